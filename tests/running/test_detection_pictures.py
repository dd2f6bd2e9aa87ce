"""What stands on the sheets: which boxes, where, in which colours, with which names."""

import io

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle
from PIL import Image
from torch import tensor

from zoo.running.detection_pictures import detections_figure, precision_recall_figure
from zoo.running.pictures import to_png

BOXES = tensor([[2.0, 3.0, 12.0, 20.0], [20.0, 4.0, 30.0, 14.0], [1.0, 1.0, 5.0, 5.0]])
FOUND = {"boxes": BOXES, "labels": tensor([1, 2, 2]), "scores": tensor([0.9, 0.7, 0.3])}
TRUE = {"boxes": BOXES[:2], "labels": tensor([1, 2]), "iscrowd": tensor([0, 1]), "image_id": tensor(7)}
NAMES = ["cat", "$dog$"]


def rectangles(axes):
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def texts(axes):
    return {text.get_text() for text in axes.texts}


def pixels(figure):
    return np.asarray(Image.open(io.BytesIO(to_png(figure))).convert("RGB"))


def test_predictions_above_the_threshold_stand_beside_the_truth():
    image = torch.rand(3, 24, 36)
    before = image.clone()
    figure = detections_figure([image], [FOUND], [TRUE], NAMES, threshold=0.5)
    found, true = figure.axes
    assert found.get_title() == "found: 2 (and 1 below 50%)"
    assert true.get_title() == "true: 2"
    assert texts(found) == {"cat 90%", "$dog$ 70%"}
    assert texts(true) == {"cat", "$dog$"}
    corners = {(patch.get_x() + 0.5, patch.get_y() + 0.5) for patch in rectangles(found)}
    assert corners == {(2.0, 3.0), (20.0, 4.0)}
    assert {(patch.get_width(), patch.get_height()) for patch in rectangles(found)} == {(10.0, 17.0), (10.0, 10.0)}
    assert sorted(patch.get_linestyle() for patch in rectangles(true)) == ["-", "--"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == NAMES
    assert torch.equal(image, before)
    assert pixels(figure).std() > 10  # names with dollar signs are drawn as they are


def test_a_class_has_one_colour_on_the_whole_sheet_and_objects_of_the_only_class_have_their_own():
    sheet = detections_figure([torch.rand(3, 24, 36)] * 2, [FOUND] * 2, [TRUE] * 2, NAMES)
    by_corner = {}
    for axes in sheet.axes:
        for patch in rectangles(axes):
            by_corner.setdefault(patch.get_x(), set()).add(patch.get_edgecolor())
    assert [len(colours) for colours in by_corner.values()] == [1, 1]
    assert len(set.union(*by_corner.values())) == 2
    single = {**FOUND, "labels": tensor([1, 1, 1])}
    alone = detections_figure([torch.rand(3, 24, 36)], [single], None, ["nucleus"], threshold=0.0).axes[0]
    assert len({patch.get_edgecolor() for patch in rectangles(alone)}) == 3
    assert texts(alone) == {"90%", "70%", "30%"}


def test_many_classes_still_differ():
    labels = torch.arange(1, 25) * 3
    found = {"boxes": torch.rand(24, 4).cumsum(1) * 5, "labels": labels, "scores": torch.ones(24)}
    axes = detections_figure([torch.rand(3, 24, 36)], [found], None, [f"class {k}" for k in range(80)]).axes[0]
    assert len({patch.get_edgecolor() for patch in rectangles(axes)}) == 24


def test_masks_are_translucent_with_an_outline():
    mask = torch.zeros(1, 1, 24, 36)
    mask[0, 0, 4:14, 10:20] = 0.9
    mask[0, 0, 20, 30] = 0.4  # not of the object
    found = {key: value[:1] for key, value in FOUND.items()} | {"masks": mask}
    axes = detections_figure([torch.rand(3, 24, 36)], [found], None, NAMES).axes[0]
    layer = axes.images[1].get_array()
    assert layer.shape == (24, 36, 4)
    opacity = np.zeros((24, 36))
    opacity[4:14, 10:20] = 0.9
    opacity[5:13, 11:19] = 0.4
    np.testing.assert_allclose(layer[..., 3], opacity)


def test_a_person_has_limbs_and_hidden_points_are_hollow():
    points = torch.rand(1, 17, 3) * 20
    points[..., 2] = 2
    points[0, 15, 2] = 0  # the left ankle is not there: no limb to it
    points[0, 10, 2] = 1
    true = {"boxes": BOXES[:1], "labels": tensor([1]), "keypoints": points}
    found = true | {"scores": tensor([0.8]), "keypoints": points.clamp_max(1)}
    left, right = detections_figure([torch.rand(3, 24, 36)], [found], [true], ["person"]).axes
    assert len(right.lines) == len(left.lines) == 17
    assert [len(points.get_offsets()) for points in right.collections] == [15, 1]
    assert [len(points.get_offsets()) for points in left.collections] == [16, 0]
    cup = found | {"keypoints": points[:, :5]}
    five = detections_figure([torch.rand(3, 24, 36)], [cup], None, ["cup"]).axes[0]
    assert len(five.lines) == 0
    joined = detections_figure([torch.rand(3, 24, 36)], [cup], None, ["cup"], skeleton=[[0, 1], [1, 4]]).axes[0]
    np.testing.assert_allclose([line.get_xydata() for line in joined.lines], points[0][[[0, 1], [1, 4]], :2])


def test_rows_fit_portraits_and_landscapes_and_nothing_is_no_error():
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    images = [torch.rand(3, 20, 60), torch.rand(3, 60, 30), torch.rand(1, 40, 40)]
    empty = {"boxes": torch.zeros(0, 4), "labels": none["labels"], "masks": torch.zeros(0, 60, 30)}
    figure = detections_figure(images, [FOUND, none, none], [TRUE, empty, none], NAMES)
    assert len(figure.axes) == 6
    assert figure.axes[2].get_title() == "found: 0"
    height, width, _ = pixels(figure).shape
    assert 1200 < width < 1300
    assert 1000 < height < 1100
    assert pixels(detections_figure([], [], [], NAMES)).size
    assert pixels(detections_figure([], [], None, NAMES)).size


def curves(count):
    recall = torch.linspace(0, 1, 101)
    return torch.stack([(recall <= (k + 1) / (count + 1)).double() for k in range(count)])


def test_each_class_has_its_curve_with_its_area_and_the_mean_is_theirs():
    values = torch.cat([curves(3), torch.full((1, 101), float("nan"))])
    figure = precision_recall_figure(values, ["a", "b", "$c$", "absent"])
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    expected = values[:3].mean(1)
    assert legend == [
        f"$c$  {expected[2]:.2f}", f"b  {expected[1]:.2f}", f"a  {expected[0]:.2f}", f"mean of 3  {expected.mean():.2f}"
    ]  # fmt: skip
    assert pixels(figure).std() > 10


def test_of_many_classes_the_best_and_the_worst_are_named():
    figure = precision_recall_figure(curves(40), [f"class {k}" for k in range(40)])
    legend = [text.get_text().split("  ")[0] for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["class 39", "class 38", "class 37", "class 2", "class 1", "class 0", "mean of 40"]
    assert len(figure.axes[0].lines) == 41


@pytest.mark.parametrize("classes", [1, 2])
def test_without_an_object_the_curve_says_so(classes):
    figure = precision_recall_figure(torch.full((classes, 101), float("nan")), ["a", "b"][:classes])
    assert figure.axes[0].get_title() == "precision over recall: no true object"
    assert figure.axes[0].get_legend() is None
    assert pixels(figure).size
