"""Prediction on pictures of one's own: any file that Pillow reads, upright, at the size that a model wants."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningModule
from PIL import Image, ImageOps
from torch import Tensor

from zoo.recipes import RecipeError
from zoo.running.checkpoint import replacing
from zoo.running.pictures import contact_sheet, write_png
from zoo.running.views import Kind, averaging_views
from zoo.tasks.classification import ClassificationTask
from zoo.weights import load

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
SMALL = 64  # pixels: up to this size nothing is cut off but what makes the picture square
MARGIN = 256 / 224  # of larger ones, as networks for ImageNet are evaluated
SHOWN = 32  # pictures on the contact sheet


def predict_pictures(
    weights: Path,
    pictures: list[Path],
    out: Path,
    top: int = 5,
    test_time_augmentation: Kind | None = None,
    device: Literal["cpu", "cuda", "mps"] | None = None,
    batch_size: int = 64,
) -> int:
    """Print what a model says of each picture; write ``predictions.jsonl`` and ``predictions.png``.

    A row of ``predictions.jsonl`` has ``file`` and ``top``: pairs of a class's name and its probability. A picture
    that cannot be read is named and left out.

    Args:
        weights: A ``.ckpt`` of a run or a ``.safetensors`` weights file of a classifier of the zoo.
        pictures: Files, and folders, which are searched through for files that end like pictures.
        out: The folder.
        top: So many classes of each picture, at most 5.
        test_time_augmentation: Average over the views of :mod:`zoo.running.views`.
        device: None is a GPU where there is one.
        batch_size: Pictures at a time.

    Returns:
        The number of pictures that could not be read.

    Raises:
        RecipeError: A file, a folder or the device is not there, the model is no classifier, or no picture is left.
        ValueError: The weights file is unsafe or damaged.
    """
    if batch_size < 1:
        raise RecipeError(f"--batch_size {batch_size} must be at least 1")
    files = find_pictures(pictures)
    model = _model(weights, device)
    rows: list[dict[str, Any]] = []
    shown: list[Tensor] = []
    broken: dict[Path, str] = {}
    for paths, images in _batches(files, model.example_input_array.shape[1:], batch_size, broken):
        shown += list(images[: max(0, SHOWN - len(shown))])
        for path, prediction in zip(paths, _predict(model, images, test_time_augmentation), strict=True):
            rows.append({"file": str(path), "top": prediction["top"][:top]})
    for path, reason in broken.items():
        print(f"zoo: error: {_printable(path)} is left out: {reason}", file=sys.stderr)
    if not rows:
        raise RecipeError(f"none of {len(files)} pictures could be read")
    _write(out, rows, torch.stack(shown))
    _print_rows(rows)
    print(f"{len(rows)} pictures: {out}/predictions.jsonl, {out}/predictions.png")
    return len(broken)


def find_pictures(paths: list[Path]) -> list[Path]:
    """Files as they are given, and of folders everything below that ends like a picture, sorted.

    Raises:
        RecipeError: A path is not there, or a folder has no pictures.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not found:
                raise RecipeError(f"{_printable(path)} has no pictures: files that end in {', '.join(SUFFIXES)}")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise RecipeError(f"there is no picture or folder {_printable(path)!r}")
    return files


def read_picture(path: Path, channels: int, height: int, width: int) -> Tensor:
    """One picture, upright, at a size: the largest part from its centre, or a little less for larger sizes.

    Up to 64 pixels the shorter side is brought to the size and the longer one cut; above that 224 of each 256 pixels
    of the shorter side are kept, as networks for ImageNet are evaluated. Transparent parts become white, 16-bit values
    8-bit ones; of an animation the first picture is taken.

    Args:
        path: A file that Pillow reads.
        channels: 1 for grey, 3 for RGB.
        height: Pixels.
        width: Pixels.

    Returns:
        float32 (channels, height, width) in [0, 1].

    Raises:
        Exception: Pillow cannot read the file; its decoders raise what they like.
    """
    with Image.open(path) as file:
        picture = _plain(ImageOps.exif_transpose(file)).convert("RGB" if channels == 3 else "L")
    margin = MARGIN if min(height, width) > SMALL else 1.0
    picture = picture.resize(
        _covering(picture.size, round(width * margin), round(height * margin)), Image.Resampling.BILINEAR
    )
    left, upper = round((picture.width - width) / 2), round((picture.height - height) / 2)
    values = np.asarray(picture.crop((left, upper, left + width, upper + height)), dtype=np.float32) / 255
    return torch.from_numpy(values.reshape(height, width, -1)).permute(2, 0, 1)


def _covering(size: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """Width and height of a picture that covers an area: one of them as wanted, the other in proportion."""
    if width * size[1] >= height * size[0]:
        return width, width * size[1] // size[0]
    return height * size[0] // size[1], height


def _plain(picture: Image.Image) -> Image.Image:
    """Without transparency, and with eight bits, where Pillow's own conversion would black out or cut off."""
    if picture.mode.startswith("I"):
        values = np.asarray(picture, dtype=np.float32) / 257  # 65,535 becomes 255
        return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        over = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return picture


def _model(weights: Path, device: str | None) -> ClassificationTask:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[device]:
        raise RecipeError(f"--device {device}: this machine, or this torch, has none")
    model: LightningModule = load(weights)
    if not isinstance(model, ClassificationTask):
        raise RecipeError(f"{weights} holds a zoo.{type(model).__name__}, which is no classifier of pictures")
    if model.example_input_array.shape[1] not in (1, 3):
        raise RecipeError(
            f"{weights} takes images of {model.example_input_array.shape[1]} channels, pictures have 1 or 3"
        )
    return model.to(device)


def _batches(
    files: list[Path], shape: torch.Size, batch_size: int, broken: dict[Path, str]
) -> Iterator[tuple[list[Path], Tensor]]:
    """Pictures (N, C, H, W) with their files; what cannot be read is told in ``broken``."""
    paths: list[Path] = []
    images: list[Tensor] = []
    for path in files:
        try:
            images.append(read_picture(path, *shape))
            paths.append(path)
        except Exception as error:
            broken[path] = f"{type(error).__name__}: {error}".replace(f" '{path}'", "").splitlines()[0]
        if len(images) == batch_size:
            yield paths, torch.stack(images)
            paths, images = [], []
    if images:
        yield paths, torch.stack(images)


def _predict(model: ClassificationTask, images: Tensor, kind: Kind | None) -> list[dict[str, Any]]:
    with torch.inference_mode():
        if kind is None:
            return model.predict_step(images.to(model.device), 0)
        with averaging_views(model, kind):
            return model.predict_step(images.to(model.device), 0)


def _write(out: Path, rows: list[dict[str, Any]], shown: Tensor) -> None:
    with replacing(out / "predictions.jsonl") as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    captions = [f"{_short(row['file'])}\n{row['top'][0][0]} {row['top'][0][1]:.0%}" for row in rows[: len(shown)]]
    captions = [caption.replace("$", r"\$") for caption in captions]  # no formula
    write_png(contact_sheet(shown, captions, "predictions"), out / "predictions.png")


def _short(file: str) -> str:
    """The file's name, at most 16 letters of it."""
    name = _printable(Path(file).name)
    return name if len(name) <= 16 else f"{name[:7]}…{name[-8:]}"


def _printable(path: Path | str) -> str:
    """A name with bytes that are no text shown as such."""
    return os.fsencode(path).decode("utf-8", "replace")


def _print_rows(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    numbers = [str(number) for number in range(1, len(rows[0]["top"]) + 1)]
    table = Table("picture", *numbers, box=None, header_style="bold", padding=(0, 1))
    for row in rows:
        table.add_row(
            Text(_printable(row["file"])), *(Text(f"{name} {probability:.1%}") for name, probability in row["top"])
        )
    Console(width=None if sys.stdout.isatty() else 400).print(table)
