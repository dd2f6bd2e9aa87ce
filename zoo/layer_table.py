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

from zoo.standardization import Standardize

LEFT_OUT = (nn.ReLU, nn.Dropout, nn.Identity, nn.BatchNorm2d, Standardize)


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
    """Run ``images`` (1, C, H, W) through a network and describe its layers in the order in which they ran.

    Works on the meta device: nothing is computed.
    """
    rows: list[Row] = []

    def record(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            kept = isinstance(module, nn.AdaptiveAvgPool2d | nn.Flatten) and output.shape == inputs[0].shape
            if isinstance(output, Tensor) and not isinstance(module, LEFT_OUT) and not kept:
                parameters = sum(p.numel() for p in module.parameters())
                rows.append(
                    Row(name, type(module).__name__, tuple(output.shape[1:]), output.numel() * 4 / 1024, parameters,
                        _multiply_adds(module, output))
                )  # fmt: skip

        return hook

    leaves = [(name, module) for name, module in network.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(record(name)) for name, module in leaves]
    try:
        with torch.no_grad():
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return rows


def _multiply_adds(module: nn.Module, output: Tensor) -> int:
    if isinstance(module, nn.Conv2d):
        kernel_height, kernel_width = module.kernel_size
        return output.numel() * module.in_channels // module.groups * kernel_height * kernel_width
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
        side = module.kernel_size
        return output.numel() * (side * side if isinstance(side, int) else math.prod(side))
    return 0
