"""Videos of shapes of which only the motion tells the class, encoded and written to disk as class folders of mp4.

A shape has a place, a turn and a size. All of these are drawn evenly from a ring: who leaves the picture at one side
comes in at the other, and a size that has become the largest begins again as the smallest. A motion moves one of them
round its ring. Whatever the motion, in each frame place, turn and size are therefore spread as in any other, so that no
single frame tells anything; and a video played backwards is one of the opposite motion, so that the frames without
their order tell four pairs of motions apart at best.
"""

import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from datamodules.embedded.drawing import COLOURS, GROUNDS
from datamodules.embedded.writing import whole_folder
from datamodules.pictures import resize
from datamodules.video import VideoFolderDataModule
from datamodules.video_files import video_library
from datamodules.video_lists import Split

VERSION = 1  # of the videos; another one makes another folder
OPPOSITES = {"left": "right", "up": "down", "clockwise": "counter-clockwise", "grow": "shrink"}
OPPOSITES |= {other: motion for motion, other in OPPOSITES.items()}
MOTIONS = sorted(OPPOSITES)
SPLITS: tuple[Split, ...] = ("train", "val", "test")
RATE = 16  # frames a second
FRAMES = 32  # of a video
SMALLEST, LARGEST = 0.15, 0.34  # of a shape's radius, in sides of the picture
# Least and greatest speed, in rounds of its ring a second: place in pictures, turn in turns, size in times through.
SPEEDS = {"left": (0.3, 0.7), "up": (0.3, 0.7), "clockwise": (0.25, 0.4), "grow": (0.3, 0.5)}
SPEEDS |= {OPPOSITES[motion]: speeds for motion, speeds in list(SPEEDS.items())}
# Which number of (x, y, turn, size) a motion changes, and to which side; y is down, and so a positive turn clockwise.
CHANGES = {"right": (0, 1), "left": (0, -1), "down": (1, 1), "up": (1, -1), "clockwise": (2, 1), "grow": (3, 1)}
CHANGES |= {"counter-clockwise": (2, -1), "shrink": (3, -1)}


class MovingShapesDataModule(VideoFolderDataModule):
    """Batches ``(clips, labels)`` of moving shapes; see :class:`VideoFolderDataModule`.

    The eight classes are clockwise, counter-clockwise, down, grow, left, right, shrink and up: what a shape does, one
    of five kinds on a textured ground, in a video of 2 seconds of 16 frames. The set is written once, into a folder of
    ``root`` that its arguments name, as mp4 (H.264) in class folders, and read by what reads any videos. Those for
    validation and testing are drawn in the same way.

    Args:
        root: Folder in which the set's own is made.
        train_size: Number of training videos, evenly of all classes.
        val_size: Number of videos for validation; 0 trains without it.
        test_size: Number of videos for testing; 0 tests on those for validation.
        seed: Seed of the videos, apart from the run's seed so that runs compare.
        num_frames: Frames of a clip.
        seconds: Length of a clip.
        size: Side of the clips in pixels; the videos, of 64 x 64, are resized to it.
        batch_size: Clips of a global training batch: all processes together.
        eval_batch_size: Clips per process in validation, test and prediction.
        test_clips: Parts of each video in testing and prediction.
        test_crops: Squares of each part: videos are square, so that three are the same.
        cache: Decode all videos once and keep them in memory, in each training process: 315 MB for the 1,600
            training videos of the default.
        workers: Processes that decode, for each process that trains; None means one per processor, at most 4.

    Raises:
        ModuleNotFoundError: PyAV is not installed.
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        root: str = "data",
        train_size: int = 1600,
        val_size: int = 200,
        test_size: int = 400,
        seed: int = 0,
        num_frames: int = 16,
        seconds: float = 2.0,
        size: int = 64,
        batch_size: int = 16,
        eval_batch_size: int = 32,
        test_clips: int = 1,
        test_crops: Literal[1, 3] = 1,
        cache: bool = True,
        workers: int | None = 0,
    ) -> None:
        if train_size < len(MOTIONS):
            raise ValueError(f"train_size={train_size} must be at least {len(MOTIONS)}, one of each class")
        self.sizes: dict[Split, int] = {"train": train_size, "val": val_size, "test": test_size}
        if wrong := [f"{split}_size={count}" for split, count in self.sizes.items() if count != int(count)]:
            raise ValueError(f"{wrong[0]} must be a number of videos, not a share")
        self.seed = seed
        super().__init__(
            root,
            num_frames=num_frames,
            seconds=seconds,
            size=size,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            short_side=[size, size],
            flip=False,
            test_clips=test_clips,
            test_crops=test_crops,
            val_size=val_size,
            test_size=test_size,
            cache=cache,
            workers=workers,
        )

    def _find(self, labels: Any) -> None:
        """There is nothing to look for: the files are those that :meth:`prepare_data` writes."""
        video_library()
        self._rows = []
        self._set_root = self.root
        counts = "-".join(str(count) for count in self.sizes.values())
        self.root = self._set_root / f"moving-shapes-v{VERSION}-{counts}-seed{self.seed}"
        self._folders = {split: self.root / split for split, count in self.sizes.items() if count}
        self.class_names = MOTIONS

    def prepare_data(self) -> None:
        """Write the set, if it is not there."""
        if not self.root.is_dir():
            rank_zero_info(f"writing {sum(self.sizes.values())} videos to {self.root}")
            write_videos(self.root, self.sizes, self.seed)

    def setup(self, stage: str) -> None:
        """List the videos, and decode them once with ``cache``.

        Raises:
            FileNotFoundError: The set is not there: :meth:`prepare_data` writes it.
            ValueError: There is nothing to test on.
        """
        if not self.root.is_dir():
            raise FileNotFoundError(f"there is no folder {self.root}: run prepare_data(), which writes it")
        super().setup(stage)


# Writing


def write_videos(folder: Path, sizes: dict[Split, int], seed: int = 0) -> None:
    """Write a set: ``<split>/<class>/00000.mp4``, classes in turn.

    It is written beside ``folder`` and moved there when it is whole: a run that is killed leaves no part of it.

    Args:
        folder: Where to; must not be there yet, unless another process was sooner with the same.
        sizes: Number of videos of each split.
        seed: Videos are the same for the same seed and split; fewer are the first of more.
    """
    with whole_folder(folder, "train") as whole:
        for number, split in enumerate(SPLITS):
            for motion in MOTIONS if sizes[split] else []:
                (whole / split / motion).mkdir(parents=True)
            for index in range(sizes[split]):
                motion = MOTIONS[index % len(MOTIONS)]
                frames = make_video(motion, np.random.default_rng([seed, number, index]))
                write_video(whole / split / motion / f"{index:05d}.mp4", frames, RATE)


def write_video(path: Path, frames: np.ndarray, rate: int, quality: int = 20) -> None:
    """Encode frames, uint8 (T, H, W, 3) of even height and width, as H.264 in mp4.

    Args:
        path: Where to.
        frames: The frames.
        rate: How many of them a second has.
        quality: x264's constant rate factor: 0 is without loss, 51 the worst.
    """
    av = video_library()
    with av.open(str(path), "w") as container:
        # With mbtree x264 gives another file each time for pictures as small as these.
        options = {"crf": str(quality), "preset": "veryfast", "x264-params": "no-mbtree=1"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode(None))


# Drawing


class Look(NamedTuple):
    """What a shape and its ground look like.

    Attributes:
        outline: The shape's radius in directions all around, (360,), at most 1.
        colour: Its red, green and blue, (3,).
        ground: The picture behind it, float32 (H, W, 3).
    """

    outline: np.ndarray
    colour: np.ndarray
    ground: np.ndarray


def make_video(motion: str, rng: np.random.Generator, side: int = 64, count: int = FRAMES) -> np.ndarray:
    """A video of a motion, uint8 (count, side, side, 3)."""
    look = draw_look(rng, side)
    states = move(motion, rng.random(4), rng.uniform(*SPEEDS[motion]) / RATE, count)
    frames = render(look, states)
    frames += 2 * rng.standard_normal((count, side, side, 1), dtype=np.float32)
    return frames.round().clip(0, 255).astype(np.uint8)


def move(motion: str, start: np.ndarray, speed: float, count: int) -> np.ndarray:
    """Place x and y, turn and size over time, (count, 4), each in [0, 1) of its ring.

    Args:
        motion: Its name.
        start: The first of them, (4,).
        speed: Rounds from one to the next.
        count: How many.
    """
    which, sign = CHANGES[motion]
    states = np.tile(start, (count, 1))
    states[:, which] += sign * speed * np.arange(count)
    return states % 1.0


def draw_look(rng: np.random.Generator, side: int) -> Look:
    """A random shape, colour and ground."""
    outline = OUTLINES[int(rng.integers(len(OUTLINES)))]
    colour = np.array(list(COLOURS.values())[int(rng.integers(len(COLOURS)))]) * rng.uniform(0.85, 1.1)
    base = np.array(list(GROUNDS.values())[int(rng.integers(len(GROUNDS)))]) * rng.uniform(0.7, 1.3)
    coarse = rng.integers(0, 256, (int(rng.integers(4, 10)),) * 2 + (3,), dtype=np.uint8)
    texture = resize(coarse, side, side).permute(1, 2, 0).numpy() - 127.5
    ground = base + rng.uniform(0.1, 0.3) * texture
    return Look(outline, colour.astype(np.float32), ground.astype(np.float32, order="C"))


def render(look: Look, states: np.ndarray) -> np.ndarray:
    """Frames, float32 (T, H, W, 3), of a shape in the states (T, 4) that :func:`move` gives."""
    side = len(look.ground)
    pixels = (np.arange(side, dtype=np.float32) + 0.5) / side
    x, y, turn, size = states.T[:, :, None, None].astype(np.float32)
    # To the nearest of the shapes that the ring repeats.
    across, down = (pixels[None, None, :] - x + 0.5) % 1 - 0.5, (pixels[None, :, None] - y + 0.5) % 1 - 0.5
    distance = np.sqrt(across**2 + down**2)
    direction = np.arctan2(down, across) / (2 * math.pi) - turn
    reach = look.outline[(direction * 360).astype(int) % 360] * SMALLEST * (LARGEST / SMALLEST) ** size
    covered = ((reach - distance) * side + 0.5).clip(0, 1)[..., None]
    return look.ground + covered * (look.colour - look.ground)


def _outline(corners: list[tuple[float, float]]) -> np.ndarray:
    """The radius of a polygon in 360 directions from the origin, which sees all of its corners; at most 1."""
    first = np.array(corners)
    first /= np.linalg.norm(first, axis=1).max()
    edge = np.roll(first, -1, axis=0) - first
    angles = 2 * math.pi * (np.arange(360)[:, None] + 0.5) / 360
    ray = np.stack([np.cos(angles), np.sin(angles)], axis=-1)  # (360, 1, 2)
    crossed = ray[..., 0] * edge[:, 1] - ray[..., 1] * edge[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        far = (first[:, 0] * edge[:, 1] - first[:, 1] * edge[:, 0]) / crossed
        along = (first[:, 0] * ray[..., 1] - first[:, 1] * ray[..., 0]) / crossed
    hit = (far > 0) & (along >= -1e-9) & (along <= 1 + 1e-9)
    return np.where(hit, far, np.inf).min(axis=1).astype(np.float32)


def _turned(lengths: list[float]) -> list[tuple[float, float]]:
    """Corners at equal angles, so far from the origin."""
    angles = 2 * math.pi * np.arange(len(lengths)) / len(lengths)
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(lengths, angles.tolist(), strict=True)]


# All of them look another way when they are turned by less than 90 degrees.
OUTLINES = [
    _outline(_turned([1, 1, 1])),  # triangle
    _outline(_turned([1, 1, 1, 1])),  # square
    _outline([(1, 0.4), (-1, 0.4), (-1, -0.4), (1, -0.4)]),  # bar
    _outline([(1, 0), (-0.2, 0.9), (0.1, 0.25), (-0.9, 0.25), (-0.9, -0.25), (0.1, -0.25), (-0.2, -0.9)]),  # arrow
    _outline(_turned([1, 0.4] * 4)),  # star
]
