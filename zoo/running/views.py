"""Test-time augmentation: what a classifier says of several views of an image, averaged.

Lecture 10 (average over crops, scales and flips at test time); Krizhevsky et al., 2012 (section 4.1: ten crops). The
views for small images are those of Jordan, 2024, https://arxiv.org/abs/2404.00498 (multi-crop evaluation), who averages
logits and gives the images that are not shifted half of the weight; here probabilities are averaged, all views alike.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.tasks.captioning import CaptioningTask

Kind = Literal["flip", "flip_shift"]


def views(images: Tensor, kind: Kind) -> list[Tensor]:
    """The views of a batch of images.

    Args:
        images: (N, C, H, W).
        kind: ``flip``: the images and their mirror images. ``flip_shift``: these, and both shifted by one pixel up and
            to the left, and by one down and to the right, where reflected pixels move in.

    Returns:
        2 or 6 tensors (N, C, H, W).
    """
    shifted = [images]
    if kind == "flip_shift":
        height, width = images.shape[-2:]
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")  # (N, C, H + 2, W + 2)
        shifted += [padded[..., 2:, 2:], padded[..., :height, :width]]
    return [view for each in shifted for view in (each, each.flip(-1))]


def log_mean_probability(logits: Sequence[Tensor]) -> Tensor:
    """The logarithm of the mean of several predictions' probabilities.

    Args:
        logits: K tensors (N, C) of unnormalized scores.

    Returns:
        Log probabilities, float32 (N, C): ``softmax`` of them is the mean of the K softmaxes.
    """
    each = torch.stack([F.log_softmax(scores.float(), dim=1) for scores in logits])  # (K, N, C)
    return each.logsumexp(0) - math.log(len(logits))


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of one object, over that of its class, and take it back."""
    own = vars(owner)
    before = own.get(name)
    had = name in own
    own[name] = value
    try:
        yield
    finally:
        own.pop(name)
        if had:
            own[name] = before


def averaging_views(module: nn.Module, kind: Kind) -> AbstractContextManager[None]:
    """Within this context ``module(images)`` gives the logarithm of the mean probabilities over the views.

    Args:
        module: A classifier: images (N, C, H, W) to logits (N, classes).
        kind: Which :func:`views`.

    Raises:
        ValueError: When called: what the module gives is no tensor (N, classes).
    """
    return replaced(module, "forward", _over_views(module.forward, kind))


def _over_views(forward: Callable[[Tensor], Tensor], kind: Kind) -> Callable[[Tensor], Tensor]:
    def forward_of_views(images: Tensor) -> Tensor:
        scores = [forward(view) for view in views(images, kind)]
        if not isinstance(scores[0], Tensor) or scores[0].ndim != 2:
            raise ValueError(
                f"test_time_augmentation={kind} is for classifiers: the model gives no logits (N, classes)"
            )
        return log_mean_probability(scores)

    return forward_of_views


class TestTimeAugmentation(Callback):
    """Averages the probabilities over views of each image in test and predict, and nowhere else.

    Args:
        kind: ``flip`` (2 views) or ``flip_shift`` (6 views), as :func:`views` makes them.

    Raises:
        ValueError: The module is a captioner, whose words come one after the other.
    """

    __test__ = False  # no test case, whatever pytest makes of the name

    def __init__(self, kind: Kind) -> None:
        self.kind: Kind = kind
        self._averaging: AbstractContextManager[None] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what would be tested without its ``forward``, and so without the views."""
        if isinstance(pl_module, CaptioningTask):
            name = type(pl_module).__name__
            raise ValueError(f"test_time_augmentation={self.kind} is for classifiers: {name} is a captioner")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to average."""
        self._averaging = averaging_views(pl_module, self.kind)
        self._averaging.__enter__()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to average."""
        self.on_test_start(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its forward back."""
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the module its forward back."""
        self._end()

    def _end(self) -> None:
        averaging, self._averaging = self._averaging, None
        if averaging is not None:
            averaging.__exit__(None, None, None)
