"""Pictures with objects: what data modules for detection, segmentation and keypoints share.

Pictures and masks stay uint8 until they are on the device that trains. Augmentation is torchvision's (v2), for boxes,
masks and keypoints alike; it follows from seed, epoch and picture alone, neither from the number of workers nor from
where a run was interrupted.
"""

import hashlib
import os
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.annotations import AnnotatedPictures, Findings
from datamodules.picture_augmentation import (
    Augmentation,
    Target,
    key_points_of_torchvision,
    new_size,
    resized,
    resized_target,
    swapped_keypoints,
)
from datamodules.pictures import resize
from datamodules.reading import AheadLoader, problems_of_all, processors, read_each, warn_of_unreadable
from datamodules.sampling import EvaluationBatches, TrainingBatches, split_at_random, training_batches

Split = Literal["train", "val", "test"]
Batch = tuple[list[Tensor], list[Target]]

CACHE_BYTES = 2**30  # pictures that need no more memory are kept by default


class DetectionDataModule(LightningDataModule):
    """Abstract: batches ``(images, targets)``, a list of images and a list of what is on each of them.

    After the transfer an image is float32 (3, H, W) in [0, 1], each of its own size; a target has torchvision's keys:
    ``boxes`` float32 (R, 4), x1, y1, x2, y2 in pixels, R may be 0; ``labels`` int64 (R,) in 1 … ``num_classes``;
    ``masks`` uint8 (R, H, W) and ``keypoints`` float32 (R, K, 3), x, y and visibility 0, 1 or 2, where they are asked
    for; ``image_id`` int64 (); ``area`` float32 (R,); ``iscrowd`` int64 (R,). Training leaves out crowds (objects to
    ignore) and cuts boxes at the picture's edge; evaluation has both as the files do.

    A subclass sets the attributes below before its constructor ends, and defines :meth:`read`.

    Args:
        batch_size: Pictures of a global training batch: all processes together.
        eval_batch_size: Pictures per process in validation, test and prediction.
        size: Resize every picture: a number is the length of its longer side, ``[height, width]`` its size whatever
            its shape was. Evaluation is then of the resized pictures, boxes and masks. None leaves them as they are.
        flip: Mirror half of the training pictures left to right; keypoints named ``left_`` and ``right_`` change
            places.
        scale_jitter: Enlarge each training picture by a factor from this range, ``[least, most]``, and cut out or pad
            with black at random what then differs from the size it had.
        iou_crop: Cut random boxes out of training pictures, as SSD does (Liu et al., 2016, arXiv:1512.02325).
        masks: Read masks.
        keypoints: Read keypoints.
        val_size: Pictures held out of training for validation where the data has none of its own: their number, or
            below 1 their share. 0 trains without validation.
        test_size: Likewise for testing. Where there are none the validation pictures are tested on.
        split_seed: Seed of that split, apart from the run's seed so that runs compare.
        keep_empty: Train on pictures without objects too.
        corrupt: What to do with a picture that cannot be read and with an entry that makes no sense. ``refuse`` stops
            with its name. ``skip`` reads all pictures once before the first batch, and leaves out what is wrong, the
            same on every process; the report counts it.
        cache: Keep decoded pictures in memory, in each training process. None does so where those of a split need no
            more than 1 GiB.
        workers: Processes that read pictures, for each process that trains; 0 reads them in that one. None means as
            many as the machine has processors, but not more than 4.

    Raises:
        ValueError: A number is out of range.
    """

    num_classes: int  # without background
    class_names: list[str]  # of the labels 1, 2, …
    category_ids: list[int]  # of the same, as the files have them
    keypoint_names: list[str] = []
    skeleton: list[list[int]] = []  # pairs of keypoints that a line joins, counted from 0
    own_splits: tuple[str, ...]  # those that the data itself has

    def __init__(
        self,
        batch_size: int,
        eval_batch_size: int,
        size: list[int] | int | None,
        flip: bool,
        scale_jitter: list[float] | None,
        iou_crop: bool,
        masks: bool,
        keypoints: bool,
        val_size: int | float,
        test_size: int | float,
        split_seed: int,
        keep_empty: bool,
        corrupt: Literal["refuse", "skip"],
        cache: bool | None,
        workers: int | None,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.size = tuple(size) if isinstance(size, (list, tuple)) else size
        self.flip = flip
        self.scale_jitter = None if scale_jitter is None else tuple(scale_jitter)
        self.iou_crop = iou_crop
        self.masks = masks
        self.keypoints = keypoints
        self.val_size = val_size
        self.test_size = test_size
        self.split_seed = split_seed
        self.keep_empty = keep_empty
        self.corrupt = corrupt
        self.cache = cache
        self.workers = min(4, processors()) if workers is None else workers
        self._check_arguments()
        self.train_set: AnnotatedPictures | None = None
        self.val_set: AnnotatedPictures | None = None
        self.test_set: AnnotatedPictures | None = None
        self._parts: dict[str, AnnotatedPictures] = {}  # of the training pictures, before they were read
        self._findings: dict[str, Findings] = {}
        self._split = ""

    @property
    def evaluation(self) -> dict[str, Any]:
        """How an evaluation makes an image of a picture: ``size`` as the argument has it."""
        return {"size": list(self.size) if isinstance(self.size, tuple) else self.size}

    def read(self, split: Split, findings: "Findings") -> "AnnotatedPictures":
        """Read the annotations of one of ``own_splits``, and tell ``findings`` what is wrong with them."""
        raise NotImplementedError(f"{type(self).__name__} must define read()")

    def setup(self, stage: str) -> None:
        """Read the annotations, split them alike on every process, and print the report.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: An entry makes no sense or a picture cannot be read, or there is nothing to train or test on.
        """
        known = self._found()
        if stage == "fit" and self.train_set is None:
            self.train_set = self._prepare("train")
            self._split = self.train_set.fingerprint()
        if (stage in ("fit", "validate") or not self._has_test) and self.val_set is None and self.val_size:
            self.val_set = self._prepare("val")
        if stage in ("test", "predict") and self.test_set is None:
            self.test_set = self._prepare("test") if self._has_test else self._validation_as_test()
        if new := [split for split in self._found() if split not in known]:
            rank_zero_info("\n".join(self._report_of(split) for split in new))

    def report(self) -> str:
        """How many pictures and objects each split has that was read so far, and what was left out and why."""
        return "\n".join(self._report_of(split) for split in self._found())

    def check_samples(self, files: bool = True) -> list[str]:
        """What is wrong: with ``files`` after reading every file, else as far as what :meth:`setup` read tells."""
        from datamodules.checking import check  # it knows all data modules

        return check(self, self._everything, files)

    def _everything(self) -> tuple[dict[str, Any], list[str]]:
        """All pictures, and what was wrong with their annotations."""
        wanted: dict[Split, bool] = {"train": True, "val": self.val_size > 0, "test": self._has_test}
        parts: dict[str, Any] = {split: self._listed(split) for split in wanted if wanted[split]}
        return parts, [line for split, findings in self._findings.items() for line in findings.wrong(split)]

    def _report_of(self, split: str) -> str:
        summary = self._found()[split].summary(self.class_names)
        findings = self._findings[split].lines() if split in self._findings else []
        return "\n  ".join([f"{split}: {summary}", *findings])

    def _found(self) -> dict[str, "AnnotatedPictures"]:
        """The splits that were read so far; the validation pictures once, if they are tested on."""
        sets = {"train": self.train_set, "val": self.val_set}
        sets |= {} if self.test_set is self.val_set else {"test": self.test_set}
        return {split: pictures for split, pictures in sets.items() if pictures is not None}

    def train_dataloader(self) -> "DetectionLoader":
        """Shuffled training batches; the order follows the run's seed, and is fixed under ``overfit_batches``."""
        pictures = _ready(self.train_set)
        batches = training_batches(self.trainer, len(pictures), self.batch_size, self._split)
        swaps = swapped_keypoints(self.keypoint_names) if self.keypoints else []
        augmentation = Augmentation(self.flip, swaps, self.iou_crop, self.scale_jitter)
        return self._loader(Samples(pictures, self.size, self.masks, self.keypoints, augmentation), batches)

    def val_dataloader(self) -> "DetectionLoader | list[DetectionLoader]":
        """Validation batches, each picture once over all processes; none where ``val_size`` is 0."""
        return self._evaluation_loader(self.val_set) if self.val_size else []

    def test_dataloader(self) -> "DetectionLoader":
        """Test batches, each picture once over all processes."""
        return self._evaluation_loader(self.test_set)

    def predict_dataloader(self) -> "DetectionLoader":
        """The test pictures, in order."""
        return self._evaluation_loader(self.test_set)

    def evaluation_dataloader(self, split: Split) -> "DetectionLoader":
        """The pictures of a split in order, as an evaluation sees them: also those of training."""
        return self._evaluation_loader({"train": self.train_set, "val": self.val_set, "test": self.test_set}[split])

    def fingerprint(self, split: Split) -> str:
        """A text that changes when a picture of a split, its annotations, or the pictures' size changes."""
        pictures = _ready({"train": self.train_set, "val": self.val_set, "test": self.test_set}[split])
        digest = hashlib.sha256(f"{pictures.fingerprint()} {self.size} {self.masks} {self.keypoints}".encode())
        for index in range(len(pictures)):
            file = os.stat(pictures.path(index))
            digest.update(f"{file.st_size} {file.st_mtime_ns} ".encode())
        for array in pictures.arrays():
            digest.update(array.tobytes())
        return digest.hexdigest()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Nothing to do for what is there already: Lightning's walk through the batch takes time."""
        if _is_batch(batch) and device.type == "cpu":
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn uint8 images into float32 in [0, 1]."""
        if not _is_batch(batch):  # a model's example_input_array, on its way through Lightning's summary
            return batch
        images, targets = batch
        return [image.float().div_(255) for image in images], targets

    def _check_arguments(self) -> None:
        for name, least in {"eval_batch_size": 1, "workers": 0, "val_size": 0, "test_size": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        sides = self.size if isinstance(self.size, tuple) else (self.size, 1)
        if self.size is not None and (len(sides) != 2 or any(not isinstance(s, int) or s < 1 for s in sides)):
            raise ValueError(f"size={self.size} must be the longer side in pixels, or [height, width]")
        jitter = self.scale_jitter
        if jitter is not None and (len(jitter) != 2 or not 0 < jitter[0] <= jitter[1] < float("inf")):
            raise ValueError(f"scale_jitter={list(jitter)} must be [least, most], two factors above 0")
        if self.corrupt not in ("refuse", "skip"):
            raise ValueError(f"corrupt={self.corrupt!r} must be refuse or skip")
        if self.keypoints and (self.iou_crop or jitter):
            key_points_of_torchvision()

    @property
    def _has_test(self) -> bool:
        return "test" in self.own_splits or self.test_size > 0

    def _place(self) -> tuple[int, int]:
        """Rank and number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _validation_as_test(self) -> "AnnotatedPictures":
        if not self.val_size:
            raise ValueError("there is nothing to test on: the data has no test pictures, and test_size is 0")
        rank_zero_info("the data has no test pictures and test_size is 0: these are the validation pictures")
        return _ready(self.val_set)

    def _listed(self, split: Split) -> "AnnotatedPictures":
        """The pictures of a split, before any was read."""
        if split != "train" and split in self.own_splits:
            return self._annotations(split)
        if not self._parts:
            self._parts = self._split_training(self._annotations("train"))
        return self._parts[split]

    def _annotations(self, split: Split) -> "AnnotatedPictures":
        findings = self._findings.setdefault(split, Findings(self.corrupt == "skip"))
        return self.read(split, findings)

    def _split_training(self, pictures: "AnnotatedPictures") -> dict[str, "AnnotatedPictures"]:
        val = 0 if "val" in self.own_splits else self.val_size
        test = 0 if "test" in self.own_splits else self.test_size
        parts = split_at_random(len(pictures), val, test, self.split_seed)
        return {name: pictures.take(chosen) for name, chosen in parts.items()}

    def _prepare(self, split: Split) -> "AnnotatedPictures":
        """The pictures of a split; read once where that is asked for, without those that cannot be read."""
        pictures = self._listed(split)
        if split == "train" and not self.keep_empty:
            filled = np.array([len(pictures.trained(i)) > 0 for i in range(len(pictures))], dtype=bool)
            self._findings[split].count("pictures without objects", int((~filled).sum()))
            pictures = pictures.take(np.flatnonzero(filled))
        cache = pictures.bytes(self.size) <= CACHE_BYTES if self.cache is None else self.cache
        if len(pictures) and (cache or self.corrupt == "skip"):
            pictures = self._read_once(pictures, split, cache)
        if not len(pictures):
            reasons = "; ".join(self._findings[split].lines()) if split in self._findings else ""
            raise ValueError(f"there are no pictures in split {split}. {reasons}".rstrip())
        return pictures

    def _read_once(self, pictures: "AnnotatedPictures", split: Split, cache: bool) -> "AnnotatedPictures":
        rank, world_size = self._place()
        mine = range(len(pictures)) if cache else range(rank, len(pictures), world_size)
        # What is cut out of a picture is better cut out of all its pixels.
        size = None if split == "train" and (self.iou_crop or self.scale_jitter) else self.size
        reader = WholeReader(pictures, size, cache)
        problems, kept = read_each(reader, len(pictures), mine, cache, self.workers if len(mine) > 200 else 0)
        problems = problems_of_all(problems, world_size, self.corrupt == "refuse")
        pictures.kept = kept
        return self._without(pictures, problems, split)

    def _without(self, pictures: "AnnotatedPictures", problems: dict[int, str], split: Split) -> "AnnotatedPictures":
        if not problems:
            return pictures
        findings = self._findings.setdefault(split, Findings(True))
        for problem in problems.values():
            findings.note("pictures that cannot be read", problem)
        warn_of_unreadable(list(problems.values()), len(pictures), split)
        return pictures.take(np.delete(np.arange(len(pictures)), list(problems)))

    def _evaluation_loader(self, pictures: "AnnotatedPictures | None") -> "DetectionLoader":
        pictures = _ready(pictures)
        batches = EvaluationBatches(len(pictures), self.eval_batch_size, *self._place())
        return self._loader(Samples(pictures, self.size, self.masks, self.keypoints, None), batches)

    def _loader(self, samples: "Samples", batches: TrainingBatches | EvaluationBatches) -> "DetectionLoader":
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return DetectionLoader(samples, batches, self.workers, pin_memory=on_gpu)


def _ready(value: Any) -> Any:
    if value is None:
        raise RuntimeError("call the data module's setup() before asking for its batches")
    return value


def _is_batch(batch: Any) -> bool:
    return isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[0], list) and isinstance(batch[1], list)


# Reading ahead


class WholeReader:
    """Pictures as they are kept in memory.

    Args:
        pictures: Where from.
        size: What they are resized to.
        keep: False only tries to read them.
    """

    def __init__(self, pictures: AnnotatedPictures, size: tuple[int, ...] | int | None, keep: bool) -> None:
        self.pictures = pictures
        self.size = size
        self.keep = keep

    def __call__(self, index: int) -> Tensor:
        """A picture, uint8 (3, H, W), or one without pixels."""
        pixels = self.pictures.pixels(index)
        if not self.keep:
            return torch.empty(3, 0, 0, dtype=torch.uint8)
        new = new_size(pixels.shape[0], pixels.shape[1], self.size)
        if new != pixels.shape[:2]:
            return resize(pixels, *new)
        return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


class Samples(Dataset):
    """Batches of pictures with what is on them: what a worker process does.

    A job is ``(seed, epoch, indices)``; its result is a packed batch, or its error.

    Args:
        pictures: Where from.
        size: What they are resized to.
        masks: Whether targets have masks.
        keypoints: Whether targets have keypoints.
        augmentation: What happens in training; None is an evaluation.
    """

    def __init__(
        self,
        pictures: AnnotatedPictures,
        size: tuple[int, ...] | int | None,
        masks: bool,
        keypoints: bool,
        augmentation: Augmentation | None,
    ) -> None:
        self.pictures = pictures
        self.size = size
        self.masks = masks
        self.keypoints = keypoints
        self.augmentation = augmentation

    def __getitems__(self, job: tuple[int, int, list[int]]) -> "Packed | Exception":
        seed, epoch, indices = job
        try:
            return pack([self.sample(seed, epoch, index) for index in indices])
        except (OSError, ValueError) as error:  # raised by the loader: from here it would come wrapped in a traceback
            return error

    def sample(self, seed: int, epoch: int, index: int) -> tuple[Tensor, Target]:
        """A picture, uint8 (3, H, W), and its target."""
        image = torch.from_numpy(np.ascontiguousarray(self.pictures.pixels(index))).permute(2, 0, 1)
        target = self.pictures.target(index, self.masks, self.keypoints, training=self.augmentation is not None)
        old = self.pictures.sizes[index].tolist()
        target = resized_target(target, (old[0], old[1]), (int(image.shape[1]), int(image.shape[2])))
        if self.augmentation is not None:
            image, target = self.augmentation(image, target, [seed, epoch, index])
        return resized(image, target, *new_size(int(image.shape[1]), int(image.shape[2]), self.size))


class Packed(NamedTuple):
    """A batch in a few tensors: each tensor that a worker hands over costs a file handle and time.

    Attributes:
        pixels: All images, uint8 (bytes,).
        sizes: Height and width of each.
        counts: Number of objects of each.
        fields: The targets' tensors, one after the other; masks flat.
    """

    pixels: Tensor
    sizes: list[tuple[int, int]]
    counts: list[int]
    fields: dict[str, Tensor]


def pack(samples: list[tuple[Tensor, Target]]) -> Packed:
    """Put images and targets one after the other."""
    sizes = [(int(image.shape[1]), int(image.shape[2])) for image, _ in samples]
    pixels = torch.empty(sum(3 * height * width for height, width in sizes), dtype=torch.uint8)
    start = 0
    for image, _ in samples:
        pixels[start : start + image.numel()].view(image.shape).copy_(image)
        start += image.numel()
    fields = {}
    for key in samples[0][1] if samples else ():
        parts = [target[key] for _, target in samples]
        if key == "image_id":
            fields[key] = torch.stack(parts)
        else:
            fields[key] = torch.cat([part.flatten() for part in parts] if key == "masks" else parts)
    return Packed(pixels, sizes, [len(target["boxes"]) for _, target in samples], fields)


def unpack(packed: Packed) -> Batch:
    """Images, uint8 (3, H, W), and targets; views of what was packed."""
    areas = [height * width for height, width in packed.sizes]
    images = [
        part.view(3, *size)
        for part, size in zip(packed.pixels.split([3 * area for area in areas]), packed.sizes, strict=True)
    ]
    targets: list[Target] = [{} for _ in images]
    for key, field in packed.fields.items():
        for target, part, size in zip(targets, _parts(key, field, packed.counts, areas), packed.sizes, strict=True):
            target[key] = part.view(-1, *size) if key == "masks" and len(part) else part
            if key == "masks" and not len(part):
                target[key] = part.new_zeros(0, *size)
    return images, targets


def _parts(key: str, field: Tensor, counts: list[int], areas: list[int]) -> tuple[Tensor, ...]:
    if key == "image_id":
        return field.unbind()
    if key == "masks":
        return field.split([count * area for count, area in zip(counts, areas, strict=True)])
    return field.split(counts)


class DetectionLoader(AheadLoader):
    """Batches ``(images, targets)``, read ahead by worker processes; images uint8 (3, H, W).

    Args:
        samples: What a worker does.
        batch_sampler: Which pictures make a batch; its place is that of the last batch that was handed out.
        workers: Number of processes; 0 reads in this one.
        pin_memory: Whether to put images where a GPU fetches them fastest.
    """

    def __init__(
        self,
        samples: Samples,
        batch_sampler: TrainingBatches | EvaluationBatches,
        workers: int,
        pin_memory: bool = False,
    ) -> None:
        super().__init__((torch.arange(len(samples.pictures)),), batch_sampler, samples, workers, pin_memory)

    def __iter__(self) -> Iterator[Any]:
        for packed, _ in self.read():
            yield unpack(packed)
