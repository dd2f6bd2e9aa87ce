"""Files that others published are downloaded: tried again, verified, and there whole or not at all."""

import hashlib
import os
import shutil
import tempfile
import time
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO
from urllib.request import Request, urlopen

SILENCE = 60  # seconds after which a server that says nothing has failed
SLOWEST = 1000  # bytes a second, on average over as many seconds: a slow telephone line brings more
CHUNK = 1 << 16  # bytes
PAUSE = 2.0  # seconds before the second try


def download(url: str, path: Path, sha256: str) -> None:
    """Bring a file, moved to its place when its checksum is right.

    It is tried twice, unless the server says that it has no such file. A server that says nothing for a minute has
    failed, and so has one that brings less than 1,000 bytes a second for a minute, however often it sends a byte; a
    whole file may take as long as it needs. What a killed process left of it is removed first.

    Args:
        url: Its address.
        path: Where to; the folder exists, and no other process downloads the file: the caller has locked it.
        sha256: The checksum, or its first digits.

    Raises:
        OSError: It cannot be brought, or is not the file that was asked for.
    """
    for pause in (PAUSE, None):
        try:
            _download(url, path, sha256)
            return
        except (OSError, HTTPException) as error:
            if pause is None or getattr(error, "code", None) in (401, 403, 404, 410):
                raise OSError(str(error) or type(error).__name__) from error
            time.sleep(pause)


def _download(url: str, path: Path, sha256: str) -> None:
    for stale in path.parent.glob(f".download-{path.name}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    # Inside the target's folder, so that the move is atomic; removed again whatever happens.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".download-{path.name}-") as partial:
        target = Path(partial) / path.name
        request = Request(url, headers={"User-Agent": "zoo"})
        with urlopen(request, timeout=SILENCE) as answer, open(target, "wb") as copy:
            found = _copy(answer, copy)
            size = copy.tell()
        if not found.startswith(sha256):
            raise OSError(f"invalid hash value: what came, {size:,} bytes, has {found}, expected {sha256}")
        os.replace(target, path)


def _copy(answer: HTTPResponse, copy: BinaryIO) -> str:
    """Write what a server sends as it comes, and give its checksum.

    Raises:
        TimeoutError: It falls silent, or trickles: the limit of a wait alone would let a byte a minute pass for ever.
    """
    found = hashlib.sha256()
    total = answer.length
    came, before, began = 0, 0, time.monotonic()
    # read1 gives what is there, where read would wait for the whole chunk. Some servers do not close at the end.
    while came != total and (part := answer.read1(CHUNK)):
        copy.write(part)
        found.update(part)
        came += len(part)
        if (seconds := time.monotonic() - began) > SILENCE:
            if came - before < SLOWEST * seconds:
                raise TimeoutError(f"too slow: {came - before:,} bytes in {seconds:.0f} seconds")
            before, began = came, time.monotonic()
    return found.hexdigest()
