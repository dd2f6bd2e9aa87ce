import hashlib
import io
import os
import pickle
import re
import runpy
import struct
import tarfile
import threading
import warnings
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from datamodules import CIFAR10DataModule, CIFAR100DataModule, cifar

MODULES = {"CIFAR10": CIFAR10DataModule, "CIFAR100": CIFAR100DataModule}
CLASSES = {"CIFAR10": 10, "CIFAR100": 100}
TRAIN = {"CIFAR10": [f"data_batch_{i}" for i in range(1, 6)], "CIFAR100": ["train"]}
TEST = {"CIFAR10": "test_batch", "CIFAR100": "test"}
FOLDERS = {
    "CIFAR10": {"python": "cifar-10-batches-py", "binary": "cifar-10-batches-bin"},
    "CIFAR100": {"python": "cifar-100-python", "binary": "cifar-100-binary"},
}
ARCHIVES = {
    "CIFAR10": {"python": "cifar-10-python.tar.gz", "binary": "cifar-10-binary.tar.gz"},
    "CIFAR100": {"python": "cifar-100-python.tar.gz", "binary": "cifar-100-binary.tar.gz"},
}

# What the small stand-ins are warned about; tested by itself below.
not_official = pytest.mark.filterwarnings("ignore:.*differ from the official files")
both = pytest.mark.parametrize("data_set", MODULES)


# Small stand-ins for the official files


def small_arrays(data_set):
    """Pictures (N, 3072), labels and coarse labels by file name: seven in each training file, five in the other."""
    generator = np.random.default_rng(0)
    arrays = {}
    for name in [*TRAIN[data_set], TEST[data_set]]:
        count = 5 if name == TEST[data_set] else 7
        pictures = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        arrays[name] = pictures, generator.integers(0, CLASSES[data_set], count), generator.integers(0, 20, count)
    return arrays


def expected(data_set, train):
    arrays = small_arrays(data_set)
    names = TRAIN[data_set] if train else [TEST[data_set]]
    pictures = np.concatenate([arrays[name][0] for name in names])
    return pictures.reshape(-1, 3, 32, 32), np.concatenate([arrays[name][1] for name in names])


def as_dictionary(data_set, name):
    pictures, labels, coarse = small_arrays(data_set)[name]
    files = [f"{i}.png".encode() for i in range(len(labels))]
    batch = {b"data": pictures, b"batch_label": b"a batch", b"filenames": files}
    if data_set == "CIFAR10":
        return {**batch, b"labels": labels.tolist()}
    return {**batch, b"fine_labels": labels.tolist(), b"coarse_labels": coarse.tolist()}


def python2(value):
    """The opcodes of pickle protocol 2 as Python 2 writes them: its text is what Python 3 calls bytes."""
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(key) + python2(entry) for key, entry in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(python2, value)) + b"e"
    if isinstance(value, bytes):
        return b"T" + struct.pack("<I", len(value)) + value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"(" + b"".join(map(python2, value.shape)) + b"t"
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    return empty + b"(K\x01" + shape + dtype + b"\x89" + python2(value.tobytes()) + b"tb"


def official_pickle(batch):
    return b"\x80\x02" + python2(batch) + b"."


def text_pickle(protocol, batch):
    """As Python 3 would write it, with text for keys."""
    return pickle.dumps({key.decode(): value for key, value in batch.items()}, protocol=protocol)


def fortran_pickle(batch):
    return text_pickle(4, {**batch, b"data": np.asfortranarray(batch[b"data"])})


def python_files(data_set, dump=official_pickle):
    return {name: dump(as_dictionary(data_set, name)) for name in small_arrays(data_set)}


def binary_files(data_set):
    contents = {}
    for name, (pictures, labels, coarse) in small_arrays(data_set).items():
        before = [labels] if data_set == "CIFAR10" else [coarse, labels]
        columns = [column[:, None].astype(np.uint8) for column in before]
        contents[f"{name}.bin"] = np.concatenate([*columns, pictures], axis=1).tobytes()
    return contents


def files_of(data_set, version):
    return python_files(data_set) if version == "python" else binary_files(data_set)


def write_folder(folder, contents):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def archive_of(folder, contents):
    """A .tar.gz with the files below ``folder``, in reverse order, and with a file that nobody asked for."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        directory = tarfile.TarInfo(folder)
        directory.type = tarfile.DIRTYPE
        archive.addfile(directory)
        for name, content in [*reversed(contents.items()), ("readme.html", b"<html>")]:
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_python(root, data_set):
    write_folder(root / FOLDERS[data_set]["python"], python_files(data_set))
    return root / FOLDERS[data_set]["python"]


def assert_read(data, data_set):
    for train in (True, False):
        images, labels = data.read(train)
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        pictures, classes = expected(data_set, train)
        np.testing.assert_array_equal(images.numpy(), pictures)
        np.testing.assert_array_equal(labels.numpy(), classes)


# Reading


@not_official
@both
@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize("place", ["folder", "its files", "archive", "its path"])
def test_official_versions_are_read(data_set, version, place, tmp_path):
    folder, contents = FOLDERS[data_set][version], files_of(data_set, version)
    archive = tmp_path / ARCHIVES[data_set][version]
    if place in ("archive", "its path"):
        archive.write_bytes(archive_of(folder, contents))
    else:
        write_folder(tmp_path / folder, contents)
    root = {"its files": tmp_path / folder, "its path": archive}.get(place, tmp_path)
    data = MODULES[data_set](root=str(root), download=False)
    before = sorted(tmp_path.rglob("*"))
    data.prepare_data()
    assert_read(data, data_set)
    assert sorted(tmp_path.rglob("*")) == before


@not_official
@both
@pytest.mark.parametrize("dump", [*(partial(text_pickle, protocol) for protocol in range(6)), fortran_pickle])
def test_copies_that_python_3_wrote_are_read(data_set, dump, tmp_path):
    write_folder(tmp_path, python_files(data_set, dump))
    assert_read(MODULES[data_set](root=str(tmp_path)), data_set)


@not_official
@both
def test_python_version_is_read_as_torchvision_reads_it(data_set, tmp_path, monkeypatch):
    reference = getattr(torchvision.datasets, data_set)
    monkeypatch.setattr(reference, "_check_integrity", lambda self: True)
    monkeypatch.setattr(reference, "_load_meta", lambda self: None)
    write_python(tmp_path, data_set)
    for train in (True, False):
        other = reference(str(tmp_path), train=train)
        images, labels = MODULES[data_set](root=str(tmp_path)).read(train)
        np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), other.data)
        assert labels.tolist() == other.targets


@not_official
@both
def test_pictures_may_be_changed_in_place(data_set, tmp_path):
    write_python(tmp_path, data_set)
    images, labels = MODULES[data_set](root=str(tmp_path)).read(train=False)
    images.zero_()
    labels.zero_()
    assert_read(MODULES[data_set](root=str(tmp_path)), data_set)


@both
def test_files_unlike_the_official_ones_are_read_with_one_warning_that_names_them(data_set, tmp_path):
    folder = write_python(tmp_path, data_set)
    with pytest.warns(UserWarning, match="differ from the official files") as caught:
        MODULES[data_set](root=str(tmp_path)).read(train=True)
    assert len(caught) == 1
    assert all(name in str(caught[0].message) for name in [str(folder), *TRAIN[data_set]])


@both
@pytest.mark.parametrize("version", ["python", "binary"])
def test_official_files_are_read_without_a_warning(data_set, version, tmp_path, monkeypatch):
    contents = files_of(data_set, version)
    write_folder(tmp_path, contents)
    data = MODULES[data_set](root=str(tmp_path))
    md5 = {file: hashlib.md5(content).hexdigest() for file, content in contents.items()}
    versions = [
        entry._replace(train={f: md5.get(f, "") for f in entry.train}, test={f: md5.get(f, "") for f in entry.test})
        for entry in getattr(cifar, data_set)
    ]
    monkeypatch.setattr(cifar, data_set, versions)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_read(data, data_set)


def test_checksums_are_those_of_torchvision():
    for data_set in MODULES:
        python, reference = getattr(cifar, data_set)[0], getattr(torchvision.datasets, data_set)
        assert (python.folder, python.archive) == (reference.base_folder, reference.filename)
        assert list(python.train.items()) == [tuple(entry) for entry in reference.train_list]
        assert list(python.test.items()) == [tuple(entry) for entry in reference.test_list]


@both
def test_classes_are_known_before_setup(data_set):
    module = MODULES[data_set]
    assert module.num_classes == len(module.class_names) == len(set(module.class_names)) == CLASSES[data_set]
    assert module.class_names == sorted(module.class_names)  # the official order is that of the alphabet


@not_official
@both
@pytest.mark.parametrize("there", [True, False])
def test_without_root_the_folder_of_zoo_data_is_read_where_it_holds_the_files(data_set, there, tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_DATA", str(tmp_path))
    folder = tmp_path / data_set.lower()
    folder.mkdir()
    (folder / "something.else").touch()
    if there:
        write_python(folder, data_set)
    assert MODULES[data_set]().root == (folder if there else Path("data"))


# Pickles that are none of ours


class Runs:
    """Unpickled by the pickle module, this calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_pickles(victim):
    command = f"touch {victim}"
    batch = as_dictionary("CIFAR10", "data_batch_1")
    yield "system", pickle.dumps(Runs(os.system, command))
    yield "exec", pickle.dumps({**batch, b"more": Runs(exec, f"open({str(victim)!r}, 'w')")})
    yield "open", b"cio\nopen\n(V" + str(victim).encode() + b"\nVw\ntR."  # protocol 0, written by hand
    yield "getattr", b"c__builtin__\ngetattr\n."
    yield "loadtxt", pickle.dumps(Runs(np.loadtxt, str(victim)))
    yield "_reconstruct.__globals__", b"\x80\x04\x8c\x16numpy._core.multiarray\x8c\x18_reconstruct.__globals__\x93."


NAMES = ["system", "exec", "open", "getattr", "loadtxt", "_reconstruct.__globals__"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("packed", [False, True])
def test_pickle_that_asks_for_more_than_arrays_is_refused_and_not_run(name, packed, tmp_path):
    victim = tmp_path / "victim"
    contents = {**python_files("CIFAR10"), "data_batch_1": dict(hostile_pickles(victim))[name]}
    if packed:
        archive = archive_of("cifar-10-batches-py", contents)
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(archive)
    else:
        write_folder(tmp_path, contents)
    with pytest.raises(
        ValueError, match=rf"data_batch_1 does not hold CIFAR pictures.*asks for .*{re.escape(name)},.*nothing was run"
    ):
        CIFAR10DataModule(root=str(tmp_path)).read(train=True)
    assert not victim.exists()


def test_the_hostile_pickles_do_run_where_nobody_refuses(tmp_path):
    victim = tmp_path / "victim"
    for name in ("system", "exec", "open"):
        pickle.loads(dict(hostile_pickles(victim))[name])
        assert victim.exists()
        victim.unlink()


def forged(**changes):
    """A protocol 2 pickle of an array whose description is forged."""
    parts = {
        "shape": b"J\x07\x00\x00\x00J\x00\x0c\x00\x00",
        "dtype": b"U\x02u1",
        "data": b"T\x00\x54\x00\x00" + b"x" * 21504,
    }
    parts.update(changes)
    dtype = (
        b"cnumpy\ndtype\n" + parts["dtype"] + b"K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    array = empty + b"(K\x01(" + parts["shape"] + b"t" + dtype + b"\x89" + parts["data"] + b"tb"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + python2([0] * 7) + b"u."


FORGERIES = {
    "pointers": {"dtype": b"U\x02O8"},
    "floats": {"dtype": b"U\x02f4"},
    "more than there is": {"shape": b"J\x08\x00\x00\x00J\x00\x0c\x00\x00"},
    "huge": {"shape": b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f"},
    "negative": {"shape": b"J\xff\xff\xff\xffJ\x00\x54\x00\x00"},
    "other shape": {"shape": b"J\x00\x54\x00\x00"},
    "no bytes": {"data": b"N"},
}


@not_official
def test_unchanged_forgery_is_read(tmp_path):
    write_folder(tmp_path, {**python_files("CIFAR10"), "test_batch": forged()})
    assert len(CIFAR10DataModule(root=str(tmp_path)).read(train=False)[1]) == 7


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_array_is_an_error_that_names_the_file(forgery, tmp_path):
    write_folder(tmp_path, {**python_files("CIFAR10"), "test_batch": forged(**FORGERIES[forgery])})
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "test_batch"))):
        CIFAR10DataModule(root=str(tmp_path)).read(train=False)


# Bad files. A file is named in every message.


def html(content):
    return b"<!DOCTYPE html><html><body>Access denied</body></html>"


def cut(content):
    return content[:-3]


def trailing(content):
    return content + b"\x00"


def empty(content):
    return b""


def other_data_set(content):
    return python_files("CIFAR100")["test"]


def no_dictionary(content):
    return pickle.dumps([1, 2])


def labels_are(labels):
    def damage(content):
        return text_pickle(4, {**as_dictionary("CIFAR10", "test_batch"), b"labels": labels})

    return damage


LABELS = [[0, 1, 2, 3, 10], [0, 1, 2, 3, -1], [0, 1, 2, 3], [], [0.0] * 5, ["0"] * 5, 7, [True] * 5, [2**70] * 5]
PYTHON_DAMAGE = [cut, html, empty, other_data_set, no_dictionary, *map(labels_are, LABELS)]


@pytest.mark.parametrize("damage", PYTHON_DAMAGE)
def test_damaged_python_file_is_an_error_that_names_it(damage, tmp_path):
    path = write_python(tmp_path, "CIFAR10") / "test_batch"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*fetch it again"):
        CIFAR10DataModule(root=str(tmp_path)).read(train=False)


@pytest.mark.parametrize("damage", [cut, html, trailing, empty])
@both
def test_damaged_binary_file_is_an_error_that_names_it(data_set, damage, tmp_path):
    contents = binary_files(data_set)
    name = f"{TEST[data_set]}.bin"
    write_folder(tmp_path, {**contents, name: damage(contents[name])})
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name)) + ".*fetch it again"):
        MODULES[data_set](root=str(tmp_path)).read(train=False)


@both
@pytest.mark.parametrize("excess", [0, 155])
def test_label_outside_the_classes_in_a_binary_file_is_an_error_that_names_it(data_set, excess, tmp_path):
    contents = binary_files(data_set)
    name = f"{TEST[data_set]}.bin"
    content = bytearray(contents[name])
    content[0 if data_set == "CIFAR10" else 1] = CLASSES[data_set] + excess
    write_folder(tmp_path, {**contents, name: bytes(content)})
    with pytest.raises(ValueError, match=f"{name} .*labels must lie between 0 and {CLASSES[data_set] - 1}"):
        MODULES[data_set](root=str(tmp_path)).read(train=False)


@not_official
def test_damaged_byte_is_read_as_pictures_or_is_an_error_that_names_the_file(tmp_path):
    folder = write_python(tmp_path, "CIFAR10")
    content = (folder / "test_batch").read_bytes()
    generator = np.random.default_rng(0)
    pixels = content.index(small_arrays("CIFAR10")["test_batch"][0].tobytes())
    outside = [i for i in range(len(content)) if not pixels <= i < pixels + 5 * 3072]
    outcomes = []
    for place in outside + outside:
        damaged = bytearray(content)
        damaged[place] = generator.integers(256)
        (folder / "test_batch").write_bytes(damaged)
        try:
            outcomes.append(CIFAR10DataModule(root=str(tmp_path)).read(train=False))
        except ValueError as error:
            outcomes.append(str(error))
    errors = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert len(errors) > 100
    assert all(str(folder / "test_batch") in error for error in errors)
    read = [outcome for outcome in outcomes if not isinstance(outcome, str)]
    assert all(images.shape == (len(labels), 3, 32, 32) for images, labels in read)
    assert all(labels.min() >= 0 and labels.max() <= 9 for _, labels in read)


@not_official
@both
@pytest.mark.parametrize("version", ["python", "binary"])
def test_archive_cut_anywhere_is_an_error_that_names_it(data_set, version, tmp_path):
    path = tmp_path / ARCHIVES[data_set][version]
    whole = archive_of(FOLDERS[data_set][version], files_of(data_set, version))
    for length in [0, 1, 10, 100, *range(1000, len(whole) - 2000, len(whole) // 20)]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=re.escape(str(path)) + ".*fetch it again"):
            MODULES[data_set](root=str(tmp_path)).read(train=True)


def test_archive_without_a_file_is_an_error_that_names_both(tmp_path):
    contents = python_files("CIFAR10")
    del contents["data_batch_3"]
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(archive_of("cifar-10-batches-py", contents))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} lacks cifar-10-batches-py/data_batch_3:"):
        CIFAR10DataModule(root=str(tmp_path)).read(train=True)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_archive_with_a_link_or_device_in_place_of_a_file_is_refused(kind, tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in python_files("CIFAR10"):
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.type, member.linkname = kind, str(tmp_path / "secret")
            archive.addfile(member)
    with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz lacks"):
        CIFAR10DataModule(root=str(tmp_path)).read(train=False)


# Missing files


@both
def test_missing_file_is_an_error_that_says_what_to_bring_and_where(data_set, tmp_path):
    folder = write_python(tmp_path, data_set)
    (folder / TEST[data_set]).unlink()
    data = MODULES[data_set](root=str(tmp_path), download=False)
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))) as raised:
        data.prepare_data()
    for part in (ARCHIVES[data_set]["python"], FOLDERS[data_set]["python"], TEST[data_set], "download true"):
        assert part in str(raised.value)
    with pytest.raises(FileNotFoundError, match=re.escape(ARCHIVES[data_set]["python"])):
        data.read(train=False)


# Download, from a server of our own on this machine


class Mirror(ThreadingHTTPServer):
    """Serves one file well (/good/…), changed (/wrong/…), cut (/short/…) or not at all."""

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), Answer)
        self.content = content
        self.asked = []


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append(self.path)
        content = self.server.content
        behaviour = self.path.split("/")[1]
        if behaviour not in ("good", "wrong", "short"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            sent = {"good": content, "wrong": content[:-1] + b"?", "short": content[: len(content) // 2]}
            self.wfile.write(sent[behaviour])


@pytest.fixture
def offer(monkeypatch):
    """Make torchvision's address that of a server on this machine, which behaves as told; returns the server."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("datamodules.download.PAUSE", 0.0)
    servers = []

    def offer(data_set, behaviour, contents=None):
        archive = archive_of(FOLDERS[data_set]["python"], contents or python_files(data_set))
        server = Mirror(archive)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        servers.append(server)
        source, file = getattr(torchvision.datasets, data_set), ARCHIVES[data_set]["python"]
        monkeypatch.setattr(source, "url", f"http://127.0.0.1:{server.server_port}/{behaviour}/{file}")
        monkeypatch.setattr(source, "tgz_md5", hashlib.md5(archive).hexdigest())
        return server

    yield offer
    for server in servers:
        server.shutdown()
        server.server_close()


def names_below(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@not_official
@both
def test_missing_files_are_downloaded_once(data_set, offer, tmp_path):
    server = offer(data_set, "good")
    data = MODULES[data_set](root=str(tmp_path / "new"))
    data.prepare_data()
    assert_read(data, data_set)
    folder = FOLDERS[data_set]["python"]
    assert names_below(tmp_path / "new") == sorted(f"{folder}/{name}" for name in python_files(data_set))
    asked = len(server.asked)
    MODULES[data_set](root=str(tmp_path / "new")).prepare_data()
    assert len(server.asked) == asked > 0


@pytest.mark.parametrize("fault", ["missing", "wrong", "short"])
@both
def test_failed_download_leaves_nothing_says_what_to_do_and_can_be_repeated(data_set, fault, offer, tmp_path):
    offer(data_set, fault)
    data = MODULES[data_set](root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"127\.0\.0\.1") as raised:
        data.prepare_data()
    assert list(tmp_path.iterdir()) == []
    source = getattr(torchvision.datasets, data_set)
    assert f"{source.filename} (md5 {source.tgz_md5})" in str(raised.value)
    assert f"Put the file into {tmp_path}" in str(raised.value)
    offer(data_set, "good")
    data.prepare_data()
    assert names_below(tmp_path) == sorted(f"{source.base_folder}/{name}" for name in python_files(data_set))


def test_downloaded_archive_writes_nothing_but_the_files_asked_for(offer, tmp_path):
    contents = {**python_files("CIFAR10"), "../../outside": b"x", "../outside": b"x", "other": b"x"}
    offer("CIFAR10", "good", contents)
    CIFAR10DataModule(root=str(tmp_path / "a" / "b")).prepare_data()
    assert names_below(tmp_path) == sorted(f"a/b/cifar-10-batches-py/{name}" for name in python_files("CIFAR10"))


@not_official
def test_files_that_are_there_are_not_replaced(offer, tmp_path):
    folder = write_python(tmp_path, "CIFAR10")
    (folder / "data_batch_5").unlink()
    mine = text_pickle(4, as_dictionary("CIFAR10", "test_batch"))
    (folder / "test_batch").write_bytes(mine)
    offer("CIFAR10", "good")
    CIFAR10DataModule(root=str(tmp_path)).prepare_data()
    assert (folder / "test_batch").read_bytes() == mine
    assert_read(CIFAR10DataModule(root=str(tmp_path)), "CIFAR10")


@not_official
def test_download_that_cannot_be_unpacked_keeps_the_archive_and_no_half_of_a_file(offer, tmp_path, monkeypatch):
    offer("CIFAR10", "good")

    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        CIFAR10DataModule(root=str(tmp_path)).prepare_data()
    assert names_below(tmp_path) == ["cifar-10-python.tar.gz"]
    assert_read(CIFAR10DataModule(root=str(tmp_path)), "CIFAR10")


@both
def test_without_permission_nothing_is_fetched(data_set, offer, tmp_path):
    server = offer(data_set, "good")
    with pytest.raises(FileNotFoundError):
        MODULES[data_set](root=str(tmp_path), download=False).prepare_data()
    assert server.asked == []
    assert list(tmp_path.iterdir()) == []


@both
def test_constructor_touches_neither_network_nor_disk(data_set, offer, tmp_path, monkeypatch):
    server = offer(data_set, "good")
    monkeypatch.delenv("ZOO_DATA", raising=False)
    MODULES[data_set]()
    MODULES[data_set](root=str(tmp_path / "nowhere"))
    assert server.asked == []
    assert list(tmp_path.iterdir()) == []


# Splits


def fitted(tmp_path, **arguments):
    """Of 500 pictures that say in their first two pixels which they are; half of them are of class 0."""
    number = np.arange(500)
    pictures = np.zeros((500, 3072), dtype=np.uint8)
    pictures[:, 0], pictures[:, 1] = number // 256, number % 256
    labels = np.where(number % 2 == 0, 0, number // 2 % 10)
    contents = {}
    for i, name in enumerate(TRAIN["CIFAR10"]):
        part = slice(100 * i, 100 * i + 100)
        contents[name] = text_pickle(4, {b"data": pictures[part], b"labels": labels[part].tolist()})
    contents["test_batch"] = contents["data_batch_1"]
    write_folder(tmp_path, contents)
    data = CIFAR10DataModule(root=str(tmp_path), **{"val_size": 100, **arguments})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*differ from the official")
        data.setup("fit")
    return data


def numbers(tensors):
    images, labels = tensors
    number = images[:, 0, 0, 0].long() * 256 + images[:, 0, 0, 1]
    assert torch.equal(labels, torch.where(number % 2 == 0, 0, number // 2 % 10))  # each kept its own label
    return set(number.tolist())


def test_training_and_validation_are_disjoint_and_together_everything(tmp_path):
    data = fitted(tmp_path)
    training, validation = numbers(data.train_set), numbers(data.val_set)
    assert (len(data.train_set[1]), len(data.val_set[1])) == (400, 100)
    assert len(training) == 400
    assert training | validation == set(range(500))


@pytest.mark.parametrize("train_size", [1, 9, 10, 57, 200, 399, 400])
def test_train_size_takes_equally_many_of_each_class_as_far_as_there_are(train_size, tmp_path):
    everything, data = fitted(tmp_path), fitted(tmp_path, train_size=train_size)
    assert len(data.train_set[1]) == len(numbers(data.train_set)) == train_size
    assert numbers(data.train_set) <= numbers(everything.train_set)
    assert numbers(data.val_set) == numbers(everything.val_set)
    available = everything.train_set[1].bincount(minlength=10)
    taken = data.train_set[1].bincount(minlength=10)
    for count, there in zip(taken.tolist(), available.tolist(), strict=True):
        assert count == there or count >= taken.max() - 1  # a class is behind only where it has no more


def test_fewer_training_images_are_a_subset_of_more(tmp_path):
    chosen = [numbers(fitted(tmp_path, train_size=size).train_set) for size in (5, 60, 61, 300)]
    assert all(fewer < more for fewer, more in pairwise(chosen))


def test_choice_depends_on_split_seed_alone(tmp_path):
    torch.manual_seed(1)
    first = fitted(tmp_path, train_size=50)
    torch.manual_seed(2)
    again, other = fitted(tmp_path, train_size=50), fitted(tmp_path, train_size=50, split_seed=1)
    assert torch.equal(first.train_set[0], again.train_set[0])
    assert numbers(first.train_set) != numbers(other.train_set)
    assert numbers(first.val_set) != numbers(other.val_set)


def test_train_size_of_everything_is_none(tmp_path):
    assert torch.equal(fitted(tmp_path, train_size=400).train_set[0], fitted(tmp_path).train_set[0])


def test_training_cannot_be_resumed_on_other_samples(tmp_path):
    place = fitted(tmp_path, train_size=50, batch_size=10).train_dataloader().state_dict()
    fitted(tmp_path, train_size=50, batch_size=10).train_dataloader().load_state_dict(place)
    for other in ({"train_size": 60}, {"train_size": None}, {"train_size": 50, "split_seed": 1}):
        with pytest.raises(ValueError, match="trained on other samples"):
            fitted(tmp_path, batch_size=10, **other).train_dataloader().load_state_dict(place)


@pytest.mark.parametrize("train_size", [-1, 0, 401])
def test_impossible_train_size_is_a_clear_error(train_size, tmp_path):
    with pytest.raises(ValueError, match=f"train_size={train_size} must lie between 1 and 400"):
        fitted(tmp_path, train_size=train_size)


# The real pictures, as a JPEG copy: other pixels than the official ones, the same pictures in the same order.


@pytest.mark.filterwarnings("ignore:.*differ from the official files")
def test_real_pictures_are_read_as_they_were_packed(zoo_data, tmp_path):
    unpack, pack = zoo_data / "unpack_cifar10.py", zoo_data / "cifar10" / "test.jpgpack"
    if not (unpack.is_file() and pack.is_file()):
        pytest.skip("$ZOO_DATA does not hold the JPEG copy of CIFAR-10")
    pictures, labels = runpy.run_path(str(unpack))["read_pack"](pack)
    contents = {}
    for i, name in enumerate([*TRAIN["CIFAR10"], "test_batch"]):
        part = slice(2000 * i, 2000 * i + 2000) if i < 5 else slice(None)
        contents[name] = pickle.dumps({"labels": labels[part].tolist(), "data": pictures[part]}, protocol=4)
    write_folder(tmp_path / "cifar-10-batches-py", contents)
    data = CIFAR10DataModule(root=str(tmp_path), val_size=1000, download=False)
    data.setup("fit")
    data.setup("test")
    images, classes = data.test_set
    assert classes.bincount().tolist() == [1000] * 10
    assert torch.equal(images.flatten(1), torch.from_numpy(pictures))
    # Skies and seas are blue, frogs and deer are not: the planes are red, green, blue and the names in order.
    means = {name: images[classes == i].float().mean((0, 2, 3)) for i, name in enumerate(data.class_names)}
    assert all(means[name][2] > means[name][0] for name in ("airplane", "ship"))
    assert all(means[name][2] < means[name][0] for name in ("frog", "deer", "horse"))
    assert len(data.train_set[1]) == 9000


@not_official
@both
def test_a_report_is_told_when_the_files_are_not_the_official_ones(data_set, tmp_path):
    write_python(tmp_path, data_set)
    data = MODULES[data_set](root=str(tmp_path))
    assert data.note == ""
    data.read(train=False)
    assert data.note == "not the official files"
