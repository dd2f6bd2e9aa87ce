"""Stops a run whose loss is no longer a number, before it costs days."""

import math
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor


class NonFiniteLossError(RuntimeError):
    """The training loss is NaN or infinite."""


class StopOnNonFiniteLoss(Callback):
    """Raises at the first training loss that is NaN or infinite and names its batch, and the terms that are to blame.

    The terms are those that the module has left under ``loss_terms``, a dict of tensors by name.

    On a CPU the loss is looked at before the backward pass, so that the weights stay good. On a GPU looking at it
    would make the host wait at every step: there the first bad step is remembered on the device and looked up every
    ``log_every_n_steps``, before validation and before a checkpoint is written.
    """

    def __init__(self) -> None:
        # Of the loss ("") and of its terms int64 (), on the device: the first bad batch of this epoch, or -1.
        self._first_bad: dict[str, Tensor] = {}

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Look at the loss, or remember it for later."""
        batch = trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1
        terms: Any = getattr(pl_module, "loss_terms", {})
        if loss.device.type == "cpu":
            if not math.isfinite(loss.item()):
                self._stop(trainer, batch, [name for name, term in terms.items() if not term.isfinite().all()])
            return
        self._remember(batch, {"": loss.detach(), **terms})
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

    def _remember(self, batch: int, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            before = self._first_bad.get(name)
            before = torch.tensor(-1, device=value.device) if before is None else before
            bad = (before < 0) & ~torch.isfinite(value).all()
            self._first_bad[name] = torch.where(bad, batch, before)

    def _look(self, trainer: Trainer) -> None:
        if self._first_bad and (batch := int(self._first_bad[""])) >= 0:
            terms = [name for name, first in self._first_bad.items() if name and int(first) == batch]
            self._first_bad = {}
            self._stop(trainer, batch, terms)

    def _stop(self, trainer: Trainer, batch: int, terms: list[str]) -> None:
        indices = getattr(getattr(trainer.train_dataloader, "batch_sampler", None), "indices", None)
        samples = f" (training samples {indices(batch)})" if callable(indices) else ""
        named = f" ({', '.join(terms)})" if terms else ""
        raise NonFiniteLossError(
            f"the training loss{named} is not finite at epoch {trainer.current_epoch}, batch {batch}{samples}. "
            "Checkpoints written before are untouched; a smaller learning rate, a warm-up, trainer.gradient_clip_val "
            "or trainer.precision 32-true usually helps"
        )
