"""ResNet against torchvision's, the lecture's figures, and weights that others trained."""

import runpy

import pytest
import torch
from torchvision import models

from zoo import ResNet
from zoo.layer_table import layer_table

PARAMETERS = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}


def billions(model, size=224):
    rows = layer_table(model, torch.zeros(1, 3, size, size, device="meta"))
    return sum(row.multiply_adds for row in rows if row.kind in ("Conv2d", "Linear")) / 1e9


@pytest.mark.parametrize("depth", PARAMETERS)
def test_shapes_are_torchvisions(depth):
    """Every tensor, by name, and the number of parameters."""
    with torch.device("meta"):
        ours, theirs = ResNet(depth), getattr(models, f"resnet{depth}")(weights=None)
    renamed = ours.published.rename(dict(theirs.state_dict()))
    own = ours.state_dict()
    assert {key: value.shape for key, value in renamed.items()} == {key: value.shape for key, value in own.items()}
    assert sum(p.numel() for p in ours.parameters()) == PARAMETERS[depth]


@pytest.mark.parametrize("depth", [18, 50])
def test_torchvisions_checkpoint_gives_the_same_outputs(depth, published_outputs):
    published_outputs(getattr(models, f"resnet{depth}")(weights=None), ResNet, {"depth": depth}, 64)


@pytest.mark.parametrize(
    ("depth", "lecture"),
    [(18, 1.8), (34, 3.7), (50, 3.8), (101, 7.6), (152, 11.3)],  # slide: 3.6 for ResNet-34, which is 3.66
)
def test_operations_are_the_lectures(depth, lecture):
    """Lecture 8's table of the five networks, whose bottlenecks have their stride in the first convolution."""
    with torch.device("meta"):
        model = ResNet(depth, stride_in_1x1=True)
    assert billions(model) == pytest.approx(lecture, abs=0.06)


@pytest.mark.parametrize(("depth", "expected"), [(18, 1.814), (34, 3.664), (50, 4.089), (101, 7.801), (152, 11.514)])
def test_operations_are_torchvisions(depth, expected):
    """torchvision's documentation of its weights: ``_ops``."""
    with torch.device("meta"):
        assert billions(ResNet(depth)) == pytest.approx(expected, abs=6e-4)


def test_a_residual_branch_can_start_as_nothing():
    block = ResNet(18, zero_init_residual=True).backbone.network.layer1[0].eval()
    x = torch.rand(2, 64, 8, 8)
    torch.testing.assert_close(block(x), x)


def test_the_small_stem_keeps_the_pictures_size():
    """As the ResNet-18 for CIFAR-10 that is usually trained, which has 11,173,962 parameters."""
    with torch.device("meta"):
        model = ResNet(18, num_classes=10, stem="small", image_size=32)
        rows = layer_table(model, torch.zeros(1, 3, 32, 32))
    assert rows[0].output == (64, 32, 32)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (56, 853_018), (110, 1_727_962)])
def test_the_cifar_networks_have_the_papers_size(depth, parameters):
    """Paper, table 6: 0.27, 0.46, 0.85 and 1.7 million."""
    with torch.device("meta"):
        assert sum(p.numel() for p in ResNet(depth, num_classes=10).parameters()) == parameters


def test_the_fast_network_has_its_authors_size():
    with torch.device("meta"):
        assert sum(p.numel() for p in ResNet(9, num_classes=10).parameters()) == 6_573_120


def test_a_cifar_block_is_the_papers_formula_in_float64():
    """y = F(x) + x with option A: every second pixel, new channels of zeros on both sides."""
    torch.manual_seed(0)
    block = ResNet(20, num_classes=10).backbone.network.layer2[0].double().eval()
    x = torch.rand(2, 16, 8, 8, dtype=torch.float64)
    inner = torch.relu(block.bn1(torch.nn.functional.conv2d(x, block.conv1.weight, stride=2, padding=1)))
    inner = block.bn2(torch.nn.functional.conv2d(inner, block.conv2.weight, padding=1))
    shortcut = torch.zeros(2, 32, 4, 4, dtype=torch.float64)
    for channel in range(16):
        shortcut[:, 8 + channel] = x[:, channel, ::2, ::2]
    torch.testing.assert_close(block(x), torch.relu(inner + shortcut), rtol=0, atol=1e-12)


def test_published_cifar_weights_load(zoo_data):
    """Keys of data-parallel training (``module.``), the classifier called ``linear``, ImageNet's mean and deviation."""
    model = ResNet(20, num_classes=10, weights=str(zoo_data / "weights" / "resnet20-12fca82f.th"))
    stored = torch.load(zoo_data / "weights" / "resnet20-12fca82f.th", map_location="cpu", weights_only=True)[
        "state_dict"
    ]
    assert torch.equal(model.head.weight, stored["module.linear.weight"])
    assert torch.equal(model.backbone.network.layer3[2].conv2.weight, stored["module.layer3.2.conv2.weight"])
    assert model.backbone.standardize.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


@pytest.mark.slow
def test_published_cifar_weights_have_their_accuracy_on_the_jpeg_copy(zoo_data):
    """81.0 % of the 10,000 test pictures, as the copy's documentation says of these weights."""
    images, labels = runpy.run_path(str(zoo_data / "unpack_cifar10.py"))["read_pack"](
        zoo_data / "cifar10" / "test.jpgpack"
    )
    model = ResNet(20, num_classes=10, weights=str(zoo_data / "weights" / "resnet20-12fca82f.th")).eval()
    right = 0
    with torch.inference_mode():
        for start in range(0, 10_000, 500):
            batch = torch.from_numpy(images[start : start + 500]).view(-1, 3, 32, 32).float() / 255
            right += int((model(batch).argmax(1) == torch.from_numpy(labels[start : start + 500])).sum())
    assert right / 10_000 == pytest.approx(0.810, abs=0.002)


def test_an_unknown_depth_is_refused():
    with pytest.raises(ValueError, match="no ResNet of depth 19: there are 9, 18, 20"):
        ResNet(19)
