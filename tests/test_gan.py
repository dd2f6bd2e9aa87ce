"""The assignment's fully connected GAN and LSGAN."""

import pytest
import torch
from torch.nn import functional as F

from zoo import GAN


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_parameters_are_the_assignments():
    model = GAN()
    assert parameters(model.discriminator) == 267_009
    assert parameters(model.generator) == 1_952_528
    assert parameters(GAN(code_size=4).generator) == 1_858_320


def test_both_networks_are_the_assignments_formulas_in_float64():
    torch.manual_seed(0)
    model = GAN().double()
    codes, images = model.draw_codes(3).double(), torch.rand(3, 1, 28, 28, dtype=torch.float64)
    w = dict(model.named_parameters())

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = linear(F.relu(linear(F.relu(linear(codes, "generator.layers.0")), "generator.layers.2")), "generator.layers.4")
    torch.testing.assert_close(model(codes), (x.tanh().view(3, 1, 28, 28) + 1) / 2, rtol=0, atol=1e-12)
    x = 2 * (images.view(3, 784) - 0.5)
    for layer in (1, 3):
        x = linear(x, f"discriminator.layers.{layer}")
        x = torch.where(x > 0, x, 0.01 * x)
    torch.testing.assert_close(model.score(images), linear(x, "discriminator.layers.5")[:, 0], rtol=0, atol=1e-12)


def test_codes_are_even_in_the_assignments_range():
    codes = GAN().draw_codes(1000, torch.Generator().manual_seed(0))
    assert codes.shape == (1000, 96)
    assert -1 <= codes.min() < -0.99
    assert 0.99 < codes.max() < 1
    assert float(codes.mean()) == pytest.approx(0, abs=0.01)
    assert float(codes.var()) == pytest.approx(1 / 3, rel=0.02)


def test_other_images_fit():
    model = GAN(in_channels=3, image_size=10)
    images = model.sample(2)
    assert images.shape == (2, 3, 10, 10)
    assert model.score(images).shape == (2,)
