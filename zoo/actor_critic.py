"""Actor-critic: a policy, and a critic that says what was to be expected.

Paper: Mnih et al., 2016, Asynchronous methods for deep reinforcement learning, https://arxiv.org/abs/1602.01783
(section 4), all environments in step. Lecture: EECS 498-007, lecture 21. The losses are in :mod:`zoo.policy_gradient`.
"""

from collections.abc import Sequence

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, optim

from zoo.arguments import plain_arguments
from zoo.policy_gradient import ActorCriticNetwork, actor_critic_loss, features_of, returns
from zoo.running.optimizing import SchedulerCallable
from zoo.tasks.control import Batch, ControlTask
from zoo.weights import load_weights


class ActorCritic(ControlTask):
    """Advantage actor-critic (A2C).

    A training batch is T steps in a row of each of N environments: ``obs`` and ``next_obs`` (T, N, …), ``action`` int64
    (T, N), ``reward`` float32 (T, N), ``terminated`` and ``truncated`` bool (T, N). What follows a truncation and the
    last step is what the critic expects.

    Args:
        observation_shape: Of an observation: (D,), or (C, S, S) of C frames of S pixels a side.
        num_actions: A.
        discount: gamma, in [0, 1].
        hidden: Widths of the layers after vectors; of pixels the network is that of the DQN paper of 2015.
        shared: Actor and critic share the layers that see, as in the paper; apart, neither drowns the other's gradient.
        value_weight: Weight of the critic's squared error.
        entropy_weight: How much the entropy of the policy, in nats, is to be raised beside.
        weights: File to start from (``.safetensors``, ``.ckpt``, ``.pth``) or ``hf://owner/name``.
        optimizer: Makes the optimizer from the parameters.
        scheduler: Makes the schedule from the optimizer and the run's number of steps; stepped once per step.

    Raises:
        ValueError: A number is out of range.
    """

    @plain_arguments
    def __init__(
        self,
        observation_shape: Sequence[int] = (4,),
        num_actions: int = 2,
        discount: float = 0.99,
        hidden: Sequence[int] = (128,),
        shared: bool = True,
        value_weight: float = 0.5,
        entropy_weight: float = 0.01,
        weights: str | None = None,
        optimizer: OptimizerCallable = lambda params: optim.Adam(params, lr=1e-3, fused=True),
        scheduler: SchedulerCallable | None = None,
    ) -> None:
        super().__init__(list(observation_shape), num_actions, discount, optimizer, scheduler)
        self.value_weight = value_weight
        self.entropy_weight = entropy_weight
        critic_trunk = None if shared else features_of(observation_shape, hidden)[0]
        self.network = ActorCriticNetwork(*features_of(observation_shape, hidden), num_actions, critic_trunk)
        if weights is not None:
            load_weights(self, weights)

    @property
    def what_scores_are(self) -> str:
        """Logits."""
        return "logit"

    def forward(self, obs: Tensor) -> Tensor:
        """Map observations (N, …) to the logits of all actions (N, A)."""
        return self.network.logits(obs)

    def draw(self, scores: Tensor) -> Tensor:
        """Actions drawn from the policy."""
        return scores.softmax(1).multinomial(1).squeeze(1)

    def loss(self, batch: Batch) -> Tensor:
        """The actor's and the critic's losses."""
        reward = batch["reward"]
        with torch.no_grad():
            _, after = self.network(batch["next_obs"].flatten(0, 1))
        expected = returns(reward, batch["terminated"], batch["truncated"], self.discount, after.view_as(reward))
        logits, values = self.network(batch["obs"].flatten(0, 1))
        action = batch["action"].flatten()
        return actor_critic_loss(logits, values, action, expected.flatten(), self.value_weight, self.entropy_weight)
