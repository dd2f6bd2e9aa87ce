"""A device without float64, as Apple's is: PyTorch computes on the CPU, and each tensor that would be there is marked.

It is the CPU by its number, which is the CPU's only one but makes it unequal to ``torch.device("cpu")``.
"""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cpu", 0)
CPU = torch.device("cpu")
LACKING = (torch.float64, torch.complex128)


class WithoutFloat64(TorchFunctionMode):
    """Marks what is sent to ``DEVICE``, made there or computed from such, and refuses float64 among it."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function == Tensor.device.__get__ and is_there(args[0]):
            return DEVICE
        given = tree_leaves((args, kwargs or {}))
        result = function(*args, **kwargs or {})
        if _leaves(function, given):
            return result.view_as(result)  # the same numbers by another name, which is not marked
        if any(is_there(each) or _is_device(each, DEVICE) for each in given):
            changed = args[:1] if getattr(function, "__name__", "") == "__set__" else ()  # as of ``parameter.data = …``
            for each in (*tree_leaves(result), *changed):
                _mark(each)
        return result


def strategy() -> SingleDeviceStrategy:
    """For a Trainer that trains there."""
    return SingleDeviceStrategy(device=DEVICE, accelerator=CPUAccelerator())


def is_there(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "is_on_the_device")


def _is_device(value: Any, device: torch.device) -> bool:
    return isinstance(value, torch.device) and value == device


def _leaves(function: Callable[..., Any], given: list[Any]) -> bool:
    to_the_cpu = any(_is_device(each, CPU) or (isinstance(each, str) and each == "cpu") for each in given)
    return function is Tensor.cpu or (function is Tensor.to and to_the_cpu)


def _mark(value: Any) -> None:
    if isinstance(value, Tensor):
        if value.dtype in LACKING:
            raise TypeError(f"the device has no {value.dtype}")
        value.is_on_the_device = True
