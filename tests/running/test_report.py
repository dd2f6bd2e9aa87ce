"""Reports: claims are held against measurements honestly, and the page stands alone."""

import base64
import json
import math
import re
from dataclasses import replace

import pytest

from zoo.running.report import Run, curves_figure, hold_against, read_curves, read_results, write_report


def claim(**changes):
    return {"metric": "test/accuracy", "at_least": 0.9, "source": "somebody <b>bold</b>"} | changes


@pytest.mark.parametrize(
    ("expect", "measured", "met"),
    [
        (claim(), 0.9, True),
        (claim(), 0.8999, False),
        (claim(tolerance=0.01), 0.89, True),
        (claim(tolerance=0.01), 0.8899, False),
        ({"metric": "test/accuracy", "at_most": 2, "source": "s"}, 2.1, False),
        ({"metric": "test/accuracy", "at_most": 2, "tolerance": 0.2, "source": "s"}, 2.1, True),
        (claim(), float("nan"), False),
        (claim(metric="test/other"), 1.0, False),
    ],
)
def test_claims(expect, measured, met):
    (result,) = hold_against("r", [expect], {"test/accuracy": measured})
    assert result.met is met


@pytest.mark.parametrize("wrong", [{"at_most": 1}, {"at_least": None, "source": None}, {"metric": None}])
def test_an_incomplete_claim_is_an_error(wrong):
    expect = {key: value for key, value in (claim() | wrong).items() if value is not None}
    with pytest.raises(ValueError, match="r: a claim needs"):
        hold_against("r", [expect], {})


GIF = b"GIF89a and what moves"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    (folder / "pictures").mkdir(parents=True)
    rows = ["epoch,step,train/loss,val/loss,val/accuracy"]
    rows += [f"0,{step},{1 / (step + 1)},," for step in range(40)] + ["0,39,,0.5,0.8", "1,79,,0.4,0.9"]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    (folder / "config.yaml").write_text("model: <script>alert(1)</script>\n")
    curves_figure(read_curves(folder / "metrics.csv")).savefig(folder / "pictures" / "test_curves.png")
    (folder / "pictures" / "test_clips.gif").write_bytes(GIF)
    results = hold_against("lenet/x", [claim()], {"test/accuracy": 0.95})
    return Run("lenet/x", "LeNet", "zoo reproduce lenet/x", results, folder, 12.3, 1_256_080)


def test_curves_are_read_as_logged(run):
    curves = read_curves(run.folder / "metrics.csv")
    assert curves["val/accuracy"] == [(39, 0.8), (79, 0.9)]
    assert len(curves["train/loss"]) == 40
    assert len(curves_figure(curves).axes) == 2


def test_the_page_needs_nothing_beside_it_and_escapes_what_it_shows(run, tmp_path):
    write_report(tmp_path / "out" / "report.html", [run])
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "every claim was met" in page
    assert page.count("data:image/png;base64,") == 2
    assert f'alt="test clips" src="data:image/gif;base64,{base64.b64encode(GIF).decode()}"' in page
    assert "<script>" not in page
    assert "<b>" not in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    for text in ("0.9500", "≥ 0.9", "1,256,080", "zoo reproduce lenet/x", "Environment", "torch"):
        assert text in page
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"report.html", "results.json"}


def test_a_miss_is_said_in_the_heading(run, tmp_path):
    run.results = hold_against("lenet/x", [claim(at_least=0.99)], {"test/accuracy": 0.95})
    write_report(tmp_path / "report.html", [run])
    assert "a claim was missed" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_several_runs_have_a_table_of_contents_and_a_failed_one_says_why(run, tmp_path):
    failed = replace(
        run, recipe="lenet/y", error="OSError: <disk> full", results=hold_against("lenet/y", [claim()], {})
    )
    missed = replace(run, recipe="lenet/z", results=hold_against("lenet/z", [claim()], {"test/accuracy": 0.5}))
    write_report(tmp_path / "report.html", [run, failed, missed], "ladder", ["lenet/last"])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h1>ladder: 1 of 3 claims met, 1 recipe failed, 1 not run yet</h1>" in page
    assert "OSError: &lt;disk&gt; full" in page
    assert "Not run yet: lenet/last." in page
    for name in ("lenet/x", "lenet/y", "lenet/z"):
        assert f'<a href="#{name}">' in page
        assert f'<h2 id="{name}">' in page
    assert re.findall(r'<tr class="(\w+)">', page) == ["met", "failed", "missed"]


def test_what_is_to_be_said_of_the_data_stands_beside_every_figure(run, tmp_path):
    run.data_note = "JPEG copy"
    write_report(tmp_path / "report.html", [run])
    assert "<td>0.9500 (JPEG copy)</td>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "results.json").read_text())[0]["data_note"] == "JPEG copy"


def test_a_figure_that_is_not_to_be_relied_upon_says_so_beside_it(run, tmp_path):
    run.data_note = "JPEG copy"
    run.results[0].doubt = "unreliable: of 9 pictures"
    write_report(tmp_path / "report.html", [run])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<td>0.9500 (unreliable: of 9 pictures; JPEG copy)</td>" in page
    assert read_results(tmp_path / "results.json") == [run]
    (content,) = json.loads((tmp_path / "results.json").read_text())
    assert content["results"][0].pop("doubt") == "unreliable: of 9 pictures"
    (tmp_path / "results.json").write_text(json.dumps([content]))
    assert read_results(tmp_path / "results.json")[0].results[0].doubt == "", "a report of an earlier version"


def test_results_are_read_back_as_they_were(run, tmp_path):
    write_report(tmp_path / "report.html", [run])
    assert read_results(tmp_path / "results.json") == [run]
    (content,) = json.loads((tmp_path / "results.json").read_text())
    assert (content["recipe"], content["results"][0]["measured"], content["results"][0]["met"]) == (
        "lenet/x",
        0.95,
        True,
    )


def test_a_measured_nan_is_null_in_the_results(run, tmp_path):
    run.results = hold_against("lenet/x", [claim()], {"test/accuracy": math.nan})
    write_report(tmp_path / "report.html", [run])
    text = (tmp_path / "results.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)[0]["results"][0]["measured"] is None
