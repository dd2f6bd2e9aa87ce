"""Pictures with captions: COCO's json files, Karpathy's split of them, and token files as of Flickr8k and Flickr30k.

Pictures stay uint8 until they are on the device that trains. What an epoch's order is follows from seed and epoch
alone, neither from the number of workers nor from where a run was interrupted.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.annotations import Findings
from datamodules.caption_files import (
    SPECIAL,
    SPLITS,
    CaptionedPictures,
    checked_words,
    collect,
    existing,
    find_files,
    find_lists,
    find_pictures_beside,
    read_coco_captions,
    read_karpathy,
    read_token_file,
    vocabulary,
)
from datamodules.coco import Files
from datamodules.detection import CACHE_BYTES, Split
from datamodules.pictures import Picture, resize
from datamodules.reading import (
    AheadLoader,
    KeptPictures,
    problems_of_all,
    processors,
    read_each,
    warn_of_unreadable,
)
from datamodules.sampling import EvaluationBatches, TrainingBatches, split_at_random, training_batches


class COCOCaptionsDataModule(LightningDataModule):
    """Batches ``(images, tokens)`` of pictures and captions; in evaluation ``(images, tokens, references)``.

    After the transfer ``images`` is float32 (N, 3, size, size) in [0, 1]. ``tokens`` is int64 (N, max_length + 2):
    ``<START>``, words, ``<END>``, then ``<NULL>``; a word's id is its place in ``words``. A training sample is a
    picture with one of its captions, so that a picture with five is seen five times an epoch. An evaluation goes over
    each picture once: ``tokens`` is its first caption, ``references`` a list of N lists with all of its captions as
    the file has them.

    Pictures are resized to a square whatever their shape was, not cropped, since a caption may speak of what is at the
    edge: bilinear, antialiased, turned upright by their EXIF orientation.

    Captions are read from one of these, the first that there is:

    - COCO's ``annotations/captions_train*.json`` and ``captions_val*.json``, or files named by ``train_json``, …;
    - Karpathy's ``dataset_coco.json`` (also his ``dataset_flickr8k.json`` and ``dataset_flickr30k.json``);
    - a token file of lines ``name.jpg#0<tab>caption``, whose pictures ``*trainImages.txt``, ``*devImages.txt`` and
      ``*testImages.txt`` split where they are, one name a line. Pictures on no list are then left out.

    Captions without words and pictures without captions are left out and counted. An entry that makes no sense (an
    unknown picture, an id that occurs twice, a caption that is no text, a file that is missing) is an error that names
    it, or is left out under ``corrupt: skip``; the report counts all of it.

    Args:
        root: Folder of the set. Other paths are relative to it, or absolute.
        train_json: File with the training captions, in COCO's format.
        train_images: Folder with the training pictures.
        val_json: File with the captions for validation.
        val_images: Folder with the pictures for validation.
        test_json: File with the captions for testing.
        test_images: Folder with the pictures for testing.
        captions: One file with the captions of all splits: Karpathy's json, or a token file.
        images: Folder that the names in ``captions`` start from.
        train_list: File with the names of the training pictures of a token file.
        val_list: Likewise for validation.
        test_list: Likewise for testing.
        restval: Train also on what Karpathy's split calls ``restval``, as published figures do.
        words: The vocabulary, such as a checkpoint's; its first four are ``<NULL>``, ``<START>``, ``<END>``, ``<UNK>``.
            None makes it from the training captions, the most frequent word first.
        min_count: Words that occur less often in the training captions become ``<UNK>``.
        max_length: Words of a caption that are kept.
        size: Side of the images in pixels.
        batch_size: Samples of a global training batch: all processes together.
        eval_batch_size: Pictures per process in validation, test and prediction.
        val_size: Pictures held out of training for validation where the set has none of its own: their number, or
            below 1 their share. 0 trains without validation.
        test_size: Likewise for testing. Where there are none the validation pictures are tested on.
        train_captions: So many captions of the training pictures, drawn with ``split_seed``, with the pictures that
            they belong to; the course's assignment takes 10,000. None takes all.
        split_seed: Seed of that split, apart from the run's seed so that runs compare.
        corrupt: Stop at what makes no sense or cannot be read (``refuse``), or leave it out (``skip``): all pictures
            are then read once before the first batch, and the same are left out on every process.
        cache: Keep the resized pictures in memory, in each training process. None does so where those of a split need
            no more than 1 GiB.
        workers: Processes that read pictures, for each process that trains; 0 reads them in that one. None means as
            many as the machine has processors, but not more than 4.

    Raises:
        FileNotFoundError: ``root`` is no folder, or a named file is missing.
        ValueError: No captions are found, or a number is out of range.
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
        captions: str | None = None,
        images: str | None = None,
        train_list: str | None = None,
        val_list: str | None = None,
        test_list: str | None = None,
        restval: bool = True,
        words: list[str] | None = None,
        min_count: int = 5,
        max_length: int = 15,
        size: int = 224,
        batch_size: int = 64,
        eval_batch_size: int = 64,
        val_size: int | float = 0.1,
        test_size: int | float = 0,
        train_captions: int | None = None,
        split_seed: int = 0,
        corrupt: Literal["refuse", "skip"] = "refuse",
        cache: bool | None = None,
        workers: int | None = None,
    ) -> None:
        super().__init__()
        self.root = Path(root).expanduser()
        self.restval = restval
        self.min_count = min_count
        self.max_length = max_length
        self.size = size
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_size = val_size
        self.test_size = test_size
        self.train_captions = train_captions
        self.split_seed = split_seed
        self.corrupt = corrupt
        self.cache = cache
        self.workers = min(4, processors()) if workers is None else workers
        self._words = None if words is None else checked_words(words)
        self._check_arguments()
        jsons: dict[Split, str | None] = {"train": train_json, "val": val_json, "test": test_json}
        folders: dict[Split, str | None] = {"train": train_images, "val": val_images, "test": test_images}
        lists: dict[Split, str | None] = {"train": train_list, "val": val_list, "test": test_list}
        self.files: dict[Split, Files] | Path
        self.lists: dict[Split, Path] = {}
        self._find(jsons, folders, lists, captions, images)
        self.train_set: CaptionedPictures | None = None
        self.val_set: CaptionedPictures | None = None
        self.test_set: CaptionedPictures | None = None
        self._own: dict[Split, CaptionedPictures] = {}  # what the files have, before any picture was opened
        self._parts: dict[Split, CaptionedPictures] = {}  # likewise, of the training pictures
        self._findings: dict[Split, Findings] = {}
        self._split = ""

    def _find(
        self,
        jsons: dict[Split, str | None],
        folders: dict[Split, str | None],
        lists: dict[Split, str | None],
        captions: str | None,
        images: str | None,
    ) -> None:
        """Set ``files``, ``images`` and ``lists``; what writes its files itself says here where they will be."""
        self.files = find_files(self.root, jsons, folders, captions)
        self.images = existing(self.root, images, "images", folder=True)
        if isinstance(self.files, dict):
            _refuse_unused({"images": images, **_arguments("list", lists)}, self.files["train"].annotations)
        elif self.files.suffix == ".json":
            _refuse_unused(_arguments("images", folders) | _arguments("list", lists), self.files)
        else:
            _refuse_unused(_arguments("images", folders), self.files)
            self.lists = find_lists(self.root, self.files, lists)

    @property
    def evaluation(self) -> dict[str, int]:
        """How an evaluation makes an image of a picture: a square of that side, whatever its shape was."""
        return {"size": self.size}

    @property
    def words(self) -> list[str]:
        """The vocabulary: a word's place is its id, the first four are special. Reads the captions if need be.

        It is made from the captions that are listed for training, those of pictures that turn out to be unreadable
        among them, so that it is the same before :meth:`setup` and after.
        """
        if self._words is None:
            captions = (text for texts in self._listed("train").captions for text in texts)
            words = vocabulary(captions, self.min_count)
            if len(words) == len(SPECIAL):
                raise ValueError(f"no word of the training captions occurs min_count={self.min_count} times: lower it")
            self._words = words
        return self._words

    def setup(self, stage: str) -> None:
        """Read captions and pictures, split them alike on every process, and print the report.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: An entry makes no sense or a picture cannot be read, or there is nothing to train or test on.
        """
        known = self._ready()
        if stage == "fit" and self.train_set is None:
            self.train_set = self._prepare("train")
            self._split = self.train_set.fingerprint()
        no_test = stage in ("test", "predict") and not self._has_test()
        if (stage in ("fit", "validate") or no_test) and self.val_set is None and self.val_size:
            self.val_set = self._prepare("val")
        if stage in ("test", "predict") and self.test_set is None:
            self.test_set = self._validation_as_test() if no_test else self._prepare("test")
        if new := [split for split in self._ready() if split not in known]:
            rank_zero_info("\n".join(self._report_of(split) for split in new))

    def report(self) -> str:
        """How many pictures and captions each split has that was read so far, and what was left out and why."""
        return "\n".join(self._report_of(split) for split in self._ready())

    def train_dataloader(self) -> "CaptionLoader":
        """Shuffled training batches; the order follows the run's seed, and is fixed under ``overfit_batches``."""
        pictures = _set_up(self.train_set)
        batches = training_batches(self.trainer, len(pictures.tokens), self.batch_size, self._split)
        return self._loader(pictures, pictures.samples(), batches, references=False)

    def val_dataloader(self) -> "CaptionLoader | list[CaptionLoader]":
        """Validation batches, each picture once over all processes; none where ``val_size`` is 0."""
        return self._evaluation_loader(self.val_set) if self.val_size else []

    def test_dataloader(self) -> "CaptionLoader":
        """Test batches, each picture once over all processes."""
        return self._evaluation_loader(self.test_set)

    def predict_dataloader(self) -> "CaptionLoader":
        """The test pictures, in order."""
        return self._evaluation_loader(self.test_set)

    def evaluation_dataloader(self, split: Split) -> "CaptionLoader":
        """All pictures of a split in order, on each process, as an evaluation sees them: also those of training."""
        pictures = _set_up(self._set(split))
        batches = EvaluationBatches(len(pictures), self.eval_batch_size)
        return self._loader(pictures, pictures.firsts(), batches, references=True)

    def fingerprint(self, split: Split) -> str:
        """A text that changes when a picture of a split, its captions, or what becomes of them changes."""
        pictures = _set_up(self._set(split))
        parts = (self.picture_fingerprint(split), pictures.fingerprint(), self.max_length, self.words)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def picture_fingerprint(self, split: Split) -> str:
        """A text that changes when the pictures of a split, their order or size changes, whatever their captions."""
        pictures = _set_up(self._set(split))
        digest = hashlib.sha256(f"{self.size}".encode())
        for index in range(len(pictures)):
            file = os.stat(pictures.path(index))
            digest.update(pictures.names[index] + f" {file.st_size} {file.st_mtime_ns} ".encode())
        return digest.hexdigest()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move images and tokens; references stay texts, through all of which Lightning would walk."""
        if not _is_batch(batch):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        images, tokens, *references = batch
        return (images.to(device, non_blocking=True), tokens.to(device, non_blocking=True), *references)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn uint8 images into float32 in [0, 1]; features stay as they are."""
        # What is no batch is a model's example_input_array, on its way through Lightning's summary.
        if not _is_batch(batch) or batch[0].dtype != torch.uint8:
            return batch
        images, *rest = batch
        return (images.float().div_(255), *rest)

    def _check_arguments(self) -> None:
        least = {"min_count": 1, "max_length": 1, "size": 1, "eval_batch_size": 1, "workers": 0}
        for name, value in (least | {"val_size": 0, "test_size": 0}).items():
            if getattr(self, name) < value:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {value}")
        if self.train_captions is not None and self.train_captions < 1:
            raise ValueError(f"train_captions={self.train_captions} must be at least 1, or null for all")
        if self.corrupt not in ("refuse", "skip"):
            raise ValueError(f"corrupt={self.corrupt!r} must be refuse or skip")

    def _place(self) -> tuple[int, int]:
        """Rank and number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _set(self, split: Split) -> CaptionedPictures | None:
        return {"train": self.train_set, "val": self.val_set, "test": self.test_set}[split]

    def _ready(self) -> dict[Split, CaptionedPictures]:
        """The splits that were read so far; the validation pictures once, if they are tested on."""
        sets: dict[Split, CaptionedPictures | None] = {"train": self.train_set, "val": self.val_set}
        sets |= {} if self.test_set is self.val_set else {"test": self.test_set}
        return {split: pictures for split, pictures in sets.items() if pictures is not None}

    def check_samples(self, files: bool = True) -> list[str]:
        """What is wrong: with ``files`` after reading every file, else as far as what :meth:`setup` read tells."""
        from datamodules.checking import check  # it knows all data modules

        return check(self, self._everything, files)

    def _everything(self) -> tuple[dict[str, Any], list[str]]:
        """All pictures, and what was wrong with their captions."""
        wanted: dict[Split, bool] = {"train": True, "val": self.val_size > 0, "test": self._has_test()}
        parts: dict[str, Any] = {split: self._listed(split) for split in wanted if wanted[split]}
        return parts, [line for split, findings in self._findings.items() for line in findings.wrong(split)]

    def _report_of(self, split: Split) -> str:
        lines = [f"{split}: {self._ready()[split].summary(self.max_length)}", *self._findings[split].lines()]
        if split == "train":
            lines.insert(1, f"{len(self.words):,} words in the vocabulary, {len(SPECIAL)} special ones among them")
        return "\n  ".join(lines)

    def _has_test(self) -> bool:
        return self.test_size > 0 or self._has("test")

    def _has(self, split: Split) -> bool:
        """Whether the files have such a split."""
        if isinstance(self.files, Path):
            self._read("train")
            return split in self._own
        return split in self.files

    def _validation_as_test(self) -> CaptionedPictures:
        if not self.val_size:
            raise ValueError("there is nothing to test on: the data has no test pictures, and test_size is 0")
        rank_zero_info("the data has no test pictures and test_size is 0: these are the validation pictures")
        return _set_up(self.val_set)

    # Captions

    def _read(self, split: Split) -> CaptionedPictures:
        """The pictures that the files have for a split, before any is opened; a file of all splits is read once."""
        if split not in self._own:
            for name in SPLITS if isinstance(self.files, Path) else (split,):
                self._findings[name] = Findings(self.corrupt == "skip")
            if isinstance(self.files, Path):
                self._own = self._read_one_file(self.files)
            else:
                found = read_coco_captions(self.files[split].annotations, self._findings[split])
                self._own[split] = collect(self.files[split].pictures, found, self._findings[split])
        return self._own[split]

    def _read_one_file(self, path: Path) -> dict[Split, CaptionedPictures]:
        if path.suffix == ".json":
            found = read_karpathy(path, self.restval, self._findings)
        else:
            found = read_token_file(path, self.lists, self._findings)
        folder = self.images or find_pictures_beside(self.root, path, found)
        return {split: collect(folder, pictures, self._findings[split]) for split, pictures in found.items()}

    def _listed(self, split: Split) -> CaptionedPictures:
        """The pictures of a split, before any is opened."""
        if split != "train" and self._has(split):
            return self._read(split)
        if not self._parts:
            self._parts = self._split_training(self._read("train"))
        return self._parts[split]

    def _split_training(self, pictures: CaptionedPictures) -> dict[Split, CaptionedPictures]:
        val, test = (0 if self._has("val") else self.val_size, 0 if self._has("test") else self.test_size)
        parts = split_at_random(len(pictures), val, test, self.split_seed)
        taken = {split: pictures.take(chosen) for split, chosen in parts.items()}
        if self.train_captions is not None:
            taken["train"] = taken["train"].draw(self.train_captions, self.split_seed)
        return taken

    # Pictures

    def _prepare(self, split: Split) -> CaptionedPictures:
        """The pictures of a split; read once where that is asked for, without those that cannot be read."""
        pictures = self._listed(split)
        findings = self._findings.setdefault(split, Findings(self.corrupt == "skip"))
        cache = 3 * self.size**2 * len(pictures) <= CACHE_BYTES if self.cache is None else self.cache
        if len(pictures) and (cache or self.corrupt == "skip"):
            pictures = self._read_once(pictures, split, cache)
        if not len(pictures):
            raise ValueError(f"there are no pictures in split {split}. {'; '.join(findings.lines())}".rstrip())
        pictures.encode(self.words, self.max_length)
        return pictures

    def _read_once(self, pictures: CaptionedPictures, split: Split, cache: bool) -> CaptionedPictures:
        rank, world_size = self._place()
        mine = range(len(pictures)) if cache else range(rank, len(pictures), world_size)
        reader = Squares(pictures.folder, pictures.names, self.size if cache else 0)
        problems, kept = read_each(reader.read, len(pictures), mine, cache, self.workers if len(mine) > 200 else 0)
        problems = problems_of_all(problems, world_size, self.corrupt == "refuse")
        good = np.delete(np.arange(len(pictures)), list(problems))
        for problem in problems.values():
            self._findings[split].note("pictures that cannot be read", problem)
        warn_of_unreadable(list(problems.values()), len(pictures), split)
        remaining = pictures.take(good)
        remaining.images = None if kept is None else stacked(kept, good, self.size)
        return remaining

    def _evaluation_loader(self, pictures: CaptionedPictures | None) -> "CaptionLoader":
        pictures = _set_up(pictures)
        batches = EvaluationBatches(len(pictures), self.eval_batch_size, *self._place())
        return self._loader(pictures, pictures.firsts(), batches, references=True)

    def _loader(
        self,
        pictures: CaptionedPictures,
        samples: tuple[Tensor, Tensor],
        batches: TrainingBatches | EvaluationBatches,
        references: bool,
    ) -> "CaptionLoader":
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return CaptionLoader(pictures, samples, batches, references, self.size, self.workers, pin_memory=on_gpu)


def _arguments(kind: str, by_split: dict[Split, str | None]) -> dict[str, str | None]:
    return {f"{split}_{kind}": name for split, name in by_split.items()}


def _refuse_unused(arguments: dict[str, str | None], path: Path) -> None:
    if named := [argument for argument, name in arguments.items() if name]:
        raise ValueError(f"{named[0]} has no use with {path}, where captions are read from")


def _set_up(value: CaptionedPictures | None) -> CaptionedPictures:
    if value is None:
        raise RuntimeError("call COCOCaptionsDataModule.setup() before asking for its batches")
    return value


def _is_batch(batch: Any) -> bool:
    return isinstance(batch, tuple) and len(batch) in (2, 3) and all(isinstance(part, Tensor) for part in batch[:2])


# Reading pictures


class Squares(Dataset):
    """Pictures resized to squares, as one batch: what a worker process does.

    A job is ``(seed, epoch, indices)``; its result is uint8 (N, 3, size, size), or its error.

    Args:
        folder: Folder that the names start from.
        names: Files, bytes (N,).
        size: Side of the squares; 0 only tries to read a picture.
        pictures: The index of each sample's picture; None means that samples are pictures.
    """

    def __init__(self, folder: Path, names: np.ndarray, size: int, pictures: np.ndarray | None = None) -> None:
        self.folder = folder
        self.names = names
        self.size = size
        self.pictures = np.arange(len(names)) if pictures is None else pictures

    def __getitems__(self, job: tuple[int, int, list[int]]) -> Tensor | Exception:
        _, _, indices = job
        images = torch.empty(len(indices), 3, self.size, self.size, dtype=torch.uint8)
        try:
            for row, index in enumerate(self.pictures[indices].tolist()):
                images[row] = self.read(index)
        except (OSError, ValueError) as error:  # raised by the loader: from here it would come wrapped in a traceback
            return error
        return images

    def read(self, index: int) -> Tensor:
        """A picture, uint8 (3, size, size).

        Raises:
            ValueError: It cannot be read as a picture; the message names its file.
            OSError: The file cannot be read.
        """
        picture = Picture(self.folder / os.fsdecode(self.names[index]))
        if not self.size:
            picture.pixels(shrink=8)
            return torch.empty(3, 0, 0, dtype=torch.uint8)
        return resize(picture.pixels(), self.size, self.size)


def stacked(kept: KeptPictures, chosen: np.ndarray, size: int) -> Tensor:
    """Some of the kept pictures as uint8 (N, 3, size, size), which takes the memory of what was kept."""
    images = torch.empty(len(chosen), 3, size, size, dtype=torch.uint8)
    piece = 0
    for row, index in enumerate(chosen.tolist()):
        if kept.places[index, 0] != piece:
            kept.pieces[piece] = torch.empty(0, dtype=torch.uint8)
            piece = int(kept.places[index, 0])
        images[row] = torch.from_numpy(kept.pixels(index)).permute(2, 0, 1)
    return images


class CaptionLoader(AheadLoader):
    """Batches ``(images, tokens)``, with ``references`` in evaluation.

    Args:
        pictures: Where from; rows of their ``images`` where there are some, else files read ahead by processes.
        samples: For each sample the index of its picture, and its tokens.
        batch_sampler: Which samples make a batch; its place is that of the last batch that was handed out.
        references: Whether a batch has the captions of its pictures too.
        size: Side of the images that are read.
        workers: Number of processes that read; 0 reads in this one.
        pin_memory: Whether to put images that are read where a GPU fetches them fastest.
    """

    def __init__(
        self,
        pictures: CaptionedPictures,
        samples: tuple[Tensor, Tensor],
        batch_sampler: TrainingBatches | EvaluationBatches,
        references: bool,
        size: int,
        workers: int,
        pin_memory: bool = False,
    ) -> None:
        squares = Squares(pictures.folder, pictures.names, size, samples[0].numpy())
        reader = squares if pictures.images is None else None
        super().__init__(samples, batch_sampler, reader, workers, pin_memory)
        self.pictures = pictures
        self.references = references

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        if self.pictures.images is None:
            for images, (rows, tokens) in self.read():
                yield self._batch(images, rows, tokens)
            return
        for rows, tokens in super().__iter__():
            yield self._batch(self.pictures.images[rows], rows, tokens)

    def _batch(self, images: Tensor, rows: Tensor, tokens: Tensor) -> tuple[Any, ...]:
        if not self.references:
            return images, tokens
        return images, tokens, [self.pictures.captions[row] for row in rows.tolist()]
