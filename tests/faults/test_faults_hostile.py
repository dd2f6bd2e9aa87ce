"""Files that were damaged or made to do harm: a clear error or a correct read, and nothing else happens."""

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from mutations import MIB, attack, damaged
from readers import NAMES, VOC, all_readers, tar_of

import zoo
from datamodules.cifar import parse
from datamodules.surfaces import read_pickled_points
from datamodules.voc import unpack
from zoo.running.checkpoint import read_checkpoint
from zoo.weights import read_weights

OUTSIDE = Path(tempfile.gettempdir()) / "zoo_outside"  # where an archive must not get to
MUTATIONS = 2000
FEW = 20  # of each reader, in the tests that run always


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """Made once, in a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("sound"))
        return all_readers()


def refused_or_read(reader, folder, contents, count):
    outcomes, wrong = attack(reader, folder, contents)
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong)
    assert sum(outcomes.values()) == count
    return outcomes


def test_a_few_damaged_files_of_every_kind(readers, tmp_path):
    assert sorted(readers) == sorted(NAMES)
    for number, reader in enumerate(readers.values()):
        (tmp_path / str(number)).mkdir()
        refused_or_read(reader, tmp_path / str(number), damaged(reader, FEW), FEW)


@pytest.mark.faults
@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_end_in_a_clear_error_or_a_correct_read(name, readers, tmp_path):
    outcomes = refused_or_read(readers[name], tmp_path, damaged(readers[name], MUTATIONS), MUTATIONS)
    assert outcomes["ValueError"] + outcomes["RecipeError"] > MUTATIONS / 50, outcomes


# Files that claim what they do not have


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def jpeg(sound: bytes, width: int, height: int) -> bytes:
    place = next(sound.index(mark) for mark in (b"\xff\xc0", b"\xff\xc2") if mark in sound)
    return sound[: place + 5] + struct.pack(">HH", height, width) + sound[place + 9 :]


def bmp(sound: bytes, width: int, height: int) -> bytes:
    return sound[:18] + struct.pack("<ii", width, height) + sound[26:]


def safetensors(header: dict, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(64)


def arguments(architecture: str = "LeNet", text: str | None = None, **given) -> bytes:
    words = json.dumps(given) if text is None else text
    told = {"class_path": f"zoo.{architecture}", "arguments": words, "class_names": "[]", "format": "1"}
    tensor = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
    return safetensors({"__metadata__": told, "head.weight": tensor})


def packed_checkpoint(sound: bytes, size: int) -> bytes:
    """The same checkpoint with a part that unpacks to so many bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(sound)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, bytes(size) if name.endswith("data/0") else old.read(name))
    return file.getvalue()


def checkpoint(*extra: object) -> bytes:
    """What a run of LeNet leaves, and something else."""
    file = io.BytesIO()
    torch.save({"state_dict": zoo.LeNet(image_size=8).state_dict(), "zoo": {}, "extra": extra}, file)
    return file.getvalue()


def expanded(**arguments) -> bytes:
    """A checkpoint of tensors that are each one number, said to be many."""
    with torch.device("meta"):
        model = zoo.FullyConnectedNet(**arguments)
    state = {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in model.state_dict().items()}
    file = io.BytesIO()
    torch.save({"state_dict": state, "zoo": {"class_path": "zoo.FullyConnectedNet", "arguments": arguments}}, file)
    return file.getvalue()


def header(size: int, kind: bytes) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.USTAR_FORMAT)


def longheaded(kind: bytes) -> bytes:
    """An archive with a header that goes on for a gigabyte, in a megabyte."""
    return gzip.compress(header(2**30, kind)) + gzip.compress(bytes(2**26)) * 16


def chained(kind: bytes) -> bytes:
    """An archive of headers that each say that another one follows."""
    return gzip.compress((header(2**16, kind) + b"19 path=aaaaaaaaaaa\n".ljust(2**16, b"x")) * 400)


def sparse_of_gnu() -> bytes:
    """A member with a list of its parts that never ends."""
    first = bytearray(header(0, tarfile.GNUTYPE_SPARSE))
    first[482] = 1  # the list goes on
    first[148:156] = b"%06o\0 " % (256 + sum(first[:148]) + sum(first[156:512]))
    part = b"0" * 11 + b"\0" + b"00000000001\0"
    return gzip.compress(bytes(first)) + gzip.compress((part * 21 + b"\1").ljust(512, b"\0") * 2**16) * 32


def sparse_of_pax() -> bytes:
    """The same as a number of numbers, at the start of the content."""
    told = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n".ljust(512, b"\0")
    start = header(44, tarfile.XHDTYPE) + told + header(2**30, tarfile.REGTYPE) + b"536870000\n"
    return gzip.compress(start) + gzip.compress(b"1\n" * 2**25) * 16


def idx(*sizes: int) -> bytes:
    return struct.pack(f">BBBB{len(sizes)}I", 0, 0, 8, len(sizes), *sizes) + bytes(100)


LAUGHS = "".join(f'<!ENTITY l{k + 1} "{f"&l{k};" * 10}">' for k in range(9))
CLAIMS = {
    ("jpg", "sides"): lambda r: jpeg(r.content, 65500, 65500),
    ("jpg", "just below the limit"): lambda r: jpeg(r.content, 13000, 13000),
    ("small.jpg", "sides"): lambda r: jpeg(r.content, 65500, 2700),
    ("png", "sides"): lambda _: png(2**31 - 1, 2**31 - 1),
    ("png", "just below the limit"): lambda _: png(13000, 13000),
    ("rendering", "just below the limit"): lambda _: png(13000, 13000),
    ("bmp", "sides"): lambda r: bmp(r.content, 2**30, 2**30),
    ("ppm", "sides"): lambda _: b"P6 100000 100000 255\n" + bytes(100),
    ("ppm", "just below the limit"): lambda _: b"P6 13000 13000 255\n" + bytes(100),
    ("safetensors", "header"): lambda _: safetensors({}, 2**60),
    ("safetensors", "tensor"): lambda _: safetensors(
        {"a": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}
    ),
    ("safetensors", "image_size"): lambda _: arguments(image_size=20000),
    ("safetensors", "classes"): lambda _: arguments(num_classes=10**10),
    ("safetensors", "layers"): lambda _: arguments("PreActResNet", blocks_per_stage=10**8),
    ("safetensors", "frames"): lambda _: arguments("SlowFast", frames=8 * 10**9),
    ("safetensors", "nested"): lambda _: arguments(text="[" * 10**6),
    ("safetensors", "digits"): lambda _: arguments(text='{"num_classes": ' + "9" * 5000 + "}"),
    ("checkpoint", "expanded"): lambda _: expanded(hidden=[10**6]),
    ("checkpoint", "bytes"): lambda _: checkpoint(Runs(bytearray, 2**40)),
    ("checkpoint", "packed"): lambda r: packed_checkpoint(r.content, 2**26),
    ("idx", "sizes"): lambda _: idx(2**32 - 1, 2**32 - 1, 2**32 - 1),
    ("idx.gz", "packed"): lambda _: gzip.compress(bytes(MIB)) * 512,
    ("cifar", "memo"): lambda _: b"\x80\x02]r" + struct.pack("<I", 2**31) + b".",
    ("cifar", "bytes"): lambda _: b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b"xx.",
    ("cifar", "frame"): lambda _: b"\x80\x05\x95" + struct.pack("<Q", 2**36) + b"xx.",
    ("cifar.tar.gz", "packed"): lambda _: tar_of({"cifar-10-batches-py/data_batch_1": bytes(2**26)}),
    ("cifar.tar.gz", "pax header"): lambda _: longheaded(tarfile.XHDTYPE),
    ("cifar.tar.gz", "long name"): lambda _: longheaded(tarfile.GNUTYPE_LONGNAME),
    ("cifar.tar.gz", "chained headers"): lambda _: chained(tarfile.XHDTYPE),
    ("cifar.tar.gz", "sparse"): lambda _: sparse_of_gnu(),
    ("cifar.tar.gz", "sparse in pax"): lambda _: sparse_of_pax(),
    ("cifar.tar.gz", "empty members"): lambda _: gzip.compress(header(0, tarfile.REGTYPE) * 2**10) * 2**9,
    ("dat", "memo"): lambda _: b"\x80\x02]r" + struct.pack("<I", 2**31) + b".",
    ("dat", "bytes"): lambda _: b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b"xx.",
    ("obj", "face"): lambda r: r.content + b"f 1 2 99999999999\n",
    ("obj", "numbers"): lambda r: r.content.replace(b"v 1 0 0", b"v 1e400 nan 0"),
    ("coco", "nested"): lambda _: b'{"images": [], "annotations": [], "categories": ' + b"[" * 10**6,
    ("coco masks", "far"): lambda r: r.content.replace(b"[2, 3, 12, 3,", b"[2, 3, 1e308, 3,"),
    ("coco masks", "far by size"): lambda r: r.content.replace(b"[2, 3, 12, 3,", b"[2, 3, 1e8, 3,"),
    ("coco masks", "size"): lambda r: r.content.replace(b'"height": 24', b'"height": 1000000000'),
    ("voc", "laughs"): lambda _: f"<!DOCTYPE a [<!ENTITY l0 'ha'>{LAUGHS}]><annotation>&l9;</annotation>".encode(),
    ("voc", "size"): lambda _: VOC.replace(">24<", f">{'9' * 5000}<").encode(),
    ("recipe", "laughs"): lambda _: (
        b"a0: &a0 x\n"
        + b"".join(b"a%d: &a%d [%s]\n" % (k + 1, k + 1, b", ".join([b"*a%d" % k] * 10)) for k in range(12))
    ),
    ("voc.tar", "pax header"): lambda _: longheaded(tarfile.XHDTYPE),
    ("voc.tar", "pax header for all"): lambda _: longheaded(tarfile.XGLTYPE),
    ("voc.tar", "long link"): lambda _: longheaded(tarfile.GNUTYPE_LONGLINK),
    ("voc.tar", "chained headers"): lambda _: chained(tarfile.XHDTYPE),
    ("voc.tar", "chained names"): lambda _: chained(tarfile.GNUTYPE_LONGNAME),
    ("voc.tar", "sparse"): lambda _: sparse_of_gnu(),
    ("voc.tar", "sparse in pax"): lambda _: sparse_of_pax(),
    ("voc.tar", "packed"): lambda _: tar_of({"VOCdevkit/VOC2007/JPEGImages/1.jpg": bytes(2**24)}),
}


@pytest.mark.parametrize("claim", CLAIMS, ids=" ".join)
def test_what_a_file_claims_is_neither_believed_nor_made_room_for(claim, readers, tmp_path):
    reader = readers[claim[0]]
    began = time.monotonic()
    refused_or_read(reader, tmp_path, [CLAIMS[claim](reader)], 1)
    assert time.monotonic() - began < 60


NOT_STORED = {
    "expanded": lambda: torch.zeros(1).expand(2**62, 1),
    "expanded, many": lambda: [torch.zeros(1).expand(10**5) for _ in range(10)],
    "sparse": lambda: torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1), (2**40,)),
    "sparse, made empty": lambda: Runs(torch.sparse.FloatTensor, torch.Size([2**40])),
    "nowhere": lambda: torch.empty(2**40, device="meta"),
    "made empty": lambda: Runs(torch.Tensor, 2**32),
    "bytes": lambda: Runs(bytearray, 2**24),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kind", NOT_STORED)
def test_a_tensor_that_is_not_stored_is_refused(kind, old):
    content = {"a.weight": torch.ones(2), "more": [NOT_STORED[kind]()]}
    torch.save(content, "w.pt", _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match=r"w\.pt is (refused|truncated)"):
        read_checkpoint("w.pt")


def test_tensors_that_share_what_is_stored_are_read():
    tied = torch.rand(1000)
    torch.save({"a": tied, "b": [tied] * 5, "parts": list(tied.view(10, 100)), "few": torch.ones(1).expand(8)}, "w.pt")
    found = read_checkpoint("w.pt")
    assert torch.equal(found["a"], tied)
    assert torch.equal(found["b"][4], tied)
    assert torch.equal(torch.cat(found["parts"]), tied)


# Code


class Runs:
    """Does something when it is unpickled."""

    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


HARM = {
    "os.system": Runs(os.system, "touch marker"),
    "eval": Runs(eval, "open('marker', 'w')"),
    "open": Runs(open, "marker", "w"),
    "torch.load": Runs(torch.load, "marker"),
    "getattr": Runs(getattr, os, "system"),
}


def as_checkpoint(harm, path):
    torch.save({"state_dict": {}, "x": harm}, path)


def as_old_checkpoint(harm, path):
    torch.save({"state_dict": {}, "x": harm}, path, _use_new_zipfile_serialization=False)


def as_pickle(harm, path):
    path.write_bytes(pickle.dumps({"data": harm, "labels": [1]}))


FORMS = {
    "x.ckpt": (as_checkpoint, read_checkpoint),
    "x.pth": (as_old_checkpoint, read_weights),
    "x.pt": (as_pickle, read_weights),
    "00.dat": (as_pickle, read_pickled_points),
    "data_batch_1": (as_pickle, lambda path: parse(path.read_bytes(), path, 10)),
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("form", FORMS)
def test_a_file_never_runs_anything(form, harm):
    write, read = FORMS[form]
    try:
        write(HARM[harm], Path(form))
    except (TypeError, AttributeError, pickle.PicklingError):
        pytest.skip("it cannot be written in this form")
    Path("marker").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=form):
        read(Path(form))
    assert not Path("marker").exists()


def test_the_harm_is_done_where_nobody_refuses():
    as_checkpoint(HARM["os.system"], "x.ckpt")
    torch.load("x.ckpt", weights_only=False)
    assert Path("marker").exists()


# Archives


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.mode = kind, link, size, 0o4777
    return info


INSIDE = "VOCdevkit/VOC2007/"
MEMBERS = {
    "above": [member("../outside")],
    "above, from inside": [member(f"{INSIDE}../../../outside")],
    "absolute": [member(str(OUTSIDE))],
    "symlink": [member(f"{INSIDE}Annotations/1.xml", tarfile.SYMTYPE, "/etc/passwd")],
    "symlink, and a file through it": [
        member(f"{INSIDE}JPEGImages", tarfile.SYMTYPE, "../../../.."), member(f"{INSIDE}JPEGImages/outside"),
    ],
    "hard link": [member(f"{INSIDE}1.xml", tarfile.LNKTYPE, "../../outside")],
    "hard link to what is there": [member(f"{INSIDE}1.xml", tarfile.LNKTYPE, "/etc/passwd")],
    "character device": [member(f"{INSIDE}null", tarfile.CHRTYPE)],
    "block device": [member(f"{INSIDE}disk", tarfile.BLKTYPE)],
    "pipe": [member(f"{INSIDE}pipe", tarfile.FIFOTYPE)],
}  # fmt: skip


@pytest.mark.parametrize("packing", ["", "gz", "xz"])
@pytest.mark.parametrize("case", MEMBERS)
def test_an_archive_writes_nothing_but_plain_files_in_its_folder(case, packing, tmp_path):
    root = tmp_path / "a" / "b" / "root"
    root.mkdir(parents=True)
    with tarfile.open(root / "VOC.tar", f"w:{packing}") as archive:
        for info in [member(f"{INSIDE}Annotations/first.xml"), *MEMBERS[case]]:
            archive.addfile(info)
    harmless = case in ("above", "absolute")  # outside of the part that is unpacked: left where it is
    if harmless:
        unpack(root / "VOC.tar", INSIDE, root / "VOC2007")
    else:
        with pytest.raises(ValueError, match=r"VOC\.tar (is refused|cannot be unpacked)"):
            unpack(root / "VOC.tar", INSIDE, root / "VOC2007")
    written = {path.relative_to(tmp_path / "a" / "b").as_posix() for path in (tmp_path / "a").rglob("*")}
    allowed = {".", "root", "root/VOC.tar"}
    if harmless:
        allowed |= {"root/VOC2007", "root/VOC2007/Annotations", "root/VOC2007/Annotations/first.xml"}
    assert {path for path in written if not path.startswith("..")} <= allowed
    assert not list(tmp_path.rglob("outside"))
    assert not OUTSIDE.exists()


def test_an_archive_that_is_sound_is_unpacked_as_it_is(tmp_path):
    files = {f"{INSIDE}Annotations/1.xml": b"one", f"{INSIDE}ImageSets/Main/train.txt": b"1\n", "readme": b"no"}
    (tmp_path / "VOC.tar").write_bytes(gzip.decompress(tar_of(files)))
    unpack(tmp_path / "VOC.tar", INSIDE, tmp_path / "VOC2007")
    found = {p.relative_to(tmp_path / "VOC2007").as_posix(): p.read_bytes() for p in tmp_path.rglob("*.[tx]*") if
             p.is_file() and p.name != "VOC.tar"}  # fmt: skip
    assert found == {name.removeprefix(INSIDE): content for name, content in files.items() if name != "readme"}


def test_the_limit_of_memory_is_one(readers, tmp_path):
    """A reader that believes a file is found out."""
    reader = readers["idx"]
    believes = type(reader)(reader.file, reader.content, lambda path: np.ones(2**28 // path.stat().st_size).sum())
    outcomes, wrong = attack(believes, tmp_path, [b"x"])
    assert not outcomes["read"]
    assert "MemoryError" in wrong[0]
