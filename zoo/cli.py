"""The ``zoo`` command. What needs no training answers without importing Lightning, which costs seconds."""

import argparse
import json
import os
import shlex
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import zoo
from zoo import recipes
from zoo.recipes import RecipeError, refusing, suggest

if TYPE_CHECKING:
    from zoo.running.command import RecipeCLI
    from zoo.running.report import Result, Run

USAGE = f"""zoo {zoo.__version__}: architectures of a computer-vision course as LightningModules, with data and recipes

usage: zoo COMMAND …

  zoo list [--json]                          the recipes: what they claim and what was measured
  zoo show ARCHITECTURE [--input CxHxW]      what each layer costs, in the lecture's terms
  zoo reproduce RECIPE… [--out DIR]          fit, test, hold against the claim, write a report; status 1 on a miss
  zoo fit RECIPE [overrides]                 train; RECIPE is a name of `zoo list` or a YAML file
  zoo validate|test|predict RECIPE --ckpt_path FILE|best|last [overrides]
  zoo export CHECKPOINT --format safetensors|onnx|pt2 [--out FILE]

An override is any key of the recipe: --trainer.max_epochs 3 --data.init_args.root my/data --seed_everything 1.
A second --config FILE (or the name of an overlay: tensorboard, wandb, wandb_offline, ddp2) is laid over the recipe.
`zoo fit --help` lists every key; ZOO_TRACEBACK=1 shows where an error came from.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the ``zoo`` command.

    Args:
        arguments: What follows ``zoo``; None takes the process's.

    Returns:
        The exit status: 0; 1 for a missed claim or a run that failed; 2 for a wrong command or recipe, found before the
        first batch, which leaves nothing behind.

    Raises:
        SystemExit: After LightningCLI's ``--help`` and ``--print_config`` (0) and after SIGTERM (143).
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if arguments[0] == "--version":
        print(f"zoo {zoo.__version__}")
        return 0
    try:
        if arguments[0] not in COMMANDS:
            raise RecipeError(f"there is no command {arguments[0]!r}{suggest(arguments[0], COMMANDS)}")
        return COMMANDS[arguments[0]](arguments)
    except _HelpWasShown:
        return 0
    except Exception as error:
        if os.environ.get("ZOO_TRACEBACK") or not _is_for_the_user(error):
            raise
        return _fail(str(error), 2 if isinstance(error, RecipeError) else 1)


def _is_for_the_user(error: Exception) -> bool:
    """Whether the message says what to do; anything else is a bug and keeps its traceback."""
    names = {"NonFiniteLossError", "MisconfigurationException"}
    return isinstance(error, OSError | ValueError | ImportError) or type(error).__name__ in names


def _fail(message: str, status: int) -> int:
    rank = os.environ.get("LOCAL_RANK", "0")
    where = f" (process {rank})" if rank != "0" else ""
    print(f"zoo: error{where}: {textwrap.shorten(message, 900, placeholder=' …')}", file=sys.stderr)
    return status


class _HelpWasShown(Exception):  # noqa: N818 (no error)
    pass


class _Parser(argparse.ArgumentParser):
    """argparse for one command: an error is one line, and nothing ends the process."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(f"zoo {command}", description=description, allow_abbrev=False)

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        """Parse; look for misspelt options first, else argparse reports the right one as missing."""
        known = [option for option in self._option_string_actions if option.startswith("--")]
        for option in (argument.split("=")[0] for argument in arguments if argument.startswith("--")):
            if option not in known:
                self.error(f"there is no option {option}{suggest(option, known)}")
        return self.parse_args(arguments)

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong in place of usage and exit."""
        raise RecipeError(f"{self.prog}: {message}")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """End after ``--help``."""
        raise _HelpWasShown


def _list(arguments: list[str]) -> int:
    parser = _Parser("list", "The recipes, what they claim and what was measured.")
    parser.add_argument("--json", action="store_true", help="for programs")
    rows = recipes.table()
    if parser.parse(arguments[1:]).json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return 0
    from rich.console import Console
    from rich.table import Table

    columns = ("name", "architecture", "task", "data", "metric", "claimed", "measured", "cost", "source")
    table = Table(*columns, box=None, header_style="bold", padding=(0, 1))
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    # Into a pipe or a file every row is one line; a terminal wraps cells.
    Console(width=None if sys.stdout.isatty() else 400).print(table)
    return 0


def _show(arguments: list[str]) -> int:
    parser = _Parser("show", "What each layer of an architecture costs.")
    parser.add_argument("architecture", help="as in `zoo list`, for example lenet; its own arguments may follow")
    parser.add_argument("--input", type=_size, help="size of the input, CxHxW")
    chosen, rest = parser.parse_known_args(arguments[1:])
    name = _architecture(chosen.architecture)
    import torch
    from rich.console import Console
    from rich.table import Table

    from zoo.layer_table import layer_table

    with refusing(), torch.device("meta"):
        model = getattr(zoo, name)(**_constructor_arguments(name, rest))
    size = chosen.input or model.example_input_array.shape[1:]
    try:
        rows = layer_table(model, torch.zeros(1, *size, device="meta"))
    except RuntimeError as error:
        arguments_of = ", ".join(_parameters(name))
        shape = "x".join(map(str, size))
        raise RecipeError(f"{name} does not take {shape} ({error}); its arguments are {arguments_of}") from error
    table = Table("layer", "kind", "output", "memory (KB)", "parameters", "MFLOP", box=None, header_style="bold")
    for column in table.columns[3:]:
        column.justify = "right"
    for row in rows:
        table.add_row(
            row.name,
            row.kind,
            " x ".join(map(str, row.output)),
            f"{row.memory_kb:.2f}",
            f"{row.parameters:,}",
            f"{row.multiply_adds / 1e6:.3f}" if row.multiply_adds else "-",
        )
    total = sum(r.memory_kb for r in rows), sum(r.parameters for r in rows), sum(r.multiply_adds for r in rows)
    table.add_section()
    table.add_row("total", "", "", f"{total[0]:.2f}", f"{total[1]:,}", f"{total[2] / 1e6:.3f}", style="bold")
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    print("Memory is the layer's output in float32 for one image; a multiply-add is one operation, as in the lecture.")
    return 0


def _size(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected channels x height x width like 3x224x224, not {text!r}") from None


def _architecture(name: str) -> str:
    """The class of ``lenet``, ``LeNet`` or ``zoo.LeNet``."""
    known = {module.removeprefix("zoo."): architecture for architecture, module in zoo.ARCHITECTURES.items()}
    known |= {architecture.lower(): architecture for architecture in zoo.ARCHITECTURES}
    asked = name.removeprefix("zoo.").lower()
    if asked not in known:
        raise RecipeError(f"there is no architecture {name!r}{suggest(asked, sorted(known), alike=0.4)}")
    return known[asked]


def _parameters(name: str) -> dict[str, Any]:
    """The arguments of an architecture that shape it, with their defaults."""
    import inspect

    hidden = ("optimizer", "scheduler", "weights", "keep_matching_classes")
    parameters = inspect.signature(getattr(zoo, name)).parameters
    return {key: parameter.default for key, parameter in parameters.items() if key not in hidden}


def _constructor_arguments(name: str, rest: list[str]) -> dict[str, Any]:
    """``--in_channels 3 --image_size 32`` as arguments of the architecture's constructor."""
    import yaml

    parser = _Parser(f"show {name.lower()}", "")
    for key, default in _parameters(name).items():
        kind = type(default) if type(default) in (int, float, str) else yaml.safe_load
        parser.add_argument(f"--{key}", type=kind, default=argparse.SUPPRESS)
    parser.add_argument("--input", default=argparse.SUPPRESS)  # for suggestions: it was taken before
    return vars(parser.parse(rest))


def _run(arguments: list[str]) -> int:
    """``fit``, ``validate``, ``test`` and ``predict``."""
    command, *rest = arguments
    if any(argument in ("-h", "--help") for argument in rest):
        from zoo.running.command import RecipeCLI

        RecipeCLI([command, "--help"], "")  # prints and exits
    if not rest or rest[0].startswith("-"):
        raise RecipeError(f"zoo {command} needs a recipe first: one of {', '.join(recipes.names())}, or a YAML file")
    cli = _start(command, rest[0], rest[1:])
    folder = cli.trainer.log_dir  # asked by every process: they agree on it together
    if cli.trainer.is_global_zero and folder and not cli.trainer.fast_dev_run:  # type: ignore[attr-defined]
        print(f"files of this run: {folder}")
    return 0


def _start(command: str, recipe: str, overrides: list[str]) -> "RecipeCLI":
    """Run one subcommand of a recipe."""
    return _finish(_prepare(command, recipe, overrides))


def _finish(cli: "RecipeCLI") -> "RecipeCLI":
    """Run what was prepared; SIGTERM and Ctrl+C end the process with their usual status."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    try:
        cli.run()
    except SIGTERMException:
        sys.exit(128 + cli.asked_to_stop_by())
    return cli


def _prepare(command: str, recipe: str, overrides: list[str]) -> "RecipeCLI":
    """Model, data and trainer of a recipe; a mistake in the recipe or the overrides is found here."""
    path = recipes.find(recipe)
    recipes.read(path)  # its own error for broken YAML
    name = recipe if path.is_relative_to(recipes.FOLDER) and not recipe.endswith(".yaml") else path.stem
    overrides = _overlays(overrides)
    from zoo.running.command import RecipeCLI

    _quieten()
    return RecipeCLI([command, "--config", str(path), *_resolve_checkpoint(command, name, overrides)], name)


def _quieten() -> None:
    """Leave out Lightning's advertising and warnings that tell a user of a recipe nothing to do."""
    import logging
    import warnings

    class NoTips(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            return "Tip:" not in record.getMessage()

    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(NoTips())
    # One process without worker processes is the fast way for data in memory; the loggers are chosen by the recipe.
    for message in (".*does not have many workers.*", ".*isinstance.treespec, LeafSpec.*",
                    ".*multiple `ModelCheckpoint`.*",
                    ".*Checkpoint directory .* exists and is not empty.*",
                    ".*Detected pickle protocol.*"):  # fmt: skip
        warnings.filterwarnings("ignore", message)


def _overlays(overrides: list[str]) -> list[str]:
    """``--config wandb`` means the overlay of that name, unless there is such a file."""
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
        if found is None:
            raise RecipeError(f"there is no run with a {asked}.ckpt under runs/{recipe}: run `zoo fit {recipe}` first")
        overrides[place] = str(found)
    return overrides


def _reproduce(arguments: list[str]) -> int:
    parser = _Parser("reproduce", "Fit, test, hold against the claim, write a report. Status 1 on a miss.")
    parser.add_argument("recipes", nargs="+", metavar="RECIPE")
    parser.add_argument("--out", type=Path, help="folder of the report; by default that of the (last) run")
    split = next((i for i, a in enumerate(arguments[1:], 1) if a.startswith("--") and a not in ("--out", "--help")),
                 len(arguments))  # fmt: skip
    chosen, overrides = parser.parse(arguments[1:split]), arguments[split:]
    if "--out" in overrides:
        parser.error("--out comes before the overrides")
    for name in chosen.recipes[1:]:
        _prepare_with_claims(name, overrides)  # a mistake in the last one shall not cost the first one's training
    runs = [_reproduce_one(name, overrides) for name in chosen.recipes]
    results = [result for run in runs for result in run.results]
    if runs[-1].writes:
        from zoo.running.report import write_report

        path = (chosen.out or runs[-1].folder) / "report.html"
        write_report(path, runs)
        _print_results(results)
        print(f"report: {path}")
    return 0 if all(result.met for result in results) else 1


def _prepare_with_claims(recipe: str, overrides: list[str]) -> "RecipeCLI":
    cli = _prepare("fit", recipe, overrides)
    if not cli.config["fit"]["expect"]:
        raise RecipeError(f"{recipe} has no `expect` to be held against: run it with zoo fit and zoo test")
    return cli


def _reproduce_one(recipe: str, overrides: list[str]) -> "Run":
    cli = _finish(_prepare_with_claims(recipe, overrides))
    from zoo.running.report import Run, hold_against

    trainer = cli.trainer
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    seconds = cli.timer.time_elapsed("train")
    # The weights at the end of training, as papers report them: under a schedule that ends at 0 they are better than
    # those that happened to be best on the validation split.
    trainer.test(cli.model, cli.datamodule, verbose=False)
    metrics |= {key: float(value) for key, value in trainer.callback_metrics.items()}
    trainer.limit_predict_batches = 1
    trainer.predict(cli.model, cli.datamodule, return_predictions=False)
    command = shlex.join(["zoo", "reproduce", recipe, *overrides])
    results = hold_against(recipe, cli.config["fit"]["expect"], metrics)
    folder = Path(trainer.log_dir or ".")
    parameters = sum(p.numel() for p in cli.model.parameters())
    return Run(recipe, type(cli.model).__name__, command, results, folder, seconds, parameters, trainer.is_global_zero)


def _print_results(results: list["Result"]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "metric", "claimed", "measured", "", box=None, header_style="bold")
    for r in results:
        state = "[green]met[/green]" if r.met else "[red]missed[/red]"
        table.add_row(r.recipe, r.metric, r.claim, "not logged" if r.measured is None else f"{r.measured:.4f}", state)
    Console().print(table)


def _export(arguments: list[str]) -> int:
    parser = _Parser("export", "Write a trained model in another format.")
    parser.add_argument("checkpoint", type=Path, help=".ckpt of a run, or .safetensors")
    parser.add_argument("--format", required=True, choices=("safetensors", "onnx", "pt2"))
    parser.add_argument("--out", type=Path, help="the new file; by default beside the checkpoint")
    parser.add_argument("--licence", default="", help="licence of the weights, written into safetensors")
    chosen = parser.parse(arguments[1:])
    from zoo.export import export

    _quieten()
    with refusing():
        print(export(chosen.checkpoint, chosen.format, chosen.out, chosen.licence))
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "list": _list,
    "show": _show,
    "reproduce": _reproduce,
    "fit": _run,
    "validate": _run,
    "test": _run,
    "predict": _run,
    "export": _export,
}
