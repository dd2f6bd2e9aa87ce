"""Learning-rate schedules over a run's steps, with a warm-up, as factors of the optimizer's own rate.

Lecture 10, "Learning rate schedules". A recipe names one (``class_path: zoo.running.schedules.Cosine``) and never
repeats epochs times batches: each gets the run's number of optimizer steps T. Python passes the class itself, or
``lambda optimizer, steps: Cosine(optimizer, steps, warmup=0.05)``. Each parameter group keeps its own rate. Torch's
schedules whose second argument is a length (``CosineAnnealingLR``, ``PolynomialLR``) can be named just as well.
"""

import bisect
import math
from collections.abc import Sequence
from typing import Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class Schedule(LRScheduler):
    """Abstract: a linear rise from 0 over the warm-up, then what the subclass says, in closed form.

    All that a schedule knows is a plain value of its ``state_dict``, so that a resumed run goes on with the schedule
    as it was made.

    Args:
        optimizer: Its groups' rates are the ones that are scaled.
        steps: Number T of optimizer steps in the run.
        warmup: Steps of the rise, or their share of the run where less than 1. As steps at most half of the run: a
            longer warm-up is cut to that.

    Raises:
        ValueError: ``warmup`` is negative.
    """

    def __init__(self, optimizer: Optimizer, steps: int, warmup: float = 0.0) -> None:
        if warmup < 0:
            raise ValueError(f"warmup={warmup} must be a share of the run below 1, or a number of steps")
        self.steps = steps
        self.warmup = round(warmup * steps) if warmup < 1 else round(warmup)  # in steps
        if warmup >= 1 and self.warmup > steps // 2:
            self.warmup = steps // 2
            rank_zero_warn(f"the warm-up is cut from {warmup:g} to {self.warmup} steps, half of the run's {steps}")
        super().__init__(optimizer)

    def factor(self, step: int) -> float:
        """The share of its full rate at which optimizer step number ``step`` (from 0) is made."""
        if step < self.warmup:
            return step / self.warmup
        return self.after(step - self.warmup, max(1, self.steps - self.warmup))

    def after(self, step: int, steps: int) -> float:
        """The factor at ``step`` of the ``steps`` that follow the warm-up."""
        raise NotImplementedError(f"{type(self).__name__} must define after()")

    def get_lr(self) -> list[float | Tensor]:
        """The rates of all groups at the present step."""
        factor = self.factor(self.last_epoch)
        return [rate * factor for rate in self.base_lrs]


class Constant(Schedule):
    """The full rate after the warm-up: the lecture's first choice, with Adam."""

    def after(self, step: int, steps: int) -> float:
        """Always 1."""
        return 1.0


class Step(Schedule):
    """Multiplied by ``gamma`` at each milestone: He et al., 2015, https://arxiv.org/abs/1512.03385 (section 4.2).

    Args:
        optimizer: Its groups' rates are the ones that are scaled.
        steps: Number of optimizer steps in the run.
        milestones: Where the rate falls, as shares of the whole run, warm-up included. Default: the lecture's
            ResNet, epochs 30, 60 and 90 of 100.
        gamma: What it is multiplied by.
        warmup: Steps of the linear rise from 0, or their share of the run where less than 1.

    Raises:
        ValueError: The milestones are no rising shares of the run.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        steps: int,
        milestones: Sequence[float] = (0.3, 0.6, 0.9),
        gamma: float = 0.1,
        warmup: float = 0.0,
    ) -> None:
        self.milestones = list(milestones)
        if any(not 0 < m < 1 for m in self.milestones) or self.milestones != sorted(self.milestones):
            raise ValueError(f"milestones={self.milestones} must be rising shares of the run, such as [0.5, 0.75]")
        self.gamma = gamma
        super().__init__(optimizer, steps, warmup)

    def after(self, step: int, steps: int) -> float:
        """``gamma`` to the power of the milestones passed."""
        passed = bisect.bisect_right([round(m * self.steps) for m in self.milestones], step + self.warmup)
        return float(self.gamma**passed)


class Cosine(Schedule):
    """Half a cosine: ``0.5 * (1 + cos(pi * t / T))``. Loshchilov and Hutter, 2016, https://arxiv.org/abs/1608.03983.

    Args:
        optimizer: Its groups' rates are the ones that are scaled.
        steps: Number of optimizer steps in the run.
        final: The share of the rate at which it ends.
        warmup: Steps of the linear rise from 0, or their share of the run where less than 1; t counts from its end.
    """

    def __init__(self, optimizer: Optimizer, steps: int, final: float = 0.0, warmup: float = 0.0) -> None:
        self.final = final
        super().__init__(optimizer, steps, warmup)

    def after(self, step: int, steps: int) -> float:
        """From 1 to ``final``."""
        return _cosine(1.0, self.final, min(1.0, step / steps))


class Linear(Schedule):
    """A straight line: ``1 - t / T``.

    Args:
        optimizer: Its groups' rates are the ones that are scaled.
        steps: Number of optimizer steps in the run.
        final: The share of the rate at which it ends.
        warmup: Steps of the linear rise from 0, or their share of the run where less than 1; t counts from its end.
    """

    def __init__(self, optimizer: Optimizer, steps: int, final: float = 0.0, warmup: float = 0.0) -> None:
        self.final = final
        super().__init__(optimizer, steps, warmup)

    def after(self, step: int, steps: int) -> float:
        """From 1 to ``final``."""
        return 1 + (self.final - 1) * min(1.0, step / steps)


class InverseSquareRoot(Schedule):
    """``sqrt(w / t)`` for a warm-up of w steps: Vaswani et al., 2017, https://arxiv.org/abs/1706.03762 (section 5.3).

    Without a warm-up it is the lecture's ``1 / sqrt(t)``, with t counted in steps from 1 on: it falls fast at first.
    """

    def after(self, step: int, steps: int) -> float:
        """``sqrt(w / t)``; the same units of t and w, so that the rise meets it at 1."""
        peak = max(1, self.warmup)
        return math.sqrt(peak / max(peak, step + self.warmup))


class OneCycle(Schedule):
    """One rise to the full rate and one fall, the rise being the warm-up: torch's ``OneCycleLR`` in relative terms.

    Smith and Topin, 2017, https://arxiv.org/abs/1708.07120. The momentum is left as the optimizer has it: torch cycles
    that too, unless told otherwise.

    Args:
        optimizer: Its groups' rates are the peaks.
        steps: Number T of optimizer steps in the run.
        peak: The share of the run after which the rate is highest.
        start: The share of the peak rate to begin with.
        final: The share of the peak rate at the last step.
        anneal: The shape of both parts.

    Raises:
        ValueError: ``peak`` is no share of the run.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        steps: int,
        peak: float = 0.3,
        start: float = 0.04,
        final: float = 1e-4,
        anneal: Literal["cosine", "linear"] = "cosine",
    ) -> None:
        if not 0 < peak < 1:
            raise ValueError(f"peak={peak} must be a share of the run, between 0 and 1")
        self.peak, self.start, self.final, self.anneal = peak, start, final, anneal
        super().__init__(optimizer, steps, warmup=peak)

    def factor(self, step: int) -> float:
        """From ``start`` at step 0 to 1 at ``peak * T - 1`` and to ``final`` at T - 1, as torch counts."""
        between = _cosine if self.anneal == "cosine" else _line
        top, last = self.peak * self.steps - 1, self.steps - 1
        if step <= top:
            return between(self.start, 1.0, step / top if top else 1.0)
        return between(1.0, self.final, min(1.0, (step - max(0.0, top)) / max(1.0, last - max(0.0, top))))


class CosineRestarts(Schedule):
    """Several cosines of equal length from the full rate to 0, each of which ends in a good network.

    For snapshot ensembles: Huang et al., 2017, https://arxiv.org/abs/1704.00109 (equation 2). ``Snapshots``
    (``zoo.running.averaging``) keeps a checkpoint at the end of each.

    Args:
        optimizer: Its groups' rates are the ones that are scaled.
        steps: Number of optimizer steps in the run.
        cycles: Number of cosines; where it does not divide the steps, the last one is cut short.
        warmup: Steps of the linear rise from 0 before the first, or their share of the run where less than 1.

    Raises:
        ValueError: There is no cycle.
    """

    def __init__(self, optimizer: Optimizer, steps: int, cycles: int = 6, warmup: float = 0.0) -> None:
        if cycles < 1:
            raise ValueError(f"cycles={cycles} must be at least 1")
        self.cycles = cycles
        super().__init__(optimizer, steps, warmup)

    @property
    def ends(self) -> list[int]:
        """After how many optimizer steps each cycle is over."""
        length = self._length(self.steps - self.warmup)
        return sorted({min(self.warmup + (k + 1) * length, self.steps) for k in range(self.cycles)})

    def after(self, step: int, steps: int) -> float:
        """The cosine's value within the cycle."""
        length = self._length(steps)
        return _cosine(1.0, 0.0, step % length / length)

    def _length(self, steps: int) -> int:
        return max(1, math.ceil(steps / self.cycles))


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))


def _line(start: float, end: float, done: float) -> float:
    return start + (end - start) * done
