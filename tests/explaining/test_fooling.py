"""Adversarial pictures of a linear model, whose steps can be counted by hand."""

import pytest
import torch
from torch import nn

from zoo.explaining.fooling import fgsm, fool, pgd


@pytest.fixture
def linear():
    """Score 0 is the first pixel, score 1 the second, score 2 nothing."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))
    model[1].weight.data = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 0]])
    return model


def picture(first, second):
    return torch.tensor([first, second, 0.5, 0.5]).view(1, 1, 2, 2)


def test_steps_norm_and_stop_are_those_of_the_formula(linear):
    images = torch.cat([picture(0.55, 0.3), picture(0.3, 0.4), picture(0.95, 0.1)])
    told = []
    found = fool(linear, images, 1, steps=5, rate=0.1, progress=lambda *both: told.append(both))
    # 0.3 + 3 * 0.1 > 0.55; the second is seen as 1 from the start; 0.1 + 5 * 0.1 < 0.95.
    assert found.steps.tolist() == [3, 0, 5]
    assert found.fooled.tolist() == [True, True, False]
    torch.testing.assert_close(found.l2, torch.tensor([0.3, 0.0, 0.5]))
    torch.testing.assert_close(found.largest, torch.tensor([0.3, 0.0, 0.5]))
    torch.testing.assert_close(found.images[0].flatten(), torch.tensor([0.55, 0.6, 0.5, 0.5]))
    assert told[-1] == (5, 5)
    assert linear.training
    assert linear[1].weight.requires_grad


def test_a_file_of_it_fools_too(linear):
    # After 3 steps 0.5994 is above 0.599, but both are 153 of 255.
    images = picture(0.599, 0.2994)
    assert fool(linear, images, 1, rate=0.1).steps.tolist() == [3]
    found = fool(linear, images, 1, rate=0.1, as_file=True)
    assert found.steps.tolist() == [4]
    torch.testing.assert_close(found.images * 255, (found.images * 255).round(), atol=1e-4, rtol=0)
    assert linear(found.images).argmax(1).tolist() == [1]


def test_it_stays_within_0_and_1_and_alone_is_as_in_a_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(inplace=True), nn.Linear(16, 4))
    images = torch.rand(3, 3, 8, 8)
    wanted = model(images).topk(2).indices[:, 1]
    found = fool(model, images, wanted, steps=40, rate=0.3)
    assert 0 <= found.images.min() <= found.images.max() <= 1
    assert (model(found.images).argmax(1) == wanted).tolist() == found.fooled.tolist()
    alone = [fool(model, images[k : k + 1], int(wanted[k]), steps=40, rate=0.3) for k in range(3)]
    torch.testing.assert_close(found.images, torch.cat([one.images for one in alone]))
    assert found.steps.tolist() == [int(one.steps) for one in alone]
    assert found.fooled.all()
    assert found.steps.min() > 0


def test_a_class_that_is_not_there(linear):
    with pytest.raises(ValueError, match="0…2"):
        fool(linear, picture(0.1, 0.2), 3)


def test_the_sign_of_the_gradient_by_captum(linear):
    pytest.importorskip("captum")
    image = picture(0.55, 0.5)
    away = fgsm(linear, image, epsilon=0.1)
    torch.testing.assert_close(away.images.flatten(), torch.tensor([0.45, 0.6, 0.5, 0.5]))
    assert away.fooled.tolist() == [True]
    torch.testing.assert_close(away.largest, torch.tensor([0.1]))
    wanted = fgsm(linear, image, epsilon=0.1, targets=0)
    torch.testing.assert_close(wanted.images.flatten(), torch.tensor([0.65, 0.4, 0.5, 0.5]))
    near = pgd(linear, image, radius=0.05, rate=0.02, steps=10, targets=1)
    torch.testing.assert_close(near.images.flatten(), torch.tensor([0.5, 0.55, 0.5, 0.5]))
    assert near.fooled.tolist() == [True]
    assert near.steps.tolist() == [10]
    assert linear.training
