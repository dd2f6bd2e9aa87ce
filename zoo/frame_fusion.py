"""The lecture's small networks for clips, which differ in where they put the frames together.

Lecture: EECS 498-007, lecture 18, "Videos" (single-frame CNN, late fusion, early fusion, 3D CNN).
Paper: Karpathy, Toderici, Shetty, Leung, Sukthankar and Fei-Fei, 2014, Large-scale video classification with
convolutional neural networks (section 3.1: single frame, late, early and slow fusion).

All are the lecture's table: a convolution to 12 channels, a pool of 4, a convolution to 24 channels, and the mean over
what is left. In the table's example clips are 3 x 20 x 64 x 64 (channels, frames T, height, width).
"""

from typing import Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn, optim
from torch.nn import functional as F

from zoo.arguments import plain_arguments
from zoo.running.optimizing import SchedulerCallable
from zoo.running.schedules import Cosine
from zoo.running.views import log_mean_probability
from zoo.standardization import standardized
from zoo.tasks.video import VideoTask
from zoo.weights import load_weights

Fusion = Literal["single_frame", "late_pool", "late_fc", "early", "slow"]

FUSIONS = ("single_frame", "late_pool", "late_fc", "early", "slow")
HALF = (0.5, 0.5, 0.5)
FIRST, SECOND = 12, 24  # the table's channels
POOL = 4


def frame_layers(in_channels: int, width: int = 1) -> nn.Sequential:
    """The table's layers over space: pictures (N, in_channels, H, W) to features (N, 24 width, H / 4, W / 4)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, FIRST * width, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(POOL),
        nn.Conv2d(FIRST * width, SECOND * width, 3, padding=1),
        nn.ReLU(inplace=True),
    )


class EachFrame(nn.Module):
    """The same layers on each frame: clips (N, 3, T, H, W) to features (N, T, 24 width).

    Args:
        width: Times the table's channels.
        flat: Keep all of a frame's places, (N, T, 24 width * H / 4 * W / 4), in place of their mean.
    """

    def __init__(self, width: int, flat: bool = False) -> None:
        super().__init__()
        self.layers = frame_layers(3, width)  # (N T, 24, 16, 16)
        self.pool = nn.Flatten(2) if flat else nn.AdaptiveAvgPool2d(1)

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips (N, 3, T, H, W) to features (N, T, F)."""
        count, frames = clips.shape[0], clips.shape[2]
        features = self.pool(self.layers(clips.transpose(1, 2).flatten(0, 1)))
        return features.reshape(count, frames, -1)


class LatePooled(nn.Module):
    """Late fusion by a mean: the features of each frame, averaged over time: (N, 3, T, H, W) to (N, 24 width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frames = EachFrame(width)

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips (N, 3, T, H, W) to features (N, 24 width)."""
        return self.frames(clips).mean(1)


class LateConnected(nn.Module):
    """Late fusion by fully-connected layers: all features of all frames side by side, and a hidden layer.

    Args:
        width: Times the table's channels.
        frames: Frames T of a clip.
        side: Pixels of its height and width.
        hidden: Units of the hidden layer.
    """

    def __init__(self, width: int, frames: int, side: int, hidden: int) -> None:
        super().__init__()
        self.frames = EachFrame(width, flat=True)
        self.hidden = nn.Linear(frames * SECOND * width * (side // POOL) ** 2, hidden)

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips (N, 3, T, side, side) to features (N, hidden)."""
        return F.relu(self.hidden(self.frames(clips).flatten(1)))


class Early(nn.Module):
    """Early fusion: the frames' colours are the first layer's channels: (N, 3, T, H, W) to (N, 24 width)."""

    def __init__(self, width: int, frames: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(frame_layers(3 * frames, width), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips (N, 3, T, H, W) to features (N, 24 width)."""
        features: Tensor = self.layers(clips.flatten(1, 2))
        return features


class Slow(nn.Sequential):
    """Slow fusion, the 3D CNN: both convolutions and the pool reach over time: (N, 3, T, H, W) to (N, 24 width)."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Conv3d(3, FIRST * width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool3d(POOL),
            nn.Conv3d(FIRST * width, SECOND * width, 3, padding=1),  # (N, 24, 5, 16, 16)
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool3d(1),
            nn.Flatten(),
        )


class FrameFusion(VideoTask):
    """The lecture's single-frame CNN, late fusion, early fusion or 3D CNN.

    Args:
        fusion: ``single_frame`` classifies each frame by itself and averages the probabilities. ``late_pool`` averages
            the frames' features. ``late_fc`` puts them side by side in front of a hidden layer. ``early`` takes the
            frames for channels of one picture. ``slow`` is the 3D CNN.
        num_classes: Number of classes.
        class_names: Their names, in the order of the labels; None calls them "0", "1", ….
        frames: Frames T of a clip. ``early`` and ``late_fc`` take no other number, ``slow`` four at least.
        image_size: Height and width of the clips, a multiple of 4 pixels; ``late_fc`` takes no others.
        width: Times the table's channels, 12 and 24.
        hidden: Units of the hidden layer of ``late_fc``.
        seconds: Length of the clips that it is made for, for ``zoo predict`` with files; None takes whole files.
        mean: Mean of each colour, which the first layer subtracts.
        std: Standard deviation of each colour, which the first layer divides by.
        label_smoothing: Share of the target mass that is spread over all classes, in [0, 1].
        weights: A file of the zoo (``.safetensors``, ``.ckpt``) or ``hf://owner/name``. The head is fresh where the
            number of classes differs.
        keep_matching_classes: Keep the rows of the head whose class names match.
        optimizer: Makes the optimizer from the parameters.
        scheduler: Makes the schedule from the optimizer and the run's number of steps.

    Raises:
        ValueError: There is no such fusion, or the size is no multiple of 4.
    """

    @plain_arguments
    def __init__(
        self,
        fusion: Fusion = "slow",
        num_classes: int = 487,
        class_names: list[str] | None = None,
        frames: int = 20,
        image_size: int = 64,
        width: int = 1,
        hidden: int = 64,
        seconds: float | None = None,
        mean: tuple[float, float, float] = HALF,
        std: tuple[float, float, float] = HALF,
        label_smoothing: float = 0.0,
        weights: str | None = None,
        keep_matching_classes: bool = False,
        optimizer: OptimizerCallable = lambda params: optim.Adam(params, lr=1e-3),
        scheduler: SchedulerCallable | None = Cosine,
    ) -> None:
        super().__init__(num_classes, class_names, optimizer, scheduler, label_smoothing)
        if fusion not in FUSIONS or image_size % POOL:
            raise ValueError(
                f"fusion={fusion} must be one of {', '.join(FUSIONS)}, image_size={image_size} a multiple of {POOL}"
            )
        self.seconds = seconds
        self.example_input_array = torch.zeros(1, 3, frames, image_size, image_size)
        networks: dict[str, nn.Module] = {
            "single_frame": EachFrame(width),
            "late_pool": LatePooled(width),
            "early": Early(width, frames),
            "slow": Slow(width),
        }
        network = networks.get(fusion) or LateConnected(width, frames, image_size, hidden)
        self.backbone = standardized(network, mean, std, dimensions=3)
        self.head = nn.Linear(hidden if fusion == "late_fc" else SECOND * width, num_classes)
        if weights is not None:
            load_weights(self, weights, keep_matching_classes)

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips (N, 3, T, H, W) in [0, 1] to logits (N, num_classes), of single frames the mean probability's."""
        logits: Tensor = self.head(self.backbone(clips))
        return logits if logits.ndim == 2 else log_mean_probability(logits.unbind(1))

    def training_loss(self, clips: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a training batch and its logits; single frames learn each by itself."""
        logits = self.head(self.backbone(clips))
        each = labels if logits.ndim == 2 else labels.repeat_interleave(logits.shape[1])
        loss = F.cross_entropy(logits.flatten(0, -2), each, label_smoothing=self.label_smoothing)
        return loss, logits if logits.ndim == 2 else log_mean_probability(logits.unbind(1))
