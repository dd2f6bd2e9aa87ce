import hashlib
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import VOCDetection
from torchvision.datasets.voc import DATASET_YEAR_DICT

from datamodules import COCODataModule, VOCDataModule
from datamodules.voc import CLASSES, picture_numbers

# Name, difficult, and the first and last pixel that belong to it, counted from 1.
OBJECT = ("dog", 0, (3, 4, 12, 20))


def write(folder, name, objects=(OBJECT,), size=(32, 24), text=None):
    """A picture and its xml file."""
    for part in ("JPEGImages", "Annotations"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(name)).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg")
    root = ElementTree.Element("annotation")
    for key, value in zip(("width", "height"), size or (), strict=False):
        sizes = root.find("size") if root.find("size") is not None else ElementTree.SubElement(root, "size")
        ElementTree.SubElement(sizes, key).text = str(value)
    for kind, difficult, edges in objects:
        item = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(item, "name").text = kind
        ElementTree.SubElement(item, "difficult").text = str(difficult)
        part = ElementTree.SubElement(ElementTree.SubElement(item, "part"), "name")  # VOC marks heads and hands
        part.text = "head"
        box = ElementTree.SubElement(item, "bndbox")
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), edges, strict=True):
            ElementTree.SubElement(box, key).text = str(value)
    file = folder / "Annotations" / f"{name}.xml"
    file.write_text(ElementTree.tostring(root, encoding="unicode") if text is None else text)


def write_list(folder, name, pictures):
    (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    (folder / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{one}\n" for one in pictures))


def voc(folder):
    """VOC 2007 with four pictures."""
    write(folder, "000005")
    write(folder, "000007", [("cat", 1, (1, 1, 32, 24)), ("person", 0, (5, 5, 9, 9))])
    write(folder, "000009", [])
    write(folder, "000012", [("sheep", 0, (1, 1, 10, 10))])
    for name, pictures in (("train", ["000005", "000007"]), ("val", ["000009"]), ("test", ["000012"])):
        write_list(folder, name, pictures)
    write_list(folder, "trainval", ["000005", "000007", "000009"])
    return folder


def data(root, stage="fit", **options):
    module = VOCDataModule(str(root), **{"workers": 0, "flip": False} | options)
    if stage:
        module.setup(stage)
    return module


def boxes(module, index=0, training=False):
    return module.train_set.target(index, False, False, training)["boxes"].tolist()


@pytest.mark.parametrize("above", ["VOCdevkit/VOC2007", "VOC2007", "."])
def test_voc_is_found_and_read_as_torchvision_reads_it(tmp_path, above):
    voc(tmp_path / above)
    module = data(tmp_path)
    module.setup("test")
    if above != ".":
        assert module.class_names == CLASSES
    if above == "VOCdevkit/VOC2007":
        for split, pictures in (("train", module.train_set), ("val", module.val_set), ("test", module.test_set)):
            compare(pictures, VOCDetection(tmp_path, "2007", split), module.class_names, 1)


def compare(pictures, theirs, class_names, first):
    assert len(pictures) == len(theirs)
    for index, (_, content) in enumerate(theirs):
        ours = pictures.target(index, False, False, training=False)
        objects = content["annotation"].get("object", [])
        assert [class_names[label - 1] for label in ours["labels"]] == [one["name"] for one in objects]
        edges = [[float(one["bndbox"][key]) for key in ("xmin", "ymin", "xmax", "ymax")] for one in objects]
        expected = torch.tensor(edges).reshape(-1, 4) - torch.tensor([first, first, 0, 0])
        assert torch.equal(ours["boxes"], expected)
        assert ours["iscrowd"].tolist() == [int(one["difficult"]) for one in objects]


def test_pixels_are_counted_from_one(tmp_path):
    write(tmp_path, "a", [("dog", 0, (1, 1, 32, 24)), ("dog", 0, (3, 3, 3, 3))])
    write(tmp_path, "b")
    module = data(tmp_path, val_size=0)
    assert boxes(module) == [[0, 0, 32, 24], [2, 2, 3, 3]]  # all of the picture; a single pixel
    assert module.train_set.target(0, False, False, False)["area"].tolist() == [32 * 24, 1]
    assert boxes(data(tmp_path, val_size=0, one_based=False)) == [[1, 1, 32, 24]]


def test_difficult_objects_are_ignored_unless_they_are_wanted(tmp_path):
    voc(tmp_path)
    module = data(tmp_path)
    found = module.train_set.target(1, False, False, training=False)
    assert found["iscrowd"].tolist() == [1, 0]
    assert boxes(module, 1, training=True) == [[4, 4, 9, 9]]
    assert "1 of them crowds or to be ignored" in module.report()
    module = data(tmp_path, difficult=True)
    assert module.train_set.target(1, False, False, False)["iscrowd"].tolist() == [0, 0]
    assert len(boxes(module, 1, training=True)) == 2


def test_classes_are_the_twenty_or_the_sets_own(tmp_path):
    write(tmp_path / "own", "a", [("zebra", 0, (1, 1, 5, 5)), ("ant", 0, (1, 1, 5, 5))])
    module = data(tmp_path / "own", stage=None)
    assert (module.class_names, module.category_ids, module.num_classes) == (["ant", "zebra"], [1, 2], 2)
    write(tmp_path / "all", "a", [(name, 0, (1, 1, 5, 5)) for name in reversed(CLASSES)])
    assert data(tmp_path / "all", stage=None).class_names == CLASSES
    for i in range(101):
        write(tmp_path / "VOC2007", f"{i:03d}")
    assert data(tmp_path, stage=None).class_names == CLASSES


def test_a_set_without_lists_is_split(tmp_path):
    for i in range(10):
        write(tmp_path, f"{i}")
    module = data(tmp_path, val_size=3, test_size=0.2)
    module.setup("test")
    parts = [set(part.numbers.tolist()) for part in (module.train_set, module.val_set, module.test_set)]
    assert [len(part) for part in parts] == [5, 3, 2]
    assert set.union(*parts) == set(range(10))


def test_training_pictures_are_never_those_of_validation(tmp_path):
    voc(tmp_path)
    with pytest.raises(ValueError, match="000009 and 0 more pictures are in the lists trainval and val"):
        data(tmp_path, train_list="trainval")
    module = data(tmp_path, train_list="trainval", val_list=None, val_size=1)
    assert [len(module.train_set), len(module.val_set)] == [2, 1]
    with pytest.raises(FileNotFoundError, match=r"there is no list .*nothing\.txt: give another train_list"):
        data(tmp_path, train_list="nothing")


def test_ids_are_the_numbers_in_names_or_places():
    assert picture_numbers(["000005", "000007"]) == {"000005": 5, "000007": 7}
    assert picture_numbers(["2008_000021"]) == {"2008_000021": 2008000021}
    assert picture_numbers(["b1", "a1"]) == {"a1": 1, "b1": 2}
    assert picture_numbers(["dog", "cat"]) == {"cat": 1, "dog": 2}


@pytest.mark.parametrize("text", ["", "<annotation><object>", "hello", "<html></html>"])
def test_malformed_xml_is_named_or_left_out(tmp_path, text):
    for name in ("a", "b", "c"):
        write(tmp_path, name)
    write(tmp_path, "b", text=text)
    with pytest.raises(ValueError, match=r"b\.xml (is no whole xml file|begins with <html>)"):
        data(tmp_path, val_size=0)
    module = data(tmp_path, val_size=0, corrupt="skip")
    assert module.train_set.names.tolist() == [b"a.jpg", b"c.jpg"]
    assert "1 file that makes no sense" in module.report()


WRONG = {
    "unknown class": (("unicorn", 0, (1, 1, 5, 5)), r"object 2 is called 'unicorn', the classes are aeroplane"),
    "no number": (("dog", 0, (1, 1, 5, "x")), r"object 2 has no box of numbers"),
    "nan": (("dog", 0, (1, 1, 5, "nan")), r"object 2 has no box of numbers"),
    "missing": (("dog", 0, (1, 1, 5, "")), r"object 2 has no box of numbers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_object_that_makes_no_sense_is_named_or_left_out(tmp_path, case):
    bad, message = WRONG[case]
    for i in range(101):
        write(tmp_path / "VOC2007", f"{i:03d}")
    write(tmp_path / "VOC2007", "100", [OBJECT, bad])
    with pytest.raises(ValueError, match=r"100\.xml: " + message + ".*corrupt skip"):
        data(tmp_path, val_size=0)
    module = data(tmp_path, val_size=0, corrupt="skip")
    assert len(boxes(module, 100)) == 1


def test_missing_files_are_named_or_left_out(tmp_path):
    voc(tmp_path)
    (tmp_path / "Annotations" / "000005.xml").unlink()
    with pytest.raises(ValueError, match=r"there is no file .*000005\.xml.*corrupt skip"):
        data(tmp_path)
    assert len(data(tmp_path, corrupt="skip").train_set) == 1
    (tmp_path / "JPEGImages" / "000007.jpg").unlink()
    write(tmp_path, "000005")
    with pytest.raises(ValueError, match=r"there is no picture 000007 in .*JPEGImages"):
        data(tmp_path)


@pytest.mark.parametrize("size", [None, (0, 0)])
def test_a_size_that_the_xml_does_not_say_is_measured(tmp_path, size):
    write(tmp_path, "a", size=size)
    assert data(tmp_path, val_size=0).train_set.sizes.tolist() == [[24, 32]]


def test_boxes_without_area_and_outside_are_left_out(tmp_path):
    write(tmp_path, "a", [OBJECT, ("dog", 0, (9, 9, 8, 12)), ("dog", 0, (40, 1, 50, 5))])
    module = data(tmp_path, val_size=0)
    assert boxes(module) == [[2, 3, 12, 20]]
    assert "1 box without area left out: object 2 of a.jpg" in module.report()
    assert "1 box outside of its picture left out: object 3 of a.jpg" in module.report()


def test_a_missing_set_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere has no VOC2007: expected .*download true"):
        data(tmp_path / "nowhere")


@pytest.fixture
def server(tmp_path):
    """Serves the files of a folder on this machine."""
    (tmp_path / "served").mkdir()

    class Answer(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Answer, directory=tmp_path / "served")) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()
        thread.join()


def test_what_is_missing_is_downloaded_verified_and_unpacked(tmp_path, monkeypatch, server):
    """From archives that are made as VOC's are, but small."""
    made = voc(tmp_path / "made" / "VOCdevkit" / "VOC2007")
    for key, names in {"2007": ("train", "val", "trainval"), "2007-test": ("test",)}.items():
        archive = tmp_path / "served" / f"{key}.tar"
        parts = ["Annotations", "JPEGImages", *(f"ImageSets/Main/{name}.txt" for name in names)]
        with tarfile.open(archive, "w") as tar:
            for part in parts:
                tar.add(made / part, f"VOCdevkit/VOC2007/{part}")
        md5 = hashlib.md5(archive.read_bytes()).hexdigest()
        changed = DATASET_YEAR_DICT[key] | {"url": f"{server}{key}.tar", "md5": md5}
        monkeypatch.setitem(DATASET_YEAR_DICT, key, changed)
    module = data(tmp_path / "root", stage=None, download=True)
    assert module.class_names == CLASSES
    module.prepare_data()
    module.setup("fit")
    module.setup("test")
    assert [len(part) for part in (module.train_set, module.val_set, module.test_set)] == [2, 1, 1]
    assert not list((tmp_path / "root").glob(".*")), "something was left behind"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "root").rglob("*")}
    module.prepare_data()
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "root").rglob("*")}
    monkeypatch.setitem(DATASET_YEAR_DICT, "2007", DATASET_YEAR_DICT["2007"] | {"md5": "0" * 32})
    with pytest.raises(FileNotFoundError, match=r"2007\.tar \(md5 0+\) could not be downloaded"):
        data(tmp_path / "other", stage=None, download=True).prepare_data()
    assert not list((tmp_path / "other").iterdir())


def test_bccds_xml_and_json_have_the_same_boxes(zoo_data):
    """Its json was made without the step from 1 to 0, so that all boxes are wider and higher by one when it is made."""
    ours = {one_based: data(zoo_data / "bccd", one_based=one_based) for one_based in (True, False)}
    theirs = COCODataModule(str(zoo_data / "bccd"), workers=0, flip=False)
    theirs.setup("fit")
    places = {int(number): i for i, number in enumerate(theirs.train_set.numbers)}
    for index, number in enumerate(ours[False].train_set.numbers.tolist()):
        expected = theirs.train_set.target(places[number], False, False, False)
        found = ours[False].train_set.target(index, False, False, False)
        assert torch.equal(found["boxes"], expected["boxes"])
        names = [ours[False].class_names[label - 1] for label in found["labels"]]
        assert names == [theirs.class_names[label - 1] for label in expected["labels"]]
        wider = ours[True].train_set.target(index, False, False, False)["boxes"]
        if len(wider) == len(expected["boxes"]):
            assert torch.equal(wider, expected["boxes"] - torch.tensor([1.0, 1.0, 0.0, 0.0]))
    # One of 2,805 boxes is a pixel wide by VOC's count, and has no area in the json.
    assert "1 box without area left out" in ours[False].report()
    assert "2,805 objects" in ours[True].report()
