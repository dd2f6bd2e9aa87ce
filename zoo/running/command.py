"""LightningCLI for recipes: what a run gets besides its recipe, and errors that a person can act on."""

import difflib
import inspect
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, Timer, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from zoo.running.checkpoint import SafeCheckpointIO, checkpoint_callbacks, read_checkpoint
from zoo.running.nonfinite import StopOnNonFiniteLoss
from zoo.running.optimizing import LinearScaling
from zoo.running.predictions import WritePredictions
from zoo.running.progress import EpochLines
from zoo.running.provenance import Provenance
from zoo.running.resume import ExactResume

LINKED = ("num_classes", "class_names")  # facts of the data that a model is told


class RecipeError(ValueError):
    """A wrong key or value in a recipe or on the command line."""


class RecipeParser(LightningArgumentParser):
    """Raises one readable error in place of usage, exit and a screen of types."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        """Turn jsonargparse's message into a :class:`RecipeError` that suggests the nearest right key."""
        raise RecipeError(readable(message, self._known_keys())) from None

    def _known_keys(self) -> list[str]:
        parsers = [self, *getattr(self._subcommands_action, "choices", {}).values()]
        return sorted({action.dest for parser in parsers for action in parser._actions})


def readable(message: str, known: list[str]) -> str:
    """One or two lines: which key, what was expected, what was given, what may have been meant."""
    if match := re.search(r"given class_path '([\w.]+)':\s+(?:.*\n\s+)*?Option '([\w.]+)' is not accepted", message):
        path, key = match.groups()
        return f"{path} has no argument {key!r}{_suggest(key, _arguments(path))}"
    if match := re.search(r"does not accept option '([\w.]+)'|unrecognized arguments: --([\w.]+)", message):
        key = match[1] or match[2]
        return f"there is no key {key!r}{_suggest(key, known)}"
    if match := re.search(r"given class_path '([\w.]+)':\s+(.*)", message):
        return f"{match[1]}: {match[2].strip()}{_suggest(match[1], _class_paths())}"
    key = re.search(r'Parser key "([\w.]+)"', message)
    expected = re.findall(r"Expected a <class '([\w.]+)'>", message)
    given = re.search(r"Given value: (.*)", message)
    if key and expected and given:
        wanted = " or ".join(dict.fromkeys("null" if e == "NoneType" else e for e in expected))
        return f"{key[1]} must be {wanted}, not {given[1].strip()!r}"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines)[:500]


def _suggest(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=2, cutoff=0.6)
    return f": did you mean {' or '.join(near)}?" if near else (f": it has {', '.join(known)}" if len(known) < 25 else "")


def _arguments(class_path: str) -> list[str]:
    module, name = class_path.rsplit(".", 1)
    return [p for p in inspect.signature(getattr(import_module(module), name)).parameters if p not in LINKED]


def _class_paths() -> list[str]:
    import zoo

    data = import_module("datamodules")
    return [f"zoo.{name}" for name in zoo.ARCHITECTURES] + [f"datamodules.{name}" for name in data.__all__]


class RecipeCLI(LightningCLI):
    """Runs one subcommand of a recipe with everything that every run of the zoo gets.

    That is: a CSV logger under ``runs/<recipe>``, ``best.ckpt`` and ``last.ckpt`` written safely, exact resuming, a
    stop at the first loss that is no number, a progress bar on a terminal and a line per epoch elsewhere, and
    predictions as files. What the recipe configures itself is left as it is.

    Args:
        args: ``[subcommand, "--config", path, …]``.
        recipe: Name of the recipe; runs are kept below it and checkpoints remember it.
    """

    def __init__(self, args: list[str], recipe: str) -> None:
        self.recipe = recipe
        self.timer = Timer()
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={name: {"allow_abbrev": False} for name in self.subcommands()},
            parser_class=RecipeParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``expect`` and ``linear_scaling``, and tell the model the classes of the data."""
        parser.add_argument("--expect", type=list[dict[str, Any]], default=[], help="What the recipe should give.")
        parser.add_argument(
            "--linear_scaling",
            type=bool,
            default=False,
            help="k processes: k times the batch and the learning rate, after a warm-up over 5,000 steps.",
        )
        for fact in LINKED:
            parser.link_arguments(f"data.{fact}", f"model.init_args.{fact}", apply_on="instantiate")
        logger = {"save_dir": "runs", "name": self.recipe}
        parser.set_defaults({"trainer.logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": logger}})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; refuse what the data decides, which jsonargparse would silently drop."""
        for fact in LINKED:
            for prefix in ("--model.init_args.", "--model."):
                if any(arg.split("=")[0] == prefix + fact for arg in args):
                    raise RecipeError(f"{prefix[2:]}{fact} comes from the data module: choose other data instead")
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Build the model that the checkpoint was written by, also if plain Python wrote it.

        ``--ckpt_path`` resumes or evaluates: a checkpoint's own arguments win, and what they override is said.
        """
        subcommand = str(self.config.get("subcommand"))
        path = self.config[subcommand].get("ckpt_path")
        if not path or "://" in path:
            return
        content = read_checkpoint(path)
        described = content.get("zoo")
        if not described:
            raise RecipeError(f"{path} was not written by a model of the zoo: start from it with --model.init_args.weights")
        asked = self.config[subcommand].model
        arguments = {k: v for k, v in described["arguments"].items() if k not in LINKED}
        if asked.class_path.rsplit(".", 1)[-1] != described["class_path"].rsplit(".", 1)[-1]:
            raise RecipeError(f"{path} holds a {described['class_path']}, the recipe says {asked.class_path}")
        for key, value in arguments.items():
            before = asked.init_args.get(key)
            if before != value:
                rank_zero_info(f"{key}: {value} from {path} ({before} was asked; --ckpt_path keeps its own)")
            asked.init_args[key] = value
        asked.init_args["weights"] = None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The recipe's Trainer with the callbacks of every run."""
        config = self._get(self.config_init, "trainer", default={})
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        plugins = config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins = [*plugins, SafeCheckpointIO()]
        config["plugins"] = plugins
        config["callbacks"] = [*given, *(c for c in self._callbacks(config) if not _configured(c, given))]
        return super().instantiate_trainer(**kwargs)

    def _callbacks(self, config: dict[str, Any]) -> list[Callback]:
        callbacks: list[Callback] = [
            ExactResume(),
            StopOnNonFiniteLoss(),
            Provenance(self.recipe),
            WritePredictions(),
            EpochLines(),
            self.timer,
        ]
        if config.get("enable_checkpointing") is not False:
            validates = config.get("limit_val_batches") not in (0, 0.0) and getattr(self.datamodule, "val_size", 1) != 0
            monitor = getattr(self.model, "monitor", None) if validates else None
            callbacks += checkpoint_callbacks(monitor, getattr(self.model, "monitor_mode", "min"))
        if config.get("enable_progress_bar") is not False and sys.stderr.isatty():
            callbacks.append(TQDMProgressBar(refresh_rate=25, leave=False))
        else:
            config["enable_progress_bar"] = False
        if config.get("enable_model_summary") is None:
            config["enable_model_summary"] = False
        if self._get(self.config_init, "linear_scaling"):
            callbacks.append(LinearScaling())
        return callbacks


def _configured(callback: Callback, given: list[Callback]) -> bool:
    """Whether the recipe has such a callback of its own; of ModelCheckpoint one may have several."""
    if isinstance(callback, ModelCheckpoint):
        return any(isinstance(g, ModelCheckpoint) and g.filename == callback.filename for g in given)
    if isinstance(callback, ProgressBar):
        return any(isinstance(g, ProgressBar) for g in given)
    return any(type(g) is type(callback) for g in given)


def newest_checkpoint(recipe: str, name: str) -> Path | None:
    """``<name>.ckpt`` of the newest run of ``recipe`` that has one."""
    runs = Path("runs") / recipe
    found = [(int(p.parts[-3].removeprefix("version_")), p) for p in runs.glob(f"version_*/checkpoints/{name}.ckpt")]
    return max(found)[1] if found else None
