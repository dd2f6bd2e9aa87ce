"""Voxel IoU and scores of points against boxes, balls and cases whose numbers follow from a formula."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import tensor

from zoo.tasks.shape_scores import point_scores, voxel_iou

trimesh = pytest.importorskip("trimesh")
pytest.importorskip("embreex")


def made(mesh, shift=(0, 0, 0)):
    return torch.tensor(np.array(mesh.vertices)).float() + tensor(shift).float(), torch.tensor(np.array(mesh.faces))


def box(low, high):
    low, high = np.array(low, dtype=float), np.array(high, dtype=float)
    return made(trimesh.creation.box(high - low), (low + high) / 2)


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_two_boxes_share_what_the_formula_says(scale):
    away = -0.8  # where a camera sees them
    one = box([0, 0, away], [2 * scale, 2 * scale, away + 2 * scale])
    other = box([scale, scale, away], [3 * scale, 3 * scale, away + 2 * scale])
    # Each has 8, both share 1 x 1 x 2; the box around both is of 3 x 3 x 2, and 33 cells along it make this exact.
    assert voxel_iou(one, other, cells=33) == pytest.approx(2 / 14)
    assert voxel_iou(one, other) == pytest.approx(2 / 14, abs=0.02)
    assert voxel_iou(other, one) == voxel_iou(one, other)
    assert voxel_iou(one, one) == 1


def test_a_ball_in_a_box_and_shapes_apart():
    ball = made(trimesh.creation.icosphere(4, 0.5))
    around = box([-0.5] * 3, [0.5] * 3)
    assert voxel_iou(ball, around, cells=48) == pytest.approx(math.pi / 6, rel=0.01)
    assert voxel_iou(ball, box([2, 2, 2], [3, 3, 3])) == 0


def test_what_is_missed_beyond_the_true_box_counts():
    # Eight times the volume around the truth: a grid over the true box alone would call it perfect.
    assert voxel_iou(box([-1] * 3, [1] * 3), box([-0.5] * 3, [0.5] * 3)) == pytest.approx(1 / 8)


def test_open_surfaces_and_wrong_numbers_are_told():
    closed = box([0] * 3, [1] * 3)
    with pytest.raises(ValueError, match="8 vertices and 11 triangles is not closed"):
        voxel_iou(closed, (closed[0], closed[1][:-1]))
    with pytest.raises(ValueError, match="cells=0 must be at least 1"):
        voxel_iou(closed, closed, cells=0)
    broken = closed[0].clone()
    broken[3, 1] = torch.nan
    assert math.isnan(voxel_iou((broken, closed[1]), closed))


def test_scores_of_points_by_hand():
    # Of three points two are within 0.01 of a true one; of two true ones one is within 0.01 of a point.
    points = tensor([[[0.0, 0, 0], [0.006, 0, 0], [0, 0.3, 0.4]]])
    true = tensor([[[0.0, 0, 0], [0, 0, 0.1]]])
    scores = point_scores(points, true)
    away = math.dist((0, 0.3, 0.4), (0, 0, 0.1))
    assert float(scores.chamfer_l1) == pytest.approx((0.006 + away) / 3 + 0.1 / 2)
    assert float(scores.chamfer_l2) == pytest.approx((0.006**2 + away**2) / 3 + 0.1**2 / 2)
    assert (float(scores.precision), float(scores.recall)) == pytest.approx((2 / 3, 1 / 2))
    assert float(scores.f1) == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))


def test_scores_of_points_are_brute_forces_and_nan_for_what_is_no_number():
    rng = np.random.default_rng(0)
    points, true = rng.normal(size=(3, 70, 3)), rng.normal(size=(3, 50, 3))
    scores = point_scores(torch.tensor(points), torch.tensor(true), radius=0.5)
    for n in range(3):
        each = cdist(points[n], true[n])
        assert float(scores.chamfer_l1[n]) == pytest.approx(each.min(1).mean() + each.min(0).mean())
        assert float(scores.chamfer_l2[n]) == pytest.approx((each.min(1) ** 2).mean() + (each.min(0) ** 2).mean())
        assert float(scores.precision[n]) == pytest.approx((each.min(1) <= 0.5).mean())
        assert float(scores.recall[n]) == pytest.approx((each.min(0) <= 0.5).mean())
    assert all(bool((score[1] > 0) & (score[1] < 9)) for score in scores)
    points[1, 4] = np.nan
    broken = point_scores(torch.tensor(points), torch.tensor(true))
    assert all(score.isnan().tolist() == [False, True, False] for score in broken)
