"""Reproducing recipes: fit, test, hold against the claims, and tell of all of them in one report."""

import json
import os
import shlex
import sys
import textwrap
import traceback
from pathlib import Path

from zoo import recipes
from zoo.recipes import RecipeError
from zoo.running.command import RecipeCLI
from zoo.running.report import Run, hold_against, read_results, write_report
from zoo.running.starting import finish, hushed, is_for_the_user, name_of, naming_dead_workers, prepare


def reproduce(asked: list[str], overrides: list[str], out: Path | None = None, resume: bool = False) -> int:
    """Reproduce recipes one after the other; the report and its ``results.json`` are written anew after each.

    Of several recipes one that fails does not keep the others from being run; a single one raises its error.

    Args:
        asked: Recipes and lists of recipes.
        overrides: For each of them.
        out: Folder of the report. None is the run's own folder, for several recipes ``runs/<list>/version_<n>``.
        resume: Go on with the newest report of the same recipes (or that in ``out``): what it has is not run again.

    Returns:
        0 where every claim was met, else 1.

    Raises:
        RecipeError: A recipe or an override cannot be meant, or a recipe claims nothing. Nothing was started.
    """
    names = list(dict.fromkeys(member for name in asked for member in recipes.expand(name)))
    with hushed():
        for name in names[1:]:
            _prepare_with_claims(name, overrides)  # a mistake in the last one shall not cost the first one's training
    title = asked[0].removesuffix(".yaml") if len(asked) == 1 else "reproduce"
    folder = out or (_newest(Path("runs") / title) if resume else None)
    known = _finished(folder, overrides) if resume and folder else {}
    runs: list[Run] = []
    for place, name in enumerate(names, start=1):
        if name in known:
            print(f"{name} is in {folder}: not run again")
        runs.append(known[name] if name in known else _attempt(name, overrides, alone=len(names) == 1))
        if runs[-1].writes:
            # At once: what comes may fail, and the next one may take hours.
            for result in [] if runs[-1].error else runs[-1].results:
                print(f"{name}: {result.metric} {runs[-1].measured(result)}, claimed {result.claim}", flush=True)
            folder = folder or (runs[0].folder if len(names) == 1 else _new(Path("runs") / title))
            write_report(folder / "report.html", runs, title if len(names) > 1 else "", names[place:])
    if runs[-1].writes:
        _print_results(runs)
        print(f"report: {folder}/report.html")
    return 0 if all(run.met for run in runs) else 1


def _attempt(recipe: str, overrides: list[str], alone: bool) -> Run:
    """Reproduce one recipe; where others follow, a failure is told in its :class:`Run`."""
    cli, error = None, ""
    metrics: dict[str, float] = {}
    try:
        cli = _prepare_with_claims(recipe, overrides)
        with naming_dead_workers():
            metrics = _measure(cli)
    except Exception as problem:
        # Another process would wait for this one for ever.
        if alone or "LOCAL_RANK" in os.environ:
            raise
        said = str(problem) if is_for_the_user(problem) else f"{type(problem).__name__}: {problem}"
        error = textwrap.shorten(said, 900, placeholder=" …") or type(problem).__name__
        print(f"zoo: error: {recipe} failed: {error}", file=sys.stderr)
        if not is_for_the_user(problem) or os.environ.get("ZOO_TRACEBACK"):
            traceback.print_exception(problem)
    return _told(recipe, overrides, cli, metrics, error)


def _measure(cli: RecipeCLI) -> dict[str, float]:
    """Fit, test and predict a batch; the metrics of the first two."""
    trainer = finish(cli).trainer
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    # The weights at the end of training, as papers report them: under a schedule that ends at 0 they are better than
    # those that happened to be best on the validation split.
    trainer.test(cli.model, cli.datamodule, verbose=False)
    metrics |= {key: float(value) for key, value in trainer.callback_metrics.items()}
    trainer.limit_predict_batches = 1
    trainer.predict(cli.model, cli.datamodule, return_predictions=False)
    return metrics


def _told(recipe: str, overrides: list[str], cli: RecipeCLI | None, metrics: dict[str, float], error: str) -> Run:
    content = recipes.read(recipes.find(recipe))
    run = Run(
        recipe=recipe,
        architecture=str(content["model"]["class_path"]).rsplit(".", 1)[-1],
        command=_command(recipe, overrides),
        results=hold_against(recipe, cli.config["fit"]["expect"] if cli else content["expect"], metrics),
        folder=Path("runs") / name_of(recipe),
        training_seconds=0.0,
        parameters=0,
        error=error,
    )
    if cli is not None:
        run.architecture = type(cli.model).__name__
        run.folder = Path(cli.trainer.log_dir or ".")
        run.training_seconds = cli.timer.time_elapsed("train")
        run.parameters = sum(parameter.numel() for parameter in cli.model.parameters())
        for result in run.results:
            result.doubt = getattr(cli.model, "doubts", {}).get(result.metric, "")
        run.data_note = str(getattr(cli.datamodule, "note", ""))
        run.writes = cli.trainer.is_global_zero
    return run


def _prepare_with_claims(recipe: str, overrides: list[str]) -> RecipeCLI:
    cli = prepare("fit", recipe, overrides)
    if not cli.config["fit"]["expect"]:
        raise RecipeError(f"{recipe} has no `expect` to be held against: run it with zoo fit and zoo test")
    return cli


def _command(recipe: str, overrides: list[str]) -> str:
    return shlex.join(["zoo", "reproduce", recipe, *overrides])


def _finished(folder: Path, overrides: list[str]) -> dict[str, Run]:
    """The runs of an earlier report that need not be made again: same overrides, and nothing went wrong."""
    path = folder / "results.json"
    try:
        runs = read_results(path) if path.is_file() else []
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise RecipeError(f"{path} is no file of zoo reproduce ({error!r}): leave --resume out") from error
    return {run.recipe: run for run in runs if not run.error and run.command == _command(run.recipe, overrides)}


def _versions(parent: Path) -> list[int]:
    numbers = (path.name.removeprefix("version_") for path in parent.glob("version_*"))
    return sorted(int(number) for number in numbers if number.isdigit())


def _newest(parent: Path) -> Path | None:
    found = [parent / f"version_{n}" for n in _versions(parent)]
    return next((path for path in reversed(found) if (path / "results.json").is_file()), None)


def _new(parent: Path) -> Path:
    return parent / f"version_{max(_versions(parent), default=-1) + 1}"


def _print_results(runs: list[Run]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "metric", "claimed", "measured", "", box=None, header_style="bold")
    colors = {"met": "green", "missed": "red", "failed": "red"}
    for run in runs:
        for result in run.results:
            state = run.state_of(result)
            measured = run.measured(result)
            table.add_row(run.recipe, result.metric, result.claim, measured, f"[{colors[state]}]{state}[/]")
    Console().print(table)
