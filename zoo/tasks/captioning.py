"""Image captioning: cross-entropy of the next word, and the captions held against people's."""

from typing import Any, NamedTuple

import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric

from zoo.running.caption_pictures import attention_figure, captions_figure
from zoo.running.optimizing import SchedulerCallable, configure_optimizers
from zoo.running.pictures import log_picture
from zoo.tasks.caption_scores import CaptionScores
from zoo.weights import NOT_SAVED, describe

NULL, START, END, UNKNOWN = range(4)  # the first tokens of every vocabulary
SPECIAL = ("<NULL>", "<START>", "<END>", "<UNK>")  # and how a vocabulary calls them

SHOWN = 20  # captions in a report, drawn at random
LOOKED_AT = 4  # pictures whose attention is shown word by word

Batch = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, list[list[str]]]


class Captions(NamedTuple):
    """Captions of N images, at most T tokens long.

    Attributes:
        tokens: int64 (N, T): the words and ``<END>``, without ``<START>``, filled up with ``<NULL>``. A caption that
            reached T tokens before its end has no ``<END>``.
        log_probabilities: float (N,): of each caption as a whole, given its image.
        attention: float (N, T, S, S): for each token where on the grid the network looked, weights that sum to one, and
            zeros after the end. None for the cells without attention.
    """

    tokens: Tensor
    log_probabilities: Tensor
    attention: Tensor | None


def captioning_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy summed over the tokens of a caption, mean over the captions, as the assignment has it.

    Args:
        scores: Logits (N, T, V).
        targets: int64 (N, T), the tokens that the scores are for: ``tokens[:, 1:]``; ``<NULL>`` does not count.

    Returns:
        A scalar: at chance about log V times the mean number of words and ``<END>``.
    """
    return _losses(scores, targets).mean()


def _losses(scores: Tensor, targets: Tensor) -> Tensor:
    """The loss of each caption (N,)."""
    losses = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=NULL, reduction="none")
    return losses.view_as(targets).sum(1)


class CaptioningTask(LightningModule):
    """Abstract: a subclass sets ``backbone``, ``head`` and ``example_input_array``, defines ``scores`` and ``caption``.

    A batch is ``(images, tokens)``, in evaluation ``(images, tokens, references)``: images float32 (N, 3, H, W) in
    [0, 1], or what ``backbone`` makes of them, which a cache may have kept; tokens int64 (N, L), ``<START>``, words,
    ``<END>``, then ``<NULL>``; references a list of N lists of captions as people wrote them. N may be 0.

    Logs ``train/loss`` (every ``log_every_n_steps``), ``val/loss``, ``val/bleu_4``, ``val/cider``, and on the test
    split ``test/loss``, ``test/bleu_1`` … ``test/bleu_4``, ``test/rouge_l``, ``test/cider`` (CIDEr-D; 1 is what papers
    print as 100) and ``test/samples``, the number of images. The loss of an evaluation is that of an image's first
    caption; the scores are those of the captions that the network writes, against all references.

    Args:
        words: The vocabulary: a word's place is its token; the first four are ``<NULL>``, ``<START>``, ``<END>`` and
            ``<UNK>``.
        optimizer: Makes the optimizer from the parameters.
        scheduler: Makes the schedule from the optimizer and the run's number of steps.

    Raises:
        ValueError: ``words`` do not begin with the four special ones, or one is there twice.
    """

    monitor = "val/cider"
    monitor_mode = "max"

    backbone: torch.nn.Module
    head: torch.nn.Module
    example_input_array: Tensor

    def __init__(self, words: list[str], optimizer: OptimizerCallable, scheduler: SchedulerCallable | None) -> None:
        super().__init__()
        if tuple(words[: len(SPECIAL)]) != SPECIAL or len(set(words)) != len(words):
            raise ValueError(f"words must begin with {', '.join(SPECIAL)} and have each word once, not {words[:6]} …")
        self.save_hyperparameters(ignore=[*NOT_SAVED])
        self.words = list(words)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.val_loss = MeanMetric(nan_strategy="disable")
        self.test_loss = MeanMetric(nan_strategy="disable")
        self.val_scores = CaptionScores()
        self.test_scores = CaptionScores()
        self._counted = 0  # pictures of this evaluation, in this process
        self._shown: list[tuple[Tensor, str, list[str]]] = []
        self._looks: list[Tensor] = []
        self._draw = torch.Generator()

    @property
    def class_names(self) -> list[str]:
        """The words: they are what the rows of the head's embedding and scores stand for."""
        return self.words

    def class_rows(self, key: str, rows: int, classes: int) -> list[Tensor] | None:
        """Which of so many rows of a head's tensor belong to each word; None if no rows do."""
        raise NotImplementedError(f"{type(self).__name__} must define class_rows()")

    def scores(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Logits (N, L - 1, V) of ``tokens[:, 1:]``, each given the true tokens before it."""
        raise NotImplementedError(f"{type(self).__name__} must define scores()")

    def caption(self, images: Tensor) -> Captions:
        """What the network says of each image."""
        raise NotImplementedError(f"{type(self).__name__} must define caption()")

    def forward(self, images: Tensor) -> Tensor:
        """Captions of images (N, 3, H, W) in [0, 1], as tokens (N, T); :meth:`sentences` makes texts of them."""
        return self.caption(images).tokens

    def sentences(self, tokens: Tensor) -> list[str]:
        """Tokens (N, T) as texts: the words up to ``<END>``."""
        texts = []
        for row in tokens.tolist():
            row = row[: row.index(END)] if END in row else row
            texts.append(" ".join(self.words[token] for token in row if token not in (NULL, START)))
        return texts

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The recipe's optimizer over all trainable parameters, its schedule in steps."""
        return configure_optimizers(self, self.optimizer, self.scheduler)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch; logged only at the steps that reach a logger."""
        images, tokens = batch[:2]
        loss = captioning_loss(self.scores(images, tokens), tokens[:, 1:])
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Count from the beginning, also after an evaluation that was broken off."""
        self.val_scores.reset()
        self._counted = 0

    def validation_step(self, batch: tuple[Tensor, Tensor, list[list[str]]], batch_idx: int) -> None:
        """Count a batch of the validation split."""
        self._count(batch, self.val_loss, self.val_scores)

    def on_validation_epoch_end(self) -> None:
        """Log over the epoch and all processes; every process takes part, also one that had no picture."""
        scores = self.val_scores.compute()
        self.log("val/loss", self.val_loss)
        self.log("val/bleu_4", scores["bleu_4"])
        self.log("val/cider", scores["cider"], prog_bar=True)
        self.val_scores.reset()

    def on_test_epoch_start(self) -> None:
        """Count from the beginning, also after an evaluation that was broken off, and draw the same pictures again."""
        self.test_scores.reset()
        self._counted, self._shown, self._looks = 0, [], []
        self._draw.manual_seed(0)

    def test_step(self, batch: tuple[Tensor, Tensor, list[list[str]]], batch_idx: int) -> None:
        """Count a batch of the test split; twenty of this process's pictures are drawn to be shown, good or bad."""
        before = self._counted
        captions = self._count(batch, self.test_loss, self.test_scores)
        if captions is None:
            return
        texts = self.sentences(captions.tokens)
        for row, place in self._drawn(before, len(texts)):
            shown = batch[0][row].detach().cpu(), texts[row], list(batch[2][row])
            self._shown[place : place + 1] = [shown]
            if captions.attention is not None:
                self._looks[place : place + 1] = [captions.attention[row].cpu()]

    def on_test_epoch_end(self) -> None:
        """Log all scores, the drawn pictures with their captions, and where the network looked."""
        scores = self.test_scores.compute()
        self.log("test/loss", self.test_loss)
        self.log_dict({f"test/{name}": value for name, value in scores.items()})
        self.log("test/samples", float(self.test_scores.samples()))
        if self._shown:
            images, texts, references = (list(column) for column in zip(*self._shown, strict=True))
            log_picture(self, "test/captions", captions_figure(images, texts, references))
            if self._looks:
                shown = slice(0, LOOKED_AT)
                figure = attention_figure(images[shown], [text.split() for text in texts[shown]], self._looks[shown])
                log_picture(self, "test/attention", figure)
        self.test_scores.reset()
        self._shown, self._looks = [], []

    def predict_step(self, batch: Batch | Tensor, batch_idx: int) -> list[dict[str, Any]]:
        """For each image its ``caption`` and the ``log_probability`` of that.

        A batch is images, alone or with tokens and references that are not looked at.
        """
        captions = self.caption(batch if isinstance(batch, Tensor) else batch[0])
        texts = self.sentences(captions.tokens)
        return [
            {"caption": text, "log_probability": value}
            for text, value in zip(texts, captions.log_probabilities.tolist(), strict=True)
        ]

    def draw_predictions(self, batch: Batch | Tensor, predictions: list[dict[str, Any]]) -> Any:
        """The first images of a batch with their captions; word by word where there is attention, else a sheet."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        found = self.caption(images[:LOOKED_AT]) if len(images) else None
        if found is not None and found.attention is not None:
            words = [text.split() for text in self.sentences(found.tokens)]  # those that were looked for
            return attention_figure(list(images[:LOOKED_AT].cpu()), words, list(found.attention.cpu()))
        texts = [prediction["caption"] for prediction in predictions]
        references = batch[2][:SHOWN] if not isinstance(batch, Tensor) and len(batch) == 3 else None
        return captions_figure(list(images[:SHOWN].cpu()), texts[:SHOWN], references)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in the file what it is, so that ``zoo.load`` can rebuild it without a recipe."""
        checkpoint["zoo"] = describe(self)

    def _count(
        self, batch: tuple[Tensor, Tensor, list[list[str]]], losses: MeanMetric, scores: CaptionScores
    ) -> Captions | None:
        """Count a batch of an evaluation; its captions, None for an empty one."""
        images, tokens, references = batch
        if not len(images):
            return None
        losses.update(_losses(self.scores(images, tokens), tokens[:, 1:]))
        captions = self.caption(images)
        ranks = self.trainer.world_size
        numbers = torch.arange(self._counted, self._counted + len(images)) * ranks + self.trainer.global_rank
        self._counted += len(images)
        scores.update(self.sentences(captions.tokens), references, numbers)
        return captions

    def _drawn(self, before: int, count: int) -> list[tuple[int, int]]:
        """Which of ``count`` pictures, after ``before`` others, are shown in which of the places (reservoir)."""
        drawn = []
        for row in range(count):
            seen = before + row
            place = seen if seen < SHOWN else int(torch.randint(seen + 1, (1,), generator=self._draw))
            if place < SHOWN:
                drawn.append((row, place))
        return drawn
