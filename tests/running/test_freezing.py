"""Freezing a backbone: nothing of it moves while it is frozen, and a resumed run trains what an unbroken one does."""

import copy
from pathlib import Path

import pytest
import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.nn import functional as F

import datamodules
from datamodules.sampling import TensorLoader, TrainingBatches
from zoo import LeNet
from zoo.running.checkpoint import SafeCheckpointIO, checkpoint_callbacks
from zoo.running.freezing import FreezeBackbone
from zoo.running.optimizing import EffectiveBatch, LinearScaling, configure_optimizers
from zoo.running.resume import ExactResume
from zoo.running.schedules import Cosine

EPOCHS, BATCHES = 4, 3
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Tiny(LightningModule):
    """A batch norm, a dropout and a weight that nobody trains, in front of a linear head."""

    def __init__(self, scheduler=Cosine):
        super().__init__()
        self.scheduler = scheduler
        self.optimizer = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01)
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4))
        self.backbone[4].bias.requires_grad_(False)
        self.head = nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return configure_optimizers(self, self.optimizer, self.scheduler)


def loader():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(8 * BATCHES, 6, generator=generator), torch.arange(8 * BATCHES) % 3
    return TensorLoader((images, labels), TrainingBatches(8 * BATCHES, 8, shuffle=False))


def moments(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, model):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


class Watch(Callback):
    """What is trained in each epoch: by its flag, by the optimizer, and by its change; and the rates at each step."""

    def __init__(self):
        self.epochs, self.rates, self.gradients = {}, {}, {}
        self._before = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0 or not self._before:
            self._before = moments(pl_module)
        self.rates[trainer.global_step] = [group["lr"] for group in trainer.optimizers[0].param_groups]

    def on_train_epoch_end(self, trainer, pl_module):
        names = {id(p): name for name, p in pl_module.named_parameters()}
        wanted = {name for name, p in pl_module.named_parameters() if p.requires_grad}
        held = {names[id(p)] for group in trainer.optimizers[0].param_groups for p in group["params"]}
        self.epochs[trainer.current_epoch] = (wanted, held, changed(self._before, pl_module))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients[trainer.global_step] = {n for n, p in pl_module.named_parameters() if p.grad is not None}


def fit(freeze, callbacks=(), ckpt_path=None, model=None, epochs=EPOCHS, **options):
    seed_everything(1, verbose=False)
    model = Tiny() if model is None else model
    options = {"enable_checkpointing": False} | options
    trainer = Trainer(
        **QUIET, max_epochs=epochs, callbacks=[freeze, ExactResume(), *callbacks], plugins=[SafeCheckpointIO()],
        accelerator="cpu", **options,
    )  # fmt: skip
    trainer.fit(model, loader(), ckpt_path=ckpt_path)
    return model, trainer


BACKBONE = {"backbone.0.weight", "backbone.0.bias", "backbone.1.weight", "backbone.1.bias", "backbone.4.weight"}
BUFFERS = {"backbone.1.running_mean", "backbone.1.running_var", "backbone.1.num_batches_tracked"}
HEAD = {"head.weight", "head.bias"}


def test_nothing_of_a_frozen_backbone_moves_and_the_head_does():
    model = Tiny()
    before = moments(model)
    watch = Watch()
    fit(FreezeBackbone(), [watch], model=model, epochs=2)
    assert changed(before, model) == HEAD
    assert watch.epochs == {0: (HEAD, HEAD, HEAD), 1: (HEAD, HEAD, HEAD)}
    assert all(names == HEAD for names in watch.gradients.values()), "a backward pass through the backbone"


class CallTrain(Callback):
    """Calls ``model.train()`` behind the freezing's back, as people do, and compares the features of both modes."""

    def __init__(self):
        self.same = []

    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.train()

    def on_before_backward(self, trainer, pl_module, loss):
        assert pl_module.head.training
        images = next(iter(loader()))[0]
        features = pl_module.backbone(images)
        assert features.abs().sum() > 0
        self.same.append(torch.equal(copy.deepcopy(pl_module.backbone).eval()(images), features))


def test_frozen_features_in_training_are_those_of_evaluation():
    compare = CallTrain()
    model, _ = fit(FreezeBackbone(), [compare], epochs=2)
    assert compare.same == [True] * 2 * BATCHES
    assert not any(model.state_dict()["backbone.1.running_mean"])
    compare = CallTrain()
    fit(FreezeBackbone(until_epoch=0), [compare], epochs=1)
    assert compare.same == [False] * BATCHES, "the comparison shows nothing"


def test_released_it_trains_at_a_tenth_of_the_heads_rate_at_every_step():
    watch = Watch()
    model, _ = fit(FreezeBackbone(until_epoch=2), [watch])
    assert [sorted(watch.epochs[epoch][2]) for epoch in range(EPOCHS)] == [sorted(HEAD)] * 2 + [
        sorted(HEAD | BACKBONE | BUFFERS)
    ] * 2
    assert all(held == HEAD | BACKBONE for _, held, _ in watch.epochs.values())
    steps = EPOCHS * BATCHES
    expected = [0.1 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * t / steps)).item()) for t in range(steps)]
    for step, (of_backbone, of_head) in watch.rates.items():
        assert of_head == pytest.approx(expected[step])
        assert of_backbone == pytest.approx(0.1 * expected[step])
    assert not model.backbone[4].bias.requires_grad, "it was nobody's to train"
    assert all(module.training for module in model.modules())


def test_the_release_is_a_plain_run_from_there_on():
    """Against torch alone: the head for one epoch on constant features, then two groups."""
    model, _ = fit(FreezeBackbone(until_epoch=1, ratio=0.5), model=plain(), epochs=3)
    other = plain()
    groups = [{"params": [p for p in other.backbone.parameters() if p.requires_grad], "lr": 0.05}]
    groups.append({"params": other.head.parameters()})
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01)
    for epoch in range(3):
        other.backbone.train(epoch >= 1)
        for images, labels in loader():
            with torch.set_grad_enabled(epoch >= 1):
                features = other.backbone(images)
            F.cross_entropy(other.head(features), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, value in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def plain():
    """Without dropout and schedule, always with the same weights."""
    torch.manual_seed(5)
    model = Tiny(scheduler=None)
    model.backbone[3] = nn.Identity()
    return model


class StopAfter(Callback):
    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.steps:
            trainer._signal_connector.received_sigterm = True


@pytest.mark.parametrize("steps", range(1, EPOCHS * BATCHES))
def test_interrupted_anywhere_around_the_release_and_resumed_it_is_the_same_run(tmp_path, steps):
    watch = Watch()
    straight, _ = fit(FreezeBackbone(until_epoch=2), [watch])
    keep = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    with pytest.raises(SIGTERMException):
        fit(FreezeBackbone(until_epoch=2), [*checkpoint_callbacks(None, "min"), StopAfter(steps)], **keep)
    again = Watch()
    resumed, _ = fit(FreezeBackbone(until_epoch=2), [again], tmp_path / "checkpoints" / "last.ckpt")
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert again.rates == {step: rate for step, rate in watch.rates.items() if step >= steps}
    assert again.gradients == {step: names for step, names in watch.gradients.items() if step >= steps}
    whole = {epoch: sets for epoch, sets in again.epochs.items() if epoch * BATCHES >= steps}
    assert whole == {epoch: sets for epoch, sets in watch.epochs.items() if epoch * BATCHES >= steps}


@pytest.mark.parametrize("epoch", range(EPOCHS - 1))
def test_resumed_from_the_end_of_any_epoch_it_is_the_same_run(tmp_path, epoch):
    watch = Watch()
    straight, _ = fit(FreezeBackbone(until_epoch=2), [watch])

    class Keep(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == epoch:
                trainer.save_checkpoint(tmp_path / "epoch.ckpt")

    fit(FreezeBackbone(until_epoch=2), [Keep()])
    again = Watch()
    resumed, _ = fit(FreezeBackbone(until_epoch=2), [again], tmp_path / "epoch.ckpt")
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert {e: s for e, s in again.epochs.items() if e > epoch} == {e: s for e, s in watch.epochs.items() if e > epoch}


class Replicas(Callback):
    """Every process's weights, and whether the wrapper that was made before the release is gone."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), self.folder / f"{trainer.global_rank}.pt")


def test_two_processes_release_together_and_train_as_one_does(tmp_path):
    """Without a new DDP wrapper each process would go its own way from the release on."""
    states = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        seed_everything(0, verbose=False)
        data = datamodules.DigitsDataModule(image_size=8, batch_size=48)
        model = LeNet(image_size=8, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), scheduler=Cosine)
        start = moments(model)
        trainer = Trainer(
            **QUIET, accelerator="cpu", devices=devices, strategy="ddp_fork" if devices > 1 else "auto", max_epochs=2,
            limit_train_batches=8, enable_checkpointing=False,
            callbacks=[FreezeBackbone(until_epoch=1), Replicas(folder)],
        )  # fmt: skip
        trainer.fit(model, data)
        states += [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))]
    one, first, second = states
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(value, start[name], rtol=0, atol=1e-5), name


def test_linear_scaling_scales_both_rates():
    class World:
        world_size = 4
        datamodule = None

    model = Tiny()
    callback = FreezeBackbone(until_epoch=1)
    trainer = Trainer(**QUIET, enable_checkpointing=False, accelerator="cpu", max_epochs=2, callbacks=[callback])
    LinearScaling(warmup_steps=1).setup(World, model, "fit")
    trainer.fit(model, loader())
    assert [group["initial_lr"] for group in trainer.optimizers[0].param_groups] == pytest.approx([0.04, 0.4])


def test_what_is_trained_is_said(caplog):
    with caplog.at_level("INFO"):
        fit(FreezeBackbone(until_epoch=1), [EffectiveBatch()], epochs=2)
    lines = [record.message for record in caplog.records]
    expected = "parameters: 15 trained, 108 frozen (backbone 0 trained, 108 frozen; head 15 trained, 0 frozen)"
    assert [line for line in lines if line.startswith("parameters:")] == [expected]
    assert "the backbone is trained after 1 epochs, at 0.1 of the rate" in lines
    assert "the backbone is trained from here on, at 0.1 of the rate" in lines


def test_afterwards_the_module_is_as_it_was():
    model, _ = fit(FreezeBackbone(), epochs=1)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == HEAD | BACKBONE
    assert all(module.training for module in model.modules())


def test_until_epoch_0_is_a_tenth_of_the_rate_from_the_start():
    watch = Watch()
    fit(FreezeBackbone(until_epoch=0), [watch], epochs=1)
    assert watch.epochs[0] == (HEAD | BACKBONE, HEAD | BACKBONE, HEAD | BACKBONE | BUFFERS)
    assert watch.rates[0] == pytest.approx([0.01, 0.1])


def test_a_module_without_a_backbone_is_refused():
    model = Tiny()
    model.features = model.backbone
    del model.backbone
    with pytest.raises(ValueError, match="`backbone`: Tiny has none"):
        fit(FreezeBackbone(), model=model)


def test_an_optimizer_without_a_group_for_the_backbone_is_refused():
    class Own(Tiny):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="no group for the backbone"):
        fit(FreezeBackbone(until_epoch=1), model=Own())


@pytest.mark.parametrize(("arguments", "message"), [({"until_epoch": -1}, "until_epoch=-1"), ({"ratio": 0}, "ratio=0")])
def test_a_wrong_number_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        FreezeBackbone(**arguments)


def test_a_backbone_that_is_never_trained_has_nothing_to_be_released():
    model = LeNet(image_size=12)
    model.backbone.requires_grad_(False)
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, callbacks=[FreezeBackbone(until_epoch=1)])
    with pytest.raises(ValueError, match=r"FreezeBackbone\(until_epoch=1\) has nothing to release: no parameter"):
        trainer.fit(model, datamodules.DigitsDataModule(image_size=12))
