"""The assignment's single-stage detector against the sheet's numbers and plain loops in float64."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import mobilenet_v2
from torchvision.ops import box_iou

from zoo.single_stage import (
    ANCHORS,
    SingleStageDetector,
    SingleStageHead,
    SingleStageNetwork,
    best_overlaps,
    grid_anchors,
    last_channels,
    mobilenet_features,
    nearest_anchors,
    offsets_to,
    sample,
    select,
    shift,
    single_stage_losses,
    squash,
    to_cells,
    to_pixels,
)
from zoo.standardization import IMAGENET_MEAN, IMAGENET_STD, standardized
from zoo.weights import Published, describe


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def anchors_of(cells: int, dtype=torch.float64) -> torch.Tensor:
    return grid_anchors(cells, torch.tensor(ANCHORS, dtype=dtype))


# Network


def test_parameters_are_the_assignments():
    with torch.device("meta"):
        network = SingleStageNetwork()
    assert count(network.backbone) == 2_223_872
    assert count(network.head) == 172_353


@pytest.mark.parametrize(("size", "width"), [(224, 1.0), (128, 0.5)])
def test_shapes_and_ranges(size, width):
    torch.manual_seed(0)
    cells = size // 32
    network = SingleStageNetwork(7, width)
    confidences, offsets, logits = network(torch.randn(2, 3, size, size))
    assert confidences.shape == (2, 9, cells, cells)
    assert offsets.shape == (2, 9, cells, cells, 4)
    assert logits.shape == (2, 7, cells, cells)
    assert ((confidences > 0) & (confidences < 1)).all()
    assert offsets[..., :2].abs().max() < 0.5


def test_the_head_is_the_assignments_single_convolution_of_65_maps():
    """For each anchor a confidence and four offsets, then the classes; sigmoid of the confidence and of x and y."""
    torch.manual_seed(0)
    head = SingleStageHead(16, 20, 9, 0.3).eval()
    first, last = nn.Conv2d(16, 128, 1), nn.Conv2d(128, 65, 1)
    first.load_state_dict(head.hidden[0].state_dict())
    last.weight.data = torch.cat([head.boxes.weight, head.classes.weight])
    last.bias.data = torch.cat([head.boxes.bias, head.classes.bias])
    x = torch.randn(2, 16, 7, 7) * 4
    maps = last(F.leaky_relu(first(x), 0.01))
    confidences, offsets, logits = head(x)
    for a in range(9):
        torch.testing.assert_close(confidences[:, a], maps[:, 5 * a].sigmoid())
        torch.testing.assert_close(offsets[:, a, ..., 0], maps[:, 5 * a + 1].sigmoid() - 0.5)
        torch.testing.assert_close(offsets[:, a, ..., 1], maps[:, 5 * a + 2].sigmoid() - 0.5)
        torch.testing.assert_close(offsets[:, a, ..., 2:].movedim(-1, 1), maps[:, 5 * a + 3 : 5 * a + 5])
    torch.testing.assert_close(logits, maps[:, 45:])


def test_torchvisions_imagenet_weights_load_by_name():
    torch.manual_seed(0)
    theirs = mobilenet_v2(weights=None)
    backbone = standardized(mobilenet_features(), (0.5, 0.5, 0.5), (1.0, 1.0, 1.0))
    state = Published("mobilenet_v2", {"classifier.": "head.imagenet."}).rename(theirs.state_dict())
    ours = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    backbone.load_state_dict(ours)
    images = torch.rand(1, 3, 64, 64)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    torch.testing.assert_close(backbone.eval()(images), theirs.eval().features((images - mean) / std))
    assert last_channels(backbone) == 1280


# Pictures and boxes


def test_pictures_are_squashed_and_their_boxes_with_them():
    image = torch.zeros(3, 100, 300)
    image[:, 25:50, 60:150] = 1
    (square,) = squash([image], 224)
    assert square.shape == (3, 224, 224)
    box = torch.tensor([[60.0, 25, 150, 50]])
    cells = to_cells(box, (100, 300), 7)
    torch.testing.assert_close(cells, torch.tensor([[1.4, 1.75, 3.5, 3.5]]))
    bright = (square[0] > 0.5).nonzero()
    edges = torch.cat([bright.amin(0).flip(0), bright.amax(0).flip(0) + 1]).float()
    assert (edges - cells[0] * 32).abs().max() <= 1
    torch.testing.assert_close(to_pixels(cells, (100, 300), 7), box)
    assert to_pixels(torch.tensor([[-1.0, 0, 8, 7]]), (100, 300), 7).tolist() == [[0, 0, 300, 100]]
    again = squash([square, square.flip(1)], 224)
    assert torch.equal(again[0], square)


def test_a_size_that_has_no_whole_cells_is_named():
    with pytest.raises(ValueError, match="image_size=100 must be a multiple of 32"):
        squash([torch.rand(3, 10, 10)], 100)


def test_anchors_of_the_assignments_grid():
    anchors = anchors_of(7)
    assert anchors.shape == (9, 7, 7, 4)
    assert anchors[:, 2, 5, :2].tolist() == [[5.5, 2.5]] * 9
    assert [tuple(shape) for shape in anchors[:, 0, 0, 2:].tolist()] == ANCHORS
    assert len(anchors.flatten(0, 2)) == 441


def test_shift_moves_by_cells_and_stretches_by_powers_of_e():
    anchors, boxes = torch.rand(2, 50, 4, dtype=torch.float64) + 0.1
    torch.testing.assert_close(shift(anchors, offsets_to(anchors, boxes)), boxes)
    by_hand = shift(torch.tensor([2.5, 3.5, 2, 3]), torch.tensor([0.25, -0.5, math.log(2), 0]))
    torch.testing.assert_close(by_hand, torch.tensor([2.75, 3, 4, 3]))


# Assignment


def slow_iou(a, b) -> float:
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    both = max(wide, 0) * max(high, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def corners(a: int, j: int, i: int):
    wide, high = ANCHORS[a]
    return i + 0.5 - wide / 2, j + 0.5 - high / 2, i + 0.5 + wide / 2, j + 0.5 + high / 2


def slow_nearest(box, cells: int) -> tuple[int, int, int]:
    """The cell by Manhattan distance of the centres, the first of equally near ones; in it the best anchor."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    places = [(abs(x - i - 0.5) + abs(y - j - 0.5), j, i) for j in range(cells) for i in range(cells)]
    _, j, i = min(places)
    overlaps = [slow_iou(corners(a, j, i), box) for a in range(9)]
    return max(range(9), key=lambda a: overlaps[a]), j, i


def truths(cells: int) -> list[torch.Tensor]:
    """Random boxes of three pictures, the second without any; in the third two alike, centres on lines and edges."""
    torch.manual_seed(1)
    corner = torch.rand(8, 2, dtype=torch.float64) * cells * 0.7
    boxes = torch.cat([corner, corner + 0.2 + torch.rand(8, 2, dtype=torch.float64) * cells * 0.3], 1)
    special = torch.tensor(
        [
            [1.1, 0.9, 2.5, 3.2],
            [1.1, 0.9, 2.5, 3.2],
            [1.3, 1.1, 2.7, 2.9],  # centre on a crossing
            [cells - 1.1, cells - 1.2, cells + 1.1, cells + 1.2],  # centre in the corner
            [-0.6, -0.7, 0.6, 0.7],
        ],
        dtype=torch.float64,
    )
    return [boxes, boxes[:0], special]


@pytest.mark.parametrize("cells", [7, 4])
def test_each_object_gets_the_best_anchor_of_the_nearest_cell(cells):
    boxes = torch.cat(truths(cells))
    found = torch.stack(nearest_anchors(anchors_of(cells), boxes), 1)
    assert found.tolist() == [list(slow_nearest(box, cells)) for box in boxes.tolist()]


def test_best_overlaps_are_those_of_each_picture():
    boxes = truths(7)
    found = best_overlaps(anchors_of(7), boxes)
    assert found.shape == (3, 9, 7, 7)
    for b, a, j, i in ((0, 0, 0, 0), (0, 3, 2, 4), (0, 8, 5, 1), (1, 2, 2, 2), (2, 1, 1, 1), (2, 5, 6, 6)):
        expected = max((slow_iou(corners(a, j, i), box) for box in boxes[b].tolist()), default=0)
        assert found[b, a, j, i].item() == pytest.approx(expected)
    assert best_overlaps(anchors_of(4), [torch.zeros(0, 4)] * 2).eq(0).all()


def test_negatives_are_drawn_evenly_from_the_candidates():
    torch.manual_seed(0)
    candidates = torch.tensor([[True, False], [True, True]])
    drawn = sample(candidates, 9000)
    assert drawn.unique().tolist() == [0, 2, 3]
    assert drawn.bincount(minlength=4)[[0, 2, 3]].sub(3000).abs().max() < 300
    assert sample(torch.zeros(2, 2, dtype=torch.bool), 5).tolist() == []


# Loss


def outputs_of(cells: int, classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return (
        torch.rand(3, 9, cells, cells, dtype=torch.float64),
        torch.randn(3, 9, cells, cells, 4, dtype=torch.float64) * 0.3,
        torch.randn(3, classes, cells, cells, dtype=torch.float64),
    )


@pytest.mark.parametrize("cells", [7, 4])
def test_losses_are_the_assignments(cells, monkeypatch):
    """All four sums in a plain loop; which negatives were drawn is overheard."""
    classes, boxes, drawn = 6, truths(cells), []

    def overheard(candidates, number):
        drawn.extend([candidates, sample(candidates, number)])
        return drawn[1]

    monkeypatch.setattr("zoo.single_stage.sample", overheard)
    confidences, offsets, logits = outputs_of(cells, classes)
    labels = [torch.randint(1, classes + 1, (len(mine),)) for mine in boxes]
    losses = single_stage_losses(confidences, offsets, logits, anchors_of(cells), boxes, labels)
    confidence = box = entropy = 0.0
    objects = sum(len(mine) for mine in boxes)
    for b, (mine, kinds) in enumerate(zip(boxes, labels, strict=True)):
        for truth, label in zip(mine.tolist(), kinds.tolist(), strict=True):
            a, j, i = slow_nearest(truth, cells)
            x, y = (truth[0] + truth[2]) / 2 - i - 0.5, (truth[1] + truth[3]) / 2 - j - 0.5
            w, h = math.log((truth[2] - truth[0]) / ANCHORS[a][0]), math.log((truth[3] - truth[1]) / ANCHORS[a][1])
            box += sum((p - t) ** 2 for p, t in zip(offsets[b, a, j, i].tolist(), (x, y, w, h), strict=True)) / objects
            confidence += (confidences[b, a, j, i].item() - 1) ** 2
            scores = logits[b, :, j, i].tolist()
            entropy += (math.log(sum(map(math.exp, scores))) - scores[label - 1]) / len(mine) / len(boxes)
        for a, j, i in ((0, 0, 0), (4, 1, 2), (7, 3, 3)):
            far = all(slow_iou(corners(a, j, i), truth) < 0.2 for truth in mine.tolist())
            assert drawn[0][b, a, j, i].item() == far
    confidence += sum(confidences.flatten()[k].item() ** 2 for k in drawn[1].tolist())
    assert len(drawn[1]) == objects
    assert losses["loss_objectness"].item() == pytest.approx(confidence / (2 * objects))
    assert losses["loss_box"].item() == pytest.approx(box)
    assert losses["loss_class"].item() == pytest.approx(entropy)


def test_the_gradient_is_that_of_the_loss():
    boxes, labels = truths(4), [torch.tensor([1, 2] * 4), torch.tensor([], dtype=torch.int64), torch.tensor([1] * 5)]
    anchors = anchors_of(4)
    outputs = [output.requires_grad_() for output in outputs_of(4, 2)]

    def loss(*outputs):
        torch.manual_seed(0)
        return sum(single_stage_losses(*outputs, anchors, boxes, labels).values())

    assert torch.autograd.gradcheck(loss, outputs, fast_mode=True)


def test_a_batch_without_objects_teaches_one_negative():
    outputs = [output.requires_grad_() for output in outputs_of(4, 2)]
    nothing = [torch.zeros(0, 4)] * 3, [torch.zeros(0, dtype=torch.int64)] * 3
    losses = single_stage_losses(*outputs, anchors_of(4), *nothing)
    sum(losses.values()).backward()
    assert losses["loss_box"] == losses["loss_class"] == 0
    taught = outputs[0].grad.nonzero()
    assert len(taught) == 1
    place = tuple(taught[0])
    assert losses["loss_objectness"].item() == pytest.approx(outputs[0][place].item() ** 2)
    assert all(output.grad is not None for output in outputs)


def test_without_any_negative_the_objects_are_learnt():
    """One cell and one object that overlaps well with all anchors that there are."""
    confidences, offsets, logits = outputs_of(1, 2)
    anchors = anchors_of(1)[:1]
    boxes, labels = [torch.tensor([[0.0, 0, 1, 1]])] * 3, [torch.tensor([1])] * 3
    losses = single_stage_losses(confidences[:, :1], offsets[:, :1], logits, anchors, boxes, labels)
    assert losses["loss_objectness"].item() == pytest.approx(((confidences[:, 0] - 1) ** 2).mean().item())


def test_flat_boxes_give_a_finite_loss():
    boxes, labels = [torch.tensor([[1.0, 1, 1, 2]])] * 3, [torch.tensor([1])] * 3
    losses = single_stage_losses(*outputs_of(4, 2), anchors_of(4), boxes, labels)
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("label", [0, 3])
def test_a_label_that_the_network_does_not_know_is_named(label):
    boxes, labels = [torch.tensor([[1.0, 1, 2, 2]])] * 3, [torch.tensor([label])] * 3
    with pytest.raises(ValueError, match=rf"labels \[{label}\] are none of 1 to 2"):
        single_stage_losses(*outputs_of(4, 2), anchors_of(4), boxes, labels)


# Selection


def test_selected_are_confident_boxes_without_near_doubles_of_any_class():
    """Two that overlap by more than the limit have different classes: the better one stays, as in the assignment."""
    anchors = anchors_of(7, torch.float32)
    confidences, offsets, logits = torch.zeros(9, 7, 7), torch.zeros(9, 7, 7, 4), torch.zeros(3, 7, 7)
    confidences[1, 3, 3], confidences[1, 3, 2], confidences[0, 0, 0], confidences[2, 5, 5] = 0.9, 0.8, 0.6, 0.4
    offsets[1, 3, 2, 0] = 0.45
    offsets[1, 3, 3, 0] = -0.45
    logits[2, 3, 3] = logits[1, 3, 2] = logits[0, 0, 0] = 2.0
    found = select(confidences, offsets, logits, anchors, (70, 140))
    torch.testing.assert_close(found["boxes"], torch.tensor([[41.0, 25, 81, 45], [0, 0, 20, 10]]))
    assert found["labels"].tolist() == [3, 1]
    torch.testing.assert_close(found["scores"], torch.tensor([0.9, 0.6]))
    assert len(select(confidences, offsets, logits, anchors, (70, 140), overlap=0.95)["boxes"]) == 3
    assert len(select(confidences, offsets, logits, anchors, (70, 140), threshold=0.3)["boxes"]) == 3
    scored = select(confidences, offsets, logits, anchors, (70, 140), class_scores=True)
    torch.testing.assert_close(scored["scores"], torch.tensor([0.9]) * math.exp(2) / (math.exp(2) + 2))
    none = select(confidences, offsets, logits, anchors, (70, 140), threshold=0.95)
    assert [tuple(none[key].shape) for key in ("boxes", "labels", "scores")] == [(0, 4), (0,), (0,)]


def test_it_learns_one_picture():
    torch.manual_seed(0)
    network = SingleStageNetwork(3, width=0.35, dropout=0.0)
    image = torch.rand(3, 100, 160) * 0.2
    boxes = torch.tensor([[8.0, 10, 60, 80], [90, 5, 140, 45]])
    image[0, 10:80, 8:60] = 1
    image[2, 5:45, 90:140] = 1
    squares, anchors = squash([image, image], 96), anchors_of(3, torch.float32)
    cells = [to_cells(boxes, (100, 160), 3)] * 2
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(45):
        losses = single_stage_losses(*network(squares), anchors, cells, [torch.tensor([1, 3])] * 2)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    # By the batch's own statistics, as in training: the steps are too few for running ones.
    with torch.inference_mode():
        found = select(*(part[0] for part in network(squares)), anchors, (100, 160))
    # The best of each class: anchors that overlap with an object and are not its own are taught nothing, and may shout.
    best = [found["boxes"][found["labels"] == label][0] for label in (1, 3)]
    assert box_iou(torch.stack(best), boxes).diagonal().min() > 0.8


# The LightningModule


SMALL = {"width": 0.35, "image_size": 96, "dropout": 0.0, "score_threshold": 0.05}


def test_the_module_starts_from_torchvisions_file(tmp_path):
    torch.manual_seed(0)
    theirs = mobilenet_v2(weights=None, width_mult=0.35)
    torch.save(theirs.state_dict(), tmp_path / "mobilenet.pth")
    model = SingleStageDetector(3, weights=str(tmp_path / "mobilenet.pth"), **SMALL).eval()
    images = torch.rand(2, 3, 96, 96)
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(model.backbone(images), theirs.eval().features((images - mean) / std))


def test_the_modules_losses_and_detections_are_in_the_pictures_pixels():
    torch.manual_seed(1)
    model = SingleStageDetector(3, **SMALL).eval()
    images = [torch.rand(3, 60, 120), torch.rand(3, 96, 96)]
    targets = [{"boxes": torch.tensor([[8.0, 10, 60, 50]]), "labels": torch.tensor([2])},
               {"boxes": torch.tensor([[1.0, 2, 30, 40]]), "labels": torch.tensor([3])}]  # fmt: skip
    outputs = model.head(model.backbone(squash(images, 96)))
    cells = [torch.tensor([[8 / 40, 10 / 20, 60 / 40, 50 / 20]]), torch.tensor([[1 / 32, 2 / 32, 30 / 32, 40 / 32]])]
    torch.manual_seed(2)  # of the negatives
    expected = single_stage_losses(*outputs, model.anchors, cells, [t["labels"] for t in targets])
    torch.manual_seed(2)
    found = model.losses(images, targets)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[key], value) for key, value in expected.items())
    first, second = model(images)
    assert len(first["boxes"])
    assert (first["boxes"] <= torch.tensor([120, 60, 120, 60])).all()
    assert (second["boxes"] <= 96).all()
    assert model([]) == []


def test_rows_of_classes_with_the_same_name_are_kept(tmp_path):
    before = SingleStageDetector(3, ["cat", "dog", "cow"], **SMALL)
    torch.save({"state_dict": before.state_dict(), "zoo": describe(before)}, tmp_path / "before.ckpt")
    path = str(tmp_path / "before.ckpt")
    after = SingleStageDetector(2, ["cow", "owl"], weights=path, keep_matching_classes=True, **SMALL)
    assert torch.equal(after.head.classes.weight[0], before.head.classes.weight[2])
    assert torch.equal(after.head.boxes.weight, before.head.boxes.weight)
    assert not (after.head.classes.weight[1] == before.head.classes.weight).flatten(1).all(1).any()


def test_as_many_classes_as_hidden_values_are_not_taken_for_these(tmp_path):
    names = [f"class {k}" for k in range(128)]
    before = SingleStageDetector(128, names, **SMALL)
    torch.save({"state_dict": before.state_dict(), "zoo": describe(before)}, tmp_path / "before.ckpt")
    path = str(tmp_path / "before.ckpt")
    after = SingleStageDetector(128, names[::-1], weights=path, keep_matching_classes=True, **SMALL)
    assert torch.equal(after.head.hidden[0].weight, before.head.hidden[0].weight)
    assert torch.equal(after.head.classes.weight, before.head.classes.weight.flip(0))
