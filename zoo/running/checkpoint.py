"""Checkpoints that a crash cannot destroy and that cannot run code."""

import contextlib
import math
import mmap
import os
import pickle
import re
import shutil
import signal as signals
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from signal import Signals, default_int_handler, getsignal, signal
from types import FrameType
from typing import Any
from uuid import uuid4

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.optim import SGD, Optimizer

# Of what torch lets a pickle call: these take memory or time as they are told to, and no checkpoint of ours needs them.
GREEDY = re.compile(rb"\n(bytearray|_rebuild_(?!tensor\n|tensor_v|parameter|from_type_v2\n)\w+)\n")
LOCAL_HEADER = 2**18  # bytes that the one before a part of a zip file has at most
SHARED = 4  # times the size of its file that all tensors may have together: some share what is stored
STOPPING = [Signals.SIGTERM, *([signals.SIGUSR1] if hasattr(signals, "SIGUSR1") else [])]  # Windows has only the first


# Torch's words for what is the file system's fault.
UNWRITABLE = r"PytorchStreamWriter|file write failed|unexpected pos|iostream error|cannot be opened|does not exist"


class CheckpointError(OSError):
    """There is no room for checkpoints, or one that should have been written was not."""


class SafeCheckpointIO(TorchCheckpointIO):
    """Saves atomically in the target's own folder and loads tensors and plain values only.

    Lightning writes to the folder for temporary files and moves the result, which truncates the old file where that is
    another file system (https://github.com/Lightning-AI/pytorch-lightning/issues/19970). Here the new file is written
    beside the old one, flushed to disk, and then renamed over it. Remote paths (``s3://…``) are left to Lightning.

    Attributes:
        patient: Whether a file that cannot be written is noted in ``lost``, with a warning, instead of raised:
            :class:`KeepLast` sets it while it trains, and ends the run with an error if something is lost.
        lost: Files whose newest state could not be written, and why.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patient = False
        self.lost: dict[str, str] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``; until it is complete on disk the file there stays as it was.

        Raises:
            OSError: The file cannot be written (disk full, quota, permission); nothing half-written stays.
        """
        try:
            if "://" in str(path):
                super().save_checkpoint(checkpoint, path, storage_options)
            else:
                write_atomically(Path(path), checkpoint)
        except OSError as error:
            if not self.patient:
                raise
            self.lost[str(path)] = str(error)
            step = checkpoint.get("global_step")
            rank_zero_warn(f"CHECKPOINT NOT WRITTEN at step {step}: {error}. Training goes on; make room")
        else:
            self.lost.pop(str(path), None)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint; not while a newer one could not be written."""
        if not self.lost:
            super().remove_checkpoint(path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; ``weights_only`` is taken as True whatever is asked. See :func:`read_checkpoint`."""
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        return read_checkpoint(path)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, which then takes its place: complete and on disk, or not at all.

    What killed processes left of the same name is removed first.

    Raises:
        OSError: The file cannot be written (disk full, quota, permission); ``path`` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}.*.partial*"):
        stale.unlink(missing_ok=True)
    partial = path.parent / f".{path.name}.{uuid4().hex}.partial{path.suffix}"  # some writers want the suffix
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            f"{path} could not be written ({error}; {free:,} bytes are free on its disk); what was there before is "
            "untouched"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every file system lets a folder be flushed
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def write_atomically(path: Path, content: Any) -> None:
    """``torch.save`` through :func:`replacing`.

    Raises:
        OSError: The file cannot be written; the file there is as it was.
    """
    with replacing(path) as partial:
        try:
            torch.save(content, partial)
        except RuntimeError as error:
            if re.search(UNWRITABLE, str(error)):
                raise OSError(str(error)) from error
            raise


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a file of ``torch.save`` to the CPU, tensors and plain values only.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file would run code when loaded, is truncated, holds no dictionary, or claims more than it has.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        _refuse_packed(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|[Uu]nsupported (?:global|class))[^.]*?([\w.]+\.\w+)", str(error))
        if named is None:
            raise ValueError(f"{path} is refused: it is no file of tensors and plain values") from error
        raise ValueError(
            f"{path} is refused: it holds more than tensors and plain values ({named[1]}), and loading that could run "
            "code. Ask its author for a .safetensors file"
        ) from error
    except Exception as error:  # a damaged pickle raises anything: its words make no sense to the interpreter
        raise ValueError(f"{path} is truncated or no checkpoint: use another file") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a checkpoint or a state dict")
    _refuse_claims(path, content)
    return content


def _refuse_packed(path: str | os.PathLike) -> None:
    """Torch stores the parts of a checkpoint as they are; one that is packed could take any memory when it is read.

    Raises:
        pickle.UnpicklingError: A part is packed, the parts are larger than the file, or a pickle is greedy.
    """
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # as torch decides it
        # One of the old form may be large: it is searched where it lies.
        contents = _pickles(path) if zipped else [mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)]
    for content in contents:
        if greedy := GREEDY.search(content):
            raise pickle.UnpicklingError(f"it calls {greedy[1].decode()}")


def _pickles(path: str | os.PathLike) -> list[bytes]:
    with zipfile.ZipFile(path) as parts, open(path, "rb") as file:
        size = sum(part.file_size for part in parts.infolist())
        if size > os.path.getsize(path) or any(part.compress_type for part in parts.infolist()):
            raise pickle.UnpicklingError(f"its parts have {size:,} bytes, or are packed")
        found = []
        for part in parts.infolist():
            if part.filename.lower().endswith(".pkl"):
                file.seek(part.header_offset)  # torch may leave checksums out, on which ZipFile insists
                found.append(file.read(LOCAL_HEADER + part.file_size))
        return found


def _refuse_claims(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """A tensor may be an expanded number, or none that is stored: whatever reads it would make room for all of it.

    Raises:
        ValueError: A tensor is no plain one, or all together have far more bytes than the file.
    """
    asked, size = 0, os.path.getsize(path)
    left: list[Any] = [content]
    seen: set[Any] = set()  # what is there by several names is looked at once: tied weights, lists within one another
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise ValueError(f"{path} is refused: it has a tensor that is sparse, quantized or not stored")
            place = (value.data_ptr(), value.shape, value.stride(), value.dtype)
            asked += 0 if place in seen else math.prod(value.shape) * value.element_size()
            seen.add(place)
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            left += value.values() if isinstance(value, dict) else value
    if asked > SHARED * size:
        raise ValueError(f"{path} is refused: its tensors ask for {asked:,} bytes, and it has {size:,}")


def checkpoint_callbacks(monitor: str | None, mode: str, minutes: float = 10.0) -> list[Callback]:
    """What keeps ``best.ckpt`` (by ``monitor``; none where that is None) and ``last.ckpt``.

    Lightning's own ``save_last`` is a copy of the best (pvnet issue 544), so it is not used.
    """
    keep_last = KeepLast(minutes)
    if monitor is None:
        return [keep_last]
    return [KeepBest(monitor=monitor, mode=mode, filename="best", enable_version_counter=False), keep_last]


def reserve(folder: Path, needed: int) -> None:
    """See whether ``folder`` can be written to and has room for so many bytes, also under a quota; nothing stays.

    Raises:
        CheckpointError: It cannot, or has not; needed and available bytes are named.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            available = shutil.disk_usage(folder).free
            if needed > available:
                raise OSError("No space left on device")
            if needed and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, needed)
    except OSError as error:
        there = next(each for each in (folder, *folder.parents) if each.exists())
        raise CheckpointError(
            f"checkpoints cannot be kept in {folder} ({error}): about {needed:,} bytes are needed, "
            f"{shutil.disk_usage(there).free:,} are free on its disk. Make room, run in another folder, or train "
            "without checkpoints (--trainer.enable_checkpointing false)"
        ) from error
    finally:
        for made in missing:
            with contextlib.suppress(OSError):  # somebody else has put something there
                made.rmdir()


def bytes_of_checkpoint(trainer: Trainer, module: LightningModule) -> int:
    """About how large a checkpoint will be: weights, and what the optimizers will remember of those they train."""
    weights = sum(value.nbytes for value in module.state_dict().values() if isinstance(value, Tensor))
    return weights + sum(_numbers_kept(optimizer) for optimizer in trainer.optimizers)


def _numbers_kept(optimizer: Optimizer) -> int:
    """Bytes of an optimizer's state after a step: of SGD the momentum if any, of others at most two numbers each."""
    size = 0
    for group in optimizer.param_groups:
        times = int(bool(group["momentum"])) if isinstance(optimizer, SGD) else 2
        size += times * sum(parameter.nbytes for parameter in group["params"])
    return size


class KeepBest(ModelCheckpoint):
    """ModelCheckpoint for which NaN and infinity are never the best.

    In the folder of a resumed run it remembers what was best in the folder before.
    """

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Whether to save; Lightning would keep a first NaN, and an infinity for ever."""
        known = current is not None and math.isfinite(current)
        if current is not None and not trainer.strategy.reduce_boolean_decision(known):
            rank_zero_warn(f"{self.monitor} is {float(current)} in epoch {trainer.current_epoch}: never the best")
            return False
        return super().check_monitor_top_k(trainer, current)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score; Lightning forgets it where the folder has another name."""
        super().load_state_dict(state_dict | {"dirpath": self.dirpath})


class KeepLast(Checkpoint):
    """Keeps ``checkpoints/last.ckpt``: the newest state, whatever the metric says.

    It is written after every epoch, every so many minutes within one, and when the run is asked to stop: on SIGTERM,
    SIGUSR1 and the first Ctrl+C, of any process. The batch, and a validation that is due, are finished, the state saved
    and the run ended. A second Ctrl+C ends it at once; ``last.ckpt`` is then that of the last epoch or interval.

    Before training the room for checkpoints is tried. When later a file cannot be written, training goes on, and the
    run ends with an error if at its end a checkpoint is missing or older than it should be.

    Args:
        minutes: How old the file may become within an epoch.

    Raises:
        CheckpointError: There is no room, or at the end: something was not written.
    """

    def __init__(self, minutes: float = 10.0) -> None:
        self.seconds = 60 * minutes
        self.path = ""
        self.asked_by: int | None = None  # the signal
        self._saved_at = 0.0
        self._previous: dict[Signals, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle the folder, beside the run's log."""
        folder = trainer.log_dir or trainer.default_root_dir  # asked by every process: they agree on it together
        self.path = os.path.join(folder, "checkpoints", "last.ckpt")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try the room, in the process that writes; what it finds all are told."""
        if trainer.fast_dev_run or "://" in self.path:  # type: ignore[attr-defined]
            return
        files = sum(isinstance(callback, Checkpoint) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        problem = ""
        if trainer.is_global_zero:
            try:  # one more: the new file is complete before the old one goes
                reserve(Path(self.path).parent, (files + 1) * bytes_of_checkpoint(trainer, pl_module))
            except CheckpointError as error:
                problem = str(error)
        if problem := trainer.strategy.broadcast(problem):
            raise CheckpointError(problem)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over, after Lightning noted which handlers it will restore.

        Lightning's own SIGTERM handler talks to the other processes at whatever moment the signal comes, and waits for
        ever where they are in the middle of something else.
        """
        self.asked_by = None
        self._saved_at = time.monotonic()
        if isinstance(files := trainer.strategy.checkpoint_io, SafeCheckpointIO):
            files.patient, files.lost = True, {}
        if threading.current_thread() is not threading.main_thread():
            return
        # SIGUSR1 is what some clusters send; under SLURM Lightning has it, to queue the run again.
        self._previous = {
            number: signal(number, self._on_signal)
            for number in STOPPING
            if number == Signals.SIGTERM or getsignal(number) == signals.SIG_DFL
        }
        if getsignal(Signals.SIGINT) is default_int_handler:
            self._previous[Signals.SIGINT] = signal(Signals.SIGINT, self._on_signal)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when the interval is over, stop when asked to; not before a validation, which would be lost."""
        epoch = trainer.fit_loop.epoch_loop
        if epoch._should_check_val_fx(trainer.fit_loop._data_fetcher):  # type: ignore[arg-type]  # it has one now
            return
        if self._any(trainer, self.asked_by is not None or trainer.received_sigterm):
            trainer._signal_connector.received_sigterm = True  # Lightning then leaves its loop where it can be resumed
        elif self._any(trainer, time.monotonic() - self._saved_at > self.seconds):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the finished epoch; stop when asked to."""
        self._save(trainer)
        if self._any(trainer, self.asked_by is not None):
            trainer._signal_connector.received_sigterm = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save where the run was asked to stop; after any other exception the state may be torn."""
        if isinstance(exception, SIGTERMException):
            # Whoever repeats the signal meanwhile is not given Lightning's handler, or the system's: the one may wait
            # for ever, the other ends the process. Lightning itself restores what was there before the run.
            self._save(trainer)
            saved = self.path not in self._end_patience(trainer)
            rank_zero_info(
                f"asked to stop: saved {self.path}; go on with --ckpt_path {self.path}"
                if saved
                else f"asked to stop, but {self.path} COULD NOT BE WRITTEN: what is there is of an earlier step"
            )
        else:
            self._release()
        self._end_patience(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back."""
        self._release()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End with an error where a checkpoint is not what it should be."""
        lost = trainer.strategy.broadcast(self._end_patience(trainer))  # process 0 alone writes
        if lost:
            reasons = "; ".join(lost.values())
            raise CheckpointError(f"training came to its end, but not every checkpoint could be written: {reasons}")

    def _save(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            for logger in trainer.loggers:
                logger.save()  # else a kill loses rows of steps that a resumed run does not repeat
            trainer.save_checkpoint(self.path, weights_only=False)  # the whole state, not the weights alone
            self._saved_at = time.monotonic()

    @staticmethod
    def _end_patience(trainer: Trainer) -> dict[str, str]:
        files = trainer.strategy.checkpoint_io
        if not isinstance(files, SafeCheckpointIO):
            return {}
        files.patient = False
        return files.lost

    @staticmethod
    def _any(trainer: Trainer, decision: bool) -> bool:
        """Whether any process says so: signals and clocks differ, and all must stop or save together."""
        return decision if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(decision, all=False)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked_by is not None and number == Signals.SIGINT:
            raise KeyboardInterrupt
        self.asked_by = number
        rank_zero_info(f"\n{Signals(number).name}: saving after this batch; Ctrl+C once more stops at once")

    def _release(self) -> None:
        for number, handler in self._previous.items():
            signal(number, handler)
        self._previous = {}
