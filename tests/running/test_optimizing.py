"""Schedules in steps, the linear scaling rule against its formula, and the effective batch."""

import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import Callback, Trainer, seed_everything

import datamodules
from zoo import CaptioningLSTM, LeNet
from zoo.running.freezing import FreezeBackbone
from zoo.running.optimizing import EffectiveBatch, LinearScaling, plan, trained_parameters, warm_up
from zoo.running.schedules import Cosine


def rates(schedule, optimizer, steps):
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def sgd(lr):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)


def test_warm_up_rises_from_zero_and_then_follows_a_cosine():
    optimizer = sgd(0.4)
    schedule = warm_up(optimizer, 100, 10, torch.optim.lr_scheduler.CosineAnnealingLR)
    expected = [0.4 * t / 10 for t in range(10)]
    expected += [0.2 * (1 + math.cos(math.pi * t / 90)) for t in range(90)]
    assert rates(schedule, optimizer, 100) == pytest.approx(expected, abs=1e-12)


def test_warm_up_to_a_constant_rate():
    optimizer = sgd(0.4)
    assert rates(warm_up(optimizer, 1000, 4, None), optimizer, 6) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4])


def test_warm_up_of_a_short_run_is_a_tenth_of_it():
    optimizer = sgd(1.0)
    with pytest.warns(UserWarning, match="cut to 5 steps"):
        schedule = warm_up(optimizer, 50, 5000, None)
    assert rates(schedule, optimizer, 7) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1, 1])


def test_a_schedule_with_a_rate_of_its_own_is_refused():
    with pytest.raises(ValueError, match="OneCycleLR"):
        warm_up(sgd(1.0), 100, 10, lambda optimizer, steps: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, steps))


def test_the_default_warm_up_is_the_lectures():
    assert LinearScaling().warmup_steps == 5000


def loader(samples=32, size=28):
    images = torch.rand(samples, 1, size, size, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.arange(samples) % 10), 8)


def test_a_schedule_gets_the_number_of_steps_of_the_run():
    seen = []

    def scheduler(optimizer, steps):
        seen.append(steps)
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=3,
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = LeNet(scheduler=scheduler)
    trainer.fit(model, loader())
    assert seen == [6]
    assert trainer.global_step == 6
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_one_process_is_not_scaled():
    model = LeNet()
    build = model.optimizer
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    LinearScaling().setup(trainer, model, "fit")
    assert model.optimizer is build


def test_k_processes_get_k_times_the_rate_and_batch():
    class World:
        world_size = 4
        datamodule = type("Data", (), {"batch_size": 64})()

    model = LeNet(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    LinearScaling(warmup_steps=10).setup(World, model, "fit")
    optimizer = model.optimizer(list(model.parameters()))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.4)
    assert World.datamodule.batch_size == 256
    assert rates(model.scheduler(optimizer, 1000), optimizer, 12) == pytest.approx(
        [0.04 * t for t in range(10)] + [0.4, 0.4]
    )


@pytest.mark.parametrize("name", ["StepLR", "ExponentialLR", "OneCycleLR"])
def test_a_schedule_that_takes_the_number_of_steps_for_something_else_is_refused(name):
    kind = getattr(torch.optim.lr_scheduler, name)
    more = {"total_steps": 9} if name == "OneCycleLR" else {}
    model = LeNet(scheduler=lambda optimizer, steps: kind(optimizer, steps, **more))
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(ValueError, match=f"{name} takes"):
        trainer.fit(model, loader())


def test_a_schedule_with_numbers_of_its_own_is_taken():
    model = LeNet(scheduler=lambda optimizer, steps: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(model, loader())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 / 16)


def test_fused_and_clipping_under_mixed_precision_is_refused_with_the_way_out():
    trainer = Trainer(
        max_epochs=1,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    with pytest.raises(ValueError, match="fused false"):
        trainer.fit(LeNet(), loader())


def test_scaling_leaves_the_model_as_it_was():
    class World:
        world_size = 2
        datamodule = type("Data", (), {"batch_size": 64})()

    model, scaling = LeNet(), LinearScaling()
    build, schedule = model.optimizer, model.scheduler
    scaling.setup(World, model, "fit")
    scaling.teardown(World, model, "fit")
    assert (model.optimizer, model.scheduler, World.datamodule.batch_size) == (build, schedule, 64)


def test_such_a_schedule_is_refused_behind_a_warm_up_too():
    with pytest.raises(ValueError, match="ExponentialLR takes gamma"):
        warm_up(sgd(1.0), 100, 10, torch.optim.lr_scheduler.ExponentialLR)


class AtStart(Callback):
    """The line about the batch, and the losses that follow."""

    def __init__(self):
        self.line, self.losses = "", []

    def on_train_start(self, trainer, pl_module):
        self.line = plan(trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        mean = trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")
        self.losses.append(float(mean))
        if trainer.is_global_zero:
            Path("seen.json").write_text(json.dumps([self.line, self.losses]))


def lenet(**more):
    seed_everything(0, verbose=False)
    return LeNet(image_size=8, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), **more)


def run(model, data, **options):
    options = {"accelerator": "cpu", "max_epochs": 2, "limit_train_batches": 10, "callbacks": [AtStart()]} | options
    trainer = Trainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options
    )
    trainer.fit(model, data)
    return json.loads(Path("seen.json").read_text())


def digits():
    return datamodules.DigitsDataModule(image_size=8, batch_size=48)


def test_two_processes_and_one_have_the_same_loss_curve():
    """The data module's global batch is what is shared; LeNet has neither batch norm nor dropout."""
    schedule = partial(Cosine, warmup=0.2)
    _, one = run(lenet(scheduler=schedule), digits())
    _, two = run(lenet(scheduler=schedule), digits(), devices=2, strategy="ddp_fork")
    assert one == pytest.approx(two, abs=1e-5)
    assert len(one) == 20
    assert min(one) < one[0] - 0.05, "nothing was learnt"


def test_what_follows_from_the_batch_is_said():
    line, _ = run(lenet(), digits())
    assert line == "global batch 48; 10 steps per epoch; 20 steps; learning rate 0.1"


def test_two_processes_share_the_batch_and_accumulation_multiplies_it():
    model = lenet(scheduler=partial(Cosine, warmup=0.2))
    line, _ = run(model, digits(), devices=2, strategy="ddp_fork", accumulate_grad_batches=3)
    assert line == (
        "global batch 144 = 2 processes × 24 × 3 accumulated; 4 steps per epoch; 8 steps; warm-up 2 steps; "
        "learning rate 0.1"
    )


def test_linear_scalings_batch_rate_and_warm_up_are_said():
    callbacks = [LinearScaling(warmup_steps=2), AtStart()]
    line, _ = run(lenet(), digits(), devices=2, strategy="ddp_fork", callbacks=callbacks, max_epochs=3)
    assert (
        line == "global batch 96 = 2 processes × 48; 10 steps per epoch; 30 steps; warm-up 2 steps; learning rate 0.2"
    )


def test_a_foreign_loader_states_the_batch_of_a_process():
    line, _ = run(lenet(), loader(size=8), max_epochs=-1, max_steps=5, callbacks=[FreezeBackbone(0, 0.5), AtStart()])
    assert line == "global batch 8; 4 steps per epoch; 5 steps; learning rate backbone 0.05, head 0.1"


def test_the_line_is_printed_once(caplog):
    with caplog.at_level("INFO"):
        run(lenet(), digits(), callbacks=[EffectiveBatch(), AtStart()])
    assert [record.message for record in caplog.records if "global batch" in record.message] == [
        "global batch 48; 10 steps per epoch; 20 steps; learning rate 0.1"
    ]


def parameters_said(caplog, model):
    with caplog.at_level("INFO"):
        run(model, digits(), callbacks=[EffectiveBatch(), AtStart()], max_epochs=1)
    return [record.message for record in caplog.records if record.message.startswith("parameters:")]


def test_how_many_parameters_are_trained_is_said_once(caplog):
    model = lenet()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert parameters_said(caplog, model) == [f"parameters: {count:,} trained, 0 frozen"]


def test_parts_are_named_where_something_is_frozen(caplog):
    model = lenet()
    model.backbone.conv1.requires_grad_(False)  # 20 kernels of 5 by 5, and their biases
    assert parameters_said(caplog, model) == [
        "parameters: 130,560 trained, 520 frozen (backbone 125,550 trained, 520 frozen; head 5,010 trained, 0 frozen)"
    ]


def test_a_frozen_encoder_is_said():
    said = trained_parameters(CaptioningLSTM(network="small", frozen_backbone=True))
    assert re.fullmatch(r"parameters: .* \(backbone 0 trained, [\d,]+ frozen; head [\d,]+ trained, 0 frozen\)", said)


def test_a_schedule_needs_a_run_of_known_length():
    with pytest.raises(ValueError, match="of known length"):
        run(lenet(scheduler=Cosine), loader(size=8), max_epochs=-1)
