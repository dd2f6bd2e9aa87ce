"""The arguments that a model is made with, as plain values: what every reader of a checkpoint understands."""

import functools
import inspect
from collections.abc import Callable
from enum import Enum
from pathlib import PurePath
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from lightning import LightningModule
from torch import Tensor

MAKERS = ("optimizer", "scheduler")  # arguments that are functions, and in no checkpoint

P = ParamSpec("P")
Module = TypeVar("Module", bound=LightningModule)


def plain_arguments(init: Callable[Concatenate[Module, P], None]) -> Callable[Concatenate[Module, P], None]:
    """A constructor that is given plain values whatever it is called with: numpy's and paths become Python's own.

    Stands on the constructor of every architecture. Its arguments go into the checkpoint, and a single number of
    numpy's among them would make that unreadable under ``weights_only``, once the training is over.

    Args:
        init: ``__init__`` of a module whose task calls ``save_hyperparameters``.

    Raises:
        ValueError: A value is not plain; see :func:`plain`.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def __init__(self: Module, *args: P.args, **kwargs: P.kwargs) -> None:  # noqa: N807 (see below)
        # save_hyperparameters looks for the arguments of a user's subclass in the frames of constructors, which it
        # knows by this name and this variable.
        __class__ = _Between  # noqa: F841
        given = signature.bind(self, *args, **kwargs)
        for name, value in given.arguments.items():
            if value is not self and name not in MAKERS:
                given.arguments[name] = plain(value, f"{type(self).__name__}: {name}")
        init(*given.args, **given.kwargs)
        # Under LightningCLI these are not what the constructor got, but what the recipe and the data module said.
        for name in self.hparams.keys() & signature.parameters.keys():
            self.hparams[name] = plain(self.hparams[name], f"{type(self).__name__}: {name}")

    # Lightning asks getfullargspec, which does not look behind a wrapper: this one would seem to take any argument.
    __init__.__signature__ = signature  # type: ignore[attr-defined]
    return __init__


class _Between:
    """A constructor between two others, which has no arguments of its own."""

    def __init__(self) -> None: ...


def plain(value: Any, name: str = "the value") -> Any:
    """A value that json and ``weights_only`` know: None, a number, a text, or a list, tuple or dict of such.

    Args:
        value: One of these; or a number, an array or a tensor, which becomes a number or lists of numbers; or a path,
            which becomes a text.
        name: What it is called in the error.

    Raises:
        ValueError: It is something else.
    """
    if isinstance(value, np.generic | np.ndarray | Tensor):
        value = value.tolist()
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, dict):
        return {plain(key, name): plain(entry, name) for key, entry in value.items()}
    if isinstance(value, list):
        return [plain(entry, name) for entry in value]
    if isinstance(value, tuple):
        return tuple(plain(entry, name) for entry in value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    what = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    instead = "one of these"
    if isinstance(value, Enum):
        instead = repr(value.value if isinstance(value.value, str | int) else value.name)
    raise ValueError(
        f"{name} is or holds a {what}, with which no checkpoint could be read again. Numbers, texts, None, and lists, "
        f"tuples and dicts of them are allowed, numpy's too, and paths: give {instead}"
    )
