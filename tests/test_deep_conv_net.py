"""DeepConvNet of assignment 3: its formula in float64, its initialization, and what that is for."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zoo import DeepConvNet


@pytest.mark.parametrize("batch_norm", [False, True])
def test_forward_is_the_assignments_formula_in_float64(batch_norm):
    """Convolution, batch norm in training mode by its definition (biased variance), rectifier, pool."""
    torch.manual_seed(0)
    model = DeepConvNet((4, 6, 5), (0, 2), batch_norm, num_classes=3, image_size=8).double().train()
    images = torch.rand(7, 3, 8, 8, dtype=torch.float64)
    x = images - model.backbone.standardize.mean
    for place, layer in enumerate(m for m in model.modules() if isinstance(m, nn.Conv2d)):
        x = F.conv2d(x, layer.weight, layer.bias, padding=1)
        if batch_norm:
            centred = x - x.mean((0, 2, 3), keepdim=True)
            x = centred / (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
        x = x.clamp(min=0)
        if place in (0, 2):
            x = F.max_pool2d(x, 2)
    expected = x.reshape(7, -1) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-10)


def test_running_statistics_are_the_assignments():
    """running = 0.9 * running + 0.1 * batch."""
    model = DeepConvNet((4,), (), True, image_size=8).train()
    images = torch.rand(5, 3, 8, 8)
    x = model.backbone.network[0](model.backbone.standardize(images))
    model(images)
    torch.testing.assert_close(model.backbone.network[1].running_mean, 0.1 * x.mean((0, 2, 3)))


def test_parameters_are_counted_by_hand():
    counts = {name: p.numel() for name, p in DeepConvNet((8, 16), (0,), True, image_size=8).named_parameters()}
    assert sum(counts.values()) == (3 * 9 * 8 + 8) + 2 * 8 + (8 * 9 * 16 + 16) + 2 * 16 + (16 * 4 * 4 * 10 + 10)


def test_initial_weights_have_hes_deviation():
    torch.manual_seed(0)
    model = DeepConvNet((256, 256), (0, 1), image_size=8)
    for layer in (m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)):
        gain = 1 if layer is model.head else 2
        assert layer.weight.std().item() == pytest.approx(math.sqrt(gain / layer.weight[0].numel()), rel=0.05)
        assert layer.bias.abs().max() == 0


@pytest.mark.parametrize(("weight_scale", "vanishes"), [(None, False), (1e-2, True)])
def test_only_hes_deviation_lets_thirty_layers_speak(weight_scale, vanishes):
    """The assignment's demonstration: with a deviation of 0.01 the signal dies on its way."""
    torch.manual_seed(0)
    filters = (8,) * 10 + (32,) * 10 + (128,) * 10
    model = DeepConvNet(filters, (9, 19), weight_scale=weight_scale, image_size=8).eval()
    spread = model.backbone(torch.rand(4, 3, 8, 8)).std().item()
    assert (spread < 1e-6) is vanishes


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"max_pools=\[3\] must be places in num_filters=\[8, 8\]"):
        DeepConvNet((8, 8), (3,))
    with pytest.raises(ValueError, match="3 pools leave nothing of image_size=4"):
        DeepConvNet((8, 8, 8), (0, 1, 2), image_size=4)
