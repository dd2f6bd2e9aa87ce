"""Every video network on real clips: mixed containers and codecs, and a small labelled set that is learnt by heart."""

import os
from pathlib import Path

import pytest
import torch
from lightning import Trainer, seed_everything
from torch.utils.data import DataLoader

import zoo
from datamodules import VideoFolderDataModule

pytest.importorskip("av")
VIDEOS = Path(os.environ.get("ZOO_DATA", "nowhere")) / "video"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not VIDEOS.is_dir(), reason="needs $ZOO_DATA/video: mini/ with class folders, and clips/"),
]
SMALL = {
    "FrameFusion": {"fusion": "slow", "frames": 8, "image_size": 32},
    "C3D": {"frames": 16, "image_size": 32, "width": 8, "hidden": 64, "dropout": 0.0},
    "CNNLSTM": {"network": "small", "frames": 8, "image_size": 32},
    "I3D": {"network": "small", "frames": 8, "image_size": 32, "kernel_frames": 3, "dropout": 0.0},
    "SlowFast": {"depth": 14, "frames": 8, "alpha": 4, "beta_inv": 2, "width": 16, "image_size": 32, "dropout": 0.0}
    | {"zero_init": False},
}


def adam(parameters):
    return torch.optim.Adam(parameters, lr=2e-3)


@pytest.mark.parametrize("name", SMALL)
def test_it_learns_a_small_labelled_set_by_heart(name):
    seed_everything(0, verbose=False)
    model = getattr(zoo, name)(num_classes=4, optimizer=adam, scheduler=None, **SMALL[name])
    frames = SMALL[name]["frames"]
    data = VideoFolderDataModule(
        str(VIDEOS / "mini"), num_frames=frames, seconds=2.0, size=32, batch_size=19, workers=0, cache=True
    )
    data.setup("fit")
    clips, labels = next(iter(data.train_dataloader()))
    assert len(labels) == 19
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, accelerator="cpu", **quiet)
    trainer.fit(model, DataLoader([(clips, labels)] * 100, batch_size=None))
    assert (model.eval()(clips).argmax(1) == labels).all()


@pytest.mark.parametrize("name", SMALL)
def test_it_says_something_of_every_real_clip(name, tmp_path, monkeypatch, capsys):
    """Wrong as it must be without training; but each of mixed containers, codecs and rates is decoded and answered."""
    from zoo.cli import main

    monkeypatch.chdir(tmp_path)
    model = getattr(zoo, name)(num_classes=4, **SMALL[name])
    zoo.save(model, "model.safetensors")
    assert main(["predict", "model.safetensors", str(VIDEOS / "clips")]) == 0
    said = capsys.readouterr().out
    for path in (VIDEOS / "clips").iterdir():
        assert path.name in said
