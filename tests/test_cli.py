"""The command as its users call it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from zoo import recipes
from zoo.cli import COMMANDS, main
from zoo.running.checkpoint import read_checkpoint
from zoo.running.starting import prepare

ROOT = Path(__file__).parents[1]
SMALL = ["--data.init_args.image_size", "8", "--model.init_args.image_size", "8"]


@pytest.mark.parametrize("arguments", ["--help", "list", "list --json", "--version"])
def test_what_needs_no_training_does_not_import_lightning_or_torch(arguments):
    code = (
        "import sys; from zoo.cli import COMMANDS, main; status = main(sys.argv[1:]); "
        "heavy = {'torch', 'lightning', 'torchvision', 'numpy', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(status)"
    )
    command = [sys.executable, "-c", code, *arguments.split()]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "lenet/mnist" in result.stdout or "list" not in arguments


def test_import_zoo_does_not_import_lightning():
    code = "import sys, zoo, datamodules; assert not {'torch', 'lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


@pytest.mark.skipif(os.name != "posix", reason="pipes of a shell")
def test_a_reader_that_has_seen_enough_is_no_error():
    code = (
        "import sys; from zoo import cli; cli.COMMANDS['list'] = lambda _: print('x' * 10**6); "
        "sys.exit(cli.main(['list']))"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


def test_the_usage_names_every_command_and_overlay(capsys):
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    overlays = [path.stem for path in (recipes.FOLDER / recipes.OVERLAYS).glob("*.yaml")]
    assert [word for word in [*COMMANDS, *overlays, *recipes.lists()] if word not in usage] == []


def test_list_has_a_row_for_each_claim(capsys):
    assert main(["list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} == set(recipes.names())
    row = next(row for row in rows if row["name"] == "lenet/mnist")
    assert (row["architecture"], row["task"], row["data"]) == ("LeNet", "classification", "MNIST")
    assert row["claimed"] == "≥ 0.991"
    assert set(row) >= {"source", "measured", "cost", "metric"}
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(rows)
    assert [line.split()[0] for line in lines[1:]] == [row["name"] for row in rows]


def test_show_prints_the_lectures_table(capsys):
    assert main(["show", "lenet"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    first = next(line for line in lines if line and line[0] == "backbone.conv1")
    assert first == ["backbone.conv1", "Conv2d", "20", "x", "28", "x", "28", "61.25", "520", "0.392"]
    total = next(line for line in lines if line and line[0] == "total")
    assert total[-2:] == ["1,256,080", "6.547"]


def test_show_takes_the_architectures_arguments(capsys):
    assert main(["show", "LeNet", "--input", "3x32x32", "--in_channels", "3", "--image_size", "32"]) == 0
    assert "20 x 32 x 32" in capsys.readouterr().out


def reproduce(*overrides):
    return main(["reproduce", "lenet/embedded", "--out", "report", "--trainer.max_epochs", "1", *SMALL, *overrides])


def test_a_missed_claim_is_status_one_and_is_reported(tmp_path, capsys):
    assert reproduce() == 1
    output = capsys.readouterr().out
    assert "missed" in output
    assert "report/report.html" in output
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "a claim was missed" in page
    assert "zoo reproduce lenet/embedded --trainer.max_epochs 1" in page
    assert page.count("data:image/png") == 5  # curves, predictions, confusion matrix, worst mistakes, filters


def test_a_met_claim_is_status_zero(tmp_path):
    recipe = recipes.find("lenet/embedded").read_text().replace("at_least: 0.98", "at_least: 0.11")
    Path("easy.yaml").write_text(recipe)
    assert main(["reproduce", "easy.yaml", "--trainer.max_epochs", "2", *SMALL]) == 0
    assert (tmp_path / "runs" / "easy" / "version_0" / "report.html").is_file()


def test_a_claim_may_have_a_colon_in_its_text(tmp_path):
    source = "Page, How to train your ResNet: 94 % after 24 epochs"
    recipe = recipes.find("lenet/embedded").read_text()
    Path("colon.yaml").write_text(recipe.replace("source: this", f'source: "{source}"  # this'))
    (claim,) = prepare("fit", "colon.yaml", []).config.fit.expect
    assert (claim["source"], claim["at_least"]) == (source, 0.98)


def test_a_claim_must_have_texts_where_texts_belong(capsys):
    recipe = recipes.find("lenet/embedded").read_text()
    Path("number.yaml").write_text(recipe.replace("source: this", "source: 1998  # this"))
    assert main(["fit", "number.yaml"]) == 2
    assert "must have a text as source, not 1998" in capsys.readouterr().err


def test_a_run_keeps_its_files_and_its_config_runs_again_unchanged(tmp_path):
    assert main(["fit", "lenet/embedded", "--trainer.max_epochs", "1", *SMALL]) == 0
    run = tmp_path / "runs" / "lenet" / "embedded" / "version_0"
    assert {p.name for p in run.iterdir()} >= {"metrics.csv", "config.yaml", "checkpoints"}
    before = (run / "config.yaml").read_bytes()
    assert main(["fit", str(run / "config.yaml")]) == 0
    assert (run / "config.yaml").read_bytes() == before
    again = tmp_path / "runs" / "config" / "version_0" / "checkpoints" / "last.ckpt"
    first, second = (read_checkpoint(p)["state_dict"] for p in (run / "checkpoints" / "last.ckpt", again))
    assert all(first[name].equal(second[name]) for name in first)


def test_a_checkpoint_remembers_its_recipe_classes_and_metrics():
    assert main(["fit", "lenet/embedded", "--trainer.max_epochs", "1", *SMALL]) == 0
    content = read_checkpoint("runs/lenet/embedded/version_0/checkpoints/last.ckpt")
    assert content["recipe"] == "lenet/embedded"
    assert content["zoo"]["class_path"] == "zoo.LeNet"
    assert content["zoo"]["class_names"] == [str(i) for i in range(10)]
    assert 0 < content["metrics"]["val/accuracy"] < 1


def test_best_and_last_are_those_of_the_newest_run(caplog):
    for _ in range(2):
        assert main(["fit", "lenet/embedded", "--trainer.max_epochs", "1", *SMALL]) == 0
    caplog.set_level("INFO")
    assert main(["test", "lenet/embedded", "--ckpt_path", "best", *SMALL]) == 0
    assert "version_1/checkpoints/best.ckpt, step 19" in caplog.text


def test_a_run_that_never_came_to_a_validation_has_no_best_and_says_so(capsys):
    rare = ["--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "5"]
    assert main(["fit", "lenet/embedded", *rare, *SMALL]) == 0
    assert main(["test", "lenet/embedded", "--ckpt_path", "best", *SMALL]) == 2
    said = capsys.readouterr().err
    assert "none came to a validation" in said
    assert "--ckpt_path last" in said
    assert main(["test", "lenet/embedded", "--ckpt_path", "last", *SMALL]) == 0


def test_resuming_says_what_the_checkpoint_decides(caplog):
    assert main(["fit", "lenet/embedded", "--trainer.max_epochs", "1", *SMALL]) == 0
    caplog.set_level("INFO")
    changed = ["--model.init_args.label_smoothing", "0.4", "--trainer.max_epochs", "2", *SMALL]
    assert main(["fit", "lenet/embedded", "--ckpt_path", "last", *changed]) == 0
    assert "label_smoothing: 0.0" in caplog.text


def test_a_checkpoint_of_plain_python_can_be_tested_by_the_command(tmp_path):
    from lightning import Trainer

    import datamodules
    from zoo import LeNet

    trainer = Trainer(max_steps=2, default_root_dir=tmp_path, logger=False, enable_progress_bar=False)
    trainer.fit(LeNet(image_size=8, class_names=list("abcdefghij")), datamodules.DigitsDataModule(image_size=8))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    assert main(["test", "lenet/embedded", "--ckpt_path", "plain.ckpt", "--data.init_args.image_size", "8"]) == 0


def arguments_of_checkpoint(change):
    """A checkpoint of the embedded recipe with other arguments."""
    import torch

    from zoo import LeNet
    from zoo.weights import describe

    model = LeNet(image_size=8, class_names=[str(i) for i in range(10)])
    described = describe(model)
    change(described["arguments"])
    content = {"state_dict": model.state_dict(), "zoo": described, "pytorch-lightning_version": "2.6.6"}
    torch.save(content | {"epoch": 0, "global_step": 0}, "other.ckpt")


def test_an_argument_of_a_checkpoint_that_nobody_knows_is_named_with_the_nearest(capsys):
    arguments_of_checkpoint(lambda arguments: arguments.update(activations="relu", image_sizes=8))
    assert main(["test", "lenet/embedded", "--ckpt_path", "other.ckpt", *SMALL]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("zoo: error")]
    assert "other.ckpt does not fit zoo.LeNet: it has the argument 'activations', which this version does not" in line
    arguments_of_checkpoint(lambda arguments: arguments.update(image_sizes=8))
    assert main(["test", "lenet/embedded", "--ckpt_path", "other.ckpt", *SMALL]) == 2
    assert "did you mean image_size?" in capsys.readouterr().err


def test_an_argument_that_a_checkpoint_lacks_is_named_with_what_is_taken():
    """But not of what the data says."""
    arguments_of_checkpoint(lambda arguments: (arguments.pop("in_channels"), arguments.pop("num_classes")))
    with pytest.warns(UserWarning, match=r"other\.ckpt lacks arguments of LeNet, for which are taken: in_channels=1$"):
        assert main(["test", "lenet/embedded", "--ckpt_path", "other.ckpt", *SMALL]) == 0


@pytest.mark.parametrize("overlay", ["tensorboard", "wandb_offline"])
def test_pictures_and_numbers_reach_the_logger_that_is_on(tmp_path, overlay, monkeypatch):
    pytest.importorskip({"tensorboard": "tensorboard", "wandb_offline": "wandb"}[overlay])
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert main(["reproduce", "lenet/embedded", "--config", overlay, "--trainer.max_epochs", "1", *SMALL]) == 1
    assert (tmp_path / "runs" / "lenet" / "embedded" / "version_0" / "metrics.csv").is_file()
    if overlay == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        file = next((tmp_path / "runs" / "tensorboard").rglob("events.out.*"))
        events = EventAccumulator(str(file.parent)).Reload()
        assert set(events.Tags()["images"]) == {"test/confusion_matrix", "test/worst_mistakes", "test/first_layer"}
        assert "val/accuracy" in events.Tags()["scalars"]
    else:
        files = list((tmp_path / "runs" / "wandb").rglob("*.png"))
        assert len(files) == 3
        assert list((tmp_path / "runs" / "wandb").rglob("*.wandb"))


def test_one_real_process_of_the_command(tmp_path):
    """What in-process tests cannot see: the exit status and the streams."""
    command = [sys.executable, "-m", "zoo", "fit", "lenet/embedded", "--trainer.max_epochs", "1", *SMALL]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    assert "epoch 1/1" in result.stdout
    assert "Traceback" not in result.stderr
    assert "Tip" not in result.stderr
