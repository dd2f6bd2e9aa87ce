"""What a classifier says of pictures of one's own; a broken one costs itself only."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from zoo import LeNet
from zoo.cli import main
from zoo.running.picture_files import read_picture

NAMES = ["cat", "dog", "[bold]", "$x$", "e", "f", "g", "h", "i", "j"]


def noise(width, height, mode="RGB", seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


@pytest.fixture
def weights():
    torch.manual_seed(0)
    zoo.save(LeNet(class_names=NAMES, in_channels=3, image_size=32), "w.safetensors")
    return "w.safetensors"


@pytest.fixture
def pictures():
    folder = Path("mine/below")
    folder.mkdir(parents=True)
    for number in range(5):
        noise(50 + number, 40, seed=number).save(folder / f"{number}.JPG")
    (folder / "notes.txt").write_text("no picture")
    return Path("mine")


def rows(folder="predictions"):
    return [json.loads(line) for line in (Path(folder) / "predictions.jsonl").read_text().splitlines()]


def test_the_command_says_what_the_model_says(weights, pictures, capsys):
    assert main(["predict", weights, "mine", "--batch_size", "2", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    found = rows()
    assert [row["file"] for row in found] == [f"mine/below/{number}.JPG" for number in range(5)]
    model = zoo.load(weights)
    for row in found:
        with torch.no_grad():
            scores = model(read_picture(Path(row["file"]), 3, 32)[None]).softmax(1)[0]
        order = scores.argsort(descending=True)[:5].tolist()
        assert [name for name, _ in row["top"]] == [NAMES[k] for k in order]
        assert [value for _, value in row["top"]] == pytest.approx(scores[order].tolist(), abs=1e-6)
    assert all(row["file"] in output for row in found)
    assert Image.open("predictions/predictions.png").size[0] > 300


def test_a_broken_picture_is_named_and_the_others_are_predicted(weights, pictures, capsys):
    Path("mine/cut.jpg").write_bytes((pictures / "below" / "0.JPG").read_bytes()[:400])
    Path("mine/empty.png").touch()
    Path("mine/page.png").write_text("<html>")
    assert main(["predict", weights, "mine", "--out", "out", "--top", "2"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [error.split(" is left out")[0] for error in errors] == [
        f"zoo: error: mine/{name}" for name in ("cut.jpg", "empty.png", "page.png")
    ]
    assert len(rows("out")) == 5
    assert all(len(row["top"]) == 2 for row in rows("out"))


def test_views_are_averaged_where_asked(weights, pictures):
    assert main(["predict", weights, "mine", "--test_time_augmentation", "flip"]) == 0
    model, row = zoo.load(weights), rows()[0]
    image = read_picture(Path(row["file"]), 3, 32)[None]
    with torch.no_grad():
        mean = (model(image).softmax(1) + model(image.flip(-1)).softmax(1))[0] / 2
    assert dict(row["top"]) == pytest.approx(
        {NAMES[k]: mean[k].item() for k in mean.topk(5).indices.tolist()}, abs=1e-6
    )


def test_a_checkpoint_with_grey_pictures_and_strange_names():
    assert main(["fit", "lenet/embedded", "--trainer.max_epochs", "1", "--data.init_args.image_size", "8",
                 "--model.init_args.image_size", "8"]) == 0  # fmt: skip
    for name in ("with blank [red].png", "a$b$.png", os.fsdecode(b"\xff.png")):
        noise(20, 30).save(name)
    checkpoint = "runs/lenet/embedded/version_0/checkpoints/last.ckpt"
    assert main(["predict", checkpoint, *sorted(str(path) for path in Path().glob("*.png"))]) == 0
    assert len(rows()) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "PICTURE|FOLDER"),
        ("no.jpg", "no picture or folder 'no.jpg'"),
        ("empty", "empty has no pictures"),
        ("broken.png", "none of 1 pictures could be read"),
        ("good.png --top 9", "--top"),
        ("good.png --batch_size 0", "--batch_size 0"),
        ("good.png --tpo 3", "did you mean --top"),
        ("good.png --device tpu", "'tpu'"),
        ("good.png --score_threshold 0.3", "--score_threshold is for detectors: w.safetensors holds a zoo.LeNet"),
    ],
)
def test_wrong_arguments_are_refused(weights, arguments, said, capsys):
    Path("empty").mkdir()
    Path("broken.png").touch()
    noise(9, 9).save("good.png")
    assert main(["predict", weights, *arguments.split()]) == 2
    assert said in capsys.readouterr().err
    assert not Path("predictions").exists()


@pytest.mark.parametrize("file", ["no.ckpt", "junk.safetensors", "evil.ckpt"])
def test_wrong_weights_are_refused(file, capsys):
    noise(9, 9).save("good.png")
    Path("junk.safetensors").write_bytes(b"junk")
    torch.save({"state_dict": {"a": torch.zeros(1)}}, "evil.ckpt")
    assert main(["predict", file, "good.png"]) == 2
    assert file in capsys.readouterr().err
