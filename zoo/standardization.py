"""Standardised input as the first layer of a network, so that a checkpoint carries all that its images need."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import cycle, islice

import torch
from torch import Tensor, nn

from zoo.channels import expect_channels

# Mean and standard deviation per colour of the images that torchvision's published weights were trained on.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Of all pixels of CIFAR-10's training pictures. The widely copied deviations 0.2023, 0.1994, 0.2010 are the mean over
# pictures of each one's own.
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


class Standardize(nn.Module):
    """Subtract a mean and divide by a standard deviation, for each channel; both are buffers.

    Grey images (N, 1, H, W) come out with three channels where there are three means, each standardised by its own.

    Args:
        mean: Mean of each channel, of images in [0, 1].
        std: Standard deviation of each channel.
        dimensions: How many follow that of the channels: 2 for images, 3 for clips (N, C, T, H, W).
        channels: Channels of the images; None: as many as there are means. 1 takes grey images alone.

    Raises:
        ValueError: There are not as many means as deviations, or a deviation is not above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], dimensions: int = 2, channels: int | None = None
    ) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise ValueError(f"mean={list(mean)} and std={list(std)} must be equally many, and each std above 0")
        self.channels = len(mean) if channels is None else channels
        ones = (1,) * dimensions
        self.register_buffer("mean", torch.tensor(mean).view(-1, *ones))
        self.register_buffer("std", torch.tensor(std).view(-1, *ones))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W), or clips, in [0, 1] to the standardised ones.

        Raises:
            ValueError: They have other channels.
        """
        given = images.shape[-self.mean.ndim]
        if (given, self.channels) != (1, 3):
            expect_channels(given, self.channels)
        return (images - self.mean) / self.std


def channel_statistics(
    in_channels: int, mean: Sequence[float], std: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel that the first convolution sees.

    Of one channel as they are given: three give it three standardised copies of a grey image, on which the kernels of
    weights for RGB do exactly what they do on the grey image repeated, also where its border is padded with zeros. (A
    sum of the kernels cannot: zeros beside a channel standardised by one mean are not zeros beside another.) Of more
    channels repeated from the first on: red, green, blue, red, ….

    Args:
        in_channels: Channels of the images.
        mean: One value, three, or one for each channel.
        std: As many.

    Raises:
        ValueError: There are other numbers of them, or of channels.
    """
    if in_channels < 1:
        raise ValueError(f"in_channels={in_channels} must be at least 1")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, 3, in_channels):
            raise ValueError(f"{name}={list(values)} must be 1 value, 3, or one for each of in_channels={in_channels}")
    if in_channels == 1:
        return tuple(mean), tuple(std)
    return tuple(islice(cycle(mean), in_channels)), tuple(islice(cycle(std), in_channels))


def standardized(
    network: nn.Module, mean: Sequence[float], std: Sequence[float], dimensions: int = 2, channels: int | None = None
) -> nn.Sequential:
    """``network`` behind a layer that standardises its images or clips; its tensors are then called ``network.…``."""
    return nn.Sequential(OrderedDict(standardize=Standardize(mean, std, dimensions, channels), network=network))
