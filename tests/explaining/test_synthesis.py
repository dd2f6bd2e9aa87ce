"""Losses by hand, and pictures of small networks whose best picture is known."""

import pytest
import torch
from torch import nn

from zoo.explaining.synthesis import (
    class_visualization,
    content_loss,
    deep_dream,
    feature_inversion,
    gram_matrix,
    style_loss,
    style_transfer,
    texture,
    total_variation,
)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(3)
    return torch.rand(2, 3, 4, 4, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)


def test_the_gram_matrix_by_hand():
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, -1.0]]]])  # two channels, one row of two places
    assert gram_matrix(features, normalize=False).tolist() == [[[5.0, 1.0], [1.0, 10.0]]]
    assert gram_matrix(features).tolist() == [[[1.25, 0.25], [0.25, 2.5]]]
    assert gram_matrix(torch.full((1, 1, 64, 64), 300.0).half()).isfinite().all()


def test_the_losses_by_hand():
    image = torch.tensor([[[[0.0, 1.0], [3.0, 1.0]]]])
    # Across 1² and 2², down 3² and 0².
    assert total_variation(image).tolist() == [14.0]
    assert total_variation(image.repeat(2, 3, 1, 1)).tolist() == [42.0, 42.0]
    assert content_loss(image, torch.ones(1, 1, 2, 2)).tolist() == [5.0]
    assert style_loss(image, torch.tensor([[[0.75]]])).tolist() == [4.0]  # (11 / 4 - 0.75)²


def test_the_best_picture_of_a_linear_model_is_known():
    """The score is w·x, so that the maximum of w·x - λ‖x - ½‖² is ½ + w / 2λ."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    found = class_visualization(
        model, [1, 0], (3, 2, 2), 250, 1.0, penalty=2.0, smoothness=0, jitter=0, rotation=0, zoom=(1, 1), seed=1
    ).images
    expected = 0.5 + model[1].weight.detach().view(2, 3, 2, 2)[[1, 0]] / 4
    torch.testing.assert_close(found, expected.clamp(0, 1), atol=2e-3, rtol=0)
    with pytest.raises(ValueError, match="0…1"):
        class_visualization(model, [2], (3, 2, 2), steps=1)


def test_class_visualization_raises_the_score(network):
    found = class_visualization(network, [2], (3, 16, 16), steps=40, jitter=2, penalty=0.001)
    assert found.losses[-1] > found.losses[0]
    assert len(found.losses) == 40


def test_inversion_of_a_layer_that_forgets_nothing_gives_the_picture(pictures):
    model = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(3 * 16 * 16, 2))
    pictures = 0.2 + 0.6 * pictures  # frequencies come through a sigmoid, which never gives 0 and 1
    found = feature_inversion(model, pictures, "0", steps=200, rate=0.2, smoothness=0)
    torch.testing.assert_close(found.images, pictures, atol=0.02, rtol=0)
    assert found.share < 1e-3


def test_the_first_dream_step_is_the_formula(pictures):
    model = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False))
    image = 0.25 + pictures[:1] / 2
    found = deep_dream(model, image, "0", octaves=1, steps=1, rate=0.01, jitter=0)
    weight = model[0].weight.detach()[:, :, 0, 0]
    gradient = torch.einsum("kc,kd,ndhw->nchw", weight, weight, image)  # of ½ Σ (Wx)²
    torch.testing.assert_close(found.images, image + 0.01 * gradient / gradient.abs().mean())
    energy = torch.einsum("kc,nchw->nkhw", weight, image).square().mean() / 2
    assert found.losses == [pytest.approx(energy.item())]


def test_a_dream_has_more_of_what_the_layer_sees(network, pictures):
    found = deep_dream(network, pictures, "3", octaves=2, steps=5, jitter=2)
    assert found.images.shape == pictures.shape
    assert len(found.losses) == 10
    assert found.losses[4] > found.losses[0]
    assert found.losses[9] > found.losses[5]


def test_style_of_the_picture_itself_costs_nothing_and_of_another_falls(network, pictures):
    same = style_transfer(network, pictures, pictures, "3", ["0", "3"], steps=1, smoothness=0)
    assert same.losses[0] == 0
    found = style_transfer(network, pictures[:1], pictures[1:], "3", ["0", "3"], steps=60)
    assert found.share < 0.5
    made = texture(network, pictures[1:], ["0", "3"], size=(20, 12), steps=60, rate=0.3, jitter=0)
    assert made.images.shape == (1, 3, 20, 12)
    assert made.share < 0.1
    with pytest.raises(ValueError, match=r"1 weights .* 2 layers"):
        texture(network, pictures, ["0", "3"], [1.0])


def test_plain_sums_are_the_formula(network, pictures):
    content, style = pictures[:1], pictures[1:]
    found = style_transfer(
        network, content, style, "3", ["0", "3"], 0.5, [2.0, 3.0], smoothness=0.1, relative=False, steps=1
    )
    expected = 0.1 * total_variation(content)
    maps = content
    others = style
    with torch.no_grad():
        for name, module in network.named_children():
            if name in ("0", "3"):
                maps, others = module(maps), module(others)
                weight = {"0": 2.0, "3": 3.0}[name]
                expected += weight * (gram_matrix(maps) - gram_matrix(others)).square().sum()
            elif name in ("1", "2"):
                maps, others = (
                    nn.functional.relu(maps) if name == "1" else module(maps),
                    (nn.functional.relu(others) if name == "1" else module(others)),
                )
    assert found.losses[0] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        lambda model, images, seed: class_visualization(model, [0, 1], (3, 16, 16), steps=5, jitter=3, seed=seed),
        lambda model, images, seed: feature_inversion(model, images, "3", steps=5, seed=seed),
        lambda model, images, seed: deep_dream(model, images, "3", octaves=2, steps=2, jitter=3, seed=seed),
        lambda model, images, seed: texture(model, images, ["0"], steps=5, seed=seed),
    ],
)
def test_a_seed_gives_the_same_pictures_within_0_and_1_and_the_model_stays(network, pictures, method):
    network.train()
    before = torch.random.get_rng_state()
    first, second, other = (method(network, pictures, seed).images for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert 0 <= first.min() <= first.max() <= 1
    assert torch.equal(torch.random.get_rng_state(), before), "no other random numbers are used up"
    assert all(module.training for module in network.modules())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert all(module.inplace for module in network if isinstance(module, nn.ReLU))
    assert not any(module._forward_hooks for module in network.modules())


def test_steps_are_told_and_an_error_leaves_the_model(network, pictures):
    told = []
    feature_inversion(network, pictures, "3", steps=3, progress=lambda *both: told.append(both))
    assert told == [(1, 3), (2, 3), (3, 3)]
    network.train()

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        feature_inversion(network, pictures, "3", steps=3, progress=stop)
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
