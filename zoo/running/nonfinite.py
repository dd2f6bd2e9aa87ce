"""Stops a run whose loss is no longer a number, before it costs days."""

import math
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor


class NonFiniteLossError(RuntimeError):
    """The training loss is NaN or infinite."""


class StopOnNonFiniteLoss(Callback):
    """Raises at the first training loss that is NaN or infinite and names its batch.

    On a CPU the loss is looked at before the backward pass, so that the weights stay good. On a GPU looking at it
    would make the host wait at every step: there the first bad step is remembered on the device and looked up every
    ``log_every_n_steps``, before validation and before a checkpoint is written.
    """

    def __init__(self) -> None:
        self._first_bad: Tensor | None = None  # int64 (), on the device: a batch of this epoch, or -1

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Look at the loss, or remember it for later."""
        batch = trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1
        if loss.device.type == "cpu":
            if not math.isfinite(loss.item()):
                self._stop(trainer, batch)
            return
        if self._first_bad is None:
            self._first_bad = torch.tensor(-1, device=loss.device)
        bad = (self._first_bad < 0) & ~torch.isfinite(loss.detach())
        self._first_bad = torch.where(bad, batch, self._first_bad)
        if trainer.global_step % (trainer.log_every_n_steps or 50) == 0:  # type: ignore[attr-defined]
            self._look(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look before time is spent on validation."""
        self._look(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look while the batch's number still means this epoch."""
        self._look(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look before a good checkpoint is replaced by a bad one."""
        self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        if self._first_bad is not None and (batch := int(self._first_bad)) >= 0:
            self._first_bad = None
            self._stop(trainer, batch)

    def _stop(self, trainer: Trainer, batch: int) -> None:
        indices = getattr(getattr(trainer.train_dataloader, "batch_sampler", None), "indices", None)
        samples = f" (training samples {indices(batch)})" if callable(indices) else ""
        raise NonFiniteLossError(
            f"the training loss is not finite at epoch {trainer.current_epoch}, batch {batch}{samples}. Checkpoints "
            "written before are untouched; a smaller learning rate, a warm-up, trainer.gradient_clip_val or "
            "trainer.precision 32-true usually helps"
        )
