"""Loggers, pictures, bars and terminals that fail cost a run nothing."""

import csv
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger

import datamodules
from zoo import VAE, LeNet
from zoo.running.checkpoint import SafeCheckpointIO, checkpoint_callbacks, read_checkpoint
from zoo.running.log import Log
from zoo.running.tolerance import ReportsMayFail

ROOT = Path(__file__).parents[2]


class Broken(DummyLogger):
    """A tracking server that is gone, for some of its methods."""

    def __init__(self, *broken):
        super().__init__()
        for name in broken:
            setattr(self, name, self._fail)

    def _fail(self, *_, **__):
        raise ConnectionError("the tracking server is gone")


class BrokenBar(ProgressBar):
    def on_train_batch_end(self, *_, **__):
        raise IndexError("pop from an empty list of live displays")


def run(folder, *loggers, callbacks=(), tolerant=True, bar=None):
    """Two epochs of digits, with a validation, and a test."""
    seed_everything(0, verbose=False)
    model = LeNet(image_size=8)
    own = Log(folder, name="", version="a")
    keep = [*callbacks, *([ReportsMayFail()] if tolerant else []), *checkpoint_callbacks("val/loss", "min")]
    trainer = Trainer(
        logger=[own, *loggers], callbacks=[*keep, *([bar] if bar else [])], plugins=[SafeCheckpointIO()], max_epochs=2,
        accelerator="cpu", enable_progress_bar=bar is not None, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    data = datamodules.DigitsDataModule(image_size=8, batch_size=256)
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    with open(folder / "a" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return read_checkpoint(folder / "a" / "checkpoints" / "last.ckpt")["global_step"], rows


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("broken", ["log_metrics", "log_hyperparams", "save", "finalize"])
def test_a_logger_that_fails_costs_nothing_and_is_named_at_once_and_at_the_end(tmp_path, broken, undisturbed):
    with pytest.warns(UserWarning, match="FAILED") as caught:
        assert run(tmp_path, Broken(broken)) == undisturbed
    said = [str(one.message) for one in caught if "FAILED" in str(one.message)]
    first = "Broken FAILED (ConnectionError: the tracking server is gone). The run goes on"
    assert said[0] == first
    assert said.count(first) <= 4, "once in the training, once in the test, and where each is closed"
    if broken != "finalize":  # which comes after the end
        assert any(re.match(r"Broken FAILED \d+ times, at first by ConnectionError", text) for text in said)


def test_a_server_that_is_waited_for_in_vain_is_asked_seldom(tmp_path, undisturbed):
    class Slow(Broken):
        calls = 0

        def _fail(self, *_, **__):
            type(self).calls += 1
            time.sleep(2)
            raise ConnectionError("timed out")

    start = time.monotonic()
    with pytest.warns(UserWarning, match="Slow FAILED"):
        assert run(tmp_path, Slow("log_metrics")) == undisturbed
    assert Slow.calls <= 1 + (time.monotonic() - start) / 20


def test_what_failed_is_said_again_where_an_exception_ends_the_run(tmp_path):
    class Fault(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            raise RuntimeError("a fault")

    with pytest.warns(UserWarning, match=r"Broken FAILED \d+ times"), pytest.raises(RuntimeError, match="a fault"):
        run(tmp_path, Broken("log_metrics"), callbacks=[Fault()])


def test_a_logger_of_many_runs_is_wrapped_once(tmp_path):
    logger = Broken("log_metrics")
    for number in range(2):
        with pytest.warns(UserWarning, match="FAILED"):
            run(tmp_path / str(number), logger)
    assert not hasattr(logger.log_metrics.not_tolerated, "not_tolerated")


def test_without_the_callback_a_logger_ends_the_run_as_lightning_has_it(tmp_path):
    with pytest.raises(ConnectionError):
        run(tmp_path, Broken("log_metrics"), tolerant=False)


def test_a_bar_that_fails_costs_nothing(tmp_path, undisturbed):
    with pytest.warns(UserWarning, match="BrokenBar FAILED .*live displays"):
        assert run(tmp_path, bar=BrokenBar()) == undisturbed


def test_what_is_no_report_is_not_tolerated(tmp_path):
    class Log2(CSVLogger):
        def log_metrics(self, *_, **__):
            raise OSError("the run's own log")

    with pytest.raises(OSError, match="own log"):
        run(tmp_path, Log2(tmp_path, name="", version="b"))


def test_pictures_that_cannot_be_kept_cost_nothing_and_leave_no_half(tmp_path, monkeypatch, undisturbed):
    pytest.importorskip("tensorboard")
    logger = TensorBoardLogger(tmp_path / "board")
    monkeypatch.setattr(type(logger.experiment), "add_image", Broken("x").x)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "pictures").write_text("a file where the folder would be")
    with pytest.warns(UserWarning, match="FAILED") as caught:
        assert run(tmp_path, logger) == undisturbed
    said = "\n".join(str(one.message) for one in caught)
    assert "TensorBoardLogger's pictures FAILED (ConnectionError" in said
    assert re.search(r"pictures in .*pictures FAILED \(\w*Error", said)


def test_animations_that_cannot_be_kept_cost_a_generator_nothing(tmp_path):
    seed_everything(0, verbose=False)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "pictures").write_text("a file where the folder would be")
    keep = [ReportsMayFail(), *checkpoint_callbacks(None, "min")]
    trainer = Trainer(
        logger=Log(tmp_path, name="", version="a"), callbacks=keep, plugins=[SafeCheckpointIO()], max_epochs=3,
        limit_train_batches=2, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"pictures in .* FAILED \d+ times"):
        trainer.fit(VAE(hidden=8), datamodules.DigitsDataModule(batch_size=128))
    assert read_checkpoint(tmp_path / "a" / "checkpoints" / "last.ckpt")["global_step"] == 6


def test_a_terminal_that_is_gone_costs_nothing(tmp_path):
    """As with ``zoo fit … | head -1``."""
    small = ["--data.init_args.image_size", "8", "--model.init_args.image_size", "8", "--trainer.max_epochs", "4"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "zoo", "fit", "lenet/embedded", *small],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline().startswith("epoch 1/4")
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(60) == 0, errors
    assert "BrokenPipe" not in errors
    last = read_checkpoint(tmp_path / "runs/lenet/embedded/version_0/checkpoints/last.ckpt")
    assert last["epoch"] == 3
