"""Anyone's own videos, by class folders or csv files: clips of them, decoded by worker processes.

The parts of videos that are seen, and where they are cut, depend on seed, epoch and video alone, neither on the number
of workers nor on where a run was interrupted. Clips stay uint8 until they are on the device that trains.
"""

import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.reading import SKIP, AheadLoader, problems_of_all, processors, read_chunks, some
from datamodules.sampling import EvaluationBatches, TrainingBatches, training_batches
from datamodules.video_files import VideoFile, video_library
from datamodules.video_lists import (
    KeptFrames,
    Split,
    VideoSet,
    classes_of,
    find_classes,
    find_folders,
    held_out,
    list_videos,
    read_rows,
    videos_of,
)

CHUNK = 8  # videos that a worker reads at a time when it reads all of them


class VideoFolderDataModule(LightningDataModule):
    """Batches ``(clips, labels)``: float32 (N, 3, num_frames, size, size) in [0, 1]; int64 (N,) in [0, num_classes).

    A clip has ``num_frames`` frames that are ``seconds / num_frames`` apart in time, whatever the frame rate; each is
    the one that a player shows then (see :class:`~datamodules.video_files.VideoFile`). Where a video is shorter its
    last frame stays. Clips lie in memory as ``torch.channels_last_3d``.

    Training takes a random part of each video and a random square of it, which is the same in all frames of a clip.
    Validation takes the middle of both. Testing takes ``test_clips`` parts, the first at the beginning and the last at
    the end, and ``test_crops`` squares of each: where these are more than one in all, V, clips are (N, V, 3,
    num_frames, eval_size, eval_size), clip after clip, the squares of a clip beside each other. All views of a video
    are in one sample, so that their scores can be averaged and each video is counted once on any number of processes.

    Videos lie in class folders as the pictures of ``ImageFolderDataModule``, or are listed in csv files: with the
    columns ``path,label``, or Kinetics' ``label,youtube_id,time_start,time_end``, and ``split`` if one file has all.
    For a ``youtube_id`` a file is looked for below ``root``: ``ID_000012_000022.mp4``, which is that part alone, else
    ``ID.mp4``, of which the part is read. Of a csv file without the column ``split`` its name says the split
    (``train.csv``, ``validate.csv``).

    Args:
        root: Folder with one folder per class, or with such folders in ``train``, ``val`` and ``test``; or the folder
            that the paths in the csv files start from.
        num_frames: Frames of a clip.
        seconds: Length of a clip. The default is the 64 frames of SlowFast's paper at 30 a second.
        size: Side of the training clips in pixels.
        batch_size: Clips of a global training batch: all processes together.
        eval_batch_size: Clips per process in validation, test and prediction; with V views a batch has ``1 / V`` of
            that many videos, at least one.
        labels: csv files, relative to ``root``; None reads the class folders.
        eval_size: Side of the clips in evaluation; None takes ``size``. The short side of a video is resized to it.
        short_side: ``[least, most]``: in training the short side of a video is resized to a random number of pixels
            between these, before the square is cut out. None takes 256/224 and 320/224 of ``size``.
        flip: Mirror half of the training clips left to right. Turn it off where left and right tell classes apart.
        test_clips: Parts of each video in testing and prediction.
        test_crops: Squares of each part: 1 is the middle, 3 are both ends of the long side and the middle.
        val_size: Videos held out of training for validation where nothing says which: their number, or below 1 their
            share; each class gives its part. 0 trains without validation.
        test_size: Likewise for testing. Where there are none and with 0 the validation videos are tested on.
        split_seed: Seed of that split, apart from the run's seed so that runs compare.
        groups: Videos that are cut from one must be in one split. A regular expression that is searched in a video's
            name, such as ``(g[0-9]+)_c`` for UCF101: what its parentheses match is the same for them. None takes each
            video for one of its own, which it says where a split is drawn.
        corrupt: What to do with a video that cannot be read, or that a csv file lists and is not there. ``refuse``
            stops with its name when it is met. ``skip`` reads all videos once before the first batch (their key frames
            are decoded), names those that cannot be read and leaves them out, the same on every process.
        cache: Decode all videos once and keep their frames in memory, uint8, in each training process. In training a
            clip then begins at a multiple of ``seconds / num_frames``, and the short side is the least of
            ``short_side``: each second needs ``4 * num_frames / seconds * short_side ** 2`` bytes. In evaluation clips
            are those without it.
        workers: Processes that decode, for each process that trains; 0 decodes in that one. None means as many as the
            machine has processors, but not more than 4.

    Raises:
        FileNotFoundError: ``root`` or a csv file is not there.
        ModuleNotFoundError: PyAV is not installed.
        ValueError: A number is out of range, a csv file makes no sense, or there are not two classes at least.
    """

    class_names: list[str]
    num_classes: int

    def __init__(
        self,
        root: str,
        num_frames: int = 32,
        seconds: float = 64 / 30,
        size: int = 224,
        batch_size: int = 8,
        eval_batch_size: int = 8,
        labels: list[str] | None = None,
        eval_size: int | None = None,
        short_side: list[int] | None = None,
        flip: bool = True,
        test_clips: int = 1,
        test_crops: Literal[1, 3] = 1,
        val_size: int | float = 0.1,
        test_size: int | float = 0,
        split_seed: int = 0,
        groups: str | None = None,
        corrupt: Literal["refuse", "skip"] = "refuse",
        cache: bool = False,
        workers: int | None = None,
    ) -> None:
        super().__init__()
        self.root = Path(root).expanduser()
        self.num_frames = num_frames
        self.seconds = seconds
        self.size = size
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.eval_size = size if eval_size is None else eval_size
        self.short_side = [size * 256 // 224, size * 320 // 224] if short_side is None else short_side
        self.flip = flip
        self.test_clips = test_clips
        self.test_crops = test_crops
        self.val_size = val_size
        self.test_size = test_size
        self.split_seed = split_seed
        self.groups = groups
        self.corrupt = corrupt
        self.cache = cache
        self.workers = min(4, processors()) if workers is None else workers
        self._check_arguments()
        self._folders: dict[str, Path] = {}
        self._listed: dict[Split, VideoSet] | None = None  # before any was opened
        self._find(labels)
        self.num_classes = len(self.class_names)
        self.train_set: VideoSet | None = None
        self.val_set: VideoSet | None = None
        self.test_set: VideoSet | None = None
        self._split = ""

    def _find(self, labels: list[str] | None) -> None:
        """Set the classes and what is known of the videos; what writes its files itself says here what they will be."""
        video_library()
        if not self.root.is_dir():
            raise FileNotFoundError(f"there is no folder {self.root.absolute()}")
        self._rows = read_rows([self.root / name for name in labels]) if labels else []
        if labels:
            self.class_names = classes_of(self._rows)
        else:
            self._folders = find_folders(self.root)
            self.class_names = find_classes(self._folders["train"])

    @property
    def evaluation(self) -> dict[str, Any]:
        """How a test makes clips of a video: the arguments that say it, under ``size``, ``clips``, ``crops``, …."""
        clips = {"size": self.eval_size, "clips": self.test_clips, "crops": self.test_crops}
        return {"num_frames": self.num_frames, "seconds": self.seconds, **clips}

    def setup(self, stage: str) -> None:
        """List the videos, split them alike on every process, and read them if ``corrupt`` or ``cache`` says so.

        Raises:
            ValueError: The class folders of two splits differ, a class has nothing to train on, a video cannot be read
                or is missing, or there is nothing to test on.
        """
        if self._listed is None:
            self._listed = self._split_videos()
        if stage == "fit" and self.train_set is None:
            self.train_set = self._prepare("train")
            self._split = f"{self.train_set.fingerprint()} {self.num_frames} frames of {self.seconds:g} s"
        if stage in ("fit", "validate") and self.val_set is None and "val" in self._listed:
            self.val_set = self._prepare("val")
        if stage in ("test", "predict") and self.test_set is None:
            self.test_set = self._prepare("test")

    def check_samples(self, files: bool = True) -> list[str]:
        """What is wrong: with ``files`` after reading every file, else as far as what :meth:`setup` read tells."""
        from datamodules.checking import check  # it knows all data modules

        return check(self, self._everything, files)

    def _everything(self) -> tuple[dict[str, Any], list[str]]:
        """All videos, and the lines of csv files that have none."""
        missing = videos_of(self.root, self._rows, self.class_names)[1] if self._rows else []
        found = [f"{len(missing)} videos of the csv files are not there: {some(missing)}"] if missing else []
        listed: dict[str, Any] = {split: videos for split, videos in self._split_videos().items()}
        return listed, found

    def train_dataloader(self) -> "VideoLoader":
        """Shuffled training batches; the order follows the run's seed, and is fixed under ``overfit_batches``."""
        videos = _ready(self.train_set)
        batches = training_batches(self.trainer, len(videos), self.batch_size, self._split)
        return self._loader(self._training_clips(videos), batches)

    def val_dataloader(self) -> "VideoLoader | list[VideoLoader]":
        """Validation batches of one view, each video once over all processes; none where there are no videos for it."""
        return [] if self.val_set is None else self._evaluation_loader(self.val_set, self._clips("val", self.val_set))

    def test_dataloader(self) -> "VideoLoader":
        """Test batches, each video once over all processes."""
        videos = _ready(self.test_set)
        return self._evaluation_loader(videos, self._clips("test", videos))

    def predict_dataloader(self) -> "VideoLoader":
        """The test videos, in order."""
        return self.test_dataloader()

    def evaluation_dataloader(self, split: Split) -> "VideoLoader":
        """The videos of a split in order, as validation sees them: also those of training and test, one view each."""
        videos = _ready({"train": self.train_set, "val": self.val_set, "test": self.test_set}[split])
        plain = VideoSet(videos.root, videos.names, videos.labels, videos.windows)  # what is kept may be other frames
        return self._evaluation_loader(plain, self._clips("val", plain))

    def fingerprint(self, split: Split) -> str:
        """A text that changes when a file of a split, their order, or what becomes of them changes."""
        videos = _ready({"train": self.train_set, "val": self.val_set, "test": self.test_set}[split])
        parts = (videos.fingerprint(), self.num_frames, self.seconds, self.size, self.eval_size, self.class_names)
        digest = hashlib.sha256(repr(parts).encode())
        for index in range(len(videos)):
            file = os.stat(videos.path(index))
            digest.update(f"{file.st_size} {file.st_mtime_ns} ".encode())
        return digest.hexdigest()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn uint8 clips into float32 in [0, 1]."""
        if isinstance(batch, Tensor) or batch[0].dtype != torch.uint8:  # a model's example_input_array
            return batch
        clips, labels = batch
        return clips.float().div_(255), labels

    def _check_arguments(self) -> None:
        least = {"num_frames": 1, "size": 1, "eval_size": 1, "eval_batch_size": 1, "test_clips": 1}
        for name, value in (least | {"workers": 0, "val_size": 0, "test_size": 0}).items():
            if getattr(self, name) < value:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {value}")
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds={self.seconds} must be greater than 0")
        if self.test_crops not in (1, 3):
            raise ValueError(f"test_crops={self.test_crops} must be 1 or 3")
        if len(self.short_side) != 2 or not self.size <= self.short_side[0] <= self.short_side[1]:
            raise ValueError(
                f"short_side={self.short_side} must be [least, most], and least not below size={self.size}"
            )
        if self.corrupt not in ("refuse", "skip"):
            raise ValueError(f"corrupt={self.corrupt!r} must be refuse or skip")

    def _place(self) -> tuple[int, int]:
        """Rank and number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    # Lists

    def _split_videos(self) -> dict[Split, VideoSet]:
        """The videos of each split, as far as there are any."""
        listed = self._by_rows() if self._rows else self._by_folders()
        videos = listed.get("train")
        if videos is None:
            raise ValueError(f"{self.root}: there is no video to train on")
        val, test = (
            0 if split in listed else size for split, size in (("val", self.val_size), ("test", self.test_size))
        )
        if val or test:
            if self.groups is None:
                rank_zero_info("a split is drawn video by video: say with groups if some are cut from one")
            parts = held_out(videos, val, test, self.groups, self.split_seed)
            listed |= {split: videos.take(part) for split, part in parts.items() if len(part)}
        self._check_training_classes(listed["train"])
        if not self.val_size:
            listed.pop("val", None)
        return listed

    def _by_folders(self) -> dict[Split, VideoSet]:
        splits: tuple[Split, ...] = ("train", "val", "test")
        return {
            split: list_videos(self.root, self._folders[split], self.class_names)
            for split in splits
            if split in self._folders
        }

    def _by_rows(self) -> dict[Split, VideoSet]:
        listed, missing = videos_of(self.root, self._rows, self.class_names)
        if missing:
            message = f"{len(missing)} of {len(self._rows)} videos of the csv files are not in {self.root}"
            if self.corrupt == "refuse":
                raise ValueError(f"{message}: {some(missing)}{SKIP}")
            if len(missing) > len(self._rows) / 2:
                raise ValueError(f"{message}: {some(missing)}. Those are too many to leave out")
            rank_zero_warn(f"{message}, and are left out: {some(missing)}")
        return listed

    def _check_training_classes(self, videos: VideoSet) -> None:
        counts = np.bincount(videos.labels, minlength=self.num_classes)
        if empty := [self.class_names[k] for k in np.flatnonzero(counts == 0)]:
            raise ValueError(
                f"{self.root}: no video to train on is left in {some(empty)}. Add videos, remove the class, or hold "
                f"out less (val_size={self.val_size}, test_size={self.test_size})"
            )

    def _validation_for_test(self) -> Split:
        if "val" not in _ready(self._listed):
            raise ValueError(f"there is nothing to test on: {self.root / 'test'} is missing and test_size is 0")
        rank_zero_info("there are no videos for testing and test_size is 0: these are the validation videos")
        return "val"

    # Reading

    def _training_clips(self, videos: VideoSet) -> "TrainingClips":
        least, most = self.short_side
        return TrainingClips(videos, self.num_frames, self.seconds, self.size, least, most, self.flip)

    def _clips(self, split: Split, videos: VideoSet) -> "EvaluationClips":
        clips, crops = (self.test_clips, self.test_crops) if split == "test" else (1, 1)
        return EvaluationClips(videos, self.num_frames, self.seconds, self.eval_size, clips, crops)

    def _prepare(self, split: Split) -> VideoSet:
        """The videos of a split, all read once where that is asked for, without those that cannot be read."""
        listed = _ready(self._listed)
        videos = listed[split if split in listed else self._validation_for_test()]
        if self.corrupt == "refuse" and not self.cache:
            return videos
        rank, world_size = self._place()
        mine = range(len(videos)) if self.cache else range(rank, len(videos), world_size)
        clips = self._training_clips(videos) if split == "train" else self._clips(split, videos)
        problems, kept = read_videos(clips, mine, self.cache, self.workers)
        problems = problems_of_all(problems, world_size, self.corrupt == "refuse")
        return self._without(VideoSet(videos.root, videos.names, videos.labels, videos.windows, kept), problems, split)

    def _without(self, videos: VideoSet, problems: dict[int, str], split: Split) -> VideoSet:
        if not problems:
            return videos
        message = f"{len(problems)} of {len(videos)} videos of split {split} cannot be read"
        if len(problems) > len(videos) / 2:
            raise ValueError(f"{message}: {some(list(problems.values()))}. Those are too many to leave out")
        rank_zero_warn(f"{message}, and are left out: {some(list(problems.values()))}")
        remaining = videos.take(np.delete(np.arange(len(videos)), list(problems)))
        if split == "train":
            self._check_training_classes(remaining)
        return remaining

    def _evaluation_loader(self, videos: VideoSet, clips: "EvaluationClips") -> "VideoLoader":
        batch_size = max(1, self.eval_batch_size // clips.views)
        return self._loader(clips, EvaluationBatches(len(videos), batch_size, *self._place()))

    def _loader(self, clips: "Clips", batches: TrainingBatches | EvaluationBatches) -> "VideoLoader":
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return VideoLoader(clips, batches, self.workers, pin_memory=on_gpu)


def _ready(value: Any) -> Any:
    if value is None:
        raise RuntimeError("call VideoFolderDataModule.setup() before asking for its batches")
    return value


# Clips


class Clips(Dataset):
    """Abstract: clips of videos as one batch, what a worker process does.

    A job is ``(seed, epoch, indices)``; its result is uint8 (N, 3, T, size, size), or (N, V, 3, T, size, size) where
    there are more views than one, or its error.

    Args:
        videos: Where from.
        num_frames: Frames of a clip, T.
        seconds: Length of a clip.
        size: Side of the clips.
    """

    views = 1

    def __init__(self, videos: VideoSet, num_frames: int, seconds: float, size: int) -> None:
        self.videos = videos
        self.num_frames = num_frames
        self.seconds = seconds
        self.size = size
        self.steps = np.arange(num_frames) * (seconds / num_frames)

    def __getitems__(self, job: tuple[int, int, list[int]]) -> Tensor | Exception:
        seed, epoch, indices = job
        shape = (len(indices), self.views, self.num_frames, self.size, self.size, 3)
        batch = torch.empty(shape, dtype=torch.uint8)
        try:
            for row, index in enumerate(indices):
                self.fill(batch[row].numpy(), seed, epoch, index)
        except (OSError, ValueError) as error:  # raised by the loader: from here it would come wrapped in a traceback
            return error
        clips = batch.permute(0, 1, 5, 2, 3, 4)
        return clips[:, 0] if self.views == 1 else clips

    def fill(self, out: np.ndarray, seed: int, epoch: int, index: int) -> None:
        """Write the views of a video into uint8 (V, T, size, size, 3).

        Raises:
            ValueError: It cannot be read; the message names it.
            OSError: The file cannot be read.
        """
        raise NotImplementedError(f"{type(self).__name__} must define fill()")

    def whole(self, index: int) -> np.ndarray:
        """What is to be kept of a video, uint8 (K, H, W, 3); errors as of :meth:`fill`."""
        raise NotImplementedError(f"{type(self).__name__} must define whole()")

    def part(self, video: VideoFile, index: int) -> tuple[float, float]:
        """Where the part of a video that counts begins and ends, in seconds.

        Raises:
            ValueError: The video is over before.
        """
        first, last = self.videos.windows[index].tolist()
        if first >= video.duration:
            raise ValueError(
                f"{video.path} lasts {video.duration:.1f} seconds, but its csv line asks for {first:g} to {last:g}: a "
                "file of that part alone is named ID_000012_000022.mp4"
            )
        return first, min(last, video.duration)


class TrainingClips(Clips):
    """A random clip of each video; see :class:`Clips`.

    Args:
        videos: Where from.
        num_frames: Frames of a clip, T.
        seconds: Length of a clip.
        size: Side of the clips.
        least: Least short side to which frames are resized before a square is cut out.
        most: The greatest.
        flip: Mirror half of the clips left to right.
    """

    def __init__(
        self, videos: VideoSet, num_frames: int, seconds: float, size: int, least: int, most: int, flip: bool
    ) -> None:
        super().__init__(videos, num_frames, seconds, size)
        self.least = least
        self.most = most
        self.flip = flip

    def fill(self, out: np.ndarray, seed: int, epoch: int, index: int) -> None:
        """Write a random clip of a video; see :class:`Clips`."""
        when, scale, top, left, mirror = np.random.default_rng([seed, epoch, index]).random(5)
        frames = self._kept(index, when) if self.videos.kept is not None else self._decoded(index, when, scale)
        height, width, _ = frames[0].shape
        rows, columns = (_cut(int(u * (side - self.size + 1)), self.size) for u, side in ((top, height), (left, width)))
        turn = -1 if self.flip and mirror < 0.5 else 1
        for k, frame in enumerate(frames):
            out[0, k] = frame[rows, columns][:, ::turn]

    def _kept(self, index: int, when: float) -> np.ndarray:
        frames = self.videos.kept.frames(index)  # type: ignore[union-attr]
        first = int(when * (max(0, len(frames) - self.num_frames) + 1))
        return frames[np.minimum(first + np.arange(self.num_frames), len(frames) - 1)]

    def _decoded(self, index: int, when: float, scale: float) -> list[np.ndarray]:
        short_side = self.least + int(scale * (self.most - self.least + 1))
        with VideoFile(self.videos.path(index)) as video:
            first, last = self.part(video, index)
            start = first + when * max(0.0, last - first - self.seconds)
            return video.frames(np.minimum(start + self.steps, last), short_side)

    def whole(self, index: int) -> np.ndarray:
        """All frames of a video that a clip may show where it begins at a multiple of their distance in time."""
        with VideoFile(self.videos.path(index)) as video:
            first, last = self.part(video, index)
            step = self.seconds / self.num_frames
            times = first + np.arange(max(1, round((last - first) / step))) * step
            return np.stack(video.frames(times, self.least))


class EvaluationClips(Clips):
    """The views of each video that an evaluation sees; see :class:`Clips`.

    Args:
        videos: Where from.
        num_frames: Frames of a clip, T.
        seconds: Length of a clip.
        size: Side of the clips.
        clips: Parts of each video: one is its middle, more are from its beginning to its end.
        crops: Squares of each part: one is its middle, three are both ends of its long side and the middle.
    """

    def __init__(self, videos: VideoSet, num_frames: int, seconds: float, size: int, clips: int, crops: int) -> None:
        super().__init__(videos, num_frames, seconds, size)
        self.clips = clips
        self.crops = crops
        self.views = clips * crops

    def fill(self, out: np.ndarray, seed: int, epoch: int, index: int) -> None:
        """Write the views of a video, clip after clip, the squares of a clip beside each other."""
        if self.videos.kept is not None:
            out[:] = self.videos.kept.frames(index).reshape(out.shape)
            return
        with VideoFile(self.videos.path(index)) as video:
            first, last = self.part(video, index)
            slack = max(0.0, last - first - self.seconds)
            starts = first + np.linspace(0, slack, self.clips) if self.clips > 1 else np.array([first + slack / 2])
            times = np.minimum(starts[:, None] + self.steps, last)
            frames = video.frames(times.reshape(-1), self.size)
        height, width, _ = frames[0].shape
        for crop, place in enumerate((0.5,) if self.crops == 1 else (0.0, 0.5, 1.0)):
            rows, columns = (_cut(round(place * (side - self.size)), self.size) for side in (height, width))
            for k, frame in enumerate(frames):
                clip, step = divmod(k, self.num_frames)
                out[clip * self.crops + crop, step] = frame[rows, columns]

    def whole(self, index: int) -> np.ndarray:
        """All views of a video, one after the other."""
        out = np.empty((self.views, self.num_frames, self.size, self.size, 3), dtype=np.uint8)
        self.fill(out, 0, 0, index)
        return out.reshape(-1, self.size, self.size, 3)


def _cut(start: int, size: int) -> slice:
    return slice(start, start + size)


class VideoLoader(AheadLoader):
    """Batches ``(clips, labels)``, uint8 and int64, whose clips are read ahead by worker processes.

    Args:
        clips: What a worker does.
        batch_sampler: Which videos make a batch; its place is that of the last batch that was handed out.
        workers: Number of processes; 0 reads in this one.
        pin_memory: Whether to put clips where a GPU fetches them fastest.
    """

    def __init__(
        self, clips: Clips, batch_sampler: TrainingBatches | EvaluationBatches, workers: int, pin_memory: bool = False
    ) -> None:
        super().__init__((torch.from_numpy(clips.videos.labels),), batch_sampler, clips, workers, pin_memory)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for clips, (labels,) in self.read():
            yield clips, labels


# All videos once


class WholeVideos(Dataset):
    """Videos read from end to end, to find those that cannot be and, if asked, to keep frames of the others.

    A job is a list of indices; its result is the pixels of all that is kept, uint8 (bytes,), and for each video the
    number of frames, height and width that are kept, what is wrong with it, or an error that has nothing to do with it.

    Args:
        clips: What is kept of a video.
        keep: Whether to keep it.
    """

    def __init__(self, clips: Clips, keep: bool) -> None:
        self.clips = clips
        self.keep = keep

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, list[tuple[int, ...] | str | OSError]]:
        pieces = [torch.empty(0, dtype=torch.uint8)]
        outcomes: list[tuple[int, ...] | str | OSError] = []
        for index in indices:
            try:
                frames = self._read(index)
                pieces.append(torch.from_numpy(frames.reshape(-1)))
                outcomes.append(frames.shape[:3])
            except ValueError as error:
                outcomes.append(str(error))
            except OSError as error:
                outcomes.append(error)
        return torch.cat(pieces), outcomes

    def _read(self, index: int) -> np.ndarray:
        if self.keep:
            return self.clips.whole(index)
        with VideoFile(self.clips.videos.path(index)) as video:
            self.clips.part(video, index)
            video.check()
        return np.empty((0, 0, 0, 3), dtype=np.uint8)


def read_videos(clips: Clips, indices: range, keep: bool, workers: int) -> tuple[dict[int, str], KeptFrames | None]:
    """Read videos from end to end.

    Args:
        clips: What is kept of a video.
        indices: Which videos.
        keep: Whether to keep it.
        workers: Processes that read.

    Returns:
        What is wrong with the videos that cannot be read, by index; and the frames of all, if they are kept.

    Raises:
        OSError: A file cannot be read for a reason that is not its own.
    """
    rank_zero_info(f"reading {len(clips.videos)} videos once")
    chunks = [list(indices[start : start + CHUNK]) for start in range(0, len(indices), CHUNK)]
    places = np.zeros((len(clips.videos), 5), dtype=np.int64)
    few = len(indices) <= 2 * CHUNK
    problems, kept = read_chunks(WholeVideos(clips, keep), chunks, places, 0 if few else workers)
    return problems, KeptFrames(kept, places) if keep else None
