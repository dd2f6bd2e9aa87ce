"""Exact resuming: the random state and the place in the data that Lightning leaves out."""

import math
import random
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from zoo.arguments import plain
from zoo.running.optimizer_settings import Settings, changes, other_kinds, settings_of, take

Other = Literal["data_set", "split", "batch_size", "classes", "optimizer"]
SAID: dict[Other, str] = {  # of the data
    "data_set": "data set",
    "split": "training samples (split_seed, val_size, train_size, or the files themselves)",
    "batch_size": "global batch",
    "classes": "class list",
}


class ExactResume(Callback):
    """Saves every process's random state in the checkpoint and sets it again when training goes on.

    Under gradient accumulation in one process the gradients collected so far are kept as well. With a training loader
    whose place is saved (``datamodules.sampling``), a run that was killed and resumed ends with the weights of one that
    was not, to the last bit, on the same machine.

    A run is not resumed on another data set, split, global batch or class list, nor with other settings of its
    optimizer or schedule, unless that is asked for by name.

    Args:
        allowed: What may be another one: ``data_set`` (and with it ``split``), ``split``, ``batch_size``, ``classes``,
            ``optimizer``. Where the samples or the batch are, training goes on with the next batch of a fresh order.
            Where the optimizer's settings are, it goes on with what it remembers and with the new settings.

    Raises:
        ValueError: The data are not those that the checkpoint was trained on, or the optimizer is another one.
    """

    def __init__(self, allowed: Sequence[Other] = ()) -> None:
        self.allowed = {*allowed, *(["split"] if "data_set" in allowed else [])}
        self._trained_on: dict[str, Any] = {}
        self._places: list[Any] = []
        self._states: list[dict[str, Any]] | None = None
        self._gradients: dict[str, Tensor] = {}
        self._planned_steps: int | None = None
        self._settings: Settings | None = None  # of this run
        self._settings_before: Settings | None = None  # of the checkpoint

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse another optimizer, before Lightning restores into it what the checkpoint's remembers."""
        before, self._settings = self._settings_before, settings_of(trainer)
        if before is None:
            return
        if any(isinstance(each, StochasticWeightAveraging) for each in trainer.callbacks):  # type: ignore[attr-defined]
            # Resumed after its beginning, it has dropped the schedule whose place it takes.
            self._settings["schedules"] = self._settings["schedules"] or before["schedules"]
        kinds = other_kinds(before, self._settings)
        same_length = self._planned_steps == planned_steps(trainer)
        found = [kinds] if kinds else changes(before, self._settings, same_length)
        if not found:
            self._settings_before = None
        elif kinds or "optimizer" not in self.allowed:
            asking = "" if kinds else ", or ask for it: --resume_with_other optimizer"
            raise ValueError(
                f"the checkpoint was trained with another optimizer or schedule: {'; '.join(found)}. Resume with the "
                f"same, start anew from its weights (--model.init_args.weights FILE){asking}"
            )
        else:
            rank_zero_warn(f"resumed with other settings, as asked: {'; '.join(found)}")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Gather the states of all processes: rank 0 alone writes the file."""
        states: list[Any] = [_random_state(pl_module.device)]
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, _random_state(pl_module.device))
        checkpoint["random_states"] = states
        checkpoint["planned_steps"] = planned_steps(trainer)
        checkpoint["optimizer_settings"] = self._settings
        checkpoint["trained_on"] = trained_on(trainer)
        if trainer.fit_loop._should_accumulate() and trainer.world_size == 1:
            gradients = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
            checkpoint["gradients"] = gradients  # of the batches since the last optimizer step

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the states until training starts: building the loaders may draw random numbers."""
        self._states = checkpoint.get("random_states")
        self._gradients = checkpoint.get("gradients", {})
        self._planned_steps = checkpoint.get("planned_steps")
        self._settings_before = checkpoint.get("optimizer_settings")
        self._trained_on = checkpoint.get("trained_on", {})
        if self.allowed:  # the loader would refuse the place of others: it is given only if they are the same
            loop = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
            self._places, loop["combined_loader"] = loop.get("combined_loader", []), []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse other data; set the place in the data and the random state where the checkpoint had them."""
        loop = trainer.fit_loop
        before, self._trained_on = self._trained_on, {}
        others = self._refuse_others(before, trained_on(trainer)) if before else []
        if self._places and not {"split", "batch_size"} & {*others}:
            loop._combined_loader_states_to_load = self._places
        self._places = []
        if loop._combined_loader_states_to_load and loop._combined_loader is not None:
            # Lightning restores a loader's place when it makes the loader. A schedule that asks for the number of
            # steps has it made before the checkpoint is read, and the place was then lost; at the end of an epoch
            # it is not restored at all, and with it the seed of the order.
            loop._combined_loader._load_state_dicts(loop._combined_loader_states_to_load)
            loop._combined_loader_states_to_load = []
            iter(loop._data_fetcher)  # type: ignore[arg-type]
        for name, parameter in pl_module.named_parameters():
            if name in self._gradients:
                parameter.grad = self._gradients[name].to(parameter.device)
        self._gradients = {}
        planned, self._planned_steps = self._planned_steps, None
        if planned is not None and planned != planned_steps(trainer) and trainer.lr_scheduler_configs:
            rank_zero_warn(
                f"the resumed run was planned for {planned} steps, this one for {planned_steps(trainer)}: its "
                "learning-rate schedule goes on as it was made, for the first number; torch's cosine rises again after "
                "them. For another length start anew from the checkpoint with --model.init_args.weights"
            )
        made_with, self._settings_before = self._settings_before, None
        if made_with is not None and self._settings is not None:
            take(trainer, made_with, self._settings, planned == planned_steps(trainer))
        states, self._states = self._states, None
        if states is None:
            if trainer.global_rank:  # else all processes would augment and drop out alike; rank 0 stays as it is alone
                torch.manual_seed(torch.initial_seed() + trainer.global_rank)
            return
        if len(states) != trainer.world_size:
            rank_zero_warn(
                f"the checkpoint was written by {len(states)} processes and is resumed by {trainer.world_size}: "
                "training goes on from its weights, but not with the random numbers of the first run"
            )
            return
        _set_random_state(states[trainer.global_rank], pl_module.device)

    def _refuse_others(self, before: dict[str, Any], now: dict[str, Any]) -> list[Other]:
        """What differs; what was not asked for is an error."""
        others = [name for name in SAID if name in before and name in now and before[name] != now[name]]
        refused = [name for name in others if name not in self.allowed]
        if refused:
            told = "; ".join(f"{SAID[name]}: {_differ(before[name], now[name])}" for name in refused)
            names = refused[0] if len(refused) == 1 else f"'[{', '.join(refused)}]'"
            raise ValueError(
                f"the checkpoint was trained on other data: {told}. Resume with the same, start anew from its weights "
                f"(--model.init_args.weights FILE), or ask for it: --resume_with_other {names}"
            )
        if others:
            rank_zero_warn(f"resumed on others, as asked: {', '.join(SAID[n] for n in SAID if n in others)}")
        return others


def planned_steps(trainer: Trainer) -> int:
    """Optimizer steps of the run; -1 where it has no end."""
    steps = trainer.estimated_stepping_batches
    return -1 if steps == math.inf else int(steps)


def trained_on(trainer: Trainer) -> dict[str, Any]:
    """What the data of a fit are, as far as data module and training loader say, in plain values.

    Returns:
        Of these what is known: ``data_set``, its name; ``split``, a fingerprint of the training samples;
        ``batch_size``, samples of all processes together; ``classes``, their names.
    """
    data: Any = getattr(trainer, "datamodule", None)
    loader: Any = trainer.train_dataloader
    sampler = getattr(loader, "batch_sampler", None)
    facts: dict[str, Any] = {}
    if data is not None:
        facts["data_set"] = type(data).__name__
        names = getattr(data, "class_names", None)
        facts["classes"] = [] if names is None else list(names)
        facts["batch_size"] = getattr(data, "batch_size", None)
    facts["split"] = getattr(sampler, "split", None)
    if sampler is not None and hasattr(sampler, "world_size"):  # it counts the samples of all processes
        facts["batch_size"] = sampler.batch_size
    elif (size := getattr(loader, "batch_size", None)) is not None:
        facts["batch_size"] = size * trainer.world_size
    return {name: plain(value, f"the data module's {name}") for name, value in facts.items() if value}


def _differ(before: Any, now: Any) -> str:
    """Both values; of lists, which are long, what only one of them has."""
    if not isinstance(before, list):
        return f"{before}, now {now}"
    if gone := [name for name in before if name not in now]:
        return f"{len(before)} names, now {len(now)}; {', '.join(map(str, gone[:3]))} … are no longer there"
    if new := [name for name in now if name not in before]:
        return f"{len(before)} names, now {len(now)}; {', '.join(map(str, new[:3]))} … are new"
    return "the same names in another order"


def _random_state(device: torch.device) -> dict[str, Any]:
    """The state of the generators that training may draw from, as plain values and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "mps": torch.mps.get_rng_state() if device.type == "mps" else None,
    }


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    if state["mps"] is not None and device.type == "mps":
        torch.mps.set_rng_state(state["mps"])
