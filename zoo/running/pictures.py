"""One way to draw and one way to log a picture, whatever loggers are on."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from lightning import LightningModule
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor

from zoo.running.checkpoint import replacing
from zoo.running.tolerance import tolerating

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@rank_zero_only
def log_picture(module: LightningModule, name: str, figure: "Figure") -> None:
    """Hand a figure to every logger that shows pictures, and write ``<log_dir>/pictures/<name>.png``.

    Args:
        module: The module that is being run by a Trainer.
        name: As a metric's name, ``stage/what``.
        figure: What to show.
    """
    trainer = module.trainer
    if trainer.fast_dev_run or trainer.sanity_checking or not trainer.loggers:  # type: ignore[attr-defined]
        return
    png = to_png(figure)
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))  # (H, W, 3)
    for logger in trainer.loggers:
        with tolerating(trainer, f"{type(logger).__name__}'s pictures"):
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, pixels, module.global_step, dataformats="HWC")
            elif isinstance(logger, WandbLogger):
                logger.log_image(name, [pixels], step=module.global_step)
    log_file(module, name, ".png", png)


@rank_zero_only
def log_file(module: LightningModule, name: str, suffix: str, content: bytes) -> None:
    """Write ``<log_dir>/pictures/<name><suffix>``: a picture, an animation, a page; over the one that is there.

    Args:
        module: The module that is being run by a Trainer.
        name: As a metric's name, ``stage/what``.
        suffix: ``.gif``, ``.html``, ….
        content: The file's.
    """
    for logger in module.trainer.loggers:
        if isinstance(logger, CSVLogger):
            path = Path(logger.log_dir) / "pictures" / f"{name.replace('/', '_')}{suffix}"
            with tolerating(module.trainer, f"pictures in {path.parent}"), replacing(path) as partial:
                partial.write_bytes(content)


def write_png(figure: "Figure", path: Path) -> None:
    """Write a figure as a PNG file, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_png(figure))


def to_png(figure: "Figure") -> bytes:
    """Draw a figure as large as what is on it, as a PNG file's content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight", pad_inches=0.15)
    return buffer.getvalue()


def contact_sheet(images: Tensor, captions: list[str], title: str = "", marked: list[bool] | None = None) -> "Figure":
    """A sheet of captioned pictures.

    Args:
        images: (N, C, H, W) in [0, 1] with one or three channels; N may be 0.
        captions: N texts; line breaks are kept.
        title: Heading of the sheet.
        marked: Which captions to print in red; none by default.
    """
    from matplotlib.figure import Figure

    count = len(images)
    columns = min(8, max(1, count))
    rows = max(1, -(-count // columns))
    lines = max([caption.count("\n") + 1 for caption in captions], default=1)
    # Five columns' width at least, so that a heading fits over a single picture.
    figure = Figure(figsize=(max(1.45 * columns, 6.0), (1.3 + 0.19 * lines) * rows + 0.5), layout="constrained")
    figure.suptitle(title if count else f"{title}: none", fontsize=11)
    for place in range(rows * columns if count else 0):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.axis("off")
        if place < count:
            picture = images[place].detach().float().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
            grey = picture.shape[2] == 1
            axes.imshow(picture[..., 0] if grey else picture, cmap="gray" if grey else None, vmin=0, vmax=1)
            axes.set_title(captions[place], fontsize=8, color="crimson" if marked and marked[place] else "black")
    return figure


def filters_figure(weights: Tensor, title: str, names: list[str] | None = None) -> "Figure":
    """The first 64 filters of a layer that looks at pictures, each scaled to [0, 1] by its own range.

    Args:
        weights: (K, C, H, W): what each of the K outputs looks for. Where C is neither 1 nor 3, the mean over channels.
        title: Heading of the sheet.
        names: K captions; none by default.
    """
    shown = weights.detach().float()[:64]
    if shown.shape[1] not in (1, 3):
        shown = shown.mean(1, keepdim=True)
    low, high = shown.amin((1, 2, 3), keepdim=True), shown.amax((1, 2, 3), keepdim=True)
    captions = names[:64] if names else [""] * len(shown)
    more = f" (64 of {len(weights)})" if len(weights) > 64 else ""
    return contact_sheet((shown - low) / (high - low).clamp_min(1e-12), captions, f"{title}{more}")


def confusion_matrix_figure(confusion: Tensor, class_names: list[str]) -> "Figure":
    """Rows are the true classes with their accuracy, columns the predicted ones.

    Args:
        confusion: Counts, int64 (K, K).
        class_names: K names. Beyond 30 classes names and counts are left out.
    """
    from matplotlib.figure import Figure

    counts = confusion.cpu().numpy()
    totals = counts.sum(axis=1)
    share = counts / np.maximum(totals, 1)[:, None]
    size = len(class_names)
    small = size <= 30
    side = max(4.5, 0.5 * size) if small else 9.0
    figure = Figure(figsize=(side + 2.2, side + 0.8), layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, label="share of the true class", shrink=0.8)
    if small:
        rows = [
            f"{name}  {share[i, i]:.1%}" if totals[i] else f"{name}  (no samples)" for i, name in enumerate(class_names)
        ]
        axes.set_xticks(range(size), class_names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(size), rows)
        for i, j in np.argwhere(counts > 0):
            axes.text(j, i, str(counts[i, j]), ha="center", va="center", fontsize=7,
                      color="white" if share[i, j] > 0.5 else "black")  # fmt: skip
    axes.set_xlabel("predicted")
    axes.set_ylabel("true, with its accuracy" if small else "true")
    return figure
