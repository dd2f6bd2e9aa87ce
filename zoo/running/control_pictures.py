"""Pictures of learning to act: returns over a run, films of episodes, values along one, and a grid world's policy."""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from zoo.running.checkpoint import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 1000  # of a part of a curve, about: of longer ones some are left out evenly
FILM_FRAMES = 250  # of a film at most; of longer episodes some are left out evenly
LEAST_MILLISECONDS = 20  # a frame: viewers show shorter ones slowly
SCENES = 8  # of an episode on a sheet
SMOOTHED = 20  # episodes' returns whose mean is drawn as a line
ARROWS = ((0, 0.3), (0.3, 0), (0, -0.3), (-0.3, 0))  # x and y of up, right, down, left


@dataclass
class Curve:
    """What is drawn of a run, by the steps in environments; of a long run no more than some thousand points a part.

    Attributes:
        episodes: (steps, mean return of training episodes that ended).
        epsilon: (steps, chance of a random action).
        evaluations: (steps, mean return of the greedy policy, its standard deviation over episodes).
    """

    episodes: list[tuple[int, float]] = field(default_factory=list)
    epsilon: list[tuple[int, float]] = field(default_factory=list)
    evaluations: list[tuple[int, float, float]] = field(default_factory=list)

    def thin(self) -> None:
        """Leave out points of what has become long; the same ones, wherever a run was stopped and gone on with."""
        for points in vars(self).values():
            if len(points) > 2 * POINTS:
                points[:] = thinned(points)

    def plain(self) -> dict[str, Any]:
        """As lists, for a checkpoint."""
        return {name: [list(point) for point in points] for name, points in vars(self).items()}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "Curve":
        """What :meth:`plain` gave; other keys are left out."""
        return cls(**{name: [tuple(point) for point in plain[name]] for name in ("episodes", "epsilon", "evaluations")})


def thinned(points: list[Any]) -> list[Any]:
    """The first of the points (steps, …) in each of at most 1000 equal parts of the steps so far."""
    width = 1  # a power of 2, so that wider parts are made of whole ones
    while points[-1][0] // width >= POINTS:
        width *= 2
    return [point for before, point in pairwise([(-width,), *points]) if point[0] // width != before[0] // width]


def returns_figure(curve: Curve) -> "Figure":
    """Returns in training, exploring, and of the greedy policy, with epsilon on an axis of its own."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps, returns = (np.array(part, dtype=float) for part in zip(*curve.episodes, strict=True))
    axes.plot(steps, returns, ".", color="0.75", markersize=3)
    window = min(SMOOTHED, len(returns))
    smooth = np.convolve(returns, np.ones(window) / window, "valid")
    axes.plot(steps[window - 1 :], smooth, color="0.35", label=f"exploring, mean of {window}")
    if curve.evaluations:
        at, mean, std = (np.array(part, dtype=float) for part in zip(*curve.evaluations, strict=True))
        axes.fill_between(at, mean - std, mean + std, color="tab:blue", alpha=0.15, linewidth=0)
        axes.plot(at, mean, "o-", color="tab:blue", markersize=4, label="greedy, mean ± std of the episodes")
    axes.set_xlabel("steps in the environments")
    axes.set_ylabel("return of an episode")
    axes.margins(x=0.01)
    if any(epsilon for _, epsilon in curve.epsilon):
        other = axes.twinx()
        at, epsilon = (np.array(part, dtype=float) for part in zip(*curve.epsilon, strict=True))
        other.plot(at, epsilon, color="tab:red", linewidth=1, label="ε")
        other.set_ylabel("ε, chance of a random action", color="tab:red")
        other.set_ylim(0, 1.02)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def episode_figure(episode: dict[str, Any], what: str) -> "Figure":
    """Scenes of an episode above the scores of each action along it.

    Args:
        episode: ``return``, ``scores`` (T, A) as lists, ``actions`` (T,), and perhaps ``frames`` uint8 (T, H, W, 3).
        what: What the scores are.
    """
    from matplotlib.figure import Figure

    scores, frames = np.array(episode["scores"]), episode.get("frames", ())
    seen = len(frames) > 0
    figure = Figure(figsize=(11, 5 if seen else 3.6), layout="constrained")
    figure.suptitle(f"an episode of {len(scores)} steps, return {episode['return']:g}", fontsize=11)
    count = min(SCENES, len(scores))
    chosen = np.linspace(0, len(scores) - 1, count).round().astype(int)
    grid = figure.add_gridspec(1 + seen, count, height_ratios=[1, 2] if seen else [1])
    for place, step in enumerate(chosen if seen else []):
        scene = figure.add_subplot(grid[0, place])
        scene.imshow(frames[step].numpy())
        scene.set_title(f"step {step}", fontsize=8)
        scene.set_xticks([])
        scene.set_yticks([])
    axes = figure.add_subplot(grid[-1, :])
    for action in range(scores.shape[1]):
        axes.plot(scores[:, action], linewidth=1, label=f"action {action}")
    taken = np.array(episode["actions"])
    axes.plot(scores[np.arange(len(taken)), taken], "k.", markersize=2, label="taken")
    axes.set_xlabel("step")
    axes.set_ylabel(what)
    axes.margins(x=0.01)
    axes.legend(fontsize=8, ncols=min(7, scores.shape[1] + 1))
    return figure


def policy_figure(values: np.ndarray, side: int, title: str) -> "Figure":
    """A grid world's best moves as arrows over the values of its cells.

    Args:
        values: (S, 4), of up, right, down and left, row by row; the first and the last cell end an episode.
        side: Cells of a side; S is its square.
        title: Heading.
    """
    from matplotlib.figure import Figure

    best = values.max(1)
    best[[0, -1]] = 0
    figure = Figure(figsize=(1.1 * side + 1.6, 1.1 * side + 0.8), layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(best.reshape(side, side), cmap="viridis")
    figure.colorbar(picture, ax=axes, label="value of the cell", shrink=0.8)
    for cell in range(1, side**2 - 1):
        row, column = divmod(cell, side)
        for move in np.flatnonzero(values[cell] > best[cell] - 1e-2):  # those that are as good
            x, y = ARROWS[move]
            axes.annotate("", (column + x, row - y), (column, row), arrowprops={"arrowstyle": "->", "color": "w"})
        axes.text(column, row + 0.42, f"{best[cell]:.2f}", ha="center", va="bottom", fontsize=8, color="w")
    for end in (0, side - 1):
        axes.text(end, end, "end", ha="center", va="center", fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=11)
    return figure


def write_film(path: Path, frames: np.ndarray, frames_per_second: float) -> None:
    """Write an animation, complete or not at all; it lasts as long as the episode, unless that would be too fast.

    Args:
        path: Ends in ``.gif``.
        frames: uint8 (T, H, W, 3).
        frames_per_second: As they were taken.
    """
    chosen = np.linspace(0, len(frames) - 1, min(len(frames), FILM_FRAMES)).round().astype(int)
    each = max(LEAST_MILLISECONDS, round(1000 * len(frames) / frames_per_second / len(chosen)))
    # Few colours, found once: a palette for each frame would flicker and take most of the time.
    palette = Image.fromarray(frames[0]).quantize(64)
    shown = [Image.fromarray(frames[k]).quantize(palette=palette, dither=Image.Dither.NONE) for k in chosen]
    with replacing(path) as partial:
        shown[0].save(partial, save_all=True, append_images=shown[1:], duration=each, loop=0)
