"""Search over keys of a recipe by what they give on the validation split: at random, on a grid, or with optuna's TPE.

Lecture 11, "Choosing hyperparameters": log-uniform ranges, and at random rather than on a grid (Bergstra and Bengio,
2012, https://jmlr.org/papers/v13/bergstra12a.html). The test split is not looked at.
"""

import csv
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from zoo.recipes import RecipeError
from zoo.running.nonfinite import NonFiniteLossError
from zoo.running.pictures import write_png
from zoo.running.starting import finish, hushed, name_of, prepare

if TYPE_CHECKING:
    import optuna
    from matplotlib.figure import Figure

    from zoo.running.command import RecipeCLI

Method = Literal["random", "grid", "tpe"]
Value = float | int | str
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"


@dataclass
class Span:
    """The values of one key: a range, or a choice where there are ``choices``."""

    key: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False  # numbers without a fraction
    choices: tuple[str, ...] = ()

    def points(self, count: int) -> list[Value]:
        """The choices, or ``count`` values from end to end of the range."""
        if self.choices:
            return list(self.choices)
        spaced = np.geomspace(self.low, self.high, count) if self.log else np.linspace(self.low, self.high, count)
        return list(dict.fromkeys(self.value(number) for number in spaced.tolist()))

    def value(self, number: float) -> Value:
        """A number as a recipe is given it: whole, or with four digits."""
        return round(number) if self.whole else float(f"{number:.4g}")

    def suggest(self, trial: "optuna.Trial") -> Value:
        """What a sampler wants to try."""
        if self.choices:
            return str(trial.suggest_categorical(self.key, self.choices))
        if self.whole:
            return trial.suggest_int(self.key, int(self.low), int(self.high), log=self.log)
        return self.value(trial.suggest_float(self.key, self.low, self.high, log=self.log))


@dataclass
class Row:
    """One trial: ``value`` is what it reached, None where it diverged."""

    trial: int
    seed: int | None
    values: dict[str, Value]
    value: float | None
    status: str
    seconds: float


@dataclass
class Search:
    """What is searched for, and what is known so far."""

    recipe: str
    overrides: list[str]
    spans: list[Span]
    folder: Path
    metric: str
    best_is_max: bool
    trials: int
    keep: bool
    rows: list[Row] = field(default_factory=list)

    @property
    def best(self) -> Row | None:
        """The best of the trials that came to their end."""
        known = [(row.value, -row.trial) for row in self.rows if row.value is not None]  # of equals the first
        if not known:
            return None
        _, trial = max(known) if self.best_is_max else min(known, key=lambda pair: (pair[0], -pair[1]))
        return self.rows[-trial]

    def run(self, values: dict[str, Value]) -> float:
        """One trial; the worst of all values where it diverges or its memory does not suffice."""
        number, begin = len(self.rows), time.monotonic()
        with ExitStack() as stack:
            scratch = "" if self.keep else stack.enter_context(tempfile.TemporaryDirectory(prefix="zoo-search-"))
            trial = (Path(scratch) if scratch else self.folder) / f"trial_{number}"
            stack.enter_context(hushed())
            cli = prepare("fit", self.recipe, [*self.overrides, *as_overrides(values)], trial, self.keep)
            status = "finished"
            try:
                finish(cli)
            except (NonFiniteLossError, torch.OutOfMemoryError) as error:
                status = "diverged" if isinstance(error, NonFiniteLossError) else "out of memory"
            value = self._measured(cli) if status == "finished" else None
        if value is not None and not math.isfinite(value):
            value, status = None, "diverged"
        seed = cli.config["fit"].get("seed_everything")
        self._note(Row(number, seed, values, value, status, time.monotonic() - begin))
        return value if value is not None else -math.inf if self.best_is_max else math.inf

    def _measured(self, cli: "RecipeCLI") -> float:
        metrics = cli.trainer.callback_metrics
        if self.metric not in metrics:
            known = sorted(name for name in metrics if name.startswith("val/"))
            raise RecipeError(f"{self.recipe} logs no {self.metric}: --metric is one of {', '.join(known) or 'none'}")
        return float(metrics[self.metric])

    def _note(self, row: Row) -> None:
        """Append a trial to ``search.csv``, at once: what is known is not lost."""
        self.rows.append(row)
        self.folder.mkdir(parents=True, exist_ok=True)
        columns: dict[str, Any] = {"trial": row.trial, "seed": row.seed} | row.values
        columns |= {self.metric: row.value, "status": row.status, "seconds": f"{row.seconds:.1f}"}
        with open(self.folder / "search.csv", "a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(columns)
            file.flush()
            os.fsync(file.fileno())
        result = row.status if row.value is None else f"{self.metric} {row.value:.4f}"
        tried = "  ".join(f"{_short(key)} {value}" for key, value in row.values.items())
        print(f"trial {row.trial + 1}/{self.trials}  {result}  {row.seconds:.1f} s  {tried}", flush=True)


def search(
    recipe: str,
    overrides: list[str],
    over: list[str],
    method: Method = "random",
    trials: int = 20,
    epochs: int | None = None,
    metric: str | None = None,
    keep: bool = False,
    out: Path | None = None,
) -> int:
    """Run trials one after the other; write ``search.csv`` and ``search.png``, print the best trial's overrides.

    A trial's value is the metric at the end of its training. All trials have the recipe's seed.

    Args:
        recipe: A name of ``zoo list``, or a YAML file.
        overrides: Keys of the recipe, for all trials.
        over: ``KEY=LOW..HIGH``, ``KEY=LOW..HIGH:log`` or ``KEY=A,B,C``.
        method: ``random``; ``grid``, which takes as many values of each range as ``trials`` allow; ``tpe``.
        trials: How many, at most.
        epochs: Of a trial; None leaves the recipe's.
        metric: A validation metric; None is what the model's best checkpoint is chosen by. What is called a loss or an
            error shall be small, anything else large.
        keep: Keep each trial's files and checkpoints below the folder.
        out: The folder; None is the next free ``runs/<recipe>/search_<n>``.

    Returns:
        0; 1 where every trial diverged, or a value was refused after others were tried; 130 after Ctrl+C and 143 after
        SIGTERM, with what was known till then.

    Raises:
        RecipeError: An argument cannot be meant, optuna is missing, or the recipe has no validation.
    """
    spans = _spans(over)
    try:
        import optuna
    except ImportError as error:
        raise RecipeError("zoo search needs optuna: pip install 'zoo[search]'") from error
    if any(override.split("=")[0] == "--ckpt_path" for override in overrides):
        raise RecipeError("every trial of zoo search starts anew: leave --ckpt_path out")
    count, trials = _grid(spans, trials) if method == "grid" else (0, trials)
    overrides = [*overrides, *(["--trainer.max_epochs", str(epochs)] if epochs else [])]
    cli = _prepare_all(recipe, overrides, spans, count)
    metric, best_is_max = _metric(cli, metric)
    folder = out or _next(Path("runs") / name_of(recipe))
    if (folder / "search.csv").exists():
        raise RecipeError(f"{folder} holds a search already: choose another --out")
    searched = Search(recipe, overrides, spans, folder, metric, best_is_max, trials, keep)
    seed = cli.config["fit"].get("seed_everything")
    sampler = _sampler(method, spans, count, seed if isinstance(seed, int) else 0)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize" if best_is_max else "minimize", sampler=sampler)

    def objective(trial: optuna.Trial) -> float:
        if method == "grid":
            points: dict[str, Any] = {s.key: trial.suggest_categorical(s.key, s.points(count)) for s in spans}
            return searched.run(points)
        return searched.run({s.key: s.suggest(trial) for s in spans})

    try:
        ended_by = _until_interrupted(lambda: study.optimize(objective, n_trials=trials))
    except RecipeError as error:
        if not searched.rows:
            raise
        print(f"zoo: error: {error}", file=sys.stderr)
        ended_by = 1
    return _tell(searched) or ended_by


def as_overrides(values: dict[str, Value]) -> list[str]:
    """Values of keys as the command line takes them."""
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def _spans(over: list[str]) -> list[Span]:
    spans = [_span(text) for text in over]
    keys = [span.key for span in spans]
    if len(set(keys)) < len(keys):
        raise RecipeError(f"--over has a key twice: {', '.join(keys)}")
    return spans


def _span(text: str) -> Span:
    key, sign, values = text.partition("=")
    key = key.lstrip("-")
    if not key or not sign:
        raise RecipeError(f"--over {text!r} is no KEY=LOW..HIGH, KEY=LOW..HIGH:log or KEY=A,B,C")
    if match := re.fullmatch(rf"({NUMBER})\.\.({NUMBER})(:log)?", values):
        low, high, log = float(match[1]), float(match[2]), match[3] is not None
        if not low < high or (log and low <= 0):
            raise RecipeError(f"--over {text!r}: LOW must be below HIGH{', and above 0 for :log' if log else ''}")
        whole = all(re.fullmatch(r"[+-]?\d+", number) for number in match.groups()[:2])
        return Span(key, low, high, log, whole)
    choices = tuple(dict.fromkeys(values.split(",")))
    if ".." in values or len(choices) < 2 or not all(choices):
        raise RecipeError(f"--over {text!r}: expected LOW..HIGH, LOW..HIGH:log, or two values or more, A,B")
    return Span(key, choices=choices)


def _grid(spans: list[Span], trials: int) -> tuple[int, int]:
    """How many values each range gets, and how many trials that makes."""

    def size(count: int) -> int:
        return math.prod(len(span.points(count)) for span in spans)

    if size(2) > trials:
        raise RecipeError(f"the coarsest grid over these keys has {size(2)} points: --trials {size(2)} at least")
    if all(span.choices for span in spans):
        return 2, size(2)
    count = 2
    while size(count + 1) <= trials and size(count + 1) > size(count):
        count += 1
    return count, size(count)


def _prepare_all(recipe: str, overrides: list[str], spans: list[Span], count: int) -> "RecipeCLI":
    """Build the recipe with every choice and both ends of every range: a mistake is found before the first trial."""
    points = [span.points(max(2, count)) for span in spans]
    ends = [values if span.choices else [values[0], values[-1]] for span, values in zip(spans, points, strict=True)]
    with hushed(), tempfile.TemporaryDirectory(prefix="zoo-search-") as folder:
        for place in range(max(map(len, ends))):
            values = {span.key: end[min(place, len(end) - 1)] for span, end in zip(spans, ends, strict=True)}
            cli = prepare("fit", recipe, [*overrides, *as_overrides(values)], Path(folder) / "trial")
    return cli


def _metric(cli: "RecipeCLI", asked: str | None) -> tuple[str, bool]:
    """The metric, and whether it should be large."""
    if getattr(cli.datamodule, "val_size", 1) == 0:
        raise RecipeError(f"zoo search needs validation, {cli.recipe} has none: set --data.init_args.val_size")
    if cli.trainer.limit_val_batches in (0, 0.0):
        raise RecipeError(f"zoo search needs validation, {cli.recipe} has none: set --trainer.limit_val_batches 1.0")
    own = getattr(cli.model, "monitor", None)
    metric = asked or own
    if metric is None:
        raise RecipeError(f"{type(cli.model).__name__} does not say which metric is its own: set --metric val/…")
    if not metric.startswith("val/"):
        raise RecipeError(f"--metric {metric} is not of the validation split, which a search chooses by: val/…")
    if metric == own:
        return metric, getattr(cli.model, "monitor_mode", "min") == "max"
    return metric, not re.search("loss|error", metric)


def _sampler(method: Method, spans: list[Span], count: int, seed: int) -> "optuna.samplers.BaseSampler":
    import optuna

    if method == "grid":
        return optuna.samplers.GridSampler({span.key: span.points(count) for span in spans}, seed=seed)
    return {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}[method](seed=seed)


def _until_interrupted(run: Any) -> int:
    """Run; 0, or the status that Ctrl+C and SIGTERM end a process with."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        run()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit as ended:  # Lightning answers Ctrl+C with the status 1, and lets no other through
        return 128 + signal.SIGINT if ended.code == 1 else int(ended.code or 0)
    finally:
        signal.signal(signal.SIGINT, handler)
    return 0


def _next(parent: Path) -> Path:
    numbers = (path.name.removeprefix("search_") for path in parent.glob("search_*"))
    return parent / f"search_{max((int(number) for number in numbers if number.isdigit()), default=-1) + 1}"


def _tell(searched: Search) -> int:
    """Draw the picture and print the best trial; 1 where there is none."""
    if not searched.rows:
        print("no trial came to its end")
        return 0
    write_png(search_figure(searched), searched.folder / "search.png")
    print(f"{len(searched.rows)} trials: {searched.folder}/search.csv, {searched.folder}/search.png")
    best = searched.best
    if best is None:
        print("every trial diverged: smaller learning rates, or trainer.gradient_clip_val, may help", file=sys.stderr)
        return 1
    print(f"best: trial {best.trial + 1}, {searched.metric} {best.value:.4f} (seed {best.seed}); use it with")
    print(f"  {shlex.join(as_overrides(best.values))}")
    return 0


def _short(key: str) -> str:
    return key.replace(".init_args", "").split(".", 1)[-1]


def search_figure(searched: Search) -> "Figure":
    """What each trial reached against each key, one panel a key; the best in red, what diverged as crosses below."""
    from matplotlib.figure import Figure

    rows, best, spans = searched.rows, searched.best, searched.spans
    known = [row.value for row in rows if row.value is not None] or [0.0]
    # Crosses have no value of their own: they stand below, or above, the worst.
    worst, span_of_values = (min(known) if searched.best_is_max else max(known)), max(known) - min(known) or 1.0
    lost = worst - 0.1 * span_of_values if searched.best_is_max else worst + 0.1 * span_of_values
    figure = Figure(figsize=(4.2 * len(spans) + 0.8, 3.8), layout="constrained")
    first = None
    for place, span in enumerate(spans, start=1):
        first = axes = figure.add_subplot(1, len(spans), place, sharey=first)
        where = span.choices.index if span.choices else float
        for row in rows:
            color = "crimson" if row is best else "grey" if row.value is None else "tab:blue"
            marker, height = ("x", lost) if row.value is None else ("o", row.value)
            axes.plot(where(row.values[span.key]), height, marker, color=color, zorder=3 if row is best else 2)
        if span.choices:
            axes.set_xticks(range(len(span.choices)), span.choices)
            axes.set_xlim(-0.5, len(span.choices) - 0.5)
        elif span.log:
            axes.set_xscale("log")
        axes.set_xlabel(_short(span.key))
        axes.set_ylabel(searched.metric if place == 1 else "")
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"{searched.recipe}: {len(rows)} trials" + (f", best {best.value:.4f}" if best else ""), fontsize=11
    )
    return figure
