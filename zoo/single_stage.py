"""The single-stage detector of assignment 5: YOLO's boxes from nine anchors in each cell of one grid, on MobileNetV2.

Course: EECS 498-007, lecture 15, "Single-stage object detection", and assignment 5, "One-stage object detector".
Backbone: Sandler et al., 2018, MobileNetV2, https://arxiv.org/abs/1801.04381, built from torchvision so that its
ImageNet weights load by name. Boxes: Redmon and Farhadi, 2016, YOLO9000, https://arxiv.org/abs/1612.08242, section 2.
The last convolution is written as two, one for the boxes and one for the classes, so that other classes replace only
the second; the function and its 172,353 parameters are the same.

The assignment's two-stage detector has the same pictures, backbone and anchors: what stands above the network here is
for both.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import ClassVar, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torchvision.ops import box_convert, box_iou, nms

from zoo.arguments import plain_arguments
from zoo.running.optimizing import SchedulerCallable
from zoo.standardization import IMAGENET_MEAN, IMAGENET_STD, standardized
from zoo.tasks.detection import Detections, DetectionTask, Target
from zoo.weights import Published, load_weights

STRIDE = 32  # pixels of a cell
# Width and height in cells.
ANCHORS = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (2, 3), (3, 2), (3, 5), (5, 3)]
PUBLISHED = Published("mobilenet_v2", {"classifier.": "head.imagenet."})


# What the assignment's two detectors share


def mobilenet_features(width: float = 1.0) -> nn.Sequential:
    """Torchvision's MobileNetV2 up to its last map: pictures (N, 3, S, S) to (N, 1280, S / 32, S / 32).

    Args:
        width: Factor of all channels but, below 1, the last; published weights are for 1.
    """
    from torchvision.models import mobilenet_v2

    return nn.Sequential(OrderedDict(features=mobilenet_v2(weights=None, width_mult=width).features))


def last_channels(features: nn.Module) -> int:
    """Channels of a map of :func:`mobilenet_features`: 1280 up to width 1."""
    convolutions = [module for module in features.modules() if isinstance(module, nn.Conv2d)]
    return convolutions[-1].out_channels


def squash(images: Sequence[Tensor], size: int) -> Tensor:
    """Pictures (3, H_i, W_i) as squares (N, 3, size, size), their sides not kept in proportion.

    Bilinear, smoothed where a picture gets smaller. Pictures of that size are taken as they are.

    Raises:
        ValueError: The size is no multiple of 32.
    """
    if size < STRIDE or size % STRIDE:
        raise ValueError(f"image_size={size} must be a multiple of {STRIDE}, the pixels of a cell")
    if all(image.shape[-2:] == (size, size) for image in images):
        return torch.stack(list(images))
    square = partial(F.interpolate, size=(size, size), mode="bilinear", antialias=True)
    return torch.cat([square(image[None]) for image in images])


def to_cells(boxes: Tensor, picture: tuple[int, int], cells: int) -> Tensor:
    """Boxes (R, 4), xyxy in pixels of a picture of that height and width, in cells of a grid of ``cells`` a side."""
    height, width = picture
    return boxes * (cells / boxes.new_tensor([width, height, width, height]))


def to_pixels(boxes: Tensor, picture: tuple[int, int], cells: int) -> Tensor:
    """Boxes (R, 4), xyxy in cells, in pixels of a picture of that height and width, cut at its edges."""
    height, width = picture
    return boxes.clamp(0, cells) * (boxes.new_tensor([width, height, width, height]) / cells)


def truths_in_cells(
    images: Sequence[Tensor], targets: Sequence[Target], cells: int
) -> tuple[list[Tensor], list[Tensor]]:
    """True boxes (R_i, 4) of each picture, xyxy in cells, and their labels (R_i,) in 1…C."""
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    boxes = [to_cells(target["boxes"], size, cells) for target, size in zip(targets, sizes, strict=True)]
    return boxes, [target["labels"] for target in targets]


def pictures_of(boxes: Sequence[Tensor], device: torch.device) -> Tensor:
    """The number (M,) of the picture of each box, of boxes (R_i, 4) of each picture one after the other."""
    counts = torch.tensor([len(mine) for mine in boxes])
    return torch.repeat_interleave(torch.arange(len(counts)), counts).to(device)


def centres_and_sides(boxes: Tensor) -> Tensor:
    """Boxes (M, 4), xyxy in cells, as centre and sides; a side below a thousandth of a cell counts as that much."""
    centred = box_convert(boxes, "xyxy", "cxcywh")
    return torch.cat([centred[:, :2], centred[:, 2:].clamp(min=1e-3)], 1)  # what is taught is a side's logarithm


def check_labels(classes: Tensor, num_classes: int) -> None:
    """Refuse classes (M,), counted from 0, that a network of so many does not have.

    Raises:
        ValueError: A class is none of them; it is named as a label, from 1.
    """
    if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
        wrong = sorted({k + 1 for k in classes.tolist() if not 0 <= k < num_classes})
        raise ValueError(f"labels {wrong} are none of 1 to {num_classes}, the classes of the network")


def grid_anchors(cells: int, shapes: Tensor) -> Tensor:
    """All anchors of a grid: each shape around the centre of each cell.

    Args:
        cells: Cells S of a side.
        shapes: Width and height (A, 2) in cells.

    Returns:
        (A, S, S, 4): centre x and y, width and height, in cells.
    """
    middle = torch.arange(cells, device=shapes.device, dtype=shapes.dtype) + 0.5
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    centres = torch.stack([x, y], -1).expand(len(shapes), -1, -1, -1)
    return torch.cat([centres, shapes[:, None, None].expand_as(centres)], -1)


def all_overlaps(anchors: Tensor, boxes: Sequence[Tensor]) -> Tensor:
    """Intersection over union of every true box of all pictures with every anchor.

    Args:
        anchors: (A, S, S, 4) of :func:`grid_anchors`.
        boxes: True boxes (R_i, 4) of each picture, xyxy in cells; R_i may be 0.

    Returns:
        (M, A * S * S), 0 for a box without area.
    """
    corners = box_convert(anchors.flatten(0, 2), "cxcywh", "xyxy")
    return box_iou(torch.cat(list(boxes)).to(corners), corners)


def best_overlaps(anchors: Tensor, boxes: Sequence[Tensor]) -> Tensor:
    """The largest intersection over union of each anchor with a true box of each picture.

    Args:
        anchors: (A, S, S, 4) of :func:`grid_anchors`.
        boxes: True boxes (R_i, 4) of each picture, xyxy in cells; R_i may be 0.

    Returns:
        (N, A, S, S), 0 in a picture without boxes.
    """
    overlaps = all_overlaps(anchors, boxes)
    picture = pictures_of(boxes, overlaps.device)[:, None].expand_as(overlaps)
    best = overlaps.new_zeros(len(boxes), overlaps.shape[1]).scatter_reduce(0, picture, overlaps, "amax")
    return best.view(-1, *anchors.shape[:3])


def sample(candidates: Tensor, count: int) -> Tensor:
    """``count`` of the places where ``candidates`` is true, drawn with replacement; numbers into it as a flat tensor.

    There are none where there is no candidate.
    """
    places = candidates.flatten().nonzero()[:, 0]
    if not len(places):
        return places
    return places[torch.randint(len(places), (count,), device=places.device)]


# The network


class SingleStageHead(nn.Module):
    """Two layers of 1x1 convolutions: a map (N, C, S, S) to confidences, offsets and class scores.

    Only ``classes`` depends on the classes; for others it is replaced and all else is kept.

    Args:
        in_channels: Channels of the backbone's map.
        num_classes: Number of classes.
        anchors: Anchors A of each cell.
        dropout: Share of the 128 hidden values that are dropped.
    """

    def __init__(self, in_channels: int, num_classes: int, anchors: int, dropout: float) -> None:
        super().__init__()
        self.anchors = anchors
        self.hidden = nn.Sequential(nn.Conv2d(in_channels, 128, 1), nn.Dropout(dropout), nn.LeakyReLU(0.01))
        self.boxes = nn.Conv2d(128, 5 * anchors, 1)
        self.classes = nn.Conv2d(128, num_classes, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map (N, C, S, S) to confidences, offsets and logits.

        Returns:
            Confidence of each anchor (N, A, S, S) in (0, 1); its offsets (N, A, S, S, 4), the first two in
            (-0.5, 0.5); logits of the classes (N, num_classes, S, S), which the anchors of a cell share.
        """
        x = self.hidden(features)
        maps = self.boxes(x).float().unflatten(1, (self.anchors, 5))  # (N, A, 5, S, S)
        shifts = maps[:, :, 1:3].sigmoid() - 0.5
        offsets = torch.cat([shifts, maps[:, :, 3:]], 2).permute(0, 1, 3, 4, 2)
        return maps[:, :, 0].sigmoid(), offsets, self.classes(x).float()


class SingleStageNetwork(nn.Module):
    """The detector's network: pictures (N, 3, S, S) to confidences, offsets and class scores of a grid.

    Args:
        num_classes: Number of classes C.
        width: Factor of the backbone's channels.
        anchors: Anchors A of each cell.
        dropout: Share of the hidden values of the head that are dropped.
    """

    def __init__(self, num_classes: int = 20, width: float = 1.0, anchors: int = 9, dropout: float = 0.3) -> None:
        super().__init__()
        self.backbone = mobilenet_features(width)
        self.head = SingleStageHead(last_channels(self.backbone), num_classes, anchors, dropout)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map standardised pictures (N, 3, S, S) to what :class:`SingleStageHead` gives for S / 32 cells a side."""
        return cast(tuple[Tensor, Tensor, Tensor], self.head(self.backbone(images)))


# From outputs to boxes


def shift(anchors: Tensor, offsets: Tensor) -> Tensor:
    """Boxes that anchors and offsets (..., 4) make, both in cells: centre plus t, side times e^t; centre and sides."""
    # e^8 cells exceed every picture; an untrained network may say e^90.
    sides = anchors[..., 2:] * offsets[..., 2:].clamp(max=8).exp()
    return torch.cat([anchors[..., :2] + offsets[..., :2], sides], -1)


def offsets_to(anchors: Tensor, boxes: Tensor) -> Tensor:
    """The offsets (..., 4) that :func:`shift` anchors to boxes, both as centre and sides in cells."""
    return torch.cat([boxes[..., :2] - anchors[..., :2], (boxes[..., 2:] / anchors[..., 2:]).log()], -1)


def select(
    confidences: Tensor,
    offsets: Tensor,
    logits: Tensor,
    anchors: Tensor,
    picture: tuple[int, int],
    threshold: float = 0.5,
    overlap: float = 0.7,
    class_scores: bool = False,
) -> dict[str, Tensor]:
    """The objects of one picture: confident boxes without near-doubles, each with the best class of its cell.

    Args:
        confidences: (A, S, S).
        offsets: (A, S, S, 4).
        logits: (C, S, S).
        anchors: (A, S, S, 4) of :func:`grid_anchors`.
        picture: Height and width of the picture in pixels.
        threshold: Score above which a box counts.
        overlap: Intersection over union with a better box, of any class, from which a box is dropped.
        class_scores: Score by confidence times probability of the class; the assignment has the confidence alone.

    Returns:
        ``boxes`` (R, 4) xyxy in pixels, ``labels`` (R,) from 1 on, ``scores`` (R,), the best first.
    """
    cells = anchors.shape[1]
    boxes = box_convert(shift(anchors, offsets).flatten(0, 2), "cxcywh", "xyxy")
    probabilities, labels = logits.softmax(0).max(0)  # (S, S)
    if class_scores:
        confidences = confidences * probabilities
    labels = labels.expand_as(confidences).flatten() + 1
    rows = (confidences.flatten() > threshold).nonzero()[:, 0]
    boxes, scores, labels = boxes[rows].clamp(0, cells), confidences.flatten()[rows], labels[rows]
    kept = nms(boxes, scores, overlap)
    return {"boxes": to_pixels(boxes[kept], picture, cells), "labels": labels[kept], "scores": scores[kept]}


# The loss


def nearest_anchors(anchors: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The anchor of each true box: in the cell whose centre is nearest, the one that overlaps most.

    A centre on the line between two cells belongs to the left or upper one, one beyond the grid to its border.

    Args:
        anchors: (A, S, S, 4) of :func:`grid_anchors`.
        boxes: True boxes (M, 4), xyxy in cells.

    Returns:
        Numbers (M,) of anchor, row and column.
    """
    cells = anchors.shape[1]
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    column, row = (centres.ceil().long() - 1).clamp(0, cells - 1).unbind(1)
    shapes = anchors[:, row, column].transpose(0, 1)  # (M, A, 4)
    corners = box_convert(shapes, "cxcywh", "xyxy")
    wide = torch.minimum(corners[..., 2:], boxes[:, None, 2:]) - torch.maximum(corners[..., :2], boxes[:, None, :2])
    both = wide.clamp(min=0).prod(2)  # (M, A)
    union = shapes[..., 2:].prod(2) + (boxes[:, 2:] - boxes[:, :2]).prod(1, keepdim=True) - both
    return (both / union).argmax(1), row, column


def single_stage_losses(
    confidences: Tensor,
    offsets: Tensor,
    logits: Tensor,
    anchors: Tensor,
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    negative: float = 0.2,
) -> dict[str, Tensor]:
    """The assignment's three losses.

    Each object teaches one anchor (:func:`nearest_anchors`), an anchor may have several. As many negatives as objects
    are drawn from the whole batch among the anchors that hardly overlap with any object of their picture; one, if the
    batch has no object.

    Args:
        confidences: (N, A, S, S).
        offsets: (N, A, S, S, 4).
        logits: (N, C, S, S).
        anchors: (A, S, S, 4) of :func:`grid_anchors`.
        boxes: True boxes (R_i, 4) of each picture, xyxy in cells; R_i may be 0. A side below a thousandth of a cell
            counts as that much.
        labels: Their classes (R_i,), from 1 to C.
        negative: Overlap below which an anchor may be a negative.

    Returns:
        ``loss_objectness``: mean squared error of the confidence, 1 for positives and 0 for negatives; ``loss_box``:
        squared error of the offsets, summed over all four and averaged over the objects; ``loss_class``: cross-entropy,
        averaged over the objects of a picture and then over the pictures, 0 for one without. To be added.

    Raises:
        ValueError: A label is none of 1 to C.
    """
    picture = pictures_of(boxes, anchors.device)
    truths = torch.cat(list(boxes)).to(anchors)  # (M, 4)
    classes = torch.cat(list(labels)).to(anchors.device) - 1
    check_labels(classes, logits.shape[1])
    slot, row, column = nearest_anchors(anchors, truths)
    spare = sample(best_overlaps(anchors, boxes) < negative, max(len(truths), 1))
    scores = torch.cat([confidences[picture, slot, row, column], confidences.flatten()[spare]])
    target = (torch.arange(len(scores), device=scores.device) < len(truths)).to(scores)
    wanted = offsets_to(anchors[slot, row, column], centres_and_sides(truths))
    errors = offsets[picture, slot, row, column] - wanted
    entropy = F.cross_entropy(logits[picture, :, row, column], classes, reduction="none")  # (M,)
    share = 1 / picture.bincount(minlength=len(boxes)).to(anchors)[picture] / len(boxes)
    return {
        "loss_objectness": ((scores - target) ** 2).sum() / max(len(scores), 1),
        "loss_box": (errors**2).sum() / max(len(truths), 1),
        "loss_class": (entropy * share).sum(),
    }


class SingleStageDetector(DetectionTask):
    """The assignment's single-stage detector on MobileNetV2.

    Args:
        num_classes: Number of classes.
        class_names: Their names, in the order of the labels 1, 2, …; None calls them "1", "2", ….
        width: Factor of the backbone's channels; published weights are for 1.
        image_size: Side in pixels of the squares that pictures are brought to, a multiple of 32.
        dropout: Share of the hidden values of the head that are dropped.
        negative: Overlap with all true boxes below which an anchor may be taught that it has no object; the
            assignment's is 0.2.
        score_threshold: Score above which a box counts; for average precision it should be small.
        overlap: Intersection over union with a better box from which a box is dropped.
        class_scores: Score by confidence times probability of the class; the assignment has the confidence alone.
        mean: Mean of each colour, which the first layer subtracts; replaced by that of the weights it starts from.
        std: Standard deviation of each colour, which the first layer divides by; replaced likewise.
        weights: torchvision's name of MobileNetV2's (``IMAGENET1K_V1``, …), a file (``.safetensors``, ``.ckpt``,
            ``.pth``) or ``hf://owner/name``. The head is fresh where the classes differ.
        keep_matching_classes: Keep the rows of the head whose class names match.
        optimizer: Makes the optimizer from the parameters. Default: the assignment's, for 100 pictures a step.
        scheduler: Makes the schedule from the optimizer and the run's number of steps. Default: none.
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
        negative: float = 0.2,
        score_threshold: float = 0.5,
        overlap: float = 0.7,
        class_scores: bool = False,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        weights: str | None = None,
        keep_matching_classes: bool = False,
        optimizer: OptimizerCallable = lambda params: optim.SGD(params, lr=0.05),
        scheduler: SchedulerCallable | None = None,
    ) -> None:
        super().__init__(num_classes, class_names, optimizer, scheduler)
        self.example_input_array = torch.zeros(1, 3, image_size, image_size)
        self.image_size = image_size
        self.negative = negative
        self.score_threshold = score_threshold
        self.overlap = overlap
        self.class_scores = class_scores
        self.published = PUBLISHED
        features = mobilenet_features(width)
        self.backbone = standardized(features, mean, std)
        self.head = SingleStageHead(last_channels(features), num_classes, len(ANCHORS), dropout)
        self.register_buffer("anchors", grid_anchors(image_size // STRIDE, torch.tensor(ANCHORS).float()), False)
        self.to(memory_format=torch.channels_last)
        if weights is not None:
            load_weights(self, weights, keep_matching_classes)

    def class_rows(self, key: str, rows: int, classes: int) -> list[Tensor] | None:
        """Which row of the last layer for the classes is whose; None for the other layers, whatever their rows are."""
        return super().class_rows(key, rows, classes) if key.startswith("head.classes.") else None

    def detect(self, images: list[Tensor]) -> Detections:
        """Boxes in the images' pixels, labels 1…C, scores."""
        if not images:
            return []
        confidences, offsets, logits = self.head(self.backbone(squash(images, self.image_size)))
        limits = self.score_threshold, self.overlap, self.class_scores
        return [
            select(confidences[k], offsets[k], logits[k], self.anchors, (image.shape[1], image.shape[2]), *limits)
            for k, image in enumerate(images)
        ]

    def losses(self, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        """``loss_objectness``, ``loss_box``, ``loss_class``."""
        confidences, offsets, logits = self.head(self.backbone(squash(images, self.image_size)))
        boxes, labels = truths_in_cells(images, targets, self.anchors.shape[1])
        return single_stage_losses(confidences, offsets, logits, self.anchors, boxes, labels, self.negative)
