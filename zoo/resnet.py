"""ResNet: residual networks, in the three forms that people train.

Paper: He, Zhang, Ren and Sun, 2015, Deep residual learning for image recognition, https://arxiv.org/abs/1512.03385.
Lecture: EECS 498-007, lecture 8, "Residual networks".

- ``depth`` 18, 34, 50, 101, 152: the ImageNet networks (section 4.1) as torchvision builds them, so that its weights
  load by name. Its bottleneck halves the picture in the 3x3 convolution ("version 1.5"), the paper's and the lecture's
  in the first 1x1: ``stride_in_1x1`` gives theirs, with 3.8 in place of 4.1 GFLOP at depth 50.
- ``depth`` 20, 32, 44, 56, 110: the CIFAR networks (section 4.2), whose shortcuts have no parameters (option A).
- ``depth`` 9: the small, wide network of the fast CIFAR-10 trainings: Page, 2018, How to train your ResNet.
"""

from typing import Literal, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn, optim
from torch.nn import functional as F

from zoo.arguments import plain_arguments
from zoo.running.optimizing import SchedulerCallable
from zoo.running.schedules import Step
from zoo.standardization import IMAGENET_MEAN, IMAGENET_STD, channel_statistics, standardized
from zoo.tasks.classification import ClassificationTask
from zoo.weights import Published, load_weights

IMAGENET_DEPTHS = (18, 34, 50, 101, 152)
CIFAR_DEPTHS = (20, 32, 44, 56, 110)
FAST_DEPTH = 9


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters: (N, C, H, W) to (N, K, H / stride, W / stride).

    Where the shape changes, the shortcut takes every second pixel and adds channels of zeros (section 3.3, option A).
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.more = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, K, H / stride, W / stride)."""
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.more:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(x)) + shortcut, inplace=True)


class CIFARNetwork(nn.Module):
    """The network of section 4.2 without its classifier: pictures (N, C, 32, 32) to features (N, 64).

    Args:
        depth: 6n + 2 layers, n blocks in each of the three stages.
        channels: Channels C of the pictures.
    """

    def __init__(self, depth: int, channels: int = 3) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to features (N, 64)."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)  # (N, 16, H, W)
        x = self.layer3(self.layer2(self.layer1(x)))  # (N, 64, H / 4, W / 4)
        return x.mean((2, 3))


class ConvBlock(nn.Sequential):
    """3x3 convolution, pooling where asked, batch norm, rectifier; pooled first, which costs less and ends alike."""

    def __init__(self, in_channels: int, channels: int, pool: bool = False) -> None:
        super().__init__(
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
            nn.MaxPool2d(2) if pool else nn.Identity(),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )


class FastNetwork(nn.Module):
    """ResNet-9 without its classifier: pictures (N, C, 32, 32) to features (N, 512).

    Page's order is convolution, batch norm, rectifier, pool; his later version pools first, as here.

    Args:
        channels: Channels C of the pictures.
    """

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.prep = ConvBlock(channels, 64)
        self.layer1 = ConvBlock(64, 128, pool=True)
        self.residual1 = nn.Sequential(ConvBlock(128, 128), ConvBlock(128, 128))
        self.layer2 = ConvBlock(128, 256, pool=True)
        self.layer3 = ConvBlock(256, 512, pool=True)
        self.residual3 = nn.Sequential(ConvBlock(512, 512), ConvBlock(512, 512))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to features (N, 512)."""
        x = self.layer1(self.prep(x))  # (N, 128, H / 2, W / 2)
        x = x + self.residual1(x)
        x = self.layer3(self.layer2(x))  # (N, 512, H / 8, W / 8)
        x = x + self.residual3(x)
        return x.amax((2, 3))


class ScaledLinear(nn.Linear):
    """A linear layer without bias whose scores are multiplied by a constant: Page's ResNet-9 by 1 / 8."""

    def __init__(self, in_features: int, out_features: int, scale: float) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Map features (N, in_features) to scores (N, out_features)."""
        return super().forward(x) * self.scale


def imagenet_network(
    depth: int, stem: Literal["imagenet", "small"], stride_in_1x1: bool, zero_init_residual: bool, channels: int = 3
) -> tuple[nn.Module, int]:
    """Torchvision's network without its classifier, and the number of its features.

    Pictures (N, channels, H, W) to features (N, 512), from depth 50 on (N, 2048).
    """
    from torchvision import models

    network = getattr(models, f"resnet{depth}")(weights=None, zero_init_residual=zero_init_residual)
    features = network.fc.in_features
    network.fc = nn.Identity()
    if stem == "small" or channels != 3:
        kernel, stride, padding = (3, 1, 1) if stem == "small" else (7, 2, 3)
        network.conv1 = nn.Conv2d(channels, 64, kernel, stride, padding, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    if stem == "small":
        network.maxpool = nn.Identity()
    for module in network.modules():
        if stride_in_1x1 and isinstance(module, models.resnet.Bottleneck):
            module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
    return network, features


class ResNet(ClassificationTask):
    """Residual network for image classification.

    Args:
        depth: Number of layers, as the file's docstring lists them.
        num_classes: Number of classes.
        class_names: Their names, in the order of the labels; None calls them "0", "1", ….
        stem: ``imagenet``: a 7x7 convolution and a pool, each of stride 2; ``small``, for pictures of 32 pixels or so:
            a 3x3 convolution of stride 1. The depths made for CIFAR have a stem of their own and leave this aside.
        image_size: Side of the pictures that the model is made for, in pixels; any from 32 on will run.
        in_channels: Channels of the pictures: 1 for grey, 3 for RGB, 4 with transparency, more for other bands. Weights
            for another number are adapted as :func:`zoo.channels.adapt` says.
        mean: Mean of each channel, which the first layer subtracts; three are repeated for further channels, and a grey
            picture is standardised by each of three. Replaced by that of the weights it starts from.
        std: Standard deviation of each channel, which the first layer divides by; repeated and replaced likewise.
        stride_in_1x1: Halve the picture in a bottleneck's first 1x1 convolution, as the paper does.
        zero_init_residual: Start with residual branches that add nothing (lecture 10; Goyal et al., 2017, section 5.1).
        label_smoothing: Share of the target mass that is spread over all classes, in [0, 1].
        weights: torchvision's name (``DEFAULT``, ``IMAGENET1K_V1``, …), a file (``.safetensors``, ``.ckpt``,
            ``.pth``) or ``hf://owner/name``. The head is fresh where the number of classes differs.
        keep_matching_classes: Keep the rows of the head whose class names match.
        optimizer: Makes the optimizer from the parameters. Default: the paper's, for 256 pictures a step.
        scheduler: Makes the schedule from the optimizer and the run's number of steps. Default: the lecture's, a tenth
            of the rate after 30, 60 and 90 % of the run.

    Raises:
        ValueError: There is no network of that depth, or there are not as many means and deviations as
            ``in_channels``, three, or one.
    """

    @plain_arguments
    def __init__(
        self,
        depth: int = 18,
        num_classes: int = 1000,
        class_names: list[str] | None = None,
        stem: Literal["imagenet", "small"] = "imagenet",
        image_size: int = 224,
        in_channels: int = 3,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        stride_in_1x1: bool = False,
        zero_init_residual: bool = False,
        label_smoothing: float = 0.0,
        weights: str | None = None,
        keep_matching_classes: bool = False,
        optimizer: OptimizerCallable = lambda params: optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-4),
        scheduler: SchedulerCallable | None = Step,
    ) -> None:
        super().__init__(num_classes, class_names, optimizer, scheduler, label_smoothing)
        self.example_input_array = torch.zeros(1, in_channels, image_size, image_size)
        self.published = Published(None, {"linear.": "head."})  # the usual name in CIFAR networks of this paper
        mean, std = channel_statistics(in_channels, mean, std)
        network: nn.Module
        if depth in IMAGENET_DEPTHS:
            self.published = Published(f"resnet{depth}", {"fc.": "head."})
            network, features = imagenet_network(depth, stem, stride_in_1x1, zero_init_residual, len(mean))
            self.head = nn.Linear(features, num_classes)
        elif depth in CIFAR_DEPTHS:
            network = CIFARNetwork(depth, len(mean))
            self.head = nn.Linear(64, num_classes)
        elif depth == FAST_DEPTH:
            network = FastNetwork(len(mean))
            self.head = ScaledLinear(512, num_classes, scale=1 / 8)
        else:
            known = ", ".join(map(str, sorted((FAST_DEPTH, *CIFAR_DEPTHS, *IMAGENET_DEPTHS))))
            raise ValueError(f"there is no ResNet of depth {depth}: there are {known}")
        self.backbone = standardized(network, mean, std, channels=in_channels)
        self.to(memory_format=torch.channels_last)
        if weights is not None:
            load_weights(self, weights, keep_matching_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to logits (N, num_classes)."""
        return cast(Tensor, self.head(self.backbone(images)))
