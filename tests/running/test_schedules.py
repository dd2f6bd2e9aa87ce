"""Schedules against torch's own classes and the lecture's formulas, step by step in float64."""

import math

import pytest
import torch
from lightning import LightningModule
from torch.optim import lr_scheduler

from zoo.cli import main
from zoo.running.optimizing import warm_up
from zoo.running.schedules import Constant, Cosine, CosineRestarts, InverseSquareRoot, Linear, OneCycle, Step

STEPS = 200


def sgd(*rates):
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in rates or (0.4,)]
    return torch.optim.SGD(groups, lr=1.0, momentum=0.9)


def rates(schedule, steps=STEPS):
    """The rates of all groups at each of so many steps."""
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in schedule.optimizer.param_groups])
        schedule.optimizer.step()
        schedule.step()
    return torch.tensor(found, dtype=torch.float64)


def same(one, other):
    torch.testing.assert_close(rates(one), rates(other), rtol=1e-12, atol=1e-12)


def test_step_is_torchs():
    same(Step(sgd(), STEPS, [0.3, 0.6, 0.9]), lr_scheduler.MultiStepLR(sgd(), [60, 120, 180]))
    same(Step(sgd(), STEPS, (0.25,), gamma=0.5), lr_scheduler.MultiStepLR(sgd(), [50], 0.5))


def test_cosine_is_torchs():
    same(Cosine(sgd(), STEPS), lr_scheduler.CosineAnnealingLR(sgd(), STEPS))
    same(Cosine(sgd(), STEPS, final=0.1), lr_scheduler.CosineAnnealingLR(sgd(), STEPS, 0.04))


def test_linear_is_torchs():
    same(Linear(sgd(), STEPS), lr_scheduler.PolynomialLR(sgd(), STEPS))
    same(Linear(sgd(), STEPS, final=0.1), lr_scheduler.LinearLR(sgd(), 1.0, 0.1, STEPS))


@pytest.mark.parametrize("steps", [10, 37, 200])
@pytest.mark.parametrize(("anneal", "theirs"), [("cosine", "cos"), ("linear", "linear")])
def test_one_cycle_is_torchs_with_another_end_and_the_same_momentum(anneal, theirs, steps):
    reference = lr_scheduler.OneCycleLR(
        sgd(), 0.4, steps, final_div_factor=400, anneal_strategy=theirs, cycle_momentum=False
    )
    schedule = OneCycle(sgd(), steps, anneal=anneal)
    found = rates(schedule, steps)
    torch.testing.assert_close(found, rates(reference, steps), rtol=1e-12, atol=1e-12)
    assert found[0].item() == pytest.approx(0.4 / 25)
    assert found[-1].item() == pytest.approx(0.4 / 1e4)
    assert schedule.optimizer.param_groups[0]["momentum"] == 0.9
    other = OneCycle(sgd(), steps, peak=0.5, start=0.2, final=0.02)
    reference = lr_scheduler.OneCycleLR(
        sgd(), 0.4, steps, pct_start=0.5, cycle_momentum=False, div_factor=5, final_div_factor=10
    )
    torch.testing.assert_close(rates(other, steps), rates(reference, steps), rtol=1e-12, atol=1e-12)


def test_restarts_are_torchs():
    same(CosineRestarts(sgd(), STEPS, 4), lr_scheduler.CosineAnnealingWarmRestarts(sgd(), 50))


def test_restarts_are_the_papers_formula_where_the_cycles_do_not_divide_the_run():
    """Huang et al. 2017, equation 2, with t from 1; six cycles of 200 steps have 34 and the last 30."""
    length = math.ceil(STEPS / 6)
    expected = [0.4 / 2 * (math.cos(math.pi * ((t - 1) % length) / length) + 1) for t in range(1, STEPS + 1)]
    schedule = CosineRestarts(sgd(), STEPS)
    assert rates(schedule)[:, 0].tolist() == pytest.approx(expected, abs=1e-12)
    assert schedule.ends == [34, 68, 102, 136, 170, 200]


def test_inverse_square_root_is_the_lectures_and_with_a_warm_up_the_papers():
    expected = [0.4 / math.sqrt(max(t, 1)) for t in range(STEPS)]
    assert rates(InverseSquareRoot(sgd(), STEPS))[:, 0].tolist() == pytest.approx(expected, abs=1e-12)
    # Vaswani et al., equation 3: min(t^-0.5, t * w^-1.5), here relative to its peak w^-0.5.
    expected = [0.0] + [0.4 * 20**0.5 * min(t**-0.5, t * 20**-1.5) for t in range(1, STEPS)]
    assert rates(InverseSquareRoot(sgd(), STEPS, warmup=20))[:, 0].tolist() == pytest.approx(expected, abs=1e-12)


RISE = [0.4 * t / 20 for t in range(20)]
FALLS = {
    Constant: lambda t: 1.0,
    Cosine: lambda t: 0.5 * (1 + math.cos(math.pi * (t - 20) / 180)),
    Linear: lambda t: 1 - (t - 20) / 180,
    Step: lambda t: 0.1 ** ((t >= 60) + (t >= 120) + (t >= 180)),
    CosineRestarts: lambda t: 0.5 * (1 + math.cos(math.pi * ((t - 20) % 30) / 30)),
}


@pytest.mark.parametrize("kind", FALLS)
@pytest.mark.parametrize("warmup", [20, 0.1])
def test_the_warm_up_rises_from_zero_and_the_rest_of_the_run_follows(kind, warmup):
    expected = RISE + [0.4 * FALLS[kind](t) for t in range(20, STEPS)]
    schedule = kind(sgd(), STEPS, warmup=warmup)
    assert schedule.warmup == 20
    assert rates(schedule)[:, 0].tolist() == pytest.approx(expected, abs=1e-12)


EVERY = pytest.mark.parametrize("kind", [*FALLS, InverseSquareRoot, OneCycle])


@EVERY
def test_each_group_keeps_its_own_rate(kind):
    found = rates(kind(sgd(0.4, 0.04), STEPS))
    torch.testing.assert_close(found[:, 1], found[:, 0] / 10, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[:, :1], rates(kind(sgd(), STEPS)), rtol=0, atol=0)


@EVERY
@pytest.mark.parametrize("at", [0, 1, 13, 150])
def test_a_restored_schedule_goes_on_exactly_and_as_it_was_made(kind, at, tmp_path):
    whole, first = kind(sgd(), STEPS), kind(sgd(), STEPS)
    expected = rates(whole)
    rates(first, at)
    torch.save([first.state_dict(), first.optimizer.state_dict()], tmp_path / "state.pt")
    state, optimizer = torch.load(tmp_path / "state.pt", weights_only=True)
    second = kind(sgd(), 3 * STEPS)
    second.load_state_dict(state)
    second.optimizer.load_state_dict(optimizer)
    assert torch.equal(rates(second, STEPS - at), expected[at:])


@EVERY
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_a_run_of_hardly_any_steps_has_a_rate(kind, steps):
    found = rates(kind(sgd(), steps), 5)
    assert bool(((found >= 0) & (found <= 0.4)).all())


@pytest.mark.parametrize("kind", [Constant, Cosine, Step])
def test_linear_scalings_warm_up_comes_before_a_schedule_without_one(kind):
    found = rates(warm_up(sgd(), STEPS, 10, kind))[:, 0]
    assert found[:10].tolist() == pytest.approx([0.4 * t / 10 for t in range(10)], abs=1e-12)
    assert found[10:].tolist() == pytest.approx(rates(kind(sgd(), STEPS - 10), STEPS - 10)[:, 0].tolist(), abs=1e-12)


@pytest.mark.parametrize("make", [OneCycle, lambda optimizer, steps: Cosine(optimizer, steps, warmup=0.2)])
def test_a_schedule_with_a_warm_up_of_its_own_gets_no_second_one(make):
    same(warm_up(sgd(0.4, 0.04), STEPS, 10, make), make(sgd(0.4, 0.04), STEPS))


def test_a_warm_up_longer_than_half_the_run_is_cut_and_said():
    with pytest.warns(UserWarning, match="cut from 5000 to 100 steps, half of the run's 200"):
        assert Cosine(sgd(), STEPS, warmup=5000).warmup == 100


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda o: Step(o, STEPS, [30, 60, 90]), "rising shares of the run"),
        (lambda o: Step(o, STEPS, [0.9, 0.5]), "rising shares of the run"),
        (lambda o: Cosine(o, STEPS, warmup=-1), "warmup=-1"),
        (lambda o: OneCycle(o, STEPS, peak=3), "peak=3"),
        (lambda o: CosineRestarts(o, STEPS, 0), "cycles=0"),
    ],
)
def test_a_wrong_argument_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(sgd())


RECIPE = """
model:
  class_path: zoo.LeNet
  init_args:
    image_size: 8
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}
    scheduler: {class_path: zoo.running.schedules.%s}
data:
  class_path: datamodules.DigitsDataModule
  init_args: {image_size: 8, batch_size: 256}
trainer: {max_epochs: 2, logger: false, enable_checkpointing: false, limit_val_batches: 0}
"""


@pytest.mark.parametrize(
    ("named", "last"),
    [
        ("Step, init_args: {milestones: [0.5, 0.75], gamma: 0.2}", 0.1 * 0.04),
        ("Cosine, init_args: {warmup: 0.25}", 0.1 * 0.5 * (1 + math.cos(math.pi * 5 / 6))),
        ("OneCycle, init_args: {peak: 0.25, anneal: linear}", 0.1 * 1e-4),
        ("Constant, init_args: {warmup: 4}", 0.1),
        ("CosineRestarts, init_args: {cycles: 2}", 0.1 * 0.5 * (1 + math.cos(math.pi * 3 / 4))),
    ],
)
def test_a_recipe_names_one_and_it_is_made_for_its_steps(tmp_path, monkeypatch, named, last):
    """Eight steps: the rate of the last one."""
    seen = []
    step = LightningModule.optimizer_step

    def watched(self, epoch, batch_idx, optimizer, *rest):
        seen.append(optimizer.param_groups[0]["lr"])
        return step(self, epoch, batch_idx, optimizer, *rest)

    monkeypatch.setattr(LightningModule, "optimizer_step", watched)
    (tmp_path / "r.yaml").write_text(RECIPE % named)
    assert main(["fit", "r.yaml"]) == 0
    assert len(seen) == 8
    assert seen[-1] == pytest.approx(last, rel=1e-9)


def test_a_misspelt_one_is_suggested(capsys):
    assert main(["fit", "lenet/embedded", "--model.init_args.scheduler", "zoo.running.schedules.Cosin"]) == 2
    assert "did you mean zoo.running.schedules.Cosine" in capsys.readouterr().err
