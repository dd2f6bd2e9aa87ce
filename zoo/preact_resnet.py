"""PreAct-ResNet of assignment 4: batch norm and rectifier before each convolution, in small networks for CIFAR-10.

Paper: He, Zhang, Ren and Sun, 2016, Identity mappings in deep residual networks, https://arxiv.org/abs/1603.05027.
Course: EECS 498-007, assignment 4, "Residual networks": plain and residual networks of 32 layers, bottlenecks of 47.
Differs from the paper, as the assignment does: no batch norm and rectifier before the global average, biases in all
convolutions, 1x1 convolutions as shortcuts where the shape changes, PyTorch's default initialization.
"""

from collections import OrderedDict
from typing import Literal, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn, optim

from zoo.arguments import plain_arguments
from zoo.running.optimizing import SchedulerCallable
from zoo.running.schedules import Step
from zoo.standardization import CIFAR10_MEAN, channel_statistics, standardized
from zoo.tasks.classification import ClassificationTask
from zoo.weights import load_weights

CIFAR_STD = (0.2023, 0.1994, 0.2010)  # the mean of the pictures' own deviations, which the assignment divides by


def activated(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """Batch norm, rectifier, convolution: (N, C, H, W) to (N, K, H / stride, W / stride)."""
    convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2)
    return [nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True), convolution]


def plain_block(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Two 3x3 convolutions: (N, C, H, W) to (N, K, H / stride, W / stride)."""
    first = activated(in_channels, out_channels, 3, stride)
    return nn.Sequential(*first, *activated(out_channels, out_channels, 3))


def bottleneck(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """1x1 to a quarter of the channels, which halves the picture where asked; 3x3; 1x1 to all of them."""
    narrow = out_channels // 4
    first = activated(in_channels, narrow, 1, stride)
    return nn.Sequential(*first, *activated(narrow, narrow, 3), *activated(narrow, out_channels, 1))


class Residual(nn.Module):
    """``block(x) + shortcut(x)``; the shortcut is the identity unless the shape changes."""

    def __init__(self, block: nn.Module, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.block = block
        same = in_channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, K, H / stride, W / stride)."""
        return cast(Tensor, self.block(x) + self.shortcut(x))


def make_block(
    kind: Literal["plain", "residual", "bottleneck"], in_channels: int, out_channels: int, stride: int
) -> nn.Module:
    """One block: without a shortcut, with one, or a bottleneck with one."""
    if kind == "plain":
        return plain_block(in_channels, out_channels, stride)
    inner = plain_block if kind == "residual" else bottleneck
    return Residual(inner(in_channels, out_channels, stride), in_channels, out_channels, stride)


def preact_network(
    block: Literal["plain", "residual", "bottleneck"], width: int, blocks_per_stage: int, channels: int = 3
) -> nn.Sequential:
    """The network without its classifier: pictures (N, C, H, W) to features (N, 4 * width).

    Args:
        block: Kind of all blocks.
        width: Channels of the stem and the first stage; each further stage has twice as many, on half the side.
        blocks_per_stage: Blocks in each of the three stages.
        channels: Channels C of the pictures.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["stem"] = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True))
    before = width
    for stage in range(3):
        wide = width * 2**stage
        blocks = [make_block(block, before, wide, 1 if stage == 0 else 2)]
        blocks += [make_block(block, wide, wide, 1) for _ in range(blocks_per_stage - 1)]
        layers[f"stage{stage + 1}"] = nn.Sequential(*blocks)
        before = wide
    return nn.Sequential(layers | OrderedDict(average=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten()))


class PreActResNet(ClassificationTask):
    """PreAct-ResNet image classifier. The assignment's resnet32 is the default.

    Args:
        block: ``plain`` has no shortcuts (plain32 of the assignment), ``residual`` has them (resnet32), ``bottleneck``
            has them around three convolutions (resnet47, at ``width`` 32).
        width: Channels of the stem and the first stage; the second and third stage have two and four times as many.
        blocks_per_stage: Blocks in each of the three stages.
        num_classes: Number of classes.
        class_names: Their names, in the order of the labels; None calls them "0", "1", ….
        image_size: Side of the pictures that the model is made for, in pixels; any from 4 on will run.
        in_channels: Channels of the pictures: 1 for grey, 3 for RGB, 4 with transparency, more for other bands. Weights
            for another number are adapted as :func:`zoo.channels.adapt` says.
        mean: Mean of each channel, which the first layer subtracts; three are repeated for further channels, and a grey
            picture is standardised by each of three. Replaced by that of the weights it starts from.
        std: Standard deviation of each channel, which the first layer divides by; repeated and replaced likewise.
        label_smoothing: Share of the target mass that is spread over all classes, in [0, 1].
        weights: File to start from (``.safetensors``, ``.ckpt``, ``.pth``) or ``hf://owner/name``. The head is fresh
            where the number of classes differs.
        keep_matching_classes: Keep the rows of the head whose class names match.
        optimizer: Makes the optimizer from the parameters. Default: the assignment's, for 64 pictures a step.
        scheduler: Makes the schedule from the optimizer and the run's number of steps. Default: the assignment's, a
            tenth of the rate after 60 and 80 % of the run.

    Raises:
        ValueError: A number is too small, or there are not as many means and deviations as ``in_channels``, three, or
            one.
    """

    @plain_arguments
    def __init__(
        self,
        block: Literal["plain", "residual", "bottleneck"] = "residual",
        width: int = 8,
        blocks_per_stage: int = 5,
        num_classes: int = 10,
        class_names: list[str] | None = None,
        image_size: int = 32,
        in_channels: int = 3,
        mean: tuple[float, ...] = CIFAR10_MEAN,
        std: tuple[float, ...] = CIFAR_STD,
        label_smoothing: float = 0.0,
        weights: str | None = None,
        keep_matching_classes: bool = False,
        optimizer: OptimizerCallable = lambda params: optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=1e-4),
        scheduler: SchedulerCallable | None = lambda optimizer, steps: Step(optimizer, steps, milestones=[0.6, 0.8]),
    ) -> None:
        super().__init__(num_classes, class_names, optimizer, scheduler, label_smoothing)
        least = 4 if block == "bottleneck" else 1
        for name, value, smallest in (("width", width, least), ("blocks_per_stage", blocks_per_stage, 1)):
            if value < smallest:
                raise ValueError(f"{name}={value} must be at least {smallest}")
        self.example_input_array = torch.zeros(1, in_channels, image_size, image_size)
        mean, std = channel_statistics(in_channels, mean, std)
        network = preact_network(block, width, blocks_per_stage, len(mean))
        self.backbone = standardized(network, mean, std, channels=in_channels)
        self.head = nn.Linear(4 * width, num_classes)
        self.to(memory_format=torch.channels_last)
        if weights is not None:
            load_weights(self, weights, keep_matching_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to logits (N, num_classes)."""
        return cast(Tensor, self.head(self.backbone(images)))
