"""Mask R-CNN against torchvision's own from random weights, and masks against cases that can be worked out by hand."""

import math

import pytest
import torch
from torch import nn
from torchvision.models import detection

from zoo.mask_rcnn import MaskRCNN

SIZES = {"min_size": 64, "max_size": 96}
PAIRS = [
    ("resnet50", "maskrcnn_resnet50_fpn", 44_401_393),
    pytest.param("resnet50_v2", "maskrcnn_resnet50_fpn_v2", 46_359_409, marks=pytest.mark.slow),
]


def target(boxes, height=64, width=64, label=1):
    """Each object fills the left half of its box."""
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[int(y1) : int(y2), int(x1) : int(x1 + x2) // 2] = 1
    labels = torch.full((len(boxes),), label)
    return {"boxes": torch.tensor(boxes).view(-1, 4), "labels": labels, "masks": masks, "image_id": torch.tensor(7)}


@pytest.mark.parametrize(("network", "builder", "parameters"), PAIRS)
def test_torchvisions_checkpoint_gives_the_same_detections_and_losses(network, builder, parameters, same_as_published):
    targets = [
        target([[5.0, 6.0, 50.0, 60.0], [30.0, 10.0, 80.0, 40.0]], 70, 90),
        target([[8.0, 20.0, 60.0, 90.0]], 96, 64, label=17),
    ]
    same_as_published(MaskRCNN, network, builder, parameters, targets)


def test_other_classes_replace_the_rows_of_boxes_and_masks_and_nothing_else(published_detector):
    _, path = published_detector("maskrcnn_resnet50_fpn", **SIZES)
    ours = MaskRCNN(3, weights=path, **SIZES)
    whole = MaskRCNN(weights=path, **SIZES).state_dict()
    fresh = {
        "head.box_predictor.cls_score": 4,
        "head.box_predictor.bbox_pred": 16,
        "head.mask_predictor.mask_fcn_logits": 4,
    }
    assert whole.keys() == ours.state_dict().keys()
    for key, value in ours.state_dict().items():
        layer = key.rsplit(".", 1)[0]
        if layer in fresh:
            assert len(value) == fresh[layer]
        else:
            assert torch.equal(value, whole[key]), key
    kept = [key for key in whole if key.rsplit(".", 1)[0] not in fresh]
    assert len(kept) == len(whole) - 6
    assert "head.mask_predictor.conv5_mask.weight" in kept


def test_the_heads_of_coco_bring_their_names_and_keep_the_rows_of_ours(published_detector):
    theirs, path = published_detector("maskrcnn_resnet50_fpn", **SIZES)
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


def test_files_of_old_torchvisions_load_as_torchvision_itself_loads_them(published_detector, tmp_path):
    theirs, path = published_detector("maskrcnn_resnet50_fpn", **SIZES)
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
    old, new = (MaskRCNN(weights=file, **SIZES) for file in (str(tmp_path / "old.pth"), path))
    assert all(torch.equal(a, b) for a, b in zip(old.state_dict().values(), new.state_dict().values(), strict=True))


def small(num_classes=2, **arguments):
    torch.manual_seed(0)
    return MaskRCNN(num_classes, network="squeezenet1_0", **SIZES, **arguments)


def says(model, values):
    """Let the last layer give each class, the background first, one value everywhere."""
    nn.init.zeros_(model.head.mask_predictor.mask_fcn_logits.weight)
    model.head.mask_predictor.mask_fcn_logits.bias.data = torch.tensor(values)


@pytest.mark.parametrize(("label", "logit"), [(1, 2.0), (2, -0.7)])
def test_the_loss_of_a_mask_is_that_of_its_own_class_over_its_box(label, logit):
    """Of 28 columns of the box 13 lie in the object and one has its edge in the middle: 13.5 of 28."""
    model = small()
    values = [50.0, 50.0, 50.0]  # of the others nothing may be heard
    values[label] = logit
    says(model, values)
    model.head.proposal_matcher.high_threshold = 1.0  # the true box alone is looked at, not what was proposed
    truth = target([[8.0, 8.0, 36.0, 36.0]], label=label)
    truth["masks"][:, :, 8:22] = 1  # beyond the box too, above and below
    loss = model.losses([torch.rand(3, 64, 64)], [truth])["loss_mask"]
    assert loss.item() == pytest.approx(math.log1p(math.exp(logit)) - logit * 13.5 / 28, abs=1e-5)


def test_images_without_objects_have_losses_and_teach_no_masks():
    model = small()
    losses = model.losses([torch.rand(3, 64, 64)] * 2, [target([]), target([])])
    assert set(losses) == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}
    assert losses["loss_mask"] == losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == 0
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert not gradients["head.mask_predictor.mask_fcn_logits.weight"].any()
    mixed = model.losses([torch.rand(3, 64, 64)] * 2, [target([]), target([[8.0, 8.0, 40.0, 40.0]])])
    assert all(value.isfinite() for value in mixed.values())
    assert mixed["loss_mask"] > 0


class LeftHalf(nn.Module):
    """Sure of the left half of every region, and of nothing else."""

    def forward(self, x):
        logits = torch.full((len(x), 3, 28, 28), -10.0)
        logits[..., :14] = 10.0
        return logits


@pytest.mark.parametrize(("height", "width"), [(64, 64), (150, 200)])
def test_masks_lie_in_their_boxes_in_the_images_own_pixels(height, width):
    model = small(score_threshold=0.0, detections=40).eval()
    model.head.mask_predictor = LeftHalf()
    with torch.no_grad():
        (found,) = model([torch.rand(3, height, width)])
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    seen = 0
    for (x1, y1, x2, y2), mask in zip(found["boxes"].tolist(), found["masks"], strict=True):
        assert mask.shape == (1, height, width)
        middle, edge = (x1 + x2) / 2, 2  # pixels that rounding may cost
        inside = (x >= x1 + edge) & (x < middle - edge) & (y >= y1 + edge) & (y < y2 - edge)
        outside = (x < x1 - edge) | (x >= middle + edge) | (y < y1 - edge) | (y >= y2 + edge)
        assert (mask[0][inside] > 0.5).all()
        assert (mask[0][outside] < 0.5).all()
        seen += int(inside.sum() > 50)
    assert seen > 3, "boxes that are large enough to tell"


def test_an_image_on_which_nothing_is_found_has_no_masks():
    model = small(score_threshold=0.99).eval()
    with torch.no_grad():
        (found,) = model([torch.rand(3, 50, 70)])
    assert found["masks"].shape == (0, 1, 50, 70)
