"""Workers that read the data and die: the run ends, and says in a line why and what to do."""

import os
import signal

import pytest
import torch
from small_runs import Child, fit

from datamodules import reading

pytestmark = pytest.mark.faults
VIDEO = ("data.workers 1", "trainer.max_epochs 1")
FULL = "unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)"
SHORT = "found no room in the shared memory (/dev/shm)"


def ends_by(number: int):
    def die(batch):
        os.kill(os.getpid(), number)

    reading._handed_over = die


def is_full():
    def share(tensor):
        raise RuntimeError(FULL)

    torch.Tensor.share_memory_ = share


@pytest.mark.parametrize(
    ("fault", "says", "advises"),
    [
        (lambda: ends_by(signal.SIGBUS), SHORT, "--shm-size"),
        (is_full, SHORT, "--data.init_args.workers 0"),
        (lambda: ends_by(signal.SIGKILL), "killed, most likely because the memory ran out", "--data.init_args.workers"),
    ],
    ids=["bus error", "full", "killed"],
)
def test_a_worker_that_dies_ends_the_run_with_a_line_that_says_why(fault, says, advises, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run():
        fault()
        fit("video", *VIDEO)

    child = Child(run)
    assert child.wait(60) == 1, child.output
    assert "Traceback" not in child.output
    lines = [line for line in child.output.splitlines() if "zoo: error" in line]
    assert len(lines) == 1, child.output
    assert says in lines[0]
    assert advises in lines[0]
