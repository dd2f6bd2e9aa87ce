"""``zoo explain``: every method writes what it says, a page has all that apply, and a wrong word is answered."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from zoo import LeNet
from zoo.cli import main

NAMES = ["cat", "dog", "[bold]", "$x$", "e", "f", "g", "h", "i", "j"]


@pytest.fixture
def weights():
    torch.manual_seed(0)
    zoo.save(LeNet(class_names=NAMES, in_channels=3, image_size=32), "w.safetensors")
    return "w.safetensors"


@pytest.fixture
def pictures():
    Path("mine").mkdir()
    for number in range(5):
        values = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(values).resize((60, 50)).save(f"mine/{number}.png")
    return "mine"


def test_the_help_names_every_method(capsys):
    from zoo.running.explained_files import METHODS

    assert main(["explain", "--help"]) == 0
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert f"The methods: {', '.join(METHODS)}." in said


@pytest.mark.parametrize("method", ["filters", "activations", "patches", "neighbours", "pca"])
def test_what_needs_nothing_else(weights, pictures, method, capsys):
    assert main(["explain", weights, method, pictures, "--out", "out"]) == 0
    assert Image.open(f"out/{method}.png").size[0] > 300
    assert f"out/{method}.png" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["saliency", "guided", "grad_cam", "occlusion", "segmentation"])
def test_what_a_class_depends_on(weights, pictures, method, capsys):
    pytest.importorskip("captum")
    if method == "segmentation":
        pytest.importorskip("cv2")
    assert main(["explain", weights, method, "mine/0.png", "mine/1.png", "--target", "dog", "--out", "out"]) == 0
    assert Image.open(f"out/{method}.png").size[0] > 300


@pytest.mark.parametrize("method", ["adversarial", "class", "inversion", "dream", "texture", "style"])
def test_pictures_that_are_made_are_files_and_the_same_again(weights, pictures, method, capsys):
    for out in ("one", "two"):
        arguments = [method, "mine/0.png", "mine/1.png", "--steps", "3", "--seed", "5", "--out", out]
        assert main(["explain", weights, *arguments]) == 0
    made = sorted(path.name for path in Path("one").glob(f"{method}_*.png"))
    assert made
    for name in made:
        first, second = (np.asarray(Image.open(Path(out, name))) for out in ("one", "two"))
        assert first.shape == (32, 32, 3)
        assert (first == second).all()


@pytest.mark.slow
def test_without_a_method_a_page_has_all_that_apply(weights, pictures, capsys):
    pytest.importorskip("captum")
    assert main(["explain", weights, "mine/0.png", "--steps", "2"]) == 0
    page = Path("explanations/index.html").read_text()
    said = capsys.readouterr().out
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert {"saliency", "Grad-CAM", "DeepDream", "class visualisation", "Left out"} <= set(headings)
    assert page.count("data:image/png;base64,") == len(headings) - 1
    assert "style transfer needs two pictures" in page
    assert "tsne is left out" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["w.safetensors", "saliancy", "mine/0.png"], "did you mean saliency"),
        (["w.safetensors", "saliency"], "needs pictures"),
        (["w.safetensors", "saliency", "mine/9.png"], "there is no picture or folder"),
        (["w.safetensors", "grad_cam", "mine/0.png", "--layer", "hed"], "did you mean head"),
        (["w.safetensors", "saliency", "mine/0.png", "--target", "dgo"], "did you mean dog"),
        (["w.safetensors", "saliency", "mine/0.png", "--weights", "DEFAULT"], "has its own"),
        (["lenett", "saliency", "mine/0.png"], "did you mean lenet"),
        (["missing.ckpt", "saliency", "mine/0.png"], "no weights file"),
        (["w.safetensors", "dream", "mine/0.png", "--layr", "x"], "did you mean --layer"),
        (["yolov3", "--weights", "w.safetensors", "saliency", "mine/0.png"], "zoo.LeNet|yolov3|YOLOv3"),
    ],
)
def test_a_wrong_word_is_one_line(weights, pictures, arguments, said, capsys):
    assert main(["explain", *arguments]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert re.search(said, errors[0])
    assert not Path("explanations").exists()
