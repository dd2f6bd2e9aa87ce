"""C3D: VGG with a third dimension, eight convolutions of 3 x 3 x 3.

Paper: Tran, Bourdev, Fergus, Torresani and Paluri, 2014, Learning spatiotemporal features with 3D convolutional
networks, https://arxiv.org/abs/1412.0767 (section 3.2; figure 3).
Lecture: EECS 498-007, lecture 18, "Videos" (C3D: the VGG of 3D CNNs).
Differs from the paper in its input, which is standardised by one mean and deviation in place of a mean clip, and in its
initial weights, which are He's.
"""

from typing import cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn, optim

from zoo.arguments import plain_arguments
from zoo.running.optimizing import SchedulerCallable
from zoo.running.schedules import Step
from zoo.standardization import standardized
from zoo.tasks.video import VideoTask
from zoo.weights import load_weights

WIDTHS = ((1,), (2,), (4, 4), (8, 8), (8, 8))  # of the convolutions before each pool, in channels of the first
HALVED = [k * 0.15 / 1.9 for k in range(1, 13)]  # when the rate is, as shares of the run
HALF = (0.5, 0.5, 0.5)


class C3DNetwork(nn.Module):
    """The network without its classifier: clips (N, 3, T, H, W) to features (N, hidden).

    Shapes in comments are those of the paper's clips of 16 frames of 112 pixels.

    Args:
        frames: T.
        image_size: H and W in pixels.
        width: Channels of the first convolution.
        hidden: Units of both fully-connected layers.
        dropout: Share of their outputs that is set to 0 in training.
    """

    def __init__(self, frames: int, image_size: int, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for stage, widths in enumerate(WIDTHS):
            for channels in (width * times for times in widths):
                layers += [nn.Conv3d(before, channels, 3, padding=1), nn.ReLU(inplace=True)]
                before = channels
            time = 1 if stage == 0 else 2  # the first pool leaves time alone
            layers.append(nn.MaxPool3d((time, 2, 2), padding=(0, 1, 1) if stage == len(WIDTHS) - 1 else 0))
        self.features = nn.Sequential(*layers)  # (N, 512, 1, 4, 4)
        with torch.device("meta"):
            inputs = self._inputs(frames, image_size)
        self.fc6 = nn.Linear(before * inputs, hidden)
        self.fc7 = nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(dropout)
        for module in self.modules():
            if isinstance(module, nn.Conv3d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(cast(Tensor, module.bias))

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips (N, 3, T, H, W) to features (N, hidden)."""
        x = self.features(clips).flatten(1)  # (N, 8192)
        x = self.dropout(torch.relu(self.fc6(x)))
        return cast(Tensor, self.dropout(torch.relu(self.fc7(x))))

    def _inputs(self, frames: int, image_size: int) -> int:
        """Places in time and space that are left after the pools."""
        pools = nn.Sequential(*(layer for layer in self.features if isinstance(layer, nn.MaxPool3d)))
        try:
            return pools(torch.zeros(1, 1, frames, image_size, image_size)).numel()
        except RuntimeError as error:
            raise ValueError(
                f"clips of {frames} frames and {image_size} pixels are too small for C3D, which halves both: it needs "
                "16 frames and 16 pixels at least"
            ) from error


class C3D(VideoTask):
    """C3D for the classification of clips.

    Args:
        num_classes: Number of classes; 487 is Sports-1M's.
        class_names: Their names, in the order of the labels; None calls them "0", "1", ….
        frames: Frames T of a clip, 16 at least; the network takes no other number.
        image_size: Height and width of the clips in pixels; the network takes no others.
        width: Channels of the first convolution; the last ones have eight times as many.
        hidden: Units of the fully-connected layers.
        dropout: Share of their outputs that is set to 0 in training, in [0, 1).
        seconds: Length of the clips that it is made for, for ``zoo predict`` with files; None takes whole files.
        mean: Mean of each colour, which the first layer subtracts.
        std: Standard deviation of each colour, which the first layer divides by.
        label_smoothing: Share of the target mass that is spread over all classes, in [0, 1].
        weights: A file of the zoo (``.safetensors``, ``.ckpt``) or ``hf://owner/name``. The head is fresh where the
            number of classes differs.
        keep_matching_classes: Keep the rows of the head whose class names match.
        optimizer: Makes the optimizer from the parameters. Default: the paper's, for 30 clips a step.
        scheduler: Makes the schedule from the optimizer and the run's number of steps. Default: about the paper's on
            Sports-1M, which halves the rate every 150,000 of 1.9 million steps.

    Raises:
        ValueError: The clips are too small.
    """

    @plain_arguments
    def __init__(
        self,
        num_classes: int = 487,
        class_names: list[str] | None = None,
        frames: int = 16,
        image_size: int = 112,
        width: int = 64,
        hidden: int = 4096,
        dropout: float = 0.5,
        seconds: float | None = 16 / 30,
        mean: tuple[float, float, float] = HALF,
        std: tuple[float, float, float] = HALF,
        label_smoothing: float = 0.0,
        weights: str | None = None,
        keep_matching_classes: bool = False,
        optimizer: OptimizerCallable = lambda params: optim.SGD(params, lr=0.003, momentum=0.9, weight_decay=5e-4),
        scheduler: SchedulerCallable | None = lambda optimizer, steps: Step(optimizer, steps, HALVED, gamma=0.5),
    ) -> None:
        super().__init__(num_classes, class_names, optimizer, scheduler, label_smoothing)
        self.seconds = seconds
        self.example_input_array = torch.zeros(1, 3, frames, image_size, image_size)
        network = C3DNetwork(frames, image_size, width, hidden, dropout).to(memory_format=torch.channels_last_3d)
        self.backbone = standardized(network, mean, std, dimensions=3)
        self.head = nn.Linear(hidden, num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        if weights is not None:
            load_weights(self, weights, keep_matching_classes)

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips (N, 3, T, H, W) in [0, 1] to logits (N, num_classes)."""
        return cast(Tensor, self.head(self.backbone(clips)))
