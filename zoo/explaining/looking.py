"""Looking into a network and leaving it as it was: its layers' outputs, its layers' names, its classes.

All methods of this package take any ``nn.Module`` that maps images (N, C, H, W), float in [0, 1], to scores (N, K): a
classifier of the zoo, which standardises in its first layer, or any other network.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from zoo.recipes import suggest

Targets = int | Sequence[int] | Tensor | None
Progress = Callable[[int, int], None]  # steps that are done, and all


@contextmanager
def leaving_untouched(model: nn.Module, in_place: bool = False) -> Iterator[None]:
    """Evaluation mode, no gradients of weights, no layer that works in place; afterwards all as it was.

    Restores of every module the mode, the hooks and ``inplace``, of every parameter ``requires_grad`` and ``grad``,
    also after an error. A layer that works in place would overwrite the output of the one before, which is looked at.

    Args:
        model: The network.
        in_place: Layers may work in place: only the scores are looked at, and less memory is needed.
    """
    modules = list(model.modules())
    modes = [module.training for module in modules]
    changed: list[Any] = [m for m in modules if not in_place and getattr(m, "inplace", False) is True]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    hooks = [(table, dict(table)) for module in modules for table in _hook_tables(module)]
    try:
        model.eval()
        for module in changed:
            module.inplace = False
        for parameter, _, _ in parameters:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for table, before in hooks:
            table.clear()
            table.update(before)
        for parameter, required, gradient in parameters:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        for module in changed:
            module.inplace = True
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _hook_tables(module: nn.Module) -> list[dict]:
    return [value for name, value in vars(module).items() if "_hooks" in name and isinstance(value, dict)]


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """A layer by its name in ``named_modules``, as ``zoo show`` prints it.

    Raises:
        ValueError: There is none; it suggests the nearest ones.
    """
    layers = dict(model.named_modules())
    if not name or name not in layers:
        raise ValueError(f"the network has no layer {name!r}{suggest(name, [known for known in layers if known])}")
    return layers[name]


class _Enough(Exception):  # noqa: N818 (no error)
    pass


def layer_outputs(model: nn.Module, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """What layers give for images, with gradients where the images have them; the network runs no further than needed.

    Within :func:`leaving_untouched`. Of a layer that runs several times the first output is taken.

    Args:
        model: The network.
        images: (N, C, H, W) in [0, 1].
        layers: Names as in ``named_modules``.

    Raises:
        ValueError: There is no such layer, it does not run, or what it gives is no tensor.
    """
    found: dict[str, Tensor] = {}
    wanted = set(layers)

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Tensor:
            if not isinstance(output, Tensor):
                raise ValueError(f"layer {name} gives a {type(output).__name__}, no tensor: name one inside it")
            found.setdefault(name, output)
            if len(found) == len(wanted):
                raise _Enough
            return output.clone()  # what follows may work in place, by a function that no module shows

        return hook

    handles = [find_layer(model, name).register_forward_hook(keep(name)) for name in layers]
    try:
        model(images)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name in layers if name not in found]:
        raise ValueError(f"layer {missing[0]} does not run when the network sees a picture: name another one")
    return {name: found[name] for name in layers}


def stages(model: nn.Module, images: Tensor) -> list[str]:
    """The last layer at each size of the maps, from the finest to the coarsest: where lectures look.

    A layer that runs several times is passed over for the block that it is in.

    Args:
        model: The network.
        images: (N, C, H, W) in [0, 1], or clips (N, C, T, H, W).

    Returns:
        Names as in ``named_modules``; none where the network has no maps.
    """
    ran: list[tuple[str, Tensor]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                ran.append((name, output))  # kept, so that no address is used twice

        return hook

    with leaving_untouched(model), torch.no_grad():
        for name, module in model.named_modules():
            if name:
                module.register_forward_hook(note(name))
        model(images[:1])
    names = [name for name, _ in ran]
    last: dict[tuple[int, ...], str] = {}
    addresses = set()
    for name, output in ran:
        new = output.data_ptr() not in addresses
        maps = output.ndim == images.ndim and min(output.shape[-2:], default=0) > 1
        if new and maps and names.count(name) == 1 and _learns(model, name):
            last[tuple(output.shape[2:])] = name
            addresses.add(output.data_ptr())
    last.pop(tuple(images.shape[2:]), None) if len(last) > 1 else None
    return list(last.values())


def _learns(model: nn.Module, name: str) -> bool:
    """Whether a layer comes after something that learns: not the standardisation of the pictures."""
    return type(model.get_submodule(name)).__name__ != "Standardize"


def chosen_classes(scores: Tensor, targets: Targets) -> Tensor:
    """The class of each image: as given, one for all or one for each; None takes the best.

    Args:
        scores: (N, K).
        targets: A class, N classes, or None.

    Returns:
        int64 (N,).

    Raises:
        ValueError: The scores are not (N, K), or a class is not in 0…K-1, or there are not N of them.
    """
    if scores.ndim != 2:
        raise ValueError(f"the network gives {tuple(scores.shape)}, expected scores (N, K) of K classes")
    if targets is None:
        return scores.argmax(1)
    classes = torch.as_tensor(targets, dtype=torch.int64, device=scores.device)
    classes = classes.expand(len(scores)) if classes.ndim == 0 else classes
    if classes.shape != scores.shape[:1]:
        raise ValueError(f"{len(classes)} targets were given for {len(scores)} images")
    if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < scores.shape[1]:
        raise ValueError(f"targets must lie in 0…{scores.shape[1] - 1}, not {sorted(set(classes.tolist()))}")
    return classes


def class_number(name: str, class_names: Sequence[str]) -> int:
    """A class by its number or its name.

    Raises:
        ValueError: There is none; it suggests the nearest ones.
    """
    if name in class_names:
        return list(class_names).index(name)
    if name.isdecimal() and int(name) < len(class_names):
        return int(name)
    raise ValueError(f"there is no class {name!r}{suggest(name, class_names)}")


def captum_part(name: str) -> ModuleType:
    """``captum.attr`` or ``captum.robust``.

    Raises:
        ImportError: captum is not installed.
    """
    from importlib import import_module

    try:
        return import_module(f"captum.{name}")
    except ImportError as error:
        raise ImportError("this method needs captum: pip install 'zoo[explain]'") from error
