"""Several recipes in one report: one that fails does not keep the others from being run, and none is run twice."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from zoo import recipes
from zoo.cli import main
from zoo.running.report import read_results
from zoo.tasks.classification import ClassificationTask

SMALL = ["--data.init_args.image_size", "8", "--model.init_args.image_size", "8", "--trainer.max_epochs", "1"]


@pytest.fixture
def plain_pictures(monkeypatch):
    """Sheets of many small pictures take seconds: nothing here looks at them."""
    for name in ("contact_sheet", "confusion_matrix_figure"):
        monkeypatch.setattr(f"zoo.tasks.classification.{name}", lambda *_: Figure(figsize=(1, 1)))


@pytest.fixture
def ladder(plain_pictures):
    """A list of three recipes: the first and the last are met, the one between is spoiled by the test."""
    recipe = recipes.find("lenet/embedded").read_text().replace("at_least: 0.98", "at_least: 0.0")
    for name in ("first", "second", "third"):
        Path(f"{name}.yaml").write_text(recipe)
    Path("ladder.yaml").write_text("recipes: [first.yaml, second.yaml, third.yaml]\n")


class Runs:
    """Counts the trainings, and spoils the one asked for."""

    def __init__(self, monkeypatch, spoil=0, error=None):
        self.count, self.spoil, self.error = 0, spoil, error
        original = ClassificationTask.configure_optimizers

        def configure(module):
            self.count += 1
            if self.count == self.spoil:
                raise self.error
            return original(module)

        monkeypatch.setattr(ClassificationTask, "configure_optimizers", configure)


def test_a_list_writes_one_report_with_all(ladder, tmp_path, capsys):
    assert main(["reproduce", "ladder.yaml", *SMALL]) == 0
    folder = tmp_path / "runs" / "ladder" / "version_0"
    assert f"report: {folder.relative_to(tmp_path)}/report.html" in capsys.readouterr().out
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<h1>ladder: 3 of 3 claims met</h1>" in page
    assert page.count("data:image/png") >= 12  # of each: curves, predictions, confusion matrix, worst mistakes, …
    assert [run.recipe for run in read_results(folder / "results.json")] == ["first.yaml", "second.yaml", "third.yaml"]


def test_what_was_measured_is_said_before_the_report_is_written(ladder, monkeypatch, capsys):
    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr("zoo.running.reproducing.write_report", broken)
    assert main(["reproduce", "first.yaml", *SMALL]) == 1
    said = capsys.readouterr()
    assert "disk full" in said.err
    (line,) = [line for line in said.out.splitlines() if line.startswith("first.yaml: test/accuracy ")]
    value, claimed = line.removeprefix("first.yaml: test/accuracy ").split(", claimed ")
    assert 0 <= float(value) <= 1
    assert claimed == "≥ 0"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyError("labels")])
def test_a_recipe_that_fails_is_reported_and_the_next_ones_are_run(ladder, monkeypatch, capsys, error):
    runs = Runs(monkeypatch, spoil=2, error=error)
    assert main(["reproduce", "ladder.yaml", "--out", "report", *SMALL]) == 1
    assert runs.count == 3
    page = Path("report/report.html").read_text(encoding="utf-8")
    assert "2 of 3 claims met, 1 recipe failed" in page
    captured = capsys.readouterr()
    assert "second.yaml failed" in captured.err
    assert ("Traceback" in captured.err) is isinstance(error, KeyError)  # a bug keeps its traceback
    failed = read_results(Path("report/results.json"))[1]
    assert str(error) in failed.error


def test_the_report_is_written_after_each_recipe(ladder, monkeypatch):
    Runs(monkeypatch, spoil=2, error=SystemExit(130))
    with pytest.raises(SystemExit):
        main(["reproduce", "ladder.yaml", "--out", "report", *SMALL])
    page = Path("report/report.html").read_text(encoding="utf-8")
    assert "1 of 1 claims met, 2 not run yet" in page
    assert "Not run yet: second.yaml, third.yaml." in page


def test_resume_runs_what_is_missing_or_failed_only(ladder, monkeypatch):
    with monkeypatch.context() as patch:
        Runs(patch, spoil=2, error=OSError("disk full"))
        assert main(["reproduce", "ladder.yaml", *SMALL]) == 1
    runs = Runs(monkeypatch)
    assert main(["reproduce", "ladder.yaml", "--resume", *SMALL]) == 0
    assert runs.count == 1
    assert len(list(Path("runs/ladder").iterdir())) == 1
    assert "3 of 3 claims met" in Path("runs/ladder/version_0/report.html").read_text(encoding="utf-8")
    # Other overrides are another experiment.
    assert main(["reproduce", "first.yaml", "third.yaml", "--resume", "--out", "runs/ladder/version_0",
                 *SMALL, "--seed_everything", "1"]) == 0  # fmt: skip
    assert runs.count == 3


def test_resume_with_a_foreign_file_is_refused(ladder, capsys):
    Path("report").mkdir()
    Path("report/results.json").write_text(json.dumps([{"a": 1}]))
    assert main(["reproduce", "ladder.yaml", "--resume", "--out", "report"]) == 2
    assert "report/results.json is no file of zoo reproduce" in capsys.readouterr().err


def test_a_mistake_in_the_last_one_is_found_before_the_first_is_trained(ladder, monkeypatch, capsys):
    Path("third.yaml").write_text(Path("third.yaml").read_text().replace("max_epochs", "max_epoch"))
    runs = Runs(monkeypatch)
    assert main(["reproduce", "ladder.yaml", *SMALL]) == 2
    assert runs.count == 0
    assert not Path("runs").exists()
    assert "third.yaml, line" in capsys.readouterr().err


@pytest.mark.parametrize("name", recipes.lists())
def test_every_member_of_a_list_is_a_recipe_that_claims_something(name):
    for member in recipes.expand(name):
        assert recipes.read(recipes.find(member))["expect"]


def test_lists_are_no_recipes_and_the_note_of_the_data_reaches_the_report(monkeypatch, plain_pictures):
    assert "lecture" in recipes.lists()
    assert not any(name.startswith("lists/") for name in recipes.names())
    from datamodules import DigitsDataModule

    monkeypatch.setattr(DigitsDataModule, "note", "small copy", raising=False)
    assert main(["reproduce", "lenet/embedded", "--out", "report", *SMALL]) == 1
    (content,) = json.loads(Path("report/results.json").read_text())
    assert content["data_note"] == "small copy"
    assert "(small copy)</td>" in Path("report/report.html").read_text(encoding="utf-8")
