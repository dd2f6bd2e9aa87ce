"""Policy gradients: REINFORCE, with or without a baseline, and actor-critic.

Papers: Williams, 1992, Simple statistical gradient-following algorithms for connectionist reinforcement learning
(REINFORCE); Mnih et al., 2016, Asynchronous methods for deep reinforcement learning, https://arxiv.org/abs/1602.01783
(section 4: advantage actor-critic, its entropy term). Lecture: EECS 498-007, lecture 21.

Steps are (T, N): T in a row of each of N environments. Actions are drawn from the softmax of logits (…, A).
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.dqn import NATURE_HIDDEN, nature_network


def features_of(observation_shape: Sequence[int], hidden: Sequence[int]) -> tuple[nn.Module, int]:
    """Layers that see, from observations (B, …) to features (B, F), and F.

    Args:
        observation_shape: (D,): fully connected layers with rectifiers. (C, S, S): the network of the paper of 2015.
        hidden: Widths of the layers after vectors.
    """
    if len(observation_shape) == 3:
        nature = nature_network(1, observation_shape[0], observation_shape[1])
        to_features = nature.values[:-1]
        return nn.Sequential(nature.trunk, to_features), NATURE_HIDDEN
    widths = [observation_shape[0], *hidden]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers), widths[-1]


class ActorCriticNetwork(nn.Module):
    """Logits of the actions, and the value of the state.

    Args:
        trunk: From observations (B, …) to features (B, F).
        features: F.
        num_actions: A.
        critic_trunk: The critic's own features (B, F); None lets it share the actor's.
    """

    def __init__(
        self, trunk: nn.Module, features: int, num_actions: int, critic_trunk: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.actor = nn.Linear(features, num_actions)
        self.critic_trunk = critic_trunk
        self.critic = nn.Linear(features, 1)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Map observations to logits (B, A) and values (B,)."""
        obs = _scaled(obs)
        features = self.trunk(obs)
        of_critic = features if self.critic_trunk is None else self.critic_trunk(obs)
        return self.actor(features), self.critic(of_critic).squeeze(1)

    def logits(self, obs: Tensor) -> Tensor:
        """Map observations to logits (B, A); the critic is not asked."""
        logits: Tensor = self.actor(self.trunk(_scaled(obs)))
        return logits


def _scaled(obs: Tensor) -> Tensor:
    return obs / 255 if obs.dtype == torch.uint8 else obs


def returns(
    reward: Tensor, terminated: Tensor, truncated: Tensor, discount: float, next_value: Tensor | None = None
) -> Tensor:
    """What each step and those after it gave, discounted: G_t = r_t + discount G_(t+1), within its episode.

    After a termination there is nothing. After a truncation, and after the last of the T steps, there is what the
    critic expects; without one nothing, so that rewards that were cut off are missing: give it whole episodes.

    Args:
        reward: (T, N).
        terminated: bool (T, N).
        truncated: bool (T, N).
        discount: gamma, in [0, 1].
        next_value: (T, N), the critic's of the observation after each step, which at an episode's end is its own last
            one. Only those after truncations and of the last row count. None means 0.

    Returns:
        (T, N), without gradient.

    Raises:
        ValueError: The shapes differ.
    """
    next_value = torch.zeros_like(reward) if next_value is None else next_value.detach()
    for tensor in (terminated, truncated, next_value):
        if reward.ndim != 2 or tensor.shape != reward.shape:
            raise ValueError(
                f"tensors (T, N) of one shape are wanted: got {tuple(reward.shape)}, {tuple(tensor.shape)}"
            )
    found = torch.empty_like(reward)
    after = next_value[-1]
    for t in range(len(reward) - 1, -1, -1):
        after = torch.where(truncated[t], next_value[t], after)
        # Not a product: nothing that follows an end may come back from it, were it infinite.
        after = reward[t].detach() + torch.where(terminated[t], torch.zeros_like(after), discount * after)
        found[t] = after
    return found


def episode_returns(returns: Tensor, terminated: Tensor, truncated: Tensor) -> Tensor:
    """For each step what its whole episode gave, the lecture's f(x): the :func:`returns` at the episode's first step.

    Args:
        returns: (T, N); the first row begins episodes.
        terminated: bool (T, N).
        truncated: bool (T, N).
    """
    begins = torch.ones_like(terminated)
    begins[1:] = (terminated | truncated)[:-1]
    steps = torch.arange(len(returns), device=returns.device)[:, None]
    return returns.gather(0, (begins * steps).cummax(0).values)


def policy_loss(
    logits: Tensor, action: Tensor, returns: Tensor, baseline: Tensor | None = None, entropy_weight: float = 0.0
) -> Tensor:
    """REINFORCE: the mean over B steps of -log pi(a|s) (G - b).

    Times the steps of an episode its gradient is on average minus that of the expected return: with the lecture's
    :func:`episode_returns`, and with less variance with :func:`returns`, if G_t is then multiplied by discount^t. That
    factor is left out by custom, since late steps would hardly count: it is 1 without a discount.

    Args:
        logits: (B, A).
        action: int64 (B,).
        returns: (B,), G.
        baseline: (B,), of what is known before the action; it lowers the variance, and the mean stays. None is 0.
        entropy_weight: How much the mean entropy of the policy, in nats, is to be raised beside.

    Raises:
        ValueError: The shapes do not fit.
    """
    weight = returns.detach() if baseline is None else returns.detach() - baseline.detach()
    if logits.ndim != 2 or not action.shape == weight.shape == returns.shape == logits.shape[:1]:
        wanted = "logits (B, A), and action, returns and baseline (B,) are wanted"
        known = returns if baseline is None else baseline
        raise ValueError(
            f"{wanted}: got {', '.join(str(tuple(each.shape)) for each in (logits, action, returns, known))}"
        )
    logs = logits.log_softmax(1)
    chosen = logs.gather(1, action[:, None]).squeeze(1)
    entropy = -(logs.exp() * logs).sum(1).mean()
    return -(chosen * weight).mean() - entropy_weight * entropy


def actor_critic_loss(
    logits: Tensor,
    values: Tensor,
    action: Tensor,
    returns: Tensor,
    value_weight: float = 0.5,
    entropy_weight: float = 0.01,
) -> Tensor:
    """The :func:`policy_loss` with the critic's values as baseline, and the critic's own squared error.

    Args:
        logits: (B, A).
        values: (B,), the critic's.
        action: int64 (B,).
        returns: (B,): :func:`returns` with the critic's ``next_value``.
        value_weight: Weight of the mean of (V - G)^2.
        entropy_weight: As in :func:`policy_loss`.

    Raises:
        ValueError: The shapes do not fit.
    """
    actor = policy_loss(logits, action, returns, values, entropy_weight)
    return actor + value_weight * F.mse_loss(values, returns.detach())
