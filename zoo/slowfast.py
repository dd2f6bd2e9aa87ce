"""SlowFast: a wide network that looks at few frames beside a narrow one that looks at many.

Paper: Feichtenhofer, Fan, Malik and He, 2018, SlowFast networks for video recognition,
https://arxiv.org/abs/1812.03982 (section 3; table 1; section 4 for training and testing).
Lecture: EECS 498-007, lecture 18, "Videos".
As in the authors' published code (PySlowFast), and where it differs from the paper's text: 8 x 8 with depth 50 has
lateral convolutions over 7 frames in place of 5 (``lateral_kernel``), and the slow frames are spread evenly from the
first to the last. Weight decay acts on batch norms as well, which the authors leave out, and batch norms keep running
statistics in place of "precise" ones.

T is the number of the clip's frames, S = T / alpha that of the slow ones; shapes in comments are those of the paper's
networks.
"""

import re
from dataclasses import dataclass
from typing import Any, cast

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

BLOCKS = {14: (1, 1, 1, 1), 26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
MEAN, STD = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)
SLOW_KERNELS = (1, 1, 3, 3)  # frames that a block's first convolution sees, of each stage
FAST_KERNELS = (3, 3, 3, 3)
EXPANSION = 4  # channels of a block's output for one of its inner ones
STRIDE = 32  # pixels of a clip for one of the last map


class ConvNorm(nn.Module):
    """A convolution over time and space without a bias, and batch norm.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        kernel: Its extent in time, height and width, all odd.
        stride: Likewise its steps.
    """

    def __init__(
        self, in_channels: int, channels: int, kernel: tuple[int, int, int], stride: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        super().__init__()
        time, height, width = kernel
        padding = (time // 2, height // 2, width // 2)
        self.conv = nn.Conv3d(in_channels, channels, kernel, stride, padding, bias=False)
        self.norm = nn.BatchNorm3d(channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, T, H, W) to (N, channels, T / stride, …)."""
        return cast(Tensor, self.norm(self.conv(x)))


class Bottleneck(nn.Module):
    """The paper's residual block: over time, over space, and back to many channels.

    Args:
        in_channels: Channels of the input.
        inner: Channels between; four times as many come out.
        time_kernel: Frames that the first convolution sees.
        stride: Of the second convolution, in space.
        zero_init: Start the last scale at 0, so that the block passes its input on.
    """

    def __init__(self, in_channels: int, inner: int, time_kernel: int, stride: int, zero_init: bool) -> None:
        super().__init__()
        channels = EXPANSION * inner
        self.a = ConvNorm(in_channels, inner, (time_kernel, 1, 1))
        self.b = ConvNorm(inner, inner, (1, 3, 3), (1, stride, stride))
        self.c = ConvNorm(inner, channels, (1, 1, 1))
        if zero_init:
            nn.init.zeros_(self.c.norm.weight)
        same = in_channels == channels and stride == 1
        self.shortcut = None if same else ConvNorm(in_channels, channels, (1, 1, 1), (1, stride, stride))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, T, H, W) to (N, 4 inner, T, H / stride, W / stride)."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        x = F.relu(self.b(F.relu(self.a(x), inplace=True)), inplace=True)
        return F.relu(self.c(x) + shortcut, inplace=True)


class Pathway(nn.Module):
    """A stem and four stages, which :class:`SlowFastNetwork` runs through.

    Args:
        blocks: Number of blocks of each stage.
        width: Channels W after the stem; the stages have 4 W, 8 W, 16 W and 32 W.
        joined: Channels that another pathway adds before a stage, for each W of its own.
        stem_kernel: Frames that the stem sees.
        time_kernels: Frames that the blocks of each stage see.
        zero_init: As :class:`Bottleneck` takes it.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        width: int,
        joined: int,
        stem_kernel: int,
        time_kernels: tuple[int, ...],
        zero_init: bool,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            ConvNorm(3, width, (stem_kernel, 7, 7), (1, 2, 2)),  # (N, W, T, 112, 112)
            nn.ReLU(inplace=True),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),  # (N, W, T, 56, 56)
        )
        self.stages = nn.ModuleList()
        channels, inner = width, width
        for k, (count, kernel) in enumerate(zip(blocks, time_kernels, strict=True)):
            before = channels + joined * channels // width
            first = Bottleneck(before, inner, kernel, 1 if k == 0 else 2, zero_init)
            channels = EXPANSION * inner
            rest = (Bottleneck(channels, inner, kernel, 1, zero_init) for _ in range(count - 1))
            self.stages.append(nn.Sequential(first, *rest))
            inner *= 2


class SlowFastNetwork(nn.Module):
    """The two pathways and the connections between them: clips (N, 3, T, H, W) to a map of features of each.

    Args:
        blocks: Number of blocks of each of the four stages.
        width: Channels of the slow pathway's stem, 64 in the paper.
        alpha: Frames of the fast pathway for one of the slow.
        beta_inv: Channels of the slow pathway for one of the fast.
        lateral_kernel: Frames that a lateral convolution sees.
        zero_init: As :class:`Bottleneck` takes it.
    """

    def __init__(
        self, blocks: tuple[int, ...], width: int, alpha: int, beta_inv: int, lateral_kernel: int, zero_init: bool
    ) -> None:
        super().__init__()
        narrow = width // beta_inv
        self.alpha = alpha
        self.slow = Pathway(blocks, width, 2 * narrow, 1, SLOW_KERNELS, zero_init)
        self.fast = Pathway(blocks, narrow, 0, 5, FAST_KERNELS, zero_init)
        channels = [narrow, *(EXPANSION * narrow * 2**k for k in range(3))]
        self.laterals = nn.ModuleList(
            ConvNorm(count, 2 * count, (lateral_kernel, 1, 1), (alpha, 1, 1)) for count in channels
        )
        self.features = 8 * EXPANSION * (width + narrow)  # of both pathways together

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Map clips (N, 3, T, H, W) to slow (N, 32 W, S, H / 32, W / 32) and fast (N, 32 W / beta_inv, T, …) features.

        Raises:
            ValueError: T is no multiple of alpha.
        """
        clips = clips.contiguous()  # channels last takes a tenth more on a CPU, in benchmarks/video_step.py
        slow = self.slow.stem(clips[:, :, slow_frames(clips.shape[2], self.alpha)])  # (N, 64, S, 56, 56)
        fast = self.fast.stem(clips)  # (N, 8, T, 56, 56)
        for lateral, slow_stage, fast_stage in zip(self.laterals, self.slow.stages, self.fast.stages, strict=True):
            joined = torch.cat([slow, F.relu(lateral(fast), inplace=True)], dim=1)  # (N, 80, S, 56, 56), …
            slow, fast = slow_stage(joined), fast_stage(fast)
        return slow, fast  # (N, 2048, S, 7, 7), (N, 256, T, 7, 7)


def slow_frames(frames: int, alpha: int) -> list[int]:
    """Which of a clip's frames the slow pathway sees: evenly from the first to the last, rounded down.

    Raises:
        ValueError: ``frames`` is no multiple of ``alpha``.
    """
    _check_frames(frames, alpha)
    count = frames // alpha
    return [k * (frames - 1) // max(1, count - 1) for k in range(count)]


def _check_frames(frames: int, alpha: int) -> None:
    if frames < alpha or frames % alpha:
        raise ValueError(f"a clip of {frames} frames does not go with alpha={alpha}: their number must be a multiple")


@dataclass(frozen=True)
class PublishedSlowFast:
    """How the files of pytorchvideo and of PySlowFast differ from ours: in the names of their tensors."""

    builder: None = None

    def recognises(self, state: dict[str, Tensor]) -> bool:
        """Whether a file has the keys of one of them."""
        return any(key.startswith(("blocks.0.", "s1.")) for key in state)

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Published tensors under our keys, and the mean and deviation that they want of clips."""
        renamed = {_our_key(key): value for key, value in state.items()}
        renamed["backbone.standardize.mean"] = torch.tensor(MEAN).view(3, 1, 1, 1)
        renamed["backbone.standardize.std"] = torch.tensor(STD).view(3, 1, 1, 1)
        return renamed

    def class_names(self, state: dict[str, Tensor]) -> list[str]:
        """None: the files do not say them."""
        return []


NETWORK = "backbone.network."
# Patterns of both kinds of file, of which only one fits a key; the groups are pathway, stage and block.
KEYS: list[tuple[str, Any]] = [
    (r"blocks\.0\.multipathway_blocks\.([01])\.(conv|norm)\.", lambda m: f"{_pathway(m[1])}.stem.0.{m[2]}."),
    (
        r"blocks\.(\d)\.multipathway_fusion\.(conv|norm)(?:_fast_to_slow)?\.",
        lambda m: f"{NETWORK}laterals.{m[1]}.{m[2]}.",
    ),
    (
        r"blocks\.(\d)\.multipathway_blocks\.([01])\.res_blocks\.(\d+)\.",
        lambda m: f"{_pathway(m[2])}.stages.{int(m[1]) - 1}.{m[3]}.",
    ),
    (r"^blocks\.6\.proj\.", "head."),
    (r"^s1\.pathway([01])_stem\.", lambda m: f"{_pathway(m[1])}.stem.0."),
    (r"^s(\d)_fuse\.(conv_f2s\.)?", lambda m: f"{NETWORK}laterals.{int(m[1]) - 1}.{'conv.' if m[2] else ''}"),
    (r"^s(\d)\.pathway([01])_res(\d+)\.", lambda m: f"{_pathway(m[2])}.stages.{int(m[1]) - 2}.{m[3]}."),
    (r"^head\.projection\.", "head."),
    (r"\.branch1_(conv|norm)\.", r".shortcut.\1."),
    (r"\.branch1_bn\.", ".shortcut.norm."),
    (r"\.branch1\.", ".shortcut.conv."),
    (r"\.branch2\.(conv|norm)_([abc])\.", r".\2.\1."),
    (r"\.branch2\.([abc])_bn\.", r".\1.norm."),
    (r"\.branch2\.([abc])\.", r".\1.conv."),
    (r"\.bn\.", ".norm."),
]


def _pathway(number: str) -> str:
    return NETWORK + ("slow", "fast")[int(number)]


def _our_key(key: str) -> str:
    for pattern, ours in KEYS:
        key = re.sub(pattern, ours, key)
    return key


class SlowFast(VideoTask):
    """SlowFast network for the classification of clips.

    The published networks: 4 x 16 are the defaults; 8 x 8 of depth 50 has ``alpha=4`` and ``lateral_kernel=7``, of
    depth 101 ``alpha=4``.

    Of clips larger than ``image_size`` every window of that size is looked at, in steps of 32 pixels, and the
    probabilities are averaged: the published testing, with crops of 256 pixels for networks of 224.

    Args:
        depth: Number of layers: 50, 101 and 152 as published, 14 and 26 for small clips.
        num_classes: Number of classes.
        class_names: Their names, in the order of the labels; None calls them "0", "1", ….
        frames: Frames T of a clip.
        alpha: Frames of the fast pathway for one of the slow: with 32 frames, 8 gives 4 and 4 gives 8.
        beta_inv: Channels of the slow pathway for one of the fast.
        width: Channels of the slow pathway's first layer, a multiple of ``beta_inv``.
        lateral_kernel: Frames that a convolution from the fast to the slow pathway sees, an odd number.
        image_size: Height and width of the clips that it is made for, a multiple of 32 pixels.
        seconds: Length of the clips that it is made for, for ``zoo predict`` with files; None takes whole files. The
            published networks see every second of 64 frames, of 30 a second.
        mean: Mean of each colour, which the first layer subtracts; replaced by that of the weights it starts from.
        std: Standard deviation of each colour, which the first layer divides by; replaced likewise.
        zero_init: Start the last batch norm's scale of each block at 0, as published; short runs of a narrow network
            learn several times sooner without.
        dropout: Share of the features that are set to 0 before the classifier, in [0, 1).
        label_smoothing: Share of the target mass that is spread over all classes, in [0, 1].
        weights: A file of pytorchvideo or PySlowFast (``.pyth``), one of the zoo (``.safetensors``, ``.ckpt``), or
            ``hf://owner/name``. The head is fresh where the number of classes differs.
        keep_matching_classes: Keep the rows of the head whose class names match.
        optimizer: Makes the optimizer from the parameters. Default: PySlowFast's, for 64 clips a step.
        scheduler: Makes the schedule from the optimizer and the run's number of steps. Default: PySlowFast's half
            cosine, after a warm-up over 34 of 196 epochs.

    Raises:
        ValueError: There is no network of that depth, or sizes do not go together.
    """

    @plain_arguments
    def __init__(
        self,
        depth: int = 50,
        num_classes: int = 400,
        class_names: list[str] | None = None,
        frames: int = 32,
        alpha: int = 8,
        beta_inv: int = 8,
        width: int = 64,
        lateral_kernel: int = 5,
        image_size: int = 224,
        seconds: float | None = 64 / 30,
        mean: tuple[float, float, float] = MEAN,
        std: tuple[float, float, float] = STD,
        zero_init: bool = True,
        dropout: float = 0.5,
        label_smoothing: float = 0.0,
        weights: str | None = None,
        keep_matching_classes: bool = False,
        optimizer: OptimizerCallable = lambda params: optim.SGD(
            params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
        ),
        scheduler: SchedulerCallable | None = lambda optimizer, steps: Cosine(optimizer, steps, warmup=34 / 196),
    ) -> None:
        super().__init__(num_classes, class_names, optimizer, scheduler, label_smoothing)
        if depth not in BLOCKS:
            raise ValueError(f"there is no SlowFast network of depth {depth}: there are {', '.join(map(str, BLOCKS))}")
        if width % beta_inv or image_size % STRIDE or not lateral_kernel % 2:
            raise ValueError(
                f"width={width} must be a multiple of beta_inv={beta_inv}, image_size={image_size} one of {STRIDE}, "
                f"and lateral_kernel={lateral_kernel} odd"
            )
        _check_frames(frames, alpha)
        self.seconds = seconds
        self.example_input_array = torch.zeros(1, 3, frames, image_size, image_size)
        self.published = PublishedSlowFast()
        network = SlowFastNetwork(BLOCKS[depth], width, alpha, beta_inv, lateral_kernel, zero_init)
        self.backbone = standardized(network, mean, std, dimensions=3)
        self.window = image_size // STRIDE
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(network.features, num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        if weights is not None:
            load_weights(self, weights, keep_matching_classes)

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips (N, 3, T, H, W) in [0, 1] to logits (N, num_classes)."""
        pooled = [self._pooled(features) for features in self.backbone(clips)]
        logits = self.head(self.dropout(torch.cat(pooled, dim=2)))  # (N, windows, num_classes)
        return logits[:, 0] if logits.shape[1] == 1 else log_mean_probability(logits.unbind(1))

    def _pooled(self, features: Tensor) -> Tensor:
        """The mean of a map (N, C, T, H, W) over time and over each window: (N, windows, C)."""
        frames, height, width = features.shape[2:]
        kernel = (frames, min(self.window, height), min(self.window, width))
        return F.avg_pool3d(features, kernel, stride=1).flatten(2).transpose(1, 2)
