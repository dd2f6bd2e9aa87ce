from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader

import datamodules
import zoo
from zoo.dqn import (
    bellman_errors,
    bellman_loss,
    bellman_targets,
    copy_into,
    epsilon,
    nature_network,
    vector_network,
)
from zoo.running.nonfinite import NonFiniteLossError, StopOnNonFiniteLoss
from zoo.running.schedules import Cosine


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


# Networks


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        (lambda: vector_network(4, 2, (120, 84)), 10_934),  # CleanRL's
        (lambda: vector_network(4, 2), 67_586),  # Stable-Baselines3's
        (lambda: vector_network(16, 4, ()), 68),
        (lambda: nature_network(4), 1_686_180),
        (lambda: nature_network(18), 1_693_362),
        (lambda: nature_network(4, dueling=True), 3_292_837),
    ],
)
def test_networks_have_the_published_number_of_parameters(network, parameters):
    assert count(network()) == parameters


def test_the_vector_network_is_the_layers_in_a_row():
    network = vector_network(3, 2, (5, 4)).double()
    obs = torch.randn(7, 3, dtype=torch.float64)
    w1, b1, w2, b2, w3, b3 = network.parameters()
    hidden = (obs @ w1.T + b1).clamp_min(0)
    expected = (hidden @ w2.T + b2).clamp_min(0) @ w3.T + b3
    torch.testing.assert_close(network(obs), expected)


def test_dueling_values_have_the_state_value_as_their_mean():
    network = vector_network(3, 4, (8, 8), dueling=True).double()
    obs = torch.randn(5, 3, dtype=torch.float64)
    features = network.trunk(obs)
    advantage, value = network.values(features), network.state_value(features)
    torch.testing.assert_close(network(obs).mean(1, keepdim=True), value)
    torch.testing.assert_close(network(obs) - value, advantage - advantage.mean(1, keepdim=True))


def test_bytes_are_the_same_as_their_share_of_255():
    network = nature_network(6)
    pixels = torch.randint(256, (2, 4, 84, 84), dtype=torch.uint8)
    values = network(pixels)
    assert values.shape == (2, 6)
    torch.testing.assert_close(values, network(pixels.float() / 255))


def test_too_few_pixels_are_refused():
    assert nature_network(2, frames=1, side=36)(torch.rand(1, 1, 36, 36)).shape == (1, 2)
    with pytest.raises(ValueError, match="at least 36"):
        nature_network(2, side=35)


def test_a_target_network_is_copied_or_moved_part_of_the_way():
    first, second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    second.weight.data.fill_(5)
    second.num_batches_tracked += 7
    copy_into(first, second, 0.25)
    assert first.weight.tolist() == [2, 2, 2]
    assert first.num_batches_tracked == 7
    copy_into(first, second)
    assert first.weight.tolist() == [5, 5, 5]
    second.weight.data.fill_(9)
    assert first.weight.tolist() == [5, 5, 5]


# Targets and losses

REWARD = torch.tensor([1.0, 2, 3], dtype=torch.float64)
TERMINATED = torch.tensor([False, True, False])
DISCOUNT = torch.tensor([0.9, 0.81, 0.729], dtype=torch.float64)
NEXT = torch.tensor([[1.0, 5], [7, 3], [-2, -4]], dtype=torch.float64)
ONLINE = torch.tensor([[9.0, 0], [0, 9], [0, 9]], dtype=torch.float64)


def test_targets_by_hand():
    found = bellman_targets(REWARD, TERMINATED, DISCOUNT, NEXT)
    assert found.tolist() == pytest.approx([1 + 0.9 * 5, 2, 3 - 0.729 * 2], abs=1e-12)


def test_double_targets_by_hand():
    found = bellman_targets(REWARD, TERMINATED, DISCOUNT, NEXT, ONLINE)
    assert found.tolist() == pytest.approx([1 + 0.9 * 1, 2, 3 - 0.729 * 4], abs=1e-12)


def test_what_follows_an_end_does_not_count_whatever_it_is():
    values = NEXT.clone()
    values[1] = torch.tensor([torch.inf, torch.nan])
    assert bellman_targets(REWARD, TERMINATED, DISCOUNT, values)[1] == 2


def test_targets_have_no_gradient():
    online = ONLINE.clone().requires_grad_()
    assert not bellman_targets(REWARD, TERMINATED, DISCOUNT, online, online).requires_grad
    values = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    bellman_loss(values, torch.tensor([0, 1, 1]), (online * 2).sum(1)).backward()
    assert online.grad is None
    assert values.grad is not None


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss", ["huber", "squared"])
def test_losses_and_gradients_are_those_of_the_formula(loss, weighted):
    generator = torch.Generator().manual_seed(0)
    values = (3 * torch.randn(50, 4, generator=generator, dtype=torch.float64)).requires_grad_()
    action = torch.randint(4, (50,), generator=generator)
    target = torch.randn(50, generator=generator, dtype=torch.float64)
    weight = torch.rand(50, generator=generator, dtype=torch.float64) if weighted else None
    found = bellman_loss(values, action, target, weight, loss)
    found.backward()
    total, gradient = 0.0, np.zeros((50, 4))
    for i in range(50):
        error = values[i, action[i]].item() - target[i].item()
        factor = weight[i].item() if weighted else 1.0
        if loss == "squared":
            total, slope = total + factor * error**2, 2 * error
        else:
            total += factor * (error**2 / 2 if abs(error) < 1 else abs(error) - 0.5)
            slope = min(max(error, -1), 1)
        gradient[i, action[i]] = factor * slope / 50
    assert found.item() == pytest.approx(total / 50, abs=1e-12)
    np.testing.assert_allclose(values.grad.numpy(), gradient, atol=1e-12)


def test_errors_are_value_less_target():
    errors = bellman_errors(NEXT, torch.tensor([1, 0, 0]), REWARD)
    assert errors.tolist() == [4, 5, -5]


def test_tensors_that_would_be_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"target \(N,\) are wanted: got \(3, 2\) and \(3, 1\)"):
        bellman_loss(NEXT, torch.zeros(3, dtype=torch.int64), REWARD[:, None])
    with pytest.raises(ValueError, match="reward"):
        bellman_targets(REWARD[:, None], TERMINATED, DISCOUNT, NEXT)
    with pytest.raises(ValueError, match="weight"):
        bellman_loss(NEXT, torch.zeros(3, dtype=torch.int64), REWARD, torch.ones(1))
    with pytest.raises(ValueError, match="loss='l1'"):
        bellman_loss(NEXT, torch.zeros(3, dtype=torch.int64), REWARD, loss="l1")


def test_epsilon_is_the_straight_line():
    found = [epsilon(step, 1.0, 0.04, 8000) for step in (0, 1, 2000, 7999, 8000, 10**9)]
    assert found == pytest.approx([1, 1 - 0.96 / 8000, 0.76, 0.04 + 0.96 / 8000, 0.04, 0.04], abs=1e-12)
    assert epsilon(0, 1.0, 0.1, 0) == 0.1


# The grid world


@pytest.mark.parametrize(("double", "max_steps"), [(False, 100), (True, 100), (True, 2)])
def test_a_table_trained_by_the_loss_comes_to_the_best_values(double, max_steps):
    gymnasium = pytest.importorskip("gymnasium")
    from datamodules.embedded.grid_world import GridWorld, value_iteration
    from datamodules.environments import Collector
    from datamodules.replay import ReplayBuffer

    # Where nearly all episodes are truncated the best values are the same: only an end of the world stops them.
    environments = gymnasium.vector.SyncVectorEnv([lambda: GridWorld(max_steps=max_steps)] * 4)
    buffer = ReplayBuffer(6000, (16,), "float32", num_envs=4, discount=0.9)
    Collector(environments).collect(buffer, 3000, lambda obs: np.zeros(4, int), epsilon=1.0)
    table = nn.Linear(16, 4, bias=False)  # of one-hot cells: each weight is a Q(s, a)
    optimizer = torch.optim.SGD(table.parameters(), lr=8.0)
    for _ in range(800):
        batch = buffer.sample(64)
        next_values = table(batch["next_obs"])  # the table is its own target: the tabular rule
        online = next_values if double else None
        target = bellman_targets(batch["reward"], batch["terminated"], batch["discount"], next_values, online)
        loss = bellman_loss(table(batch["obs"]), batch["action"], target, batch["weight"], "squared")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    best = value_iteration(GridWorld().model(), 0.9)
    np.testing.assert_allclose(table.weight.detach().T[1:-1], best[1:-1], atol=1e-3)


# The module


def transitions(count=6, **more):
    generator = torch.Generator().manual_seed(0)
    return {
        "obs": torch.randn(count, 4, generator=generator),
        "next_obs": torch.randn(count, 4, generator=generator),
        "action": torch.randint(2, (count,), generator=generator),
        "reward": torch.randn(count, generator=generator),
        "terminated": torch.arange(count) % 3 == 0,
    } | more


@pytest.mark.parametrize("dueling", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_the_loss_of_the_module_is_that_of_its_parts(double, dueling):
    model = zoo.DQN(hidden=[8, 8], double=double, dueling=dueling, discount=0.7, loss="squared")
    torch.nn.init.normal_(model.target_network.values[0].weight)  # else both networks choose alike
    for discount in (None, torch.full((6,), 0.343)):
        batch = transitions() if discount is None else transitions(discount=discount)
        found = loss_of(model, batch)
        online, target = model.network(batch["next_obs"]), model.target_network(batch["next_obs"])
        best = target.gather(1, (online if double else target).argmax(1, keepdim=True))[:, 0]
        wanted = batch["reward"] + (0.7 if discount is None else 0.343) * best * ~batch["terminated"]
        values = model.network(batch["obs"]).gather(1, batch["action"][:, None])[:, 0]
        torch.testing.assert_close(found, (values - wanted).square().mean())


class Told:
    def __init__(self):
        self.errors = None

    def update_priorities(self, index, errors):
        self.index, self.errors = index, errors


def loss_of(model, batch, data=None):
    model._trainer = SimpleNamespace(datamodule=data)  # what the loss asks of a trainer
    try:
        return model.loss(batch)
    finally:
        model._trainer = None


def test_prioritised_replay_is_told_the_errors():
    model, data = zoo.DQN(hidden=[8]), Told()
    index, weight = torch.arange(6), torch.linspace(0.1, 1, 6)
    batch = transitions(index=index, weight=weight)
    found = loss_of(model, batch, data)
    assert torch.equal(data.index, index)
    huber = torch.nn.functional.huber_loss(data.errors, torch.zeros(6), reduction="none")
    torch.testing.assert_close(found, (huber * weight).mean())


class Targets(Callback):
    """Whether the target network was the trained one after each step, and what it was made of."""

    def __init__(self):
        self.changed = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = pl_module.target_network.values[0].weight.clone()

    def on_before_backward(self, trainer, pl_module, loss):
        self.changed.append(not torch.equal(self.before, pl_module.target_network.values[0].weight))


def test_the_target_network_is_copied_every_so_many_steps_and_never_trained():
    model, targets = zoo.DQN(hidden=[8], target_every=3), Targets()
    options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    loader = DataLoader([transitions()] * 8, batch_size=None)
    Trainer(**options, max_epochs=1, enable_model_summary=False, callbacks=[targets]).fit(model, loader)
    assert targets.changed == [False, False, False, True, False, False, True, False]
    assert not any(p.requires_grad for p in model.target_network.parameters())
    made = zoo.DQN(hidden=[8])
    torch.testing.assert_close(made.target_network.state_dict(), made.network.state_dict())


def test_epsilon_of_the_module_is_by_steps_in_the_environments():
    model = zoo.DQN(epsilon_start=0.8, epsilon_end=0.2, epsilon_steps=100)
    assert [model.exploration(step) for step in (0, 50, 100, 10**6)] == pytest.approx([0.8, 0.5, 0.2, 0.2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_every": 0}, "target_every=0 must be at least 1"),
        ({"target_share": 0.0}, r"target_share=0.0 in \(0, 1\]"),
        ({"epsilon_end": 2.0}, "epsilon_end=2.0"),
        ({"loss": "l1"}, "loss='l1' must be 'huber' or 'squared'"),
        ({"updates_per_step": 0}, "updates_per_step=0 must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        zoo.DQN(**arguments)


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_batch():
    model = zoo.DQN(hidden=[8])
    broken = transitions(reward=torch.full((6,), torch.nan))
    loader = DataLoader([transitions(), broken], batch_size=None)
    options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(**options, max_epochs=1, enable_model_summary=False, callbacks=[StopOnNonFiniteLoss()])
    with pytest.raises(NonFiniteLossError, match="epoch 0, batch 1"):
        trainer.fit(model, loader)


class Rates(Callback):
    """The learning rate at each optimizer step."""

    def __init__(self):
        self.rates = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


class SavedAt(Callback):
    """A checkpoint in the middle of an epoch."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def trained(updates_per_step, max_steps=-1, callbacks=(), checkpoint=None):
    """A short run on CartPole: its trainer, its network's weights and the rates of its updates."""
    torch.manual_seed(0)
    model = zoo.DQN(hidden=[16], target_every=5, updates_per_step=updates_per_step, scheduler=Cosine)
    data = datamodules.GymDataModule(
        num_envs=2, capacity=500, batch_size=8, learning_starts=40, collect_steps=16, updates=12, epoch_steps=48,
        updates_per_step=updates_per_step, eval_envs=2, val_episodes=2, seed=0,
    )  # fmt: skip
    rates = Rates()
    trainer = Trainer(
        max_epochs=2, max_steps=max_steps, gradient_clip_val=0.05, callbacks=[rates, *callbacks],
        limit_val_batches=0, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=False)
    return trainer, model.state_dict(), rates.rates


@pytest.mark.parametrize("updates_per_step", [4, 12])
def test_several_updates_in_a_training_step_are_as_many_steps_bit_for_bit(updates_per_step):
    one, expected, expected_rates = trained(1)
    several, found, rates = trained(updates_per_step)
    assert one.global_step == several.global_step == len(rates) == 72
    assert several.num_training_batches == 36 // updates_per_step
    assert rates == expected_rates
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_of_so_many_updates_ends_within_a_training_step():
    one, expected, expected_rates = trained(1, max_steps=20)
    several, found, rates = trained(6, max_steps=20)
    assert one.global_step == several.global_step == 20
    assert rates == expected_rates
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_of_several_updates_a_step_goes_on_where_it_was(tmp_path):
    path = tmp_path / "middle.ckpt"
    _, expected, expected_rates = trained(4, callbacks=[SavedAt(16, path)])
    _, found, rates = trained(4, checkpoint=path)
    assert rates == expected_rates[16:]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_batches_that_do_not_fit_the_updates_and_accumulation_are_refused():
    options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    loader = DataLoader([transitions()], batch_size=None)
    with pytest.raises(ValueError, match=r"must hold rewards \(2, N\): got \(6,\). Set updates_per_step of the data"):
        Trainer(**options, max_steps=1).fit(zoo.DQN(hidden=[8], updates_per_step=2), loader)
    with pytest.raises(ValueError, match="accumulate_grad_batches"):
        Trainer(**options, max_steps=1, accumulate_grad_batches=2).fit(zoo.DQN(updates_per_step=2), loader)


def test_a_loss_without_a_trainer_has_nobody_to_tell_its_errors():
    assert zoo.DQN(hidden=[8]).loss(transitions(index=torch.arange(6), weight=torch.ones(6))).isfinite()


@pytest.mark.slow
def test_two_processes_play_the_same_episodes_as_one():
    pytest.importorskip("gymnasium")
    from datamodules import GymDataModule

    found = []
    torch.manual_seed(0)
    model = zoo.DQN()
    for strategy, devices in (("auto", 1), ("ddp_fork", 2)):
        data = GymDataModule(test_episodes=7, eval_envs=3)
        options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        trainer = Trainer(**options, accelerator="cpu", strategy=strategy, devices=devices)
        found.append({k: float(v) for k, v in trainer.test(model, data, verbose=False)[0].items()})
    assert found[0] == found[1]
    assert found[0]["test/episodes"] == 7


def test_experience_of_another_world_is_refused():
    data = datamodules.GymDataModule("CartPole-v1", num_envs=2, capacity=100)
    data.setup("fit")
    state = data.state_dict()
    same = datamodules.GymDataModule("CartPole-v1", num_envs=2, capacity=100)
    same.setup("fit")
    same.load_state_dict(state)
    for other in ({"environment": "GridWorld"}, {"options": {"sutton_barto_reward": True}}):
        data = datamodules.GymDataModule(**{"environment": "CartPole-v1", "num_envs": 2, "capacity": 100} | other)
        data.setup("fit")
        with pytest.raises(ValueError, match=r"has the experience of CartPole-v1 .*start anew"):
            data.load_state_dict(state)
