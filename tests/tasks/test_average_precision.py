"""The lecture's pieces against torchvision, pycocotools and cases computed by hand."""

import contextlib
import io
import math

import numpy as np
import pytest
import torch
from torch import tensor
from torchvision.ops import box_iou
from torchvision.ops import nms as torchvisions_nms

from zoo.tasks.average_precision import (
    average_precision,
    iou,
    match_detections,
    mean_average_precision,
    nms,
    precision_recall,
)


def random_boxes(count, generator, size=100.0):
    corners = torch.rand(count, 2, 2, generator=generator) * size
    return torch.cat([corners.amin(1), corners.amax(1)], dim=1)


def test_iou_by_hand_and_as_torchvision_has_it():
    square = tensor([[0.0, 0.0, 2.0, 2.0]])
    others = tensor([[1.0, 0.0, 3.0, 2.0], [0.0, 0.0, 2.0, 2.0], [2.0, 0.0, 4.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(iou(square, others), tensor([[1 / 3, 1, 0, 0]]))
    generator = torch.Generator().manual_seed(0)
    one, other = random_boxes(50, generator), random_boxes(60, generator)
    torch.testing.assert_close(iou(one, other), box_iou(one, other))
    assert iou(torch.zeros(0, 4), other).shape == (0, 60)
    assert iou(one, torch.zeros(0, 4)).shape == (50, 0)


def test_two_boxes_without_area_do_not_overlap():
    point = tensor([[1.0, 1.0, 1.0, 1.0]])
    assert iou(point, point).item() == 0


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_nms_keeps_what_torchvision_keeps(threshold):
    generator = torch.Generator().manual_seed(1)
    for count in (0, 1, 2, 30, 200):
        boxes, scores = random_boxes(count, generator, 30.0), torch.rand(count, generator=generator)
        assert nms(boxes, scores, threshold).tolist() == torchvisions_nms(boxes, scores, threshold).tolist()


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5, 0.75])
def test_nms_of_degenerate_boxes_with_equal_scores_is_torchvisions(threshold):
    """Corners on a coarse grid: boxes without area, the same box again, overlaps that are the threshold itself."""
    generator = torch.Generator().manual_seed(2)
    boxes = random_boxes(300, generator, 5.0).floor()
    scores = torch.randint(3, (300,), generator=generator) / 2
    assert (boxes[:, 0] == boxes[:, 2]).any()
    kept = nms(boxes, scores, threshold)
    assert kept.tolist() == torchvisions_nms(boxes, scores, threshold).tolist()
    assert kept.dtype == torch.int64


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nms_refuses_what_cannot_be_compared(bad):
    boxes, scores = tensor([[0.0, 0.0, 1.0, 1.0]] * 2), tensor([0.5, 0.6])
    with pytest.raises(ValueError, match="NaN or infinite"):
        nms(boxes, tensor([0.5, bad]), 0.5)
    boxes[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        nms(boxes, scores, 0.5)


def test_each_truth_is_used_once_and_by_the_best_score():
    truths = tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]])
    boxes = tensor([[0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 5.0], [50.0, 0.0, 60.0, 10.0]])
    scores = tensor([0.9, 0.8, 0.7, 0.6])
    assert match_detections(boxes, scores, truths).tolist() == [True, False, True, False]
    assert match_detections(boxes, scores, truths, threshold=0.51).tolist() == [True, False, False, False]
    assert match_detections(boxes, scores.flip(0), truths).tolist() == [False, True, True, False]
    assert match_detections(boxes, scores, torch.zeros(0, 4)).tolist() == [False] * 4
    assert match_detections(torch.zeros(0, 4), torch.zeros(0), truths).tolist() == []


def test_the_lectures_example_of_average_precision():
    """Five detections of three dogs: right, right, wrong, wrong, right; lecture 15 draws this curve."""
    scores, correct = tensor([0.99, 0.95, 0.90, 0.5, 0.10]), tensor([True, True, False, False, True])
    precision, recall = precision_recall(scores, correct, positives=3)
    torch.testing.assert_close(precision, tensor([1, 1, 2 / 3, 1 / 2, 3 / 5], dtype=torch.float64))
    torch.testing.assert_close(recall, tensor([1 / 3, 2 / 3, 2 / 3, 2 / 3, 1], dtype=torch.float64))
    assert average_precision(precision, recall) == pytest.approx(2 / 3 + 0.6 / 3)
    assert average_precision(precision, recall, "11_points") == pytest.approx((7 * 1 + 4 * 0.6) / 11)
    assert average_precision(precision, recall, "101_points") == pytest.approx((67 * 1 + 34 * 0.6) / 101)


def test_the_curve_sorts_and_raises_precision_to_the_best_beyond():
    precision, recall = precision_recall(tensor([0.1, 0.9, 0.5]), tensor([True, False, True]), positives=4)
    assert precision.tolist() == pytest.approx([0, 1 / 2, 2 / 3])
    assert recall.tolist() == [0, 0.25, 0.5]
    assert average_precision(precision, recall) == pytest.approx(2 / 3 * 0.5)


@pytest.mark.parametrize("interpolation", ["area", "11_points", "101_points"])
def test_nothing_found_is_zero_all_found_is_one_and_nothing_to_find_is_no_number(interpolation):
    none = torch.zeros(0), torch.zeros(0, dtype=torch.bool)
    assert average_precision(*precision_recall(*none, positives=3), interpolation) == 0
    everything = torch.rand(3), torch.ones(3, dtype=torch.bool)
    assert average_precision(*precision_recall(*everything, positives=3), interpolation) == 1
    wrong = torch.rand(3), torch.zeros(3, dtype=torch.bool)
    assert math.isnan(average_precision(*precision_recall(*wrong, positives=0), interpolation))
    boxes = torch.zeros(0, 4)
    nothing = {"boxes": boxes, "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    mean, each = mean_average_precision([nothing], [nothing], 2, interpolation=interpolation)
    assert math.isnan(mean)
    assert all(math.isnan(value) for value in each)


def test_thresholds_of_recall_are_cocos_in_float64():
    """3 of 10 objects found, all right: recall 0.3 itself is reached, so that 31 of the 101 points count."""
    curve = precision_recall(torch.rand(3), torch.ones(3, dtype=torch.bool), positives=10)
    assert average_precision(*curve, "101_points") == pytest.approx(31 / 101, abs=1e-12)


def noisy(generator, images=12, classes=4):
    """Truths, and detections that are near them, doubled, wrong in class or nowhere near."""
    predictions, targets = [], []
    for _ in range(images):
        count = int(torch.randint(0, 7, (1,), generator=generator))
        truths = random_boxes(count, generator)
        labels = torch.randint(1, classes, (count,), generator=generator)  # the last class has no truth
        near = torch.cat([truths, truths]) + torch.randn(2 * count, 4, generator=generator) * 4
        boxes = torch.cat([near, random_boxes(5, generator)])
        boxes = torch.cat([boxes[:, :2], torch.maximum(boxes[:, :2], boxes[:, 2:])], dim=1)
        found = torch.cat([labels, labels, torch.randint(1, classes + 1, (5,), generator=generator)])
        scores = (torch.rand(len(boxes), generator=generator) * 20).round() / 20  # many are equal
        predictions.append({"boxes": boxes, "labels": found, "scores": scores})
        targets.append({"boxes": truths, "labels": labels})
    return predictions, targets


def pycocotools_precision(predictions, targets, classes, kinds="bbox"):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def annotations(sides):
        for image, side in enumerate(sides):
            for i, (x1, y1, x2, y2) in enumerate(side["boxes"].double().tolist()):
                annotation = {"image_id": image, "category_id": side["labels"][i].item(), "iscrowd": 0}
                annotation |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
                yield annotation | ({"score": side["scores"][i].item()} if "scores" in side else {})

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i} for i in range(len(targets))],
            "categories": [{"id": k} for k in range(1, classes + 1)],
            "annotations": [annotation | {"id": n} for n, annotation in enumerate(annotations(targets), 1)],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(list(annotations(predictions))), kinds)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][:, :, :, 0, -1]  # (overlaps, recalls, classes)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("place", "threshold"), [(0, 0.5), (5, 0.75)])
def test_step_by_step_it_is_pycocotools_average_precision(seed, place, threshold):
    predictions, targets = noisy(torch.Generator().manual_seed(seed))
    theirs = pycocotools_precision(predictions, targets, 4)[place].mean(0)
    mean, each = mean_average_precision(predictions, targets, 4, threshold)
    assert each[:3] == pytest.approx(theirs[:3], abs=1e-9)
    assert theirs[3] == -1
    assert math.isnan(each[3])
    assert mean == pytest.approx(np.mean(theirs[:3]), abs=1e-9)
    assert 0.01 < mean < 0.9
