"""What other tasks answer as scores (N, K), so that each method of this package works for them too.

A Q-network already maps what it observes (N, C, H, W) to the values of K actions, and a classifier of clips maps
(N, C, T, H, W) to scores, whose saliency has the frames: both go in as they are.

    scores = BoxScore(detector, found["boxes"][0], int(found["labels"][0]))
    maps = saliency(scores, image[None], 0)
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou


class BoxScores(nn.Module):
    """A detector as a network that scores classes: for each class the score of the box that is best for it.

    Args:
        detector: Maps images to a dict of ``labels`` in 1…C and ``scores`` for each, as torchvision's do.
        num_classes: C, without the background. Class 0 of the scores is the background, which has none.
    """

    def __init__(self, detector: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.detector = detector
        self.num_classes = num_classes

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] to scores (N, 1 + C); a class that is not found has 0."""
        rows = []
        for found in self.detector(list(images)):
            empty = images.new_zeros(1 + self.num_classes) + _nothing(images)
            rows.append(empty.scatter_reduce(0, found["labels"], found["scores"], "amax"))
        return torch.stack(rows)


class BoxScore(nn.Module):
    """A detector as a network with one score: that of one object, found again in pictures that are changed a little.

    Of the boxes of its class the one that has the largest score times intersection over union with the object's box;
    in the picture itself that is the object and its score. Petsiuk et al., 2021, https://arxiv.org/abs/2006.03204,
    section 3, without the agreement of the other classes. No gradient goes through the overlap.

    Args:
        detector: As for :class:`BoxScores`; its dicts have ``boxes`` (R, 4) too.
        box: (4,) as (x1, y1, x2, y2) in pixels.
        label: The object's class, in 1…C.
    """

    def __init__(self, detector: nn.Module, box: Tensor, label: int) -> None:
        super().__init__()
        self.detector = detector
        self.label = label
        self.register_buffer("box", box.detach().clone()[None])

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] to scores (N, 1); 0 where the object is not found."""
        return torch.stack([self._score(found) for found in self.detector(list(images))])[:, None] + _nothing(images)

    def _score(self, found: dict[str, Tensor]) -> Tensor:
        mine = found["labels"] == self.label
        if not mine.any():
            return found["scores"].new_zeros(())
        overlap = box_iou(found["boxes"][mine].detach(), self.get_buffer("box"))[:, 0]
        return (found["scores"][mine] * overlap).max()


class WordScores(nn.Module):
    """A captioner as a network that scores words: the log probabilities of those that may come next in a caption.

    Among all words, <NULL>, <START> and <UNK> too, which a search never writes: its own log probabilities are larger.

    Args:
        captioner: Has ``scores(images, tokens)``: (N, L) tokens to scores (N, L - 1, V) of those after the first, each
            given the true ones before it, as the zoo's captioners.
        beginning: Tokens of the caption so far, with <START>.
    """

    def __init__(self, captioner: Any, beginning: list[int]) -> None:
        super().__init__()
        self.captioner = captioner
        self.beginning = beginning

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] to the log probabilities (N, V) of the next word."""
        # The last token is the one that is scored: which it is makes no difference.
        tokens = torch.tensor([*self.beginning, 0], device=images.device).expand(len(images), -1)
        scores: Tensor = self.captioner.scores(images, tokens)
        return scores[:, -1].log_softmax(1)


class ObservationScores(nn.Module):
    """A policy as a network over observations with one channel, so that each of their frames has a saliency of its own.

    Args:
        policy: Maps observations (N, D) or stacks of frames (N, C, H, W) to scores (N, A).
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observations: Tensor) -> Tensor:
        """Observations (N, 1, D) or (N, 1, C, H, W) to scores (N, A)."""
        scores: Tensor = self.policy(observations[:, 0])
        return scores


def _nothing(images: Tensor) -> Tensor:
    """0, with a gradient of 0: where nothing is found no pixel matters."""
    return 0 * images.sum()
