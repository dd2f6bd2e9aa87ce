"""A line per epoch that stays on the terminal and is readable in a log file."""

import time

from lightning import Callback, LightningModule, Trainer

from zoo.running.tolerance import say


class EpochLines(Callback):
    """Prints epoch, seconds and the newest metrics after every training epoch."""

    def __init__(self) -> None:
        self._start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the time: a resumed epoch is not started again."""
        self._start = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the time."""
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line."""
        seconds = time.perf_counter() - self._start
        newest = trainer.callback_metrics  # asked by every process: some metrics are summed up together
        if not trainer.is_global_zero:
            return
        metrics = "  ".join(f"{name} {float(value):.4f}" for name, value in sorted(newest.items()))
        of = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        line = f"epoch {trainer.current_epoch + 1}{of}  {seconds:.1f} s  {metrics}"
        bar = trainer.progress_bar_callback
        if bar is None:
            say(line)
        else:
            bar.print(line)
