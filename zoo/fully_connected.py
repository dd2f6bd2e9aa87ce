"""Fully connected network: the lecture's two-layer net, and deeper ones with dropout.

Lecture: EECS 498-007, lecture 5, "Neural networks", and lecture 10 (dropout); assignments 2 (``TwoLayerNet``) and 3
(``FullyConnectedNet``): {linear - rectifier - [dropout]} x (L - 1) - linear - softmax, on pixels minus the mean of each
colour. Dropout is inverted: in training each hidden value is dropped with probability p and the others are divided by
1 - p; in evaluation nothing happens (Srivastava et al., 2014, section 10). The assignments' ``reg * sum(W^2)`` is the
optimizer's ``weight_decay`` of 2 * reg, here on the biases as well.
"""

import math
from typing import cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn, optim

from zoo.arguments import plain_arguments
from zoo.running.optimizing import SchedulerCallable
from zoo.running.pictures import filters_figure, log_picture
from zoo.standardization import CIFAR10_MEAN, standardized
from zoo.tasks.classification import ClassificationTask
from zoo.weights import load_weights


def hidden_layers(in_features: int, widths: tuple[int, ...], dropout: float) -> nn.Sequential:
    """Pictures (N, C, H, W), flattened, to features (N, widths[-1]): linear, rectifier, dropout for each width."""
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, width in zip([in_features, *widths], widths, strict=False):
        layers += [nn.Linear(fan_in, width), nn.ReLU(inplace=True), nn.Dropout(dropout)]
    return nn.Sequential(*layers)


class FullyConnectedNet(ClassificationTask):
    """Multilayer perceptron for image classification.

    Args:
        hidden: Widths of the hidden layers; a single one makes the two-layer net.
        dropout: Probability of dropping a hidden value in training.
        weight_scale: Standard deviation of all initial weights, as the assignments have it (1e-4 for two layers, 1e-2
            for more); None takes He et al.'s, ``sqrt(2 / fan_in)``, and ``sqrt(1 / fan_in)`` for the last layer.
            Biases start at 0.
        num_classes: Number of classes.
        class_names: Their names, in the order of the labels; None calls them "0", "1", ….
        image_size: Side of the square images in pixels.
        mean: Mean of each channel, which the first layer subtracts. A grey image is repeated for three means.
        std: What the first layer divides each channel by; the assignments leave that out.
        label_smoothing: Share of the target mass that is spread over all classes, in [0, 1].
        weights: File to start from (``.safetensors``, ``.ckpt``, ``.pth``) or ``hf://owner/name``. The head is fresh
            where the number of classes differs.
        keep_matching_classes: Keep the rows of such a head whose class names match.
        optimizer: Makes the optimizer from the parameters. Default: Adam at 1e-3, as in assignment 3.
        scheduler: Makes the schedule from the optimizer and the run's number of steps.

    Raises:
        ValueError: There is no hidden layer, or one without width.
    """

    @plain_arguments
    def __init__(
        self,
        hidden: tuple[int, ...] = (100,),
        dropout: float = 0.0,
        weight_scale: float | None = None,
        num_classes: int = 10,
        class_names: list[str] | None = None,
        image_size: int = 32,
        mean: tuple[float, ...] = CIFAR10_MEAN,
        std: tuple[float, ...] = (1.0, 1.0, 1.0),
        label_smoothing: float = 0.0,
        weights: str | None = None,
        keep_matching_classes: bool = False,
        optimizer: OptimizerCallable = lambda params: optim.Adam(params, lr=1e-3, fused=True),
        scheduler: SchedulerCallable | None = None,
    ) -> None:
        super().__init__(num_classes, class_names, optimizer, scheduler, label_smoothing)
        if not hidden or min(hidden) < 1:
            raise ValueError(f"hidden={list(hidden)} must be the hidden layers' widths, such as [100] or [512, 512]")
        self.example_input_array = torch.zeros(1, len(mean), image_size, image_size)
        self.backbone = standardized(hidden_layers(len(mean) * image_size**2, hidden, dropout), mean, std)
        self.head = nn.Linear(hidden[-1], num_classes)
        self._initialize(weight_scale)
        if weights is not None:
            load_weights(self, weights, keep_matching_classes)

    def _initialize(self, weight_scale: float | None) -> None:
        for layer in (module for module in self.modules() if isinstance(module, nn.Linear)):
            gain = 1 if layer is self.head else 2  # a rectifier halves the mean square
            nn.init.normal_(
                layer.weight, std=weight_scale if weight_scale is not None else math.sqrt(gain / layer.in_features)
            )
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, S, S) in [0, 1] to logits (N, num_classes)."""
        return cast(Tensor, self.head(self.backbone(images)))

    def on_test_epoch_end(self) -> None:
        """Also show the weights of the first hidden units."""
        super().on_test_epoch_end()
        first = next(module for module in self.backbone.modules() if isinstance(module, nn.Linear))
        pictures = first.weight.unflatten(1, self.example_input_array.shape[1:])
        log_picture(self, "test/first_layer", filters_figure(pictures, "weights of the first layer"))
