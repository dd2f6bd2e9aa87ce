import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from datamodules import ScenesDataModule
from datamodules.embedded.scenes import KEYPOINTS, KINDS, make_scene, write_scenes

SIZES = {"train": 60, "val": 6, "test": 0}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "set"
    write_scenes(folder, SIZES)
    return folder


@pytest.fixture(scope="module")
def instances(scenes):
    return COCO(scenes / "annotations" / "instances_train.json")


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_seed_gives_the_same_bytes_and_another_one_others(tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        np.random.seed(seed)
        torch.manual_seed(seed)
        write_scenes(tmp_path / name, {"train": 9, "val": 4, "test": 2}, 64, seed)
    one, two, three = (files(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert len(one) == 9 + 4 + 2 + 3 * 3
    for name, content in one.items():  # without a person in its pictures a file of keypoints is like another
        assert content != three[name] or name.name.startswith("person_keypoints"), name


def test_fewer_scenes_are_the_first_of_more(tmp_path, scenes):
    write_scenes(tmp_path / "few", {"train": 3, "val": 0, "test": 0})
    for name, content in files(tmp_path / "few").items():
        if name.parts[0] == "train":
            assert (scenes / name).read_bytes() == content


def test_pictures_and_annotations_belong_together(scenes, instances):
    assert len(instances.imgs) == 60 == len(list((scenes / "train").iterdir()))
    for entry in instances.imgs.values():
        with Image.open(scenes / "train" / entry["file_name"]) as picture:
            assert picture.size == (entry["width"], entry["height"]) == (128, 128)
            assert picture.format == ("PNG" if entry["file_name"].endswith("png") else "JPEG")
    assert {entry["file_name"][-3:] for entry in instances.imgs.values()} == {"jpg", "png"}
    assert {number: category["name"] for number, category in instances.cats.items()} == KINDS


def test_boxes_and_areas_are_those_of_the_masks(instances):
    kinds = set()
    for entry in instances.anns.values():
        mask = instances.annToMask(entry)
        ys, xs = np.nonzero(mask)
        box = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        x, y, w, h = entry["bbox"]
        tolerance = 1 if isinstance(entry["segmentation"], list) else 0  # pycocotools draws polygons in its own way
        assert np.abs(box - [x, y, x + w, y + h]).max() <= tolerance
        assert mask.sum() == pytest.approx(entry["area"], rel=0.25 if tolerance else 0, abs=12 if tolerance else 0)
        assert 0 <= x < x + w <= 128
        assert 0 <= y < y + h <= 128
        kinds.add(type(entry["segmentation"]))
    assert kinds == {list, dict}, "polygons and run lengths"


def test_there_is_what_makes_detection_hard(instances):
    objects = list(instances.anns.values())
    counts = np.bincount([len(instances.getAnnIds(number)) for number in instances.imgs])
    assert counts[0] == 3, "empty pictures: the eighth of each 25"
    assert len(counts) > 4, "up to five objects and a crowd"
    assert sum(entry["iscrowd"] for entry in objects) == 2, "a crowd in the fourth of each 50"
    assert sum(entry["area"] < 16**2 for entry in objects) > 15, "small ones"
    assert sum(min(entry["bbox"][:2]) == 0 or entry["bbox"][0] + entry["bbox"][2] == 128 for entry in objects) > 15
    inside = [entry for entry in objects if min(entry["bbox"][:2]) > 1 and max(entry["bbox"][:2]) < 60]
    covered = [entry for entry in inside if isinstance(entry["segmentation"], dict) and not entry["iscrowd"]]
    assert covered, "ones that others cover in part"
    assert {entry["category_id"] for entry in objects} == set(KINDS)


def test_objects_look_unlike_their_ground(scenes, instances):
    """The median difference in colour between an object and a ring around its box is far above the noise."""
    differences = []
    for entry in instances.anns.values():
        pixels = np.asarray(Image.open(scenes / "train" / instances.imgs[entry["image_id"]]["file_name"]), dtype=float)
        everything = np.zeros((128, 128), dtype=bool)
        for other in instances.loadAnns(instances.getAnnIds(entry["image_id"])):
            everything |= instances.annToMask(other).astype(bool)
        inside = pixels[instances.annToMask(entry).astype(bool)].mean(0)
        differences.append(np.abs(inside - pixels[~everything].mean(0)).max())
    assert np.median(differences) > 50
    assert np.mean(np.array(differences) > 15) > 0.95


def test_keypoints_lie_on_their_person(scenes):
    people = COCO(scenes / "annotations" / "person_keypoints_train.json")
    plain = COCO(scenes / "annotations" / "instances_train.json")
    assert [category["keypoints"] for category in people.cats.values()] == [KEYPOINTS]
    assert len(people.imgs) == 60
    assert len(people.anns) == len(plain.getAnnIds(catIds=[9])) > 15
    visibilities = set()
    for entry in people.anns.values():
        mask = people.annToMask(entry)
        points = np.array(entry["keypoints"]).reshape(-1, 3)
        assert entry["num_keypoints"] == (points[:, 2] > 0).sum()
        assert (points[points[:, 2] == 0] == 0).all()
        for x, y, seen in points[points[:, 2] > 0]:
            if seen == 2:
                assert mask[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].any()
        left, right = points[2], points[3]
        if left[2] and right[2]:
            assert left[0] > right[0], "it faces us"
        visibilities |= set(points[:, 2].tolist())
    assert visibilities == {0, 1, 2}


def test_captions_say_what_is_there(scenes, instances):
    captions = json.loads((scenes / "annotations" / "captions_train.json").read_text())["annotations"]
    assert len(captions) == 2 * 60
    words = ["no", "a", "two", "three", "four", "five"]
    for caption in captions[::2]:
        objects = instances.loadAnns(instances.getAnnIds(caption["image_id"], iscrowd=False))
        for number, name in KINDS.items():
            count = sum(entry["category_id"] == number for entry in objects)
            many = "people" if name == "person" else f"{name}s"
            text = caption["caption"].lower().replace("heap of circles", "heap")
            assert (f"{words[count]} {name if count == 1 else many}" in text) == (count > 0)
    assert all(caption["caption"][0].isupper() and caption["caption"].endswith(".") for caption in captions)


def test_a_killed_run_leaves_nothing_that_counts(tmp_path, monkeypatch):
    calls = []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return make_scene(*arguments)

    monkeypatch.setattr("datamodules.embedded.scenes.make_scene", killed)
    module = ScenesDataModule(str(tmp_path), 64, 4, 2, 0)
    with pytest.raises(KeyboardInterrupt):
        module.prepare_data()
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match=r"there is no file .*instances_train\.json: run prepare_data"):
        module.setup("fit")
    module.prepare_data()
    module.setup("fit")
    assert [path.name for path in tmp_path.iterdir()] == ["scenes-v1-64px-4-2-0-seed0"]


def test_another_process_may_be_sooner(tmp_path, monkeypatch):
    rename = os.rename

    def later(source, target):
        monkeypatch.setattr(os, "rename", rename)
        write_scenes(target, {"train": 2, "val": 0, "test": 0}, 64)
        rename(source, target)

    monkeypatch.setattr(os, "rename", later)
    write_scenes(tmp_path / "set", {"train": 2, "val": 0, "test": 0}, 64)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_set_is_written_once(tmp_path):
    module = ScenesDataModule(str(tmp_path), 64, 3, 2, 1)
    module.prepare_data()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    module.prepare_data()
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    module.setup("fit")
    module.setup("test")
    assert [len(part) for part in (module.train_set, module.val_set, module.test_set)] == [3, 2, 1]


def test_what_the_module_says_before_it_is_set_up():
    module = ScenesDataModule()
    assert (module.num_classes, module.class_names) == (5, ["circle", "square", "triangle", "star", "person"])
    assert module.category_ids == [1, 3, 4, 7, 9]
    module = ScenesDataModule(keypoints=True)
    assert (module.class_names, module.category_ids, module.keypoint_names) == (["person"], [9], KEYPOINTS)


def test_keypoints_and_masks_come_in_batches(tmp_path):
    module = ScenesDataModule(str(tmp_path), 64, 12, 4, 0, masks=True, keypoints=True, keep_empty=False)
    module.prepare_data()
    module.setup("fit")
    for _, targets in module.train_dataloader():
        for found in targets:
            assert len(found["boxes"]) > 0
            assert found["keypoints"].shape == (len(found["boxes"]), 7, 3)
            assert found["masks"].shape == (len(found["boxes"]), 64, 64)


@pytest.mark.parametrize(
    ("options", "message"), [({"image_size": 8}, "image_size=8"), ({"train_size": 0}, "train_size=0")]
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ScenesDataModule(**options)
