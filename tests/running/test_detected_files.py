"""What a detector finds on pictures of one's own, in their own upright pixels."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pycocotools import mask as coco

import zoo
from zoo.cli import main
from zoo.running.detected_files import DetectedFiles
from zoo.tasks.detection import DetectionTask

NAMES = ["cat", "$dog$", "[bold]"]
SMALL = {"network": "squeezenet1_0", "min_size": 64, "max_size": 96, "score_threshold": 0.0, "detections": 5}
DETECTORS = {
    "FasterRCNN": SMALL,
    "MaskRCNN": SMALL,
    "KeypointRCNN": SMALL | {"num_keypoints": 5},
    "SingleStageDetector": {"image_size": 64, "width": 0.25, "score_threshold": 0.5, "overlap": 0.3},
    "YOLOv3": {"tiny": True, "image_size": 64, "width": 0.125, "score_threshold": 0.2, "detections": 7},
}


def noise(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height // 10 + 1, width // 10 + 1, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height))


def weights_of(architecture, **changed):
    torch.manual_seed(0)
    zoo.save(getattr(zoo, architecture)(3, NAMES, **(DETECTORS[architecture] | changed)), "w.safetensors")
    return "w.safetensors"


@pytest.fixture
def pictures():
    folder = Path("mine/below")
    folder.mkdir(parents=True)
    for number in range(3):
        noise(90 + 40 * number, 70 + 5 * number, seed=number).save(folder / f"{number}.JPG")
    (folder / "notes.txt").write_text("no picture")
    return Path("mine")


def rows(folder="predictions"):
    return [json.loads(line) for line in (Path(folder) / "predictions.jsonl").read_text().splitlines()]


def by_hand(model, file):
    pixels = np.asarray(ImageOps.exif_transpose(Image.open(file)).convert("RGB"))
    with torch.no_grad():
        return model([torch.from_numpy(pixels / np.float32(255)).permute(2, 0, 1)])[0]


@pytest.mark.parametrize("architecture", DETECTORS)
def test_the_command_says_what_the_model_says(architecture, pictures, capsys):
    weights = weights_of(architecture)
    assert main(["predict", weights, "mine", "--batch_size", "1", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    model = zoo.load(weights)
    assert [row["file"] for row in rows()] == [f"mine/below/{number}.JPG" for number in range(3)]
    assert sum(len(row["objects"]) for row in rows()) > 2
    for row in rows():
        expected = by_hand(model, row["file"])
        assert [each["class_name"] for each in row["objects"]] == [NAMES[k - 1] for k in expected["labels"]]
        assert [each["score"] for each in row["objects"]] == pytest.approx(expected["scores"].tolist(), abs=1e-6)
        boxes = torch.tensor([each["box"] for each in row["objects"]]).reshape(-1, 4)
        torch.testing.assert_close(boxes, expected["boxes"], rtol=1e-5, atol=1e-3)
        for k, each in enumerate(row["objects"]):
            assert ("mask" in each, "keypoints" in each) == ("masks" in expected, "keypoints" in expected)
            if "mask" in each:
                assert np.array_equal(coco.decode(each["mask"]), (expected["masks"][k, 0] > 0.5).numpy())
            if "keypoints" in each:
                np.testing.assert_allclose(each["keypoints"], expected["keypoints"][k].numpy(), rtol=1e-5, atol=1e-3)
        assert row["file"] in output
    with Image.open("predictions/predictions.png") as sheet:
        assert sheet.size[0] > 600


def test_boxes_are_in_the_pixels_of_the_upright_picture():
    upright = noise(200, 80)
    upright.save("upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save("turned.png", exif=exif)
    assert Image.open("turned.png").size == (80, 200)
    weights = weights_of("SingleStageDetector")
    assert main(["predict", weights, "upright.png", "turned.png", "--device", "cpu"]) == 0
    one, other = rows()
    assert one["objects"] == other["objects"]
    boxes = np.array([each["box"] for each in one["objects"]])
    assert boxes[:, [0, 2]].max() > 100
    assert boxes[:, [1, 3]].max() <= 80


@pytest.mark.parametrize("architecture", ["FasterRCNN", "SingleStageDetector", "YOLOv3"])
def test_a_threshold_reaches_below_the_models_own_and_cuts_above_it(architecture, pictures, capsys):
    weights = weights_of(architecture, score_threshold=0.9, **({"prior": 0.9} if architecture == "YOLOv3" else {}))
    few = ["mine/below/0.JPG", "--device", "cpu"]
    assert main(["predict", weights, *few]) == 0
    capsys.readouterr()
    assert main(["predict", weights, *few, "--score_threshold", "0.01"]) == 0
    output = capsys.readouterr().out
    (row,) = rows()
    scores = sorted(each["score"] for each in row["objects"])
    assert 0.01 <= scores[0] < 0.9
    assert "from a score of 1% on" in output
    middle = scores[len(scores) // 2]
    assert main(["predict", weights, *few, "--score_threshold", str(middle)]) == 0
    (cut,) = rows()
    assert cut["objects"] == [each for each in row["objects"] if each["score"] >= middle][: len(cut["objects"])]
    assert 0 < len(cut["objects"]) < len(row["objects"])


class Known(DetectionTask):
    """Finds two dogs and a cat on large pictures, an unsure cat on small ones, and nothing on tiny ones."""

    def __init__(self, optimizer=None):
        super().__init__(3, NAMES, optimizer, None, ("boxes", "masks"))
        self.head = torch.nn.Linear(1, 1)

    def detect(self, images):
        return [self._on(image) for image in images]

    def _on(self, image):
        height, width = image.shape[1:]
        boxes = torch.tensor([[0.1, 0.2, 0.3, 0.6], [0.5, 0.1, 0.9, 0.5], [0.6, 0.6, 0.9, 0.9], [0.1, 0.7, 0.3, 0.9]])
        boxes = boxes * torch.tensor([width, height, width, height])
        scores = torch.tensor([0.93, 0.88, 0.71, 0.2] if width > 500 else [0.32, 0.1, 0.1, 0.1])
        masks = torch.zeros(4, 1, height, width)
        points = torch.cat([(boxes[:, None, :2] + boxes[:, None, 2:]) / 2, torch.ones(4, 1, 1)], 2)
        for k, (x1, y1, x2, y2) in enumerate(boxes.long().tolist()):
            masks[k, 0, y1:y2, x1:x2] = 1
        found = {"boxes": boxes, "labels": torch.tensor([2, 1, 2, 1]), "scores": scores, "masks": masks}
        return {key: value[: 0 if width < 50 else 4] for key, value in (found | {"keypoints": points}).items()}


def printed(table):
    from rich.console import Console

    with (console := Console(width=200)).capture() as capture:
        console.print(table)
    return [" ".join(line.split()) for line in capture.get().splitlines()]


def test_what_was_found_is_counted_and_nothing_is_said_in_words():
    files = DetectedFiles(Known().eval())
    found = files.predict([Path("a.png"), Path("b.png"), Path("c.png")],
                          [torch.rand(3, 400, 900), torch.rand(3, 60, 80), torch.rand(3, 9, 9)])  # fmt: skip
    assert [len(row["objects"]) for row in found] == [4, 4, 0], "the rows have what the model gives"
    assert printed(files.table(found)) == [
        "picture objects from a score of 50% on",
        "a.png 2 × $dog$ (best 93%), cat (88%)",
        "b.png nothing so sure; the best of 4 below: $dog$ (32%)",
        "c.png nothing found",
    ]


def test_the_sheet_shows_the_first_pictures_smaller_with_their_names():
    files = DetectedFiles(Known().eval())
    for number in range(5):
        names = [Path(f"${number}{k}$.jpg") for k in range(3)]
        files.predict(names, [torch.rand(3, 1000, 2000), torch.rand(3, 60, 80), torch.rand(3, 9, 9)])
    figure = files.sheet()
    assert len(figure.axes) == 12
    assert [axes.get_title() for axes in figure.axes[:3]] == [
        "$00$.jpg\nfound: 3", "$01$.jpg\nfound: 0", "$02$.jpg\nfound: 0"
    ]  # fmt: skip
    large = figure.axes[0]
    assert large.images[0].get_array().shape == (320, 640, 3)
    corners = sorted((patch.get_x() + 0.5, patch.get_y() + 0.5) for patch in large.patches)
    np.testing.assert_allclose(corners, [(64, 64), (320, 32), (384, 192)], atol=1e-3)
    layer = large.images[1].get_array()
    assert (layer[70:185, 70:185, 3] > 0).all()
    assert (layer[:60, :300, 3] == 0).all()
    points = sorted(tuple(map(float, each.get_offsets()[0])) for each in large.collections if len(each.get_offsets()))
    np.testing.assert_allclose(points, [(128, 128), (448, 96), (480, 240)], atol=1e-3)


@pytest.mark.parametrize("size", [90, [200, 90]])
def test_pictures_are_looked_at_as_in_training_and_what_is_found_is_told_in_their_own_pixels(size):
    model = Known().eval()
    images = [torch.rand(3, 400, 900), torch.rand(3, 800, 600)]
    expected = [model._on(torch.rand(3, 40, 90)) for _ in images]
    model.evaluation = {"size": size}
    files = DetectedFiles(model)
    found = files._detect(images)
    for each, image, said in zip(found, images, expected, strict=True):
        height, width = image.shape[1:]
        assert torch.equal(each["scores"], said["scores"]), "it is unsure of what is small"
        scale = torch.tensor([width / 90, height / 40])
        torch.testing.assert_close(each["boxes"], said["boxes"] * scale.repeat(2), rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(each["keypoints"][..., :2], said["keypoints"][..., :2] * scale)
        assert each["masks"].shape == (4, 1, height, width)
        x1, y1, x2, y2 = each["boxes"][1].tolist()
        middle = slice(int(y1) + 20, int(y2) - 20), slice(int(x1) + 20, int(x2) - 20)
        assert (each["masks"][1, 0][middle] > 0.5).all()
        assert (each["masks"][1, 0][:, : int(x1) - 20] < 0.5).all()
    (row, _) = files.predict([Path("a.png"), Path("b.png")], images)
    assert row["objects"][1]["mask"]["size"] == [400, 900]


def test_a_broken_picture_is_named_and_the_others_are_predicted(pictures, capsys):
    Path("mine/cut.jpg").write_bytes((pictures / "below" / "0.JPG").read_bytes()[:400])
    Path("mine/page.png").write_text("<html>")
    noise(3000, 1).save("mine/thin.png")
    assert main(["predict", weights_of("YOLOv3"), "mine", "--out", "out"]) == 1
    captured = capsys.readouterr()
    assert [line.split(" is left out")[0] for line in captured.err.splitlines()] == [
        f"zoo: error: mine/{name}" for name in ("cut.jpg", "page.png", "thin.png")
    ]
    assert "3000 x 1 pixels are too thin" in captured.err
    assert "3 pictures: out/predictions.jsonl, out/predictions.png" in captured.out
    assert len(rows("out")) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--top 3", "--top is for classifiers: w.safetensors holds a zoo.YOLOv3, a detector"),
        ("--test_time_augmentation flip", "--test_time_augmentation is for classifiers"),
        ("--top 3 --test_time_augmentation flip", "--top and --test_time_augmentation are for classifiers"),
        ("--score_threshold 1.5", "expected a number from 0 to 1, not '1.5'"),
        ("--score_threshold high", "expected a number from 0 to 1, not 'high'"),
        ("--score_treshold 0.3", "did you mean --score_threshold"),
    ],
)
def test_wrong_options_are_refused(arguments, said, capsys):
    noise(90, 70).save("good.png")
    assert main(["predict", weights_of("YOLOv3"), "good.png", *arguments.split()]) == 2
    assert said in capsys.readouterr().err
    assert not Path("predictions").exists()
