"""Darknet's ``.weights`` files: read into a network, written from one.

Source: the framework of the YOLO papers, https://github.com/pjreddie/darknet (``src/parser.c``). A file is
little-endian: three int32 (major, minor, revision), the number of pictures ``seen`` in training, as int64 from version
0.2 on and as int32 before, then the float32 values of all layers in the order of the cfg file, nothing between them.
A convolution has its biases, if batch norm follows scales, running means and running variances, then its weights
(out, in, height, width); the biases of a normalised one are those of the batch norm. Other layers here have nothing.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from zoo.running.checkpoint import replacing
from zoo.weights import Transfer

LEAK = 0.1  # slope of the rectifier below 0
# Of the kernels that the published weights were trained with: sqrt(variance + 1e-5). Darknet's code for CPUs has
# sqrt(variance) + 1e-6 and OpenCV's importer sqrt(variance + 1e-6); the three differ where a variance is small.
EPS = 1e-5


def convolution(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, leaky rectifier: (N, C, H, W) to (N, K, H / stride, W / stride)."""
    layer = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight)  # Darknet's: deviation sqrt(2 / fan in)
    return nn.Sequential(layer, nn.BatchNorm2d(out_channels, eps=EPS), nn.LeakyReLU(LEAK, inplace=True))


class Header(NamedTuple):
    """The start of a file: the version that wrote it, and the pictures it was trained on."""

    major: int = 0
    minor: int = 2
    revision: int = 0
    seen: int = 0

    @property
    def wide(self) -> bool:
        """Whether ``seen`` takes 8 bytes in place of 4."""
        return self.major * 10 + self.minor >= 2


@dataclass(frozen=True)
class Layer:
    """One convolution as a file has it.

    Attributes:
        name: Name of the convolution in the network.
        tensors: Its tensors by their keys in the network's state, in the order of the file.
        normalized: Whether batch norm follows; in the YOLO networks it does wherever the classes do not matter.
    """

    name: str
    tensors: dict[str, Tensor]
    normalized: bool

    @property
    def size(self) -> int:
        """Number of values."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def layers_of(network: nn.Module) -> list[Layer]:
    """A network's convolutions in the order in which its modules were registered, which must be that of the cfg.

    Raises:
        ValueError: A convolution has neither a bias nor a batch norm behind it.
    """
    modules = [(name, m) for name, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    layers = []
    for position, (name, module) in enumerate(modules):
        if not isinstance(module, nn.Conv2d):
            continue
        if module.bias is not None:
            tensors = {f"{name}.bias": module.bias, f"{name}.weight": module.weight}
            layers.append(Layer(name, tensors, normalized=False))
            continue
        norm_name, norm = modules[position + 1] if position + 1 < len(modules) else ("", None)
        if not isinstance(norm, nn.BatchNorm2d):
            raise ValueError(f"{name} has neither a bias nor a batch norm behind it: Darknet has no such layer")
        state = norm.state_dict(prefix=f"{norm_name}.", keep_vars=True)
        parts = ("bias", "weight", "running_mean", "running_var")
        tensors = {f"{norm_name}.{part}": state[f"{norm_name}.{part}"] for part in parts}
        layers.append(Layer(name, tensors | {f"{name}.weight": module.weight}, normalized=True))
    return layers


def read_header(path: Path) -> tuple[Header, int]:
    """The header of a file and the bytes that it takes, 20 or 16.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It does not start as Darknet's files do.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; expected Darknet's weights, as in yolov3.weights")
    with open(path, "rb") as file:
        start = file.read(20)
    version = struct.unpack("<iii", start[:12]) if len(start) >= 16 else (-1, -1, -1)
    header = Header(*version)
    length = 20 if header.wide else 16
    if not all(0 <= number < 1000 for number in version) or len(start) < length:
        raise ValueError(
            f"{path} is no file of Darknet's weights: expected a header of 16 or 20 bytes that starts with a version "
            f"such as 0.2.0, found {start[:12].hex(' ') or 'an empty file'}. Fetch it again"
        )
    return header._replace(seen=struct.unpack("<q" if header.wide else "<i", start[12:length])[0]), length


def read_values(path: Path) -> tuple[Header, Tensor]:
    """The header of a file and all its values, float32 (K,).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is none of Darknet's, it is cut within a value, or it holds values that are no numbers.
    """
    header, length = read_header(path)
    size = path.stat().st_size
    if (size - length) % 4:
        raise ValueError(
            f"{path} has {size:,} bytes, which are not {length} of a header and 4 for each value: "
            "it is truncated. Fetch it again"
        )
    values = torch.from_numpy(np.fromfile(path, "<f4", offset=length).astype(np.float32, copy=False))
    if not values.isfinite().all():
        raise ValueError(f"{path} holds values that are no numbers: use another file")
    return header, values


def load_darknet(network: nn.Module, path: str | Path, anchors: int = 3) -> Transfer:
    """Fill a YOLO network from a file: all of it, or as far as the file goes.

    Taken are the whole network; the same with output convolutions for another number of classes, which are then left
    as they are; and files cut behind any convolution from the last of the backbone to the last before the first
    output, as ``darknet53.conv.74`` is.

    Args:
        network: A network whose ``backbone`` and ``head`` have their convolutions in the order of the cfg, and
            whose output convolutions are those without batch norm.
        path: The file.
        anchors: Anchors of each output convolution, which has ``anchors * (5 + classes)`` maps.

    Returns:
        Which tensors were loaded and which are fresh; also printed.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged or of another network; nothing was changed.
    """
    path = Path(path).expanduser()
    header, values = read_values(path)
    layers = layers_of(network)
    taken = _taken(layers, len(values), anchors)
    if taken is None:
        raise ValueError(_misfit(path, header, layers, len(values), anchors))
    filled: dict[str, Tensor] = {}
    place = 0
    for layer, size in taken:
        if size == layer.size:
            filled |= _cut(layer, values[place : place + size])
        place += size
    for key, value in filled.items():
        if key.endswith("running_var") and (value < 0).any():
            raise ValueError(f"{path} has variances below 0 in {key}: it is damaged or of another network")
    own = {key: tensor for layer in layers for key, tensor in layer.tensors.items()}
    with torch.no_grad():
        for key, value in filled.items():
            own[key].copy_(value)
    transfer = Transfer(list(filled), {}, [key for key in own if key not in filled])
    rank_zero_info(f"weights from {path}: {transfer}")
    return transfer


def write_darknet(network: nn.Module, path: str | Path, seen: int = 0) -> None:
    """Write a network's convolutions as a file of version 0.2.0, complete or not at all.

    Args:
        network: A network whose convolutions stand in the order of the cfg.
        path: The file.
        seen: Number of pictures that it was trained on.
    """
    layers = layers_of(network)
    with replacing(Path(path)) as partial, open(partial, "wb") as file:
        file.write(struct.pack("<iiiq", *Header(seen=seen)))
        for layer in layers:
            for tensor in layer.tensors.values():
                file.write(tensor.detach().cpu().contiguous().numpy().astype("<f4").tobytes())


def _cut(layer: Layer, values: Tensor) -> dict[str, Tensor]:
    """The values of a layer under its keys, in their shapes."""
    parts = values.split([tensor.numel() for tensor in layer.tensors.values()])
    return {key: part.view(tensor.shape) for (key, tensor), part in zip(layer.tensors.items(), parts, strict=True)}


def _taken(layers: Sequence[Layer], found: int, anchors: int) -> list[tuple[Layer, int]] | None:
    """The layers that a file of so many values holds, each with its number of values there; None if it fits none."""
    sizes = [layer.size for layer in layers]
    if found == sum(sizes):
        return list(zip(layers, sizes, strict=True))
    for stop in _stops(layers):
        if found == sum(sizes[:stop]):
            return list(zip(layers[:stop], sizes[:stop], strict=True))
    # Each map of an output takes a bias and a weight for each of its inputs.
    fixed = sum(layer.size for layer in layers if layer.normalized)
    maps, rest = divmod(found - fixed, max(_map_size(layers), 1))
    if rest or maps % anchors or maps <= 5 * anchors:
        return None
    return [(layer, layer.size if layer.normalized else maps * _map_size([layer])) for layer in layers]


def _stops(layers: Sequence[Layer]) -> range:
    """Numbers of layers after which a file may end: the backbone's, up to all before the first output."""
    backbone = sum(layer.name.startswith("backbone.") for layer in layers)
    outputs = [position for position, layer in enumerate(layers) if not layer.normalized]
    return range(backbone, outputs[0] + 1) if backbone and outputs else range(0)


def _map_size(layers: Sequence[Layer]) -> int:
    """Values that one map of each output convolution takes."""
    outputs = [layer for layer in layers if not layer.normalized]
    return sum(layer.size // layer.tensors[f"{layer.name}.bias"].numel() for layer in outputs)


def _misfit(path: Path, header: Header, layers: Sequence[Layer], found: int, anchors: int) -> str:
    """What is wrong with a file of so many values."""
    start = 20 if header.wide else 16
    whole = sum(layer.size for layer in layers)
    said = f"{path} does not fit: it holds {found:,} values ({start + 4 * found:,} bytes), expected "
    said += f"{whole:,} ({start + 4 * whole:,} bytes)"
    if _map_size(layers):
        said += f" (a class more or fewer is {anchors * _map_size(layers):,} values more or fewer)"
    if stops := _stops(layers):
        backbone = sum(layer.size for layer in layers[: stops[0]])
        said += f", or {backbone:,} ({start + 4 * backbone:,} bytes) of the backbone alone"
    return f"{said}. It is truncated or of another network"
