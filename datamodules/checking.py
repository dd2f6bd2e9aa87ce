"""What is wrong with the samples of a data module: looked for before a training, and named with their files.

What is in memory is looked at whenever a run starts; files are opened by ``zoo check-data``.
"""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from datamodules.annotations import AnnotatedPictures, annotated_pixels, counted
from datamodules.caption_files import CaptionedPictures
from datamodules.pictures import Picture
from datamodules.reading import PictureSet, read_each
from datamodules.shapenet_files import Views
from datamodules.video_files import VideoFile
from datamodules.video_lists import VideoSet

# The samples of a split: in memory images and labels, else what lists files.
Part = tuple[Tensor, Tensor] | PictureSet | AnnotatedPictures | CaptionedPictures | VideoSet | Views
NAMED = 10  # cases of a kind that are named
NOTHING = torch.empty(3, 0, 0, dtype=torch.uint8)


def check(data: Any, listed: Callable[[], tuple[dict[str, Part], list[str]]], files: bool) -> list[str]:
    """What is wrong with the samples of a data module.

    Args:
        data: The module, after its ``setup`` unless ``files``.
        listed: Gives all samples of all splits, before any file was opened, and what was wrong with what lists them.
        files: Look at those, and read each; else only at what is in memory after a ``setup``.
    """
    names = list(getattr(data, "class_names", []))
    if not files:
        if missing := never_seen(parts := set_up(data), names):
            told = f"nothing in training belongs to {len(missing)} of {len(names)} classes: {_some(missing)}"
            rank_zero_warn(told, category=UserWarning)
        return quick_problems(parts, names)
    try:
        parts, found = listed()
    except (ValueError, OSError) as error:
        return [str(error)]
    wanted = [split for split in ("train", "val", "test") if split in parts and _wanted(data, split)]
    return found + problems({split: parts[split] for split in wanted}, names, data.workers)


def set_up(data: Any) -> dict[str, Part]:
    """The splits that a ``setup`` has made ready."""
    sets = {split: getattr(data, f"{split}_set") for split in ("train", "val", "test")}
    ready = {split: getattr(part, "views", part) for split, part in sets.items() if part is not None}
    return {split: part for split, part in ready.items() if _wanted(data, split)}


def _wanted(data: Any, split: str) -> bool:
    return split != "val" or getattr(data, "val_size", 1) != 0


def quick_problems(parts: dict[str, Part], class_names: list[str]) -> list[str]:
    """What is wrong as far as memory tells: empty splits, labels that are no class, names that are there twice."""
    found = [f"split {split} is empty" for split, part in parts.items() if not count(part)]
    for split, part in parts.items():
        wrong = [label for label in np.unique(labels_of(part)).tolist() if not 0 <= label < len(class_names)]
        if wrong and class_names:
            last = len(class_names) - 1
            found.append(f"split {split} has the labels {_some(wrong)}, and the classes are 0 to {last}")
    alike = Counter(name.strip().casefold() for name in class_names)
    twice = [name for name in class_names if alike[name.strip().casefold()] > 1]
    return found + ([f"several classes have the same name: {_some(twice)}"] if twice else [])


def never_seen(parts: dict[str, Part], class_names: list[str]) -> list[str]:
    """The classes that nothing in training belongs to."""
    if "train" not in parts or isinstance(parts["train"], CaptionedPictures):
        return []
    seen = set(np.unique(labels_of(parts["train"])).tolist())
    return [name for label, name in enumerate(class_names) if label not in seen]


def problems(parts: dict[str, Part], class_names: list[str], workers: int) -> list[str]:
    """All that is wrong, after every file was read.

    Args:
        parts: The samples of each split, listed.
        class_names: Of the labels from 0.
        workers: Processes that read.

    Returns:
        A line for each kind of thing that is wrong, with the first few files of it.
    """
    found = quick_problems(parts, class_names)
    if missing := never_seen(parts, class_names):
        found.append(f"nothing in training belongs to {len(missing)} of {len(class_names)} classes: {_some(missing)}")
    if class_names and all(name.isdecimal() for name in class_names):
        numbers = {int(name) for name in class_names}
        if gaps := sorted(set(range(min(numbers), max(numbers))) - numbers):
            found.append(f"the classes are {min(numbers)} to {max(numbers)} without {_some(gaps)}")
    for split, part in parts.items():
        unreadable = list(unreadable_in(part, workers).values())
        found += _line(f"files of split {split} that cannot be used", unreadable)
    return found + alike_in(parts, class_names)


# Contents


def alike_in(parts: dict[str, Part], class_names: list[str]) -> list[str]:
    """What is in two splits, or in two classes, by content."""
    places: dict[bytes, list[tuple[str, str, int | None]]] = defaultdict(list)  # split, name, label
    for content, place in contents(parts):
        places[content].append(place)
    splits, classes = [], []
    for alike in places.values():
        by_split = {split: name for split, name, _ in reversed(alike)}
        by_class = {label: name for _, name, label in reversed(alike) if label is not None}
        if len(by_split) > 1:
            splits.append(" and ".join(f"{name} ({split})" for split, name in sorted(by_split.items())))
        if len(by_class) > 1:
            classes.append(" and ".join(f"{name} ({class_names[k]})" for k, name in sorted(by_class.items())))
    return [*_line("samples are in two splits", splits), *_line("samples are in two classes", classes)]


def contents(parts: dict[str, Part]) -> Iterable[tuple[bytes, tuple[str, str, int | None]]]:
    """What tells apart what a sample shows, with its split, name and label; files of a size of their own are left out.

    A video of which several parts are used is each of these.
    """
    files: list[tuple[Path, str, tuple[str, str, int | None]]] = []
    for split, part in parts.items():
        if isinstance(part, tuple):
            for index, (image, label) in enumerate(zip(part[0].cpu().numpy(), part[1].tolist(), strict=True)):
                yield hashlib.sha256(image.tobytes()).digest(), (split, f"image {index}", label)
        else:
            files += [(path, window, (split, str(path), label)) for path, window, label in files_of(part)]
    sizes = {path: os.path.getsize(path) for path in {path for path, _, _ in files} if path.is_file()}
    alike = Counter(sizes.values())
    digests: dict[Path, bytes] = {}
    for path, window, place in files:
        if not sizes.get(path):
            continue  # which cannot be read
        if path not in digests:  # only files of one size can be alike; one file may be listed twice
            digests[path] = _digest(path) if alike[sizes[path]] > 1 else os.fsencode(path.resolve())
        yield digests[path] + window.encode(), place


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest() if hasattr(hashlib, "file_digest") else _slowly(file)


def _slowly(file: Any) -> bytes:
    """As ``hashlib.file_digest``, which Python 3.10 lacks."""
    digest = hashlib.sha256()
    while piece := file.read(2**20):
        digest.update(piece)
    return digest.digest()


def files_of(part: Any) -> list[tuple[Path, str, int | None]]:
    """The files of listed samples, with the part of each that counts, and their class where they have one."""
    if isinstance(part, Views):
        return [(part.picture(i), "", int(part.categories[part.models[i]])) for i in range(len(part))]
    if isinstance(part, VideoSet):
        return [(part.path(i), str(part.windows[i].tolist()), int(part.labels[i])) for i in range(len(part))]
    if isinstance(part, PictureSet):
        return [(part.path(i), "", int(part.labels[i])) for i in range(len(part))]
    return [(part.path(i), "", None) for i in range(len(part))]


def count(part: Part) -> int:
    """The number of samples."""
    return len(part[1]) if isinstance(part, tuple) else len(part)


def labels_of(part: Part) -> np.ndarray:
    """The classes of samples, or of the objects on them, counted from 0."""
    if isinstance(part, tuple):
        return part[1].cpu().numpy()
    if isinstance(part, AnnotatedPictures):
        rows = [part.present(index) for index in range(len(part))]
        return part.objects.labels[np.concatenate(rows)] - 1 if rows else np.zeros(0, dtype=np.int64)
    if isinstance(part, Views):
        return part.categories[part.models]
    return np.zeros(0, dtype=np.int64) if isinstance(part, CaptionedPictures) else part.labels


# Reading


def unreadable_in(part: Part, workers: int) -> dict[int, str]:
    """What cannot be read, or does not fit what is said of it, by sample."""
    if isinstance(part, tuple) or not count(part):
        return {}
    readers: dict[type, Callable[[Any, int], None]] = {
        AnnotatedPictures: _read_annotated,
        VideoSet: _read_video,
        Views: _read_view,
    }
    read = partial(_read, readers.get(type(part), _read_picture), part)
    return read_each(read, count(part), range(count(part)), False, workers if count(part) > 200 else 0)[0]


def _read(read: Callable[[Any, int], None], part: Part, index: int) -> Tensor:
    try:
        read(part, index)
    except OSError as error:  # of a file that is missing or may not be read too, the others are looked at
        raise ValueError(str(error)) from error
    return NOTHING


def _read_picture(part: Any, index: int) -> None:
    Picture(part.path(index)).pixels(shrink=8)


def _read_annotated(part: AnnotatedPictures, index: int) -> None:
    annotated_pixels(part.path(index), *part.sizes[index].tolist())


def _read_video(part: VideoSet, index: int) -> None:
    with VideoFile(part.path(index)) as video:
        if (first := part.windows[index, 0]) >= video.duration:
            raise ValueError(f"{video.path} lasts {video.duration:.1f} seconds, and its csv line begins at {first:g}")
        video.check()


def _read_view(part: Views, index: int) -> None:
    from datamodules.shapenet import rendering
    from datamodules.surfaces import read_mesh, read_pickled_points

    rendering(part.picture(index))
    model = part.models[index]
    if index == 0 or part.models[index - 1] != model or not part.meshes[model]:  # a mesh once
        _, path = part.surface(index)
        (read_pickled_points if path.suffix == ".dat" else read_mesh)(path)


def _line(what: str, cases: list[str]) -> list[str]:
    return [f"{counted(len(cases), what)}: {_some(cases, '; ')}"] if cases else []


def _some(cases: list[Any], between: str = ", ") -> str:
    more = f" and {len(cases) - NAMED:,} more" if len(cases) > NAMED else ""
    return between.join(map(str, cases[:NAMED])) + more
