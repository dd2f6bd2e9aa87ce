"""The linear probe against scikit-learn's logistic regression, and its cache."""

import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

import zoo
from datamodules import DigitsDataModule
from zoo import LeNet
from zoo.cli import main
from zoo.running.probing import DECAYS, compute_features, fit_head, probe


@pytest.fixture
def data():
    return DigitsDataModule(image_size=12, translate=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LeNet(image_size=12)


def test_the_head_is_that_of_logistic_regression():
    """Both minimise mean cross-entropy + decay / 2 * |W|^2, which has one minimum."""
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(200, 5)), rng.integers(3, size=200)
    decay = 0.01
    theirs = LogisticRegression(C=1 / (decay * 200), tol=1e-10, max_iter=10_000).fit(features, labels)
    head = fit_head(nn.Linear(5, 3).double(), torch.from_numpy(features), torch.from_numpy(labels), decay)
    scores = head(torch.from_numpy(features)).softmax(1).detach().numpy()
    np.testing.assert_allclose(scores, theirs.predict_proba(features), atol=2e-4)


def test_it_fits_the_head_and_leaves_the_backbone_alone(model, data, tmp_path):
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    found = probe(model, data, tmp_path, torch.device("cpu"))
    assert found.samples == 1257
    assert found.decay in DECAYS
    assert found.accuracy["test"] > 0.85, "random features of digits are worth more than that"
    assert all(torch.equal(before[key], value) for key, value in model.backbone.state_dict().items())
    images, labels = data.test_set
    predicted = model.eval()(images.float() / 255).argmax(1)
    assert float((predicted == labels).float().mean()) == pytest.approx(found.accuracy["test"])


def test_features_are_computed_once_for_the_same_images_and_weights(model, data, tmp_path, monkeypatch):
    from zoo.running import probing

    computed = []

    def counted(*arguments):
        computed.append(1)
        return compute_features(*arguments)

    monkeypatch.setattr(probing, "compute_features", counted)
    first = probe(model, data, tmp_path, torch.device("cpu"))
    assert len(computed) == 3
    again = probe(model, DigitsDataModule(image_size=12), tmp_path, torch.device("cpu"))
    assert len(computed) == 3, "other augmentation is the same images"
    assert again.accuracy == first.accuracy
    with torch.no_grad():
        model.backbone.conv1.weight[0, 0, 0, 0] += 1
    probe(model, data, tmp_path, torch.device("cpu"))
    assert len(computed) == 6, "other weights"
    probe(model, DigitsDataModule(image_size=12, split_seed=1), tmp_path, torch.device("cpu"))
    assert len(computed) == 8, "other images for training and validation, the same for testing"


def test_it_needs_a_validation_split(model, tmp_path):
    with pytest.raises(ValueError, match=r"--data\.init_args\.val_size"):
        probe(model, DigitsDataModule(image_size=12, val_size=0), tmp_path, torch.device("cpu"))


def test_the_command_writes_a_weights_file_that_predicts(model, tmp_path, capsys):
    import zoo
    from zoo.cli import main

    zoo.save(model, tmp_path / "start.safetensors")
    weights = ["--model.init_args.weights", str(tmp_path / "start.safetensors"), "--model.init_args.image_size", "12"]
    images = ["--data.init_args.image_size", "12"]
    assert main(["probe", "lenet/embedded", "--out", str(tmp_path / "p.safetensors"), *weights, *images]) == 0
    probed = zoo.load(tmp_path / "p.safetensors")
    assert probed.evaluation == {"short_side": 12, "size": 12}
    assert torch.equal(probed.backbone.conv1.weight, model.backbone.conv1.weight)
    assert not torch.equal(probed.head.weight, model.head.weight)
    assert json.loads(json.dumps(probed.class_names)) == [str(digit) for digit in range(10)]
    assert "test" in capsys.readouterr().out
    assert main(["probe", "lenet/embedded"]) == 2, "a network that has learnt nothing has no features worth probing"
    assert "weights" in capsys.readouterr().err


def test_what_is_no_classifier_is_refused_in_one_line(capsys, tmp_path):
    zoo.save(zoo.CaptioningLSTM(network="small", image_size=64), "captioner.safetensors")
    overrides = ["--model.init_args.weights", "captioner.safetensors", "--data.init_args.train_size", "12"]
    sizes = ["--data.init_args.val_size", "4", "--data.init_args.test_size", "4"]
    network = ["--model.init_args.wordvec_dim", "256", "--model.init_args.hidden_dim", "512"]
    assert main(["probe", "captioning_lstm/embedded", *overrides, *sizes, *network]) == 2
    assert "zoo probe fits the head of a classifier, and captioning_lstm/embedded has a" in capsys.readouterr().err
