"""Test-time augmentation: the views are the right ones, their probabilities are averaged, and only where asked."""

import json
from pathlib import Path

import pytest
import torch
from lightning import Trainer

import datamodules
from zoo import LeNet
from zoo.cli import main
from zoo.running.views import TestTimeAugmentation, averaging_views, log_mean_probability, views

SMALL = ["--data.init_args.image_size", "8", "--model.init_args.image_size", "8", "--trainer.max_epochs", "1"]


def mean_softmax_by_hand(model, images, shifts):
    """Probabilities in float64, pixel by pixel: each view is written out with its own index arithmetic."""
    height = images.shape[-1]

    def reflect(i):
        return -i if i < 0 else 2 * (height - 1) - i if i >= height else i

    total = torch.zeros(len(images), 10, dtype=torch.float64)
    for shift in shifts:
        rows = torch.tensor([reflect(i - shift) for i in range(height)])
        moved = images[:, :, rows][:, :, :, rows]
        for view in (moved, moved[..., torch.arange(height - 1, -1, -1)]):
            logits = model(view).double()
            total += logits.exp() / logits.exp().sum(1, keepdim=True)
    return total / (2 * len(shifts))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LeNet(image_size=8).eval()


@pytest.mark.parametrize(("kind", "shifts"), [("flip", [0]), ("flip_shift", [0, -1, 1])])
def test_the_probabilities_of_all_views_are_averaged(model, kind, shifts):
    images = torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        expected = mean_softmax_by_hand(model, images, shifts)
        plain = model(images)
        with averaging_views(model, kind):
            found = model(images).softmax(1)
        assert torch.equal(model(images), plain)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, plain.softmax(1), atol=1e-4)


def test_a_shift_moves_one_pixel_up_and_to_the_left_or_back():
    image = torch.zeros(1, 1, 7, 7)
    image[0, 0, 2, 3] = 1
    places = [tuple(view[0, 0].nonzero()[0].tolist()) for view in views(image, "flip_shift")]
    assert places == [(2, 3), (2, 3), (1, 2), (1, 4), (3, 4), (3, 2)]
    assert len(views(image, "flip")) == 2


def test_far_logits_do_not_overflow():
    logits = [torch.tensor([[1000.0, 0.0]]), torch.tensor([[0.0, 1000.0]])]
    torch.testing.assert_close(log_mean_probability(logits).exp(), torch.tensor([[0.5, 0.5]]))


class Calls(LeNet):
    """Counts the images that each stage's steps and the network itself saw."""

    def __init__(self):
        super().__init__(image_size=8, class_names=[str(i) for i in range(10)])
        self.backbone.register_forward_hook(lambda *_: self.count())
        self.calls = {}

    def count(self):
        stage = str(self.trainer.state.stage.value)
        self.calls[stage] = self.calls.get(stage, 0) + 1


def test_only_test_and_prediction_look_at_more_views_and_forward_is_given_back():
    model, data = Calls(), datamodules.DigitsDataModule(image_size=8, batch_size=600, eval_batch_size=500)
    options = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_epochs=1, num_sanity_val_steps=0, callbacks=[TestTimeAugmentation("flip_shift")], **options)
    trainer.fit(model, data)
    trainer.test(model, data)
    assert "forward" not in vars(model)
    trainer.predict(model, data)
    assert "forward" not in vars(model)
    trainer.validate(model, data)
    assert model.calls == {"train": 2, "validate": 2, "test": 6, "predict": 6}


def test_an_error_in_the_middle_gives_forward_back(monkeypatch):
    def fail(self, batch, batch_idx):
        raise KeyError("labels")

    model, data = Calls(), datamodules.DigitsDataModule(image_size=8)
    monkeypatch.setattr(LeNet, "test_step", fail)
    with pytest.raises(KeyError):
        Trainer(logger=False, callbacks=[TestTimeAugmentation("flip")]).test(model, data)
    assert "forward" not in vars(model)


def test_a_model_without_logits_is_refused(model):
    model.head = torch.nn.Unflatten(1, (50, 10))
    with (
        averaging_views(model, "flip"),
        pytest.raises(ValueError, match="test_time_augmentation=flip is for classifiers"),
    ):
        model(torch.rand(2, 1, 8, 8))


def test_the_switch_of_the_command_gives_the_accuracy_by_hand():
    assert main(["fit", "lenet/embedded", *SMALL, "--trainer.max_epochs", "5"]) == 0
    switch = ["--test_time_augmentation", "flip_shift"]
    assert main(["predict", "lenet/embedded", "--ckpt_path", "last", *SMALL, *switch]) == 0
    import zoo

    model = zoo.load("runs/lenet/embedded/version_0/checkpoints/last.ckpt")
    data = datamodules.DigitsDataModule(image_size=8)
    data.setup("predict")
    images = data.test_set[0].float() / 255
    with torch.no_grad():
        expected = mean_softmax_by_hand(model, images, [0, -1, 1])
        plain = model(images).argmax(1)
    rows = [
        json.loads(line) for line in Path("runs/lenet/embedded/version_1/predictions.jsonl").read_text().splitlines()
    ]
    assert [int(row["class_name"]) for row in rows] == expected.argmax(1).tolist()
    assert plain.tolist() != expected.argmax(1).tolist()
