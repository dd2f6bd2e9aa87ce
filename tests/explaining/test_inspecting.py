"""Receptive fields by hand and by gradients, neighbours and planes by numpy, masks of a known object."""

import numpy as np
import pytest
import torch
from torch import nn

from zoo.explaining.inspecting import (
    activation_maps,
    activations,
    embed,
    features,
    first_filters,
    maximally_activating_patches,
    nearest_neighbours,
    receptive_fields,
)
from zoo.explaining.segmenting import segment


class Branches(nn.Module):
    """A short way and a long way that are added up."""

    def __init__(self):
        super().__init__()
        self.short = nn.Conv2d(3, 2, 1, stride=2)
        self.long = nn.Sequential(nn.Conv2d(3, 2, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1))
        self.sum = nn.Identity()

    def forward(self, images):
        return self.sum(self.short(images) + self.long(images))


@pytest.fixture
def stack():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(4, 5, (3, 5), padding=(1, 2), dilation=1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(5, 3),
    )  # fmt: skip


def test_the_receptive_field_of_a_stack_by_hand(stack):
    # Row i of the second convolution sees rows i-1…i+1 of the pool, these 2i-2…2i+3, these 2i-3…2i+4 of the picture;
    # column j sees j-2…j+2, 2j-4…2j+5, 2j-5…2j+6.
    found = receptive_fields(stack, "4", (3, 24, 32), [(5, 8), (0, 0), (11, 15), (5, 0)])
    assert found == [(7, 11, 15, 23), (0, 0, 5, 7), (19, 25, 24, 32), (7, 0, 15, 7)]
    assert receptive_fields(stack, "0", (3, 24, 32), [(3, 4)]) == [(2, 3, 5, 6)]
    assert receptive_fields(stack, "6", (3, 24, 32), [(0, 0)]) == [(0, 0, 24, 32)]


def test_the_receptive_field_of_branches_is_the_support_of_the_gradient():
    torch.manual_seed(1)
    model = Branches().double()
    for parameter in model.parameters():
        parameter.data.abs_()  # so that no rectifier closes and nothing cancels
    for place in ((0, 0), (3, 5), (7, 7)):
        image = torch.rand(1, 3, 16, 16, dtype=torch.float64, requires_grad=True)
        model(image)[0, :, place[0], place[1]].sum().backward()
        seen = image.grad.abs().sum((0, 1)).nonzero()
        (low, high) = seen.amin(0).tolist(), (seen.amax(0) + 1).tolist()
        assert receptive_fields(model.float(), "sum", (3, 16, 16), [place]) == [(*low, *high)]
        model.double()


def test_patches_are_the_strongest_places_with_what_they_see(stack):
    images = torch.rand(6, 3, 24, 32, generator=torch.Generator().manual_seed(2))
    stack.train()
    patches = maximally_activating_patches(stack, images, "4", 2, count=3)
    maps = activations(stack, images, "4")
    best = maps[:, 2].amax((1, 2)).sort(descending=True)
    assert [patch.image for patch in patches] == best.indices[:3].tolist()
    for patch, value in zip(patches, best.values, strict=False):
        assert patch.value == value == maps[patch.image, 2][patch.place]
        top, left, bottom, right = patch.box
        assert torch.equal(patch.pixels, images[patch.image, :, top:bottom, left:right])
        # What lies outside does not matter, what lies inside does.
        around = torch.rand_like(images[:1])
        around[0, :, top:bottom, left:right] = patch.pixels
        assert activations(stack, around, "4")[0, 2][patch.place].item() == pytest.approx(patch.value, abs=1e-6)
    assert all(module.training for module in stack.modules())
    with pytest.raises(ValueError, match="channels 0…4"):
        maximally_activating_patches(stack, images, "4", 5)
    with pytest.raises(ValueError, match="no maps"):
        maximally_activating_patches(stack, images, "8", 0)


def test_maps_and_features(stack):
    images = torch.rand(5, 3, 24, 32)
    stack.eval()
    with torch.no_grad():
        expected = stack[:5](images)
    torch.testing.assert_close(activations(stack, images, "4", batch_size=2), expected)
    torch.testing.assert_close(features(stack, images, "4"), expected.mean((2, 3)))
    assert features(stack, images, "8").shape == (5, 3)
    scaled = activation_maps(stack, images, "4")
    assert torch.equal(scaled.amax((2, 3)), torch.ones(5, 5))
    assert torch.equal(scaled.amin((2, 3)), torch.zeros(5, 5))


def test_first_filters_of_a_convolution_and_of_a_linear_layer(stack):
    filters = first_filters(stack, (3, 24, 32))
    weight = stack[0].weight[1].detach()
    torch.testing.assert_close(filters[1], (weight - weight.min()) / (weight.max() - weight.min()))
    linear = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    assert first_filters(linear, (3, 4, 4)).shape == (2, 3, 4, 4)
    for model, said in (
        (linear, "48 values"),
        (nn.Conv2d(8, 2, 3), "8 channels"),
        (nn.Flatten(), "no convolution"),
    ):
        with pytest.raises(ValueError, match=said):
            first_filters(model, (3, 5, 5))


def test_neighbours_are_those_by_distance():
    vectors = np.random.default_rng(0).normal(size=(20, 7))
    indices, distances = nearest_neighbours(torch.tensor(vectors[:3]), torch.tensor(vectors), 4)
    expected = np.linalg.norm(vectors[:3, None] - vectors[None], axis=2)
    assert indices.tolist() == expected.argsort(1)[:, :4].tolist()
    np.testing.assert_allclose(distances, np.sort(expected, 1)[:, :4], atol=1e-12)


def test_principal_components_and_neighbours_in_the_plane():
    generator = np.random.default_rng(0)
    vectors = np.concatenate([generator.normal(3 * k, 0.1, (12, 6)) for k in range(2)])
    plane = embed(torch.tensor(vectors))
    left, scale, _ = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(plane.numpy()), np.abs(left[:, :2] * scale[:2]), atol=1e-4)
    first, second = (embed(torch.tensor(vectors), "tsne", seed=1) for _ in range(2))
    assert torch.equal(first, second)
    within = torch.cdist(first[:12], first[:12]).max()
    assert torch.cdist(first[:12], first[12:]).min() > within
    with pytest.raises(ValueError, match="three at least"):
        embed(torch.zeros(2, 4))


def test_an_object_is_cut_out_by_its_colour():
    pytest.importorskip("cv2")
    generator = torch.Generator().manual_seed(0)
    image = torch.tensor([0.1, 0.6, 0.2])[:, None, None] + 0.05 * torch.rand(3, 60, 80, generator=generator)
    inside = torch.zeros(60, 80, dtype=torch.bool)
    inside[15:45, 20:50] = True
    image = torch.where(inside, torch.tensor([0.8, 0.2, 0.1])[:, None, None] + 0.05 * torch.rand(3, 60, 80), image)
    rows, columns = torch.meshgrid(torch.arange(60), torch.arange(80), indexing="ij")
    saliency = torch.exp(-((rows - 28) ** 2 + (columns - 37) ** 2) / 200)  # strongest on a part of it
    mask = segment(image, saliency)
    assert ((mask & inside).sum() / (mask | inside).sum()).item() > 0.95
    with pytest.raises(ValueError, match="all over"):
        segment(image, torch.ones(60, 80))
    with pytest.raises(ValueError, match="must be"):
        segment(image, torch.ones(60, 8))
