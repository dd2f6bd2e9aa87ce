"""REINFORCE's loss against the formula, in each of its forms."""

import numpy as np
import pytest
import torch

import zoo

# Two episodes of 2 and 3 steps.
BATCH = {
    "obs": torch.randn(5, 1, 4, generator=torch.Generator().manual_seed(0)),
    "action": torch.tensor([0, 1, 1, 0, 1])[:, None],
    "reward": torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])[:, None],
    "terminated": torch.tensor([False, True, False, False, False])[:, None],
    "truncated": torch.tensor([False, False, False, False, True])[:, None],
}
TO_GO = np.array([1 + 2 / 2, 2, 4 + 8 / 2 + 16 / 4, 8 + 16 / 2, 16])
WHOLE = np.array([2, 2, 12, 12, 12])


@pytest.mark.parametrize("whole_episode", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("baseline", ["none", "mean", "value"])
def test_the_loss_is_that_of_the_formula(baseline, normalize, whole_episode):
    torch.manual_seed(0)
    model = zoo.REINFORCE(hidden=[8], discount=0.5, baseline=baseline, normalize=normalize, whole_episode=whole_episode)
    credit = (WHOLE if whole_episode else TO_GO).astype(float)
    obs = BATCH["obs"].flatten(0, 1)
    logits, values = (part.detach().double().numpy() for part in model.network(obs))
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    advantage = credit - {"none": 0, "mean": credit.mean(), "value": values}[baseline]
    if normalize:
        advantage = advantage / (advantage.std(ddof=1) + 1e-8)
    expected = -sum(logs[t, int(BATCH["action"][t])] * advantage[t] for t in range(5)) / 2  # a mean over the episodes
    expected += np.mean((values - credit) ** 2) if baseline == "value" else 0
    assert model.loss(BATCH).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("baseline", ["none", "mean", "value"])
def test_what_is_not_asked_is_not_trained(baseline):
    model = zoo.REINFORCE(hidden=[8], baseline=baseline)
    model.loss(BATCH).backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None}
    assert ("network.critic.weight" in trained) == (baseline == "value")


def test_a_baseline_that_is_none_is_refused():
    with pytest.raises(ValueError, match="baseline='median' must be"):
        zoo.REINFORCE(baseline="median")
