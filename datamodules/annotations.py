"""What is on the pictures of a set: read, checked, counted, and kept in arrays.

A reader of a format (COCO's json, VOC's xml) says what it found; what makes no sense is named, or left out and counted.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datamodules.picture_augmentation import Target, new_size
from datamodules.pictures import Picture
from datamodules.reading import KeptPictures, some

SINGULAR = {"boxes": "box", "are": "is", "make": "makes", "occur": "occurs", "their": "its"}
MEND = ". Mend it, or have such entries left out by --data.init_args.corrupt skip"


def counted(number: int, things: str) -> str:
    """A number of things, of which the first word is a plural: "2 boxes that are empty", "1 box that is empty"."""
    if number != 1:
        return f"{number:,} {things}"
    noun, *rest = (SINGULAR.get(word, word) for word in things.split(" "))
    return " ".join(["1", noun.removesuffix("s"), *rest])


class Findings:
    """What is wrong with the annotations of a split: what was left out or changed, and why.

    Args:
        skip: Leave out entries that make no sense; else the first one is an error.
    """

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.counts: dict[str, int] = {}
        self.examples: dict[str, list[str]] = {}
        self._refused: set[str] = set()

    def refuse(self, reason: str, message: str) -> None:
        """An entry that makes no sense.

        Raises:
            ValueError: Such entries are not skipped.
        """
        if not self.skip:
            raise ValueError(message + MEND)
        self._refused.add(reason)
        self.note(reason, message)

    def note(self, reason: str, example: str) -> None:
        """One case, which an example makes clear."""
        self.count(reason, 1)
        self.examples.setdefault(reason, []).append(example)

    def count(self, reason: str, number: int) -> None:
        """So many cases."""
        if number:
            self.counts[reason] = self.counts.get(reason, 0) + number

    def lines(self) -> list[str]:
        """A line for each reason, with the first few cases."""
        return [self._line(reason, 3) for reason in self.counts]

    def wrong(self, split: str) -> list[str]:
        """The lines of what would have been refused, and of boxes that are not as they should be."""
        wrong = [reason for reason in self.counts if reason in self._refused or reason.startswith("boxes ")]
        return [f"split {split}: {self._line(reason, 10)}" for reason in wrong]

    def _line(self, reason: str, cases: int) -> str:
        told = self.examples.get(reason, [])
        more = f" and {len(told) - cases:,} more" if cases > 3 and len(told) > cases else ""
        return counted(self.counts[reason], reason) + (f": {'; '.join(told[:cases])}{more}" if told else "")


class FoundObject(NamedTuple):
    """An object as a file has it.

    Attributes:
        name: What a message calls it.
        box: x1, y1, x2, y2 in pixels.
        label: Its class, from 1.
        area: In pixels; None takes the box's.
        crowd: Whether it is to be ignored in evaluation and left out of training.
        mask: Its compressed run lengths, as pycocotools writes them.
        keypoints: 3K numbers: x, y, visibility.
    """

    name: str
    box: tuple[float, float, float, float]
    label: int
    area: float | None = None
    crowd: bool = False
    mask: bytes = b""
    keypoints: list[float] | None = None


class FoundPicture(NamedTuple):
    """A picture as a file has it: its name below the folder of pictures, its number, its size and its objects."""

    name: str
    number: int
    height: int
    width: int
    objects: list[FoundObject]


class Objects(NamedTuple):
    """All objects of a split, in arrays.

    Attributes:
        boxes: float32 (A, 4), as the files have them.
        labels: int64 (A,).
        areas: float32 (A,).
        crowds: bool (A,).
        keypoints: float32 (A, K, 3).
        runs: Compressed run lengths of all masks, uint8 (bytes,).
        run_ends: Where those of an object end, int64 (A + 1,) after a 0.
    """

    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowds: np.ndarray
    keypoints: np.ndarray
    runs: np.ndarray
    run_ends: np.ndarray


class AnnotatedPictures:
    """Pictures and their objects by index.

    All is in arrays: of lists each worker would come to hold a copy of its own
    (https://github.com/pytorch/pytorch/issues/13246).

    Args:
        folder: Folder that the names start from.
        names: Files, bytes (N,).
        numbers: The pictures' ids, int64 (N,).
        sizes: Height and width, int64 (N, 2).
        rows: The first of a picture's objects and the one after its last, int64 (N, 2).
        objects: Those of all pictures.
        kept: The pictures in memory, if they are kept there.
    """

    def __init__(
        self,
        folder: Path,
        names: np.ndarray,
        numbers: np.ndarray,
        sizes: np.ndarray,
        rows: np.ndarray,
        objects: Objects,
        kept: KeptPictures | None = None,
    ) -> None:
        self.folder = folder
        self.names = names
        self.numbers = numbers
        self.sizes = sizes
        self.rows = rows
        self.objects = objects
        self.kept = kept

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """The file of a picture."""
        return self.folder / os.fsdecode(self.names[index])

    def take(self, indices: np.ndarray) -> "AnnotatedPictures":
        """Some of the pictures."""
        kept = None if self.kept is None else KeptPictures(self.kept.pieces, self.kept.places[indices])
        parts = self.names[indices], self.numbers[indices], self.sizes[indices], self.rows[indices]
        return AnnotatedPictures(self.folder, *parts, self.objects, kept)

    def bytes(self, size: tuple[int, ...] | int | None) -> int:
        """How much memory the decoded pictures need."""
        sizes = np.array([new_size(height, width, size) for height, width in self.sizes.tolist()])
        return int(3 * sizes.prod(1).sum()) if len(sizes) else 0

    def fingerprint(self) -> str:
        """What stays the same as long as these are the same files in the same order, wherever the folder is."""
        return hashlib.sha256(b"\0".join(self.names.tolist())).hexdigest()[:16]

    def arrays(self) -> Iterator[np.ndarray]:
        """All that is said of these pictures."""
        chosen = np.concatenate([np.arange(*row) for row in self.rows]) if len(self) else np.zeros(0, dtype=np.int64)
        yield from (self.numbers, self.sizes)
        yield from (array[chosen] for array in self.objects[:5])
        yield from (self.runs(row) for row in chosen)

    def summary(self, class_names: list[str]) -> str:
        """Their number, the number of their objects by class, and how many have none."""
        rows = [self.present(index) for index in range(len(self))]
        chosen = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
        counts = np.bincount(self.objects.labels[chosen], minlength=len(class_names) + 1)[1:]
        few = ", ".join(f"{name} {count:,}" for name, count in zip(class_names, counts, strict=True))
        missing = [name for name, count in zip(class_names, counts, strict=True) if not count]
        classes = few if len(class_names) <= 20 else f"of {len(class_names) - len(missing)} classes"
        text = f"{len(self):,} pictures, {len(chosen):,} objects ({classes})"
        if missing and len(class_names) > 20:
            text += f", none of {some(missing)}"
        crowds = int(self.objects.crowds[chosen].sum())
        empty = sum(len(row) == 0 for row in rows)
        text += f", {crowds:,} of them crowds or to be ignored" if crowds else ""
        return text + (f", {empty:,} pictures without objects" if empty else "")

    def present(self, index: int) -> np.ndarray:
        """Rows of a picture's objects."""
        return np.arange(*self.rows[index])

    def trained(self, index: int) -> np.ndarray:
        """Rows of a picture's objects that are trained on."""
        rows = self.present(index)
        return rows[~self.objects.crowds[rows]]

    def runs(self, row: int) -> np.ndarray:
        """The compressed mask of an object, uint8 (bytes,)."""
        return self.objects.runs[self.objects.run_ends[row] : self.objects.run_ends[row + 1]]

    def pixels(self, index: int) -> np.ndarray:
        """A picture's pixels, uint8 (H, W, 3): those that are kept, or all of its file's."""
        if self.kept is not None:
            return self.kept.pixels(index)
        height, width = self.sizes[index].tolist()
        return annotated_pixels(self.path(index), height, width)

    def target(self, index: int, masks: bool, keypoints: bool, training: bool) -> Target:
        """What is on a picture, in the pixels of its file."""
        rows, objects = self.trained(index) if training else self.present(index), self.objects
        height, width = self.sizes[index].tolist()
        boxes = objects.boxes[rows]
        target = {
            "boxes": torch.from_numpy(boxes.clip(0, [width, height] * 2) if training else boxes).float(),
            "labels": torch.from_numpy(objects.labels[rows]),
            "image_id": torch.tensor(int(self.numbers[index])),
            "area": torch.from_numpy(objects.areas[rows]),
            "iscrowd": torch.from_numpy(objects.crowds[rows].astype(np.int64)),
        }
        if masks:
            target["masks"] = decoded_masks([self.runs(row).tobytes() for row in rows], height, width)
        if keypoints:
            target["keypoints"] = torch.from_numpy(objects.keypoints[rows])
        return target


def collect(folder: Path, pictures: list[FoundPicture], num_keypoints: int, findings: Findings) -> AnnotatedPictures:
    """Put pictures and objects into arrays, without objects that have no area or lie outside of their picture."""
    kept = [[found for found in picture.objects if _on_picture(found, picture, findings)] for picture in pictures]
    everything = [found for objects in kept for found in objects]
    boxes = np.array([found.box for found in everything], dtype=np.float32).reshape(-1, 4)
    box_areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    areas = [box_areas[i] if found.area is None else found.area for i, found in enumerate(everything)]
    points = [found.keypoints or [0.0] * 3 * num_keypoints for found in everything]
    objects = Objects(
        boxes,
        np.array([found.label for found in everything], dtype=np.int64),
        np.array(areas, dtype=np.float32),
        np.array([found.crowd for found in everything], dtype=bool),
        np.array(points, dtype=np.float32).reshape(len(everything), num_keypoints, 3),
        np.frombuffer(b"".join(found.mask for found in everything), dtype=np.uint8),
        np.cumsum([0] + [len(found.mask) for found in everything]),
    )
    ends = np.cumsum([0] + [len(found) for found in kept])
    return AnnotatedPictures(
        folder,
        np.array([os.fsencode(picture.name) for picture in pictures], dtype=np.bytes_),
        np.array([picture.number for picture in pictures], dtype=np.int64),
        np.array([(picture.height, picture.width) for picture in pictures], dtype=np.int64).reshape(-1, 2),
        np.stack([ends[:-1], ends[1:]], axis=1).astype(np.int64),
        objects,
    )


def _on_picture(found: FoundObject, picture: FoundPicture, findings: Findings) -> bool:
    """Whether a box has an area, on the picture, in the precision of its target."""
    x1, y1, x2, y2 = np.array(found.box, dtype=np.float32).tolist()
    name = f"{found.name} of {picture.name}"
    if x2 <= x1 or y2 <= y1:
        findings.note("boxes without area left out", name)
        return False
    if min(x2, picture.width) <= max(x1, 0) or min(y2, picture.height) <= max(y1, 0):
        findings.note("boxes outside of their picture left out", name)
        return False
    if x1 < 0 or y1 < 0 or x2 > picture.width or y2 > picture.height:
        findings.note("boxes beyond the edge of their picture, in training cut there", name)
    return True


def annotated_pixels(path: Path, height: int, width: int) -> np.ndarray:
    """A picture's pixels, uint8 (H, W, 3), laid as its annotations are.

    A picture is turned upright by its EXIF orientation, unless only the pixels as they are stored have the size that
    its annotations say: then whoever made them saw those.

    Raises:
        ValueError: The file cannot be read as a picture, or has another size; the message names it.
        OSError: The file cannot be read.
    """
    picture = Picture(path)
    if (picture.height, picture.width) != (height, width):
        stored = Picture(path, upright=False)
        if (stored.height, stored.width) != (height, width):
            raise ValueError(
                f"{path} has {picture.width} x {picture.height} pixels, its annotations say {width} x {height}: "
                "boxes would be misplaced"
            )
        picture = stored
    return picture.pixels()


def decoded_masks(runs: list[bytes], height: int, width: int) -> Tensor:
    """Masks from compressed run lengths: uint8 (R, height, width) of 0 and 1."""
    if not runs:
        return torch.zeros(0, height, width, dtype=torch.uint8)
    decoded = mask_functions().decode([{"size": [height, width], "counts": run} for run in runs])  # (H, W, R)
    return torch.from_numpy(np.ascontiguousarray(decoded.transpose(2, 0, 1)))


def mask_functions() -> Any:
    """The functions for masks of pycocotools.

    Raises:
        ModuleNotFoundError: It is not installed; the message says how to install it.
    """
    try:
        from pycocotools import mask
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("masks need pycocotools: pip install 'zoo[detection]'") from error
    return mask
