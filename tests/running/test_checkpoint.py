"""Checkpoints survive crashes and cannot run code."""

import errno
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.demos.boring_classes import BoringModel

import zoo
from zoo.running.checkpoint import SafeCheckpointIO, checkpoint_callbacks, read_checkpoint, write_atomically
from zoo.running.command import _steps_inside, newest_checkpoint


class Malicious:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


def test_a_saved_file_is_read_back(tmp_path):
    path = tmp_path / "new" / "a.ckpt"
    SafeCheckpointIO().save_checkpoint({"weight": torch.arange(3.0), "epoch": 4}, path)
    content = SafeCheckpointIO().load_checkpoint(path, weights_only=False)
    assert torch.equal(content["weight"], torch.arange(3.0))
    assert content["epoch"] == 4
    assert [p.name for p in path.parent.iterdir()] == ["a.ckpt"]


def saved_on_a_gpu(path, content):
    """Write what a run on a GPU would, without one: the file says of each tensor where it was."""
    torch.save(content, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, record in records.items():
            archive.writestr(name, record.replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0"))


def test_a_checkpoint_of_a_gpu_is_read_to_the_cpu(tmp_path, monkeypatch):
    model, path = zoo.LeNet(), tmp_path / "runs" / "lenet" / "version_0" / "checkpoints" / "last.ckpt"
    content = {"state_dict": model.state_dict(), "epoch": 1, "global_step": 7, "loops": {}}
    model.on_save_checkpoint(content)
    path.parent.mkdir(parents=True)
    saved_on_a_gpu(path, content)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(path, weights_only=True)
    for read in (SafeCheckpointIO().load_checkpoint, read_checkpoint):
        tensors = read(path)["state_dict"]
        assert {tensor.device.type for tensor in tensors.values()} == {"cpu"}
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in tensors.items())
    assert {tensor.device.type for tensor in zoo.load(path).state_dict().values()} == {"cpu"}
    monkeypatch.chdir(tmp_path)
    assert _steps_inside(path) == 7
    assert newest_checkpoint("lenet", "last") == path.relative_to(tmp_path)


@pytest.mark.parametrize("inside", [lambda evil: evil, lambda evil: {"state_dict": {}, "extra": evil}])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, inside):
    marker = tmp_path / "executed"
    with open(tmp_path / "evil.ckpt", "wb") as file:
        torch.save(inside(Malicious(marker)), file)
    with pytest.raises(ValueError, match=r"evil\.ckpt is refused.*run code"):
        SafeCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt", weights_only=False)
    assert not marker.exists()
    torch.load(tmp_path / "evil.ckpt", weights_only=False)
    assert marker.exists(), "the file is not malicious, so this test shows nothing"


def test_a_plain_pickle_is_refused_and_not_run(tmp_path):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Malicious(tmp_path / "executed")))
    with pytest.raises(ValueError, match=r"evil\.pth"):
        read_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04 cut off"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "bad.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.ckpt"):
        read_checkpoint(tmp_path / "bad.ckpt")


def test_every_truncation_is_named(tmp_path):
    write_atomically(tmp_path / "a.ckpt", {"weight": torch.randn(100)})
    whole = (tmp_path / "a.ckpt").read_bytes()
    for length in range(0, len(whole) - 1, 97):
        (tmp_path / "cut.ckpt").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.ckpt"):
            read_checkpoint(tmp_path / "cut.ckpt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_checkpoint(tmp_path / "nowhere.ckpt")


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
)
def test_a_full_disk_keeps_the_last_good_file_and_leaves_nothing(tmp_path, monkeypatch, failure):
    path = tmp_path / "last.ckpt"
    write_atomically(path, {"step": 1})

    def half(content, file):
        Path(file).write_bytes(b"half of it")
        raise failure

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match=r"last\.ckpt could not be written"):
        write_atomically(path, {"step": 2})
    monkeypatch.undo()
    assert read_checkpoint(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


SAVE_UNTIL_KILLED = """
import os, signal, sys, time
from pathlib import Path
import torch
from zoo.running.checkpoint import read_checkpoint, write_atomically

path = Path(sys.argv[1])
for attempt in range(12):
    child = os.fork()
    if child == 0:
        for step in range(10**6):
            write_atomically(path, {"step": step, "weight": torch.zeros(10**6)})
    before = path.stat().st_mtime_ns
    while path.stat().st_mtime_ns == before:  # a busy machine takes its time for the first
        time.sleep(0.005)
    time.sleep(0.017 * attempt)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(read_checkpoint(path)["step"], flush=True)
"""


def test_what_is_no_full_disk_is_not_taken_for_one(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "save", fail)
    patient = SafeCheckpointIO()
    patient.patient = True
    with pytest.raises(RuntimeError, match="CUDA error"):
        patient.save_checkpoint({"step": 1}, tmp_path / "a.ckpt")
    assert not patient.lost
    assert not list(tmp_path.iterdir())


def test_a_process_killed_while_saving_leaves_a_loadable_file(tmp_path):
    """Twelve SIGKILLs at arbitrary moments of a process that does nothing but save."""
    path = tmp_path / "last.ckpt"
    write_atomically(path, {"step": -1, "weight": torch.zeros(10)})
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", SAVE_UNTIL_KILLED, str(path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    steps = [int(line) for line in result.stdout.split()]
    assert len(steps) == 12
    assert min(steps) >= 0
    assert max(steps) > 0
    write_atomically(path, {"step": 0})  # and the next start removes what the killed ones left
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


class NeverBetter(BoringModel):
    """Its validation metric is best in the first epoch."""

    def on_validation_epoch_end(self):
        self.log("val/accuracy", 1.0 - self.current_epoch / 10)


def fit(folder, epochs, callbacks=(), ckpt_path=None, minutes=10.0, limit_val_batches=1, **options):
    seed_everything(0, verbose=False)
    trainer = Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        limit_train_batches=4,
        limit_val_batches=limit_val_batches,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*checkpoint_callbacks("val/accuracy", "max", minutes), *callbacks],
        plugins=[SafeCheckpointIO()],
        **options,
    )
    trainer.fit(NeverBetter(), ckpt_path=ckpt_path)
    return trainer


def test_last_is_the_last_and_best_is_the_best(tmp_path):
    fit(tmp_path, 3)
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert read_checkpoint(folder / "last.ckpt")["global_step"] == 12
    assert read_checkpoint(folder / "best.ckpt")["global_step"] == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_resuming_from_last_does_not_write_a_second_last(tmp_path):
    fit(tmp_path, 2)
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert fit(tmp_path, 4, ckpt_path=last).global_step == 16
    assert sorted(p.name for p in last.parent.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert read_checkpoint(last)["global_step"] == 16


def test_last_is_written_within_an_epoch_when_the_interval_is_over(tmp_path):
    class Look(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            path = tmp_path / "checkpoints" / "last.ckpt"
            self.seen.append(read_checkpoint(path)["global_step"] if path.exists() else None)

    look = Look()
    fit(tmp_path, 1, [look], minutes=1e-9)
    assert look.seen == [None, 1, 2, 3]


def test_a_crash_in_validation_leaves_the_epoch_before(tmp_path):
    class Crash(Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking and trainer.current_epoch == 1:
                raise RuntimeError("the disk of the logger is gone")

    with pytest.raises(RuntimeError, match="logger"):
        fit(tmp_path, 3, [Crash()])
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert read_checkpoint(last)["global_step"] == 4
    assert fit(tmp_path, 3, ckpt_path=last).global_step == 12


class Send(Callback):
    """Sends a signal to this process in the middle of an epoch."""

    def __init__(self, number, times=1):
        self.number, self.times = number, times

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 5:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
                time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_the_run_saves_and_can_go_on(tmp_path, number):
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(SystemExit):
        fit(tmp_path, 3, [Send(number)])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert read_checkpoint(last)["global_step"] == 6
    assert fit(tmp_path, 3, ckpt_path=last).global_step == 12


def test_a_second_interrupt_stops_at_once(tmp_path):
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(tmp_path, 3, [Send(signal.SIGINT, times=2)])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning leaves it ignored after an interrupt
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 4


def test_the_best_is_remembered_in_the_folder_of_a_resumed_run(tmp_path):
    fit(tmp_path / "first", 2)
    trainer = fit(tmp_path / "second", 4, ckpt_path=tmp_path / "first" / "checkpoints" / "last.ckpt")
    assert trainer.checkpoint_callback.best_model_score == 1.0
    assert trainer.checkpoint_callback.best_model_path == str(tmp_path / "first" / "checkpoints" / "best.ckpt")
    assert [p.name for p in (tmp_path / "second" / "checkpoints").iterdir()] == ["last.ckpt"]
    assert (tmp_path / "first" / "checkpoints" / "best.ckpt").is_file()


class InValidation(Callback):
    """Sends SIGTERM while the second epoch is validated."""

    finished = False

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if trainer.current_epoch == 1 and not trainer.sanity_checking:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    def on_validation_end(self, trainer, pl_module):
        self.finished = self.finished or trainer.current_epoch == 1


def test_asked_to_stop_in_validation_the_validation_is_finished_first(tmp_path):
    look = InValidation()
    with pytest.raises(SystemExit):
        fit(tmp_path, 3, [look], limit_val_batches=3)
    assert look.finished
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 8
    assert fit(tmp_path, 3, ckpt_path=tmp_path / "checkpoints" / "last.ckpt").global_step == 12
