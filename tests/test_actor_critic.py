"""Actor-critic's loss against the formula, with a termination and a truncation in the middle of the rows."""

import numpy as np
import pytest
import torch

import zoo

GENERATOR = torch.Generator().manual_seed(0)
BATCH = {
    "obs": torch.randn(3, 2, 4, generator=GENERATOR),
    "next_obs": torch.randn(3, 2, 4, generator=GENERATOR),
    "action": torch.tensor([[0, 1], [1, 1], [0, 0]]),
    "reward": torch.tensor([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0]]),
    "terminated": torch.tensor([[False, False], [True, False], [False, False]]),
    "truncated": torch.tensor([[False, True], [False, False], [False, False]]),
}


@pytest.mark.parametrize("shared", [True, False])
def test_the_loss_is_that_of_the_formula(shared):
    torch.manual_seed(1)
    model = zoo.ActorCritic(hidden=[8], shared=shared, discount=0.5, value_weight=0.25, entropy_weight=0.1)
    with torch.no_grad():
        logits, values = model.network(BATCH["obs"].flatten(0, 1))
        after = model.network(BATCH["next_obs"].flatten(0, 1))[1].view(3, 2).double().numpy()
    expected = np.array(
        [
            [1 + 4 / 2, 2 + after[0, 1] / 2],  # the first ends in the second step; the second is cut off here
            [4, 8 + (32 + after[2, 1] / 2) / 2],
            [16 + after[2, 0] / 2, 32 + after[2, 1] / 2],
        ]
    ).flatten()
    logs = logits.double().log_softmax(1).numpy()
    values = values.double().numpy()
    actions = BATCH["action"].flatten().numpy()
    actor = -np.mean([logs[k, actions[k]] * (expected[k] - values[k]) for k in range(6)])
    entropy = -np.mean((np.exp(logs) * logs).sum(1))
    found = model.loss(BATCH).item()
    assert found == pytest.approx(actor - 0.1 * entropy + 0.25 * np.mean((values - expected) ** 2), rel=1e-5)


def test_the_critic_is_not_pulled_towards_the_future():
    model = zoo.ActorCritic(hidden=[8])
    model.loss(BATCH).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    other = zoo.ActorCritic(hidden=[8])
    other.load_state_dict(model.state_dict())
    future = BATCH["next_obs"].clone().requires_grad_()
    other.loss(BATCH | {"next_obs": future}).backward()
    assert future.grad is None


def test_an_actor_of_its_own_does_not_feel_the_critics_error():
    gradients = []
    for weight in (0.0, 100.0):
        torch.manual_seed(1)
        model = zoo.ActorCritic(hidden=[8], shared=False, value_weight=weight)
        model.loss(BATCH).backward()
        gradients.append(
            [p.grad.clone() for p in (*model.network.trunk.parameters(), *model.network.actor.parameters())]
        )
        assert all((p.grad != 0).any() == bool(weight) for p in model.network.critic_trunk.parameters())
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    obs = torch.randn(5, 4)
    torch.testing.assert_close(model(obs), model.network(obs)[0])
