"""Schedules in steps and the linear scaling rule, against their formulas."""

import math

import pytest
import torch
from lightning import Trainer, seed_everything

from zoo import LeNet
from zoo.running.optimizing import LinearScaling, warm_up


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


def loader(samples=32):
    images = torch.rand(samples, 1, 28, 28, generator=torch.Generator().manual_seed(0))
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
