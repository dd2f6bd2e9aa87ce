"""YOLOv3: boxes, objectness and classes of all anchors of three grids, in one pass; and its tiny sister with two grids.

Paper: Redmon and Farhadi, 2018, YOLOv3: an incremental improvement, https://arxiv.org/abs/1804.02767 (section 2).
Lecture: EECS 498-007, lecture 15, "Single-stage object detection".
The network, the loss and the letterbox are those of its authors' framework Darknet (``cfg/yolov3.cfg``,
``cfg/yolov3-tiny.cfg``, ``src/yolo_layer.c``, ``src/image.c`` of https://github.com/pjreddie/darknet), whose weights
:mod:`zoo.darknet` reads. Where the paper and the framework differ the framework is followed: only boxes that overlap
a true one by more than 0.7 count as no negatives (paper: 0.5), and large boxes weigh less.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torchvision.ops import batched_nms

from zoo.arguments import plain_arguments
from zoo.darknet import convolution, load_darknet
from zoo.running.optimizing import SchedulerCallable
from zoo.running.schedules import Step
from zoo.tasks.detection import Detections, DetectionTask, Target
from zoo.weights import load_weights

STRIDE = 32  # pixels of a cell of the coarsest grid
# Width and height in pixels of the network's input; masks: which of them each grid owns, the coarsest grid first.
ANCHORS = [(10, 13), (16, 30), (33, 23), (30, 61), (62, 45), (59, 119), (116, 90), (156, 198), (373, 326)]
MASKS = [[6, 7, 8], [3, 4, 5], [0, 1, 2]]
TINY_ANCHORS = [(10, 14), (23, 27), (37, 58), (81, 82), (135, 169), (344, 319)]
TINY_MASKS = [[3, 4, 5], [0, 1, 2]]  # the first weights that were published have [[3, 4, 5], [1, 2, 3]]
DARKNET_SUFFIXES = (".weights", ".74", ".15")  # yolov3.weights, darknet53.conv.74, yolov3-tiny.conv.15
FAR = 2048  # pixels; a box that reaches beyond is cut there before boxes are compared


def channels(count: int, width: float) -> int:
    """``count`` channels times ``width``, as a multiple of 8 and at least 8."""
    return max(8, round(count * width / 8) * 8)


class Residual(nn.Module):
    """``x + block(x)`` of a 1x1 convolution to half the channels and a 3x3 one back: (N, C, H, W) to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(convolution(width, width // 2, 1), convolution(width // 2, width, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H, W)."""
        return cast(Tensor, x + self.block(x))


class Darknet53(nn.Module):
    """Darknet-53 without its classifier (table 1): pictures (N, 3, H, W) to maps at three scales.

    Args:
        width: Factor of all channels.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        wide = [channels(count, width) for count in (32, 64, 128, 256, 512, 1024)]
        self.stem = convolution(3, wide[0], 3)
        self.stages = nn.ModuleList()
        for (before, after), blocks in zip(pairwise(wide), (1, 2, 8, 8, 4), strict=True):
            self.stages.append(
                nn.Sequential(convolution(before, after, 3, stride=2), *(Residual(after) for _ in range(blocks)))
            )
        self.out_channels = wide[:2:-1]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps of 1024, 512 and 256 channels on a 32nd, 16th and 8th of the side of (N, 3, H, W), in this order."""
        x = self.stem(images)  # (N, 32, H, W)
        maps = []
        for stage in self.stages:
            x = stage(x)  # (N, 64, H / 2, W / 2) to (N, 1024, H / 32, W / 32)
            maps.append(x)
        return maps[:1:-1]


class SlidingMaxPool(nn.Module):
    """Largest of 2x2 pixels at stride 1; the picture is continued by one pixel to the right and below, not around."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H, W)."""
        return F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-math.inf), 2, 1)


class TinyDarknet(nn.Module):
    """The trunk of tiny-YOLOv3: pictures (N, 3, H, W) to maps at two scales.

    Args:
        width: Factor of all channels.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        wide = [3, *(channels(count, width) for count in (16, 32, 64, 128, 256, 512, 1024))]
        self.fine = nn.Sequential(convolution(wide[0], wide[1], 3))
        for before, after in pairwise(wide[1:6]):
            self.fine.extend([nn.MaxPool2d(2), convolution(before, after, 3)])
        self.coarse = nn.Sequential(
            nn.MaxPool2d(2), convolution(wide[5], wide[6], 3), SlidingMaxPool(), convolution(wide[6], wide[7], 3)
        )
        self.out_channels = [wide[7], wide[5]]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps of 1024 and 256 channels on a 32nd and a 16th of the side of (N, 3, H, W), in this order."""
        fine = self.fine(images)  # (N, 256, H / 16, W / 16)
        return [self.coarse(fine), fine]


class Scale(nn.Module):
    """The convolutions of one grid, which also looks at what the coarser grid found.

    Args:
        in_channels: Channels of the backbone's map.
        coarser: Channels of the coarser grid's branch; 0 where there is none.
        lateral: Channels to which that branch is brought before it is doubled in size and joined.
        neck: Channels and kernel of the convolutions before the branch to the finer grid.
        last: Channels of the 3x3 convolution after it.
        outputs: Maps of the output, ``anchors * (5 + num_classes)``.
    """

    def __init__(
        self, in_channels: int, coarser: int, lateral: int, neck: list[tuple[int, int]], last: int, outputs: int
    ) -> None:
        super().__init__()
        self.lateral = convolution(coarser, lateral, 1) if coarser else None
        wide = in_channels + (lateral if coarser else 0)
        self.neck = nn.Sequential()
        for out, kernel in neck:
            self.neck.append(convolution(wide, out, kernel))
            wide = out
        self.out_channels = wide
        self.last = convolution(wide, last, 3)
        self.output = nn.Conv2d(last, outputs, 1)
        nn.init.kaiming_normal_(self.output.weight)

    def forward(self, x: Tensor, coarser: Tensor | None) -> tuple[Tensor, Tensor]:
        """Map the backbone's (N, C, H, W) and a branch (N, D, H / 2, W / 2) to a branch and an output of H by W."""
        if self.lateral is not None:
            x = torch.cat([F.interpolate(self.lateral(coarser), scale_factor=2.0), x], 1)
        branch = self.neck(x)
        return branch, self.output(self.last(branch))


class YOLOv3Head(nn.Module):
    """The convolutions of all grids: maps of the backbone to outputs.

    Only ``scales.N.output``, one 1x1 convolution for each grid, depends on the classes; for another number of classes
    these are replaced and all else is kept.

    Args:
        in_channels: Channels of the backbone's maps, the coarsest first: three of them, or two for the tiny network.
        num_classes: Number of classes.
        width: Factor of all channels.
        anchors: Width and height of each anchor in pixels of the network's input.
        masks: Numbers of the anchors that each grid owns, as many for each.
        prior: Objectness that an untrained network gives to a box.
    """

    anchors: Tensor  # (K, 2)

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        width: float,
        anchors: Sequence[tuple[float, float]],
        masks: list[list[int]],
        prior: float = 0.5,
    ) -> None:
        super().__init__()
        tiny = len(in_channels) == 2
        self.masks = masks
        self.register_buffer("anchors", torch.tensor(anchors, dtype=torch.float32), persistent=False)
        self.scales = nn.ModuleList()
        coarser = 0
        for position, (wide, mask) in enumerate(zip(in_channels, masks, strict=True)):
            narrow, last = channels(512 // 2**position, width), channels((512 if tiny else 1024) // 2**position, width)
            neck = [(narrow, 1), (last, 3), (narrow, 1), (last, 3), (narrow, 1)]
            if tiny:
                neck = [] if position else [(channels(256, width), 1)]
            lateral = channels((256 if tiny else 512) // 2**position, width)
            scale = Scale(wide, coarser, lateral, neck, last, len(mask) * (5 + num_classes))
            # The fifth map of each anchor is its objectness.
            nn.init.zeros_(cast(Tensor, scale.output.bias))
            cast(Tensor, scale.output.bias).data.view(len(mask), -1)[:, 4] = math.log(prior / (1 - prior))
            self.scales.append(scale)
            coarser = scale.out_channels

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Map (N, C, H, W) of each scale, the coarsest first, to outputs (N, A * (5 + num_classes), H, W)."""
        outputs: list[Tensor] = []
        branch = None
        for scale, x in zip(self.scales, features, strict=True):
            branch, output = scale(x, branch)
            outputs.append(output)
        return outputs


class YOLOv3Network(nn.Module):
    """YOLOv3 as Darknet has it: pictures (N, 3, S, S) in [0, 1] to the raw outputs of its grids.

    Args:
        num_classes: Number of classes C.
        tiny: Build tiny-YOLOv3, with two grids.
        width: Factor of all channels; 1 is the paper's.
        anchors: Width and height of each anchor in pixels of the network's input; None: the paper's for COCO.
        masks: Numbers of the anchors that each grid owns, the coarsest grid first, as many for each; None: Darknet's.
        prior: Objectness that an untrained network gives to a box; Darknet's is 0.5. A small one starts the training
            with a small loss, since nearly all boxes have no object.

    Raises:
        ValueError: The masks do not fit the anchors or the network.
    """

    def __init__(
        self,
        num_classes: int = 80,
        tiny: bool = False,
        width: float = 1.0,
        anchors: Sequence[tuple[float, float]] | None = None,
        masks: list[list[int]] | None = None,
        prior: float = 0.5,
    ) -> None:
        super().__init__()
        anchors = anchors or (TINY_ANCHORS if tiny else ANCHORS)
        masks = masks or (TINY_MASKS if tiny else MASKS)
        _check_masks(masks, len(anchors), 2 if tiny else 3)
        self.backbone = TinyDarknet(width) if tiny else Darknet53(width)
        self.head = YOLOv3Head(self.backbone.out_channels, num_classes, width, anchors, masks, prior)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map pictures (N, 3, S, S) to outputs (N, A * (5 + C), S / 32, S / 32), …, the coarsest grid first."""
        return cast(list[Tensor], self.head(self.backbone(images)))


def _check_masks(masks: list[list[int]], anchors: int, grids: int) -> None:
    alike = len(masks) == grids and len({len(mask) for mask in masks}) == 1 and len(masks[0]) > 0
    if not alike or not all(0 <= number < anchors for mask in masks for number in mask):
        raise ValueError(
            f"masks={masks} must be {grids} lists, one for each grid, of equally many numbers of the {anchors} anchors"
        )


# From pictures of any size to the network's input, and back


def letterbox(images: Sequence[Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Fit pictures into squares, their sides in proportion and grey (0.5) around them, as Darknet does.

    Bilinear between the corner pixels, without smoothing before. Pictures of that size are taken as they are.

    Args:
        images: Pictures (3, H_i, W_i) in [0, 1].
        size: Side of the squares in pixels, a multiple of 32.

    Returns:
        The squares (N, 3, size, size), and where the pictures lie in them (N, 4): factor of x and of y, then left and
        upper edge in pixels.

    Raises:
        ValueError: The size is no multiple of 32.
    """
    if size < STRIDE or size % STRIDE:
        raise ValueError(f"image_size={size} must be a multiple of {STRIDE}, the pixels of a cell of the coarsest grid")
    if all(image.shape[-2:] == (size, size) for image in images):
        return torch.stack(list(images)), images[0].new_tensor([1.0, 1.0, 0.0, 0.0]).repeat(len(images), 1)
    squares = images[0].new_full((len(images), 3, size, size), 0.5)
    places = []
    for k, image in enumerate(images):
        height, width = image.shape[-2:]
        longer = max(height, width)
        high, wide = max(height * size // longer, 1), max(width * size // longer, 1)
        top, left = (size - high) // 2, (size - wide) // 2
        fitted = F.interpolate(image[None], (high, wide), mode="bilinear", align_corners=True)[0]
        squares[k, :, top : top + high, left : left + wide] = fitted
        places.append([wide / width, high / height, left, top])
    return squares, squares.new_tensor(places)


def place(boxes: Tensor, where: Tensor) -> Tensor:
    """Boxes (R, 4) of a picture, xyxy in its pixels, in the pixels of its letterbox ``where`` (4,)."""
    return boxes * where[:2].repeat(2) + where[2:].repeat(2)


def unplace(boxes: Tensor, where: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (R, 4) of a letterbox in the pixels of the picture of that height and width, cut at its edges."""
    boxes = (boxes - where[2:].repeat(2)) / where[:2].repeat(2)
    height, width = size
    return boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))


# From outputs to boxes


def by_anchor(output: Tensor, anchors: int) -> Tensor:
    """An output (N, A * (5 + C), H, W) as (N, A, H, W, 5 + C), in float32 or better."""
    count, _, height, width = output.shape
    wide = torch.promote_types(output.dtype, torch.float32)
    return output.to(wide).view(count, anchors, -1, height, width).permute(0, 1, 3, 4, 2)


def boxes_of(outputs: Tensor, anchors: Tensor, size: int) -> Tensor:
    """Boxes xyxy in pixels of one grid (figure 2 of the paper).

    Args:
        outputs: The grid's (N, A, H, W, 5 + C) of :func:`by_anchor`.
        anchors: Width and height (A, 2) in pixels.
        size: Side of the network's input in pixels.

    Returns:
        Boxes (N, A, H, W, 4), not cut at the picture's edges.
    """
    _, _, height, width, _ = outputs.shape
    x = torch.arange(width, device=outputs.device)
    y = torch.arange(height, device=outputs.device)[:, None]
    centre_x = (outputs[..., 0].sigmoid() + x) * (size / width)
    centre_y = (outputs[..., 1].sigmoid() + y) * (size / height)
    # An untrained network may say e^90, which is no number that could be computed with; e^8 exceeds every picture.
    sides = outputs[..., 2:4].clamp(max=8).exp() * anchors[:, None, None] / 2
    centres = torch.stack([centre_x, centre_y], -1)
    return torch.cat([centres - sides, centres + sides], -1)


def decode(outputs: list[Tensor], anchors: Tensor, masks: list[list[int]], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the network's outputs say.

    Args:
        outputs: (N, A * (5 + C), H, W) of each grid.
        anchors: Width and height of all anchors (K, 2) in pixels.
        masks: Numbers of the anchors of each grid.
        size: Side of the network's input in pixels.

    Returns:
        Boxes (N, P, 4), xyxy in pixels of the network's input and not cut at its edges; their objectness (N, P); and
        the probabilities of their classes (N, P, C), each for itself. P counts grids, anchors, rows and columns.
    """
    boxes, objectness, classes = [], [], []
    for output, mask in zip(outputs, masks, strict=True):
        grid = by_anchor(output, len(mask))
        boxes.append(boxes_of(grid, anchors[mask], size).flatten(1, 3))
        objectness.append(grid[..., 4].sigmoid().flatten(1, 3))
        classes.append(grid[..., 5:].sigmoid().flatten(1, 3))
    return torch.cat(boxes, 1), torch.cat(objectness, 1), torch.cat(classes, 1)


def select(
    boxes: Tensor,
    objectness: Tensor,
    probabilities: Tensor,
    where: Tensor,
    size: tuple[int, int],
    threshold: float = 0.005,
    overlap: float = 0.45,
    most: int = 100,
    candidates: int = 4096,
) -> dict[str, Tensor]:
    """The objects of one picture: every class of every box whose score is above a threshold, without near-doubles.

    Args:
        boxes: Boxes (P, 4) of :func:`decode`.
        objectness: (P,).
        probabilities: (P, C); a score is the product of both.
        where: Where the picture lies in its letterbox (4,).
        size: Height and width of the picture in pixels.
        threshold: Smallest score; Darknet has 0.005 to measure and 0.24 or 0.5 to show.
        overlap: Intersection over union with a better box of the same class from which a box is dropped.
        most: Largest number of objects.
        candidates: Largest number that is looked at for overlaps, the best ones; an untrained network has many.

    Returns:
        ``boxes`` (R, 4) xyxy in pixels of the picture, ``labels`` (R,) from 1 on, ``scores`` (R,), the best first.
    """
    scores = objectness[:, None] * probabilities  # (P, C)
    rows, classes = (scores > threshold).nonzero(as_tuple=True)
    values, best = scores[rows, classes].topk(min(candidates, len(rows)))
    rows, classes = rows[best], classes[best]
    found = unplace(boxes[rows], where, size)
    inside = (found[:, 2:] > found[:, :2]).all(1)  # not in the grey
    found, values, classes = found[inside], values[inside], classes[inside]
    # Not cut at the picture's edges, as in Darknet: cut boxes overlap more. But classes are told apart by moving their
    # boxes, which among huge ones would cost the digits of the small ones.
    kept = batched_nms(boxes[rows][inside].clamp(-FAR, FAR), values, classes, overlap)[:most]
    return {"boxes": found[kept], "labels": classes[kept] + 1, "scores": values[kept]}


# The loss


def best_anchors(sides: Tensor, anchors: Tensor) -> Tensor:
    """The number of the anchor whose shape overlaps most with each box, both around one centre.

    Args:
        sides: Width and height (R, 2) of the boxes.
        anchors: Those of the anchors (K, 2).

    Returns:
        Numbers (R,); the first of anchors that are equally good.
    """
    both = torch.minimum(sides[:, None], anchors).prod(2)  # (R, K)
    return (both / (sides.prod(1)[:, None] + anchors.prod(1) - both)).argmax(1)


def yolo_losses(
    outputs: list[Tensor],
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    anchors: Tensor,
    masks: list[list[int]],
    size: int,
    ignore: float = 0.7,
) -> dict[str, Tensor]:
    """Darknet's loss (``forward_yolo_layer``), summed over everything and divided by the number of pictures.

    An object belongs to the cell of its centre and to the one anchor of all grids whose shape is nearest; only the grid
    that owns this anchor learns it. Of several objects in one place the last gives the box; the place has the classes
    of all. A centre on the right or lower edge belongs to the last cell. A side below a thousandth of a pixel counts
    as that much.

    Args:
        outputs: (N, A * (5 + C), H, W) of each grid.
        boxes: True boxes (R_i, 4) of each picture, xyxy in pixels of the network's input; R_i may be 0.
        labels: Their classes (R_i,), from 1 to C.
        anchors: Width and height of all anchors (K, 2) in pixels.
        masks: Numbers of the anchors of each grid.
        size: Side of the network's input in pixels.
        ignore: Intersection over union with a true box above which a box is no negative.

    Returns:
        ``loss_box``: cross-entropy of the place in the cell, half the squared error of the logarithmic sides, times
        2 less the share of the picture; ``loss_objectness``: cross-entropy, 1 where an object belongs, 0 elsewhere;
        ``loss_class``: cross-entropy of each class for itself. Three scalars, to be added.

    Raises:
        ValueError: A label is none of 1 to C.
    """
    truths = _Truths(boxes, labels, anchors)
    num_classes = outputs[0].shape[1] // len(masks[0]) - 5
    if len(truths.labels) and not 0 <= int(truths.labels.min()) <= int(truths.labels.max()) < num_classes:
        wrong = sorted({k + 1 for k in truths.labels.tolist() if not 0 <= k < num_classes})
        raise ValueError(f"labels {wrong} are none of 1 to {num_classes}, the classes of the network")
    total: dict[str, Tensor] = {}
    for output, mask in zip(outputs, masks, strict=True):
        for name, value in _grid_losses(by_anchor(output, len(mask)), truths, anchors, mask, size, ignore).items():
            total[name] = total.get(name, 0) + value / len(output)
    return total


class _Truths:
    """The true boxes of a batch, one after the other.

    Attributes:
        picture: Number of the picture (M,).
        centres: (M, 2) in pixels.
        sides: (M, 2) in pixels.
        labels: Classes from 0 on (M,).
        best: Number of the anchor (M,).
        padded: Boxes xyxy of each picture, with empty ones behind them (N, T, 4).
    """

    def __init__(self, boxes: Sequence[Tensor], labels: Sequence[Tensor], anchors: Tensor) -> None:
        counts = [len(mine) for mine in boxes]
        together = torch.cat(list(boxes)).to(anchors)  # (M, 4)
        pictures = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        self.picture = pictures.to(anchors.device)
        self.centres = (together[:, :2] + together[:, 2:]) / 2
        self.sides = (together[:, 2:] - together[:, :2]).clamp(min=1e-3)
        self.labels = torch.cat(list(labels)).to(anchors.device) - 1
        self.best = best_anchors(self.sides, anchors)
        self.padded = nn.utils.rnn.pad_sequence([mine.to(anchors) for mine in boxes], batch_first=True)


def _grid_losses(
    grid: Tensor, truths: _Truths, anchors: Tensor, mask: list[int], size: int, ignore: float
) -> dict[str, Tensor]:
    """The three sums of one grid (N, A, H, W, 5 + C)."""
    _, _, height, width, _ = grid.shape
    rows, slots = (truths.best[:, None] == torch.tensor(mask, device=grid.device)).nonzero(as_tuple=True)
    cells = grid.new_tensor([width, height]) / size
    where = truths.centres[rows].to(grid) * cells
    column = where[:, 0].long().clamp(0, width - 1)
    row = where[:, 1].long().clamp(0, height - 1)
    place = ((truths.picture[rows] * len(mask) + slots) * height + row) * width + column
    last, classes = _last_in_place(place, truths.labels[rows], grid.shape[:4].numel(), grid)
    rows, place = rows[last], place[last]
    logits = grid.flatten(0, 3)[place]  # (positives, 5 + C)
    offsets = where[last] - torch.stack([column[last], row[last]], 1)
    sides = truths.sides[rows].to(grid)
    weight = (2 - (sides / size).prod(1, keepdim=True)).expand(-1, 2)
    targets = (sides / anchors[mask][slots[last]].to(grid)).log()
    near = F.binary_cross_entropy_with_logits(logits[:, :2], offsets, weight, reduction="sum")
    far = 0.5 * (weight * (logits[:, 2:4] - targets) ** 2).sum()
    return {
        "loss_box": near + far,
        "loss_objectness": _objectness_loss(grid, place, truths.padded, anchors[mask], size, ignore),
        "loss_class": F.binary_cross_entropy_with_logits(logits[:, 5:], classes[last], reduction="sum"),
    }


def _last_in_place(place: Tensor, labels: Tensor, places: int, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Which objects (M,) are the last of their place, and the classes of all in their place (M, C).

    Written so that it does not depend on the order in which a GPU writes.
    """
    order = torch.arange(len(place), device=place.device)
    winner = order.new_zeros(places).scatter_reduce(0, place, order, "amax")[place]  # (M,)
    classes = grid.new_zeros(len(place), grid.shape[-1] - 5)
    classes[winner, labels] = 1
    return (winner == order).nonzero()[:, 0], classes


def _objectness_loss(grid: Tensor, place: Tensor, truths: Tensor, anchors: Tensor, size: int, ignore: float) -> Tensor:
    """Cross-entropy of all objectness of a grid but of boxes that lie well on an object which is another's."""
    logits = grid[..., 4].flatten()
    target = torch.zeros_like(logits)
    target[place] = 1
    with torch.no_grad():
        boxes = boxes_of(grid, anchors, size).flatten(1, 3)  # (N, P, 4)
        counts = (best_overlap(boxes, truths.to(boxes)) <= ignore).flatten().to(logits)
        counts[place] = 1
    return F.binary_cross_entropy_with_logits(logits, target, counts, reduction="sum")


def best_overlap(boxes: Tensor, truths: Tensor) -> Tensor:
    """The largest intersection over union of each box with a true one of its picture.

    Args:
        boxes: (N, P, 4), xyxy.
        truths: (N, T, 4), xyxy; T may be 0, empty boxes overlap with none.

    Returns:
        (N, P), 0 where there is no true box.
    """
    if not truths.shape[1]:
        return boxes.new_zeros(boxes.shape[:2])
    mine, theirs = boxes[:, :, None].unbind(-1), truths[:, None].unbind(-1)  # each (N, P, 1) and (N, 1, T)
    wide = (torch.minimum(mine[2], theirs[2]) - torch.maximum(mine[0], theirs[0])).clamp(min=0)
    high = (torch.minimum(mine[3], theirs[3]) - torch.maximum(mine[1], theirs[1])).clamp(min=0)
    both = wide.mul_(high)  # (N, P, T)
    areas = (mine[2] - mine[0]) * (mine[3] - mine[1]) + (theirs[2] - theirs[0]) * (theirs[3] - theirs[1])
    return both.div_((areas - both).clamp(min=1e-9)).amax(2)


class YOLOv3(DetectionTask):
    """YOLOv3, or tiny-YOLOv3, with Darknet's weights, loss and letterbox.

    Args:
        num_classes: Number of classes.
        class_names: Their names, in the order of the labels 1, 2, …; None calls them "1", "2", ….
        tiny: Build tiny-YOLOv3, with two grids.
        width: Factor of all channels; 1 is the paper's.
        image_size: Side in pixels of the squares into which pictures are fitted, a multiple of 32.
        anchors: Width and height of each anchor in pixels of such a square; None: the paper's for COCO at 416 pixels.
        masks: Numbers of the anchors that each grid owns, the coarsest grid first; None: Darknet's.
        prior: Objectness that an untrained network gives to a box; Darknet's is 0.5.
        ignore: Overlap with a true box above which a box is taught no objectness.
        score_threshold: Smallest score of a detection; Darknet has 0.005 to measure and 0.24 or 0.5 to show.
        overlap: Intersection over union with a better box of the same class from which a box is dropped.
        detections: Detections of an image, at most.
        weights: Darknet's file (``yolov3.weights``, ``yolov3-tiny.weights``, ``darknet53.conv.74``), a file of the zoo
            (``.safetensors``, ``.ckpt``, ``.pth``) or ``hf://owner/name``. The outputs are fresh where the number of
            classes differs.
        keep_matching_classes: Keep the rows of the outputs whose class names match; Darknet's files have no names.
        optimizer: Makes the optimizer from the parameters. Default: Darknet's, for 64 pictures a step.
        scheduler: Makes the schedule from the optimizer and the run's number of steps. Default: Darknet's, a tenth of
            the rate after 400,000 and 450,000 of 500,200 steps.
    """

    background: ClassVar[list[str]] = ["(box)"]

    head: YOLOv3Head

    @plain_arguments
    def __init__(
        self,
        num_classes: int = 80,
        class_names: list[str] | None = None,
        tiny: bool = False,
        width: float = 1.0,
        image_size: int = 416,
        anchors: list[list[float]] | None = None,
        masks: list[list[int]] | None = None,
        prior: float = 0.5,
        ignore: float = 0.7,
        score_threshold: float = 0.005,
        overlap: float = 0.45,
        detections: int = 100,
        weights: str | None = None,
        keep_matching_classes: bool = False,
        optimizer: OptimizerCallable = lambda params: optim.SGD(params, lr=1e-3, momentum=0.9, weight_decay=5e-4),
        scheduler: SchedulerCallable | None = lambda optimizer, steps: Step(optimizer, steps, [0.8, 0.9], warmup=0.002),
    ) -> None:
        super().__init__(num_classes, class_names, optimizer, scheduler)
        self.example_input_array = torch.zeros(1, 3, image_size, image_size)
        self.image_size = image_size
        self.ignore = ignore
        self.score_threshold = score_threshold
        self.overlap = overlap
        self.detections = detections
        shapes = [(w, h) for w, h in anchors] if anchors else (TINY_ANCHORS if tiny else ANCHORS)
        network = YOLOv3Network(num_classes, tiny, width, shapes, masks, prior)
        self.backbone = network.backbone
        self.head = network.head
        self.to(memory_format=torch.channels_last)
        if weights is not None and Path(weights).suffix not in DARKNET_SUFFIXES:
            load_weights(self, weights, keep_matching_classes)
        elif weights is not None:
            load_darknet(self, weights, len(self.head.masks[0]))

    def class_rows(self, key: str, rows: int, classes: int) -> list[Tensor] | None:
        """Which rows of an output's tensor belong to the boxes, and which to each class, of all its anchors."""
        anchors = len(self.head.masks[0])
        if not key.endswith(("output.weight", "output.bias")) or rows != anchors * (4 + classes):
            return None
        numbers = torch.arange(rows).view(anchors, 4 + classes)  # of each anchor: box, objectness, classes
        return [numbers[:, :5].flatten(), *numbers[:, 5:].T]

    def detect(self, images: list[Tensor]) -> Detections:
        """Boxes in the images' pixels, labels 1…C, scores."""
        if not images:
            return []
        squares, where = letterbox(images, self.image_size)
        outputs = self.head(self.backbone(squares))
        boxes, objectness, classes = decode(outputs, self.head.anchors, self.head.masks, self.image_size)
        limits = self.score_threshold, self.overlap, self.detections
        return [
            select(boxes[k], objectness[k], classes[k], where[k], (image.shape[1], image.shape[2]), *limits)
            for k, image in enumerate(images)
        ]

    def losses(self, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        """``loss_box``, ``loss_objectness``, ``loss_class``."""
        squares, where = letterbox(images, self.image_size)
        outputs = self.head(self.backbone(squares))
        boxes = [place(target["boxes"], spot) for target, spot in zip(targets, where, strict=True)]
        labels = [target["labels"] for target in targets]
        return yolo_losses(outputs, boxes, labels, self.head.anchors, self.head.masks, self.image_size, self.ignore)
