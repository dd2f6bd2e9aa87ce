"""Pictures of one's own: any file that Pillow reads, upright, at its own size or at the size that a model wants."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from zoo.recipes import RecipeError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
SMALL = 64  # pixels: up to this size nothing is cut off but what makes the picture square
MARGIN = 256 / 224  # of larger ones, as networks for ImageNet are evaluated


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


def read_whole_picture(path: Path) -> Tensor:
    """One picture, upright, at its own size.

    Transparent parts become white, 16-bit values 8-bit ones; of an animation the first picture is taken.

    Args:
        path: A file that Pillow reads.

    Returns:
        RGB, float32 (3, H, W) in [0, 1].

    Raises:
        Exception: Pillow cannot read the file; its decoders raise what they like.
    """
    return _tensor(_upright(path, 3))


def read_picture(path: Path, channels: int, height: int, width: int) -> Tensor:
    """One picture, upright, at a size: the largest part from its centre, or a little less for larger sizes.

    Up to 64 pixels the shorter side is brought to the size and the longer one cut; above that 224 of each 256 pixels
    of the shorter side are kept, as networks for ImageNet are evaluated. Otherwise as :func:`read_whole_picture`.

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
    picture = _upright(path, channels)
    margin = MARGIN if min(height, width) > SMALL else 1.0
    picture = picture.resize(
        _covering(picture.size, round(width * margin), round(height * margin)), Image.Resampling.BILINEAR
    )
    left, upper = round((picture.width - width) / 2), round((picture.height - height) / 2)
    return _tensor(picture.crop((left, upper, left + width, upper + height)))


def printable(path: Path | str) -> str:
    """A name with bytes that are no text shown as such."""
    return os.fsencode(path).decode("utf-8", "replace")


def short_name(path: Path | str, letters: int = 16) -> str:
    """The file's name, at most so many letters of its beginning and end."""
    name = printable(Path(path).name)
    half = letters // 2
    return name if len(name) <= letters else f"{name[: half - 1]}…{name[len(name) - half :]}"


def _upright(path: Path, channels: int) -> Image.Image:
    with Image.open(path) as file:
        return _plain(ImageOps.exif_transpose(file)).convert("RGB" if channels == 3 else "L")


def _tensor(picture: Image.Image) -> Tensor:
    values = np.asarray(picture, dtype=np.float32) / 255
    return torch.from_numpy(values.reshape(picture.height, picture.width, -1)).permute(2, 0, 1)


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
