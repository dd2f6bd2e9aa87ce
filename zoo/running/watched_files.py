"""What a classifier of clips says of videos of one's own: the best classes of each."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from zoo.running.checkpoint import replacing
from zoo.running.clip_pictures import best_three, clips_figure, clips_gif
from zoo.running.picture_files import printable, short_name
from zoo.tasks.classification import best_classes
from zoo.tasks.video import VideoTask

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")
SHOWN = 8  # videos on the sheet and in the animation
VIEWS = 10  # clips of a video at most, as SlowFast is tested


class WatchedFiles:
    """Video files with the classes that a model sees in them.

    Clips of the length that the model was made for are taken evenly from the whole video, side by side as long as they
    do not overlap, ten at most, and their probabilities are averaged.

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
        """The clips of one video, float32 (V, 3, T, H, W) in [0, 1], of the size that the model was made for."""
        frames, height, width = self.model.example_input_array.shape[2:]
        return read_clips(path, frames, self.model.seconds, height, width)

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


def read_clips(path: Path, frames: int, seconds: float | None, height: int, width: int) -> Tensor:
    """Clips of a video file, side by side from its beginning to its end, at most ten; one of a shorter video.

    A clip's frames are ``seconds / frames`` apart in time; each is the one that a player shows then. Where the video is
    shorter its last frame stays. Of each frame the largest middle part of the wanted shape is taken.

    Args:
        path: A file that PyAV reads.
        frames: Frames T of a clip.
        seconds: Length of a clip; None takes the whole video as one.
        height: Pixels.
        width: Pixels.

    Returns:
        float32 (V, 3, T, height, width) in [0, 1].

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
        if not container.streams.video:
            raise ValueError("it has no pictures")
        start, end = _span(container)
    length = end - start if seconds is None else seconds
    slack = max(0.0, end - start - length)
    views = 1 if not length else min(VIEWS, 1 + int(slack / length))
    starts = np.linspace(0, slack, views) if views > 1 else np.array([slack / 2])
    times = start + starts[:, None] + np.arange(frames) * length / frames  # (V, T)
    with av.open(str(path), metadata_errors="ignore") as container:
        shown = _frames_at(container, times.reshape(-1), height, width)
    clips = torch.from_numpy(shown).view(views, frames, height, width, 3)
    return clips.permute(0, 4, 1, 2, 3).float() / 255


def _span(container: Any) -> tuple[float, float]:
    """When the first frame is shown and when the last one ends, in seconds, by the packets' own times."""
    stream = container.streams.video[0]
    times = [(p.pts, p.duration or 0) for p in container.demux(stream) if p.pts is not None]
    if not times:
        raise ValueError("its pictures have no times")
    start, end = min(times)[0], max(pts + length for pts, length in times)
    return float(start * stream.time_base), float(end * stream.time_base)


def _frames_at(container: Any, times: np.ndarray, height: int, width: int) -> np.ndarray:
    """The frames that a player shows at some times: uint8 (len(times), height, width, 3)."""
    shown = np.empty((len(times), height, width, 3), dtype=np.uint8)
    waiting = [int(place) for place in times.argsort(kind="stable")]
    tick = float(container.streams.video[0].time_base)
    before = None
    for frame in container.decode(container.streams.video[0]):
        due = 0
        while due < len(waiting) and before is not None and times[waiting[due]] + tick < frame.time:
            due += 1
        _show(shown, waiting[:due], before)
        waiting, before = waiting[due:], frame
        if not waiting:
            return shown
    if before is None:
        raise ValueError("none of its pictures can be decoded")
    _show(shown, waiting, before)  # after the end the last one stays
    return shown


def _show(shown: np.ndarray, places: list[int], frame: Any) -> None:
    if places:
        shown[places] = _middle(frame, *shown.shape[1:3])


def _middle(frame: Any, height: int, width: int) -> np.ndarray:
    """A frame upright, scaled so that it covers an area, and its middle: uint8 (height, width, 3)."""
    turns = round(frame.rotation / 90) % 4
    scale = max(height / frame.height, width / frame.width)
    if turns % 2:
        scale = max(width / frame.height, height / frame.width)
    small = frame.reformat(round(frame.width * scale), round(frame.height * scale), "rgb24", interpolation="BILINEAR")
    upright = np.rot90(small.to_ndarray(), turns)
    top, left = (upright.shape[0] - height) // 2, (upright.shape[1] - width) // 2
    return upright[top : top + height, left : left + width]
