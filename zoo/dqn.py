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
from typing import Any, Literal, cast

import torch
from lightning import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler

from zoo.arguments import plain_arguments
from zoo.running.control_pictures import policy_figure
from zoo.running.optimizing import SchedulerCallable, configure_optimizers
from zoo.running.pictures import log_picture
from zoo.tasks.control import Batch, ControlTask
from zoo.weights import load_weights

Loss = Literal["huber", "squared"]

NATURE_LAYERS = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # channels, kernel and stride
NATURE_HIDDEN = 512
NEWS = ("steps", "returns")  # what a batch tells of the collecting: of all its transitions together


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
    if weight is not None:
        _check(values, weight=weight)
    return loss_of_errors(bellman_errors(values, action, target), weight, loss)


def loss_of_errors(errors: Tensor, weight: Tensor | None = None, loss: Loss = "huber") -> Tensor:
    """:func:`bellman_loss` of errors (N,) that are known already.

    Raises:
        ValueError: There is no such loss.
    """
    if loss not in ("huber", "squared"):
        raise ValueError(f"loss={loss!r} must be 'huber' or 'squared'")
    losses = errors.square() if loss == "squared" else F.huber_loss(errors, torch.zeros_like(errors), reduction="none")
    return losses.mean() if weight is None else (weight * losses).mean()


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


class DQN(ControlTask):
    """Deep Q-network.

    A training batch has ``obs`` and ``next_obs`` (N, …), ``action`` int64 (N,), ``reward`` float32 (N,) and
    ``terminated`` bool (N,); where several steps are one transition ``discount`` (N,), and of prioritised replay
    ``index`` and ``weight`` (N,): the errors are then told to the data module's ``update_priorities(index, errors)``.
    With ``updates_per_step`` U all these are (U, N, …): so many batches, and optimizer steps, one after the other.

    Args:
        observation_shape: Of an observation: (D,), or (C, S, S) of C frames of S pixels a side.
        num_actions: A.
        discount: gamma, in [0, 1]; of a batch with ``discount`` that one counts.
        hidden: Widths of the layers between vectors and values; none of them is a table of one-hot states. Of pixels
            the network is that of the paper of 2015.
        double: The trained network chooses the next action, the target network values it.
        dueling: The value of the state, and what each action is better than the mean of all, have layers of their own.
        loss: ``huber``, as in the paper of 2015, which clips errors to [-1, 1], or ``squared``, as in the lecture.
        target_every: Optimizer steps between two copies into the target network.
        target_share: How far each copy goes, in (0, 1]; 1 copies.
        epsilon_start: Chance of a random action at first.
        epsilon_end: What it falls to in a straight line.
        epsilon_steps: Steps in the environments over which it falls.
        updates_per_step: Optimizer steps U of a training step. The run is the same whatever it is; more than one spares
            a small network much of what a training step costs beside them. What counts optimizer steps
            (``max_steps``, ``target_every``, schedules) counts each of them, what counts batches
            (``log_every_n_steps``) all of them as one. The recipe's data module tells it.
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
        hidden: Sequence[int] = (256, 256),
        double: bool = False,
        dueling: bool = False,
        loss: Loss = "huber",
        target_every: int = 128,
        target_share: float = 1.0,
        epsilon_start: float = 1.0,
        epsilon_end: float = 0.04,
        epsilon_steps: int = 8000,
        updates_per_step: int = 1,
        weights: str | None = None,
        optimizer: OptimizerCallable = lambda params: optim.Adam(params, lr=2.3e-3, fused=True),
        scheduler: SchedulerCallable | None = None,
    ) -> None:
        super().__init__(list(observation_shape), num_actions, discount, optimizer, scheduler)
        if target_every < 1 or not 0 < target_share <= 1:
            raise ValueError(f"target_every={target_every} must be at least 1, target_share={target_share} in (0, 1]")
        if not 0 <= epsilon_end <= 1 or not 0 <= epsilon_start <= 1:
            raise ValueError(f"epsilon_start={epsilon_start} and epsilon_end={epsilon_end} must be in [0, 1]")
        if loss not in ("huber", "squared"):
            raise ValueError(f"loss={loss!r} must be 'huber' or 'squared'")
        if updates_per_step < 1:
            raise ValueError(f"updates_per_step={updates_per_step} must be at least 1")
        self.updates_per_step = updates_per_step
        self.double_q = double
        self.loss_kind = loss
        self.target_every = target_every
        self.target_share = target_share
        self.epsilon = epsilon_start, epsilon_end, epsilon_steps
        self.network = self._build(hidden, dueling)
        self.target_network = self._build(hidden, dueling).requires_grad_(False)
        if weights is not None:
            load_weights(self, weights)
        else:
            copy_into(self.target_network, self.network)

    def _build(self, hidden: Sequence[int], dueling: bool) -> QNetwork:
        shape = self.observation_shape
        if len(shape) == 1:
            return vector_network(shape[0], self.num_actions, hidden, dueling)
        return nature_network(self.num_actions, shape[0], shape[1], dueling)

    @property
    def what_scores_are(self) -> str:
        """Values."""
        return "Q(s, a)"

    def forward(self, obs: Tensor) -> Tensor:
        """Map observations (N, …) to the values of all actions (N, A)."""
        return self.network(obs)

    def exploration(self, steps: int) -> float:
        """Epsilon after so many steps in environments."""
        return epsilon(steps, *self.epsilon)

    def loss(self, batch: Batch) -> Tensor:
        """The Bellman loss of a batch of transitions; tells prioritised replay its errors."""
        with torch.no_grad():
            next_values = self.target_network(batch["next_obs"])
            next_online = self.network(batch["next_obs"]) if self.double_q else None
        reward = batch["reward"]
        discount = batch.get("discount")
        discount = torch.full_like(reward, self.discount) if discount is None else discount
        target = bellman_targets(reward, batch["terminated"], discount, next_values, next_online)
        errors = bellman_errors(self.network(batch["obs"]), batch["action"], target)
        if "index" in batch:
            update: Any = getattr(getattr(self._trainer, "datamodule", None), "update_priorities", None)
            if update is not None:
                update(batch["index"], errors.detach())
        weight = batch.get("weight")
        if weight is not None:
            _check(next_values, weight=weight)
        return loss_of_errors(errors, weight, self.loss_kind)

    # A training step of several updates

    def configure_callbacks(self) -> list[Callback]:
        """None; Lightning asks for them before it refuses to clip for a module that optimizes by hand."""
        if self.trainer.state.fn == "fit":
            self.automatic_optimization = True
        return []

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The recipe's optimizer over all trainable parameters, its schedule in updates."""
        self.automatic_optimization = self.updates_per_step == 1
        if not self.automatic_optimization and self.trainer.accumulate_grad_batches > 1:
            raise ValueError(
                "trainer.accumulate_grad_batches gathers gradients of several batches for an update, updates_per_step "
                "makes several updates: set one of them to 1"
            )
        return configure_optimizers(self, self.optimizer, self.scheduler, updates=self.updates_per_step)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch; of several the last one's, after an optimizer step for each."""
        if self.automatic_optimization:
            self._refresh_target()
            return super().training_step(batch, batch_idx)
        self.hear(batch)
        optimizer = cast(LightningOptimizer, self.optimizers())
        schedule = cast(LRScheduler | None, self.lr_schedulers())
        losses = [self._update(part, optimizer, schedule) for part in self._parts(batch)]
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (batch_idx + 1) % every == 0:
            self.log_training(losses[-1])
        return losses[-1]

    def _parts(self, batch: Batch) -> list[Batch]:
        """The U batches of one; fewer where the run's last step comes before."""
        shape = tuple(batch["reward"].shape)
        if len(shape) != 2 or shape[0] != self.updates_per_step:
            raise ValueError(
                f"updates_per_step={self.updates_per_step}, so that a training batch must hold rewards "
                f"({self.updates_per_step}, N): got {shape}. Set updates_per_step of the data module to the same"
            )
        split = {name: tensor.unbind() for name, tensor in batch.items() if name not in NEWS}
        last = self.trainer.max_steps
        count = shape[0] if last < 0 else min(shape[0], last - self.global_step)
        return [{name: parts[number] for name, parts in split.items()} for number in range(count)]

    def _update(self, batch: Batch, optimizer: LightningOptimizer, schedule: LRScheduler | None) -> Tensor:
        """An optimizer step; the batch's loss before it."""
        self._refresh_target()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        return loss.detach()

    def on_before_optimizer_step(self, optimizer: optim.Optimizer) -> None:
        """Clip as the trainer is told to, which it does by itself only where it optimizes by itself."""
        if not self.automatic_optimization:
            self.clip_gradients(optimizer)

    def _refresh_target(self) -> None:
        """Copy into the target network when it is time: before an update, and so after any checkpoint."""
        if self.global_step % self.target_every == 0:
            copy_into(self.target_network, self.network, self.target_share)

    def on_test_epoch_end(self) -> None:
        """Also hold the values against the best ones and draw the policy, where the data module knows the world."""
        super().on_test_epoch_end()
        best_of: Any = getattr(getattr(self.trainer, "datamodule", None), "best_values", None)
        best = None if best_of is None else best_of()
        if best is None:
            return
        states = len(best)
        values = self.scores_of(torch.eye(states, device=self.device)).cpu().double()
        error = (values - torch.from_numpy(best))[1:-1].abs().max()  # nothing is learnt of the ends, where none acts
        self.log("test/value_error", float(error), rank_zero_only=False, sync_dist=False)
        log_picture(self, "test/policy", policy_figure(values.numpy(), round(states**0.5), "what was learnt"))
