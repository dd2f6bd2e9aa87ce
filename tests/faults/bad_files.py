"""Pictures that people have: damaged ones, unusual ones, and what is no picture at all."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

ORIENTATION = 0x0112


def pixels(height: int = 24, width: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def good() -> dict[str, bytes]:
    """Unusual pictures of 32 x 24 pixels that are to be read, by name."""
    image = Image.fromarray(pixels())
    grey = np.linspace(0, 65535, 24 * 32).reshape(24, 32).astype(np.uint16)
    found = {
        "cmyk.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "grey.jpg": encoded(image.convert("L"), "JPEG"),
        "progressive.jpg": encoded(image, "JPEG", progressive=True),
        "sixteen.png": encoded(Image.fromarray(grey), "PNG"),
        "rgba.png": encoded(image.convert("RGBA"), "PNG"),
        "palette.png": encoded(image.convert("P"), "PNG"),
        "bilevel.png": encoded(image.convert("1"), "PNG"),
        "animation.gif": encoded(image, "GIF", save_all=True, append_images=[image.rotate(90)] * 2),
    }
    for orientation in range(1, 9):
        stored = image.transpose(Image.Transpose.ROTATE_90) if orientation > 4 else image
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        found[f"exif{orientation}.jpg"] = encoded(stored, "JPEG", exif=exif)
    return found


def bad() -> dict[str, bytes]:
    """What is no picture, or not a whole one, by name."""
    jpeg, png = (encoded(Image.fromarray(pixels()), form) for form in ("JPEG", "PNG"))
    huge = b"IHDR" + struct.pack(">IIBBBBB", 200_000, 200_000, 8, 2, 0, 0, 0)
    return {
        "empty.jpg": b"",
        "page.jpg": b"<!DOCTYPE html><html><body>404 not found</body></html>",
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "head.jpg": jpeg[:20],
        "cut.png": png[: len(png) // 2],
        "zeros.png": bytes(500),
        "huge.png": png[:8] + struct.pack(">I", 13) + huge + struct.pack(">I", zlib.crc32(huge)) + png[33:],
        "huge.jpg": jpeg.replace(struct.pack(">HH", 24, 32), struct.pack(">HH", 65500, 65500)),
        "text.png": b"photograph",
    }


def write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
