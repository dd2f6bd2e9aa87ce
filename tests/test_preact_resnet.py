"""PreAct-ResNet of assignment 4: sizes, and its formula in float64."""

import pytest
import torch
from torch.nn import functional as F

from zoo import PreActResNet


@pytest.mark.parametrize(
    ("block", "width", "parameters"), [("plain", 8, 117_386), ("residual", 8, 118_074), ("bottleneck", 32, 129_146)]
)
def test_parameters_are_the_assignments(block, width, parameters):
    """plain32, resnet32 and resnet47."""
    with torch.device("meta"):
        model = PreActResNet(block, width)
    assert sum(p.numel() for p in model.parameters()) == parameters
    within = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d) and "shortcut" not in n]
    assert len(within) == 1 + (45 if block == "bottleneck" else 30), "stem and blocks; the classifier is one layer more"


def reference(x, block):
    """BN - ReLU - conv, twice, as the assignment writes it, in evaluation mode."""
    first_norm, _, first, second_norm, _, second = block
    for norm, convolution in ((first_norm, first), (second_norm, second)):
        shape = (1, -1, 1, 1)
        x = (x - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + 1e-5).sqrt()
        x = (x * norm.weight.view(shape) + norm.bias.view(shape)).clamp(min=0)
        x = F.conv2d(x, convolution.weight, convolution.bias, stride=convolution.stride, padding=1)
    return x


def test_blocks_are_the_assignments_formulas_in_float64():
    torch.manual_seed(0)
    model = PreActResNet(blocks_per_stage=2).double().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    stages = model.backbone.network
    x = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    same, down = stages.stage1[0], stages.stage2[0]
    torch.testing.assert_close(same(x), reference(x, same.block) + x, rtol=0, atol=1e-12)
    shortcut = F.conv2d(x, down.shortcut.weight, down.shortcut.bias, stride=2)
    torch.testing.assert_close(down(x), reference(x, down.block) + shortcut, rtol=0, atol=1e-12)
    assert down(x).shape == (2, 16, 4, 4)
    plain = PreActResNet("plain", blocks_per_stage=1).double().eval().backbone.network.stage1[0]
    torch.testing.assert_close(plain(x), reference(x, plain), rtol=0, atol=1e-12)


def test_the_whole_is_the_sum_of_its_parts():
    """Standardise, stem, stages, global average, classifier."""
    model = PreActResNet(num_classes=3, blocks_per_stage=1).eval()
    images = torch.rand(2, 3, 16, 16)
    parts = model.backbone.network
    mean, std = torch.tensor([[0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]])[:, :, None, None]
    maps = parts.stage3(parts.stage2(parts.stage1(parts.stem((images - mean) / std))))
    assert maps.shape == (2, 32, 4, 4)
    torch.testing.assert_close(model(images), model.head(maps.mean((2, 3))))


def test_too_small_numbers_are_refused():
    with pytest.raises(ValueError, match="width=2 must be at least 4"):
        PreActResNet("bottleneck", width=2)
    with pytest.raises(ValueError, match="blocks_per_stage=0"):
        PreActResNet(blocks_per_stage=0)
