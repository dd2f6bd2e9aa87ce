"""The layers of detectors, which select between them, against what others counted."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from zoo.cli import main
from zoo.faster_rcnn import FasterRCNN
from zoo.keypoint_rcnn import KeypointRCNN
from zoo.layer_table import layer_table
from zoo.mask_rcnn import MaskRCNN
from zoo.single_stage import SingleStageDetector
from zoo.two_stage import TwoStageDetector
from zoo.yolov3 import YOLOv3


def table_of(architecture, **arguments):
    with torch.device("meta"):
        model = architecture(**arguments)
        return layer_table(model, torch.zeros(model.example_input_array.shape))


@pytest.mark.parametrize(("tiny", "billions"), [(False, 65.86), (True, 5.56)])
def test_yolov3_costs_what_its_authors_say(tiny, billions):
    """Darknet counts convolutions, and a multiply-add twice: https://pjreddie.com/darknet/yolo/ at 416 pixels."""
    rows = [row for row in table_of(YOLOv3, tiny=tiny) if row.kind == "Conv2d"]
    assert sum(row.multiply_adds for row in rows) * 2 / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize(
    ("architecture", "parameters"), [(FasterRCNN, 41_755_286), (MaskRCNN, 44_401_393), (KeypointRCNN, 59_137_258)]
)
def test_every_parameter_of_torchvisions_detectors_is_in_the_table_once(architecture, parameters):
    rows = table_of(architecture)
    assert sum(row.parameters for row in rows) == parameters
    objectness = [row for row in rows if row.name == "rpn.head.cls_logits"]
    assert [row.output for row in objectness] == [(3, side, side) for side in (200, 100, 50, 25, 13)]
    assert [row.parameters for row in objectness] == [256 * 3 + 3, 0, 0, 0, 0]


def test_heads_of_regions_cost_as_much_as_the_regions_that_are_kept_at_most():
    rows = {row.name: row for row in table_of(MaskRCNN, num_classes=3, test_proposals=50, detections=7, min_size=128)}
    hidden, mask = rows["head.box_head.fc6"], rows["head.mask_predictor.conv5_mask"]
    assert (hidden.output, hidden.multiply_adds) == ((50, 1024), 50 * 256 * 7 * 7 * 1024)
    assert (mask.output, mask.memory_kb) == ((7, 256, 28, 28), 7 * 256 * 28 * 28 * 4 / 1024)
    assert rows["head.mask_predictor.mask_fcn_logits"].output == (7, 4, 28, 28)


@pytest.mark.parametrize(("architecture", "last"), [(SingleStageDetector, (20, 7, 7)), (TwoStageDetector, (20,))])
def test_the_assignments_detectors_end_in_their_classes(architecture, last):
    rows = table_of(architecture)
    assert (rows[-1].name, rows[-1].output) == ("head.classes", last)
    convolutions = {row.name for row in rows if row.kind == "Conv2d"}
    assert len([name for name in convolutions if name.startswith("backbone.")]) == 52  # of MobileNetV2


@pytest.mark.parametrize(("groups", "kernel", "stride"), [(1, 2, 2), (1, 4, 2), (2, (3, 1), 1)])
def test_a_transposed_convolution_costs_what_torch_counts(groups, kernel, stride):
    network = nn.Sequential(nn.ConvTranspose2d(4, 6, kernel, stride, groups=groups))
    images = torch.zeros(1, 4, 9, 7)
    (row,) = layer_table(network, images)
    with FlopCounterMode(display=False) as counted:
        network(images)
    assert row.multiply_adds * 2 == counted.get_total_flops()


def test_show_prints_a_detectors_table(capsys):
    options = ["--network", "squeezenet1_0", "--min_size", "128", "--num_classes", "3", "--test_proposals", "50"]
    assert main(["show", "faster_rcnn", *options]) == 0
    output = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in output.splitlines() if line.strip()}
    assert lines["head.box_predictor.cls_score"] == [
        "head.box_predictor.cls_score", "Linear", "50", "x", "4", "0.78", "4,100", "0.205"
    ]  # fmt: skip
    assert lines["total"][1:]
    assert "how many are kept at most" in output
    assert main(["show", "yolov3", "--tiny", "true", "--width", "0.125", "--input", "3x64x64"]) == 0
    output = capsys.readouterr().out
    assert "255 x 4 x 4" in output
    assert "kept at most" not in output


def test_show_refuses_a_size_that_a_detector_does_not_take(capsys):
    assert main(["show", "yolov3", "--input", "3x100x100"]) == 2
    assert "YOLOv3 does not take 3x100x100" in capsys.readouterr().err
