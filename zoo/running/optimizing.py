"""Optimizer and schedule from a recipe, in steps, and the linear scaling rule for several processes."""

import inspect
import math
from collections.abc import Callable
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.nn import Module, Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, SequentialLR

from zoo.running.freezing import FreezeBackbone
from zoo.running.schedules import Constant, Schedule

# (optimizer, number of optimizer steps in the run) -> schedule, stepped once per optimizer step
SchedulerCallable = Callable[[Optimizer, int], LRScheduler]
LENGTHS = ("steps", "T_max", "T_0", "total_iters", "total_steps")  # names of arguments that are a number of steps


def configure_optimizers(
    module: LightningModule,
    optimizer: OptimizerCallable,
    scheduler: SchedulerCallable | None,
    part: Module | None = None,
    updates: int = 1,
) -> OptimizerLRScheduler:
    """Build a module's optimizer over its trainable parameters, and its schedule over the run's steps.

    Under :class:`FreezeBackbone` the backbone has a group of its own, with its share of the rate. With ``part`` only
    the parameters of that part are taken, for a module of several optimizers. ``updates`` are the optimizer steps of a
    training step, more than one only where a module makes them by itself.

    Raises:
        ValueError: Optimizer, schedule and trainer do not go together; it says how to mend that.
    """
    trainer = module.trainer
    built = optimizer(_parameters(module, trainer) if part is None else _trainable(part))
    for group in built.param_groups:
        if (ratio := group.pop("ratio", None)) is not None:
            group["lr"] = group["lr"] * ratio
    mixed = isinstance(trainer.precision_plugin, MixedPrecision)
    if mixed and trainer.gradient_clip_val and getattr(built, "_step_supports_amp_scaling", False):
        raise ValueError(
            f"{type(built).__name__} with fused: true cannot clip gradients under mixed precision: set "
            "--model.init_args.optimizer.init_args.fused false"
        )
    if scheduler is None:
        return built
    if trainer.estimated_stepping_batches == math.inf:
        raise ValueError("a schedule needs a run of known length: set trainer.max_epochs or trainer.max_steps")
    steps = _steps(trainer, updates)
    schedule = scheduler(built, steps)
    _refuse_other_numbers(schedule, steps)
    return {"optimizer": built, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _steps(trainer: Trainer, updates: int) -> int:
    """Optimizer steps of a run of known length, ``updates`` in each training step."""
    steps = int(trainer.estimated_stepping_batches) * updates
    return steps if trainer.max_steps < 0 else min(steps, trainer.max_steps)


def _parameters(module: LightningModule, trainer: Trainer) -> list[Any]:
    """The trainable parameters, or their groups where the backbone is frozen at first."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, FreezeBackbone):
            return callback.parameter_groups(module)
    return _trainable(module)


def _trainable(module: Module) -> list[Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _refuse_other_numbers(schedule: LRScheduler, steps: int) -> None:
    """Refuse a schedule that took the run's number of steps for something else.

    A recipe that names a class gets the number as the class's second argument, whatever that means to the class.
    """
    second = list(inspect.signature(type(schedule).__init__).parameters)[2]
    taken = [getattr(schedule, second, None), *(group.get(second) for group in schedule.optimizer.param_groups)]
    if second not in LENGTHS and steps in taken:
        raise ValueError(
            f"{type(schedule).__name__} takes {second} where a schedule of a recipe gets the run's number of steps: "
            "use one of zoo.running.schedules (Step, Cosine, Linear, OneCycle, …), CosineAnnealingLR or PolynomialLR, "
            "or a function of your own (optimizer, steps) -> schedule"
        )


class LinearScaling(Callback):
    """The linear scaling rule: k processes, k times the batch and the learning rate, after a warm-up from 0.

    Lecture 11; Goyal et al., 2017, https://arxiv.org/abs/1706.02677 (section 2). Without it a recipe's global batch is
    shared among the processes and nothing else changes. A data module with ``batch_size`` gets k times its value;
    plain data loaders state the batch of a process and are left alone.

    Args:
        warmup_steps: Optimizer steps over which the rate rises linearly from 0; the schedule of the recipe, made for
            the steps that remain, follows. Cut to a tenth of a run that is shorter than ten times as long.

    Raises:
        ValueError: The module has no ``optimizer`` callable to scale.
    """

    def __init__(self, warmup_steps: int = 5000) -> None:
        self.warmup_steps = warmup_steps
        self._undo: list[tuple[Any, str, Any]] = []  # (object, attribute, value before)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap the module's optimizer and schedule before Lightning asks for them."""
        factor = trainer.world_size
        if stage != "fit" or factor == 1:
            return
        build: Any = getattr(pl_module, "optimizer", None)
        schedule: Any = getattr(pl_module, "scheduler", None)
        if not callable(build):
            raise ValueError(f"linear scaling needs a module with an `optimizer` callable, {type(pl_module)} has none")
        data: Any = getattr(trainer, "datamodule", None)
        self._undo = [(pl_module, "optimizer", build), (pl_module, "scheduler", schedule)]
        if hasattr(data, "batch_size"):
            self._undo.append((data, "batch_size", data.batch_size))
            data.batch_size *= factor

        def scaled(parameters: list) -> Optimizer:
            optimizer = build(parameters)
            for group in optimizer.param_groups:
                group["lr"] *= factor
            rates = sorted({group["lr"] for group in optimizer.param_groups})
            rank_zero_info(f"linear scaling: {factor} processes, learning rate {rates}")
            return optimizer

        def warmed_up(optimizer: Optimizer, steps: int) -> LRScheduler:
            return warm_up(optimizer, steps, self.warmup_steps, schedule)

        # Through Any: to a type checker every attribute of a module may be a tensor.
        changed: Any = pl_module
        changed.optimizer, changed.scheduler = scaled, warmed_up

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave everything as it was, for another fit."""
        for owner, name, value in self._undo:
            setattr(owner, name, value)
        self._undo = []


def warm_up(optimizer: Optimizer, steps: int, warmup_steps: int, scheduler: SchedulerCallable | None) -> LRScheduler:
    """A linear rise from 0 over ``warmup_steps`` (at most a tenth of ``steps``), then ``scheduler`` over the rest.

    A schedule of :mod:`zoo.running.schedules` with a warm-up of its own is left alone.
    """
    if warmup_steps > steps // 10:
        warmup_steps = max(1, steps // 10)
        rank_zero_warn(f"linear scaling: the warm-up is cut to {warmup_steps} steps, a tenth of the run's {steps}")
    rise = Constant(optimizer, steps, warmup_steps)
    if scheduler is None:
        return rise
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]  # the rise has set it to 0; the schedule starts from the full rate
    rest = scheduler(optimizer, steps - warmup_steps)
    if isinstance(rest, OneCycleLR | CyclicLR):
        raise ValueError(
            f"linear scaling cannot scale {type(rest).__name__}, which sets a rate of its own: use another schedule "
            "(zoo.running.schedules.OneCycle, say), or leave linear_scaling off and set max_lr by hand"
        )
    if isinstance(rest, Schedule) and rest.warmup:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"]
        return scheduler(optimizer, steps)
    _refuse_other_numbers(rest, steps - warmup_steps)
    return SequentialLR(optimizer, [rise, rest], milestones=[warmup_steps])


class EffectiveBatch(Callback):
    """Says when training starts what is trained, and what follows from batch, processes and accumulation."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print both lines, once for all processes."""
        rank_zero_info(trained_parameters(pl_module))
        rank_zero_info(plan(trainer))


def trained_parameters(module: Module) -> str:
    """One line: parameters that are trained and that are frozen; of each part, where any are frozen."""

    def counts(part: Module) -> str:
        trained = sum(parameter.numel() for parameter in _trainable(part))
        return f"{trained:,} trained, {sum(p.numel() for p in part.parameters()) - trained:,} frozen"

    parts = [f"{name} {counts(part)}" for name, part in module.named_children() if [*part.parameters()]]
    said = f"parameters: {counts(module)}"
    return said if said.endswith(", 0 frozen") else f"{said} ({'; '.join(parts)})"


def plan(trainer: Trainer) -> str:
    """One line: samples of an optimizer step, steps of an epoch and of the run, warm-up, and the full learning rates.

    A recipe's ``batch_size`` is the global batch of one forward pass, all processes together. Accumulation over k
    batches makes that k times as many samples per optimizer step; the rate stays as the recipe states it.
    """
    accumulated = trainer.accumulate_grad_batches
    updates = getattr(trainer.lightning_module, "updates_per_step", 1)
    facts = [_batch(trainer.train_dataloader, trainer.world_size, accumulated)]
    if trainer.num_training_batches != math.inf:
        facts.append(f"{math.ceil(trainer.num_training_batches / accumulated) * updates} steps per epoch")
    if trainer.estimated_stepping_batches != math.inf:
        facts.append(f"{_steps(trainer, updates)} steps")
    for config in trainer.lr_scheduler_configs:
        if warmup := _warmup(config.scheduler):
            facts.append(f"warm-up {warmup} steps")
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    rates = [f"{group.get('name', '')} {float(group.get('initial_lr', group['lr'])):.4g}".strip() for group in groups]
    facts.append(f"learning rate {', '.join(dict.fromkeys(rates))}")
    return "; ".join(fact for fact in facts if fact)


def _batch(loader: Any, processes: int, accumulated: int) -> str:
    sampler = getattr(loader, "batch_sampler", None)
    size = getattr(sampler, "batch_size", None) or getattr(loader, "batch_size", None)
    if size is None:
        return ""
    each = size // getattr(sampler, "world_size", 1)  # a sampler that knows of processes counts all of them together
    parts = [f"{processes} processes × {each}"] if processes > 1 else [str(each)] if accumulated > 1 else []
    parts += [f"{accumulated} accumulated"] if accumulated > 1 else []
    return f"global batch {processes * each * accumulated}{' = ' if parts else ''}{' × '.join(parts)}"


def _warmup(schedule: Any) -> int:
    """Steps of a schedule's rise: its own, or that of the linear scaling rule before it."""
    if isinstance(schedule, SequentialLR):
        return int(schedule._milestones[0])
    return schedule.warmup if isinstance(schedule, Schedule) else 0
