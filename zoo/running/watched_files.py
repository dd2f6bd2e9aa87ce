"""What a classifier of clips says of videos of one's own: the best classes of each."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zoo.running.checkpoint import replacing
from zoo.running.clip_pictures import best_three, clips_figure, clips_gif
from zoo.running.picture_files import evaluation_of, printable, short_name
from zoo.tasks.classification import best_classes
from zoo.tasks.video import VideoTask

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")
SHOWN = 8  # videos on the sheet and in the animation
VIEWS = 10  # clips of a video at most, as SlowFast is tested
PLACES = {1: (0.5,), 3: (0.0, 0.5, 1.0)}  # where along the long side so many squares are
ROUNDING = 1e-3  # seconds: Matroska's clock has milliseconds
LONGEST = 16  # times the short side: more of a frame is not made


class WatchedFiles:
    """Video files with the classes that a model sees in them.

    The clips are those that a test of the training saw of such a video: as many, of that length, side and place
    (``test_clips``, ``test_crops``, … of the data module); of one that a csv file named a part of, the whole file's. Of
    a file that does not say it clips of the length that the model was made for are taken evenly from the whole video,
    side by side as long as they do not overlap, ten at most. Probabilities are averaged. Validation has the clip in the
    middle alone, which is the same where ``test_clips`` and ``test_crops`` are 1.

    Args:
        model: A classifier of clips in evaluation mode, on its device.
        out: Folder for what :meth:`write_views` writes.
        top: So many classes of each video, at most 5.
    """

    batch_size = 1
    suffixes = SUFFIXES

    def __init__(self, model: VideoTask, out: Path, top: int = 5) -> None:
        self.model = model
        self.out = out
        self.top = top
        self._clips: list[Tensor] = []
        self._captions: list[str] = []

    def read(self, path: Path) -> Tensor:
        """The clips of one video, float32 (V, 3, T, H, W) in [0, 1]."""
        frames, _, size = self.model.example_input_array.shape[2:]
        made = evaluation_of(self.model)
        frames, seconds = made.get("num_frames", frames), made.get("seconds", self.model.seconds)
        return read_clips(path, frames, seconds, made.get("size", size), made.get("clips"), made.get("crops", 1))

    def predict(self, paths: list[Path], images: list[Tensor]) -> list[dict[str, Any]]:
        """A row for each video: ``file`` and ``top``, pairs of a class's name and its probability."""
        rows = []
        for path, views in zip(paths, images, strict=True):
            with torch.inference_mode():
                found = self.model.log_probabilities(views[None].to(self.model.device)).exp()
            (prediction,) = best_classes(found, self.model.class_names)
            rows.append({"file": str(path), "top": prediction["top"][: self.top]})
            if len(self._clips) < SHOWN:
                self._clips.append(views[len(views) // 2])
                self._captions.append(f"{short_name(path)}\n{best_three(prediction)}")
        return rows

    def sheet(self) -> "Figure":
        """Frames of the first videos with their best three classes."""
        return clips_figure(self._clips, self._captions, "predictions")

    def table(self, rows: list[dict[str, Any]]) -> "Table":
        """The best classes of each video."""
        from rich.table import Table
        from rich.text import Text

        table = Table("video", *map(str, range(1, len(rows[0]["top"]) + 1)), box=None, header_style="bold")
        for row in rows:
            table.add_row(printable(row["file"]), *(Text(f"{name} {share:.1%}") for name, share in row["top"]))
        return table

    def write_views(self) -> list[Path]:
        """Write ``predictions.gif``, where the first videos play."""
        path = self.out / "predictions.gif"
        with replacing(path) as partial:
            partial.write_bytes(clips_gif(self._clips, self._captions))
        return [path]


def read_clips(
    path: Path, frames: int, seconds: float | None, size: int, clips: int | None = None, crops: int = 1
) -> Tensor:
    """Clips of a video file, by the same rules as those that a test of the training sees.

    A clip's frames are ``seconds / frames`` apart in time; each is the one that a player shows then. Where the video is
    shorter its last frame stays. The short side of each frame is resized to ``size``.

    Args:
        path: A file that PyAV reads.
        frames: Frames T of a clip.
        seconds: Length of a clip; None takes the whole video as one.
        size: Side of the clips in pixels.
        clips: Parts of the video: one is its middle, more are from its beginning to its end. None is as many as do not
            overlap, ten at most.
        crops: Squares of each part: one is its middle, three are both ends of its long side and the middle.

    Returns:
        float32 (V, 3, T, size, size) in [0, 1], clip after clip, the squares of a clip beside each other.

    Raises:
        ModuleNotFoundError: PyAV is not installed.
        ValueError: The file has no pictures.
        Exception: PyAV cannot read the file; it has errors of its own.
    """
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("to read videos needs PyAV: pip install 'zoo[video]'") from error
    with av.open(str(path), metadata_errors="ignore") as container:
        known = _times(container)
    length = known.end if seconds is None else seconds
    slack = max(0.0, known.end - length)
    if clips is None:
        clips = min(VIEWS, 1 + int(slack / length)) if length else 1
    starts = np.linspace(0, slack, clips) if clips > 1 else np.array([slack / 2])
    times = np.minimum(starts[:, None] + np.arange(frames) * (length / frames), known.end)  # (clips, T)
    chosen = (np.searchsorted(known.shown, times.reshape(-1) + known.rounding, side="right") - 1).clip(0)
    with av.open(str(path), metadata_errors="ignore") as container:
        found = _frames_at(container, chosen, known.stamps, size)
    squares = np.stack([_square(frame, size, place) for frame in found for place in PLACES[crops]])
    views = torch.from_numpy(squares).view(clips, frames, crops, size, size, 3)
    return views.permute(0, 2, 5, 1, 3, 4).flatten(0, 1).float().div_(255)


class Times(NamedTuple):
    """When the frames of a video are shown.

    Attributes:
        shown: Seconds since the first frame, ascending.
        stamps: The same as the file has it; None where its frames are counted.
        end: When the last frame is over.
        rounding: Seconds by which a clock may be wrong.
    """

    shown: np.ndarray
    stamps: np.ndarray | None
    end: float
    rounding: float


def _square(frame: np.ndarray, size: int, place: float) -> np.ndarray:
    """A square of a frame (H, W, 3) of short side ``size``: from the beginning, 0, of its long side to the end, 1."""
    top, left = (round(place * (side - size)) for side in frame.shape[:2])
    return frame[top : top + size, left : left + size]


def _pictures(container: Any) -> Any:
    """The stream of pictures, not that of a cover."""
    from av.stream import Disposition

    streams = container.streams.video
    found = next((stream for stream in streams if not stream.disposition & Disposition.attached_pic), None)
    if found is None:
        raise ValueError("it has no pictures")
    return found


def _times(container: Any) -> Times:
    """When frames are shown, by the packets' own times."""
    stream = _pictures(container)
    tick = float(stream.time_base)
    packets = [packet for packet in container.demux(stream) if packet.size]
    # AVI has no times for frames that are stored in another order than shown: they are counted.
    counted = container.format.name == "avi" and stream.codec_context.has_b_frames
    counted = counted or any(packet.pts is None for packet in packets)
    stamps = [packet.dts if packet.pts is None else packet.pts for packet in packets if not packet.is_discard]
    known = np.sort(np.array([stamp for stamp in stamps if stamp is not None], dtype=np.int64))
    if not len(known):
        raise ValueError("its pictures have no times")
    known = known if counted else np.unique(known)
    start = int(known[0]) if counted else stream.start_time or 0
    ends = [packet.pts + (packet.duration or 0) for packet in packets if packet.pts is not None]
    duration = stream.duration or max(ends, default=int(known[-1])) - (stream.start_time or 0)
    return Times((known - start) * tick, None if counted else known, duration * tick, min(tick, ROUNDING))


def _frames_at(container: Any, chosen: np.ndarray, stamps: np.ndarray | None, short_side: int) -> list[np.ndarray]:
    """Some frames by their places, uint8 (H, W, 3) each; one that is not decoded is as the last before it that is."""
    from av.video.reformatter import Interpolation, VideoReformatter

    scaler = VideoReformatter()
    wanted = set(chosen.tolist())
    found: dict[int, np.ndarray] = {}
    for number, frame in enumerate(container.decode(_pictures(container))):
        place = number if stamps is None else int(np.searchsorted(stamps, frame.pts))
        if place in wanted:
            height, width = _resized(frame.height, frame.width, short_side)
            small = scaler.reformat(frame, width, height, "rgb24", interpolation=Interpolation.BILINEAR, threads=1)
            found[place] = np.rot90(small.to_ndarray(), round(frame.rotation / 90) % 4)
        if len(found) == len(wanted):
            break
    if not found:
        raise ValueError("none of its pictures can be decoded")
    there = np.array(sorted(found))
    return [found[int(there[max(0, k)])] for k in np.searchsorted(there, chosen, side="right") - 1]


def _resized(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width with another short side; the long one is at most 16 times it."""
    short = min(height, width)
    tall, wide = (min(LONGEST * short_side, int(short_side * side / short)) for side in (height, width))
    return tall, wide
