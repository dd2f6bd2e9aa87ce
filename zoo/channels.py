"""Pictures of other than three channels: weights whose first convolution takes another number of them.

A convolution's outputs keep their size: a sum over RGB gives for a grey picture what the three channels give for that
picture repeated, and copies for n channels are scaled by 3 / n, as timm does.
"""

from typing import Any

import torch
from torch import Tensor, nn

DEVIATION = "backbone.standardize.std"
STATISTICS = ("backbone.standardize.mean", DEVIATION)


def expect_channels(given: int, expected: int) -> None:
    """Refuse images of other channels.

    Args:
        given: Channels of the images.
        expected: Channels that the model takes.

    Raises:
        ValueError: They differ.
    """
    if given != expected:
        raise ValueError(
            f"the images have {given} channel{'s' * (given != 1)} and the model takes {expected}: change the data, or "
            "in_channels where the model has it"
        )


def adapt(module: nn.Module, state: dict[str, Tensor], arguments: dict[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Tensors of a file for a model whose pictures have other channels.

    Of a model with the argument ``in_channels`` the first convolution of ``backbone`` is changed, and the mean and
    deviation before it:

    - 3 channels to 1: the kernels' sum over RGB, each divided by its deviation; the means' average. Where the means
      differ, that is not exact, so that a model with three means keeps three channels: it takes the kernels as they
      are, and each sees the grey picture standardised for it.
    - 3 channels to n > 3: the kernels of red, green, blue, red, …, times 3 / n.
    - 1 channel to n: the kernel n times, divided by n.

    Args:
        module: The model.
        state: The file's tensors under the model's names.
        arguments: Those of the model that wrote the file; empty where it does not say.

    Returns:
        The tensors, and what was done; empty where nothing was.

    Raises:
        ValueError: There is no such rule.
    """
    hparams: Any = getattr(module, "hparams", {})
    key, mine = _first_kernels(module) if "in_channels" in hparams else ("", None)
    given = state.get(key)
    if mine is None or given is None or _without_channels(given) != _without_channels(mine):
        return state, ""
    ours, theirs = mine.shape[1], given.shape[1]
    if ours == theirs:
        grey = hparams["in_channels"] == 1 and ours == 3 and arguments.get("in_channels") != 1
        return state, "3 channels kept, each sees the grey one: their sum" if grey else ""
    if (theirs, ours) == (3, 1):
        return state | _summed(key, state), "3 channels summed to 1"
    if theirs == 1 or (theirs == 3 and ours > 3):
        said = f"{theirs} channel{'s' * (theirs > 1)} repeated to {ours}, times {theirs}/{ours}"
        return state | _repeated(key, state, ours), said
    raise ValueError(
        f"its first convolution takes {theirs} channels, that of the model {ours}: weights for 3 channels are adapted "
        "to 1 and to more than 3, weights for 1 to any number; give in_channels, or weights, that fit"
    )


def _first_kernels(module: nn.Module) -> tuple[str, Tensor | None]:
    """Name and weights (K, C, h, w) of the first convolution; None where there is none."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d) and name.startswith("backbone."):
            return f"{name}.weight", layer.weight
    return "", None


def _without_channels(kernels: Tensor) -> tuple[int, ...]:
    return (*kernels.shape[:1], *kernels.shape[2:])


def _summed(key: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The kernels of three channels, and what standardises them, as those of one."""
    changed = {name: value.mean(0, keepdim=True) for name, value in _statistics(state, 3).items()}
    kernels = _in_full(state[key])
    if DEVIATION in changed:
        kernels = kernels * (changed[DEVIATION] / state[DEVIATION])
    return changed | {key: kernels.sum(1, keepdim=True)}


def _repeated(key: str, state: dict[str, Tensor], channels: int) -> dict[str, Tensor]:
    """The kernels, and what standardises them, from the first on again and again."""
    there = state[key].shape[1]
    places = torch.arange(channels) % there
    changed = {name: value[places] for name, value in _statistics(state, there).items()}
    return changed | {key: _in_full(state[key])[:, places] * (there / channels)}


def _statistics(state: dict[str, Tensor], channels: int) -> dict[str, Tensor]:
    """Mean and deviation of so many channels, where the file has them."""
    return {name: state[name] for name in STATISTICS if name in state and state[name].shape == (channels, 1, 1)}


def _in_full(kernels: Tensor) -> Tensor:
    return kernels.to(torch.promote_types(kernels.dtype, torch.float32))
