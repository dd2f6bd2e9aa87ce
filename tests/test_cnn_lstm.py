"""CNN + LSTM against its formula in float64, frame after frame."""

import pytest
import torch

from zoo.cnn_lstm import CNNLSTM


def small(**arguments):
    return CNNLSTM("small", num_classes=5, hidden=6, frames=4, image_size=16, **arguments)


def test_a_clip_is_read_frame_after_frame():
    torch.manual_seed(0)
    model = small().eval().double()
    clips = torch.rand(2, 3, 4, 16, 16, dtype=torch.float64)
    cell = model.head.cell
    h = c = torch.zeros(2, 6, dtype=torch.float64)
    for k in range(4):
        trunk = model.backbone.network.trunk
        features = trunk((clips[:, :, k] - 0.5) / 0.5).mean((2, 3))
        h, c = cell.step(features, h, c)
    torch.testing.assert_close(model(clips), model.head.scores(h))


def test_any_number_of_frames_runs_and_their_order_counts():
    torch.manual_seed(0)
    model = small().eval()
    clips = torch.rand(2, 3, 7, 16, 16)
    assert model(clips).shape == (2, 5)
    assert not torch.allclose(model(clips), model(clips.flip(2)))


def test_it_starts_from_a_classifier_of_pictures(tmp_path):
    from torchvision import models

    torch.manual_seed(0)
    theirs = models.squeezenet1_0(weights=None).eval()
    torch.save(theirs.state_dict(), tmp_path / "pictures.pth")
    path = str(tmp_path / "pictures.pth")
    model = CNNLSTM("squeezenet1_0", 5, hidden=6, image_size=32, backbone_weights=path).eval()
    clips = torch.rand(1, 3, 2, 32, 32)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, None, :, None, None]
    expected = theirs.features((clips[:, :, 1] - mean) / std).mean((2, 3))
    torch.testing.assert_close(model.backbone(clips[:, :, 1]), expected, rtol=1e-4, atol=1e-5)


def test_places_keep_where_things_are():
    torch.manual_seed(0)
    model = small(places=2).eval()
    pictures = torch.rand(3, 3, 32, 32)
    features = model.backbone.network.trunk((pictures - 0.5) / 0.5)  # (3, 128, 4, 4)
    quarters = [features[:, :, y : y + 2, x : x + 2].mean((2, 3)) for y in (0, 2) for x in (0, 2)]
    torch.testing.assert_close(model.backbone(pictures), torch.stack(quarters, 2).flatten(1))
    moved = model.head(model.backbone(pictures.flip(3))[None]), model.head(model.backbone(pictures)[None])
    assert not torch.allclose(*moved, atol=1e-5)
    with pytest.raises(ValueError, match="places=0 must be at least 1"):
        small(places=0)
