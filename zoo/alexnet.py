"""AlexNet: the convolutional network that won ImageNet in 2012, as one tower.

Paper: Krizhevsky, Sutskever and Hinton, 2012, ImageNet classification with deep convolutional neural networks; in one
tower: Krizhevsky, 2014, One weird trick for parallelizing convolutional neural networks,
https://arxiv.org/abs/1404.5997 (figure 2). Lecture: EECS 498-007, lecture 8, "AlexNet".
Built from torchvision, so that its weights load by name. Differs from 2012, as the lecture's table does: 64 filters
first in place of 96, no split over two GPUs, no local response normalization.
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


def alexnet_network(
    stem: Literal["imagenet", "small"], hidden: int, dropout: float, channels: int = 3
) -> nn.Sequential:
    """Torchvision's network without its last layer: pictures (N, C, H, W) to features (N, hidden).

    Args:
        stem: ``imagenet``: 11x11 of stride 4, for pictures of 63 pixels and more. ``small``: 5x5 of stride 2, for
            pictures of 31 pixels and more, whose last feature map is averaged to one pixel.
        hidden: Width of the two fully connected layers.
        dropout: Share of features dropped before each of them.
        channels: Channels C of the pictures.
    """
    from torchvision.models import alexnet

    built = alexnet(weights=None, dropout=dropout)
    side = 6 if stem == "imagenet" else 1
    built.classifier[1] = nn.Linear(256 * side * side, hidden)
    built.classifier[4] = nn.Linear(hidden, hidden)
    if stem == "small":
        built.features[0] = nn.Conv2d(channels, 64, 5, stride=2, padding=2)
    elif channels != 3:
        built.features[0] = nn.Conv2d(channels, 64, 11, stride=4, padding=2)
    return nn.Sequential(
        OrderedDict(
            features=built.features,
            avgpool=nn.AdaptiveAvgPool2d(side),
            flatten=nn.Flatten(),
            classifier=built.classifier[:-1],
        )
    )


class AlexNet(ClassificationTask):
    """AlexNet image classifier.

    Args:
        num_classes: Number of classes.
        class_names: Their names, in the order of the labels; None calls them "0", "1", ….
        stem: ``imagenet``: the paper's 11x11 convolution of stride 4; ``small``, for pictures of 32 pixels or so: 5x5
            of stride 2.
        hidden: Width of the two fully connected layers; 4,096 in the paper.
        dropout: Share of features dropped before each of them.
        image_size: Side of the pictures that the model is made for, in pixels.
        in_channels: Channels of the pictures: 1 for grey, 3 for RGB, 4 with transparency, more for other bands. Weights
            for another number are adapted as :func:`zoo.channels.adapt` says.
        mean: Mean of each channel, which the first layer subtracts; three are repeated for further channels, and a grey
            picture is standardised by each of three. Replaced by that of the weights it starts from.
        std: Standard deviation of each channel, which the first layer divides by; repeated and replaced likewise.
        label_smoothing: Share of the target mass that is spread over all classes, in [0, 1].
        weights: torchvision's name (``DEFAULT``, ``IMAGENET1K_V1``), a file (``.safetensors``, ``.ckpt``, ``.pth``) or
            ``hf://owner/name``. The head is fresh where the number of classes differs.
        keep_matching_classes: Keep the rows of the head whose class names match.
        optimizer: Makes the optimizer from the parameters. Default: the paper's, for 128 pictures a step.
        scheduler: Makes the schedule from the optimizer and the run's number of steps. Default: a tenth of the rate
            three times, as in the paper, there whenever the validation error stood still.

    Raises:
        ValueError: There are not as many means and deviations as ``in_channels``, three, or one.
    """

    @plain_arguments
    def __init__(
        self,
        num_classes: int = 1000,
        class_names: list[str] | None = None,
        stem: Literal["imagenet", "small"] = "imagenet",
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
        self.example_input_array = torch.zeros(1, in_channels, image_size, image_size)
        self.published = Published("alexnet", {"classifier.6.": "head."})
        mean, std = channel_statistics(in_channels, mean, std)
        network = alexnet_network(stem, hidden, dropout, len(mean))
        self.backbone = standardized(network, mean, std, channels=in_channels)
        self.head = nn.Linear(hidden, num_classes)
        self.to(memory_format=torch.channels_last)
        if weights is not None:
            load_weights(self, weights, keep_matching_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to logits (N, num_classes)."""
        return cast(Tensor, self.head(self.backbone(images)))
