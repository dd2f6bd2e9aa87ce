"""YOLOv3 against OpenCV's Darknet importer, its decoding and loss against plain loops in float64."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import box_iou

from zoo.darknet import load_darknet, write_darknet
from zoo.weights import describe
from zoo.yolov3 import (
    ANCHORS,
    MASKS,
    TINY_ANCHORS,
    TINY_MASKS,
    SlidingMaxPool,
    YOLOv3,
    YOLOv3Network,
    best_anchors,
    best_overlap,
    boxes_of,
    by_anchor,
    decode,
    letterbox,
    place,
    select,
    unplace,
    yolo_losses,
)

# The networks as Darknet's cfg files describe them


class Cfg:
    """The text of a cfg file, and the shapes of its convolutions in order."""

    def __init__(self, size: int, classes: int, width: float = 1.0):
        self.text = f"[net]\nwidth={size}\nheight={size}\nchannels=3\n"
        self.classes, self.width = classes, width
        self.shapes: list[tuple[int, int, int, float]] = []  # out, in, kernel, signal's power; 0: no batch norm
        self.channels: list[int] = []  # of each layer's output
        self.outputs: list[str] = []  # OpenCV's names of the output convolutions

    def section(self, name: str, channels: int, **options):
        self.text += f"\n[{name}]\n" + "".join(f"{key}={value}\n" for key, value in options.items())
        self.channels.append(channels)

    def conv(self, filters: int, kernel: int, stride: int = 1, power: float = 3.0):
        before = self.channels[-1] if self.channels else 3
        filters = int(filters * self.width)
        self.shapes.append((filters, before, kernel, power))
        self.section("convolutional", filters, batch_normalize=1, filters=filters, size=kernel, stride=stride, pad=1,
                     activation="leaky")  # fmt: skip

    def pool(self, stride: int):
        self.section("maxpool", self.channels[-1], size=2, stride=stride)

    def residual(self, filters: int):
        self.conv(filters // 2, 1)
        self.conv(filters, 3, power=0.3)
        self.section("shortcut", self.channels[-1], **{"from": -3, "activation": "linear"})

    def route(self, *layers: int):
        channels = sum(self.channels[layer] for layer in layers)
        self.section("route", channels, layers=",".join(map(str, layers)))

    def upsample(self):
        self.section("upsample", self.channels[-1], stride=2)

    def yolo(self, mask: list[int], anchors: list[tuple[int, int]]):
        filters = len(mask) * (5 + self.classes)
        self.outputs.append(f"conv_{len(self.channels)}")
        self.shapes.append((filters, self.channels[-1], 1, 0.0))
        self.section("convolutional", filters, filters=filters, size=1, stride=1, pad=1, activation="linear")
        pairs = ",  ".join(f"{w},{h}" for w, h in anchors)
        self.section("yolo", filters, mask=",".join(map(str, mask)), anchors=pairs, classes=self.classes,
                     num=len(anchors), ignore_thresh=0.7, truth_thresh=1, thresh=0)  # fmt: skip

    def write_weights(self, path: Path, floor: float = 0.5):
        """Random values in the order of Darknet's files; variances from ``floor`` to three times as much."""
        random = np.random.default_rng(0)
        with open(path, "wb") as file:
            file.write(np.array([0, 2, 0], "<i4").tobytes() + np.array([32013312], "<i8").tobytes())
            for out, before, kernel, power in self.shapes:
                random.normal(0, 0.1, out).astype("<f4").tofile(file)
                if power:
                    random.uniform(0.5, 1.5, out).astype("<f4").tofile(file)
                    random.normal(0, 0.1, out).astype("<f4").tofile(file)
                    random.uniform(floor, 3 * floor, out).astype("<f4").tofile(file)
                # Chosen so that neither the signal dies nor the outputs are their biases only.
                scale = np.sqrt((power * floor or 1) / (before * kernel**2))
                (random.standard_normal((out, before * kernel**2), "f4") * scale).astype("<f4").tofile(file)


def yolov3_cfg(size: int, classes: int, width: float = 1.0) -> Cfg:
    cfg = Cfg(size, classes, width)
    cfg.conv(32, 3)
    for filters, blocks in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)):
        cfg.conv(filters, 3, stride=2)
        for _ in range(blocks):
            cfg.residual(filters)
    assert len(cfg.channels) == 75
    for position, (wide, joined) in enumerate(((512, None), (256, 61), (128, 36))):
        if joined:
            cfg.route(-4)
            cfg.conv(wide, 1)
            cfg.upsample()
            cfg.route(-1, joined)
        for _ in range(3):
            cfg.conv(wide, 1)
            cfg.conv(2 * wide, 3)
        cfg.yolo(MASKS[position], ANCHORS)
    return cfg


def tiny_cfg(size: int, classes: int, width: float = 1.0) -> Cfg:
    cfg = Cfg(size, classes, width)
    for filters in (16, 32, 64, 128, 256, 512):
        cfg.conv(filters, 3)
        cfg.pool(1 if filters == 512 else 2)
    cfg.conv(1024, 3)
    cfg.conv(256, 1)
    cfg.conv(512, 3)
    cfg.yolo(TINY_MASKS[0], TINY_ANCHORS)
    cfg.route(-4)
    cfg.conv(128, 1)
    cfg.upsample()
    cfg.route(-1, 8)
    cfg.conv(256, 3)
    cfg.yolo(TINY_MASKS[1], TINY_ANCHORS)
    return cfg


def pair(cfg: Cfg, path: Path, network: YOLOv3Network, floor: float = 0.5):
    """OpenCV's network and ours, both read from one random file."""
    cv2 = pytest.importorskip("cv2")
    cfg.write_weights(path / "random.weights", floor)
    (path / "network.cfg").write_text(cfg.text)
    theirs = cv2.dnn.readNetFromDarknet(str(path / "network.cfg"), str(path / "random.weights"))
    theirs.enableFusion(False)
    theirs.enableWinograd(False)
    load_darknet(network, path / "random.weights")
    return theirs, network.eval()


def set_eps(network: YOLOv3Network, eps: float):
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = eps


CASES = [
    pytest.param(yolov3_cfg, {"width": 0.25}, 96, 5, id="narrow"),
    pytest.param(tiny_cfg, {"tiny": True}, 128, 80, id="tiny"),
    pytest.param(yolov3_cfg, {}, 96, 80, id="whole"),
]


@pytest.mark.parametrize(("make", "arguments", "size", "classes"), CASES)
def test_opencv_gives_the_same_outputs_and_boxes_from_one_file(make, arguments, size, classes, tmp_path):
    cfg = make(size, classes, arguments.get("width", 1.0))
    published = {(yolov3_cfg, 80): 248_007_048, (tiny_cfg, 80): 35_434_956}.get((make, classes))
    theirs, ours = pair(cfg, tmp_path, YOLOv3Network(classes, **arguments))
    assert published in (None, (tmp_path / "random.weights").stat().st_size)
    set_eps(ours, 1e-6)  # OpenCV's
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    theirs.setInput(images.numpy())
    names = cfg.outputs + [f"yolo_{int(name.split('_')[1]) + 1}" for name in cfg.outputs]
    answers = [torch.from_numpy(answer.copy()) for answer in theirs.forward(names)]
    with torch.inference_mode():
        outputs = ours(images)
        boxes, objectness, probabilities = decode(outputs, ours.head.anchors, ours.head.masks, size)
    for mine, other in zip(outputs, answers, strict=False):
        assert other.std((0, 2, 3)).mean() > 0.1, "outputs that are alike everywhere prove nothing"
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    start = 0
    for mine, other in zip(outputs, answers[len(outputs) :], strict=True):
        _, _, high, wide = mine.shape
        other = other.view(2, high, wide, 3, 5 + classes).permute(0, 3, 1, 2, 4).flatten(1, 3)
        part = slice(start, start := start + other.shape[1])
        centres, sides = other[..., :2] * size, other[..., 2:4] * size
        theirs_boxes = torch.cat([centres - sides / 2, centres + sides / 2], -1)
        torch.testing.assert_close(boxes[:, part], theirs_boxes, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(objectness[:, part], other[..., 4], rtol=1e-4, atol=1e-5)
        scores = objectness[:, part, None] * probabilities[:, part]
        torch.testing.assert_close(scores, other[..., 5:], rtol=1e-4, atol=1e-5)
    assert start == boxes.shape[1]


def test_the_batch_norm_is_that_of_darknets_gpu_kernel_which_opencv_does_not_have(tmp_path):
    """Where variances are small the two differ visibly, and each is met exactly with its own constant."""
    theirs, ours = pair(tiny_cfg(64, 2, 0.5), tmp_path, YOLOv3Network(2, tiny=True, width=0.5), floor=0.01)
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    theirs.setInput(images.numpy())
    other = torch.from_numpy(theirs.forward("conv_15").copy())
    with torch.inference_mode():
        darknets = ours(images)[0]
        set_eps(ours, 1e-6)
        torch.testing.assert_close(ours(images)[0], other, rtol=1e-4, atol=1e-4)
    assert (darknets - other).abs().max() > 1e-3
    convolution, norm, _ = YOLOv3Network(2, tiny=True).backbone.fine[0].eval()
    norm.running_var.fill_(1e-4)
    x = convolution(images)
    torch.testing.assert_close(norm(x), x / math.sqrt(1e-4 + 1e-5))


def test_parameters_are_darknets():
    for arguments, learnt in (({}, 61_949_149), ({"tiny": True}, 8_852_366)):
        with torch.device("meta"):
            assert sum(p.numel() for p in YOLOv3Network(**arguments).parameters()) == learnt


def test_the_sliding_pool_continues_to_the_right_and_below():
    x = torch.tensor([[[[-1.0, -2.0], [-4.0, -3.0]]]])
    assert SlidingMaxPool()(x).tolist() == [[[[-1, -2], [-3, -3]]]]


def test_only_the_outputs_depend_on_the_classes():
    state, other = (YOLOv3Network(classes, width=0.25).state_dict() for classes in (4, 7))
    differ = {key for key in state if state[key].shape != other[key].shape}
    assert state.keys() == other.keys()
    assert differ == {f"head.scales.{n}.output.{part}" for n in range(3) for part in ("weight", "bias")}


def test_the_prior_is_what_an_untrained_network_thinks_of_a_box():
    head = YOLOv3Network(4, tiny=True, width=0.25, prior=0.01).head
    for scale in head.scales:
        bias = scale.output.bias.view(3, 9)
        torch.testing.assert_close(bias[:, 4].sigmoid(), torch.full((3,), 0.01))
        assert bias[:, [0, 1, 2, 3, 5, 6, 7, 8]].eq(0).all()


@pytest.mark.parametrize("masks", [[[0, 1, 2]], [[6, 7, 8], [3, 4, 5], [0, 1]], [[6, 7, 9], [3, 4, 5], [0, 1, 2]]])
def test_masks_that_do_not_fit_are_named(masks):
    with pytest.raises(ValueError, match=r"masks=.* must be 3 lists, one for each grid, .* of the 9 anchors"):
        YOLOv3Network(4, width=0.25, masks=masks)


# Letterbox


def slow_letterbox(image: np.ndarray, size: int) -> np.ndarray:
    """As in Darknet's image.c: letterbox_image, resize_image, embed_image."""
    height, width = image.shape[1:]
    if size / width < size / height:
        wide, high = size, height * size // width
    else:
        wide, high = width * size // height, size
    square = np.full((3, size, size), 0.5)
    for y in range(high):
        for x in range(wide):
            from_x, from_y = x * (width - 1) / (wide - 1), y * (height - 1) / (high - 1)
            left, top = min(int(from_x), width - 1), min(int(from_y), height - 1)
            right, below = min(left + 1, width - 1), min(top + 1, height - 1)
            dx, dy = from_x - left, from_y - top
            upper = (1 - dx) * image[:, top, left] + dx * image[:, top, right]
            lower = (1 - dx) * image[:, below, left] + dx * image[:, below, right]
            square[:, (size - high) // 2 + y, (size - wide) // 2 + x] = (1 - dy) * upper + dy * lower
    return square


def test_the_letterbox_is_darknets():
    torch.manual_seed(0)
    images = [torch.rand(3, *shape, dtype=torch.float64) for shape in ((40, 61), (75, 30), (20, 20), (64, 64), (3, 90))]
    squares, _ = letterbox(images, 64)
    for image, square in zip(images, squares, strict=True):
        np.testing.assert_allclose(square.numpy(), slow_letterbox(image.numpy(), 64), atol=1e-12)
    again, where = letterbox(list(squares), 64)
    assert torch.equal(again, squares)
    assert where.tolist() == [[1, 1, 0, 0]] * 5
    assert letterbox([torch.rand(3, 1, 500)], 64)[0].shape == (1, 3, 64, 64)


def test_boxes_follow_their_picture_into_the_letterbox_and_back():
    image = torch.zeros(3, 40, 80)
    image[:, 10:20, 40:60] = 1
    (square,), (where,) = letterbox([image], 160)
    box = torch.tensor([[40.0, 10, 60, 20]])
    placed = place(box, where)
    assert placed.tolist() == [[80, 60, 120, 80]]  # twice as large, 40 grey rows above
    bright = (square[0] > 0.75).nonzero()
    edges = torch.cat([bright.amin(0).flip(0), bright.amax(0).flip(0) + 1]).float()
    assert (placed[0] - edges).abs().max() <= 1
    torch.testing.assert_close(unplace(placed, where, (40, 80)), box)
    outside = torch.tensor([[-10.0, 0, 170, 160]])
    assert unplace(outside, where, (40, 80)).tolist() == [[0, 0, 80, 40]]


@pytest.mark.parametrize("size", [0, 100, -32])
def test_a_size_that_has_no_whole_cells_is_named(size):
    with pytest.raises(ValueError, match=f"image_size={size} must be a multiple of 32"):
        letterbox([torch.rand(3, 10, 10)], size)


# Selection


def slow_select(boxes, scores, overlap):
    """Darknet's do_nms_sort: for each class the best box first, dropping what overlaps with it."""
    found = []
    for k in range(scores.shape[1]):
        order = [i for i in scores[:, k].argsort(descending=True).tolist() if scores[i, k] > 0.005]
        while order:
            best = order.pop(0)
            found.append((round(scores[best, k].item(), 6), k + 1, best))
            order = [i for i in order if box_iou(boxes[[best]], boxes[[i]]).item() <= overlap]
    return sorted(found, reverse=True)


def test_near_doubles_of_a_class_are_dropped_as_darknet_does():
    torch.manual_seed(0)
    corner = torch.rand(60, 2) * 50
    boxes = torch.cat([corner, corner + 5 + torch.rand(60, 2) * 40], 1)
    objectness, classes = torch.rand(60), torch.rand(60, 3)
    objectness[:10] = 0.001
    found = select(boxes, objectness, classes, torch.tensor([1.0, 1, 0, 0]), (96, 96), most=1000)
    expected = slow_select(boxes, objectness[:, None] * classes, 0.45)
    assert 20 < len(expected) < 150
    assert [(round(s, 6), k) for s, k in zip(found["scores"].tolist(), found["labels"].tolist(), strict=True)] == [
        (score, label) for score, label, _ in expected
    ]
    assert torch.equal(found["boxes"], boxes[[row for _, _, row in expected]].clamp(max=96))
    few = select(boxes, objectness, classes, torch.tensor([1.0, 1, 0, 0]), (96, 96), most=7)
    assert torch.equal(few["scores"], found["scores"][:7])


def test_boxes_are_given_in_the_pictures_pixels_and_none_in_the_grey():
    boxes = torch.tensor([[80.0, 60, 120, 80], [0, 0, 160, 30], [-(10.0**6), 0, 10.0**6, 160]])
    classes = torch.tensor([[0.9, 0.0], [0.9, 0.0], [0.0, 0.5]])
    found = select(boxes, torch.ones(3), classes, torch.tensor([2.0, 2, 0, 40]), (40, 80))
    assert found["boxes"].tolist() == [[40, 10, 60, 20], [0, 0, 80, 40]]
    assert found["labels"].tolist() == [1, 2]
    none = select(boxes, torch.zeros(3), classes, torch.tensor([2.0, 2, 0, 40]), (40, 80))
    assert [tuple(none[key].shape) for key in ("boxes", "labels", "scores")] == [(0, 4), (0,), (0,)]
    assert none["labels"].dtype == torch.int64


def test_boxes_are_compared_before_the_edges_cut_them():
    """Within the picture both are the whole of it; as the network means them they overlap by a third."""
    boxes = torch.tensor([[0.0, 0, 40, 40], [0, 0, 40, 120]])
    found = select(boxes, torch.tensor([0.9, 0.8]), torch.ones(2, 1), torch.tensor([1.0, 1, 0, 0]), (40, 40))
    assert found["boxes"].tolist() == [[0, 0, 40, 40]] * 2


def test_a_huge_box_does_not_blur_the_others():
    """Near-doubles of the last class are still seen as such; classes are told apart by moving their boxes."""
    boxes = torch.tensor([[0.0, 0, 4, 4], [0.2, 0, 4.2, 4], [0, 0, 1e7, 1e7]])
    classes = torch.zeros(3, 80)
    classes[:2, 79] = classes[2, 0] = 1
    found = select(boxes, torch.tensor([0.9, 0.8, 0.7]), classes, torch.tensor([1.0, 1, 0, 0]), (40, 40))
    assert found["labels"].tolist() == [80, 1]


# Loss


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def cross_entropy(x: float, target: float) -> float:
    return math.log1p(math.exp(x)) - target * x


def iou(a, b) -> float:
    wide = min(a[0] + a[2] / 2, b[0] + b[2] / 2) - max(a[0] - a[2] / 2, b[0] - b[2] / 2)
    high = min(a[1] + a[3] / 2, b[1] + b[3] / 2) - max(a[1] - a[3] / 2, b[1] - b[3] / 2)
    both = max(wide, 0) * max(high, 0)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def slow_loss(grids, boxes, labels, anchors, masks, size):
    """Darknet's forward_yolo_layer in plain numbers: losses, and what it writes to ``delta``."""
    losses = {"loss_box": 0.0, "loss_objectness": 0.0, "loss_class": 0.0}
    deltas = []
    for grid, mask in zip(grids, masks, strict=True):
        count, _, cells, _, entries = grid.shape
        delta = torch.zeros_like(grid)
        for b in range(count):
            truths = [
                ((x1 + x2) / 2 / size, (y1 + y2) / 2 / size, (x2 - x1) / size, (y2 - y1) / size)
                for x1, y1, x2, y2 in boxes[b].tolist()
            ]
            terms = {}
            for n, j, i in np.ndindex(len(mask), cells, cells):
                x = grid[b, n, j, i].tolist()
                wide, high = anchors[mask[n]]
                box = (
                    (i + sigmoid(x[0])) / cells,
                    (j + sigmoid(x[1])) / cells,
                    math.exp(x[2]) * wide / size,
                    math.exp(x[3]) * high / size,
                )
                if all(iou(box, truth) <= 0.7 for truth in truths):
                    delta[b, n, j, i, 4] = -sigmoid(x[4])
                    terms[n, j, i, "objectness"] = cross_entropy(x[4], 0)
            places = {}
            for truth, label in zip(truths, labels[b].tolist(), strict=True):
                shapes = [iou((0, 0, *truth[2:]), (0, 0, w / size, h / size)) for w, h in anchors]
                best = max(range(len(anchors)), key=lambda k: shapes[k])
                if best not in mask:
                    continue
                n = mask.index(best)
                i, j = min(int(truth[0] * cells), cells - 1), min(int(truth[1] * cells), cells - 1)
                x = grid[b, n, j, i].tolist()
                scale = 2 - truth[2] * truth[3]
                targets = [
                    truth[0] * cells - i,
                    truth[1] * cells - j,
                    math.log(truth[2] * size / anchors[best][0]),
                    math.log(truth[3] * size / anchors[best][1]),
                ]
                for e in range(4):
                    out = sigmoid(x[e]) if e < 2 else x[e]
                    delta[b, n, j, i, e] = scale * (targets[e] - out)
                terms[n, j, i, "box"] = scale * (
                    cross_entropy(x[0], targets[0])
                    + cross_entropy(x[1], targets[1])
                    + 0.5 * (targets[2] - x[2]) ** 2
                    + 0.5 * (targets[3] - x[3]) ** 2
                )
                delta[b, n, j, i, 4] = 1 - sigmoid(x[4])
                terms[n, j, i, "objectness"] = cross_entropy(x[4], 1)
                places.setdefault((n, j, i), set()).add(label - 1)
                for k in range(entries - 5):
                    target = float(k in places[n, j, i])
                    delta[b, n, j, i, 5 + k] = target - sigmoid(x[5 + k])
                    terms[n, j, i, "class", k] = cross_entropy(x[5 + k], target)
            for key, value in terms.items():
                losses[f"loss_{key[3]}"] += value / count
        deltas.append(delta / count)
    return losses, deltas


def scene(size: int, classes: int):
    """Random outputs of the tiny network, double, and pictures that have what is difficult."""
    torch.manual_seed(3)
    outputs = [torch.randn(4, 3 * (5 + classes), size // s, size // s, dtype=torch.float64) for s in (32, 16)]
    anchors = torch.tensor(TINY_ANCHORS, dtype=torch.float64)
    predicted, _, _ = decode(outputs, anchors, TINY_MASKS, size)
    inside = predicted[0][((predicted[0] > 0) & (predicted[0] < size)).all(1)]
    boxes = [
        torch.cat([inside[::9][:6] + 0.3, torch.tensor([[10.0, 10, 20, 24]], dtype=torch.float64)]),
        torch.zeros(0, 4, dtype=torch.float64),
        # Three in one cell of one anchor, the first and the last of one class; another anchor in the same cell.
        torch.tensor(
            [[3.0, 3, 13, 15], [4, 4, 13, 18], [3, 2, 14, 15], [1, 1, 15, 29]], dtype=torch.float64
        ),
        # At the edges: in the corner, a centre on the right and lower edge, and the whole picture.
        torch.tensor(
            [[0.0, 0, 8, 9], [size - 6, size - 6, size + 6, size + 6], [0, 0, size, size]], dtype=torch.float64
        ),
    ]  # fmt: skip
    labels = [torch.randint(1, classes + 1, (len(mine),)) for mine in boxes]
    labels[2] = torch.tensor([1, 3, 1, 2])
    return outputs, anchors, boxes, labels


def test_loss_and_gradient_are_darknets():
    size, classes = 96, 4
    outputs, anchors, boxes, labels = scene(size, classes)
    outputs = [output.requires_grad_() for output in outputs]
    losses = yolo_losses(outputs, boxes, labels, anchors, TINY_MASKS, size)
    grids = [by_anchor(output.detach(), 3) for output in outputs]
    expected, deltas = slow_loss(grids, boxes, labels, anchors.tolist(), TINY_MASKS, size)
    ignored = sum((grid[..., 4] == 0).sum().item() for grid in deltas)
    assert ignored >= 3, "no box lies on an object that is another's"
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-9), name
    sum(losses.values()).backward()
    for output, delta in zip(outputs, deltas, strict=True):
        torch.testing.assert_close(by_anchor(output.grad, 3), -delta, rtol=1e-9, atol=1e-12)


def test_loss_of_masks_that_share_an_anchor_and_leave_one_out():
    """As the first published tiny network has them: anchor 3 belongs to both grids, anchor 0 to none."""
    size, masks = 96, [[3, 4, 5], [1, 2, 3]]
    outputs, anchors, boxes, labels = scene(size, 4)
    losses = yolo_losses(outputs, boxes, labels, anchors, masks, size)
    grids = [by_anchor(output, 3) for output in outputs]
    expected, _ = slow_loss(grids, boxes, labels, anchors.tolist(), masks, size)
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-9), name


def test_the_gradient_is_that_of_the_loss():
    _, anchors, boxes, labels = scene(64, 2)
    boxes, labels = [mine[:4].clamp(max=64) for mine in boxes[2:]], [mine[:4].clamp(max=2) for mine in labels[2:]]
    outputs = [torch.randn(2, 3 * 7, s, s, dtype=torch.float64, requires_grad=True) for s in (1, 2)]

    def loss(*outputs):
        return sum(yolo_losses(list(outputs), boxes, labels, anchors, TINY_MASKS, 64).values())

    assert torch.autograd.gradcheck(loss, outputs)


def test_loss_of_one_object_by_hand():
    """Logits of 0, the object is as the anchor and in the middle of its cell: all cross-entropies are log 2."""
    outputs = [torch.zeros(2, 8, 1, 1), torch.zeros(2, 8, 2, 2)]
    anchors = torch.tensor([[8.0, 8], [30, 30]])
    boxes = [torch.tensor([[4.0, 4, 12, 12]]), torch.zeros(0, 4)]
    labels = [torch.tensor([2]), torch.zeros(0, dtype=torch.int64)]
    losses = yolo_losses(outputs, boxes, labels, anchors, [[1], [0]], 32)
    assert losses["loss_box"].item() == pytest.approx((2 - 1 / 16) * 2 * math.log(2) / 2)
    assert losses["loss_objectness"].item() == pytest.approx(5 * math.log(2))  # 5 places in each of 2 pictures
    assert losses["loss_class"].item() == pytest.approx(3 * math.log(2) / 2)


def test_a_batch_without_objects_still_has_a_gradient_everywhere():
    outputs = [torch.randn(2, 21, s, s, requires_grad=True) for s in (2, 4)]
    nothing = [torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2
    losses = yolo_losses(outputs, *nothing, torch.tensor(TINY_ANCHORS).float(), TINY_MASKS, 64)
    sum(losses.values()).backward()
    assert losses["loss_box"] == losses["loss_class"] == 0
    for output in outputs:
        grid = by_anchor(output.grad, 3)
        torch.testing.assert_close(grid[..., 4], by_anchor(output.detach(), 3)[..., 4].sigmoid() / 2)
        assert grid[..., :4].eq(0).all()


def test_flat_boxes_and_extreme_outputs_give_a_finite_loss():
    outputs = [torch.full((1, 21, s, s), 90.0, requires_grad=True) for s in (2, 4)]
    boxes = [torch.tensor([[5.0, 5, 5, 9], [70, 70, 71, 71]])]
    losses = yolo_losses(outputs, boxes, [torch.tensor([1, 2])], torch.tensor(TINY_ANCHORS).float(), TINY_MASKS, 64)
    sum(losses.values()).backward()
    assert all(output.grad.isfinite().all() for output in outputs)


@pytest.mark.parametrize("label", [0, 3])
def test_a_label_that_the_network_does_not_know_is_named(label):
    outputs = [torch.zeros(1, 21, s, s) for s in (2, 4)]
    boxes, labels = [torch.tensor([[5.0, 5, 9, 9]])], [torch.tensor([label])]
    with pytest.raises(ValueError, match=rf"labels \[{label}\] are none of 1 to 2"):
        yolo_losses(outputs, boxes, labels, torch.tensor(TINY_ANCHORS).float(), TINY_MASKS, 64)


def test_best_anchor_is_that_of_the_nearest_shape():
    anchors = torch.tensor(ANCHORS).float()
    assert best_anchors(anchors * 1.05, anchors).tolist() == list(range(9))
    assert best_anchors(torch.tensor([[1.0, 1.0], [900.0, 900.0]]), anchors).tolist() == [0, 8]


def test_best_overlap_is_torchvisions():
    torch.manual_seed(0)
    corner = torch.rand(3, 12, 2) * 20
    boxes = torch.cat([corner, corner + torch.rand(3, 12, 2) * 20], -1)
    truths = boxes[:, :5] + 2
    truths[2, 3:] = 0  # as padding has them
    expected = torch.stack([box_iou(boxes[i], truths[i]).amax(1) for i in range(3)])
    torch.testing.assert_close(best_overlap(boxes, truths), expected)
    assert best_overlap(boxes, boxes[:, :0]).eq(0).all()


def test_it_learns_one_picture():
    torch.manual_seed(0)
    network = YOLOv3Network(3, tiny=True, width=0.25, prior=0.01)
    image = torch.rand(3, 50, 80) * 0.2
    boxes = torch.tensor([[8.0, 10, 30, 40], [45, 5, 70, 25]])
    image[0, 10:40, 8:30] = 1
    image[2, 5:25, 45:70] = 1
    squares, where = letterbox([image], 64)
    labels = torch.tensor([1, 3])
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    head = network.head
    for _ in range(60):
        losses = yolo_losses(network(squares), [place(boxes, where[0])], [labels], head.anchors, head.masks, 64)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    with torch.inference_mode():
        outputs = network(squares)
        found = select(*(part[0] for part in decode(outputs, head.anchors, head.masks, 64)), where[0], (50, 80), 0.5)
    assert sorted(found["labels"].tolist()) == [1, 3]
    order = found["labels"].argsort()
    assert box_iou(found["boxes"][order], boxes).diagonal().min() > 0.8


def test_boxes_of_an_output_by_hand():
    """A logit of 0 is the middle of a cell and the anchor itself (figure 2)."""
    output = torch.zeros(1, 1, 2, 2, 6)
    output[0, 0, 1, 0, 2] = math.log(2)
    boxes = boxes_of(output, torch.tensor([[10.0, 20]]), 64)
    assert boxes[0, 0, 0, 1].tolist() == [43, 6, 53, 26]
    torch.testing.assert_close(boxes[0, 0, 1, 0], torch.tensor([6.0, 38, 26, 58]))


def test_half_precision_outputs_are_decoded_and_learnt_in_full():
    outputs = [torch.randn(1, 21, s, s) for s in (2, 4)]
    anchors = torch.tensor(TINY_ANCHORS).float()
    low = [output.bfloat16() for output in outputs]
    boxes, objectness, _ = decode(low, anchors, TINY_MASKS, 64)
    assert boxes.dtype == objectness.dtype == torch.float32
    same = decode([output.float() for output in low], anchors, TINY_MASKS, 64)[0]
    assert torch.equal(boxes, same)
    truths = [torch.tensor([[5.0, 5, 30, 30]])], [torch.tensor([1])]
    loss = yolo_losses(low, *truths, anchors, TINY_MASKS, 64)["loss_box"]
    assert loss.dtype == torch.float32
    assert F.relu(loss) == loss


# The LightningModule


SMALL = {"tiny": True, "width": 0.25, "image_size": 64, "prior": 0.01}


def test_the_module_starts_from_darknets_file(tmp_path):
    torch.manual_seed(3)
    network = YOLOv3Network(3, tiny=True, width=0.25)
    write_darknet(network, tmp_path / "mine.weights")
    model = YOLOv3(3, weights=str(tmp_path / "mine.weights"), **SMALL)
    for part in ("backbone", "head"):
        ours, theirs = getattr(model, part).state_dict(), getattr(network, part).state_dict()
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    other = YOLOv3(5, weights=str(tmp_path / "mine.weights"), **SMALL)
    assert torch.equal(next(other.backbone.parameters()), next(network.backbone.parameters()))


def test_rows_of_the_boxes_and_of_classes_with_the_same_name_are_kept(tmp_path):
    torch.manual_seed(4)
    before = YOLOv3(3, ["cat", "dog", "cow"], **SMALL)
    torch.save({"state_dict": before.state_dict(), "zoo": describe(before)}, tmp_path / "before.ckpt")
    after = YOLOv3(2, ["cow", "owl"], weights=str(tmp_path / "before.ckpt"), keep_matching_classes=True, **SMALL)
    for ours, theirs in zip(after.head.scales, before.head.scales, strict=True):
        mine, given = ours.output.weight.view(3, 7, -1), theirs.output.weight.view(3, 8, -1)
        assert torch.equal(mine[:, :5], given[:, :5])  # boxes and objectness
        assert torch.equal(mine[:, 5], given[:, 7])  # cows
        assert not torch.isclose(mine[:, 6, None], given[:, 5:]).all(2).any(), "nobody knows an owl"


def test_the_modules_losses_and_detections_are_in_the_pictures_pixels():
    torch.manual_seed(5)
    model = YOLOv3(3, **SMALL)
    images = [torch.rand(3, 40, 80), torch.rand(3, 64, 64)]
    targets = [{"boxes": torch.tensor([[8.0, 10, 30, 38]]), "labels": torch.tensor([2])},
               {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]  # fmt: skip
    squares, where = letterbox(images, 64)
    outputs = model.head(model.backbone(squares))
    boxes, labels = [place(targets[0]["boxes"], where[0]), targets[1]["boxes"]], [t["labels"] for t in targets]
    expected = yolo_losses(outputs, boxes, labels, model.head.anchors, model.head.masks, 64)
    found = model.losses(images, targets)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[key], value) for key, value in expected.items())
    first, second = model.eval()(images)
    assert len(first["boxes"])
    assert (first["boxes"] >= 0).all()
    assert (first["boxes"] <= torch.tensor([80, 40, 80, 40])).all()
    assert (second["boxes"] <= 64).all()
    assert model([]) == []
