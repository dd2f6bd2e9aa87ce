"""Pictures from files: upright RGB pixels of whatever format, and the boxes and sizes that classifiers are fed with.

JPEGs are decoded by simplejpeg where it is installed (``pip install 'zoo[jpeg]'``): sooner, and to the same pixels as
Pillow's. Random boxes follow Szegedy et al., 2015, Going deeper with convolutions (section 6), in torchvision's form.
"""

import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

# Of one byte, at most: a block of 64 pixels takes a bit of a JPEG at least. Decoders conceal what is missing.
PIXELS_OF_A_BYTE = 1024
ORIENTATION = 0x0112  # the EXIF tag: 1 is upright, 5 to 8 swap width and height


def read_image(path: str | Path) -> Tensor:
    """Read a picture: RGB, uint8 (3, H, W), turned upright by its EXIF orientation.

    Grey, palette, CMYK and 16-bit pictures become RGB of 8 bits; transparency is dropped; an animation gives its first
    frame. Damage that a decoder conceals (a flipped bit inside a JPEG) is not found.

    Raises:
        ValueError: The file is no picture, or is truncated or corrupt; the message names it.
        OSError: The file cannot be read.
    """
    pixels = Picture(path).pixels()
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).contiguous()


class Picture:
    """An opened picture whose size is known; a JPEG is decoded when its pixels are asked for.

    Args:
        path: Its file.
        upright: Turn it by its EXIF orientation; False leaves the pixels as they are stored.

    Raises:
        ValueError: The file is no picture, or is corrupt; the message names it.
        OSError: The file cannot be read.
    """

    def __init__(self, path: str | Path, upright: bool = True) -> None:
        self.path = path
        self._data = Path(path).read_bytes()
        if not self._data:
            raise ValueError(f"{path} is empty (0 bytes)")
        try:
            self._image = Image.open(io.BytesIO(self._data))
            self.is_jpeg = self._image.format in ("JPEG", "MPO")
            if not self.is_jpeg:
                self._image.load()  # TIFF knows its size and orientation only then
            self._orientation = self._image.getexif().get(ORIENTATION, 1) if upright else 1
        except Exception as error:  # whatever a decoder raises: OSError, SyntaxError, struct.error, …
            raise self._unreadable(error) from error
        width, height = self._image.size
        if self.is_jpeg and width * height > max(2**20, PIXELS_OF_A_BYTE * len(self._data)):
            said = f"it says that it has {width} x {height} pixels, for which its {len(self._data)} bytes are too few"
            raise self._unreadable(ValueError(said))
        self.height, self.width = (width, height) if self._orientation in (5, 6, 7, 8) else (height, width)

    def pixels(self, shrink: int = 1) -> np.ndarray:
        """Its upright pixels, uint8 (H, W, 3), which is a view where it had to be turned.

        Args:
            shrink: 1, 2, 4 or 8: a JPEG of no fewer pixels a side is decoded at that fraction of its size, rounded up.

        Raises:
            ValueError: The picture is truncated or corrupt; the message names its file.
        """
        try:
            pixels = self._decode_jpeg(shrink) if self.is_jpeg else _to_rgb(self._image)
        except Exception as error:
            raise self._unreadable(error) from error
        return _upright(pixels, self._orientation)

    def _decode_jpeg(self, shrink: int) -> np.ndarray:
        width, height = self._image.size
        if simplejpeg is not None and self._image.mode in ("RGB", "L"):
            least = {"min_width": -(-width // shrink), "min_height": -(-height // shrink)}
            try:
                return simplejpeg.decode_jpeg(self._data, "RGB", **least)
            except ValueError:
                pass  # it is stricter than Pillow, which has the last word
        self._image.draft(self._image.mode, (max(1, width // shrink), max(1, height // shrink)))
        return _to_rgb(self._image)

    def _unreadable(self, error: Exception) -> ValueError:
        reason = str(error) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"it begins with {self._data[:16]!r}, which is no known format"
        return ValueError(f"{self.path} cannot be read as a picture: {reason}")


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Pixels of a Pillow picture as uint8 (H, W, 3)."""
    if image.mode.startswith("I"):  # 16 bits, in "I" of 32 with older Pillow: keep the upper eight
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of which it does not say the range")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode != "RGB":  # else it would be copied
        image = image.convert("RGB")
    return np.array(image)  # a copy of what Pillow gives: torch warns of arrays that must not be written to


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn pixels (H, W, 3) by an EXIF orientation; a view."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def random_box(rng: np.random.Generator, height: int, width: int, least_area: float) -> tuple[int, int, int, int]:
    """Draw a box (top, left, height, width) of an area uniform in [least_area, 1] of the picture's.

    Its width is 3/4 to 4/3 of its height, uniform in the logarithm; after ten tries that do not fit it is the largest
    such box in the centre. The same distribution as torchvision's ``RandomResizedCrop``.
    """
    for area, log_ratio in zip(rng.uniform(least_area, 1, 10), rng.uniform(-1, 1, 10), strict=True):
        ratio = (4 / 3) ** log_ratio
        w = round(math.sqrt(height * width * area * ratio))
        h = round(math.sqrt(height * width * area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(pixels: np.ndarray, height: int, width: int) -> Tensor:
    """Resize pixels (H, W, 3) to uint8 (3, height, width): bilinear, antialiased, as Pillow to within a grey level."""
    # In one piece: a tensor cannot be a mirrored view, and a box inside a picture takes PyTorch twice the time.
    pixels = np.ascontiguousarray(pixels)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return F.interpolate(image, (height, width), mode="bilinear", antialias=True)[0]


def resize_short_side(pixels: np.ndarray, size: int) -> Tensor:
    """Resize pixels (H, W, 3) so that the short side is ``size``; torchvision's ``Resize(size)``."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    if max(height, width) > 16 * short:  # a line of pixels would become a picture of gigabytes: keep its middle
        top, left = (max(0, (side - 16 * short) // 2) for side in (height, width))
        return resize_short_side(pixels[top : top + 16 * short, left : left + 16 * short], size)
    return resize(pixels, int(size * height / short), int(size * width / short))


def centre(image: Tensor, size: int) -> Tensor:
    """Cut the middle ``size`` x ``size`` pixels out of an image (3, H, W); torchvision's ``CenterCrop(size)``."""
    top, left = (round((side - size) / 2) for side in image.shape[1:])
    return image[:, top : top + size, left : left + size]
