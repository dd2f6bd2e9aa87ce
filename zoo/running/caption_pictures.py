"""Pictures with their captions, and word by word where a network looked for them."""

import textwrap
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 4
LETTERS = 36  # of a line below a picture
REFERENCES = 2  # shown below a caption
WORDS = 20  # of a caption whose attention is shown


def captions_figure(
    images: list[Tensor], captions: list[str], references: list[list[str]] | None, title: str = ""
) -> "Figure":
    """A sheet of pictures, below each its caption, and in grey the first two of its references.

    Args:
        images: N of (3, H, W) in [0, 1].
        captions: A caption for each.
        references: The captions that each is held against, if there are any.
        title: Heading of the sheet.
    """
    from matplotlib.figure import Figure

    columns = min(COLUMNS, max(1, len(images)))
    rows = max(1, -(-len(images) // columns))
    texts = [_below(caption, references[k] if references else []) for k, caption in enumerate(captions)]
    lines = max([own.count("\n") + others.count("\n") + 2 for own, others in texts], default=1)
    figure = Figure(figsize=(max(2.6 * columns, 5.0), (2.5 + 0.15 * lines) * rows + 0.5), layout="constrained")
    heading = title or ("captions; in grey, what they are held against" if references else "captions")
    figure.suptitle(heading if images else f"{heading}: none", fontsize=11)
    for place, (image, (own, others)) in enumerate(zip(images, texts, strict=True), start=1):
        axes = figure.add_subplot(rows, columns, place)
        _show(axes, image)
        axes.set_title(own, fontsize=8.5, y=0, pad=-6, va="top", parse_math=False)
        offset = -12 - 11 * (own.count("\n") + 1)
        axes.annotate(others, (0.5, 0), (0, offset), xycoords="axes fraction", textcoords="offset points",
                      ha="center", va="top", fontsize=7, color="dimgrey", parse_math=False)  # fmt: skip
    return figure


def attention_figure(images: list[Tensor], captions: list[list[str]], attention: list[Tensor]) -> "Figure":
    """Each picture, and for each word of its caption the picture lit where the network looked for it.

    As in EECS 498-007, lecture 13, and Xu et al., 2015, figure 5. The brightest place of each word is its own largest
    weight, which is written to the word as a multiple of an even look at all places.

    Args:
        images: N of (3, H, W) in [0, 1].
        captions: The words of each.
        attention: For each (T, S, S), weights that sum to one; T is at least the number of its words.
    """
    from matplotlib.figure import Figure

    shown = [words[:WORDS] for words in captions]
    columns = min(10, max([len(words) for words in shown], default=0) + 1)
    heights = [-(-(len(words) + 1) // columns) for words in shown]
    figure = Figure(figsize=(max(1.35 * columns, 5.0), 1.62 * sum(heights) + 0.5), layout="constrained")
    figure.suptitle("where it looked for each word" if images else "where it looked: none", fontsize=11)
    grid = figure.add_gridspec(max(1, sum(heights)), columns)
    row = 0
    for image, words, looks, height in zip(images, shown, attention, heights, strict=True):
        axes = figure.add_subplot(grid[row, 0])
        _show(axes, image)
        axes.set_title("the picture", fontsize=8, color="dimgrey")
        for k, (word, look) in enumerate(zip(words, looks, strict=False), start=1):
            axes = figure.add_subplot(grid[row + k // columns, k % columns])
            _show(axes, image, look)
            axes.set_title(f"{word}  ×{float(look.max()) * look.numel():.1f}", fontsize=8, parse_math=False)
        row += height
    return figure


def _below(caption: str, references: list[str]) -> tuple[str, str]:
    """The lines of a caption and those of its references."""
    others = [textwrap.fill(text.strip(), LETTERS + 8) for text in references[:REFERENCES]]
    return textwrap.fill(caption or "(no words)", LETTERS), "\n".join(others)


def _show(axes: "Axes", image: Tensor, look: Tensor | None = None) -> None:
    """A picture, dark where a network did not look."""
    picture = image.detach().float().cpu().clamp(0, 1)
    if look is not None:
        size = picture.shape[1], picture.shape[2]
        light = F.interpolate(look.float()[None, None], size, mode="bicubic", align_corners=False)[0]
        picture = picture * (0.2 + 0.8 * (light / light.amax().clamp_min(1e-12)).clamp(0, 1))
    axes.imshow(np.asarray(picture.permute(1, 2, 0)), vmin=0, vmax=1)
    axes.axis("off")
