"""Fully connected networks against the assignments' formulas in float64."""

import math

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader, TensorDataset

from zoo import FullyConnectedNet


def tiny(**options):
    torch.manual_seed(0)
    return FullyConnectedNet(num_classes=4, image_size=3, weight_scale=0.3, **options)


def batch(samples=6):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(samples, 3, 3, 3, generator=generator, dtype=torch.float64)
    return images, torch.randint(4, (samples,), generator=generator)


def linear_layers(model):
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear)]


def test_parameters_are_those_of_the_assignment():
    """3072 - 100 - 10 with biases; and the six layers of assignment 3."""
    assert sum(p.numel() for p in FullyConnectedNet().parameters()) == 3072 * 100 + 100 + 100 * 10 + 10
    six = FullyConnectedNet(hidden=(100,) * 5)
    assert len(linear_layers(six)) == 6
    assert sum(p.numel() for p in six.parameters()) == 307_300 + 4 * 10_100 + 1_010


def test_loss_and_gradient_of_two_layers_are_the_hand_derived_ones():
    model, (images, labels) = tiny(hidden=(5,)).double(), batch()
    first, second = linear_layers(model)
    torch.nn.init.normal_(first.bias)
    loss, logits = model.training_loss(images, labels)
    loss.backward()
    x = (images - torch.tensor([0.4914, 0.4822, 0.4465])[:, None, None]).reshape(6, 27)
    hidden = (x @ first.weight.T + first.bias).clamp_min(0)
    scores = hidden @ second.weight.T + second.bias
    torch.testing.assert_close(logits, scores)
    d_scores = scores.softmax(1)
    assert loss.item() == pytest.approx(-d_scores[torch.arange(6), labels].log().mean().item(), abs=1e-12)
    d_scores = (d_scores - torch.nn.functional.one_hot(labels, 4)) / 6
    torch.testing.assert_close(second.weight.grad, d_scores.T @ hidden)
    torch.testing.assert_close(second.bias.grad, d_scores.sum(0))
    d_hidden = d_scores @ second.weight * (hidden > 0)
    torch.testing.assert_close(first.weight.grad, d_hidden.T @ x)
    torch.testing.assert_close(first.bias.grad, d_hidden.sum(0))


def test_the_initial_weights_are_the_assignments_or_he_et_als():
    torch.manual_seed(0)
    for layer in linear_layers(FullyConnectedNet((500, 400), weight_scale=1e-2)):
        assert layer.weight.std().item() == pytest.approx(1e-2, rel=0.05)
        assert not layer.bias.any()
    deviations = [layer.weight.std().item() for layer in linear_layers(FullyConnectedNet((500, 400)))]
    expected = [math.sqrt(2 / 3072), math.sqrt(2 / 500), math.sqrt(1 / 400)]
    assert deviations == pytest.approx(expected, rel=0.05)


def test_he_et_als_weights_keep_the_mean_square_through_many_layers():
    torch.manual_seed(0)
    images = torch.rand(64, 3, 32, 32)
    model = FullyConnectedNet((512,) * 8)
    x = model.backbone.standardize(images)
    kept = model.backbone(images).square().mean() / x.square().mean()
    assert 0.5 < kept < 2
    lost = FullyConnectedNet((512,) * 8, weight_scale=1e-2).backbone(images).square().mean() / x.square().mean()
    assert lost < 1e-4, "the assignment's 1e-2 is too small for nine layers: that is its lesson"


def test_dropout_is_inverted_and_of_probability_p():
    model = tiny(hidden=(20_000,), dropout=0.25)
    image = torch.rand(1, 3, 3, 3)
    kept = model.eval().backbone(image)
    assert torch.equal(kept, model.backbone(image)), "nothing is dropped in evaluation"
    dropped = model.train().backbone(image)
    positive = kept > 0
    gone = dropped[positive] == 0
    assert gone.float().mean().item() == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(dropped[positive][~gone], kept[positive][~gone] / 0.75)


@pytest.mark.parametrize("hidden", [(), (100, 0)])
def test_layers_without_width_are_refused(hidden):
    with pytest.raises(ValueError, match="hidden="):
        FullyConnectedNet(hidden=hidden)


def test_fifty_images_are_learnt_by_heart():
    """Assignment 3: a three-layer net of 100 units overfits 50 pictures within 20 epochs."""
    torch.manual_seed(0)
    images = torch.rand(50, 3, 32, 32)
    labels = torch.randint(10, (50,))
    model = FullyConnectedNet((100, 100))
    run = Trainer(
        max_epochs=20, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    run.fit(model, DataLoader(TensorDataset(images, labels), 25))
    assert torch.equal(model.eval()(images).argmax(1), labels)


def test_the_weights_of_the_first_layer_are_drawn(tmp_path, monkeypatch):
    from lightning.pytorch.loggers import CSVLogger

    import zoo.fully_connected as module

    drawn = []
    figure = module.filters_figure
    monkeypatch.setattr(module, "filters_figure", lambda *a: drawn.append(a) or figure(*a))
    model, (images, labels) = tiny(hidden=(70,)), batch()
    run = Trainer(logger=CSVLogger(tmp_path), enable_progress_bar=False, enable_model_summary=False)
    run.test(model, DataLoader(TensorDataset(images.float(), labels), 6), verbose=False)
    assert torch.equal(drawn[0][0][5, 2, 1], linear_layers(model)[0].weight[5, 21:24])
    assert (tmp_path / "lightning_logs/version_0/pictures/test_first_layer.png").is_file()
