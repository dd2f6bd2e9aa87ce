"""Single-label image classification: cross-entropy, accuracy, confusion matrix, and the worst mistakes."""

import math
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from zoo.running.optimizing import SchedulerCallable, configure_optimizers
from zoo.running.pictures import confusion_matrix_figure, contact_sheet, filters_figure, log_picture
from zoo.weights import Published, describe

WORST = 24  # mistakes that are shown


class ClassificationTask(LightningModule):
    """Abstract: a subclass sets ``backbone``, ``head`` and ``example_input_array`` and defines ``forward``.

    A batch is ``(images, labels)``: images float32 (N, C, H, W) in [0, 1], labels int64 (N,) in ``[0, num_classes)``,
    or in training the share of each class, float32 (N, num_classes), as mixed images have it; a batch of an evaluation
    may be empty. ``forward`` maps images to logits (N, num_classes).

    Logs ``train/loss`` and ``train/accuracy`` (of the batch, every ``log_every_n_steps``), ``val/loss``,
    ``val/accuracy``, ``test/loss``, ``test/accuracy``, ``test/accuracy_top5`` where there are more than five classes,
    and ``test/samples``, the number of samples that were scored.

    A loss other than cross-entropy is a subclass's ``losses``; a training loss of more than the logits, or with
    other terms, its ``training_loss``. Either changes ``chance_loss``.

    Args:
        num_classes: Number of classes.
        class_names: Their names in the order of the labels; None calls them "0", "1", ….
        optimizer: Makes the optimizer from the parameters.
        scheduler: Makes the schedule from the optimizer and the run's number of steps.
        label_smoothing: Share of the target mass that is spread over all classes.

    Raises:
        ValueError: ``class_names`` are not ``num_classes`` many.
    """

    monitor = "val/accuracy"
    monitor_mode = "max"

    backbone: torch.nn.Module
    head: torch.nn.Module
    example_input_array: Tensor
    published: Published | None = None  # where weights of this architecture were published

    def __init__(
        self,
        num_classes: int,
        class_names: list[str] | None,
        optimizer: OptimizerCallable,
        scheduler: SchedulerCallable | None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        # A checkpoint must load under weights_only, and without the file that this run started from.
        self.save_hyperparameters(ignore=["optimizer", "scheduler", "weights", "keep_matching_classes"])
        self.class_names = names_of_classes(num_classes, class_names)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.label_smoothing = label_smoothing
        self.val_loss = MeanMetric(nan_strategy="disable")
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_loss = MeanMetric(nan_strategy="disable")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy_top5 = MulticlassAccuracy(num_classes, top_k=5, average="micro") if num_classes > 5 else None
        self.test_confusion = MulticlassConfusionMatrix(num_classes)
        self._mistakes: list[dict[str, Any]] = []

    @property
    def chance_loss(self) -> float:
        """The training loss of logits that are all equal, where a sound initialization starts: log C."""
        return math.log(self.hparams["num_classes"])

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each sample (N,) in an evaluation: cross-entropy, without smoothing."""
        return F.cross_entropy(logits, labels, reduction="none")

    def training_loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a training batch, a scalar, and its logits (N, num_classes)."""
        logits = self(images)
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing), logits

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The recipe's optimizer over all trainable parameters, its schedule in steps."""
        return configure_optimizers(self, self.optimizer, self.scheduler)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch; logged only at the steps that reach a logger, since logging costs a CPU step 5 %."""
        images, labels = batch
        loss, logits = self.training_loss(images, labels)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            classes = labels if labels.ndim == 1 else labels.argmax(1)
            accuracy = (logits.argmax(1) == classes).float().mean()
            self.log_dict({"train/loss": loss, "train/accuracy": accuracy}, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count a batch of the validation split."""
        images, labels = batch
        if len(labels):
            logits = self(images)
            self.val_loss.update(self.losses(logits, labels))
            self.val_accuracy.update(logits, labels)

    def on_validation_epoch_end(self) -> None:
        """Log over the epoch and all processes; every process takes part, also one that had no sample."""
        self.log("val/loss", self.val_loss)
        self.log("val/accuracy", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count a batch of the test split and keep its worst mistakes."""
        images, labels = batch
        if len(labels):
            logits = self(images)
            losses = self.losses(logits, labels)
            self.test_loss.update(losses)
            self.test_accuracy.update(logits, labels)
            if self.test_accuracy_top5 is not None:
                self.test_accuracy_top5.update(logits, labels)
            self.test_confusion.update(logits, labels)
            self._keep_worst(images, labels, logits, losses)

    def on_test_epoch_end(self) -> None:
        """Log the numbers, the confusion matrix with the accuracy of each class, and the worst mistakes."""
        confusion = self.test_confusion.compute()
        self.log("test/loss", self.test_loss)
        self.log("test/accuracy", self.test_accuracy)
        if self.test_accuracy_top5 is not None:
            self.log("test/accuracy_top5", self.test_accuracy_top5)
        self.log("test/samples", confusion.sum().float(), rank_zero_only=True)
        mistakes = gather_worst(self, self._mistakes, WORST)
        log_picture(self, "test/confusion_matrix", confusion_matrix_figure(confusion, self.class_names))
        captions = [f"{m['predicted']} {m['score']:.0%}\nis {m['true']}" for m in mistakes]
        images = torch.stack([m["image"] for m in mistakes]) if mistakes else torch.zeros(0, 1, 1, 1)
        log_picture(self, "test/worst_mistakes", contact_sheet(images, captions, "worst mistakes"))
        if (filters := self._first_filters()) is not None:
            log_picture(self, "test/first_layer", filters_figure(filters, "filters of the first layer"))
        self.test_confusion.reset()
        self._mistakes = []

    def predict_step(self, batch: tuple[Tensor, Tensor] | Tensor, batch_idx: int) -> list[dict[str, Any]]:
        """For each image its ``class_name``, the ``probability`` of that, and the ``top`` five as (name, probability).

        A batch is images (N, C, H, W) in [0, 1], alone or with labels that are not looked at.
        """
        images = batch if isinstance(batch, Tensor) else batch[0]
        return best_classes(self(images).float().softmax(1), self.class_names)

    def draw_predictions(self, batch: tuple[Tensor, Tensor] | Tensor, predictions: list[dict[str, Any]]) -> Any:
        """A contact sheet of the first 32 images of a batch with their predictions; wrong ones in red."""
        images, labels = (batch, None) if isinstance(batch, Tensor) else batch
        shown = predictions[:32]
        captions = [f"{p['class_name']} {p['probability']:.0%}" for p in shown]
        wrong = None
        if labels is not None:
            wrong = [p["class_name"] != self.class_names[k] for p, k in zip(shown, labels.tolist(), strict=False)]
        return contact_sheet(images[: len(shown)], captions, "predictions", wrong)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in the file what it is, so that ``zoo.load`` can rebuild it without a recipe."""
        checkpoint["zoo"] = describe(self)

    def _first_filters(self) -> Tensor | None:
        """Weights (K, C, H, W) of the first convolution, if it looks at the image itself with more than one pixel."""
        channels = self.example_input_array.shape[1]
        for module in self.backbone.modules():
            if isinstance(module, torch.nn.Conv2d):
                seen = module.in_channels == channels in (1, 3) and module.kernel_size[0] > 1
                return module.weight.detach() if seen else None
        return None

    def _keep_worst(self, images: Tensor, labels: Tensor, logits: Tensor, losses: Tensor) -> None:
        scores, predicted = logits.float().softmax(1).max(1)
        wrong = (predicted != labels).nonzero()[:, 0]
        for i in wrong[losses[wrong].argsort(descending=True)[:WORST]].tolist():
            self._mistakes.append(
                {
                    "loss": losses[i].item(),
                    "score": scores[i].item(),
                    "predicted": self.class_names[int(predicted[i])],
                    "true": self.class_names[int(labels[i])],
                    "image": images[i].cpu(),
                }
            )
        self._mistakes = sorted(self._mistakes, key=lambda mistake: -mistake["loss"])[:WORST]


def names_of_classes(num_classes: int, class_names: list[str] | None) -> list[str]:
    """The classes' names; None calls them "0", "1", ….

    Raises:
        ValueError: They are not ``num_classes`` many.
    """
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(f"{len(class_names)} class_names were given for num_classes={num_classes}")
    return list(class_names) if class_names is not None else [str(i) for i in range(num_classes)]


def best_classes(probabilities: Tensor, class_names: list[str]) -> list[dict[str, Any]]:
    """For each row of (N, num_classes) its ``class_name``, the ``probability`` of that, and the ``top`` five."""
    values, classes = probabilities.topk(min(5, probabilities.shape[1]))
    predictions = []
    for row_values, row_classes in zip(values.tolist(), classes.tolist(), strict=True):
        top = [(class_names[k], value) for k, value in zip(row_classes, row_values, strict=True)]
        predictions.append({"class_name": top[0][0], "probability": top[0][1], "top": top})
    return predictions


def gather_worst(module: LightningModule, mistakes: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Of the mistakes of all processes the ``count`` with the largest ``loss``, the worst first."""
    if module.trainer.world_size == 1:
        return mistakes
    gathered: list[Any] = [None] * module.trainer.world_size
    torch.distributed.all_gather_object(gathered, mistakes)
    everyone = [mistake for share in gathered for mistake in share]
    return sorted(everyone, key=lambda mistake: -mistake["loss"])[:count]
