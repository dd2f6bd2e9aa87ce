"""Faster R-CNN against torchvision's own, from random weights."""

import pytest
import torch
from torchvision import models
from torchvision.ops import FrozenBatchNorm2d

from zoo.faster_rcnn import EPS, FasterRCNN

SIZES = {"min_size": 64, "max_size": 96}
PAIRS = [
    ("resnet50", "fasterrcnn_resnet50_fpn", 41_755_286),
    ("resnet50_v2", "fasterrcnn_resnet50_fpn_v2", 43_712_278),
    ("mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_fpn", 19_386_354),
]


def target(boxes):
    return {"boxes": torch.tensor(boxes).view(-1, 4), "labels": torch.ones(len(boxes), dtype=torch.int64),
            "image_id": torch.tensor(7)}  # fmt: skip


@pytest.mark.parametrize(("network", "builder", "parameters"), PAIRS)
def test_torchvisions_checkpoint_gives_the_same_detections_and_losses(network, builder, parameters, same_as_published):
    targets = [target([[5.0, 6.0, 50.0, 60.0], [30.0, 10.0, 80.0, 40.0]]), target([[8.0, 20.0, 60.0, 90.0]])]
    same_as_published(FasterRCNN, network, builder, parameters, targets)


@pytest.mark.parametrize("network", ["resnet50", "mobilenet_v3_large", "squeezenet1_0"])
def test_a_trunk_starts_from_a_classifiers_file(network, tmp_path):
    torch.manual_seed(2)
    classifier = getattr(models, network)(weights=None)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    ours = FasterRCNN(4, network=network, backbone_weights=str(tmp_path / "classifier.pth"), **SIZES)
    theirs = {key.removeprefix("features."): value for key, value in classifier.state_dict().items()}
    body = ours.backbone.body.state_dict()
    assert len(body) > 40
    assert all(torch.equal(value, theirs[key]) for key, value in body.items())
    other = "squeezenet1_0" if network == "resnet50" else network
    torch.save(getattr(models, other)(weights=None).state_dict(), tmp_path / "classifier.pth")
    with pytest.raises(ValueError, match=r"classifier\.pth is not of a resnet50: conv1\.weight"):
        FasterRCNN(4, backbone_weights=str(tmp_path / "classifier.pth"), **SIZES)


@pytest.mark.parametrize(("network", "least"), [("resnet50", 5), ("mobilenet_v3_large", 6), ("squeezenet1_0", 4)])
def test_stages_are_frozen_from_the_first_on(network, least):
    trained = [
        sum(p.numel() for p in FasterRCNN(4, network=network, trainable_layers=k, **SIZES).backbone.body.parameters()
            if p.requires_grad)
        for k in range(least + 1)
    ]  # fmt: skip
    assert trained[0] == 0
    assert trained == sorted(set(trained)), "each stage adds some"
    with pytest.raises(ValueError, match=f"trainable_layers={least + 1} must be between 0 and {least}"):
        FasterRCNN(4, network=network, trainable_layers=least + 1, **SIZES)


def test_frozen_batch_norms_add_the_epsilon_that_the_renaming_takes_off():
    norms = [m for m in FasterRCNN(4, **SIZES).backbone.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(norms) == 53
    assert {norm.eps for norm in norms} == {EPS}


def test_a_box_without_area_is_named():
    model = FasterRCNN(4, network="squeezenet1_0", **SIZES)
    with pytest.raises(ValueError, match=r"images \[7\].*positive height and width.*\[5\.0, 5\.0, 5\.0, 9\.0\]"):
        model.losses([torch.rand(3, 64, 64)], [target([[5.0, 5.0, 5.0, 9.0]])])


def test_an_image_without_objects_has_a_loss():
    model = FasterRCNN(4, network="squeezenet1_0", **SIZES)
    losses = model.losses([torch.rand(3, 64, 64)] * 2, [target([]), target([[5.0, 5.0, 40.0, 50.0]])])
    assert set(losses) == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
    assert all(value.isfinite() for value in losses.values())


def test_training_mode_does_not_detect():
    with pytest.raises(ValueError, match=r"call .eval\(\) first"):
        FasterRCNN(4, network="squeezenet1_0", **SIZES)([torch.rand(3, 70, 90)])


def test_anchors_are_a_list_for_each_map():
    with pytest.raises(ValueError, match="a list for each of the 4 maps of squeezenet1_0"):
        FasterRCNN(4, network="squeezenet1_0", anchor_sizes=[[16], [32]], **SIZES)
