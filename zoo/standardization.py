"""Standardised input as the first layer of a network, so that a checkpoint carries all that its images need."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Mean and standard deviation per colour of the images that torchvision's published weights were trained on.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Of all pixels of CIFAR-10's training pictures. The widely copied deviations 0.2023, 0.1994, 0.2010 are the mean over
# pictures of each one's own.
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


class Standardize(nn.Module):
    """Subtract a mean and divide by a standard deviation, for each channel; both are buffers.

    Grey images (N, 1, H, W) come out with as many channels as there are means, each standardised by its own.

    Args:
        mean: Mean of each channel, of images in [0, 1].
        std: Standard deviation of each channel.
        dimensions: How many follow that of the channels: 2 for images, 3 for clips (N, C, T, H, W).

    Raises:
        ValueError: There are not as many means as deviations, or a deviation is not above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], dimensions: int = 2) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise ValueError(f"mean={list(mean)} and std={list(std)} must be equally many, and each std above 0")
        ones = (1,) * dimensions
        self.register_buffer("mean", torch.tensor(mean).view(-1, *ones))
        self.register_buffer("std", torch.tensor(std).view(-1, *ones))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W), or clips, in [0, 1] to the standardised ones, of the same shape."""
        return (images - self.mean) / self.std


def standardized(network: nn.Module, mean: Sequence[float], std: Sequence[float], dimensions: int = 2) -> nn.Sequential:
    """``network`` behind a layer that standardises its images or clips; its tensors are then called ``network.…``."""
    return nn.Sequential(OrderedDict(standardize=Standardize(mean, std, dimensions), network=network))
