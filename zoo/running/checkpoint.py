"""Checkpoints that a crash cannot destroy and that cannot run code."""

import contextlib
import os
import pickle
import re
import threading
import time
from pathlib import Path
from signal import SIGINT, default_int_handler, getsignal, signal
from types import FrameType
from typing import Any
from uuid import uuid4

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException


class SafeCheckpointIO(TorchCheckpointIO):
    """Saves atomically in the target's own folder and loads tensors and plain values only.

    Lightning writes to the folder for temporary files and moves the result, which truncates the old file where that is
    another file system (https://github.com/Lightning-AI/pytorch-lightning/issues/19970). Here the new file is written
    beside the old one, flushed to disk, and then renamed over it. Remote paths (``s3://…``) are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``; until it is complete on disk the file there stays as it was.

        Raises:
            OSError: The file cannot be written (disk full, quota, permission); nothing half-written stays.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_atomically(Path(path), checkpoint)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; ``weights_only`` is taken as True whatever is asked. See :func:`read_checkpoint`."""
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        return read_checkpoint(path)


def write_atomically(path: Path, content: Any) -> None:
    """``torch.save`` to a file beside ``path``, flush, rename; remove what killed processes left of the same name.

    Raises:
        OSError: The file cannot be written; it names ``path``, and the file there is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}.*.partial"):
        stale.unlink(missing_ok=True)
    partial = path.parent / f".{path.name}.{uuid4().hex}.partial"
    try:
        with open(partial, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise OSError(f"{path} could not be written ({error}); what was there before is untouched") from error
    finally:
        partial.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every file system lets a folder be flushed
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a file of ``torch.save`` to the CPU, tensors and plain values only.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file would run code when loaded, is truncated, or holds no dictionary.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|[Uu]nsupported (?:global|class))[^.]*?([\w.]+\.\w+)", str(error))
        if named is None:
            raise ValueError(f"{path} is no checkpoint: use another file") from error
        raise ValueError(
            f"{path} is refused: it holds more than tensors and plain values ({named[1]}), and loading that could run "
            "code. Ask its author for a .safetensors file"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is truncated or no checkpoint: use another file") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a checkpoint or a state dict")
    return content


def checkpoint_callbacks(monitor: str | None, mode: str, minutes: float = 10.0) -> list[Callback]:
    """What keeps ``best.ckpt`` (by ``monitor``; none where that is None) and ``last.ckpt``.

    Lightning's own ``save_last`` is a copy of the best (pvnet issue 544), so it is not used.
    """
    keep_last = KeepLast(minutes)
    if monitor is None:
        return [keep_last]
    return [ModelCheckpoint(monitor=monitor, mode=mode, filename="best", enable_version_counter=False), keep_last]


class KeepLast(Checkpoint):
    """Keeps ``checkpoints/last.ckpt``: the newest state, whatever the metric says.

    It is written after every epoch, every so many minutes within one, and when the run is asked to stop: on SIGTERM,
    and on the first Ctrl+C, the batch is finished, the state saved and the run ended. A second Ctrl+C ends it at once;
    ``last.ckpt`` is then that of the last epoch or interval.

    Args:
        minutes: How old the file may become within an epoch.
    """

    def __init__(self, minutes: float = 10.0) -> None:
        self.seconds = 60 * minutes
        self.path = ""
        self._saved_at = 0.0
        self._interrupted = False
        self._previous: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle the folder, beside the run's log."""
        folder = trainer.log_dir or trainer.default_root_dir  # asked by every process: they agree on it together
        self.path = os.path.join(folder, "checkpoints", "last.ckpt")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take Ctrl+C over where nobody else has; not before Lightning notes which handlers it will restore."""
        self._saved_at = time.monotonic()
        main_thread = threading.current_thread() is threading.main_thread()
        if main_thread and getsignal(SIGINT) is default_int_handler:
            self._previous = signal(SIGINT, self._on_interrupt)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when the interval is over; pass Ctrl+C on as if it were SIGTERM."""
        if self._interrupted:  # Lightning then leaves its loop where a run can be resumed
            trainer._signal_connector.received_sigterm = True
        elif self._is_due(trainer):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the finished epoch."""
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save where the run was asked to stop; after any other exception the state may be torn."""
        self._release()
        if isinstance(exception, SIGTERMException):
            self._save(trainer)
            rank_zero_info(f"asked to stop: saved {self.path}; go on with --ckpt_path {self.path}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give Ctrl+C back."""
        self._release()

    def _is_due(self, trainer: Trainer) -> bool:
        """Whether the interval is over: on several processes for any of them, since all save together."""
        due = time.monotonic() - self._saved_at > self.seconds
        return due if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(due, all=False)

    def _save(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(self.path)
            self._saved_at = time.monotonic()

    def _on_interrupt(self, signal_number: int, frame: FrameType | None) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        rank_zero_info("\nCtrl+C: saving after this batch; press again to stop at once")

    def _release(self) -> None:
        if self._previous is not None:
            signal(SIGINT, self._previous)
            self._previous = None
