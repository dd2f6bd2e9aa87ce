"""Pictures of what a generator makes: tiles on one sheet, and an animation of them over training."""

import io
from typing import TYPE_CHECKING

import numpy as np
import torch
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor

from zoo.running.pictures import log_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRAMES = 100  # of an animation at most; of longer ones some are left out evenly
MILLISECONDS = 200  # a frame
SIDE = 320  # pixels, about: small pictures are enlarged to be looked at


def tiles(images: Tensor, columns: int) -> np.ndarray:
    """Pictures side by side, row by row, a pixel apart.

    Args:
        images: (N, C, H, W) in [0, 1] with one or three channels.
        columns: Pictures of a row.

    Returns:
        uint8 (height, width, 3).
    """
    from torchvision.utils import make_grid

    sheet = make_grid(images.detach().float().cpu().clamp(0, 1), nrow=columns, padding=1, pad_value=0.5)
    return (sheet.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def tiles_figure(images: Tensor, columns: int, title: str, rows: list[str] | None = None) -> "Figure":
    """Pictures as :func:`tiles` has them, under a heading.

    Args:
        images: (N, C, H, W) in [0, 1]; N may be 0.
        columns: Pictures of a row.
        title: Heading of the sheet.
        rows: What to write before each row.
    """
    from matplotlib.figure import Figure

    sheet = tiles(images if len(images) else torch.zeros(1, 1, 8, 8), columns)
    height, width = sheet.shape[:2]
    inches = max(4.0, min(9.0, width / 40))
    figure = Figure(figsize=(inches, inches * height / width + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.add_subplot()
    axes.imshow(sheet, interpolation="nearest")
    axes.set_xticks([])
    count = len(rows or [])
    places = [(row + 0.5) * (height / count) for row in range(count)]
    axes.set_yticks(places, rows or [], fontsize=8)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure


@rank_zero_only
def log_animation(module: LightningModule, name: str, frames: list[np.ndarray]) -> None:
    """Write ``<log_dir>/pictures/<name>.gif``, over the one that is there.

    Args:
        module: The module that is being run by a Trainer.
        name: As a metric's name, ``stage/what``.
        frames: uint8 (height, width, 3), all of one size.
    """
    trainer = module.trainer
    if trainer.fast_dev_run or trainer.sanity_checking or not frames:  # type: ignore[attr-defined]
        return
    log_file(module, name, ".gif", to_gif(frames))


def kept(count: int) -> range:
    """Of so many frames those that are kept for an animation: every 1st, 2nd, 4th, …, at most 100 of them.

    What is kept of more frames was kept of fewer, so that they can be left out as they come.
    """
    every = 1
    while count > FRAMES * every:
        every *= 2
    return range(0, count, every)


def to_gif(frames: list[np.ndarray]) -> bytes:
    """An animation that goes round and stays a second at its end, as a GIF file; see :func:`log_animation`."""
    enlarged = max(1, SIDE // max(frames[0].shape[:2]))
    chosen = [frames[k] for k in np.linspace(0, len(frames) - 1, min(len(frames), FRAMES)).round().astype(int)]
    shown = [Image.fromarray(frame.repeat(enlarged, 0).repeat(enlarged, 1)) for frame in chosen]
    durations = [MILLISECONDS] * (len(shown) - 1) + [1000]
    file = io.BytesIO()
    shown[0].save(file, "GIF", save_all=True, append_images=shown[1:], duration=durations, loop=0)
    return file.getvalue()
