"""The lecture's small networks against its table: sizes, parameters, and what a value of each layer sees."""

import pytest
import torch
from torch import nn

from zoo.frame_fusion import FrameFusion
from zoo.layer_table import layer_table

FUSIONS = ["single_frame", "late_pool", "late_fc", "early", "slow"]


def backbone(fusion, **arguments):
    return FrameFusion(fusion, **arguments).backbone.network


@pytest.mark.parametrize(
    ("fusion", "parameters"), [("single_frame", 2952), ("late_pool", 2952), ("early", 9108), ("slow", 8784)]
)
def test_parameters_are_the_lectures(fusion, parameters):
    """Those of clips of 20 frames, without the classifier; the slide's early fusion has 3 * 20 input channels."""
    assert sum(p.numel() for p in backbone(fusion).parameters()) == parameters


@pytest.mark.parametrize(
    ("fusion", "sizes"),
    [
        ("late_pool", [(20, 12, 64, 64), (20, 12, 16, 16), (20, 24, 16, 16)]),  # the frames come first
        ("early", [(12, 64, 64), (12, 16, 16), (24, 16, 16)]),
        ("slow", [(12, 20, 64, 64), (12, 5, 16, 16), (24, 5, 16, 16)]),
    ],
)
def test_sizes_are_the_lectures(fusion, sizes):
    with torch.device("meta"):
        rows = layer_table(backbone(fusion), torch.zeros(1, 3, 20, 64, 64))
    assert [row.output for row in rows[:3]] == sizes
    assert rows[3].output[-2:] == (1, 1) or rows[3].output[-1:] == (1,)


def seen(layers, clip):
    """Frames, rows and columns of a clip that a value in the middle of the layers' output depends on."""
    clip = clip.clone().requires_grad_()
    output = layers(clip)
    middle = tuple(size // 2 for size in output.shape[2:])
    output[(0, 0, *middle)].backward()
    return clip.grad


@pytest.mark.parametrize(
    ("fusion", "fields"),
    [
        ("late_pool", [(1, 3, 3), (1, 6, 6), (1, 14, 14)]),
        ("early", [(20, 3, 3), (20, 6, 6), (20, 14, 14)]),
        ("slow", [(3, 3, 3), (6, 6, 6), (14, 14, 14)]),
    ],
)
def test_receptive_fields_are_the_lectures(fusion, fields):
    """Measured: where the gradient of a value in the middle is not 0, pools taken for means so that it reaches all."""
    network = backbone(fusion)
    layers = {"late_pool": lambda: network.frames.layers, "early": lambda: network.layers[0], "slow": lambda: network}[
        fusion
    ]()
    whole = [nn.AvgPool3d(4) if isinstance(m, nn.MaxPool3d) else nn.AvgPool2d(4) if isinstance(m, nn.MaxPool2d) else m
             for m in layers]  # fmt: skip
    for module in whole:
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.ones_(module.weight)  # so that the rectifiers let all through
    for last, field in zip((1, 3, 4), fields, strict=True):
        part = nn.Sequential(*whole[:last])
        if fusion == "slow":
            gradient = seen(part, torch.ones(1, 3, 20, 64, 64))[0].abs().sum(0)  # (T, H, W)
        else:
            channels = 60 if fusion == "early" else 3
            gradient = seen(part, torch.ones(1, channels, 64, 64))[0].abs()
            gradient = gradient.unflatten(0, (3, -1)).sum(0)
        found = [int((gradient.sum([d for d in range(3) if d != axis]) > 0).sum()) for axis in range(3)]
        assert tuple(found) == field


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_order_of_frames_counts_where_it_can(fusion):
    torch.manual_seed(0)
    model = FrameFusion(fusion, num_classes=5).eval()
    clips = torch.rand(2, 3, 20, 64, 64)
    same = torch.allclose(model(clips), model(clips.flip(2)), atol=1e-5)
    assert same == (fusion in ("single_frame", "late_pool"))


def test_single_frames_average_probabilities_and_learn_each_by_itself():
    torch.manual_seed(0)
    model = FrameFusion("single_frame", num_classes=5, frames=4, image_size=8).eval()
    clips, labels = torch.rand(3, 3, 4, 8, 8), torch.tensor([1, 4, 0])
    frames = torch.stack([model(clips[:, :, k : k + 1]).softmax(1) for k in range(4)])
    torch.testing.assert_close(model(clips).softmax(1), frames.mean(0))
    loss, logits = model.training_loss(clips, labels)
    torch.testing.assert_close(loss, -frames[:, torch.arange(3), labels].log().mean())
    torch.testing.assert_close(logits, model(clips))


def test_early_fusion_is_a_3d_kernel_as_long_as_the_clip_in_float64():
    network = backbone("early", frames=6, image_size=8).double()
    clips = torch.rand(2, 3, 6, 8, 8, dtype=torch.float64)
    conv = network.layers[0][0]
    whole = nn.functional.conv3d(clips, conv.weight.unflatten(1, (3, 6)), conv.bias, padding=(0, 1, 1))
    torch.testing.assert_close(conv(clips.flatten(1, 2)), whole[:, :, 0])


def test_an_unknown_fusion_is_refused():
    with pytest.raises(ValueError, match="fusion=middle must be one of single_frame, late_pool, late_fc, early, slow"):
        FrameFusion("middle")
