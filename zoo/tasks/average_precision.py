"""The pieces of object detection, step by step as EECS498 lecture 15 shows them.

Overlap of boxes, non-maximum suppression, matching of detections to objects, the precision-recall curve, average
precision. All of it is plain and for reading; :mod:`zoo.tasks.coco_evaluation` is what the tasks evaluate with, and
:func:`torchvision.ops.nms` what the detectors suppress with. Boxes are (x1, y1, x2, y2) in pixels.
"""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Interpolation = Literal["area", "11_points", "101_points"]


def iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of every box with every other one, the lecture's measure of how well two boxes agree.

    Args:
        boxes: (N, 4) as (x1, y1, x2, y2), in any unit.
        others: (M, 4) in the same unit.

    Returns:
        (N, M) in [0, 1]; 0 where neither box has an area.
    """
    top_left = torch.maximum(boxes[:, None, :2], others[None, :, :2])  # (N, M, 2)
    bottom_right = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    intersection = (bottom_right - top_left).clamp_min(0).prod(2)  # (N, M)
    union = _areas(boxes)[:, None] + _areas(others)[None, :] - intersection
    return torch.where(union > 0, intersection / union, 0)


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression: of boxes that overlap by more than ``threshold``, only the one with the best score.

    The lecture's loop: take the best box that is left, drop what overlaps it too much, and again until none is left.
    Of equal scores the first is taken first.

    Args:
        boxes: (N, 4) as (x1, y1, x2, y2); a box without area overlaps nothing.
        scores: (N,), higher is better.
        threshold: Intersection over union above which a box is dropped.

    Returns:
        Indices of the boxes that are kept, int64, the best first.

    Raises:
        ValueError: A box or a score is NaN or infinite: such a box could not be compared with any other.
    """
    if not (boxes.isfinite().all() and scores.isfinite().all()):
        raise ValueError("nms wants finite boxes and scores; at least one is NaN or infinite")
    left = scores.argsort(descending=True, stable=True)
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        left = left[iou(boxes[best][None], boxes[left])[0] <= threshold]
    return torch.stack(kept) if kept else left


def match_detections(boxes: Tensor, scores: Tensor, truths: Tensor, threshold: float = 0.5) -> Tensor:
    """Which detections of one class in one image are correct.

    From the best score to the worst, each detection takes the object that it overlaps most among those that are still
    free; it is correct if that overlap is ``threshold`` or more. Each object is used once: a second detection of it is
    wrong.

    Args:
        boxes: Detections (N, 4) as (x1, y1, x2, y2).
        scores: (N,), higher is better; of equal ones the first comes first.
        truths: True boxes (M, 4).
        threshold: Intersection over union from which on a detection counts.

    Returns:
        Boolean (N,) in the order of ``boxes``.
    """
    correct = torch.zeros(len(boxes), dtype=torch.bool)
    overlaps = iou(boxes.cpu().double(), truths.cpu().double())  # (N, M); float64 as pycocotools has it
    free = torch.ones(len(truths), dtype=torch.bool)
    for detection in scores.argsort(descending=True, stable=True).tolist():
        candidates = torch.where(free, overlaps[detection], -1.0)
        if free.any() and candidates.max() >= threshold:
            correct[detection] = True
            free[(candidates == candidates.max()).nonzero()[-1]] = False  # of equal ones the last, as pycocotools does
    return correct


def precision_recall(scores: Tensor, correct: Tensor, positives: int) -> tuple[Tensor, Tensor]:
    """The precision-recall curve of one class: after each detection, the best score first.

    Args:
        scores: Of all detections of the class in all images (N,).
        correct: Which of them are, boolean (N,).
        positives: How many objects of the class there are in all images.

    Returns:
        Precision (N,): the share of the detections so far that are correct; and recall (N,): the share of the objects
        that are found so far, NaN where there is no object. Both float64 on the CPU.
    """
    hits = correct[scores.argsort(descending=True, stable=True)].cpu().double().cumsum(0)
    seen = torch.arange(1, len(hits) + 1, dtype=torch.float64)
    return hits / seen, hits / (positives if positives else float("nan"))


def average_precision(precision: Tensor, recall: Tensor, interpolation: Interpolation = "area") -> float:
    """The area under a precision-recall curve, after each precision was raised to the best at that recall or beyond.

    Args:
        precision: (N,) as :func:`precision_recall` gives it.
        recall: (N,), rising.
        interpolation: ``area``: the exact area, as Pascal VOC from 2010 on (development kit, section 3.4.1).
            ``11_points``: the mean at recall 0, 0.1, …, 1, as Pascal VOC 2007 (Everingham et al., "The Pascal Visual
            Object Classes Challenge", 2010, section 4.2). ``101_points``: the mean at recall 0, 0.01, …, 1, as COCO.

    Returns:
        In [0, 1]: 0 without detections, NaN without objects, which only ``recall`` knows.
    """
    if recall.isnan().any():
        return float("nan")
    best = precision.flip(0).cummax(0).values.flip(0) if len(precision) else precision
    if interpolation == "area":
        steps = torch.diff(recall, prepend=recall.new_zeros(1))
        return float((steps * best).sum())
    points = {"11_points": 11, "101_points": 101}[interpolation]
    # numpy's in float64, as in COCO's own program: in float32 0.3 is another number than the recall 3 / 10, and the
    # result is off by some 1e-4.
    thresholds = torch.from_numpy(np.linspace(0, 1, points)).to(recall.device)
    places = torch.searchsorted(recall, thresholds)  # the first detection that reaches each recall
    return float(torch.cat([best, best.new_zeros(1)])[places].mean())


def mean_average_precision(
    predictions: list[dict[str, Any]],
    targets: list[dict[str, Any]],
    num_classes: int,
    threshold: float = 0.5,
    interpolation: Interpolation = "101_points",
) -> tuple[float, list[float]]:
    """Mean average precision at one overlap, step by step.

    With the defaults it is COCO's AP50, for sets without crowds and with at most 100 detections an image.

    Args:
        predictions: One dict an image: ``boxes`` (N, 4), ``scores`` (N,), ``labels`` (N,) in 1…num_classes.
        targets: One dict an image: ``boxes`` (M, 4), ``labels`` (M,) in 1…num_classes.
        num_classes: Number of classes without the background.
        threshold: Intersection over union from which on a detection is correct.
        interpolation: See :func:`average_precision`.

    Returns:
        The mean over the classes that have an object, NaN if none has; and each class's, NaN where it has no object.
    """
    each = []
    for label in range(1, num_classes + 1):
        scores, correct, positives = [torch.zeros(0)], [torch.zeros(0, dtype=torch.bool)], 0
        for prediction, target in zip(predictions, targets, strict=True):
            found, true = prediction["labels"] == label, target["labels"] == label
            boxes, score = prediction["boxes"][found], prediction["scores"][found].cpu()
            scores.append(score)
            correct.append(match_detections(boxes, score, target["boxes"][true], threshold))
            positives += int(true.sum())
        curve = precision_recall(torch.cat(scores), torch.cat(correct), positives)
        # Without a detection the curve has no point that could say that there is no object.
        each.append(average_precision(*curve, interpolation) if positives else float("nan"))
    known = [value for value in each if value == value]
    return (sum(known) / len(known) if known else float("nan")), each
