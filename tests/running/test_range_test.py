"""The range test: the suggestion is where the loss falls, nothing is left behind, and the override can be used."""

import shlex
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn, optim

from zoo import LeNet
from zoo.cli import main
from zoo.running.range_test import smoothed, suggestion
from zoo.tasks.classification import ClassificationTask

SMALL = ["--data.init_args.image_size", "16", "--model.init_args.image_size", "16"]
MOMENTUM = ["--model.init_args.optimizer", "torch.optim.SGD", "--model.init_args.optimizer.init_args.momentum", "0.9"]
RATE = "--model.init_args.optimizer.init_args.lr"
WIDE = ["--min_lr", "1e-5", "--max_lr", "10", "--steps", "40"]


def test_the_running_mean_is_that_of_weights_that_fall_by_a_tenth():
    losses = np.random.default_rng(0).random(20)
    expected = [np.average(losses[: n + 1], weights=0.9 ** np.arange(n, -1, -1)) for n in range(20)]
    np.testing.assert_allclose(smoothed(losses.tolist()), expected)
    assert smoothed([2.0])[0] == 2.0


def test_the_suggestion_is_the_middle_of_a_fall():
    """A loss that falls like a logistic curve of the logarithm, steepest at 1e-3, and rises again at 1e-1."""
    rates = np.geomspace(1e-6, 1, 400)
    decades = np.log10(rates)
    losses = 2 - 1 / (1 + np.exp(-4 * (decades + 3))) + 10 * np.clip(decades + 1, 0, None)
    found = suggestion(rates.tolist(), losses.tolist())
    assert 1e-3 <= found <= 2e-3  # the running mean comes a little late
    assert suggestion(rates.tolist(), [*losses[:300].tolist(), *[float("nan")] * 100]) == found


def test_a_loss_that_never_falls_gives_no_suggestion():
    assert suggestion([10.0**-k for k in range(9, 0, -1)], [float(k) for k in range(9)]) is None
    assert suggestion([1e-3, 1e-2], [1.0, float("inf")]) is None


@pytest.fixture
def rates(monkeypatch):
    """The rate of every step of SGD."""
    seen = []
    original = optim.SGD.step

    def step(self, *arguments, **named):
        seen.append([group["lr"] for group in self.param_groups])
        return original(self, *arguments, **named)

    monkeypatch.setattr(optim.SGD, "step", step)
    return seen


def test_the_command_suggests_a_rate_that_learns_and_leaves_nothing_but_the_picture(capsys, rates):
    temporary = set(Path(tempfile.gettempdir()).glob("zoo-find_lr-*"))
    recipe = ["lenet/embedded", *SMALL, *MOMENTUM, RATE, "0.1", "--trainer.max_epochs", "1"]
    assert main(["find_lr", *recipe, "--min_lr", "1e-3", "--max_lr", "3", "--steps", "80"]) == 0
    output = capsys.readouterr().out
    assert [path.name for path in Path().rglob("*")] == ["find_lr.png"]
    assert set(Path(tempfile.gettempdir()).glob("zoo-find_lr-*")) == temporary
    assert Image.open("find_lr.png").size[0] > 500
    # More steps than the 19 of the recipe's epoch, each rate the same factor above the one before: no schedule.
    expected = np.geomspace(1e-3, 3, 80)[: len(rates)]
    np.testing.assert_allclose(np.array(rates)[:, 0], expected, rtol=1e-6)
    assert len(rates) > 19
    override = shlex.split(output.splitlines()[-1].removeprefix("use it with "))
    assert override[0] == RATE
    assert 1e-2 < float(override[1]) < 1
    assert main(["fit", *recipe, *override, "--trainer.fast_dev_run", "true"]) == 0


def test_a_recipe_that_leaves_the_optimizer_to_the_model_can_use_the_override(capsys):
    Path("plain.yaml").write_text(
        "model: {class_path: zoo.LeNet, init_args: {image_size: 16}}\n"
        "data: {class_path: datamodules.DigitsDataModule, init_args: {image_size: 16}}\n"
    )
    assert main(["find_lr", "plain.yaml", *WIDE, "--out", "curve.png"]) == 0
    override = capsys.readouterr().out.splitlines()[-1].removeprefix("use it with ").split()
    assert Path("curve.png").is_file()
    assert main(["fit", "plain.yaml", *override, "--trainer.fast_dev_run", "true"]) == 0


def test_groups_keep_their_proportions_and_a_divergence_ends_the_test(monkeypatch, rates, capsys):
    def optimizers(self):
        slow = {"params": self.backbone.parameters(), "lr": 0.01}
        return optim.SGD([slow, {"params": self.head.parameters()}], lr=0.1, momentum=0.9)

    monkeypatch.setattr(ClassificationTask, "configure_optimizers", optimizers)
    main(["find_lr", "lenet/embedded", *SMALL, "--min_lr", "1e-3", "--max_lr", "1e9", "--steps", "60"])
    assert all(slow == pytest.approx(fast / 10) for slow, fast in rates)
    assert rates[0][1] == pytest.approx(1e-3)
    assert len(rates) < 60


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--min_lr", "1", "--max_lr", "0.1"], "--min_lr 1 must be above 0 and below --max_lr 0.1"),
        (["--min_lr", "0"], "must be above 0"),
        (["--steps", "3"], "at least 10"),
        (["--steps", "x"], "'x'"),
        (["--ckpt_path", "last"], "leave --ckpt_path out"),
        (["--trainer.max_epoch", "3"], "trainer.max_epochs"),
    ],
)
def test_wrong_arguments_are_refused(arguments, said, capsys):
    assert main(["find_lr", "lenet/embedded", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_a_model_without_an_optimizer_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(LeNet, "automatic_optimization", property(lambda self: False, lambda self, value: None))
    monkeypatch.setattr(ClassificationTask, "configure_optimizers", lambda self: None)
    assert main(["find_lr", "lenet/embedded", *SMALL]) == 2
    assert "has no single optimizer" in capsys.readouterr().err
    assert isinstance(LeNet(), nn.Module)
