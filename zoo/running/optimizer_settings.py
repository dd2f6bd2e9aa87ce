"""What a run's optimizers and schedules were made with, in plain values: does a resumed run ask for something else?

Lightning restores an optimizer with its settings, so that a rate that is asked for with ``--ckpt_path`` would be
dropped without a word.
"""

import json
from collections.abc import Iterator
from typing import Any

from lightning import Trainer
from torch import Tensor

HOW = ("foreach", "fused", "capturable", "differentiable")  # a step is computed, not what it computes
Settings = dict[str, list[dict[str, Any]]]


def settings_of(trainer: Trainer) -> Settings:
    """What optimizers and schedules were made with; to be asked before a checkpoint is restored into them.

    Returns:
        ``optimizers``, one entry for each group of parameters with its ``class``; ``schedules``, one for each.
    """
    groups = [(optimizer, group) for optimizer in trainer.optimizers for group in optimizer.param_groups]
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
    return {
        "optimizers": [{"class": type(optimizer).__name__} | _of_group(group) for optimizer, group in groups],
        "schedules": [_of_schedule(each) for each in schedules],
    }


def other_kinds(before: Settings, now: Settings) -> str:
    """The classes of both, where they or the numbers of groups differ: nothing can be restored then."""
    kinds = [[each["class"] for each in _parts(every, "optimizers", "schedules")] for every in (before, now)]
    return "" if kinds[0] == kinds[1] else " with ".join(kinds[0]) + ", now " + " with ".join(kinds[1])


def changes(before: Settings, now: Settings, same_length: bool) -> list[str]:
    """What differs between settings of the same kinds.

    Args:
        before: Of the checkpoint.
        now: Of the run.
        same_length: Whether both have as many steps; else what schedules derive from that differs too, and is not
            looked at.
    """
    kinds = ("optimizers", "schedules") if same_length else ("optimizers",)
    pairs = zip(_parts(before, *kinds), _parts(now, *kinds), strict=True)
    said = [f"{key} {one[key]}, now {other[key]}" for one, other in pairs for key in _differing(one, other)]
    return list(dict.fromkeys(said))


def take(trainer: Trainer, before: Settings, now: Settings, same_length: bool) -> None:
    """Put the settings of the run in the place of the checkpoint's; the rates move in proportion.

    Schedules stay as they were made for a run of another length, as in :func:`changes`.
    """
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    for group, was, wanted in zip(groups, before["optimizers"], now["optimizers"], strict=True):
        group.update({key: wanted[key] for key in _differing(was, wanted) if key != "lr"})
        group["lr"] = group["lr"] * (wanted["lr"] / was["lr"]) if was["lr"] else wanted["lr"]
        if "initial_lr" in group:
            group["initial_lr"] = wanted["lr"]
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
    # Averaging of weights has dropped its schedule by then.
    for schedule, was, wanted in zip(schedules, before["schedules"], now["schedules"], strict=False):
        _retune(schedule, was, wanted if same_length else was)


def _retune(schedule: Any, before: dict[str, Any], now: dict[str, Any]) -> None:
    if hasattr(schedule, "base_lrs"):
        schedule.base_lrs = [group.get("initial_lr", group["lr"]) for group in schedule.optimizer.param_groups]
    for key in _differing(before, now):
        setattr(schedule, key, now[key])
    parts = (getattr(schedule, "_schedulers", []), before.get("_schedulers", []), now.get("_schedulers", []))
    for part, was, wanted in zip(*parts, strict=True):  # of a sequence of schedules
        _retune(part, was, wanted)


def _parts(settings: Settings, *kinds: str) -> Iterator[dict[str, Any]]:
    """All of these kinds, and of a sequence of schedules each."""
    left = [each for kind in reversed(kinds) for each in reversed(settings[kind])]
    while left:
        yield (each := left.pop())
        left += reversed(each.get("_schedulers", []))


def _differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Of the keys that both have, as another version of torch may know more; parts are compared by themselves."""
    both = [key for key in before if key in now and key != "_schedulers"]
    return [key for key in both if json.dumps(before[key]) != json.dumps(now[key])]


def _of_group(group: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in group.items() if key not in ("params", "initial_lr", *HOW)}
    return _plain(kept | {"lr": float(group.get("initial_lr", group["lr"]))})


def _of_schedule(schedule: Any) -> dict[str, Any]:
    """Without the rates, which are the optimizer's."""
    kept = {key: value for key, value in schedule.state_dict().items() if key not in ("base_lrs", "_last_lr")}
    if "_schedulers" in kept:
        kept["_schedulers"] = [_of_schedule(part) for part in schedule._schedulers]
    return {"class": type(schedule).__name__} | _plain(kept)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Those that can be written to a checkpoint and compared."""
    simple = {key: _simple(value) for key, value in values.items()}
    return {key: value for key, value in simple.items() if _is_plain(value)}


def _simple(value: Any) -> Any:
    """A number of a tensor of one; a dictionary of a Counter, as MultiStepLR keeps its milestones."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    return dict(value) if isinstance(value, dict) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(each) for pair in value.items() for each in pair)
    if isinstance(value, list | tuple):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, bool | int | float | str)
