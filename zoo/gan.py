"""The generative adversarial network in its first form, fully connected, and its least-squares variant.

Papers: Goodfellow et al., 2014, https://arxiv.org/abs/1406.2661; Mao et al., 2017, https://arxiv.org/abs/1611.04076
(LSGAN). Lecture: EECS 498-007, lecture 20, and assignment 6, whose layers, codes and losses these are: the generator
maximizes log D(G(z)), and draws other codes for its own step than it did for the discriminator's. Images stay in
[0, 1] outside; inside they are in [-1, 1]. 1,952,528 parameters generate, 267,009 judge.
"""

from typing import cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn, optim

from zoo.arguments import plain_arguments
from zoo.running.optimizing import SchedulerCallable
from zoo.tasks.adversarial import Loss
from zoo.tasks.generation import GenerationTask
from zoo.weights import load_weights


class GANGenerator(nn.Module):
    """Codes (N, Z) to images (N, C, S, S) in [0, 1].

    Args:
        code_size: Length Z of a code.
        in_channels: Channels C of the images.
        image_size: Their side S in pixels.
    """

    def __init__(self, code_size: int = 96, in_channels: int = 1, image_size: int = 28) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(code_size, 1024),
            nn.ReLU(inplace=True),
            nn.Linear(1024, 1024),
            nn.ReLU(inplace=True),
            nn.Linear(1024, in_channels * image_size**2),
            nn.Tanh(),
            nn.Unflatten(1, (in_channels, image_size, image_size)),
        )

    def forward(self, codes: Tensor) -> Tensor:
        """Map codes (N, Z) to images (N, C, S, S) in [0, 1]."""
        return cast(Tensor, (self.layers(codes) + 1) / 2)


class GANDiscriminator(nn.Module):
    """Images (N, C, S, S) in [0, 1] to scores (N,), higher for what looks real.

    Args:
        in_channels: Channels C of the images.
        image_size: Their side S in pixels.
    """

    def __init__(self, in_channels: int = 1, image_size: int = 28) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(in_channels * image_size**2, 256),
            nn.LeakyReLU(0.01, inplace=True),
            nn.Linear(256, 256),
            nn.LeakyReLU(0.01, inplace=True),
            nn.Linear(256, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, S, S) in [0, 1] to scores (N,)."""
        return cast(Tensor, self.layers(2 * images - 1)).squeeze(1)


class GAN(GenerationTask):
    """Fully connected GAN or LSGAN.

    Args:
        loss: ``gan``, or ``lsgan`` for least squares.
        code_size: Length of a code, drawn evenly from [-1, 1).
        in_channels: Channels of the images: 1 for grey, 3 for RGB.
        image_size: Side of the square images in pixels.
        classifier: Judges the samples: a ``.safetensors`` or ``.ckpt`` file of a classifier of the zoo that was trained
            on the same data, ``classifiers/digits.safetensors`` and the like, which come with the recipes, or a recipe
            such as ``lenet/mnist``, whose newest run's ``best.ckpt`` is taken. None leaves its numbers out.
        weights: File to start from (``.safetensors``, ``.ckpt``, ``.pth``) or ``hf://owner/name``.
        optimizer: Makes the optimizer of either network from its parameters. Default: the assignment's Adam at 1e-3.
        scheduler: Makes the schedule from an optimizer and the run's number of steps; stepped once per step.
    """

    @plain_arguments
    def __init__(
        self,
        loss: Loss = "gan",
        code_size: int = 96,
        in_channels: int = 1,
        image_size: int = 28,
        classifier: str | None = None,
        weights: str | None = None,
        optimizer: OptimizerCallable = lambda params: optim.Adam(params, lr=1e-3, betas=(0.5, 0.999), fused=True),
        scheduler: SchedulerCallable | None = None,
    ) -> None:
        super().__init__(code_size, None, None, loss, classifier, optimizer, scheduler)
        self.generator = GANGenerator(code_size, in_channels, image_size)
        self.discriminator = GANDiscriminator(in_channels, image_size)
        if weights is not None:
            load_weights(self, weights)

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map codes (N, Z) to images (N, C, S, S) in [0, 1]; there are no labels."""
        return cast(Tensor, self.generator(codes))

    def score(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Scores (N,) of images (N, C, S, S) in [0, 1]: logits for ``gan``, near 1 for real ones for ``lsgan``."""
        return cast(Tensor, self.discriminator(images))

    def draw_codes(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Codes (n, Z), even in [-1, 1), on the device; a generator is the CPU's."""
        device = self.device if generator is None else None
        return 2 * torch.rand(n, self.code_size, generator=generator, device=device).to(self.device) - 1
