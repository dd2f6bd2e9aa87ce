"""A recipe and overrides become a run: names and checkpoints are looked up before Lightning is imported."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from zoo import recipes
from zoo.recipes import RecipeError

if TYPE_CHECKING:
    from zoo.running.command import RecipeCLI

SHARED_MEMORY_SHORT = (
    "a worker that reads the data found no room in the shared memory (/dev/shm) that it hands batches over in: read in "
    "the run's own process (--data.init_args.workers 0), or make it larger (docker run --shm-size 8g …)"
)
WORKER_KILLED = (
    "a worker that reads the data was killed, most likely because the memory ran out: take fewer workers "
    "(--data.init_args.workers 1, or 0 for none), a smaller batch or a machine with more memory ({})"
)
WEIGHTS = (".ckpt", ".safetensors")  # files that zoo.load reads


def is_for_the_user(error: Exception) -> bool:
    """Whether the message says what to do; anything else is a bug and keeps its traceback."""
    names = {"NonFiniteLossError", "MisconfigurationException"}
    return isinstance(error, OSError | ValueError | ImportError) or type(error).__name__ in names


@contextmanager
def naming_dead_workers() -> Iterator[None]:
    """Say in a line why a worker of a data loader is dead, which PyTorch tells at any time and in a traceback.

    Raises:
        ChildProcessError: In place of PyTorch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if (line := _death_of_worker(error)) is None:
            raise
        raise ChildProcessError(line) from error


def _death_of_worker(error: BaseException | None) -> str | None:
    """What to say of it, of an error or of what that came from; None of another error."""
    said = []
    while error is not None:
        said.append(str(error))
        error = error.__cause__ or error.__context__
    if any("unable to allocate shared memory" in text or "out of shared memory" in text for text in said):
        return SHARED_MEMORY_SHORT
    killed = [text for text in said if "DataLoader worker" in text and "killed by signal" in text]
    gone = [text for text in said if "DataLoader worker" in text and "exited unexpectedly" in text]
    return WORKER_KILLED.format((killed or gone)[0].strip(". ")) if killed or gone else None


def finish(cli: "RecipeCLI") -> "RecipeCLI":
    """Run what was prepared; SIGTERM and Ctrl+C end the process with their usual status."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    try:
        with naming_dead_workers():
            cli.run()
    except SIGTERMException:
        sys.exit(128 + cli.asked_to_stop_by())
    return cli


def prepare(
    command: str,
    recipe: str,
    overrides: list[str],
    trial: Path | None = None,
    keep: bool = False,
    untrained: bool = False,
) -> "RecipeCLI":
    """Model, data and trainer of a recipe; a mistake in the recipe or the overrides is found here.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        recipe: A name of ``zoo list``, or a YAML file.
        overrides: ``--key value`` as LightningCLI takes them, and overlays by their name.
        trial: Folder of a trial, as :class:`zoo.running.command.RecipeCLI` has it; None for a run.
        keep: Whether a trial writes checkpoints.
        untrained: Whether ``test`` may use a network without weights.

    Raises:
        RecipeError: Something that was asked for cannot be meant.
    """
    path = recipes.find(recipe)
    recipes.read(path)  # its own error for broken YAML
    name = name_of(recipe)
    overrides = with_overlays(overrides)
    from zoo.running.command import RecipeCLI

    quieten()
    arguments = [command, "--config", str(path), *_resolve_checkpoint(command, name, overrides)]
    return RecipeCLI(arguments, name, trial, keep, untrained)


def name_of(recipe: str) -> str:
    """What a recipe is called in ``runs/`` and in checkpoints: its name, or its file's without the suffix."""
    path = recipes.find(recipe)
    return recipe if path.is_relative_to(recipes.FOLDER) and not recipe.endswith(".yaml") else path.stem


@contextmanager
def hushed() -> Iterator[None]:
    """Keep Lightning's information (seed, devices) to itself, in commands that start it many times."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


def quieten() -> None:
    """Leave out Lightning's advertising and warnings that tell a user of a recipe nothing to do."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)
    # One process without worker processes is the fast way for data in memory; the loggers are chosen by the recipe.
    for message in (".*does not have many workers.*", ".*isinstance.treespec, LeafSpec.*",
                    ".*multiple `ModelCheckpoint`.*", ".*have no `val_dataloader`.*",
                    ".*Checkpoint directory .* exists and is not empty.*",
                    ".*Detected pickle protocol.*"):  # fmt: skip
        warnings.filterwarnings("ignore", message)


def with_overlays(overrides: list[str]) -> list[str]:
    """Overrides in which ``--config wandb`` means the overlay of that name, unless there is such a file."""
    resolved = _apart("--config", ["--config" if override == "-c" else override for override in overrides])
    for place, argument in enumerate(resolved[:-1]):
        if argument == "--config":
            path = recipes.find(resolved[place + 1], recipes.OVERLAYS)
            recipes.read(path)  # its own error for broken YAML
            resolved[place + 1] = str(path)
    return resolved


def _apart(option: str, overrides: list[str]) -> list[str]:
    """``option=value`` as two arguments, as all others are."""
    return [part for o in overrides for part in (o.split("=", 1) if o.startswith(f"{option}=") else [o])]


def _resolve_checkpoint(command: str, recipe: str, overrides: list[str]) -> list[str]:
    """``--ckpt_path best`` and ``last`` mean those of the recipe's newest run that has one."""
    from zoo.running.command import newest_checkpoint

    overrides = _apart("--ckpt_path", overrides)
    if "--ckpt_path" not in overrides[:-1]:
        return overrides
    place = overrides.index("--ckpt_path") + 1
    asked = overrides[place]
    if asked not in ("best", "last") and "://" not in asked and not Path(asked).is_file():
        raise RecipeError(f"there is no checkpoint {asked!r}: --ckpt_path expects a file, best or last")
    if asked in ("best", "last"):
        found = newest_checkpoint(recipe, asked)
        if found is None and command == "fit":
            print(f"no {asked}.ckpt under runs/{recipe} yet: training starts from the beginning")
            return overrides[: place - 1] + overrides[place + 1 :]
        if found is None and asked == "best" and newest_checkpoint(recipe, "last") is not None:
            raise RecipeError(
                f"no run under runs/{recipe} has a best.ckpt: none came to a validation whose metric is a number "
                "(trainer.check_val_every_n_epoch). --ckpt_path last takes the weights at the end"
            )
        if found is None:
            raise RecipeError(f"there is no run with a {asked}.ckpt under runs/{recipe}: run `zoo fit {recipe}` first")
        overrides[place] = str(found)
    return overrides
