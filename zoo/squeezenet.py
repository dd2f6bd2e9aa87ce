"""SqueezeNet 1.0: AlexNet's accuracy with a fiftieth of its parameters.

Paper: Iandola et al., 2016, SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size,
https://arxiv.org/abs/1602.07360. EECS 498-007, assignment 4, visualises and fools this network.
Built from torchvision, so that its weights load by name. The paper's SqueezeNet-DeepCompression gives the same network
compressed weights; as a state dict of half-precision tensors they load too.
"""

from collections import OrderedDict
from typing import Literal, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn, optim

from zoo.arguments import plain_arguments
from zoo.running.optimizing import SchedulerCallable
from zoo.running.schedules import Linear
from zoo.standardization import IMAGENET_MEAN, IMAGENET_STD, channel_statistics, standardized
from zoo.tasks.classification import ClassificationTask
from zoo.weights import Published, load_weights


def squeezenet_network(stem: Literal["imagenet", "small"], dropout: float, channels: int = 3) -> nn.Sequential:
    """Torchvision's network up to its last convolution: pictures (N, C, H, W) to a map (N, 512, H / 16, W / 16).

    Args:
        stem: ``imagenet``: 7x7 of stride 2, for pictures of 21 pixels and more; ``small``: 3x3 of stride 1, which
            leaves twice the pixels.
        dropout: Share of the map's values that are dropped at its end.
        channels: Channels C of the pictures.
    """
    from torchvision.models import squeezenet1_0

    built = squeezenet1_0(weights=None, dropout=dropout)
    if stem == "small" or channels != 3:
        kernel, stride, padding = (3, 1, 1) if stem == "small" else (7, 2, 0)
        built.features[0] = nn.Conv2d(channels, 96, kernel, stride, padding)
        nn.init.kaiming_uniform_(built.features[0].weight)
        nn.init.zeros_(built.features[0].bias)
    return nn.Sequential(OrderedDict(features=built.features, classifier=built.classifier[:1]))


class SqueezeNetHead(nn.Conv2d):
    """A 1x1 convolution to one map per class, rectified, whose means are the scores (N, num_classes).

    Its bias starts at 1, where torchvision's is 0: softmax does not mind, and no class starts behind a closed
    rectifier, out of which it would never learn.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(512, num_classes, 1)
        nn.init.normal_(self.weight, 0, 0.01)
        nn.init.ones_(cast(Tensor, self.bias))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 512, H, W) to scores (N, num_classes), none below 0."""
        return super().forward(x).relu().mean((2, 3))


class SqueezeNet(ClassificationTask):
    """SqueezeNet 1.0 image classifier.

    Args:
        num_classes: Number of classes.
        class_names: Their names, in the order of the labels; None calls them "0", "1", ….
        stem: ``imagenet``: the paper's 7x7 convolution of stride 2; ``small``, for pictures of 32 pixels or so: 3x3 of
            stride 1.
        dropout: Share of features dropped before the head.
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
        optimizer: Makes the optimizer from the parameters. Default: the paper's, for 512 pictures a step.
        scheduler: Makes the schedule from the optimizer and the run's number of steps. Default: linear to 0, the
            paper's.

    Raises:
        ValueError: There are not as many means and deviations as ``in_channels``, three, or one.
    """

    @plain_arguments
    def __init__(
        self,
        num_classes: int = 1000,
        class_names: list[str] | None = None,
        stem: Literal["imagenet", "small"] = "imagenet",
        dropout: float = 0.5,
        image_size: int = 224,
        in_channels: int = 3,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        label_smoothing: float = 0.0,
        weights: str | None = None,
        keep_matching_classes: bool = False,
        optimizer: OptimizerCallable = lambda params: optim.SGD(params, lr=0.04, momentum=0.9, weight_decay=2e-4),
        scheduler: SchedulerCallable | None = Linear,
    ) -> None:
        super().__init__(num_classes, class_names, optimizer, scheduler, label_smoothing)
        self.example_input_array = torch.zeros(1, in_channels, image_size, image_size)
        self.published = Published("squeezenet1_0", {"classifier.1.": "head."})
        mean, std = channel_statistics(in_channels, mean, std)
        network = squeezenet_network(stem, dropout, len(mean))
        self.backbone = standardized(network, mean, std, channels=in_channels)
        self.head = SqueezeNetHead(num_classes)
        self.to(memory_format=torch.channels_last)
        if weights is not None:
            load_weights(self, weights, keep_matching_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to logits (N, num_classes)."""
        return cast(Tensor, self.head(self.backbone(images)))
