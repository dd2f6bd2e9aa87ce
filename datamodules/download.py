"""Downloads that are verified, leave nothing half-written, and say what to bring where there is no network."""

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

MIRROR_TIMEOUT = 60  # seconds of silence after which the next mirror is asked


def fetch(mirrors: list[str], file: str, md5: str, folder: Path) -> None:
    """Download ``file`` into ``folder`` from the first mirror that has it, moved there when its checksum is right.

    Args:
        mirrors: Addresses that ``file`` is appended to.
        file: Its name, there and here.
        md5: Its checksum.
        folder: An existing folder.

    Raises:
        FileNotFoundError: No mirror gave the file; names each with its reason, and where to put the file by hand.
    """
    from torchvision.datasets.utils import download_url

    errors = []
    for mirror in mirrors:
        # Inside the target's folder, so that the move is atomic; removed again whatever happens.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as partial, _timeout(MIRROR_TIMEOUT):
            try:
                download_url(mirror + file, partial, file, md5)
            except (OSError, HTTPException, RuntimeError, ValueError) as error:
                errors.append(f"  {mirror}{file}: {error}")
                continue
            os.replace(Path(partial) / file, folder / file)
            return
    reasons = "\n".join(errors)
    raise FileNotFoundError(
        f"{file} (md5 {md5}) could not be downloaded:\n{reasons}\nPut the file into {folder}, or give the folder that "
        "has it as --data.init_args.root"
    )


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """Limit every wait for the network; torchvision sets no limit, and a silent mirror would stop the run for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
