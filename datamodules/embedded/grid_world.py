"""A grid world small enough to be solved exactly: reach a corner in as few steps as can be.

Lecture: EECS 498-007, lecture 21, "Grid World": each step costs 1, and two cells end the episode. Sutton and Barto,
2018, Reinforcement learning, example 4.1, has it with four cells a side and the corners as ends. Needs gymnasium:
``pip install 'zoo[control]'``.
"""

from typing import Any, NamedTuple

import numpy as np

try:
    import gymnasium
except ImportError as error:
    raise ModuleNotFoundError("the grid world needs gymnasium: pip install 'zoo[control]'") from error

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # rows and columns of up, right, down, left


class Model(NamedTuple):
    """All that can happen, in S states and with A actions.

    Attributes:
        chances: float64 (S, A, S), of each state to follow.
        rewards: float64 (S, A).
        terminal: bool (S,), the states in which an episode is over; nothing is to be had from there.
    """

    chances: np.ndarray
    rewards: np.ndarray
    terminal: np.ndarray


class GridWorld(gymnasium.Env[np.ndarray, np.int64]):
    """Cells of a square, row by row, of which the first and the last end the episode.

    An observation is the cell as float32 (S,), 1 at its place and 0 elsewhere, so that a linear layer is a table.
    Actions are up, right, down, left; a step against the edge stays. Every step gives reward -1. Episodes begin in any
    cell but the two, each as likely.

    Args:
        side: Cells of a side; S is its square.
        slip: Chance in [0, 1] that a step goes any of the four ways instead.
        max_steps: Steps after which an episode is truncated.

    Raises:
        ValueError: A number is out of range.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(self, side: int = 4, slip: float = 0.0, max_steps: int = 100) -> None:
        if side < 2 or not 0 <= slip <= 1 or max_steps < 1:
            raise ValueError(
                f"side={side} must be at least 2, slip={slip} in [0, 1] and max_steps={max_steps} at least 1"
            )
        self.side = side
        self.slip = slip
        self.max_steps = max_steps
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (side * side,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(len(MOVES))
        self._cell = 0
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Begin in a random cell; ``options`` may name it as ``cell``, in ``[1, S - 1)``."""
        super().reset(seed=seed)
        last = self.side**2 - 1
        self._cell = int(self.np_random.integers(1, last))
        if options and "cell" in options:
            self._cell = int(options["cell"])
            if not 0 < self._cell < last:
                raise ValueError(f"cell={self._cell} must be in [1, {last}): the others end the episode")
        self._steps = 0
        return self._seen(), {}

    def step(self, action: int | np.int64) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Move one cell."""
        if self.np_random.random() < self.slip:
            action = int(self.np_random.integers(len(MOVES)))
        self._cell = _moved(self._cell, int(action), self.side)
        self._steps += 1
        terminated = self._cell in (0, self.side**2 - 1)
        return self._seen(), -1.0, terminated, not terminated and self._steps >= self.max_steps, {}

    def model(self) -> Model:
        """What value iteration needs."""
        states = self.side**2
        chances = np.zeros((states, len(MOVES), states))
        for cell in range(states):
            to = [_moved(cell, move, self.side) for move in range(len(MOVES))]
            for action, wanted in enumerate(to):
                chances[cell, action, wanted] += 1 - self.slip
                np.add.at(chances[cell, action], to, self.slip / len(MOVES))
        terminal = np.zeros(states, bool)
        terminal[[0, -1]] = True
        return Model(chances, np.full((states, len(MOVES)), -1.0), terminal)

    def _seen(self) -> np.ndarray:
        seen = np.zeros(self.side**2, np.float32)
        seen[self._cell] = 1
        return seen


def value_iteration(model: Model, discount: float, tolerance: float = 1e-10) -> np.ndarray:
    """The best values Q* (S, A) of a model, float64, by the Bellman equation repeated until nothing changes.

    Rows of terminal states are 0.

    Args:
        model: What can happen.
        discount: Factor in [0, 1]; 1 only where every policy comes to an end at last, or the best one does.
        tolerance: Change below which it ends.
    """
    alive = ~model.terminal[:, None]
    values = np.zeros(model.rewards.shape)
    while True:
        best = values.max(1)
        renewed = alive * (model.rewards + discount * model.chances @ best)
        if np.abs(renewed - values).max() < tolerance:
            return renewed
        values = renewed


def _moved(cell: int, action: int, side: int) -> int:
    row, column = divmod(cell, side)
    down, right = MOVES[action]
    return min(max(row + down, 0), side - 1) * side + min(max(column + right, 0), side - 1)
