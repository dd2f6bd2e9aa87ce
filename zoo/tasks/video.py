"""Classification of clips: cross-entropy, accuracy, scores averaged over the views of a video, the worst mistakes."""

import math
from typing import Any, Protocol

from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from zoo.running.clip_pictures import best_three, clips_figure, clips_gif, still_frames
from zoo.running.optimizing import SchedulerCallable, configure_optimizers
from zoo.running.pictures import confusion_matrix_figure, log_file, log_picture
from zoo.running.views import log_mean_probability
from zoo.tasks.classification import best_classes, gather_worst, names_of_classes
from zoo.weights import describe

WORST = 8  # mistakes that are shown
SHOWN = 8  # clips of an animation or of predictions


class PublishedVideo(Protocol):
    """What a video network's ``published`` says of the files in which others published its weights."""

    @property
    def builder(self) -> str | None:
        """The function of ``torchvision.models``; None if torchvision has none."""

    def recognises(self, state: dict[str, Tensor]) -> bool:
        """Whether a file is such a one."""

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Its tensors under our keys."""

    def class_names(self, state: dict[str, Tensor]) -> list[str]:
        """The names of its classes, none if it does not say them."""


class VideoScores(nn.Module):
    """Loss, accuracy and, where there are more than five classes, top-5 accuracy of one split.

    Args:
        num_classes: Number of classes.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.metrics = nn.ModuleDict(
            {"loss": MeanMetric(nan_strategy="disable"), "accuracy": MulticlassAccuracy(num_classes, average="micro")}
        )
        if num_classes > 5:
            self.metrics["accuracy_top5"] = MulticlassAccuracy(num_classes, top_k=5, average="micro")

    def update(self, log_probabilities: Tensor, losses: Tensor, labels: Tensor) -> None:
        """Count videos: log probabilities (N, num_classes), losses (N,) and labels (N,)."""
        for name, metric in self.metrics.items():
            metric.update(losses) if name == "loss" else metric.update(log_probabilities, labels)  # type: ignore[operator]

    def log(self, module: LightningModule, stage: str) -> None:
        """Log over the epoch and all processes, as ``stage/loss`` and so on."""
        for name, metric in self.metrics.items():
            module.log(f"{stage}/{name}", metric, prog_bar=stage == "val" and name == "accuracy")  # type: ignore[arg-type]


class VideoTask(LightningModule):
    """Abstract: a subclass sets ``backbone``, ``head`` and ``example_input_array`` and defines ``forward``.

    A batch is ``(clips, labels)``: clips float32 (N, 3, T, H, W) in [0, 1], labels int64 (N,) in ``[0, num_classes)``.
    In an evaluation a batch may be empty, and clips may be (N, V, 3, T, H, W), V views of each video, whose
    probabilities are averaged. ``forward`` maps clips (N, 3, T, H, W) to logits (N, num_classes).

    Logs ``train/loss`` and ``train/accuracy`` (of the batch, every ``log_every_n_steps``); ``val/loss``,
    ``val/accuracy``, ``test/loss``, ``test/accuracy`` and, where there are more than five classes,
    ``val/accuracy_top5`` and ``test/accuracy_top5``; and ``test/samples``, the number of videos that were scored. The
    loss of an evaluation is the negative logarithm of the mean probability.

    A training loss that does not follow from the logits is a subclass's ``training_loss``.

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

    backbone: nn.Module
    head: nn.Module
    example_input_array: Tensor
    published: PublishedVideo | None = None
    seconds: float | None = None  # length of the clips that it is made for; None takes a whole video

    def __init__(
        self,
        num_classes: int,
        class_names: list[str] | None,
        optimizer: OptimizerCallable,
        scheduler: SchedulerCallable | None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        # A checkpoint must load under weights_only, and without the files that this run started from.
        self.save_hyperparameters(
            ignore=["optimizer", "scheduler", "weights", "backbone_weights", "keep_matching_classes"]
        )
        self.class_names = names_of_classes(num_classes, class_names)
        self.optimizer, self.scheduler = optimizer, scheduler
        self.label_smoothing = label_smoothing
        self.val_scores = VideoScores(num_classes)
        self.test_scores = VideoScores(num_classes)
        self.test_confusion = MulticlassConfusionMatrix(num_classes)
        self._mistakes: list[dict[str, Any]] = []
        self._shown: dict[str, list[tuple[Tensor, str]]] = {}  # of each class clips and what is said of them

    @property
    def chance_loss(self) -> float:
        """The training loss of logits that are all equal, where a sound initialization starts: log C."""
        return math.log(self.hparams["num_classes"])

    def training_loss(self, clips: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a training batch, a scalar, and its logits (N, num_classes)."""
        logits = self(clips)
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing), logits

    def log_probabilities(self, clips: Tensor) -> Tensor:
        """Of clips (N, 3, T, H, W), or views (N, V, 3, T, H, W) of videos, float32 (N, num_classes).

        The views of a video are looked at one after the other, so that they need the memory of one.
        """
        return log_mean_probability([self(view) for view in (clips.unbind(1) if clips.ndim == 6 else [clips])])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The recipe's optimizer over all trainable parameters, its schedule in steps."""
        return configure_optimizers(self, self.optimizer, self.scheduler)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch, logged at the steps that reach a logger."""
        loss, logits = self.training_loss(*batch)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            right = (logits.argmax(1) == batch[1]).float().mean()
            self.log_dict({"train/loss": loss, "train/accuracy": right}, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count a batch of the validation split."""
        self._count(batch, self.val_scores)

    def on_validation_epoch_end(self) -> None:
        """Log over the epoch and all processes; every process takes part, also one that had no video."""
        self.val_scores.log(self, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count a batch of the test split, keep its worst mistakes and the first clips of each class."""
        counted = self._count(batch, self.test_scores)
        if counted is None:
            return
        (clips, labels), (found, losses) = batch, counted
        clips = clips[:, clips.shape[1] // 2] if clips.ndim == 6 else clips  # the view in the middle
        self.test_confusion.update(found, labels)
        predictions = best_classes(found.exp(), self.class_names)
        names = [self.class_names[label] for label in labels.tolist()]
        for k, name in enumerate(names):
            # In class folders the first clips are all of one class: each class shows as many.
            shown, count = self._shown.setdefault(name, []), sum(map(len, self._shown.values()))
            if count < SHOWN and len(shown) < max(1, SHOWN // len(self.class_names)):
                shown.append((clips[k].cpu(), f"{best_three(predictions[k])}\nis {name}"))
        self._keep_worst(clips, losses, predictions, names)

    def on_test_epoch_end(self) -> None:
        """Log the numbers, the confusion matrix, the worst mistakes and an animation of clips of each class."""
        confusion = self.test_confusion.compute()
        self.test_scores.log(self, "test")
        self.log("test/samples", confusion.sum().float(), rank_zero_only=True)
        log_picture(self, "test/confusion_matrix", confusion_matrix_figure(confusion, self.class_names))
        mistakes = gather_worst(self, self._mistakes, WORST)
        frames, captions = [each["frames"] for each in mistakes], [each["caption"] for each in mistakes]
        log_picture(self, "test/worst_mistakes", clips_figure(frames, captions, "worst mistakes"))
        if self._shown and self.trainer.loggers and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            shown = [clip for of_class in self._shown.values() for clip in of_class]
            clips, said = (list(column) for column in zip(*shown, strict=True))
            log_picture(self, "test/clips", clips_figure(clips, said, "clips, the best three classes of each"))
            log_file(self, "test/clips", ".gif", clips_gif(clips, said))
        self.test_confusion.reset()
        self._mistakes, self._shown = [], {}

    def predict_step(self, batch: tuple[Tensor, Tensor] | Tensor, batch_idx: int) -> list[dict[str, Any]]:
        """For each video its ``class_name``, the ``probability`` of that, and the ``top`` five as (name, probability).

        A batch is clips (N, 3, T, H, W) in [0, 1] or views (N, V, 3, T, H, W), alone or with labels that are not
        looked at.
        """
        clips = batch if isinstance(batch, Tensor) else batch[0]
        return best_classes(self.log_probabilities(clips).exp(), self.class_names)

    def draw_predictions(self, batch: tuple[Tensor, Tensor] | Tensor, predictions: list[dict[str, Any]]) -> Any:
        """A sheet with frames of the first clips of a batch, their best three classes and the true one; wrong: red."""
        clips, labels = (batch, None) if isinstance(batch, Tensor) else batch
        clips = clips[:, clips.shape[1] // 2] if clips.ndim == 6 else clips
        shown, wrong = predictions[:SHOWN], None
        captions = [best_three(prediction) for prediction in shown]
        if labels is not None:
            names = [self.class_names[label] for label in labels[: len(shown)].tolist()]
            wrong = [p["class_name"] != name for p, name in zip(shown, names, strict=True)]
            captions = [f"{caption}\nis {name}" for caption, name in zip(captions, names, strict=True)]
        return clips_figure(list(clips[: len(shown)]), captions, "predictions", wrong)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in the file what it is, so that ``zoo.load`` can rebuild it without a recipe."""
        checkpoint["zoo"] = describe(self)

    def _count(self, batch: tuple[Tensor, Tensor], scores: VideoScores) -> tuple[Tensor, Tensor] | None:
        """Count a batch of an evaluation; its log probabilities and losses, None for an empty one."""
        clips, labels = batch
        if not len(labels):
            return None
        found = self.log_probabilities(clips)
        losses = F.nll_loss(found, labels, reduction="none")
        scores.update(found, losses, labels)
        return found, losses

    def _keep_worst(self, clips: Tensor, losses: Tensor, predictions: list[dict[str, Any]], names: list[str]) -> None:
        """Of mistakes the frames of a sheet alone: the clips of a large network would be many megabytes."""
        for k in losses.argsort(descending=True).tolist():
            if predictions[k]["class_name"] != names[k]:
                frames = still_frames(clips[k]).transpose(0, 1).cpu()  # (3, F, H, W)
                caption = f"{best_three(predictions[k])}\nis {names[k]}"
                self._mistakes.append({"loss": losses[k].item(), "frames": frames, "caption": caption})
        self._mistakes = sorted(self._mistakes, key=lambda mistake: -mistake["loss"])[:WORST]
