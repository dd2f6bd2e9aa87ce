"""Weights: start a model from a file, write the weights file, rebuild a model from it.

The weights file is safetensors (no code, no pickle) with a header of texts: ``class_path``, ``arguments`` (JSON of the
constructor's), ``class_names`` (JSON), ``recipe``, ``metrics`` (JSON) and ``licence``.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

import zoo
from zoo.running.checkpoint import read_checkpoint, replacing

FORMAT = "1"
NOT_SAVED = ("optimizer", "scheduler", "weights", "keep_matching_classes")  # arguments of a run, not of the network


@dataclass
class Transfer:
    """What became of each tensor of a model that started from a file.

    ``loaded`` were taken as they are, ``resized`` heads got the rows of the classes whose names match, ``fresh`` heads
    stay as initialized.
    """

    loaded: list[str]
    resized: dict[str, str]
    fresh: list[str]

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded"]
        lines += [f"{name}: {what}" for name, what in self.resized.items()]
        lines += [f"{name}: fresh" for name in self.fresh]
        return "; ".join(lines)


def describe(module: LightningModule) -> dict[str, Any]:
    """What rebuilds a module: its public class path and plain constructor arguments, and its classes' names."""
    hparams = dict(module.hparams).items()
    return {
        "class_path": f"zoo.{type(module).__name__}",
        "arguments": {key: value for key, value in hparams if key not in NOT_SAVED and not key.startswith("_")},
        "class_names": list(getattr(module, "class_names", [])),
    }


def load(path: str | os.PathLike) -> LightningModule:
    """Rebuild a model of the zoo from a weights file or a checkpoint, ready to predict.

    Args:
        path: A ``.safetensors`` file of :func:`save`, or a ``.ckpt`` of a run.

    Returns:
        The model, in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is unsafe, damaged, or does not say which class of the zoo it is.
    """
    state, header = read_weights(path)
    name = str(header.get("class_path", "")).removeprefix("zoo.")
    # The file may come from anywhere: it chooses among the zoo's classes, never an import path of its own.
    if name not in zoo.ARCHITECTURES:
        said = header.get("class_path") or "nothing"
        raise ValueError(
            f"{path} names {said} as its class, expected one of {', '.join(f'zoo.{a}' for a in zoo.ARCHITECTURES)}. "
            "For a bare state dict build the model yourself: zoo.LeNet(weights=path)"
        )
    try:
        # Of the arguments only those that shape the network: a file must not make us fetch another one.
        arguments = {key: value for key, value in header["arguments"].items() if key not in NOT_SAVED}
        module: LightningModule = getattr(zoo, name)(**arguments)
        module.load_state_dict(state)
    except (TypeError, RuntimeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} does not fit zoo.{name}: {error}") from error
    return module.eval()


def save(
    module: LightningModule,
    path: str | os.PathLike,
    recipe: str = "",
    metrics: dict[str, float] | None = None,
    licence: str = "",
) -> None:
    """Write a model's weights file, atomically.

    Args:
        module: A model of the zoo.
        path: Where to; usually ends in ``.safetensors``.
        recipe: Name of the recipe that trained it.
        metrics: What was measured, by metric name.
        licence: Licence of the weights.
    """
    from safetensors.torch import save_file

    described = describe(module)
    header = {
        "format": FORMAT,
        "class_path": described["class_path"],
        "arguments": json.dumps(described["arguments"]),
        "class_names": json.dumps(described["class_names"]),
        "recipe": recipe,
        "metrics": json.dumps(metrics or {}),
        "licence": licence,
    }
    # Clones: safetensors refuses tensors that share memory, and wants them contiguous.
    state = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in module.state_dict().items()}
    with replacing(Path(path)) as partial:
        save_file(state, partial, metadata=header)


def read_weights(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and what the file says of itself (empty where it says nothing), without running its code.

    Args:
        path: ``.safetensors``; or a file of ``torch.save``: a Lightning checkpoint, a bare state dict, or one under
            the key ``state_dict`` or ``model``, with or without the prefix ``module.`` of data-parallel training.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is unsafe or damaged.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = read_checkpoint(path)
    header = dict(content.get("zoo") or {})
    header |= {key: content[key] for key in ("recipe", "metrics") if key in content}
    state = content.get("state_dict", content.get("model", content))
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__} where its tensors should be: use another file")
    state = {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    if not state:
        raise ValueError(f"{path} holds no tensors: expected a Lightning checkpoint or a state dict")
    return state, header


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, Any] = dict(file.metadata() or {})
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        for key in ("arguments", "class_names", "metrics"):
            if key in header:
                header[key] = json.loads(header[key])
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}): fetch it again") from error
    return state, header


def load_weights(module: LightningModule, weights: str, keep_matching_classes: bool = False) -> Transfer:
    """Start a model from weights; only a head of another number of classes may differ.

    Args:
        module: A model with ``backbone`` and ``head``.
        weights: A file of :func:`read_weights`, or ``hf://owner/name`` (its ``model.safetensors``) or
            ``hf://owner/name/file``.
        keep_matching_classes: Fill the rows of such a head whose class names both sides have.

    Returns:
        What became of each tensor; also printed.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is unsafe or damaged, or tensors outside the head do not fit; it names them.
    """
    state, header = read_weights(locate(weights))
    own = module.state_dict()
    transfer = Transfer([], {}, [])
    wrong = [f"{key} is missing" for key in own if key not in state and not key.startswith("head.")]
    wrong += [f"{key} is unknown" for key in state if key not in own and not key.startswith("head.")]
    for key in own:
        if key not in state:
            transfer.fresh.append(key)
        elif state[key].shape == own[key].shape:
            transfer.loaded.append(key)
        elif key.startswith("head.") and state[key].shape[1:] == own[key].shape[1:]:
            rows = _matching_rows(module, header) if keep_matching_classes else []
            if rows:
                kept = own[key].clone()
                for mine, theirs in rows:
                    kept[mine] = state[key][theirs]
                state[key] = kept
                transfer.resized[key] = f"{len(rows)} of {len(kept)} rows kept by class name"
            else:
                transfer.fresh.append(key)
        else:
            wrong.append(f"{key} has shape {tuple(state[key].shape)}, expected {tuple(own[key].shape)}")
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(f"{weights} does not fit {type(module).__name__}: {'; '.join(wrong[:8])}{more}")
    taken = {*transfer.loaded, *transfer.resized}
    module.load_state_dict({key: value for key, value in state.items() if key in taken}, strict=False)
    rank_zero_info(f"weights from {weights}: {transfer}")
    return transfer


def locate(weights: str) -> Path:
    """The local file of ``weights``; one of the Hugging Face hub is downloaded to its cache.

    Raises:
        ImportError: The hub is asked for and its library is not installed.
        FileNotFoundError: The hub has no such file or cannot be reached, and the cache does not have it.
        ValueError: The name is no ``hf://owner/name``.
    """
    if not weights.startswith("hf://"):
        return Path(weights).expanduser()
    parts = weights.removeprefix("hf://").split("/")
    if len(parts) < 2 or not all(parts):
        raise ValueError(f"{weights} is no name on the hub, expected hf://owner/name or hf://owner/name/file")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ImportError(f"{weights} needs the hub's library: pip install 'zoo[hub]'") from error
    file = "/".join(parts[2:]) or "model.safetensors"
    try:
        return Path(hf_hub_download("/".join(parts[:2]), file))
    except Exception as error:  # its own classes for offline, not found, gated; all mean that there is no file
        raise FileNotFoundError(
            f"{weights} could not be fetched ({str(error).splitlines()[0]}). Bring {file} by hand and give its path"
        ) from error


def _matching_rows(module: LightningModule, header: dict[str, Any]) -> list[tuple[int, int]]:
    """Pairs (row of ours, row of theirs) of the classes that have the same name."""
    theirs = {name: row for row, name in enumerate(header.get("class_names") or [])}
    names = getattr(module, "class_names", [])
    return [(row, theirs[name]) for row, name in enumerate(names) if name in theirs]
