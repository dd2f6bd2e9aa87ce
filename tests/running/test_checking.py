"""Each check before training passes on a sound recipe, fails on one that was spoiled, and leaves nothing behind."""

import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn, optim
from torch.nn import functional as F

import datamodules
from zoo import LeNet
from zoo.cli import main
from zoo.running.checking import check
from zoo.tasks.classification import ClassificationTask

SMALL = ["--data.init_args.image_size", "8", "--model.init_args.image_size", "8"]
STEPS = 12
LEARNING = ("initial loss", "gradients", "10 samples by heart", "update / weight")


def states(*overrides):
    """The state of each check, and what was found, by name."""
    rows = check("lenet/embedded", [*SMALL, *overrides], STEPS)
    assert len({row.name for row in rows}) == len(rows)
    return {row.name: row.state for row in rows}, {row.name: row.found for row in rows}


def spoil(monkeypatch, change):
    """Change every LeNet at the end of its constructor."""
    original = LeNet.__init__

    def init(self, *arguments, **named):
        original(self, *arguments, **named)
        change(self)

    # The command reads the signature.
    init.__wrapped__ = original
    monkeypatch.setattr(LeNet, "__init__", init)


def test_a_sound_recipe_passes_and_nothing_is_left_behind(capsys, monkeypatch, tmp_path_factory):
    temporary = tmp_path_factory.mktemp("temporary")  # in the machine's own others may check at the same time
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    assert main(["check", "lenet/embedded", *SMALL, "--steps", str(STEPS)]) == 0
    output = capsys.readouterr().out
    assert "failed" not in output
    assert [line.split()[0] for line in output.splitlines()[1:3]] == ["initial", "gradients"]
    assert "train 1,216, val 180, test 360" in output  # 19 batches of 64; the digits module's own sizes
    assert list(Path().iterdir()) == []
    assert list(temporary.iterdir()) == []


def test_the_initial_loss_is_that_of_the_spoiled_head(monkeypatch, capsys):
    def change(model):
        nn.init.constant_(model.head.weight, 0)
        model.head.bias.data = torch.tensor([30.0] + [0.0] * 9)

    spoil(monkeypatch, change)
    found, said = states()
    assert found["initial loss"] == "failed"
    # With these logits the loss is 30 for every digit but 0, and 0 for that.
    data = datamodules.DigitsDataModule(image_size=8)
    data.setup("fit")
    share = float((data.train_set[1] != 0).float().mean())
    assert float(said["initial loss"]) == pytest.approx(30 * share, abs=3)
    assert main(["check", "lenet/embedded", *SMALL, "--steps", "1"]) == 1
    assert "failed" in capsys.readouterr().out


def test_a_loss_that_is_a_little_above_chance_is_a_warning(monkeypatch):
    spoil(monkeypatch, lambda model: setattr(model.head.bias, "data", torch.tensor([1.0, -1.0] * 5)))
    found, said = states()
    # Half of the digits have logits of 1, half of -1, nearly: log(5 e + 5 / e) is 2.74 on average.
    assert float(said["initial loss"]) == pytest.approx(2.74, abs=0.12)
    assert found["initial loss"] == "warning"


def test_a_model_that_starts_from_weights_is_not_held_to_chance(tmp_path):
    import zoo

    zoo.save(LeNet(image_size=8), tmp_path / "w.safetensors")
    found, said = states("--model.init_args.weights", str(tmp_path / "w.safetensors"))
    assert found["initial loss"] == "skipped"
    assert "starts from weights" in said["initial loss"]


def test_the_initial_loss_is_without_dropout_and_augmentation_and_moves_no_statistic(monkeypatch):
    data = datamodules.DigitsDataModule(image_size=8)
    data.setup("fit")
    raw = {tuple((image.float() / 255).flatten().tolist()) for image in data.train_set[0]}
    seen = {}

    def loss(self, images, labels):
        if not seen:
            seen["dropping"] = self.backbone.drop.training
            seen["normalizing"] = self.backbone.norm.training
            seen["plain"] = {tuple(image.flatten().tolist()) for image in images} <= raw
        logits = self(images)
        return F.cross_entropy(logits, labels), logits

    def change(model):
        model.backbone.drop = nn.Dropout(0.99)
        model.backbone.norm = nn.BatchNorm1d(500)
        plain = model.backbone.forward
        model.backbone.forward = lambda images: model.backbone.norm(model.backbone.drop(plain(images)))

    moved = []
    monkeypatch.setattr(ClassificationTask, "training_loss", loss)
    spoil(monkeypatch, change)
    original = LeNet.on_train_epoch_start
    monkeypatch.setattr(
        LeNet,
        "on_train_epoch_start",
        lambda self: (moved.append(int(self.backbone.norm.num_batches_tracked)), original(self)),
    )
    found, _ = states()
    assert seen == {"dropping": False, "normalizing": True, "plain": True}
    assert moved[0] == 0
    assert found["10 samples by heart"] == "ok"  # with 99 % dropped it could not be learnt


def test_a_parameter_without_a_gradient_is_named(monkeypatch):
    spoil(monkeypatch, lambda model: setattr(model.backbone, "forgotten", nn.Linear(2, 2)))
    found, said = states()
    assert found["gradients"] == "failed"
    assert said["gradients"] == "none: backbone.forgotten.bias, backbone.forgotten.weight"


def test_a_gradient_that_is_always_zero_is_none(monkeypatch):
    spoil(monkeypatch, lambda model: nn.init.constant_(model.backbone.hidden.bias, -100))
    found, said = states()
    assert found["gradients"] == "failed"
    assert "backbone.conv1.weight" in said["gradients"]


def test_a_loss_that_diverges_is_told(monkeypatch):
    found, said = states(
        "--model.init_args.optimizer", "torch.optim.SGD", "--model.init_args.optimizer.init_args.lr", "1e9"
    )
    assert found["gradients"] == "failed"
    assert "not finite" in said["gradients"]
    assert found["10 samples by heart"] == "failed"


def test_nothing_is_learnt_by_heart_at_a_rate_of_nothing_and_the_steps_are_told():
    found, said = states("--model.init_args.optimizer.init_args.lr", "1e-9")
    assert found["10 samples by heart"] == "failed"
    assert said["10 samples by heart"].endswith("300 steps")
    assert found["update / weight"] == "warning"
    assert found["  head"] == "warning"


def test_samples_are_learnt_at_the_constant_rate_without_weight_decay(monkeypatch):
    groups = []
    original = optim.SGD.step

    def step(self, *arguments, **named):
        groups.append((self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]))
        return original(self, *arguments, **named)

    monkeypatch.setattr(optim.SGD, "step", step)
    optimizer = "--model.init_args.optimizer"
    states(
        optimizer, "torch.optim.SGD", f"{optimizer}.init_args.lr", "0.1", f"{optimizer}.init_args.weight_decay", "0.5"
    )
    assert {decay for _, decay in groups[:STEPS]} == {0.5}
    assert len({rate for rate, _ in groups[:STEPS]}) == STEPS  # the recipe's cosine
    assert set(groups[STEPS:]) == {(0.1, 0.0)}


def test_the_ratio_is_that_of_the_update_to_the_weights(monkeypatch):
    """SGD on a loss whose gradient is the weights themselves: each update is the rate times the weights."""

    def loss(self, images, labels):
        return sum(p.square().sum() / 2 for p in self.parameters()), self(images)

    monkeypatch.setattr(ClassificationTask, "training_loss", loss)
    optimizer = "--model.init_args.optimizer"
    found, said = states(optimizer, "torch.optim.SGD", f"{optimizer}.init_args.lr", "0.003",
                         "--model.init_args.scheduler", "null")  # fmt: skip
    assert said["  backbone.conv1"] == said["  head"] == "3.0e-03"
    assert said["update / weight"].startswith("3.0e-03 (median of 4 layers over 12 steps)")
    assert found["update / weight"] == "ok"


@pytest.mark.parametrize("scale", [255.0, 1 / 255, -1.0])
def test_images_outside_of_their_range_fail(monkeypatch, scale):
    original = datamodules.DigitsDataModule.on_after_batch_transfer

    def scaled(self, batch, dataloader_idx):
        images, labels = original(self, batch, dataloader_idx)
        return images * scale, labels

    monkeypatch.setattr(datamodules.DigitsDataModule, "on_after_batch_transfer", scaled)
    assert states()[0]["images"] == "failed"


def relabel(monkeypatch, change):
    original = datamodules.DigitsDataModule.read

    def read(self, train):
        images, labels = original(self, train)
        return images, change(labels)

    monkeypatch.setattr(datamodules.DigitsDataModule, "read", read)


def test_a_class_that_is_never_seen_is_named(monkeypatch):
    relabel(monkeypatch, lambda labels: torch.where(labels == 7, 1, labels))
    found, said = states()
    assert found["classes in training"] == "failed"
    assert said["classes in training"].startswith("fewest 0 (7), most ")


def test_labels_outside_of_their_range_fail(monkeypatch):
    # Of the test split alone: training with them would stop at once.
    original = datamodules.DigitsDataModule.read

    def read(self, train):
        images, labels = original(self, train)
        return images, labels if train else labels + 1

    monkeypatch.setattr(datamodules.DigitsDataModule, "read", read)
    found, said = states()
    assert (found["labels"], said["labels"]) == ("failed", "0 to 10")


def test_an_order_that_ignores_the_seed_fails(monkeypatch):
    original = datamodules.DigitsDataModule.train_dataloader
    drawn = torch.Generator().manual_seed(0)

    def loader(self):
        self.train_set = tuple(tensor[torch.randperm(len(self.train_set[1]), generator=drawn.clone_state())]
                               for tensor in self.train_set)  # fmt: skip
        torch.rand(1, generator=drawn)
        return original(self)

    monkeypatch.setattr(datamodules.DigitsDataModule, "train_dataloader", loader)
    assert states()[0]["first batch"] == "failed"


@pytest.mark.parametrize("optimizer", [lambda self: None, lambda self: optim.SGD(self.head.parameters(), lr=0.0)])
def test_what_does_not_learn_by_gradients_skips_what_is_about_them(monkeypatch, optimizer):
    spoil(monkeypatch, lambda model: setattr(model, "automatic_optimization", False))
    monkeypatch.setattr(ClassificationTask, "configure_optimizers", optimizer)
    found, said = states()
    assert [found[name] for name in LEARNING] == ["skipped"] * 4
    assert "does not learn by gradients" in said["initial loss"]
    assert found["images"] == found["labels"] == found["first batch"] == "ok"


def test_an_early_stop_and_a_checkpoint_of_the_recipe_do_not_get_in_the_way(tmp_path):
    Path("overlay.yaml").write_text(
        "trainer:\n  callbacks:\n"
        "  - {class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: val/loss}}\n"
        "  - {class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {monitor: val/loss}}\n"
        "  - {class_path: lightning.pytorch.callbacks.LearningRateMonitor}\n"
    )
    found, _ = states("--config", "overlay.yaml", "--trainer.devices", "2", "--data.init_args.val_size", "0")
    assert "failed" not in found.values()
    assert found["samples of an epoch"] == "warning"  # nothing is held out
    assert [path.name for path in Path().iterdir()] == ["overlay.yaml"]


def test_a_checkpoint_to_resume_from_is_refused(capsys):
    assert main(["check", "lenet/embedded", "--ckpt_path", "best"]) == 2
    assert "leave --ckpt_path out" in capsys.readouterr().err


DETECTOR = """
seed_everything: 0
expect: []
model:
  class_path: zoo.SingleStageDetector
  init_args:
    image_size: 64
    width: 0.25
    dropout: 0.0
    optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.01}}
data:
  class_path: datamodules.ScenesDataModule
  init_args: {train_size: 24, val_size: 4, test_size: 4, batch_size: 4, image_size: 64}
trainer: {max_epochs: 1, log_every_n_steps: 1}
"""


def of_objects():
    Path("detector.yaml").write_text(DETECTOR)
    rows = check("detector.yaml", [], 3)
    return {row.name: row.state for row in rows if row.name}, {row.name: row.found for row in rows if row.name}


def test_a_sound_recipe_of_a_detector_passes_in_its_own_terms():
    found, said = of_objects()
    assert "failed" not in found.values()
    assert found["2 samples by heart"] == found["images"] == found["labels"] == found["boxes in training"] == "ok"
    assert said["labels"] == "1 to 5"
    data = datamodules.ScenesDataModule(train_size=24, val_size=4, test_size=4, image_size=64)
    data.setup("fit")
    counts = [
        sum((t["labels"] == k).sum().item() for _, ts in data.train_dataloader() for t in ts) for k in range(1, 6)
    ]
    fewest, most = min(counts), max(counts)
    assert said["classes in training"].startswith(f"fewest {fewest} objects (")
    assert f"most {most} (" in said["classes in training"]
    assert said["boxes in training"].startswith(f"{sum(counts) / 24:.1f} a picture")
    assert said["samples of an epoch"] == "train 24, val 4, test 4"
    assert said["files of train"].startswith("24 pictures, ")


def change_training(monkeypatch, change):
    """Change each target of the training batches."""
    original = datamodules.ScenesDataModule.train_dataloader

    class Changed:
        def __init__(self, loader):
            self.loader = loader

        def __len__(self):
            return len(self.loader)

        def __iter__(self):
            for images, targets in self.loader:
                yield images, [change(dict(target)) for target in targets]

    monkeypatch.setattr(datamodules.ScenesDataModule, "train_dataloader", lambda self: Changed(original(self)))


@pytest.mark.parametrize("recipe", ["dqn/embedded", "reinforce/embedded"])
def test_a_policy_is_checked_on_what_it_collects(recipe):
    pytest.importorskip("gymnasium")
    rows = {row.name: row for row in check(recipe, ["--data.init_args.learning_starts=100"][recipe[0] == "r" :], 3)}
    assert "failed" not in {row.state for row in rows.values()}
    assert rows["gradients"].state == "ok"
    assert rows["10 samples by heart"].state == ("ok" if recipe[0] == "d" else "skipped")
    assert "experience" in rows["first batch"].found


def test_boxes_that_leave_their_pictures_fail(monkeypatch):
    change_training(monkeypatch, lambda target: target | {"boxes": target["boxes"] + 40})
    found, said = of_objects()
    assert found["boxes in training"] == "failed"
    assert " are not; " in said["boxes in training"]


def test_pictures_of_bytes_and_classes_without_objects_are_told(monkeypatch):
    change_training(monkeypatch, lambda target: target | {"labels": target["labels"].clamp(max=4)})
    original = datamodules.ScenesDataModule.on_after_batch_transfer

    def scaled(self, batch, dataloader_idx):
        images, targets = original(self, batch, dataloader_idx)
        return [image * 255 for image in images], targets

    monkeypatch.setattr(datamodules.ScenesDataModule, "on_after_batch_transfer", scaled)
    found, said = of_objects()
    assert found["images"] == "failed"
    assert found["classes in training"] == "warning"
    assert said["classes in training"].startswith("fewest 0 objects (person)")
