"""What cannot be exported is refused before anything is written."""

from pathlib import Path

import pytest
import torch

import zoo
from zoo.cli import main

DETECTORS = {
    "FasterRCNN": {"network": "squeezenet1_0", "min_size": 64},
    "SingleStageDetector": {"image_size": 64, "width": 0.25},
    "YOLOv3": {"tiny": True, "width": 0.125, "image_size": 64},
}


@pytest.mark.parametrize("architecture", DETECTORS)
@pytest.mark.parametrize("file_format", ["onnx", "pt2"])
def test_a_detector_is_refused_in_one_sentence(architecture, file_format, capsys):
    zoo.save(getattr(zoo, architecture)(3, **DETECTORS[architecture]), "w.safetensors")
    assert main(["export", "w.safetensors", "--format", file_format, "--out", "model"]) == 2
    assert capsys.readouterr().err == (
        f"zoo: error: w.safetensors holds a zoo.{architecture}, which cannot be written as {file_format}: torch.export "
        "does not follow a detector, which keeps objects by the images' values; --format safetensors works\n"
    )
    assert [path.name for path in Path().iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("architecture", DETECTORS)
def test_a_detectors_weights_file_gives_the_same_detections(architecture):
    torch.manual_seed(0)
    zoo.save(getattr(zoo, architecture)(3, **DETECTORS[architecture]), "w.safetensors")
    assert main(["export", "w.safetensors", "--format", "safetensors", "--out", "other.safetensors"]) == 0
    images = [torch.rand(3, 50, 70)]
    with torch.no_grad():
        one, other = (zoo.load(file)(images)[0] for file in ("w.safetensors", "other.safetensors"))
    assert len(one["boxes"])
    assert all(torch.equal(one[key], other[key]) for key in one)
