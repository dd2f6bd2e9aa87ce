"""Batches by index: a training order whose place can be saved, and an evaluation that counts each sample once.

PyTorch's DistributedSampler repeats samples until every process has equally many, so that metrics of several processes
differ from those of one (https://github.com/pytorch/pytorch/issues/25162). Here no sample is repeated or left out.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor


class TrainingBatches:
    """Shuffled index batches of one process; the order depends on ``seed`` and the epoch alone.

    A *global* batch is cut from the epoch's order and every process takes its equal share of it, so that k processes
    together see the batches that one process sees. The remainder of an epoch that fills no global batch is left out
    (another one each epoch); a data set smaller than one batch is one batch, of equal shares.

    Lightning saves ``state_dict`` inside the checkpoint, also in the middle of an epoch, and tells the epoch through
    ``set_epoch``. Without Lightning every ``iter`` is the next epoch.

    Args:
        size: Number of samples in the data set.
        batch_size: Samples of a global batch: all processes together.
        seed: Seed of the order.
        shuffle: False keeps the order of the data set.
        rank: This process, in ``[0, world_size)``.
        world_size: Number of processes.
        device: Where the index batches are wanted: the device that holds the data.
        split: A fingerprint of which samples these are, so that training is not resumed on others; any text.

    Raises:
        ValueError: ``batch_size`` is not a positive multiple of ``world_size``, or there are fewer samples than
            processes.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        split: str = "",
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            nearest = max(1, round(batch_size / world_size)) * world_size
            raise ValueError(
                f"batch_size={batch_size} counts the samples of all processes together and must be a positive "
                f"multiple of the {world_size} processes: {nearest} would do"
            )
        if size < world_size:
            raise ValueError(f"{size} training samples are too few for {world_size} processes")
        # Python's own numbers: numpy's would make a checkpoint unreadable.
        self.size = int(size)
        self.batch_size = int(min(batch_size, size - size % world_size))
        self.seed = int(seed)
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.split = split
        self.epoch = -1
        self.next_batch = 0
        self._resume_at: tuple[int, int] | None = None  # (epoch, batch) of a restored place
        self._told_epoch: int | None = None

    @property
    def sampler(self) -> "TrainingBatches":
        """Where Lightning looks for ``set_epoch``: ``loader.batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Make ``epoch`` (from 0) the one that the next iteration runs."""
        self._told_epoch = epoch

    def __len__(self) -> int:
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        # A generator: nothing below runs before the first batch is taken, and Lightning calls set_epoch in between.
        self.epoch = self.epoch + 1 if self._told_epoch is None else self._told_epoch
        self.next_batch = 0
        if self._resume_at is not None:
            epoch, batch = self._resume_at
            if self._told_epoch is None or self._told_epoch == epoch:
                self.epoch, self.next_batch = epoch, batch
            self._resume_at = None
        self._told_epoch = None
        order = self._order(self.epoch).to(self.device)
        while self.next_batch < len(self):
            start = self._start(self.next_batch)
            # Counted before the batch is handed out: a checkpoint written while it is used must not repeat it.
            self.next_batch += 1
            yield order[start : start + self.batch_size // self.world_size]

    def indices(self, batch: int) -> list[int]:
        """The samples of this process in batch number ``batch`` of the current epoch, to name them in a message."""
        start = self._start(batch)
        return self._order(self.epoch)[start : start + self.batch_size // self.world_size].tolist()

    def state_dict(self) -> dict[str, Any]:
        """The place in the order, as plain values."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "next_batch": self.next_batch,
            "size": self.size,
            "batch_size": self.batch_size,
            "split": self.split,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place.

        Raises:
            ValueError: The samples are others, or the place is in the middle of an epoch of another global batch.
        """
        if state.get("split", self.split) != self.split:
            raise ValueError(
                "the checkpoint was trained on other samples, by another split_seed, val_size or train_size: its "
                "validation samples could be among them. Resume with the same data, start anew with "
                "--model.init_args.weights, or ask for it: --resume_with_other split"
            )
        mid_epoch = 0 < state["next_batch"] < state["size"] // state["batch_size"]
        for name, now in (("size", self.size), ("batch_size", self.batch_size)):
            if mid_epoch and state[name] != now:
                raise ValueError(
                    f"the checkpoint was written after batch {state['next_batch']} of an epoch with "
                    f"{name}={state[name]}, the data module now has {name}={now}: resume with the same data and the "
                    "same global batch, start anew from the checkpoint with --model.init_args.weights, or ask for it: "
                    "--resume_with_other " + ("split" if name == "size" else name)
                )
        self.seed = state["seed"]
        # An epoch that is over, or not begun, has no place to go on from: the next one follows.
        self._resume_at = (state["epoch"], state["next_batch"]) if mid_epoch else None
        self.epoch, self.next_batch = state["epoch"], state["next_batch"]

    def _start(self, batch: int) -> int:
        return batch * self.batch_size + self.rank * (self.batch_size // self.world_size)

    def _order(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.size)
        return torch.from_numpy(np.random.default_rng([self.seed, epoch]).permutation(self.size))


def training_batches(
    trainer: Any, size: int, batch_size: int, split: str, device: torch.device | str = "cpu"
) -> TrainingBatches:
    """Batches in the order of the run's seed, for this process; the order is fixed under ``overfit_batches``.

    Args:
        trainer: Lightning's; None is one process without it.
        size: Number of samples in the data set.
        batch_size: Samples of a global batch: all processes together.
        split: A fingerprint of which samples these are.
        device: Where the index batches are wanted.

    Raises:
        ValueError: See :class:`TrainingBatches`.
    """
    seed = torch.initial_seed() % 2**63
    if trainer is None:
        return TrainingBatches(size, batch_size, seed, device=device, split=split)
    # Without seed_everything each process has a seed of its own, and their shares would overlap: take rank 0's.
    seed = trainer.strategy.broadcast(seed)
    shuffle = not trainer.overfit_batches
    return TrainingBatches(size, batch_size, seed, shuffle, trainer.global_rank, trainer.world_size, device, split)


def split_at_random(
    total: int, val_size: int | float, test_size: int | float, seed: int
) -> dict[Literal["train", "val", "test"], np.ndarray]:
    """Indices of the samples of each split, int64, in order; a size is a number, or below 1 a share, rounded up.

    Raises:
        ValueError: None are left to train on.
    """
    order = np.random.default_rng(seed).permutation(total)
    val, test = (math.ceil(size * total) if size < 1 else int(size) for size in (val_size, test_size))
    if total and val + test >= total:
        raise ValueError(f"val_size={val_size} and test_size={test_size} leave none of {total} pictures")
    return {
        "val": np.sort(order[:val]),
        "test": np.sort(order[val : val + test]),
        "train": np.sort(order[val + test :]),
    }


class EvaluationBatches:
    """Index batches of one process that cover the data set exactly once over all processes, in order.

    Process r takes samples r, r + k, r + 2k, …. Every process yields equally many batches, since DDP synchronises
    buffers at each step; a process that runs out of samples ends with an empty batch.

    Args:
        size: Number of samples in the data set.
        batch_size: Samples of a batch, per process.
        rank: This process, in ``[0, world_size)``.
        world_size: Number of processes.
        device: Where the index batches are wanted.
    """

    def __init__(
        self, size: int, batch_size: int, rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.device = device

    def __len__(self) -> int:
        return math.ceil(math.ceil(self.size / self.world_size) / self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        mine = torch.arange(self.size, device=self.device)[self.rank :: self.world_size]
        for batch in range(len(self)):
            yield mine[batch * self.batch_size : (batch + 1) * self.batch_size]


class TensorLoader:
    """Batches of in-memory tensors, each taken by one index operation: no per-sample work, no worker processes.

    Args:
        tensors: Tensors of equal length; a batch is a tuple with the chosen rows of each.
        batch_sampler: Which rows make a batch.
    """

    def __init__(self, tensors: tuple[Tensor, ...], batch_sampler: TrainingBatches | EvaluationBatches) -> None:
        self.tensors = tensors
        self.batch_sampler = batch_sampler

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for index in self.batch_sampler:
            yield tuple(tensor[index] for tensor in self.tensors)

    def state_dict(self) -> dict[str, Any]:
        """The place of the training order; empty for evaluation, which always starts at the beginning."""
        return self.batch_sampler.state_dict() if isinstance(self.batch_sampler, TrainingBatches) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place; see :class:`TrainingBatches`."""
        if isinstance(self.batch_sampler, TrainingBatches):
            self.batch_sampler.load_state_dict(state)
