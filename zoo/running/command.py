"""LightningCLI for recipes: what a run gets besides its recipe, and where in it a mistake was made."""

import inspect
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, cast

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar, Timer, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from zoo import recipes
from zoo.recipes import RecipeError, refusing
from zoo.running.checking_data import LookAtSamples
from zoo.running.checkpoint import KeepLast, SafeCheckpointIO, checkpoint_callbacks, read_checkpoint
from zoo.running.ending import EndTogether
from zoo.running.log import Log
from zoo.running.nonfinite import StopOnNonFiniteLoss
from zoo.running.optimizing import EffectiveBatch, LinearScaling
from zoo.running.parser import NO_VALUE, RecipeParser, reason
from zoo.running.predictions import WritePredictions
from zoo.running.profiling import NoProfiler
from zoo.running.progress import EpochLines
from zoo.running.provenance import Provenance
from zoo.running.resume import ExactResume, Other
from zoo.running.tolerance import ReportsMayFail
from zoo.running.views import TestTimeAugmentation
from zoo.weights import NOT_SAVED, compare_arguments, read_weights

# told by the data
LINKED = ("num_classes", "class_names", "words", "observation_shape", "num_actions", "discount", "updates_per_step")


class RecipeCLI(LightningCLI):
    """One subcommand of a recipe, ready to :meth:`run`, with everything that every run of the zoo gets.

    That is: a CSV logger under ``runs/<recipe>``, ``best.ckpt`` and ``last.ckpt`` written safely, exact resuming, a
    stop at the first loss that is no number, a progress bar on a terminal and a line per epoch elsewhere, and
    predictions as files. What the recipe configures itself is left as it is.

    Args:
        args: ``[subcommand, "--config", path, …]``.
        recipe: Name of the recipe; runs are kept below it and checkpoints remember it.
        trial: Folder of a trial (``zoo check``, ``find_lr``, ``search``), which runs on one device, logs there and
            nowhere else, and prints no line per epoch. None is a run.
        keep: Whether a trial writes checkpoints as a run does.
        untrained: Whether ``test`` may use a network without weights: others will speak for it.
    """

    def __init__(
        self, args: list[str], recipe: str, trial: Path | None = None, keep: bool = False, untrained: bool = False
    ) -> None:
        self.recipe = recipe
        self.trial = trial
        self.keep = keep or trial is None
        self.untrained = untrained
        self.timer = Timer()
        self.asked = args[0]
        self.trained_classes: int | None = None  # of the checkpoint that is resumed or evaluated
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": "zoo", "allow_abbrev": False, args[0]: {"allow_abbrev": False}},
            parser_class=RecipeParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            args=args,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that is asked for: a parser for each takes most of the time before a run."""
        return {self.asked: super().subcommands()[self.asked]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``expect``, ``linear_scaling``, …; tell the model the classes of the data."""
        # Of a value of any type jsonargparse would take a text with a colon for a mapping.
        parser.add_argument(
            "--expect", type=list[dict[str, float | str]], default=[], help="What the recipe should give."
        )
        parser.add_argument(
            "--linear_scaling",
            type=bool,
            default=False,
            help="k processes: k times the batch and the learning rate, after a warm-up over 5,000 steps.",
        )
        parser.add_argument(
            "--test_time_augmentation",
            type=Literal["flip", "flip_shift"] | None,
            default=None,
            help="Average the probabilities over views of each image in test and predict: 2 (flip) or 6 (flip_shift).",
        )
        parser.add_argument(
            "--resume_with_other",
            type=Other | list[Other] | None,
            default=None,
            help="With --ckpt_path: data_set, split, batch_size, classes, or a list of them, may be another one.",
        )
        for fact in LINKED:
            parser.link_arguments(f"data.{fact}", f"model.init_args.{fact}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; say where what is wrong was set; refuse what the data decides, which jsonargparse silently drops."""
        files = [Path(value) for option, value in pairwise(args) if option == "--config"]
        options = [_short(option) for option in args if option.startswith("--")]
        keys = _class_keys(files)
        for each in (parser, *self._subcommand_parsers.values()):
            cast(RecipeParser, each).of_classes = keys
        try:
            for fact in LINKED:
                if f"model.{fact}" in options or any(recipes.sets(path, f"model.{fact}") for path in files):
                    raise RecipeError(
                        f"‹model.init_args.{fact}› comes from the data: set it there, or choose another data module"
                    )
            self.config = parser.parse_args(args)
            _check_values(self.config[self.config["subcommand"]])
        except RecipeError as error:
            match = re.fullmatch(r"‹(.*?)› (.*)", str(error))
            if match is None:
                raise
            key = _short(match[1])
            typed = any(key == o.removesuffix(".class_path") or key.startswith(f"{o}.") for o in options)
            where = "--" if typed or not files else f"{recipes.place(files, key)}: "
            raise RecipeError(f"{where}{match[1]} {match[2]}") from None

    def _parse_ckpt_path(self) -> None:
        """Build the model that the checkpoint was written by, also if plain Python wrote it.

        ``--ckpt_path`` resumes or evaluates: a checkpoint's own arguments win, and what they override is said.
        """
        subcommand = str(self.config.get("subcommand"))
        path = self.config[subcommand].get("ckpt_path")
        weights = self.config[subcommand].model.get("init_args.weights")
        if subcommand != "fit" and weights and Path(str(weights)).is_file():
            with refusing():
                header = read_weights(weights)[1]
            self._keep_words(_stored_arguments(weights, header).get("words") if "arguments" in header else None)
        trained = path or self.config[subcommand].model.get("init_args.weights") or self.untrained
        if subcommand != "fit" and not trained:
            raise RecipeError(
                f"zoo {subcommand} {self.recipe} would use a network that has learnt nothing: add --ckpt_path best "
                "(the newest run's), --ckpt_path FILE or --model.init_args.weights FILE"
            )
        if not path or "://" in path:
            return
        with refusing():
            content = read_checkpoint(path)
        rank_zero_info(f"--ckpt_path: {path}, step {content.get('global_step')}")
        described = content.get("zoo")
        asked = self.config[subcommand].model
        if not described and not asked.class_path.startswith("zoo."):
            return  # somebody else's module, which is built as its recipe says
        if not described:
            raise RecipeError(f"{path} holds no model of the zoo: start from it with --model.init_args.weights {path}")
        stored = _stored_arguments(path, described)
        self.trained_classes = stored.get("num_classes")
        self._keep_words(stored.get("words"))
        if asked.class_path.rsplit(".", 1)[-1] != described["class_path"].rsplit(".", 1)[-1]:
            raise RecipeError(f"{path} holds a {described['class_path']}, the recipe says {asked.class_path}")
        module, name = asked.class_path.rsplit(".", 1)
        try:
            architecture = getattr(import_module(module), name)
            compare_arguments(path, architecture, stored, vars(asked.init_args), LINKED)
        except ValueError as error:
            raise RecipeError(f"{path} does not fit {asked.class_path}: {error}") from error
        for key, value in stored.items():
            if key in LINKED:
                continue
            before = asked.init_args.get(key)
            if before != value:
                rank_zero_info(f"{key}: {value} from {path} ({before} was asked; --ckpt_path keeps its own)")
            asked.init_args[key] = value
        for key in ("weights", "backbone_weights"):  # all of them are in the checkpoint
            if key in asked.init_args:
                asked.init_args[key] = None

    def _keep_words(self, words: list[str] | None) -> None:
        """A trained model's vocabulary goes to data that can take one: its tokens must mean the same words."""
        data = self.config[str(self.config.get("subcommand"))].get("data")
        if words is not None and data is not None and "words" in data.get("init_args", {}):
            data.init_args["words"] = words

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; what they refuse is a wrong recipe."""
        try:
            with refusing():
                super().instantiate_classes()
        except RecipeError as error:
            raise RecipeError(reason(str(error))) from error
        before, now = self.trained_classes, getattr(self.datamodule, "num_classes", None)
        if before is not None and now is not None and before != now:
            raise RecipeError(
                f"--ckpt_path: the checkpoint knows {before} classes, {type(self.datamodule).__name__} has {now}. To "
                "train for other classes start from its weights: --model.init_args.weights FILE"
            )
        for name, made in list(vars(self.model).items()):
            if isinstance(made, partial):
                setattr(self.model, name, _apart_from_the_command(made))

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing: :meth:`run` does it."""

    def run(self) -> None:
        """Fit, validate, test or predict.

        Raises:
            RecipeError: The model or the data refused before the first batch. The run's empty folder is removed.
        """
        try:
            super()._run_subcommand(str(self.subcommand))
        except Exception:
            folder = Path(getattr(self.trainer.logger, "log_dir", None) or os.devnull)
            written = list(folder.glob("*"))
            # Lightning validates two batches before it trains: that is no start of a fit.
            stages = {"fit": ["train"]}.get(str(self.subcommand), ["validate", "test"])
            started = any(self.timer.start_time(stage) is not None for stage in stages)
            if started or any(path.name not in ("config.yaml", "hparams.yaml") for path in written):
                raise
            if self.trainer.is_global_zero and folder.is_dir():
                for path in written:
                    path.unlink()
                os.removedirs(folder)  # with what is empty above it
            with refusing():
                raise

    def asked_to_stop_by(self) -> int:
        """The signal that ended the run."""
        keepers = [c for c in self.trainer.callbacks if isinstance(c, KeepLast)]  # type: ignore[attr-defined]
        return next((keeper.asked_by for keeper in keepers if keeper.asked_by), signal.SIGTERM)

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
        if self.trial is not None:
            alone = {"default_root_dir": str(self.trial), "devices": 1, "num_nodes": 1, "strategy": "auto"}
            for key, value in alone.items():
                config[key] = value
        if not self.keep:
            config["enable_checkpointing"] = False
            given = [callback for callback in given if not isinstance(callback, Checkpoint)]
        config["logger"] = self._loggers(config.get("logger"))
        config["profiler"] = config.get("profiler") or NoProfiler()
        config["callbacks"] = [*given, *(c for c in self._callbacks(config) if not _configured(c, given))]
        try:
            with refusing():
                trainer = super().instantiate_trainer(**kwargs)
        except (RecipeError, TypeError) as error:
            hardware = f"accelerator {config.get('accelerator')}, devices {config.get('devices')}"
            raise RecipeError(f"trainer ({hardware}): {error}") from error
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EndTogether):
                callback.from_the_start(trainer)
        return trainer

    def _loggers(self, given: Any) -> Any:
        """The recipe's loggers behind the CSV log that every run keeps, unless logging is switched off."""
        if self.trial is not None:
            return CSVLogger(self.trial.parent, name="", version=self.trial.name)
        if given is False:
            return False
        loggers = [] if given in (None, True) else given if isinstance(given, list) else [given]
        if any(isinstance(logger, CSVLogger) for logger in loggers):
            return loggers
        return [Log("runs", name=self.recipe), *loggers]

    def _callbacks(self, config: dict[str, Any]) -> list[Callback]:
        callbacks: list[Callback] = [StopOnNonFiniteLoss(), self.timer]
        if self.keep:
            other = self._get(self.config_init, "resume_with_other") or []
            allowed: list[Other] = [cast(Other, other)] if isinstance(other, str) else other
            callbacks = [ExactResume(allowed), *callbacks, Provenance(self.recipe), WritePredictions()]
        if self.trial is None:
            callbacks = [EndTogether(), ReportsMayFail(), *callbacks, EffectiveBatch(), LookAtSamples(), EpochLines()]
        if kind := self._get(self.config_init, "test_time_augmentation"):
            callbacks.append(TestTimeAugmentation(kind))
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


def _apart_from_the_command(made: Callable) -> Callable:
    """A function around an optimizer's or schedule's maker, which refers to parser, trainer and data.

    Whoever copies the model, as averages of weights do, would copy them all, or fail; functions are not copied.
    """
    return lambda *arguments: made(*arguments)


def _stored_arguments(path: str | Path, described: Any) -> dict[str, Any]:
    """The constructor's arguments that a file has: values that cannot name a class, whose module would be imported.

    Raises:
        RecipeError: The file has something else there.
    """
    arguments = described.get("arguments") if isinstance(described, dict) else None
    if not isinstance(arguments, dict) or not isinstance(described.get("class_path"), str):
        raise RecipeError(f"{path} does not say which class of the zoo it is, and with which arguments: it is damaged")
    kept = {key: value for key, value in arguments.items() if key not in NOT_SAVED}
    for key, value in kept.items():
        if not isinstance(key, str) or not _is_harmless(value):
            raise RecipeError(f"{path} is refused: its argument {key!r} is no number or text, or list of these")
    return kept


def _is_harmless(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_harmless(each) for each in value)
    return value is None or isinstance(value, bool | int | float | str)


def _short(option: str) -> str:
    """``--model.init_args.weights=file`` as ``model.weights``."""
    return option.split("=")[0].lstrip("-").rstrip("+").replace(".init_args", "")


def _class_keys(files: list[Path]) -> tuple[str, ...]:
    """The keys of the model and the data that the recipe names: ``model.init_args.image_size``, ….

    Empty for classes that cannot be imported, which is reported where they are parsed.
    """
    keys = []
    for part in ("model", "data"):
        with suppress(Exception):
            module, name = recipes.read(files[0])[part]["class_path"].rsplit(".", 1)
            parameters = inspect.signature(getattr(import_module(module), name)).parameters
            keys += [f"{part}.init_args.{parameter}" for parameter in parameters if parameter not in LINKED]
    return tuple(keys)


def _check_values(config: Any) -> None:
    """What the types let pass.

    Raises:
        RecipeError: A claim of ``expect`` is incomplete, or ``trainer`` is no mapping.
    """
    for claim in config["expect"]:
        if problem := recipes.wrong_claim(claim):
            raise RecipeError(f"‹expect› {problem}")
    if isinstance(config.get("trainer"), int | float | str | list):
        raise RecipeError(f"‹trainer› {NO_VALUE}")


def _configured(callback: Callback, given: list[Callback]) -> bool:
    """Whether the recipe has such a callback of its own; of ModelCheckpoint one may have several."""
    if isinstance(callback, ModelCheckpoint):
        return any(isinstance(g, ModelCheckpoint) and g.filename == callback.filename for g in given)
    if isinstance(callback, ProgressBar):
        return any(isinstance(g, ProgressBar) for g in given)
    return any(type(g) is type(callback) for g in given)


def newest_checkpoint(recipe: str, name: str) -> Path | None:
    """``best.ckpt`` or ``last.ckpt`` of the newest run of ``recipe`` that has one.

    The last is the one with the most steps inside: where the disk was full for ``last.ckpt``, that may be another file
    of the run. A file that cannot be read, or that holds the weights alone, is none.
    """
    pattern = "version_*/checkpoints/[!.]*.ckpt" if name == "last" else f"version_*/checkpoints/{name}.ckpt"
    # Not version_3_backup, which somebody has made.
    numbered = ((re.fullmatch(r"version_(\d+)", p.parts[-3]), p) for p in (Path("runs") / recipe).glob(pattern))
    found = [(int(number[1]), p) for number, p in numbered if number is not None]
    if not found:
        return None
    files = [path for run, path in found if run == max(found)[0]]
    if name != "last" or len(files) == 1:
        return files[0]
    return max(files, key=lambda path: (_steps_inside(path), path.name == "last.ckpt"))


def _steps_inside(path: Path) -> int:
    """The step that a checkpoint was written at; -1 where training cannot go on from it."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return int(content["global_step"]) if "loops" in content else -1
    except (
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        KeyError,
        UnpicklingError,
    ) as error:  # cut off, or no checkpoint
        rank_zero_warn(f"{path} cannot be read: {error}")
        return -1
