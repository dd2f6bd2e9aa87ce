"""The non-local block: every place of a clip looks at every other, at all times.

Paper: Wang, Girshick, Gupta and He, 2017, Non-local neural networks, https://arxiv.org/abs/1711.07971 (section 3;
figure 2; section 4.1 for where it is put).
Lecture: EECS 498-007, lecture 18, "Videos" (spatio-temporal self-attention).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Affinity = Literal["softmax", "dot_product"]


class NonLocalBlock(nn.Module):
    """``x + W(sum over places j of f(x_i, x_j) g(x_j))``: clips of features (N, C, T, H, W) to as many.

    ``theta``, ``phi`` and ``g`` halve the channels. The affinity f is the softmax over j of ``theta_i . phi_j`` (the
    paper's embedded Gaussian, the lecture's attention), or that product divided by the number of places. A batch norm
    whose scale starts at 0 comes last, so that a fresh block gives what it gets and can be put into a trained network.

    Args:
        channels: C, an even number.
        affinity: Which of the two.
        pool: Look at the maximum of each 2 x 2 pixels, which takes a quarter of the products (section 3.3).
    """

    def __init__(self, channels: int, affinity: Affinity = "softmax", pool: bool = True) -> None:
        super().__init__()
        self.affinity = affinity
        self.theta = nn.Conv3d(channels, channels // 2, 1)
        self.phi = nn.Conv3d(channels, channels // 2, 1)
        self.g = nn.Conv3d(channels, channels // 2, 1)
        self.pool = nn.MaxPool3d((1, 2, 2)) if pool else nn.Identity()
        self.out = nn.Conv3d(channels // 2, channels, 1)
        self.norm = nn.BatchNorm3d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (N, C, T, H, W) to as many."""
        queries = self.theta(x).flatten(2).transpose(1, 2)  # (N, THW, C / 2)
        keys, values = (self.pool(layer(x)).flatten(2).transpose(1, 2) for layer in (self.phi, self.g))
        if self.affinity == "softmax":
            seen = F.scaled_dot_product_attention(queries, keys, values, scale=1.0)
        else:
            seen = queries @ (keys.transpose(1, 2) @ values) / keys.shape[1]
        return x + self.norm(self.out(seen.transpose(1, 2).unflatten(2, x.shape[2:])))


def insert_non_local(
    network: nn.Module, after: list[str], clip: Tensor, affinity: Affinity = "softmax", pool: bool = True
) -> None:
    """Put a fresh block after some of a network's layers, which become pairs of the layer and the block.

    Args:
        network: Takes clips; it is changed.
        after: Names of its layers, as ``named_modules`` has them, whose output is (N, C, T, H, W).
        clip: What the network takes, to see how many channels these outputs have; (1, 3, T, H, W).
        affinity: See :class:`NonLocalBlock`.
        pool: Likewise.

    Raises:
        ValueError: There is no layer of such a name, or its output is no map over time and space.
    """
    layers = dict(network.named_modules())
    if missing := [name for name in after if name not in layers or not name]:
        raise ValueError(
            f"there is no layer {', '.join(missing)}: there are {', '.join(name for name in layers if name)}"
        )
    channels: dict[str, int] = {}
    handles = [layers[name].register_forward_hook(_noting(channels, name)) for name in after]
    training = network.training
    with torch.no_grad():
        network.eval()(clip)
    network.train(training)
    for handle in handles:
        handle.remove()
    for name in after:
        parent, _, own = name.rpartition(".")
        pair = nn.Sequential(layers[name], NonLocalBlock(channels[name], affinity, pool))
        setattr(network.get_submodule(parent), own, pair)


def _noting(channels: dict[str, int], name: str) -> Callable[[nn.Module, object, Tensor], None]:
    def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
        if output.ndim != 5:
            raise ValueError(f"the output of {name} is {tuple(output.shape)}, no map (N, C, T, H, W)")
        channels[name] = output.shape[1]

    return hook
