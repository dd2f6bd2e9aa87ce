"""Whatever a model is made with, its checkpoint holds plain values; what cannot be plain is refused at once."""

import enum
import inspect
import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Trainer
from torchvision.models import ResNet18_Weights

import datamodules
import zoo
from zoo import DCGAN, REINFORCE, CaptioningLSTM, FasterRCNN, FrameFusion, LeNet, Pix2Mesh
from zoo.arguments import plain
from zoo.cli import main

NAMES = np.unique(["dog", "cat", "cat", "bird"])
WORDS = np.array(["<NULL>", "<START>", "<END>", "<UNK>", "a", "cat"])


@pytest.mark.parametrize(
    ("architecture", "given", "expected"),
    [
        (LeNet, {"num_classes": np.int64(3), "class_names": list(NAMES)}, {"class_names": ["bird", "cat", "dog"]}),
        (LeNet, {"num_classes": np.int32(3), "class_names": NAMES}, {"num_classes": 3}),
        (LeNet, {"label_smoothing": np.float64(0.1), "image_size": np.int64(28)}, {"label_smoothing": 0.1}),
        (LeNet, {"num_classes": torch.tensor(4)}, {"num_classes": 4}),
        (FrameFusion, {"num_classes": np.int64(3), "class_names": NAMES}, {"num_classes": 3}),
        (FasterRCNN, {"network": "resnet18", "num_classes": np.int64(3), "class_names": NAMES}, {"num_classes": 3}),
        (DCGAN, {"conditional": np.bool_(True), "num_classes": np.int64(3), "class_names": NAMES}, {"num_classes": 3}),
        (CaptioningLSTM, {"words": WORDS, "network": "small"}, {"words": list(map(str, WORDS))}),
        (Pix2Mesh, {"class_names": NAMES}, {"class_names": ["bird", "cat", "dog"]}),
        (REINFORCE, {"observation_shape": np.array([4]), "num_actions": np.int64(2)}, {"observation_shape": [4]}),
    ],
)
def test_numpys_values_become_plain_ones(architecture, given, expected, tmp_path):
    model = architecture(**given)
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    found = torch.load(tmp_path / "model.ckpt", weights_only=True)["hyper_parameters"]
    assert {key: found[key] for key in expected} == expected
    json.dumps(found)
    zoo.save(model, tmp_path / "model.safetensors")
    for file in ("model.ckpt", "model.safetensors"):
        loaded = zoo.load(tmp_path / file)
        assert getattr(loaded, "class_names", None) == getattr(model, "class_names", None)
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_model_made_with_them_trains_and_its_checkpoint_is_read(tmp_path):
    data = datamodules.DigitsDataModule(image_size=8, batch_size=np.int64(48))
    model = LeNet(np.int64(10), np.array(data.class_names), image_size=np.int64(8), label_smoothing=np.float32(0.1))
    trainer = Trainer(max_steps=2, limit_val_batches=1, logger=False, default_root_dir=tmp_path, accelerator="cpu")
    trainer.fit(model, data)
    (path,) = tmp_path.rglob("*.ckpt")
    assert zoo.load(path).class_names == data.class_names
    assert LeNet.load_from_checkpoint(path).hparams.num_classes == 10


class Stem(enum.Enum):
    SMALL = "small"


@dataclass
class Size:
    side: int = 28


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Stem.SMALL, r"Stem, .*: give 'small'$"),
        (ResNet18_Weights.DEFAULT, r"torchvision\.models\.resnet\.ResNet18_Weights, .*: give 'IMAGENET1K_V1'$"),
        (Size(), r"Size, .* and paths: give one of these$"),
        ({"side": {1, 2}}, r"set, "),
        ([b"cat"], r"bytes, "),
        (Fraction(1, 2), r"fractions\.Fraction, "),
        (np.array([1, None, Size()], dtype=object), r"Size, "),
        (np.datetime64("2026-01-01"), r"datetime\.date, "),
    ],
)
def test_what_cannot_be_plain_is_refused_with_its_name(value, words):
    with pytest.raises(ValueError, match=rf"^LeNet: class_names is or holds a .*{words}"):
        LeNet(class_names=value)


def test_torchvisions_enum_is_no_name_of_weights():
    with pytest.raises(ValueError, match=r"ResNet: weights is or holds .* give 'IMAGENET1K_V1'$"):
        zoo.ResNet(weights=ResNet18_Weights.DEFAULT)


def test_a_path_is_a_text(tmp_path):
    zoo.save(LeNet(image_size=8), tmp_path / "lenet.safetensors")
    started = LeNet(image_size=8, weights=tmp_path / "lenet.safetensors")
    loaded = zoo.load(tmp_path / "lenet.safetensors")
    assert torch.equal(started.head.weight, loaded.head.weight)
    assert plain({"files": (Path("a") / "b", [np.float32(0.5)])}) == {"files": ("a/b", [0.5])}
    assert plain(Path("a")) == "a"


def test_plain_values_are_those_that_were_given():
    value = {"a": [1, 2.5, "text", None, True], "b": (1, (2, 3))}
    assert plain(value) == value
    assert [type(entry) for entry in plain([True, 1, 1.0, "1", None])] == [bool, int, float, str, type(None)]


def test_a_wrong_argument_is_still_named():
    with pytest.raises(TypeError, match="clases"):
        LeNet(clases=3)


class NumpysDigits(datamodules.DigitsDataModule):
    """Has its classes' names from an array."""

    class_names = list(np.unique([str(digit) for digit in range(10)]))


def test_a_data_module_may_have_its_classes_from_an_array(monkeypatch):
    monkeypatch.setattr(datamodules, "NumpysDigits", NumpysDigits, raising=False)
    Path("recipe.yaml").write_text(
        "model: {class_path: zoo.LeNet, init_args: {image_size: 8}}\n"
        "data: {class_path: datamodules.NumpysDigits, init_args: {image_size: 8}}\n"
        "trainer: {max_steps: 2, limit_val_batches: 1}\n"
    )
    assert main(["fit", "recipe.yaml"]) == 0
    (path,) = Path("runs").rglob("last.ckpt")
    assert type(torch.load(path, weights_only=True)["hyper_parameters"]["class_names"][0]) is str
    assert zoo.load(path).class_names == [str(digit) for digit in range(10)]


class Own(LeNet):
    """A user's subclass, with arguments of its own, one of them not plain."""

    def __init__(self, extra, act=None, **more):
        super().__init__(**more)
        self.extra = extra


def test_a_subclass_keeps_its_own_arguments(tmp_path):
    model = Own(7, num_classes=np.int64(3), image_size=8)
    assert model.hparams["extra"] == 7
    assert type(model.hparams["num_classes"]) is int
    assert Own(7, act=torch.nn.ReLU()).extra == 7  # it may not be read again, which is the subclass's to see to
    trainer = Trainer(max_steps=0, logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    loaded = Own.load_from_checkpoint(tmp_path / "own.ckpt")
    assert (loaded.extra, loaded.head.out_features) == (7, 3)


@pytest.mark.parametrize("name", sorted(zoo.ARCHITECTURES))
def test_a_constructor_takes_no_arguments_but_its_own(name):
    """As Lightning asks: what data and recipe say besides is left out when a checkpoint is loaded."""
    assert inspect.getfullargspec(getattr(zoo, name).__init__).varkw is None
