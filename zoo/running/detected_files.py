"""What a detector finds on pictures of one's own, each at its own size."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.running.detection_pictures import detections_figure
from zoo.running.picture_files import evaluation_of, from_array, printable, read_whole_picture, resized, short_name
from zoo.tasks.detection import DetectionTask
from zoo.weights import describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

SHOWN = 12  # pictures on the sheet
SIDE = 640  # pixels of the longer side of a picture that is kept for the sheet
LETTERS = 40  # of a file's name above its picture
THIN = 50  # times as long as wide: architectures bring such a picture to a width of less than a pixel
SURE = 0.5  # score of what is shown where the user names none


class DetectedFiles:
    """Files with the objects that a model finds on them.

    Where the pictures of the training's evaluation were resized these are too, and what is found is brought back to the
    size of the file. As in an evaluation pictures of several sizes that are looked at together may change each other's
    scores a little, since the smaller ones are padded.

    Args:
        model: A detector in evaluation mode, on its device.
        score_threshold: Least score of an object. None keeps the model's own, and shows objects from 0.5 on.
    """

    batch_size = 4

    def __init__(self, model: DetectionTask, score_threshold: float | None = None) -> None:
        self.model = model if score_threshold is None else _with_threshold(model, score_threshold)
        self.shown_from = SURE if score_threshold is None else score_threshold
        self._images: list[Tensor] = []
        self._found: list[dict[str, Tensor]] = []
        self._names: list[str] = []

    def read(self, path: Path) -> Tensor:
        """One picture (3, H, W) at its own size.

        Raises:
            Exception: Pillow cannot read the file, or the picture is too thin.
        """
        picture = read_whole_picture(path)
        _, height, width = picture.shape
        if max(height, width) > THIN * min(height, width):
            raise ValueError(f"{width} x {height} pixels are too thin to look for objects")
        return picture

    def predict(self, paths: list[Path], images: list[Tensor]) -> list[dict[str, Any]]:
        """A row for each picture: ``file`` and ``objects``, best first."""
        with torch.inference_mode():
            detections = self._detect(images)
        for path, image, found in zip(paths, images, detections, strict=True):
            if len(self._images) < SHOWN:
                image, found = _smaller(image, _from(found, self.shown_from))
                self._images.append(image)
                self._found.append(found)
                self._names.append(short_name(path, LETTERS))
        return [
            {"file": str(path), "objects": self.model.objects(found)}
            for path, found in zip(paths, detections, strict=True)
        ]

    def _detect(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """What is found on pictures of the evaluation's size, in the pixels of the pictures as they are."""
        size = evaluation_of(self.model).get("size")
        seen = [as_evaluated(image, size) for image in images]
        detections = self.model.detect([image.to(self.model.device) for image in seen])
        return [
            _scaled(found, (small.shape[1], small.shape[2]), (image.shape[1], image.shape[2]))
            for found, small, image in zip(detections, seen, images, strict=True)
        ]

    def sheet(self) -> "Figure":
        """The first pictures with what was found on them."""
        return detections_figure(
            self._images, self._found, None, self.model.class_names, self.shown_from, names=self._names
        )

    def table(self, rows: list[dict[str, Any]]) -> "Table":
        """Of each picture how many objects of which classes were found."""
        from rich.table import Table
        from rich.text import Text

        title = f"objects from a score of {self.shown_from:.0%} on" if self.shown_from else "objects"
        table = Table("picture", title, box=None, header_style="bold", padding=(0, 1))
        for row in rows:
            table.add_row(Text(printable(row["file"])), Text(_in_words(row["objects"], self.shown_from)))
        return table


def _with_threshold(model: DetectionTask, score_threshold: float) -> DetectionTask:
    """The same detector, which gives objects of other scores: each architecture has its own place for that number."""
    arguments = describe(model)["arguments"] | {"score_threshold": score_threshold}
    other = type(model)(**arguments)
    other.load_state_dict(model.state_dict())
    return other.to(model.device).eval()


def _from(found: dict[str, Tensor], score: float) -> dict[str, Tensor]:
    return {key: value[found["scores"] >= score].cpu() for key, value in found.items()}


def _smaller(image: Tensor, found: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """A picture of at most 640 pixels a side and what is on it: twelve of a camera's, with masks, would fill memory."""
    height, width = image.shape[1:]
    factor = min(1.0, SIDE / max(height, width))
    size = max(1, round(height * factor)), max(1, round(width * factor))
    smaller = dict(_scaled(found, (height, width), size))
    if "masks" in smaller:
        smaller["masks"] = smaller["masks"] > 0.5  # a quarter of the memory
    return _resized(image[None], size)[0], smaller


def as_evaluated(image: Tensor, size: list[int] | int | None) -> Tensor:
    """A picture, float32 (3, H, W) of whole grey levels, at an evaluation's size: of its longer side, or both."""
    if size is None:
        return image
    height, width = image.shape[1:]
    if isinstance(size, int):
        factor = size / max(height, width)
        size = [max(1, round(height * factor)), max(1, round(width * factor))]
    if size == [height, width]:
        return image
    pixels = from_array((image * 255).round().byte().permute(1, 2, 0).numpy())
    return resized(pixels, *size).float().div_(255)


def _scaled(found: dict[str, Tensor], old: tuple[int, int], new: tuple[int, int]) -> dict[str, Tensor]:
    """What was found on a picture for the same picture at another size, both (height, width)."""
    if old == new:
        return found
    scale = found["boxes"].new_tensor([new[1] / old[1], new[0] / old[0]])
    scaled = found | {"boxes": found["boxes"] * scale.repeat(2)}
    if "masks" in found:
        scaled["masks"] = _resized(found["masks"].float(), new)
    if "keypoints" in found:
        scaled["keypoints"] = found["keypoints"] * torch.cat([scale, scale.new_ones(1)])
    return scaled


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, H, W) at another size; N may be 0."""
    if not len(images):
        return images.new_zeros(*images.shape[:2], *size)
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def _in_words(objects: list[dict[str, Any]], threshold: float) -> str:
    """``3 × dog (best 93%), person (88%)``: the classes in the order of their best scores."""
    scores: dict[str, list[float]] = {}
    for each in objects:
        if each["score"] >= threshold:
            scores.setdefault(each["class_name"], []).append(each["score"])
    if scores:
        return ", ".join(
            f"{len(mine)} × {name} (best {mine[0]:.0%})" if len(mine) > 1 else f"{name} ({mine[0]:.0%})"
            for name, mine in scores.items()
        )
    if not objects:
        return "nothing found"
    best = objects[0]
    return f"nothing so sure; the best of {len(objects)} below: {best['class_name']} ({best['score']:.0%})"
