"""The CSV log keeps its rows."""

import csv
import os

import pytest

from zoo.running.log import Log


def rows(log):
    with open(log.experiment.metrics_file_path, newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def filled(folder):
    log = Log(folder, name="", version="a")
    log.log_metrics({"loss": 1.0}, step=0)
    log.save()
    log.log_metrics({"loss": 0.5, "accuracy": 0.25}, step=1)
    return log


BOTH = [{"loss": "1.0", "step": "0"}, {"loss": "0.5", "accuracy": "0.25", "step": "1"}]


def test_rows_are_those_of_lightning(tmp_path):
    log = filled(tmp_path)
    log.save()
    log.save()
    assert rows(log) == BOTH


def test_a_new_metric_never_leaves_half_a_file(tmp_path, monkeypatch):
    """Killed at any moment of the writing, what there was before is there."""
    log = filled(tmp_path)

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    monkeypatch.setattr(csv.DictWriter, "writerows", kill)
    with pytest.raises(Killed):
        log.save()
    monkeypatch.undo()
    assert rows(log) == BOTH[:1]


def test_rows_wait_while_the_disk_is_full(tmp_path, monkeypatch):
    log = filled(tmp_path)
    log.save()
    log.log_metrics({"loss": 0.25}, step=2)
    write = csv.DictWriter.writerows

    def half(self, given):
        write(self, given)
        self.writer.writerow(["0.12"])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(csv.DictWriter, "writerows", half)
    with pytest.warns(UserWarning, match=r"1 rows of .*metrics\.csv wait"):
        log.save()
    monkeypatch.undo()
    assert rows(log) == BOTH
    log.save()
    assert rows(log) == [*BOTH, {"loss": "0.25", "step": "2"}]
    assert os.listdir(tmp_path / "a").count("metrics.csv") == 1


def test_two_runs_that_start_together_have_folders_of_their_own(tmp_path):
    one, other = (Log(tmp_path, name="recipe") for _ in range(2))
    assert [one.version, other.version, one.version] == [0, 1, 0]
    (tmp_path / "recipe" / "version_7").mkdir()
    assert Log(tmp_path, name="recipe").version == 8
