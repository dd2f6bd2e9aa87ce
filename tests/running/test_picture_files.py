"""Prediction on any picture: read as torchvision's evaluation reads it, upright, and a broken one costs itself only."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

import zoo
from zoo import LeNet
from zoo.cli import main
from zoo.running.picture_files import read_picture

NAMES = ["cat", "dog", "[bold]", "$x$", "e", "f", "g", "h", "i", "j"]


def noise(width, height, mode="RGB", seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height)).convert(mode)


def read_bytes(path, channels, size):
    """As uint8, which torchvision's resized pictures are."""
    return (read_picture(Path(path), channels, size, size) * 255).round().byte()


@pytest.mark.parametrize(("width", "height"), [(300, 400), (640, 333), (100, 50), (224, 224), (31, 977)])
def test_large_inputs_are_resized_and_cropped_as_torchvision_evaluates(width, height):
    noise(width, height).save("picture.png")
    same = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])
    assert torch.equal(read_bytes("picture.png", 3, 224), same(Image.open("picture.png")))


@pytest.mark.parametrize(("width", "height"), [(40, 60), (500, 32), (32, 32), (10, 10)])
def test_small_inputs_lose_nothing_but_the_longer_sides_ends(width, height):
    noise(width, height, "L").save("picture.png")
    same = v2.Compose([v2.Resize(32), v2.CenterCrop(32), v2.PILToTensor()])
    assert torch.equal(read_bytes("picture.png", 1, 32), same(Image.open("picture.png")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright_whatever_the_camera_wrote(orientation):
    upright = noise(32, 32)
    # How the sensor stored it: the inverse of what the viewer must do.
    inverse = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    stored = upright if inverse is None else upright.transpose(Image.Transpose(inverse))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save("picture.png", exif=exif)
    assert ImageOps.exif_transpose(Image.open("picture.png")).tobytes() == upright.tobytes()
    assert torch.equal(read_bytes("picture.png", 3, 32), torch.from_numpy(np.array(upright)).permute(2, 0, 1))


def test_what_is_transparent_becomes_white_and_sixteen_bits_become_eight():
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save("clear.png")
    assert torch.equal(read_picture(Path("clear.png"), 3, 32, 32), torch.ones(3, 32, 32))
    deep = np.linspace(0, 65535, 32 * 32).reshape(32, 32)
    Image.fromarray(deep.astype(np.uint16)).save("deep.png")
    found = read_picture(Path("deep.png"), 1, 32, 32)[0]
    np.testing.assert_allclose(found.numpy(), deep / 65535, atol=0.6 / 255)


@pytest.mark.parametrize(
    ("mode", "name"), [("CMYK", "c.jpg"), ("P", "p.gif"), ("1", "b.png"), ("LA", "l.png"), ("L", "g.jpg")]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_gives_grey_or_rgb(mode, name, channels):
    noise(40, 50, mode).save(name)
    found = read_picture(Path(name), channels, 28, 28)
    assert found.shape == (channels, 28, 28)
    assert found.dtype == torch.float32
    assert 0 <= found.min() < found.max() <= 1


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
            scores = model(read_picture(Path(row["file"]), 3, 32, 32)[None]).softmax(1)[0]
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
    image = read_picture(Path(row["file"]), 3, 32, 32)[None]
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
