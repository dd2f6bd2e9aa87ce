"""Real handwritten digits that ship with scikit-learn: 1,797 grey pictures of 8x8 pixels in 10 classes.

Source: Alpaydin and Kaynak, 1998, Optical Recognition of Handwritten Digits (its test part),
https://archive.ics.uci.edu/dataset/80; CC BY 4.0.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.in_memory import InMemoryDataModule

TEST_SIZE = 360  # a fifth; the data set itself has no split
TEST_SEED = 0  # fixed: every run is tested on the same digits


class DigitsDataModule(InMemoryDataModule):
    """Batches of ``(images, labels)``: float32 (N, channels, image_size, image_size) in [0, 1]; int64 (N,) in [0, 10).

    360 digits chosen once and for all are the test set. Pictures are enlarged from 8x8 by bilinear interpolation.

    Args:
        image_size: Side of the pictures in pixels.
        batch_size: Images of a global training batch: all processes together.
        eval_batch_size: Images per process in validation, test and prediction.
        val_size: Training images held out for validation.
        split_seed: Seed of the split into training and validation.
        translate: Each training image is shifted by up to so many pixels on both axes.
        channels: 1 for grey pictures; 3 repeats the grey picture as red, green and blue.

    Raises:
        ValueError: A number is too small, or ``channels`` is neither 1 nor 3.
    """

    num_classes = 10
    class_names = [str(digit) for digit in range(10)]

    def __init__(
        self,
        image_size: int = 28,
        batch_size: int = 64,
        eval_batch_size: int = 512,
        val_size: int = 180,
        split_seed: int = 0,
        translate: int = 0,
        channels: Literal[1, 3] = 1,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, val_size, split_seed, translate)
        if image_size < 1:
            raise ValueError(f"image_size={image_size} must be at least 1")
        if channels not in (1, 3):
            raise ValueError(f"channels={channels} must be 1 (grey) or 3 (the same three times)")
        self.image_size = self.side = image_size
        self.channels = channels

    def read(self, train: bool) -> tuple[Tensor, Tensor]:
        """Read the training or the test digits, uint8 (N, channels, image_size, image_size), and labels (N,)."""
        from sklearn.datasets import load_digits  # imported here: it costs more than a second

        digits = load_digits()
        order = np.random.default_rng(TEST_SEED).permutation(len(digits.target))
        chosen = order[TEST_SIZE:] if train else order[:TEST_SIZE]
        small = torch.from_numpy(digits.images[chosen]).float()[:, None]  # (N, 1, 8, 8), values 0 to 16
        images = F.interpolate(small, size=(self.image_size,) * 2, mode="bilinear", align_corners=False)
        images = (images * (255 / 16)).round().to(torch.uint8).repeat(1, self.channels, 1, 1)
        return images, torch.from_numpy(digits.target[chosen]).long()
