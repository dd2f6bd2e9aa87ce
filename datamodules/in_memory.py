"""Labelled images of one size that fit in memory: uint8 tensors, batches by index, whole-batch work on the device."""

import hashlib
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.nn import functional as F

from datamodules.augmentation import BatchAugmentation
from datamodules.sampling import EvaluationBatches, TensorLoader, training_batches


class InMemoryDataModule(LightningDataModule):
    """Abstract: batches ``(images, labels)`` from tensors held in memory, on the device that trains.

    After the transfer ``images`` is float32 (N, C, H, W) in [0, 1] and ``labels`` int64 (N,) in ``[0, num_classes)``.
    Held images are uint8; scaling and augmentation run on the device for the whole batch, augmentation in training
    only. A subclass sets ``num_classes``, ``class_names`` and, if all images are held in one size, ``side``, and
    defines :meth:`read`.

    Args:
        batch_size: Images of a global training batch: all processes together.
        eval_batch_size: Images per process in validation, test and prediction.
        val_size: Training images held out for validation; 0 trains on all of them without validation.
        split_seed: Seed of that split, apart from the run's seed so that runs compare.
        translate: Each training image is shifted by up to so many pixels on both axes.
        flip: Mirror half of the training images.
        train_size: Train on only so many of the images that are not held out, as evenly from all classes as they
            allow, chosen by ``split_seed``: fewer are a subset of more. None takes all.
        cutout: Fill a square of this side, in pixels, in each training image with the mean of the training images.
        mixup: a of Beta(a, a), which gives the shares of the two images of a mixture; 0 mixes none. With this or
            ``cutmix`` training labels are the share of each class, float32 (N, num_classes).
        cutmix: a of Beta(a, a), which gives how much of each picture is left when a box of another one is pasted in;
            0 pastes none. With ``mixup``, a coin decides for each batch.
        jitter: Brightness, contrast and saturation of each training image change by factors in [1 - jitter,
            1 + jitter].
        resize: Side in pixels to which all images are brought on the device, after augmentation, by bilinear
            interpolation; None leaves them as they are.

    Raises:
        ValueError: A number is too small, ``val_size`` leaves nothing to train on, or ``train_size`` asks for more.
    """

    num_classes: int
    class_names: list[str]
    side: int | None = None  # of the pictures that are held, in pixels

    def __init__(
        self,
        batch_size: int,
        eval_batch_size: int,
        val_size: int,
        split_seed: int,
        translate: int = 0,
        flip: bool = False,
        train_size: int | None = None,
        cutout: int = 0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        jitter: float = 0.0,
        resize: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("eval_batch_size", eval_batch_size), ("resize", 1 if resize is None else resize)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_size = val_size
        self.train_size = train_size
        self.split_seed = split_seed
        self.resize = resize
        self.augment = BatchAugmentation(translate, flip, jitter, cutout, mixup, cutmix)
        self.train_set: tuple[Tensor, Tensor] | None = None
        self.val_set: tuple[Tensor, Tensor] | None = None
        self.test_set: tuple[Tensor, Tensor] | None = None
        self._split = ""
        self._mean = torch.zeros(1, dtype=torch.uint8)  # of the training images, (C,), where Cutout needs it

    @property
    def evaluation(self) -> dict[str, int] | None:
        """How a picture becomes such an image: made as small as the others are held, then resized as they are."""
        if self.side is None:
            return None
        held = {"short_side": self.side, "size": self.side}
        return held if self.resize is None else held | {"resize": self.resize}

    def read(self, train: bool) -> tuple[Tensor, Tensor]:
        """Read the training or the test images, uint8 (N, C, H, W), and their labels, int64 (N,)."""
        raise NotImplementedError(f"{type(self).__name__} must define read()")

    def setup(self, stage: str) -> None:
        """Read what ``stage`` needs, once, and split training from validation, alike on every process."""
        if stage in ("fit", "validate") and self.train_set is None:
            images, labels = self.read(train=True)
            if not 0 <= self.val_size < len(images):
                raise ValueError(f"val_size={self.val_size} must lie between 0 and {len(images) - 1}")
            order = torch.from_numpy(np.random.default_rng(self.split_seed).permutation(len(images)))
            held_out, kept = order[: self.val_size].sort().values, self._chosen(order[self.val_size :], labels)
            self.val_set = images[held_out], labels[held_out]
            self.train_set = images[kept], labels[kept]
            if self.augment.cutout:
                mean = self.train_set[0].numpy().mean((0, 2, 3))
                self._mean = torch.from_numpy(mean.round().astype(np.uint8))
            digest = hashlib.sha256(kept.numpy().tobytes())
            digest.update(self.train_set[1].numpy().tobytes())
            for some in self.train_set[0][:: max(1, len(kept) // 256)]:  # enough to tell data sets apart, and soon done
                digest.update(some.numpy().tobytes())
            self._split = digest.hexdigest()[:16]
        if stage in ("test", "predict") and self.test_set is None:
            self.test_set = self.read(train=False)

    def _chosen(self, candidates: Tensor, labels: Tensor) -> Tensor:
        """The first ``train_size`` of the shuffled candidates, in turns of one from each class; sorted."""
        if self.train_size is None:
            return candidates.sort().values
        if not 1 <= self.train_size <= len(candidates):
            raise ValueError(f"train_size={self.train_size} must lie between 1 and {len(candidates)}")
        classes = labels[candidates].numpy()
        turn = np.empty(len(classes), dtype=np.int64)  # how many of the same class come before
        for label in np.unique(classes):
            turn[classes == label] = np.arange((classes == label).sum())
        return candidates[torch.from_numpy(np.argsort(turn, kind="stable")[: self.train_size])].sort().values

    def check_samples(self, files: bool = True) -> list[str]:
        """What is wrong: with ``files`` after reading every file, else as far as what :meth:`setup` read tells."""
        from datamodules.checking import check  # it knows all data modules

        return check(self, self._everything, files)

    workers = 0  # nothing is read ahead

    def _everything(self) -> tuple[dict[str, Any], list[str]]:
        """All samples, and what was wrong with what lists them."""
        self.setup("fit")
        self.setup("test")
        return {"train": self.train_set, "val": self.val_set, "test": self.test_set}, []

    def train_dataloader(self) -> TensorLoader:
        """Shuffled training batches; the order follows the run's seed, and is fixed under ``overfit_batches``."""
        tensors = self._on_device(self.train_set)
        batches = training_batches(self.trainer, len(tensors[1]), self.batch_size, self._split, tensors[1].device)
        return TensorLoader(tensors, batches)

    def val_dataloader(self) -> TensorLoader | list[TensorLoader]:
        """Validation batches, each sample once over all processes; none where ``val_size`` is 0."""
        return self._evaluation_loader(self.val_set) if self.val_size else []

    def test_dataloader(self) -> TensorLoader:
        """Test batches, each sample once over all processes."""
        return self._evaluation_loader(self.test_set)

    def predict_dataloader(self) -> TensorLoader:
        """The test images, in order."""
        return self._evaluation_loader(self.test_set)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Nothing to do for what is there already: Lightning's walk through the batch costs more than a small step."""
        if isinstance(batch, tuple) and all(tensor.device == device for tensor in batch):
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(
        self, batch: tuple[Tensor, Tensor] | Tensor, dataloader_idx: int
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Turn uint8 images into float32 in [0, 1], in training after augmentation."""
        if isinstance(batch, Tensor):  # a model's example_input_array, on its way through Lightning's summary
            return batch
        images, labels = batch
        if self.trainer is not None and self.trainer.training:
            self._mean = self._mean.to(images.device)
            images, labels = self.augment(images, labels, self.num_classes, self._mean)
        else:
            images = images.float().div_(255)
        if self.resize is not None:
            images = F.interpolate(images, size=(self.resize, self.resize), mode="bilinear", antialias=True)
        return images, labels

    def evaluation_dataloader(self, split: Literal["train", "val", "test"]) -> TensorLoader:
        """The images of a split in order, as an evaluation sees them: also those of training, without augmentation."""
        return self._evaluation_loader({"train": self.train_set, "val": self.val_set, "test": self.test_set}[split])

    def fingerprint(self, split: Literal["train", "val", "test"]) -> str:
        """A text that changes when the images of a split, as an evaluation sees them, or their labels change."""
        tensors = {"train": self.train_set, "val": self.val_set, "test": self.test_set}[split]
        images, labels = self._on_device(tensors)
        digest = hashlib.sha256(f"{tuple(images.shape)} {self.resize}".encode())
        for tensor in (images, labels):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _evaluation_loader(self, tensors: tuple[Tensor, Tensor] | None) -> TensorLoader:
        images, labels = self._on_device(tensors)
        rank, world_size = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        batches = EvaluationBatches(len(labels), self.eval_batch_size, rank, world_size, labels.device)
        return TensorLoader((images, labels), batches)

    def _on_device(self, tensors: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        if tensors is None:
            raise RuntimeError(f"call {type(self).__name__}.setup() before asking for its batches")
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        return tensors[0].to(device), tensors[1].to(device)
