"""Attributions against closed forms: a linear model, a network made by hand, float64 differences."""

import builtins

import pytest
import torch
from torch import nn

from zoo.explaining.attributions import grad_cam, guided_backpropagation, occlusion, saliency

pytest.importorskip("captum")


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 5, 6))


@pytest.fixture
def convolutional():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def test_the_saliency_of_a_linear_model_is_its_weight(linear):
    weight = linear[1].weight.detach().view(6, 3, 4, 5)
    maps = saliency(linear, torch.rand(2, 3, 4, 5), [2, 5])
    torch.testing.assert_close(maps, weight[[2, 5]].abs().amax(1))
    assert not maps.requires_grad


def test_saliency_is_the_difference_in_float64(convolutional):
    model = convolutional.double()
    image = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    found = saliency(model, image, 1)
    step = 1e-6
    for y, x in ((0, 0), (3, 5), (7, 2)):
        differences = []
        for channel in range(3):
            near = image.clone()
            near[0, channel, y, x] += step
            far = image.clone()
            far[0, channel, y, x] -= step
            differences.append(((model(near) - model(far))[0, 1] / (2 * step)).abs().item())
        assert found[0, y, x].item() == pytest.approx(max(differences), abs=1e-7)


def test_saliency_of_a_clip_has_its_frames():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 2 * 4 * 4, 2))
    maps = saliency(model, torch.rand(1, 3, 2, 4, 4), 0)
    torch.testing.assert_close(maps, model[1].weight.detach()[:1].view(1, 3, 2, 4, 4).abs().amax(1))


def test_guided_backpropagation_passes_what_is_positive_both_ways():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4, bias=False), nn.ReLU(inplace=True), nn.Linear(4, 1, bias=False))
    model[1].weight.data = torch.diag(torch.tensor([1.0, 1.0, -1.0, -1.0]))
    model[3].weight.data = torch.tensor([[2.0, -3.0, 2.0, -3.0]])
    image = torch.ones(1, 1, 2, 2)
    # The third and fourth rectifier are closed; the second is open and has a gradient below 0.
    assert guided_backpropagation(model, image, 0).flatten().tolist() == [2.0, 0.0, 0.0, 0.0]
    assert saliency(model, image, 0).flatten().tolist() == [2.0, 3.0, 0.0, 0.0]
    assert model[2].inplace
    assert not model[2]._forward_hooks
    assert not model[2]._forward_pre_hooks


def test_grad_cam_of_a_network_made_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    model[0].weight.data = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    model[3].weight.data = torch.tensor([[4.0, 8.0], [8.0, 4.0]])
    image = torch.tensor([[0.0, 1.0], [0.5, 0.25]])[None, None]
    # The mean gradient of a map is the head's weight over 4 places: 1 * x + 2 * (-x) < 0, and 2 * x + 1 * (-x) = x.
    assert grad_cam(model, image, "0", 0).abs().max() == 0
    torch.testing.assert_close(grad_cam(model, image, "0", 1), image[:, 0])
    assert grad_cam(model, image.repeat(1, 1, 2, 2), "0", 1).shape == (1, 4, 4)
    with pytest.raises(ValueError, match="no maps"):
        grad_cam(model, image, "2")
    with pytest.raises(ValueError, match="no layer '9'"):
        grad_cam(model, image, "9")


class OnePixel(nn.Module):
    """Score 0 is the value of one pixel, score 1 nothing."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, images):
        self.sizes.append(len(images))
        return torch.stack([images[:, 0, 4, 6], torch.zeros(len(images))], 1)


def test_occlusion_finds_the_one_pixel_that_is_looked_at():
    model = OnePixel()
    image = torch.zeros(1, 1, 8, 10)
    image[0, 0, 4, 6] = 1
    falls = occlusion(model, image, 0, patch=2, stride=2, of="score")
    expected = torch.zeros(1, 8, 10)
    expected[0, 4:6, 6:8] = 1 - 1 / 80  # from the pixel's 1 to the picture's mean
    torch.testing.assert_close(falls, expected)
    assert max(model.sizes) > 10, "many patches at once"
    assert len(model.sizes) < 6


@pytest.mark.parametrize(("size", "together"), [(32, 100), (64, 64), (128, 16), (224, 5), (600, 1)])
def test_so_many_covered_pictures_go_together_as_have_few_pixels(size, together):
    model = OnePixel()
    occlusion(model, torch.rand(1, 1, size, size), 0, patch=size // 5, stride=size // 10)
    assert max(model.sizes) == together


def test_occlusion_of_a_network_whose_first_layer_works_in_place():
    model = nn.Sequential(nn.Dropout(0.5, inplace=True), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 2))
    image = torch.rand(1, 1, 4, 4) - 0.5
    before = image.clone()
    falls = occlusion(model, image, 0, patch=2, of="score")
    apart = nn.Sequential(nn.ReLU(), nn.Flatten(), model[3])
    torch.testing.assert_close(falls, occlusion(apart, before, 0, patch=2, of="score"))
    assert torch.equal(image, before)


def test_occlusion_of_probabilities_is_their_difference(convolutional):
    image = torch.rand(1, 3, 8, 8)
    falls = occlusion(convolutional, image, 2, patch=4, stride=4)
    covered = image.clone()
    covered[0, :, 4:, :4] = image.mean((2, 3))[0, :, None, None]
    with torch.no_grad():
        before, after = convolutional(image).softmax(1)[0, 2], convolutional(covered).softmax(1)[0, 2]
    torch.testing.assert_close(falls[0, 4:, :4], (before - after).expand(4, 4), atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="patch=9"):
        occlusion(convolutional, image, patch=9)


@pytest.mark.parametrize(
    "method", [saliency, guided_backpropagation, occlusion, lambda *given: grad_cam(*given[:2], "2", *given[2:])]
)
def test_a_batch_gives_what_each_picture_gives_and_the_model_stays(convolutional, method):
    convolutional.train()
    convolutional[0].weight.requires_grad_(False)
    images = torch.rand(3, 3, 8, 8)
    given = images.clone()
    together = method(convolutional, images, [0, 1, 2])
    alone = [method(convolutional, images[k : k + 1], k) for k in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))
    assert together.isfinite().all()
    assert torch.equal(images, given)
    assert not images.requires_grad
    assert all(module.training for module in convolutional.modules())
    assert [p.requires_grad for p in convolutional.parameters()][:2] == [False, True]
    assert all(p.grad is None for p in convolutional.parameters())
    assert all(module.inplace for module in convolutional if isinstance(module, nn.ReLU))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in convolutional.modules())


def test_no_target_is_the_best_class(linear):
    images = torch.rand(2, 3, 4, 5)
    best = linear(images).argmax(1)
    assert torch.equal(saliency(linear, images), saliency(linear, images, best))


def test_without_captum_the_extra_is_named(linear, monkeypatch):
    def missing(name, *arguments, **options):
        if name.startswith("captum"):
            raise ImportError(name)
        return original(name, *arguments, **options)

    original = builtins.__import__
    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ImportError, match=r"zoo\[explain\]"):
        saliency(linear, torch.rand(1, 3, 4, 5))
