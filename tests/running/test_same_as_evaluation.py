"""What ``zoo predict FILE`` says of a picture or a video is what validation and test said of the same file."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning import Trainer
from PIL import Image

import zoo
from datamodules import (
    CIFAR10DataModule,
    COCOCaptionsDataModule,
    COCODataModule,
    DigitsDataModule,
    ImageFolderDataModule,
    VideoFolderDataModule,
)
from datamodules.pictures import centre, read_image, resize, resize_short_side
from datamodules.shapenet import SeenReader
from datamodules.video import EvaluationClips
from datamodules.video_lists import VideoSet
from zoo.cli import main
from zoo.running import own_pictures
from zoo.running.captioned_files import CaptionedFiles
from zoo.running.classified_files import ClassifiedFiles
from zoo.running.detected_files import DetectedFiles
from zoo.running.meshed_files import MeshedFiles
from zoo.running.picture_files import read_picture, read_pixels, read_whole_picture, resized
from zoo.running.watched_files import WatchedFiles, read_clips
from zoo.tasks.captioning import SPECIAL
from zoo.weights import read_weights

CLOSE = 1e-5
NAMES = ["photo.jpg", "plain.png", "clear.png", "deep.png", "palette.png", "turned.jpg", "grey.jpg", "print.jpg"]
MORE = ["fade.png", "key.png", "few.gif", "deep.tif"]


@pytest.fixture(autouse=True)
def _no_sheets(monkeypatch):
    """They take most of the time, and other tests look at them."""
    for files in (CaptionedFiles, ClassifiedFiles, DetectedFiles, WatchedFiles):
        monkeypatch.setattr(files, "sheet", lambda self: None)
    monkeypatch.setattr(own_pictures, "write_png", lambda figure, path: None)


def write_picture(path, width=200, height=150):
    """A picture of the kind that the file's name says: smooth shades, and noise on top."""
    name = Path(path).name
    rng = np.random.default_rng(len(name) + sum(name.encode()))
    coarse = rng.integers(0, 256, (height // 9, width // 9, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height)), dtype=np.int64)
    pixels = (smooth + rng.integers(-30, 30, smooth.shape)).clip(0, 255).astype(np.uint8)
    picture, options = Image.fromarray(pixels), {}
    alpha = Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8))
    if name == "clear.png":
        picture.putalpha(alpha)
    elif name in ("deep.png", "deep.tif"):
        picture = Image.fromarray((pixels[..., 0].astype(np.uint16) << 8) + pixels[..., 1])
    elif name == "palette.png":
        picture, options = picture.quantize(40), {"transparency": bytes(range(0, 240, 6))}
    elif name == "few.gif":
        picture, options = picture.quantize(20), {"transparency": 3}
    elif name == "key.png":
        options = {"transparency": tuple(pixels[0, 0].tolist())}
    elif name == "turned.jpg":
        picture, exif = picture.transpose(Image.Transpose.ROTATE_90), Image.Exif()
        exif[0x0112] = 6
        options = {"exif": exif}
    elif name == "grey.jpg":
        picture = picture.convert("L")
    elif name == "print.jpg":
        picture = picture.convert("CMYK")
    elif name == "fade.png":
        picture = picture.convert("LA")
        picture.putalpha(alpha)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)
    return Path(path)


@pytest.mark.parametrize("name", NAMES + MORE)
def test_the_pixels_are_those_of_the_data_modules(name):
    path = write_picture(name)
    expected = read_image(path)
    assert torch.equal(read_pixels(path), expected)
    assert torch.equal(read_whole_picture(path), expected.float().div_(255))
    pixels = expected.permute(1, 2, 0).numpy()
    for size, short_side in ((32, 36), (32, 32), (96, 109), (96, 96), (224, 256)):
        image = centre(resize_short_side(pixels, short_side), size).float().div_(255)
        assert torch.equal(read_picture(path, 3, size, short_side), image)
    assert torch.equal(resized(read_pixels(path), 40, 30), resize(pixels, 40, 30))


@pytest.mark.parametrize(("width", "height"), [(500, 9), (9, 500), (31, 977), (77, 1), (10, 10), (333, 640)])
def test_the_shape_of_a_picture_changes_nothing_of_that(width, height):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save("a.png")
    image = centre(resize_short_side(read_image("a.png").permute(1, 2, 0).numpy(), 37), 32)
    assert torch.equal(read_picture(Path("a.png"), 3, 32, 37), image.float().div_(255))


def test_what_is_no_picture_for_the_data_modules_is_none_here():
    Image.fromarray(np.random.default_rng(0).random((9, 9), dtype=np.float32)).save("a.tif")
    for read in (read_image, read_pixels):
        with pytest.raises(ValueError, match="floating-point numbers"):
            read(Path("a.tif"))


def saved(model, data, name="w.ckpt"):
    """A checkpoint as a training with these data writes it, before its first step; and what the trainer predicts."""
    trainer = Trainer(max_epochs=0, logger=False, enable_checkpointing=False, accelerator="cpu",
                      enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0)  # fmt: skip
    trainer.fit(model, data)
    trainer.save_checkpoint(name, weights_only=False)
    predictions = [each for batch in trainer.predict(model, data) for each in batch]
    assert main(["export", name, "--format", "safetensors", "--out", "w.safetensors"]) == 0
    return [name, "w.safetensors"], predictions


def said(*arguments):
    """The rows of the command by file."""
    assert main(["predict", *map(str, arguments), "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in Path("predictions/predictions.jsonl").read_text().splitlines()]
    return {row["file"]: row for row in rows}


@pytest.fixture
def folder():
    """Two classes with a picture of each kind, the same for training and validation."""
    for split in ("train", "val"):
        for number, name in enumerate(NAMES):
            write_picture(f"mine/{split}/{'ab'[number % 2]}/{name}")
    return Path("mine")


def classifier(image_size):
    """One that is sure: a difference of pixels is one of probabilities."""
    torch.manual_seed(0)
    model = zoo.LeNet(num_classes=2, class_names=["a", "b"], in_channels=3, image_size=image_size)
    torch.nn.init.normal_(model.head.weight, std=3.0)
    return model


@pytest.mark.parametrize(("image_size", "resize_size"), [(32, None), (32, 32), (32, 60), (96, None), (96, 96)])
def test_a_classifier_says_what_validation_said(image_size, resize_size, folder):
    data = ImageFolderDataModule("mine", image_size, resize_size, eval_batch_size=5, workers=0)
    files, predictions = saved(classifier(image_size), data)
    assert read_weights("w.ckpt")[1]["evaluation"] == {"short_side": data.resize_size, "size": image_size}
    expected = {str(data.test_set.path(k)): dict(each["top"]) for k, each in enumerate(predictions)}
    assert np.std([each["a"] for each in expected.values()]) > 0.01, "answers that are all alike prove nothing"
    for file in files:
        found = said(file, folder / "val")
        assert found.keys() == expected.keys()
        for name, row in found.items():
            assert dict(row["top"]) == pytest.approx(expected[name], abs=CLOSE), name


def test_an_exported_file_that_is_exported_again_still_knows(folder):
    saved(classifier(32), ImageFolderDataModule("mine", 32, 60, workers=0))
    assert main(["export", "w.safetensors", "--format", "safetensors", "--out", "again.safetensors"]) == 0
    assert zoo.load("again.safetensors").evaluation == {"short_side": 60, "size": 32}
    model = zoo.load("again.safetensors")
    assert ClassifiedFiles(model).read(Path("mine/val/a/photo.jpg")).shape == (3, 32, 32)


def test_a_file_that_does_not_say_it_is_read_as_before():
    path = write_picture("photo.jpg")
    for size, short_side in ((32, 32), (64, 64), (96, 110), (224, 256)):
        expected = centre(resize_short_side(read_image(path).permute(1, 2, 0).numpy(), short_side), size)
        assert torch.equal(ClassifiedFiles(classifier(size)).read(path), expected.float().div_(255))


def test_a_fresh_process_with_the_file_and_the_picture_alone_says_what_the_recipe_said(folder):
    recipe = {
        "expect": [{"metric": "test/accuracy", "at_least": 0, "source": "this test"}],
        "model": {"class_path": "zoo.LeNet", "init_args": {"in_channels": 3, "image_size": 32}},
        "data": {"class_path": "datamodules.ImageFolderDataModule",
                 "init_args": {"root": "mine", "image_size": 32, "resize_size": 44, "workers": 0}},
        "trainer": {"max_steps": 1, "accelerator": "cpu"},
    }  # fmt: skip
    Path("own.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "own.yaml"]) == 0
    assert main(["predict", "own.yaml", "--ckpt_path", "last"]) == 0
    (written,) = Path("runs").rglob("predictions.jsonl")
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    names = [path.relative_to("mine/val").as_posix() for path in sorted(folder.glob("val/*/*"))]
    expected = {Path(name).name: dict(line["top"]) for name, line in zip(names, lines, strict=True)}
    Path("alone").mkdir()
    shutil.copy(next(Path("runs").rglob("last.ckpt")), "alone/w.ckpt")
    for name in names:
        shutil.copy(folder / "val" / name, "alone")
    shutil.rmtree("mine")
    command = [sys.executable, "-m", "zoo", "predict", "w.ckpt", *sorted(expected), "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(Path(zoo.__file__).parents[1])}
    subprocess.run(command, cwd="alone", env=environment, check=True, capture_output=True)
    for line in Path("alone/predictions/predictions.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert dict(row["top"]) == pytest.approx(expected.pop(row["file"]), abs=CLOSE)
    assert not expected


def coco(names, width, height):
    """The entries of COCO's format for pictures of one size, which are written."""
    for name in names:
        write_picture(f"mine/images/{name}", width, height)
    return [{"id": k, "file_name": name, "width": width, "height": height} for k, name in enumerate(names, 1)]


@pytest.mark.parametrize(("image_size", "cell"), [(32, "attention"), (96, "rnn")])
def test_a_captioner_says_what_validation_said(image_size, cell):
    images = coco(NAMES, 200, 150)
    texts = [{"id": k, "image_id": k, "caption": "a dog on the grass"} for k in range(1, len(NAMES) + 1)]
    for split in ("train", "val"):
        path = Path(f"mine/annotations/captions_{split}.json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"images": images, "annotations": texts}))
    words = [*SPECIAL, "a", "dog", "on", "the", "grass"]
    folders = {f"{split}_images": "images" for split in ("train", "val")}
    data = COCOCaptionsDataModule("mine", words=words, size=image_size, workers=0, **folders)
    torch.manual_seed(0)
    # Made for another size than it is trained with, but for attention, which has a place for each part of a picture.
    made_for = 32 if cell == "attention" else 64
    model = zoo.CaptioningLSTM(words, cell, network="small", image_size=made_for, wordvec_dim=8, hidden_dim=16)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    files, predictions = saved(model, data)
    expected = {f"mine/images/{name}": each for name, each in zip(NAMES, predictions, strict=True)}
    assert len({round(each["log_probability"], 3) for each in predictions}) > len(NAMES) / 2
    for file in files:
        for name, row in said(file, "mine/images").items():
            assert row["caption"] == expected[name]["caption"], name
            assert row["log_probability"] == pytest.approx(expected[name]["log_probability"], abs=CLOSE), name


SMALL = {"network": "squeezenet1_0", "min_size": 64, "max_size": 96, "score_threshold": 0.0, "detections": 5}
DETECTORS = {
    "SingleStageDetector": {"image_size": 64, "width": 0.25, "score_threshold": 0.5, "overlap": 0.3},
    "MaskRCNN": SMALL,
    "KeypointRCNN": SMALL | {"num_keypoints": 5},
}


def meet_noise(detector, norms):
    """Fresh batch norms make all pictures alike."""
    for norm in norms:
        norm.momentum = None
    target = {"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([1])}
    noise = torch.nn.functional.interpolate(torch.rand(8, 3, 9, 9), (64, 64), mode="bilinear")
    with torch.no_grad():
        detector.train().losses(list(noise), [target] * 8)


@pytest.mark.parametrize(
    ("architecture", "size", "as_large"),
    [
        ("SingleStageDetector", None, (150, 200)),
        ("SingleStageDetector", 96, (72, 96)),
        ("SingleStageDetector", [60, 50], (60, 50)),
        pytest.param("MaskRCNN", 80, (60, 80), marks=pytest.mark.slow),
        pytest.param("KeypointRCNN", 80, (60, 80), marks=pytest.mark.slow),
    ],
)
def test_a_detector_says_what_validation_said(architecture, size, as_large):
    content = {"images": coco(NAMES, 200, 150), "annotations": [], "categories": [{"id": 3, "name": "cat"}]}
    for image in content["images"]:
        box = {"bbox": [10, 10, 60, 60], "area": 3600, "iscrowd": 0, "category_id": 3}
        content["annotations"].append({"id": image["id"], "image_id": image["id"], **box})
    Path("mine/a.json").write_text(json.dumps(content))
    named = {"train_json": "a.json", "val_json": "a.json", "train_images": "images", "val_images": "images"}
    data = COCODataModule("mine", **named, size=size, eval_batch_size=4, workers=0)
    torch.manual_seed(0)
    model = getattr(zoo, architecture)(1, ["cat"], **DETECTORS[architecture])
    if norms := [each for each in model.modules() if isinstance(each, torch.nn.BatchNorm2d)]:
        meet_noise(model, norms)
    files, predictions = saved(model, data)
    expected = {f"mine/images/{name}": each["objects"] for name, each in zip(NAMES, predictions, strict=True)}
    assert np.std([each[0]["score"] for each in expected.values()]) > 1e-3, "scores that are all alike prove nothing"
    across, down = 200 / as_large[1], 150 / as_large[0]
    for file in files:
        for name, row in said(file, "mine/images").items():
            assert len(row["objects"]) == len(expected[name])
            for found, other in zip(row["objects"], expected[name], strict=True):
                assert found["score"] == pytest.approx(other["score"], abs=CLOSE), name
                box = np.array(other["box"]) * [across, down, across, down]
                np.testing.assert_allclose(found["box"], box, rtol=1e-5, atol=1e-3, err_msg=name)
                if "mask" in other:
                    assert found["mask"]["size"] == [150, 200]
                if "keypoints" in other:
                    points = np.array(other["keypoints"]) * [across, down, 1]
                    np.testing.assert_allclose(found["keypoints"], points, rtol=1e-5, atol=1e-3)


class Turned(SeenReader):
    """A reader of one picture."""

    def __init__(self, path, size):
        self.views, self.size = self, size
        self.path = path

    def picture(self, index):
        return self.path


def test_a_model_of_meshes_sees_a_rendering_as_in_training():
    pixels = np.random.default_rng(0).integers(0, 256, (137, 137, 4), dtype=np.uint8)
    pixels[:40, :, 3] = 0
    Image.fromarray(pixels).save("a.png")
    for size in (137, 48):
        model = zoo.Pix2Mesh(width=2, hidden=8, residuals=1, image_size=64)
        model.evaluation = {"size": size}
        expected = Turned(Path("a.png"), size).image(0).float().div_(255)
        assert torch.equal(MeshedFiles(model, Path()).read(Path("a.png")), expected)


def write_video(path, size=(48, 64), rate=10, frames=34, turned=0, **options):
    av = pytest.importorskip("av")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(sum(str(path).encode()))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4" if str(path).endswith("avi") else "libx264", rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.options = options
        for k in range(frames):
            coarse = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
            picture = np.asarray(Image.fromarray(coarse).resize(size[::-1]))
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = k
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_videos():
    for split in ("train", "val"):
        write_video(f"mine/{split}/a/wide.mp4")
        write_video(f"mine/{split}/a/tall.mp4", (90, 50), 25, 90)
        write_video(f"mine/{split}/a/other.mkv", (46, 78), 24, 50)
        write_video(f"mine/{split}/b/old.avi", (48, 64), 10)
        write_video(f"mine/{split}/b/older.avi", (48, 64), 30, 80, bf="2")
        write_video(f"mine/{split}/b/short.mp4", (64, 64), 10, 3)


@pytest.mark.parametrize(("clips", "crops"), [(1, 1), (3, 1), (1, 3), (2, 3)])
def test_clips_are_those_of_a_test(clips, crops):
    write_videos()
    for path in sorted(Path("mine/val").glob("*/*")):
        one = np.array([os.fsencode(path.name)]), np.zeros(1, dtype=np.int64), np.array([[0.0, np.inf]])
        reader = EvaluationClips(VideoSet(path.parent, *one), 5, 0.7, 40, clips, crops)
        expected = reader.__getitems__((0, 0, [0])).float().div_(255)
        found = read_clips(path, 5, 0.7, 40, clips, crops)
        assert found.shape == (clips * crops, 3, 5, 40, 40)
        assert torch.equal(found, expected[0] if clips * crops > 1 else expected), path


@pytest.mark.parametrize("views", [{}, {"test_clips": 2, "test_crops": 3}])
def test_a_classifier_of_clips_says_what_the_test_said(views):
    write_videos()
    data = VideoFolderDataModule("mine", num_frames=4, seconds=0.8, size=32, eval_size=40, workers=0, **views)
    torch.manual_seed(0)
    model = zoo.SlowFast(num_classes=2, class_names=["a", "b"], depth=14, frames=8, alpha=4, beta_inv=4, width=8,
                         image_size=32, seconds=1.0)  # fmt: skip
    torch.nn.init.normal_(model.head.weight, std=2.0)
    files, predictions = saved(model, data)
    expected = {str(data.test_set.path(k)): dict(each["top"]) for k, each in enumerate(predictions)}
    assert np.std([each["a"] for each in expected.values()]) > 1e-3
    for file in files:
        found = said(file, "mine/val")
        assert found.keys() == expected.keys()
        for name, row in found.items():
            assert dict(row["top"]) == pytest.approx(expected[name], abs=CLOSE), name


def test_pictures_that_are_held_in_memory_are_seen_as_they_are_held():
    """A digit's own pixels as a file; and a picture of CIFAR that is enlarged on the device."""
    data = DigitsDataModule(image_size=72, val_size=5)
    files, predictions = saved(zoo.LeNet(image_size=72), data)
    for number, image in enumerate(data.test_set[0][:3]):
        Image.fromarray(image[0].numpy()).save(f"{number}.png")
    for file in files:
        for row, prediction in zip(said(file, "0.png", "1.png", "2.png").values(), predictions, strict=False):
            assert dict(row["top"]) == pytest.approx(dict(prediction["top"]), abs=CLOSE)
    large = zoo.LeNet(in_channels=3, image_size=96)
    large.evaluation = CIFAR10DataModule(download=False, resize=96).evaluation
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 32, 32), dtype=np.uint8))
    Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save("c.png")
    expected, _ = CIFAR10DataModule(download=False, resize=96).on_after_batch_transfer((pixels, torch.zeros(1)), 0)
    assert torch.equal(ClassifiedFiles(large).read(Path("c.png")), expected[0])


@pytest.mark.parametrize(
    ("evaluation", "named"),
    [
        ([1], "its evaluation is "),
        ({"size": 10**9}, "size=1000000000"),
        ({"size": "large"}, "size='large'"),
        ({"size": True}, "size=True"),
        ({"seconds": -1.0}, "seconds=-1.0"),
        ({"size": [4, 0]}, "size="),
    ],
)
def test_a_file_that_says_nonsense_of_it_is_refused(evaluation, named, capsys):
    model = zoo.LeNet(in_channels=3, image_size=8)
    described = zoo.weights.describe(model) | {"evaluation": evaluation}
    torch.save({"state_dict": model.state_dict(), "zoo": described}, "w.ckpt")
    write_picture("photo.jpg")
    assert main(["predict", "w.ckpt", "photo.jpg"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "w.ckpt does not fit zoo.LeNet" in line
    assert named in line


@pytest.mark.parametrize("evaluation", [lambda self: 3, {"metric": "map"}, {"size": np.int64(8)}])
def test_what_a_foreign_data_module_calls_an_evaluation_is_left_alone(evaluation, monkeypatch):
    monkeypatch.setattr(DigitsDataModule, "evaluation", evaluation)
    saved(zoo.LeNet(image_size=8), DigitsDataModule(image_size=8))
    assert "evaluation" not in read_weights("w.ckpt")[1]
