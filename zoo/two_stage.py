"""The two-stage detector of assignment 5: a network proposes boxes, a second one says what is in each of them.

Course: EECS 498-007, lectures 15 and 16, "Faster R-CNN", and assignment 5, "Two-stage object detector". Paper: Ren et
al., 2015, Faster R-CNN, https://arxiv.org/abs/1506.01497, of which this is the plainest form: one map, nine anchors in
each cell, no background class and no second correction of the boxes. Backbone, anchors and pictures are those of
:mod:`zoo.single_stage`; the boxes are not: here an anchor's centre moves by shares of its own sides.

What differs from the assignment: an anchor that is taught an object is never drawn as a negative as well (the paper's
rule, section 3.1.2), and proposals are cut at the picture's edges in training as in detection, since RoIAlign takes
more samples the larger a box is and an untrained network may propose any.
"""

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torchvision.ops import box_convert, nms, roi_align

from zoo.arguments import plain_arguments
from zoo.running.optimizing import SchedulerCallable
from zoo.single_stage import (
    ANCHORS,
    PUBLISHED,
    STRIDE,
    all_overlaps,
    best_overlaps,
    centres_and_sides,
    check_labels,
    grid_anchors,
    last_channels,
    mobilenet_features,
    pictures_of,
    sample,
    squash,
    to_pixels,
    truths_in_cells,
)
from zoo.standardization import IMAGENET_MEAN, IMAGENET_STD, standardized
from zoo.tasks.detection import Detections, DetectionTask, Target
from zoo.weights import load_trunk, load_weights

BOX_WEIGHT = 5.0  # of the loss of the offsets, to that of the scores and that of the classes
REGION = 2  # RoIAlign's values a side


# The network


class ProposalHead(nn.Module):
    """The region proposal network on a map (N, C, S, S): for each anchor two scores and four offsets.

    Args:
        in_channels: Channels of the backbone's map.
        anchors: Anchors A of each cell.
        dropout: Share of the 256 hidden values that are dropped.
    """

    def __init__(self, in_channels: int, anchors: int, dropout: float) -> None:
        super().__init__()
        self.anchors = anchors
        self.hidden = nn.Sequential(nn.Conv2d(in_channels, 256, 3, padding=1), nn.Dropout(dropout), nn.LeakyReLU(0.01))
        self.output = nn.Conv2d(256, 6 * anchors, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Map (N, C, S, S) to scores and offsets.

        Returns:
            Scores (N, A, S, S, 2), before the sigmoid, of there being an object and of there being none; offsets
            (N, A, S, S, 4) of :func:`stretch`.
        """
        maps = self.output(self.hidden(features)).float().unflatten(1, (self.anchors, 6))  # (N, A, 6, S, S)
        maps = maps.permute(0, 1, 3, 4, 2)
        return maps[..., :2], maps[..., 2:]


class RegionHead(nn.Module):
    """The second stage: what is in each box of a map.

    Only ``classes`` depends on the classes; for others it is replaced and all else is kept.

    Args:
        in_channels: Channels of the backbone's map.
        num_classes: Number of classes.
        dropout: Share of the 256 hidden values that are dropped.
    """

    def __init__(self, in_channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(in_channels, 256), nn.Dropout(dropout), nn.ReLU())
        self.classes = nn.Linear(256, num_classes)

    def forward(self, features: Tensor, boxes: Tensor, picture: Tensor) -> Tensor:
        """Logits (R, num_classes) of boxes (R, 4) as :func:`region_features` takes them, of the boxes' type."""
        return cast(Tensor, self.classes(self.hidden(region_features(features, boxes, picture)))).to(boxes)


def region_features(features: Tensor, boxes: Tensor, picture: Tensor) -> Tensor:
    """The mean over each box of RoIAlign's 2x2 values.

    RoIAlign's kernel has no gradient to the boxes: what is learnt from these values goes into the map. Its replacement
    in deterministic mode on a GPU has one, so that boxes should come detached.

    Args:
        features: Maps (N, C, S, S).
        boxes: (R, 4), xyxy in cells; R may be 0.
        picture: The number (R,) of the map of each box.

    Returns:
        (R, C), of the boxes' type.
    """
    rois = torch.cat([picture[:, None].to(boxes), boxes], 1)
    return cast(Tensor, roi_align(features.to(boxes), rois, REGION)).mean((2, 3))


# From outputs to boxes


def stretch(anchors: Tensor, offsets: Tensor) -> Tensor:
    """Boxes that anchors and offsets (..., 4) make: centre plus t times the side, side times e^t; centre and sides."""
    # e^8 times an anchor exceeds every picture; an untrained network may say e^90.
    sides = anchors[..., 2:] * offsets[..., 2:].clamp(max=8).exp()
    return torch.cat([anchors[..., :2] + offsets[..., :2] * anchors[..., 2:], sides], -1)


def stretch_to(anchors: Tensor, boxes: Tensor) -> Tensor:
    """The offsets (..., 4) that :func:`stretch` anchors to boxes, both as centre and sides in cells."""
    sides = anchors[..., 2:]
    return torch.cat([(boxes[..., :2] - anchors[..., :2]) / sides, (boxes[..., 2:] / sides).log()], -1)


def corners_within(boxes: Tensor, cells: int) -> Tensor:
    """Boxes (R, 4), centre and sides in cells, as xyxy, cut at the edges of a grid of ``cells`` a side."""
    return box_convert(boxes, "cxcywh", "xyxy").clamp(0, cells)


def propose(
    scores: Tensor, offsets: Tensor, anchors: Tensor, threshold: float = 0.5, overlap: float = 0.7
) -> tuple[Tensor, Tensor]:
    """Where there may be objects in one picture: confident boxes without near-doubles, the best first.

    Args:
        scores: (A, S, S, 2) of :class:`ProposalHead`.
        offsets: (A, S, S, 4).
        anchors: (A, S, S, 4) of :func:`zoo.single_stage.grid_anchors`.
        threshold: Probability of an object above which a box counts.
        overlap: Intersection over union with a better box from which a box is dropped.

    Returns:
        Boxes (R, 4), xyxy in cells, and their probabilities (R,).
    """
    confidences = scores[..., 0].sigmoid().flatten()
    rows = (confidences > threshold).nonzero()[:, 0]
    boxes = stretch(anchors.flatten(0, 2)[rows], offsets.flatten(0, 2)[rows])
    boxes, confidences = corners_within(boxes, anchors.shape[1]), confidences[rows]
    kept = nms(boxes, confidences, overlap)
    return boxes[kept], confidences[kept]


def name_objects(confidences: Tensor, logits: Tensor, threshold: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """What the proposals of one picture are.

    Args:
        confidences: Probability (R,) of an object in each, the best first.
        logits: Of the classes (R, C).
        threshold: None scores by the probability of an object, as the assignment does. Else by that times the
            probability of the class, and only what scores higher is kept.

    Returns:
        Which proposals (K,), the best first; their labels, from 1 on, and scores.
    """
    probabilities, labels = logits.softmax(1).max(1)
    if threshold is None:
        return torch.arange(len(labels), device=labels.device), labels + 1, confidences
    scores, order = (confidences * probabilities).sort(descending=True, stable=True)
    kept = order[scores > threshold]
    return kept, labels[kept] + 1, scores[: len(kept)]


# The loss


def assign(
    anchors: Tensor, boxes: Sequence[Tensor], positive: float = 0.7, negative: float = 0.3
) -> tuple[Tensor, Tensor, Tensor]:
    """Which anchors are to find which object, and which are to find none.

    To find one: an anchor that overlaps with any by more than ``positive``, and of each object the anchor, or equally
    good ones, that overlaps most with it, if it does at all. Its object is the one that it overlaps most with, the
    first of equals. To find none: any other whose overlap with all objects is below ``negative``. The rest is taught
    nothing.

    Args:
        anchors: (A, S, S, 4) of :func:`zoo.single_stage.grid_anchors`.
        boxes: True boxes (R_i, 4) of each picture, xyxy in cells; R_i may be 0.
        positive: Intersection over union.
        negative: Intersection over union.

    Returns:
        Positives (M,), as numbers into a flat (N, A, S, S), in rising order; the number (M,) of the object of each, of
        all objects of all pictures; where there may be negatives (N, A, S, S).
    """
    overlaps = all_overlaps(anchors, boxes)  # (T, K): objects, anchors
    best = best_overlaps(anchors, boxes)
    picture = pictures_of(boxes, overlaps.device)
    found = (overlaps > positive) | ((overlaps == overlaps.amax(1, keepdim=True)) & (overlaps > 0))
    row, column = found.nonzero(as_tuple=True)
    taught = torch.zeros_like(best, dtype=torch.bool).flatten(1)  # (N, K)
    taught[picture[row], column] = True
    objects = torch.arange(len(overlaps), device=overlaps.device)[:, None].expand_as(overlaps)
    # Of each picture and anchor the first object that overlaps as much as the best does; none comes last.
    objects = objects.masked_fill(overlaps < best.flatten(1)[picture], len(overlaps))
    mine = objects.new_full(taught.shape, len(overlaps))
    mine = mine.scatter_reduce(0, picture[:, None].expand_as(overlaps), objects, "amin")
    places = taught.flatten().nonzero()[:, 0]
    return places, mine.flatten()[places], (best < negative) & ~taught.view_as(best)


def two_stage_losses(
    features: Tensor,
    scores: Tensor,
    offsets: Tensor,
    head: nn.Module,
    anchors: Tensor,
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    positive: float = 0.7,
    negative: float = 0.3,
) -> dict[str, Tensor]:
    """The assignment's three losses; the anchors are shared out by :func:`assign`.

    As many negatives as positives are drawn from the whole batch, with replacement; one, if there are no positives. The
    second stage learns from the boxes that the positives propose, and these do not learn from it.

    Args:
        features: The backbone's maps (N, C, S, S).
        scores: (N, A, S, S, 2) of :class:`ProposalHead`.
        offsets: (N, A, S, S, 4).
        head: A :class:`RegionHead`.
        anchors: (A, S, S, 4) of :func:`zoo.single_stage.grid_anchors`.
        boxes: True boxes (R_i, 4) of each picture, xyxy in cells; R_i may be 0.
        labels: Their classes (R_i,), from 1 to C.
        positive: Overlap above which an anchor is to find an object.
        negative: Overlap below which an anchor may be a negative.

    Returns:
        ``loss_objectness``: binary cross-entropy of both scores, summed over the positives (1, 0) and negatives (0, 1)
        and divided by the pictures; ``loss_rpn_box``: smooth L1 of the positives' offsets, likewise, times 5;
        ``loss_class``: cross-entropy, averaged over the positives. To be added. Without an object the last two are 0.

    Raises:
        ValueError: A label is none of 1 to C.
    """
    classes = torch.cat(list(labels)).to(anchors.device) - 1
    check_labels(classes, cast(nn.Linear, head.classes).out_features)
    places, objects, spare = assign(anchors, boxes, positive, negative)
    negatives = sample(spare, max(len(places), 1))
    flat = anchors.flatten(0, 2)
    mine, moved = flat[places % len(flat)], offsets.flatten(0, 3)[places]
    proposals = corners_within(stretch(mine, moved), anchors.shape[1]).detach()
    logits = head(features, proposals, places // len(flat))
    truths = centres_and_sides(torch.cat(list(boxes)).to(anchors))[objects]
    smooth = F.smooth_l1_loss(moved, stretch_to(mine, truths), reduction="sum") / len(features)
    entropy = F.cross_entropy(logits, classes[objects], reduction="sum") / max(len(places), 1)
    return {
        "loss_objectness": _objectness(scores.flatten(0, 3), places, negatives) / len(features),
        "loss_rpn_box": BOX_WEIGHT * smooth,
        "loss_class": entropy,
    }


def _objectness(scores: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """Binary cross-entropy of scores (K, 2), summed over the rows of positives and negatives."""
    wanted = scores.new_zeros(len(positives) + len(negatives), 2)
    wanted[: len(positives), 0] = 1
    wanted[len(positives) :, 1] = 1
    return F.binary_cross_entropy_with_logits(scores[torch.cat([positives, negatives])], wanted, reduction="sum")


class TwoStageDetector(DetectionTask):
    """The assignment's two-stage detector on MobileNetV2.

    Args:
        num_classes: Number of classes.
        class_names: Their names, in the order of the labels 1, 2, …; None calls them "1", "2", ….
        width: Factor of the backbone's channels; published weights are for 1.
        image_size: Side in pixels of the squares that pictures are brought to, a multiple of 32.
        dropout: Share of the hidden values of both stages that are dropped.
        positive: Overlap with a true box above which an anchor is taught to find it; the best of each box is in any
            case.
        negative: Overlap with all true boxes below which an anchor may be taught that it has no object.
        score_threshold: Score above which a box counts; for average precision it should be small.
        overlap: Intersection over union with a better box, of any class, from which a box is dropped.
        class_scores: Score by the probability of an object times that of the class; the assignment has the former
            alone.
        mean: Mean of each colour, which the first layer subtracts; replaced by that of the weights it starts from.
        std: Standard deviation of each colour, which the first layer divides by; replaced likewise.
        weights: A file of this detector (``.safetensors``, ``.ckpt``) or ``hf://owner/name``. The last layer is fresh
            where the classes differ.
        backbone_weights: torchvision's name of MobileNetV2's (``IMAGENET1K_V1``, …) or a file, of torchvision's or of
            one of the assignment's detectors, for the backbone alone.
        keep_matching_classes: Keep the rows of the last layer whose class names match.
        optimizer: Makes the optimizer from the parameters. Default: the assignment's, for 100 pictures a step.
        scheduler: Makes the schedule from the optimizer and the run's number of steps. Default: none.

    Raises:
        ValueError: ``positive`` and ``negative`` are not in this order.
    """

    background: ClassVar[list[str]] = []

    anchors: Tensor  # (9, S, S, 4)

    @plain_arguments
    def __init__(
        self,
        num_classes: int = 20,
        class_names: list[str] | None = None,
        width: float = 1.0,
        image_size: int = 224,
        dropout: float = 0.3,
        positive: float = 0.7,
        negative: float = 0.3,
        score_threshold: float = 0.5,
        overlap: float = 0.7,
        class_scores: bool = False,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        weights: str | None = None,
        backbone_weights: str | None = None,
        keep_matching_classes: bool = False,
        optimizer: OptimizerCallable = lambda params: optim.SGD(params, lr=0.005),
        scheduler: SchedulerCallable | None = None,
    ) -> None:
        super().__init__(num_classes, class_names, optimizer, scheduler)
        if not 0 <= negative <= positive <= 1:
            raise ValueError(f"negative={negative} must be at most positive={positive}, both from 0 to 1")
        self.example_input_array = torch.zeros(1, 3, image_size, image_size)
        self.image_size = image_size
        self.positive = positive
        self.negative = negative
        self.score_threshold = score_threshold
        self.overlap = overlap
        self.class_scores = class_scores
        features = mobilenet_features(width)
        channels = last_channels(features)
        self.backbone = standardized(features, mean, std)
        self.rpn = ProposalHead(channels, len(ANCHORS), dropout)
        self.head = RegionHead(channels, num_classes, dropout)
        self.register_buffer("anchors", grid_anchors(image_size // STRIDE, torch.tensor(ANCHORS).float()), False)
        self.to(memory_format=torch.channels_last)
        if backbone_weights is not None:
            load_trunk(cast(nn.Module, self.backbone.network), backbone_weights, PUBLISHED.builder)
        if weights is not None:
            load_weights(self, weights, keep_matching_classes)

    def class_rows(self, key: str, rows: int, classes: int) -> list[Tensor] | None:
        """Which row of the last layer for the classes is whose; None for the other layers, whatever their rows are."""
        return super().class_rows(key, rows, classes) if key.startswith("head.classes.") else None

    def detect(self, images: list[Tensor]) -> Detections:
        """Boxes in the images' pixels, labels 1…C, scores."""
        if not images:
            return []
        features = self.backbone(squash(images, self.image_size))
        scores, offsets = self.rpn(features)
        limits = self.score_threshold, self.overlap
        proposals = [propose(scores[k], offsets[k], self.anchors, *limits) for k in range(len(images))]
        boxes = [mine for mine, _ in proposals]
        logits = self.head(features, torch.cat(boxes), pictures_of(boxes, features.device))
        each = zip(images, proposals, logits.split([len(mine) for mine in boxes]), strict=True)
        return [self._objects_on(image, *proposed, classes) for image, proposed, classes in each]

    def losses(self, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        """``loss_objectness``, ``loss_rpn_box`` (with its weight), ``loss_class``."""
        features = self.backbone(squash(images, self.image_size))
        scores, offsets = self.rpn(features)
        truths = truths_in_cells(images, targets, self.anchors.shape[1])
        limits = self.positive, self.negative
        return two_stage_losses(features, scores, offsets, self.head, self.anchors, *truths, *limits)

    def _objects_on(self, image: Tensor, boxes: Tensor, confidences: Tensor, logits: Tensor) -> dict[str, Tensor]:
        kept, labels, scores = name_objects(confidences, logits, self.score_threshold if self.class_scores else None)
        boxes = to_pixels(boxes[kept], (image.shape[1], image.shape[2]), self.anchors.shape[1])
        return {"boxes": boxes, "labels": labels, "scores": scores}
