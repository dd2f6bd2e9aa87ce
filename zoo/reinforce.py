"""REINFORCE: the policy is moved towards the actions of those episodes that gave more than was to be expected.

Paper: Williams, 1992, Simple statistical gradient-following algorithms for connectionist reinforcement learning.
Lecture: EECS 498-007, lecture 21. The losses and their sources are in :mod:`zoo.policy_gradient`.
"""

from collections.abc import Sequence
from typing import Literal

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, optim
from torch.nn import functional as F

from zoo.arguments import plain_arguments
from zoo.policy_gradient import ActorCriticNetwork, episode_returns, features_of, policy_loss, returns
from zoo.running.optimizing import SchedulerCallable
from zoo.tasks.control import Batch, ControlTask
from zoo.weights import load_weights

Baseline = Literal["none", "mean", "value"]

SMALLEST = 1e-8  # added to a standard deviation


class REINFORCE(ControlTask):
    """Policy gradient from whole episodes, with or without a baseline.

    A training batch is whole episodes one after the other: ``obs`` (T, 1, …), ``action`` int64 (T, 1), ``reward``
    float32 (T, 1), ``terminated`` and ``truncated`` bool (T, 1). What a truncation cut off counts as nothing.

    Args:
        observation_shape: Of an observation: (D,), or (C, S, S) of C frames of S pixels a side.
        num_actions: A.
        discount: gamma, in [0, 1].
        hidden: Widths of the layers after vectors; of pixels the network is that of the DQN paper of 2015.
        whole_episode: Each action is credited with what its whole episode gave, the lecture's f(x); else with what came
            after it, which has the same mean and less variance.
        baseline: ``none``; ``mean`` of the batch; ``value``, a value of the state that is learnt beside.
        normalize: Divide by the standard deviation over the batch.
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
        whole_episode: bool = False,
        baseline: Baseline = "mean",
        normalize: bool = True,
        entropy_weight: float = 0.0,
        weights: str | None = None,
        optimizer: OptimizerCallable = lambda params: optim.Adam(params, lr=1e-2, fused=True),
        scheduler: SchedulerCallable | None = None,
    ) -> None:
        super().__init__(list(observation_shape), num_actions, discount, optimizer, scheduler)
        if baseline not in ("none", "mean", "value"):
            raise ValueError(f"baseline={baseline!r} must be 'none', 'mean' or 'value'")
        self.whole_episode = whole_episode
        self.baseline = baseline
        self.normalize = normalize
        self.entropy_weight = entropy_weight
        self.network = ActorCriticNetwork(*features_of(observation_shape, hidden), num_actions)
        self.network.critic.requires_grad_(baseline == "value")  # else it is not asked
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
        """What has on average minus the gradient of an episode's return, and the critic's own error if there is one."""
        ends = batch["terminated"], batch["truncated"]
        credit = returns(batch["reward"], *ends, self.discount)
        if self.whole_episode:
            credit = episode_returns(credit, *ends)
        episodes = (ends[0] | ends[1]).sum().clamp_min(1)
        credit, action, obs = credit.flatten(), batch["action"].flatten(), batch["obs"].flatten(0, 1)
        if self.baseline == "value":
            logits, values = self.network(obs)
            return self._per_episode(logits, action, credit, values.detach(), episodes) + F.mse_loss(values, credit)
        baseline = credit.mean().expand(len(credit)) if self.baseline == "mean" else credit.new_zeros(len(credit))
        return self._per_episode(self(obs), action, credit, baseline, episodes)

    def _per_episode(
        self, logits: Tensor, action: Tensor, credit: Tensor, baseline: Tensor, episodes: Tensor
    ) -> Tensor:
        advantage = credit - baseline
        if self.normalize and len(credit) > 1:
            advantage = advantage / (advantage.std() + SMALLEST)
        return policy_loss(logits, action, advantage, None, self.entropy_weight) * (len(credit) / episodes)
