"""Control: a policy that learns from its own experience in environments, and the episodes that evaluate it."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from zoo.running.control_pictures import Curve, episode_figure, returns_figure, write_film
from zoo.running.optimizing import SchedulerCallable, configure_optimizers
from zoo.running.pictures import log_picture
from zoo.weights import NOT_SAVED, describe

Batch = dict[str, Tensor]

AT_ONCE = 256  # observations of an episode that are looked at together


class ControlTask(LightningModule):
    """Abstract: a subclass defines ``forward`` and ``loss``, and sets ``example_input_array``.

    ``forward`` maps observations (N, D), or pixels (N, C, H, W), to a number for each action (N, A): the greedy policy
    takes the largest. Whoever collects experience asks :meth:`act` and :meth:`exploration`.

    A training batch is a dict of tensors, as the subclass says; it may tell of the collecting: ``steps``, the steps in
    environments so far, and ``returns`` (E,), those of the episodes that ended since. A batch of an evaluation has
    ``returns`` (E,) and ``lengths`` (E,) of whole episodes of the greedy policy. One of prediction is an episode of T
    steps: ``obs`` (T, …), ``action`` (T,), ``reward`` (T,), and perhaps ``frames`` uint8 (T, H, W, 3) with
    ``frames_per_second``.

    Logs ``train/loss``; ``train/return``, the mean over the episodes since the last time; ``train/epsilon``, the chance
    of a random action, and ``train/environment_steps`` (every ``log_every_n_steps``); and of ``val`` and ``test`` the
    mean ``return`` with ``return_std``, its standard deviation over the episodes, their mean ``length`` and their
    number ``episodes``.

    Args:
        observation_shape: Of an observation, (D,) or (C, H, W).
        num_actions: A.
        discount: gamma, in [0, 1].
        optimizer: Makes the optimizer from the parameters.
        scheduler: Makes the schedule from the optimizer and the run's number of steps.

    Raises:
        ValueError: A number is out of range.
    """

    monitor = "val/return"
    monitor_mode = "max"

    example_input_array: Tensor

    def __init__(
        self,
        observation_shape: list[int],
        num_actions: int,
        discount: float,
        optimizer: OptimizerCallable,
        scheduler: SchedulerCallable | None,
    ) -> None:
        super().__init__()
        if len(observation_shape) not in (1, 3) or min(observation_shape) < 1:
            raise ValueError(f"observation_shape={list(observation_shape)} must be [D] or [C, H, W]")
        if num_actions < 1 or not 0 <= discount <= 1:
            raise ValueError(f"num_actions={num_actions} must be at least 1 and discount={discount} in [0, 1]")
        self.save_hyperparameters(ignore=[*NOT_SAVED])
        self.observation_shape = list(observation_shape)
        self.num_actions = num_actions
        self.discount = discount
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.example_input_array = torch.zeros(1, *observation_shape)
        self._steps = 0  # in environments, as far as is known
        self._returns: list[float] = []  # of episodes since they were logged
        self._curve = Curve()
        self._played: dict[str, list[Tensor]] = {"returns": [], "lengths": []}  # in this evaluation

    # What collecting asks

    def act(self, obs: np.ndarray, greedy: bool = False) -> np.ndarray:
        """Actions int64 (N,) for observations (N, …): the best ones, or as the policy draws them."""
        with torch.inference_mode():
            scores = self(torch.from_numpy(obs).to(self.device))
            actions = scores.argmax(1) if greedy else self.draw(scores)
            found: np.ndarray = actions.cpu().numpy()
        return found

    def draw(self, scores: Tensor) -> Tensor:
        """Actions int64 (N,) of the policy in training, from scores (N, A); the largest, but in subclasses."""
        return scores.argmax(1)

    def exploration(self, steps: int) -> float:
        """The chance of a random action after so many steps in environments; 0, but in subclasses."""
        return 0.0

    # Training

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a training batch, a scalar."""
        raise NotImplementedError(f"{type(self).__name__} must define loss()")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The recipe's optimizer over all trainable parameters, its schedule in steps."""
        return configure_optimizers(self, self.optimizer, self.scheduler)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch; it is logged, with what collecting gave, only at the steps that reach a logger."""
        self.hear(batch)
        loss = self.loss(batch)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            self.log_training(loss)
        return loss

    def hear(self, batch: Batch) -> None:
        """Take down what a training batch tells of the collecting."""
        if "steps" in batch:
            self._steps = int(batch["steps"])
        if "returns" in batch and len(batch["returns"]):
            returns = batch["returns"].tolist()
            self._returns += returns
            self._curve.episodes.append((self._steps, sum(returns) / len(returns)))
            self._curve.thin()

    def log_training(self, loss: Tensor) -> None:
        """Log a loss, and what collecting gave since the last time."""
        epsilon = self.exploration(self._steps)
        self._curve.epsilon.append((self._steps, epsilon))
        self._curve.thin()
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict({"train/epsilon": epsilon, "train/environment_steps": float(self._steps)})
        if self._returns:
            self.log("train/return", sum(self._returns) / len(self._returns), prog_bar=True)
            self._returns = []

    def on_train_end(self) -> None:
        """Show the returns over the run."""
        if self.trainer.is_global_zero and self.trainer.loggers and self._curve.episodes:
            log_picture(self, "train/returns", returns_figure(self._curve))

    # Evaluation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count the episodes of a batch."""
        self._count(batch)

    def on_validation_epoch_end(self) -> None:
        """Log over all episodes."""
        numbers = self._log_episodes("val")
        if numbers and not self.trainer.sanity_checking:
            self._curve.evaluations.append((self._steps, numbers["return"], numbers["return_std"]))
            self._curve.thin()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Count the episodes of a batch."""
        self._count(batch)

    def on_test_epoch_end(self) -> None:
        """Log over all episodes."""
        self._log_episodes("test")

    def _count(self, batch: Batch) -> None:
        for name, played in self._played.items():
            played.append(batch[name].cpu().double())

    def _log_episodes(self, stage: Literal["val", "test"]) -> dict[str, float]:
        """Every process has played the same episodes: there is nothing to put together."""
        if not self._played["returns"]:
            return {}
        returns, lengths = (torch.cat(played) for played in self._played.values())
        self._played = {"returns": [], "lengths": []}
        numbers = {
            "return": float(returns.mean()),
            "return_std": float(returns.std(correction=0)),
            "length": float(lengths.mean()),
            "episodes": float(len(returns)),
        }
        for name, value in numbers.items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "return", rank_zero_only=False, sync_dist=False)
        return numbers

    # Prediction

    def scores_of(self, obs: Tensor) -> Tensor:
        """What :meth:`forward` says of each observation of an episode, (T, A), without gradients."""
        with torch.no_grad():
            return torch.cat([self(some) for some in obs.split(AT_ONCE)])

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """The episode's ``return``, ``length``, ``actions`` and, at each step, the ``scores`` of all actions.

        What is seen of it is under ``frames`` and ``frames_per_second``, which go to a film.
        """
        row: dict[str, Any] = {
            "return": float(batch["reward"].sum()),
            "length": len(batch["reward"]),
            "actions": batch["action"].tolist(),
            "scores": [[round(score, 4) for score in of] for of in self.scores_of(batch["obs"]).tolist()],
        }
        if "frames" in batch:
            row |= {"frames": batch["frames"].cpu(), "frames_per_second": float(batch["frames_per_second"])}
        return [row]

    def write_prediction(self, folder: Path, number: int, prediction: dict[str, Any]) -> dict[str, Any]:
        """Write the film of an episode to ``<folder>/episodes/<number>.gif``; the rest is a line of text."""
        row = {key: value for key, value in prediction.items() if not key.startswith("frames")}
        if "frames" in prediction:
            row["film"] = f"episodes/{number:05d}.gif"
            write_film(folder / row["film"], prediction["frames"].numpy(), prediction["frames_per_second"])
        return row

    def draw_predictions(self, batch: Batch, predictions: list[dict[str, Any]]) -> Any:
        """Scenes of the first episode above what the model thought of each action."""
        return episode_figure(predictions[0], self.what_scores_are)

    @property
    def what_scores_are(self) -> str:
        """What :meth:`forward` gives, as a figure's axis says it."""
        return "score"

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in the file what it is; keep the curve of the returns."""
        checkpoint["zoo"] = describe(self)
        checkpoint["curve"] = {"steps": self._steps, "returns": list(self._returns)} | self._curve.plain()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the curve."""
        if curve := checkpoint.get("curve"):
            self._steps, self._returns = curve["steps"], list(curve["returns"])
            self._curve = Curve.of(curve)
