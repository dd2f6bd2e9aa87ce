"""Averages: of weights over the steps (EMA) or the last epochs (SWA), and snapshots for averaging predictions.

Lecture 10, "Model ensembles": Lightning's callbacks, cured of what loses or spoils an average, and the one it lacks.
"""

import os
import warnings
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, StochasticWeightAveraging, WeightAveraging
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import SequentialLR
from torch.optim.swa_utils import SWALR

from zoo.running.checkpoint import KeepLast
from zoo.running.schedules import CosineRestarts


class EMA(WeightAveraging):
    """An exponential moving average of the weights, which is validated, saved and left behind in place of the last.

    Polyak and Juditsky, 1992; lecture 10. Checkpoints hold the averaged weights, and beside them what a resumed run
    needs to end exactly like an unbroken one. Buffers such as a batch norm's statistics are averaged, counters copied.

    Lightning's ``EMAWeightAveraging`` (2.6.6) keeps the average on the CPU while a GPU trains, leaves the initial
    weights behind where a run ends before its first update, and lets frozen weights drift by rounding.

    Args:
        decay: What is kept of the average at each optimizer step; 0.999 looks back about 1,000 steps. After n steps it
            is at most (1 + n) / (10 + n), as in TensorFlow, so that short runs do not end near their start.

    Raises:
        ValueError: ``decay`` is no share.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay={decay} must be between 0 and 1; near 1 averages over many steps")
        super().__init__(multi_avg_fn=self._average)
        self.decay = decay
        self._swapped = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the module to its device, where Lightning has moved it by now."""
        if self._average_model is not None:
            self._average_model.to(pl_module.device)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave a validation that was broken off with the weights where they belong, for a checkpoint's sake."""
        if self._swapped:
            self._swap_models(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average behind also where a resumed run had nothing left to do."""
        self._copy_average_to_current(pl_module)

    def _swap_models(self, pl_module: LightningModule) -> None:
        super()._swap_models(pl_module)
        self._swapped = not self._swapped

    def _average(self, averages: list[Tensor], values: list[Tensor], updates: Tensor | int) -> None:
        """Move averages of one type towards the present values; what is equal stays so to the last bit."""
        steps = self._latest_update_step  # the number of updates, without waiting for a device
        decay = min(self.decay, (1 + steps) / (10 + steps))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, values, 1 - decay)
        else:
            torch._foreach_copy_(averages, values)


class SWA(StochasticWeightAveraging):
    """Stochastic weight averaging: the mean of the weights at the start of each of the last epochs, at a steady rate.

    Izmailov et al., 2018, https://arxiv.org/abs/1803.05407. Lightning's callback: from ``start`` on it takes the
    schedule over, anneals to the steady rate and averages; a network with batch norm is given one more epoch, without
    training, for its statistics. Only what is left at the end of training, and ``last.ckpt``, are the average:
    validation and ``best.ckpt`` are of single epochs. A run that is stopped early is not averaged.

    Added here: rates relative to the recipe's, ``last.ckpt`` of the average also without batch norm, and exact resuming
    in the middle of an epoch.

    Args:
        start: The share of the epochs after which averaging begins.
        ratio: The steady rate as a share of the recipe's.
        annealing_epochs: Epochs of the way to it.

    Raises:
        ValueError: ``ratio`` is not positive.
        ImportError: Torch is too old: its schedule would put code into the checkpoint, which is then refused.
    """

    def __init__(self, start: float = 0.75, ratio: float = 0.5, annealing_epochs: int = 5) -> None:
        if "state_dict" not in vars(SWALR):
            raise ImportError(f"SWA needs a newer torch than {torch.__version__}, whose SWALR cannot be saved safely")
        if ratio <= 0:
            raise ValueError(f"ratio={ratio} must be above 0: the steady rate as a share of the recipe's")
        super().__init__(swa_lrs=ratio, swa_epoch_start=float(start), annealing_epochs=annealing_epochs)
        self.ratio = ratio

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resume in the middle of an epoch, whose start Lightning does not announce again."""
        if self._scheduler_state is not None and self.swa_start <= trainer.current_epoch <= self.swa_end:
            self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average; before the first time settle the steady rate of each group."""
        if not self._initialized:
            groups = trainer.optimizers[0].param_groups
            self._swa_lrs = [g.get("swa_lr", self.ratio * g.get("initial_lr", g["lr"])) for g in groups]
        with warnings.catch_warnings():  # it takes over a schedule in steps, but says that it cannot
            warnings.filterwarnings("ignore", "SWA is currently only supported every epoch")
            super().on_train_epoch_start(trainer, pl_module)

    @staticmethod
    def pl_module_contains_batch_norm(pl_module: LightningModule) -> bool:
        """Whether there are statistics to renew."""
        return bool(_moving_norms(pl_module))

    def reset_batch_norm_and_save_state(self, pl_module: LightningModule) -> None:
        """Forget the statistics that the additional epoch renews; a frozen backbone's nothing would bring back."""
        self.momenta = {norm: norm.momentum for norm in _moving_norms(pl_module)}
        for norm in self.momenta:
            norm.reset_running_stats()
            norm.momentum = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average in place and save it."""
        super().on_train_end(trainer, pl_module)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, KeepLast) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                trainer.save_checkpoint(callback.path, weights_only=False)


def _moving_norms(module: LightningModule) -> list[_BatchNorm]:
    return [each for each in module.modules() if isinstance(each, _BatchNorm) and each.training]


class Snapshots(Checkpoint):
    """Keeps ``checkpoints/snapshot-1.ckpt``, ``snapshot-2.ckpt``, … at the end of each cycle of ``CosineRestarts``.

    For a snapshot ensemble: Huang et al., 2017, https://arxiv.org/abs/1704.00109; lecture 10. A resumed run writes
    those that are left into its own folder.

    Raises:
        ValueError: The schedule is no :class:`~zoo.running.schedules.CosineRestarts`.
    """

    def __init__(self) -> None:
        self.folder = ""
        self._ends: list[int] = []
        self._saved_at = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle the folder, beside the run's log."""
        # Asked by every process: they agree on it together.
        self.folder = os.path.join(trainer.log_dir or trainer.default_root_dir, "checkpoints")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask the schedule when its cycles end."""
        self._ends, self._saved_at = _cycle_ends(trainer), 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where a cycle ends within an epoch."""
        if not trainer.is_last_batch:  # else after the validation, whose metrics the file then tells
            self._save_if_due(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where a cycle ends with the epoch."""
        self._save_if_due(trainer)

    def _save_if_due(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if step in self._ends and step != self._saved_at and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._saved_at = step  # under accumulation several batches end at the same step
            path = os.path.join(self.folder, f"snapshot-{self._ends.index(step) + 1}.ckpt")
            trainer.save_checkpoint(path, weights_only=False)


def _cycle_ends(trainer: Trainer) -> list[int]:
    for config in trainer.lr_scheduler_configs:
        schedule: Any = config.scheduler
        begin = 0
        if isinstance(schedule, SequentialLR):  # behind the warm-up of linear scaling
            begin, schedule = schedule._milestones[-1], schedule._schedulers[-1]
        if isinstance(schedule, CosineRestarts):
            return [begin + end for end in schedule.ends]
    raise ValueError(
        "Snapshots follows the cycles of a schedule: set scheduler to zoo.running.schedules.CosineRestarts"
    )
