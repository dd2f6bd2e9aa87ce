"""What only reports, a logger, a picture, a progress bar, never costs the run that it reports of."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import rank_zero_warn

RARELY = 10  # times as long as a call took to fail it is not made again
LOGGING = ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize", "after_save_checkpoint")


class ReportsMayFail(Callback):
    """Lets a run go on where a logger, a picture or the progress bar fails; says so at once, and again at the end.

    A tracking server that is gone, or a disk that is full, would else end a training of days. The run's own
    ``metrics.csv`` is no such report (:class:`zoo.running.log.Log`), nor are predictions and checkpoints. What fails
    before the first step, as a login does, still ends the run.
    """

    def __init__(self) -> None:
        self._failed: dict[str, str] = {}  # what, and how it failed at first
        self._times: dict[str, int] = {}
        self._not_before: dict[str, float] = {}  # a call that waits for a server that is gone is made seldom

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the errors of loggers and bars."""
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):
                self._tolerate(logger, LOGGING)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ProgressBar):
                self._tolerate(callback, [name for name in dir(callback) if name.startswith("on_")] + ["print"])

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say it also where the run ends in another way."""
        self.teardown(trainer, pl_module, "")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say once more what failed."""
        for what, how in self._failed.items():
            rank_zero_warn(f"{what} FAILED {self._times[what]} times, at first by {how}. All else is as it should be")
        self._failed, self._times = {}, {}

    def note(self, what: str, error: Exception) -> None:
        """A report has failed; the first time of each kind is said."""
        if isinstance(error, BrokenPipeError):
            _leave_stdout()
        self._times[what] = self._times.get(what, 0) + 1
        if what not in self._failed:
            self._failed[what] = f"{type(error).__name__}: {error}"
            rank_zero_warn(f"{what} FAILED ({self._failed[what]}). The run goes on")

    def _tolerate(self, reporter: Logger | ProgressBar, names: list[str] | tuple[str, ...]) -> None:
        for name in names:
            setattr(reporter, name, self._tolerated(getattr(reporter, name), type(reporter).__name__, name))

    def _tolerated(self, method: Callable, what: str, name: str) -> Callable:
        method = getattr(method, "not_tolerated", method)  # of an earlier stage, or another Trainer

        @wraps(method)
        def tolerated(*args: Any, **options: Any) -> Any:
            start = time.monotonic()
            if start < self._not_before.get(f"{what}.{name}", 0.0) and name != "finalize":
                return None
            try:
                return method(*args, **options)
            except Exception as error:
                now = time.monotonic()
                self._not_before[f"{what}.{name}"] = now + RARELY * (now - start)
                return self.note(what, error)

        tolerated.not_tolerated = method  # type: ignore[attr-defined]
        return tolerated


@contextmanager
def tolerating(trainer: Trainer, what: str) -> Iterator[None]:
    """Go on after an error of the block, if the run has :class:`ReportsMayFail`."""
    try:
        yield
    except Exception as error:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        tolerant = next((each for each in callbacks if isinstance(each, ReportsMayFail)), None)
        if tolerant is None:
            raise
        tolerant.note(what, error)


def say(line: str) -> None:
    """Print a line, unless whoever read has gone, as ``head`` does; nothing is printed then from there on."""
    try:
        print(line, flush=True)
    except OSError:
        _leave_stdout()


def _leave_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes what is left at its end
