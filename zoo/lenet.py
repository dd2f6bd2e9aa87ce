"""LeNet-5: the first convolutional network that was widely used, in the wider form that the lecture teaches.

Paper: LeCun, Bottou, Bengio and Haffner, 1998, Gradient-based learning applied to document recognition (section II).
Lecture: EECS 498-007, lecture 7, "Convolutional networks": 20 and 50 channels, 500 hidden units.
Differs from the paper, as the lecture does: ReLU in place of a scaled tanh, max pooling in place of trainable
subsampling, padded convolutions, full connection between the two convolutional layers, a linear head under softmax
in place of radial basis functions. 1,256,080 parameters against about 60,000.
"""

from typing import cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn, optim
from torch.nn import functional as F

from zoo.arguments import plain_arguments
from zoo.channels import expect_channels
from zoo.running.optimizing import SchedulerCallable
from zoo.tasks.classification import ClassificationTask
from zoo.weights import load_weights


class LeNetBackbone(nn.Module):
    """Two convolutions and the hidden layer: images (N, C, S, S) to features (N, 500).

    Args:
        in_channels: Channels C of the images.
        image_size: Side S of the images in pixels, at least 4.
    """

    out_features = 500

    def __init__(self, in_channels: int = 1, image_size: int = 28) -> None:
        super().__init__()
        if image_size < 4:
            raise ValueError(f"image_size={image_size} is too small: LeNet halves it twice, so it must be at least 4")
        self.conv1 = nn.Conv2d(in_channels, 20, 5, padding=2)
        self.conv2 = nn.Conv2d(20, 50, 5, padding=2)
        self.pool = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.hidden = nn.Linear(50 * (image_size // 4) ** 2, self.out_features)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, S, S) in [0, 1] to features (N, 500)."""
        expect_channels(images.shape[1], self.conv1.in_channels)
        # The rectifier comes after the pool: the same values as before it, on a quarter of the elements.
        x = F.relu(self.pool(self.conv1(images)), inplace=True)  # (N, 20, S / 2, S / 2)
        x = F.relu(self.pool(self.conv2(x)), inplace=True)  # (N, 50, S / 4, S / 4)
        x = self.flatten(x)  # (N, 50 * S / 4 * S / 4)
        return F.relu(self.hidden(x), inplace=True)  # (N, 500)


class LeNet(ClassificationTask):
    """LeNet-5 image classifier.

    Args:
        num_classes: Number of classes.
        class_names: Their names, in the order of the labels; None calls them "0", "1", ….
        in_channels: Channels of the images: 1 for grey, 3 for RGB. Weights for another number are adapted as
            :func:`zoo.channels.adapt` says.
        image_size: Side of the square images in pixels.
        label_smoothing: Share of the target mass that is spread over all classes, in [0, 1].
        weights: File to start from (``.safetensors``, ``.ckpt``, ``.pth``) or ``hf://owner/name``. The head is fresh
            where the number of classes differs.
        keep_matching_classes: Keep the rows of such a head whose class names match.
        optimizer: Makes the optimizer from the parameters. Default: Adam at 1e-3, the lecture's usual first choice.
        scheduler: Makes the schedule from the optimizer and the run's number of steps; stepped once per step.
    """

    @plain_arguments
    def __init__(
        self,
        num_classes: int = 10,
        class_names: list[str] | None = None,
        in_channels: int = 1,
        image_size: int = 28,
        label_smoothing: float = 0.0,
        weights: str | None = None,
        keep_matching_classes: bool = False,
        optimizer: OptimizerCallable = lambda params: optim.Adam(params, lr=1e-3, fused=True),
        scheduler: SchedulerCallable | None = None,
    ) -> None:
        super().__init__(num_classes, class_names, optimizer, scheduler, label_smoothing)
        self.example_input_array = torch.zeros(1, in_channels, image_size, image_size)
        self.backbone = LeNetBackbone(in_channels, image_size)
        self.head = nn.Linear(self.backbone.out_features, num_classes)
        # About 1.5 times as fast on a CPU: its convolutions then run on contiguous channels.
        self.to(memory_format=torch.channels_last)
        if weights is not None:
            load_weights(self, weights, keep_matching_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, S, S) in [0, 1] to logits (N, num_classes)."""
        return cast(Tensor, self.head(self.backbone(images)))
