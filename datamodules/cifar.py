"""CIFAR-10 and CIFAR-100: 60,000 colour pictures of 32x32 pixels in 10 or 100 classes, in the official files.

Source: Krizhevsky, 2009, Learning Multiple Layers of Features from Tiny Images,
https://www.cs.toronto.edu/~kriz/cifar.html; no licence is stated.
"""

import gzip
import hashlib
import io
import os
import pickle
import tarfile
import tempfile
import zlib
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from datamodules.download import Member, alone, fetch, members_of
from datamodules.in_memory import InMemoryDataModule

FOREIGN = "not the official files"  # beside every figure of a report that was measured on other ones
PIXELS = 3 * 32 * 32  # bytes of a picture: the red plane, the green, the blue


class CIFAR10DataModule(InMemoryDataModule):
    """Small photographs: batches of float32 (N, 3, 32, 32) in [0, 1] and int64 (N,) in [0, 10).

    Args:
        root: Folder with an official version of the data: the python one (``cifar-10-batches-py`` or what is in it),
            the binary one (``cifar-10-batches-bin`` or what is in it), or the ``.tar.gz`` of either (or its path),
            which is read as it is. None means ``$ZOO_DATA/cifar10`` where that has them, else ``data``.
        download: Fetch the python version to ``root`` if there is none, verified by torchvision's checksum.
        batch_size: Images of a global training batch: all processes together.
        eval_batch_size: Images per process in validation, test and prediction.
        val_size: Images held out of the 50,000 training images for validation; EECS 498's assignments hold out 1,000.
        split_seed: Seed of the split into training and validation, and of the choice of ``train_size``.
        train_size: Train on only so many of the images that are not held out, as evenly from all classes as they
            allow; None takes all.
        translate: Each training image is shifted by up to so many pixels on both axes.
        flip: Mirror half of the training images left to right.
        cutout: Fill a square of this side, in pixels, in each training image with the mean of the training images;
            the paper takes 16.
        mixup: a of Beta(a, a), which gives the shares of the two images of a mixture; 0 mixes none. With this or
            ``cutmix`` training labels are the share of each class, float32 (N, 10).
        cutmix: a of Beta(a, a), which gives how much of each picture is left when a box of another one is pasted in;
            0 pastes none. With ``mixup``, a coin decides for each batch.
        jitter: Brightness, contrast and saturation of each training image change by factors in [1 - jitter,
            1 + jitter].
        resize: Side in pixels to which all images are brought on the device; None leaves them at 32.
    """

    num_classes = 10
    side = 32
    note = ""  # what a report says of the data, where it is not the official one
    class_names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

    def __init__(
        self,
        root: str | None = None,
        download: bool = True,
        batch_size: int = 128,
        eval_batch_size: int = 500,
        val_size: int = 5000,
        split_seed: int = 0,
        train_size: int | None = None,
        translate: int = 0,
        flip: bool = False,
        cutout: int = 0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        jitter: float = 0.0,
        resize: int | None = None,
    ) -> None:
        super().__init__(
            batch_size,
            eval_batch_size,
            val_size,
            split_seed,
            translate,
            flip,
            train_size,
            cutout,
            mixup,
            cutmix,
            jitter,
            resize,
        )
        self.root = _root(root, "cifar10", CIFAR10)
        self.download = download

    def prepare_data(self) -> None:
        """Make sure that the pictures are there, by download if allowed."""
        prepare_cifar(self.root, "CIFAR10", CIFAR10, self.download)

    def read(self, train: bool) -> tuple[Tensor, Tensor]:
        """Read images, uint8 (N, 3, 32, 32), and labels, int64 (N,)."""
        images, labels, foreign = read_labelled_images(self.root, CIFAR10, train, self.num_classes)
        self.note = FOREIGN if foreign else self.note
        return images, labels


class CIFAR100DataModule(InMemoryDataModule):
    """Small photographs: batches of float32 (N, 3, 32, 32) in [0, 1] and int64 (N,), the fine classes, in [0, 100).

    Args:
        root: Folder with an official version of the data: the python one (``cifar-100-python`` or what is in it), the
            binary one (``cifar-100-binary`` or what is in it), or the ``.tar.gz`` of either (or its path), which is
            read as it is. None means ``$ZOO_DATA/cifar100`` where that has them, else ``data``.
        download: Fetch the python version to ``root`` if there is none, verified by torchvision's checksum.
        batch_size: Images of a global training batch: all processes together.
        eval_batch_size: Images per process in validation, test and prediction.
        val_size: Images held out of the 50,000 training images for validation.
        split_seed: Seed of the split into training and validation, and of the choice of ``train_size``.
        train_size: Train on only so many of the images that are not held out, as evenly from all classes as they
            allow; None takes all.
        translate: Each training image is shifted by up to so many pixels on both axes.
        flip: Mirror half of the training images left to right.
        cutout: Fill a square of this side, in pixels, in each training image with the mean of the training images;
            the paper takes 8.
        mixup: a of Beta(a, a), which gives the shares of the two images of a mixture; 0 mixes none. With this or
            ``cutmix`` training labels are the share of each class, float32 (N, 100).
        cutmix: a of Beta(a, a), which gives how much of each picture is left when a box of another one is pasted in;
            0 pastes none. With ``mixup``, a coin decides for each batch.
        jitter: Brightness, contrast and saturation of each training image change by factors in [1 - jitter,
            1 + jitter].
        resize: Side in pixels to which all images are brought on the device; None leaves them at 32.
    """

    num_classes = 100
    side = 32
    note = ""  # what a report says of the data, where it is not the official one
    class_names = [
        "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle",
        "bowl", "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle",
        "chair", "chimpanzee", "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur",
        "dolphin", "elephant", "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard",
        "lamp", "lawn_mower", "leopard", "lion", "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain",
        "mouse", "mushroom", "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree",
        "plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road", "rocket",
        "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake", "spider",
        "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone", "television", "tiger",
        "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm",
    ]  # fmt: skip

    def __init__(
        self,
        root: str | None = None,
        download: bool = True,
        batch_size: int = 128,
        eval_batch_size: int = 500,
        val_size: int = 5000,
        split_seed: int = 0,
        train_size: int | None = None,
        translate: int = 0,
        flip: bool = False,
        cutout: int = 0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        jitter: float = 0.0,
        resize: int | None = None,
    ) -> None:
        super().__init__(
            batch_size,
            eval_batch_size,
            val_size,
            split_seed,
            translate,
            flip,
            train_size,
            cutout,
            mixup,
            cutmix,
            jitter,
            resize,
        )
        self.root = _root(root, "cifar100", CIFAR100)
        self.download = download

    def prepare_data(self) -> None:
        """Make sure that the pictures are there, by download if allowed."""
        prepare_cifar(self.root, "CIFAR100", CIFAR100, self.download)

    def read(self, train: bool) -> tuple[Tensor, Tensor]:
        """Read images, uint8 (N, 3, 32, 32), and fine labels, int64 (N,)."""
        images, labels, foreign = read_labelled_images(self.root, CIFAR100, train, self.num_classes)
        self.note = FOREIGN if foreign else self.note
        return images, labels


class Version(NamedTuple):
    """One of the official versions of a data set; files with their MD5, others of the right form raise a warning."""

    folder: str
    archive: str
    train: dict[str, str]
    test: dict[str, str]


CIFAR10 = [
    Version(
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
        {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        {"test_batch": "40351d587109b95175f43aff81a1287e"},
    ),
    Version(
        "cifar-10-batches-bin",
        "cifar-10-binary.tar.gz",
        {
            "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
            "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
            "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
            "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
            "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
        },
        {"test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d"},
    ),
]
CIFAR100 = [
    Version(
        "cifar-100-python",
        "cifar-100-python.tar.gz",
        {"train": "16019d7e3df5f24257cddd939b257f8d"},
        {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    ),
    Version(
        "cifar-100-binary",
        "cifar-100-binary.tar.gz",
        {"train.bin": "6172c7755cfe09b2fe270c85cebc1b15"},
        {"test.bin": "4499cfba6c016c1be1438163640a0898"},
    ),
]


def _root(root: str | None, folder: str, versions: list[Version]) -> Path:
    if root is not None:
        return Path(root).expanduser()
    if "ZOO_DATA" in os.environ:
        shared = Path(os.environ["ZOO_DATA"]) / folder
        if find_cifar(shared, versions) is not None:
            return shared
    return Path("data")


def find_cifar(root: Path, versions: list[Version]) -> tuple[Path, Version] | None:
    """The folder with all files of a version, or else its archive, in ``root`` or being ``root``; else None."""
    for version in versions:
        for folder in (root / version.folder, root):
            if all((folder / name).is_file() for name in version.train | version.test):
                return folder, version
    for version in versions:
        for archive in (root / version.archive, root):
            if archive.name == version.archive and archive.is_file():
                return archive, version
    return None


def prepare_cifar(root: Path, data_set: str, versions: list[Version], download: bool) -> None:
    """Download and unpack the python version if no version is there.

    Raises:
        FileNotFoundError: The files are missing and cannot be, or may not be, downloaded.
    """
    if find_cifar(root, versions) is not None:
        return
    python = versions[0]
    if not download:
        raise FileNotFoundError(
            f"{root} lacks {python.archive}, or {python.folder} with {', '.join(python.train | python.test)}: "
            "put one of them there, or set --data.init_args.download true"
        )
    # Imported here: a run that has its files does not pay for it.
    from torchvision import datasets

    source = getattr(datasets, data_set)
    root.mkdir(parents=True, exist_ok=True)
    rank_zero_info(f"downloading {source.filename} to {root}")
    mirrors = [source.url.removesuffix(source.filename)]
    fetch(mirrors, source.filename, source.tgz_md5, root, lambda: find_cifar(root, versions) is not None)
    if not (root / source.filename).is_file():
        return  # another process was sooner
    _unpack(root / source.filename, python, root / python.folder)
    (root / source.filename).unlink(missing_ok=True)


def _unpack(archive: Path, version: Version, folder: Path) -> None:
    """Write the files of an archive that are wanted and not there yet; each appears whole or not at all."""
    contents = _read_archive(archive, version, version.train | version.test)
    folder.mkdir(exist_ok=True)
    with alone(folder, ".unpack-*"), tempfile.TemporaryDirectory(dir=folder, prefix=".unpack-") as partial:
        for name, content in contents.items():
            if not (folder / name).exists():
                (Path(partial) / name).write_bytes(content)
                os.replace(Path(partial) / name, folder / name)


def read_labelled_images(
    root: Path, versions: list[Version], train: bool, num_classes: int
) -> tuple[Tensor, Tensor, list[str]]:
    """Read one split: images uint8 (N, 3, 32, 32), labels int64 (N,) in ``[0, num_classes)``, names of foreign files.

    Files of the right form that are not the official ones are read with one warning that names them all.

    Raises:
        FileNotFoundError: There is no version of the data set.
        ValueError: A file is truncated, corrupt, or asks to run something.
    """
    found = find_cifar(root, versions)
    if found is None:
        raise FileNotFoundError(
            f"{versions[0].archive} is not in {root}: run prepare_data(), or give its folder as root"
        )
    place, version = found
    files = version.train if train else version.test
    contents = _read_archive(place, version, files) if place.is_file() else _read_folder(place, files)
    pairs, foreign = [], []
    for name, md5 in files.items():
        pairs.append(parse(contents[name], place / name, num_classes))
        if hashlib.md5(contents.pop(name), usedforsecurity=False).hexdigest() != md5:
            foreign.append(name)
    if foreign:
        rank_zero_warn(f"{place}: these differ from the official files, judged by their md5: {', '.join(foreign)}")
    images, labels = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    return torch.from_numpy(images).view(-1, 3, 32, 32), torch.from_numpy(labels), foreign


def _read_folder(folder: Path, files: dict[str, str]) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files}


def _read_archive(archive: Path, version: Version, files: dict[str, str]) -> dict[str, bytes]:
    """The content of the wanted members; no member's name or kind decides where anything is written."""
    wanted = {f"{version.folder}/{name}": name for name in files}
    contents: dict[str, bytes] = {}
    room = ALL_FILES
    try:
        with tarfile.open(archive, "r|gz", tarinfo=Member) as members:
            for member in members_of(members):
                name = wanted.get(member.name)
                if name is not None and member.isreg() and member.size <= room:
                    room -= member.size
                    contents[name] = members.extractfile(member).read()  # type: ignore[union-attr]
                if len(contents) == len(wanted):
                    break
    # A cut header is a TypeError.
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error, TypeError, RecursionError) as error:
        raise ValueError(f"{archive} is truncated or corrupt ({error}): delete it and fetch it again") from error
    missing = ", ".join(path for path, name in wanted.items() if name not in contents)
    if missing:
        raise ValueError(f"{archive} lacks {missing}: delete it and fetch it again")
    return contents


ALL_FILES = 2**28  # bytes; the official ones have 186 million


def parse(content: bytes, path: Path, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Read one file's content: pictures uint8 (N, 3072) and labels int64 (N,), the fine ones of CIFAR-100.

    A binary file is a row of records: the label, or the coarse and the fine label, then the picture. A python file is
    a pickled dictionary with the pictures, ``data``, and the list ``labels`` or ``fine_labels``.

    Raises:
        ValueError: The content is not such a file, or is truncated or corrupt; names ``path``.
    """
    try:
        if path.suffix == ".bin":
            images, labels = _parse_records(content, 1 if num_classes == 10 else 2)
        else:
            images, labels = _parse_pickle(content, "labels" if num_classes == 10 else "fine_labels")
        if not len(labels) or labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(f"labels must lie between 0 and {num_classes - 1}")
    except Exception as error:  # what a pickle with a flipped bit raises can be anything
        raise ValueError(f"{path} does not hold CIFAR pictures and labels ({error}): fetch it again") from error
    return images, labels


def _parse_records(content: bytes, label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    size = label_bytes + PIXELS
    if len(content) % size:
        raise ValueError(f"{len(content)} bytes are not a whole number of records of {size}")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, size)
    return records[:, label_bytes:], records[:, label_bytes - 1].astype(np.int64)


def _parse_pickle(content: bytes, label_key: str) -> tuple[np.ndarray, np.ndarray]:
    # Written by Python 2, whose text is bytes here; newer copies have text.
    loaded = _PictureUnpickler(io.BytesIO(content), encoding="bytes").load()
    batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in loaded.items()}
    images, labels = batch["data"].to_numpy(), batch[label_key]
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError(f"{label_key} is not a list of whole numbers")
    if images.shape != (len(labels), PIXELS):
        raise ValueError(f"data has the shape {images.shape}, expected ({len(labels)}, {PIXELS})")
    return images, np.array(labels, dtype=np.int64)


class _Array:
    """Stands in for a numpy array while unpickling: it only keeps what the file says of it.

    numpy's own reconstruction trusts a pickle: a forged dtype can make it take bytes for pointers.
    """

    def __init__(self, *ignored: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def to_numpy(self) -> np.ndarray:
        """The array, uint8; ValueError, TypeError or the like where the file says nonsense."""
        _, shape, dtype, fortran, data = self.state
        if dtype.name not in ("u1", b"u1"):
            raise ValueError(f"data has the type {dtype.name}, expected u1")
        data = data.encode("latin1") if isinstance(data, str) else data
        return np.frombuffer(data, dtype=np.uint8).reshape(shape, order="F" if fortran else "C")


class _DType:
    """Stands in for a numpy dtype while unpickling."""

    def __init__(self, name: Any, *ignored: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        pass


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.state = (1, shape, dtype, order == "F", data)
    return array


def _encode(text: str, encoding: Any) -> bytes:
    return text.encode("latin1")  # how old protocols write bytes


# In Python: the interpreter in C sets aside as much memory as a file tells it to.
class _PictureUnpickler(pickle._Unpickler):
    """Reads dictionaries, lists, numbers, text and arrays of bytes; anything else is refused before it runs."""

    STAND_INS = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _DType,
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy.core.numeric", "_frombuffer"): _from_buffer,  # protocol 5
        ("numpy._core.numeric", "_frombuffer"): _from_buffer,
        ("_codecs", "encode"): _encode,
    }

    def load_bytearray8(self) -> None:
        """Bytes of protocol 5, as many as the file has; Python's own makes room for as many as it says."""
        size = int.from_bytes(self.read(8), "little")  # type: ignore[attr-defined]
        self.append(bytearray(self.read(size)))  # type: ignore[attr-defined]

    dispatch: ClassVar[Any] = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: load_bytearray8}

    def find_class(self, module: str, name: str) -> Any:
        """What stands in for the few names in an array's pickle."""
        if (module, name) not in self.STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which pictures do not need; nothing was run")
        return self.STAND_INS[module, name]
