"""The assignment's two-stage detector against the sheet's numbers and plain loops in float64."""

import math
from statistics import median

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import mobilenet_v2
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_convert, box_iou, roi_align

from zoo.single_stage import (
    ANCHORS,
    SingleStageDetector,
    grid_anchors,
    last_channels,
    mobilenet_features,
    sample,
    squash,
)
from zoo.standardization import IMAGENET_MEAN, IMAGENET_STD
from zoo.two_stage import (
    ProposalHead,
    RegionHead,
    TwoStageDetector,
    assign,
    corners_within,
    name_objects,
    propose,
    region_features,
    stretch,
    stretch_to,
    two_stage_losses,
)
from zoo.weights import describe


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def anchors_of(cells: int, dtype=torch.float64) -> torch.Tensor:
    return grid_anchors(cells, torch.tensor(ANCHORS, dtype=dtype))


# Network


def test_parameters_are_the_assignments():
    with torch.device("meta"):
        channels = last_channels(mobilenet_features())
        assert count(ProposalHead(channels, len(ANCHORS), 0.3)) == 2_963_254
        assert count(RegionHead(channels, 20, 0.3)) == 333_076
        assert count(TwoStageDetector()) == 2_223_872 + 2_963_254 + 333_076


def test_the_proposal_head_says_for_each_anchor_two_scores_then_four_offsets():
    torch.manual_seed(0)
    head = ProposalHead(16, 9, 0.3).eval()
    x = torch.randn(2, 16, 5, 5)
    hidden = F.leaky_relu(F.conv2d(x, head.hidden[0].weight, head.hidden[0].bias, padding=1), 0.01)
    maps = torch.einsum("oc,nchw->nohw", head.output.weight[:, :, 0, 0], hidden) + head.output.bias[:, None, None]
    scores, offsets = head(x)
    assert scores.shape == (2, 9, 5, 5, 2)
    assert offsets.shape == (2, 9, 5, 5, 4)
    for a in range(9):
        torch.testing.assert_close(scores[:, a].movedim(-1, 1), maps[:, 6 * a : 6 * a + 2])
        torch.testing.assert_close(offsets[:, a].movedim(-1, 1), maps[:, 6 * a + 2 : 6 * a + 6])


def test_dropout_of_both_stages_is_the_assignments():
    model = TwoStageDetector(width=0.35, image_size=64)
    assert [m.p for part in (model.rpn, model.head) for m in part.modules() if isinstance(m, nn.Dropout)] == [0.3, 0.3]


# Boxes


def test_stretch_moves_by_shares_of_the_sides():
    """By hand, and as torchvision's box coder does; the single-stage detector's would move by cells."""
    by_hand = stretch(torch.tensor([2.5, 3.5, 2, 4]), torch.tensor([0.25, -0.5, math.log(2), 0]))
    torch.testing.assert_close(by_hand, torch.tensor([3.0, 1.5, 4, 4]))
    torch.manual_seed(0)
    anchors, boxes = torch.rand(2, 50, 4, dtype=torch.float64) + 0.1
    offsets = torch.randn(50, 4, dtype=torch.float64)
    torch.testing.assert_close(stretch(anchors, stretch_to(anchors, boxes)), boxes)
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0), bbox_xform_clip=8.0)
    theirs = coder.decode_single(offsets, box_convert(anchors, "cxcywh", "xyxy"))
    torch.testing.assert_close(box_convert(stretch(anchors, offsets), "cxcywh", "xyxy"), theirs)
    pair = [box_convert(part, "cxcywh", "xyxy") for part in (boxes, anchors)]
    torch.testing.assert_close(stretch_to(anchors, boxes), coder.encode_single(*pair))


def test_any_offsets_make_boxes_within_the_grid():
    anchors = anchors_of(4, torch.float32)
    boxes = stretch(anchors, torch.tensor([90.0, -1e4, 90, -90]).expand_as(anchors))
    assert boxes.isfinite().all()
    wild = corners_within(boxes, 4)
    assert wild.min() >= 0
    assert wild.max() <= 4


# Regions


def slow_region(channel: torch.Tensor, box: list[float]) -> float:
    """Mean of RoIAlign's 2x2 bins, each the mean of samples between the four nearest values of a map (S, S)."""
    cells = len(channel)
    wide, high = max(box[2] - box[0], 1) / 2, max(box[3] - box[1], 1) / 2
    columns, rows = math.ceil(wide), math.ceil(high)
    total = 0.0
    for y in ((box[1] + high * (bin_ + (k + 0.5) / rows)) for bin_ in range(2) for k in range(rows)):
        for x in ((box[0] + wide * (bin_ + (k + 0.5) / columns)) for bin_ in range(2) for k in range(columns)):
            if y > cells or x > cells:
                continue  # counts as 0, as far from the map as that
            top, left = min(int(y), cells - 1), min(int(x), cells - 1)
            down, right = (y - top, x - left) if top < cells - 1 else (0.0, x - left)
            right = right if left < cells - 1 else 0.0
            for j, share in ((top, 1 - down), (min(top + 1, cells - 1), down)):
                for i, part in ((left, 1 - right), (min(left + 1, cells - 1), right)):
                    total += share * part * channel[j, i].item()
    return total / (4 * rows * columns)


def test_region_features_are_the_mean_of_roi_aligns_four_values():
    """By hand: one sample in each quarter of the box, between the four nearest values. RoIPool would give 1 / 4."""
    features = torch.zeros(2, 1, 4, 4)
    features[0, 0, 1, 1] = 1
    boxes = torch.tensor([[0.5, 0.5, 2.5, 2.5], [1, 1, 3, 3], [1, 1, 3, 3]])
    found = region_features(features, boxes, torch.tensor([0, 0, 1]))
    torch.testing.assert_close(found, torch.tensor([[0.25], [0.0625], [0]]))


def test_region_features_are_those_of_a_loop():
    torch.manual_seed(3)
    features = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    corner = torch.rand(20, 2, dtype=torch.float64) * 5
    boxes = torch.cat([corner, corner + torch.rand(20, 2, dtype=torch.float64) * 6], 1).clamp(0, 6)
    boxes[0] = torch.tensor([0, 0, 6, 6])
    picture = torch.randint(3, (20,))
    found = region_features(features, boxes, picture)
    assert found.shape == (20, 2)
    for k in range(20):
        expected = [slow_region(channel, boxes[k].tolist()) for channel in features[picture[k]]]
        assert found[k].tolist() == pytest.approx(expected)
    assert region_features(features, boxes[:0], picture[:0]).shape == (0, 2)


# Assignment


def slow_iou(a, b) -> float:
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    both = max(wide, 0) * max(high, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def all_corners(cells: int) -> list[tuple[float, ...]]:
    """The anchors in the order of a flat (A, S, S)."""
    return [
        (i + 0.5 - wide / 2, j + 0.5 - high / 2, i + 0.5 + wide / 2, j + 0.5 + high / 2)
        for wide, high in ANCHORS
        for j in range(cells)
        for i in range(cells)
    ]


def slow_assign(boxes, cells: int, positive: float, negative: float) -> tuple[dict[int, int], set[int]]:
    """The object of each positive anchor, and the anchors that may be negatives, of one picture."""
    anchors = all_corners(cells)
    overlaps = [[slow_iou(anchor, box) for box in boxes] for anchor in anchors]
    taught = {}
    for k, mine in enumerate(overlaps):
        best = [u > 0 and u == max(row[t] for row in overlaps) for t, u in enumerate(mine)]
        if any(u > positive for u in mine) or any(best):
            taught[k] = mine.index(max(mine))
    return taught, {k for k, mine in enumerate(overlaps) if k not in taught and all(u < negative for u in mine)}


def truths(cells: int) -> list[torch.Tensor]:
    """Boxes of four pictures: any, none, special ones, and one that an anchor fits."""
    torch.manual_seed(1)
    corner = torch.rand(8, 2, dtype=torch.float64) * cells * 0.7
    boxes = torch.cat([corner, corner + 0.2 + torch.rand(8, 2, dtype=torch.float64) * cells * 0.3], 1)
    special = torch.tensor(
        [
            [1.125, 0.875, 2.5, 3.25],
            [1.125, 0.875, 2.5, 3.25],  # the same again: the first has all of their anchors
            [1.125, 0.875, 2.5, 3.375],  # nearly so: its best anchor overlaps more with another
            [1.5, 1.5, 2.5, 2.5],  # centre on a crossing: four anchors are equally good, and below 0.3
            [0.25, 0.25, 0.375, 0.3125],  # small: its best anchor hardly overlaps
            [cells + 9, cells + 9, cells + 10, cells + 10],  # no anchor overlaps
        ],
        dtype=torch.float64,
    )
    fitting = torch.tensor([[1.0, 1, 3, 3]], dtype=torch.float64)
    return [boxes, boxes[:0], special, fitting]


@pytest.mark.parametrize(("positive", "negative"), [(0.7, 0.3), (0.5, 0.2)])
@pytest.mark.parametrize("cells", [7, 4])
def test_anchors_are_shared_out_as_in_a_loop(cells, positive, negative):
    boxes = truths(cells)
    number = 9 * cells * cells
    places, objects, spare = assign(anchors_of(cells), boxes, positive, negative)
    assert places.tolist() == sorted(places.tolist())
    first = 0
    for b, mine in enumerate(boxes):
        taught, free = slow_assign(mine.tolist(), cells, positive, negative)
        here = places // number == b
        found = dict(zip((places[here] % number).tolist(), (objects[here] - first).tolist(), strict=True))
        assert found == taught
        assert set(spare[b].flatten().nonzero()[:, 0].tolist()) == free
        first += len(mine)
    assert spare[1].all(), "a picture without objects is all background"


def test_thresholds_are_the_assignments_by_default():
    """A one-cell object in cell (3, 3): the anchor above 0.7 and no other is taught; up to 0.3 there is nothing."""
    boxes = [torch.tensor([[3.0, 3, 4, 3.875]])]
    places, _, spare = assign(anchors_of(7), boxes)
    overlaps = torch.tensor([slow_iou(anchor, boxes[0][0].tolist()) for anchor in all_corners(7)])
    assert places.tolist() == [24]
    assert torch.equal(spare.flatten(), overlaps < 0.3)
    assert ((overlaps > 0.2) & (overlaps < 0.3)).any(), "between the two detectors' thresholds"
    model = TwoStageDetector(width=0.35, image_size=64)
    assert (model.positive, model.negative) == (0.7, 0.3)


def test_without_any_object_all_is_background():
    places, objects, spare = assign(anchors_of(4), [torch.zeros(0, 4)] * 2)
    assert places.tolist() == objects.tolist() == []
    assert spare.shape == (2, 9, 4, 4)
    assert spare.all()


# Loss


def outputs_of(cells: int, pictures: int = 4) -> list[torch.Tensor]:
    torch.manual_seed(2)
    shapes = (3, cells, cells), (9, cells, cells, 2), (9, cells, cells, 4)
    return [torch.randn(pictures, *shape, dtype=torch.float64) * 0.5 for shape in shapes]


def head_of(classes: int) -> RegionHead:
    torch.manual_seed(4)
    return RegionHead(3, classes, 0.3).double().eval()


def labels_of(boxes: list[torch.Tensor], classes: int) -> list[torch.Tensor]:
    return [torch.arange(len(mine)) % classes + 1 for mine in boxes]


@pytest.mark.parametrize("cells", [7, 4])
def test_losses_are_the_assignments(cells, monkeypatch):
    """All sums in plain loops; which negatives were drawn is overheard."""
    classes, boxes, drawn = 5, truths(cells), []

    def overheard(candidates, number):
        drawn.extend(sample(candidates, number).tolist())
        return torch.tensor(drawn)

    monkeypatch.setattr("zoo.two_stage.sample", overheard)
    features, scores, offsets = outputs_of(cells)
    head, labels = head_of(classes), labels_of(boxes, classes)
    losses = two_stage_losses(features, scores, offsets, head, anchors_of(cells), boxes, labels)
    flat_scores, flat_offsets = scores.flatten(0, 3), offsets.flatten(0, 3)
    corners, number = all_corners(cells), 9 * cells * cells
    objectness = smooth = entropy = positives = 0.0

    def softplus(x):
        return math.log1p(math.exp(x))

    for b, mine in enumerate(boxes):
        for k, t in slow_assign(mine.tolist(), cells, 0.7, 0.3)[0].items():
            positives += 1
            some, none = flat_scores[b * number + k].tolist()
            objectness += softplus(-some) + softplus(none)
            left, top, right, bottom = corners[k]
            x, y, w, h = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
            p, truth = flat_offsets[b * number + k].tolist(), mine[t].tolist()
            wide, high = truth[2] - truth[0], truth[3] - truth[1]
            wanted = ((truth[0] + truth[2]) / 2 - x) / w, ((truth[1] + truth[3]) / 2 - y) / h
            wanted += math.log(wide / w), math.log(high / h)
            for one, other in zip(p, wanted, strict=True):
                error = abs(one - other)
                smooth += error**2 / 2 if error < 1 else error - 0.5
            x, y, w, h = x + p[0] * w, y + p[1] * h, w * math.exp(p[2]), h * math.exp(p[3])
            box = [min(max(edge, 0), cells) for edge in (x - w / 2, y - h / 2, x + w / 2, y + h / 2)]
            region = torch.tensor([slow_region(channel, box) for channel in features[b]], dtype=torch.float64)
            logits = head.classes(head.hidden[0](region).relu()).tolist()
            entropy += math.log(sum(map(math.exp, logits))) - logits[labels[b][t] - 1]
    for place in drawn:
        some, none = flat_scores[place].tolist()
        objectness += softplus(some) + softplus(-none)
        b, k = divmod(place, number)
        assert k in slow_assign(boxes[b].tolist(), cells, 0.7, 0.3)[1]
    assert len(drawn) == positives > 8
    assert losses["loss_objectness"].item() == pytest.approx(objectness / 4)
    assert losses["loss_rpn_box"].item() == pytest.approx(5 * smooth / 4)
    assert losses["loss_class"].item() == pytest.approx(entropy / positives)


def test_the_gradient_is_that_of_the_loss():
    """But for what RoIAlign does not say: how the classes would change with the boxes."""
    boxes, anchors, head = truths(4), anchors_of(4), head_of(3)
    labels = labels_of(boxes, 3)
    features, scores, offsets = (output.requires_grad_() for output in outputs_of(4))

    def loss(features, scores, offsets, *names):
        torch.manual_seed(0)
        losses = two_stage_losses(features, scores, offsets, head, anchors, boxes, labels)
        return sum(losses[name] for name in names)

    names = "loss_objectness", "loss_rpn_box"
    fixed = features.detach()
    assert torch.autograd.gradcheck(lambda s, o: loss(fixed, s, o, *names), (scores, offsets), fast_mode=True)
    assert torch.autograd.gradcheck(lambda f: loss(f, scores, offsets, "loss_class"), (features,), fast_mode=True)


def differentiable(features: torch.Tensor, rois: torch.Tensor, size: int) -> torch.Tensor:
    return (features.mean() * rois[:, 2:])[:, :, None, None].expand(-1, -1, size, size)


@pytest.mark.parametrize("align", [roi_align, differentiable])
def test_proposals_learn_nothing_from_the_classes(align, monkeypatch):
    """Whatever RoIAlign does: torchvision's own, in deterministic mode on a GPU, has a gradient to the boxes."""
    monkeypatch.setattr("zoo.two_stage.roi_align", align)
    boxes, outputs = truths(4), [output.requires_grad_() for output in outputs_of(4)]
    losses = two_stage_losses(*outputs, head_of(3), anchors_of(4), boxes, labels_of(boxes, 3))
    features, scores, offsets = torch.autograd.grad(losses["loss_class"], outputs, allow_unused=True)
    assert features.abs().sum() > 0
    assert scores is None
    assert offsets is None


def test_a_batch_without_objects_teaches_one_negative():
    outputs = [output.requires_grad_() for output in outputs_of(4)]
    nothing = [torch.zeros(0, 4)] * 4, [torch.zeros(0, dtype=torch.int64)] * 4
    losses = two_stage_losses(*outputs, head_of(3), anchors_of(4), *nothing)
    assert losses["loss_rpn_box"] == losses["loss_class"] == 0
    losses["loss_objectness"].backward()
    taught = outputs[1].grad.nonzero()
    assert len(taught) == 2, "both scores of one anchor"
    some, none = outputs[1][tuple(taught[0][:4])].tolist()
    expected = math.log1p(math.exp(some)) + math.log1p(math.exp(-none))
    assert losses["loss_objectness"].item() == pytest.approx(expected / 4)


def test_without_any_negative_the_objects_are_learnt():
    """One cell, one anchor, and an object that it fits."""
    features, scores, offsets = outputs_of(1)
    boxes, labels = [torch.tensor([[0.0, 0, 1, 1]])] * 4, [torch.tensor([1])] * 4
    outputs = features, scores[:, :1], offsets[:, :1]
    losses = two_stage_losses(*outputs, head_of(3), anchors_of(1)[:1], boxes, labels)
    expected = F.softplus(-scores[:, 0, ..., 0]).sum() + F.softplus(scores[:, 0, ..., 1]).sum()
    assert losses["loss_objectness"].item() == pytest.approx(expected.item() / 4)


def test_flat_boxes_and_wild_offsets_give_a_finite_loss():
    boxes = [torch.tensor([[1.0, 1, 1, 2], [1, 1, 3, 3], [2, 1, 2 + 1e-7, 2]])] * 4
    features, scores, offsets = outputs_of(4)
    losses = two_stage_losses(features, scores, offsets * 1e4, head_of(3), anchors_of(4), boxes, labels_of(boxes, 3))
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("label", [0, 4])
def test_a_label_that_the_network_does_not_know_is_named(label):
    boxes, labels = [torch.tensor([[1.0, 1, 2, 2]])] * 4, [torch.tensor([label])] * 4
    with pytest.raises(ValueError, match=rf"labels \[{label}\] are none of 1 to 3"):
        two_stage_losses(*outputs_of(4), head_of(3), anchors_of(4), boxes, labels)


# Detection


def test_proposals_are_confident_boxes_without_near_doubles():
    anchors = anchors_of(7, torch.float32)
    scores, offsets = torch.zeros(9, 7, 7, 2), torch.zeros(9, 7, 7, 4)
    scores[..., 0] = -9
    scores[..., 1] = torch.randn(9, 7, 7) * 9  # of the background: nobody asks
    scores[1, 3, 3, 0], scores[1, 3, 2, 0], scores[0, 0, 0, 0], scores[2, 5, 5, 0] = 2.0, 1.5, 1.0, -0.5
    offsets[1, 3, 3, 0], offsets[1, 3, 2, 0] = -0.225, 0.225  # shares of two cells: near-doubles
    offsets[0, 0, 0, 2] = math.log(4)  # beyond the left edge
    boxes, confidences = propose(scores, offsets, anchors)
    torch.testing.assert_close(boxes, torch.tensor([[2.05, 2.5, 4.05, 4.5], [0, 0, 2.5, 1]]))
    torch.testing.assert_close(confidences, torch.tensor([2.0, 1.0]).sigmoid())
    assert len(propose(scores, offsets, anchors, overlap=0.95)[0]) == 3
    assert len(propose(scores, offsets, anchors, threshold=0.3)[0]) == 3
    none = propose(scores, offsets, anchors, threshold=0.99)
    assert [tuple(part.shape) for part in none] == [(0, 4), (0,)]


def test_objects_are_named_by_their_best_class():
    confidences = torch.tensor([0.9, 0.8, 0.6])
    logits = torch.tensor([[0.0, 0, 0.1], [0, 5, 0], [0, 0, -9]])
    kept, labels, scores = name_objects(confidences, logits)
    assert kept.tolist() == [0, 1, 2]
    assert labels.tolist() == [3, 2, 1]
    assert torch.equal(scores, confidences)
    kept, labels, scores = name_objects(confidences, logits, threshold=0.3)
    assert kept.tolist() == [1, 0]
    assert labels.tolist() == [2, 3]
    expected = [0.8 * math.exp(5) / (math.exp(5) + 2), 0.9 * math.exp(0.1) / (math.exp(0.1) + 2)]
    assert scores.tolist() == pytest.approx(expected)
    assert [len(part) for part in name_objects(confidences[:0], logits[:0], 0.3)] == [0, 0, 0]


# The LightningModule


SMALL = {"width": 0.35, "image_size": 96, "dropout": 0.0, "score_threshold": 0.05}


def scenes() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Two pictures of different sizes with coloured boxes of classes 1 to 3, and one without objects."""
    generator = torch.Generator().manual_seed(0)
    sizes = (100, 160), (128, 96), (64, 64)
    boxes = [[[8.0, 10, 60, 80], [90, 5, 140, 45]], [[20.0, 30, 80, 110]], []]
    labels = [[1, 3], [2], []]
    images = [torch.rand(3, *size, generator=generator) * 0.2 for size in sizes]
    for image, mine, kinds in zip(images, boxes, labels, strict=True):
        for (left, top, right, bottom), kind in zip(mine, kinds, strict=True):
            image[kind - 1, int(top) : int(bottom), int(left) : int(right)] = 1
    targets = [
        {"boxes": torch.tensor(mine).view(-1, 4), "labels": torch.tensor(kinds, dtype=torch.int64)}
        for mine, kinds in zip(boxes, labels, strict=True)
    ]
    return images, targets


def test_it_learns_a_few_pictures():
    """The losses fall to less than a tenth; the best box of each class is at its object."""
    torch.manual_seed(0)
    model = TwoStageDetector(3, class_scores=True, **SMALL)
    images, targets = scenes()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    sums = []
    for _ in range(60):
        loss = sum(model.losses(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sums.append(loss.item())
    assert median(sums[-11:]) < sums[0] / 10  # a negative that was never drawn before costs more, once
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # average over what follows: these steps are too few for running statistics
            module.reset_running_stats()
    with torch.inference_mode():
        model.losses(images, targets)
        found = model.eval()(images)
    for detections, target in zip(found, targets, strict=True):
        best = [detections["boxes"][detections["labels"] == label][:1] for label in target["labels"]]
        assert not best or box_iou(torch.cat(best), target["boxes"]).diagonal().min() > 0.5  # as lecture 15 counts


def test_the_modules_losses_and_detections_are_in_the_pictures_pixels():
    torch.manual_seed(1)
    model = TwoStageDetector(3, **SMALL).eval()
    images, targets = scenes()
    features = model.backbone(squash(images, 96))
    scores, offsets = model.rpn(features)
    stretched = [torch.tensor([3 / 160, 3 / 100] * 2), torch.tensor([3 / 96, 3 / 128] * 2), torch.ones(4)]
    boxes = [target["boxes"] * factor for target, factor in zip(targets, stretched, strict=True)]
    torch.manual_seed(2)  # of the negatives
    labels = [target["labels"] for target in targets]
    expected = two_stage_losses(features, scores, offsets, model.head, model.anchors, boxes, labels)
    torch.manual_seed(2)
    found = model.losses(images, targets)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[key], value) for key, value in expected.items())
    detections = model(images)
    for k, (image, mine) in enumerate(zip(images, detections, strict=True)):
        assert len(mine["boxes"]) > 1
        assert (mine["boxes"] <= torch.tensor([image.shape[2], image.shape[1]] * 2)).all()
        assert ((mine["labels"] >= 1) & (mine["labels"] <= 3)).all()
        proposals, confidences = propose(scores[k], offsets[k], model.anchors, 0.05)
        torch.testing.assert_close(mine["scores"], confidences)
        cells = torch.tensor([image.shape[2], image.shape[1]] * 2) / 3
        torch.testing.assert_close(mine["boxes"], proposals * cells)
        logits = model.head(features[k : k + 1], proposals, torch.zeros(len(proposals)))
        assert torch.equal(mine["labels"], logits.argmax(1) + 1)


def test_pictures_without_detections_are_empty():
    model = TwoStageDetector(3, **SMALL | {"score_threshold": 0.9}).eval()
    images, _ = scenes()
    model.rpn.output.bias.data.view(9, 6)[:, 0] = -50
    for class_scores in (False, True):
        model.class_scores = class_scores
        for mine in model(images):
            assert [tuple(mine[key].shape) for key in ("boxes", "labels", "scores")] == [(0, 4), (0,), (0,)]
            assert mine["labels"].dtype == torch.int64
    assert model([]) == []


@pytest.mark.parametrize("with_objects", [True, False])
def test_every_parameter_gets_a_gradient(with_objects):
    torch.manual_seed(0)
    model = TwoStageDetector(3, **SMALL)
    images, targets = scenes()
    if not with_objects:
        images, targets = images[2:] * 2, targets[2:] * 2
    losses = model.losses(images, targets)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert model.rpn.output.weight.grad.abs().sum() > 0
    assert (model.head.classes.weight.grad.abs().sum() > 0) == with_objects


def test_half_precision_changes_little():
    torch.manual_seed(0)
    model = TwoStageDetector(3, **SMALL)
    images, targets = scenes()
    results = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = model.train().losses(images, targets)
            found = model.eval()(images)
        sum(losses.values()).backward()
        assert all(loss.dtype == torch.float32 for loss in losses.values())
        assert found[0]["boxes"].dtype == found[0]["scores"].dtype == torch.float32
        results.append(sum(losses.values()).item())
    assert results[1] == pytest.approx(results[0], rel=0.05)


def test_thresholds_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match=r"negative=0.8 must be at most positive=0.7"):
        TwoStageDetector(negative=0.8)


# Weights


def test_the_backbone_starts_from_torchvisions_file_or_from_another_detectors(tmp_path):
    torch.manual_seed(0)
    theirs = mobilenet_v2(weights=None, width_mult=0.35)
    torch.save(theirs.state_dict(), tmp_path / "mobilenet.pth")
    other = {"mean": (0.5, 0.4, 0.3), "std": (0.3, 0.3, 0.2)}
    model = TwoStageDetector(3, backbone_weights=str(tmp_path / "mobilenet.pth"), **other, **SMALL).eval()
    images = torch.rand(2, 3, 96, 96)
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(model.backbone(images), theirs.eval().features((images - mean) / std))
    assert model.class_names == ["1", "2", "3"]
    single = SingleStageDetector(7, **other, **SMALL).eval()
    torch.save({"state_dict": single.state_dict()}, tmp_path / "single.ckpt")
    model = TwoStageDetector(3, backbone_weights=str(tmp_path / "single.ckpt"), **SMALL).eval()
    torch.testing.assert_close(model.backbone(images), single.backbone(images))
    with pytest.raises(ValueError, match=r"mobilenet\.pth is not of a mobilenet_v2: features\.2\.conv"):
        TwoStageDetector(3, backbone_weights=str(tmp_path / "mobilenet.pth"), **SMALL | {"width": 0.5})


def saved(model: TwoStageDetector, path) -> str:
    torch.save({"state_dict": model.state_dict(), "zoo": describe(model)}, path)
    return str(path)


def test_other_classes_replace_the_last_layer_alone(tmp_path):
    before = TwoStageDetector(3, ["cat", "dog", "cow"], **SMALL)
    path = saved(before, tmp_path / "before.ckpt")
    fresh = TwoStageDetector(2, ["cow", "owl"], weights=path, **SMALL)
    kept = TwoStageDetector(2, ["cow", "owl"], weights=path, keep_matching_classes=True, **SMALL)
    for after in (fresh, kept):
        own = after.state_dict()
        differing = [key for key, value in before.state_dict().items() if own[key].shape != value.shape]
        assert differing == ["head.classes.weight", "head.classes.bias"]
        assert all(torch.equal(own[k], v) for k, v in before.state_dict().items() if k not in differing)
    assert torch.equal(kept.head.classes.weight[0], before.head.classes.weight[2])
    assert kept.head.classes.bias[0] == before.head.classes.bias[2]
    for row in (fresh.head.classes.weight[0], kept.head.classes.weight[1]):
        assert not (row == before.head.classes.weight).all(1).any()


def test_as_many_classes_as_hidden_values_are_not_taken_for_these(tmp_path):
    names = [f"class {k}" for k in range(256)]
    before = TwoStageDetector(256, names, **SMALL)
    path = saved(before, tmp_path / "before.ckpt")
    after = TwoStageDetector(256, names[::-1], weights=path, keep_matching_classes=True, **SMALL)
    assert torch.equal(after.head.hidden[0].weight, before.head.hidden[0].weight)
    assert torch.equal(after.head.classes.weight, before.head.classes.weight.flip(0))
