"""Ensembles: the mean of the probabilities, every member's own accuracy, each sample once, and clear refusals."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import datamodules
import zoo
from zoo import LeNet
from zoo.cli import main

ROOT = Path(__file__).parents[2]
SMALL = ["--data.init_args.image_size", "8", "--model.init_args.image_size", "8"]


@pytest.fixture
def members():
    """Three networks of their own, slightly trained; the last one of another file format."""
    paths = [Path("a.ckpt"), Path("sub/b.ckpt"), Path("c.safetensors")]
    Path("sub").mkdir()
    data = datamodules.DigitsDataModule(image_size=8, batch_size=64)
    data.setup("fit")
    images, labels = data.train_set[0].float() / 255, data.train_set[1]
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        model = LeNet(image_size=8, class_names=data.class_names, label_smoothing=0.1 * seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for batch in torch.randperm(len(labels)).split(128):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        if path.suffix == ".ckpt":
            torch.save({"state_dict": model.state_dict(), "zoo": zoo.weights.describe(model)}, path)
        else:
            zoo.save(model, path)
    return [str(path) for path in paths]


def by_hand(paths, views=lambda images: [images]):
    """Accuracies of the members and of the mean of their probabilities, in float64."""
    data = datamodules.DigitsDataModule(image_size=8)
    data.setup("test")
    images, labels = data.test_set[0].float() / 255, data.test_set[1]
    with torch.no_grad():
        each = [
            torch.stack([zoo.load(path)(view).double().softmax(1) for view in views(images)]).mean(0) for path in paths
        ]
    mean = torch.stack(each).mean(0)
    accuracies = [(scores.argmax(1) == labels).double().mean().item() for scores in [*each, mean]]
    return accuracies, -mean[torch.arange(len(labels)), labels].log().mean().item()


def measured(run="runs/lenet/embedded/version_0"):
    with open(Path(run) / "metrics.csv", encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    members = sorted(name for name in row if name.startswith("test/accuracy_member_"))
    return (
        [float(row[name]) for name in [*members, "test/accuracy"]],
        float(row["test/loss"]),
        float(row["test/samples"]),
    )


def test_members_and_ensemble_have_the_accuracies_by_hand(members, capsys):
    assert main(["test", "lenet/embedded", "--ensemble", *members, *SMALL]) == 0
    accuracies, loss = by_hand(members)
    found, found_loss, samples = measured()
    assert found == pytest.approx(accuracies, abs=1e-6)
    assert found_loss == pytest.approx(loss, abs=1e-5)
    assert samples == 360
    assert len(set(accuracies)) == 4
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    for name, accuracy in zip([*members, "ensemble"], accuracies, strict=True):
        assert [line[-1] for line in table if line and line[0] == name] == [f"{accuracy:.4f}"]
    assert (Path("runs/lenet/embedded/version_0/pictures/test_confusion_matrix.png")).is_file()


def test_patterns_are_expanded_and_the_switch_for_views_reaches_every_member(members):
    command = ["test", "lenet/embedded", *SMALL, "--test_time_augmentation", "flip"]
    assert main([*command, "--ensemble", "**/*.ckpt", "a.ckpt"]) == 0
    expected, _ = by_hand(members[:2], lambda images: [images, images.flip(-1)])
    assert measured()[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(members):
    overrides = [*SMALL, "--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu"]
    # 360 digits in batches of 7 for each of two processes: the last ones differ in length.
    overrides += ["--data.init_args.eval_batch_size", "7"]
    command = [sys.executable, "-m", "zoo", "test", "lenet/embedded", "--ensemble", *members, *overrides]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    accuracies, loss = by_hand(members)
    found, found_loss, samples = measured()
    assert found == pytest.approx(accuracies, abs=1e-6)
    assert found_loss == pytest.approx(loss, abs=1e-5)
    assert samples == 360
    assert result.stdout.count("ensemble of 3") == 1


def describe_as(**changes):
    model = LeNet(**({"image_size": 8, "class_names": [str(i) for i in range(10)]} | changes))
    zoo.save(model, "other.safetensors")


@pytest.mark.parametrize(
    ("files", "changes", "said"),
    [
        ("a.ckpt", None, "two members or more"),
        ("a.ckpt a.ckpt", None, "two members or more"),
        ("a.ckpt no*.ckpt", None, "no checkpoint 'no*.ckpt'"),
        ("", None, "--ensemble"),
        ("a.ckpt other.safetensors", {"class_names": list("abcdefghij")}, "other classes (a, b, c, d, e, …)"),
        ("a.ckpt other.safetensors", {"num_classes": 3, "class_names": None}, "other.safetensors knows other classes"),
        ("a.ckpt other.safetensors", {"image_size": 12}, "takes images 1x12x12"),
        ("a.ckpt bare.ckpt", None, "bare.ckpt names nothing as its class"),
        ("a.ckpt other.safetensors --ckpt_path best", {}, "leave --ckpt_path out"),
    ],
)
def test_what_does_not_belong_together_is_refused(members, files, changes, said, capsys):
    torch.save({"a": torch.zeros(1)}, "bare.ckpt")
    if changes is not None:
        describe_as(**changes)
    assert main(["test", "lenet/embedded", *SMALL, "--ensemble", *files.split()]) == 2
    assert said in capsys.readouterr().err
    assert not Path("runs").exists()


def test_predictions_without_an_ensemble_still_need_weights(capsys):
    assert main(["test", "lenet/embedded", *SMALL]) == 2
    assert "learnt nothing" in capsys.readouterr().err
