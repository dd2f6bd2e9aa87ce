"""Anyone's own pictures: one folder per class, read from files by worker processes; ImageNet in its usual layout.

Pictures stay uint8 until they are on the device that trains. Random crops depend on seed, epoch and picture alone,
neither on the number of workers nor on where a run was interrupted. In training only, a JPEG whose crop is much larger
than what is asked of it is decoded at 1/2, 1/4 or 1/8 of its size.
"""

import hashlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from datamodules.augmentation import BatchAugmentation
from datamodules.pictures import read_image
from datamodules.reading import Crops, PictureLoader, PictureSet, problems_of_all, processors, read_all, some
from datamodules.sampling import EvaluationBatches, TrainingBatches, training_batches

__all__ = ["ImageFolderDataModule", "read_image"]

ENDINGS = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
LAYOUT = "expected <root>/<class>/*.jpg, or <root>/train/<class>/*.jpg with val and test beside train"


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
        jitter: Brightness, contrast and saturation of each training image change by factors in [1 - jitter,
            1 + jitter].
        mixup: a of Beta(a, a), which gives the shares of the two images of a mixture; 0 mixes none. With this or
            ``cutmix`` training labels are the share of each class, float32 (N, num_classes).
        cutmix: a of Beta(a, a), which gives how much of each picture is left when a box of another one is pasted in;
            0 pastes none. With ``mixup``, a coin decides for each batch.
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
        jitter: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
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
        self.workers = min(4, processors()) if workers is None else workers
        self.crop_scale = crop_scale
        self.augment = BatchAugmentation(flip=flip, jitter=jitter, mixup=mixup, cutmix=cutmix)
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

    @property
    def evaluation(self) -> dict[str, int]:
        """How an evaluation makes an image of a picture: its short side is resized, then the middle is cut out."""
        return {"short_side": self.resize_size, "size": self.image_size}

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

    def check_samples(self, files: bool = True) -> list[str]:
        """What is wrong: with ``files`` after reading every file, else as far as what :meth:`setup` read tells."""
        from datamodules.checking import check  # it knows all data modules

        return check(self, self._everything, files)

    def _everything(self) -> tuple[dict[str, Any], list[str]]:
        """All pictures, and what was wrong with the folders."""
        listed: dict[str, Any] = self._split_pictures()
        if "test" in self._folders:
            listed["test"] = list_pictures(self.root, self._folders["test"], self._classes)
        return {split: part for split, part in listed.items() if split != "test" or self._has_test}, []

    def train_dataloader(self) -> PictureLoader:
        """Shuffled training batches; the order follows the run's seed, and is fixed under ``overfit_batches``."""
        pictures = _ready(self.train_set)
        batches = training_batches(self.trainer, len(pictures), self.batch_size, self._split)
        return self._loader(pictures, batches, self.crop_scale)

    def val_dataloader(self) -> PictureLoader | list[PictureLoader]:
        """Validation batches, each picture once over all processes; none where ``val_size`` is 0."""
        return self._evaluation_loader(self.val_set) if self.val_size else []

    def test_dataloader(self) -> PictureLoader:
        """Test batches, each picture once over all processes."""
        return self._evaluation_loader(self.test_set)

    def predict_dataloader(self) -> PictureLoader:
        """The test pictures, in order."""
        return self._evaluation_loader(self.test_set)

    def evaluation_dataloader(self, split: Literal["train", "val", "test"]) -> PictureLoader:
        """The pictures of a split in order, as an evaluation sees them: also those of training, their centres."""
        return self._evaluation_loader({"train": self.train_set, "val": self.val_set, "test": self.test_set}[split])

    def fingerprint(self, split: Literal["train", "val", "test"]) -> str:
        """A text that changes when a file of a split, their order, or the images' size changes."""
        pictures = _ready({"train": self.train_set, "val": self.val_set, "test": self.test_set}[split])
        digest = hashlib.sha256(f"{pictures.fingerprint()} {self.image_size} {self.resize_size}".encode())
        for name in pictures.names.tolist():
            file = os.stat(os.path.join(os.fsencode(self.root), name))
            digest.update(f"{file.st_size} {file.st_mtime_ns} ".encode())
        return digest.hexdigest()

    def on_after_batch_transfer(
        self, batch: tuple[Tensor, Tensor] | Tensor, dataloader_idx: int
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Turn uint8 images into float32 in [0, 1], in training after augmentation."""
        if isinstance(batch, Tensor):  # a model's example_input_array, on its way through Lightning's summary
            return batch
        images, labels = batch
        if self.trainer is not None and self.trainer.training:
            return self.augment(images, labels, self.num_classes, torch.zeros(3, dtype=torch.uint8))
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

    def _split_pictures(self) -> dict[str, PictureSet]:
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

    def _check_training_classes(self, pictures: PictureSet) -> None:
        counts = np.bincount(pictures.labels, minlength=self.num_classes)
        if empty := [self._classes[k] for k in np.flatnonzero(counts == 0)]:
            raise ValueError(
                f"{self._folders['train']}: no picture to train on is left in {some(empty)}. Add pictures, remove the "
                f"folder, or hold out less (val_size={self.val_size}, test_size={self.test_size})"
            )

    def _test_pictures(self) -> PictureSet:
        if not self._has_test:
            if not self.val_size:
                raise ValueError(f"there is nothing to test on: {self.root / 'test'} is missing and test_size is 0")
            rank_zero_info(f"there is no {self.root / 'test'} and test_size is 0: these are the validation pictures")
            return _ready(self.val_set)
        if "test" in self._folders:
            return self._prepare(list_pictures(self.root, self._folders["test"], self._classes), "test")
        return self._prepare(_ready(self._listed)["test"], "test")

    def _prepare(self, pictures: PictureSet, split: str) -> PictureSet:
        """Read all pictures once where that is asked for, and leave out what cannot be read."""
        if not len(pictures) or (self.corrupt == "refuse" and not self.cache):
            return pictures
        rank, world_size = self._place()
        mine = range(len(pictures)) if self.cache else range(rank, len(pictures), world_size)
        problems, kept = read_all(pictures, mine, self.resize_size if self.cache else None, self.workers)
        problems = problems_of_all(problems, world_size, self.corrupt == "refuse")
        pictures.kept = kept
        return self._without(pictures, problems, split)

    def _without(self, pictures: PictureSet, problems: dict[int, str], split: str) -> PictureSet:
        if not problems:
            return pictures
        message = f"{len(problems)} of {len(pictures)} {split} pictures cannot be read: {some(list(problems.values()))}"
        if len(problems) > len(pictures) / 2:
            raise ValueError(f"{message}. Those are too many to leave out")
        rank_zero_warn(f"{message}. They are left out")
        remaining = pictures.take(np.delete(np.arange(len(pictures)), list(problems)))
        if split == "training":
            self._check_training_classes(remaining)
        return remaining

    def _evaluation_loader(self, pictures: PictureSet | None) -> PictureLoader:
        pictures = _ready(pictures)
        return self._loader(pictures, EvaluationBatches(len(pictures), self.eval_batch_size, *self._place()), None)

    def _loader(
        self, pictures: PictureSet, batches: TrainingBatches | EvaluationBatches, crop_scale: float | None
    ) -> PictureLoader:
        crops = Crops(pictures, self.image_size, self.resize_size, crop_scale)
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return PictureLoader(crops, batches, self.workers, pin_memory=on_gpu)


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


# Folders


def find_folders(root: Path) -> dict[str, Path]:
    """The folders of ``train``, ``val`` and ``test`` as far as they exist; ``train`` is ``root`` where one holds all.

    Raises:
        FileNotFoundError: ``root`` is no folder.
        ValueError: There are folders for evaluation, but none for training; or what lies in the class folders are
            folders again.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root.absolute()}: {LAYOUT}")
    if subfolders(root / "train"):  # else it is a class of that name
        found = ((split, root / name) for split, names in FOLDERS.items() for name in names)
        return {split: folder for split, folder in found if folder.is_dir()}
    for name in (*FOLDERS["val"], *FOLDERS["test"]):
        if subfolders(root / name):
            raise ValueError(f"{root} has a folder {name} with classes but no such folder train: {LAYOUT}")
    classes = subfolders(root)
    if classes and all(_holds_folders_only(root / name) for name in classes[:10]):
        raise ValueError(f"{root / classes[0]} holds folders and no pictures, and so do those beside it: {LAYOUT}")
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
        ValueError: There are fewer than two.
    """
    classes = subfolders(folder)
    if len(classes) < 2:
        found = f"only the folder {classes[0]}" if classes else "no folders"
        raise ValueError(f"{folder} has {found}, and a classifier needs two classes at least: {LAYOUT}")
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


def list_pictures(root: Path, folder: Path, classes: list[str]) -> PictureSet:
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
        rank_zero_info(f"{folder}: {len(ignored)} files are no pictures by their names: {some(ignored)}")
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
        raise ValueError(f"{folder} has class folders that training has not: {some(more)}. Rename or remove them")
    if fewer:
        raise ValueError(f"{folder} lacks class folders that training has: {some(fewer)}. An empty folder would do")


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
