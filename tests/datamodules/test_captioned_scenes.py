import itertools
import json
import math
import os
import re
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from scipy import ndimage

import datamodules
from datamodules import CaptionedScenesDataModule, COCOCaptionsDataModule
from datamodules.caption_files import SPECIAL, tokenize
from datamodules.embedded.captioned_scenes import Group, _captions, make_captioned_scene, write_captioned_scenes

HUES = {"red": 3, "orange": 30, "yellow": 53, "green": 125, "blue": 223, "purple": 284}  # degrees
STRONG = {"red": 69, "orange": 88, "yellow": 76, "green": 55, "blue": 67, "purple": 55}  # most minus least of r, g, b
ANGLES = {"circle": 40, "square": 4, "triangle": 3, "star": 10}  # corners of an outline
NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3}
NOUN = r"\b(an|a|two|three) ([a-z]+) (circle|square|triangle|star)(s?)\b"


def options(root, train=300, val=40, test=60, **more):
    return {"root": str(root), "train_size": train, "val_size": val, "test_size": test} | more


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    module = CaptionedScenesDataModule(**options(tmp_path_factory.mktemp("scenes")))
    module.prepare_data()
    return module


def coco(module, split):
    return COCO(module.folder / "annotations" / f"captions_{split}.json")


def pictures(module, split):
    """The pixels of each picture of a split and its captions, read by Pillow and pycocotools."""
    found = coco(module, split)
    for number, entry in found.imgs.items():
        captions = [found.anns[k]["caption"] for k in found.getAnnIds([number])]
        with Image.open(module.folder / split / entry["file_name"]) as picture:
            yield np.asarray(picture.convert("RGB")), captions


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What the captions say, and what there is


def said(caption):
    """The groups of a caption, (number, colour, shape), the left or upper one first; and whether it is the upper."""
    nouns = [(NUMBERS[number], colour, shape) for number, colour, shape, _ in re.findall(NOUN, caption)]
    assert len(nouns) == 2, caption
    places = re.findall(r"left of|right of|above|below|left|right|top|bottom", caption)
    first = places[0].split()[0]
    # "on the left are two circles" and "two circles left of" speak of the left first, "is to the left of" too.
    assert len(places) == 1 or {first, places[1]} in ({"left", "right"}, {"top", "bottom"})
    order = nouns if first in ("left", "above", "top") else nouns[::-1]
    return order, first in ("above", "below", "top", "bottom")


def seen(pixels):
    """The shapes on a picture, found by their strong colours: colour, shape, x and y of the centre, pixels."""
    red, green, blue = (part.astype(float) for part in pixels.transpose(2, 0, 1))
    hue = np.degrees(np.arctan2(math.sqrt(3) * (green - blue), 2 * red - green - blue))
    away = abs((hue[..., None] - np.array(list(HUES.values())) + 180) % 360 - 180)
    most, spread = pixels.max(2), np.ptp(pixels, 2)
    strong = (spread > np.array(list(STRONG.values()))[away.argmin(2)]) & (spread > 0.46 * most)
    regions, count = ndimage.label(ndimage.binary_fill_holes(strong))
    found = []
    for number in range(1, count + 1):
        mask = regions == number
        if mask.sum() >= 24:  # else it is a bit of a stroke
            colour = list(HUES)[Counter(away.argmin(2)[mask].tolist()).most_common(1)[0][0]]
            y, x = (float(place.mean()) + 0.5 for place in np.nonzero(mask))
            left, top = max(0, int(x) - 16), max(0, int(y) - 16)  # no shape reaches further
            shape = shape_of(mask[top : top + 32, left : left + 32], x - left, y - top)
            found.append((colour, shape, x, y, int(mask.sum())))
    return found


def shape_of(mask, x, y):
    """The shape that covers a mask best, of those with its centre and its area."""
    return max(ANGLES, key=lambda name: max(overlap(mask, name, x, y, turn) for turn in (-0.25, -0.1, 0.1, 0.25)))


def overlap(mask, name, x, y, turn):
    count = ANGLES[name]
    lengths = [0.45 if name == "star" and k % 2 else 1.0 for k in range(count)]
    start = turn - math.pi / 2 + (math.pi / 4 if name == "square" else 0)
    corners = [cut * np.exp(1j * (start + 2 * math.pi * k / count)) for k, cut in enumerate(lengths)]
    area = sum((a.conjugate() * b).imag for a, b in zip(corners, corners[1:] + corners[:1], strict=True)) / 2
    scale = math.sqrt(mask.sum() / area)
    sheet = Image.new("L", (4 * mask.shape[1], 4 * mask.shape[0]))
    points = [(4 * (x + scale * corner.real), 4 * (y + scale * corner.imag)) for corner in corners]
    ImageDraw.Draw(sheet).polygon(points, fill=1)
    drawn = np.asarray(sheet).reshape(mask.shape[0], 4, mask.shape[1], 4).mean((1, 3))
    return np.minimum(drawn, mask).sum() / np.maximum(drawn, mask).sum()


def test_captions_say_what_is_in_the_pixels(scenes):
    alike = []
    for split in ("train", "test"):
        for pixels, captions in itertools.islice(pictures(scenes, split), 40):
            (groups, above), *others = [said(caption) for caption in captions]
            assert others == [(groups, above)] * 4
            halves = [[], []]
            for colour, shape, x, y, _ in seen(pixels):
                halves[(y if above else x) > 32].append((colour, shape))
            for half, (number, colour, shape) in zip(halves, groups, strict=True):
                assert [one for one, _ in half] == [colour] * number, (captions, halves)
                alike += [kind == shape for _, kind in half]
    assert np.mean(alike) >= 0.98  # of the smallest, forty pixels say little


def test_shapes_are_large_enough_and_wholly_on_the_picture(scenes):
    for pixels, _ in pictures(scenes, "val"):
        for colour, shape, x, y, area in seen(pixels):
            assert area >= 24, (colour, shape)
            reach = math.sqrt(area / math.pi)
            assert min(x, y) - reach >= 0
            assert max(x, y) + reach <= 64


def test_five_captions_are_five_correct_sentences(scenes):
    found = coco(scenes, "train")
    assert len(found.anns) == 5 * len(found.imgs)
    for number in found.imgs:
        captions = [found.anns[k]["caption"] for k in found.getAnnIds([number])]
        assert len({tuple(tokenize(caption)) for caption in captions}) == 5
        for caption in captions:
            assert len(tokenize(caption)) <= 15
            for count, colour, _, plural in re.findall(NOUN, caption):
                assert (plural == "s") == (NUMBERS[count] > 1), caption
                assert NUMBERS[count] > 1 or count == ("an" if colour == "orange" else "a"), caption
            for before, verb, after in re.findall(r"(\w+) (is|are) (\w+)", caption):
                many = NUMBERS[after] > 1 if after in NUMBERS else before.endswith("s")
                assert verb == ("are" if many else "is"), caption


@pytest.mark.parametrize(
    ("count", "caption"),
    [
        ((2, 1), "two red circles left of a blue square"),
        ((2, 1), "a blue square right of two red circles"),
        ((2, 1), "there are two red circles to the left of a blue square"),
        ((2, 1), "a blue square is on the right and two red circles are on the left"),
        ((2, 1), "on the left are two red circles and on the right is a blue square"),
        ((1, 3), "there is a red circle to the left of three blue squares"),
        ((1, 3), "three blue squares are on the right and a red circle is on the left"),
    ],
)
def test_sentences_are_worded_as_documented(count, caption):
    assert caption in _captions(Group(count[0], "red", "circle"), Group(count[1], "blue", "square"), above=False)


# Held-out pairs


def pairs(module, split):
    """The pairs of colour and shape of each picture."""
    found = coco(module, split)
    texts = [found.anns[found.getAnnIds([number])[0]]["caption"] for number in found.imgs]
    return [{(colour, shape) for _, colour, shape, _ in re.findall(NOUN, text)} for text in texts]


def test_held_out_pairs_are_in_every_test_picture_and_in_no_other(scenes):
    held_out = set(scenes.held_out)
    assert len(held_out) == len(scenes.held_out) == 6
    for split in ("train", "val"):
        assert not set().union(*pairs(scenes, split)) & held_out
    assert all(len(two) == 2 and two & held_out for two in pairs(scenes, "test"))
    assert set().union(*pairs(scenes, "test")) >= held_out
    together = set().union(*pairs(scenes, "train"))
    assert together == {(colour, shape) for colour in HUES for shape in ANGLES} - held_out
    assert {shape for _, shape in held_out} == set(ANGLES)
    assert {colour for colour, _ in held_out} == set(HUES)


def test_every_word_of_the_test_is_learnt(scenes):
    scenes.setup("fit")
    scenes.setup("test")
    assert scenes.words[:4] == SPECIAL
    words = {word for texts in scenes.test_set.captions for text in texts for word in tokenize(text)}
    assert words <= set(scenes.words)
    assert len(scenes.words) == 37


# Batches and files


def test_batches_are_pictures_tokens_and_references(scenes):
    scenes.setup("fit")
    scenes.setup("test")
    images, tokens = next(iter(scenes.train_dataloader()))
    assert images.shape == (64, 3, 64, 64)
    assert images.dtype == torch.uint8
    assert tokens.shape == (64, 17)
    assert tokens.dtype == torch.int64
    assert len(scenes.train_dataloader()) == 5 * 300 // 64
    images, tokens, references = scenes.on_after_batch_transfer(next(iter(scenes.val_dataloader())), 0)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert len(images) == len(tokens) == len(references) == 40
    assert {len(texts) for texts in references} == {5}
    assert sum(len(batch[0]) for batch in scenes.test_dataloader()) == 60


def test_pixels_of_a_batch_are_those_of_the_files(scenes):
    scenes.setup("fit")
    images, *_ = next(iter(scenes.val_dataloader()))
    for image, (pixels, _) in zip(images, pictures(scenes, "val"), strict=True):
        assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - pixels).max() <= 1


def test_the_vocabulary_is_known_before_the_set_is_written(tmp_path):
    module = CaptionedScenesDataModule(**options(tmp_path, 60, 2, 2))
    words = module.words
    assert module.folder.is_dir()
    assert len(words) > 30
    given = CaptionedScenesDataModule(**options(tmp_path / "other", 60, 2, 2, words=words))
    assert given.words == words
    assert not given.folder.exists()


def test_other_readers_read_the_files_alike(scenes):
    scenes.setup("fit")
    plain = COCOCaptionsDataModule(str(scenes.folder), size=64, min_count=1, workers=0)
    plain.setup("fit")
    assert plain.words == scenes.words
    assert plain.train_set.captions == scenes.train_set.captions
    assert torch.equal(plain.train_set.images, scenes.train_set.images)


def test_a_seed_gives_the_same_bytes_and_another_one_others(tmp_path):
    sizes = {"train": 6, "val": 2, "test": 2}
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        np.random.seed(seed)
        torch.manual_seed(seed)
        write_captioned_scenes(tmp_path / name, sizes, 64, seed)
    one, two, three = (files(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert len(one) == 10 + 3
    assert one.keys() == three.keys()
    assert all(content != three[name] for name, content in one.items())


def test_fewer_scenes_are_the_first_of_more(tmp_path, scenes):
    write_captioned_scenes(tmp_path / "few", {"train": 5, "val": 0, "test": 0})
    few = {name: content for name, content in files(tmp_path / "few").items() if name.parts[0] == "train"}
    assert len(few) == 5
    assert all((scenes.folder / name).read_bytes() == content for name, content in few.items())


def test_each_set_has_a_folder_of_its_own(tmp_path):
    changes = [{}, {"seed": 1}, {"image_size": 80}, {"train_size": 5}, {"val_size": 5}, {"test_size": 5}]
    folders = {CaptionedScenesDataModule(**options(tmp_path, 4, 3, 2) | change).folder for change in changes}
    assert len(folders) == len(changes)
    assert {folder.parent for folder in folders} == {tmp_path}


def test_a_killed_run_leaves_nothing_that_counts(tmp_path, monkeypatch):
    calls = []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return make_captioned_scene(*arguments)

    monkeypatch.setattr("datamodules.embedded.captioned_scenes.make_captioned_scene", killed)
    module = CaptionedScenesDataModule(**options(tmp_path, 4, 2, 2))
    with pytest.raises(KeyboardInterrupt):
        module.prepare_data()
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*captioned-scenes.*: run prepare_data\(\)"):
        module.setup("fit")
    module.prepare_data()
    module.setup("fit")
    assert [path.name for path in tmp_path.iterdir()] == ["captioned-scenes-v1-64px-4-2-2-seed0"]


def test_another_process_may_be_sooner(tmp_path, monkeypatch):
    rename = os.rename

    def later(source, target):
        monkeypatch.setattr(os, "rename", rename)
        write_captioned_scenes(target, {"train": 2, "val": 0, "test": 0})
        rename(source, target)

    monkeypatch.setattr(os, "rename", later)
    write_captioned_scenes(tmp_path / "set", {"train": 2, "val": 0, "test": 0})
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_set_is_written_once(tmp_path):
    module = CaptionedScenesDataModule(**options(tmp_path, 3, 2, 1))
    module.prepare_data()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    module.prepare_data()
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_without_test_pictures_those_for_validation_are_tested_on(tmp_path):
    module = CaptionedScenesDataModule(**options(tmp_path, 4, 3, 0))
    module.prepare_data()
    module.setup("test")
    assert module.test_set is module.val_set
    assert len(module.val_set) == 3
    assert not (module.folder / "test").exists()
    module = CaptionedScenesDataModule(**options(tmp_path, 4, 0, 2))
    module.prepare_data()
    module.setup("fit")
    assert module.val_dataloader() == []
    assert len(module.train_set) == 4


@pytest.mark.parametrize("side", [48, 100])
def test_other_sizes_have_room_for_six_shapes(side):
    for i in range(30):
        scene = make_captioned_scene(side, "train", np.random.default_rng(i))
        assert scene.pixels.shape == (side, side, 3)
        assert len(scene.captions) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 47}, "image_size=47 must be at least 48"),
        ({"train_size": 0}, "train_size=0 at least 1"),
        ({"val_size": 0.1}, "val_size=0.1 must be a number of pictures"),
        ({"test_size": -1}, "test_size=-1 must be at least 0"),
        ({"min_count": 0}, "min_count=0"),
        ({"max_length": 0}, "max_length=0"),
        ({"words": ["red"]}, r"words begins with \['red'\]"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        CaptionedScenesDataModule(**options(tmp_path) | change)
    assert not list(tmp_path.iterdir())


def test_both_data_modules_for_captions_are_exported():
    assert {"COCOCaptionsDataModule", "CaptionedScenesDataModule"} <= set(datamodules.__all__)
    assert datamodules.CaptionedScenesDataModule.__mro__[1] is COCOCaptionsDataModule


def test_a_broken_file_is_named(tmp_path):
    module = CaptionedScenesDataModule(**options(tmp_path, 3, 2, 1))
    module.prepare_data()
    file = module.folder / "annotations" / "captions_train.json"
    content = json.loads(file.read_text())
    assert content["info"]["version"] == "1"
    assert set(content) == {"info", "licenses", "images", "annotations"}
    file.write_text("{")
    with pytest.raises(ValueError, match=r"captions_train\.json is no whole json file"):
        module.setup("fit")
