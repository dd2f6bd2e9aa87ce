"""I3D: a network for pictures, inflated to clips, with what it has learnt of pictures.

Paper: Carreira and Zisserman, 2017, Quo vadis, action recognition? A new model and the Kinetics dataset,
https://arxiv.org/abs/1705.07750 (section 2.4); Wang, Girshick, Gupta and He, 2017, Non-local neural networks,
https://arxiv.org/abs/1711.07971 (section 4), for the blocks that can be put into it.
Lecture: EECS 498-007, lecture 18, "Videos".
Differs from the first paper in that nothing halves the number of frames, in the networks that are inflated, and in the
ends of a clip, for which see ``zoo/inflation.py``.
"""

from collections import OrderedDict
from typing import cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn, optim

from zoo.arguments import plain_arguments
from zoo.captioning_lstm import ENCODERS, HALF, SMALL_LAYERS, Network, small_network
from zoo.inflation import inflate
from zoo.non_local import Affinity, insert_non_local
from zoo.running.optimizing import SchedulerCallable
from zoo.running.schedules import Step
from zoo.standardization import standardized
from zoo.tasks.video import VideoTask
from zoo.weights import load_trunk, load_weights


class I3D(VideoTask):
    """An inflated network for the classification of clips.

    Args:
        network: What is inflated: a network of torchvision's without its classifier, or ``small``, four convolutions
            for clips of 64 pixels or so.
        num_classes: Number of classes.
        class_names: Their names, in the order of the labels; None calls them "0", "1", ….
        frames: Frames T of a clip that it is made for; any number will run.
        image_size: Height and width of the clips that it is made for, in pixels.
        kernel_frames: Extent in time of the kernels that are wider than a pixel, odd; None takes that in space.
        non_local: Layers behind which a non-local block is put, named as in torchvision: ``["layer2.1", "layer3.1"]``.
        affinity: What those blocks compare places by.
        seconds: Length of the clips that it is made for, for ``zoo predict`` with files; None takes whole files. The
            paper's are 64 frames, of 25 a second.
        backbone_weights: Weights of the network for pictures, before it is inflated: torchvision's name for its
            classifier's (``IMAGENET1K_V1``, …) or a file; None starts it fresh.
        dropout: Share of the features that are set to 0 before the classifier, in [0, 1).
        label_smoothing: Share of the target mass that is spread over all classes, in [0, 1].
        weights: A file of the zoo (``.safetensors``, ``.ckpt``) or ``hf://owner/name``. The head is fresh where the
            number of classes differs.
        keep_matching_classes: Keep the rows of the head whose class names match.
        optimizer: Makes the optimizer from the parameters.
        scheduler: Makes the schedule from the optimizer and the run's number of steps.

    Raises:
        ValueError: A layer of ``non_local`` is not there, or ``kernel_frames`` is even.
    """

    @plain_arguments
    def __init__(
        self,
        network: Network = "resnet18",
        num_classes: int = 400,
        class_names: list[str] | None = None,
        frames: int = 64,
        image_size: int = 224,
        kernel_frames: int | None = None,
        non_local: list[str] | None = None,
        affinity: Affinity = "softmax",
        seconds: float | None = 64 / 25,
        backbone_weights: str | None = None,
        dropout: float = 0.5,
        label_smoothing: float = 0.0,
        weights: str | None = None,
        keep_matching_classes: bool = False,
        optimizer: OptimizerCallable = lambda params: optim.SGD(params, lr=0.1, momentum=0.9),
        scheduler: SchedulerCallable | None = Step,
    ) -> None:
        super().__init__(num_classes, class_names, optimizer, scheduler, label_smoothing)
        self.seconds = seconds
        self.example_input_array = torch.zeros(1, 3, frames, image_size, image_size)
        encoder = ENCODERS.get(network)
        trunk = small_network() if encoder is None else encoder.build()
        if backbone_weights is not None:
            load_trunk(trunk, backbone_weights, encoder.builder if encoder else None)
        inflated = inflate(trunk, kernel_frames)
        if non_local:
            insert_non_local(inflated, non_local, torch.zeros(1, 3, 2, 64, 64), affinity)
        inflated.to(memory_format=torch.channels_last_3d)
        pooled = nn.Sequential(OrderedDict(trunk=inflated, pool=nn.AdaptiveAvgPool3d(1), flat=nn.Flatten()))
        mean, std = (HALF, HALF) if encoder is None else (encoder.mean, encoder.std)
        self.backbone = standardized(pooled, mean, std, dimensions=3)
        self.dropout = nn.Dropout(dropout)
        features = SMALL_LAYERS[-1][0] if encoder is None else encoder.channels
        self.head = nn.Linear(features, num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        if weights is not None:
            load_weights(self, weights, keep_matching_classes)

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips (N, 3, T, H, W) in [0, 1] to logits (N, num_classes)."""
        return cast(Tensor, self.head(self.dropout(self.backbone(clips))))
