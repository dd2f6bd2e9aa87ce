"""Gymnasium's environments as data: experience collected by the model's own policy, and episodes that evaluate it.

Needs gymnasium, and ale-py for Atari's games: ``pip install 'zoo[control]'``.

The model that trains is asked through the Trainer for two things, and never imported: ``act(obs, greedy)``, actions
int64 (N,) for observations (N, *shape), both numpy; and, where it has it, ``exploration(steps)``, the chance of a
random action after so many steps in the environments. Without a Trainer actions are drawn evenly.
"""

import os
from collections.abc import Iterator
from functools import cached_property, partial
from itertools import repeat
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor

from datamodules.environments import Collector, Episode, Policy, evaluate, gymnasium_or_refuse
from datamodules.replay import ReplayBuffer

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

GRID_WORLD = "GridWorld"  # datamodules.embedded.grid_world, beside gymnasium's own
ATARI = "ALE/"
# The paper of 2015, table 1, but for what ale-py does by itself: 4 frames an action, the largest of the last two, 84 x
# 84 grey pixels, 4 of them stacked, up to 30 actions that do nothing at first.
ATARI_OPTIONS = {"repeat_action_probability": 0.0, "noop_max": 30, "use_fire_reset": True}
ATARI_TRAINING = {"episodic_life": True, "reward_clipping": True}
ATARI_EVALUATION = {"episodic_life": False, "reward_clipping": False}
SEEDS = {"val": 2**20, "test": 2**21, "predict": 2**21}  # of evaluations; they differ from those of training
BURST_BYTES = 2**24  # of batches that are drawn at once
FILM_SIDE = 300  # pixels of a film's longer side, about

Batch = dict[str, Tensor]
Option = bool | int | float | str


class EnvironmentsDataModule(LightningDataModule):
    """Abstract: vector environments that training collects from, and others that evaluate a frozen greedy policy.

    A batch of validation or test is a dict of whole episodes: ``returns`` float32 (E,), the sums of their rewards, not
    discounted, and ``lengths`` int64 (E,). A batch of prediction is one episode of T steps: ``obs`` (T, *shape),
    ``action`` int64 (T,), ``reward`` float32 (T,) and, where the environment can be seen, ``frames`` uint8 (T, H, W, 3)
    and ``frames_per_second`` ().

    A subclass defines :meth:`collected`, the batches of training. Training is done by one process; an evaluation by
    several, each of which plays the same episodes.

    Args:
        environment: gymnasium's name of it, such as ``CartPole-v1`` or ``ALE/Pong-v5``; ``GridWorld`` is
            :class:`~datamodules.embedded.grid_world.GridWorld`. Atari's are preprocessed as in the paper of 2015: they
            are trained on with rewards clipped to their sign and a lost life as an end, and evaluated on neither.
        num_envs: Environments N that are stepped together.
        discount: Factor in [0, 1] by which a reward counts less with each step; the model is told.
        val_episodes: Episodes of a validation.
        test_episodes: Episodes of a test.
        predict_episodes: Episodes of a prediction.
        eval_envs: Environments of an evaluation, which are stepped together.
        eval_epsilon: Chance of a random action there; the paper of 2015 has 0.05.
        seed: Seed of environments and exploration; None takes the run's. Evaluations have seeds of their own, so that
            all models meet the same episodes.
        options: Arguments of the environment, such as ``{sutton_barto_reward: true}``.

    Raises:
        ValueError: A number is out of range, or there is no such environment.
        ModuleNotFoundError: gymnasium is not installed.
    """

    def __init__(
        self,
        environment: str,
        num_envs: int,
        discount: float,
        val_episodes: int,
        test_episodes: int,
        predict_episodes: int,
        eval_envs: int,
        eval_epsilon: float,
        seed: int | None,
        options: dict[str, Option] | None,
    ) -> None:
        super().__init__()
        counts = {"num_envs": num_envs, "test_episodes": test_episodes, "eval_envs": eval_envs}
        for name, value in (counts | {"val_episodes": val_episodes, "predict_episodes": predict_episodes}).items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name, share in (("discount", discount), ("eval_epsilon", eval_epsilon)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share} must be in [0, 1]")
        self.environment = environment
        self.num_envs = num_envs
        self.discount = discount
        self.episodes = {"val": val_episodes, "test": test_episodes, "predict": predict_episodes}
        self.eval_envs = eval_envs
        self.eval_epsilon = eval_epsilon
        self.seed = seed
        self.options = dict(options or {})
        self.collector: Collector | None = None
        self._restored: dict[str, Any] = {}

    def __str__(self) -> str:
        # Lightning's own makes every loader to count its batches, and with it environments and a buffer.
        return f"{type(self).__name__}({self.environment})"

    @property
    def num_actions(self) -> int:
        """The number of actions; they are numbered from 0."""
        return self._spaces[0]

    @property
    def observation_shape(self) -> list[int]:
        """The shape of an observation, without the environments' axis."""
        return self._spaces[1]

    def make(self, num_envs: int, training: bool = True, **more: Any) -> "VectorEnv":
        """Vector environments; their owner closes them.

        Args:
            num_envs: How many.
            training: Of Atari, whether rewards are clipped and a lost life ends an episode.
            more: For ``gymnasium.make_vec``.

        Raises:
            ValueError: There is no such environment, or it takes no such option.
        """
        gymnasium = gymnasium_or_refuse()
        options: dict[str, Any] = dict(self.options)
        try:
            if self.environment == GRID_WORLD:
                from datamodules.embedded.grid_world import GridWorld

                return gymnasium.vector.SyncVectorEnv([partial(GridWorld, **options)] * num_envs, **more)
            if self.environment.startswith(ATARI):
                _register_atari()
                options = ATARI_OPTIONS | (ATARI_TRAINING if training else ATARI_EVALUATION) | options
            return gymnasium.make_vec(self.environment, num_envs, **more, **options)
        except (gymnasium.error.Error, TypeError) as error:
            raise ValueError(f"environment={self.environment!r} with options={self.options}: {error}") from error

    def setup(self, stage: str) -> None:
        """Make what training collects from, once."""
        if stage != "fit" or self.collector is not None:
            return
        if self.trainer is not None and self.trainer.world_size > 1:
            raise ValueError(
                f"{type(self).__name__} trains on one process, whose experience is its own: set trainer.devices 1"
            )
        self._policy()  # a model without one is refused at once
        self.collector = Collector(self.make_training(), self._seed())

    def make_training(self) -> "VectorEnv":
        """The environments that training collects from."""
        return self.make(self.num_envs)

    def collected(self, first: int) -> Iterator[Batch]:
        """The batches of an epoch from number ``first`` on."""
        raise NotImplementedError(f"{type(self).__name__} must define collected()")

    @property
    def batches_per_epoch(self) -> int:
        """Training batches of an epoch."""
        raise NotImplementedError(f"{type(self).__name__} must define batches_per_epoch")

    def train_dataloader(self) -> "CollectedBatches":
        """The batches of training, collected as they are asked for."""
        if self.collector is None:
            self.setup("fit")
        return CollectedBatches(self)

    def val_dataloader(self) -> "PlayedEpisodes":
        """The episodes of a validation, as one batch."""
        return PlayedEpisodes(self, "val")

    def test_dataloader(self) -> "PlayedEpisodes":
        """The episodes of a test, as one batch."""
        return PlayedEpisodes(self, "test")

    def predict_dataloader(self) -> "PlayedEpisodes":
        """Episodes with their observations and pictures, each a batch."""
        return PlayedEpisodes(self, "predict")

    def play(self, stage: Literal["val", "test"]) -> list[Episode]:
        """The episodes of an evaluation, with the model's greedy policy, in environments of their own."""
        count = self.episodes[stage]
        environments = self.make(min(self.eval_envs, count), training=False)
        try:
            return evaluate(environments, self._policy(greedy=True), count, SEEDS[stage], self.eval_epsilon)
        finally:
            environments.close()

    def film(self, number: int) -> Batch:
        """One episode of the greedy policy with what is seen; the same ``number`` is the same episode."""
        environments = self._seen_environments()
        try:
            return self._filmed(environments, SEEDS["predict"] + 1 + number)
        finally:
            environments.close()

    def best_values(self) -> np.ndarray | None:
        """The best values Q* (S, A) of a world small enough to be solved exactly, the grid world; else None."""
        if self.environment != GRID_WORLD:
            return None
        from datamodules.embedded.grid_world import GridWorld, value_iteration

        options: Any = self.options
        return value_iteration(GridWorld(**options).model(), self.discount)

    def state_dict(self) -> dict[str, Any]:
        """What is collected so far, for an exact resumption."""
        if self.collector is None:
            return {}
        return {"world": f"{self.environment} {self.options}", "collector": self.collector.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: It is of another environment, or of the same with other options.
        """
        world = f"{self.environment} {self.options}"
        if state.get("world", world) != world:
            raise ValueError(
                f"the checkpoint has the experience of {state['world']}, the data module is {world}: resume with the "
                "same, or start anew with --model.init_args.weights"
            )
        if self.collector is not None and "collector" in state:
            self.collector.load_state_dict(state["collector"])

    def teardown(self, stage: str) -> None:
        """Close the environments that training collected from."""
        if stage == "fit" and self.collector is not None:
            self.collector.environments.close()
            self.collector = None

    def _policy(self, greedy: bool = False) -> Policy:
        if self.trainer is None:
            random = np.random.default_rng(0)
            return lambda obs: random.integers(self.num_actions, size=len(obs))
        module = self.trainer.lightning_module
        if not hasattr(module, "act"):
            raise ValueError(
                f"{type(module).__name__} plays no game: {type(self).__name__} needs a model with act(obs, greedy), "
                "such as zoo.DQN"
            )
        act: Any = module.act
        return lambda obs: act(obs, greedy)

    def _exploration(self, steps: int) -> float:
        module = None if self.trainer is None else self.trainer.lightning_module
        explore: Any = getattr(module, "exploration", None)
        return 0.0 if explore is None else float(explore(steps))

    def _seed(self) -> int:
        return torch.initial_seed() % 2**32 if self.seed is None else self.seed

    @cached_property
    def _spaces(self) -> tuple[int, list[int], str]:
        """The number of actions, an observation's shape and its type."""
        environments = self.make(1)
        try:
            space: Any = environments.single_observation_space
            if not isinstance(space, gymnasium_or_refuse().spaces.Box) or len(space.shape) not in (1, 3):
                raise ValueError(
                    f"the observations of {self.environment} are {space}: vectors (D,) or stacks of frames (C, H, W) "
                    "are wanted"
                )
            return Collector(environments).num_actions, list(space.shape), str(space.dtype)
        finally:
            environments.close()

    def _seen_environments(self) -> "VectorEnv":
        """One environment that draws itself, where it can."""
        if self.environment == GRID_WORLD or self.environment.startswith(ATARI):
            return self.make(1, training=False)
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws in memory: no display is looked for
        modes = gymnasium_or_refuse().make(self.environment).metadata.get("render_modes", [])
        return self.make(1, training=False, **({"render_mode": "rgb_array"} if "rgb_array" in modes else {}))

    def _filmed(self, environments: "VectorEnv", seed: int) -> Batch:
        collector = Collector(environments, seed)
        obs = collector.reset()
        policy = self._policy(greedy=True)
        steps, frames, over = [], [], False
        while not over:
            frames += _frames(environments, obs)
            step = collector.step(policy, self.eval_epsilon)
            steps.append((step.obs[0].copy(), step.action[0], step.reward[0]))
            obs, over = step.next_obs, bool(len(step.ended))
        film = [torch.from_numpy(np.stack(part)) for part in zip(*steps, strict=True)]
        batch = {"obs": film[0], "action": film[1], "reward": film[2].float()}
        if frames:
            batch["frames"] = torch.from_numpy(np.stack(frames))
            per_second = environments.metadata.get("render_fps", 15)  # 60 frames, of which each action has 4
            batch["frames_per_second"] = torch.tensor(float(per_second))
        return batch


class GymDataModule(EnvironmentsDataModule):
    """Experience replay: transitions of the policy that is learnt, drawn from the last ones of several environments.

    At first ``learning_starts`` steps are taken at random. From then on ``collect_steps`` steps and ``updates`` batches
    take turns, which keeps their ratio whatever the number of environments. An epoch is ``epoch_steps`` steps, those at
    first not counted.

    A training batch is a dict, on the device: ``obs`` and ``next_obs`` (B, *shape), ``action`` int64 (B,), ``reward``
    float32 (B,), ``terminated`` bool (B,), ``discount`` float32 (B,), ``index`` int64 (B,) and ``weight`` float32 (B,),
    as :meth:`~datamodules.replay.ReplayBuffer.sample` describes them; and in the first after some steps ``steps``
    int64 (), the steps in the environments so far, and ``returns`` float32 (E,), those of the episodes that ended since
    the last time: of exploring, and on Atari of one life with clipped rewards. With ``updates_per_step`` U all but
    these two are (U, B, …): U batches at once, for a model that makes as many updates in a training step.

    A checkpoint holds counters, exploration, the environments where their state is known and, with ``save_buffer``, the
    buffer. On CartPole a resumed run then ends with the weights of one that was never stopped. Atari's environments
    begin new games; without its buffer a run first collects ``learning_starts`` steps anew, with the policy it has.

    Args:
        environment: See :class:`EnvironmentsDataModule`, as for all that is not told here.
        num_envs: Environments that are stepped together.
        capacity: Observations (of pixels: frames) that are held; the memory is stated before it is taken.
        batch_size: Transitions B of a batch.
        learning_starts: Steps, of all environments together, before the first batch.
        collect_steps: Steps, of all environments together, between one round of batches and the next.
        updates: Batches of a round.
        updates_per_step: Batches U that are handed over at once, a divisor of ``updates``; 1 for prioritised replay.
        epoch_steps: Steps of an epoch: after each one validates.
        n_step: Steps of a transition.
        discount: Factor by which a reward counts less with each step.
        priority_exponent: alpha of prioritised replay; 0 draws evenly.
        importance_exponent: beta of prioritised replay at first; it rises to 1 in a straight line.
        importance_steps: Steps over which it rises.
        val_episodes: Episodes of a validation.
        test_episodes: Episodes of a test.
        predict_episodes: Episodes of a prediction.
        eval_envs: Environments of an evaluation, which are stepped together.
        eval_epsilon: Chance of a random action in evaluations.
        seed: Seed of environments, exploration and draws; None takes the run's.
        save_buffer: Whether a checkpoint holds the buffer, which may be large.
        options: Arguments of the environment.

    Raises:
        ValueError: A number is out of range, there is no such environment, or the memory is not there.
    """

    def __init__(
        self,
        environment: str = "CartPole-v1",
        num_envs: int = 8,
        capacity: int = 100_000,
        batch_size: int = 64,
        learning_starts: int = 1000,
        collect_steps: int = 256,
        updates: int = 128,
        updates_per_step: int = 1,
        epoch_steps: int = 2560,
        n_step: int = 1,
        discount: float = 0.99,
        priority_exponent: float = 0.0,
        importance_exponent: float = 0.4,
        importance_steps: int = 50_000,
        val_episodes: int = 20,
        test_episodes: int = 100,
        predict_episodes: int = 1,
        eval_envs: int = 100,
        eval_epsilon: float = 0.0,
        seed: int | None = None,
        save_buffer: bool = True,
        options: dict[str, Option] | None = None,
    ) -> None:
        super().__init__(
            environment, num_envs, discount, val_episodes, test_episodes, predict_episodes, eval_envs, eval_epsilon,
            seed, options,
        )  # fmt: skip
        counts = {"batch_size": batch_size, "learning_starts": learning_starts, "collect_steps": collect_steps}
        for name, value in (counts | {"updates": updates, "importance_steps": importance_steps}).items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if updates_per_step < 1 or updates % updates_per_step:
            raise ValueError(f"updates_per_step={updates_per_step} must divide updates={updates}")
        if updates_per_step > 1 and priority_exponent:
            raise ValueError(
                f"updates_per_step={updates_per_step} must be 1 with priority_exponent={priority_exponent}: the errors "
                "of each batch change what is drawn next"
            )
        if epoch_steps < collect_steps:
            raise ValueError(f"epoch_steps={epoch_steps} must be at least collect_steps={collect_steps}")
        if not 0 <= importance_exponent <= 1:
            raise ValueError(f"importance_exponent={importance_exponent} must be in [0, 1]")
        self.capacity = capacity
        self.batch_size = batch_size
        self.learning_starts = learning_starts
        self.collect_steps = collect_steps
        self.updates = updates
        self.updates_per_step = updates_per_step
        self.epoch_steps = epoch_steps
        self.n_step = n_step
        self.priority_exponent = priority_exponent
        self.importance_exponent = importance_exponent
        self.importance_steps = importance_steps
        self.save_buffer = save_buffer
        self.buffer: ReplayBuffer | None = None
        self._planned = 0  # steps that will have been taken after this round's
        self._given = 0  # batches of this round so far
        self._before_burst: dict[str, Any] | None = None  # the draws' state before those that are not all given yet
        self._news: Batch = {}

    @property
    def batches_per_epoch(self) -> int:
        """Training batches of an epoch."""
        return self.epoch_steps // self.collect_steps * self.updates // self.updates_per_step

    def setup(self, stage: str) -> None:
        """Make the environments and the buffer, once."""
        super().setup(stage)
        if stage != "fit" or self.buffer is not None:
            return
        _, shape, dtype = self._spaces
        stacked = len(shape) == 3
        if stacked and not self.environment.startswith(ATARI):
            raise ValueError(f"{self.environment} gives pictures {shape} that are no stacks of frames: Atari's are")
        self.buffer = ReplayBuffer(
            self.capacity,
            tuple(shape),
            dtype,
            self.num_envs,
            stack=shape[0] if stacked else 0,
            padding="zeros",  # ale-py's
            n_step=self.n_step,
            discount=self.discount,
            priority_exponent=self.priority_exponent,
            seed=self._seed(),
        )
        self._planned, self._given, self._before_burst, self._news = 0, 0, None, {}

    def collected(self, first: int) -> Iterator[Batch]:
        """Collect and draw, in turns; see the class."""
        assert self.buffer is not None
        given = first
        while given < self.batches_per_epoch:
            if self._given == 0:
                self._collect()
            for batch in self._round():
                given += 1
                yield batch
                if given == self.batches_per_epoch:
                    break

    def update_priorities(self, index: Tensor, errors: Tensor) -> None:
        """Tell prioritised replay how far the values of drawn transitions were off; see the buffer's method."""
        if self.buffer is not None and self.priority_exponent:
            self.buffer.update_priorities(index, errors)

    def state_dict(self) -> dict[str, Any]:
        """Counters, exploration, environments where known, and the buffer, in tensors and plain values."""
        state = super().state_dict()
        if not state or self.buffer is None:
            return {}
        state |= {"planned": self._planned, "given": self._given, "before_burst": self._before_burst}
        return state | ({"buffer": self.buffer.state_dict()} if self.save_buffer else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: The buffer was made with other arguments.
        """
        super().load_state_dict(state)
        if self.buffer is None or "planned" not in state:
            return
        self._planned = state["planned"]
        if "buffer" in state:
            self._given, self._before_burst = state["given"], state["before_burst"]
            self.buffer.load_state_dict(state["buffer"])
        elif self.collector is not None:  # the steps at first come once more, with the policy that there is
            self._planned += self.learning_starts
            self.collector.begin_anew()

    def teardown(self, stage: str) -> None:
        """Close the environments and give the buffer's memory back."""
        super().teardown(stage)
        if stage == "fit":
            self.buffer = None

    def _collect(self) -> None:
        """Take the steps that come before a round of batches."""
        assert self.collector is not None
        assert self.buffer is not None
        if self._planned == 0:
            self._planned = self.learning_starts
            episodes = self._step_to(self._planned, at_random=True)
        else:
            episodes = []
        self._planned += self.collect_steps
        episodes += self._step_to(self._planned)
        if not len(self.buffer):  # fewer steps than a transition has
            raise ValueError(f"learning_starts={self.learning_starts} gave no transition of {self.n_step} steps")
        self._news = {
            "steps": torch.tensor(self.collector.steps),
            "returns": torch.tensor([episode.ret for episode in episodes]),
        }

    def _step_to(self, goal: int, at_random: bool = False) -> list[Episode]:
        """Collect until there were ``goal`` steps; the exploration is that of each step."""
        collector, policy = self.collector, self._policy()
        assert collector is not None
        assert self.buffer is not None
        episodes: list[Episode] = []
        while collector.steps < goal:
            epsilon = 1.0 if at_random or self.trainer is None else self._exploration(collector.steps)
            episodes += collector.collect(self.buffer, 1, policy, epsilon)
        return episodes

    def _round(self) -> Iterator[Batch]:
        """The batches that are left of this round, several drawn at once where nothing comes between them."""
        assert self.buffer is not None
        while True:
            first = self._given - self._given % self._burst
            count = min(self._burst, self.updates - first)
            if self._before_burst is not None:  # some of them were given before: the same are drawn once more
                self.buffer.random_state = self._before_burst
            before = self.buffer.random_state
            drawn = self.buffer.sample(count * self.batch_size, self._beta())
            drawn = {name: tensor.to(self._device) for name, tensor in drawn.items()}
            drawn = {name: tensor.unflatten(0, (count, self.batch_size)) for name, tensor in drawn.items()}
            for number in range(self._given - first, count, self.updates_per_step):
                self._given = (self._given + self.updates_per_step) % self.updates
                self._before_burst = before if self._given % self._burst else None
                rows = slice(number, number + self.updates_per_step) if self.updates_per_step > 1 else number
                news, self._news = self._news, {}
                yield {name: tensor[rows] for name, tensor in drawn.items()} | news
            if self._given == 0:
                return

    @property
    def _burst(self) -> int:
        """Batches that are drawn at once: one where errors change what is drawn next."""
        if self.priority_exponent:
            return 1
        _, shape, dtype = self._spaces
        each = 2 * self.updates_per_step * self.batch_size * int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.updates_per_step * max(1, min(self.updates // self.updates_per_step, BURST_BYTES // each))

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def _beta(self) -> float:
        assert self.collector is not None
        share = min(1.0, self.collector.steps / self.importance_steps)
        return self.importance_exponent + (1 - self.importance_exponent) * share

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Nothing to do for what is there already: Lightning's walk through the batch costs more than a small step."""
        if isinstance(batch, dict) and "obs" in batch and batch["obs"].device == device:
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)


class CollectedBatches:
    """The training batches of a data module; its place in the epoch can be saved.

    Args:
        data: The data module.
    """

    def __init__(self, data: EnvironmentsDataModule) -> None:
        self.data = data
        self.batch_size = getattr(data, "batch_size", None)
        self.next_batch = 0
        self._resume_at = 0
        self._fixed: Batch | None = None  # under overfit_batches the one batch that there is

    def __len__(self) -> int:
        return self.data.batches_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing is collected before the first batch is taken.
        self.next_batch, self._resume_at = self._resume_at, 0
        trainer: Any = self.data.trainer
        batches = self.data.collected(self.next_batch)
        if trainer is not None and trainer.overfit_batches:
            self._fixed = self._fixed or next(batches)
            batches = repeat(self._fixed, len(self))
        for batch in batches:
            self.next_batch += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch; the data module saves the rest."""
        return {"next_batch": self.next_batch, "length": len(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place; an epoch that is over, or not begun, has none.

        Raises:
            ValueError: The place is in the middle of an epoch of another length.
        """
        mid_epoch = 0 < state["next_batch"] < state["length"]
        if mid_epoch and state["length"] != len(self):
            raise ValueError(
                f"the checkpoint was written after batch {state['next_batch']} of an epoch of {state['length']}, this "
                f"one has {len(self)}: resume with the same epoch_steps, collect_steps and updates"
            )
        self._resume_at = state["next_batch"] if mid_epoch else 0


class PlayedEpisodes:
    """Episodes of an evaluation, played when they are asked for.

    Args:
        data: The data module.
        stage: ``val`` and ``test`` give one batch, ``predict`` one for each episode.
    """

    batch_size = 1

    def __init__(self, data: EnvironmentsDataModule, stage: Literal["val", "test", "predict"]) -> None:
        self.data = data
        self.stage = stage

    def __len__(self) -> int:
        return self.data.episodes["predict"] if self.stage == "predict" else 1

    def __iter__(self) -> Iterator[Batch]:
        if self.stage == "predict":
            for number in range(len(self)):
                yield self.data.film(number)
            return
        episodes = self.data.play(self.stage)
        yield {
            "returns": torch.tensor([episode.ret for episode in episodes]),
            "lengths": torch.tensor([episode.length for episode in episodes]),
        }


def _register_atari() -> None:
    try:
        import ale_py
    except ImportError as error:
        raise ModuleNotFoundError("Atari's games need ale-py: pip install 'zoo[control]'") from error
    gymnasium_or_refuse().register_envs(ale_py)


def _frames(environments: "VectorEnv", obs: np.ndarray) -> list[np.ndarray]:
    """What is seen now, uint8 (H, W, 3), of one environment; nothing of what cannot be seen."""
    if obs.ndim == 4:  # the newest frame of a stack
        return [obs[0, -1].repeat(2, 0).repeat(2, 1)[..., None].repeat(3, -1)]
    if getattr(environments, "render_mode", None) != "rgb_array":
        return []
    drawn: Any = environments.render()
    step = max(1, round(max(drawn[0].shape[:2]) / FILM_SIDE))
    height, width = (side // step * step for side in drawn[0].shape[:2])
    blocks = drawn[0][:height, :width].reshape(height // step, step, width // step, step, 3)
    return [blocks.mean((1, 3)).astype(np.uint8)]
