"""Experience from gymnasium's vector environments: whole transitions, whichever way episodes begin anew.

Gymnasium's rules (version 1.0 on): where an episode of one of N environments has ended, that environment is reset

- ``NEXT_STEP``: by the next step, which ignores the action and gives the first observation with reward 0;
- ``SAME_STEP``: at once: the step gives the first observation, and the last one is in ``info["final_obs"]``;
- ``DISABLED``: by whoever steps it, through ``reset(options={"reset_mask": ...})``.

A step that only resets is no transition, and no transition leads from one episode into the next. Needs gymnasium:
``pip install 'zoo[control]'``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

    from datamodules.replay import ReplayBuffer

KNOWN = ("gymnasium.envs.classic_control.", "datamodules.embedded.grid_world")  # whose state is in STATE
STATE = (
    "state",
    "steps",
    "prev_done",
    "steps_beyond_terminated",
    "_elapsed_steps",
    "_autoreset_envs",
    "_cell",
    "_steps",
)
UNDER_WAY = ("_obs", "_over", "_returns", "_lengths")  # a collector's, of its episodes

Policy = Callable[[np.ndarray], np.ndarray]  # observations (N, *shape) to actions (N,), in [0, number of actions)


class Episode(NamedTuple):
    """A finished episode: the sum of its rewards, not discounted, and its steps."""

    ret: float
    length: int


@dataclass
class Steps:
    """What one step of N environments gave: transitions of K of them, and the first observations of J.

    Attributes:
        which: int64 (K,), the environments that took a step; the others were only reset.
        obs: (K, *shape), where each began.
        action: int64 (K,).
        reward: float64 (K,).
        terminated: bool (K,).
        truncated: bool (K,).
        next_obs: (K, *shape), where each led: the episode's own last observation at its end.
        begun: int64 (J,), the environments that began an episode after that.
        first_obs: (J, *shape), with what observation.
        episodes: Those that ended, in the order of ``which``.
        ended: int64, their environments.
    """

    which: np.ndarray
    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    next_obs: np.ndarray
    begun: np.ndarray
    first_obs: np.ndarray
    episodes: list[Episode]
    ended: np.ndarray


class Collector:
    """Steps through vector environments with discrete actions, under any of the three rules of resetting.

    Saved with :meth:`state_dict` are the counters, the random numbers of the exploration and the seed, and of
    environments whose state is known (:func:`save_environments`) that state: a resumed run then goes on as if it had
    never been stopped. Others cannot be saved: after :meth:`load_state_dict` they begin new episodes, from seeds that
    depend on ``seed`` and on how often the run was resumed, and the episodes that were under way count for nothing.
    Such a run has the same counters, exploration and replay buffer as one that was never stopped, but meets other
    episodes; two resumptions from the same file meet the same.

    Args:
        environments: Vector environments; one of them must be wrapped with ``num_envs=1``. They are not closed here.
        seed: Seed of the environments and of the exploration.

    Raises:
        ValueError: The actions are not discrete, counted from 0.
    """

    def __init__(self, environments: "VectorEnv", seed: int = 0) -> None:
        modes = gymnasium_or_refuse().vector.AutoresetMode
        space: Any = environments.single_action_space
        if not isinstance(space, gymnasium_or_refuse().spaces.Discrete) or space.start != 0:
            raise ValueError(f"the environments' actions are {space}: Discrete actions, counted from 0, are wanted")
        self.environments = environments
        self.num_envs = environments.num_envs
        self.num_actions = int(space.n)
        self.seed = seed
        # An environment that says nothing follows gymnasium's default.
        self.mode = modes(environments.metadata.get("autoreset_mode", modes.NEXT_STEP))
        self._same_step = self.mode == modes.SAME_STEP
        self._disabled = self.mode == modes.DISABLED
        self.steps = 0  # transitions so far
        self.episodes = 0  # finished so far
        self.resumed = 0
        self._random = np.random.default_rng([seed, 0])
        self._obs: np.ndarray | None = None  # the latest of each environment
        self._over = np.zeros(self.num_envs, bool)  # the next step only resets
        self._returns = np.zeros(self.num_envs)
        self._lengths = np.zeros(self.num_envs, np.int64)

    def reset(self) -> np.ndarray:
        """Begin an episode in every environment, and return the first observations (N, *shape)."""
        source = np.random.SeedSequence([self.seed, 1, self.resumed, self.steps])
        # Environment i gets i more; 30 bits, so that none is more than a signed number of 32 bits holds. A list of
        # seeds is not what all vector environments take.
        self._obs, _ = self.environments.reset(seed=int(source.generate_state(1)[0]) >> 2)
        self._over[:] = False
        self._returns[:] = 0
        self._lengths[:] = 0
        return self._obs

    def begin_anew(self) -> None:
        """Let the next step begin with new episodes, from seeds that depend on the steps so far."""
        self._obs = None

    def step(self, policy: Policy, epsilon: float = 0.0) -> Steps:
        """Take one step in every environment; the first begins with :meth:`reset`.

        Args:
            policy: Called with the observations of all N, those included whose episode is over and whose action counts
                for nothing; not called where all act at random.
            epsilon: Chance in [0, 1] with which each environment's action is drawn evenly instead.

        Raises:
            ValueError: The policy's actions are not N integers in range.
        """
        obs = self.reset() if self._obs is None else self._obs
        actions = self._actions(policy, obs, epsilon)
        stepped = np.flatnonzero(~self._over)
        seen = {"obs": obs[stepped]}  # now: some environments write into the same array anew
        after, rewards, terminated, truncated, info = self.environments.step(actions)
        ends = (terminated | truncated) & ~self._over
        ended = np.flatnonzero(ends)
        led_to = _with_final(after, info, ended) if self._same_step else after
        begun = ended if self._same_step or self._disabled else np.flatnonzero(self._over)
        seen["next_obs"] = led_to[stepped]
        if self._disabled and len(ended):
            after, _ = self.environments.reset(options={"reset_mask": ends})
        self._obs = after
        self._over = ends if not (self._same_step or self._disabled) else self._over
        return Steps(
            which=stepped,
            action=actions[stepped],
            reward=rewards[stepped],
            terminated=terminated[stepped],
            truncated=truncated[stepped],
            begun=begun,
            first_obs=after[begun],
            episodes=self._count(stepped, rewards, ended),
            ended=ended,
            **seen,
        )

    def collect(self, buffer: "ReplayBuffer", steps: int, policy: Policy, epsilon: float = 0.0) -> list[Episode]:
        """Put at least ``steps`` transitions of all environments together into a replay buffer.

        Args:
            buffer: For N environments, and told of all their steps; episodes it holds open from another run are cut.
            steps: Transitions wanted. Up to N - 1 more are taken, since all environments step together.
            policy: As in :meth:`step`.
            epsilon: As in :meth:`step`.

        Returns:
            The episodes that ended.
        """
        if self._obs is None:
            buffer.reset(self.reset())
        episodes: list[Episode] = []
        goal = self.steps + steps
        while self.steps < goal:
            step = self.step(policy, epsilon)
            buffer.add(step.action, step.reward, step.terminated, step.truncated, step.next_obs, step.which)
            if len(step.begun):
                buffer.reset(step.first_obs, step.begun)
            episodes += step.episodes
        return episodes

    def state_dict(self) -> dict[str, Any]:
        """The counters, the seed, the state of the exploration and of the environments, as tensors and plain values."""
        state: dict[str, Any] = {
            "seed": self.seed,
            "steps": self.steps,
            "episodes": self.episodes,
            "resumed": self.resumed,
            "random": self._random.bit_generator.state,
            "environments": None if self._obs is None else save_environments(self.environments),
        }
        if state["environments"] is not None:
            state["under_way"] = {name: torch.from_numpy(np.array(getattr(self, name))) for name in UNDER_WAY}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state: where the environments were, or else in new episodes."""
        self.seed = state["seed"]
        self.steps = state["steps"]
        self.episodes = state["episodes"]
        self.resumed = state["resumed"]
        self._random.bit_generator.state = state["random"]
        self._obs = None
        if state.get("environments") is None:
            self.resumed += 1
        else:
            self.reset()
            load_environments(self.environments, state["environments"])
            for name in UNDER_WAY:
                setattr(self, name, state["under_way"][name].numpy().copy())

    def _actions(self, policy: Policy, obs: np.ndarray, epsilon: float) -> np.ndarray:
        # Both are drawn always, so that the numbers that follow do not depend on epsilon.
        explores = self._random.random(self.num_envs) < epsilon
        drawn = self._random.integers(self.num_actions, size=self.num_envs)
        if explores.all():
            return drawn
        chosen = np.asarray(policy(obs))
        whole = chosen.shape == (self.num_envs,) and np.issubdtype(chosen.dtype, np.integer)
        if not whole or chosen.min() < 0 or chosen.max() >= self.num_actions:
            raise ValueError(
                f"a policy must give {self.num_envs} integers in [0, {self.num_actions}): got {chosen.dtype} "
                f"{chosen.shape}"
            )
        return np.where(explores, drawn, chosen)

    def _count(self, stepped: np.ndarray, rewards: np.ndarray, ended: np.ndarray) -> list[Episode]:
        self._returns[stepped] += rewards[stepped]
        self._lengths[stepped] += 1
        finished = [Episode(float(self._returns[env]), int(self._lengths[env])) for env in ended]
        self._returns[ended] = 0
        self._lengths[ended] = 0
        self.steps += len(stepped)
        self.episodes += len(finished)
        return finished


def evaluate(
    environments: "VectorEnv", policy: Policy, episodes: int, seed: int = 0, epsilon: float = 0.0
) -> list[Episode]:
    """Play whole episodes without exploring, unless asked.

    Each environment plays its share, decided beforehand: the first so many to end would be the short ones.

    Args:
        environments: Others than those that training collects from. They are not closed here.
        policy: As in :meth:`Collector.step`.
        episodes: How many in all.
        seed: Seed of the environments: the same one gives the same episodes for the same policy.
        epsilon: As in :meth:`Collector.step`; the paper of 2015 evaluates with 0.05.

    Raises:
        ValueError: ``episodes`` is below 1.
    """
    if episodes < 1:
        raise ValueError(f"episodes={episodes} must be at least 1")
    collector = Collector(environments, seed)
    left = np.full(collector.num_envs, episodes // collector.num_envs)
    left[: episodes % collector.num_envs] += 1
    played: list[Episode] = []
    while left.any():
        step = collector.step(policy, epsilon)
        for env, episode in zip(step.ended, step.episodes, strict=True):
            if left[env]:
                left[env] -= 1
                played.append(episode)
    return played


def save_environments(environments: "VectorEnv") -> dict[str, Any] | None:
    """The state of vector environments in tensors and plain values; None where it is not known how to save it.

    It is known of gymnasium's classic control (CartPole, MountainCar, Acrobot; vector environments of their own, or
    ``SyncVectorEnv``) and of this project's grid world.
    """
    parts = _parts(environments)
    if parts is None:
        return None
    state: dict[str, Any] = {}
    for name, part in parts.items():
        held = vars(part)
        state[name] = {key: _plain(held[key]) for key in STATE if key in held}
        if (random := held.get("_np_random")) is not None:
            state[name]["random"] = random.bit_generator.state
    return state


def load_environments(environments: "VectorEnv", state: dict[str, Any]) -> None:
    """Bring environments, made with the same arguments and reset, to a state of :func:`save_environments`.

    Raises:
        ValueError: They are others than those that were saved.
    """
    parts = _parts(environments)
    if parts is None or parts.keys() != state.keys():
        raise ValueError(
            f"{environments} are not the environments that were saved: resume with the same environment and num_envs"
        )
    for name, part in parts.items():
        for key, value in state[name].items():
            if key == "random":
                part.np_random.bit_generator.state = value
            else:
                setattr(part, key, value.numpy().copy() if isinstance(value, torch.Tensor) else value)


def _parts(environments: Any) -> dict[str, Any] | None:
    """The objects that hold the state: vector environments and, one by one, those in them with their wrappers."""
    parts = {"vector": environments}
    if type(environments).__module__.startswith(KNOWN):  # all in one
        return parts
    if not isinstance(environments, gymnasium_or_refuse().vector.SyncVectorEnv):
        return None
    for number, environment in enumerate(environments.envs):
        depth = 0
        while environment is not environment.unwrapped:
            parts[f"{number}/{depth}"] = environment
            environment, depth = environment.env, depth + 1
        if not type(environment).__module__.startswith(KNOWN):
            return None
        parts[f"{number}/{depth}"] = environment
    return parts


def _plain(value: Any) -> Any:
    """Arrays as tensors, which a checkpoint may hold; numbers as they are."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, tuple | list):
        return type(value)(_plain(each) for each in value)
    return value.item() if isinstance(value, np.generic) else value


def _with_final(after: np.ndarray, info: dict[str, Any], ended: np.ndarray) -> np.ndarray:
    """Observations in which those of ended episodes are their last, not the first of the next."""
    if not len(ended):
        return after
    after = after.copy()
    after[ended] = np.stack([info["final_obs"][env] for env in ended])
    return after


def gymnasium_or_refuse() -> ModuleType:
    """gymnasium, imported where it is used; an error that names the extra where it is missing."""
    try:
        import gymnasium
    except ImportError as error:
        raise ModuleNotFoundError("environments need gymnasium: pip install 'zoo[control]'") from error
    return gymnasium
