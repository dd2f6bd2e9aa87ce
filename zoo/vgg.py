"""VGG: 3x3 convolutions and nothing else, from 11 to 19 layers.

Paper: Simonyan and Zisserman, 2014, Very deep convolutional networks for large-scale image recognition,
https://arxiv.org/abs/1409.1556 (table 1: A, B, D and E). Lecture: EECS 498-007, lecture 8, "VGG".
Built from torchvision, so that its weights load by name. Batch norm is younger than the paper; with it the network
trains without the paper's detour over a shallower one.
"""

from collections import OrderedDict
from typing import Literal, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn, optim

from zoo.arguments import plain_arguments
from zoo.running.optimizing import SchedulerCallable
from zoo.running.schedules import Step
from zoo.standardization import IMAGENET_MEAN, IMAGENET_STD, channel_statistics, standardized
from zoo.tasks.classification import ClassificationTask
from zoo.weights import Published, load_weights

# Convolutions in each of the five stages, whose widths are 64, 128, 256, 512 and 512; a 2x2 pool ends each stage.
STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
WIDTHS = (64, 128, 256, 512, 512)


def vgg_network(
    depth: int,
    batch_norm: bool,
    stem: Literal["imagenet", "small"],
    width: float,
    hidden: int,
    dropout: float,
    channels: int = 3,
) -> nn.Sequential:
    """Torchvision's network without its last layer: pictures (N, C, H, W) to features (N, hidden).

    Args:
        depth: 11, 13, 16 or 19 layers with weights.
        batch_norm: Put a batch norm behind each convolution.
        stem: ``imagenet`` hands 7x7 pixels to the fully connected layers, ``small`` their mean.
        width: Factor on the channels of all convolutions.
        hidden: Width of the two fully connected layers.
        dropout: Share of features dropped behind each of them.
        channels: Channels C of the pictures.
    """
    from torchvision.models.vgg import VGG, make_layers

    widths = [round(width * full) for full in WIDTHS]
    plan: list[str | int] = []
    for count, wide in zip(STAGES[depth], widths, strict=True):
        plan += [wide] * count + ["M"]
    side = 7 if stem == "imagenet" else 1
    built = VGG(make_layers(plan, batch_norm), num_classes=1, init_weights=False, dropout=dropout)
    if channels != 3:
        built.features[0] = nn.Conv2d(channels, widths[0], 3, padding=1)
    built.classifier[0] = nn.Linear(widths[-1] * side * side, hidden)
    built.classifier[3] = nn.Linear(hidden, hidden)
    network = nn.Sequential(
        OrderedDict(
            features=built.features,
            avgpool=nn.AdaptiveAvgPool2d(side),
            flatten=nn.Flatten(),
            classifier=built.classifier[:-1],
        )
    )
    return network.apply(_initialize)


def _initialize(module: nn.Module) -> None:
    """As He et al. do; torchvision has N(0, 0.01) for linear layers, which suits their full width only."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        mode: Literal["fan_in", "fan_out"] = "fan_out" if isinstance(module, nn.Conv2d) else "fan_in"
        nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
        nn.init.zeros_(cast(Tensor, module.bias))


class VGG(ClassificationTask):
    """VGG image classifier.

    Args:
        depth: Layers with weights: 11, 13, 16 or 19.
        batch_norm: Put a batch norm behind each convolution.
        num_classes: Number of classes.
        class_names: Their names, in the order of the labels; None calls them "0", "1", ….
        stem: ``imagenet``: fully connected layers on 7x7 pixels; ``small``, for pictures of 32 pixels or so, whose
            last feature map is one pixel: on their mean.
        width: Factor on the channels of all convolutions; 1 in the paper.
        hidden: Width of the two fully connected layers; 4,096 in the paper.
        dropout: Share of features dropped behind each of them.
        image_size: Side of the pictures that the model is made for, in pixels; any from 32 on will run.
        in_channels: Channels of the pictures: 1 for grey, 3 for RGB, 4 with transparency, more for other bands. Weights
            for another number are adapted as :func:`zoo.channels.adapt` says.
        mean: Mean of each channel, which the first layer subtracts; three are repeated for further channels, and a grey
            picture is standardised by each of three. Replaced by that of the weights it starts from.
        std: Standard deviation of each channel, which the first layer divides by; repeated and replaced likewise.
        label_smoothing: Share of the target mass that is spread over all classes, in [0, 1].
        weights: torchvision's name (``DEFAULT``, ``IMAGENET1K_V1``), a file (``.safetensors``, ``.ckpt``, ``.pth``) or
            ``hf://owner/name``. The head is fresh where the number of classes differs.
        keep_matching_classes: Keep the rows of the head whose class names match.
        optimizer: Makes the optimizer from the parameters. Default: the paper's, for 256 pictures a step; ten times
            the rate diverges without batch norm.
        scheduler: Makes the schedule from the optimizer and the run's number of steps. Default: a tenth of the rate
            three times, as in the paper, there whenever the validation accuracy stood still.

    Raises:
        ValueError: There is no network of that depth, or there are not as many means and deviations as
            ``in_channels``, three, or one.
    """

    @plain_arguments
    def __init__(
        self,
        depth: int = 16,
        batch_norm: bool = False,
        num_classes: int = 1000,
        class_names: list[str] | None = None,
        stem: Literal["imagenet", "small"] = "imagenet",
        width: float = 1.0,
        hidden: int = 4096,
        dropout: float = 0.5,
        image_size: int = 224,
        in_channels: int = 3,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        label_smoothing: float = 0.0,
        weights: str | None = None,
        keep_matching_classes: bool = False,
        optimizer: OptimizerCallable = lambda params: optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=5e-4),
        scheduler: SchedulerCallable | None = Step,
    ) -> None:
        super().__init__(num_classes, class_names, optimizer, scheduler, label_smoothing)
        if depth not in STAGES:
            raise ValueError(f"there is no VGG of depth {depth}: there are {', '.join(map(str, STAGES))}")
        self.example_input_array = torch.zeros(1, in_channels, image_size, image_size)
        self.published = Published(f"vgg{depth}{'_bn' if batch_norm else ''}", {"classifier.6.": "head."})
        mean, std = channel_statistics(in_channels, mean, std)
        network = vgg_network(depth, batch_norm, stem, width, hidden, dropout, len(mean))
        self.backbone = standardized(network, mean, std, channels=in_channels)
        self.head = nn.Linear(hidden, num_classes)
        nn.init.normal_(self.head.weight, 0, 0.01)
        nn.init.zeros_(self.head.bias)
        self.to(memory_format=torch.channels_last)
        if weights is not None:
            load_weights(self, weights, keep_matching_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to logits (N, num_classes)."""
        return cast(Tensor, self.head(self.backbone(images)))
