"""The ``zoo`` command. What needs no training answers without importing Lightning, which costs seconds."""

import argparse
import difflib
import json
import os
import signal
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import zoo
from zoo import recipes
from zoo.recipes import RecipeError, refusing, suggest
from zoo.running.starting import WEIGHTS, finish, is_for_the_user, naming_dead_workers, prepare, quieten

if TYPE_CHECKING:
    from zoo.running.command import RecipeCLI

USAGE = f"""zoo {zoo.__version__}: architectures of a computer-vision course as LightningModules, with data and recipes

usage: zoo COMMAND …

  zoo list [--json]                          the recipes: what they claim and what was measured
  zoo show ARCHITECTURE [--input CxHxW]      what each layer costs, in the lecture's terms
  zoo reproduce RECIPE… [--out DIR]          fit, test, hold against the claim, write a report; status 1 on a miss;
                        [--resume]           also a list of recipes: lecture, video; --resume goes on with one
  zoo check RECIPE [--steps 50]              before training: initial loss, gradients, a batch learnt by heart, step
                                             sizes, data; status 1 if one is wrong
  zoo check-data RECIPE [overrides]          the recipe's files before any training: unreadable ones, boxes, splits that
                                             share pictures, classes without any; status 1 if one is wrong
  zoo find_lr RECIPE [--min_lr 1e-6]         learning-rate range test: a suggestion, and a picture (--out find_lr.png)
              [--max_lr 1] [--steps 100]
  zoo search RECIPE --over KEY=LOW..HIGH[:log] --over KEY=A,B,… [--method random|grid|tpe] [--trials 20]
             [--epochs N] [--metric val/accuracy] [--keep] [--out DIR]         keys of a recipe against validation
  zoo probe RECIPE [--out probe.safetensors] a linear head on features of the recipe's pretrained backbone, which are
            [--cache runs/features]          computed once and kept
  zoo fit RECIPE [overrides]                 train; RECIPE is a name of `zoo list` or a YAML file
  zoo validate|test|predict RECIPE --ckpt_path FILE|best|last [overrides]
  zoo test RECIPE --ensemble FILE FILE…      the mean probabilities of several checkpoints
  zoo predict FILE PICTURE|FOLDER…           pictures of your own, by a .ckpt or .safetensors of the zoo
              [--out DIR] [--device cpu|cuda|mps] [--top 5 | --score_threshold 0.5]     their classes, objects, meshes
  zoo explain FILE|ARCHITECTURE METHOD PICTURE|FOLDER…       what a classifier looks at, and pictures that it would like
              [--layer NAME] [--target CLASS] [--out DIR] [--seed 0]     to see; without METHOD a page of all that apply
  zoo export CHECKPOINT --format safetensors|onnx|pt2 [--out FILE]

An override is any key of the recipe: --trainer.max_epochs 3 --data.init_args.root my/data --seed_everything 1.
--test_time_augmentation flip|flip_shift averages over 2 or 6 views of each picture in test, predict and reproduce.
A second --config FILE, or the name of an overlay, is laid over the recipe: bf16, compile, ddp2, early_stopping, ema,
freeze, snapshots, swa, tensorboard, wandb, wandb_offline.
`zoo fit --help` lists every key, `zoo search --help` a command's options; ZOO_TRACEBACK=1 shows an error's origin.
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
        with naming_dead_workers():
            return COMMANDS[arguments[0]](arguments)
    except _HelpWasShown:
        return 0
    except BrokenPipeError:  # whoever read on, as `head` does, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes what is left at its end
        return 128 + signal.SIGPIPE
    except Exception as error:
        if os.environ.get("ZOO_TRACEBACK") or not is_for_the_user(error):
            raise
        return _fail(str(error), 2 if isinstance(error, RecipeError) else 1)


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

    def parse(self, arguments: list[str], anywhere: bool = False) -> argparse.Namespace:
        """Parse; look for misspelt options first, else argparse reports the right one as missing.

        Args:
            arguments: What follows the command.
            anywhere: Options may stand between the words of one list.
        """
        known = [option for option in self._option_string_actions if option.startswith("--")]
        for option in (argument.split("=")[0] for argument in arguments if argument.startswith("--")):
            if option not in known:
                self.error(f"there is no option {option}{suggest(option, known)}")
        return self.parse_intermixed_args(arguments) if anywhere else self.parse_args(arguments)

    def split(self, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """Parse this command's own options, wherever they are; what is left are overrides of a recipe."""
        chosen, overrides = self.parse_known_args(arguments)
        if overrides and not overrides[0].startswith("-"):
            self.error(f"{overrides[0]!r} is no override, which is --key value")
        own = [option.removeprefix("--") for option in self._option_string_actions if option.startswith("--")]
        for option in (override.split("=")[0].removeprefix("--") for override in overrides):
            if near := difflib.get_close_matches(option, own, n=1, cutoff=0.75):
                self.error(f"there is no option --{option}: did you mean --{near[0]}?")
        return chosen, overrides

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

    own = _constructor_arguments(name, rest)
    if chosen.input and len(chosen.input) == 3 and "in_channels" in _parameters(name):
        own.setdefault("in_channels", chosen.input[0])
    with refusing(), torch.device("meta"):
        model = getattr(zoo, name)(**own)
    size = chosen.input or model.example_input_array.shape[1:]
    try:
        model.to("meta")  # what was made from arrays is on the CPU
        rows = layer_table(model, torch.zeros(1, *size, device="meta"))
    except (RuntimeError, ValueError) as error:
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
    if hasattr(model, "rpn"):
        print("Of regions the first number of an output is how many are kept at most, or one where that is not fixed.")
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

    hidden = ("optimizer", "scheduler", "weights", "backbone_weights", "keep_matching_classes")
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
    if command == "predict" and rest and rest[0].endswith(WEIGHTS):
        return _predict_pictures(arguments)
    if any(argument in ("-h", "--help") for argument in rest):
        from zoo.running.command import RecipeCLI

        RecipeCLI([command, "--help"], "")  # prints and exits
    if not rest or rest[0].startswith("-"):
        raise RecipeError(
            f"zoo {command} needs a recipe first, such as lenet/mnist (zoo list has them all), or a YAML file"
        )
    if command == "test" and "--ensemble" in rest:
        return _test_ensemble(arguments)
    return _say_where(finish(prepare(command, rest[0], rest[1:])))


def _say_where(cli: "RecipeCLI") -> int:
    folder = cli.trainer.log_dir  # asked by every process: they agree on it together
    if cli.trainer.is_global_zero and folder and not cli.trainer.fast_dev_run:  # type: ignore[attr-defined]
        print(f"files of this run: {folder}")
    return 0


def _test_ensemble(arguments: list[str]) -> int:
    parser = _Parser("test", "Test the mean probabilities of several checkpoints.")
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument(
        "--ensemble", nargs="+", metavar="FILE", help="checkpoints or weights files; * may stand in one"
    )
    chosen, overrides = parser.split(arguments[1:])
    from zoo.running.ensembles import run_ensemble

    return _say_where(run_ensemble(chosen.recipe, chosen.ensemble, overrides))


def _predict_pictures(arguments: list[str]) -> int:
    parser = _Parser("predict", "Tell what is on pictures, or in videos, of your own.")
    parser.add_argument("weights", type=Path, metavar="FILE", help=".ckpt of a run, or .safetensors")
    parser.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE|FOLDER", help="folders are searched through")
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="folder; by default predictions")
    parser.add_argument("--top", type=int, choices=range(1, 6), help="of a classifier: so many classes (5)")
    parser.add_argument(
        "--test_time_augmentation", choices=("flip", "flip_shift"), help="of a classifier: average over 2 or 6 views"
    )
    parser.add_argument(
        "--score_threshold", type=_share, metavar="SCORE",
        help="of a detector: least score of an object; by default its own, and of what is shown 0.5",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), help="by default cuda where there is one, else cpu")
    parser.add_argument("--batch_size", type=int, help="at a time (64; of a detector 4, of meshes 16, of videos 1)")
    chosen = parser.parse(arguments[1:])
    from zoo.running.own_pictures import predict_pictures

    quieten()
    with refusing():
        broken = predict_pictures(**vars(chosen))
    return 1 if broken else 0


def _check(arguments: list[str]) -> int:
    parser = _Parser("check", "The lecture's checks before training. Overrides of the recipe may follow.")
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("--steps", type=_positive, default=50, help="training steps to look at")
    chosen, overrides = parser.split(arguments[1:])
    from zoo.running.checking import check, print_checks

    checks = check(chosen.recipe, overrides, chosen.steps)
    print_checks(checks)
    return 1 if any(each.state == "failed" for each in checks) else 0


def _check_data(arguments: list[str]) -> int:
    parser = _Parser("check-data", "Look for what is wrong with a recipe's data. Overrides of the recipe may follow.")
    parser.add_argument("recipe", metavar="RECIPE")
    chosen, overrides = parser.split(arguments[1:])
    from zoo.running.checking_data import check_data

    return check_data(chosen.recipe, overrides)


def _find_lr(arguments: list[str]) -> int:
    parser = _Parser("find_lr", "Learning-rate range test. Overrides of the recipe may follow.")
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("--min_lr", type=float, default=1e-6, help="the first rate")
    parser.add_argument("--max_lr", type=float, default=1.0, help="the last rate")
    parser.add_argument("--steps", type=_positive, default=100, help="optimizer steps from the first to the last rate")
    parser.add_argument("--out", type=Path, default=Path("find_lr.png"), help="the picture; by default find_lr.png")
    chosen, overrides = parser.split(arguments[1:])
    from zoo.running.range_test import find_lr

    return find_lr(chosen.recipe, overrides, chosen.min_lr, chosen.max_lr, chosen.steps, chosen.out)


def _search(arguments: list[str]) -> int:
    parser = _Parser("search", "Search over keys of a recipe by its validation metric. Overrides may follow.")
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("--over", action="append", required=True, metavar="KEY=VALUES",
                        help="KEY=LOW..HIGH, KEY=LOW..HIGH:log, or KEY=A,B,C; may be given several times")  # fmt: skip
    parser.add_argument("--method", choices=("random", "grid", "tpe"), default="random")
    parser.add_argument("--trials", type=_positive, default=20, help="at most so many")
    parser.add_argument("--epochs", type=_positive, help="of a trial; by default the recipe's")
    parser.add_argument("--metric", help="by default what the model's best checkpoint is chosen by")
    parser.add_argument("--keep", action="store_true", help="keep each trial's files and checkpoints")
    parser.add_argument("--out", type=Path, help="folder; by default the next runs/RECIPE/search_<n>")
    chosen, overrides = parser.split(arguments[1:])
    from zoo.running.search import search

    return search(overrides=overrides, **vars(chosen))


def _probe(arguments: list[str]) -> int:
    parser = _Parser(
        "probe", "Fit the head to features of the pretrained backbone. Overrides of the recipe may follow."
    )
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("--cache", type=Path, default=Path("runs/features"), help="folder of the features' files")
    parser.add_argument("--out", type=Path, default=Path("probe.safetensors"), help="the weights file to write")
    chosen, overrides = parser.split(arguments[1:])
    from zoo.running.probing import probe_recipe

    probe_recipe(chosen.recipe, overrides, chosen.cache, chosen.out)
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, not {text!r}")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, not {text!r}")
    return value


def _reproduce(arguments: list[str]) -> int:
    parser = _Parser("reproduce", "Fit, test, hold against the claim, write a report. Status 1 on a miss.")
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help=f"or a list: {', '.join(recipes.lists())}")
    parser.add_argument("--out", type=Path, help="folder of the report; by default the run's, of several a new one")
    parser.add_argument("--resume", action="store_true", help="leave out what the newest such report has")
    chosen, overrides = parser.split(arguments[1:])
    from zoo.running.reproducing import reproduce

    return reproduce(chosen.recipes, overrides, chosen.out, chosen.resume)


def _export(arguments: list[str]) -> int:
    parser = _Parser("export", "Write a trained model in another format.")
    parser.add_argument("checkpoint", type=Path, help=".ckpt of a run, or .safetensors")
    parser.add_argument("--format", required=True, choices=("safetensors", "onnx", "pt2"))
    parser.add_argument("--out", type=Path, help="the new file; by default beside the checkpoint")
    parser.add_argument("--licence", default="", help="licence of the weights, written into safetensors")
    chosen = parser.parse(arguments[1:])
    from zoo.export import export

    quieten()
    with refusing():
        print(export(chosen.checkpoint, chosen.format, chosen.out, chosen.licence))
    return 0


def _explain(arguments: list[str]) -> int:
    methods = (
        "filters, activations, patches, neighbours, pca, tsne, saliency, guided, grad_cam, occlusion, segmentation, "
        "adversarial, class, inversion, dream, texture, style, attention"
    )
    others = "filters, activations, saliency, guided, grad_cam, occlusion"
    parser = _Parser(
        "explain",
        f"Look into a classifier of pictures. The methods: {methods}. Of a detector's objects and a captioner's words "
        f"{others}, and attention; of clips saliency, guided, grad_cam; of a policy's scores saliency.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help=".ckpt, .safetensors, or an architecture as in `zoo list`: its published weights"
    )
    parser.add_argument(
        "words", nargs="+", metavar="[METHOD] PICTURE|FOLDER",
        help="without a method one page of all that apply; for style the last picture is the manner; for clips videos, "
        "for policies observations (.npy, of frames pictures too)",
    )  # fmt: skip
    parser.add_argument("--layer", help="as in `zoo show`; by default one that suits the method")
    parser.add_argument("--target", metavar="CLASS", help="name or number; by default what the model sees; of "
                        "objects and words also their place, from 1")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("explanations"), help="folder; by default explanations")
    parser.add_argument("--steps", type=_positive, help="of what is optimised; by default what suits the method")
    parser.add_argument("--seed", type=int, default=0, help="of what is random")
    parser.add_argument("--weights", help="of an architecture: a name or a file; by default DEFAULT")
    chosen = parser.parse(arguments[1:], anywhere=True)
    from zoo.running.explained_files import explain

    quieten()
    with refusing():
        explain(**vars(chosen))
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "list": _list,
    "show": _show,
    "reproduce": _reproduce,
    "check": _check,
    "check-data": _check_data,
    "find_lr": _find_lr,
    "search": _search,
    "probe": _probe,
    "fit": _run,
    "validate": _run,
    "test": _run,
    "predict": _run,
    "explain": _explain,
    "export": _export,
}
