"""Clips to look at: a sheet with some frames of each side by side, and an animation."""

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRAMES = 6  # of a clip on a sheet
COLUMNS = 4  # clips side by side in an animation
SIDE = 128  # pixels of a clip there
LINE = 14  # pixels of a line of its caption
LETTERS = SIDE // 6  # of a line of its caption


def best_three(prediction: dict[str, Any]) -> str:
    """The three best classes of one of ``predict_step``'s predictions, one a line."""
    return "\n".join(f"{name} {probability:.0%}" for name, probability in prediction["top"][:3])


def still_frames(clip: Tensor, count: int = FRAMES) -> Tensor:
    """At most ``count`` frames of a clip (3, T, H, W), evenly from the first to the last: (count, 3, H, W)."""
    places = torch.linspace(0, clip.shape[1] - 1, min(count, clip.shape[1])).round().long()
    return clip[:, places.to(clip.device)].transpose(0, 1)


def clips_figure(clips: list[Tensor], captions: list[str], title: str, marked: list[bool] | None = None) -> "Figure":
    """A sheet with a row for each clip: its caption, and some of its frames in the order of time.

    Args:
        clips: Each (3, T, H, W) in [0, 1].
        captions: As many texts; line breaks are kept.
        title: Heading of the sheet.
        marked: Which captions to print in red; none by default.
    """
    from matplotlib.figure import Figure

    rows = max(1, len(clips))
    figure = Figure(figsize=(1.3 * FRAMES + 2.6, 1.3 * rows + 0.5), layout="constrained")
    figure.suptitle(title if clips else f"{title}: none", fontsize=11)
    for row, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
        axes = figure.add_subplot(rows, 1, row + 1)
        axes.axis("off")
        frames = still_frames(clip.detach().float().cpu().clamp(0, 1))  # (F, 3, H, W)
        strip = F.pad(frames, (0, max(1, frames.shape[-1] // 24)), value=1.0).permute(2, 0, 3, 1).flatten(1, 2)
        axes.imshow(strip.numpy())
        color = "crimson" if marked and marked[row] else "black"
        axes.text(-0.02, 0.5, caption.replace("$", r"\$"), transform=axes.transAxes, ha="right", va="center",
                  fontsize=8, color=color)  # fmt: skip
    return figure


def clips_gif(clips: list[Tensor], captions: list[str], milliseconds: int = 120) -> bytes:
    """An animation of clips side by side that goes round, as a GIF file's content.

    Args:
        clips: At least one, each (3, T, H, W) in [0, 1], all of one T.
        captions: As many texts; line breaks are kept, and what is longer than a clip is wide is cut.
        milliseconds: Of a frame.
    """
    tiles = [_tile(clip, caption) for clip, caption in zip(clips, captions, strict=True)]  # (T, height, width, 3) each
    height = max(tile.shape[1] for tile in tiles)
    tiles = [np.pad(t, ((0, 0), (0, height - t.shape[1]), (0, 0), (0, 0)), constant_values=255) for t in tiles]
    columns = min(COLUMNS, len(tiles))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[k : k + columns], axis=2) for k in range(0, len(tiles), columns)]
    frames = [Image.fromarray(frame) for frame in np.concatenate(rows, axis=1)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    return buffer.getvalue()


def _tile(clip: Tensor, caption: str) -> np.ndarray:
    """A clip with its caption below: uint8 (T, height, width, 3)."""
    scaled = F.interpolate(clip.detach().float().cpu().clamp(0, 1).transpose(0, 1), (SIDE, SIDE), mode="nearest")
    frames = (scaled * 255).round().byte().permute(0, 2, 3, 1).numpy()  # (T, SIDE, SIDE, 3)
    lines = caption.split("\n")
    label = Image.new("RGB", (SIDE, LINE * len(lines) + 6), "white")
    for k, line in enumerate(lines):
        ImageDraw.Draw(label).text((3, LINE * k + 1), line[:LETTERS], fill="black", font=ImageFont.load_default())
    below = np.broadcast_to(np.asarray(label), (len(frames), label.height, SIDE, 3))
    tiled = np.concatenate([frames, below], axis=1)
    return np.pad(tiled, ((0, 0), (3, 3), (3, 3), (0, 0)), constant_values=255)
