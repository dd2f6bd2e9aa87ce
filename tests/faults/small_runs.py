"""Small runs of every task, in processes that are forked after one import of Lightning: an import takes seconds."""

import logging
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything

from zoo import cli
from zoo.running.starting import finish, prepare

FILES = tempfile.TemporaryDirectory()  # meshes and videos, written once for all tests of a process
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
SMALL_RCNN = ("data.train_size 24", "data.val_size 24", "data.test_size 24", "data.batch_size 4", "data.size [64,64]",
              "model.min_size 64", "model.max_size 64", "model.fpn_channels 16")  # fmt: skip
# Of each task the recipe, and what makes it small.
TASKS = {
    "classification": ("lenet/embedded", "data.image_size 8", "model.image_size 8", "data.batch_size 128"),
    "detection": ("single_stage/embedded", "data.train_size 24", "data.val_size 8", "data.test_size 24",
                  "data.batch_size 8", "data.size [96,96]", "model.image_size 96", "model.width 0.35"),
    "masks": ("mask_rcnn/embedded", *SMALL_RCNN),
    "keypoints": ("keypoint_rcnn/embedded", *SMALL_RCNN),
    "captioning": ("captioning_lstm/embedded", "data.train_size 32", "data.val_size 8", "data.test_size 24",
                   "data.batch_size 16", "model.hidden_dim 16"),
    "generation": ("vae/embedded", "data.batch_size 128", "model.hidden 32"),
    "adversarial": ("gan/embedded", "data.batch_size 128"),
    "mesh": ("pix2mesh/embedded", "data.train_size 24", "data.val_size 6", "data.test_size 24", "data.views 1",
             "data.batch_size 6", "data.num_points 100", "model.hidden 8", f"data.root {FILES.name}/shapes"),
    "video": ("frame_fusion/embedded", "data.train_size 32", "data.val_size 8", "data.test_size 24",
              "data.batch_size 8", f"data.root {FILES.name}/videos"),
    "control": ("dqn/embedded", "data.val_episodes 2", "data.test_episodes 2", "data.eval_envs 2", "model.hidden [8]",
                "data.learning_starts 64", "data.collect_steps 64", "data.updates 8", "data.updates_per_step 2",
                "data.epoch_steps 256", "data.capacity 400"),
}  # fmt: skip


def overrides(*settings: str) -> list[str]:
    """``data.batch_size 8`` as the command line has it."""
    words = []
    for setting in settings:
        key, value = setting.split(" ", 1)
        part, _, name = key.partition(".")
        words += [f"--{part}.init_args.{name}" if part in ("data", "model") else f"--{key}", value]
    return words


def build(task: str, *settings: str) -> tuple[LightningModule, LightningDataModule]:
    """A fresh model and data of a task, as the command line makes them."""
    recipe, *small = TASKS[task]
    nothing = ["trainer.limit_train_batches 0", "trainer.limit_val_batches 0", "trainer.logger false"]
    run = finish(prepare("fit", recipe, overrides(*nothing, *small, *settings)))
    run.model.trainer = None
    run.datamodule.trainer = None
    return run.model, run.datamodule


def fit(
    task: str,
    *settings: str,
    callbacks: tuple[Callback, ...] = (),
    data_hooks: dict[str, Callable[..., None]] | None = None,
) -> None:
    """The command ``zoo fit`` in this folder, with callbacks and hooks of the test's own; it ends the process.

    ``task`` is one of ``TASKS``, or a recipe's file.
    """
    recipe, *small = TASKS.get(task, (task,))

    def prepare_with_callbacks(*given):
        run = prepare(*given)
        run.trainer.callbacks[:0] = callbacks
        for name, hook in (data_hooks or {}).items():
            setattr(run.datamodule, name, hook)
        return run

    cli.prepare = prepare_with_callbacks
    sys.exit(cli.main(["fit", recipe, *overrides(*small, *settings)]))


def trainer(**options) -> Trainer:
    seed_everything(0, verbose=False)
    return Trainer(**QUIET, accelerator="cpu", **options)


def _print_warning(message, category, *_, **__):
    print(f"{category.__name__}: {message}", file=sys.stderr)


class Child:
    """A forked process that runs a function; what it writes goes to a file."""

    def __init__(self, function: Callable[[], object], environment: dict[str, str] | None = None) -> None:
        descriptor, self.file = tempfile.mkstemp(dir=FILES.name, prefix="output")
        os.close(descriptor)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(function, environment or {})

    def _run(self, function: Callable[[], object], environment: dict[str, str]) -> None:
        status = 70
        try:
            os.environ.update(environment)
            output = os.open(self.file, os.O_WRONLY | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout = os.fdopen(1, "w", buffering=1)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
                logging.getLogger(name).handlers.clear()
                logging.getLogger(name).propagate = True
            logging.getLogger().handlers[:] = [logging.StreamHandler(sys.stderr)]  # in place of pytest's
            warnings.showwarning = _print_warning  # else pytest keeps them
            signal.signal(signal.SIGINT, signal.default_int_handler)
            function()
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
        except BaseException:
            traceback.print_exc()
            status = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float) -> int:
        """Its status, or minus the signal that ended it; it is killed, and the test fails, where it takes longer."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"it still ran after {seconds:.0f} s:\n{self.output}")

    @property
    def output(self) -> str:
        return Path(self.file).read_text(errors="replace")


def together(count: int, function: Callable[[int], object]) -> list[Child]:
    """So many processes of one run on this machine, as a launcher starts them; ``function`` gets the rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "NODE_RANK": "0"}
    return [Child(lambda rank=rank: function(rank), shared | {"LOCAL_RANK": str(rank)}) for rank in range(count)]
