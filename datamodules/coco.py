"""Any set in COCO's format: pictures in a folder, and boxes, masks and keypoints in a json file.

Format: Lin et al., 2014, Microsoft COCO, https://cocodataset.org/#format-data. Masks are polygons, or run lengths as
lists (COCO's crowds) or compressed.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeGuard

import numpy as np

from datamodules.annotations import AnnotatedPictures, Findings, FoundObject, FoundPicture, collect, mask_functions
from datamodules.detection import DetectionDataModule, Split
from datamodules.pictures import Picture

NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
WHOLE: tuple[str, ...] = (
    "annotations/instances_default.json",
    "_annotations.coco.json",
    "annotations.json",
    "instances.json",
)
WHOLE += ("result.json",)  # sets without a split: CVAT, roboflow and Label Studio among others
LONGEST = 2**16  # pixels of a side: no JPEG has more
FARTHEST = 1e9  # pixels: numbers beyond it are no places in a picture, and float32 soon has none for them
LAYOUT = (
    "expected <root>/annotations/instances_train*.json with the pictures in <root>/train*, <root>/images or beside it, "
    "or <root>/train/_annotations.coco.json; or name the files, by train_json and train_images"
)


class COCODataModule(DetectionDataModule):
    """Batches ``(images, targets)`` from a set in COCO's format; see :class:`DetectionDataModule` for what is in them.

    Category ids become the labels 1 … C in ascending order; ``category_ids`` has them, so that results can carry the
    original ones. Files are found in COCO's own layout (``train2017``, ``val2017``, ``annotations``), in roboflow's
    (``train``, ``valid``, ``test``, each with ``_annotations.coco.json``) and in similar ones, or are named: relative
    to ``root`` or absolute. ``train_json`` and so on take the place of those that are found, so that without
    ``val_json`` a named ``train_json`` is split.

    Boxes without area or outside of their picture are left out. An entry that makes no sense (an unknown category or
    picture, an id that occurs twice, a file that is missing, numbers that are none) is an error that names it, or is
    left out under ``corrupt: skip``; the report counts all of it.

    Args:
        root: Folder of the set.
        train_json: File with the training annotations.
        train_images: Folder with the training pictures.
        val_json: File with the annotations for validation.
        val_images: Folder with the pictures for validation.
        test_json: File with the annotations for testing.
        test_images: Folder with the pictures for testing.
        masks: Read masks; needs pycocotools, ``pip install 'zoo[detection]'``.
        keypoints: Read keypoints, from ``person_keypoints_*.json`` where that is there.
        batch_size: Pictures of a global training batch: all processes together.
        eval_batch_size: Pictures per process in validation, test and prediction.
        size: Length of the longer side, or ``[height, width]``, to which all pictures are resized, in evaluation too;
            None leaves them as they are.
        flip: Mirror half of the training pictures left to right.
        scale_jitter: Enlarge each training picture by a factor from ``[least, most]``, then cut or pad it to its size.
        iou_crop: Cut random boxes out of training pictures, as SSD does.
        val_size: Pictures held out of training for validation where the set has none of its own: their number, or
            below 1 their share. 0 trains without validation.
        test_size: Likewise for testing. Where there are none the validation pictures are tested on.
        split_seed: Seed of that split.
        keep_empty: Train on pictures without objects too.
        corrupt: Stop at what makes no sense or cannot be read (``refuse``), or leave it out (``skip``).
        cache: Keep decoded pictures in memory; None does so where those of a split need no more than 1 GiB.
        workers: Processes that read pictures, for each process that trains; None means one per processor, at most 4.

    Raises:
        FileNotFoundError: ``root`` is no folder, or a named file is missing.
        ValueError: No annotations are found, those for training have no categories, or a number is out of range.
    """

    def __init__(
        self,
        root: str,
        train_json: str | None = None,
        train_images: str | None = None,
        val_json: str | None = None,
        val_images: str | None = None,
        test_json: str | None = None,
        test_images: str | None = None,
        masks: bool = False,
        keypoints: bool = False,
        batch_size: int = 8,
        eval_batch_size: int = 8,
        size: list[int] | int | None = None,
        flip: bool = True,
        scale_jitter: list[float] | None = None,
        iou_crop: bool = False,
        val_size: int | float = 0.1,
        test_size: int | float = 0,
        split_seed: int = 0,
        keep_empty: bool = True,
        corrupt: Literal["refuse", "skip"] = "refuse",
        cache: bool | None = None,
        workers: int | None = None,
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
            split_seed,
            keep_empty,
            corrupt,
            cache,
            workers,
        )
        self.root = Path(root).expanduser()
        named = {
            "train": (train_json, train_images),
            "val": (val_json, val_images),
            "test": (test_json, test_images),
        }
        self.files = find_files(self.root, named, keypoints)
        self.own_splits = tuple(self.files)
        self.categories = read_categories(self.files["train"].annotations)
        self.class_names = [category.name for category in self.categories]
        self.category_ids = [category.number for category in self.categories]
        self.num_classes = len(self.categories)
        if keypoints:
            self.keypoint_names, self.skeleton = keypoint_names(self.files["train"].annotations, self.categories)

    def read(self, split: Split, findings: Findings) -> AnnotatedPictures:
        """Read the annotations of a split; see :func:`read_coco`."""
        files = self.files[split]
        return read_coco(files, self.categories, self.masks, self.keypoint_names, findings)


class Files(NamedTuple):
    """Where a split lies: its json file and the folder of its pictures."""

    annotations: Path
    pictures: Path


class Category(NamedTuple):
    """A category of a json file: its id, its name, and the names and lines of its keypoints, if it has any."""

    number: int
    name: str
    keypoints: list[str]
    skeleton: list[list[int]]


# Files


def find_files(
    root: Path, named: dict[str, tuple[str | None, str | None]], keypoints: bool = False
) -> dict[str, Files]:
    """The files of each split that there is.

    Args:
        root: Folder of the set.
        named: For each split its json file and its folder of pictures, where they are named.
        keypoints: Take ``person_keypoints_*.json`` rather than ``instances_*.json``.

    Raises:
        FileNotFoundError: ``root`` is no folder, or a named file is missing.
        ValueError: There are no annotations for training, or several.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root.absolute()}: {LAYOUT}")
    training, _ = named["train"]
    jsons = {} if training else {split: find_json(root, split, keypoints) for split in NAMES}
    if not training and jsons["train"] is None:
        jsons["train"] = next((root / name for name in WHOLE if (root / name).is_file()), None)
    jsons |= {split: root / name for split, (name, _) in named.items() if name}
    if jsons["train"] is None:
        raise ValueError(f"{root} has no annotations for training: {LAYOUT}")
    found = {}
    for split, path in jsons.items():
        if path is not None:
            if not path.is_file():
                raise FileNotFoundError(f"there is no file {path.absolute()}, which {split}_json names")
            found[split] = Files(path, find_pictures(root, split, path, named[split][1]))
    return found


def find_json(root: Path, split: str, keypoints: bool) -> Path | None:
    """The annotations of a split in one of the usual places, or None."""
    kinds = ("person_keypoints", "instances") if keypoints else ("instances",)
    patterns = [f"annotations/{kind}_{name}*.json" for kind in kinds for name in NAMES[split]]
    patterns += [f"{name}/{file}.json" for name in NAMES[split] for file in ("_annotations.coco", "annotations")]
    patterns += [f"{folder}{name}.json" for name in NAMES[split] for folder in ("annotations/", "")]
    for pattern in patterns:
        found = sorted(root.glob(pattern))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ValueError(f"{found[0].parent} has several files for {split}: {names}. Name one by {split}_json")
        if found:
            return found[0]
    return None


def find_pictures(root: Path, split: str, annotations: Path, named: str | None) -> Path:
    """The folder that the file names in a json start from: the first usual one where one of its pictures is.

    Raises:
        FileNotFoundError: The named folder is missing.
    """
    if named is not None:
        if not (root / named).is_dir():
            raise FileNotFoundError(f"there is no folder {(root / named).absolute()}, which {split}_images names")
        return root / named
    stem = annotations.stem.rsplit("_", 1)[-1]  # train2017 of instances_train2017
    folders = [f"{above}{name}" for above in ("", "images/") for name in (stem, *NAMES[split])]
    candidates = [root / name for name in (*folders, "images", "JPEGImages")] + [annotations.parent, root]
    candidates = [folder for folder in candidates if folder.is_dir()]
    names = first_pictures(annotations)
    return next(
        (folder for folder in candidates if any(os.path.isfile(folder / name) for name in names)), candidates[0]
    )


def first_pictures(annotations: Path) -> list[str]:
    """A few of the pictures that a json file names, found without reading all of it."""
    text = annotations.read_bytes()
    names: list[Any] = []
    place = text.find(b'"file_name"')
    while place >= 0 and len(names) < 20:
        value = text.find(b'"', text.find(b":", place) + 1)
        try:
            names.append(json.JSONDecoder().raw_decode(text[value : value + 4096].decode(errors="replace"))[0])
        except ValueError:
            break
        place = text.find(b'"file_name"', value)
    return [name for name in names if isinstance(name, str) and name]


# Categories


def read_categories(path: Path) -> list[Category]:
    """The categories of a json file in ascending order of their ids, where possible without reading all of it.

    Raises:
        ValueError: There are none, or they are not as they should be; the message names the file.
    """
    found = _list_of_categories(path.read_bytes())
    found = load_json(path)["categories"] if found is None else found
    if not found:
        raise ValueError(f"{path} has no categories, so that there is nothing to detect")
    categories = sorted(_category(path, entry) for entry in found)
    numbers = Counter(category.number for category in categories)
    if twice := [number for number, times in numbers.items() if times > 1]:
        raise ValueError(f"{path} has several categories with the id {twice[0]}: give each an id of its own")
    return categories


def _list_of_categories(text: bytes) -> list[dict[str, Any]] | None:
    """What follows the last "categories" in a file, if it is a list of them: COCO's training file has 450 MB."""
    start = text.find(b"[", place) if (place := text.rfind(b'"categories"')) >= 0 else -1
    if start < 0:
        return None
    try:
        found = json.JSONDecoder().raw_decode(text[start:].decode())[0]
    except (ValueError, RecursionError):
        return None
    good = isinstance(found, list) and all(isinstance(entry, dict) and {"id", "name"} <= set(entry) for entry in found)
    return found if good else None


def _category(path: Path, entry: Any) -> Category:
    name = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not _is_whole(entry.get("id")) or not isinstance(name, str | int) or name == "":
        raise ValueError(f"{path}: a category is {_short(entry)}, expected an object with a whole number id and a name")
    points, lines = entry.get("keypoints") or [], entry.get("skeleton") or []
    if not isinstance(points, list) or not all(isinstance(point, str | int) for point in points):
        raise ValueError(f"{path}: category {name} has the keypoints {_short(points)}, expected a list of names")
    if not isinstance(lines, list) or not all(_is_line(line, len(points)) for line in lines):
        raise ValueError(
            f"{path}: category {name} has the skeleton {_short(lines)}, expected pairs of its {len(points)} keypoints"
        )
    joined = [[first - 1, second - 1] for first, second in lines]  # files count from 1
    return Category(entry["id"], str(name), [str(point) for point in points], joined)


def _is_line(line: Any, points: int) -> bool:
    return isinstance(line, list) and len(line) == 2 and all(_is_whole(end) and 1 <= end <= points for end in line)


def keypoint_names(path: Path, categories: list[Category]) -> tuple[list[str], list[list[int]]]:
    """Names of the keypoints, and pairs of them, from 0, that a line joins.

    Raises:
        ValueError: No category has keypoints, or two have different ones.
    """
    having = [category for category in categories if category.keypoints]
    if not having:
        raise ValueError(f"{path} has no category with keypoints: set keypoints to false, or give a file that has")
    for category in having[1:]:
        if category.keypoints != having[0].keypoints:
            raise ValueError(
                f"{path}: the keypoints of {category.name} are not those of {having[0].name}, and a detector learns "
                "one list of them: keep the categories that share theirs"
            )
    return having[0].keypoints, having[0].skeleton


# Annotations


def load_json(path: Path, keys: tuple[str, ...] = ("images", "annotations", "categories")) -> dict[str, Any]:
    """A json file in COCO's format.

    Args:
        path: The file.
        keys: The lists that it must have.

    Raises:
        FileNotFoundError: It is missing.
        ValueError: It is no json or has another format; the message names it.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no whole json file ({error}): fetch or write it again") from error
    missing = [key for key in keys if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        raise ValueError(f"{path} has no list {missing[0]!r}: expected an object with the lists {', '.join(keys)}")
    return content


def read_coco(
    files: Files, categories: list[Category], masks: bool, keypoint_names: list[str], findings: Findings
) -> AnnotatedPictures:
    """Read a json file in COCO's format.

    Args:
        files: The file and the folder of its pictures.
        categories: Those of the labels 1, 2, …; the file's own must not contradict them.
        masks: Whether every object needs a mask.
        keypoint_names: Names of the keypoints to read; none reads none.
        findings: Is told what is wrong.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: It has another format, or an entry makes no sense and ``findings`` does not skip; the message names
            the file.
    """
    path, folder = files
    content = load_json(path)
    _compare(path, content["categories"], categories)
    labels = {category.number: i + 1 for i, category in enumerate(categories)}
    entries = _Entries(files, labels, masks, len(keypoint_names))
    for entry in content["images"]:
        try:
            entries.add_picture(entry)
        except _BadEntryError as error:
            findings.refuse(error.reason, str(error))
    for entry in content["annotations"]:
        try:
            entries.add_object(entry)
        except _BadEntryError as error:
            findings.refuse(error.reason, str(error))
    return collect(folder, list(entries.pictures.values()), len(keypoint_names), findings)


def _compare(path: Path, found: list[Any], categories: list[Category]) -> None:
    names = {category.number: category.name for category in categories}
    for entry in found:
        number, name, *_ = _category(path, entry)
        if names.get(number, name) != name:
            raise ValueError(f"{path}: category {number} is {name}, in the training annotations it is {names[number]}")


class _BadEntryError(ValueError):
    """An entry that makes no sense; ``reason`` is what the report counts it under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class _Entries:
    """The pictures that a json file has, and on them their objects.

    Args:
        files: Where they are from.
        labels: The label of each category id.
        masks: Whether every object needs a mask.
        num_keypoints: Number of keypoints to read.
    """

    def __init__(self, files: Files, labels: dict[int, int], masks: bool, num_keypoints: int) -> None:
        self.path, self.folder = files
        self.labels = labels
        self.masks = masks
        self.num_keypoints = num_keypoints
        self.pictures: dict[int, FoundPicture] = {}
        self._left_out: set[int] = set()  # ids of pictures that make no sense: their objects go with them
        self._ids: set[int] = set()  # of objects
        self._listings: dict[Path, set[str]] = {}

    def add_picture(self, entry: Any) -> None:
        """Add a picture.

        Raises:
            _BadEntryError: It makes no sense, or its file is missing.
        """
        if not isinstance(entry, dict) or not _is_whole(entry.get("id")) or not isinstance(entry.get("file_name"), str):
            message = f"{self.path}: a picture is {_short(entry)}, expected a whole number id and a file_name"
            raise _BadEntryError("pictures that make no sense", message)
        number, name = entry["id"], entry["file_name"]
        if number in self.pictures:
            message = f"{self.path}: two pictures have the id {number}, {self.pictures[number].name} and {name}"
            raise _BadEntryError("ids that occur twice", message)
        self._left_out.add(number)
        if not self._exists(self.folder / name):
            message = f"{self.path} names the picture {self.folder / name}, which is not there"
            raise _BadEntryError("pictures that are missing", message)
        self.pictures[number] = FoundPicture(name, number, *self._size(entry), [])
        self._left_out.remove(number)

    def _exists(self, file: Path) -> bool:
        if file.parent not in self._listings:  # to ask for each of 118,000 files takes minutes on a network's disk
            self._listings[file.parent] = set(os.listdir(file.parent)) if file.parent.is_dir() else set()
        return file.name in self._listings[file.parent]

    def _size(self, entry: dict[str, Any]) -> tuple[int, int]:
        """Height and width of a picture: of the file itself where the entry says none that can be."""
        height, width = entry.get("height"), entry.get("width")
        if all(_is_whole(side) and 0 < side < LONGEST for side in (height, width)):
            return height, width  # type: ignore[return-value]
        try:
            picture = Picture(self.folder / entry["file_name"])
        except ValueError as error:
            raise _BadEntryError("pictures that cannot be read", str(error)) from error
        return picture.height, picture.width

    def add_object(self, entry: Any) -> None:
        """Add an object to its picture, unless that was left out.

        Raises:
            _BadEntryError: It makes no sense.
        """
        if not isinstance(entry, dict) or not _is_whole(entry.get("id")):
            message = f"{self.path}: an annotation is {_short(entry)}, expected an object with a whole number id"
            raise _BadEntryError("annotations that make no sense", message)
        name, number = f"{self.path}: annotation {entry['id']}", entry.get("image_id")
        if entry["id"] in self._ids:
            raise _BadEntryError("ids that occur twice", f"{name}: another one has the same id")
        self._ids.add(entry["id"])
        if not _is_whole(number) or (number not in self.pictures and number not in self._left_out):
            message = f"{name} is of picture {_short(number)}, which is not among the images"
            raise _BadEntryError("annotations of unknown pictures", message)
        if number in self.pictures:
            picture = self.pictures[number]
            picture.objects.append(self._object(name, entry, picture))

    def _object(self, name: str, entry: dict[str, Any], picture: FoundPicture) -> FoundObject:
        category, box, area = entry.get("category_id"), entry.get("bbox"), entry.get("area")
        if not _is_whole(category) or category not in self.labels:
            message = f"{name} has the category {_short(category)}, which is not among those of training"
            raise _BadEntryError("annotations of unknown categories", message)
        if not _are_numbers(box, 4):
            message = f"{name} has the box {_short(box)}, expected four numbers x, y, width, height"
            raise _BadEntryError("boxes that make no sense", message)
        x, y, width, height = box  # type: ignore[misc]
        if max(map(abs, (x, y, width, height))) > FARTHEST:
            raise _BadEntryError("boxes that make no sense", f"{name} has the box {_short(box)}, far from any picture")
        if area is not None and (not _are_numbers([area]) or area < 0 < min(width, height)):
            raise _BadEntryError("areas that make no sense", f"{name} has the area {_short(area)}, expected a number")
        if entry.get("iscrowd") not in (None, 0, 1):
            message = f"{name} has iscrowd {_short(entry['iscrowd'])}, expected 0 or 1"
            raise _BadEntryError("crowds that make no sense", message)
        mask, points = b"", None
        try:
            if self.masks:
                mask = compressed_mask(entry.get("segmentation"), picture.height, picture.width)
            if self.num_keypoints:
                points = checked_keypoints(entry.get("keypoints"), self.num_keypoints)
        except ValueError as error:
            raise _BadEntryError("masks or keypoints that make no sense", f"{name} {error}") from error
        return FoundObject(
            f"annotation {entry['id']}",
            (x, y, x + width, y + height),
            self.labels[category],
            None if area is None else float(area),
            bool(entry.get("iscrowd")),
            mask,
            points,
        )


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _are_numbers(values: Any, count: int | None = None) -> bool:
    """Whether it is a list of numbers that a picture may have, and of so many."""
    return (
        isinstance(values, (list, tuple))
        and (count is None or len(values) == count)
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < FARTHEST**2 for v in values)
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]} …"


def checked_keypoints(values: Any, number: int) -> list[float]:
    """3 * ``number`` values x, y, visibility; zeros for an object that has none.

    Raises:
        ValueError: They are others.
    """
    if values is None:
        return [0.0] * 3 * number
    if not _are_numbers(values, 3 * number) or not set(values[2::3]) <= {0, 1, 2}:
        raise ValueError(
            f"has the keypoints {_short(values)}, expected {3 * number} numbers: x, y and a visibility of 0, 1 or 2 "
            f"for each of {number} keypoints"
        )
    return values


def compressed_mask(segmentation: Any, height: int, width: int) -> bytes:
    """The compressed run lengths of a mask for a picture of this size.

    Args:
        segmentation: Polygons, or run lengths as a list or compressed, as a json file has them.
        height: Of the picture.
        width: Of the picture.

    Raises:
        ValueError: There is none, or it is broken or of another size.
    """
    functions = mask_functions()
    if isinstance(segmentation, list) and segmentation:
        # pycocotools takes four numbers for a box, and two for nothing that it could draw.
        polygons = [p for p in segmentation if _are_numbers(p) and len(p) >= 6 and len(p) % 2 == 0]
        # It draws an edge point by point, wherever that leads; what is far away ends the process.
        if any(abs(place) > 10 * max(height, width) for polygon in polygons for place in polygon):
            raise ValueError(f"has the polygons {_short(segmentation)}, far from its picture of {width} x {height}")
        if len(polygons) < len(segmentation):
            raise ValueError(f"has the polygons {_short(segmentation)}, expected lists x, y, x, y, … of three points")
        return functions.merge(functions.frPyObjects(polygons, height, width))["counts"]
    if not isinstance(segmentation, dict):
        raise ValueError(f"has the segmentation {_short(segmentation)}, expected polygons or run lengths")
    counts = segmentation.get("counts")
    if not isinstance(counts, (str, list)) or segmentation.get("size") != [height, width]:
        size = _short(segmentation.get("size"))
        raise ValueError(f"has run lengths for the size {size}, the picture's is {[height, width]}")
    if isinstance(counts, list):
        if not all(_is_whole(count) and count >= 0 for count in counts) or sum(counts) != height * width:
            raise ValueError(f"has run lengths that do not add up to {height} x {width} pixels")
        return functions.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"]
    if pixels_in_runs(counts) != height * width:  # pycocotools would show what lies in the memory behind
        raise ValueError(f"has compressed run lengths that do not add up to {height} x {width} pixels")
    return counts.encode()


def pixels_in_runs(counts: str) -> int:
    """The sum of compressed run lengths, -1 where they are broken.

    A number is written in characters of 5 bits from 48 on, the lowest first; a sixth bit says that more follow, and the
    highest bit of the last one is the sign. From the fourth on a number is the difference to the one two before it.
    """
    codes = np.frombuffer(counts.encode(errors="replace"), dtype=np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return -1
    last = np.flatnonzero(codes & 32 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    if (last - first).max() > 6:  # longer than any picture
        return -1
    place = np.arange(len(codes)) - np.repeat(first, last - first + 1)
    values = np.add.reduceat((codes & 31) << 5 * place, first)
    values -= np.where(codes[last] & 16, 1 << 5 * (last - first + 1), 0)
    lengths = np.concatenate([values[:1], np.zeros(len(values) - 1, dtype=np.int64)])
    lengths[1::2], lengths[2::2] = np.cumsum(values[1::2]), np.cumsum(values[2::2])
    return int(lengths.sum()) if lengths.min() >= 0 else -1
