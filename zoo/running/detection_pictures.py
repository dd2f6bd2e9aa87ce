"""What a detector found, drawn beside what there is; and its curves of precision over recall."""

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Colour = tuple[float, float, float]

# A person's 17 keypoints in COCO's order: ankles to knees to hips, hips and shoulders, arms, face.
PERSON_SKELETON = [[15, 13], [13, 11], [16, 14], [14, 12], [11, 12], [5, 11], [6, 12], [5, 6], [5, 7], [7, 9], [6, 8],
                   [8, 10], [0, 1], [0, 2], [1, 3], [2, 4], [3, 5], [4, 6]]  # fmt: skip
LABELLED = 20  # objects in one picture that have their names written to them
WIDTH = 3.1  # of a picture, in inches of 100 pixels


def detections_figure(
    images: list[Tensor],
    predictions: list[dict[str, Any]],
    truths: list[dict[str, Any]] | None,
    class_names: list[str],
    threshold: float = 0.5,
    names: list[str] | None = None,
    skeleton: list[list[int]] | None = None,
) -> "Figure":
    """A sheet of pictures with what was found on them, and beside each the same picture with the true objects.

    A class has one colour; where there is only one class, or where objects have keypoints, each object has its own.
    The names of the classes are written to the 20 objects of the best scores, and below the sheet. Crowds are dashed;
    true keypoints that are there but hidden (visibility 1) are hollow.

    Args:
        images: N of (3, H, W) in [0, 1], each of its own size.
        predictions: A dict of tensors for each: ``boxes`` (R, 4) as (x1, y1, x2, y2) in pixels, ``labels`` (R,) in 1…C,
            ``scores`` (R,), and where there are ``masks`` (R, 1, H, W) or (R, H, W), drawn where above 0.5, and
            ``keypoints`` (R, K, 3) as (x, y, visibility).
        truths: The same without scores, and with ``iscrowd`` (R,) if there is one; None draws the predictions alone.
        class_names: C names in the order of the labels 1…C.
        threshold: Only detections with such a score or a better one are drawn.
        names: N captions, written above what was found; none by default.
        skeleton: Pairs of keypoints that a line joins, counted from 0; None: a person's where there are 17.
    """
    from matplotlib.figure import Figure

    kept = [_select(found, found["scores"] >= threshold) for found in predictions]
    each = 1 if truths is None else 2
    columns = min(4, each * max(1, len(images)))
    colours = _class_colours([*kept, *(truths or [])], len(class_names))
    # A row is as high as its tallest picture, up to twice the width.
    shapes = [min(image.shape[1] / image.shape[2], 2.0) for image in images for _ in range(each)] or [0.1]
    title = 0.3 if names is None else 0.45
    heights = [WIDTH * max(shapes[i : i + columns]) + title for i in range(0, len(shapes), columns)]
    figure = Figure(figsize=(WIDTH * columns, sum(heights) + 0.4), layout="constrained")
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    if not images:
        figure.suptitle("detections: none", fontsize=11)
    for i, (image, found) in enumerate(zip(images, kept, strict=True)):
        heading = f"found: {len(found['labels'])}"
        if left := len(predictions[i]["labels"]) - len(found["labels"]):
            heading += f" (and {left} below {threshold:.0%})"
        heading = heading if names is None else f"{names[i]}\n{heading}"
        _draw(
            figure.add_subplot(grid[divmod(each * i, columns)]), image, found, class_names, colours, heading, skeleton
        )
        if truths is not None:
            heading = f"true: {len(truths[i]['labels'])}"
            axes = figure.add_subplot(grid[divmod(each * i + 1, columns)])
            _draw(axes, image, truths[i], class_names, colours, heading, skeleton)
    if len(class_names) > 1 and colours and not any("keypoints" in found for found in kept):
        _name_colours(figure, colours, class_names)
    return figure


def precision_recall_figure(curves: Tensor, class_names: list[str]) -> "Figure":
    """Precision over recall, a line for each class and their mean; the area under each is in the legend.

    Beyond ten classes the three best and the three worst are named, the others grey.

    Args:
        curves: Precision (C, R) at R recalls evenly from 0 to 1; NaN where a class has no object.
        class_names: C names in the order of the rows.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot(xlim=(0, 1.005), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.grid(color="0.9", linewidth=0.6)
    values = curves.detach().cpu().double().numpy()
    known = [k for k in range(len(values)) if not np.isnan(values[k]).any()]
    recall = np.linspace(0, 1, values.shape[1])
    ranked = sorted(known, key=lambda k: -values[k].mean())
    named = ranked if len(ranked) <= 10 else [*ranked[:3], *ranked[-3:]]
    for k in known:
        if k not in named:
            axes.plot(recall, _until_zero(values[k]), color="0.8", linewidth=0.7)
    for place, k in enumerate(named):
        label = f"{class_names[k]}  {values[k].mean():.2f}"
        axes.plot(
            recall,
            _until_zero(values[k]),
            color=_colour(k if len(values) <= 10 else place, 10),
            linewidth=1.5,
            label=label,
        )
    if len(known) > 1:
        mean = values[known].mean(0)
        axes.plot(recall, mean, color="black", linewidth=2.2, label=f"mean of {len(known)}  {mean.mean():.2f}")
    if known:
        legend = axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a name may have dollar signs
    axes.set_title("precision over recall" if known else "precision over recall: no true object", fontsize=11)
    return figure


def _draw(
    axes: "Axes",
    image: Tensor,
    objects: dict[str, Any],
    class_names: list[str],
    class_colours: dict[int, Colour],
    heading: str,
    skeleton: list[list[int]] | None,
) -> None:
    """An image and its objects."""
    height, width = image.shape[1:]
    picture = image.detach().float().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
    axes.imshow(picture if picture.shape[2] == 3 else picture[..., 0], cmap="gray", vmin=0, vmax=1)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[])
    axes.set_title(heading, fontsize=8, parse_math=False)
    labels = objects["labels"].tolist()
    own = len(class_names) == 1 or "keypoints" in objects  # to tell one from another
    colours = [_colour(i, 10) if own else class_colours[k] for i, k in enumerate(labels)]
    if "masks" in objects and labels:
        axes.imshow(_overlay(objects["masks"].detach().cpu().reshape(-1, height, width), colours))
    boxes = objects["boxes"].detach().float().cpu()
    scores = objects["scores"].detach().float().cpu() if "scores" in objects else None
    # The last is on top: the best, or of the true ones the smallest.
    order = (scores if scores is not None else -(boxes[:, 2:] - boxes[:, :2]).prod(1)).argsort().tolist()
    for i in order:
        crowd = "iscrowd" in objects and bool(objects["iscrowd"][i])
        _rectangle(axes, boxes[i].tolist(), colours[i], crowd, len(labels))
        if "keypoints" in objects:
            points = objects["keypoints"][i].detach().float().cpu().numpy()
            _skeleton(axes, points, colours[i], points[:, 2] < (2 if scores is None else 1), skeleton)
    for i in order[-LABELLED:]:
        name = class_names[labels[i] - 1] if len(class_names) > 1 else ""
        text = f"{name} {scores[i]:.0%}".strip() if scores is not None else name
        if text:
            _label(axes, boxes[i].tolist(), text, colours[i], width, height)


def _rectangle(axes: "Axes", box: list[float], colour: Colour, dashed: bool, count: int) -> None:
    from matplotlib.patches import Rectangle

    x1, y1, x2, y2 = box
    line = 1.4 if count <= LABELLED else 0.9
    style = "--" if dashed else "-"
    corner = (x1 - 0.5, y1 - 0.5)  # a picture's first pixel is around 0
    patch = Rectangle(corner, x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=line, linestyle=style)
    axes.add_patch(patch).set_in_layout(False)


def _label(axes: "Axes", box: list[float], text: str, colour: Colour, width: int, height: int) -> None:
    """A name above a box, or in it where there is no room above; at its right end near the picture's right border."""
    dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 0.55
    frame = {"facecolor": colour, "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
    right, above = box[0] > 0.75 * width, box[1] > 0.05 * height
    x = min(box[2], width - 1) if right else max(box[0], 0)
    axes.text(x, max(box[1], 0), text, fontsize=6, color="white" if dark else "black", bbox=frame, clip_on=True,
              ha="right" if right else "left", va="bottom" if above else "top",
              parse_math=False).set_in_layout(False)  # fmt: skip


def _skeleton(
    axes: "Axes", points: np.ndarray, colour: Colour, hidden: np.ndarray, lines: list[list[int]] | None
) -> None:
    """The limbs between points (K, 3), and the points, hollow where hidden (K,)."""
    there = points[:, 2] > 0
    if lines is None:
        lines = PERSON_SKELETON if len(points) == 17 else []
    for start, end in lines:
        if there[start] and there[end]:
            axes.plot(*points[[start, end], :2].T, color=colour, linewidth=1.2)
    for where, face in ((there & ~hidden, colour), (there & hidden, "white")):
        axes.scatter(
            points[where, 0], points[where, 1], s=9, facecolors=face, edgecolors=[colour], linewidths=0.8, zorder=3
        )


def _overlay(masks: Tensor, colours: list[Colour]) -> np.ndarray:
    """Masks (R, H, W) as one translucent picture (H, W, 4): their areas lightly, their outlines fully."""
    layer = np.zeros((*masks.shape[1:], 4))
    for mask, colour in zip(masks, colours, strict=True):
        inside = (mask > 0.5).float()
        # An outline is where a pixel beside it lies outside; the border of the picture counts as inside.
        outline = (F.max_pool2d(1 - inside[None, None], 3, stride=1, padding=1)[0, 0] > 0) & (inside > 0)
        layer[inside.bool().numpy()] = (*colour, 0.4)
        layer[outline.numpy()] = (*colour, 0.9)
    return layer


def _select(objects: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    return {key: value[rows] if isinstance(value, Tensor) and value.ndim else value for key, value in objects.items()}


def _until_zero(precision: np.ndarray) -> np.ndarray:
    """The curve down to its first zero, where nothing more was found."""
    zeros = np.flatnonzero(precision == 0)
    return np.where(np.arange(len(precision)) > zeros[0], np.nan, precision) if len(zeros) else precision


def _class_colours(sheet: list[dict[str, Any]], num_classes: int) -> dict[int, Colour]:
    """The colour of each label on the sheet: always the same of up to ten classes, else in the order of the labels."""
    labels = sorted({label for objects in sheet for label in objects["labels"].tolist()})
    if num_classes <= 10:
        return {label: _colour(label - 1, num_classes) for label in labels}
    return {label: _colour(place, len(labels)) for place, label in enumerate(labels)}


def _colour(place: int, count: int) -> Colour:
    """One of ``count`` colours that differ, as (red, green, blue) in [0, 1]."""
    from matplotlib import colormaps
    from matplotlib.colors import hsv_to_rgb

    if count <= 10:
        red, green, blue, _ = colormaps["tab10"](place % 10)
    else:
        red, green, blue = hsv_to_rgb((place * 0.618 % 1, (0.9, 0.55)[place % 2], (1.0, 0.8, 0.95)[place % 3]))
    return float(red), float(green), float(blue)


def _name_colours(figure: "Figure", colours: dict[int, Colour], class_names: list[str]) -> None:
    """The colours of up to 24 classes below the sheet."""
    from matplotlib.patches import Patch

    patches = [Patch(color=colour, label=class_names[k - 1]) for k, colour in list(colours.items())[:24]]
    columns = min(8, max(2, round(figure.get_figwidth() / 1.5)))
    legend = figure.legend(handles=patches, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
