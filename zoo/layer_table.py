"""The lecture's layer table: what each layer of a network costs.

Conventions of EECS 498-007, lecture 8: a multiply-add is one operation ("flop"), a pool does one for each value in each
window, memory is that of the layer's output in float32 (1 KB = 1,024 bytes). Rectifiers and dropout are left out, and
so is a layer that only standardises or normalises, or hands its input on as it is.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from zoo.standardization import Standardize
from zoo.tasks.captioning import CaptioningTask
from zoo.tasks.detection import DetectionTask
from zoo.tasks.generation import GenerationTask

RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardswish, nn.Hardsigmoid, nn.Tanh)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, FrozenBatchNorm2d, Standardize)
MAY_KEEP = (nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.Flatten)  # what may hand its input on as it is
LEFT_OUT = (*RECTIFIERS, *NORMS, nn.Dropout, nn.Identity, nn.Unflatten, nn.Sequential)  # a Sequential without children


@dataclass
class Row:
    """One layer: its name, kind, output size without the batch, KB of output, parameters and multiply-adds."""

    name: str
    kind: str
    output: tuple[int, ...]
    memory_kb: float
    parameters: int
    multiply_adds: int


def layer_table(network: nn.Module, images: Tensor) -> list[Row]:
    """Run ``images`` (1, C, H, W), or a clip (1, C, T, H, W), through a network and describe its layers as they ran.

    Works on the meta device: nothing is computed. A layer that runs several times has as many rows, its parameters in
    the first. What a detector's head makes of each region has the number of regions before its size: as many as the
    detector keeps at most, or one where it names no number.
    """
    rows: list[Row] = []
    seen: set[str] = set()

    def record(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            output = output[0] if isinstance(module, nn.RNNBase) else output  # the rest is its last state
            kept = isinstance(module, MAY_KEEP) and output.shape == inputs[0].shape
            if isinstance(output, Tensor) and not isinstance(module, LEFT_OUT) and not kept:
                parameters = 0 if name in seen else sum(p.numel() for p in module.parameters())
                seen.add(name)
                size = tuple(output.shape if len(output) > 1 else output.shape[1:])
                rows.append(
                    Row(name, type(module).__name__, size, output.numel() * 4 / 1024, parameters,
                        _multiply_adds(module, inputs[0], output))
                )  # fmt: skip

        return hook

    leaves = [(name, module) for name, module in network.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(record(name)) for name, module in leaves]
    try:
        with torch.no_grad():
            _run(network, images)
    finally:
        for handle in handles:
            handle.remove()
    return rows


def _run(network: nn.Module, images: Tensor) -> None:
    """Of a detector the layers alone: what it selects between them depends on values. Of a captioner one word."""
    if isinstance(network, CaptioningTask):
        _run_one_word(network, images)
        return
    if isinstance(network, GenerationTask):
        network.run_layers(images)
        return
    if not isinstance(network, DetectionTask):
        network(images)
        return
    features = network.backbone(images)
    rpn: Any = getattr(network, "rpn", None)
    if isinstance(features, dict):  # torchvision's R-CNNs: a map for each level of the pyramid
        rpn.head(list(features.values()))
        _run_on_regions(network, next(iter(features.values())))
    elif rpn is not None:
        rpn(features)
        box = images.new_zeros(1, 4)
        network.head(features, box, box.new_zeros(1))
    else:
        network.head(features)


def _run_one_word(network: CaptioningTask, images: Tensor) -> None:
    """A recurrence comes last where attention takes its place in time, which multiplies by its weights itself."""
    network.scores(images, torch.ones(len(images), 2, dtype=torch.int64, device=images.device))
    cell: Any = network.head.cell
    if hasattr(cell, "lstm"):
        recurrence = cell.lstm.recurrence
        recurrence(images.new_zeros(len(images), 1, recurrence.input_size))


def _run_on_regions(network: DetectionTask, features: Tensor) -> None:
    """The layers of torchvision's heads, on as many regions as are kept in evaluation."""
    head: Any = network.head

    def regions(count: int, pool: Any) -> Tensor:
        return features.new_zeros(count, features.shape[1], *pool.output_size)

    head.box_predictor(head.box_head(regions(network.hparams["test_proposals"], head.box_roi_pool)))
    if head.has_mask():
        head.mask_predictor(head.mask_head(regions(head.detections_per_img, head.mask_roi_pool)))
    if head.has_keypoint():
        head.keypoint_predictor(head.keypoint_head(regions(head.detections_per_img, head.keypoint_roi_pool)))


def _multiply_adds(module: nn.Module, given: Any, output: Tensor) -> int:
    if isinstance(module, nn.ConvTranspose2d):
        kernel_height, kernel_width = module.kernel_size
        return given.numel() * module.out_channels // module.groups * kernel_height * kernel_width
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        return output.numel() * module.in_channels // module.groups * math.prod(module.kernel_size)
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    if isinstance(module, nn.RNNBase):
        steps = output.numel() // module.hidden_size
        return steps * sum(p.numel() for p in module.parameters() if p.ndim == 2)
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
        side = module.kernel_size
        return output.numel() * (side * side if isinstance(side, int) else math.prod(side))
    if isinstance(module, nn.MaxPool3d | nn.AvgPool3d):
        extent = module.kernel_size
        return output.numel() * (extent**3 if isinstance(extent, int) else math.prod(extent))
    return 0
