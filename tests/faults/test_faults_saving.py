"""Saving is interrupted, the disk is full, or there was never any room: a checkpoint is there that can be loaded."""

import contextlib
import csv
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import torch
from lightning import Callback
from small_runs import Child, fit

from zoo.running.checkpoint import CheckpointError, SafeCheckpointIO, read_checkpoint, reserve
from zoo.running.command import newest_checkpoint

pytestmark = pytest.mark.faults

LAST = Path("runs/lenet/embedded/version_0/checkpoints/last.ckpt")
SMALL = ("trainer.max_epochs 4", "data.eval_batch_size 90")
STEPS = 9
KILLS = 50


def save_for_ever(path, first):
    for step in range(first, 10**9):
        SafeCheckpointIO().save_checkpoint({"global_step": step, "weight": torch.full((10**6,), float(step))}, path)


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_fifty_kills_while_saving_leave_a_whole_checkpoint(where, tmp_path, monkeypatch):
    """The folder for temporary files is on another file system, where Lightning alone truncates the file."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("there is no second file system: no /dev/shm")
    moments = random.Random(where)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        target, other = (tmp_path, memory) if where == "disk" else (Path(memory), str(tmp_path))
        monkeypatch.setattr(tempfile, "tempdir", other)
        monkeypatch.setenv("TMPDIR", other)
        assert os.stat(target).st_dev != os.stat(other).st_dev
        path, steps, partial = target / "last.ckpt", [-1], 0
        SafeCheckpointIO().save_checkpoint({"global_step": -1, "weight": torch.full((10**6,), -1.0)}, path)
        for _ in range(KILLS):
            child = Child(lambda: save_for_ever(path, steps[-1] + 1))
            time.sleep(moments.uniform(0.02, 0.2))
            child.send(signal.SIGKILL)
            assert child.wait(10) == -signal.SIGKILL, child.output
            partial += len(list(target.glob(".*.partial*")))
            content = read_checkpoint(path)
            assert content["global_step"] >= steps[-1]
            assert torch.equal(content["weight"], torch.full((10**6,), float(content["global_step"])))
            steps.append(content["global_step"])
        assert steps[-1] > 0, "nothing was saved between the kills"
        assert partial, "no kill hit a file that was being written"
        SafeCheckpointIO().save_checkpoint({"global_step": 0}, path)
        assert [each.name for each in target.iterdir()] == ["last.ckpt"], "what the killed ones left is removed"
        assert not list(Path(other).glob("tmp*")), "nothing was written to the folder for temporary files"


class From(Callback):
    """Does something at the start of an epoch, and undoes it at the start of another."""

    def __init__(self, act, first, undo=None, until=None):
        self.act, self.first, self.undo, self.until = act, first, undo, until

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.first:
            self.act()
        if trainer.current_epoch == self.until:
            self.undo()


def limit(size):
    """No file of this process may be larger; Python ignores the signal and the write fails, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def epochs_of(log):
    with log.open(newline="") as file:
        return {int(float(row["epoch"])) for row in csv.DictReader(file) if row["val/loss"]}


def test_what_cannot_be_written_keeps_the_last_good_file_and_the_run_going_and_fails_it_at_its_end():
    child = Child(lambda: fit("classification", *SMALL, callbacks=(From(lambda: limit(20_000), 2),)))
    assert child.wait(60) == 1, child.output
    assert read_checkpoint(LAST)["global_step"] == 2 * STEPS
    assert read_checkpoint(LAST.with_name("best.ckpt"))["global_step"] <= 2 * STEPS
    assert "epoch 4/4" in child.output, "training went on"
    assert re.search(rf"CHECKPOINT NOT WRITTEN at step {3 * STEPS}.*last\.ckpt", child.output)
    assert re.search(r"zoo: error: training came to its end, but not every checkpoint.*last\.ckpt", child.output)
    assert "Traceback" not in child.output
    assert sorted(path.name for path in LAST.parent.iterdir()) == ["best.ckpt", "last.ckpt"]
    child = Child(lambda: fit("classification", *SMALL, "ckpt_path last"))
    assert child.wait(60) == 0, child.output
    assert read_checkpoint(str(LAST).replace("version_0", "version_1"))["global_step"] == 4 * STEPS


def test_where_room_comes_back_in_time_nothing_is_lost_and_the_run_ends_well():
    short = From(lambda: limit(20_000), 1, lambda: limit(resource.RLIM_INFINITY), 3)
    child = Child(lambda: fit("classification", *SMALL, callbacks=(short,)))
    status = child.wait(60)
    assert re.search(r"CHECKPOINT NOT WRITTEN.*last\.ckpt", child.output)
    assert read_checkpoint(LAST)["global_step"] == 4 * STEPS
    best_missed = re.search(r"CHECKPOINT NOT WRITTEN.*best\.ckpt", child.output)
    best_is_old = read_checkpoint(LAST.with_name("best.ckpt"))["global_step"] == STEPS
    assert status == (1 if best_missed and best_is_old else 0), child.output


def test_a_disk_that_is_full():
    """A small file system of its own, which another file fills."""
    folder = Path("disk")
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:

        def fill():
            with open("filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(b"x" * 4096):
                    pass

        def run():
            os.chdir(folder)
            fit("classification", *SMALL, callbacks=(From(fill, 2),))

        child = Child(run)
        assert child.wait(60) == 1, child.output
        assert read_checkpoint(folder / LAST)["global_step"] == 2 * STEPS
        assert "epoch 4/4" in child.output
        assert "CHECKPOINT NOT WRITTEN" in child.output
        assert epochs_of(folder / LAST.parents[1] / "metrics.csv") >= {0, 1}
        (folder / "filler").unlink()

        def again():
            os.chdir(folder)
            fit("classification", *SMALL, "ckpt_path last")

        child = Child(again)
        assert child.wait(60) == 0, child.output

        fill_first = Child(lambda: (os.chdir(folder), fill(), fit("classification", *SMALL)))
        assert fill_first.wait(60) != 0
        assert re.search(r"bytes are needed, [\d,]+ are free|No space left", fill_first.output), fill_first.output
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_without_room_the_run_is_refused_before_the_first_step():
    def run():
        limit(20_000)
        fit("classification", *SMALL)

    child = Child(run)
    assert child.wait(60) == 1, child.output
    assert re.search(r"zoo: error: checkpoints cannot be kept in .*about [\d,]+ bytes are needed, [\d,]+ are free",
                     child.output)  # fmt: skip
    assert "epoch 1" not in child.output
    assert not Path("runs").exists(), "nothing stays"


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be kept in .*file/checkpoints.*0 bytes are needed"):
        reserve(tmp_path / "file" / "checkpoints", 0)
    with pytest.raises(CheckpointError, match=r"about 1,000,000,000,000,000 bytes are needed, [\d,]+ are free"):
        reserve(tmp_path / "new" / "checkpoints", 10**15)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    if os.geteuid() == 0:
        return  # root may write anywhere
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(CheckpointError, match="Permission denied"):
        reserve(tmp_path / "closed" / "checkpoints", 0)


def test_last_is_the_last_by_the_step_inside_it():
    folder = Path("runs/some/recipe/version_3/checkpoints")
    for name, step in (("best", 7), ("last", 5), ("snapshot-1", 6)):
        SafeCheckpointIO().save_checkpoint({"global_step": step, "loops": {}}, folder / f"{name}.ckpt")
    SafeCheckpointIO().save_checkpoint({"global_step": 9}, folder / "weights-alone.ckpt")
    (folder / "newer.ckpt").write_bytes((folder / "last.ckpt").read_bytes()[:100])  # of a copy that broke off
    (folder / ".last.ckpt.0.partial.ckpt").write_bytes(b"")  # of a process that was killed while it saved
    later = time.time() + 100
    os.utime(folder / "last.ckpt", (later, later))
    for copy in ("version_3_backup", "version_1_0", "version_4x"):
        shutil.copytree(folder.parent, folder.parents[1] / copy)
    assert newest_checkpoint("some/recipe", "last") == folder / "best.ckpt"
    SafeCheckpointIO().save_checkpoint({"global_step": 7, "loops": {}}, folder / "last.ckpt")
    assert newest_checkpoint("some/recipe", "last").name == "last.ckpt"
    assert newest_checkpoint("some/recipe", "best").name == "best.ckpt"
