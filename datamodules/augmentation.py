"""Augmentation of a whole batch on its device, drawn for each image apart from the device's default generator."""

import torch
from torch import Tensor
from torch.nn import functional as F


def random_translate(images: Tensor, pixels: int) -> Tensor:
    """Shift each image by its own whole number of pixels in [-pixels, pixels] on both axes; zeros move in.

    The same as a random crop after zero padding. Images (N, C, H, W) of any dtype keep shape and dtype.
    """
    count, channels, height, width = images.shape
    device = images.device
    padded = F.pad(images, [pixels] * 4)  # (N, C, H + 2p, W + 2p)
    shift = torch.randint(0, 2 * pixels + 1, (2, count, 1), device=device)
    rows = shift[0] + torch.arange(height, device=device)  # (N, H)
    columns = shift[1] + torch.arange(width, device=device)  # (N, W)
    image = torch.arange(count, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def random_flip(images: Tensor) -> Tensor:
    """Mirror each image (N, C, H, W) left to right with probability one half."""
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(chosen, images.flip(-1), images)
