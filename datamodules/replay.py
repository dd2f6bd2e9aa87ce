"""Experience replay: past transitions in a ring of observations, drawn evenly or by their errors.

Papers: Mnih et al., 2015, Human-level control through deep reinforcement learning (Methods); Schaul, Quan, Antonoglou
and Silver, 2016, Prioritized experience replay, https://arxiv.org/abs/1511.05952 (section 3, proportional). Lecture:
EECS 498-007, lecture 21.

Each observation is one *slot*. A step writes what was done into the slot of the observation it began from, and the
observation it led to into the next, so that both are held once, as they are in pixels. An episode of T steps takes
T + 1 slots: the last holds its real last observation, from which a truncated episode is still valued.
"""

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

Padding = Literal["repeat", "zeros"]

SMALLEST = 1e-6  # added to every error, so that no transition is lost for good; the paper's epsilon
DRAWS = 8  # of slots that may hold no whole transition, before those that do are listed
MEBIBYTE = 2**20


class SumTree:
    """Numbers whose sums are at hand, so that one can be drawn in proportion to its size.

    A binary tree in an array: node n is the sum of nodes 2n and 2n + 1. Sums are added up anew at each change, so that
    rounding never piles up.

    Args:
        size: How many numbers there are, all 0 at first.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.levels = max(size - 1, 1).bit_length()
        self._leaves = 2**self.levels
        self._nodes = np.zeros(2 * self._leaves)

    @property
    def total(self) -> float:
        """The sum of all."""
        return float(self._nodes[1])

    @property
    def values(self) -> np.ndarray:
        """All numbers, float64 (size,), not to be written to."""
        return self._nodes[self._leaves : self._leaves + self.size]

    def set(self, places: np.ndarray, values: np.ndarray | float) -> None:
        """Set the numbers at ``places``, in ``[0, size)``, to ``values``, which are 0 or more."""
        if not len(places):
            return
        nodes = places + self._leaves
        self._nodes[nodes] = values
        for _ in range(self.levels):
            nodes = nodes >> 1
            self._nodes[nodes] = self._nodes[2 * nodes] + self._nodes[2 * nodes + 1]

    def find(self, masses: np.ndarray) -> np.ndarray:
        """For each of ``masses`` (B,), in ``[0, total)``, the first place up to which the sum is above it.

        A place whose number is 0 is never found, unless all are 0.
        """
        masses = np.array(masses, dtype=np.float64)
        nodes = np.ones(len(masses), dtype=np.int64)
        for _ in range(self.levels):
            left = self._nodes[2 * nodes]
            # Rounding may leave a mass that is as large as both halves: it belongs to the one that has any.
            right = (masses >= left) & (self._nodes[2 * nodes + 1] > 0)
            masses -= np.where(right, left, 0)
            nodes = 2 * nodes + right
        return nodes - self._leaves


class ReplayBuffer:
    """The last transitions of several environments, and batches drawn from them.

    :meth:`reset` begins episodes, :meth:`add` takes a step in them. An episode that is reset before its end is cut
    there, as if truncated. A transition of ``n_step`` steps can be drawn once all its steps were taken, or once its
    episode has ended; and no more once a frame it needs was written over.

    With ``stack`` the observations are stacks (stack, *frame) of frames, the newest last, of which only the newest is
    held. They are put together anew when drawn, and never from two episodes.

    Args:
        capacity: Observations (frames) that are held, over all environments: rounded down to equally many of each. An
            episode of T transitions takes T + 1.
        obs_shape: Of one observation, without the environments' axis; with ``stack`` its first number is the stack.
        obs_dtype: ``uint8`` for pixels, ``float32`` for vectors.
        num_envs: Number of environments N.
        stack: Frames of an observation; 0 where observations are no stacks.
        padding: What an episode's first stack holds before its first frame: that frame again (gymnasium's
            ``FrameStackObservation``), or zeros (ale-py's ``AtariVectorEnv``).
        n_step: Steps of a transition.
        discount: Factor in [0, 1] by which a reward counts less with each step.
        priority_exponent: alpha of the paper, to which priorities are raised; 0 draws evenly.
        seed: Seed of the draws.

    Raises:
        ValueError: A number is out of range, ``capacity`` is too small for ``stack`` and ``n_step``, or the memory,
            which is stated before it is taken, is not there.
    """

    def __init__(
        self,
        capacity: int,
        obs_shape: tuple[int, ...],
        obs_dtype: str = "uint8",
        num_envs: int = 1,
        stack: int = 0,
        padding: Padding = "repeat",
        n_step: int = 1,
        discount: float = 0.99,
        priority_exponent: float = 0.0,
        seed: int = 0,
    ) -> None:
        _check(capacity, obs_shape, num_envs, stack, padding, n_step, discount, priority_exponent)
        self.slots = capacity // num_envs  # of each environment
        self.obs_shape = tuple(obs_shape)
        self.obs_dtype = np.dtype(obs_dtype)
        self.num_envs = num_envs
        self.stack = stack
        self.padding = padding
        self.n_step = n_step
        self.discount = discount
        self.priority_exponent = priority_exponent
        needed = self.memory(capacity, obs_shape, obs_dtype, num_envs, stack, priority_exponent)
        _claim(needed, self.slots * num_envs)
        frame_shape = self.obs_shape[1:] if stack else self.obs_shape
        shape = (num_envs, self.slots)
        self._frames = np.zeros((*shape, *frame_shape), self.obs_dtype)
        self._actions = np.zeros(shape, np.int64)
        self._rewards = np.zeros(shape, np.float32)
        self._terminated = np.zeros(shape, bool)
        self._ends = np.zeros(shape, bool)  # the episode's last step, terminated or not
        self._ages = np.zeros(shape, np.int32)  # steps since the episode began
        self._whole = np.zeros(shape, bool)  # can be drawn
        self._heads = np.full(num_envs, -1)  # the slot of each environment's latest observation
        self._filled = np.zeros(num_envs, np.int64)  # slots that were ever written
        self._open = np.zeros(num_envs, bool)  # in an episode
        self._size = 0
        self._tree = SumTree(self.slots * num_envs) if priority_exponent else None
        self._largest = 1.0  # priority so far, which a new transition gets
        self._random = np.random.default_rng(seed)

    @staticmethod
    def memory(
        capacity: int,
        obs_shape: tuple[int, ...],
        obs_dtype: str = "uint8",
        num_envs: int = 1,
        stack: int = 0,
        priority_exponent: float = 0.0,
    ) -> int:
        """Bytes that a buffer with these arguments takes when it is full."""
        slots = capacity // num_envs * num_envs
        frame = math.prod(obs_shape[1:] if stack else obs_shape) * np.dtype(obs_dtype).itemsize
        tree = 16 * 2 ** max(slots - 1, 1).bit_length() if priority_exponent else 0
        return slots * (frame + 8 + 4 + 1 + 1 + 4 + 1) + tree

    def __len__(self) -> int:
        """The number of transitions that can be drawn."""
        return self._size

    # Writing

    def reset(self, obs: np.ndarray, which: np.ndarray | None = None) -> None:
        """Begin episodes.

        Args:
            obs: (K, *obs_shape), the first observation of each.
            which: (K,) int64, their environments, each once; None means all.

        Raises:
            ValueError: The shapes do not fit, or the first stacks are not padded as ``padding`` says.
        """
        which = self._environments(which)
        obs = self._checked(obs, which, "obs")
        self._check_padding(obs)
        self._cut(which[self._open[which]])
        self._open[which] = True
        self._write(obs, which, np.zeros(len(which), np.int32))

    def add(
        self,
        action: np.ndarray,
        reward: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        next_obs: np.ndarray,
        which: np.ndarray | None = None,
    ) -> None:
        """Take a step from the latest observation of each environment.

        Args:
            action: (K,) integers.
            reward: (K,) numbers.
            terminated: (K,) bool: the episode ended, and nothing more is to be had.
            truncated: (K,) bool: the episode was ended, by a limit of time for example.
            next_obs: (K, *obs_shape), where each step led: at an episode's end its own last observation, not the
                first of the next one.
            which: (K,) int64, the environments, each once; None means all.

        Raises:
            ValueError: The shapes do not fit, or an environment is in no episode: it was not reset after an end.
        """
        which = self._environments(which)
        next_obs = self._checked(next_obs, which, "next_obs")
        if not self._open[which].all():
            closed = which[~self._open[which]].tolist()
            raise ValueError(f"the environments {closed} are in no episode: call reset() with their first observations")
        at = which, self._heads[which]
        ends = np.asarray(terminated, bool) | np.asarray(truncated, bool)
        for held, given in (
            (self._actions, action),
            (self._rewards, reward),
            (self._terminated, terminated),
            (self._ends, ends),
        ):
            held[at] = given
        age = self._ages[at]
        self._write(next_obs, which, age + 1)
        self._complete(which, at[1], age, ends)
        self._open[which] = ~ends

    def update_priorities(self, index: Tensor, errors: Tensor) -> None:
        """Give the transitions that were drawn the priorities of their errors; without effect on even draws.

        A transition that was written over since is left out.

        Args:
            index: (B,) int64, as :meth:`sample` gave it. Of a transition that was drawn twice the last error counts.
            errors: (B,) how far each value was off; the sign does not count.

        Raises:
            ValueError: An error is NaN or infinite.
        """
        if self._tree is None:
            return
        priorities = np.abs(errors.detach().cpu().numpy().astype(np.float64)) + SMALLEST
        if not np.isfinite(priorities).all():
            raise ValueError("errors must be finite numbers: they are the priorities of what is drawn next")
        places = index.cpu().numpy()
        kept = self._whole.reshape(-1)[places]
        self._largest = max(self._largest, priorities.max(initial=0))
        self._tree.set(places[kept], priorities[kept] ** self.priority_exponent)

    def _environments(self, which: np.ndarray | None) -> np.ndarray:
        return np.arange(self.num_envs) if which is None else np.asarray(which, dtype=np.int64)

    def _checked(self, obs: np.ndarray, which: np.ndarray, name: str) -> np.ndarray:
        obs = np.asarray(obs)
        wanted = (len(which), *self.obs_shape)
        if obs.shape != wanted or not np.can_cast(obs.dtype, self.obs_dtype, "same_kind"):
            raise ValueError(
                f"{name} must be {self.obs_dtype} {wanted}, an observation for each of {len(which)} environments: got "
                f"{obs.dtype} {obs.shape}"
            )
        return obs

    def _check_padding(self, obs: np.ndarray) -> None:
        if self.stack < 2:
            return
        expected = obs[:, -1:] if self.padding == "repeat" else np.zeros_like(obs[:, -1:])
        if not (obs[:, :-1] == expected).all():
            other = "zeros" if self.padding == "repeat" else "repeat"
            raise ValueError(
                f"the first stack of an episode is not padded by padding={self.padding!r}, so that it could not be put "
                f"together again from its frames: try padding={other!r}, and look at what stacks the frames"
            )

    def _cut(self, which: np.ndarray) -> None:
        """End episodes that were left open, as truncated, at their latest observation."""
        head = self._heads[which]
        stepped = self._ages[which, head] > 0
        which, last = which[stepped], (head[stepped] - 1) % self.slots
        self._ends[which, last] = True
        self._complete(which, last, self._ages[which, last], np.ones(len(which), bool))

    def _write(self, obs: np.ndarray, which: np.ndarray, age: np.ndarray) -> None:
        head = (self._heads[which] + 1) % self.slots
        self._frames[which, head] = obs[:, -1] if self.stack else obs
        self._ages[which, head] = age
        self._heads[which] = head
        self._filled[which] = np.minimum(self._filled[which] + 1, self.slots)
        # What was here is gone, and with it whatever stack needs it.
        ahead = np.arange(max(self.stack, 1))
        slots = (head[:, None] + ahead) % self.slots
        gone = (ahead == 0) | (self._ages[which[:, None], slots] >= ahead)
        self._mark(which[:, None] * self.slots + slots, gone, False)

    def _complete(self, which: np.ndarray, slot: np.ndarray, age: np.ndarray, ends: np.ndarray) -> None:
        """Let be drawn what the step from ``slot`` made whole: n steps back, or all since where the episode ended."""
        back = np.arange(self.n_step)
        whole = (back <= age[:, None]) & (ends[:, None] | (back == self.n_step - 1))
        self._mark(which[:, None] * self.slots + (slot[:, None] - back) % self.slots, whole, True)

    def _mark(self, places: np.ndarray, chosen: np.ndarray, whole: bool) -> None:
        places = places[chosen]
        marks = self._whole.reshape(-1)
        places = places[marks[places] != whole]
        marks[places] = whole
        self._size += len(places) if whole else -len(places)
        if self._tree is not None:
            self._tree.set(places, self._largest**self.priority_exponent if whole else 0.0)

    # Drawing

    def sample(self, batch_size: int, beta: float = 0.0) -> dict[str, Tensor]:
        """Draw B transitions, with replacement.

        Args:
            batch_size: B.
            beta: How far the weights undo the uneven draws, in [0, 1]: 1 wholly (the paper's annealed exponent).

        Returns:
            ``obs`` and ``next_obs`` (B, *obs_shape); ``action`` int64 (B,); ``reward`` float32 (B,), of up to n
            steps, discounted; ``terminated`` bool (B,); ``discount`` float32 (B,), the factor with which the value of
            ``next_obs`` counts unless terminated; ``index`` int64 (B,), for :meth:`update_priorities`; ``weight``
            float32 (B,), the paper's importance weights over the largest of the batch.

        Raises:
            ValueError: There is nothing to draw yet.
        """
        if not self._size:
            raise ValueError("the replay buffer has no whole transition yet: collect some before sampling")
        index = self._draw(batch_size)
        batch = self.transitions(index)
        batch["index"] = torch.from_numpy(index)
        batch["weight"] = torch.from_numpy(self._weights(index, beta))
        return batch

    def transitions(self, index: np.ndarray) -> dict[str, Tensor]:
        """The transitions at ``index`` (B,), as :meth:`sample` gives them, without ``index`` and ``weight``."""
        env, slot = np.divmod(index, self.slots)
        window = env[:, None], (slot[:, None] + np.arange(self.n_step)) % self.slots  # (B, n)
        ended = np.cumsum(self._ends[window], axis=1) > 0
        steps = 1 + (~ended[:, :-1]).sum(1)
        counts = np.arange(self.n_step) < steps[:, None]
        factors = np.where(counts, self.discount ** np.arange(self.n_step), 0)
        last = (slot + steps - 1) % self.slots
        values = {
            "obs": self._observations(env, slot),
            "action": self._actions[env, slot],
            "reward": (self._rewards[window] * factors).sum(1).astype(np.float32),
            "next_obs": self._observations(env, (slot + steps) % self.slots),
            "terminated": self._terminated[env, last],
            "discount": (self.discount**steps).astype(np.float32),
        }
        return {name: torch.from_numpy(value) for name, value in values.items()}

    def _draw(self, count: int) -> np.ndarray:
        if self._tree is not None:
            # One from each of equal parts, as in the paper: fewer repeats than with independent draws.
            masses = (np.arange(count) + self._random.random(count)) / count * self._tree.total
            return self._tree.find(masses)
        places = self._written(count)
        marks = self._whole.reshape(-1)
        for _ in range(DRAWS):
            wrong = np.flatnonzero(~marks[places])
            if not len(wrong):
                return places
            places[wrong] = self._written(len(wrong))
        wrong = np.flatnonzero(~marks[places])
        places[wrong] = self._random.choice(np.flatnonzero(marks), len(wrong))
        return places

    def _written(self, count: int) -> np.ndarray:
        """Places drawn evenly from those that were ever written."""
        ends = np.cumsum(self._filled)
        drawn = self._random.integers(ends[-1], size=count)
        env = np.searchsorted(ends, drawn, side="right")
        return env * self.slots + drawn - (ends[env] - self._filled[env])

    def _weights(self, index: np.ndarray, beta: float) -> np.ndarray:
        if self._tree is None:
            return np.ones(len(index), np.float32)
        # (N P)^-beta over its largest: N and the sum of priorities are the same in all, and cancel.
        priorities = self._tree.values[index]
        return ((priorities / priorities.min()) ** -beta).astype(np.float32)

    def _observations(self, env: np.ndarray, slot: np.ndarray) -> np.ndarray:
        if not self.stack:
            return self._frames[env, slot]
        back = np.arange(self.stack - 1, -1, -1)
        age = self._ages[env, slot][:, None]
        stacks = self._frames[env[:, None], (slot[:, None] - np.minimum(back, age)) % self.slots]
        if self.padding == "zeros":
            stacks[back > age] = 0
        return stacks

    # Saving

    @property
    def random_state(self) -> dict[str, Any]:
        """The state of the draws, as plain values."""
        return dict(self._random.bit_generator.state)

    @random_state.setter
    def random_state(self, state: dict[str, Any]) -> None:
        self._random.bit_generator.state = state

    def state_dict(self) -> dict[str, Any]:
        """All that is held, and the state of the draws, in tensors and plain values.

        Tensors of a full buffer share its memory, as those of a module's do: copy them to keep them past the next step.
        """
        used = int(self._filled.max())
        state: dict[str, Any] = {"arguments": self._arguments(), "size": self._size, "largest": float(self._largest)}
        for name, held in self._held().items():
            # A part would be saved with the whole memory behind it: copy it.
            state[name] = torch.from_numpy(held if used == self.slots else held[:, :used].copy())
        for name, ring in (("heads", self._heads), ("filled", self._filled), ("open", self._open)):
            state[name] = torch.from_numpy(ring.copy())
        if self._tree is not None:
            state["priorities"] = torch.from_numpy(self._tree.values.copy())
        state["random"] = self.random_state
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold what was saved, and draw on as it would have.

        Environments are not part of it: begin their episodes anew with :meth:`reset`, which cuts those left open.

        Raises:
            ValueError: The buffer was made with other arguments.
        """
        for name, now in self._arguments().items():
            if (saved := state["arguments"][name]) != now:
                raise ValueError(
                    f"the saved replay buffer has {name}={saved}, this one {name}={now}: resume with the same settings"
                )
        used = int(state["filled"].max())
        for name, held in self._held().items():
            held[:, :used] = state[name].numpy()
            held[:, used:] = 0
        for name, ring in (("heads", self._heads), ("filled", self._filled), ("open", self._open)):
            ring[:] = state[name].numpy()
        if self._tree is not None:
            self._tree.set(np.arange(self._tree.size), state["priorities"].numpy())
        self._size = state["size"]
        self._largest = state["largest"]
        self._random.bit_generator.state = state["random"]

    def _arguments(self) -> dict[str, Any]:
        return {
            "slots": self.slots,
            "num_envs": self.num_envs,
            "obs_shape": list(self.obs_shape),
            "obs_dtype": str(self.obs_dtype),
            "stack": self.stack,
            "padding": self.padding,
            "n_step": self.n_step,
            "discount": self.discount,
            "priority_exponent": self.priority_exponent,
        }

    def _held(self) -> dict[str, np.ndarray]:
        return {
            "frames": self._frames,
            "actions": self._actions,
            "rewards": self._rewards,
            "terminated": self._terminated,
            "ends": self._ends,
            "ages": self._ages,
            "whole": self._whole,
        }


def _check(
    capacity: int,
    obs_shape: tuple[int, ...],
    num_envs: int,
    stack: int,
    padding: str,
    n_step: int,
    discount: float,
    priority_exponent: float,
) -> None:
    for name, value, least in (("num_envs", num_envs, 1), ("stack", stack, 0), ("n_step", n_step, 1)):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    if padding not in ("repeat", "zeros"):
        raise ValueError(f"padding={padding!r} must be 'repeat' or 'zeros'")
    if stack and (not obs_shape or obs_shape[0] != stack):
        raise ValueError(f"stack={stack} must be the first number of obs_shape={tuple(obs_shape)}; 0 is for no stacks")
    if not 0 <= discount <= 1 or priority_exponent < 0:
        raise ValueError(f"discount={discount} must be in [0, 1], priority_exponent={priority_exponent} at least 0")
    # The oldest steps lose their stacks to the newest observation: what has just become whole must be out of its reach.
    least = (max(stack, 1) + n_step + 1) * num_envs
    if capacity < least:
        raise ValueError(
            f"capacity={capacity} is too small for num_envs={num_envs}, stack={stack} and n_step={n_step}: it must be "
            f"{least} at least"
        )


def _claim(needed: int, slots: int) -> None:
    """Say what will be taken, and refuse what is not there."""
    available = available_memory()
    rank_zero_info(f"replay buffer: {slots:,} observations, {needed / MEBIBYTE:,.1f} MiB when full")
    if available is not None and needed > available:
        raise ValueError(
            f"a replay buffer needs {needed / MEBIBYTE:,.0f} MiB when full, {available / MEBIBYTE:,.0f} MiB are free: "
            f"lower its capacity, of which {int(slots * available / needed):,} would fit"
        )


def available_memory() -> int | None:
    """Bytes of memory that this process may still take, or None where the system does not say (not Linux)."""
    found = []
    for line in _text("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    limit, used = _text("/sys/fs/cgroup/memory.max").strip(), _text("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        # Pages of files count as used there, though they give way.
        kept = dict(line.split() for line in _text("/sys/fs/cgroup/memory.stat").splitlines())
        found.append(int(limit) - int(used) + int(kept.get("inactive_file", 0)))
    return min(found, default=None)


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
