"""The CSV log of every run, which neither a full disk nor a kill spoils."""

import csv
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from zoo.running.checkpoint import replacing


class Log(CSVLogger):
    """Lightning's ``metrics.csv``, of which no row is lost once it is written.

    Its folder is claimed when it is chosen: two runs that start together do not write into one.

    Where a metric is new, Lightning writes the whole file anew in its place, and a kill in between loses it; here the
    new file takes the old one's place when it is complete. Where the disk is full, Lightning's error ends the run; here
    the rows wait for the next time.
    """

    def _get_next_version(self) -> int:
        number = super()._get_next_version()
        while getattr(rank_zero_only, "rank", 0) == 0:  # it tells the others
            try:
                Path(self.root_dir, f"version_{number}").mkdir(parents=True)
                break
            except FileExistsError:
                number += 1
        return number

    @rank_zero_only
    def save(self) -> None:
        """Write what has been logged since the last time."""
        experiment: Any = self.experiment
        path = Path(experiment.metrics_file_path)
        size = path.stat().st_size if path.exists() else 0
        try:
            if size and {key for row in experiment.metrics for key in row} - {*experiment.metrics_keys}:
                _add_columns(path, experiment)
                size = path.stat().st_size
            super().save()
        except OSError as error:
            if path.exists():
                os.truncate(path, size)  # without half a row
            rank_zero_warn(f"{len(experiment.metrics)} rows of {path} wait to be written ({error})")


def _add_columns(path: Path, experiment: Any) -> None:
    """Give the file a column for each metric that is new."""
    keys = sorted({*experiment.metrics_keys, *(key for row in experiment.metrics for key in row)})
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=keys)
        writer.writeheader()
        writer.writerows(rows)
    experiment.metrics_keys = keys
