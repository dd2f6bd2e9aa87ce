"""What a run holds in memory does not grow with its epochs, in its own process or in those that read for it."""

import os
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from small_runs import QUIET, TASKS, build
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datamodules.reading import Crops, PictureSet, once
from zoo.running import control_pictures, generated_pictures

NAMES = 1_000_000
MIB = 2**20


def held(value: Any, seen: set[int]) -> int:
    """Bytes of all tensors, arrays, texts and places in lists that are within reach."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, nn.Module) or is_dataclass(value):
        value = {name: part for name, part in vars(value).items() if name not in ("_trainer", "_fabric")}
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    return sum(8 + held(part, seen) for part in value) if isinstance(value, list | tuple | set) else 0


class Held(Callback):
    """What a model, its metrics among it, holds after each validation."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def on_validation_end(self, trainer, pl_module):
        self.bytes.append(held(pl_module, set()))


@pytest.mark.faults
@pytest.mark.parametrize("task", TASKS)
def test_a_model_holds_no_more_after_ten_validations_than_after_the_first_ones(task, tmp_path, monkeypatch):
    monkeypatch.setattr(generated_pictures, "FRAMES", 2)
    monkeypatch.setattr(control_pictures, "POINTS", 1)
    model, data = build(task)
    data.eval_batch_size = 4
    seen = Held()
    options = QUIET | {"logger": CSVLogger(tmp_path), "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    few = {"limit_train_batches": 2, "limit_val_batches": 2}
    Trainer(**options, **few, max_epochs=10, accelerator="cpu", callbacks=[seen]).fit(model, data)
    assert len(seen.bytes) == 10
    assert max(seen.bytes[4:]) <= max(seen.bytes[:4]), seen.bytes


class FreeCrops(Crops):
    """Crops of pictures that cost nothing to decode."""

    def centre(self, index: int) -> Tensor:
        assert int(self.pictures.path(index).stem) == index
        return torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8)


def private_to_workers(loader: DataLoader) -> int:
    """Bytes that each worker has for itself."""
    rows = [Path(f"/proc/{worker.pid}/smaps_rollup").read_text().splitlines() for worker in loader._iterator._workers]
    return sum(int(row.split()[1]) * 1024 for of_worker in rows for row in of_worker if row.startswith("Private_"))


def growth(names: Any) -> int:
    """By how many bytes two workers grow over five epochs, each of which looks at names all over the index."""
    crops = FreeCrops(PictureSet(Path("pictures"), names, np.zeros(NAMES, dtype=np.int64)), 1, 1, None)
    looks = [(0, 0, list(range(start, NAMES, 20_000))) for start in range(0, 20_000, 40)]
    jobs = [(0, 0, [0] * len(indices)) for _, _, indices in looks]  # at first, until all else has been touched
    with once(crops, jobs, workers=2) as loader:
        list(loader)
        before = private_to_workers(loader)
        jobs[:] = looks
        for _ in range(5):
            list(loader)
        return private_to_workers(loader) - before


@pytest.mark.faults
@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="who has which memory is asked of Linux")
def test_workers_hold_no_copy_of_the_index():
    names = [f"{index:09d}.jpg" for index in range(NAMES)]
    assert growth(np.array(names, dtype="S")) < 40 * MIB
    assert growth(names) > 80 * MIB, "of a list they would, or this test shows nothing"
