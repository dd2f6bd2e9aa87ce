"""Object detection, instance segmentation and keypoints: losses of the architecture, average precision after COCO."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from zoo.running.detection_pictures import detections_figure, precision_recall_figure
from zoo.running.optimizing import SchedulerCallable, configure_optimizers
from zoo.running.pictures import log_picture
from zoo.tasks.coco_evaluation import IOU_TYPE, PREFIX, CocoEvaluation, Kind
from zoo.weights import NOT_SAVED, describe

Target = dict[str, Tensor]
Detections = list[dict[str, Tensor]]

SHOWN = 8  # pictures with their detections in a report


class DetectionTask(LightningModule):
    """Abstract: a subclass sets ``backbone``, ``head`` and ``example_input_array``, defines ``detect`` and ``losses``.

    A batch is ``(images, targets)``: images a list of float32 (3, H, W) in [0, 1], each of its own size; targets a list
    of dicts with torchvision's keys: ``boxes`` float32 (R, 4) as (x1, y1, x2, y2) in pixels, ``labels`` int64 (R,) in
    1…C (0 is the background), ``image_id``, and where they are evaluated ``masks`` uint8 (R, H, W), ``keypoints``
    float32 (R, K, 3) as (x, y, visibility), ``area``, ``iscrowd``. R may be 0; training targets have no crowds.

    Logs ``train/loss`` and each of the losses it is the sum of (every ``log_every_n_steps``), ``val/map``,
    ``val/map_50`` and the like for masks and keypoints, and on the test split all of COCO's numbers
    (:class:`zoo.tasks.coco_evaluation.CocoEvaluation`) and ``test/samples``, the number of images. ``zoo test`` writes
    ``results_bbox.json`` (``results_segm.json``, ``results_keypoints.json``) in COCO's format, with the data's own ids.

    Args:
        num_classes: Number of classes C, without the background.
        class_names: Their names in the order of the labels 1…C; None calls them "1", "2", ….
        optimizer: Makes the optimizer from the parameters.
        scheduler: Makes the schedule from the optimizer and the run's number of steps.
        kinds: What is evaluated: boxes, and masks or keypoints where the architecture has them.

    Raises:
        ValueError: ``class_names`` are not ``num_classes`` many.
    """

    monitor_mode = "max"
    background: ClassVar[list[str]] = ["(background)"]  # what the heads' first row stands for

    backbone: torch.nn.Module
    head: torch.nn.Module
    example_input_array: Tensor

    def __init__(
        self,
        num_classes: int,
        class_names: list[str] | None,
        optimizer: OptimizerCallable,
        scheduler: SchedulerCallable | None,
        kinds: tuple[Kind, ...] = ("boxes",),
    ) -> None:
        super().__init__()
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"{len(class_names)} class_names were given for num_classes={num_classes}")
        self.save_hyperparameters(ignore=[*NOT_SAVED, "kinds"])
        self.class_names = list(class_names) if class_names is not None else [str(i + 1) for i in range(num_classes)]
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.kinds = kinds
        self.monitor = f"val/{PREFIX[kinds[-1]]}map"
        self.val_map = CocoEvaluation(num_classes, kinds)
        self.test_map = CocoEvaluation(num_classes, kinds)
        self._shown: list[tuple[Tensor, dict[str, Tensor], Target]] = []

    def detect(self, images: list[Tensor]) -> Detections:
        """What is on each image: ``boxes`` (R, 4) in its pixels, ``labels`` in 1…C, ``scores``, best first."""
        raise NotImplementedError(f"{type(self).__name__} must define detect()")

    def losses(self, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        """The terms of the training loss by name, each a scalar."""
        raise NotImplementedError(f"{type(self).__name__} must define losses()")

    def forward(self, images: list[Tensor] | Tensor) -> Detections:
        """Detections on a list of images (3, H, W) in [0, 1], or on images (N, 3, H, W) of one size.

        Raises:
            ValueError: The module is in training mode, in which its layers look for targets.
        """
        if self.training:
            raise ValueError(f"{type(self).__name__} detects in evaluation mode: call .eval() first")
        return self.detect(list(images))

    def class_rows(self, key: str, rows: int, classes: int) -> list[Tensor] | None:
        """Which of so many rows of a head's tensor belong to each class, the background first; None if no rows do.

        As in torchvision's R-CNNs: one row for a class, four in what moves the boxes.
        """
        each = 4 if "bbox_pred" in key else 1
        return list(torch.arange(rows).view(classes, each)) if rows == each * classes else None

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The recipe's optimizer over all trainable parameters, its schedule in steps."""
        return configure_optimizers(self, self.optimizer, self.scheduler)

    def training_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> Tensor:
        """The sum of the losses of a batch; logged only at the steps that reach a logger."""
        images, targets = batch
        losses = self.losses(images, targets)
        self.loss_terms = {name: value.detach() for name, value in losses.items()}  # for zoo.running.nonfinite
        loss = torch.stack(list(losses.values())).sum()
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            terms = {f"train/{name}": value for name, value in losses.items()}
            self.log_dict(terms, batch_size=len(images))
            self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> None:
        """Count a batch of the validation split."""
        images, targets = batch
        self.val_map.update(self.detect(images), targets)

    def on_validation_epoch_end(self) -> None:
        """Evaluate over all processes and log the leading numbers."""
        numbers = self.val_map.compute()
        for kind in self.kinds:
            for name in ("map", "map_50"):
                self.log(f"val/{PREFIX[kind]}{name}", numbers[PREFIX[kind] + name], prog_bar=name == "map")
        self.val_map.reset()

    def test_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> None:
        """Count a batch of the test split; of the first ones keep an image to be shown, one with objects if any has."""
        images, targets = batch
        found = self.detect(images)
        self.test_map.update(found, targets)
        if images and len(self._shown) < SHOWN:
            place = max(range(len(images)), key=lambda k: (len(targets[k]["boxes"]) > 0, k))
            self._shown.append((images[place].cpu(), _on_cpu(found[place]), _on_cpu(targets[place])))

    def on_test_epoch_end(self) -> None:
        """Log all numbers, the curves of precision over recall, images with their detections, and the results."""
        numbers = self.test_map.compute()
        self.log_dict({f"test/{name}": value for name, value in numbers.items()})
        self.log("test/samples", float(self.test_map.samples()))
        for kind in self.kinds:
            figure = precision_recall_figure(self.test_map.curves(kind), self.class_names)
            log_picture(self, f"test/{PREFIX[kind]}precision_recall", figure)
            self._write_results(kind)
        if self._shown:
            images, found, truths = (list(column) for column in zip(*self._shown, strict=True))
            figure = detections_figure(images, found, truths, self.class_names, skeleton=self._skeleton())
            log_picture(self, "test/detections", figure)
        self.test_map.reset()
        self._shown = []

    def predict_step(self, batch: tuple[list[Tensor], list[Target]] | list[Tensor], batch_idx: int) -> list[dict]:
        """For each image its ``objects``, best first.

        Each has ``class_name``, ``score`` and ``box`` [x1, y1, x2, y2] in pixels; ``mask`` (COCO's run lengths) and
        ``keypoints`` [[x, y, visibility], …] where the architecture finds them.
        """
        images = batch[0] if isinstance(batch, tuple) else batch
        return [{"objects": self.objects(detections)} for detections in self.detect(list(images))]

    def objects(self, detections: dict[str, Tensor]) -> list[dict[str, Any]]:
        """What was found on one image, as :meth:`predict_step` says it."""
        objects = []
        for row, label in enumerate(detections["labels"].tolist()):
            found = {
                "class_name": self.class_names[label - 1],
                "score": float(detections["scores"][row]),
                "box": detections["boxes"][row].tolist(),
            }
            if "masks" in detections:
                found["mask"] = _run_lengths(detections["masks"][row])
            if "keypoints" in detections:
                found["keypoints"] = detections["keypoints"][row].tolist()
            objects.append(found)
        return objects

    def draw_predictions(self, batch: Any, predictions: list[dict[str, Any]]) -> Any:
        """The first images of a batch with what was found on them, the true objects beside it if they are known.

        Those with objects come first, after them those on which something was found most surely.
        """
        images, targets = batch if isinstance(batch, tuple) else (batch, None)

        def first(k: int) -> tuple[bool, float]:
            scores = [found["score"] for found in predictions[k]["objects"]]
            return not (targets and len(targets[k]["boxes"])), -max(scores, default=0.0)

        places = sorted(range(len(images)), key=first)[:SHOWN]
        shown = [images[k] for k in places]
        found = [_on_cpu(detections) for detections in self.detect(shown)]  # as tensors: predictions are texts
        truths = [_on_cpu(targets[k]) for k in places] if targets is not None else None
        shown = [image.cpu() for image in shown]
        return detections_figure(shown, found, truths, self.class_names, skeleton=self._skeleton())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in the file what it is, so that ``zoo.load`` can rebuild it without a recipe."""
        checkpoint["zoo"] = describe(self)

    def _skeleton(self) -> list[list[int]] | None:
        """Which keypoints a line joins, if the data says so."""
        return getattr(getattr(self._trainer, "datamodule", None), "skeleton", None) or None

    def _write_results(self, kind: Kind) -> None:
        """COCO's results file in the run's folder, with the data's own category ids if it says them."""
        folder = self.trainer.log_dir  # asked by every process: they agree on it together
        ids = getattr(getattr(self.trainer, "datamodule", None), "category_ids", None)
        if folder and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            ids = list(ids) if ids is not None else list(range(1, len(self.class_names) + 1))
            path = Path(folder) / f"results_{IOU_TYPE[kind]}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            self.test_map.write_results(path, ids, kind)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in tensors.items()}


def _run_lengths(mask: Tensor) -> dict[str, Any]:
    """COCO's run lengths of a mask (1, H, W) or (H, W) of probabilities, as text."""
    try:
        from pycocotools import mask as coco
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("masks need pycocotools: pip install 'zoo[detection]'") from error
    binary = (mask.reshape(mask.shape[-2:]) > 0.5).to(torch.uint8).cpu().numpy()
    encoded = coco.encode(binary.copy(order="F"))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}
