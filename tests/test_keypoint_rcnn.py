"""Keypoint R-CNN against torchvision's own from random weights, and keypoints against cases worked out by hand."""

import math

import pytest
import torch
from torch import nn

from zoo.keypoint_rcnn import KeypointRCNN

SIZES = {"min_size": 64, "max_size": 96}


def target(boxes, points, visible=1):
    """Each object has the same points (K, 2), all visible or none."""
    keypoints = torch.tensor([[[x, y, visible] for x, y in points]] * len(boxes)).view(len(boxes), len(points), 3)
    labels = torch.ones(len(boxes), dtype=torch.int64)
    return {"boxes": torch.tensor(boxes).view(-1, 4), "labels": labels, "keypoints": keypoints.float()}


def test_torchvisions_checkpoint_gives_the_same_detections_and_losses(same_as_published):
    points = [(20.0 + k, 55.0 - 2 * k) for k in range(17)]
    targets = [
        target([[5.0, 6.0, 50.0, 60.0], [10.0, 10.0, 80.0, 60.0]], points),
        target([[8.0, 20.0, 60.0, 90.0]], points),
    ]
    targets[0]["keypoints"][0, 4:9, 2] = 0
    same_as_published(KeypointRCNN, "resnet50", "keypointrcnn_resnet50_fpn", 59_137_258, targets)


@pytest.mark.parametrize(
    ("arguments", "fresh"),
    [
        ({"num_classes": 2}, {"head.box_predictor.cls_score": 3, "head.box_predictor.bbox_pred": 12}),
        ({"num_keypoints": 5}, {"head.keypoint_predictor.kps_score_lowres": 5}),
    ],
)
def test_others_replace_the_rows_that_they_are_about_and_nothing_else(arguments, fresh, published_detector):
    _, path = published_detector("keypointrcnn_resnet50_fpn", **SIZES)
    whole = KeypointRCNN(weights=path, **SIZES).state_dict()
    ours = KeypointRCNN(**arguments, weights=path, **SIZES).state_dict()
    assert ours.keys() == whole.keys()
    other = [key for key in ours if not torch.equal(ours[key], whole[key])]
    assert {key.rsplit(".", 1)[0] for key in other} == set(fresh)
    for key in other:
        layer, which = key.rsplit(".", 1)
        # A transposed convolution has its outputs in the second dimension.
        assert ours[key].shape[1 if "keypoint" in layer and which == "weight" else 0] == fresh[layer]


def small(num_keypoints=3, **arguments):
    torch.manual_seed(0)
    return KeypointRCNN(1, num_keypoints=num_keypoints, network="squeezenet1_0", **SIZES, **arguments)


def test_the_loss_without_knowledge_is_the_logarithm_of_the_maps_cells():
    """56 x 56 cells in which a point may lie, all alike; points that are not there or not in the box do not count."""
    model = small()
    for parameter in model.head.keypoint_predictor.parameters():
        nn.init.zeros_(parameter)
    model.head.proposal_matcher.high_threshold = 1.0  # the true box alone is looked at
    box, inside = [[8.0, 8.0, 40.0, 40.0]], [(10.0, 12.0), (30.0, 39.0), (8.5, 20.0)]
    for points, visible, expected in (
        (inside, 1, math.log(56 * 56)),
        (inside, 2, math.log(56 * 56)),
        ([*inside[:2], (50.0, 50.0)], 1, math.log(56 * 56)),
        (inside, 0, 0.0),
        ([(50.0, 50.0)] * 3, 1, 0.0),
    ):
        loss = model.losses([torch.rand(3, 64, 64)], [target(box, points, visible)])["loss_keypoint"]
        assert loss.item() == pytest.approx(expected, abs=1e-5)


class Peaks(nn.Module):
    """Sure of one cell for each keypoint."""

    def __init__(self, cells):
        super().__init__()
        self.cells = cells

    def forward(self, x):
        logits = torch.zeros(len(x), len(self.cells), 56, 56)
        for k, (row, column) in enumerate(self.cells):
            logits[:, k, row, column] = 30.0
        return logits


def test_the_loss_of_points_where_they_are_expected_is_nothing():
    """In a box of 28 pixels each pixel has two of the 56 cells."""
    model = small()
    model.head.proposal_matcher.high_threshold = 1.0
    model.head.keypoint_predictor = Peaks([(0, 4), (21, 30), (55, 55)])
    image, box = torch.rand(3, 64, 64), [[8.0, 8.0, 36.0, 36.0]]
    right = [(10.2, 8.1), (23.4, 18.6), (35.9, 35.6)]
    assert model.losses([image], [target(box, right)])["loss_keypoint"] < 1e-6
    wrong = [right[0], right[1], (20.0, 20.0)]
    assert model.losses([image], [target(box, wrong)])["loss_keypoint"].item() == pytest.approx(30 / 3, abs=1e-4)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (150, 200)])
def test_keypoints_lie_in_their_boxes_in_the_images_own_pixels(height, width):
    model = small(score_threshold=0.0, detections=30).eval()
    cells = [(0, 0), (28, 14), (55, 42)]
    model.head.keypoint_predictor = Peaks(cells)
    with torch.no_grad():
        (found,) = model([torch.rand(3, height, width)])
    expected = torch.tensor([[(column + 0.5) / 56, (row + 0.5) / 56] for row, column in cells])
    sides = (found["boxes"][:, 2:] - found["boxes"][:, :2])[:, None]
    places = found["boxes"][:, None, :2] + expected * sides
    points = found["keypoints"]
    assert (points[..., 2] == 1).all()
    pixel = height / 64  # of the resized image, in which the map is drawn over the box
    large = (sides > 28 * pixel).all(2)[:, 0]  # of smaller ones not every cell of the map is looked at
    assert large.sum() > 3
    assert ((points[..., :2] - places).abs() < pixel)[large].all()
    assert found["keypoints_scores"].shape == points.shape[:2]


def test_images_without_objects_have_losses_and_teach_no_keypoints():
    model = small()
    none = target([], [(0.0, 0.0)] * 3)
    losses = model.losses([torch.rand(3, 64, 64)] * 2, [none, none])
    assert set(losses) == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_keypoint"}
    assert losses["loss_keypoint"] == losses["loss_box_reg"] == 0
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    mixed = model.losses([torch.rand(3, 64, 64)] * 2, [none, target([[8.0, 8.0, 40.0, 40.0]], [(20.0, 20.0)] * 3)])
    assert all(value.isfinite() for value in mixed.values())
    assert mixed["loss_keypoint"] > 0
