"""Exact resuming: the random state that Lightning leaves out of its checkpoints."""

import random
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn


class ExactResume(Callback):
    """Saves every process's random state in the checkpoint and sets it again when training goes on.

    With a training loader whose place is saved (``datamodules.sampling``), a run that was killed and resumed ends with
    the weights of one that was not, to the last bit, on the same machine.
    """

    def __init__(self) -> None:
        self._states: list[dict[str, Any]] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Gather the states of all processes: rank 0 alone writes the file."""
        states: list[Any] = [_random_state(pl_module.device)]
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, _random_state(pl_module.device))
        checkpoint["random_states"] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the states until training starts: building the loaders may draw random numbers."""
        self._states = checkpoint.get("random_states")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the random state where the checkpoint had it."""
        states, self._states = self._states, None
        if states is None:
            return
        if len(states) != trainer.world_size:
            rank_zero_warn(
                f"the checkpoint was written by {len(states)} processes and is resumed by {trainer.world_size}: "
                "training goes on from its weights, but not with the random numbers of the first run"
            )
            return
        _set_random_state(states[trainer.global_rank], pl_module.device)


def _random_state(device: torch.device) -> dict[str, Any]:
    """The state of the generators that training may draw from, as plain values and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
