"""Batches of crops from picture files, read ahead by worker processes, whose place can be saved."""

import copy
import hashlib
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, get_worker_info

from datamodules.pictures import Picture, centre, random_box, resize, resize_short_side
from datamodules.sampling import EvaluationBatches, TensorLoader, TrainingBatches

CHUNK = 32  # pictures that a worker reads at a time when it reads all of them
SKIP = ". Mend or remove it, or have such files left out by --data.init_args.corrupt skip"


def processors() -> int:
    """Processors that this process may use, which in a container are fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def some(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


class PictureSet:
    """Pictures by index.

    Names are in one array: of a list each worker would come to hold a copy of its own
    (https://github.com/pytorch/pytorch/issues/13246).

    Args:
        root: Folder that the names start from.
        names: Files, bytes (N,).
        labels: Their classes, int64 (N,).
        kept: The pictures in memory, if they are kept there.
    """

    def __init__(self, root: Path, names: np.ndarray, labels: np.ndarray, kept: "KeptPictures | None" = None) -> None:
        self.root = root
        self.names = names
        self.labels = labels
        self.kept = kept

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """The file of a picture."""
        return self.root / os.fsdecode(self.names[index])

    def take(self, indices: np.ndarray) -> "PictureSet":
        """Some of the pictures."""
        kept = None if self.kept is None else KeptPictures(self.kept.pieces, self.kept.places[indices])
        return PictureSet(self.root, self.names[indices], self.labels[indices], kept)

    def fingerprint(self) -> str:
        """What stays the same as long as these are the same files in the same order, wherever the root is."""
        return hashlib.sha256(b"\0".join(self.names.tolist())).hexdigest()[:16]


class KeptPictures:
    """Decoded pictures of different sizes in memory: in few large tensors, since to share one costs a file handle.

    Args:
        pieces: The pixels of many pictures in one tensor each, uint8 (bytes,).
        places: For each picture its piece, where it begins there, height and width; int64 (N, 4).
    """

    def __init__(self, pieces: list[Tensor], places: np.ndarray) -> None:
        self.pieces = pieces
        self.places = places

    def pixels(self, index: int) -> np.ndarray:
        """The pixels of a picture, uint8 (H, W, 3); a view."""
        piece, start, height, width = self.places[index].tolist()
        return self.pieces[piece][start : start + height * width * 3].view(height, width, 3).numpy()


class Crops(Dataset):
    """Crops of pictures as one batch: what a worker process does.

    A job is ``(seed, epoch, indices)``; its result is uint8 (N, 3, image_size, image_size), or its error.

    Args:
        pictures: Where from.
        image_size: Side of the crops.
        resize_size: Short side of a picture of which the centre is cut out.
        crop_scale: Least share of a picture's area in a random crop; None cuts out the centre.
    """

    def __init__(self, pictures: PictureSet, image_size: int, resize_size: int, crop_scale: float | None) -> None:
        self.pictures = pictures
        self.image_size = image_size
        self.resize_size = resize_size
        self.crop_scale = crop_scale

    def __getitems__(self, job: tuple[int, int, list[int]]) -> Tensor | Exception:
        seed, epoch, indices = job
        crops = torch.empty(len(indices), 3, self.image_size, self.image_size, dtype=torch.uint8)
        try:
            for row, index in enumerate(indices):
                if self.crop_scale is None:
                    crops[row] = self.centre(index)
                else:
                    crops[row] = self.random(seed, epoch, index, self.crop_scale)
        except (OSError, ValueError) as error:  # raised by the loader: from here it would come wrapped in a traceback
            return error
        return crops

    def centre(self, index: int) -> Tensor:
        """The middle of a picture, uint8 (3, image_size, image_size)."""
        if self.pictures.kept is not None:
            image = torch.from_numpy(self.pictures.kept.pixels(index)).permute(2, 0, 1)
        else:
            image = resize_short_side(Picture(self.pictures.path(index)).pixels(), self.resize_size)
        return centre(image, self.image_size)

    def random(self, seed: int, epoch: int, index: int, least_area: float) -> Tensor:
        """A random box of a picture, resized to uint8 (3, image_size, image_size)."""
        rng = np.random.default_rng([seed, epoch, index])
        size, shrink = self.image_size, 1
        if self.pictures.kept is not None:
            pixels = self.pictures.kept.pixels(index)
            top, left, height, width = random_box(rng, pixels.shape[0], pixels.shape[1], least_area)
        else:
            picture = Picture(self.pictures.path(index))
            top, left, height, width = random_box(rng, picture.height, picture.width, least_area)
            if picture.is_jpeg:
                shrink = next((s for s in (8, 4, 2) if min(height, width) >= s * size), 1)
            pixels = picture.pixels(shrink)
        rows = slice(round(top / shrink), round((top + height) / shrink))
        columns = slice(round(left / shrink), round((left + width) / shrink))
        return resize(pixels[rows, columns], size, size)


class WholePictures(Dataset):
    """Pictures read from end to end, to find those that cannot be and, if asked, to keep the others.

    A job is a list of indices; its result is the pixels of all pictures, uint8 (bytes,), and for each of them its
    (height, width), what is wrong with it, or the error that has nothing to do with it.

    Args:
        read: Gives by its index a picture to keep, uint8 (3, H, W), or one without pixels.
    """

    def __init__(self, read: Callable[[int], Tensor]) -> None:
        self.read = read

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, list[tuple[int, int] | str | OSError]]:
        pieces = [torch.empty(0, dtype=torch.uint8)]
        outcomes: list[tuple[int, int] | str | OSError] = []
        for index in indices:
            try:
                image = self.read(index)
                pieces.append(image.permute(1, 2, 0).reshape(-1))
                outcomes.append((image.shape[1], image.shape[2]))
            except ValueError as error:
                outcomes.append(str(error))
            except OSError as error:
                outcomes.append(error)
        return torch.cat(pieces), outcomes


def read_all(
    pictures: PictureSet, indices: range, resize_size: int | None, workers: int
) -> tuple[dict[int, str], KeptPictures | None]:
    """Read pictures from end to end; those that are kept have ``resize_size`` as their short side, None keeps none."""
    read = partial(_read_picture, pictures, resize_size)
    return read_each(read, len(pictures), indices, resize_size is not None, workers)


def _read_picture(pictures: PictureSet, resize_size: int | None, index: int) -> Tensor:
    picture = Picture(pictures.path(index))
    if resize_size is not None:
        return resize_short_side(picture.pixels(), resize_size)
    picture.pixels(shrink=8)
    return torch.empty(3, 0, 0, dtype=torch.uint8)


def read_each(
    read: Callable[[int], Tensor], total: int, indices: range, keep: bool, workers: int
) -> tuple[dict[int, str], KeptPictures | None]:
    """Read pictures from end to end.

    Args:
        read: Gives a picture by its index, uint8 (3, H, W).
        total: Number of pictures.
        indices: Which of them.
        keep: Whether to keep what ``read`` gives.
        workers: Processes that read.

    Returns:
        What is wrong with the pictures that cannot be read, by index; and all pictures, if they are kept.

    Raises:
        OSError: A file cannot be read for a reason that is not its own.
    """
    rank_zero_info(f"reading {total} pictures once")
    chunks = [list(indices[start : start + CHUNK]) for start in range(0, len(indices), CHUNK)]
    reader = WholePictures(read)
    places = np.zeros((total, 4), dtype=np.int64)
    problems, kept = read_chunks(reader, chunks, places, workers)
    return problems, KeptPictures(kept, places) if keep else None


def read_chunks(
    reader: Dataset, chunks: list[list[int]], places: np.ndarray, workers: int
) -> tuple[dict[int, str], list[Tensor]]:
    """Have each chunk of samples read once, as :class:`WholePictures` does it.

    Args:
        reader: What a worker does.
        chunks: The samples' indices.
        places: int64 (N, P): of each sample its piece, where it begins there, and its size without the channels; filled
            in for those that can be read.
        workers: Processes that read.

    Returns:
        What is wrong with the others, by index; and the pieces.

    Raises:
        OSError: A file cannot be read for a reason that is not its own.
    """
    problems: dict[int, str] = {}
    kept = []
    with once(reader, chunks, workers) as loader:
        for number, (chunk, (piece, outcomes)) in enumerate(zip(chunks, loader, strict=True)):
            kept.append(piece.clone())  # out of the memory that is shared with the worker
            start = 0
            for index, outcome in zip(chunk, outcomes, strict=True):
                if isinstance(outcome, OSError):
                    raise outcome
                if isinstance(outcome, str):
                    problems[index] = outcome
                else:
                    places[index] = number, start, *outcome
                    start += 3 * math.prod(outcome)
    return problems, kept


def problems_of_all(problems: dict[int, str], world_size: int, refuse: bool) -> dict[int, str]:
    """What is wrong with pictures, by index, as all processes found it together.

    Raises:
        ValueError: There is something, and ``refuse``.
    """
    if world_size > 1:
        everyone: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(everyone, problems)
        problems = dict(sorted(item for share in everyone for item in share.items()))
    if problems and refuse:
        raise ValueError(next(iter(problems.values())) + SKIP)
    return problems


def warn_of_unreadable(problems: list[str], total: int, split: str) -> None:
    """Say which of the pictures of a split are left out.

    Raises:
        ValueError: They are more than half.
    """
    message = f"{len(problems)} of {total} pictures of split {split} cannot be read"
    if len(problems) > total / 2:
        raise ValueError(f"{message}: {some(problems)}. Those are too many to leave out")
    if problems:
        rank_zero_warn(f"{message}, and are left out: {some(problems)}")


class AheadLoader(TensorLoader):
    """Batches of which a part is in memory, and another is read ahead by worker processes.

    Args:
        tensors: What is in memory, of equal length.
        batch_sampler: Which rows make a batch; its place is that of the last batch that was handed out.
        reader: What a worker does: its ``__getitems__`` takes ``(seed, epoch, indices)`` and gives its part of a batch,
            or its error. None reads nothing.
        workers: Number of processes; 0 reads in this one.
        pin_memory: Whether to put what is read where a GPU fetches it fastest.
    """

    def __init__(
        self,
        tensors: tuple[Tensor, ...],
        batch_sampler: TrainingBatches | EvaluationBatches,
        reader: Dataset | None,
        workers: int,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(tensors, batch_sampler)
        self._reader = None if reader is None else data_loader(reader, Ahead(batch_sampler), workers, pin_memory)

    @property
    def _iterator(self) -> Any:
        """Where Lightning looks for the workers when a run is over, however it ended, to shut them down."""
        return None if self._reader is None else self._reader._iterator

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        if self._reader is not None:
            self._reader._iterator = iterator

    def read(self) -> Iterator[tuple[Any, tuple[Tensor, ...]]]:
        """What was read of each batch, and its rows of the tensors.

        Raises:
            ValueError: A picture cannot be read; the message names its file.
            OSError: A file cannot be read.
        """
        # Both begin at the same place, since a generator does nothing before its first batch is taken.
        for result, rows in zip(self._reader, TensorLoader.__iter__(self), strict=True):  # type: ignore[arg-type]
            if isinstance(result, Exception):
                _end_workers(self)  # who keeps the error, as a notebook does, would keep them too
                raise ValueError(f"{result}{SKIP}") if isinstance(result, ValueError) else result
            yield result, rows


class PictureLoader(AheadLoader):
    """Batches ``(images, labels)``, uint8 and int64, whose images are read ahead by worker processes.

    Args:
        crops: What a worker does.
        batch_sampler: Which pictures make a batch; its place is that of the last batch that was handed out.
        workers: Number of processes; 0 reads in this one.
        pin_memory: Whether to put images where a GPU fetches them fastest.
    """

    def __init__(
        self, crops: Crops, batch_sampler: TrainingBatches | EvaluationBatches, workers: int, pin_memory: bool = False
    ) -> None:
        super().__init__((torch.from_numpy(crops.pictures.labels),), batch_sampler, crops, workers, pin_memory)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for images, (labels,) in self.read():
            yield images, labels


class Ahead:
    """The order of ``batches`` from its place on, as jobs for workers, who take them sooner than it does."""

    def __init__(self, batches: TrainingBatches | EvaluationBatches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[int, int, list[int]]]:
        ahead = copy.copy(self.batches)
        for index in ahead:
            seed, epoch = (ahead.seed, ahead.epoch) if isinstance(ahead, TrainingBatches) else (0, 0)
            yield seed, epoch, index.tolist()


def data_loader(dataset: Dataset, jobs: Any, workers: int, pin_memory: bool = False) -> DataLoader:
    """What ``dataset.__getitems__`` makes of each job, as it is and in order, by so many processes."""
    return DataLoader(
        dataset,
        batch_sampler=jobs,
        num_workers=workers,
        collate_fn=_handed_over,
        worker_init_fn=_leave_signals_to_the_parent,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # its seed for the workers would else be drawn from the run's random numbers
    )


@contextmanager
def once(dataset: Dataset, jobs: Any, workers: int) -> Iterator[DataLoader]:
    """A :func:`data_loader` whose workers end with the block, also where that ends by an error."""
    loader = data_loader(dataset, jobs, workers)
    try:
        yield loader
    finally:
        _end_workers(loader)


def _end_workers(loader: "DataLoader | AheadLoader") -> None:
    """As Lightning does at the end of a run."""
    iterator: Any = loader._iterator
    if iterator is not None:
        iterator._shutdown_workers()
    loader._iterator = None


def _handed_over(batch: Any) -> Any:
    """What a worker has read, in the memory that it shares with the run's own process.

    Python's queue would do it later, in a thread whose errors nobody hears: with /dev/shm full the run would wait for
    ever.
    """
    if get_worker_info() is not None:
        for part in tree_leaves(batch):
            if isinstance(part, Tensor):
                part.share_memory_()
    return batch


def _leave_signals_to_the_parent(worker: int) -> None:
    """What asks a run to stop is often sent to all its processes; it can save and end in order as long as these go on.

    Ctrl+C reaches all processes of a terminal, and a cluster or systemd sends SIGTERM to a whole group.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has only the first
            signal.signal(getattr(signal, name), _do_nothing)  # to ignore it would be handed on to what a worker starts
    if hasattr(signal, "sigwaitinfo"):  # nor do all systems tell who has sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_parent_asks, name="zoo-ending", daemon=True).start()


def _do_nothing(number: int, frame: Any) -> None:
    pass


def _end_when_the_parent_asks() -> None:
    """So torch and multiprocessing end a worker that is stuck."""
    parent = multiprocessing.parent_process()  # also where a server forks for it
    while parent is not None and signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(128 + signal.SIGTERM)
