"""A real run of the command, killed and preempted: it goes on as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning import Trainer, seed_everything

import datamodules
from zoo import LeNet
from zoo.running.checkpoint import SafeCheckpointIO, read_checkpoint
from zoo.running.resume import ExactResume

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
