"""Inflation: on a clip that stands still the inflated network says what the network for pictures says; and I3D."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models

from zoo.i3d import I3D
from zoo.inflation import InflatedConv, inflate

NETWORKS = [("resnet18", 64), ("squeezenet1_0", 64), ("mobilenet_v2", 64)]


def random_statistics(network):
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


def still(pictures, frames):
    return pictures[:, :, None].expand(-1, -1, frames, -1, -1)


@pytest.mark.parametrize(("name", "size"), NETWORKS)
def test_a_still_clip_gives_the_output_of_its_picture(name, size):
    """Also at the ends of the clip, since the end frames are repeated there."""
    torch.manual_seed(0)
    network = random_statistics(getattr(models, name)(weights=None)).double()
    inflated = inflate(network)
    picture = torch.rand(1, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        expected, found = network(picture), inflated(still(picture, 5))
    assert expected.std() > 0, "outputs that are all alike prove nothing"
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    # What only a training of Inception v3 runs is no part of the inflated one.
    kept = [key for key in network.state_dict() if not key.startswith("AuxLogits.")]
    assert list(inflated.state_dict()) == kept


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [("alexnet", 64), ("vgg11", 32), ("googlenet", 64), ("mobilenet_v3_small", 64), ("densenet121", 64),
     ("efficientnet_b0", 64), ("mnasnet0_5", 64), ("regnet_y_400mf", 64), ("resnext50_32x4d", 64), ("vgg11_bn", 32),
     ("inception_v3", 139)],
)  # fmt: skip
def test_other_networks_of_torchvision_too(name, size):
    test_a_still_clip_gives_the_output_of_its_picture(name, size)


def test_an_inflated_kernel_is_the_mean_over_time_of_its_own_extent():
    torch.manual_seed(0)
    flat = nn.Conv2d(2, 4, 3, stride=2, padding=1).double()
    clip = torch.rand(1, 2, 6, 9, 9, dtype=torch.float64)
    found = InflatedConv(flat, 3)(clip)
    each = torch.stack([flat(clip[:, :, k]) for k in (0, *range(6), 5)], dim=2)  # the end frames twice
    expected = torch.stack([each[:, :, k : k + 3].mean(2) for k in range(6)], dim=2)
    torch.testing.assert_close(found, expected)


def test_inflation_leaves_the_given_network_alone_and_only_wide_kernels_see_time():
    network = models.resnet50(weights=None)
    inflated = inflate(network, frames=3)
    assert network.conv1.weight.ndim == 4
    assert inflated.conv1.weight.shape == (64, 3, 3, 7, 7)
    assert inflated.layer1[0].conv1.weight.shape == (64, 64, 1, 1, 1)
    assert inflated.training


@pytest.mark.parametrize(
    ("network", "frames", "message"),
    [
        (nn.Conv2d(1, 1, 3), 2, "frames=2 must be an odd number"),
        (nn.Sequential(nn.InstanceNorm2d(3)), None, "a InstanceNorm2d cannot be inflated"),
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), None, "pads with reflect cannot be inflated"),
    ],
)
def test_what_cannot_be_inflated_is_refused(network, frames, message):
    with pytest.raises(ValueError, match=message):
        inflate(network, frames)


def test_i3d_is_the_picture_network_on_a_still_clip(tmp_path):
    torch.manual_seed(0)
    theirs = random_statistics(models.resnet18(weights=None))
    torch.save(theirs.state_dict(), tmp_path / "pictures.pth")
    blocks = {"non_local": ["layer2.1", "layer3.1"], "affinity": "dot_product"}
    path = str(tmp_path / "pictures.pth")
    model = I3D("resnet18", 5, frames=4, image_size=64, backbone_weights=path, **blocks).eval()
    theirs.fc = nn.Identity()
    picture = torch.rand(2, 3, 64, 64)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, None, :, None, None]
    expected = theirs((picture - mean) / std)
    torch.testing.assert_close(model.backbone(still(picture, 4)), expected, rtol=1e-4, atol=1e-4)
    assert "norm" in dict(model.backbone.network.trunk.layer2[1][1].named_children()), "the block is there"


def test_a_moving_clip_gives_another_output_than_its_frames():
    torch.manual_seed(0)
    model = I3D("small", 5, frames=4, image_size=32).eval()
    clips = torch.rand(1, 3, 4, 32, 32)
    frames = torch.stack([model.backbone(still(clips[:, :, k], 4)) for k in range(4)]).mean(0)
    assert F.mse_loss(model.backbone(clips), frames) > 0
