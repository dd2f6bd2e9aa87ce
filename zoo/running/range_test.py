"""The learning-rate range test: the rate rises step by step, and the loss tells where it is too small or too large.

Smith, 2017, https://arxiv.org/abs/1506.01186 (section 3.3); lecture 11, "Choosing hyperparameters" (step 3).
Lightning's own ``Tuner.lr_find`` is not used: it starts its curve at half of the loss (the correction of its running
mean is one step ahead), takes the slope by the rate and not by its logarithm, which favours small rates, and gives all
parameter groups the same rate.
"""

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.exceptions import _TunerExitException

from zoo.recipes import RecipeError
from zoo.running.nonfinite import StopOnNonFiniteLoss
from zoo.running.pictures import write_png
from zoo.running.starting import hushed, prepare

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from zoo.running.command import RecipeCLI

SMOOTHING = 0.9  # of the running mean of the loss
DIVERGED = 4.0  # times the smallest loss ends the test
BEGINNING = 5  # steps whose mean loss is that of the start
FALL = 0.02  # of that loss at least, else there is nothing but noise


class RangeTest(Callback):
    """Raises the rate by the same factor at every optimizer step, and ends the training.

    The recipe's schedule is off. Parameter groups keep their proportions; the largest of them gets the rate.

    Args:
        min_lr: The first rate.
        max_lr: The last rate.
        steps: Optimizer steps from one to the other.
    """

    def __init__(self, min_lr: float, max_lr: float, steps: int) -> None:
        self.planned = [min_lr * (max_lr / min_lr) ** (step / (steps - 1)) for step in range(steps)]
        self.rates: list[float] = []
        self.losses: list[float] = []
        self._shares: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch the schedule and the recipe's length off."""
        if len(trainer.optimizers) != 1 or not pl_module.automatic_optimization:
            raise RecipeError(f"{type(pl_module).__name__} has no single optimizer that the rate of could be tested")
        trainer.strategy.lr_scheduler_configs = []
        trainer.fit_loop.max_epochs = -1
        trainer.fit_loop.epoch_loop.max_steps = -1
        groups = trainer.optimizers[0].param_groups
        own = [float(group.get("initial_lr", group["lr"])) for group in groups]
        self._shares = [rate / max(own) for rate in own] if max(own) > 0 else [1.0] * len(own)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the rate of this step."""
        for group, share in zip(trainer.optimizers[0].param_groups, self._shares, strict=True):
            group["lr"] = self.planned[trainer.global_step] * share

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss, of the last batch where gradients are accumulated; end after the last rate, or when lost."""
        if trainer.global_step == len(self.rates):
            return
        loss = float(outputs["loss"] if isinstance(outputs, dict) else outputs)
        self.rates.append(self.planned[len(self.rates)])
        self.losses.append(loss)
        smooth = smoothed(self.losses)
        lost = not math.isfinite(loss) or smooth[-1] > DIVERGED * min(smooth)
        if lost or len(self.rates) == len(self.planned):
            raise _TunerExitException


def smoothed(losses: list[float]) -> list[float]:
    """A running mean that starts at the first value: the sum of ``0.9**age * loss`` over that of the weights."""
    mean, weight, out = 0.0, 0.0, []
    for loss in losses:
        mean, weight = SMOOTHING * mean + loss, SMOOTHING * weight + 1
        out.append(mean / weight)
    return out


def suggestion(rates: list[float], losses: list[float]) -> float | None:
    """The rate at which the smoothed loss falls most steeply over the logarithm of the rate; None where it never falls.

    Looked for between the first steps and the smallest loss; what comes after a loss that is no number is left out.
    """
    count = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    smooth = np.array(smoothed(losses[:count]))
    lowest = int(smooth.argmin()) if count else 0
    if lowest <= BEGINNING or smooth[lowest] > (1 - FALL) * np.mean(losses[:BEGINNING]):
        return None
    slope = np.gradient(smooth, np.log(rates[:count]))
    return rates[BEGINNING + int(slope[BEGINNING : lowest + 1].argmin())]


def find_lr(recipe: str, overrides: list[str], min_lr: float, max_lr: float, steps: int, out: Path) -> int:
    """Test a recipe's rates in a folder that is removed again; print a suggestion, draw the curve.

    Args:
        recipe: A name of ``zoo list``, or a YAML file.
        overrides: Keys of the recipe.
        min_lr: The first rate.
        max_lr: The last rate.
        steps: Optimizer steps from one to the other.
        out: The picture, a PNG file.

    Returns:
        0 where there is a suggestion, else 1.

    Raises:
        RecipeError: An argument, the recipe or an override cannot be meant.
    """
    if not 0 < min_lr < max_lr < math.inf:
        raise RecipeError(f"--min_lr {min_lr:g} must be above 0 and below --max_lr {max_lr:g}")
    if steps < 10:
        raise RecipeError(f"--steps {steps} is too few to see a slope: at least 10")
    if any(override.split("=")[0] == "--ckpt_path" for override in overrides):
        raise RecipeError("zoo find_lr looks at the start of a training: leave --ckpt_path out")
    without_validation = ["--trainer.limit_val_batches", "0", "--trainer.num_sanity_val_steps", "0"]
    test = RangeTest(min_lr, max_lr, steps)
    with hushed(), tempfile.TemporaryDirectory(prefix="zoo-find_lr-") as folder:
        cli = prepare("fit", recipe, [*overrides, *without_validation], trial=Path(folder) / "trial")
        # A loss that is no number is an answer here, and validation is left out.
        kept = [c for c in cli.trainer.callbacks if not isinstance(c, StopOnNonFiniteLoss | EarlyStopping)]  # type: ignore[attr-defined]
        cli.trainer.callbacks = [*kept, test]  # type: ignore[attr-defined]
        cli.run()
    found = suggestion(test.rates, test.losses)
    write_png(range_figure(test.rates, test.losses, found, recipe), out)
    _tell(cli, test, found, out)
    return 0 if found is not None else 1


def range_figure(rates: list[float], losses: list[float], found: float | None, title: str) -> "Figure":
    """The loss against the rate on a logarithmic axis, smoothed and not, with the suggestion."""
    from matplotlib.figure import Figure

    smooth = smoothed(losses)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(rates, losses, color="tab:blue", alpha=0.3, linewidth=1, label="loss of a batch")
    axes.plot(rates, smooth, color="tab:blue", label="smoothed")
    if found is not None:
        axes.plot(found, smooth[rates.index(found)], "o", color="crimson", label=f"suggestion: {found:.1e}")
        axes.axvline(found, color="crimson", alpha=0.4, linewidth=1)
    finite = [loss for loss in smooth if math.isfinite(loss)]
    if finite:
        # The last steps before the end would flatten everything else.
        low, high = min(finite), min(max(finite), 2.5 * finite[0])
        axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low) or None)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _tell(cli: "RecipeCLI", test: RangeTest, found: float | None, out: Path) -> None:
    last = test.losses[-1]
    end = f"loss {last:.3g}" if math.isfinite(last) else "a loss that is no number"
    print(f"{len(test.rates)} steps from {test.rates[0]:.1e} to {test.rates[-1]:.1e}, which ended with {end}")
    print(f"picture: {out}")
    if found is None:
        print("no suggestion: the loss never fell; try other --min_lr and --max_lr, or more --steps")
        return
    print(f"suggestion: {found:.1e}, where the loss falls most steeply")
    if cli.config["fit"].model.get("init_args.optimizer.class_path") is not None:
        print(f"use it with --model.init_args.optimizer.init_args.lr {found:.1e}")
