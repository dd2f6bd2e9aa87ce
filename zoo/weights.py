"""Weights: start a model from a file, write the weights file, rebuild a model from it.

The weights file is safetensors (no code, no pickle) with a header of texts: ``class_path``, ``arguments`` (JSON of the
constructor's), ``class_names`` (JSON), ``recipe``, ``metrics`` (JSON) and ``licence``; and, where the data module that
it was trained with says it, ``evaluation`` (JSON): how an image is made of a picture, or clips of a video.
"""

import contextlib
import inspect
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, cast

import torch
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

import zoo
from zoo.channels import adapt
from zoo.recipes import suggest
from zoo.running.checkpoint import read_checkpoint, replacing
from zoo.running.downloading import download
from zoo.standardization import IMAGENET_MEAN, IMAGENET_STD

FORMAT = "1"
TORCHVISION_NAME = re.compile(r"[A-Z][A-Z0-9_]*")  # DEFAULT, IMAGENET1K_V2, …: no file is called so
# Arguments of a run, not of the network.
NOT_SAVED = ("optimizer", "scheduler", "weights", "backbone_weights", "keep_matching_classes", "classifier")
LARGEST = 2**14  # pixels, frames or clips that a file may ask for in its evaluation


@dataclass(frozen=True)
class Published:
    """How the files in which an architecture's weights were published differ from ours.

    Our keys are ``backbone.network.…`` and ``head.…``, with mean and deviation of the input in
    ``backbone.standardize``; a published file knows neither.

    Attributes:
        builder: The function of ``torchvision.models`` whose weights they are; None if torchvision has none.
        heads: What each prefix of a key that depends on the classes becomes, as in ``{"fc.": "head."}``.
        mean: Mean of each channel that the weights want the images to be standardised by.
        std: Standard deviation of each channel.
    """

    builder: str | None
    heads: dict[str, str]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def recognises(self, state: dict[str, Tensor]) -> bool:
        """Whether a file has the published keys."""
        return not any(key.startswith("backbone.") for key in state)

    def class_names(self, state: dict[str, Tensor]) -> list[str]:
        """ImageNet's names if the head, under our keys, has 1,000 rows and torchvision published it; else none."""
        from torchvision.models import AlexNet_Weights

        names = list(AlexNet_Weights.IMAGENET1K_V1.meta["categories"])
        rows = [value.shape[0] for key, value in state.items() if key.startswith("head.") and value.ndim]
        return names if self.builder and len(names) in rows else []

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Published tensors under our keys."""
        renamed = {self._rename(key): value for key, value in state.items()}
        renamed["backbone.standardize.mean"] = torch.tensor(self.mean)[:, None, None]
        renamed["backbone.standardize.std"] = torch.tensor(self.std)[:, None, None]
        return renamed

    def _rename(self, key: str) -> str:
        for theirs, ours in self.heads.items():
            if key.startswith(theirs):
                return ours + key.removeprefix(theirs)
        return f"backbone.network.{key}"


@dataclass
class Transfer:
    """What became of each tensor of a model that started from a file.

    ``loaded`` were taken as they are, ``resized`` heads got the rows of the classes whose names match, ``fresh`` heads
    stay as initialized. ``channels`` says how the first convolution, and what standardises its input, became those of a
    model for other channels.
    """

    loaded: list[str]
    resized: dict[str, str]
    fresh: list[str]
    channels: str = ""

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded"]
        lines += [f"first convolution: {self.channels}"] * bool(self.channels)
        lines += [f"{name}: {what}" for name, what in self.resized.items()]
        lines += [f"{name}: fresh" for name in self.fresh]
        return "; ".join(lines)


def describe(module: LightningModule) -> dict[str, Any]:
    """What rebuilds a module: its public class path and plain constructor arguments, and its classes' names.

    ``evaluation`` is there too where the data module that it is trained with has such an attribute, or the file that it
    was loaded from had it.
    """
    # Of its own constructor: Lightning also notes what the task's was given, which the architecture may not take.
    own = inspect.signature(type(module)).parameters.keys() - set(NOT_SAVED)
    described = {
        "class_path": f"zoo.{type(module).__name__}",
        "arguments": {key: value for key, value in dict(module.hparams).items() if key in own},
        "class_names": list(getattr(module, "class_names", [])),
    }
    evaluation = _evaluation_of(module)
    return described if evaluation is None else described | {"evaluation": evaluation}


def _evaluation_of(module: LightningModule) -> dict[str, Any] | None:
    """What its data module, or else its file, says of an evaluation; somebody else's attribute of that name is none."""
    data = getattr(getattr(module, "_trainer", None), "datamodule", None)
    try:
        return _checked_evaluation(getattr(data, "evaluation", None) or getattr(module, "evaluation", None))
    except Exception:  # a property of somebody's raises what it likes
        return None


def load(path: str | os.PathLike) -> LightningModule:
    """Rebuild a model of the zoo from a weights file or a checkpoint, ready to predict.

    Args:
        path: A ``.safetensors`` file of :func:`save`, or a ``.ckpt`` of a run.

    Returns:
        The model, in evaluation mode, on the CPU. Its ``evaluation`` is what the file says of that.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is unsafe, damaged, does not say which class of the zoo it is, or has arguments that this
            class does not take. Those that it lacks are named in a warning.
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
        compare_arguments(path, getattr(zoo, name), arguments, {})
        evaluation = _checked_evaluation(header.get("evaluation"))
        _compare_size(getattr(zoo, name), arguments, state)
        module: LightningModule = getattr(zoo, name)(**arguments)
        module.load_state_dict(state)
    except (TypeError, ValueError, RuntimeError, LookupError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"{path} does not fit zoo.{name}: {error}") from error
    if evaluation is not None:
        module.evaluation = evaluation  # type: ignore[assignment]
    return module.eval()


def compare_arguments(
    path: str | os.PathLike,
    architecture: type,
    stored: dict[str, Any],
    otherwise: dict[str, Any],
    elsewhere: tuple[str, ...] = (),
) -> None:
    """Hold the arguments that a file has against those of its class; name in a warning what it lacks.

    Args:
        path: The file.
        architecture: The class.
        stored: The file's arguments.
        otherwise: What is taken for those that it lacks; for others the class's defaults are.
        elsewhere: Those that the file need not have, since they come from elsewhere.

    Raises:
        ValueError: The class does not take one of them.
    """
    known = {
        key: parameter.default
        for key, parameter in inspect.signature(architecture).parameters.items()
        if key not in NOT_SAVED
    }
    for key in stored:
        if key not in known and key not in NOT_SAVED:
            raise ValueError(f"it has the argument {key!r}, which this version does not take{suggest(key, known)}")
    missing = [key for key in known if key not in stored and key not in elsewhere]
    values = {key: otherwise.get(key, known[key]) for key in missing}
    taken = [f"{key}={value!r}" for key, value in values.items() if value is not inspect.Parameter.empty]
    if taken:
        rank_zero_warn(f"{path} lacks arguments of {architecture.__name__}, for which are taken: {', '.join(taken)}")


def _checked_evaluation(said: Any) -> dict[str, Any] | None:
    """What a file says of its evaluation.

    Raises:
        ValueError: It is no mapping of names to numbers, or a number is out of range.
    """
    if said is None:
        return None
    if not isinstance(said, dict):
        raise ValueError(
            f"its evaluation is {shortened(said)}, expected a mapping such as {{'short_side': 256, 'size': 224}}"
        )
    for key, value in said.items():
        if type(key) is not str:
            raise ValueError(f"its evaluation has the key {shortened(key)}, expected texts")
        parts = value if isinstance(value, list) and len(value) == 2 else [value]
        if key == "seconds" and type(value) in (int, float) and 0 < value < math.inf:
            continue
        if value is not None and not all(type(part) is int and 0 < part <= LARGEST for part in parts):
            raise ValueError(
                f"its evaluation says {key}={shortened(value)}, expected a whole number from 1 to {LARGEST:,}"
            )
    return {**said}


def _compare_size(architecture: type[LightningModule], arguments: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Hold what a file's arguments ask for against what it has, before any memory is taken for it.

    Raises:
        ValueError: They ask for more.
    """
    there = sum(tensor.numel() for tensor in state.values())
    classes = arguments.get("num_classes")
    if isinstance(classes, int) and classes > max(there, 10**5):  # each is to be given a name
        raise ValueError(f"its arguments ask for {classes:,} classes, and it has {there:,} values")
    with torch.device("meta"), _making_at_most(1000 + 10 * len(state)):  # of modules some have no tensor, some five
        asked = sum(tensor.numel() for tensor in architecture(**arguments).state_dict().values())
    if asked > there:
        raise ValueError(f"its arguments ask for {asked:,} values, and it has {there:,}")


@contextlib.contextmanager
def _making_at_most(most: int) -> Iterator[None]:
    """End the building of a network that comes to more modules and parameters: even empty ones take time.

    Raises:
        ValueError: It does.
    """
    made = 0

    def count(*_: Any) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise ValueError("its arguments ask for far more layers than it has")

    hooks = [register_module_parameter_registration_hook(count), register_module_module_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
    if "evaluation" in described:
        header["evaluation"] = json.dumps(described["evaluation"])
    # Clones: safetensors refuses tensors that share memory, and wants them contiguous.
    state = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in module.state_dict().items()}
    with replacing(Path(path)) as partial:
        save_file(state, partial, metadata=header)


def read_weights(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and what the file says of itself (empty where it says nothing), without running its code.

    Args:
        path: ``.safetensors``; or a file of ``torch.save``: a Lightning checkpoint, a bare state dict, or one under
            the key ``state_dict``, ``model`` or ``model_state``, with or without the prefix ``module.`` of
            data-parallel training.

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
    state = next((content[key] for key in ("state_dict", "model", "model_state") if key in content), content)
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
        for key in ("arguments", "class_names", "metrics", "evaluation"):
            if key in header:
                header[key] = json.loads(header[key])
    except (SafetensorError, OSError, ValueError, RecursionError) as error:  # the last, of json within json
        raise ValueError(f"{path} is damaged or no safetensors file ({error}): fetch it again") from error
    return state, header


def load_weights(module: LightningModule, weights: str, keep_matching_classes: bool = False) -> Transfer:
    """Start a model from weights; a head of another number of classes may differ, and the channels of the pictures.

    A model of ImageNet's 1,000 classes that was given no names takes theirs with weights that torchvision published.
    For other channels the first convolution is adapted as :func:`zoo.channels.adapt` says.

    Args:
        module: A model with ``backbone`` and ``head``.
        weights: A file of :func:`read_weights`, with our keys or those of :class:`Published`; or
            ``hf://owner/name`` (its ``model.safetensors``) or ``hf://owner/name/file``; or the name of torchvision's
            weights: ``DEFAULT``, ``IMAGENET1K_V1``, ….
        keep_matching_classes: Fill the rows of such a head whose class names both sides have.

    Returns:
        What became of each tensor; also printed.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is unsafe or damaged, or tensors outside the head do not fit; it names them.
    """
    given, header = _read_as_ours(module, weights)
    arguments = header.get("arguments")
    try:
        adapted, said = adapt(module, given, arguments if isinstance(arguments, dict) else {})
    except ValueError as error:
        raise ValueError(f"{weights} does not fit {type(module).__name__}: {error}") from error
    state, transfer, wrong = _match(module, adapted, header, keep_matching_classes)
    transfer.channels = said
    transfer.loaded = [key for key in transfer.loaded if adapted[key] is given[key]]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(f"{weights} does not fit {type(module).__name__}: {'; '.join(wrong[:8])}{more}")
    module.load_state_dict(state, strict=False)
    rank_zero_info(f"weights from {weights}: {transfer}")
    return transfer


def load_trunk(trunk: nn.Module, weights: str, builder: str | None) -> None:
    """Start an image encoder from the weights of the classifier that it is the first part of.

    Args:
        trunk: The encoder, its tensors named as in that classifier of torchvision, with or without ``features.``.
        weights: torchvision's name for the classifier's (``IMAGENET1K_V1``, …), or a file: torchvision's, or one of a
            classifier of the zoo.
        builder: The classifier's function in ``torchvision.models``; None if torchvision has none.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is unsafe or damaged, or is not of this encoder; it names tensors that do not fit.
    """
    state, _ = read_weights(find_weights(weights, builder))
    given = {key.removeprefix("backbone.network.").removeprefix("features."): value for key, value in state.items()}
    own = {key: value for key, value in trunk.state_dict().items() if not key.endswith("num_batches_tracked")}
    fitting = {key: given.get(key.removeprefix("features.")) for key in own}
    wrong = [key for key, value in fitting.items() if value is None or value.shape != own[key].shape]
    if wrong:
        what = f"a {builder}" if builder else "an encoder of this kind"
        raise ValueError(f"{weights} is not of {what}: {', '.join(wrong[:4])} are missing or of another shape")
    trunk.load_state_dict(fitting, strict=False)
    rank_zero_info(f"trunk from {weights}: {len(fitting)} tensors loaded, the rest is fresh")


def _read_as_ours(module: LightningModule, weights: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors under our keys and what the file says of itself; published files get the names of their classes."""
    published: Published | None = getattr(module, "published", None)
    state, header = read_weights(find_weights(weights, published.builder if published else None))
    broken = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise ValueError(f"{weights} holds values that are no numbers in {', '.join(broken[:4])}: use another file")
    if published is None or not published.recognises(state):
        return state, header
    state = published.rename(state)
    header["class_names"] = published.class_names(state)
    _take_names(module, header["class_names"])
    return state, header


def _match(
    module: LightningModule, state: dict[str, Tensor], header: dict[str, Any], keep_matching_classes: bool
) -> tuple[dict[str, Tensor], Transfer, list[str]]:
    """Which tensors a module takes, what becomes of its own, and what does not fit."""
    own = module.state_dict()
    ours = _classes(module, getattr(module, "class_names", []))
    theirs = _classes(module, header.get("class_names") or [])
    rows = _matching_rows(ours, theirs) if keep_matching_classes else []
    taken: dict[str, Tensor] = {}
    transfer = Transfer([], {}, [])
    wrong: list[str] = []
    for key, mine in own.items():
        in_head = key.startswith("head.")
        by_class = in_head and mine.ndim and key in state and _same_but_rows(module, key, mine, state[key])
        if key not in state and key.endswith("num_batches_tracked"):
            continue  # a count that nothing here reads and older files lack
        if key not in state and in_head:
            transfer.fresh.append(key)
        elif key not in state:
            wrong.append(f"{key} is missing")
        elif by_class and rows and (kept := _rows_of(module, key, mine, state[key], ours, theirs)) is not None:
            taken[key] = kept
            transfer.resized[key] = f"{len(rows)} of {len(ours)} rows kept by class name"
        elif state[key].shape == mine.shape:
            taken[key] = state[key]
            transfer.loaded.append(key)
        elif by_class:
            transfer.fresh.append(key)
        else:
            wrong.append(f"{key} has shape {tuple(state[key].shape)}, expected {tuple(mine.shape)}")
    known = {*own, *(key for key in state if key.endswith("num_batches_tracked"))}
    wrong += [f"{key} is unknown" for key in state if key not in known and not key.startswith("head.")]
    return taken, transfer, wrong


def _same_but_rows(module: LightningModule, key: str, mine: Tensor, given: Tensor) -> bool:
    """Whether two tensors of a layer differ at most in the number of its outputs."""
    turned = isinstance(module.get_submodule(key.rpartition(".")[0]), nn.ConvTranspose2d) and mine.ndim > 1
    outputs = 1 if turned else 0  # a transposed convolution has them in its second dimension
    return _without(mine.shape, outputs) == _without(given.shape, outputs)


def _without(shape: torch.Size, dimension: int) -> tuple[int, ...]:
    return (*shape[:dimension], *shape[dimension + 1 :])


def _rows_of(
    module: LightningModule, key: str, mine: Tensor, given: Tensor, ours: list[str], theirs: list[str]
) -> Tensor | None:
    """Our tensor with the rows of the classes that both have taken from theirs; None if its rows are no classes'."""
    to, source = _class_rows(module, key, len(mine), len(ours)), _class_rows(module, key, len(given), len(theirs))
    if to is None or source is None:
        return None
    kept = mine.clone()
    for our_class, their_class in _matching_rows(ours, theirs):
        kept[to[our_class]] = given[source[their_class]].to(kept)
    return kept


def _class_rows(module: LightningModule, key: str, rows: int, classes: int) -> list[Tensor] | None:
    """Which rows of a head's tensor belong to each class: one, unless the module has a ``class_rows`` of its own."""
    own: Any = getattr(module, "class_rows", None)
    if own is not None:
        return cast(list[Tensor] | None, own(key, rows, classes))
    return list(torch.arange(rows)[:, None]) if rows == classes else None


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


def find_weights(weights: str, builder: str | None) -> Path:
    """The local file of :func:`locate`'s names, or of torchvision's for a function of ``torchvision.models``."""
    by_name = TORCHVISION_NAME.fullmatch(weights) and not Path(weights).exists()
    return fetch_torchvision(builder, weights) if by_name else locate(weights)


def fetch_torchvision(builder: str | None, name: str) -> Path:
    """The file of torchvision's weights of that name, downloaded to its cache if it is not there yet.

    Args:
        builder: The function of ``torchvision.models`` whose weights they are; None if torchvision has none.
        name: ``DEFAULT``, ``IMAGENET1K_V1``, …

    Raises:
        FileNotFoundError: It is not in the cache and cannot be downloaded, as :func:`~zoo.running.downloading.download`
            tries it.
        ValueError: There are no weights of that name for this architecture.
    """
    if builder is None:
        raise ValueError(f"torchvision publishes no weights for this architecture: give a file in place of {name}")
    from torch.hub import get_dir
    from torchvision.models import get_model_weights

    known = get_model_weights(builder).__members__
    if name not in known:
        raise ValueError(f"{builder} has no weights {name}: there are {', '.join(known)}")
    url = known[name].url
    path = Path(get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    from filelock import FileLock  # torch brings it

    try:
        with FileLock(f"{path}.lock"):  # several processes ask at once: one downloads
            if not path.is_file():
                # torchvision's names end in the first digits of the hash
                download(url, path, sha256=path.stem.rsplit("-", 1)[-1])
    except OSError as error:
        raise FileNotFoundError(
            f"{name} could not be downloaded from {url} ({error}). Bring {path.name} by hand and put it into "
            f"{path.parent}, or give its path as --model.init_args.weights"
        ) from error
    return path


def _take_names(module: LightningModule, names: list[str]) -> None:
    """A module of as many classes that was given no names takes the published ones."""
    if names and module.hparams.get("num_classes") == len(names) and module.hparams.get("class_names") is None:
        module.class_names = list(names)  # type: ignore[assignment]
        module.hparams["class_names"] = list(names)


def _classes(module: LightningModule, names: list[str]) -> list[str]:
    """What the rows of a head stand for: the classes, behind the background where the task has one."""
    return [*getattr(module, "background", []), *names]


def _matching_rows(ours: list[str], theirs: list[str]) -> list[tuple[int, int]]:
    """Pairs (row of ours, row of theirs) of the classes that have the same name."""
    places = {name: row for row, name in enumerate(theirs)}
    return [(row, places[name]) for row, name in enumerate(ours) if name in places]
