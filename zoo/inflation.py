"""Inflation: a network for pictures becomes one for clips, with its weights.

Paper: Carreira and Zisserman, 2017, Quo vadis, action recognition? A new model and the Kinetics dataset,
https://arxiv.org/abs/1705.07750 (section 2.4).
Lecture: EECS 498-007, lecture 18, "Videos" (inflating 2D networks to 3D).

A kernel K x K becomes K x K x K, its weights repeated in time and divided by K, so that a clip whose frames are all
alike gives what its frame gave. The paper keeps this where a kernel lies within the clip; at the first and last frame
its zeros beyond the ends would break it, and so the end frames are repeated there instead. With that it holds for every
clip, to rounding.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F


class InflatedConv(nn.Conv3d):
    """A convolution over time and space that repeats the first and last frame in time, and pads with zeros in space.

    Args:
        flat: The convolution over space that it is made of; its weights are taken.
        frames: Extent in time, odd.
    """

    def __init__(self, flat: nn.Conv2d, frames: int) -> None:
        padding: Any = flat.padding if isinstance(flat.padding, str) else (0, *flat.padding)
        super().__init__(
            flat.in_channels,
            flat.out_channels,
            (frames, *_pair(flat.kernel_size)),
            (1, *_pair(flat.stride)),
            padding,
            (1, *_pair(flat.dilation)),
            flat.groups,
            flat.bias is not None,
            device=flat.weight.device,
            dtype=flat.weight.dtype,
        )
        self.ends = frames // 2
        with torch.no_grad():
            self.weight.copy_(flat.weight[:, :, None].expand_as(self.weight) / frames)
            if self.bias is not None and flat.bias is not None:
                self.bias.copy_(flat.bias)
        self.weight.requires_grad_(flat.weight.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, T, H, W) to (N, out_channels, T, H / stride, W / stride)."""
        if self.ends:
            x = F.pad(x, (0, 0, 0, 0, self.ends, self.ends), mode="replicate")
        return super().forward(x)


def inflate(network: nn.Module, frames: int | None = None) -> nn.Module:
    """A network for clips (N, C, T, H, W) with the weights of one for pictures (N, C, H, W), and the same keys.

    Time is kept until the network's own global pooling, which then takes the mean over it too; where there is none the
    output has it as its third dimension.

    Args:
        network: Of convolutions, pools, batch norms and what works on any shape. Functions that it calls itself, as
            ``adaptive_avg_pool2d``, are replaced in a trace of its ``forward``, which then follows the mode, training
            or evaluation, that it is in now. It is not changed. Networks that reshape their pictures by themselves, as
            ShuffleNet and vision transformers do, cannot be inflated, which may show only when they are called.
        frames: Extent in time of what is wider than a pixel, odd; None takes that in space.

    Returns:
        The new network, in the mode of the given one. What only a training runs, as the auxiliary classifier of
        Inception v3, is no part of it.

    Raises:
        ValueError: It has a layer that cannot be inflated, or ``frames`` is even.
    """
    if frames is not None and not frames % 2:
        raise ValueError(f"frames={frames} must be an odd number, so that a kernel has a middle")
    inflated = _inflated(copy.deepcopy(network), frames)
    if _calls_functions_of_pictures(network):
        inflated = _retraced(inflated)
    return inflated.train(network.training)


def _inflated(module: nn.Module, frames: int | None) -> nn.Module:
    """The module itself with what is below it replaced, or what takes its place."""
    for kind, replace in REPLACED.items():
        if type(module) is kind:
            return replace(module, frames)
    if "2d" in type(module).__name__ and not list(module.children()):
        raise ValueError(f"a {type(module).__name__} cannot be inflated")
    for name, child in module.named_children():
        setattr(module, name, _inflated(child, frames))
    return module


def _convolution(flat: Any, frames: int | None) -> nn.Module:
    height, width = flat.kernel_size
    if flat.padding_mode != "zeros":
        raise ValueError(f"a convolution that pads with {flat.padding_mode} cannot be inflated")
    own = frames if frames is not None and max(height, width) > 1 else height
    return InflatedConv(flat, own)


def _batch_norm(flat: Any, frames: int | None) -> nn.Module:
    norm = nn.BatchNorm3d(flat.num_features, flat.eps, flat.momentum, flat.affine, flat.track_running_stats)
    # The very tensors, so that device, type and what is trained are those of the given one.
    norm._parameters, norm._buffers = flat._parameters, flat._buffers
    return norm


def _max_pool(flat: Any, frames: int | None) -> nn.Module:
    kernel, stride, padding = _pair(flat.kernel_size), _pair(flat.stride), _pair(flat.padding)
    return nn.MaxPool3d((1, *kernel), (1, *stride), (0, *padding), ceil_mode=flat.ceil_mode)


def _average_pool(flat: Any, frames: int | None) -> nn.Module:
    kernel, stride, padding = _pair(flat.kernel_size), _pair(flat.stride), _pair(flat.padding)
    return nn.AvgPool3d((1, *kernel), (1, *stride), (0, *padding), flat.ceil_mode, flat.count_include_pad)


def _adaptive(flat: Any, frames: int | None) -> nn.Module:
    return nn.AdaptiveAvgPool3d((1, *_pair(flat.output_size)))


REPLACED: dict[type[nn.Module], Callable[[Any, int | None], nn.Module]] = {
    nn.Conv2d: _convolution,
    nn.BatchNorm2d: _batch_norm,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _average_pool,
    nn.AdaptiveAvgPool2d: _adaptive,
    nn.Dropout2d: lambda flat, frames: nn.Dropout3d(flat.p, flat.inplace),
}


def _pair(value: Any) -> tuple[Any, Any]:
    return (value, value) if not isinstance(value, tuple | list) else (value[0], value[1])


# Functions that a network calls itself


def _adaptive_function(clips: Tensor, size: Any) -> Tensor:
    return F.adaptive_avg_pool3d(clips, (1, *_pair(size)))


def _max_function(clips: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, **rest: Any) -> Tensor:
    stride = kernel_size if stride is None else stride
    return F.max_pool3d(clips, (1, *_pair(kernel_size)), (1, *_pair(stride)), (0, *_pair(padding)), **rest)


def _average_function(clips: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, **rest: Any) -> Tensor:
    stride = kernel_size if stride is None else stride
    return F.avg_pool3d(clips, (1, *_pair(kernel_size)), (1, *_pair(stride)), (0, *_pair(padding)), **rest)


FUNCTIONS: dict[Any, Callable] = {
    F.adaptive_avg_pool2d: _adaptive_function,
    F.max_pool2d: _max_function,
    F.avg_pool2d: _average_function,
}


def _calls_functions_of_pictures(network: nn.Module) -> bool:
    """Whether a trace has one of them; what cannot be traced is taken as it is."""
    try:
        nodes = fx.symbolic_trace(network).graph.nodes
    except Exception:  # fx raises what it likes
        return False
    return any(node.target in FUNCTIONS or _is_mean_over_space(node) for node in nodes)


class _Tracer(fx.Tracer):
    """Takes inflated convolutions for layers, not for what they call."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, InflatedConv) or super().is_leaf_module(m, module_qualified_name)


def _retraced(network: nn.Module) -> nn.Module:
    traced = fx.GraphModule(network, _Tracer().trace(network))
    for node in traced.graph.nodes:
        if node.op == "call_function" and node.target in FUNCTIONS:
            node.target = FUNCTIONS[node.target]
        elif _is_mean_over_space(node):
            node.args = (node.args[0], [2, 3, 4], *node.args[2:])
    traced.recompile()
    return traced


def _is_mean_over_space(node: fx.Node) -> bool:
    """``x.mean([2, 3])``, as some networks have it for a global pool."""
    return node.op == "call_method" and node.target == "mean" and node.args[1:2] in (([2, 3],), ((2, 3),))
