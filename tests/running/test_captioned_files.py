"""What a captioner says of pictures of one's own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import resize

import zoo
from zoo.cli import main
from zoo.tasks.captioning import SPECIAL

WORDS = [*SPECIAL, "a", "dog", "cat", "on", "the", "grass", "[bold]"]


@pytest.fixture
def weights():
    """A captioner whose captions differ from picture to picture."""
    torch.manual_seed(0)

    def make(cell="attention"):
        model = zoo.CaptioningLSTM(WORDS, cell, network="small", image_size=32, wordvec_dim=8, hidden_dim=16)
        for parameter in model.head.parameters():
            torch.nn.init.normal_(parameter, std=0.7)
        zoo.save(model, "w.safetensors")
        return "w.safetensors"

    return make


@pytest.fixture
def pictures():
    folder = Path("mine")
    folder.mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (40 + number, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels // 2 + 20 * number).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def by_hand(model, path):
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    with torch.no_grad():
        (said,) = model.predict_step(resize(pixels, [32, 32], antialias=True)[None] / 255, 0)
    return said


@pytest.mark.parametrize("cell", ["rnn", "attention"])
def test_the_command_says_what_the_model_says(cell, weights, pictures, capsys):
    path = weights(cell)
    assert main(["predict", path, "mine", "--batch_size", "4", "--device", "cpu"]) == 1
    output, errors = capsys.readouterr()
    rows = [json.loads(line) for line in Path("predictions/predictions.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == [f"mine/{number}.png" for number in range(6)]
    model = zoo.load(path)
    for row in rows:
        expected = by_hand(model, row["file"])
        assert row["caption"] == expected["caption"]
        assert row["log_probability"] == pytest.approx(expected["log_probability"], abs=1e-4)
        assert row["caption"] in output
    assert "broken.png is left out" in errors
    with Image.open("predictions/predictions.png") as sheet:
        assert len(set(sheet.convert("L").tobytes())) > 20


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--top", "3"], "--top is for classifiers"),
        (["--score_threshold", "0.5"], "--score_threshold is for detectors"),
        (["--test_time_augmentation", "flip"], "--test_time_augmentation is for classifiers"),
    ],
)
def test_options_of_other_tasks_are_refused(option, said, weights, pictures, capsys):
    assert main(["predict", weights(), "mine", *option]) == 2
    assert said in capsys.readouterr().err
    assert not Path("predictions").exists()


@pytest.mark.parametrize("file_format", ["onnx", "pt2"])
def test_a_captioner_is_exported_as_safetensors_alone(file_format, weights, capsys):
    assert main(["export", weights(), "--format", file_format]) == 2
    assert "torch.export does not follow a captioner" in capsys.readouterr().err
