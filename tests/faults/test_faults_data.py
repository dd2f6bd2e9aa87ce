"""Bad files through every data module: the file and the reason are named, or it is left out and counted."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_files import ORIENTATION, bad, encoded, good, pixels, write
from PIL import Image

from datamodules import (
    COCOCaptionsDataModule,
    COCODataModule,
    ImageFolderDataModule,
    ShapeNetDataModule,
    VideoFolderDataModule,
    VOCDataModule,
)

MESH = "v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nf 1 2 3\nf 1 2 4\n"
SKIPPING = {"refuse": False, "skip": True}
PLAIN = encoded(Image.fromarray(pixels(seed=9)), "PNG")


def folder(root: Path, files: dict[str, bytes], corrupt: str):
    """Class folders; most pictures are sound, so that the few may be left out."""
    write(root / "a", files | {f"plain{k}.png": PLAIN for k in range(3)})
    write(root / "b", {"plain.png": PLAIN, "other.png": PLAIN})
    module = ImageFolderDataModule(str(root), image_size=8, val_size=0, workers=0, corrupt=corrupt, batch_size=2)
    module.setup("fit")
    return module


def coco(root: Path, files: dict[str, bytes], corrupt: str):
    named = files | {f"plain{k}.png": PLAIN for k in range(3)}
    write(root / "train", named)
    images = [{"id": k, "file_name": name, "height": 24, "width": 32} for k, name in enumerate(named)]
    objects = [{"id": k, "image_id": k, "category_id": 1, "bbox": [4, 5, 9, 8]} for k in range(len(named))]
    (root / "train.json").write_text(
        json.dumps({"images": images, "annotations": objects, "categories": [{"id": 1, "name": "x"}]})
    )
    module = COCODataModule(str(root), val_size=0, workers=0, corrupt=corrupt, batch_size=2)
    module.setup("fit")
    return module


def voc(root: Path, files: dict[str, bytes], corrupt: str):
    named = files | {f"plain{k}.png": PLAIN for k in range(3)}
    write(root / "JPEGImages", named)
    (root / "Annotations").mkdir()
    box = "<bndbox><xmin>5</xmin><ymin>6</ymin><xmax>13</xmax><ymax>13</ymax></bndbox>"
    size = "<size><width>32</width><height>24</height></size>"
    for name in named:
        text = f"<annotation>{size}<object><name>x</name>{box}</object></annotation>"
        (root / "Annotations" / f"{Path(name).stem}.xml").write_text(text)
    module = VOCDataModule(str(root), val_size=0, workers=0, corrupt=corrupt, batch_size=2)
    module.setup("fit")
    return module


def captions(root: Path, files: dict[str, bytes], corrupt: str):
    named = files | {f"plain{k}.png": PLAIN for k in range(3)}
    write(root, named)
    (root / "x.token.txt").write_text("".join(f"{name}#0\ta cat\n" for name in named))
    module = COCOCaptionsDataModule(
        str(root), min_count=1, size=8, val_size=0, workers=0, corrupt=corrupt, batch_size=2
    )
    module.setup("fit")
    return module


def shapenet(root: Path, files: dict[str, bytes], corrupt: str):
    """Square pictures are asked for, so that only what cannot be read is given to it."""
    square = encoded(Image.fromarray(pixels(24, 24)).convert("RGBA"), "PNG")
    for name, content in (files | {f"plain{k}": square for k in range(3)}).items():
        rendered = root / "models" / "03001627" / Path(name).stem / "rendering"
        write(rendered, {"00.png": content, "rendering_metadata.txt": b"30 25 0 0.8 25\n"})
        (rendered.parent / "model.obj").write_text(MESH)
    module = ShapeNetDataModule(
        str(root), size=8, num_points=10, val_size=0, test_size=0, workers=0, corrupt=corrupt, batch_size=2,
        cache_folder=str(root / "points"),
    )  # fmt: skip
    module.setup("fit")
    return module


MODULES = {"folder": folder, "coco": coco, "voc": voc, "captions": captions, "shapenet": shapenet}
GOOD, BAD = good(), bad()


@pytest.mark.parametrize("kind", [kind for kind in MODULES if kind != "shapenet"])
def test_unusual_pictures_are_read_by_every_module(kind, tmp_path):
    module = MODULES[kind](tmp_path, {f"{k}{Path(n).suffix}": c for k, (n, c) in enumerate(GOOD.items())}, "refuse")
    batches = list(module.evaluation_dataloader("train"))
    assert sum(len(batch[0]) for batch in batches) == len(module.train_set) >= len(GOOD) + 3


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("kind", MODULES)
def test_a_bad_picture_is_named_with_the_reason(kind, name, tmp_path):
    stem = name.split(".")[0]
    with pytest.raises(ValueError, match=rf"{stem}.*(is empty|cannot be read as a picture: \S|has \d+ x)") as caught:
        for _ in MODULES[kind](tmp_path, {name: BAD[name]}, "refuse").train_dataloader():
            pass
    assert "\n" not in str(caught.value)
    assert "corrupt skip" in str(caught.value)


@pytest.mark.parametrize("kind", MODULES)
def test_bad_pictures_are_left_out_counted_and_capped_when_asked(kind, tmp_path, recwarn):
    few = dict(list(BAD.items())[:2])
    module = MODULES[kind](tmp_path / "few", few, "skip")
    told = " ".join(str(warning.message) for warning in recwarn) + (
        module.report() if hasattr(module, "report") else ""
    )
    for name in few:
        assert Path(name).stem in told
    left = getattr(module.train_set, "views", module.train_set)
    assert len(left) == (5 if kind == "folder" else 3)
    with pytest.raises(ValueError, match=r"too many to leave out"):
        MODULES[kind](tmp_path / "many", BAD, "skip")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_stay_on_what_they_are_around_whatever_the_orientation(orientation, tmp_path):
    """A red square on black: the box is around it in the batch, as it is in the upright picture."""
    upright = np.zeros((24, 32, 3), dtype=np.uint8)
    upright[5:13, 4:13] = (255, 0, 0)
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the inverse of what the orientation does
    image = Image.fromarray(upright)
    stored = image.transpose(Image.Transpose(turns[orientation])) if orientation > 1 else image
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    module = coco(tmp_path, {"turned.png": encoded(stored, "PNG", exif=exif)}, "refuse")
    ((image, *_), (target, *_)) = next(iter(module.evaluation_dataloader("train")))
    x1, y1, x2, y2 = target["boxes"][0].int().tolist()
    inside = torch.zeros(image.shape[1:], dtype=torch.bool)
    inside[y1:y2, x1:x2] = True
    assert (x1, y1, x2, y2) == (4, 5, 13, 13)
    assert torch.equal(image[0] > 128, inside)


# json: every field missing, or of another kind


def entries() -> dict:
    return {
        "images": [{"id": 1, "file_name": "1.png", "height": 24, "width": 32}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 3, "bbox": [2, 3, 9, 8], "area": 72, "iscrowd": 0,
             "segmentation": [[2, 3, 11, 3, 11, 11]], "keypoints": [3, 4, 2], "num_keypoints": 1}
        ],
        "categories": [{"id": 3, "name": "x", "keypoints": ["tip"], "skeleton": []}],
    }  # fmt: skip


FIELDS = [(part, key) for part, (entry, *_) in entries().items() for key in entry]
OPTIONAL = {("images", "height"), ("images", "width"), ("annotations", "area"), ("annotations", "iscrowd"),
            ("annotations", "num_keypoints"), ("annotations", "keypoints"), ("categories", "keypoints"),
            ("categories", "skeleton")}  # fmt: skip
WRONG = [None, "x", -1.5, [], {}, [None]]


def read(root: Path, content: dict):
    write(root / "train", {"1.png": PLAIN})
    (root / "train.json").write_text(json.dumps(content))
    module = COCODataModule(str(root), val_size=0, workers=0, masks=True, keypoints=True)
    module.setup("fit")
    return module


@pytest.mark.parametrize(("part", "key"), FIELDS, ids=lambda field: str(field))
def test_a_field_of_an_annotation_that_is_missing_or_wrong_is_named_or_not_needed(part, key, tmp_path):
    content = entries()
    del content[part][0][key]
    cases = [(content, (part, key) in OPTIONAL and (part, key) != ("categories", "keypoints"))]
    for value in WRONG:
        content = entries()
        content[part][0][key] = value
        cases.append((content, None))
    for number, (content, fine) in enumerate(cases):
        try:
            module = read(tmp_path / str(number), content)
        except ValueError as error:
            assert "train.json" in str(error), content  # noqa: PT017 (some are read)
            assert not fine, content
        else:
            assert fine is not False, content
            target = module.train_set.target(0, True, True, training=False)
            assert target["boxes"].tolist() == [[2, 3, 11, 11]]
            assert target["area"].isfinite().all()


# Videos and meshes


@pytest.mark.parametrize("content", ["empty", "page", "cut", "sound"])
def test_a_bad_video_is_named_or_left_out(content, tmp_path):
    pytest.importorskip("av")
    from readers import video

    sound = video("mp4")
    wrong = {"empty": b"", "page": b"<html></html>", "cut": sound[: len(sound) // 3], "sound": wave()}[content]
    for name in ("a/1", "a/2", "a/3", "b/1", "b/2"):
        write(tmp_path / name.split("/")[0], {f"{name[-1]}.mp4": sound})
    write(tmp_path / "a", {"wrong.mp4": wrong})
    options = {"num_frames": 2, "seconds": 0.2, "size": 8, "val_size": 0, "workers": 0, "batch_size": 2}
    module = VideoFolderDataModule(str(tmp_path), **options)
    module.setup("fit")
    with pytest.raises(ValueError, match=r"a/wrong\.mp4 (is empty|cannot be read as a video: \S|has no pictures)"):
        list(module.train_dataloader())
    module = VideoFolderDataModule(str(tmp_path), corrupt="skip", **options)
    with pytest.warns(UserWarning, match=r"1 of 6 videos of split train cannot be read.*wrong\.mp4"):
        module.setup("fit")
    assert len(module.train_set) == 5
    shutil.copy(tmp_path / "a/wrong.mp4", tmp_path / "b/1.mp4")


def wave() -> bytes:
    """A file of sound only."""
    import io

    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        for k in range(10):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 16000, 1024 * k
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MESH.replace("1 0 0", "nan 0 0"), "vertices that are not finite"),
        (MESH.replace("1 0 0", "inf 0 0"), "vertices that are not finite"),
        ("v 0 0 0\n", "has no faces"),
        ("", r"model\.obj"),
        (MESH + "f 1 2 99\n", r"model\.obj"),
        ("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n", "only degenerate triangles"),
    ],
)
def test_a_bad_mesh_is_named_or_left_out(mesh, message, tmp_path):
    pytest.importorskip("trimesh")
    square = encoded(Image.fromarray(pixels(24, 24)).convert("RGBA"), "PNG")
    for name in ("wrong", "p", "q"):
        rendered = tmp_path / "models" / "03001627" / name / "rendering"
        write(rendered, {"00.png": square, "rendering_metadata.txt": b"30 25 0 0.8 25\n"})
        (rendered.parent / "model.obj").write_text(mesh if name == "wrong" else MESH)
    options = {"size": 8, "num_points": 10, "val_size": 0, "test_size": 0, "workers": 0, "cache_folder": str(tmp_path)}
    with pytest.raises(ValueError, match=rf"wrong/model\.obj.*{message}|{message}.*wrong/model\.obj|{message}"):
        ShapeNetDataModule(str(tmp_path), **options).setup("fit")
    module = ShapeNetDataModule(str(tmp_path), corrupt="skip", **options)
    module.setup("fit")
    assert len(module.train_set.views) == 2
    assert "1 surface that cannot be used" in module.report()
