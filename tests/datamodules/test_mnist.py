import gzip
import hashlib
import os
import re
import shutil
import signal
import socket
import struct
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from lightning import LightningModule, Trainer

from datamodules import FashionMNISTDataModule, MNISTDataModule
from datamodules.mnist import read_idx

NAMES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
MODULES = {"MNIST": MNISTDataModule, "FashionMNIST": FashionMNISTDataModule}

# What the small stand-ins are warned about; tested by itself below.
not_official = pytest.mark.filterwarnings("ignore:.*differs from the official file")


def small_arrays():
    """Twelve training and five test pictures with labels, by file name."""
    generator = np.random.default_rng(0)
    arrays = {}
    for images, labels, count in ((*NAMES[:2], 12), (*NAMES[2:], 5)):
        arrays[images] = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[labels] = generator.integers(0, 10, count, dtype=np.uint8)
    return arrays


def idx(array):
    """The IDX format: two zero bytes, 8 for unsigned bytes, the number of sizes, the sizes, the bytes in C order."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def packed(array):
    return gzip.compress(idx(array), mtime=0)


def write_small(folder, gzipped=True):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in small_arrays().items():
        path = folder / (f"{name}.gz" if gzipped else name)
        path.write_bytes(packed(array) if gzipped else idx(array))


# Reading


@not_official
@pytest.mark.parametrize("data_set", MODULES)
@pytest.mark.parametrize("gzipped", [True, False])
@pytest.mark.parametrize("folder", [".", "{}/raw"])
def test_small_files_are_read_back(data_set, gzipped, folder, tmp_path):
    write_small(tmp_path / folder.format(data_set), gzipped)
    data = MODULES[data_set](root=str(tmp_path), download=False)
    data.prepare_data()
    for train, (images_name, labels_name) in ((True, NAMES[:2]), (False, NAMES[2:])):
        images, labels = data.read(train)
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        np.testing.assert_array_equal(images.numpy(), small_arrays()[images_name][:, None])
        np.testing.assert_array_equal(labels.numpy(), small_arrays()[labels_name])


@not_official
def test_root_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_small(tmp_path / "pictures")
    assert len(MNISTDataModule(root="~/pictures").read(train=False)[1]) == 5


@not_official
@pytest.mark.parametrize(("data_set", "folder"), [("MNIST", "mnist"), ("FashionMNIST", "fashion_mnist")])
def test_without_root_the_folder_of_zoo_data_is_read(data_set, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_DATA", str(tmp_path))
    write_small(tmp_path / folder)
    assert len(MODULES[data_set]().read(train=False)[1]) == 5


@pytest.mark.parametrize("value", [None, "", "without_mnist"])
def test_without_root_and_zoo_data_the_folder_is_data(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if value is None:
        monkeypatch.delenv("ZOO_DATA", raising=False)
    else:
        monkeypatch.setenv("ZOO_DATA", value and str(tmp_path / value))
    assert MNISTDataModule().root == Path("data")


@pytest.mark.parametrize("gzipped", [True, False])
def test_arrays_may_be_changed_in_place(gzipped, tmp_path):
    write_small(tmp_path, gzipped)
    assert read_idx(tmp_path / (f"{NAMES[0]}.gz" if gzipped else NAMES[0]), 3).flags.writeable


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(784, 10)
        self.trained_on, self.validated_on = [], []

    def training_step(self, batch, batch_idx):
        self.trained_on.append(batch)
        return self.layer(batch[0].flatten(1)).mean()

    def validation_step(self, batch, batch_idx):
        self.validated_on.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@not_official
def test_flip_mirrors_about_half_of_the_training_images_and_no_others(tmp_path):
    write_small(tmp_path)
    data = FashionMNISTDataModule(root=str(tmp_path), val_size=4, batch_size=8, flip=True)
    model = Recorder()
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    torch.manual_seed(0)
    Trainer(accelerator="cpu", max_epochs=10, num_sanity_val_steps=0, enable_model_summary=False, **silent).fit(
        model, data
    )
    plain = {image.tobytes() for image in small_arrays()[NAMES[0]]}
    mirrored = {image[:, ::-1].tobytes() for image in small_arrays()[NAMES[0]]}

    def found(batches):
        images = torch.cat([x for x, _ in batches])
        return [image.tobytes() for image in (images * 255).round().to(torch.uint8).numpy()]

    trained_on = found(model.trained_on)
    assert set(trained_on) <= plain | mirrored
    assert 20 <= sum(image in mirrored for image in trained_on) <= 60  # expected 40 of 80, deviation 4.5
    assert set(found(model.validated_on)) <= plain


# Bad files. A file is named in every message, also where the message comes from a library.


def cut(content):
    return content[:-3]


def flip_a_bit(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


def html(content):
    return b"<!DOCTYPE html><html><body>Access denied</body></html>"


def empty(content):
    return b""


def wrong_magic(content):
    return b"\x00\x00\x0d" + content[3:]  # 32-bit floats


def swapped_kind(content):
    return idx(np.zeros((2, 2), dtype=np.uint8))


def trailing(content):
    return content + b"\x00"


def overflowing_sizes(content):
    return struct.pack(">BBBB3I", 0, 0, 8, 3, 2**31, 2**31, 4)  # 2 ** 64 bytes: 0 in 64-bit arithmetic


def huge_sizes(content):
    return struct.pack(">BBBB3I", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 1)


RAW_DAMAGE = [cut, html, empty, wrong_magic, swapped_kind, trailing]
GZ_DAMAGE = [cut, flip_a_bit, html, empty]


@not_official
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("gzipped", "damage"), [(False, damage) for damage in RAW_DAMAGE] + [(True, damage) for damage in GZ_DAMAGE]
)
def test_damaged_file_is_an_error_that_names_it(name, gzipped, damage, tmp_path):
    write_small(tmp_path, gzipped)
    path = tmp_path / (f"{name}.gz" if gzipped else name)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*fetch it again"):
        MNISTDataModule(root=str(tmp_path)).read(train=name.startswith("train"))


@not_official
@pytest.mark.parametrize("damage", [overflowing_sizes, huge_sizes])
def test_sizes_larger_than_the_file_are_an_error_that_names_it(damage, tmp_path):
    write_small(tmp_path, gzipped=False)
    path = tmp_path / NAMES[0]
    path.write_bytes(damage(b""))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        MNISTDataModule(root=str(tmp_path)).read(train=True)


@not_official
@pytest.mark.parametrize("gzipped", [True, False])
def test_file_cut_anywhere_is_an_error_that_names_it(gzipped, tmp_path):
    write_small(tmp_path, gzipped)
    path = tmp_path / (f"{NAMES[3]}.gz" if gzipped else NAMES[3])
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            MNISTDataModule(root=str(tmp_path)).read(train=False)


@not_official
def test_gzip_file_with_any_bit_flipped_is_read_right_or_is_an_error_that_names_it(tmp_path):
    write_small(tmp_path)
    path = tmp_path / f"{NAMES[3]}.gz"
    content = path.read_bytes()

    def outcome(bit):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            return MNISTDataModule(root=str(tmp_path)).read(train=False)[1].tolist()
        except ValueError as error:
            return str(error)

    outcomes = [outcome(bit) for bit in range(8 * len(content))]
    errors = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert all(str(path) in error for error in errors)
    # A few bits say nothing of the content: the time and the like in gzip's header.
    assert len(errors) > len(outcomes) / 2
    assert outcomes.count(small_arrays()[NAMES[3]].tolist()) == len(outcomes) - len(errors)


@not_official
def test_images_and_labels_of_different_number_are_an_error_that_names_both(tmp_path):
    write_small(tmp_path, gzipped=False)
    (tmp_path / NAMES[1]).write_bytes(idx(np.zeros(11, dtype=np.uint8)))
    with pytest.raises(ValueError, match=rf"{NAMES[0]} has 12 images .*{NAMES[1]} has 11 labels"):
        MNISTDataModule(root=str(tmp_path)).read(train=True)


@not_official
@pytest.mark.parametrize("label", [10, 11, 255])
def test_label_outside_the_classes_is_an_error_that_names_the_file(label, tmp_path):
    write_small(tmp_path, gzipped=False)
    labels = small_arrays()[NAMES[1]]
    labels[3] = label
    (tmp_path / NAMES[1]).write_bytes(idx(labels))
    with pytest.raises(ValueError, match=rf"{NAMES[1]} holds the label {label}"):
        MNISTDataModule(root=str(tmp_path)).read(train=True)


@pytest.mark.parametrize("data_set", MODULES)
@pytest.mark.parametrize("name", NAMES)
def test_missing_file_is_an_error_that_names_it(data_set, name, tmp_path):
    write_small(tmp_path)
    (tmp_path / f"{name}.gz").unlink()
    data = MODULES[data_set](root=str(tmp_path), download=False)
    for use in (data.prepare_data, lambda: data.read(name.startswith("train"))):
        with pytest.raises(FileNotFoundError) as raised:
            use()
        named = {other for other in NAMES if other in str(raised.value)}
        assert named == {name}
        assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("data_set", MODULES)
def test_file_unlike_the_official_one_is_read_with_a_warning_that_names_it(data_set, tmp_path):
    write_small(tmp_path)
    with pytest.warns(UserWarning, match="differs from the official file") as caught:
        MODULES[data_set](root=str(tmp_path)).read(train=True)
    messages = [str(warning.message) for warning in caught]
    for name in NAMES[:2]:
        found = hashlib.md5(idx(small_arrays()[name])).hexdigest()
        assert any(f"{tmp_path / name}.gz differs from the official file (md5 {found}" in text for text in messages)


# The real files


@pytest.fixture(scope="module")
def real_mnist():
    folder = Path(os.environ.get("ZOO_DATA") or os.devnull) / "mnist"
    if not all((folder / f"{name}.gz").is_file() for name in NAMES):
        pytest.skip("$ZOO_DATA/mnist does not hold the four files of MNIST")
    return folder


@pytest.fixture(scope="module")
def real_data(real_mnist):
    torch.manual_seed(1)
    data = MNISTDataModule(root=str(real_mnist), download=False)
    data.prepare_data()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none says that a file differs from the official one
        data.setup("fit")
        data.setup("test")
    return data


@pytest.fixture(scope="module")
def torchvision_mnist(real_mnist, tmp_path_factory):
    root = tmp_path_factory.mktemp("torchvision")
    (root / "MNIST" / "raw").mkdir(parents=True)
    for name in NAMES:
        with gzip.open(real_mnist / f"{name}.gz") as source, open(root / "MNIST" / "raw" / name, "wb") as target:
            shutil.copyfileobj(source, target)
    return {train: torchvision.datasets.MNIST(str(root), train=train) for train in (True, False)}


def rows(images, labels):
    """One sortable row of bytes per labelled picture."""
    table = np.concatenate([labels.numpy().astype(np.uint8)[:, None], images.flatten(1).numpy()], axis=1)
    return np.ascontiguousarray(table).view(f"V{table.shape[1]}")[:, 0]


def test_real_mnist_equals_what_torchvision_reads(real_data, torchvision_mnist):
    images, labels = real_data.test_set
    assert torch.equal(images[:, 0], torchvision_mnist[False].data)
    assert torch.equal(labels, torchvision_mnist[False].targets)
    images = torch.cat([real_data.train_set[0], real_data.val_set[0]])
    labels = torch.cat([real_data.train_set[1], real_data.val_set[1]])
    expected = rows(torchvision_mnist[True].data, torchvision_mnist[True].targets)
    # All 60,000 pictures are there once (they are all different): training and validation share none.
    assert len(set(expected.tolist())) == 60_000
    assert np.array_equal(np.sort(rows(images, labels)), np.sort(expected))


def test_real_mnist_has_the_stated_sizes(real_data):
    sets = [real_data.train_set, real_data.val_set, real_data.test_set]
    assert [tuple(images.shape) for images, _ in sets] == [(n, 1, 28, 28) for n in (55_000, 5_000, 10_000)]
    assert [len(labels) for _, labels in sets] == [55_000, 5_000, 10_000]
    assert all(labels.unique().tolist() == list(range(10)) for _, labels in sets)


def test_real_mnist_is_split_alike_whatever_torchs_seed(real_mnist, real_data):
    torch.manual_seed(2)
    again = MNISTDataModule(root=str(real_mnist), download=False)
    again.setup("fit")
    for (images, labels), (other_images, other_labels) in (
        (again.train_set, real_data.train_set),
        (again.val_set, real_data.val_set),
    ):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


# Download, from a server of our own on this machine


class Mirror(ThreadingHTTPServer):
    """Serves the small files; the first folder of the address says how it behaves."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked = set()  # "folder/file" of every request
        self.hold = threading.Event()  # ends the answers that hang
        self.folder = None  # where the client downloads to

    def address(self, behaviour):
        return f"http://127.0.0.1:{self.server_port}/{behaviour}/"

    def handle_error(self, request, client_address):
        pass  # clients that hang up are expected


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.add(self.path.strip("/"))
        _, behaviour, file = self.path.split("/")
        content = packed(small_arrays()[file.removesuffix(".gz")])
        getattr(self, behaviour)(content)

    def send(self, content, length=None, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
            self.wfile.flush()

    def good(self, content):
        self.send(content)

    def missing(self, content):
        self.send_error(404)

    def overloaded(self, content):
        self.send_error(503)

    def short(self, content):
        self.send(content[: len(content) // 2], length=len(content))

    def wrong(self, content):
        self.send(flip_a_bit(content))

    def page(self, content):
        self.send(html(content))

    def nothing(self, content):
        self.send(b"")

    def hangs_up(self, content):
        self.close_connection = True

    def no_http(self, content):
        self.wfile.write(b"220 ftp.example.org ready\r\n")

    def cut_chunk(self, content):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(b"%x\r\n" % len(content) + content[: len(content) // 2])

    def circle(self, content):
        self.send_response(302)
        self.send_header("Location", self.path)
        self.end_headers()

    def incomplete(self, content):
        self.send_error(404) if "-labels-" in self.path else self.send(content)

    def falls_silent(self, content):
        self.short(content)
        self.server.hold.wait(10)

    def interrupted(self, content):
        """Half of the file, and Ctrl+C as soon as the client has begun to write it."""
        self.short(content)
        while not self.server.hold.wait(0.01):
            if any(self.server.folder.rglob("*.gz")):
                self.server.hold.set()
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


@pytest.fixture
def mirror(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("datamodules.download.PAUSE", 0.0)
    server = Mirror()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.hold.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def offer(mirror, monkeypatch):
    """Make torchvision know the small files' checksums, and mirrors that behave as told."""

    def offer(data_set, *behaviours):
        source = getattr(torchvision.datasets, data_set)
        resources = [(f"{name}.gz", md5_of(name)) for name in NAMES]
        addresses = [free_address() if b == "nobody" else mirror.address(b) for b in behaviours]
        monkeypatch.setattr(source, "resources", resources)
        monkeypatch.setattr(source, "mirrors", addresses)

    return offer


def md5_of(name):
    return hashlib.md5(packed(small_arrays()[name])).hexdigest()


def free_address():
    """Where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/"


def files(root):
    """All files below ``root``, and folders of unfinished downloads."""
    return sorted(path.name for path in root.rglob("*") if path.is_file() or path.name.startswith("."))


def assert_complete(data, root):
    raw = root / type(data).__name__.removesuffix("DataModule") / "raw"
    assert files(root) == sorted(f"{name}.gz" for name in NAMES)
    assert all((raw / f"{name}.gz").read_bytes() == packed(array) for name, array in small_arrays().items())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*differs from the official file")
        assert len(data.read(train=True)[1]) == 12
        assert len(data.read(train=False)[1]) == 5


FAULTS = [
    "missing", "overloaded", "short", "cut_chunk", "wrong", "page", "nothing", "hangs_up", "no_http", "circle",
    "nobody",  # listens
]  # fmt: skip


@pytest.mark.parametrize("data_set", MODULES)
def test_missing_files_are_downloaded(data_set, offer, mirror, tmp_path):
    offer(data_set, "good")
    data = MODULES[data_set](root=str(tmp_path))
    data.prepare_data()
    assert_complete(data, tmp_path)
    assert mirror.asked == {f"good/{name}.gz" for name in NAMES}


@pytest.mark.parametrize("fault", FAULTS)
def test_second_mirror_is_asked_where_the_first_fails(fault, offer, mirror, tmp_path):
    offer("MNIST", fault, "good")
    data = MNISTDataModule(root=str(tmp_path))
    data.prepare_data()
    assert_complete(data, tmp_path)
    assert mirror.asked >= {f"good/{name}.gz" for name in NAMES}


@pytest.mark.parametrize("data_set", MODULES)
@pytest.mark.parametrize("fault", FAULTS)
def test_failed_download_leaves_nothing_says_what_to_do_and_can_be_repeated(data_set, fault, offer, tmp_path):
    offer(data_set, fault, fault)
    data = MODULES[data_set](root=str(tmp_path))
    with pytest.raises(FileNotFoundError) as raised:
        data.prepare_data()
    file = re.search(r"[\w-]+-ubyte", str(raised.value))[0]
    assert files(tmp_path) == []
    assert f"{file}.gz (md5 {md5_of(file)})" in str(raised.value)
    assert str(tmp_path / data_set / "raw") in str(raised.value)

    offer(data_set, "good")
    data.prepare_data()
    assert_complete(data, tmp_path)


def test_failed_download_names_every_address_that_was_tried(offer, mirror, tmp_path):
    offer("MNIST", "missing", "wrong")
    with pytest.raises(FileNotFoundError) as raised:
        MNISTDataModule(root=str(tmp_path)).prepare_data()
    for behaviour in ("missing", "wrong"):
        assert f"{mirror.address(behaviour)}{NAMES[0]}.gz: " in str(raised.value)
    assert "404" in str(raised.value)


def test_files_that_came_before_a_failure_are_kept_and_not_fetched_again(offer, mirror, tmp_path):
    offer("MNIST", "incomplete")
    data = MNISTDataModule(root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=NAMES[1]):
        data.prepare_data()
    assert files(tmp_path) == [f"{NAMES[0]}.gz"]
    offer("MNIST", "good")
    data.prepare_data()
    assert_complete(data, tmp_path)
    assert mirror.asked & {f"good/{name}.gz" for name in NAMES} == {f"good/{name}.gz" for name in NAMES[1:]}


@not_official
@pytest.mark.parametrize("data_set", MODULES)
@pytest.mark.parametrize("gzipped", [True, False])
@pytest.mark.parametrize("folder", [".", "{}/raw"])
def test_existing_files_are_not_fetched(data_set, gzipped, folder, offer, mirror, tmp_path):
    write_small(tmp_path / folder.format(data_set), gzipped)
    before = files(tmp_path)
    offer(data_set, "good")
    MODULES[data_set](root=str(tmp_path)).prepare_data()
    assert mirror.asked == set()
    assert files(tmp_path) == before


@not_official
def test_only_the_missing_file_is_fetched(offer, mirror, tmp_path):
    write_small(tmp_path)
    (tmp_path / f"{NAMES[2]}.gz").unlink()
    offer("MNIST", "good")
    data = MNISTDataModule(root=str(tmp_path))
    data.prepare_data()
    assert mirror.asked == {f"good/{NAMES[2]}.gz"}
    assert len(data.read(train=False)[1]) == 5


@pytest.mark.parametrize("data_set", MODULES)
def test_without_permission_to_download_nothing_is_fetched_and_all_missing_files_are_named(
    data_set, offer, mirror, tmp_path
):
    offer(data_set, "good")
    with pytest.raises(FileNotFoundError) as raised:
        MODULES[data_set](root=str(tmp_path), download=False).prepare_data()
    assert all(f"{name}.gz" in str(raised.value) for name in NAMES)
    assert str(tmp_path) in str(raised.value)
    assert mirror.asked == set()
    assert files(tmp_path) == []


@pytest.mark.parametrize("data_set", MODULES)
def test_constructor_touches_neither_network_nor_disk(data_set, offer, mirror, tmp_path, monkeypatch):
    offer(data_set, "good")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZOO_DATA", raising=False)
    MODULES[data_set]()
    MODULES[data_set](root=str(tmp_path / "nowhere"))
    assert mirror.asked == set()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mirrors", [["falls_silent", "good"], ["falls_silent"]])
def test_mirror_that_falls_silent_is_given_up(mirrors, offer, tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.download.MIRROR_TIMEOUT", 0.2)
    before = socket.getdefaulttimeout()
    offer("MNIST", *mirrors)
    data = MNISTDataModule(root=str(tmp_path))
    if "good" in mirrors:
        data.prepare_data()
        assert_complete(data, tmp_path)
    else:
        with pytest.raises(FileNotFoundError, match="timed out"):
            data.prepare_data()
        assert files(tmp_path) == []
    assert socket.getdefaulttimeout() == before


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="sends Ctrl+C to a thread of this process")
def test_interrupted_download_leaves_nothing(offer, mirror, tmp_path):
    mirror.folder = tmp_path
    offer("MNIST", "interrupted", "good")
    with pytest.raises(KeyboardInterrupt):
        MNISTDataModule(root=str(tmp_path)).prepare_data()
    assert files(tmp_path) == []


def test_leftovers_of_a_killed_download_do_not_count_as_files_and_go(offer, tmp_path):
    partial = tmp_path / "MNIST" / "raw" / ".download-killed"
    partial.mkdir(parents=True)
    (partial / f"{NAMES[0]}.gz").write_bytes(b"half")
    offer("MNIST", "good")
    MNISTDataModule(root=str(tmp_path)).prepare_data()
    assert not partial.exists()
    assert_complete(MNISTDataModule(root=str(tmp_path)), tmp_path)
