"""LeNet-5 as the lecture draws it."""

import pytest
import torch
from torch.nn import functional as F

from zoo import LeNet
from zoo.layer_table import layer_table


def test_parameters_are_the_lectures():
    model = LeNet()
    counts = {name: p.numel() for name, p in model.named_parameters()}
    assert counts["backbone.conv1.weight"] + counts["backbone.conv1.bias"] == 520
    assert counts["backbone.conv2.weight"] + counts["backbone.conv2.bias"] == 25_050
    assert counts["backbone.hidden.weight"] + counts["backbone.hidden.bias"] == 1_225_500
    assert counts["head.weight"] + counts["head.bias"] == 5_010
    assert sum(counts.values()) == 1_256_080


def test_layer_table_is_the_lectures():
    rows = layer_table(LeNet(), torch.zeros(1, 1, 28, 28))
    assert [(row.kind, row.output) for row in rows] == [
        ("Conv2d", (20, 28, 28)),
        ("MaxPool2d", (20, 14, 14)),
        ("Conv2d", (50, 14, 14)),
        ("MaxPool2d", (50, 7, 7)),
        ("Flatten", (2450,)),
        ("Linear", (500,)),
        ("Linear", (10,)),
    ]
    assert [row.multiply_adds for row in rows] == [392_000, 15_680, 4_900_000, 9_800, 0, 1_225_000, 5_000]
    assert [round(row.memory_kb, 2) for row in rows] == [61.25, 15.31, 38.28, 9.57, 9.57, 1.95, 0.04]


def test_forward_is_the_lectures_formula_in_float64():
    """Rectified before the pool, as the lecture writes it; the model does it after."""
    torch.manual_seed(0)
    model = LeNet().double()
    images = torch.rand(3, 1, 28, 28, dtype=torch.float64, requires_grad=True)
    w = dict(model.named_parameters())
    x = F.max_pool2d(F.relu(F.conv2d(images, w["backbone.conv1.weight"], w["backbone.conv1.bias"], padding=2)), 2)
    x = F.max_pool2d(F.relu(F.conv2d(x, w["backbone.conv2.weight"], w["backbone.conv2.bias"], padding=2)), 2)
    x = F.relu(x.reshape(3, 2450) @ w["backbone.hidden.weight"].T + w["backbone.hidden.bias"])
    expected = x @ w["head.weight"].T + w["head.bias"]
    logits = model(images)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    ours = torch.autograd.grad(logits.square().sum(), [images, *w.values()])
    theirs = torch.autograd.grad(expected.square().sum(), [images, *w.values()])
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (4, 17)])
def test_other_images_fit(channels, size):
    model = LeNet(num_classes=3, in_channels=channels, image_size=size)
    assert model(torch.rand(2, channels, size, size)).shape == (2, 3)


def test_too_small_images_are_refused():
    with pytest.raises(ValueError, match="image_size=3"):
        LeNet(image_size=3)


def test_class_names_must_be_as_many_as_classes():
    with pytest.raises(ValueError, match="2 class_names"):
        LeNet(num_classes=3, class_names=["a", "b"])


def test_a_batch_may_be_empty():
    assert LeNet().eval()(torch.zeros(0, 1, 28, 28)).shape == (0, 10)
