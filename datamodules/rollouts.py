"""Experience for policy gradients: whole episodes, or steps in a row, of the policy as it is now and used once."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from datamodules.environments import Episode
from datamodules.gym import GRID_WORLD, Batch, EnvironmentsDataModule, Option, gymnasium_or_refuse

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv


class RolloutsDataModule(EnvironmentsDataModule):
    """Steps that the present policy takes, each batch collected anew.

    With ``steps`` a batch is T steps in a row of each of N environments, whose episodes go on in the next batch. With
    ``episodes`` it is that many whole episodes, one after the other as if of one environment (N = 1).

    A training batch is a dict, on the device: ``obs`` and ``next_obs`` (T, N, *shape), ``action`` int64 (T, N),
    ``reward`` float32 (T, N), ``terminated`` and ``truncated`` bool (T, N), ``steps`` int64 (), the steps in the
    environments so far, and ``returns`` float32 (E,), those of the episodes that ended.

    A checkpoint holds counters, seeds and, where their state is known, the environments: on CartPole a resumed run ends
    with the weights of one that was never stopped.

    Args:
        environment: See :class:`~datamodules.gym.EnvironmentsDataModule`, as for all that is not told here.
        num_envs: Environments that are stepped together.
        steps: T; None with ``episodes``.
        episodes: Whole episodes of a batch, a multiple of ``num_envs``; None with ``steps``.
        batches: Batches of an epoch: after each epoch one validates.
        discount: Factor by which a reward counts less with each step; the model is told.
        val_episodes: Episodes of a validation.
        test_episodes: Episodes of a test.
        predict_episodes: Episodes of a prediction.
        eval_envs: Environments of an evaluation, which are stepped together.
        eval_epsilon: Chance of a random action in evaluations.
        seed: Seed of environments; None takes the run's.
        options: Arguments of the environment.

    Raises:
        ValueError: A number is out of range, not one of ``steps`` and ``episodes`` is given, or there is no such
            environment.
    """

    def __init__(
        self,
        environment: str = "CartPole-v1",
        num_envs: int = 8,
        steps: int | None = None,
        episodes: int | None = None,
        batches: int = 100,
        discount: float = 0.99,
        val_episodes: int = 20,
        test_episodes: int = 100,
        predict_episodes: int = 1,
        eval_envs: int = 100,
        eval_epsilon: float = 0.0,
        seed: int | None = None,
        options: dict[str, Option] | None = None,
    ) -> None:
        super().__init__(
            environment, num_envs, discount, val_episodes, test_episodes, predict_episodes, eval_envs, eval_epsilon,
            seed, options,
        )  # fmt: skip
        if (steps is None) == (episodes is None):
            raise ValueError(f"either steps or episodes is wanted: got steps={steps} and episodes={episodes}")
        if min(steps or 1, episodes or 1, batches) < 1:
            raise ValueError(f"steps={steps}, episodes={episodes} and batches={batches} must be at least 1")
        if episodes is not None and episodes % num_envs:
            raise ValueError(f"episodes={episodes} must be a multiple of num_envs={num_envs}")
        self.steps = steps
        self.episodes_per_batch = episodes
        self.batches = batches

    @property
    def batches_per_epoch(self) -> int:
        """Training batches of an epoch."""
        return self.batches

    def make_training(self) -> "VectorEnv":
        """Environments that begin anew within the step that ends an episode: none stands still while others go on."""
        mode = gymnasium_or_refuse().vector.AutoresetMode.SAME_STEP
        if self.environment == GRID_WORLD:
            return self.make(self.num_envs, autoreset_mode=mode)
        if self.environment.startswith("ALE/"):
            return self.make(self.num_envs, autoreset_mode=mode)
        return self.make(self.num_envs, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode})

    def collected(self, first: int) -> Iterator[Batch]:
        """Collect a batch each time that one is taken."""
        for _ in range(first, self.batches):
            parts, episodes = self._row() if self.episodes_per_batch is None else self._whole()
            assert self.collector is not None
            batch = {name: torch.from_numpy(part) for name, part in parts.items()}
            batch["reward"] = batch["reward"].float()
            batch["steps"] = torch.tensor(self.collector.steps)
            batch["returns"] = torch.tensor([episode.ret for episode in episodes])
            yield batch

    def _row(self) -> tuple[dict[str, np.ndarray], list[Episode]]:
        """T steps of all environments, each part (T, N, …)."""
        assert self.collector is not None
        policy = self._policy()
        steps = [self.collector.step(policy) for _ in range(self.steps or 0)]
        return {name: np.stack([_part(step, name) for step in steps]) for name in PARTS}, _episodes(steps)

    def _whole(self) -> tuple[dict[str, np.ndarray], list[Episode]]:
        """Whole episodes, each part (T, 1, …): those of the first environment, then those of the second, …."""
        assert self.collector is not None
        assert self.episodes_per_batch is not None
        policy = self._policy()
        self.collector.begin_anew()  # what was begun by an older policy is not gone on with
        left = np.full(self.num_envs, self.episodes_per_batch // self.num_envs)
        taken: list[list[tuple]] = [[] for _ in range(self.num_envs)]
        episodes = []
        while left.any():
            step = self.collector.step(policy)
            values = [_part(step, name) for name in PARTS]
            for row, env in enumerate(step.which):
                if left[env]:
                    taken[env].append(tuple(value[row] for value in values))
            for env, episode in zip(step.ended, step.episodes, strict=True):
                if left[env]:
                    episodes.append(episode)
                left[env] = max(0, left[env] - 1)
        rows = [row for of_one in taken for row in of_one]
        parts = {name: np.stack(part)[:, None] for name, part in zip(PARTS, zip(*rows, strict=True), strict=True)}
        return parts, episodes


PARTS = ("obs", "action", "reward", "next_obs", "terminated", "truncated")


def _part(step: Any, name: str) -> np.ndarray:
    return np.array(getattr(step, name))  # a copy: environments may write into the same array anew


def _episodes(steps: list[Any]) -> list[Episode]:
    return [episode for step in steps for episode in step.episodes]
