"""Search: ranges are log-uniform, grids complete, what diverges is worst, and what is known is never lost."""

import csv
import os
import shlex
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kstest

import datamodules
from zoo.cli import main
from zoo.recipes import RecipeError
from zoo.running.search import Search, Span, _grid, _span
from zoo.tasks.classification import ClassificationTask

optuna = pytest.importorskip("optuna")

RATE = "model.init_args.optimizer.init_args.lr"
RECIPE = [
    *("lenet/embedded", "--data.init_args.image_size", "8", "--model.init_args.image_size", "8"),
    *("--data.init_args.translate", "0", "--trainer.max_epochs", "1"),
]


def rows(folder="runs/lenet/embedded/search_0"):
    with open(Path(folder) / "search.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("a.b=1e-4..1e-1:log", Span("a.b", 1e-4, 0.1, log=True)),
        ("--a=-1.5..2", Span("a", -1.5, 2.0)),
        ("a=1..8", Span("a", 1, 8, whole=True)),
        ("a=1..8.", Span("a", 1, 8)),
        ("a=16,32", Span("a", choices=("16", "32"))),
        ("a=torch.optim.SGD,torch.optim.Adam", Span("a", choices=("torch.optim.SGD", "torch.optim.Adam"))),
    ],
)
def test_what_a_key_ranges_over(text, span):
    assert _span(text) == span


@pytest.mark.parametrize("text", ["a", "=1..2", "a=", "a=1", "a=2..1", "a=0..1:log", "a=1..2:lg", "a=1..x", "a=1,,2"])
def test_what_no_range_is(text):
    with pytest.raises(RecipeError, match="--over"):
        _span(text)


def test_a_log_range_is_uniform_over_the_decades_and_another_over_its_values():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trials = [study.ask() for _ in range(400)]
    log, plain = Span("log", 1e-5, 1e-1, log=True), Span("plain", 2.0, 6.0)
    decades = np.log10([log.suggest(trial) for trial in trials])
    assert kstest((decades + 5) / 4, "uniform").pvalue > 0.01
    assert kstest((np.array([plain.suggest(trial) for trial in trials]) - 2) / 4, "uniform").pvalue > 0.01
    assert {Span("whole", 1, 3, whole=True).suggest(trial) for trial in trials} == {1, 2, 3}


def test_a_grid_takes_as_many_values_of_each_range_as_the_trials_allow():
    log, plain, choice = Span("l", 1e-4, 1e-2, log=True), Span("p", 0.0, 1.0), Span("c", choices=("a", "b"))
    assert _grid([log, plain], 9) == (3, 9)
    assert _grid([log, plain], 15) == (3, 9)
    assert _grid([log, choice], 20) == (10, 20)
    assert _grid([choice], 20) == (2, 2)
    assert _grid([Span("w", 1, 3, whole=True)], 20) == (3, 3)
    assert log.points(3) == [1e-4, 1e-3, 1e-2]
    with pytest.raises(RecipeError, match="8 points: --trials 8 at least"):
        _grid([log, plain, choice], 7)


def test_every_point_of_the_grid_is_tried_once(monkeypatch):
    tried = []
    monkeypatch.setattr(Search, "run", lambda self, values: float(len(tried)) if tried.append(values) else 0.0)
    over = ["--over", f"{RATE}=1e-3..1e-1:log", "--over", "data.init_args.batch_size=32,64"]
    assert main(["search", *RECIPE, *over, "--method", "grid", "--trials", "6"]) == 0
    assert len(tried) == 6
    expected = {(rate, size) for rate in (1e-3, 1e-2, 1e-1) for size in ("32", "64")}
    assert {tuple(values.values()) for values in tried} == expected


@pytest.mark.parametrize("method", ["random", "tpe"])
def test_the_same_seed_tries_the_same_values(monkeypatch, method):
    tried = []
    monkeypatch.setattr(Search, "run", lambda self, values: tried.append(values) or values[RATE])
    for seed in ("0", "0", "1"):
        command = ["search", *RECIPE, "--over", f"{RATE}=1e-3..1e-1:log", "--method", method, "--trials", "12"]
        assert main([*command, "--seed_everything", seed]) == 0
    assert tried[:12] == tried[12:24] != tried[24:]


def test_the_best_is_told_what_diverges_is_worst_and_the_test_split_is_not_read(monkeypatch, capsys, tmp_path_factory):
    def test_dataloader(self):
        raise AssertionError("the test split was asked for")

    monkeypatch.setattr(datamodules.DigitsDataModule, "test_dataloader", test_dataloader)
    temporary = tmp_path_factory.mktemp("temporary")  # in the machine's own others may search at the same time
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    over = ["--over", f"{RATE}=1e-9,1e15,0.005", "--over", "data.init_args.batch_size=16,600"]
    assert main(["search", *RECIPE, *over, "--method", "grid", "--epochs", "3"]) == 0
    output = capsys.readouterr().out
    folder = Path("runs/lenet/embedded/search_0")
    assert {path for path in Path().rglob("*") if path.is_file()} == {folder / "search.csv", folder / "search.png"}
    assert not list(temporary.glob("zoo-search-*"))
    table = rows()
    assert len(table) == 6
    assert {row["seed"] for row in table} == {"0"}
    assert {row[RATE] for row in table if row["status"] == "diverged"} == {"1e15"}
    assert all(bool(row["val/accuracy"]) is (row["status"] == "finished") for row in table)
    best = max(float(row["val/accuracy"] or 0) for row in table)
    assert best > 0.5  # 234 steps at a rate that learns
    override = shlex.split(output.splitlines()[-1])
    assert override == [f"--{RATE}", "0.005", "--data.init_args.batch_size", "16"]
    assert f"val/accuracy {best:.4f} (seed 0)" in output
    assert main(["fit", *RECIPE, *override, "--trainer.fast_dev_run", "true"]) == 0


def test_where_all_diverge_the_status_is_one_and_a_loss_is_to_be_small(capsys):
    command = ["search", *RECIPE, "--over", f"{RATE}=1e15,1e16", "--trials", "2", "--metric", "val/loss"]
    assert main(command) == 1
    assert "every trial diverged" in capsys.readouterr().err
    assert [row["val/loss"] for row in rows()] == ["", ""]
    assert Path("runs/lenet/embedded/search_0/search.png").is_file()


def test_the_smallest_loss_is_the_best():
    search = Search("r", [], [], Path("folder"), "val/loss", False, 3, False)
    from zoo.running.search import Row

    search.rows = [Row(i, 0, {}, value, "", 0.0) for i, value in enumerate([0.5, 0.2, None, 0.2])]
    assert search.best is search.rows[1]
    search.best_is_max = True
    assert search.best is search.rows[0]


def test_kept_trials_have_their_files_and_the_next_search_its_own_folder():
    command = ["search", *RECIPE, "--over", f"{RATE}=0.1,0.2", "--trials", "1"]
    assert main([*command, "--keep"]) == 0
    kept = Path("runs/lenet/embedded/search_0/trial_0")
    assert {path.name for path in (kept / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert {"metrics.csv", "config.yaml"} <= {path.name for path in kept.iterdir()}
    assert main(command) == 0
    assert len(rows("runs/lenet/embedded/search_1")) == 1
    assert main([*command, "--out", "runs/lenet/embedded/search_1"]) == 2


@pytest.mark.parametrize("keep", [[], ["--keep"]])
def test_ctrl_c_ends_with_what_is_known(monkeypatch, capsys, keep):
    original, steps = ClassificationTask.training_step, []

    def step(self, batch, batch_idx):
        steps.append(batch_idx)
        if len(steps) == 25:  # in the second trial: the first has 19
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(ClassificationTask, "training_step", step)
    handler = signal.getsignal(signal.SIGINT)
    assert main(["search", *RECIPE, "--over", f"{RATE}=0.01..0.1", "--trials", "3", *keep]) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    (row,) = rows()
    assert row["status"] == "finished"
    assert f"  --{RATE} {row[RATE]}" in capsys.readouterr().out
    assert len(steps) < 38


def test_a_value_that_is_refused_in_the_middle_does_not_lose_what_is_known(capsys):
    over = ["--over", "data.init_args.batch_size=64,0"]
    assert main(["search", *RECIPE, *over, "--method", "grid", "--seed_everything", "1"]) == 1
    captured = capsys.readouterr()
    assert "zoo: error: batch_size=0" in captured.err
    assert "best: trial 1" in captured.out
    assert [row["status"] for row in rows()] == ["finished"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--over"),
        (["--over", "a.b=1..2"], "a.b is no key"),
        (["--over", f"{RATE}=1..2", "--over", f"{RATE}=3..4"], "a key twice"),
        (["--over", "data.init_args.batch_size=16,x"], "batch_size must be int, not 'x'"),
        (["--over", "data.init_args.batch_size=0,-1"], "batch_size="),
        (["--over", f"{RATE}=1..2", "--data.init_args.val_size", "0"], "set --data.init_args.val_size"),
        (["--over", f"{RATE}=1..2", "--trainer.limit_val_batches", "0"], "set --trainer.limit_val_batches"),
        (["--over", f"{RATE}=1..2", "--metric", "test/accuracy"], "not of the validation split"),
        (["--over", f"{RATE}=1..2", "--metric", "val/acuracy"], "--metric is one of val/accuracy, val/loss"),
        (["--over", f"{RATE}=1..2", "--trials", "0"], "'0'"),
        (["--over", f"{RATE}=1..2", "--method", "bayes"], "'bayes'"),
        (["--over", f"{RATE}=1..2", "--ckpt_path", "best"], "leave --ckpt_path out"),
    ],
)
def test_wrong_arguments_are_refused(arguments, said, capsys):
    assert main(["search", *RECIPE, *arguments]) == 2
    assert said in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_without_optuna_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["search", *RECIPE, "--over", f"{RATE}=1..2"]) == 2
    assert "pip install 'zoo[search]'" in capsys.readouterr().err
