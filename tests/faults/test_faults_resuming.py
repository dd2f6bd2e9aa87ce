"""A run that was killed and goes on is the run that was not: weights, rates, metrics and counters, bit for bit."""

import csv
import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from lightning import Callback
from small_runs import TASKS, Child, fit

from zoo.running.checkpoint import read_checkpoint

pytestmark = pytest.mark.faults

EVERY_STEP = "{class_path: zoo.running.checkpoint.KeepLast, init_args: {minutes: 1.0e-9}}"
FREEZE = "{class_path: zoo.running.freezing.FreezeBackbone, init_args: {until_epoch: %d}}"
EMA = "{class_path: zoo.running.averaging.EMA, init_args: {decay: 0.9}}"
COSINE = "model.scheduler.class_path torch.optim.lr_scheduler.CosineAnnealingLR"
BY_WORKERS = ("data.cache false", "data.workers 2")
SHORT = ("trainer.max_epochs 4", "trainer.log_every_n_steps 1", "trainer.check_val_every_n_epoch 1")
# Task, settings, callbacks: what must come through a kill.
VARIANTS = {
    "classification": ("classification", ("data.translate 0",), ()),
    "augmented": ("classification", ("data.translate 2", COSINE), ()),
    "released at the kill": ("classification", (), (FREEZE % 2,)),
    "released before": ("classification", (), (FREEZE % 1,)),
    "released after": ("classification", (), (FREEZE % 3,)),
    "average": ("classification", (), (EMA,)),
    "augmented by workers": ("detection", ("data.flip true", "data.scale_jitter [0.5,1]", *BY_WORKERS), ()),
    "captioning": ("captioning", (), ()),
    "generation": ("generation", (), ()),
    "adversarial": ("adversarial", (), ()),
    "mesh": ("mesh", (), ()),
    "video": ("video", BY_WORKERS, ()),
    "control": ("control", (), ()),
}


class Record(Callback):
    """Writes down each step's rates and the weights' sum, at once: a kill loses nothing of it."""

    def __init__(self, name):
        self.file = Path(f"{name}.jsonl")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        weights = sum(parameter.double().sum().item() for parameter in pl_module.parameters())
        batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        row = (batches, trainer.global_step, trainer.current_epoch, rates, weights)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")


class Kill(Callback):
    """kill -9 at the start of a batch, counted over the run."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


def run(variant, *callbacks, last=False):
    """``zoo fit`` in a child; its status and what it printed."""
    task, settings, made = VARIANTS[variant]
    settings = (*SHORT, *settings, *(["ckpt_path last"] if last else []))
    child = Child(
        lambda: fit(task, *settings, f"trainer.callbacks [{', '.join([*made, EVERY_STEP])}]", callbacks=callbacks)
    )
    status = child.wait(150)
    return status, child.output


def folder(variant, version):
    return Path("runs") / TASKS[VARIANTS[variant][0]][0] / f"version_{version}"


def rows(name):
    """By batch what was written down; of one that was repeated the later."""
    return {row[0]: row for row in map(json.loads, Path(f"{name}.jsonl").read_text().splitlines())}


def metrics(*folders):
    """What the logs of one or more runs say, by step and name."""
    found = {}
    for each in folders:
        with (each / "metrics.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                found |= {(row["step"], name): value for name, value in row.items() if value}
    return found


def news(log):
    """Without what only repeats itself: Lightning writes a number again at steps that have no new one."""
    steps = sorted(log, key=lambda key: (key[1], int(key[0])))
    pairs = zip([("", ""), *steps], steps, strict=False)
    return {key: log[key] for before, key in pairs if before[1] != key[1] or log[before] != log[key]}


def same(one, other, where=""):
    """Whether two checkpoints' contents are equal to the last bit; else where they differ."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) or (one != one).equal(other != other) else [where]
    if isinstance(one, dict):
        keys = [] if one.keys() == other.keys() else [f"{where}: {one.keys() ^ other.keys()}"]
        return keys + [d for key in one if key in other for d in same(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [where]
        return [d for place, pair in enumerate(zip(one, other, strict=True)) for d in same(*pair, f"{where}[{place}]")]
    return [] if one == other or one != one else [f"{where}: {one} {other}"]


STATE = ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step", "random_states", "trained_on")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_run_goes_on_to_the_same_end(variant):
    status, output = run(variant, Record("straight"))
    assert status == 0, output
    straight = read_checkpoint(folder(variant, 0) / "checkpoints/last.ckpt")
    whole, log = rows("straight"), metrics(folder(variant, 0))
    per_epoch = len(whole) // 4
    assert len(whole) == 4 * per_epoch
    for number, killed in enumerate((2 * per_epoch, 2 * per_epoch + max(1, per_epoch // 2))):
        first, second = 2 * number + 1, 2 * number + 2
        status, output = run(variant, Record(f"{killed}"), Kill(killed))
        assert status == -signal.SIGKILL, output
        status, output = run(variant, Record(f"{killed}"), last=True)
        assert status == 0, output
        assert "last.ckpt, step" in output
        assert rows(f"{killed}") == whole, "rates, counters and weights of each step"
        resumed = read_checkpoint(folder(variant, second) / "checkpoints/last.ckpt")
        wanted = [key for key in straight if key in STATE or key.endswith(("DataModule", "curve"))]
        assert {"state_dict", "optimizer_states"} <= {*wanted}
        different = same({key: straight[key] for key in wanted}, {key: resumed[key] for key in wanted})
        assert not [each for each in different if "resumed" not in each]
        assert news(metrics(folder(variant, first), folder(variant, second))) == news(log)
    if variant == "average":
        assert straight["averaging_state"] if "averaging_state" in straight else straight["current_model_state"]


def test_a_run_that_is_killed_again_and_again_at_random_moments_comes_to_the_same_end():
    task, settings, _ = VARIANTS["augmented"]
    settings = (*SHORT, *settings, f"trainer.callbacks [{EVERY_STEP}]")

    def straight():
        Path("apart").mkdir()
        os.chdir("apart")  # else its checkpoint is the last at first
        fit(task, *settings, callbacks=(Record("straight"),))

    child = Child(straight)
    assert child.wait(100) == 0, child.output
    moments, kills = random.Random(0), 0
    for attempt in range(30):
        child = Child(lambda: fit(task, *settings, "ckpt_path last", callbacks=(Record("killed"),)))
        lines = len(Path("killed.jsonl").read_text().splitlines()) if attempt else 0
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:  # until it trains: before, there is nothing to disturb
            if Path("killed.jsonl").exists() and len(Path("killed.jsonl").read_text().splitlines()) > lines:
                break
            if os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.3))
        child.send(signal.SIGKILL)
        status = child.wait(60)
        if status == 0:
            break
        assert status == -signal.SIGKILL, child.output
        kills += 1
    assert status == 0, "it never came to its end"
    assert kills >= 2
    assert rows("killed") == rows("apart/straight")


class KillBetween(Callback):
    """kill -9 after ``best.ckpt`` is written and before ``last.ckpt`` is."""

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_between_the_two_files_of_an_epoch_changes_nothing():
    """``best.ckpt`` then has more steps than ``last.ckpt``: training goes on from it."""
    task, settings, _ = VARIANTS["augmented"]
    child = Child(lambda: fit(task, *SHORT, *settings, callbacks=(Record("straight"),)))
    assert child.wait(100) == 0, child.output
    child = Child(lambda: fit(task, *SHORT, *settings, callbacks=(Record("killed"), KillBetween())))
    assert child.wait(100) == -signal.SIGKILL, child.output
    child = Child(lambda: fit(task, *SHORT, *settings, "ckpt_path last", callbacks=(Record("killed"),)))
    assert child.wait(100) == 0, child.output
    assert rows("killed") == rows("straight")
    one, other = (read_checkpoint(folder("augmented", k) / "checkpoints/last.ckpt") for k in (0, 2))
    assert not same({key: one[key] for key in STATE}, {key: other[key] for key in STATE})


@pytest.mark.parametrize(
    ("change", "asked", "message"),
    [
        ("data.batch_size 64", "batch_size", "batch_size=128|global batch: 128, now 64"),
        ("data.split_seed 7", "split", "other samples|training samples"),
        ("data.val_size 100", "split", "other samples|training samples"),
        ("model.optimizer.init_args.lr 0.01", "optimizer", "lr 0.002, now 0.01"),
    ],
)
def test_other_data_are_refused_with_the_words_that_ask_for_them(change, asked, message):
    child = Child(lambda: fit("classification", "trainer.max_epochs 1"))
    assert child.wait(60) == 0, child.output
    more = ("trainer.max_epochs 2", "ckpt_path last", change)
    child = Child(lambda: fit("classification", *more))
    assert child.wait(60) == 2, child.output
    assert f"--resume_with_other {asked}" in child.output
    assert re.search(message, child.output), child.output
    assert "Traceback" not in child.output
    assert not list(Path("runs").glob("**/version_1")), "nothing is left of what was refused"
    child = Child(lambda: fit("classification", *more, f"resume_with_other {asked}"))
    assert child.wait(60) == 0, child.output
    files = [path for path in Path("runs").glob("**/last.ckpt") if "version_0" not in path.parts]
    assert [read_checkpoint(path)["epoch"] for path in files] == [1]


def test_another_number_of_classes_is_refused_in_a_line():
    child = Child(lambda: fit("classification", "trainer.max_epochs 1"))
    assert child.wait(60) == 0, child.output
    pictures = Path("pictures")
    for name in ("a", "b", "c"):
        (pictures / name).mkdir(parents=True)
    from PIL import Image

    for place, name in enumerate("abc" * 8):
        Image.new("L", (8, 8), 10 * place).save(pictures / name / f"{place}.png")
    settings = ["--data", "datamodules.ImageFolderDataModule", "--data.init_args.root", "pictures"]

    def other():
        from zoo.cli import main

        raise SystemExit(main(["fit", "lenet/embedded", *settings, "--ckpt_path", "last"]))

    child = Child(other)
    assert child.wait(60) == 2, child.output
    assert "knows 10 classes, ImageFolderDataModule has 3" in child.output
    assert "Traceback" not in child.output
