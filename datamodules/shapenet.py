"""ShapeNet's models and their renderings, as Pixel2Mesh learns from them: a picture, and the points that it shows.

Sources: Chang et al., 2015, ShapeNet, arXiv:1512.03012; Choy et al., 2016, 3D-R2N2, arXiv:1604.00449, whose renderings
these are; Wang et al., 2018, Pixel2Mesh, arXiv:1804.01654.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.annotations import Findings
from datamodules.captions import stacked
from datamodules.detection import CACHE_BYTES
from datamodules.pictures import resize
from datamodules.reading import (
    CHUNK,
    AheadLoader,
    WholePictures,
    once,
    problems_of_all,
    processors,
    read_each,
    some,
    warn_of_unreadable,
)
from datamodules.sampling import EvaluationBatches, TrainingBatches, split_at_random, training_batches
from datamodules.shapenet_files import (
    Listed,
    Split,
    Views,
    chosen_views,
    collect,
    find_categories,
    find_folders,
    find_lists,
    read_lists,
    read_models,
)
from datamodules.surfaces import Surfaces, intrinsics, mesh_library, read_mesh, seen_from

CHECKED = 64  # views of a split whose points are held against their pictures
Batch = dict[str, Tensor]


class ShapeNetDataModule(LightningDataModule):
    """Batches of pictures of models and of the points on these, in the frame of the camera that took the picture.

    A batch is a dict, after the transfer of:

    - ``image``: float32 (N, 3, size, size) in [0, 1], on white. As in the published code a pixel is white where the
      picture is wholly transparent, and has the picture's colour where it is not;
    - ``points``: float32 (N, num_points, 3), x to the right, y up, z towards the viewer, so that what is seen has a
      negative z. Lengths are ShapeNet's by 0.57, as in the published figures;
    - ``normals``: float32 (N, num_points, 3) of length 1, of the triangle that a point is on. They point where the file
      says that its triangles are seen from, which many of ShapeNet's meshes do not say the same everywhere;
    - ``intrinsics``: float32 (N, 3, 3), which map (x / -z, -y / -z, 1) to column and row in pixels, counted from the
      middle of the first one;
    - ``category``: int64 (N,) in [0, num_classes), the place in ``class_names``.

    A sample is one view. These layouts are read:

    - ShapeNet's meshes (``ShapeNetCore.v1/<category>/<model>/model.obj``, also ``models/model_normalized.obj``) beside
      3D-R2N2's renderings (``ShapeNetRendering/<category>/<model>/rendering/00.png``, … with
      ``rendering_metadata.txt``), or both in one folder for each model. The renderings are of version 1 of the meshes;
    - Pixel2Mesh's ``ShapeNetP2M/<category>/<model>/rendering/00.png`` with ``00.dat``, which has points and normals in
      the camera's frame. These files are pickles: what is in them other than numbers is refused, and never run.

    Points are sampled from a mesh once, evenly over its surface, and kept in ``cache_folder``; they follow from the
    mesh, its name and ``points_seed`` alone. All views of a model are in one split: that of Pixel2Mesh's lists or
    ShapeNet's ``all.csv`` where they lie in ``root``, else one drawn by ``split_seed``.

    Models without a folder of renderings are left out and counted. A mesh without faces, with vertices that are not
    finite or with degenerate triangles only, a missing mesh, picture or line of metadata, and what cannot be read is an
    error that names the file, or is left out under ``corrupt: skip``; the report counts all of it. A warning says if
    many points lie outside of what their pictures show.

    Args:
        root: Folder of the set. Other paths are relative to it, or absolute.
        renderings: Folder with the renderings; None looks for it.
        meshes: Folder with the meshes; None looks for it.
        categories: Names or folders of the categories, in the order of their numbers; None takes all.
        train_list: File with the models or views for training, one a line: ``<category>/<model>``, or
            ``…/<category>/<model>/rendering/00.dat``. None looks for Pixel2Mesh's, and for ShapeNet's ``all.csv``.
        val_list: Likewise for validation.
        test_list: Likewise for testing.
        views: Take only the first so many views of a model; None takes all.
        size: Side of the images in pixels; the pictures are resized to it.
        focal_length: Of the camera, in sides of the picture. The default is Pixel2Mesh's 248 pixels for 224.
        num_points: Points of each model.
        points_seed: Seed of their places.
        cache_folder: Folder for the sampled points, relative to where the run is.
        batch_size: Views of a global training batch: all processes together.
        eval_batch_size: Views per process in validation, test and prediction.
        val_size: Models held out of training for validation where no list says which: their number, or below 1 their
            share. 0 trains without validation.
        test_size: Likewise for testing. Where there are none the validation views are tested on.
        split_seed: Seed of that split, apart from the run's seed so that runs compare.
        corrupt: Stop at what makes no sense or cannot be read (``refuse``), or leave it out (``skip``): all pictures
            are then read once before the first batch, and the same are left out on every process.
        cache: Keep pictures and points in memory, in each training process. None does so where those of a split need
            no more than 1 GiB.
        workers: Processes that read, for each process that trains; 0 reads in that one. None means as many as the
            machine has processors, but not more than 4.

    Raises:
        FileNotFoundError: ``root`` is no folder, or a named file or folder is missing.
        ValueError: No renderings are found, or a number is out of range.
    """

    def __init__(
        self,
        root: str,
        renderings: str | None = None,
        meshes: str | None = None,
        categories: list[str] | None = None,
        train_list: str | None = None,
        val_list: str | None = None,
        test_list: str | None = None,
        views: int | None = None,
        size: int = 224,
        focal_length: float = 248 / 224,
        num_points: int = 9000,
        points_seed: int = 0,
        cache_folder: str = "data/points",
        batch_size: int = 32,
        eval_batch_size: int = 32,
        val_size: int | float = 0.1,
        test_size: int | float = 0.2,
        split_seed: int = 0,
        corrupt: Literal["refuse", "skip"] = "refuse",
        cache: bool | None = None,
        workers: int | None = None,
    ) -> None:
        super().__init__()
        self.root = Path(root).expanduser()
        self.views = views
        self.size = size
        self.focal_length = focal_length
        self.num_points = num_points
        self.points_seed = points_seed
        self.cache_folder = Path(cache_folder).expanduser()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_size = val_size
        self.test_size = test_size
        self.split_seed = split_seed
        self.corrupt = corrupt
        self.cache = cache
        self.workers = min(4, processors()) if workers is None else workers
        self._check_arguments()
        self._find(renderings, meshes, categories, {"train": train_list, "val": val_list, "test": test_list})
        self.train_set: SeenSurfaces | None = None
        self.val_set: SeenSurfaces | None = None
        self.test_set: SeenSurfaces | None = None
        self._parts: dict[Split, Views] = {}  # what the folders have, before any picture or mesh was opened
        self._found = Findings(corrupt == "skip")  # of all splits
        self._findings: dict[Split, Findings] = {}
        self._split = ""

    def _find(
        self,
        renderings: str | None,
        meshes: str | None,
        categories: list[str] | None,
        lists: dict[Split, str | None],
    ) -> None:
        """Set folders, lists and categories; what writes its files itself says here what they will be."""
        self.renderings, self.meshes = find_folders(self.root, renderings, meshes)
        self.category_folders = find_categories(self.renderings, categories)
        self.lists = find_lists(self.root, lists)

    @property
    def evaluation(self) -> dict[str, int]:
        """How an evaluation makes an image of a picture: a square of that side."""
        return {"size": self.size}

    @property
    def class_names(self) -> list[str]:
        """The categories by their numbers: names of the thirteen published ones, folders of others."""
        return list(self.category_folders.values())

    @property
    def num_classes(self) -> int:
        """The number of categories."""
        return len(self.category_folders)

    def setup(self, stage: str) -> None:
        """Sample points, read pictures, split both alike on every process, and print the report.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: Something makes no sense or cannot be read, or there is nothing to train or test on.
        """
        known = self._ready()
        if stage == "fit" and self.train_set is None:
            self.train_set = self._prepare("train")
            self._split = f"{self.train_set.views.fingerprint()} {self.num_points} points"
        no_test = stage in ("test", "predict") and not self._has("test")
        if (stage in ("fit", "validate") or no_test) and self.val_set is None and self._has("val"):
            self.val_set = self._prepare("val")
        if stage in ("test", "predict") and self.test_set is None:
            self.test_set = self._validation_as_test() if no_test else self._prepare("test")
        if new := [split for split in self._ready() if split not in known]:
            general = [] if known else self._found.lines()
            rank_zero_info("\n".join([*general, *(self._report_of(split) for split in new)]))

    def report(self) -> str:
        """How many models and views each split has that was read so far, and what was left out and why."""
        return "\n".join([*self._found.lines(), *(self._report_of(split) for split in self._ready())])

    def train_dataloader(self) -> "MeshLoader":
        """Shuffled training batches; the order follows the run's seed, and is fixed under ``overfit_batches``."""
        seen = _set_up(self.train_set)
        batches = training_batches(self.trainer, len(seen.views), self.batch_size, self._split)
        return self._loader(seen, batches)

    def val_dataloader(self) -> "MeshLoader | list[MeshLoader]":
        """Validation batches, each view once over all processes; none where there are no models for it."""
        return self._evaluation_loader(self.val_set) if self._has("val") else []

    def test_dataloader(self) -> "MeshLoader":
        """Test batches, each view once over all processes."""
        return self._evaluation_loader(self.test_set)

    def predict_dataloader(self) -> "MeshLoader":
        """The test views, in order."""
        return self._evaluation_loader(self.test_set)

    def evaluation_dataloader(self, split: Split) -> "MeshLoader":
        """The views of a split in order, as an evaluation sees them: also those of training."""
        return self._evaluation_loader(self._set(split))

    def mesh(self, split: Split, index: int) -> tuple[Tensor, Tensor]:
        """The mesh that a view of a split shows, in its camera's frame and in the unit of ``points``.

        Args:
            split: Whose views.
            index: Place of the view in ``evaluation_dataloader(split)``.

        Returns:
            Vertices, float32 (V, 3), and triangles, int64 (F, 3).

        Raises:
            ValueError: The set has points only.
        """
        views = _set_up(self._set(split)).views
        _, path = views.surface(index)
        if path.suffix == ".dat":
            raise ValueError(f"{path} has points and normals, but no mesh")
        vertices, faces = read_mesh(path)
        surface = torch.from_numpy(np.concatenate([vertices, vertices], axis=1)[None].astype(np.float32))
        return seen_from(surface, views.cameras[index : index + 1])[0, :, :3], torch.from_numpy(faces)

    def fingerprint(self, split: Split) -> str:
        """A text that changes when a picture or a mesh of a split, or what becomes of them, changes."""
        seen = _set_up(self._set(split))
        parts = (seen.views.fingerprint(), self.size, self.focal_length, self.class_names)
        digest = hashlib.sha256(repr(parts).encode())
        for view in range(len(seen.views)):
            file = os.stat(seen.views.picture(view))
            digest.update(f"{seen.surfaces.kept(view).name} {file.st_size} {file.st_mtime_ns} ".encode())
        return digest.hexdigest()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn uint8 images into float32 in [0, 1]."""
        # What is no batch is a model's example_input_array, on its way through Lightning's summary.
        if isinstance(batch, dict) and isinstance(batch.get("image"), Tensor) and batch["image"].dtype == torch.uint8:
            return batch | {"image": batch["image"].float().div_(255)}
        return batch

    def _check_arguments(self) -> None:
        least = {"size": 1, "num_points": 1, "eval_batch_size": 1, "workers": 0, "val_size": 0, "test_size": 0}
        for name, value in (least | ({} if self.views is None else {"views": 1})).items():
            if getattr(self, name) < value:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {value}")
        if not self.focal_length > 0:
            raise ValueError(f"focal_length={self.focal_length} must be greater than 0")
        if self.corrupt not in ("refuse", "skip"):
            raise ValueError(f"corrupt={self.corrupt!r} must be refuse or skip")

    def _place(self) -> tuple[int, int]:
        """Rank and number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _set(self, split: Split) -> "SeenSurfaces | None":
        return {"train": self.train_set, "val": self.val_set, "test": self.test_set}[split]

    def _ready(self) -> "dict[Split, SeenSurfaces]":
        """The splits that were read so far; the validation views once, if they are tested on."""
        sets: dict[Split, SeenSurfaces | None] = {"train": self.train_set, "val": self.val_set}
        sets |= {} if self.test_set is self.val_set else {"test": self.test_set}
        return {split: seen for split, seen in sets.items() if seen is not None}

    def check_samples(self, files: bool = True) -> list[str]:
        """What is wrong: with ``files`` after reading every file, else as far as what :meth:`setup` read tells."""
        from datamodules.checking import check  # it knows all data modules

        return check(self, self._everything, files)

    def _everything(self) -> tuple[dict[str, Any], list[str]]:
        """All views, and what was wrong with folders and lists."""
        splits: tuple[Split, ...] = ("train", "val", "test")
        mesh_library()
        wanted = [split for split in splits if self._has(split) or split == "train"]
        parts: dict[str, Any] = {split: self._listed(split) for split in wanted}
        return parts, self._found.wrong("train, val and test")

    def _report_of(self, split: Split) -> str:
        seen = self._ready()[split]
        inside = f"{seen.inside:.1%} of the points lie in what the pictures show"
        lines = [f"{split}: {seen.views.summary(self.class_names)}, {inside}", *self._findings[split].lines()]
        return "\n  ".join(lines)

    def _has(self, split: Split) -> bool:
        """Whether there are models for a split."""
        listed = {} if self.lists is None else {"train", "val", "test"} if isinstance(self.lists, Path) else self.lists
        return split in listed or (self.val_size if split == "val" else self.test_size) > 0

    def _validation_as_test(self) -> "SeenSurfaces":
        if not self._has("val"):
            raise ValueError("there is nothing to test on: there are no models for testing, and test_size is 0")
        rank_zero_info("there are no models for testing and test_size is 0: these are the validation views")
        return _set_up(self.val_set)

    # Models

    def _listed(self, split: Split) -> Views:
        """The views of a split, before any is opened."""
        if not self._parts:
            folders = list(self.category_folders)
            models = read_models(self.renderings, self.meshes, folders, self._found)
            self._parts = self._split_models(collect(self.renderings, models))
        return self._parts[split]

    def _split_models(self, views: Views) -> dict[Split, Views]:
        """Views by split, the first so many of each model."""
        if self.lists is None:
            return self._drawn(views, self.val_size, self.test_size)
        listed = read_lists(self.lists, self._found)
        self._compare(listed, views)
        parts = {split: views.take(chosen_views(views, names)) for split, names in listed.items()}
        val, test = (
            0 if split in parts else size for split, size in (("val", self.val_size), ("test", self.test_size))
        )
        drawn = self._drawn(parts["train"], val, test)
        return drawn | {split: self._first(part) for split, part in parts.items() if split != "train"}

    def _compare(self, listed: dict[Split, Listed], views: Views) -> None:
        """Count the models that are on no list, and those of the categories that are on one but not there."""
        there = {os.fsdecode(name) for name in views.names.tolist()}
        names = {name for names in listed.values() for name in names}
        self._found.count("models that are on no list left out", len(there - names))
        absent = sorted(name for name in names - there if name.split("/")[0] in self.category_folders)
        for name in absent:
            if isinstance(self.lists, Path):  # which lists more models than were rendered
                self._found.count("models on the list without renderings", 1)
            else:
                self._found.refuse("models on a list that are not there", f"there are no renderings of {name}")

    def _drawn(self, views: Views, val_size: int | float, test_size: int | float) -> dict[Split, Views]:
        parts = split_at_random(len(views.names), val_size, test_size, self.split_seed)
        chosen = {split: np.flatnonzero(np.isin(views.models, models)) for split, models in parts.items()}
        return {split: self._first(views.take(rows)) for split, rows in chosen.items()}

    def _first(self, views: Views) -> Views:
        """The first so many views of each model."""
        if self.views is None:
            return views
        starts = np.searchsorted(views.models, views.models)  # the views of a model are beside each other
        return views.take(np.flatnonzero(np.arange(len(views)) - starts < self.views))

    # Points and pictures

    def _prepare(self, split: Split) -> "SeenSurfaces":
        """The views of a split with their points sampled, without those of which something cannot be read."""
        mesh_library()  # before processes ask for it
        views = self._listed(split)
        findings = self._findings[split] = Findings(self.corrupt == "skip")
        views = self._with_points(views, split)
        images = None
        cache = (
            len(views) * (3 * self.size**2 + 24 * self.num_points) <= CACHE_BYTES if self.cache is None else self.cache
        )
        if len(views) and (cache or self.corrupt == "skip"):
            views, images = self._read_once(views, split, cache)
        if not len(views):
            raise ValueError(f"there are no views in split {split}. {'; '.join(findings.lines())}".rstrip())
        seen = SeenSurfaces(views, self._surfaces(views), images)
        if cache:
            seen.keep()
        seen.inside = self._inside(seen)
        if seen.inside < 0.9:
            rank_zero_warn(
                f"only {seen.inside:.1%} of the points of split {split} lie in what the pictures show: are these the "
                "meshes that were rendered, and is focal_length theirs?"
            )
        return seen

    def _surfaces(self, views: Views) -> Surfaces:
        return Surfaces(views, self.cache_folder, self.num_points, self.points_seed)

    def _with_points(self, views: Views, split: Split) -> Views:
        """The views whose points could be sampled; every process samples its share, which the others then find."""
        rank, world_size = self._place()
        _, firsts = np.unique([views.surface(view)[0] for view in range(len(views))], return_index=True)
        mine = [int(view) for view in np.sort(firsts)[rank::world_size]]
        problems = _sample_each(self._surfaces(views), mine, self.workers if len(mine) > 2 * CHUNK else 0)
        problems = problems_of_all(problems, world_size, self.corrupt == "refuse")
        for problem in problems.values():
            self._findings[split].note("surfaces that cannot be used", problem)
        wrong = {views.surface(view)[0] for view in problems}
        if len(wrong) > len(firsts) / 2:
            message = f"{len(wrong)} of {len(firsts)} surfaces of split {split} cannot be used"
            raise ValueError(f"{message}: {some(list(problems.values()))}. Those are too many to leave out")
        good = [view for view in range(len(views)) if views.surface(view)[0] not in wrong]
        return views.take(np.array(good, dtype=np.int64)) if wrong else views

    def _read_once(self, views: Views, split: Split, cache: bool) -> tuple[Views, Tensor | None]:
        rank, world_size = self._place()
        mine = range(len(views)) if cache else range(rank, len(views), world_size)
        reader = SeenReader(views, self._surfaces(views), self.size)
        problems, kept = read_each(reader.image, len(views), mine, cache, self.workers if len(mine) > 200 else 0)
        problems = problems_of_all(problems, world_size, self.corrupt == "refuse")
        good = np.delete(np.arange(len(views)), list(problems))
        for problem in problems.values():
            self._findings[split].note("pictures that cannot be read", problem)
        warn_of_unreadable(list(problems.values()), len(views), split)
        return views.take(good), None if kept is None else stacked(kept, good, self.size)

    def _inside(self, seen: "SeenSurfaces") -> float:
        """The share of points that are where their picture shows something, or next to it, of some views."""
        chosen = np.unique(np.linspace(0, len(seen.views) - 1, CHECKED).astype(int))
        shares = []
        for view in chosen.tolist():
            shown = _alpha(seen.views.picture(view)) > 0
            surface = seen_from(seen.surfaces.read(view)[None], seen.views.cameras[view : view + 1])[0]
            shares.append(_share_inside(surface[:, :3], shown, self.focal_length))
        return float(np.mean(shares))

    def _evaluation_loader(self, seen: "SeenSurfaces | None") -> "MeshLoader":
        seen = _set_up(seen)
        return self._loader(seen, EvaluationBatches(len(seen.views), self.eval_batch_size, *self._place()))

    def _loader(self, seen: "SeenSurfaces", batches: TrainingBatches | EvaluationBatches) -> "MeshLoader":
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return MeshLoader(seen, batches, self.size, self.focal_length, self.workers, pin_memory=on_gpu)


def _set_up(value: "SeenSurfaces | None") -> "SeenSurfaces":
    if value is None:
        raise RuntimeError("call ShapeNetDataModule.setup() before asking for its batches")
    return value


def _sample_each(surfaces: Surfaces, views: list[int], workers: int) -> dict[int, str]:
    """Sample the points of what views show, where it was not done before; what is wrong with the others, by view."""
    chunks = [views[start : start + CHUNK] for start in range(0, len(views), CHUNK)]
    problems: dict[int, str] = {}
    with once(WholePictures(_Sampled(surfaces)), chunks, workers) as loader:
        for chunk, (_, outcomes) in zip(chunks, loader, strict=True):
            for view, outcome in zip(chunk, outcomes, strict=True):
                if isinstance(outcome, OSError):
                    raise outcome
                if isinstance(outcome, str):
                    problems[view] = outcome
    return problems


class _Sampled:
    """Samples the points of a view, and gives a picture without pixels."""

    def __init__(self, surfaces: Surfaces) -> None:
        self.surfaces = surfaces

    def __call__(self, view: int) -> Tensor:
        if not self.surfaces.kept(view).is_file():
            self.surfaces.read(view)
        return torch.empty(3, 0, 0, dtype=torch.uint8)


def _share_inside(points: Tensor, shown: np.ndarray, focal_length: float) -> float:
    """The share of points (P, 3) that a camera sees on ``shown`` (H, H), or one pixel beside it."""
    side = len(shown)
    rays = torch.stack([points[:, 0] / -points[:, 2], points[:, 1] / points[:, 2], torch.ones(len(points))], dim=1)
    column, row = (rays @ intrinsics(side, focal_length).T)[:, :2].round().long().clamp(-2, side + 1).T.numpy() + 2
    near = np.zeros((side + 4, side + 4), dtype=bool)
    for top in (1, 2, 3):
        for left in (1, 2, 3):
            near[top : top + side, left : left + side] |= shown
    return float(near[row, column].mean())


# Reading


class SeenSurfaces:
    """Views, and the points of what they show.

    Args:
        views: The views.
        surfaces: Where their points are kept.
        images: Their pictures, uint8 (V, 3, size, size); None reads them from their files.

    Attributes:
        points: Points and normals in memory, float32 (F, P, 6), and for each view the row of its own, int64 (V,).
        inside: Share of the points that lie in what the pictures show.
    """

    def __init__(self, views: Views, surfaces: Surfaces, images: Tensor | None) -> None:
        self.views = views
        self.surfaces = surfaces
        self.images = images
        self.points: tuple[Tensor, Tensor] | None = None
        self.inside = 1.0

    def keep(self) -> None:
        """Read all points into memory; those of a model once."""
        names = [self.views.surface(view)[0] for view in range(len(self.views))]
        _, firsts, rows = np.unique(names, return_index=True, return_inverse=True)
        self.points = torch.stack([self.surfaces.read(view) for view in firsts.tolist()]), torch.from_numpy(rows)


class SeenReader(Dataset):
    """Pictures and points of views, as one batch: what a worker process does.

    A job is ``(seed, epoch, indices)``; its result is uint8 (N, 3, size, size) and float32 (N, P, 6), or its error.

    Args:
        views: The views.
        surfaces: Where their points are kept.
        size: Side of the pictures.
    """

    def __init__(self, views: Views, surfaces: Surfaces, size: int) -> None:
        self.views = views
        self.surfaces = surfaces
        self.size = size

    def __getitems__(self, job: tuple[int, int, list[int]]) -> tuple[Tensor, Tensor] | Exception:
        _, _, indices = job
        images = torch.empty(len(indices), 3, self.size, self.size, dtype=torch.uint8)
        points = torch.empty(len(indices), self.surfaces.num_points, 6)
        try:
            for row, index in enumerate(indices):
                images[row], points[row] = self.image(index), self.surfaces.read(index)
        except (OSError, ValueError) as error:  # raised by the loader: from here it would come wrapped in a traceback
            return error
        return images, points

    def image(self, index: int) -> Tensor:
        """A picture on white, uint8 (3, size, size).

        Raises:
            ValueError: It cannot be read as a square picture; the message names its file.
            OSError: The file cannot be read.
        """
        pixels = rendering(self.views.picture(index))
        pixels[pixels[..., 3] == 0] = 255
        return resize(pixels[..., :3], self.size, self.size)


def rendering(path: Path) -> np.ndarray:
    """The pixels of a picture, uint8 (S, S, 4).

    Raises:
        ValueError: It cannot be read as a square picture; the message names its file.
        OSError: The file is not there.
    """
    pixels = _pixels(path)
    if pixels.shape[0] != pixels.shape[1]:
        raise ValueError(f"{path} has {pixels.shape[1]} x {pixels.shape[0]} pixels: expected a square picture")
    return pixels


def _pixels(path: Path) -> np.ndarray:
    """The pixels of a picture, uint8 (H, W, 4)."""
    try:
        with path.open("rb") as file, Image.open(file) as picture:
            return np.array(picture.convert("RGBA"))
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a decoder raises: OSError, SyntaxError, struct.error, …
        raise ValueError(f"{path} cannot be read as a picture: {error or type(error).__name__}") from error


def _alpha(path: Path) -> np.ndarray:
    return _pixels(path)[..., 3]


class MeshLoader(AheadLoader):
    """Batches of pictures and points; see :class:`ShapeNetDataModule`. Images are uint8.

    Args:
        seen: Where from: what it holds in memory, else files read ahead by processes.
        batch_sampler: Which views make a batch; its place is that of the last batch that was handed out.
        size: Side of the images.
        focal_length: Of the camera, in sides of the image.
        workers: Number of processes that read; 0 reads in this one.
        pin_memory: Whether to put what is read where a GPU fetches it fastest.
    """

    def __init__(
        self,
        seen: SeenSurfaces,
        batch_sampler: TrainingBatches | EvaluationBatches,
        size: int,
        focal_length: float,
        workers: int,
        pin_memory: bool = False,
    ) -> None:
        rows = torch.arange(len(seen.views))
        reader = SeenReader(seen.views, seen.surfaces, size) if seen.points is None else None
        super().__init__((rows,), batch_sampler, reader, workers, pin_memory)
        self.seen = seen
        self.intrinsics = intrinsics(size, focal_length)

    def __iter__(self) -> Iterator[Any]:
        if self.seen.points is None:
            for (images, points), (rows,) in self.read():
                yield self._batch(images, points, rows)
            return
        surfaces, row_of = self.seen.points
        for (rows,) in super().__iter__():
            assert self.seen.images is not None  # pictures and points are kept together
            yield self._batch(self.seen.images[rows], surfaces[row_of[rows]], rows)

    def _batch(self, images: Tensor, points: Tensor, rows: Tensor) -> Batch:
        views = self.seen.views
        seen = seen_from(points, views.cameras[rows.numpy()])
        return {
            "image": images,
            "points": seen[..., :3].contiguous(),
            "normals": seen[..., 3:].contiguous(),
            "intrinsics": self.intrinsics.repeat(len(rows), 1, 1),
            "category": torch.from_numpy(views.categories[views.models[rows.numpy()]]),
        }
