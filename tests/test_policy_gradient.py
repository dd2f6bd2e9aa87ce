from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from zoo.policy_gradient import ActorCriticNetwork, actor_critic_loss, episode_returns, policy_loss, returns

# Returns


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


REWARD = column(1, 2, 4, 8, 16)
NEVER = torch.zeros(5, 1, dtype=torch.bool)
SECOND = NEVER.clone()
SECOND[1] = True
VALUES = column(1000, 100, 1000, 1000, 10)


@pytest.mark.parametrize(
    ("terminated", "truncated", "values", "expected"),
    [
        (SECOND, NEVER, None, [1 + 2 / 2, 2, 4 + 8 / 2 + 16 / 4, 8 + 16 / 2, 16]),
        (SECOND, NEVER, VALUES, [1 + 2 / 2, 2, 4 + 8 / 2 + 21 / 4, 8 + 21 / 2, 16 + 10 / 2]),
        (NEVER, SECOND, VALUES, [1 + 52 / 2, 2 + 100 / 2, 4 + 8 / 2 + 21 / 4, 8 + 21 / 2, 16 + 10 / 2]),
        (NEVER, SECOND, None, [1 + 2 / 2, 2, 4 + 8 / 2 + 16 / 4, 8 + 16 / 2, 16]),
        (SECOND, SECOND, VALUES, [1 + 2 / 2, 2, 4 + 8 / 2 + 21 / 4, 8 + 21 / 2, 16 + 10 / 2]),
        (NEVER, NEVER, None, [1 + 1 + 1 + 1 + 1, 2 + 2 + 2 + 2, 4 + 4 + 4, 8 + 8, 16]),
    ],
)
def test_returns_by_hand(terminated, truncated, values, expected):
    # beside an environment in which nothing ends, whose returns must not be touched
    reward, beside = REWARD.repeat(1, 2), torch.cat([terminated, NEVER], 1)
    both = None if values is None else values.repeat(1, 2)
    found = returns(reward, beside, torch.cat([truncated, NEVER], 1), 0.5, both)
    assert found[:, 0].tolist() == expected
    assert found[0, 1] == 5 + (0 if values is None else 10 / 32)


def test_what_an_episode_gave_is_told_to_all_its_steps():
    found = episode_returns(returns(REWARD, SECOND, NEVER, 1.0), SECOND, NEVER)
    assert found[:, 0].tolist() == [3, 3, 28, 28, 28]
    assert torch.equal(found, episode_returns(returns(REWARD, NEVER, SECOND, 1.0), NEVER, SECOND))


# The gradient against that of the expected return, over all that can happen

HORIZON, STATES, ACTIONS, DISCOUNT = 3, 3, 2, 0.9
RNG = np.random.default_rng(0)
CHANCES = torch.from_numpy(RNG.dirichlet(np.ones(STATES), size=(STATES, ACTIONS)))
REWARDS = torch.from_numpy(RNG.normal(size=(STATES, ACTIONS)))


def expected_return(logits):
    """From state 0, by the Bellman equation of the policy."""
    policy, values = logits.softmax(1), torch.zeros(STATES, dtype=torch.float64)
    for _ in range(HORIZON):
        values = (policy * (REWARDS + DISCOUNT * CHANCES @ values)).sum(1)
    return values[0]


def trajectories(logits):
    """(chance, states, actions) of all there are."""
    policy = logits.detach().softmax(1)
    for states in product(range(STATES), repeat=HORIZON - 1):
        for actions in product(range(ACTIONS), repeat=HORIZON):
            path = [0, *states]
            chance = torch.stack([policy[s, a] for s, a in zip(path, actions, strict=True)]).prod()
            for s, a, following in zip(path, actions, path[1:], strict=False):
                chance = chance * CHANCES[s, a, following]
            yield chance, torch.tensor(path), torch.tensor(actions)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("with_baseline", [False, True])
def test_the_mean_gradient_is_that_of_the_expected_return(whole, with_baseline):
    logits = torch.from_numpy(RNG.normal(size=(STATES, ACTIONS))).requires_grad_()
    baseline = torch.tensor([3.0, -2.0, 7.0], dtype=torch.float64)
    ends = torch.zeros(HORIZON, 1, dtype=torch.bool)
    ends[-1] = True
    total, mass = torch.zeros((), dtype=torch.float64), 0.0
    for chance, states, actions in trajectories(logits):
        gains = returns(REWARDS[states, actions][:, None], ends, ~ends & False, DISCOUNT)
        if whole:
            gains = episode_returns(gains, ends, ~ends & False)
        else:
            # seen from the beginning, as the return is
            gains = gains * DISCOUNT ** torch.arange(HORIZON, dtype=torch.float64)[:, None]
        known = baseline[states] if with_baseline else None
        # the loss is a mean over the steps, the lecture's a sum
        total = total + chance * HORIZON * policy_loss(logits[states], actions, gains[:, 0], known)
        mass += chance.item()
    assert mass == pytest.approx(1)
    (found,) = torch.autograd.grad(-total, logits)
    (expected,) = torch.autograd.grad(expected_return(logits), logits)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


# Losses


def test_the_actor_critics_loss_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    logits, values, gains = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((6, 3), (6,), (6,)))
    action = torch.randint(3, (6,), generator=generator)
    expected = 0.0
    for i in range(6):
        chances = np.exp(logits[i].numpy()) / np.exp(logits[i].numpy()).sum()
        advantage = (gains[i] - values[i]).item()
        expected += -np.log(chances[action[i]]) * advantage + 0.5 * advantage**2
        expected += 0.01 * (chances * np.log(chances)).sum()
    assert actor_critic_loss(logits, values, action, gains).item() == pytest.approx(expected / 6, abs=1e-12)


def test_the_policy_does_not_move_the_critic_nor_the_critics_error_the_returns():
    logits, values = torch.randn(4, 2, requires_grad=True), torch.randn(4, requires_grad=True)
    gains = torch.randn(4, requires_grad=True)
    actor_critic_loss(logits, values, torch.tensor([0, 1, 1, 0]), gains).backward()
    torch.testing.assert_close(values.grad, (0.5 * 2 * (values - gains) / 4).detach())
    assert gains.grad is None


def test_actor_and_critic_share_their_features():
    network = ActorCriticNetwork(nn.Sequential(nn.Linear(4, 128), nn.ReLU()), 128, 2)
    logits, values = network(torch.randn(5, 4))
    assert (logits.shape, values.shape) == ((5, 2), (5,))
    assert sum(parameter.numel() for parameter in network.parameters()) == 4 * 128 + 128 + 128 * 3 + 3


def test_shapes_that_would_be_broadcast_are_refused():
    logits, action, gains = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), torch.zeros(3)
    with pytest.raises(ValueError, match=r"got \(3, 2\), \(3,\), \(3,\), \(3, 1\)"):
        policy_loss(logits, action, gains, gains[:, None])
    with pytest.raises(ValueError, match="returns"):
        policy_loss(logits, action, gains[:, None])
    with pytest.raises(ValueError, match=r"\(5, 1\), \(4, 1\)"):
        returns(REWARD, NEVER[1:], NEVER, 0.5)
