"""Downloads that are verified, leave nothing half-written, and say what to bring where there is no network."""

import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path

MIRROR_TIMEOUT = 60  # seconds of silence after which the next mirror is asked
TRIES = 2  # of each mirror
PAUSE = 2.0  # seconds before the second
NOT_THERE = (401, 403, 404, 410)  # what a server says that will not say otherwise soon


def fetch(mirrors: list[str], file: str, md5: str, folder: Path, found: Callable[[], bool] = lambda: False) -> None:
    """Download ``file`` into ``folder`` from the first mirror that has it, moved there when its checksum is right.

    Mirrors that fail are asked once more, except where they say that they do not have it. Of several processes one
    downloads, and the others wait for it.

    Args:
        mirrors: Addresses that ``file`` is appended to.
        file: Its name, there and here.
        md5: Its checksum.
        folder: An existing folder.
        found: Whether another process has brought what the file is needed for, asked after it was waited for; that the
            file itself is there always counts.

    Raises:
        FileNotFoundError: No mirror gave the file; names each with its reason, and where to put the file by hand.
    """
    errors: dict[str, Exception] = {}
    with _alone(folder):
        if (folder / file).is_file() or found():
            return
        for attempt in range(TRIES):
            asked = [mirror for mirror in mirrors if getattr(errors.get(mirror), "code", None) not in NOT_THERE]
            time.sleep(PAUSE if attempt and asked else 0)
            for mirror in asked:
                try:
                    _download(mirror, file, md5, folder)
                    return
                except (OSError, HTTPException, RuntimeError, ValueError) as error:
                    errors[mirror] = error
    reasons = "\n".join(f"  {mirror}{file}: {error}" for mirror, error in errors.items())
    raise FileNotFoundError(
        f"{file} (md5 {md5}) could not be downloaded:\n{reasons}\nPut the file into {folder}, or give the folder that "
        "has it as --data.init_args.root"
    )


def _download(mirror: str, file: str, md5: str, folder: Path) -> None:
    from torchvision.datasets.utils import download_url

    # Inside the target's folder, so that the move is atomic; removed again whatever happens.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as partial, _timeout(MIRROR_TIMEOUT):
        download_url(mirror + file, partial, file, md5)
        os.replace(Path(partial) / file, folder / file)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for other processes that download into a folder; where files cannot be locked, do not."""
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # which lets the next one in


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """Limit every wait for the network; torchvision sets no limit, and a silent mirror would stop the run for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
