"""Augmentation of a whole batch on its device, drawn for each image apart from torch's default generators.

What can be done on bytes is done before the images become floats. CutMix is torchvision's, one box for the batch;
``benchmarks/augmentation.py`` times all of it against torchvision and kornia.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


class BatchAugmentation:
    """What happens to a training batch, in this order; everything is off by default.

    Args:
        translate: Shift each image by up to so many pixels on both axes, zeros moving in: a crop after zero padding.
        flip: Mirror half of the images left to right.
        jitter: Strength of random brightness, contrast and saturation, each a factor in [1 - jitter, 1 + jitter].
        cutout: Side in pixels of a square that is filled (DeVries and Taylor, 2017, arXiv:1708.04552).
        mixup: a of the Beta(a, a) that gives the share of each image in its mixture with another one
            (Zhang et al., 2018, arXiv:1710.09412).
        cutmix: a of the Beta(a, a) that gives the share of the picture that is kept when a box of another picture is
            pasted in (Yun et al., 2019, arXiv:1905.04899). With ``mixup``, one of the two for each batch, by a coin.

    Raises:
        ValueError: A number is negative or not finite.
    """

    def __init__(
        self,
        translate: int = 0,
        flip: bool = False,
        jitter: float = 0.0,
        cutout: int = 0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        strengths = {"translate": translate, "jitter": jitter, "cutout": cutout, "mixup": mixup, "cutmix": cutmix}
        for name, value in strengths.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be at least 0")
        self.translate = translate
        self.flip = flip
        self.jitter = jitter
        self.cutout = cutout
        self.mixup = mixup
        self.cutmix = cutmix

    def __call__(self, images: Tensor, labels: Tensor, num_classes: int, fill: Tensor) -> tuple[Tensor, Tensor]:
        """Augment a batch.

        Args:
            images: uint8 (N, C, H, W).
            labels: int64 (N,).
            num_classes: Number of classes.
            fill: What Cutout fills with, uint8 (C,): the mean of the data.

        Returns:
            Images, float32 in [0, 1], and the labels; with ``mixup`` or ``cutmix`` the share of each class, float32
            (N, num_classes).
        """
        images = random_translate(images, self.translate) if self.translate else images
        images = random_flip(images) if self.flip else images
        images = random_jitter(images, self.jitter) if self.jitter else images
        images = random_cutout(images, self.cutout, fill) if self.cutout else images
        boxed = self.cutmix and (not self.mixup or torch.rand(()) < 0.5)
        if boxed:
            images, labels = cutmix(images, labels, self.cutmix, num_classes)
        images = images.float().div_(255)
        if self.mixup and not boxed:
            images, labels = mixup(images, labels, self.mixup, num_classes)
        return images, labels


def random_translate(images: Tensor, pixels: int) -> Tensor:
    """Shift each image by its own whole number of pixels in [-pixels, pixels] on both axes; zeros move in.

    The same as a random crop after zero padding. Images (N, C, H, W) of any dtype keep shape and dtype.
    """
    count, channels, height, width = images.shape
    if not count:
        return images
    device = images.device
    padded = F.pad(images, [pixels] * 4)  # (N, C, H + 2p, W + 2p)
    shift = torch.randint(0, 2 * pixels + 1, (2, count, 1), device=device)
    rows = shift[0] + torch.arange(height, device=device)  # (N, H)
    plane = torch.arange(count * channels, device=device).view(count, channels, 1)
    starts = (plane * padded.shape[2] + rows[:, None]) * padded.shape[3] + shift[1, :, None]  # (N, C, H)
    # Every run of W pixels in memory, as a view: a row of the result is one of them, copied as a whole.
    runs = padded.flatten().unfold(0, width, 1)
    return runs.index_select(0, starts.flatten()).view(images.shape)


def random_flip(images: Tensor) -> Tensor:
    """Mirror each image (N, C, H, W) left to right with probability one half."""
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return _replace(images, chosen, images.flip(-1))


def random_jitter(images: Tensor, strength: float) -> Tensor:
    """Change brightness, contrast and saturation of each image by factors of its own.

    Args:
        images: (N, C, H, W), uint8, or float in [0, 1].
        strength: Factors are uniform in [1 - strength, 1 + strength], those below 0 are 0.
    """
    low = max(0.0, 1 - strength)
    factors = torch.rand(3, len(images), device=images.device) * (1 + strength - low) + low
    return adjust_colours(images, factors[0], factors[1], factors[2])


def adjust_colours(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Scale brightness, then contrast, then saturation of each image by its factors, as torchvision defines them.

    Args:
        images: (N, C, H, W) with one or three channels, uint8, or float in [0, 1]; the dtype is kept, and bytes are
            rounded once, at the end.
        brightness: (N,), factor of all pixels.
        contrast: (N,), factor of the distance from the image's mean grey.
        saturation: (N,), factor of the distance from each pixel's grey; without effect on one channel.

    Raises:
        ValueError: The images have neither one nor three channels.
    """
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images have {images.shape[1]} channels, colours are changed of 1 or 3")
    white = 255 if images.dtype == torch.uint8 else 1
    brightness, contrast, saturation = (factor[:, None, None, None] for factor in (brightness, contrast, saturation))
    result = (images * brightness).clamp_(0, white)  # a new tensor: the rest is done in place
    mean = _grey(result).mean((2, 3), keepdim=True)
    result.mul_(contrast).add_(mean * (1 - contrast)).clamp_(0, white)
    if images.shape[1] == 3:
        grey = _grey(result)
        result.mul_(saturation).add_(grey * (1 - saturation)).clamp_(0, white)
    return (result.round_() if images.dtype == torch.uint8 else result).to(images.dtype)


def _grey(images: Tensor) -> Tensor:
    """The luma of float images (N, 1 or 3, H, W), as torchvision weighs it (ITU-R BT.601): (N, 1, H, W)."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    return red * 0.2989 + green * 0.587 + blue * 0.114


def random_cutout(images: Tensor, side: int, fill: Tensor) -> Tensor:
    """Fill a square in each image (N, C, H, W), whose centre may be any pixel, so that it may stick out.

    The paper fills with 0 after standardisation, that is with the mean of the data; here images are not standardised
    yet, so that ``fill`` (C,), of the images' dtype, says the mean.
    """
    height, width = images.shape[2:]
    rows = _covered(height, side, len(images), images.device)[:, None, :, None]
    columns = _covered(width, side, len(images), images.device)[:, None, None, :]
    return _replace(images, rows & columns, fill[:, None, None])


def _covered(size: int, side: int, count: int, device: torch.device) -> Tensor:
    """Which of ``size`` places lie in a stretch of ``side`` around a random one of them, for each image: (N, size)."""
    first = torch.randint(0, size, (count, 1), device=device) - side // 2
    place = torch.arange(size, device=device)
    return (place >= first) & (place < first + side)


def _replace(images: Tensor, mask: Tensor, other: Tensor) -> Tensor:
    """``other`` where ``mask`` is true, else ``images``; the three broadcast."""
    if images.dtype != torch.uint8:
        return torch.where(mask, other, images)
    bits = mask.to(torch.uint8).neg_()  # 0 or 255: on a CPU three operations on bits take a third of torch.where's time
    return (images ^ other).bitwise_and_(bits).bitwise_xor_(images)


def mixup(images: Tensor, labels: Tensor, alpha: float, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mix each image with the one before it in the batch, in shares of its own (the paper's code: one for all).

    Args:
        images: Float (N, C, H, W); the order of a batch is random.
        labels: int64 (N,).
        alpha: The share of an image is drawn from Beta(alpha, alpha).
        num_classes: Number of classes.

    Returns:
        Mixed images, and the share of each class, float32 (N, num_classes).
    """
    concentration = torch.tensor(alpha, device=images.device)
    # Its check of the arguments would wait for a GPU.
    beta = torch.distributions.Beta(concentration, concentration, validate_args=False)
    share = beta.sample((len(images),))
    targets = F.one_hot(labels, num_classes).float()
    return (
        torch.lerp(images.roll(1, 0), images, share[:, None, None, None].to(images.dtype)),
        torch.lerp(targets.roll(1, 0), targets, share[:, None]),
    )


def cutmix(images: Tensor, labels: Tensor, alpha: float, num_classes: int) -> tuple[Tensor, Tensor]:
    """Paste a box of the image before it in the batch into each image: torchvision's, one box for the whole batch.

    Args:
        images: (N, C, H, W), of any dtype; the order of a batch is random.
        labels: int64 (N,).
        alpha: The share of an image that is kept is drawn from Beta(alpha, alpha), before the box is cut at the edges.
        num_classes: Number of classes.

    Returns:
        Images, and the share of each class by the pixels it has, float32 (N, num_classes).
    """
    from torchvision.transforms import v2  # imported here: it costs seconds, and most recipes do not need it

    return v2.CutMix(alpha=alpha, num_classes=num_classes)(images, labels)
