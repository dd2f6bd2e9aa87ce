"""Pictures of one's own: any file that Pillow reads, upright, at its own size or as an evaluation makes images of them.

The pixels are those that the data modules of classes, captions and objects make of a file, bit for bit: what a model
says of a file is what validation and test said of it.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from zoo.recipes import RecipeError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
SMALL = 64  # pixels: up to this size nothing is cut off but what makes the picture square
MARGIN = 256 / 224  # of larger ones, as networks for ImageNet are evaluated
LONGEST = 16  # times the short side: of a longer picture the middle is taken


def find_pictures(paths: list[Path], suffixes: tuple[str, ...] = SUFFIXES, kind: str = "picture") -> list[Path]:
    """Files as they are given, and of folders everything below that ends like a picture, or a video, sorted.

    Args:
        paths: Files and folders.
        suffixes: How they end.
        kind: What they are called where there are none.

    Raises:
        RecipeError: A path is not there, or a folder has none.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
            if not found:
                raise RecipeError(f"{printable(path)} has no {kind}s: files that end in {', '.join(suffixes)}")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise RecipeError(f"there is no {kind} or folder {printable(path)!r}")
    return files


def read_pixels(path: Path, ground: int | None = None) -> Tensor:
    """One picture, upright, at its own size.

    Transparency is dropped, of 16 bits the upper eight are kept, of an animation the first picture is taken.

    Args:
        path: A file that Pillow reads.
        ground: Grey level of what is wholly transparent; None leaves it the colour that the file has there.

    Returns:
        RGB, uint8 (3, H, W).

    Raises:
        Exception: Pillow cannot read the file; its decoders raise what they like.
    """
    with Image.open(path) as file:
        file.load()  # TIFF knows its orientation only then
        picture = ImageOps.exif_transpose(file)
    pixels = np.array(_to_rgb(picture))
    if ground is not None and (picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info):
        pixels[np.asarray(picture.convert("RGBA"))[..., 3] == 0] = ground
    return from_array(pixels)


def read_whole_picture(path: Path) -> Tensor:
    """The same as float32 (3, H, W) in [0, 1]."""
    return read_pixels(path).float().div_(255)


def read_picture(
    path: Path, channels: int, size: int, short_side: int | None = None, resize: int | None = None
) -> Tensor:
    """One picture as an evaluation makes an image of it: its short side is resized, then the middle is cut out.

    Args:
        path: A file that Pillow reads.
        channels: 1 for grey, 3 for RGB.
        size: Side of what is cut out, in pixels.
        short_side: That of the picture before. None is ``size`` where that is 64 at most, and above 256/224 of it, as
            networks for ImageNet are evaluated.
        resize: Side to which the image is brought at last; None leaves it at ``size``.

    Returns:
        float32 (channels, size, size) in [0, 1], or (channels, resize, resize).

    Raises:
        Exception: Pillow cannot read the file; its decoders raise what they like.
    """
    if short_side is None:
        short_side = size if size <= SMALL else round(size * MARGIN)
    if short_side < size:
        raise ValueError(f"no {size} pixels can be cut out of a short side of {short_side}")
    image = read_pixels(path)
    if channels == 1:
        image = from_array(np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L"))[..., None])
    image = _centre(_resized_short_side(image, short_side), size).float().div_(255)
    if resize is None:
        return image
    return F.interpolate(image[None], (resize, resize), mode="bilinear", antialias=True)[0]


def from_array(pixels: np.ndarray) -> Tensor:
    """Pixels (H, W, C) as a tensor (C, H, W)."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def resized(image: Tensor, height: int, width: int) -> Tensor:
    """An image, uint8 (C, H, W), at another size: bilinear, antialiased, in whole grey levels."""
    return F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]


def evaluation_of(model: LightningModule) -> dict[str, Any]:
    """How the images were made that a model was evaluated on, as its data module said; empty where its file does not.

    Its keys are those of the data modules' ``evaluation``, which differ from task to task.
    """
    found: Any = getattr(model, "evaluation", None)
    return found or {}


def printable(path: Path | str) -> str:
    """A name with bytes that are no text shown as such."""
    return os.fsencode(path).decode("utf-8", "replace")


def short_name(path: Path | str, letters: int = 16) -> str:
    """The file's name, at most so many letters of its beginning and end."""
    name = printable(Path(path).name)
    half = letters // 2
    return name if len(name) <= letters else f"{name[: half - 1]}…{name[len(name) - half :]}"


def _to_rgb(picture: Image.Image) -> np.ndarray:
    """Pixels as uint8 (H, W, 3)."""
    if picture.mode.startswith("I"):  # 16 bits, in "I" of 32 with older Pillow
        grey = np.clip(np.asarray(picture).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of which it does not say the range")
    if "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return np.asarray(picture.convert("RGB"))


def _resized_short_side(image: Tensor, size: int) -> Tensor:
    height, width = image.shape[1:]
    short = min(height, width)
    if max(height, width) > LONGEST * short:
        top, left = (max(0, (side - LONGEST * short) // 2) for side in (height, width))
        middle = image[:, top : top + LONGEST * short, left : left + LONGEST * short]
        return _resized_short_side(from_array(middle.permute(1, 2, 0).numpy()), size)
    return resized(image, int(size * height / short), int(size * width / short))


def _centre(image: Tensor, size: int) -> Tensor:
    top, left = (round((side - size) / 2) for side in image.shape[1:])
    return image[:, top : top + size, left : left + size]
