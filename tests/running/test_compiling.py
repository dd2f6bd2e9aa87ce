"""The compiled backbone: the same training, the same names, and nothing left behind."""

import shutil

import pytest
import torch
from lightning import LightningModule, Trainer, seed_everything
from torch._dynamo.utils import counters

from datamodules import DigitsDataModule
from zoo import GoogLeNet, LeNet
from zoo.running.averaging import EMA
from zoo.running.compiling import Compile
from zoo.running.starting import prepare


def trained(callbacks, tmp_path, model=LeNet):
    seed_everything(0)
    network = model(image_size=28) if model is LeNet else model(image_size=32)
    seed_everything(0)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=3,
        limit_val_batches=2,
        logger=False,
        callbacks=callbacks,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    side, channels = network.example_input_array.shape[-1], network.example_input_array.shape[1]
    trainer.fit(network, DigitsDataModule(image_size=side, channels=channels, batch_size=16, eval_batch_size=60))
    return network


@pytest.fixture(autouse=True)
def forgotten():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("model", [LeNet, pytest.param(GoogLeNet, marks=pytest.mark.slow)])
def test_a_compiled_run_gives_the_weights_of_a_plain_one(model, tmp_path):
    plain = trained([], tmp_path, model).state_dict()
    assert not counters["frames"]
    compiled = trained([Compile(backend="eager")], tmp_path, model)
    assert counters["frames"]["ok"] >= 2  # training and validation
    assert compiled.state_dict().keys() == plain.keys()
    for name, value in compiled.state_dict().items():
        torch.testing.assert_close(value, plain[name], msg=name)
    assert compiled.backbone._compiled_call_impl is None


def test_it_goes_with_an_average_of_the_weights(tmp_path):
    plain = trained([EMA(decay=0.5)], tmp_path).state_dict()
    both = trained([Compile(backend="eager"), EMA(decay=0.5)], tmp_path).state_dict()
    for name, value in both.items():
        torch.testing.assert_close(value, plain[name], msg=name)


def test_the_overlay_asks_for_cuda_graphs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    callbacks = prepare("fit", "lenet/embedded", ["--config", "compile"]).trainer.callbacks
    (compiling,) = [callback for callback in callbacks if isinstance(callback, Compile)]
    assert (compiling.mode, compiling.backend, compiling.dynamic) == ("reduce-overhead", "inductor", False)


def test_a_module_without_a_backbone_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Compile needs a module with a `backbone`: LightningModule has none"):
        Compile().setup(Trainer(logger=False, accelerator="cpu"), LightningModule(), "fit")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductors_code_trains_alike(tmp_path):
    plain = trained([], tmp_path).state_dict()
    for name, value in trained([Compile()], tmp_path).state_dict().items():
        torch.testing.assert_close(value, plain[name], atol=1e-5, rtol=1e-3, msg=name)
