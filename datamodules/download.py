"""Downloads that are verified, leave nothing half-written, and say what to bring where there is no network.

What is in a downloaded archive is read by :func:`members_of`.
"""

import hashlib
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

MIRROR_TIMEOUT = 60  # seconds of silence after which the next mirror is asked
SLOWEST = 1000  # bytes a second, on average over as many seconds: a slow telephone line brings more
CHUNK = 1 << 16  # bytes
TRIES = 2  # of each mirror
PAUSE = 2.0  # seconds before the second
# Headers of a tar file with a content, which tarfile reads whole, and the bytes that it may have: a path has 4,096.
EXTENDED = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
LONGEST_HEADER = 2**16
NOT_THERE = (401, 403, 404, 410)  # what a server says that will not say otherwise soon


def fetch(mirrors: list[str], file: str, md5: str, folder: Path, found: Callable[[], bool] = lambda: False) -> None:
    """Download ``file`` into ``folder`` from the first mirror that has it, moved there when its checksum is right.

    Mirrors that fail are asked once more, except where they say that they do not have it. One that says nothing for a
    minute has failed, and so has one that brings less than 1,000 bytes a second for a minute, however often it sends a
    byte; a whole file may take as long as it needs. Of several processes one downloads, and the others wait for it.

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
    with alone(folder, ".download-*"):
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
    # Inside the target's folder, so that the move is atomic; removed again whatever happens.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as partial:
        target = Path(partial) / file
        with (
            urlopen(Request(mirror + file, headers={"User-Agent": "zoo"}), timeout=MIRROR_TIMEOUT) as answer,
            open(target, "wb") as copy,
        ):
            found = hashlib.md5(usedforsecurity=False)
            for part in _parts(answer, file):
                copy.write(part)
                found.update(part)
            size = copy.tell()
        if found.hexdigest() != md5:
            raise ValueError(f"what came, {size:,} bytes, is not the file: its md5 is {found.hexdigest()}")
        os.replace(target, folder / file)


def _parts(answer: HTTPResponse, file: str) -> Iterator[bytes]:
    """What a mirror sends, as it comes, with a bar in a terminal.

    Raises:
        TimeoutError: It falls silent, or trickles: the limit of a wait alone would let a byte a minute pass for ever.
    """
    from tqdm import tqdm  # Lightning brings it

    total = answer.length
    came, before, began = 0, 0, time.monotonic()
    with tqdm(desc=file, total=total, unit="B", unit_scale=True, disable=None) as bar:
        # read1 gives what is there, where read would wait for the whole chunk. Some servers do not close at the end.
        while came != total and (part := answer.read1(CHUNK)):
            yield part
            came += len(part)
            bar.update(len(part))
            if (seconds := time.monotonic() - began) > MIRROR_TIMEOUT:
                if came - before < SLOWEST * seconds:
                    raise TimeoutError(f"too slow: {came - before:,} bytes in {seconds:.0f} seconds")
                before, began = came, time.monotonic()


@contextmanager
def alone(folder: Path, leftovers: str) -> Iterator[None]:
    """Wait for other processes that write into a folder in the same way; where files cannot be locked, do not.

    Args:
        folder: Existing.
        leftovers: Pattern of the folders for what is half-written. Those there are of processes that were killed, since
            no other one is at work, and are removed.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems
            fcntl.flock(handle, fcntl.LOCK_EX)
            for stale in folder.glob(leftovers):
                shutil.rmtree(stale, ignore_errors=True)
        yield
    finally:
        os.close(handle)  # which lets the next one in


class Member(tarfile.TarInfo):
    """A member of an archive whose headers are short: tarfile makes room for whatever they unpack to."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Member":
        """Read a header.

        Raises:
            tarfile.ReadError: A longer one follows, or a list of the parts of a sparse file.
        """
        member = super().frombuf(buf, encoding, errors)
        if member.type == tarfile.GNUTYPE_SPARSE or (member.type in EXTENDED and member.size > LONGEST_HEADER):
            raise tarfile.ReadError(f"a header that takes {member.size:,} bytes, or a sparse file")
        return member

    def _proc_gnusparse_10(self, *_: Any) -> None:  # the same list in the other format, which frombuf does not see
        raise tarfile.ReadError("a sparse file")


def members_of(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of an archive that was opened with ``tarinfo=Member``; each is forgotten when the next is read."""
    while (member := archive.next()) is not None:
        yield member
        archive.members.clear()  # type: ignore[attr-defined]  # of nothing there may be millions
        archive.pax_headers.clear()  # type: ignore[attr-defined]
