"""Ensembles: the mean of the probabilities of several checkpoints.

Lecture 11, "Model ensembles": independent models, or snapshots of one training (Huang et al., 2017,
https://arxiv.org/abs/1704.00109).
"""

import glob
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from zoo.recipes import RecipeError, refusing
from zoo.running.command import RecipeCLI
from zoo.running.starting import finish, prepare
from zoo.running.views import Kind, TestTimeAugmentation, log_mean_probability, replaced, views
from zoo.tasks.classification import ClassificationTask
from zoo.weights import load


class TestEnsemble(Callback):
    """Lets a module be tested as the mean of several members' probabilities, and counts each member's own accuracy.

    ``forward`` of the tested module is replaced for the time of the test by the logarithm of the mean probabilities,
    so that the task's own metrics and pictures are those of the ensemble. The members' accuracies are logged as
    ``test/accuracy_member_1``, …; each sample is counted once on any number of processes.

    Args:
        members: Classifiers of the same classes: images (N, C, H, W) to logits (N, num_classes).
        num_classes: Number of classes.
        kind: The :func:`zoo.running.views.views` that each member averages over; None looks at the images alone.
    """

    __test__ = False  # no test case, whatever pytest makes of the name

    def __init__(self, members: list[LightningModule], num_classes: int, kind: Kind | None = None) -> None:
        self.members = members
        self.kind = kind
        self.accuracies = [MulticlassAccuracy(num_classes, average="micro") for _ in members]
        self._scores: list[Tensor] = []  # of each member for the batch at hand, log probabilities (N, classes)
        self._replacing = ExitStack()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the members to the device and speak for the module."""
        for member, accuracy in zip(self.members, self.accuracies, strict=True):
            trainer.precision_plugin.convert_module(member)
            member.to(pl_module.device).eval()
            accuracy.to(pl_module.device).reset()
        self._replacing.enter_context(replaced(pl_module, "forward", self._forward))

    def _forward(self, images: Tensor) -> Tensor:
        seen = views(images, self.kind) if self.kind else [images]
        self._scores = [log_mean_probability([member(view) for view in seen]) for member in self.members]
        return log_mean_probability(self._scores)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the members' answers; a process that ran out of samples has an empty batch."""
        _, labels = batch
        if len(labels):
            for accuracy, scores in zip(self.accuracies, self._scores, strict=True):
                accuracy.update(scores, labels)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the members' accuracies, of all processes."""
        for number, accuracy in enumerate(self.accuracies, start=1):
            pl_module.log(f"test/accuracy_member_{number}", accuracy.compute(), rank_zero_only=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its forward back."""
        self._replacing.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the module its forward back."""
        self._replacing.close()


def run_ensemble(recipe: str, files: list[str], overrides: list[str]) -> RecipeCLI:
    """Test several checkpoints on a recipe's data, each alone and all together; print a table.

    Args:
        recipe: A name of ``zoo list``, or a YAML file: its data and Trainer are used, and its task's metrics.
        files: Checkpoints or weights files of classifiers of the zoo with the same classes; patterns with ``*`` too.
        overrides: Keys of the recipe.

    Returns:
        The run.

    Raises:
        RecipeError: A file is missing, is no classifier of the zoo, or has other classes or images than the recipe.
    """
    if any(override.split("=")[0] == "--ckpt_path" for override in overrides):
        raise RecipeError("--ensemble names the checkpoints: leave --ckpt_path out")
    paths = _expanded(files)
    cli = prepare("test", recipe, overrides, untrained=True)
    with refusing():
        members = [load(path) for path in paths]
        for path, member in zip(paths, members, strict=True):
            _refuse_other_task(path, member, cli.model, recipe)
    # The members themselves look at the views: so their own accuracies are of the views as well.
    others = [c for c in cli.trainer.callbacks if not isinstance(c, TestTimeAugmentation)]  # type: ignore[attr-defined]
    kind = cli.config["test"].get("test_time_augmentation")
    together = TestEnsemble(members, len(cli.model.class_names), kind)
    cli.trainer.callbacks = [*others, together]  # type: ignore[attr-defined]
    finish(cli)
    metrics = cli.trainer.callback_metrics  # asked by every process: they agree on it together
    if cli.trainer.is_global_zero:
        _print_members(paths, {name: float(value) for name, value in metrics.items()})
    return cli


def _expanded(files: list[str]) -> list[Path]:
    """The files, sorted within each pattern, each once."""
    paths = []
    for file in files:
        found = [file] if Path(file).is_file() else sorted(glob.glob(file, recursive=True))
        if not found:
            raise RecipeError(
                f"there is no checkpoint {file!r}: --ensemble expects files, or patterns such as 'runs/*'"
            )
        paths += [Path(each) for each in found]
    paths = list(dict.fromkeys(paths))
    if len(paths) < 2:
        raise RecipeError(f"an ensemble has two members or more: --ensemble found {paths[0]} only")
    return paths


def _refuse_other_task(path: Path, member: LightningModule, model: LightningModule, recipe: str) -> None:
    """Refuse a member that is not of the recipe's task: other classes, or other images."""
    if not isinstance(member, ClassificationTask) or not isinstance(model, ClassificationTask):
        raise RecipeError(
            f"{path} holds a zoo.{type(member).__name__}: an ensemble is of classifiers, as is its recipe"
        )
    if member.class_names != model.class_names:
        told = [
            ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            for names in (member.class_names, model.class_names)
        ]
        raise RecipeError(f"{path} knows other classes ({told[0]}) than {recipe} ({told[1]})")
    shapes = ["x".join(map(str, each.example_input_array.shape[1:])) for each in (member, model)]
    if shapes[0] != shapes[1]:
        raise RecipeError(
            f"{path} takes images {shapes[0]}, the model of {recipe} {shapes[1]}: set the arguments of both"
        )


def _print_members(paths: list[Path], metrics: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("member", "test/accuracy", box=None, header_style="bold", padding=(0, 1))
    for number, path in enumerate(paths, start=1):
        table.add_row(Text(str(path)), f"{metrics[f'test/accuracy_member_{number}']:.4f}")
    table.add_row(f"ensemble of {len(paths)}", f"{metrics['test/accuracy']:.4f}", style="bold")
    Console(width=None if sys.stdout.isatty() else 200).print(table)
