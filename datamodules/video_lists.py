"""Which videos there are, of which class and split: by class folders, or by csv files as Kinetics has them."""

import csv
import hashlib
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from datamodules.image_folder import FOLDERS, stratified_order, subfolders, walk
from datamodules.reading import some

Split = Literal["train", "val", "test"]
SPLITS: dict[str, Split] = {"train": "train", "training": "train", "val": "val", "valid": "val", "validate": "val"}
SPLITS |= {"validation": "val", "test": "test", "testing": "test"}
ENDINGS = (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
LAYOUT = "expected <root>/<class>/*.mp4, or <root>/train/<class>/*.mp4 with val and test beside train"
COLUMNS = "expected a first line that names the columns label and path, or label, youtube_id, time_start and time_end"


class KeptFrames:
    """Decoded frames of videos in memory: in few large tensors, since to share one costs a file handle.

    Args:
        pieces: The pixels of many videos in one tensor each, uint8 (bytes,).
        places: For each video its piece, where it begins there, number of frames, height and width; int64 (N, 5).
    """

    def __init__(self, pieces: list[Tensor], places: np.ndarray) -> None:
        self.pieces = pieces
        self.places = places

    def frames(self, index: int) -> np.ndarray:
        """The frames of a video, uint8 (K, H, W, 3); a view."""
        piece, start, count, height, width = self.places[index].tolist()
        end = start + count * height * width * 3
        return self.pieces[piece][start:end].view(count, height, width, 3).numpy()


class VideoSet:
    """Videos, or parts of them, by index.

    Args:
        root: Folder that the names start from.
        names: Files, bytes (N,).
        labels: Their classes, int64 (N,).
        windows: First and last second of the part that counts, float64 (N, 2); from 0 to infinity is all.
        kept: Their frames in memory, if they are kept there.
    """

    def __init__(
        self,
        root: Path,
        names: np.ndarray,
        labels: np.ndarray,
        windows: np.ndarray | None = None,
        kept: KeptFrames | None = None,
    ) -> None:
        self.root = root
        self.names = names
        self.labels = labels
        self.windows = np.tile((0.0, np.inf), (len(names), 1)) if windows is None else windows
        self.kept = kept

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """The file of a video."""
        return self.root / os.fsdecode(self.names[index])

    def take(self, indices: np.ndarray) -> "VideoSet":
        """Some of the videos."""
        kept = None if self.kept is None else KeptFrames(self.kept.pieces, self.kept.places[indices])
        return VideoSet(self.root, self.names[indices], self.labels[indices], self.windows[indices], kept)

    def fingerprint(self) -> str:
        """What stays the same as long as these are the same files in the same order, wherever the root is."""
        digest = hashlib.sha256(b"\0".join(self.names.tolist()))
        return hashlib.sha256(digest.digest() + self.windows.tobytes()).hexdigest()[:16]


# Class folders


def find_folders(root: Path) -> dict[str, Path]:
    """The folders of ``train``, ``val`` and ``test`` as far as they exist; ``train`` is ``root`` where one holds all.

    Raises:
        ValueError: There are folders for evaluation, but none for training.
    """
    if subfolders(root / "train"):  # else it is a class of that name
        found = ((split, root / name) for split, names in FOLDERS.items() for name in names)
        return {split: folder for split, folder in found if folder.is_dir()}
    for name in (*FOLDERS["val"], *FOLDERS["test"]):
        if subfolders(root / name):
            raise ValueError(f"{root} has a folder {name} with classes but no such folder train: {LAYOUT}")
    return {"train": root}


def find_classes(folder: Path) -> list[str]:
    """The class folders, sorted.

    Raises:
        ValueError: There are fewer than two.
    """
    classes = subfolders(folder)
    if len(classes) < 2:
        found = f"only the folder {classes[0]}" if classes else "no folders"
        raise ValueError(f"{folder} has {found}, and a classifier needs two classes at least: {LAYOUT}")
    return classes


def list_videos(root: Path, folder: Path, classes: list[str]) -> VideoSet:
    """The videos of ``folder``, by class and name; those in folders of a class folder belong to the class.

    Raises:
        ValueError: Its class folders are not ``classes``, or there are no videos in them.
    """
    found = subfolders(folder)
    more, fewer = sorted(set(found) - set(classes)), sorted(set(classes) - set(found))
    if more:
        raise ValueError(f"{folder} has class folders that training has not: {some(more)}. Rename or remove them")
    if fewer:
        raise ValueError(f"{folder} lacks class folders that training has: {some(fewer)}. An empty folder would do")
    names, labels, ignored = [], [], []
    for label, name in enumerate(classes):
        for file in walk(folder / name):
            if file.lower().endswith(ENDINGS):
                names.append(os.fsencode(os.path.relpath(file, root)))
                labels.append(label)
            else:
                ignored.append(file)
    if ignored:
        rank_zero_info(f"{folder}: {len(ignored)} files are no videos by their names: {some(ignored)}")
    if not names:
        raise ValueError(f"{folder} has no videos in its class folders; looked for {', '.join(ENDINGS)}")
    return VideoSet(root, np.array(names), np.array(labels))


# csv


class Row(NamedTuple):
    """A line of a csv file.

    Attributes:
        name: The file below the root, or YouTube's name of the video.
        label: Its class.
        split: train, val or test.
        window: First and last second, if the line says them.
        where: The file and line, for messages.
    """

    name: str
    label: str
    split: Split
    window: tuple[float, float] | None
    where: str


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """The lines of csv files.

    A line's split is that of its column ``split``; without it that of the file's name (``train.csv``,
    ``validate.csv``); without that it is for training.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A column or a value is missing, or makes no sense.
    """
    return [row for path in paths for row in _rows(path)]


def _rows(path: Path) -> list[Row]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path.absolute()}")
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines(keepends=True)
        reader = csv.DictReader(lines)
        columns = list(reader.fieldnames or ["none"])
        found = [(line, f"{path}, line {reader.line_num}") for line in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no csv file in UTF-8 ({error}): write it again") from error
    if "label" not in columns or not {"path", "youtube_id"} & set(columns):
        raise ValueError(f"{path} has the columns {', '.join(columns)}: {COLUMNS}")
    by_name: Split = next((SPLITS[word] for word in re.split(r"[^a-z]+", path.stem.lower()) if word in SPLITS), "train")
    rows = [_row(line, by_name, where) for line, where in found]
    if not rows:
        raise ValueError(f"{path} has no lines below its first one")
    return rows


def _row(line: dict[str, Any], split: Split, where: str) -> Row:
    if line.get("split"):
        said = line["split"].strip().lower()
        if said not in SPLITS:
            raise ValueError(f"{where}: split {line['split']!r} must be train, val or test")
        split = SPLITS[said]
    name, label = (line.get("path") or line.get("youtube_id") or "").strip(), (line.get("label") or "").strip()
    if not name or not label:
        raise ValueError(f"{where} lacks {'its video' if not name else 'its label'}: {COLUMNS}")
    return Row(name, label, split, _window(line, where), where)


def _window(line: dict[str, Any], where: str) -> tuple[float, float] | None:
    if not line.get("time_start") and not line.get("time_end"):
        return None
    try:
        first, last = float(line.get("time_start")), float(line.get("time_end"))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"{where}: time_start and time_end must both be seconds") from None
    if not 0 <= first < last < math.inf:
        raise ValueError(f"{where}: time_start {first:g} must not be negative, and be before time_end {last:g}")
    return first, last


def classes_of(rows: list[Row]) -> list[str]:
    """The labels of the training lines, sorted: as numbers where all are.

    Raises:
        ValueError: There are fewer than two, or a line for evaluation has another.
    """
    found = {row.label for row in rows if row.split == "train"}
    classes = sorted(found, key=int if all(label.isdecimal() for label in found) else None)
    if len(classes) < 2:
        raise ValueError(f"the csv files train on {', '.join(classes) or 'nothing'}: a classifier needs two classes")
    if unknown := [row for row in rows if row.label not in found]:
        raise ValueError(f"{unknown[0].where}: no line for training has the label {unknown[0].label!r}")
    return classes


def videos_of(root: Path, rows: list[Row], classes: list[str]) -> tuple[dict[Split, VideoSet], list[str]]:
    """The videos of csv lines by split, and the lines that have no file.

    A ``path`` starts from ``root``. For a ``youtube_id`` a file is looked for anywhere in ``root``, of which the folder
    is named as the label where there are several: ``ID_000012_000022.mp4``, which is the part from second 12 to 22
    alone, else ``ID.mp4``, of which that part is read.
    """
    files = _files_by_stem(root) if any(row.window for row in rows) else {}
    found: dict[Split, list[tuple[bytes, int, tuple[float, float]]]] = {"train": [], "val": [], "test": []}
    missing = []
    label_of = {name: label for label, name in enumerate(classes)}
    for row in rows:
        name, window = _file_of(root, row, files)
        if name is None:
            missing.append(f"{row.name} ({row.where})")
        else:
            found[row.split].append((os.fsencode(name), label_of[row.label], window))
    return {split: _video_set(root, videos) for split, videos in found.items() if videos}, missing


def _files_by_stem(root: Path) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for file in walk(root):
        if file.lower().endswith(ENDINGS):
            name = os.path.relpath(file, root)
            files.setdefault(Path(name).stem, []).append(name)
    return files


def _file_of(root: Path, row: Row, files: dict[str, list[str]]) -> tuple[str | None, tuple[float, float]]:
    """The file of a line, and the part of it that counts."""
    if (root / row.name).is_file():
        return row.name, row.window or (0.0, math.inf)
    if row.window is None:
        return None, (0.0, math.inf)
    first, last = row.window
    cut = files.get(f"{row.name}_{int(first):06d}_{int(last):06d}", [])
    for names, window in ((cut, (0.0, math.inf)), (files.get(row.name, []), row.window)):
        if names:
            return next((name for name in names if Path(name).parent.name == row.label), names[0]), window
    return None, row.window


def _video_set(root: Path, videos: list[tuple[bytes, int, tuple[float, float]]]) -> VideoSet:
    names, labels, windows = zip(*videos, strict=True)
    return VideoSet(root, np.array(names), np.array(labels), np.array(windows, dtype=np.float64))


# The split


def held_out(
    videos: VideoSet, val_size: int | float, test_size: int | float, groups: str | None, seed: int
) -> dict[Split, np.ndarray]:
    """Indices of the videos of each split, in order, of each class its part.

    Args:
        videos: All of them.
        val_size: Least number of videos for validation, or below 1 their share; whole groups are taken.
        test_size: Likewise for testing.
        groups: Videos whose names have the same text where this regular expression matches (what is in its
            parentheses, if there are any) are in one split; None lets each go its own way.
        seed: Seed of the split.

    Raises:
        ValueError: The expression does not match, or nothing is left to train on.
    """
    val, test = (math.ceil(size * len(videos)) if size < 1 else int(size) for size in (val_size, test_size))
    keys = np.arange(len(videos)) if groups is None else _groups(videos, groups)
    _, firsts, members = np.unique(keys, return_index=True, return_inverse=True)
    order = stratified_order(videos.labels[firsts], seed)
    sizes = np.bincount(members)[order]
    before = np.concatenate([[0], np.cumsum(sizes)[:-1]])  # videos of the groups that come sooner
    end_of_val = np.searchsorted(before, val)
    taken = before[end_of_val] if end_of_val < len(before) else len(videos)
    end_of_test = np.searchsorted(before, taken + test) if test else end_of_val
    parts = {"val": order[:end_of_val], "test": order[end_of_val:end_of_test], "train": order[end_of_test:]}
    if not len(parts["train"]):
        raise ValueError(f"{val} videos for validation and {test} for testing leave none of {len(videos)} to train on")
    return {split: np.flatnonzero(np.isin(members, parts[split])) for split in ("train", "val", "test")}


def _groups(videos: VideoSet, groups: str) -> np.ndarray:
    keys = []
    for index in range(len(videos)):
        name = Path(os.fsdecode(videos.names[index])).as_posix()
        match = re.search(groups, name)
        if match is None:
            raise ValueError(f"groups={groups!r} does not match {name}: it must say for each video what it is cut from")
        keys.append("\0".join(match.groups(default="")) or match.group())
    return np.array(keys)
