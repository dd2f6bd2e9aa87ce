"""MNIST and Fashion-MNIST: 70,000 grey pictures of 28x28 pixels in 10 classes, in the IDX format.

Sources: LeCun, Cortes and Burges, 1998 (MNIST, CC BY-SA 3.0 as commonly given);
Xiao, Rasul and Vollgraf, 2017, https://arxiv.org/abs/1708.07747 (Fashion-MNIST, MIT).
"""

import gzip
import hashlib
import math
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from datamodules.download import fetch
from datamodules.in_memory import InMemoryDataModule

FILES = {  # train? -> (images, labels)
    True: ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    False: ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
LARGEST = 2**28  # bytes that are read of a file, and unpacked


class MNISTDataModule(InMemoryDataModule):
    """Handwritten digits: batches of float32 (N, 1, 28, 28) in [0, 1] and int64 (N,) in [0, 10).

    Args:
        root: Folder with the four official IDX files, gzipped or not, or torchvision's folder above ``MNIST/raw``.
            None means ``$ZOO_DATA/mnist`` where that exists, else ``data``.
        download: Fetch what is missing to ``root/MNIST/raw``, verified by torchvision's checksums.
        batch_size: Images of a global training batch: all processes together.
        eval_batch_size: Images per process in validation, test and prediction.
        val_size: Images held out of the 60,000 training images for validation.
        split_seed: Seed of the split into training and validation.
        translate: Each training image is shifted by up to so many pixels on both axes.
    """

    num_classes = 10
    side = 28
    class_names = [str(digit) for digit in range(10)]

    def __init__(
        self,
        root: str | None = None,
        download: bool = True,
        batch_size: int = 64,
        eval_batch_size: int = 512,
        val_size: int = 5000,
        split_seed: int = 0,
        translate: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, val_size, split_seed, translate)
        self.root = _root(root, "mnist")
        self.download = download

    def prepare_data(self) -> None:
        """Make sure that the four files are there, by download if allowed."""
        prepare_idx(self.root, "MNIST", self.download)

    def read(self, train: bool) -> tuple[Tensor, Tensor]:
        """Read images, uint8 (N, 1, 28, 28), and labels, int64 (N,)."""
        return read_labelled_images(self.root, "MNIST", train, MNIST_MD5)


class FashionMNISTDataModule(InMemoryDataModule):
    """Articles of clothing: batches of float32 (N, 1, 28, 28) in [0, 1] and int64 (N,) in [0, 10).

    Args:
        root: Folder with the four official IDX files, gzipped or not, or torchvision's folder above
            ``FashionMNIST/raw``. None means ``$ZOO_DATA/fashion_mnist`` where that exists, else ``data``.
        download: Fetch what is missing to ``root/FashionMNIST/raw``, verified by torchvision's checksums.
        batch_size: Images of a global training batch: all processes together.
        eval_batch_size: Images per process in validation, test and prediction.
        val_size: Images held out of the 60,000 training images for validation.
        split_seed: Seed of the split into training and validation.
        translate: Each training image is shifted by up to so many pixels on both axes.
        flip: Mirror half of the training images left to right.
    """

    num_classes = 10
    side = 28
    class_names = [
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ]  # fmt: skip

    def __init__(
        self,
        root: str | None = None,
        download: bool = True,
        batch_size: int = 64,
        eval_batch_size: int = 512,
        val_size: int = 5000,
        split_seed: int = 0,
        translate: int = 0,
        flip: bool = False,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, val_size, split_seed, translate, flip)
        self.root = _root(root, "fashion_mnist")
        self.download = download

    def prepare_data(self) -> None:
        """Make sure that the four files are there, by download if allowed."""
        prepare_idx(self.root, "FashionMNIST", self.download)

    def read(self, train: bool) -> tuple[Tensor, Tensor]:
        """Read images, uint8 (N, 1, 28, 28), and labels, int64 (N,)."""
        return read_labelled_images(self.root, "FashionMNIST", train, FASHION_MNIST_MD5)


# MD5 of the official files, unpacked: another file of the right form is read, with a warning.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
FASHION_MNIST_MD5 = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}


def _root(root: str | None, folder: str) -> Path:
    if root is not None:
        return Path(root).expanduser()
    if "ZOO_DATA" in os.environ:
        shared = Path(os.environ["ZOO_DATA"]) / folder
        if shared.is_dir():
            return shared
    return Path("data")


def find_idx(root: Path, data_set: str, name: str) -> Path | None:
    """The file ``name``, gzipped or not, in ``root`` or in torchvision's folder below it; None if there is none."""
    for folder in (root, root / data_set / "raw"):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    return None


def prepare_idx(root: Path, data_set: str, download: bool) -> None:
    """Download the missing ones of the four files, each to a temporary folder first and moved when verified.

    Raises:
        FileNotFoundError: Files are missing and cannot be, or may not be, downloaded.
    """
    missing = [name for pair in FILES.values() for name in pair if find_idx(root, data_set, name) is None]
    if not missing:
        return
    wanted = ", ".join(f"{name}.gz" for name in missing)
    if not download:
        raise FileNotFoundError(f"{root} lacks {wanted}: put them there, or set --data.init_args.download true")
    # Imported here: a run that has its files does not pay for it.
    from torchvision.datasets import MNIST, FashionMNIST

    source = {"MNIST": MNIST, "FashionMNIST": FashionMNIST}[data_set]
    folder = root / data_set / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for file, md5 in source.resources:
        if file.removesuffix(".gz") in missing:
            rank_zero_info(f"downloading {file} to {folder}")
            fetch(source.mirrors, file, md5, folder)


def read_labelled_images(root: Path, data_set: str, train: bool, md5: dict[str, str]) -> tuple[Tensor, Tensor]:
    """Read one split: images uint8 (N, 1, H, W) and labels int64 (N,) in [0, 10).

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is truncated or corrupt, or images and labels do not belong together.
    """
    paths = [find_idx(root, data_set, name) for name in FILES[train]]
    for path, name in zip(paths, FILES[train], strict=True):
        if path is None:
            raise FileNotFoundError(f"{name}.gz is not in {root}: run prepare_data(), or give its folder as root")
    images = read_idx(paths[0], 3, md5.get(FILES[train][0]))  # type: ignore[arg-type]
    labels = read_idx(paths[1], 1, md5.get(FILES[train][1]))  # type: ignore[arg-type]
    if len(images) != len(labels):
        raise ValueError(f"{paths[0]} has {len(images)} images but {paths[1]} has {len(labels)} labels")
    if len(labels) and labels.max() > 9:
        raise ValueError(f"{paths[1]} holds the label {labels.max()}, expected 0 to 9: fetch the file again")
    return torch.from_numpy(images)[:, None], torch.from_numpy(labels).long()


def read_idx(path: Path, dimensions: int, md5: str | None = None) -> np.ndarray:
    """Read an IDX file of bytes, gzipped or not, as a writable uint8 array of so many dimensions.

    The header is two zero bytes, 8 for "unsigned byte", the number of dimensions, then each size as a big-endian
    32-bit number. A file of the right form whose content has another MD5 than expected is read with a warning.

    Raises:
        ValueError: The file is not such a file, or is truncated or corrupt.
    """
    again = "delete it and fetch it again"
    try:
        with path.open("rb") as file:
            packed = file.peek(2)[:2] == b"\x1f\x8b"
            data = gzip.GzipFile(fileobj=file).read(LARGEST) if packed else file.read(LARGEST)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is truncated or corrupt ({error}): {again}") from error
    if len(data) == LARGEST:
        raise ValueError(f"{path} has {LARGEST:,} bytes or more, the official files 47 million at most: {again}")
    if data[:4] != bytes([0, 0, 8, dimensions]):
        raise ValueError(f"{path} is no IDX file of {dimensions}-dimensional bytes (it begins {data[:4]!r}): {again}")
    header = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, header, 4))
    expected = header + math.prod(shape)
    if len(data) != expected:
        raise ValueError(f"{path} has {len(data)} bytes, expected {expected} for {shape}: {again}")
    if md5 is not None and (found := hashlib.md5(data, usedforsecurity=False).hexdigest()) != md5:
        rank_zero_warn(f"{path} differs from the official file (md5 {found}, expected {md5})")
    return np.frombuffer(bytearray(data), dtype=np.uint8, offset=header).reshape(shape)
