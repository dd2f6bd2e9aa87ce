"""The ``zoo`` command. What needs no training answers without importing Lightning, which costs seconds."""

import argparse
import difflib
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zoo
from zoo import recipes

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
        The exit status: 0, 1 for a missed claim or a failed run, 2 for a wrong command or recipe, 143 after SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if arguments[0] == "--version":
        print(f"zoo {zoo.__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        return _fail(f"there is no command {arguments[0]!r}: {hint}", 2)
    try:
        return COMMANDS[arguments[0]](arguments)
    except Exception as error:
        if os.environ.get("ZOO_TRACEBACK") or not _is_for_the_user(error):
            raise
        return _fail(str(error), 2 if type(error).__name__ == "RecipeError" else 1)


def _is_for_the_user(error: Exception) -> bool:
    """Whether the message says what to do; anything else is a bug and keeps its traceback."""
    names = {"RecipeError", "NonFiniteLossError", "MisconfigurationException"}
    return isinstance(error, OSError | ValueError | ImportError) or type(error).__name__ in names


def _fail(message: str, status: int) -> int:
    rank = os.environ.get("LOCAL_RANK", "0")
    where = f" (process {rank})" if rank != "0" else ""
    print(f"zoo: error{where}: {message}", file=sys.stderr)
    return status


def _list(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("zoo list", description="The recipes, what they claim and what was measured.")
    parser.add_argument("--json", action="store_true", help="for programs")
    rows = recipes.table()
    if parser.parse_args(arguments[1:]).json:
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
    parser = argparse.ArgumentParser("zoo show", description="What each layer of an architecture costs.")
    parser.add_argument("architecture", help="as in `zoo list`, for example lenet")
    parser.add_argument("--input", help="size of the input, CxHxW")
    chosen, rest = parser.parse_known_args(arguments[1:])
    name = _architecture(chosen.architecture)
    import torch
    from rich.console import Console
    from rich.table import Table

    from zoo.layer_table import layer_table

    with torch.device("meta"):
        model = getattr(zoo, name)(**_constructor_arguments(name, rest))
    size = model.example_input_array.shape[1:]
    if chosen.input:
        try:
            size = torch.Size(int(number) for number in chosen.input.split("x"))
        except ValueError:
            return _fail(f"--input {chosen.input}: expected channels x height x width, for example 3x224x224", 2)
    try:
        rows = layer_table(model, torch.zeros(1, *size, device="meta"))
    except RuntimeError as error:
        arguments_of = ", ".join(_parameters(name))
        return _fail(f"{name} does not take {chosen.input} ({error}); its arguments are {arguments_of}", 2)
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


def _architecture(name: str) -> str:
    """The class of ``lenet``, ``LeNet`` or ``zoo.LeNet``."""
    known = {module.removeprefix("zoo."): architecture for architecture, module in zoo.ARCHITECTURES.items()}
    known |= {architecture.lower(): architecture for architecture in zoo.ARCHITECTURES}
    asked = name.removeprefix("zoo.").lower()
    if asked not in known:
        near = difflib.get_close_matches(asked, known, n=2, cutoff=0.4)
        raise ValueError(f"there is no architecture {name!r}: {'did you mean' if near else 'there are'} "
                         f"{' or '.join(near) if near else ', '.join(sorted(known))}{'?' if near else ''}")  # fmt: skip
    return known[asked]


def _parameters(name: str) -> list[str]:
    import inspect

    hidden = ("optimizer", "scheduler", "weights", "keep_matching_classes")
    return [parameter for parameter in inspect.signature(getattr(zoo, name)).parameters if parameter not in hidden]


def _constructor_arguments(name: str, rest: list[str]) -> dict[str, Any]:
    """``--in_channels 3 --image_size 32`` as arguments of the architecture's constructor."""
    import yaml

    known = _parameters(name)
    parser = argparse.ArgumentParser(f"zoo show {name.lower()}", allow_abbrev=False)
    for parameter in known:
        parser.add_argument(f"--{parameter}", type=yaml.safe_load, default=argparse.SUPPRESS)
    chosen, unknown = parser.parse_known_args(rest)
    if unknown:
        raise ValueError(f"{name} has no argument {unknown[0]}: it has {', '.join(known)}")
    return vars(chosen)


def _run(arguments: list[str]) -> int:
    """``fit``, ``validate``, ``test`` and ``predict``."""
    command, *rest = arguments
    if any(argument in ("-h", "--help") for argument in rest):
        from zoo.running.command import RecipeCLI

        RecipeCLI([command, "--help"], "")  # prints and exits
    if not rest or rest[0].startswith("-"):
        return _fail(f"zoo {command} needs a recipe: one of {', '.join(recipes.names())}, or a YAML file", 2)
    cli = _start(command, rest[0], rest[1:])
    if cli.trainer.is_global_zero and cli.trainer.log_dir and not cli.trainer.fast_dev_run:
        print(f"files of this run: {cli.trainer.log_dir}")
    return 0


def _start(command: str, recipe: str, overrides: list[str]) -> "RecipeCLI":
    """Run one subcommand of a recipe; SIGTERM and Ctrl+C end the process with their usual status."""
    path = recipes.find(recipe)
    recipes.read(path)  # its own error for broken YAML
    name = recipe if path.is_relative_to(recipes.FOLDER) and not recipe.endswith(".yaml") else path.stem
    overrides = _overlays(overrides)
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from zoo.running.command import RecipeCLI, RecipeError

    _quieten()
    overrides = _resolve_checkpoint(command, name, overrides)
    if command != "fit" and not any(o.split("=")[0] in ("--ckpt_path", "--model.init_args.weights") for o in overrides):
        raise RecipeError(
            f"zoo {command} {recipe} would use a network that has learnt nothing: add --ckpt_path best (the newest "
            "run's), --ckpt_path FILE or --model.init_args.weights FILE"
        )
    try:
        return RecipeCLI([command, "--config", str(path), *overrides], name)
    except SIGTERMException:
        sys.exit(143)


def _quieten() -> None:
    """Leave out Lightning's advertising and warnings that tell a user of a recipe nothing to do."""
    import logging
    import warnings

    class NoTips(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            return "Tip:" not in record.getMessage()

    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(NoTips())
    # One process without worker processes is the fast way for data in memory; the loggers are chosen by the recipe.
    for message in (".*does not have many workers.*", ".*isinstance.treespec, LeafSpec.*", ".*multiple `ModelCheckpoint`.*",
                    ".*Checkpoint directory .* exists and is not empty.*", ".*dirpath.* has changed.*"):  # fmt: skip
        warnings.filterwarnings("ignore", message)


def _overlays(overrides: list[str]) -> list[str]:
    """``--config wandb`` means the overlay of that name, unless there is such a file."""
    resolved = list(overrides)
    for place, argument in enumerate(overrides):
        if argument == "--config" and place + 1 < len(overrides):
            resolved[place + 1] = str(recipes.find(overrides[place + 1], recipes.OVERLAYS))
        elif argument.startswith("--config="):
            resolved[place] = f"--config={recipes.find(argument.split('=', 1)[1], recipes.OVERLAYS)}"
    return resolved


def _resolve_checkpoint(command: str, recipe: str, overrides: list[str]) -> list[str]:
    """``--ckpt_path best`` and ``last`` mean those of the recipe's newest run that has one."""
    from zoo.running.command import RecipeError, newest_checkpoint

    overrides = [part for o in overrides for part in (o.split("=", 1) if o.startswith("--ckpt_path=") else [o])]
    if "--ckpt_path" not in overrides[:-1]:
        return overrides
    place = overrides.index("--ckpt_path") + 1
    asked = overrides[place]
    if asked in ("best", "last"):
        found = newest_checkpoint(recipe, asked)
        if found is None and command == "fit":
            print(f"no {asked}.ckpt under runs/{recipe} yet: training starts from the beginning")
            return overrides[: place - 1] + overrides[place + 1 :]
        if found is None:
            raise RecipeError(f"there is no run with a {asked}.ckpt under runs/{recipe}: run `zoo fit {recipe}` first")
        import torch

        step = torch.load(found, map_location="cpu", weights_only=True, mmap=True)["global_step"]
        print(f"--ckpt_path {asked}: {found}, step {step}")
        overrides[place] = str(found)
    return overrides


def _reproduce(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "zoo reproduce", description="Fit, test, hold against the claim, write a report. Status 1 on a miss."
    )
    parser.add_argument("recipes", nargs="+", metavar="RECIPE")
    parser.add_argument("--out", type=Path, help="folder of the report; by default that of the (last) run")
    split = next((i for i, a in enumerate(arguments[1:], 1) if a.startswith("--") and a not in ("--out", "--help")),
                 len(arguments))  # fmt: skip
    chosen, overrides = parser.parse_args(arguments[1:split]), arguments[split:]
    for name in chosen.recipes:
        recipes.find(name)  # a typo in the last one shall not cost the first one's training
    runs = [_reproduce_one(name, overrides) for name in chosen.recipes]
    results = [result for run in runs for result in run.results]
    if os.environ.get("LOCAL_RANK", "0") == "0":
        from zoo.running.report import write_report

        path = (chosen.out or runs[-1].folder) / "report.html"
        write_report(path, runs)
        _print_results(results)
        print(f"report: {path}")
    return 0 if all(result.met for result in results) else 1


def _reproduce_one(recipe: str, overrides: list[str]) -> "Run":
    cli = _start("fit", recipe, overrides)
    from zoo.running.report import Run, hold_against

    trainer = cli.trainer
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    seconds = cli.timer.time_elapsed("train")
    best = getattr(trainer.checkpoint_callback, "best_model_path", "") or None
    trainer.test(cli.model, cli.datamodule, ckpt_path=best, verbose=False)
    metrics |= {key: float(value) for key, value in trainer.callback_metrics.items()}
    trainer.limit_predict_batches = 1
    trainer.predict(cli.model, cli.datamodule, return_predictions=False)
    command = shlex.join(["zoo", "reproduce", recipe, *overrides])
    results = hold_against(recipe, cli.config["fit"]["expect"], metrics)
    folder = Path(trainer.log_dir or ".")
    parameters = sum(p.numel() for p in cli.model.parameters())
    return Run(recipe, type(cli.model).__name__, command, results, folder, seconds, parameters)


def _print_results(results: list["Result"]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "metric", "claimed", "measured", "", box=None, header_style="bold")
    for r in results:
        state = "[green]met[/green]" if r.met else "[red]missed[/red]"
        table.add_row(r.recipe, r.metric, r.claim, "not logged" if r.measured is None else f"{r.measured:.4f}", state)
    Console().print(table)


def _export(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("zoo export", description="Write a trained model in another format.")
    parser.add_argument("checkpoint", type=Path, help=".ckpt of a run, or .safetensors")
    parser.add_argument("--format", required=True, choices=("safetensors", "onnx", "pt2"))
    parser.add_argument("--out", type=Path, help="the new file; by default beside the checkpoint")
    parser.add_argument("--licence", default="", help="licence of the weights, written into safetensors")
    chosen = parser.parse_args(arguments[1:])
    from zoo.export import export

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
