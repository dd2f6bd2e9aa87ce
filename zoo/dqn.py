"""Deep Q-learning: networks that value each action, and what training them means.

Papers: Mnih et al., 2015, Human-level control through deep reinforcement learning (Methods); van Hasselt, Guez and
Silver, 2016, Deep reinforcement learning with double Q-learning, https://arxiv.org/abs/1509.06461; Wang et al., 2016,
Dueling network architectures for deep reinforcement learning, https://arxiv.org/abs/1511.06581 (equation 9). Lecture:
EECS 498-007, lecture 21.
Differs from the dueling paper: gradients into the shared layers are not scaled by the root of a half.

Observations are vectors (N, D), or pixels (N, C, H, W) of C frames, uint8 or in [0, 1]. Values are (N, A), one of each
action.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Literal["huber", "squared"]

NATURE_LAYERS = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # channels, kernel and stride
NATURE_HIDDEN = 512


# Networks


class QNetwork(nn.Module):
    """Features of an observation, and from these the value of each action.

    Args:
        trunk: From observations to features (N, F).
        features: F.
        hidden: Width of the layer between features and values; None has none.
        num_actions: A.
        dueling: Value of the state plus what each action is better than the mean of all: two layers of ``hidden``.
    """

    def __init__(
        self, trunk: nn.Module, features: int, hidden: int | None, num_actions: int, dueling: bool = False
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.values = _head(features, hidden, num_actions)  # if dueling, of the actions' advantages
        self.state_value = _head(features, hidden, 1) if dueling else None

    def forward(self, obs: Tensor) -> Tensor:
        """Map observations to values (N, A)."""
        features = self.trunk(_scaled(obs))
        values = self.values(features)
        if self.state_value is None:
            return values
        return self.state_value(features) + values - values.mean(1, keepdim=True)


def vector_network(
    inputs: int, num_actions: int, hidden: Sequence[int] = (256, 256), dueling: bool = False
) -> QNetwork:
    """Fully connected layers with rectifiers: observations (N, D) to values (N, A).

    Args:
        inputs: D.
        num_actions: A.
        hidden: Widths of the layers between; the last is doubled if ``dueling``. None of them makes a linear map.
        dueling: See :class:`QNetwork`.
    """
    widths = [inputs, *hidden[:-1]]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return QNetwork(nn.Sequential(*layers), widths[-1], hidden[-1] if hidden else None, num_actions, dueling)


def nature_network(num_actions: int, frames: int = 4, side: int = 84, dueling: bool = False) -> QNetwork:
    """The network of the paper of 2015: pixels (N, C, S, S) to values (N, A); 1,686,180 parameters for 4 actions.

    Args:
        num_actions: A.
        frames: C.
        side: S, in pixels.
        dueling: See :class:`QNetwork`.

    Raises:
        ValueError: The pixels are too few for the three convolutions.
    """
    layers: list[nn.Module] = []
    before, left = frames, side
    for channels, kernel, stride in NATURE_LAYERS:
        layers += [nn.Conv2d(before, channels, kernel, stride), nn.ReLU()]
        before, left = channels, (left - kernel) // stride + 1
    if left < 1:
        raise ValueError(f"side={side} is too small for the network's convolutions: it must be at least 36 pixels")
    return QNetwork(nn.Sequential(*layers, nn.Flatten()), before * left**2, NATURE_HIDDEN, num_actions, dueling)


def copy_into(target: nn.Module, network: nn.Module, share: float = 1.0) -> None:
    """Move all tensors of ``target`` by ``share``, in [0, 1], of the way to those of ``network``; 1 copies them."""
    moved = zip(target.state_dict().values(), network.state_dict().values(), strict=True)
    with torch.no_grad():
        for theirs, ours in moved:
            if share == 1 or not theirs.is_floating_point():
                theirs.copy_(ours)
            else:
                theirs.lerp_(ours, share)


# What training means


def bellman_targets(
    reward: Tensor, terminated: Tensor, discount: Tensor, next_values: Tensor, next_online: Tensor | None = None
) -> Tensor:
    """What the values of the actions that were taken should be: y = r + discount max Q(s', a'), without gradient.

    A terminated episode gives no more than r. One that was truncated is valued as any other.

    Args:
        reward: (N,), of a step, or of several, discounted.
        terminated: bool (N,).
        discount: (N,): gamma, to the power of the steps that ``reward`` is of.
        next_values: (N, A), the target network's of the next observations.
        next_online: (N, A), the trained network's, which then choose the action (double Q-learning). None lets the
            target network choose.

    Returns:
        (N,).

    Raises:
        ValueError: The shapes do not fit.
    """
    _check(next_values, reward=reward, terminated=terminated, discount=discount)
    with torch.no_grad():
        choosing = next_values if next_online is None else next_online
        best = next_values.gather(1, choosing.argmax(1, keepdim=True)).squeeze(1)
        # Not a product: a value that is infinite or NaN must not come back from an episode's end.
        return reward + torch.where(terminated.bool(), torch.zeros_like(best), discount * best)


def bellman_errors(values: Tensor, action: Tensor, target: Tensor) -> Tensor:
    """Q(s, a) - y (N,) from values (N, A), actions int64 (N,) and targets y (N,), which get no gradient.

    Raises:
        ValueError: The shapes do not fit.
    """
    _check(values, action=action, target=target)
    return values.gather(1, action[:, None]).squeeze(1) - target.detach()


def bellman_loss(
    values: Tensor, action: Tensor, target: Tensor, weight: Tensor | None = None, loss: Loss = "huber"
) -> Tensor:
    """The mean over N of the loss of each :func:`bellman_errors`, times its weight.

    Args:
        values: (N, A).
        action: int64 (N,), in [0, A).
        target: (N,), of :func:`bellman_targets`.
        weight: (N,), of prioritised replay; None weighs all by 1.
        loss: ``squared`` is the lecture's, (Q - y)^2. ``huber`` is half of it up to an error of 1 and grows linearly
            from there: its gradient is that of the paper of 2015, which clips errors to [-1, 1].

    Raises:
        ValueError: The shapes do not fit, or there is no such loss.
    """
    errors = bellman_errors(values, action, target)
    if loss not in ("huber", "squared"):
        raise ValueError(f"loss={loss!r} must be 'huber' or 'squared'")
    losses = errors.square() if loss == "squared" else F.huber_loss(errors, torch.zeros_like(errors), reduction="none")
    if weight is None:
        return losses.mean()
    _check(values, weight=weight)
    return (weight * losses).mean()


def epsilon(step: int, start: float, end: float, steps: int) -> float:
    """How much to explore at ``step``, from 0: ``start`` to ``end`` in a straight line of ``steps``, then ``end``."""
    return end if step >= steps else start + (end - start) * step / steps


def _scaled(obs: Tensor) -> Tensor:
    return obs / 255 if obs.dtype == torch.uint8 else obs


def _head(features: int, hidden: int | None, outputs: int) -> nn.Sequential:
    if hidden is None:
        return nn.Sequential(nn.Linear(features, outputs))
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def _check(values: Tensor, **of_each: Tensor) -> None:
    """Tensors that do not fit would be broadcast to (N, N) without a word."""
    for name, tensor in of_each.items():
        if values.ndim != 2 or tensor.shape != values.shape[:1]:
            raise ValueError(
                f"values (N, A) and {name} (N,) are wanted: got {tuple(values.shape)} and {tuple(tensor.shape)}"
            )
