"""Faster, Mask and Keypoint R-CNN against torchvision's own, from random weights."""

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

from zoo.faster_rcnn import EPS, FasterRCNN
from zoo.keypoint_rcnn import KeypointRCNN
from zoo.mask_rcnn import MaskRCNN

SIZES = {"min_size": 64, "max_size": 96}
PAIRS = [
    (FasterRCNN, "resnet50", "fasterrcnn_resnet50_fpn", 41_755_286),
    (FasterRCNN, "resnet50_v2", "fasterrcnn_resnet50_fpn_v2", 43_712_278),
    (FasterRCNN, "mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_fpn", 19_386_354),
    (MaskRCNN, "resnet50", "maskrcnn_resnet50_fpn", 44_401_393),
    (MaskRCNN, "resnet50_v2", "maskrcnn_resnet50_fpn_v2", 46_359_409),
    (KeypointRCNN, "resnet50", "keypointrcnn_resnet50_fpn", 59_137_258),
]


def published(builder, network):
    """Torchvision's network with random weights and statistics, as its published file would make it."""
    torch.manual_seed(0)
    few = {
        "box_score_thresh": 0.0,
        "box_detections_per_img": 4,
        "rpn_pre_nms_top_n_test": 20,
        "rpn_post_nms_top_n_test": 20,
    }
    theirs = getattr(detection, builder)(weights=None, weights_backbone=None, **few, **SIZES)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            # What torchvision does to the frozen batch norms of its first weights (overwrite_eps).
            module.eps = 0.0 if network == "resnet50" else module.eps
    for name, parameter in theirs.named_parameters():
        if name.startswith("roi_heads.") and "predictor" in name:
            nn.init.normal_(parameter, 0, 0.05)  # else all scores are alike, and their order is chance
    return theirs.eval()


def pictures(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, 70, 90, generator=generator).to(dtype), torch.rand(3, 96, 64, generator=generator).to(dtype)]


@pytest.mark.parametrize(("architecture", "network", "builder", "parameters"), PAIRS)
def test_torchvisions_checkpoint_gives_the_same_detections(architecture, network, builder, parameters, tmp_path):
    theirs = published(builder, network)
    torch.save(theirs.state_dict(), tmp_path / "published.pth")
    few = {"score_threshold": 0.0, "detections": 4, "test_proposals": 20}
    ours = architecture(network=network, weights=str(tmp_path / "published.pth"), **few, **SIZES).eval()
    assert sum(parameter.numel() for parameter in ours.parameters()) == parameters
    with torch.no_grad():
        expected, found = theirs.double()(pictures()), ours.double()(pictures())
    for one, other in zip(expected, found, strict=True):
        assert len(one["boxes"]) >= 1
        assert one.keys() == other.keys()
        for key, value in one.items():
            # The variances that take up epsilon were rounded to float32.
            torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-3, msg=key)


def test_the_heads_of_coco_bring_their_names_and_keep_the_rows_of_ours(tmp_path):
    theirs = published("maskrcnn_resnet50_fpn", "resnet50")
    path = str(tmp_path / "published.pth")
    torch.save(theirs.state_dict(), path)
    all_of_them = MaskRCNN(weights=path, **SIZES)
    assert (all_of_them.class_names[0], all_of_them.class_names[11], len(all_of_them.class_names)) == (
        "person",
        "N/A",
        90,
    )
    ours = MaskRCNN(3, ["lamp", "dog", "person"], weights=path, keep_matching_classes=True, **SIZES)
    scores, boxes = theirs.roi_heads.box_predictor.cls_score.weight, theirs.roi_heads.box_predictor.bbox_pred.weight
    masks = theirs.roi_heads.mask_predictor.mask_fcn_logits.weight
    dog, person = (all_of_them.class_names.index(name) + 1 for name in ("dog", "person"))
    predictor = ours.head.box_predictor
    assert torch.equal(predictor.cls_score.weight[[0, 2, 3]], scores[[0, dog, person]])
    assert torch.equal(predictor.bbox_pred.weight[8:16].flatten(), boxes.view(91, 4, -1)[[dog, person]].flatten())
    assert torch.equal(ours.head.mask_predictor.mask_fcn_logits.weight[2:], masks[[dog, person]])
    assert not (predictor.cls_score.weight[1] == scores).all(1).any(), "nobody knows a lamp"


OLD = {"inner_blocks.{}.0.": "inner_blocks.{}.", "layer_blocks.{}.0.": "layer_blocks.{}."}


def test_files_of_old_torchvisions_load_as_torchvision_itself_loads_them(tmp_path):
    theirs = published("maskrcnn_resnet50_fpn", "resnet50")
    state = {}
    for key, value in theirs.state_dict().items():
        for k in range(4):
            for new, old in OLD.items():
                key = key.replace(new.format(k), old.format(k))
            key = key.replace(f"mask_head.{k}.0.", f"mask_head.mask_fcn{k + 1}.")
        state[key.replace("rpn.head.conv.0.0.", "rpn.head.conv.")] = value
    assert "rpn.head.conv.weight" in state
    assert "roi_heads.mask_head.mask_fcn4.weight" in state
    detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).load_state_dict(state)  # it knows them too
    torch.save(state, tmp_path / "old.pth")
    torch.save(theirs.state_dict(), tmp_path / "new.pth")
    old, new = (MaskRCNN(weights=str(tmp_path / name), **SIZES) for name in ("old.pth", "new.pth"))
    assert all(torch.equal(a, b) for a, b in zip(old.state_dict().values(), new.state_dict().values(), strict=True))


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


def target(boxes):
    return {"boxes": torch.tensor(boxes).view(-1, 4), "labels": torch.ones(len(boxes), dtype=torch.int64),
            "image_id": torch.tensor(7)}  # fmt: skip


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
        FasterRCNN(4, network="squeezenet1_0", **SIZES)(pictures(torch.float32))


def test_anchors_are_a_list_for_each_map():
    with pytest.raises(ValueError, match="a list for each of the 4 maps of squeezenet1_0"):
        FasterRCNN(4, network="squeezenet1_0", anchor_sizes=[[16], [32]], **SIZES)
