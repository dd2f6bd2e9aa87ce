"""``zoo predict FILE PICTURE…``: what a model of the zoo says of pictures, or videos, of one's own."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from zoo.recipes import RecipeError
from zoo.running.captioned_files import CaptionedFiles
from zoo.running.checkpoint import replacing
from zoo.running.classified_files import ClassifiedFiles
from zoo.running.detected_files import DetectedFiles
from zoo.running.meshed_files import MeshedFiles
from zoo.running.picture_files import SUFFIXES, find_pictures, printable
from zoo.running.pictures import write_png
from zoo.running.views import Kind
from zoo.running.watched_files import WatchedFiles
from zoo.tasks.captioning import CaptioningTask
from zoo.tasks.classification import ClassificationTask
from zoo.tasks.detection import DetectionTask
from zoo.tasks.mesh import MeshTask
from zoo.tasks.video import VideoTask
from zoo.weights import load

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


class Predicted(Protocol):
    """What a task does with files."""

    batch_size: int

    def read(self, path: Path) -> Tensor:
        """One picture (C, H, W), or the clips (V, 3, T, H, W) of one video, as the model wants it."""

    def predict(self, paths: list[Path], images: list[Tensor]) -> list[dict[str, Any]]:
        """A row of ``predictions.jsonl`` for each picture."""

    def sheet(self) -> "Figure":
        """The first pictures with what was said of them."""

    def table(self, rows: list[dict[str, Any]]) -> "Table":
        """What the terminal shows."""


def predict_pictures(
    weights: Path,
    pictures: list[Path],
    out: Path,
    top: int | None = None,
    test_time_augmentation: Kind | None = None,
    score_threshold: float | None = None,
    device: Literal["cpu", "cuda", "mps"] | None = None,
    batch_size: int | None = None,
) -> int:
    """Print what a model says of each picture; write ``predictions.jsonl`` and ``predictions.png``.

    Pictures are read as the evaluation of the training read them, which its data module says (``evaluation``) and the
    file keeps: what is said of a file is what validation and test said of it, to 1e-5. Of a clip it is what the test
    said, whose ``test_clips`` and ``test_crops`` validation has not. Where a file does not say it, as of earlier
    releases, classifiers take the usual size and cut: :func:`zoo.running.picture_files.read_picture`.

    A row of ``predictions.jsonl`` has ``file``, and of a classifier ``top``: pairs of a class's name and its
    probability; of a detector ``objects``, as :meth:`zoo.tasks.detection.DetectionTask.objects` gives them, in pixels
    of the upright picture; of a captioner ``caption`` and its ``log_probability``; of a model of meshes ``meshes``, the
    files below ``out`` that they are written to, beside ``predictions.gif`` and ``predictions.html``. A model of clips
    is given videos in place of pictures, and writes ``predictions.gif`` too. A file that cannot be read is named and
    left out.

    Args:
        weights: A ``.ckpt`` of a run or a ``.safetensors`` weights file of a classifier of pictures or clips, a
            detector, a captioner or a model of meshes of the zoo.
        pictures: Files, and folders, which are searched through for files that end like pictures, or like videos.
        out: The folder.
        top: So many classes of each picture, at most 5; by default 5. For classifiers.
        test_time_augmentation: Average over the views of :mod:`zoo.running.views`. For classifiers.
        score_threshold: Least score of an object. None writes what the model gives by itself, and shows what has 0.5.
            For detectors.
        device: None is a GPU where there is one.
        batch_size: Pictures at a time; None is 4 for detectors, 16 for meshes, 1 for videos, 64 for others.

    Returns:
        The number of pictures that could not be read.

    Raises:
        RecipeError: A file, a folder or the device is not there, the model takes no pictures or not such an option, or
            no picture is left.
        ValueError: The weights file is unsafe or damaged.
    """
    if batch_size is not None and batch_size < 1:
        raise RecipeError(f"--batch_size {batch_size} must be at least 1")
    chosen = {"top": top, "test_time_augmentation": test_time_augmentation, "score_threshold": score_threshold}
    predicted = _predicted(weights, device, out, {key: value for key, value in chosen.items() if value is not None})
    kind = "video" if isinstance(predicted, WatchedFiles) else "picture"
    files = find_pictures(pictures, predicted.suffixes if isinstance(predicted, WatchedFiles) else SUFFIXES, kind)
    rows: list[dict[str, Any]] = []
    broken: dict[Path, str] = {}
    for paths, images in _batches(files, predicted.read, batch_size or predicted.batch_size, broken):
        rows += predicted.predict(paths, images)
    for path, reason in broken.items():
        print(f"zoo: error: {printable(path)} is left out: {reason}", file=sys.stderr)
    if not rows:
        raise RecipeError(f"none of {len(files)} {kind}s could be read")
    with replacing(out / "predictions.jsonl") as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_png(predicted.sheet(), out / "predictions.png")
    more = predicted.write_views() if isinstance(predicted, MeshedFiles | WatchedFiles) else []
    _print(predicted.table(rows))
    print(f"{len(rows)} {kind}s: {', '.join(map(str, [out / 'predictions.jsonl', out / 'predictions.png', *more]))}")
    return len(broken)


def _predicted(weights: Path, device: str | None, out: Path, options: dict[str, Any]) -> Predicted:
    """The model on its device, with the options of its task."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[device]:
        raise RecipeError(f"--device {device}: this machine, or this torch, has none")
    model = load(weights)
    name = f"zoo.{type(model).__name__}"
    if isinstance(model, DetectionTask):
        _refuse(options, ("top", "test_time_augmentation"), "classifiers", f"{weights} holds a {name}, a detector")
        return DetectedFiles(model.to(device), **options)
    if isinstance(model, CaptioningTask | MeshTask):
        said = f"{weights} holds a {name}, a {'captioner' if isinstance(model, CaptioningTask) else 'model of meshes'}"
        _refuse(options, ("top", "test_time_augmentation"), "classifiers", said)
        _refuse(options, ("score_threshold",), "detectors", said)
        model = model.to(device)
        return CaptionedFiles(model) if isinstance(model, CaptioningTask) else MeshedFiles(model, out)
    if isinstance(model, VideoTask):
        said = f"{weights} holds a {name}, a classifier of clips"
        _refuse(options, ("test_time_augmentation",), "classifiers of pictures", said)
        _refuse(options, ("score_threshold",), "detectors", said)
        return WatchedFiles(model.to(device), out, **options)
    if not isinstance(model, ClassificationTask):
        raise RecipeError(f"{weights} holds a {name}, which says nothing of pictures")
    _refuse(options, ("score_threshold",), "detectors", f"{weights} holds a {name}, a classifier")
    channels = model.example_input_array.shape[1]
    if channels not in (1, 3):
        raise RecipeError(f"{weights} takes images of {channels} channels, pictures have 1 or 3")
    return ClassifiedFiles(model.to(device), **options)


def _refuse(options: dict[str, Any], wrong: tuple[str, ...], of: str, found: str) -> None:
    given = [f"--{key}" for key in wrong if key in options]
    if given:
        raise RecipeError(f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} for {of}: {found}")


def _batches(
    files: list[Path], read: Callable[[Path], Tensor], batch_size: int, broken: dict[Path, str]
) -> Iterator[tuple[list[Path], list[Tensor]]]:
    """Files and their pictures; what cannot be read is told in ``broken``."""
    paths: list[Path] = []
    images: list[Tensor] = []
    for path in files:
        try:
            images.append(read(path))
            paths.append(path)
        except Exception as error:
            broken[path] = f"{type(error).__name__}: {error}".replace(f" '{path}'", "").splitlines()[0]
        if len(images) == batch_size:
            yield paths, images
            paths, images = [], []
    if images:
        yield paths, images


def _print(table: "Table") -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 400).print(table)
