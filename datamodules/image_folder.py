"""Anyone's own pictures: one folder per class, read from files by worker processes; ImageNet in its usual layout.

Pictures stay uint8 until they are on the device that trains. A JPEG that is much larger than what is asked of it is
decoded at 1/2, 1/4 or 1/8 of its size, in training only; with simplejpeg installed (``pip install 'zoo[jpeg]'``) JPEGs
are decoded sooner and to the same pixels. Random crops follow Szegedy et al., 2015, Going deeper with convolutions
(section 6), in the form that torchvision gave them; they depend on seed, epoch and picture alone, neither on the number
of workers nor on where a run was interrupted.
"""

import copy
import hashlib
import io
import math
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from datamodules.augmentation import random_flip
from datamodules.sampling import EvaluationBatches, TensorLoader, TrainingBatches

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

ENDINGS = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
LAYOUT = "expected <root>/<class>/*.jpg, or <root>/train/<class>/*.jpg with val and test beside train"
ORIENTATION = 0x0112  # the EXIF tag: 1 is upright, 5 to 8 swap width and height
CHUNK = 32  # pictures that a worker reads at a time when it reads all of them


class ImageFolderDataModule(LightningDataModule):
    """Batches ``(images, labels)``: float32 (N, 3, image_size, image_size) in [0, 1]; int64 (N,) in [0, num_classes).

    Classes are the folders' names, sorted; 1,000 folders named as ImageNet's (``n01440764``) get readable names.
    Training takes a random crop of each picture, evaluation its centre, as torchvision's reference does: the short
    side is resized to ``resize_size``, then the middle ``image_size`` pixels are cut out. A picture is turned upright
    by its EXIF orientation; transparency is dropped; an animation shows its first frame.

    Args:
        root: Folder with one folder per class, or with such folders in ``train``, ``val`` and ``test``.
        image_size: Side of the images in pixels.
        resize_size: Short side of a picture before its centre is cut out; None means 256/224 of ``image_size``.
        batch_size: Images of a global training batch: all processes together.
        eval_batch_size: Images per process in validation, test and prediction.
        val_size: Pictures held out of training for validation where there is no folder for it: their number, or below
            1 their share; each class gives its part. 0 trains without validation, whatever folders there are.
        test_size: Likewise for testing. Without a folder and with 0 the validation pictures are tested on.
        split_seed: Seed of that split, apart from the run's seed so that runs compare.
        workers: Processes that read pictures, for each process that trains; 0 reads them in that one. None means as
            many as the machine has processors, but not more than 4.
        crop_scale: Least area of a random crop as a share of its picture.
        flip: Mirror half of the training images left to right.
        corrupt: What to do with a picture that cannot be read. ``refuse`` stops with its name when it is met. ``skip``
            reads all pictures once before the first batch, names those that cannot be read and leaves them out, the
            same on every process and in every epoch.
        cache: Read all pictures once and keep them in memory, uint8 with their short side at ``resize_size``: about
            ``4 * resize_size ** 2`` bytes each, in each training process. Random crops are then cut from those.

    Raises:
        FileNotFoundError: ``root`` is no folder.
        ValueError: A number is out of range, or there are not two class folders at least.
    """

    def __init__(
        self,
        root: str,
        image_size: int = 224,
        resize_size: int | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        val_size: int | float = 0.1,
        test_size: int | float = 0,
        split_seed: int = 0,
        workers: int | None = None,
        crop_scale: float = 0.08,
        flip: bool = True,
        corrupt: Literal["refuse", "skip"] = "refuse",
        cache: bool = False,
    ) -> None:
        super().__init__()
        self.root = Path(root).expanduser()
        self.image_size = image_size
        self.resize_size = image_size * 256 // 224 if resize_size is None else resize_size
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_size = val_size
        self.test_size = test_size
        self.split_seed = split_seed
        self.workers = min(4, os.cpu_count() or 1) if workers is None else workers
        self.crop_scale = crop_scale
        self.flip = flip
        self.corrupt = corrupt
        self.cache = cache
        self._check_arguments()
        self._folders = find_folders(self.root)
        self._classes = find_classes(self._folders["train"])
        self.class_names = readable_names(self._classes)
        self.num_classes = len(self._classes)
        self.train_set: PictureSet | None = None
        self.val_set: PictureSet | None = None
        self.test_set: PictureSet | None = None
        self._listed: dict[str, PictureSet] | None = None  # before anything was read
        self._split = ""

    def setup(self, stage: str) -> None:
        """List the pictures, split them alike on every process, and read them once if ``corrupt`` or ``cache`` says so.

        Raises:
            ValueError: The class folders of two splits differ, a class has nothing to train on, a picture cannot be
                read, or there is nothing to test on.
        """
        if self._listed is None:
            self._listed = self._split_pictures()
        if stage == "fit" and self.train_set is None:
            self.train_set = self._prepare(self._listed["train"], "training")
            self._split = self.train_set.fingerprint()
        if (stage in ("fit", "validate") or not self._has_test) and self.val_set is None:
            self.val_set = self._prepare(self._listed["val"], "validation")
        if stage in ("test", "predict") and self.test_set is None:
            self.test_set = self._test_pictures()

    def train_dataloader(self) -> "PictureLoader":
        """Shuffled training batches; the order follows the run's seed, and is fixed under ``overfit_batches``."""
        pictures = _ready(self.train_set)
        # Without seed_everything each process has a seed of its own, and their shares would overlap: take rank 0's.
        seed = torch.initial_seed() % 2**63
        seed = seed if self.trainer is None else self.trainer.strategy.broadcast(seed)
        shuffle = self.trainer is None or not self.trainer.overfit_batches  # type: ignore[attr-defined]
        rank, world_size = self._place()
        batches = TrainingBatches(len(pictures), self.batch_size, seed, shuffle, rank, world_size, split=self._split)
        return self._loader(pictures, batches, self.crop_scale)

    def val_dataloader(self) -> "PictureLoader | list[PictureLoader]":
        """Validation batches, each picture once over all processes; none where ``val_size`` is 0."""
        return self._evaluation_loader(self.val_set) if self.val_size else []

    def test_dataloader(self) -> "PictureLoader":
        """Test batches, each picture once over all processes."""
        return self._evaluation_loader(self.test_set)

    def predict_dataloader(self) -> "PictureLoader":
        """The test pictures, in order."""
        return self._evaluation_loader(self.test_set)

    def on_after_batch_transfer(
        self, batch: tuple[Tensor, Tensor] | Tensor, dataloader_idx: int
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Turn uint8 images into float32 in [0, 1], in training after augmentation."""
        if isinstance(batch, Tensor):  # a model's example_input_array, on its way through Lightning's summary
            return batch
        images, labels = batch
        if self.flip and self.trainer is not None and self.trainer.training:
            images = random_flip(images)
        return images.float().div_(255), labels

    def _check_arguments(self) -> None:
        least = {"image_size": 1, "resize_size": self.image_size, "eval_batch_size": 1, "workers": 0}
        for name, value in (least | {"val_size": 0, "test_size": 0}).items():
            if getattr(self, name) < value:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {value}")
        if not 0 < self.crop_scale <= 1:
            raise ValueError(f"crop_scale={self.crop_scale} is a share of a picture's area: it must lie in (0, 1]")
        if self.corrupt not in ("refuse", "skip"):
            raise ValueError(f"corrupt={self.corrupt!r} must be refuse or skip")

    @property
    def _has_test(self) -> bool:
        return "test" in self._folders or self.test_size > 0

    def _place(self) -> tuple[int, int]:
        """Rank and number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _split_pictures(self) -> dict[str, "PictureSet"]:
        """The pictures of each split, as far as the folders for training and validation hold them."""
        pictures = list_pictures(self.root, self._folders["train"], self._classes)
        total = len(pictures)
        order = stratified_order(pictures.labels, self.split_seed)
        val = 0 if "val" in self._folders else _number(self.val_size, total)
        test = 0 if "test" in self._folders else _number(self.test_size, total)
        held_out = {"val": order[:val], "test": order[val : val + test], "train": order[val + test :]}
        listed = {split: pictures.take(np.sort(chosen)) for split, chosen in held_out.items()}
        self._check_training_classes(listed["train"])
        if "val" in self._folders and self.val_size:
            listed["val"] = list_pictures(self.root, self._folders["val"], self._classes)
        return listed

    def _check_training_classes(self, pictures: "PictureSet") -> None:
        counts = np.bincount(pictures.labels, minlength=self.num_classes)
        if empty := [self._classes[k] for k in np.flatnonzero(counts == 0)]:
            raise ValueError(
                f"{self._folders['train']}: no picture to train on is left in {_some(empty)}. Add pictures, remove the "
                f"folder, or hold out less (val_size={self.val_size}, test_size={self.test_size})"
            )

    def _test_pictures(self) -> "PictureSet":
        if not self._has_test:
            if not self.val_size:
                raise ValueError(f"there is nothing to test on: {self.root / 'test'} is missing and test_size is 0")
            rank_zero_info(f"there is no {self.root / 'test'} and test_size is 0: these are the validation pictures")
            return _ready(self.val_set)
        if "test" in self._folders:
            return self._prepare(list_pictures(self.root, self._folders["test"], self._classes), "test")
        return self._prepare(_ready(self._listed)["test"], "test")

    def _prepare(self, pictures: "PictureSet", split: str) -> "PictureSet":
        """Read all pictures once where that is asked for, and leave out what cannot be read."""
        if not len(pictures) or (self.corrupt == "refuse" and not self.cache):
            return pictures
        rank, world_size = self._place()
        mine = range(len(pictures)) if self.cache else range(rank, len(pictures), world_size)
        problems, kept = read_all(pictures, mine, self.resize_size if self.cache else None, self.workers)
        if world_size > 1:
            everyone: list[Any] = [None] * world_size
            torch.distributed.all_gather_object(everyone, problems)
            problems = dict(sorted(item for share in everyone for item in share.items()))
        if problems and self.corrupt == "refuse":
            raise ValueError(next(iter(problems.values())) + SKIP)
        pictures.kept = kept
        return self._without(pictures, problems, split)

    def _without(self, pictures: "PictureSet", problems: dict[int, str], split: str) -> "PictureSet":
        if not problems:
            return pictures
        message = (
            f"{len(problems)} of {len(pictures)} {split} pictures cannot be read: {_some(list(problems.values()))}"
        )
        if len(problems) > len(pictures) / 2:
            raise ValueError(f"{message}. Those are too many to leave out")
        rank_zero_warn(f"{message}. They are left out")
        remaining = pictures.take(np.delete(np.arange(len(pictures)), list(problems)))
        if split == "training":
            self._check_training_classes(remaining)
        return remaining

    def _evaluation_loader(self, pictures: "PictureSet | None") -> "PictureLoader":
        pictures = _ready(pictures)
        return self._loader(pictures, EvaluationBatches(len(pictures), self.eval_batch_size, *self._place()), None)

    def _loader(
        self, pictures: "PictureSet", batches: TrainingBatches | EvaluationBatches, crop_scale: float | None
    ) -> "PictureLoader":
        crops = Crops(pictures, self.image_size, self.resize_size, crop_scale)
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return PictureLoader(crops, batches, self.workers, pin_memory=on_gpu)


SKIP = ". Mend or remove it, or have such files left out by --data.init_args.corrupt skip"


def _ready(value: Any) -> Any:
    if value is None:
        raise RuntimeError("call ImageFolderDataModule.setup() before asking for its batches")
    return value


def _number(size: int | float, total: int) -> int:
    """How many of ``total`` pictures a size means: a number, or below 1 a share."""
    number = math.ceil(size * total) if size < 1 else int(size)
    if number >= total:
        raise ValueError(f"{size} of {total} pictures leaves nothing to train on")
    return number


def _some(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


# Folders


def find_folders(root: Path) -> dict[str, Path]:
    """The folders of ``train``, ``val`` and ``test`` as far as they exist; ``train`` is ``root`` where one holds all.

    Raises:
        FileNotFoundError: ``root`` is no folder.
        ValueError: There are folders for evaluation, but none for training.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root.absolute()}: {LAYOUT}")
    if subfolders(root / "train"):  # else it is a class of that name
        found = ((split, root / name) for split, names in FOLDERS.items() for name in names)
        return {split: folder for split, folder in found if folder.is_dir()}
    for name in (*FOLDERS["val"], *FOLDERS["test"]):
        if subfolders(root / name):
            raise ValueError(f"{root} has a folder {name} with classes but no such folder train: {LAYOUT}")
    return {"train": root}


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in ``folder``, sorted, without hidden ones; none where there is no such folder."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def find_classes(folder: Path) -> list[str]:
    """The class folders, sorted.

    Raises:
        ValueError: There are fewer than two, or what lies in them are folders again.
    """
    classes = subfolders(folder)
    if len(classes) < 2:
        found = f"only the folder {classes[0]}" if classes else "no folders"
        raise ValueError(f"{folder} has {found}, and a classifier needs two classes at least: {LAYOUT}")
    if all(_holds_folders_only(folder / name) for name in classes[:10]):
        raise ValueError(f"{folder / classes[0]} holds folders and no pictures, and so do those beside it: {LAYOUT}")
    return classes


def _holds_folders_only(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        kinds = {entry.is_dir() for entry in entries if not entry.name.startswith(".")}
    return kinds == {True}


def readable_names(classes: list[str]) -> list[str]:
    """The folders' names, or ImageNet's words for its 1,000 folders, whose order is torchvision's."""
    if len(classes) != 1000 or not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return classes
    from torchvision.models import get_weight  # imported here: it costs a second

    return list(get_weight("ResNet18_Weights.IMAGENET1K_V1").meta["categories"])


def list_pictures(root: Path, folder: Path, classes: list[str]) -> "PictureSet":
    """The pictures of ``folder``, by class and name; those in folders of a class folder belong to the class.

    Raises:
        ValueError: Its class folders are not ``classes``, or there are no pictures in them.
    """
    _compare_classes(folder, subfolders(folder), classes)
    names, labels, ignored = [], [], []
    for label, name in enumerate(classes):
        for file in walk(folder / name):
            if file.lower().endswith(ENDINGS):
                names.append(os.path.relpath(file, root))
                labels.append(label)
            else:
                ignored.append(file)
    if ignored:
        rank_zero_info(f"{folder}: {len(ignored)} files are no pictures by their names: {_some(ignored)}")
    if not names:
        raise ValueError(f"{folder} has no pictures in its class folders; looked for {', '.join(ENDINGS)}")
    return PictureSet(root, np.array([os.fsencode(name) for name in names]), np.array(labels))


def _compare_classes(folder: Path, found: list[str], classes: list[str]) -> None:
    if not found:
        raise ValueError(
            f"{folder} has no class folders: sort its pictures into folders named as those for training. (ImageNet's "
            "validation archive is sorted by torchvision.datasets.ImageNet(root, 'val'), with the devkit beside it)"
        )
    more, fewer = sorted(set(found) - set(classes)), sorted(set(classes) - set(found))
    if more:
        raise ValueError(f"{folder} has class folders that training has not: {_some(more)}. Rename or remove them")
    if fewer:
        raise ValueError(f"{folder} lacks class folders that training has: {_some(fewer)}. An empty folder would do")


def walk(folder: Path) -> Iterator[str]:
    """All files below ``folder`` but hidden ones, sorted."""
    for path, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):  # also ._name.jpg, which macOS leaves behind
                yield os.path.join(path, name)


def stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """An order, int64 (N,), any beginning of which has of each class its share, to within a picture.

    Picture k of the n of a class, shuffled, is placed at (k + 1/2) / n; ties are broken at random.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels)
    within = np.concatenate([np.arange(count) for count in counts])
    place = (within + 0.5) / np.repeat(counts, counts)
    return by_class[np.lexsort((rng.random(len(labels)), place))]


# Pictures


def read_image(path: str | Path) -> Tensor:
    """Read a picture: RGB, uint8 (3, H, W), turned upright by its EXIF orientation.

    Grey, palette, CMYK and 16-bit pictures become RGB of 8 bits; transparency is dropped; an animation gives its first
    frame. Damage that a decoder conceals (a flipped bit inside a JPEG) is not found.

    Raises:
        ValueError: The file is no picture, or is truncated or corrupt; the message names it.
        OSError: The file cannot be read.
    """
    pixels = Picture(path).pixels()
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).contiguous()


class Picture:
    """An opened picture whose size is known; a JPEG is decoded when its pixels are asked for.

    Args:
        path: Its file.

    Raises:
        ValueError: The file is no picture, or is corrupt; the message names it.
        OSError: The file cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self._data = Path(path).read_bytes()
        if not self._data:
            raise ValueError(f"{path} is empty (0 bytes)")
        try:
            self._image = Image.open(io.BytesIO(self._data))
            self.is_jpeg = self._image.format in ("JPEG", "MPO")
            if not self.is_jpeg:
                self._image.load()  # TIFF knows its size and orientation only then
            self._orientation = self._image.getexif().get(ORIENTATION, 1)
        except Exception as error:  # whatever a decoder raises: OSError, SyntaxError, struct.error, …
            raise self._unreadable(error) from error
        width, height = self._image.size
        self.height, self.width = (width, height) if self._orientation in (5, 6, 7, 8) else (height, width)

    def pixels(self, shrink: int = 1) -> np.ndarray:
        """Its upright pixels, uint8 (H, W, 3), which is a view where it had to be turned.

        Args:
            shrink: 1, 2, 4 or 8: a JPEG is decoded at that fraction of its size, rounded up.

        Raises:
            ValueError: The picture is truncated or corrupt; the message names its file.
        """
        try:
            pixels = self._decode_jpeg(shrink) if self.is_jpeg else _to_rgb(self._image)
        except Exception as error:
            raise self._unreadable(error) from error
        return _upright(pixels, self._orientation)

    def _decode_jpeg(self, shrink: int) -> np.ndarray:
        width, height = self._image.size
        if simplejpeg is not None and self._image.mode in ("RGB", "L"):
            least = {"min_width": -(-width // shrink), "min_height": -(-height // shrink)}
            try:
                return simplejpeg.decode_jpeg(self._data, "RGB", **least)
            except ValueError:
                pass  # it is stricter than Pillow, which has the last word
        self._image.draft(self._image.mode, (width // shrink, height // shrink))
        return _to_rgb(self._image)

    def _unreadable(self, error: Exception) -> ValueError:
        reason = str(error) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"it begins with {self._data[:16]!r}, which is no known format"
        return ValueError(f"{self.path} cannot be read as a picture: {reason}")


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Pixels of a Pillow picture as uint8 (H, W, 3)."""
    if image.mode.startswith("I"):  # 16 bits, in "I" of 32 with older Pillow: keep the upper eight
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of which it does not say the range")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn pixels (H, W, 3) by an EXIF orientation; a view."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def random_box(rng: np.random.Generator, height: int, width: int, least_area: float) -> tuple[int, int, int, int]:
    """Draw a box (top, left, height, width) of an area uniform in [least_area, 1] of the picture's.

    Its width is 3/4 to 4/3 of its height, uniform in the logarithm; after ten tries that do not fit it is the largest
    such box in the centre. The same distribution as torchvision's ``RandomResizedCrop``.
    """
    for area, log_ratio in zip(rng.uniform(least_area, 1, 10), rng.uniform(-1, 1, 10), strict=True):
        ratio = (4 / 3) ** log_ratio
        w = round(math.sqrt(height * width * area * ratio))
        h = round(math.sqrt(height * width * area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(pixels: np.ndarray, height: int, width: int) -> Tensor:
    """Resize pixels (H, W, 3) to uint8 (3, height, width): bilinear, antialiased, as Pillow to within a grey level."""
    if any(stride < 0 for stride in pixels.strides):  # a tensor cannot be such a view
        pixels = np.ascontiguousarray(pixels)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return F.interpolate(image, (height, width), mode="bilinear", antialias=True)[0]


def resize_short_side(pixels: np.ndarray, size: int) -> Tensor:
    """Resize pixels (H, W, 3) so that the short side is ``size``; torchvision's ``Resize(size)``."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    if max(height, width) > 16 * short:  # a line of pixels would become a picture of gigabytes: keep its middle
        top, left = (max(0, (side - 16 * short) // 2) for side in (height, width))
        return resize_short_side(pixels[top : top + 16 * short, left : left + 16 * short], size)
    return resize(pixels, int(size * height / short), int(size * width / short))


def centre(image: Tensor, size: int) -> Tensor:
    """Cut the middle ``size`` x ``size`` pixels out of an image (3, H, W); torchvision's ``CenterCrop(size)``."""
    top, left = (round((side - size) / 2) for side in image.shape[1:])
    return image[:, top : top + size, left : left + size]


# Reading by worker processes


class PictureSet:
    """Pictures by index.

    Names are in one array: of a list each worker would come to hold a copy of its own
    (https://github.com/pytorch/pytorch/issues/13246).

    Args:
        root: Folder that the names start from.
        names: Files, bytes (N,).
        labels: Their classes, int64 (N,).
        kept: The pictures in memory, if they are kept there.
    """

    def __init__(self, root: Path, names: np.ndarray, labels: np.ndarray, kept: "KeptPictures | None" = None) -> None:
        self.root = root
        self.names = names
        self.labels = labels
        self.kept = kept

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """The file of a picture."""
        return self.root / os.fsdecode(self.names[index])

    def take(self, indices: np.ndarray) -> "PictureSet":
        """Some of the pictures."""
        kept = None if self.kept is None else KeptPictures(self.kept.pieces, self.kept.places[indices])
        return PictureSet(self.root, self.names[indices], self.labels[indices], kept)

    def fingerprint(self) -> str:
        """What stays the same as long as these are the same files in the same order, wherever the root is."""
        return hashlib.sha256(b"\0".join(self.names.tolist())).hexdigest()[:16]


class KeptPictures:
    """Decoded pictures of different sizes in memory: in few large tensors, since to share one costs a file handle.

    Args:
        pieces: The pixels of many pictures in one tensor each, uint8 (bytes,).
        places: For each picture its piece, where it begins there, height and width; int64 (N, 4).
    """

    def __init__(self, pieces: list[Tensor], places: np.ndarray) -> None:
        self.pieces = pieces
        self.places = places

    def pixels(self, index: int) -> np.ndarray:
        """The pixels of a picture, uint8 (H, W, 3); a view."""
        piece, start, height, width = self.places[index].tolist()
        return self.pieces[piece][start : start + height * width * 3].view(height, width, 3).numpy()


class Crops(Dataset):
    """Crops of pictures as one batch: what a worker process does.

    A job is ``(seed, epoch, indices)``; its result is uint8 (N, 3, image_size, image_size), or its error.

    Args:
        pictures: Where from.
        image_size: Side of the crops.
        resize_size: Short side of a picture of which the centre is cut out.
        crop_scale: Least share of a picture's area in a random crop; None cuts out the centre.
    """

    def __init__(self, pictures: PictureSet, image_size: int, resize_size: int, crop_scale: float | None) -> None:
        self.pictures = pictures
        self.image_size = image_size
        self.resize_size = resize_size
        self.crop_scale = crop_scale

    def __getitems__(self, job: tuple[int, int, list[int]]) -> Tensor | Exception:
        seed, epoch, indices = job
        crops = torch.empty(len(indices), 3, self.image_size, self.image_size, dtype=torch.uint8)
        try:
            for row, index in enumerate(indices):
                if self.crop_scale is None:
                    crops[row] = self.centre(index)
                else:
                    crops[row] = self.random(seed, epoch, index, self.crop_scale)
        except (OSError, ValueError) as error:  # raised by the loader: from here it would come wrapped in a traceback
            return error
        return crops

    def centre(self, index: int) -> Tensor:
        """The middle of a picture, uint8 (3, image_size, image_size)."""
        if self.pictures.kept is not None:
            image = torch.from_numpy(self.pictures.kept.pixels(index)).permute(2, 0, 1)
        else:
            image = resize_short_side(Picture(self.pictures.path(index)).pixels(), self.resize_size)
        return centre(image, self.image_size)

    def random(self, seed: int, epoch: int, index: int, least_area: float) -> Tensor:
        """A random box of a picture, resized to uint8 (3, image_size, image_size)."""
        rng = np.random.default_rng([seed, epoch, index])
        size, shrink = self.image_size, 1
        if self.pictures.kept is not None:
            pixels = self.pictures.kept.pixels(index)
            top, left, height, width = random_box(rng, pixels.shape[0], pixels.shape[1], least_area)
        else:
            picture = Picture(self.pictures.path(index))
            top, left, height, width = random_box(rng, picture.height, picture.width, least_area)
            if picture.is_jpeg:
                shrink = next((s for s in (8, 4, 2) if min(height, width) >= s * size), 1)
            pixels = picture.pixels(shrink)
        rows = slice(round(top / shrink), round((top + height) / shrink))
        columns = slice(round(left / shrink), round((left + width) / shrink))
        return resize(pixels[rows, columns], size, size)


class WholePictures(Dataset):
    """Pictures read from end to end, to find those that cannot be and, if asked, to keep the others.

    A job is a list of indices; its result is the pixels of all pictures, uint8 (bytes,), and for each of them its
    (height, width), what is wrong with it, or the error that has nothing to do with it.

    Args:
        pictures: Where from.
        resize_size: Short side of the pictures that are kept; None keeps none.
    """

    def __init__(self, pictures: PictureSet, resize_size: int | None) -> None:
        self.pictures = pictures
        self.resize_size = resize_size

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, list[tuple[int, int] | str | OSError]]:
        pieces = [torch.empty(0, dtype=torch.uint8)]
        outcomes: list[tuple[int, int] | str | OSError] = []
        for index in indices:
            try:
                image = self.read(index)
                pieces.append(image.permute(1, 2, 0).reshape(-1))
                outcomes.append((image.shape[1], image.shape[2]))
            except ValueError as error:
                outcomes.append(str(error))
            except OSError as error:
                outcomes.append(error)
        return torch.cat(pieces), outcomes

    def read(self, index: int) -> Tensor:
        """A picture to keep, uint8 (3, H, W), or without pixels."""
        picture = Picture(self.pictures.path(index))
        if self.resize_size is not None:
            return resize_short_side(picture.pixels(), self.resize_size)
        picture.pixels(shrink=8)
        return torch.empty(3, 0, 0, dtype=torch.uint8)


def read_all(
    pictures: PictureSet, indices: range, resize_size: int | None, workers: int
) -> tuple[dict[int, str], KeptPictures | None]:
    """Read pictures from end to end.

    Args:
        pictures: Where from.
        indices: Which of them.
        resize_size: Short side of the pictures that are kept; None keeps none.
        workers: Processes that read.

    Returns:
        What is wrong with the pictures that cannot be read, by index; and all pictures, if they are kept.

    Raises:
        OSError: A file cannot be read for a reason that is not its own.
    """
    rank_zero_info(f"reading {len(pictures)} pictures once")
    chunks = [list(indices[start : start + CHUNK]) for start in range(0, len(indices), CHUNK)]
    reader = WholePictures(pictures, resize_size)
    problems: dict[int, str] = {}
    kept, places = [], np.zeros((len(pictures), 4), dtype=np.int64)
    loader = _data_loader(reader, chunks, workers)
    for number, (chunk, (piece, outcomes)) in enumerate(zip(chunks, loader, strict=True)):
        kept.append(piece.clone())  # out of the memory that is shared with the worker
        start = 0
        for index, outcome in zip(chunk, outcomes, strict=True):
            if isinstance(outcome, OSError):
                raise outcome
            if isinstance(outcome, str):
                problems[index] = outcome
            else:
                places[index] = number, start, *outcome
                start += 3 * outcome[0] * outcome[1]
    return problems, None if resize_size is None else KeptPictures(kept, places)


class PictureLoader(TensorLoader):
    """Batches ``(images, labels)``, uint8 and int64, whose images are read ahead by worker processes.

    Args:
        crops: What a worker does.
        batch_sampler: Which pictures make a batch; its place is that of the last batch that was handed out.
        workers: Number of processes; 0 reads in this one.
        pin_memory: Whether to put images where a GPU fetches them fastest.
    """

    def __init__(
        self, crops: Crops, batch_sampler: TrainingBatches | EvaluationBatches, workers: int, pin_memory: bool = False
    ) -> None:
        super().__init__((torch.from_numpy(crops.pictures.labels),), batch_sampler)
        self._images = _data_loader(crops, Ahead(batch_sampler), workers, pin_memory)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        # Both begin at the same place, since a generator does nothing before its first batch is taken.
        for images, (labels,) in zip(self._images, super().__iter__(), strict=True):
            if isinstance(images, Exception):
                raise type(images)(f"{images}{SKIP}") if isinstance(images, ValueError) else images
            yield images, labels


class Ahead:
    """The order of ``batches`` from its place on, as jobs for workers, who take them sooner than it does."""

    def __init__(self, batches: TrainingBatches | EvaluationBatches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[int, int, list[int]]]:
        ahead = copy.copy(self.batches)
        for index in ahead:
            seed, epoch = (ahead.seed, ahead.epoch) if isinstance(ahead, TrainingBatches) else (0, 0)
            yield seed, epoch, index.tolist()


def _data_loader(dataset: Dataset, jobs: Any, workers: int, pin_memory: bool = False) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=jobs,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_leave_interrupts_to_the_parent,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # its seed for the workers would else be drawn from the run's random numbers
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_interrupts_to_the_parent(worker: int) -> None:
    """Ctrl+C reaches all processes of a terminal; the run may save and end in order as long as its workers go on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
