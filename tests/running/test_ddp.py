"""Two real processes."""

import json
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
from zoo.running.checkpoint import read_checkpoint
from zoo.running.optimizing import LinearScaling
from zoo.running.predictions import WritePredictions

ROOT = Path(__file__).parents[2]
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


def train(devices, folder, callbacks=(), steps=12):
    from lightning.pytorch.loggers import CSVLogger

    seed_everything(0, verbose=False)
    strategy = "ddp_fork" if devices > 1 else "auto"
    data = datamodules.DigitsDataModule(image_size=8, batch_size=48)
    model = LeNet(image_size=8, optimizer=sgd)
    trainer = Trainer(
        **QUIET,
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_steps=steps,
        log_every_n_steps=1,
        logger=CSVLogger(folder, name="", version=f"{devices}"),
        callbacks=list(callbacks),
    )
    trainer.fit(model, data)
    return model, trainer


def test_two_processes_train_as_one_does(tmp_path):
    """The global batch is shared: the same batches, the same gradients, the same weights up to rounding."""
    one, _ = train(1, tmp_path)
    two, _ = train(2, tmp_path)
    untrained = LeNet(image_size=8)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(one.head.weight, untrained.head.weight, atol=1e-3)


def test_linear_scaling_doubles_rate_and_batch_after_a_warm_up(tmp_path):
    """Two scaled processes make the steps of one with twice the batch and the rate k * lr * min(1, t / warm-up)."""
    seed_everything(0, verbose=False)
    scaled, _ = train(2, tmp_path, [LinearScaling(warmup_steps=1)])
    seed_everything(0, verbose=False)
    data = datamodules.DigitsDataModule(image_size=8, batch_size=96)
    reference = LeNet(
        image_size=8,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        scheduler=lambda optimizer, steps: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, t / 1)),
    )
    Trainer(**QUIET, accelerator="cpu", logger=False, max_steps=12).fit(reference, data)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(scaled.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_predictions_of_two_processes_are_in_the_order_of_the_data(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    rows = []
    for devices in (1, 2):
        seed_everything(0, verbose=False)
        data = datamodules.DigitsDataModule(image_size=8, eval_batch_size=50)
        model = LeNet(image_size=8)
        trainer = Trainer(
            **QUIET,
            accelerator="cpu",
            devices=devices,
            strategy="ddp_fork" if devices > 1 else "auto",
            logger=CSVLogger(tmp_path, name="p", version=f"{devices}"),
            callbacks=[WritePredictions()],
        )
        trainer.predict(model, data, return_predictions=False)
        lines = (tmp_path / "p" / f"{devices}" / "predictions.jsonl").read_text().splitlines()
        rows.append([json.loads(line) for line in lines])
    assert len(rows[0]) == 360
    assert [row["class_name"] for row in rows[0]] == [row["class_name"] for row in rows[1]]
    assert [row["probability"] for row in rows[0]] == pytest.approx([row["probability"] for row in rows[1]], abs=1e-6)


def test_the_command_runs_on_two_processes(tmp_path):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "zoo", "fit", "lenet/embedded", "--config", "ddp2", "--trainer.max_epochs", "1"]
    command += ["--data.init_args.image_size", "8", "--model.init_args.image_size", "8"]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("epoch 1/1") == 1
    content = read_checkpoint(tmp_path / "runs/lenet/embedded/version_0/checkpoints/last.ckpt")
    assert content["global_step"] == 1257 // 64
    assert len(content["random_states"]) == 2


LEAVING = """
import torch
from zoo.cli import main

small = ["--data.init_args.image_size", "8", "--model.init_args.image_size", "8", "--trainer.max_steps", "1"]
assert main(["fit", "lenet/embedded", "--config", "ddp2", *small]) == 0
for _ in range(200):
    torch.distributed.all_reduce(torch.ones(1), async_op=True)
"""


@pytest.mark.skipif(torch.__version__ < (2, 8), reason="before, torch cannot wait for its threads without a deadlock")
def test_processes_end_well_with_exchanges_that_are_still_under_way(tmp_path):
    """As torch's thread is for a moment after each: on a busy machine until the interpreter is gone."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    (tmp_path / "leaving.py").write_text(LEAVING)
    command = [sys.executable, "leaving.py"]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert "terminate called" not in result.stderr
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("everyone", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_two_processes_asked_to_stop_save_once_and_end(tmp_path, everyone):
    """SIGTERM to the whole group, as a cluster sends it, and to one process alone."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "zoo", "fit", "lenet/embedded", "--config", "ddp2", "--trainer.max_epochs", "500"]
    command += ["--data.init_args.image_size", "8", "--model.init_args.image_size", "8"]
    process = subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    path = tmp_path / "runs/lenet/embedded/version_0/checkpoints/last.ckpt"
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM) if everyone else process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 143, output
    assert output.count("asked to stop: saved") == 1
    assert len(read_checkpoint(path)["random_states"]) == 2
