"""Folders of generated pictures, written whole or not at all."""

import io
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


@contextmanager
def whole_folder(folder: Path, part: str) -> Iterator[Path]:
    """A new folder to write into, which becomes ``folder`` when it is whole: a run that is killed leaves no part of it.

    It lies beside ``folder``, so that the move is atomic.

    Args:
        folder: Must not be there yet, unless another process was sooner with the same.
        part: A name inside it by which one that another process wrote is known.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".scenes-") as partial:
        whole = Path(partial) / "scenes"
        whole.mkdir()
        yield whole
        try:
            os.rename(whole, folder)
        except OSError:
            if not (folder / part).is_dir():  # else another process was sooner
                raise


def encoded(pixels: np.ndarray, name: str, quality: int, subsampling: int = 2) -> bytes:
    """The file of a picture, uint8 (H, W, 3): PNG or JPEG, as its name ends.

    Args:
        pixels: The picture.
        name: Its name.
        quality: Of a JPEG, up to 95.
        subsampling: Of a JPEG's colours: 0 none, 2 by half.
    """
    file = io.BytesIO()
    if name.endswith("png"):
        Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
    else:
        Image.fromarray(pixels).save(file, format="JPEG", quality=quality, subsampling=subsampling)
    return file.getvalue()


def write_json(path: Path, description: str, version: int, content: dict[str, Any]) -> None:
    """Write a file in COCO's format, ``content`` after what it says of itself."""
    info = {"description": description, "version": str(version)}
    path.write_text(json.dumps({"info": info, "licenses": []} | content))
