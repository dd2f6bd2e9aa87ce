"""DCGAN: a generator of transposed convolutions against a convolutional discriminator.

Paper: Radford, Metz and Chintala, 2016, https://arxiv.org/abs/1511.06434 (section 3), for 64x64 pixels, as its authors'
code (dcgan.torch) and PyTorch's example have it: kernels of 4x4 and half the paper's channels. Lecture: EECS 498-007,
lecture 20, and assignment 6 for 28x28 pixels, whose batch norm comes after the rectifier, and whose generator is that
of InfoGAN (Chen et al., 2016, https://arxiv.org/abs/1606.03657, appendix C.1). Codes are even in [-1, 1), as in both.

Conditional (the assignment has none): the class is added to the code (Mirza and Osindero, 2014,
https://arxiv.org/abs/1411.1784) and judged by projection (Miyato and Koyama, 2018, https://arxiv.org/abs/1802.05637,
equation 3): the discriminator's score gains the product of its features and the class's vector.
"""

from itertools import pairwise
from typing import Literal, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn, optim
from torch.nn import functional as F

from zoo.arguments import plain_arguments
from zoo.running.optimizing import SchedulerCallable
from zoo.tasks.adversarial import Loss
from zoo.tasks.generation import GenerationTask
from zoo.weights import load_weights

Network = Literal["assignment", "paper"]
SIDE: dict[Network, int] = {"assignment": 28, "paper": 64}  # of the images, in pixels


class DCGANGenerator(nn.Module):
    """Codes (N, Z), and classes (N,) if it knows any, to images (N, C, S, S) in [0, 1].

    Args:
        network: ``assignment`` (S = 28) or ``paper`` (S = 64).
        code_size: Length Z of a code.
        in_channels: Channels C of the images.
        num_classes: None for a generator without classes.
    """

    def __init__(
        self, network: Network = "assignment", code_size: int = 96, in_channels: int = 1, num_classes: int | None = None
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        make = _assignment_generator if network == "assignment" else _paper_generator
        self.layers = make(code_size + (num_classes or 0), in_channels)

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map codes (N, Z), and labels (N,) where there are classes, to images (N, C, S, S) in [0, 1]."""
        if self.num_classes is not None:
            assert labels is not None
            codes = torch.cat([codes, F.one_hot(labels, self.num_classes).to(codes)], 1)
        return cast(Tensor, (self.layers(codes) + 1) / 2)


class DCGANDiscriminator(nn.Module):
    """Images (N, C, S, S) in [0, 1], and classes (N,) if it knows any, to scores (N,), higher for what looks real.

    Args:
        network: ``assignment`` (S = 28) or ``paper`` (S = 64).
        in_channels: Channels C of the images.
        num_classes: None for a discriminator without classes.
    """

    def __init__(self, network: Network = "assignment", in_channels: int = 1, num_classes: int | None = None) -> None:
        super().__init__()
        self.features: nn.Sequential
        self.judge: nn.Module
        if network == "assignment":
            self.features, width = _assignment_features(in_channels), 1024
            self.judge = nn.Linear(width, 1)
        else:
            self.features, width = _paper_features(in_channels), 512 * 4 * 4
            self.judge = nn.Sequential(nn.Unflatten(1, (512, 4, 4)), nn.Conv2d(512, 1, 4, bias=False), nn.Flatten())
        self.classes = None if num_classes is None else nn.Embedding(num_classes, width)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map images (N, C, S, S) in [0, 1], and labels (N,) where there are classes, to scores (N,)."""
        features = self.features(2 * images - 1)  # (N, 1024) or (N, 512 * 4 * 4)
        scores = self.judge(features).squeeze(1)
        return scores if self.classes is None else scores + (self.classes(labels) * features).sum(1)


class DCGAN(GenerationTask):
    """DCGAN, conditional if asked.

    Args:
        network: ``assignment``, for images of 28 pixels, or ``paper``, for 64.
        conditional: Generate pictures of the class that is asked for.
        num_classes: Number of classes, for a conditional model.
        class_names: Their names, in the order of the labels; None calls them "0", "1", ….
        loss: ``gan``, or ``lsgan`` for least squares.
        code_size: Length of a code, drawn evenly from [-1, 1).
        in_channels: Channels of the images: 1 for grey, 3 for RGB.
        classifier: Judges the samples: a ``.safetensors`` or ``.ckpt`` file of a classifier of the zoo that was trained
            on the same data, ``classifiers/digits.safetensors`` and the like, which come with the recipes, or a recipe
            such as ``lenet/mnist``, whose newest run's ``best.ckpt`` is taken. None leaves its numbers out.
        weights: File to start from (``.safetensors``, ``.ckpt``, ``.pth``) or ``hf://owner/name``.
        optimizer: Makes the optimizer of either network from its parameters. Default: the paper's Adam at 2e-4.
        scheduler: Makes the schedule from an optimizer and the run's number of steps; stepped once per step.
    """

    @plain_arguments
    def __init__(
        self,
        network: Network = "assignment",
        conditional: bool = False,
        num_classes: int = 10,
        class_names: list[str] | None = None,
        loss: Loss = "gan",
        code_size: int = 96,
        in_channels: int = 1,
        classifier: str | None = None,
        weights: str | None = None,
        optimizer: OptimizerCallable = lambda params: optim.Adam(params, lr=2e-4, betas=(0.5, 0.999), fused=True),
        scheduler: SchedulerCallable | None = None,
    ) -> None:
        classes = num_classes if conditional else None
        super().__init__(code_size, classes, class_names, loss, classifier, optimizer, scheduler)
        self.generator = DCGANGenerator(network, code_size, in_channels, classes)
        self.discriminator = DCGANDiscriminator(network, in_channels, classes)
        self.apply(_initialize_as_assignment if network == "assignment" else _initialize_as_paper)
        # Somewhat faster on a CPU: its convolutions then run on contiguous channels.
        self.to(memory_format=torch.channels_last)
        if weights is not None:
            load_weights(self, weights)

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map codes (N, Z), of a conditional model with labels (N,), to images (N, C, S, S) in [0, 1]."""
        return cast(Tensor, self.generator(codes, labels))

    def score(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Scores (N,) of images (N, C, S, S) in [0, 1]: logits for ``gan``, near 1 for real ones for ``lsgan``."""
        return cast(Tensor, self.discriminator(images, labels))

    def draw_codes(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Codes (n, Z), even in [-1, 1), on the device; a generator is the CPU's."""
        device = self.device if generator is None else None
        return 2 * torch.rand(n, self.code_size, generator=generator, device=device).to(self.device) - 1


def _assignment_generator(code_size: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(code_size, 1024),
        nn.ReLU(inplace=True),
        nn.BatchNorm1d(1024),
        nn.Linear(1024, 128 * 7 * 7),
        nn.ReLU(inplace=True),
        nn.BatchNorm1d(128 * 7 * 7),
        nn.Unflatten(1, (128, 7, 7)),
        nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1),  # (N, 64, 14, 14)
        nn.ReLU(inplace=True),
        nn.BatchNorm2d(64),
        nn.ConvTranspose2d(64, channels, 4, stride=2, padding=1),  # (N, C, 28, 28)
        nn.Tanh(),
    )


def _assignment_features(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 32, 5),  # (N, 32, 24, 24)
        nn.LeakyReLU(0.01, inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5),  # (N, 64, 8, 8)
        nn.LeakyReLU(0.01, inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 1024),
        nn.LeakyReLU(0.01, inplace=True),
    )


def _paper_generator(code_size: int, channels: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Unflatten(1, (code_size, 1, 1))]
    widths = [code_size, 512, 256, 128, 64]
    for place, (before, after) in enumerate(pairwise(widths)):
        stride, padding = (2, 1) if place else (1, 0)  # to 4, 8, 16 and 32 pixels
        layers.append(nn.ConvTranspose2d(before, after, 4, stride, padding, bias=False))
        layers += [nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    layers.append(nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1, bias=False))  # (N, C, 64, 64)
    return nn.Sequential(*layers, nn.Tanh())


def _paper_features(channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    widths = [channels, 64, 128, 256, 512]
    for place, (before, after) in enumerate(pairwise(widths)):
        layers.append(nn.Conv2d(before, after, 4, 2, 1, bias=False))  # to 32, 16, 8 and 4 pixels
        layers += [nn.BatchNorm2d(after)] if place else []  # none on the image itself
        layers.append(nn.LeakyReLU(0.2, inplace=True))
    return nn.Sequential(*layers, nn.Flatten())


def _initialize_as_assignment(layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear | nn.ConvTranspose2d):
        nn.init.xavier_uniform_(layer.weight)
    elif isinstance(layer, nn.Embedding):
        nn.init.normal_(layer.weight, std=0.02)


def _initialize_as_paper(layer: nn.Module) -> None:
    """All weights from a normal distribution of deviation 0.02, those of batch norms about 1."""
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Embedding):
        nn.init.normal_(layer.weight, std=0.02)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, mean=1, std=0.02)
