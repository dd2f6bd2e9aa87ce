"""CNN + LSTM: features of each frame by a network for pictures, read one after the other by a recurrent network.

Lecture: EECS 498-007, lecture 18, "Videos" (modelling long-term temporal structure).
Paper: Donahue, Hendricks, Rohrbach, Venugopalan, Guadarrama, Saenko and Darrell, 2014, Long-term recurrent
convolutional networks for visual recognition and description, https://arxiv.org/abs/1411.4389 (section 4).
Differs from the paper in what is said of a clip: from the state after its last frame, as the lecture's "many to one",
in place of the mean of what is said after each frame. With a pretrained network that is left as it is (the callback
``FreezeBackbone``), only the recurrent part is trained, as the lecture says.
"""

from collections import OrderedDict
from typing import cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn, optim

from zoo.arguments import plain_arguments
from zoo.captioning_lstm import ENCODERS, HALF, LSTM, SMALL_LAYERS, Network, small_network
from zoo.running.optimizing import SchedulerCallable
from zoo.running.schedules import Cosine
from zoo.standardization import standardized
from zoo.tasks.video import VideoTask
from zoo.weights import load_trunk, load_weights


class LastState(nn.Module):
    """A recurrent network's state after the last frame, and scores from it: features (N, T, F) to logits.

    Args:
        features: F.
        hidden: Length of the state.
        num_classes: Number of classes.
    """

    def __init__(self, features: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.cell = LSTM(features, hidden)
        self.scores = nn.Linear(hidden, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (N, T, F) to logits (N, num_classes)."""
        states = self.cell(features, features.new_zeros(features.shape[0], self.cell.recurrence.hidden_size))
        return cast(Tensor, self.scores(states[:, -1]))


class CNNLSTM(VideoTask):
    """A network for pictures on each frame and an LSTM over them, for the classification of clips.

    Args:
        network: What looks at a frame: a network of torchvision's without its classifier, or ``small``, four
            convolutions for clips of 64 pixels or so.
        num_classes: Number of classes.
        class_names: Their names, in the order of the labels; None calls them "0", "1", ….
        hidden: Length of the LSTM's state.
        places: Places a side at which a frame's features are kept. 1 is their mean over the frame, as networks for
            pictures have it: what moves, but not from where to where. The paper takes AlexNet's fc6, which sees all 6.
        frames: Frames T of a clip that it is made for; any number will run.
        image_size: Height and width of the clips that it is made for, in pixels.
        seconds: Length of such clips, for ``zoo predict`` with files; None takes whole files.
        backbone_weights: Weights of the network for pictures: torchvision's name for its classifier's
            (``IMAGENET1K_V1``, …) or a file; None starts it fresh.
        label_smoothing: Share of the target mass that is spread over all classes, in [0, 1].
        weights: A file of the zoo (``.safetensors``, ``.ckpt``) or ``hf://owner/name``. The layer that gives the
            scores is fresh where the number of classes differs.
        keep_matching_classes: Keep the rows of that layer whose class names match.
        optimizer: Makes the optimizer from the parameters.
        scheduler: Makes the schedule from the optimizer and the run's number of steps.

    Raises:
        ValueError: ``places`` is not at least 1.
    """

    @plain_arguments
    def __init__(
        self,
        network: Network = "resnet18",
        num_classes: int = 400,
        class_names: list[str] | None = None,
        hidden: int = 256,
        places: int = 1,
        frames: int = 16,
        image_size: int = 224,
        seconds: float | None = None,
        backbone_weights: str | None = None,
        label_smoothing: float = 0.0,
        weights: str | None = None,
        keep_matching_classes: bool = False,
        optimizer: OptimizerCallable = lambda params: optim.Adam(params, lr=1e-3),
        scheduler: SchedulerCallable | None = Cosine,
    ) -> None:
        super().__init__(num_classes, class_names, optimizer, scheduler, label_smoothing)
        if places < 1:
            raise ValueError(f"places={places} must be at least 1")
        self.seconds = seconds
        self.example_input_array = torch.zeros(1, 3, frames, image_size, image_size)
        encoder = ENCODERS.get(network)
        trunk = small_network() if encoder is None else encoder.build()
        if backbone_weights is not None:
            load_trunk(trunk, backbone_weights, encoder.builder if encoder else None)
        features = SMALL_LAYERS[-1][0] if encoder is None else encoder.channels
        pooled = nn.Sequential(OrderedDict(trunk=trunk, pool=nn.AdaptiveAvgPool2d(places), flat=nn.Flatten()))
        mean, std = (HALF, HALF) if encoder is None else (encoder.mean, encoder.std)
        self.backbone = standardized(pooled, mean, std).to(memory_format=torch.channels_last)
        self.head = LastState(features * places**2, hidden, num_classes)
        if weights is not None:
            load_weights(self, weights, keep_matching_classes)

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips (N, 3, T, H, W) in [0, 1] to logits (N, num_classes)."""
        frames = clips.transpose(1, 2)  # (N, T, 3, H, W)
        features = self.backbone(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        return cast(Tensor, self.head(features))
