"""Write the golden files of a release: ``python tests/golden/make.py`` after the version in ``zoo/__init__.py`` is set.

For each architecture ``index.json`` has the constructor's arguments, the keys, shapes and kinds of its tensors, and
what it answers to a fixed input with weights that follow from their keys. Where it can be made small a checkpoint and a
weights file with those weights lie beside it. Those of earlier releases stay as they are: ``test_golden.py`` loads all.
"""

import json
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from torch import Tensor

import zoo

LARGEST = 130_000  # values of a model that is kept as files
LARGEST_ANSWER = 12_000_000  # values of a model that is asked something
SHOWN = 40  # numbers of an answer that are kept
PICTURES = {"num_classes": 3, "image_size": 32}
SMALL: dict[str, dict[str, Any]] = {
    "ActorCritic": {"hidden": (16,)},
    "AlexNet": {"num_classes": 3, "hidden": 16, "image_size": 64},
    "C3D": {**PICTURES, "width": 1, "hidden": 8},
    "CNNLSTM": {**PICTURES, "hidden": 8, "frames": 4},
    "CaptioningLSTM": {"words": ["<NULL>", "<START>", "<END>", "<UNK>", "a", "cat"], "wordvec_dim": 4, "hidden_dim": 8},
    "DCGAN": {"code_size": 4},
    "DQN": {"hidden": (16,)},
    "DeepConvNet": {**PICTURES, "num_filters": (4, 4, 4), "max_pools": (0, 1), "batch_norm": True},
    "FasterRCNN": {"num_classes": 3},
    "FrameFusion": {**PICTURES, "frames": 4, "hidden": 8},
    "FullyConnectedNet": {"num_classes": 3, "image_size": 8, "hidden": (4,)},
    "GAN": {"code_size": 4},
    "GoogLeNet": PICTURES | {"stem": "cifar"},
    "I3D": {**PICTURES, "frames": 8},
    "KNearestNeighbors": {"num_classes": 3, "image_size": 8},
    "KeypointRCNN": {},
    "LeNet": {"num_classes": 3, "image_size": 8},
    "LinearClassifier": {"num_classes": 3, "image_size": 8},
    "MaskRCNN": {"num_classes": 3},
    "Pix2Mesh": {"width": 1, "hidden": 4, "residuals": 1, "image_size": 64},
    "PreActResNet": {**PICTURES, "width": 2, "blocks_per_stage": 1},
    "REINFORCE": {"hidden": (16,)},
    "ResNet": PICTURES | {"stem": "cifar"},
    "SingleStageDetector": {"num_classes": 3},
    "SlowFast": {**PICTURES, "frames": 8, "alpha": 4, "width": 8},
    "SqueezeNet": PICTURES | {"stem": "cifar"},
    "TwoStageDetector": {"num_classes": 3},
    "VAE": {"code_size": 2, "hidden": 4},
    "VGG": PICTURES | {"stem": "cifar", "width": 0.125, "hidden": 16, "depth": 11},
    "YOLOv3": {"num_classes": 3, "tiny": True, "width": 0.03, "image_size": 96},
}  # fmt: skip
# What these select depends on which of nearly equal scores is higher, or is a text: their tensors alone are kept.
WITHOUT_ANSWER = (
    "CaptioningLSTM", "FasterRCNN", "KNearestNeighbors", "KeypointRCNN", "MaskRCNN", "SingleStageDetector",
    "TwoStageDetector", "YOLOv3",
)  # fmt: skip


def planned(name: str, arguments: dict[str, Any]) -> LightningModule:
    """The model without memory for its tensors."""
    with torch.device("meta"):
        model: LightningModule = getattr(zoo, name)(**arguments)
    return model


def build(name: str, arguments: dict[str, Any]) -> LightningModule:
    """The model in evaluation mode, with weights that follow from their keys alone."""
    model: LightningModule = getattr(zoo, name)(**arguments).eval()
    learnt = {key for key, _ in model.named_parameters()}
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key in learnt or key.endswith(("running_mean", "running_var")):
                tensor.copy_(torch.from_numpy(values(key, tuple(tensor.shape))))
    return model


def values(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers that keep signals of the size they have."""
    drawn = np.random.RandomState(zlib.crc32(key.encode()) % 2**31).standard_normal(shape)  # it never changes
    drawn = np.asarray(drawn)  # of no dimension it is a number
    if len(shape) > 1:
        return drawn * (1.4 / np.sqrt(np.prod(shape[1:])))
    return np.asarray(1 + 0.1 * np.abs(drawn) if key.endswith(("running_var", "weight")) else 0.1 * drawn)


def question(model: LightningModule) -> Tensor:
    """Two fixed inputs."""
    shape = (2, *model.example_input_array.shape[1:])  # type: ignore[union-attr,operator]
    return torch.from_numpy(np.random.RandomState(0).random_sample(shape).astype(np.float32))


def answer(model: LightningModule) -> dict[str, Any]:
    """What it says to the question: the first numbers, and two sums that all of them are in."""
    with torch.no_grad():
        said = model(question(model))
    tensors = [part for part in (said if isinstance(said, tuple | list) else [said]) if isinstance(part, Tensor)]
    flat = torch.cat([tensor.double().flatten() for tensor in tensors])
    turning = torch.cos(torch.arange(len(flat), dtype=torch.float64))
    return {
        "shapes": [list(tensor.shape) for tensor in tensors],
        "first": [float(f"{value:.6g}") for value in flat[:SHOWN].tolist()],
        "mean": float(flat.mean()),
        "size": float(flat.abs().mean()),
        "turning": float((flat * turning).mean()),
    }


def tensors(model: LightningModule) -> dict[str, Any]:
    """Keys, shapes and kinds of all tensors."""
    return {key: [str(t.dtype).removeprefix("torch."), *t.shape] for key, t in model.state_dict().items()}


def main(folder: Path) -> None:
    """Write the files of this release."""
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {}
    for name in sorted(zoo.ARCHITECTURES):
        model = planned(name, SMALL[name])
        index[name] = {"arguments": SMALL[name], "tensors": tensors(model)}
        count = sum(tensor.numel() for tensor in model.state_dict().values())
        if count <= LARGEST or (count <= LARGEST_ANSWER and name not in WITHOUT_ANSWER):
            model = build(name, SMALL[name])
        if count <= LARGEST_ANSWER and name not in WITHOUT_ANSWER:
            index[name]["answer"] = answer(model)
        print(name, count, index[name].get("answer", {}).get("size"))
        if count <= LARGEST:
            zoo.save(model, folder / f"{name}.safetensors", recipe="golden", licence="Apache-2.0")
            trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
            trainer.strategy.connect(model)
            trainer.save_checkpoint(folder / f"{name}.ckpt", weights_only=False)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in index.items())
    (folder / "index.json").write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / zoo.__version__)
