"""Scenes of textured shapes on cluttered grounds, written to disk in COCO's format, always alike for a seed.

Every shape has a box and a mask (polygons where it is wholly seen, run lengths where it is covered in part or reaches
out of the picture), stick figures have keypoints, every picture has two captions. Some shapes are small, some pictures
are empty, and in some a heap of circles is one annotation, a crowd.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from datamodules.annotations import AnnotatedPictures, Findings
from datamodules.coco import Category, Files, read_coco
from datamodules.detection import DetectionDataModule, Split
from datamodules.embedded.drawing import COLOURS, KINDS, Placed, Shape, draw_ground, paint, place, polygon
from datamodules.embedded.writing import encoded, whole_folder, write_json

VERSION = 1  # of the pictures; another one makes another folder
PERSON = 9
KEYPOINTS = ["head", "neck", "left_hand", "right_hand", "hip", "left_foot", "right_foot"]
SKELETON = [[1, 2], [2, 3], [2, 4], [2, 5], [5, 6], [5, 7]]  # counted from 1, as in COCO's files
SPLITS = ("train", "val", "test")


class ScenesDataModule(DetectionDataModule):
    """Batches ``(images, targets)`` of generated scenes; see :class:`DetectionDataModule` for what is in them.

    There are five classes: circle, square, triangle, star and person, a stick figure. The set is written once, into a
    folder of ``root`` that its arguments name, and read by what reads any set in COCO's format.

    Args:
        root: Folder in which the set's own is made.
        image_size: Side of the pictures in pixels.
        train_size: Number of training pictures.
        val_size: Number of pictures for validation; 0 trains without it.
        test_size: Number of pictures for testing; 0 tests on those for validation.
        seed: Seed of the scenes, apart from the run's seed so that runs compare.
        masks: Read masks; needs pycocotools, ``pip install 'zoo[detection]'``.
        keypoints: Read keypoints: the only class is then the person.
        batch_size: Pictures of a global training batch: all processes together.
        eval_batch_size: Pictures per process in validation, test and prediction.
        size: Length of the longer side, or ``[height, width]``, to which all pictures are resized, in evaluation too;
            None leaves them as they are.
        flip: Mirror half of the training pictures left to right.
        scale_jitter: Enlarge each training picture by a factor from ``[least, most]``, then cut or pad it to its size.
        iou_crop: Cut random boxes out of training pictures, as SSD does.
        keep_empty: Train on pictures without objects too.
        cache: Keep decoded pictures in memory; None does so where those of a split need no more than 1 GiB.
        workers: Processes that read pictures, for each process that trains; None means one per processor, at most 4.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        root: str = "data",
        image_size: int = 128,
        train_size: int = 400,
        val_size: int = 100,
        test_size: int = 100,
        seed: int = 0,
        masks: bool = False,
        keypoints: bool = False,
        batch_size: int = 8,
        eval_batch_size: int = 8,
        size: list[int] | int | None = None,
        flip: bool = True,
        scale_jitter: list[float] | None = None,
        iou_crop: bool = False,
        keep_empty: bool = True,
        cache: bool | None = None,
        workers: int | None = 0,
    ) -> None:
        super().__init__(
            batch_size,
            eval_batch_size,
            size,
            flip,
            scale_jitter,
            iou_crop,
            masks,
            keypoints,
            val_size,
            test_size,
            0,
            keep_empty,
            "refuse",
            cache,
            workers,
        )
        if image_size < 32 or train_size < 1:
            raise ValueError(f"image_size={image_size} must be at least 32, and train_size={train_size} at least 1")
        self.root = Path(root).expanduser()
        self.image_size = image_size
        self.sizes = {"train": train_size, "val": val_size, "test": test_size}
        self.seed = seed
        self.own_splits = tuple(split for split, count in self.sizes.items() if count)
        self.category_ids = [PERSON] if keypoints else list(KINDS)
        self.class_names = [KINDS[number] for number in self.category_ids]
        self.num_classes = len(self.class_names)
        if keypoints:
            self.keypoint_names = list(KEYPOINTS)
            self.skeleton = [[first - 1, second - 1] for first, second in SKELETON]

    @property
    def folder(self) -> Path:
        """Where this set lies."""
        counts = "-".join(str(count) for count in self.sizes.values())
        return self.root / f"scenes-v{VERSION}-{self.image_size}px-{counts}-seed{self.seed}"

    def prepare_data(self) -> None:
        """Write the set, if it is not there."""
        if not self.folder.is_dir():
            rank_zero_info(f"writing {sum(self.sizes.values())} scenes to {self.folder}")
            write_scenes(self.folder, self.sizes, self.image_size, self.seed)

    def read(self, split: Split, findings: Findings) -> AnnotatedPictures:
        """Read the annotations of a split, as of any set in COCO's format."""
        kind = "person_keypoints" if self.keypoints else "instances"
        files = Files(self.folder / "annotations" / f"{kind}_{split}.json", self.folder / split)
        if not files.annotations.is_file():
            raise FileNotFoundError(f"there is no file {files.annotations}: run prepare_data(), which writes it")
        categories = [Category(number, KINDS[number], [], []) for number in self.category_ids]
        return read_coco(files, categories, self.masks, self.keypoint_names, findings)


# Writing


def write_scenes(folder: Path, sizes: dict[str, int], image_size: int = 128, seed: int = 0) -> None:
    """Write a set: ``train`` and so on with the pictures, and ``annotations`` with COCO's three kinds of json.

    It is written beside ``folder`` and moved there when it is whole: a run that is killed leaves no part of it.

    Args:
        folder: Where to; must not be there yet, unless another process was sooner with the same.
        sizes: Number of pictures of each split, by its name: train, val, test.
        image_size: Side of the pictures in pixels.
        seed: Scenes are the same for the same seed, size and split; fewer are the first of more.
    """
    with whole_folder(folder, "annotations") as whole:
        (whole / "annotations").mkdir()
        for split, count in sizes.items():
            if count:
                _write_split(whole, split, count, image_size, seed)


def _write_split(folder: Path, split: str, count: int, image_size: int, seed: int) -> None:
    (folder / split).mkdir()
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    for i in range(count):
        scene = make_scene(image_size, i, np.random.default_rng([seed, SPLITS.index(split), i]))
        number = 1000 * (SPLITS.index(split) + 1) + 7 * i  # no one should count on ids that count
        name = f"{number:08d}.{'png' if i % 4 == 3 else 'jpg'}"
        (folder / split / name).write_bytes(encoded(scene.pixels, name, 92))
        images.append({"id": number, "file_name": name, "height": image_size, "width": image_size})
        for found in scene.objects:
            objects.append({"id": len(objects) + 1, "image_id": number} | found)
        for text in scene.captions:
            captions.append({"id": len(captions) + 1, "image_id": number, "caption": text})
    people = [found for found in objects if found["category_id"] == PERSON]
    plain = [{key: value for key, value in found.items() if "keypoints" not in key} for found in objects]
    _write_json(folder, f"instances_{split}", images, plain, _categories(list(KINDS)))
    _write_json(folder, f"person_keypoints_{split}", images, people, _categories([PERSON], keypoints=True))
    _write_json(folder, f"captions_{split}", images, captions, None)


def _categories(numbers: list[int], keypoints: bool = False) -> list[dict[str, Any]]:
    points = {"keypoints": KEYPOINTS, "skeleton": SKELETON} if keypoints else {}
    return [
        {"id": n, "name": KINDS[n], "supercategory": "person" if n == PERSON else "shape"} | points for n in numbers
    ]


def _write_json(
    folder: Path,
    name: str,
    images: list[dict[str, Any]],
    annotations: list[dict[str, Any]],
    categories: list[dict[str, Any]] | None,
) -> None:
    content: dict[str, Any] = {"images": images, "annotations": annotations}
    content |= {} if categories is None else {"categories": categories}
    write_json(folder / "annotations" / f"{name}.json", "Generated scenes of shapes", VERSION, content)


# Scenes


class Scene(NamedTuple):
    """A picture, uint8 (H, W, 3); its objects as a json file has them, without ids; and two captions."""

    pixels: np.ndarray
    objects: list[dict[str, Any]]
    captions: list[str]


def make_scene(side: int, index: int, rng: np.random.Generator) -> Scene:
    """Draw scene number ``index`` of a split: each 25th is empty, each 50th has a crowd."""
    pixels, ground = draw_ground(side, rng)
    placed: list[Placed] = []
    if index % 50 == 3:
        placed.append(place(_heap(side, rng), side))
    if index % 25 != 7:
        for _ in range(int(rng.choice([1, 2, 3, 4, 5], p=[0.2, 0.3, 0.25, 0.15, 0.1]))):
            _add(placed, side, rng)
    for one in placed:
        paint(pixels, one, rng)
    pixels += 4 * rng.standard_normal(pixels.shape, dtype=np.float32)  # a sensor's noise
    visible = _visible([one.depth > 0 for one in placed])
    objects = [_annotation(one, mask) for one, mask in zip(placed, visible, strict=True)]
    return Scene(pixels.clip(0, 255).astype(np.uint8), objects, _captions(placed, ground))


def _add(placed: list[Placed], side: int, rng: np.random.Generator) -> None:
    """Place one more shape, before the others, where it leaves enough of each to be seen; none after 20 tries."""
    for _ in range(20):
        one = place(_random_shape(side, rng), side)
        masks = [other.depth > 0 for other in [*placed, one]]
        left = [mask.sum() / max(1, whole.sum()) for mask, whole in zip(_visible(masks), masks, strict=True)]
        if masks[-1].sum() >= max(24, 0.5 * _whole_area(one.shape)) and min(left) >= 0.5:
            placed.append(one)
            return


def _visible(masks: list[np.ndarray]) -> list[np.ndarray]:
    """Masks without what later ones cover."""
    visible: list[np.ndarray] = []
    for mask in masks:
        visible = [other & ~mask for other in visible] + [mask]
    return visible


def _random_shape(side: int, rng: np.random.Generator) -> Shape:
    kind = int(rng.choice(list(KINDS), p=[0.19, 0.19, 0.19, 0.19, 0.24]))
    least, most = (0.15, 0.3) if kind == PERSON else (0.06, 0.22)
    radius = side * least * (most / least) ** rng.random()
    x, y = rng.uniform(-0.03 * side, 1.03 * side, 2)  # some reach out of the picture
    colour = str(rng.choice(list(COLOURS)))
    if kind == PERSON:
        outlines, points = _person(x, y, radius, rng)
        return Shape(kind, outlines, points, (x, y), 1.25 * radius, colour)
    return Shape(kind, [polygon(kind, x, y, radius, rng.uniform(0, 2 * math.pi))], None, (x, y), radius, colour)


def _person(x: float, y: float, radius: float, rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    """The limbs of a stick figure and its keypoints (7, 2); it faces us, so that its left hand is on our right."""
    arms, legs = rng.uniform(-1.0, 0.9, 2), rng.uniform(0.15, 0.6, 2)  # angles: below level, and from straight down
    neck, hip = np.array([0.0, -0.45]), np.array([0.0, 0.2])
    hands = [neck + 0.62 * np.array([s * math.cos(a), math.sin(a)]) for s, a in zip((1, -1), arms, strict=True)]
    feet = [hip + 0.8 * np.array([s * math.sin(a), math.cos(a)]) for s, a in zip((1, -1), legs, strict=True)]
    points = np.array([[0.0, -0.74], neck, *hands, hip, *feet])
    lean = rng.uniform(-0.2, 0.2)
    turn = np.array([[math.cos(lean), -math.sin(lean)], [math.sin(lean), math.cos(lean)]])
    points = np.array([x, y]) + radius * points @ turn.T
    limbs = [_limb(points[a - 1], points[b - 1], max(1.3, 0.1 * radius)) for a, b in SKELETON[1:]]
    return [polygon(1, points[0, 0], points[0, 1], 0.27 * radius, 0.0), *limbs], points


def _limb(first: np.ndarray, second: np.ndarray, half: float) -> np.ndarray:
    """A bar (4, 2) between two points, a little longer than from one to the other."""
    along = (second - first) / np.linalg.norm(second - first) * half
    across = np.array([-along[1], along[0]])
    return np.array([first - along - across, second + along - across, second + along + across, first - along + across])


def _heap(side: int, rng: np.random.Generator) -> Shape:
    """Many small circles close to each other."""
    x, y = rng.uniform(0.25 * side, 0.75 * side, 2)
    places = np.array([x, y]) + rng.normal(0, 0.08 * side, (12, 2)).clip(-0.2 * side, 0.2 * side)
    circles = [polygon(1, x, y, 0.05 * side, 0.0) for x, y in places]
    return Shape(1, circles, None, (x, y), 0.35 * side, str(rng.choice(list(COLOURS))), crowd=True)


def _whole_area(shape: Shape) -> float:
    """The area of its polygons, those of a person's limbs overlap a little."""
    areas = []
    for x, y in (outline.T for outline in shape.outlines):
        areas.append(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)
    return float(sum(areas))


# Annotations


def _annotation(one: Placed, visible: np.ndarray) -> dict[str, Any]:
    """What a json file says of a shape; its box is the least one around what is seen of it."""
    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    x, y = int(columns[0]), int(rows[0])
    box = [float(x), float(y), float(columns[-1] - x + 1), float(rows[-1] - y + 1)]
    found: dict[str, Any] = {"category_id": one.shape.kind, "bbox": box, "area": float(visible.sum())}
    found |= {"iscrowd": int(one.shape.crowd), "segmentation": _segmentation(one, visible)}
    if one.shape.points is not None:
        found |= _keypoints(one.shape.points, visible)
    return found


def _segmentation(one: Placed, visible: np.ndarray) -> list[list[float]] | dict[str, Any]:
    """Polygons of a shape that is wholly seen, else run lengths, column by column from 0 on, as COCO has them."""
    corners = np.concatenate(one.shape.outlines)
    whole = corners.min() >= 0 and corners.max() <= len(visible) and np.array_equal(visible, one.depth > 0)
    if whole and not one.shape.crowd:
        return [outline.round(2).flatten().tolist() for outline in one.shape.outlines]
    flat = visible.T.flatten()
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    return {"size": list(visible.shape), "counts": np.diff(changes, prepend=0, append=len(flat)).tolist()}


def _keypoints(points: np.ndarray, visible: np.ndarray) -> dict[str, Any]:
    """Pixels and visibility: 2 seen, 1 covered, 0 not on the picture."""
    values = []
    for x, y in np.floor(points).astype(int).tolist():
        inside = 0 <= x < visible.shape[1] and 0 <= y < visible.shape[0]
        values += [x, y, 2 if visible[y, x] else 1] if inside else [0, 0, 0]
    return {"keypoints": values, "num_keypoints": sum(v > 0 for v in values[2::3])}


def _captions(placed: list[Placed], ground: str) -> list[str]:
    """Two sentences: one counts, one says colours and places."""
    if not placed:
        return [f"There is nothing on the {ground} ground.", f"An empty {ground} ground with some strokes."]
    names = ["heap of circles" if one.shape.crowd else KINDS[one.shape.kind] for one in placed]
    counts = [_counted(name, names.count(name)) for name in dict.fromkeys(names)]
    first = min(range(len(placed)), key=lambda i: placed[i].shape.centre[0])
    places = [f"the {placed[i].shape.colour} {names[i]}" for i in range(len(placed)) if i != first]
    left = f"a {placed[first].shape.colour} {names[first]}".replace("a orange", "an orange")
    second = f"{left} is to the left of {_and(places)}." if places else f"{left} on a {ground} ground."
    return [f"{_and(counts)} on a {ground} ground.".capitalize(), second[0].upper() + second[1:]]


def _counted(name: str, count: int) -> str:
    if count == 1:
        return f"a {name}"
    return f"{('two', 'three', 'four', 'five')[count - 2]} {'people' if name == 'person' else name + 's'}"


def _and(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
