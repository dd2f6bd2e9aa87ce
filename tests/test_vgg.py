"""VGG against torchvision's and the lecture's figures."""

import pytest
import torch
from torchvision import models

from zoo import VGG
from zoo.layer_table import layer_table

PARAMETERS = {  # torchvision's documentation of its weights: num_params
    (11, False): 132_863_336,
    (11, True): 132_868_840,
    (13, False): 133_047_848,
    (13, True): 133_053_736,
    (16, False): 138_357_544,
    (16, True): 138_365_992,
    (19, False): 143_667_240,
    (19, True): 143_678_248,
}


@pytest.mark.parametrize(("depth", "batch_norm"), PARAMETERS)
def test_shapes_are_torchvisions(depth, batch_norm):
    """Every tensor, by name, and the number of parameters."""
    with torch.device("meta"):
        ours = VGG(depth, batch_norm)
        theirs = getattr(models, ours.published.builder)(weights=None)
    renamed = ours.published.rename({key: value for key, value in theirs.state_dict().items()})
    own = ours.state_dict()
    assert {key: value.shape for key, value in renamed.items()} == {key: value.shape for key, value in own.items()}
    assert sum(p.numel() for p in ours.parameters()) == PARAMETERS[depth, batch_norm]


def test_torchvisions_checkpoint_gives_the_same_outputs(published_outputs):
    published_outputs(models.vgg11_bn(weights=None), VGG, {"depth": 11, "batch_norm": True}, 64)


def test_layer_table_of_vgg16_is_the_lectures():
    """Lecture 8 counts the input of 224x224 down to 28x28 as 42.9 MB, 1.1 M parameters and 7485 MFLOP.

    These are the sums of conv1_1 to conv3_2 alone: conv3_3 and the pools are left out.
    """
    with torch.device("meta"):
        rows = layer_table(VGG(16), torch.zeros(1, 3, 224, 224))
    convolutions = [row for row in rows if row.kind == "Conv2d"]
    assert [row.output[0] for row in convolutions] == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    millions = [86.7, 1849.7, 924.8, 1849.7, 924.8, 1849.7, 1849.7, 924.8, 1849.7, 1849.7, 462.4, 462.4, 462.4]
    assert [round(row.multiply_adds / 1e6, 1) for row in convolutions] == millions
    slide = convolutions[:6]
    assert round(sum(row.multiply_adds for row in slide) / 1e6) == 7485
    assert round(sum(row.memory_kb for row in slide) / 1024, 1) == 42.9
    assert round(sum(row.parameters for row in slide) / 1e6, 1) == 1.1
    until_28 = rows[: next(i for i, row in enumerate(rows) if row.output[1:] == (28, 28)) + 1]
    assert round(sum(row.multiply_adds for row in until_28) / 1e6) == 9341  # what the slide should say
    with_weights = [row for row in rows if row.kind in ("Conv2d", "Linear")]
    assert round(sum(row.multiply_adds for row in with_weights) / 1e9, 2) == 15.47
    assert sum(row.parameters for row in rows) == 138_357_544


def test_a_narrow_one_for_small_pictures():
    model = VGG(11, True, num_classes=5, stem="small", width=0.125, hidden=16).eval()
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 5)


def test_an_unknown_depth_is_refused():
    with pytest.raises(ValueError, match="no VGG of depth 12: there are 11, 13, 16, 19"):
        VGG(12)
