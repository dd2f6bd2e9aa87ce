import json
import multiprocessing
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.ImageOps
import pytest
import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from PIL import Image
from pycocotools import mask as pycocotools_mask
from pycocotools.coco import COCO
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from datamodules import COCODataModule, ScenesDataModule
from datamodules.coco import compressed_mask, pixels_in_runs, read_categories
from datamodules.detection import DetectionLoader, Samples
from datamodules.embedded.scenes import write_scenes
from datamodules.picture_augmentation import (
    Augmentation,
    mirrored,
    random_iou_crop,
    random_scale,
    resized,
    swapped_keypoints,
)
from datamodules.sampling import EvaluationBatches, TrainingBatches

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]


def picture(path, height=24, width=32, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def annotation(number=1, image_id=1, category_id=3, bbox=(2, 3, 10, 8), **more):
    x, y, w, h = bbox
    polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    found = {"id": number, "image_id": image_id, "category_id": category_id, "bbox": list(bbox), "area": w * h}
    return found | {"iscrowd": 0, "segmentation": polygon} | more


def image(number=1, name="a.png", height=24, width=32):
    return {"id": number, "file_name": name, "height": height, "width": width}


@pytest.fixture
def make(tmp_path):
    """Write a set of a few pictures with these entries, and read it."""

    def write(images=None, annotations=None, categories=None, stage="fit", **options):
        images = [image(), image(5, "b.png")] if images is None else images
        for i, entry in enumerate(images):
            if isinstance(entry, dict) and not (tmp_path / "train" / entry.get("file_name", "x")).exists():
                picture(tmp_path / "train" / entry.get("file_name", "x"), seed=i, format="PNG")
        content = {"images": images, "annotations": [annotation()] if annotations is None else annotations}
        content["categories"] = CATEGORIES if categories is None else categories
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(content))
        module = COCODataModule(str(tmp_path), **{"val_size": 0, "workers": 0, "flip": False} | options)
        if stage:
            module.setup(stage)
        return module

    return write


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "set"
    write_scenes(folder, {"train": 27, "val": 9, "test": 0}, 64)
    return folder


def target(module, index=0, training=False, split="train"):
    pictures = {"train": module.train_set, "val": module.val_set}[split]
    return pictures.target(index, module.masks, module.keypoints, training)


def batches(loader, count=None):
    taken = []
    for images, targets in loader:
        taken.append(([one.clone() for one in images], [{k: v.clone() for k, v in t.items()} for t in targets]))
        if len(taken) == count:
            break
    return taken


def same(one, other):
    return len(one) == len(other) and all(
        len(a[0]) == len(b[0])
        and all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))
        and all(
            s.keys() == t.keys() and all(torch.equal(s[k], t[k]) for k in s) for s, t in zip(a[1], b[1], strict=True)
        )
        for a, b in zip(one, other, strict=True)
    )


# What is in a batch


def test_a_batch_is_what_torchvisions_detectors_take(scenes):
    module = COCODataModule(str(scenes), masks=True, batch_size=4, workers=0)
    module.setup("fit")
    images, targets = module.on_after_batch_transfer(next(iter(module.train_dataloader())), 0)
    assert len(images) == len(targets) == 4
    kinds = {
        "boxes": (torch.float32, (4,)), "labels": (torch.int64, ()), "area": (torch.float32, ()),
        "iscrowd": (torch.int64, ()), "masks": (torch.uint8, (64, 64)),
    }  # fmt: skip
    for one, found in zip(images, targets, strict=True):
        assert (one.dtype, one.shape, one.min() >= 0, one.max() <= 1) == (torch.float32, (3, 64, 64), True, True)
        assert found.keys() == kinds.keys() | {"image_id"}
        for key, (dtype, shape) in kinds.items():
            assert (found[key].dtype, found[key].shape) == (dtype, (len(found["boxes"]), *shape)), key
        assert (found["image_id"].dtype, found["image_id"].shape) == (torch.int64, ())


@pytest.mark.parametrize("keypoints", [False, True])
def test_every_target_is_what_pycocotools_reads(scenes, keypoints):
    kind = "person_keypoints" if keypoints else "instances"
    theirs = COCO(scenes / "annotations" / f"{kind}_train.json")
    module = COCODataModule(str(scenes), masks=True, keypoints=keypoints, workers=0)
    module.setup("fit")
    compare(module, theirs, "train", 27)


@pytest.mark.parametrize(("name", "json_file", "count"), [
    ("coco_small", "instances_val2017.json", 66), ("nuclei", "instances_val.json", 67),
])  # fmt: skip
def test_real_sets_are_read_as_pycocotools_does(zoo_data, name, json_file, count):
    module = COCODataModule(str(zoo_data / name), masks=True, workers=0)
    module.setup("validate")
    compare(module, COCO(zoo_data / name / "annotations" / json_file), "val", count)


def compare(module, theirs, split, count):
    pictures = {"train": module.train_set, "val": module.val_set}[split]
    assert len(pictures) == len(theirs.imgs) == count
    for index in range(count):
        ours = target(module, index, split=split)
        expected = theirs.loadAnns(theirs.getAnnIds(ours["image_id"].item()))
        assert pictures.path(index).name == theirs.imgs[ours["image_id"].item()]["file_name"]
        boxes = torch.tensor([entry["bbox"] for entry in expected]).reshape(-1, 4)
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
        torch.testing.assert_close(ours["boxes"], boxes, rtol=0, atol=1e-4)
        assert [module.category_ids[k - 1] for k in ours["labels"]] == [entry["category_id"] for entry in expected]
        assert ours["iscrowd"].tolist() == [entry["iscrowd"] for entry in expected]
        assert ours["area"].tolist() == pytest.approx([entry["area"] for entry in expected])
        for mask, entry in zip(ours["masks"].numpy(), expected, strict=True):
            np.testing.assert_array_equal(mask, theirs.annToMask(entry))
        if module.keypoints:
            assert ours["keypoints"].flatten(1).tolist() == [entry["keypoints"] for entry in expected]


def test_labels_follow_ascending_ids_and_ids_are_kept(make):
    module = make(annotations=[annotation(1, category_id=7), annotation(2, category_id=3)])
    assert (module.num_classes, module.class_names, module.category_ids) == (2, ["cat", "dog"], [3, 7])
    assert target(module)["labels"].tolist() == [2, 1]


def test_crowds_are_evaluated_and_not_trained_on(make):
    counts = [100, 50, 24 * 32 - 150]
    runs = {"size": [24, 32], "counts": counts}
    crowd = annotation(2, iscrowd=1, segmentation=runs)
    module = make(annotations=[annotation(), crowd], masks=True)
    evaluated, trained = target(module), target(module, training=True)
    assert evaluated["iscrowd"].tolist() == [0, 1]
    assert evaluated["masks"].sum((1, 2)).tolist() == [80, 50]
    assert trained["iscrowd"].tolist() == [0]
    assert len(trained["masks"]) == len(trained["labels"]) == len(trained["area"]) == 1


def test_pictures_without_objects_stay_unless_they_are_not_wanted(make):
    module = make(masks=True)
    assert len(module.train_set) == 2
    _, targets = next(iter(module.evaluation_dataloader("train")))
    assert targets[1]["boxes"].shape == (0, 4)
    assert targets[1]["masks"].shape == (0, 24, 32)
    crowd_only = annotation(2, image_id=5, iscrowd=1)
    module = make(annotations=[annotation(), crowd_only], keep_empty=False)
    assert module.train_set.numbers.tolist() == [1]
    assert "1 picture without objects" in module.report()


# Boxes at the edge


@pytest.mark.parametrize("bbox", [(4, 4, 0, 5), (4, 4, 5, 0), (4, 4, -3, 5), (30, 5, 1e-9, 5)])
def test_boxes_without_area_are_left_out_and_counted(make, bbox):
    module = make(annotations=[annotation(), annotation(2, bbox=bbox)])
    assert len(target(module)["boxes"]) == 1
    assert "1 box without area left out: annotation 2 of a.png" in module.report()


@pytest.mark.parametrize("bbox", [(40, 4, 5, 5), (-9, 4, 9, 5), (4, 24, 5, 5), (4, -6, 5, 5)])
def test_boxes_outside_of_the_picture_are_left_out_and_counted(make, bbox):
    module = make(annotations=[annotation(), annotation(2, bbox=bbox)])
    assert len(target(module)["boxes"]) == 1
    assert "1 box outside of its picture left out: annotation 2 of a.png" in module.report()


def test_boxes_beyond_the_edge_are_cut_in_training_and_counted(make):
    module = make(annotations=[annotation(bbox=(-2.5, 20, 40, 10))])
    assert target(module, training=True)["boxes"].tolist() == [[0, 20, 32, 24]]
    assert target(module)["boxes"].tolist() == [[-2.5, 20, 37.5, 30]]  # as pycocotools evaluates
    assert "1 box beyond the edge of its picture, in training cut there: annotation 1 of a.png" in module.report()


def test_the_report_counts_pictures_and_objects(make, capsys):
    module = make(annotations=[annotation(1), annotation(2, 5, 7), annotation(3, 5, 7, iscrowd=1)])
    assert module.report() == "train: 2 pictures, 3 objects (cat 1, dog 2), 1 of them crowds or to be ignored"


# Entries that make no sense

WRONG = {
    "picture": ({"images": [image(), {"id": "x", "file_name": "b.png"}]}, r"json: a picture is {'id': 'x'"),
    "no name": ({"images": [image(), {"id": 2}]}, r"expected a whole number id and a file_name"),
    "picture twice": ({"images": [image(), image(1, "b.png")]}, r"two pictures have the id 1, a\.png and b\.png"),
    "annotation": ({"annotations": [annotation(), [1]]}, r"an annotation is \[1\], expected"),
    "annotation twice": ({"annotations": [annotation(), annotation()]}, r"annotation 1: another one has the same id"),
    "unknown picture": ({"annotations": [annotation(), annotation(2, 9)]}, r"annotation 2 is of picture 9, which"),
    "unknown category": ({"annotations": [annotation(), annotation(2, 1, 1)]}, r"annotation 2 has the category 1"),
    "box": ({"annotations": [annotation(), annotation(2, bbox=(1, 2, 3, float("nan")))]}, r"the box \[1, 2, 3, nan\]"),
    "no box": ({"annotations": [annotation(), annotation(2) | {"bbox": None}]}, r"has the box None, expected four"),
    "no mask": ({"annotations": [annotation(), annotation(2, segmentation=[])]}, r"has the segmentation \[\]"),
    "polygon": (
        {"annotations": [annotation(), annotation(2, segmentation=[[1, 2, 3, 4]])]},
        r"polygons \[\[1, 2, 3, 4\]\], expected lists",
    ),
    "size": (
        {"annotations": [annotation(), annotation(2, segmentation={"size": [9, 9], "counts": [81]})]},
        r"run lengths for the size \[9, 9\], the picture's is \[24, 32\]",
    ),
    "runs": (
        {"annotations": [annotation(), annotation(2, segmentation={"size": [24, 32], "counts": [5, 6]})]},
        r"run lengths that do not add up to 24 x 32 pixels",
    ),
    "compressed": (
        {"annotations": [annotation(), annotation(2, segmentation={"size": [24, 32], "counts": "52"})]},
        r"compressed run lengths that do not add up",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_an_entry_that_makes_no_sense_is_named_or_left_out(make, case):
    entries, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as caught:
        make(masks=True, **entries)
    assert "instances_train.json" in str(caught.value)
    assert str(caught.value).count("\n") == 0
    assert "--data.init_args.corrupt skip" in str(caught.value)
    module = make(masks=True, corrupt="skip", **entries)
    assert len(target(module)["boxes"]) == 1
    assert any(line.startswith("  1 ") for line in module.report().splitlines())


@pytest.mark.parametrize("text", ["", "{", '{"images": [', "\x00\x01", '{"images": [], "annotations": []} x'])
def test_broken_json_is_named(tmp_path, text):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "_annotations.coco.json").write_text(text)
    with pytest.raises(ValueError, match=r"_annotations\.coco\.json is no whole json file .*fetch or write it again"):
        COCODataModule(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "has no list 'images'"),
        ({"images": [], "annotations": []}, "has no list 'categories'"),
        ({"images": [], "annotations": [], "categories": []}, "has no categories"),
        ({"images": [], "annotations": [], "categories": [{"id": 1}]}, r"a category is {'id': 1}, expected"),
        ({"images": [], "annotations": [], "categories": CATEGORIES[:1] * 2}, "several categories with the id 7"),
    ],
)
def test_another_format_is_named(tmp_path, content, message):
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"annotations\.json.*" + message):
        COCODataModule(str(tmp_path))


def test_a_json_that_is_cut_off_behind_its_categories_is_named_when_it_is_read(tmp_path):
    text = json.dumps({"categories": CATEGORIES, "images": [image()], "annotations": [annotation()]})
    (tmp_path / "train.json").write_text(text[:-20])
    module = COCODataModule(str(tmp_path))
    assert module.class_names == ["cat", "dog"]
    with pytest.raises(ValueError, match="is no whole json file"):
        module.setup("fit")


def test_a_set_without_any_pictures_is_refused(make):
    with pytest.raises(ValueError, match="there are no pictures in split train"):
        make(images=[], annotations=[])


def test_missing_pictures_are_named_or_left_out_with_their_objects(make, tmp_path):
    make(annotations=[annotation(), annotation(2, 5)])
    (tmp_path / "train" / "b.png").unlink()
    module = COCODataModule(str(tmp_path), val_size=0)
    with pytest.raises(ValueError, match=r"names the picture .*b\.png, which is not there.*corrupt skip"):
        module.setup("fit")
    module = COCODataModule(str(tmp_path), val_size=0, corrupt="skip")
    module.setup("fit")
    assert module.train_set.numbers.tolist() == [1]
    assert "1 picture that is missing" in module.report()


@pytest.mark.parametrize("cache", [False, True])
def test_unreadable_pictures_are_named_or_left_out(make, tmp_path, cache):
    images = [image(i, f"{i}.jpg") for i in range(1, 6)]
    for entry in images:
        picture(tmp_path / "train" / entry["file_name"], seed=entry["id"], format="JPEG")
    make(images)
    file = tmp_path / "train" / "3.jpg"
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"3\.jpg cannot be read as a picture: .*corrupt skip"):
        batches(make(images, cache=cache).train_dataloader())
    with pytest.warns(UserWarning, match=r"1 of 5 pictures of split train cannot be read, and are left out: .*3\.jpg"):
        module = make(images, cache=cache, corrupt="skip")
    assert module.train_set.numbers.tolist() == [1, 2, 4, 5]
    assert "1 picture that cannot be read" in module.report()
    for entry in images[:4]:
        (tmp_path / "train" / entry["file_name"]).write_bytes(b"")
    with pytest.raises(ValueError, match=r"4 of 5 pictures .* too many to leave out"):
        make(images, cache=cache, corrupt="skip")


def test_a_picture_of_another_size_than_its_annotations_say_is_named(make):
    with pytest.raises(ValueError, match=r"a\.png has 32 x 24 pixels, its annotations say 30 x 24: boxes would be"):
        make([image(width=30)])


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "I;16"])
def test_pictures_of_any_kind_become_rgb(make, tmp_path, mode):
    grey = Image.fromarray(np.full((24, 32), 200, dtype=np.uint8))
    deep = Image.fromarray(np.full((24, 32), 200 * 256, dtype=np.uint16))
    kinds = {"L": grey, "P": grey.convert("P"), "I;16": deep}
    name = "x.jpg" if mode == "CMYK" else "x.png"
    (tmp_path / "train").mkdir()
    kinds.get(mode, grey.convert("RGB").convert(mode if mode in ("CMYK", "RGBA") else "RGB")).save(
        tmp_path / "train" / name
    )
    images, _ = next(iter(make([image(1, name)]).evaluation_dataloader("train")))
    assert images[0].shape == (3, 24, 32)
    assert (images[0].float() - 200).abs().max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("annotated", ["upright", "stored"])
def test_boxes_stay_on_what_they_are_around_whatever_the_exif_orientation(make, tmp_path, orientation, annotated):
    stored = Image.new("RGB", (32, 24))
    stored.paste((255, 255, 255), (2, 3, 8, 7))
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "train").mkdir()
    stored.save(tmp_path / "train" / "x.png", exif=exif)
    upright = np.asarray(PIL.ImageOps.exif_transpose(Image.open(tmp_path / "train" / "x.png")))
    if annotated == "stored" and orientation < 5:
        pytest.skip("the sizes are the same: nothing says which was annotated, and upright is taken")
    seen = upright if annotated == "upright" else np.asarray(stored)
    ys, xs = np.nonzero(seen[..., 0])
    box = [int(xs.min()), int(ys.min()), int(xs.max() - xs.min() + 1), int(ys.max() - ys.min() + 1)]
    module = make([image(1, "x.png", *seen.shape[:2])], [annotation(bbox=box)])
    images, targets = next(iter(module.evaluation_dataloader("train")))
    x1, y1, x2, y2 = targets[0]["boxes"][0].int().tolist()
    white = images[0] == 255
    assert white[:, y1:y2, x1:x2].all()
    assert white.sum() == 3 * 24


def test_a_size_that_the_json_does_not_say_is_measured(make):
    module = make([{"id": 1, "file_name": "a.png"}])
    assert module.train_set.sizes.tolist() == [[24, 32]]


# Masks


def test_the_sum_of_compressed_runs_is_that_of_the_lengths():
    rng = np.random.default_rng(0)
    for _ in range(50):
        height, width = rng.integers(1, 900, 2)
        mask = (rng.random((height, width)) < rng.random() ** 3).astype(np.uint8)
        runs = pycocotools_mask.encode(np.asfortranarray(mask))
        assert pixels_in_runs(runs["counts"].decode()) == height * width
    assert [pixels_in_runs(text) for text in ("", "\x7f", "P", "zzzzzzzzzzzzzzzz", "é")] == [-1] * 5


def test_a_mask_may_consist_of_several_polygons():
    polygons = [[1, 1, 5, 1, 5, 5, 1, 5], [3, 3, 9, 3, 9, 9, 3, 9]]
    runs = compressed_mask(polygons, 12, 12)
    mask = pycocotools_mask.decode({"size": [12, 12], "counts": runs})
    assert mask.sum() == 16 + 36 - 4


def test_without_pycocotools_the_error_says_what_to_install(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert make(masks=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'zoo\[detection\]'"):
        make(masks=True)


# Keypoints

PERSON = [{"id": 1, "name": "person", "keypoints": ["nose", "left_eye", "right_eye"], "skeleton": [[1, 2], [1, 3]]}]
POINTS = [5, 6, 2, 8, 4, 1, 0, 0, 0]


def test_keypoints_are_read_with_their_names(make):
    module = make(annotations=[annotation(category_id=1, keypoints=POINTS)], categories=PERSON, keypoints=True)
    assert module.keypoint_names == ["nose", "left_eye", "right_eye"]
    assert module.skeleton == [[0, 1], [0, 2]]
    assert target(module)["keypoints"].tolist() == [[[5, 6, 2], [8, 4, 1], [0, 0, 0]]]


@pytest.mark.parametrize("points", [POINTS[:6], [*POINTS[:8], 3], "none"])
def test_broken_keypoints_are_named(make, points):
    with pytest.raises(ValueError, match=r"annotation 1 has the keypoints .*, expected 9 numbers"):
        make(annotations=[annotation(category_id=1, keypoints=points)], categories=PERSON, keypoints=True)


def test_keypoints_that_no_category_has_are_refused(make):
    with pytest.raises(ValueError, match="has no category with keypoints"):
        make(keypoints=True)
    other = {"id": 2, "name": "dog", "keypoints": ["tail"], "skeleton": []}
    with pytest.raises(ValueError, match="the keypoints of dog are not those of person"):
        make(categories=[*PERSON, other], keypoints=True)


def test_cocos_seventeen_keypoints_change_sides_in_a_mirror():
    names = "nose,left_eye,right_eye,left_ear,right_ear,left_shoulder,right_shoulder,left_elbow,right_elbow,left_wrist,"
    names += "right_wrist,left_hip,right_hip,left_knee,right_knee,left_ankle,right_ankle"
    # torchvision's references/detection/transforms.py has this list
    assert swapped_keypoints(names.split(",")) == [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]
    assert swapped_keypoints(["leftmost", "tail"]) == [0, 1]


# Augmentation


def sample(seed=0, height=40, width=60, count=4):
    """Bright rectangles on black: whatever happens, boxes, masks and points must stay on them."""
    rng = np.random.default_rng(seed)
    masks = torch.zeros(count, height, width, dtype=torch.uint8)
    boxes, points = torch.zeros(count, 4), torch.zeros(count, 3, 3)
    for i in range(count):
        x, y = int(rng.integers(0, width - 12)), int(rng.integers(0, height - 10))
        w, h = rng.integers(6, 12), rng.integers(5, 10)
        masks[i, y : y + h, x : x + w] = 1
        boxes[i] = torch.tensor([x, y, x + w, y + h])
        points[i] = torch.tensor([[x, y, 2], [x + w - 1, y, 2], [0, 0, 0]])  # corners top left and right; none
    image = (masks.amax(0) * 255)[None].repeat(3, 1, 1)
    found = {"boxes": boxes, "labels": torch.arange(1, count + 1), "masks": masks, "keypoints": points}
    found |= {"image_id": torch.tensor(3), "iscrowd": torch.zeros(count, dtype=torch.int64)}
    return image, found | {"area": masks.sum((1, 2)).float()}


SWAPS = swapped_keypoints(["left_top", "right_top", "middle"])


needs_keypoints = pytest.mark.skipif(not hasattr(tv_tensors, "KeyPoints"), reason="needs torchvision 0.23")


@needs_keypoints
def test_a_mirror_equals_brute_force_and_torchvision():
    image, before = sample()
    flipped, after = mirrored(image, before, SWAPS)
    assert torch.equal(flipped, image.flip(-1))
    assert torch.equal(after["masks"], before["masks"].flip(-1))
    for i, mask in enumerate(after["masks"]):
        ys, xs = mask.nonzero(as_tuple=True)
        assert after["boxes"][i].tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        # What is called left top is again the corner at the left.
        assert after["keypoints"][i, :2, 0].tolist() == [xs.min(), xs.max()]
    assert after["keypoints"][:, 2].eq(0).all()
    theirs = functional.horizontal_flip(tv_tensors.KeyPoints(before["keypoints"][:, :2, :2], canvas_size=(40, 60)))
    assert torch.equal(after["keypoints"][:, [1, 0], :2], theirs.as_subclass(torch.Tensor))
    again = mirrored(flipped, after, SWAPS)
    assert same([([again[0]], [again[1]])], [([image], [before])])


def test_resizing_scales_everything():
    image, before = sample()
    big, after = resized(image, before, 80, 180)
    assert big.shape == (3, 80, 180)
    assert torch.equal(after["boxes"], before["boxes"] * torch.tensor([3.0, 2, 3, 2]))
    assert torch.equal(after["masks"], before["masks"].repeat_interleave(2, 1).repeat_interleave(3, 2))
    assert torch.equal(after["area"], before["area"] * 6)
    assert torch.equal(after["keypoints"], before["keypoints"] * torch.tensor([3.0, 2, 1]))


@needs_keypoints
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("change", [random_iou_crop, lambda image, found: random_scale(image, found, 0.5, 2.0)])
def test_after_a_random_crop_all_fields_belong_together(seed, change):
    torch.manual_seed(seed)
    image, before = sample(seed)
    cropped, after = change(image, before)
    count = len(after["boxes"])
    assert {len(value) for key, value in after.items() if key != "image_id"} == {count}
    height, width = cropped.shape[1:]
    assert after["masks"].shape[1:] == (height, width)
    assert after["labels"].unique().numel() == count
    for i in range(count):
        x1, y1, x2, y2 = after["boxes"][i].tolist()
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
        ys, xs = after["masks"][i].nonzero(as_tuple=True)
        assert [x1, y1, x2, y2] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert (cropped[:, after["masks"][i].bool()] > 100).float().mean() > 0.95
        for x, y, seen in after["keypoints"][i].tolist():
            assert (0 <= x < width and 0 <= y < height) if seen else (x, y) == (0, 0)
    if change is not random_iou_crop:
        assert cropped.shape == image.shape


def test_a_random_crop_of_a_picture_without_objects(make):
    module = make(annotations=[annotation()], iou_crop=True, scale_jitter=[0.5, 2.0], masks=True, batch_size=2)
    for _ in range(5):
        for images, targets in module.train_dataloader():
            assert len(images) == len(targets) == 2


def test_augmentation_changes_half_of_the_pictures_and_leaves_the_runs_random_numbers_alone():
    image, before = sample()
    flip = Augmentation(True, SWAPS, False, None)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    flipped = [not torch.equal(flip(image, before, [0, 0, i])[0], image) for i in range(400)]
    assert 160 < sum(flipped) < 240
    assert torch.equal(torch.get_rng_state(), state)
    assert flipped == [not torch.equal(flip(image, before, [0, 0, i])[0], image) for i in range(400)]


@pytest.mark.parametrize(("size", "expected"), [(None, (24, 32)), (64, (48, 64)), (16, (12, 16)), ([10, 20], (10, 20))])
@pytest.mark.parametrize("cache", [False, True])
def test_the_size_of_pictures(make, size, expected, cache):
    module = make(size=size, masks=True, cache=cache)
    for loader in (module.train_dataloader(), module.evaluation_dataloader("train")):
        images, targets = next(iter(loader))
        place = [int(found["image_id"]) for found in targets].index(1)
        assert images[place].shape == (3, *expected)
        assert targets[place]["masks"].shape == (1, *expected)
        sy, sx = expected[0] / 24, expected[1] / 32
        box = torch.tensor([[2 * sx, 3 * sy, 12 * sx, 11 * sy]])
        torch.testing.assert_close(targets[place]["boxes"], box)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_batch_size": 0}, "eval_batch_size=0 must be at least 1"),
        ({"workers": -1}, "workers=-1 must be at least 0"),
        ({"val_size": -1}, "val_size=-1 must be at least 0"),
        ({"size": 0}, "size=0 must be the longer side"),
        ({"size": [3]}, r"size=\(3,\) must be"),
        ({"scale_jitter": [2, 1]}, r"scale_jitter=\[2, 1\] must be \[least, most\]"),
        ({"scale_jitter": [0, 1]}, "two factors above 0"),
        ({"corrupt": "ignore"}, "corrupt='ignore' must be refuse or skip"),
    ],
)
def test_wrong_arguments_are_named(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(stage=None, **options)


# Files


def layout(root, train, val=None, pictures=("train", "val")):
    for split, file in (("train", train), ("val", val)):
        if file:
            number = {"train": 1, "val": 2}[split]
            folder = root / pictures[number - 1]
            picture(folder / f"{split}.png", seed=number)
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            content = {"images": [image(number, f"{split}.png")], "annotations": [], "categories": CATEGORIES}
            (root / file).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("train", "val", "pictures"),
    [
        ("annotations/instances_train2017.json", "annotations/instances_val2017.json", ("train2017", "val2017")),
        ("annotations/instances_train.json", "annotations/instances_val.json", ("images", "images")),
        ("annotations/instances_train.json", "annotations/instances_val.json", ("images/train", "images/val")),
        ("train/_annotations.coco.json", "valid/_annotations.coco.json", ("train", "valid")),
        ("train.json", "val.json", ("JPEGImages", "JPEGImages")),
        ("annotations/train.json", "annotations/validation.json", (".", ".")),
    ],
)
def test_usual_layouts_are_found(tmp_path, train, val, pictures):
    layout(tmp_path, train, val, pictures)
    module = COCODataModule(str(tmp_path), workers=0)
    module.setup("fit")
    assert module.train_set.path(0) == tmp_path / pictures[0] / "train.png"
    assert module.val_set.path(0) == tmp_path / pictures[1] / "val.png"
    module.setup("test")
    assert module.test_set is module.val_set


def test_files_can_be_named(tmp_path):
    layout(tmp_path, "a/x.json", "b/y.json", ("p", "q"))
    module = COCODataModule(
        str(tmp_path), "a/x.json", "p", val_json=str(tmp_path / "b" / "y.json"), val_images="q", workers=0
    )
    module.setup("fit")
    assert [module.train_set.path(0).name, module.val_set.path(0).name] == ["train.png", "val.png"]
    with pytest.raises(FileNotFoundError, match=r"there is no file .*z\.json, which train_json names"):
        COCODataModule(str(tmp_path), "z.json")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*z, which val_images names"):
        COCODataModule(str(tmp_path), "a/x.json", val_json="b/y.json", val_images="z")


def test_what_is_not_found_or_not_clear_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere: expected <root>/annotations"):
        COCODataModule(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="has no annotations for training: expected"):
        COCODataModule(str(tmp_path))
    for year in (2014, 2017):
        layout(tmp_path, f"annotations/instances_train{year}.json")
    with pytest.raises(
        ValueError, match=r"several files for train: .*2014\.json, .*2017\.json\. Name one by train_json"
    ):
        COCODataModule(str(tmp_path))


def test_classes_that_contradict_those_of_training_are_named(tmp_path):
    layout(tmp_path, "annotations/instances_train.json", "annotations/instances_val.json")
    file = tmp_path / "annotations" / "instances_val.json"
    file.write_text(file.read_text().replace('"cat"', '"cow"'))
    module = COCODataModule(str(tmp_path))
    with pytest.raises(
        ValueError, match=r"instances_val\.json: category 3 is cow, in the training annotations it is cat"
    ):
        module.setup("fit")


def test_a_hundred_thousand_categories_are_read_in_seconds(tmp_path):
    categories = [{"id": k, "name": str(k)} for k in range(100_000)]
    (tmp_path / "many.json").write_text(json.dumps({"categories": categories}))
    began = time.monotonic()
    assert len(read_categories(tmp_path / "many.json")) == 100_000
    assert time.monotonic() - began < 20


def test_a_set_without_a_split_is_split_alike_every_time(tmp_path, scenes):
    shutil.copytree(scenes / "train", tmp_path / "images")
    shutil.copy(scenes / "annotations" / "instances_train.json", tmp_path / "annotations.json")
    parts = []
    for seed in (0, 0, 1):
        module = COCODataModule(str(tmp_path), val_size=5, test_size=0.2, split_seed=seed, workers=0)
        torch.manual_seed(seed)
        module.setup("fit")
        module.setup("test")
        parts.append([sorted(part.numbers.tolist()) for part in (module.train_set, module.val_set, module.test_set)])
    assert [len(part) for part in parts[0]] == [16, 5, 6]
    assert len({number for part in parts[0] for number in part}) == 27
    assert parts[0] == parts[1] != parts[2]
    # Pinned: neither a version of numpy nor the next change may move pictures from validation to training.
    assert parts[0][1] == [1028, 1070, 1077, 1133, 1182]
    with pytest.raises(ValueError, match="leave none of 27 pictures"):
        COCODataModule(str(tmp_path), val_size=20, test_size=7).setup("fit")


def test_without_validation(scenes):
    module = COCODataModule(str(scenes), val_size=0, workers=0)
    module.setup("fit")
    assert module.val_dataloader() == []
    with pytest.raises(ValueError, match="there is nothing to test on"):
        module.setup("test")


# Order, workers, processes, resuming


def module_of(scenes, workers=0, **options):
    options = {"batch_size": 4, "masks": True, "iou_crop": True, "scale_jitter": [0.7, 1.5]} | options
    module = COCODataModule(str(scenes), workers=workers, eval_batch_size=4, **options)
    module.setup("fit")
    return module


def test_workers_and_cache_do_not_change_a_batch(scenes):
    torch.manual_seed(3)
    loader = module_of(scenes).train_dataloader()
    expected = [batches(loader) for _ in range(2)]
    assert not same(expected[0], expected[1])
    for workers, cache in ((2, False), (0, True), (2, True)):
        torch.manual_seed(3)
        loader = module_of(scenes, workers, cache=cache).train_dataloader()
        assert [same(batches(loader), epoch) for epoch in expected] == [True, True]


@pytest.mark.parametrize(("workers", "done"), [(0, 3), (2, 2)])
def test_resumed_in_the_middle_of_an_epoch_the_same_batches_follow(scenes, workers, done):
    torch.manual_seed(3)
    straight = module_of(scenes).train_dataloader()
    epochs = [batches(straight) for _ in range(3)]
    torch.manual_seed(3)
    stopped = module_of(scenes, workers).train_dataloader()
    batches(stopped)
    assert same(batches(stopped, done), epochs[1][:done])
    state = stopped.state_dict()
    assert (state["epoch"], state["next_batch"]) == (1, done)  # not where the workers are
    torch.manual_seed(4)
    resumed = module_of(scenes, workers).train_dataloader()
    resumed.load_state_dict(state)
    assert same(batches(resumed), epochs[1][done:])
    assert same(batches(resumed), epochs[2])


def test_processes_share_a_global_training_batch(scenes):
    pictures = module_of(scenes).train_set
    samples = Samples(pictures, None, True, False, Augmentation(True, [], True, None))
    whole = batches(DetectionLoader(samples, TrainingBatches(27, 6, seed=1), 0))
    shares = [batches(DetectionLoader(samples, TrainingBatches(27, 6, 1, rank=r, world_size=2), 0)) for r in (0, 1)]
    joined = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(*shares, strict=True)]
    assert same(joined, whole)


@pytest.mark.parametrize("size", [1, 3, 9])
def test_processes_together_evaluate_each_picture_once(scenes, size):
    pictures = module_of(scenes).val_set.take(np.arange(size))
    samples = Samples(pictures, None, False, False, None)
    shares = [batches(DetectionLoader(samples, EvaluationBatches(size, 2, rank, 2), 0)) for rank in range(2)]
    assert len(shares[0]) == len(shares[1])  # also where one has nothing left
    seen = [int(found["image_id"]) for share in shares for _, targets in share for found in targets]
    assert sorted(seen) == pictures.numbers.tolist()


def test_what_workers_get_can_be_pickled(scenes):
    """As where processes are spawned, not forked."""
    for cache in (False, True):
        module = module_of(scenes, cache=cache)
        samples = Samples(module.train_set, None, True, False, Augmentation(True, [], True, (0.5, 2.0)))
        one, other = (s.__getitems__((0, 0, [1, 2])) for s in (samples, pickle.loads(pickle.dumps(samples))))
        assert torch.equal(one.pixels, other.pixels)


def test_the_fingerprint_follows_what_is_evaluated(scenes, tmp_path):
    first, again, other = (module_of(scenes, size=size).fingerprint("val") for size in (None, None, 32))
    assert first == again != other
    shutil.copytree(scenes, tmp_path / "set")
    file = tmp_path / "set" / "annotations" / "instances_val.json"
    file.write_text(file.read_text().replace('"area": ', '"area": 1', 1))
    assert module_of(tmp_path / "set").fingerprint("val") != first


class Recorder(LightningModule):
    """Counts what it sees."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        images, targets = batch
        assert images[0].dtype == torch.float32
        self.seen.append([int(found["image_id"]) for found in targets])
        return self.layer(images[0].mean()[None]).sum()

    def test_step(self, batch, batch_idx):
        _, targets = batch
        counts = torch.zeros(10000)
        for found in targets:
            counts[int(found["image_id"])] += 1
        self.counts = counts + getattr(self, "counts", 0)

    def on_test_epoch_end(self):
        counts = self.all_gather(self.counts).reshape(-1, 10000).sum(0)
        self.log("pictures", (counts > 0).sum().float())
        self.log("most", counts.max())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_trainer_tests_each_picture_once_on_any_number_of_processes(scenes, devices):
    seed_everything(0, verbose=False)
    module = COCODataModule(str(scenes), workers=1, batch_size=4, eval_batch_size=2)
    strategy = "ddp_fork" if devices == 2 else "auto"
    trainer = Trainer(**QUIET, strategy=strategy, devices=devices, max_epochs=1, enable_checkpointing=False)
    results = trainer.test(Recorder(), module, verbose=False)[0]
    assert results == {"pictures": 9.0, "most": 1.0}
    assert not multiprocessing.active_children(), "workers outlived their run"


def test_a_trainer_resumes_with_the_batches_it_had_not_seen(scenes, tmp_path):
    class SaveAtEight(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "stopped.ckpt")

    def fit(seed, **options):
        seed_everything(seed, verbose=False)
        module = COCODataModule(str(scenes), workers=0, batch_size=4, val_size=0)
        model = Recorder()
        trainer = Trainer(**QUIET, max_epochs=2, enable_checkpointing=False, callbacks=[SaveAtEight()])
        trainer.fit(model, module, **options)
        return model.seen

    expected = fit(3)
    assert len(expected) == 12
    assert fit(4, ckpt_path=tmp_path / "stopped.ckpt") == expected[8:]


def test_scenes_are_read_by_both_modules_alike(tmp_path):
    options = {"image_size": 64, "train_size": 5, "val_size": 2, "test_size": 0}
    own = ScenesDataModule(str(tmp_path), **options)
    own.prepare_data()
    own.setup("validate")
    general = COCODataModule(str(own.folder), workers=0)
    general.setup("validate")
    assert (own.class_names, own.category_ids) == (general.class_names, general.category_ids)
    assert same(batches(own.val_dataloader()), batches(general.val_dataloader()))


def test_importing_the_package_costs_nothing():
    code = "import sys, datamodules; assert not {'torch', 'lightning', 'pycocotools'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
