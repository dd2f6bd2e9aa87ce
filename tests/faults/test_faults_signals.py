"""Signals, exceptions and deaths at any moment: a checkpoint is there, the status tells, the same command goes on."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lightning import Callback
from PIL import Image
from small_runs import Child, fit, together

from zoo.running.checkpoint import read_checkpoint

pytestmark = pytest.mark.faults

LAST = Path("runs/lenet/embedded/version_0/checkpoints/last.ckpt")
SMALL = ("trainer.max_epochs 3", "data.eval_batch_size 90")
STEPS = 9  # of an epoch: 1257 digits, without those that are held out, in batches of 128


class At(Callback):
    """Does something to this process, or to all, once: when a hook is called in the second epoch."""

    def __init__(self, hook, act, rank=0):
        self.act, self.rank, self.done = act, rank, False
        setattr(self, hook, self._look)

    def _look(self, trainer, pl_module, *more):
        second = trainer.current_epoch == 1 and not trainer.sanity_checking
        late = trainer.fit_loop.epoch_loop.batch_progress.current.ready >= 4
        if second and late and not self.done and trainer.global_rank == self.rank:
            self.done = True
            self.act(trainer)


def send(number):
    """A signal to this process, which then waits until it has come."""

    def act(trainer):
        os.kill(os.getpid(), number)
        time.sleep(0.05)

    return act


def train(callback=None, *settings, ckpt_path=None):
    more = [f"ckpt_path {ckpt_path}"] if ckpt_path else []
    fit("classification", *SMALL, *settings, *more, callbacks=(callback,) if callback else ())


HOOKS = {"training": "on_before_optimizer_step", "validation": "on_validation_batch_start"}


@pytest.mark.parametrize("phase", HOOKS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_the_same_command_goes_on(number, phase):
    child = Child(lambda: train(At(HOOKS[phase], send(number))))
    assert child.wait(60) == 128 + number, child.output
    assert "Traceback" not in child.output
    reached = read_checkpoint(LAST)["global_step"]
    assert reached == (STEPS + 4 if phase == "training" else 2 * STEPS)
    child = Child(lambda: train(ckpt_path="last"))
    assert child.wait(60) == 0, child.output
    assert f"last.ckpt, step {reached}" in child.output
    assert read_checkpoint(str(LAST).replace("version_0", "version_1"))["global_step"] == 3 * STEPS


@pytest.mark.parametrize("phase", HOOKS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("to", ["first", "second", "group"])
def test_a_signal_to_one_process_or_to_the_group_ends_both_and_saves_once(number, phase, to):
    ranks = {"first": [0], "second": [1], "group": [0, 1]}[to]

    def run(rank):
        callback = At(HOOKS[phase], send(number), rank) if rank in ranks else None
        train(callback, "trainer.devices 2", "trainer.strategy ddp", "trainer.accelerator cpu")

    children = together(2, run)
    statuses = [child.wait(60) for child in children]
    outputs = "".join(child.output for child in children)
    assert all(statuses[rank] == 128 + number for rank in ranks), outputs
    assert all(status > 128 for status in statuses), outputs
    assert "Traceback" not in outputs
    assert outputs.count("asked to stop: saved") == 1
    content = read_checkpoint(LAST)
    assert content["global_step"] == (STEPS + 4 if phase == "training" else 2 * STEPS)
    assert len(content["random_states"]) == 2


PICTURES = """
seed_everything: 0
model: {class_path: zoo.LeNet, init_args: {in_channels: 3, image_size: 16}}
data:
  class_path: datamodules.ImageFolderDataModule
  init_args: {root: pictures, image_size: 16, batch_size: 8, val_size: 8, workers: 2}
trainer: {max_epochs: 3}
expect: [{metric: test/accuracy, at_least: 0, source: a test}]
"""


def send_to_the_group(number):
    """A signal to this process and its workers, sent by another one, as clusters, systemd and shells do."""

    def act(trainer):
        script = "import os, sys; os.killpg(int(sys.argv[1]), int(sys.argv[2]))"
        subprocess.run([sys.executable, "-c", script, str(os.getpgrp()), str(int(number))], capture_output=True)
        time.sleep(0.05)

    return act


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_that_reaches_the_workers_too_saves_and_the_same_command_goes_on(number):
    for place in range(64):
        folder = Path("pictures") / "ab"[place % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (3 * place, 100, 255 - 3 * place)).save(folder / f"{place}.png")
    Path("pictures.yaml").write_text(PICTURES)
    last = Path("runs/pictures/version_0/checkpoints/last.ckpt")

    def run():
        os.setpgid(0, 0)
        fit("pictures.yaml", callbacks=(At("on_before_optimizer_step", send_to_the_group(number)),))

    child = Child(run)
    assert child.wait(60) == 128 + number, child.output
    assert "Traceback" not in child.output
    assert read_checkpoint(last)["global_step"] == 7 + 4
    child = Child(lambda: fit("pictures.yaml", "ckpt_path last"))
    assert child.wait(60) == 0, child.output
    assert read_checkpoint(str(last).replace("version_0", "version_1"))["global_step"] == 3 * 7


class Twice(At):
    """Sends a signal, and once more while the state is being saved."""

    def __init__(self, number):
        super().__init__("on_before_optimizer_step", send(number))
        self.again = False

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if self.done and not self.again:
            self.again = True
            self.act(trainer)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_that_is_repeated_while_the_state_is_saved_changes_nothing(number, processes):
    shared = (f"trainer.devices {processes}", "trainer.accelerator cpu")
    shared += ("trainer.strategy ddp",) if processes > 1 else ()
    children = together(processes, lambda rank: train(Twice(number) if rank == 0 else None, *shared))
    outputs = [f"{child.wait(60)} {child.output}" for child in children]
    assert outputs[0].startswith(str(128 + number)), outputs
    assert "asked to stop: saved" in outputs[0]
    assert read_checkpoint(LAST)["global_step"] == STEPS + 4


def validations(*versions):
    """Step and loss of each validation of some runs."""
    rows = []
    for version in versions:
        with Path(f"runs/lenet/embedded/version_{version}/metrics.csv").open(newline="") as file:
            rows += [(row["step"], row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")]
    return rows


def test_a_signal_before_a_validation_that_comes_after_so_many_steps_of_the_run_does_not_lose_it():
    every = ("trainer.check_val_every_n_epoch null", f"trainer.val_check_interval {STEPS + 4}")
    child = Child(lambda: train(At("on_before_optimizer_step", send(signal.SIGTERM)), *every))
    assert child.wait(60) == 128 + signal.SIGTERM, child.output
    assert read_checkpoint(LAST.with_name("best.ckpt"))["global_step"] == STEPS + 4
    child = Child(lambda: fit("classification", *SMALL, *every, "ckpt_path last"))
    assert child.wait(60) == 0, child.output
    child = Child(lambda: train(None, *every))
    assert child.wait(60) == 0, child.output
    assert validations(0, 1) == validations(2)
    assert len(validations(2)) == 3 * STEPS // (STEPS + 4)


def fail(trainer):
    raise RuntimeError("a fault")


def break_logger(trainer):
    def broken(*_, **__):
        raise OSError("the logger's disk is gone")

    trainer.loggers[0].log_metrics = broken


def break_metric(trainer):
    def broken(*_, **__):
        raise RuntimeError("a fault in compute")

    trainer.lightning_module.val_accuracy.compute = broken


@pytest.mark.parametrize(
    ("hook", "act", "every", "newest"),
    [
        ("on_train_batch_start", fail, None, STEPS),
        ("on_train_batch_end", fail, 0, STEPS + 3),  # saved after each step
        ("on_validation_batch_start", fail, None, STEPS),
        ("on_validation_end", fail, None, STEPS),
        ("on_validation_epoch_end", fail, None, STEPS),
        ("on_train_epoch_end", fail, None, STEPS),
        ("on_train_batch_start", break_metric, None, STEPS),
        ("on_train_batch_start", break_logger, None, STEPS),
    ],
)
def test_an_exception_at_any_hook_leaves_a_checkpoint_at_most_one_interval_old(hook, act, every, newest):
    def run():
        callbacks = "[{class_path: zoo.running.checkpoint.KeepLast, init_args: {minutes: 1.0e-9}}]"
        train(At(hook, act), *(["trainer.callbacks " + callbacks] if every is not None else []))

    child = Child(run)
    assert child.wait(60) not in (0, 70), child.output
    assert read_checkpoint(LAST)["global_step"] == newest, child.output
    child = Child(lambda: train(ckpt_path="last"))
    assert child.wait(60) == 0, child.output


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("death", ["killed", "exception"])
def test_when_one_process_dies_all_end_and_say_which_and_why(rank, death):
    act = send(signal.SIGKILL) if death == "killed" else fail

    def run(mine):
        callback = At("on_train_batch_start", act, rank) if mine == rank else None
        train(callback, "trainer.devices 3", "trainer.strategy ddp", "trainer.accelerator cpu", "data.batch_size 129")

    children = together(3, run)
    start = time.monotonic()
    statuses = [child.wait(60) for child in children]
    assert time.monotonic() - start < 60
    assert 0 not in statuses
    others = [child.output for number, child in enumerate(children) if number != rank]
    why = "it was killed" if death == "killed" else "RuntimeError: a fault"
    for output in others:
        assert f"process {rank} of this run ended: {why}" in output
    assert read_checkpoint(LAST)["global_step"] == STEPS


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("hook", "act", "why"),
    [
        ("on_validation_batch_start", fail, "RuntimeError: a fault"),
        ("on_train_batch_start", break_metric, "RuntimeError: a fault in compute"),
        ("on_save_checkpoint", fail, "RuntimeError: a fault"),
    ],
)
def test_a_process_that_fails_where_the_others_wait_for_its_share_ends_all(rank, hook, act, why):
    """In a validation, in a metric that is summed up together, in a checkpoint to which each gives its state."""

    def run(mine):
        callback = At(hook, act, rank) if mine == rank else None
        train(callback, "trainer.devices 2", "trainer.strategy ddp", "trainer.accelerator cpu")

    children = together(2, run)
    start = time.monotonic()
    statuses = [child.wait(60) for child in children]
    assert time.monotonic() - start < 60
    assert 0 not in statuses
    assert why in children[rank].output
    assert f"process {rank} of this run ended: {why}" in children[1 - rank].output
    assert read_checkpoint(LAST)["global_step"] == STEPS


@pytest.mark.parametrize("death", ["killed", "exception"])
@pytest.mark.parametrize("hook", ["prepare_data", "setup"])
def test_when_the_first_process_dies_while_the_others_wait_for_its_data_all_end_and_say_why(hook, death):
    def run(rank):
        def die(*_, **__):
            if rank == 0:
                time.sleep(1)  # by then the others wait
                (send(signal.SIGKILL) if death == "killed" else fail)(None)

        three = ("trainer.devices 3", "trainer.strategy ddp", "trainer.accelerator cpu")
        fit("classification", *SMALL, *three, data_hooks={hook: die})

    children = together(3, run)
    start = time.monotonic()
    statuses = [child.wait(60) for child in children]
    assert time.monotonic() - start < 60
    assert 0 not in statuses
    why = "it was killed" if death == "killed" else "RuntimeError: a fault"
    for child in children[1:]:
        assert f"process 0 of this run ended: {why}" in child.output, child.output
