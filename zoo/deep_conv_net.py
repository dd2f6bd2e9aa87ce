"""DeepConvNet of assignment 3: 3x3 convolutions, with or without batch norm, then one linear layer.

Course: EECS 498-007, assignment 3, "Convolutional networks" (``DeepConvNet``): {convolution - [batch norm] -
rectifier - [2x2 pool]} x (L - 1) - linear - softmax. Initialization: He et al., 2015, Delving deep into rectifiers,
https://arxiv.org/abs/1502.01852 (section 2.2). Batch norm: Ioffe and Szegedy, 2015, https://arxiv.org/abs/1502.03167;
the assignment's "momentum 0.9" for the running statistics is PyTorch's 0.1.
"""

import math
from typing import cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn, optim

from zoo.arguments import plain_arguments
from zoo.running.optimizing import SchedulerCallable
from zoo.standardization import CIFAR10_MEAN, channel_statistics, standardized
from zoo.tasks.classification import ClassificationTask
from zoo.weights import load_weights


def deep_conv_network(
    in_channels: int, num_filters: tuple[int, ...], max_pools: tuple[int, ...], batch_norm: bool
) -> nn.Sequential:
    """Pictures (N, C, S, S) to flat features (N, num_filters[-1] * (S / 2 ** pools) ** 2).

    Args:
        in_channels: Channels C of the pictures.
        num_filters: Filters of each convolution.
        max_pools: After which convolutions, counted from 0, the picture is halved.
        batch_norm: Put a batch norm behind each convolution.
    """
    layers: list[nn.Module] = []
    for place, (fan_in, filters) in enumerate(zip([in_channels, *num_filters], num_filters, strict=False)):
        layers.append(nn.Conv2d(fan_in, filters, 3, padding=1))
        # Without batch norm pooled before the rectifier: the same values as after it, on a quarter of the elements.
        if place in max_pools and not batch_norm:
            layers.append(nn.MaxPool2d(2))
        if batch_norm:
            layers.append(nn.BatchNorm2d(filters))
        layers.append(nn.ReLU(inplace=True))
        if place in max_pools and batch_norm:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten())


class DeepConvNet(ClassificationTask):
    """DeepConvNet image classifier.

    Args:
        num_filters: Filters of each 3x3 convolution.
        max_pools: After which of them, counted from 0, a 2x2 pool halves the picture.
        batch_norm: Put a batch norm behind each convolution.
        weight_scale: Standard deviation of all initial weights; None takes He et al.'s, ``sqrt(2 / fan_in)``, and
            ``sqrt(1 / fan_in)`` for the linear layer. Biases start at 0.
        num_classes: Number of classes.
        class_names: Their names, in the order of the labels; None calls them "0", "1", ….
        image_size: Side of the square images in pixels.
        in_channels: Channels of the pictures; None: as many as there are means. Weights for another number are adapted
            as :func:`zoo.channels.adapt` says.
        mean: Mean of each channel, which the first layer subtracts. A grey image is repeated for three means, and three
            means are repeated for further channels.
        std: What the first layer divides each channel by; the assignment leaves that out.
        label_smoothing: Share of the target mass that is spread over all classes, in [0, 1].
        weights: File to start from (``.safetensors``, ``.ckpt``, ``.pth``) or ``hf://owner/name``. The head is fresh
            where the number of classes differs.
        keep_matching_classes: Keep the rows of the head whose class names match.
        optimizer: Makes the optimizer from the parameters. Default: Adam at 1e-3, as in the assignment.
        scheduler: Makes the schedule from the optimizer and the run's number of steps.

    Raises:
        ValueError: There is no convolution, a pool follows one that there is not, the pools leave no pixel, or
            there are not as many means and deviations as ``in_channels``, three, or one.
    """

    @plain_arguments
    def __init__(
        self,
        num_filters: tuple[int, ...] = (8, 8, 8, 8, 8),
        max_pools: tuple[int, ...] = (0, 1, 2, 3, 4),
        batch_norm: bool = False,
        weight_scale: float | None = None,
        num_classes: int = 10,
        class_names: list[str] | None = None,
        image_size: int = 32,
        in_channels: int | None = None,
        mean: tuple[float, ...] = CIFAR10_MEAN,
        std: tuple[float, ...] = (1.0, 1.0, 1.0),
        label_smoothing: float = 0.0,
        weights: str | None = None,
        keep_matching_classes: bool = False,
        optimizer: OptimizerCallable = lambda params: optim.Adam(params, lr=1e-3, fused=True),
        scheduler: SchedulerCallable | None = None,
    ) -> None:
        super().__init__(num_classes, class_names, optimizer, scheduler, label_smoothing)
        if not num_filters or not set(max_pools) <= set(range(len(num_filters))):
            raise ValueError(
                f"max_pools={list(max_pools)} must be places in num_filters={list(num_filters)}, counted from 0"
            )
        side = image_size // 2 ** len(set(max_pools))
        if side < 1:
            raise ValueError(f"{len(set(max_pools))} pools leave nothing of image_size={image_size}")
        in_channels = len(mean) if in_channels is None else in_channels
        mean, std = channel_statistics(in_channels, mean, std)
        self.example_input_array = torch.zeros(1, in_channels, image_size, image_size)
        network = deep_conv_network(len(mean), num_filters, max_pools, batch_norm)
        self.backbone = standardized(network, mean, std, channels=in_channels)
        self.head = nn.Linear(num_filters[-1] * side * side, num_classes)
        self._initialize(weight_scale)
        self.to(memory_format=torch.channels_last)
        if weights is not None:
            load_weights(self, weights, keep_matching_classes)

    def _initialize(self, weight_scale: float | None) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                gain = 1 if layer is self.head else 2  # a rectifier halves the mean square
                fan_in = layer.weight[0].numel()
                scale = weight_scale if weight_scale is not None else math.sqrt(gain / fan_in)
                nn.init.normal_(layer.weight, std=scale)
                nn.init.zeros_(cast(Tensor, layer.bias))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, S, S) in [0, 1] to logits (N, num_classes)."""
        return cast(Tensor, self.head(self.backbone(images)))
