"""Captions of pictures as files have them: found, read, checked, counted, and turned into the tokens of a vocabulary.

Formats: Chen et al., 2015, Microsoft COCO Captions, arXiv:1504.00325; Karpathy and Fei-Fei, 2015, arXiv:1412.2306,
whose ``dataset_coco.json`` is the split that published figures are of; Hodosh et al., 2013, doi:10.1613/jair.3994.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor

from datamodules.annotations import Findings
from datamodules.coco import NAMES, Files, find_pictures, load_json
from datamodules.detection import Split
from datamodules.reading import some

SPLITS: tuple[Split, ...] = ("train", "val", "test")
SPECIAL = ["<NULL>", "<START>", "<END>", "<UNK>"]  # their places are the ids 0 to 3 of every vocabulary
NULL, START, END, UNK = range(4)
ONE_FILE = ("dataset*.json", "annotations/dataset*.json", "*token.txt", "*.token")  # with the captions of all splits
LISTS: dict[Split, str] = {
    "train": "*trainImages.txt",
    "val": "*devImages.txt",
    "test": "*testImages.txt",
}  # as Flickr8k names them
FOLDERS = ("", "images", "Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k_images", "flickr30k-images")
KARPATHY: dict[str, Split] = {"train": "train", "restval": "train", "val": "val", "test": "test"}
LAYOUT = (
    "expected <root>/annotations/captions_train*.json with the pictures in <root>/train* or <root>/images, or "
    "<root>/dataset_*.json, or <root>/*token.txt; or name the files, by train_json or captions"
)


# Words


def tokenize(caption: str) -> list[str]:
    """The words of a caption: lower case, of letters, digits and apostrophes inside a word; all else is dropped."""
    # A model has these lines too, in zoo/: what reads data and what learns from it never import each other.
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", caption.lower().replace("’", "'"))


def vocabulary(captions: Iterable[str], min_count: int) -> list[str]:
    """The special words, then those that occur ``min_count`` times: the most frequent first, ties in the alphabet's."""
    counts = Counter(word for caption in captions for word in tokenize(caption))
    kept = (word for word, count in counts.items() if count >= min_count)
    return SPECIAL + sorted(kept, key=lambda word: (-counts[word], word))


def checked_words(words: list[str]) -> list[str]:
    """A vocabulary that was given.

    Raises:
        ValueError: It does not begin with the special words, or a word occurs twice or is none.
    """
    if list(words[: len(SPECIAL)]) != SPECIAL:
        raise ValueError(f"words begins with {list(words[: len(SPECIAL)])}, expected {SPECIAL} and then words")
    wrong = [word for word, count in Counter(words).items() if count > 1 or not isinstance(word, str) or not word]
    if wrong:
        raise ValueError(f"words has {wrong[0]!r}, which is no word or occurs twice: a word's place in it is its id")
    return list(words)


# Pictures and their captions


class CaptionedPictures:
    """Pictures and their captions by index.

    Args:
        folder: Folder that the names start from.
        names: Files, bytes (N,).
        numbers: The pictures' ids as the file has them, int64 (N,).
        captions: The captions of each picture, one at least.

    Attributes:
        tokens: All captions, int64 (A, max_length + 2), picture by picture; empty before :meth:`encode`.
        images: One row for each picture: uint8 (N, 3, size, size), or what stands for it, such as features of an
            encoder; None reads pictures from their files.
    """

    def __init__(self, folder: Path, names: np.ndarray, numbers: np.ndarray, captions: list[list[str]]) -> None:
        self.folder = folder
        self.names = names
        self.numbers = numbers
        self.captions = captions
        self.tokens = torch.empty(0, 0, dtype=torch.int64)
        self.images: Tensor | None = None
        self._lengths = np.zeros(0, dtype=np.int64)  # words of each caption, before it was cut

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """The file of a picture."""
        return self.folder / os.fsdecode(self.names[index])

    def take(self, indices: np.ndarray) -> "CaptionedPictures":
        """Some of the pictures, with their tokens and images if they have any."""
        captions = [self.captions[index] for index in indices.tolist()]
        taken = CaptionedPictures(self.folder, self.names[indices], self.numbers[indices], captions)
        if self.images is not None:
            taken.images = self.images[torch.from_numpy(indices)]
        if len(self.tokens):
            starts = np.cumsum([0, *map(len, self.captions)])
            rows = np.concatenate([np.arange(starts[index], starts[index + 1]) for index in indices.tolist()])
            taken.tokens, taken._lengths = self.tokens[torch.from_numpy(rows)], self._lengths[rows]
        return taken

    def draw(self, count: int, seed: int) -> "CaptionedPictures":
        """So many of the captions, drawn without replacement, and the pictures that have one of them.

        Raises:
            ValueError: There are not so many.
        """
        places = [(picture, place) for picture, texts in enumerate(self.captions) for place in range(len(texts))]
        if count > len(places):
            raise ValueError(
                f"train_captions={count} asks for more captions than the {len(places)} of the training pictures"
            )
        kept: dict[int, list[str]] = {}
        for index in np.sort(np.random.default_rng(seed).permutation(len(places))[:count]).tolist():
            picture, place = places[index]
            kept.setdefault(picture, []).append(self.captions[picture][place])
        drawn = self.take(np.array(list(kept), dtype=np.int64))
        drawn.captions = list(kept.values())
        return drawn

    def fingerprint(self) -> str:
        """What stays the same as long as these are the same files and captions in the same order."""
        digest = hashlib.sha256(b"\0".join(self.names.tolist()))
        digest.update("\0".join("\1".join(texts) for texts in self.captions).encode(errors="replace"))
        return digest.hexdigest()[:16]

    def encode(self, words: list[str], max_length: int) -> None:
        """Make ``tokens`` of the captions."""
        ids = {word: number for number, word in enumerate(words) if number >= len(SPECIAL)}
        coded = [[ids.get(word, UNK) for word in tokenize(text)] for texts in self.captions for text in texts]
        rows = [[START, *caption[:max_length], END] for caption in coded]
        padded = [row + [NULL] * (max_length + 2 - len(row)) for row in rows]
        self.tokens = torch.from_numpy(np.array(padded, dtype=np.int64).reshape(-1, max_length + 2))
        self._lengths = np.array([len(caption) for caption in coded], dtype=np.int64)

    def samples(self) -> tuple[Tensor, Tensor]:
        """For each caption the index of its picture, int64 (A,), and its tokens."""
        counts = torch.tensor([len(texts) for texts in self.captions])
        return torch.repeat_interleave(torch.arange(len(self)), counts), self.tokens

    def firsts(self) -> tuple[Tensor, Tensor]:
        """Each picture's index, int64 (N,), and the tokens of its first caption."""
        counts = torch.tensor([len(texts) for texts in self.captions])
        return torch.arange(len(self)), self.tokens[counts.cumsum(0) - counts]

    def summary(self, max_length: int) -> str:
        """Their number, that of their captions, and how much of these is lost."""
        counts = [len(texts) for texts in self.captions]
        unknown = int((self.tokens == UNK).sum()) / max(1, int((self.tokens >= UNK).sum()))
        each = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        return (
            f"{len(self):,} pictures, {sum(counts):,} captions ({each} each, {self._lengths.mean():.1f} words on "
            f"average), {int((self._lengths > max_length).sum()):,} of them cut to {max_length} words; "
            f"{unknown:.1%} of the words are not in the vocabulary"
        )


class Found(NamedTuple):
    """A picture as a file has it: its name below the folder of pictures, its number and its captions."""

    name: str
    number: int
    captions: list[str]


def collect(folder: Path, found: list[Found], findings: Findings) -> CaptionedPictures:
    """Put pictures together, without captions that have no words, and pictures that are missing or have no captions."""
    listings: dict[Path, set[str]] = {}  # to ask for each of 118,000 files takes minutes on a network's disk
    kept = []
    for picture in found:
        file = folder / picture.name
        if file.parent not in listings:
            listings[file.parent] = set(os.listdir(file.parent)) if file.parent.is_dir() else set()
        captions = [caption for caption in picture.captions if any(map(str.isalnum, caption))]
        findings.count("captions without words left out", len(picture.captions) - len(captions))
        if not captions:
            findings.note("pictures without captions left out", picture.name)
        elif file.name not in listings[file.parent]:
            findings.refuse("pictures that are missing", f"the picture {file} has captions, but it is not there")
        else:
            kept.append(Found(picture.name, picture.number, captions))
    names = np.array([os.fsencode(picture.name) for picture in kept], dtype=np.bytes_)
    numbers = np.array([picture.number for picture in kept], dtype=np.int64)
    return CaptionedPictures(folder, names, numbers, [picture.captions for picture in kept])


# Files


def find_files(
    root: Path, jsons: dict[Split, str | None], folders: dict[Split, str | None], captions: str | None
) -> dict[Split, Files] | Path:
    """The json files of each split with the folders of their pictures, or the one file for all splits.

    Raises:
        FileNotFoundError: ``root`` is no folder, or what is named is missing.
        ValueError: There are no captions for training, or several files with them.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root.absolute()}: {LAYOUT}")
    if captions is not None and any(jsons.values()):
        raise ValueError("captions names one file for all splits, train_json and so on one for each: name either")
    if captions is not None:
        return existing(root, captions, "captions") or root
    found = {} if jsons["train"] else {split: _find_json(root, split) for split in SPLITS}
    found |= {split: existing(root, name, f"{split}_json") for split, name in jsons.items() if name}
    if found["train"] is None:
        return _find_one_file(root)
    return {
        split: Files(path, find_pictures(root, split, path, folders[split]))
        for split in SPLITS
        if (path := found.get(split)) is not None
    }


def _find_json(root: Path, split: str) -> Path | None:
    patterns = [f"{folder}captions_{name}*.json" for folder in ("annotations/", "") for name in NAMES[split]]
    return _only(root, patterns, f"name one by {split}_json")


def _find_one_file(root: Path) -> Path:
    found = _only(root, list(ONE_FILE), "name one by captions")
    if found is None:
        raise ValueError(f"{root} has no captions for training: {LAYOUT}")
    return found


def find_lists(root: Path, captions: Path, named: dict[Split, str | None]) -> dict[Split, Path]:
    """The lists of the pictures of each split that lie beside a token file or are named.

    Raises:
        FileNotFoundError: One that is named is missing.
    """
    found: dict[Split, Path | None] = {}
    if not any(named.values()):
        found = {
            split: _only(captions.parent, [pattern], f"name one by {split}_list") for split, pattern in LISTS.items()
        }
    found |= {split: existing(root, name, f"{split}_list") for split, name in named.items() if name}
    return {split: path for split, path in found.items() if path is not None}


def find_pictures_beside(root: Path, captions: Path, found: "dict[Split, list[Found]]") -> Path:
    """The folder that the names in a file of all splits start from: the first usual one where one of them is."""
    names = [picture.name for pictures in found.values() for picture in pictures[:20]]
    candidates = [folder for folder in [*(root / name for name in FOLDERS), captions.parent] if folder.is_dir()]
    return next((folder for folder in candidates if any(os.path.isfile(folder / name) for name in names)), root)


def _only(folder: Path, patterns: list[str], advice: str) -> Path | None:
    """The file that has the first of these names that there is."""
    for pattern in patterns:
        found = sorted(path for path in folder.glob(pattern) if ".lemma." not in path.name)  # Flickr8k's second file
        if len(found) > 1:
            raise ValueError(f"{folder} has several files: {some([path.name for path in found])}; {advice}")
        if found:
            return found[0]
    return None


def existing(root: Path, name: str | None, argument: str, folder: bool = False) -> Path | None:
    """What an argument names, which must be there."""
    if name is None:
        return None
    path = root / Path(name).expanduser()
    if not (path.is_dir() if folder else path.is_file()):
        kind = "folder" if folder else "file"
        raise FileNotFoundError(f"there is no {kind} {path.absolute()}, which {argument} names")
    return path


# Formats


def read_coco_captions(path: Path, findings: Findings) -> list[Found]:
    """Read a captions json in COCO's format.

    Args:
        path: The file.
        findings: Is told what is wrong.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: It has another format, or an entry makes no sense and ``findings`` does not skip; the message names
            the file.
    """
    content = load_json(path, ("images", "annotations"))
    pictures: dict[int, Found] = {}
    for entry in content["images"]:
        number, name = _values(entry, "id", "file_name")
        if not _is_id(number) or not isinstance(name, str) or not name:
            message = f"{path}: a picture is {short(entry)}, expected a whole number id and a file_name"
            findings.refuse("pictures that make no sense", message)
        elif number in pictures:
            message = f"{path}: two pictures have the id {number}, {pictures[number].name} and {name}"
            findings.refuse("ids that occur twice", message)
        else:
            pictures[number] = Found(name, number, [])
    for entry in content["annotations"]:
        number, caption = _values(entry, "image_id", "caption")
        if not isinstance(caption, str):
            message = f"{path}: an annotation is {short(entry)}, expected a caption and the image_id of its picture"
            findings.refuse("captions that make no sense", message)
        elif not _is_id(number) or number not in pictures:
            message = f"{path}: the caption {caption!r} is of picture {short(number)}, which is not among the images"
            findings.refuse("captions of unknown pictures", message)
        else:
            pictures[number].captions.append(caption)
    return list(pictures.values())


def read_karpathy(path: Path, restval: bool, findings: dict[Split, Findings]) -> dict[Split, list[Found]]:
    """Read a json file of Karpathy's, in which each picture says its split.

    Args:
        path: The file.
        restval: Whether the pictures of that split are trained on, or left out.
        findings: Are told what is wrong with each split; what says none is told to training.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: It has another format, or an entry makes no sense and ``findings`` do not skip; the message names
            the file.
    """
    found: dict[Split, list[Found]] = {"train": []}
    for place, entry in enumerate(load_json(path, ("images",))["images"]):
        name, folder, split, sentences = _values(entry, "filename", "filepath", "split", "sentences")
        captions = [_sentence(sentence) for sentence in sentences] if isinstance(sentences, list) else [None]
        whose = KARPATHY.get(split, "train") if isinstance(split, str) else "train"
        named = isinstance(name, str) and name and isinstance(folder, str | None)
        if not named or not isinstance(split, str) or split not in KARPATHY or None in captions:
            message = f"{path}: a picture is {short(entry)}, expected a filename, a split ({', '.join(KARPATHY)}) and "
            message += "sentences that have raw or tokens. (A file in COCO's own format is named by train_json)"
            findings[whose].refuse("pictures that make no sense", message)
        elif split == "restval" and not restval:
            findings["train"].count("pictures of restval left out", 1)
        else:
            number = next((n for n in _values(entry, "cocoid", "imgid") if _is_id(n)), place)
            picture = Found(os.path.join(folder or "", name), number, [text for text in captions if text is not None])
            found.setdefault(whose, []).append(picture)
    return found


def _is_id(value: Any) -> TypeGuard[int]:
    return type(value) is int and abs(value) < 2**63


def _sentence(entry: Any) -> str | None:
    raw, tokens = _values(entry, "raw", "tokens")
    if raw is None and isinstance(tokens, list):
        raw = " ".join(str(token) for token in tokens)
    return raw if isinstance(raw, str) else None


def _values(entry: Any, *keys: str) -> list[Any]:
    """What an entry of a json file has under these keys; None where it has nothing or is no object."""
    return [entry.get(key) if isinstance(entry, dict) else None for key in keys]


def read_token_file(path: Path, lists: dict[Split, Path], findings: dict[Split, Findings]) -> dict[Split, list[Found]]:
    """Read lines ``name.jpg#0<tab>caption``.

    Args:
        path: The file.
        lists: Files with the names of each split's pictures; without one for training, it gets those on no list.
        findings: Are told what is wrong with each split; what has none is told to training.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is no text, or a line makes no sense and ``findings`` do not skip; the message names it.
    """
    pictures: dict[str, Found] = {}
    for number, line in enumerate(_lines(path), start=1):
        name, tab, caption = line.partition("\t")
        name, mark, _ = name.rpartition("#")
        if tab and mark and name:
            pictures.setdefault(name, Found(name, len(pictures), [])).captions.append(caption)
        elif line.strip():
            message = f"{path}, line {number} is {short(line)}, expected name.jpg#0, a tab and a caption"
            findings["train"].refuse("lines that make no sense", message)
    splits = _splits(lists, findings)
    found: dict[Split, list[Found]] = {split: [] for split in ("train", *lists)}
    for name, split in splits.items():
        found[split].append(pictures.pop(name, Found(name, -1, [])))
    if "train" in lists:
        findings["train"].count("pictures on no list left out", len(pictures))
    else:
        found["train"] = list(pictures.values())
    return found


def _splits(lists: dict[Split, Path], findings: dict[Split, Findings]) -> dict[str, Split]:
    """The split of each picture that is on a list."""
    splits: dict[str, Split] = {}
    for split, path in lists.items():
        for name in (line.strip() for line in _lines(path)):
            if splits.get(name, split) != split:
                message = f"{path} names {name}, which is on the list for {splits[name]} too"
                findings[split].refuse("pictures on two lists", message)
            elif name:
                splits[name] = split
    return splits


def _lines(path: Path) -> list[str]:
    try:
        return path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}): fetch or write it again") from error
