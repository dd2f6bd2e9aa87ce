"""Damaged copies of files, seeded, and a process with little memory in which readers are given them."""

import copy
import json
import logging
import math
import multiprocessing
import os
import random
import re
import resource
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

MIB = 2**20
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**40, 2**63 - 1, 2**64 - 1)
WORDS = [
    b"null", b"true", b"-1", b"0", b"1e309", b"-1e309", b"NaN", b"nan", b"1.5", b"99999999999999999999", b"9" * 5000,
    b'""', b'"x"', b"[]", b"{}", b"[[[]]]", b'"\\ud800"', b"../../x", b"\xff\xfe", b"[" * 20000, b"%s%n",
]  # fmt: skip


def mutate(content: bytes, seed: int) -> bytes:
    """A copy with one to four kinds of damage: bits, lengths, parts that are missing, doubled or moved, other words."""
    rng = random.Random(seed)
    if content[:1] in (b"{", b"<") and rng.random() < 0.7:  # damage that its parser does not notice
        return (_json if content[:1] == b"{" else _xml)(content, rng)
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if data:
            rng.choice(DAMAGE)(data, rng)
    return bytes(data)


def _flip(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _byte(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] = rng.choice((0, 1, 0x20, 0x7F, 0x80, 0xFE, 0xFF))


def _header(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(min(64, len(data)))] = rng.randrange(256)


def _length(data: bytearray, rng: random.Random) -> None:
    """What may be a size says another one."""
    size = rng.choice((2, 4, 8))
    value = rng.choice(EXTREMES) % 256**size
    place = rng.randrange(max(1, len(data) - size))
    if rng.random() < 0.5:  # where sizes mostly are
        place = min(place, rng.randrange(64))
    data[place : place + size] = value.to_bytes(size, rng.choice(("little", "big")))


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def _drop(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.choice((1, 2, 3, 16, 200))]


def _double(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    part = data[start : start + rng.choice((1, 4, 40, 400))]
    data[start:start] = part * rng.choice((1, 1, 50))


def _zeros(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice((4, 64, 1000)))
    data[start:end] = bytes(end - start)


def _noise(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    data[start:start] = rng.randbytes(rng.choice((1, 8, 100)))


def _word(data: bytearray, rng: random.Random) -> None:
    """A number, text or name of a text file becomes something else."""
    found = list(re.finditer(rb'"[^"]*"|-?\d+(?:\.\d+)?|\w+', bytes(data[:20000])))
    if found:
        match = rng.choice(found)
        data[match.start() : match.end()] = rng.choice(WORDS)


VALUES = (
    None, True, False, -1, 0, 1, 2, 3, 0.5, math.inf, -math.inf, math.nan, 1e308, -1e308, 2**31, 2**63, -(2**63),
    10**400, "", "x", "1", "\ud800", "\0", "../../x", "/etc/passwd", "x" * 10000, [], [0], [[]], {}, {"id": 1}, [1, 2],
    [None] * 4, [math.nan] * 4, [1e308] * 4, [-5, -5, 3, 3], [1, 1, -2, 2], [[1, 2, 3, 4, 5, 6]], [[1e300] * 6],
    {"size": [24, 32]}, {"size": [24, 32], "counts": "x"}, {"size": [10**6, 10**6], "counts": [10**12]},
    {"size": [24, 32], "counts": [768, 0]},
)  # fmt: skip


def _json(content: bytes, rng: random.Random) -> bytes:
    """Of a json file some values are others, are missing, or are there twice."""
    whole = json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        holders = [part for part in _holders(whole) if part]
        if not holders:
            break
        holder = rng.choice(holders)
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        what = rng.random()
        if what < 0.7:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif what < 0.9:
            del holder[key]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        else:
            holder["other"] = holder.pop(key)
    return json.dumps(whole).encode()


def _holders(part: object) -> Iterator[object]:
    if isinstance(part, dict | list):
        yield part
        for child in part.values() if isinstance(part, dict) else part:
            yield from _holders(child)


def _xml(content: bytes, rng: random.Random) -> bytes:
    """Of an xml file some texts are others, or elements are missing or called otherwise."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        found = list(re.finditer(rb"<(\w+)>([^<]*)</\w+>", content))
        if not found:
            break
        match = rng.choice(found)
        value = str(rng.choice(VALUES)).replace("\0", "").encode(errors="replace")
        other = rng.choice((b"", b"<%s>%s</%s>" % (match[1], value, match[1]), match[0] * 2, b"<other>1</other>"))
        content = content[: match.start()] + other + content[match.end() :]
    return content


DAMAGE = (_flip, _byte, _header, _length, _length, _cut, _drop, _double, _zeros, _noise, _word, _word)


class Reader:
    """What reads a kind of file.

    Args:
        file: Its name, which an error must have.
        content: A sound file.
        read: Reads it.
        check: Holds what was read to what a correct read is.
        others: Files beside it, by name.
        named: What an error must name, one of these; by default the file.
    """

    def __init__(
        self,
        file: str,
        content: bytes,
        read: Callable[[Path], object],
        check: Callable[[object], bool] | None = None,
        others: dict[str, bytes] | None = None,
        named: tuple[str, ...] = (),
    ) -> None:
        self.file = file
        self.content = content
        self.read = read
        self.check = check
        self.others = others or {}
        self.named = named or (file,)


def damaged(reader: Reader, count: int) -> Iterator[bytes]:
    """So many damaged copies of a reader's sound file, each by its seed."""
    return (mutate(reader.content, seed) for seed in range(count))


def attack(
    reader: Reader, folder: Path, contents: Iterable[bytes], room: int = 768 * MIB
) -> tuple[Counter[str], list[str]]:
    """Give a reader files in a process of its own, which may take so many bytes more than it has.

    Returns:
        How many ended in which error, or were ``read``; and what was no clear error, with the number of the file.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_attacked, args=(theirs, reader, folder, contents, room))
    process.start()
    theirs.close()
    seed, outcomes, wrong = -1, Counter(), []
    for message in _messages(ours):
        if isinstance(message, int):
            seed = message
        else:
            outcomes, wrong = message
    process.join()
    if process.exitcode:
        wrong.append(f"seed {seed}: the process died with status {process.exitcode}")
    return outcomes, wrong


def _messages(pipe: "multiprocessing.connection.Connection") -> Iterator[object]:
    while True:
        try:
            yield pipe.recv()
        except EOFError:
            return


def _attacked(pipe, reader: Reader, folder: Path, contents: Iterable[bytes], room: int) -> None:
    warnings.simplefilter("ignore")
    logging.disable()
    os.chdir(folder)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + room, now + room))
    path = folder / reader.file
    for name, content in {**reader.others, reader.file: reader.content}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    there = set(folder.rglob("*"))
    _judge(reader, path)  # a sound file is read
    before = peak()
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    for seed, content in enumerate(contents):
        path.write_bytes(content)
        pipe.send(seed)
        try:
            outcomes[_judge(reader, path)] += 1
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            wrong.append(f"seed {seed}: {type(error).__name__}: {error!s:.300} ({where.filename}:{where.lineno})")
        if peak() - before > room / 2:
            wrong.append(f"seed {seed}: {(peak() - before) // MIB} MiB were taken")
            break
        if len(wrong) >= 20:
            break
    if left := set(folder.rglob("*")) - there:
        wrong.append(f"it wrote {sorted(map(str, left))}")
    pipe.send((outcomes, wrong))


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _judge(reader: Reader, path: Path) -> str:
    """``read``, or the name of a clear error; anything else is raised."""
    try:
        found = reader.read(path)
    except (ValueError, FileNotFoundError, OSError) as error:
        # ValueError's own subclasses are what Python says of text that is none, not what a reader says of a file.
        if type(error) is ValueError or type(error).__module__.split(".")[0] in ("zoo", "datamodules"):
            if not any(name in str(error) for name in reader.named):
                raise AssertionError(f"it does not name the file: {error}") from error
            return type(error).__name__
        if type(error) is FileNotFoundError:  # a picture that the file names
            return type(error).__name__
        raise
    if reader.check is not None and not reader.check(found):
        raise AssertionError(f"it was read as {found!r:.300}")
    return "read"
