"""What other tasks answer as scores (N, K), so that each method of this package works for them too.

A Q-network already maps what it observes (N, C, H, W) to the values of K actions, and a classifier of clips maps
(N, C, T, H, W) to scores, whose saliency has the frames: both go in as they are.
"""

from typing import Any

import torch
from torch import Tensor, nn


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
            empty = images.new_zeros(1 + self.num_classes)
            rows.append(empty.scatter_reduce(0, found["labels"], found["scores"], "amax"))
        return torch.stack(rows)


class WordScores(nn.Module):
    """A captioner as a network that scores words: those that may follow the beginning of a caption.

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
        """Images (N, 3, H, W) in [0, 1] to the scores (N, V) of the next word."""
        # The last token is the one that is scored: which it is makes no difference.
        tokens = torch.tensor([*self.beginning, 0], device=images.device).expand(len(images), -1)
        scores: Tensor = self.captioner.scores(images, tokens)
        return scores[:, -1]
