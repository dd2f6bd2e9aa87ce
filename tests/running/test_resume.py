"""A real run of the command, killed and preempted: it goes on as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning import Callback, Trainer, seed_everything

import datamodules
from zoo import LeNet
from zoo.running.checkpoint import SafeCheckpointIO, read_checkpoint
from zoo.running.resume import ExactResume
from zoo.running.schedules import Cosine, Linear

ROOT = Path(__file__).parents[2]
# Every step is saved, so that a kill at any moment lands in the middle of an epoch. Noise and momentum make any
# difference in order, random numbers or optimizer state visible in the weights.
RECIPE = """
seed_everything: 1
model:
  class_path: zoo.LeNet
  init_args:
    image_size: 8
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.05, momentum: 0.9}}
    scheduler: {class_path: torch.optim.lr_scheduler.CosineAnnealingLR}
data:
  class_path: datamodules.DigitsDataModule
  init_args: {image_size: 8, batch_size: 32, translate: 1}
trainer:
  max_epochs: 3
  enable_progress_bar: false
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {filename: last, every_n_train_steps: 1, enable_version_counter: false}
"""


def start(folder: Path, *overrides: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "zoo", "fit", "noisy.yaml", *overrides]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def last(folder: Path, version: int) -> Path:
    return folder / "runs" / "noisy" / f"version_{version}" / "checkpoints" / "last.ckpt"


def wait_for_step(process: subprocess.Popen, path: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and read_checkpoint(path)["global_step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate(timeout=10)[0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "noisy.yaml").write_text(RECIPE)
    process = start(folder)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    content = read_checkpoint(last(folder, 0))
    assert content["global_step"] == 3 * 39
    return content


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, -9), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_run_that_was_ended_by_a_signal_goes_on_to_the_same_weights(tmp_path, whole, number, status):
    (tmp_path / "noisy.yaml").write_text(RECIPE)
    first = start(tmp_path)
    wait_for_step(first, last(tmp_path, 0), 50)
    first.send_signal(number)
    output = first.communicate(timeout=60)[0]
    assert first.returncode == status, output
    assert "Traceback" not in output
    reached = read_checkpoint(last(tmp_path, 0))["global_step"]
    assert 50 <= reached < 3 * 39
    assert reached % 39, "the signal hit the end of an epoch: nothing was shown"
    second = start(tmp_path, "--ckpt_path", "last")
    output = second.communicate(timeout=300)[0]
    assert second.returncode == 0, output
    assert f"version_0/checkpoints/last.ckpt, step {reached}" in output
    resumed = read_checkpoint(last(tmp_path, 1))
    assert resumed["global_step"] == 3 * 39
    for name, value in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name


def options(**more):
    return {"logger": False, "enable_progress_bar": False, "enable_model_summary": False} | more


def test_resuming_on_another_global_batch_in_the_middle_of_an_epoch_is_refused(tmp_path):
    def fit(batch_size, ckpt_path=None, **more):
        seed_everything(0, verbose=False)
        trainer = Trainer(callbacks=[ExactResume()], plugins=[SafeCheckpointIO()], **options(**more))
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR
        trainer.fit(
            LeNet(image_size=8, scheduler=scheduler),
            datamodules.DigitsDataModule(image_size=8, batch_size=batch_size),
            ckpt_path=ckpt_path,
        )
        return trainer

    trainer = fit(32, max_steps=5, enable_checkpointing=False)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"batch_size=32.*now has batch_size=64"):
        fit(64, tmp_path / "a.ckpt", max_steps=9, enable_checkpointing=False)


def test_random_numbers_of_another_world_size_are_left_alone_with_a_warning():
    class World:
        world_size, global_rank = 3, 0

        class fit_loop:  # noqa: N801
            _combined_loader_states_to_load = ()

    callback, model = ExactResume(), LeNet(image_size=8)
    callback.on_load_checkpoint(World, None, {"random_states": [{}]})
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match="written by 1 processes and is resumed by 3"):
        callback.on_train_start(World, model)
    assert torch.equal(torch.get_rng_state(), before)


def test_resuming_on_another_split_is_refused_and_another_length_is_said(tmp_path):
    def fit(ckpt_path=None, split_seed=0, **more):
        seed_everything(0, verbose=False)
        trainer = Trainer(callbacks=[ExactResume()], plugins=[SafeCheckpointIO()], **options(**more))
        model = LeNet(image_size=8, scheduler=torch.optim.lr_scheduler.CosineAnnealingLR)
        data = datamodules.DigitsDataModule(image_size=8, batch_size=256, split_seed=split_seed)
        trainer.fit(model, data, ckpt_path=ckpt_path)
        return trainer

    fit(max_epochs=1, enable_checkpointing=False).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="trained on other"):
        fit(tmp_path / "a.ckpt", split_seed=1, max_epochs=2, enable_checkpointing=False)
    with pytest.warns(UserWarning, match="planned for 4 steps, this one for 8"):
        fit(tmp_path / "a.ckpt", max_epochs=2, enable_checkpointing=False)


class Renamed(datamodules.DigitsDataModule):
    """The digits by another name, and with two of their names exchanged."""

    class_names = ["1", "0", *"23456789"]


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("steps", [4, 6])  # at the end of an epoch and within one
@pytest.mark.parametrize(
    ("kind", "arguments", "allowed", "message"),
    [
        (
            datamodules.DigitsDataModule,
            {"batch_size": 128},
            ["batch_size"],
            "global batch: 256, now 128|batch_size=256.*now has batch_size=128",
        ),
        (datamodules.DigitsDataModule, {"split_seed": 1}, ["split"], "other samples|training samples"),
        (datamodules.DigitsDataModule, {"val_size": 200}, ["split"], "other samples|training samples"),
        (Renamed, {}, ["data_set", "classes"], r"data set: DigitsDataModule, now Renamed.*class list.*other order"),
    ],
)
def test_other_data_are_refused_unless_asked_for(tmp_path, kind, arguments, allowed, message, steps, asked):
    def fit(kind, max_steps, ckpt_path=None, **arguments):
        seed_everything(0, verbose=False)
        made = ExactResume(allowed if asked else ())
        trainer = Trainer(
            callbacks=[made], plugins=[SafeCheckpointIO()], **options(max_steps=max_steps, enable_checkpointing=False)
        )
        data = kind(**{"image_size": 8, "batch_size": 256} | arguments)
        trainer.fit(LeNet(image_size=8), data, ckpt_path=ckpt_path)
        return trainer

    fit(datamodules.DigitsDataModule, steps).save_checkpoint(tmp_path / "a.ckpt")
    if not asked:
        with pytest.raises(ValueError, match=message) as caught:
            fit(kind, steps + 2, tmp_path / "a.ckpt", **arguments)
        assert "--resume_with_other" in str(caught.value)
        assert all(name in str(caught.value).split("--resume_with_other")[1] for name in allowed)
    else:
        with pytest.warns(UserWarning, match="resumed on others, as asked"):
            assert fit(kind, steps + 2, tmp_path / "a.ckpt", **arguments).global_step == steps + 2


def resumed_with(optimizer, scheduler, allowed=(), ckpt_path=None, max_steps=8, until=None, **more):
    """A run of eight steps, or what of it was made until it was stopped."""
    seed_everything(0, verbose=False)

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == until

    class Rates(Callback):
        def __init__(self):
            self.seen = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.seen.append([group["lr"] for group in optimizer.param_groups])

    rates = Rates()
    trainer = Trainer(
        callbacks=[ExactResume(allowed), Stop(), rates],
        plugins=[SafeCheckpointIO()],
        **options(max_steps=max_steps, enable_checkpointing=False, **more),
    )
    data = datamodules.DigitsDataModule(image_size=8, batch_size=256)
    trainer.fit(LeNet(image_size=8, optimizer=optimizer, scheduler=scheduler), data, ckpt_path=ckpt_path)
    return trainer, [rate for (rate,) in rates.seen]


def sgd(lr, momentum=0.9):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=momentum)


SCHEDULES = {
    "none": None,
    "torch": torch.optim.lr_scheduler.CosineAnnealingLR,
    "zoo": Cosine,
    "sequence": lambda optimizer, steps: torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, 3), Cosine(optimizer, steps - 3)],
        milestones=[3],
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_another_rate_is_refused_and_taken_where_it_is_asked_for(tmp_path, schedule):
    """As asked, the rates that follow are those of a run with the new rate, and momentum is remembered."""
    make = SCHEDULES[schedule]
    stopped, _ = resumed_with(sgd(0.05), make, until=5)
    stopped.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(
        ValueError, match=r"lr 0\.05, now 0\.01; momentum 0\.9, now 0\.8\..*resume_with_other optimizer"
    ):
        resumed_with(sgd(0.01, 0.8), make, ckpt_path=tmp_path / "a.ckpt")
    _, straight = resumed_with(sgd(0.01, 0.8), make)
    with pytest.warns(UserWarning, match=r"as asked: lr 0\.05, now 0\.01; momentum 0\.9, now 0\.8"):
        trainer, rates = resumed_with(sgd(0.01, 0.8), make, ["optimizer"], tmp_path / "a.ckpt")
    assert rates == pytest.approx(straight[5:])
    assert trainer.optimizers[0].param_groups[0]["momentum"] == 0.8
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    resumed_with(sgd(0.01, 0.8), make, ckpt_path=tmp_path / "b.ckpt", max_steps=9)  # these are its settings now


@pytest.mark.parametrize("schedule", ["torch", "zoo", "sequence"])
def test_another_rate_for_another_length_leaves_the_schedule_as_it_was_made(tmp_path, schedule):
    stopped, _ = resumed_with(sgd(0.05), SCHEDULES[schedule], until=5)
    stopped.save_checkpoint(tmp_path / "a.ckpt")
    _, straight = resumed_with(sgd(0.01), SCHEDULES[schedule])
    with pytest.warns(UserWarning, match="goes on as it was made, for the first number"):
        _, rates = resumed_with(sgd(0.01), SCHEDULES[schedule], ["optimizer"], tmp_path / "a.ckpt", max_steps=12)
    assert rates[:3] == pytest.approx(straight[5:])


def test_how_a_step_is_computed_may_be_another_one(tmp_path):
    def adam(**how):
        return lambda parameters: torch.optim.Adam(parameters, lr=1e-3, **how)

    resumed_with(adam(), Cosine, until=5)[0].save_checkpoint(tmp_path / "a.ckpt")
    for how in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        assert resumed_with(adam(**how), Cosine, ckpt_path=tmp_path / "a.ckpt")[0].global_step == 8


def test_sequences_of_other_schedules_are_other_kinds(tmp_path):
    def sequence(*kinds):
        def make(optimizer, steps):
            parts = [kind(optimizer, steps) for kind in kinds]
            ends = [2 * (k + 1) for k in range(len(kinds) - 1)]
            return torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=ends)

        return make

    resumed_with(sgd(0.05), sequence(Linear, Cosine), until=5)[0].save_checkpoint(tmp_path / "a.ckpt")
    for kinds in ((Linear, Linear), (Linear, Cosine, Cosine)):
        with pytest.raises(ValueError, match="SequentialLR with Linear with Cosine, now SGD with SequentialLR"):
            resumed_with(sgd(0.05), sequence(*kinds), ["optimizer"], tmp_path / "a.ckpt")


def test_what_an_optimizer_remembers_goes_on_with_another_rate(tmp_path):
    resumed_with(sgd(0.05), None, until=5)[0].save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="as asked"):
        trainer, _ = resumed_with(sgd(0.0), None, ["optimizer"], tmp_path / "a.ckpt", max_steps=5)
    before = read_checkpoint(tmp_path / "a.ckpt")["optimizer_states"][0]["state"]
    for number, state in trainer.optimizers[0].state_dict()["state"].items():
        assert torch.equal(state["momentum_buffer"], before[number]["momentum_buffer"])


def test_another_schedule_of_the_same_kind_is_refused_and_taken_where_it_is_asked_for(tmp_path):
    def ends_at(final):
        return lambda optimizer, steps: Cosine(optimizer, steps, final=final)

    resumed_with(sgd(0.05), ends_at(0.0), until=5)[0].save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"final 0\.0, now 0\.5"):
        resumed_with(sgd(0.05), ends_at(0.5), ckpt_path=tmp_path / "a.ckpt")
    _, straight = resumed_with(sgd(0.05), ends_at(0.5))
    with pytest.warns(UserWarning, match="as asked"):
        _, rates = resumed_with(sgd(0.05), ends_at(0.5), ["optimizer"], tmp_path / "a.ckpt")
    assert rates[1:] == pytest.approx(straight[6:])  # the first was set before the kill


@pytest.mark.parametrize(
    ("optimizer", "schedule", "message"),
    [
        (torch.optim.Adam, Cosine, "SGD with Cosine, now Adam with Cosine"),
        (sgd(0.05), None, "SGD with Cosine, now SGD"),
        (sgd(0.05), Linear, "SGD with Cosine, now SGD with Linear"),
    ],
)
def test_another_kind_of_optimizer_or_schedule_is_refused_also_where_it_is_asked_for(
    tmp_path, optimizer, schedule, message
):
    resumed_with(sgd(0.05), Cosine, until=5)[0].save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=rf"{message}\. .*--model\.init_args\.weights FILE\)$"):
        resumed_with(optimizer, schedule, ["optimizer"], tmp_path / "a.ckpt")


def test_a_run_without_an_end_is_saved_and_goes_on(tmp_path):
    trainer, _ = resumed_with(sgd(0.05), None, until=5, max_steps=-1, max_epochs=-1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert read_checkpoint(tmp_path / "a.ckpt")["planned_steps"] == -1
    trainer, _ = resumed_with(sgd(0.05), None, (), tmp_path / "a.ckpt", until=9, max_steps=-1, max_epochs=-1)
    assert trainer.global_step == 9


class KeepBatches(Callback):
    """Writes down what each process is given, after augmentation, and the checkpoint of the end."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.save(batch[0], f"{trainer.global_step}-{trainer.global_rank}.pt")

    def on_train_end(self, trainer, pl_module):
        trainer.save_checkpoint("end.ckpt")


def test_two_processes_augment_in_their_own_ways_also_after_a_resume():
    """One picture many times over: batches of two processes differ only by what augmentation draws."""
    for steps, path in ((2, None), (4, "end.ckpt")):
        seed_everything(0, verbose=False)
        data = datamodules.DigitsDataModule(image_size=8, batch_size=48, translate=2)
        data.setup("fit")
        data.train_set = tuple(part[:1].repeat(480, *[1] * (part.ndim - 1)) for part in data.train_set)
        trainer = Trainer(
            accelerator="cpu", devices=2, strategy="ddp_fork", max_steps=steps, limit_val_batches=0, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[ExactResume(), KeepBatches()], plugins=[SafeCheckpointIO()],
        )  # fmt: skip
        trainer.fit(LeNet(image_size=8), data, ckpt_path=path)
    for step in range(4):
        first, second = (torch.load(f"{step}-{rank}.pt") for rank in (0, 1))
        assert not torch.equal(first, second), f"step {step}"
    assert len({tuple(image.flatten().tolist()) for image in first}) > 1, "nothing was augmented"
