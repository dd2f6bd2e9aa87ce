"""What was found, as sheets of pictures and as one HTML page that needs nothing beside it."""

import base64
import html
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL, GAP, LINE, HEADING = 2.2, 0.1, 0.16, 0.35  # of a sheet, in inches of 100 pixels


@dataclass(frozen=True)
class Sheet:
    """Pictures of one method, with what is to be said of them.

    Attributes:
        title: What they are.
        note: Settings, norms and losses.
        images: (H, W) or (C, H, W) in [0, 1] each; sizes may differ.
        captions: One for each.
        columns: Of the sheet.
    """

    title: str
    note: str
    images: list[Tensor]
    captions: list[str]
    columns: int

    def figure(self) -> "Figure":
        """The sheet."""
        from matplotlib.figure import Figure

        # One pair of axes in inches: one for each picture takes seconds to lay out and to draw.
        starts = range(0, len(self.images), self.columns)
        heights = [CELL * max(_tallness(image) for image in self.images[k : k + self.columns]) for k in starts]
        above = [LINE * max(_lines(text) for text in self.captions[k : k + self.columns]) + GAP for k in starts]
        left = max(0.0, (5.0 - (CELL + GAP) * self.columns - GAP) / 2) + GAP
        width = 2 * left + (CELL + GAP) * self.columns - GAP
        height = HEADING + sum(heights) + sum(above) + GAP
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.text(width / 2, HEADING / 2, self.title, fontsize=11, ha="center", va="center")
        for place, (image, caption) in enumerate(zip(self.images, self.captions, strict=True)):
            row, column = divmod(place, self.columns)
            top = HEADING + sum(heights[:row]) + sum(above[: row + 1])
            wide = min(CELL, CELL * 2 * image.shape[-1] / image.shape[-2])
            start = left + (CELL + GAP) * column + (CELL - wide) / 2
            extent = (start, start + wide, top + CELL * _tallness(image), top)
            shown = rgb(image).permute(1, 2, 0).numpy()
            axes.imshow(shown, extent=extent, interpolation="nearest" if image.shape[-1] < 32 else None)
            text = caption.replace("$", r"\$")  # no formula
            axes.text(start + wide / 2, top - 0.04, text, fontsize=8, ha="center", va="bottom")
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.axis("off")
        return figure


def _tallness(image: Tensor) -> float:
    """Height of a picture over its width, two at most."""
    return min(2.0, image.shape[-2] / image.shape[-1])


def _lines(text: str) -> int:
    return text.count("\n") + 1 if text else 0


@dataclass(frozen=True)
class Bars:
    """Numbers of one method as bars.

    Attributes:
        title: What they are.
        note: Settings.
        values: (N, D).
        captions: One for each of the N.
    """

    title: str
    note: str
    values: Tensor
    captions: list[str]

    def figure(self) -> "Figure":
        """A row of bars for each of the N, all on one scale."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(max(5.0, 2.5 + 0.35 * self.values.shape[1]), 0.5 + 1.3 * len(self.values)),
                        layout="constrained")  # fmt: skip
        figure.suptitle(self.title, fontsize=11)
        for place, (row, caption) in enumerate(zip(self.values.tolist(), self.captions, strict=True), 1):
            axes = figure.add_subplot(len(self.values), 1, place, ylim=(0, 1.05 * max(float(self.values.max()), 1e-12)))
            axes.bar(range(len(row)), row, color="tab:orange")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_ylabel(caption.replace("$", r"\$"), fontsize=8, rotation=0, ha="right", va="center")
            axes.tick_params(labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
        return figure


def rgb(image: Tensor) -> Tensor:
    """(H, W), (1, H, W) or (3, H, W) to (3, H, W) in [0, 1], on the CPU."""
    plain = image.detach().float().cpu().clamp(0, 1)
    plain = plain[None] if plain.ndim == 2 else plain
    return plain.expand(3, -1, -1) if plain.shape[0] == 1 else plain[:3]


def coloured(values: Tensor) -> Tensor:
    """A map (H, W) in colours from black to yellow (3, H, W); its largest hundredth is brightest."""
    from matplotlib import colormaps

    scale = values.flatten().quantile(0.99)
    scale = scale if scale > 0 else values.max().clamp_min(1e-12)
    shown = colormaps["inferno"]((values / scale).clamp(0, 1).cpu().numpy())[..., :3]
    return torch.from_numpy(shown).float().permute(2, 0, 1)


def over(image: Tensor, values: Tensor) -> Tensor:
    """A map (H, W) in colours over its picture (C, H, W) in grey."""
    return (0.4 * rgb(image).mean(0) + 0.6 * coloured(values)).clamp(0, 1)


def framed(image: Tensor, boxes: Tensor | None) -> Tensor:
    """Boxes (R, 4) as (x1, y1, x2, y2) in pixels drawn in white, with a dark rim, on a picture (3, H, W)."""
    from torchvision.utils import draw_bounding_boxes

    if boxes is None:
        return image
    width = max(1, round(max(image.shape[1:]) / 160))
    rimmed = draw_bounding_boxes(image, boxes, colors="black", width=2 * width)
    return draw_bounding_boxes(rimmed, boxes, colors="white", width=width)


def signed(change: Tensor) -> Tensor:
    """(C, H, W) with sign around grey; its largest two hundredths are cut off."""
    scale = change.abs().flatten()[:: max(1, change.numel() // 100_000)].quantile(0.99).clamp_min(1e-12)
    return (0.5 + change / scale / 2).clamp(0, 1)


def scattered(images: Tensor, plane: Tensor, side: int = 640, thumbnail: int = 64) -> Tensor:
    """Pictures (N, C, H, W) laid out at their places in the plane (N, 2): (3, side, side)."""
    canvas = torch.ones(3, side, side)
    low, high = plane.amin(0), plane.amax(0)
    places = ((plane - low) / (high - low).clamp_min(1e-12) * (side - thumbnail)).round().int().tolist()
    small = F.interpolate(images.float().cpu(), (thumbnail, thumbnail), mode="bilinear", antialias=True)
    for (x, y), picture in zip(places, small, strict=True):
        top = side - thumbnail - y  # upwards, as in a plot
        canvas[:, top : top + thumbnail, x : x + thumbnail] = rgb(picture)
    return canvas


def write_page(path: Path, title: str, sheets: list[tuple[Sheet | Bars, bytes]], left_out: dict[str, str]) -> None:
    """Write the page, complete or not at all.

    Args:
        path: The page.
        title: Its heading.
        sheets: Each with its picture as a PNG file's content.
        left_out: Methods that do not apply, with the reason.
    """
    from zoo.running.checkpoint import replacing

    sections = "\n".join(_section(sheet, png) for sheet, png in sheets)
    reasons = "".join(f"<li>{html.escape(method)}: {html.escape(why)}</li>" for method, why in left_out.items())
    without = f"<h2>Left out</h2><ul>{reasons}</ul>" if reasons else ""
    with replacing(path) as partial:
        partial.write_text(PAGE.format(title=html.escape(title), sections=sections, without=without), encoding="utf-8")


def _section(sheet: Sheet | Bars, png: bytes) -> str:
    title, data = html.escape(sheet.title), base64.b64encode(png).decode()
    return f'<h2>{title}</h2><p>{html.escape(sheet.note)}</p><img alt="{title}" src="data:image/png;base64,{data}">'


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }}
h1 {{ font-size: 1.5rem; }} h2 {{ margin-top: 2.5rem; border-bottom: 1px solid #ddd; }}
img {{ max-width: 100%; height: auto; }}
</style>
</head>
<body>
<h1>{title}</h1>
{sections}
{without}
</body>
</html>
"""
