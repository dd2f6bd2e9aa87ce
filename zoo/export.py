"""Export of a trained model: safetensors, ONNX or torch.export, each checked against the model that it came from."""

import json
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning import LightningModule
from torch import Tensor, nn

from zoo.running.checkpoint import replacing
from zoo.tasks.captioning import CaptioningTask
from zoo.tasks.detection import DetectionTask
from zoo.tasks.generation import GenerationTask
from zoo.weights import describe, load, read_weights, save

Format = Literal["safetensors", "onnx", "pt2"]
SUFFIXES: dict[str, str] = {"safetensors": ".safetensors", "onnx": ".onnx", "pt2": ".pt2"}
PARTS = ("network", "backbone", "head", "generator", "decoder")  # what forward runs through
TOLERANCE = 1e-4  # largest difference of any output that is taken for rounding
MOST = 2**31 - 1  # images at once: torch 2.6 refuses a slice of them where there may be 2**63 - 1


class _Network(nn.Module):
    """A model's forward without Lightning around it."""

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        for name in PARTS:
            if hasattr(module, name):
                setattr(self, name, getattr(module, name))
        self.model = [module]  # in a list: not a submodule, so that metrics are not exported

    def forward(self, images: Tensor) -> Any:
        return self.model[0](images)


def export(checkpoint: Path, file_format: Format, out: Path | None = None, licence: str = "") -> Path:
    """Write a model in another format, complete or not at all.

    ONNX and pt2 take images (N, C, H, W) in [0, 1] with any N, or a generator's codes (N, Z), and carry class path,
    arguments and class names. They are for classifiers and unconditional generators: what a detector selects depends
    on the images' values.

    Args:
        checkpoint: A ``.ckpt`` of a run, or a ``.safetensors`` weights file.
        file_format: ``safetensors`` (read back by ``zoo.load``), ``onnx`` or ``pt2``.
        out: The new file; by default beside the checkpoint.
        licence: Licence of the weights, written into safetensors.

    Returns:
        The new file.

    Raises:
        ImportError: The format's library is not installed.
        ValueError: The exported model gives other outputs than the model, or it is a detector or a captioner.
    """
    module = load(checkpoint)
    out = out or checkpoint.with_suffix(SUFFIXES[file_format])
    if file_format == "safetensors":
        _, header = read_weights(checkpoint)
        save(module, out, header.get("recipe", ""), header.get("metrics"), licence or header.get("licence", ""))
        return out
    if isinstance(module, DetectionTask | CaptioningTask):
        what = f"{checkpoint} holds a zoo.{type(module).__name__}, which cannot be written as {file_format}"
        raise ValueError(f"{what}: torch.export does not follow {_what_it_does(module)}; --format safetensors works")
    if isinstance(module, GenerationTask) and module.classes is not None:
        raise ValueError(
            f"{checkpoint} holds a conditional zoo.{type(module).__name__}, which takes a class beside the code and "
            f"cannot be written as {file_format}; --format safetensors works"
        )
    # Two images: torch.export takes a size of one for a constant.
    shape = cast(Tensor, module.example_input_array).shape[1:]
    example = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    with replacing(out) as partial:
        difference = (_write_onnx if file_format == "onnx" else _write_pt2)(module, example, partial)
        if not difference <= TOLERANCE:
            raise ValueError(f"the exported model's outputs differ by {difference:.1e}, more than {TOLERANCE:.0e}")
    return out


def _what_it_does(module: LightningModule) -> str:
    if isinstance(module, CaptioningTask):
        return "a captioner, which stops when its captions have ended"
    return "a detector, which keeps objects by the images' values"


def _write_pt2(module: LightningModule, example: Tensor, path: Path) -> float:
    """Write with torch.export, read back, and return the largest difference of the outputs."""
    batch = torch.export.Dim("batch", max=MOST)
    program = torch.export.export(_Network(module).eval(), (example,), dynamic_shapes=({0: batch},))
    torch.export.save(program, path, extra_files={"zoo.json": json.dumps(describe(module))})
    other = torch.cat([example, example[:1]])
    with torch.no_grad():
        return float((torch.export.load(path).module()(other) - module(other)).abs().max())


def _write_onnx(module: LightningModule, example: Tensor, path: Path) -> float:
    """Write ONNX, run it with onnxruntime, and return the largest difference of the outputs."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx imports it; asked for here to name the extra
    except ImportError as error:
        raise ImportError(f"ONNX export needs {error.name}: pip install 'zoo[export]'") from error
    program = torch.onnx.export(
        _Network(module).eval(),
        (example,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["outputs"],
        dynamic_shapes=({0: torch.export.Dim("batch", max=MOST)},),
    )
    assert program is not None
    program.model.metadata_props.update({key: json.dumps(value) for key, value in describe(module).items()})
    program.save(path, external_data=False)
    other = torch.cat([example, example[:1]])
    (found,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(
        None, {"images": other.numpy()}
    )
    with torch.no_grad():
        return float((torch.from_numpy(found) - module(other)).abs().max())
