"""What a network makes meshes of: pictures of one's own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import resize

import zoo
from zoo.cli import main
from zoo.running import mesh_pictures

trimesh = pytest.importorskip("trimesh")
pytest.importorskip("embreex")


@pytest.fixture
def weights():
    """A network whose meshes differ from picture to picture."""
    torch.manual_seed(0)
    model = zoo.Pix2Mesh(width=2, hidden=8, residuals=1, offsets=True, image_size=48)
    for block in model.network.blocks:
        torch.nn.init.normal_(block.places.own.weight, std=0.2)
    zoo.save(model, "w.safetensors")
    return "w.safetensors"


@pytest.fixture
def pictures():
    folder = Path("mine")
    folder.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 64, (40, 60, 4), dtype=np.uint8)
        pixels[..., :3] += np.uint8(90 * number)
        pixels[..., 3] = 255
        pixels[:, :20, 3] = 0
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def by_hand(model, path):
    """On white, made square with ten rows above and below."""
    pixels = torch.from_numpy(np.asarray(Image.open(path)) / np.float32(255))
    opaque = pixels[..., 3:]
    square = torch.ones(60, 60, 3)
    square[10:50] = pixels[..., :3] * opaque + 1 - opaque
    with torch.no_grad():
        return model(resize(square.permute(2, 0, 1), [48, 48], antialias=True)[None])[0]


def test_the_command_writes_the_meshes_that_the_model_makes(weights, pictures, capsys, monkeypatch):
    for name, value in (("SIDE", 40), ("FRAME_SIDE", 40), ("FRAMES", 4)):
        monkeypatch.setattr(mesh_pictures, name, value)
    assert main(["predict", weights, "mine", "--batch_size", "2", "--device", "cpu", "--out", "out"]) == 1
    output, errors = capsys.readouterr()
    assert "broken.png is left out" in errors
    rows = [json.loads(line) for line in Path("out/predictions.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == [f"mine/{number}.png" for number in range(3)]
    model = zoo.load(weights)
    meshes = []
    for row in rows:
        meshes.append(by_hand(model, row["file"]))
        assert [Path(name).suffix for name in row["meshes"]] == [".obj", ".glb"]
        for name in row["meshes"]:
            opened = trimesh.load(Path("out", name), force="mesh", process=False)
            assert np.allclose(opened.vertices, meshes[-1], atol=2e-3)  # pictures of 8 bits were blended
            assert opened.euler_number == 2
        assert row["meshes"][0] in output
    assert not torch.allclose(meshes[0], meshes[1], atol=5e-3), "meshes that are all alike prove nothing"
    for name in ("predictions.png", "predictions.gif"):
        with Image.open(Path("out", name)) as picture:
            assert len(set(picture.convert("L").tobytes())) > 20
        assert name in output
    assert Path("out/predictions.html").read_text().count("data:image/png") == 3


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--top", "3"], "--top is for classifiers"),
        (["--score_threshold", "0.5"], "--score_threshold is for detectors"),
        (["--test_time_augmentation", "flip"], "--test_time_augmentation is for classifiers"),
    ],
)
def test_options_of_other_tasks_are_refused(option, said, weights, pictures, capsys):
    assert main(["predict", weights, "mine", *option]) == 2
    assert f"{said}: {weights} holds a zoo.Pix2Mesh, a model of meshes" in capsys.readouterr().err
