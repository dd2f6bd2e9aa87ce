"""C3D against the paper's sizes and a forward pass written out."""

import pytest
import torch
from torch.nn import functional as F

from zoo.c3d import C3D
from zoo.layer_table import layer_table


@pytest.mark.parametrize(("classes", "parameters"), [(487, 79_991_015), (101, 78_409_573)])
def test_parameters_are_the_papers(classes, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in C3D(classes).parameters()) == parameters


def test_layers_and_their_operations_are_the_papers():
    """Billions of multiply-adds of each convolution; 38.5 in all, which lecture 18 has as 39.5 GFLOP."""
    with torch.device("meta"):
        rows = layer_table(C3D(), torch.zeros(1, 3, 16, 112, 112))
    convolutions = [row for row in rows if row.kind == "Conv3d"]
    found = [row.multiply_adds / 1e9 for row in convolutions]
    assert found == pytest.approx([1.04, 11.1, 5.55, 11.1, 2.77, 5.55, 0.69, 0.69], rel=0.01)
    assert sum(found) == pytest.approx(38.5, abs=0.05)
    pools = [row.output for row in rows if row.kind == "MaxPool3d"]
    assert pools == [(64, 16, 56, 56), (128, 8, 28, 28), (256, 4, 14, 14), (512, 2, 7, 7), (512, 1, 4, 4)]


def test_a_narrow_one_is_the_formula():
    torch.manual_seed(0)
    model = C3D(num_classes=5, image_size=32, width=2, hidden=16).double().eval()
    clips = torch.rand(2, 3, 16, 32, 32, dtype=torch.float64)
    state = model.backbone.network.state_dict()
    x = (clips - 0.5) / 0.5
    names = [key.removesuffix(".weight") for key in state if key.startswith("features") and key.endswith("weight")]
    assert len(names) == 8
    for k, name in enumerate(names):
        x = F.conv3d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1).relu()
        if k in (0, 1, 3, 5, 7):
            last = (0, 1, 1) if k == 7 else 0
            x = F.max_pool3d(x, (1 if k == 0 else 2, 2, 2), padding=last)
    x = F.linear(x.flatten(1), state["fc6.weight"], state["fc6.bias"]).relu()
    x = F.linear(x, state["fc7.weight"], state["fc7.bias"]).relu()
    torch.testing.assert_close(model(clips), model.head(x))


def test_clips_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="clips of 8 frames and 32 pixels are too small for C3D"):
        C3D(frames=8, image_size=32, width=2, hidden=4)
