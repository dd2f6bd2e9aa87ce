"""Workers that start anew, installations without extras, and calls that are going away."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXTRAS = (
    "simplejpeg", "pycocotools", "faster_coco_eval", "trimesh", "manifold3d", "embreex", "av", "gymnasium", "ale_py",
    "pygame", "captum", "huggingface_hub", "onnx", "onnxruntime", "onnxscript", "optuna", "tensorboard", "wandb", "cv2",
    "pycocoevalcap", "torch_fidelity", "pynanoflann",
)  # fmt: skip


def run(script: str, folder: Path) -> str:
    (folder / "script.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "script.py"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=550,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


SPAWNED = """
import multiprocessing
from pathlib import Path

import torch


def tensors(batch):
    if isinstance(batch, torch.Tensor):
        return [batch]
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else []
    return [tensor for part in parts for tensor in tensors(part)]


def batches(build, workers):
    module = build(workers=workers)
    module.prepare_data()
    module.setup("fit")
    module.setup("test")
    loaders = [module.train_dataloader(), module.test_dataloader()]
    return [tensors(batch) for loader in loaders for batch in loader]


def same(build):
    alone, spawned = batches(build, 0), batches(build, 1)
    assert len(alone) == len(spawned) > 0
    for one, other in zip(alone, spawned, strict=True):
        assert len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    import test_faults_data as data
    from functools import partial

    from datamodules import (CaptionedScenesDataModule, ImageFolderDataModule, MovingShapesDataModule, ScenesDataModule,
                             ShapesDataModule)

    data.folder(Path("folder"), {}, "refuse")
    few = {"train_size": 4, "val_size": 2, "test_size": 4, "batch_size": 2}
    kinds = {
        "folder": partial(ImageFolderDataModule, "folder", image_size=8, val_size=2, batch_size=2),
        "objects": partial(ScenesDataModule, root="scenes", image_size=32, cache=False, **few),
        "captions": partial(CaptionedScenesDataModule, root="captions", cache=False, **few),
        "videos": partial(MovingShapesDataModule, root="videos", num_frames=2, size=16,
                          **{**few, "train_size": 8, "val_size": 8, "test_size": 8}),
        "meshes": partial(ShapesDataModule, root="shapes", views=1, size=16, num_points=20, cache=False,
                          **{**few, "train_size": 6, "val_size": 6, "test_size": 6}),
    }
    for name, build in kinds.items():
        same(build)
        print(name, flush=True)
"""


@pytest.mark.faults
def test_workers_that_are_spawned_give_the_same_batches(tmp_path):
    assert run(SPAWNED, tmp_path).split() == ["folder", "objects", "captions", "videos", "meshes"]


WITHOUT = """
import importlib.util, pkgutil, sys


import importlib.metadata
from importlib.machinery import PathFinder

find, distribution = PathFinder.find_spec, importlib.metadata.Distribution.from_name


def find_others(name, path=None, target=None):
    return None if name.split(".")[0] in EXTRAS else find(name, path, target)


def distribution_of_others(name):
    if name.replace("-", "_").lower() in (*EXTRAS, "opencv_python_headless"):
        raise importlib.metadata.PackageNotFoundError(name)
    return distribution(name)


PathFinder.find_spec = find_others
importlib.metadata.Distribution.from_name = distribution_of_others
for name in EXTRAS:
    assert importlib.util.find_spec(name) is None
import datamodules
import zoo

for package in (zoo, datamodules):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if found.name == "datamodules.embedded.grid_world":  # a class of gymnasium's, imported when it is asked for
            try:
                importlib.import_module(found.name)
            except ModuleNotFoundError as error:
                assert "pip install 'zoo[control]'" in str(error)
            else:
                raise AssertionError("gymnasium is not hidden")
        elif not found.name.endswith("__main__"):
            importlib.import_module(found.name)
for name in zoo.ARCHITECTURES:
    getattr(zoo, name)
for name in datamodules.__all__:
    getattr(datamodules, name)
from zoo.cli import main

small = ["--data.init_args.image_size", "8", "--model.init_args.image_size", "8"]
assert main(["list"]) == 0
assert main(["show", "lenet"]) == 0
assert main(["check-data", "lenet/embedded", *small]) == 0
assert main(["fit", "lenet/embedded", "--trainer.fast_dev_run", "true", *small]) == 0
assert main(["fit", "vae/embedded", "--trainer.fast_dev_run", "true"]) == 0
assert main(["fit", "lenet/embedded", "--trainer.max_epochs", "1", *small]) == 0
assert main(["export", "runs/lenet/embedded/version_0/checkpoints/last.ckpt", "--format", "safetensors"]) == 0
for command in (
    ["fit", "dqn/embedded", "--trainer.fast_dev_run", "true"],
    ["fit", "frame_fusion/embedded", "--trainer.fast_dev_run", "true"],
    ["fit", "pix2mesh/embedded", "--trainer.fast_dev_run", "true"],
    ["search", "lenet/embedded", "--over", "model.init_args.label_smoothing=0,0.1", "--method", "tpe"],
    ["fit", "lenet/embedded", "--config", "wandb_offline", "--trainer.fast_dev_run", "false", *small],
):
    print("status", main(command), command[1], file=sys.stderr)
"""


@pytest.mark.faults
def test_without_any_optional_package_everything_imports_and_what_needs_none_works(tmp_path):
    (tmp_path / "script.py").write_text(WITHOUT.replace("EXTRAS", repr(EXTRAS)))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "script.py"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=550,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "Traceback" not in ended.stderr
    for extra in ("control", "video", "mesh", "search"):
        assert f"pip install 'zoo[{extra}]'" in ended.stderr, ended.stderr
    assert ended.stderr.count("status 2") >= 4, ended.stderr


@pytest.mark.parametrize("module", ["zoo.running.command", "datamodules.mnist"])
@pytest.mark.parametrize("kind", [DeprecationWarning, FutureWarning])
def test_calls_of_ours_that_are_going_away_are_errors(module, kind):
    with pytest.raises(kind, match="is going away"):
        warnings.warn_explicit("it is going away", kind, f"{module}.py", 1, module=module)
    warnings.warn_explicit("it is going away", kind, "other.py", 1, module="lightning.pytorch")
