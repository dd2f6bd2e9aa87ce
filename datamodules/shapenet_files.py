"""Where ShapeNet's models and their renderings lie, what splits them, and from where each picture was taken.

Formats: Chang et al., 2015, ShapeNet, arXiv:1512.03012; renderings of Choy et al., 2016, 3D-R2N2, arXiv:1604.00449;
lists and points of Wang et al., 2018, Pixel2Mesh, arXiv:1804.01654.
"""

import csv
import hashlib
import os
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from datamodules.annotations import Findings

Split = Literal["train", "val", "test"]
Listed = dict[str, set[int] | None]  # views of the models on a list; None means all

# The thirteen categories that 3D-R2N2 rendered, by their numbers in WordNet.
NAMES = {
    "02691156": "plane", "02828884": "bench", "02933112": "cabinet", "02958343": "car", "03001627": "chair",
    "03211117": "monitor", "03636649": "lamp", "03691459": "speaker", "04090263": "firearm", "04256520": "couch",
    "04379243": "table", "04401088": "cellphone", "04530566": "watercraft",
}  # fmt: skip
RENDERINGS = ("ShapeNetRendering", "ShapeNetP2M", "Data/ShapeNetP2M", "data_tf", "models", ".")
MESHES = ("ShapeNetCore.v1", "ShapeNetCore", "ShapeNetCore.v2")
MESH_FILES = ("model.obj", "models/model_normalized.obj", "model_normalized.obj")
LISTS = {
    split: (f"{split}_list.txt", f"Data/{split}_list.txt", f"meta/{split}_tf.txt", f"{split}.txt")
    for split in ("train", "val", "test")
}
CSV = "all.csv"  # ShapeNet's own split, with a column for model and for split
LAYOUT = (
    "expected <root>/ShapeNetCore.v1/<category>/<model>/model.obj and "
    "<root>/ShapeNetRendering/<category>/<model>/rendering/00.png, both in one folder, or "
    "<root>/ShapeNetP2M/<category>/<model>/rendering/00.png with 00.dat; or name the folders by renderings and meshes"
)


class Views:
    """Models and their views by index, in arrays: of lists each worker would come to hold a copy of its own.

    Args:
        renderings: Folder that the models' names start from.
        names: The models, ``category/id``, bytes (S,).
        categories: Their classes, int64 (S,).
        meshes: Their files; empty where each view has a ``.dat`` file with points in its camera's frame; bytes (S,).
        models: The model of each view, int64 (V,).
        numbers: Its number, which names its picture, int64 (V,).
        cameras: Azimuth and elevation in degrees, and distance, float64 (V, 3).
    """

    def __init__(
        self,
        renderings: Path,
        names: np.ndarray,
        categories: np.ndarray,
        meshes: np.ndarray,
        models: np.ndarray,
        numbers: np.ndarray,
        cameras: np.ndarray,
    ) -> None:
        self.renderings = renderings
        self.names = names
        self.categories = categories
        self.meshes = meshes
        self.models = models
        self.numbers = numbers
        self.cameras = cameras

    def __len__(self) -> int:
        return len(self.models)

    def name(self, view: int) -> str:
        """What a view is called: ``category/model/rendering/number``."""
        return f"{os.fsdecode(self.names[self.models[view]])}/rendering/{self.numbers[view]:02d}"

    def picture(self, view: int) -> Path:
        """The file of its picture."""
        return self.renderings / f"{self.name(view)}.png"

    def surface(self, view: int) -> tuple[str, Path]:
        """The name and the file of what it shows: a mesh, or points in its camera's frame."""
        model = self.models[view]
        if mesh := self.meshes[model]:
            return os.fsdecode(self.names[model]), Path(os.fsdecode(mesh))
        return self.name(view), self.renderings / f"{self.name(view)}.dat"

    def take(self, chosen: np.ndarray) -> "Views":
        """Some of the views, and the models that these show."""
        present, models = np.unique(self.models[chosen], return_inverse=True)
        whose = self.names[present], self.categories[present], self.meshes[present]
        return Views(self.renderings, *whose, models.astype(np.int64), self.numbers[chosen], self.cameras[chosen])

    def fingerprint(self) -> str:
        """What stays the same as long as these are the same views in the same order, wherever their folder is."""
        digest = hashlib.sha256(b"\0".join(self.names.tolist()))
        for array in (self.models, self.numbers, self.cameras):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def summary(self, class_names: list[str]) -> str:
        """Numbers of models and views, and of the models of each category."""
        counts = np.bincount(self.categories, minlength=len(class_names))
        each = ", ".join(f"{name} {count:,}" for name, count in zip(class_names, counts, strict=True) if count)
        return f"{len(self.names):,} models ({each}), {len(self):,} views"


class Model(NamedTuple):
    """A model as the folders have it: its name ``category/id``, class, mesh, and the numbers and cameras of views."""

    name: str
    category: int
    mesh: bytes
    numbers: np.ndarray
    cameras: np.ndarray


def collect(renderings: Path, models: list[Model]) -> Views:
    """Put models into arrays."""
    counts = [len(model.numbers) for model in models]
    return Views(
        renderings,
        np.array([os.fsencode(model.name) for model in models], dtype=np.bytes_),
        np.array([model.category for model in models], dtype=np.int64),
        np.array([model.mesh for model in models], dtype=np.bytes_),
        np.repeat(np.arange(len(models)), counts),
        np.concatenate([np.zeros(0, dtype=np.int64), *(model.numbers for model in models)]),
        np.concatenate([np.zeros((0, 3)), *(model.cameras for model in models)]),
    )


# Folders


def find_folders(root: Path, renderings: str | None, meshes: str | None) -> tuple[Path, Path]:
    """The folders of renderings and of meshes, which may be one.

    Raises:
        FileNotFoundError: ``root`` or a named one is no folder.
        ValueError: There are no renderings.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root.absolute()}: {LAYOUT}")
    for argument, name in (("renderings", renderings), ("meshes", meshes)):
        if name is not None and not (root / name).is_dir():
            raise FileNotFoundError(f"{argument}: there is no folder {root / name}")
    candidates = RENDERINGS if renderings is None else (renderings,)
    found = next((root / name for name in candidates if any((root / name).glob("*/*/rendering"))), None)
    if found is None:
        raise ValueError(f"{root} has no renderings: {LAYOUT}")
    beside = next((root / name for name in MESHES if (root / name).is_dir()), found)
    return found, beside if meshes is None else root / meshes


def find_categories(renderings: Path, wanted: list[str] | None) -> dict[str, str]:
    """The folder of each category and its name, those of the thirteen published ones in plain English.

    Raises:
        ValueError: One that is wanted is not there, or is there twice.
    """
    folders = sorted(entry.name for entry in os.scandir(renderings) if entry.is_dir() and entry.name[0] != ".")
    found = {folder: NAMES.get(folder, folder) for folder in folders}
    if wanted is None:
        return found
    folder_of = {name: folder for folder, name in found.items()} | {folder: folder for folder in folders}
    if missing := [name for name in wanted if name not in folder_of]:
        raise ValueError(f"categories: {renderings} has no {missing[0]!r}, it has {', '.join(found.values())}")
    chosen = {folder_of[name]: found[folder_of[name]] for name in wanted}
    if len(chosen) < len(wanted) or not wanted:
        raise ValueError(f"categories={wanted} must name one category at least, and none twice")
    return chosen


def read_models(renderings: Path, meshes: Path, categories: list[str], findings: Findings) -> list[Model]:
    """All models of some categories that have renderings.

    Raises:
        ValueError: A mesh, a picture or its camera is missing, unless these are skipped.
    """
    found = []
    for category, folder in enumerate(categories):
        for name in sorted(entry.name for entry in os.scandir(renderings / folder) if entry.is_dir()):
            if not (renderings / folder / name / "rendering").is_dir():
                findings.note("models without renderings left out", f"{folder}/{name}")
            elif (model := _read_model(renderings, meshes, f"{folder}/{name}", category, findings)) is not None:
                found.append(model)
    return found


def _read_model(renderings: Path, meshes: Path, name: str, category: int, findings: Findings) -> Model | None:
    pictures = renderings / name / "rendering"
    present = set(os.listdir(pictures))
    if any(file.endswith(".dat") for file in present):
        numbers, cameras = _views_with_points(pictures, present, findings)
        mesh = b""
    else:
        path = next((meshes / name / file for file in MESH_FILES if (meshes / name / file).is_file()), None)
        if path is None:
            findings.refuse("models without a mesh", f"there is no mesh {meshes / name / MESH_FILES[0]}")
            return None
        numbers, cameras = _views_with_cameras(pictures, present, findings)
        mesh = os.fsencode(path)
    if not len(numbers):
        findings.refuse("models without views", f"{pictures} has no picture 00.png, 01.png, … that can be used")
        return None
    return Model(name, category, mesh, numbers, cameras)


def _views_with_points(pictures: Path, present: set[str], findings: Findings) -> tuple[np.ndarray, np.ndarray]:
    numbers = []
    for file in sorted(present):
        stem, end = os.path.splitext(file)
        if end == ".dat" and f"{stem}.png" not in present:
            findings.refuse("views without a picture", f"there is no picture {pictures / stem}.png, only its points")
        elif end == ".dat" and stem.isdecimal():
            numbers.append(int(stem))
    return np.array(numbers, dtype=np.int64), np.zeros((len(numbers), 3))


def _views_with_cameras(pictures: Path, present: set[str], findings: Findings) -> tuple[np.ndarray, np.ndarray]:
    """Those with a picture and a line that says from where it was taken."""
    path = pictures / "rendering_metadata.txt"
    if path.name not in present:
        findings.refuse("models without metadata", f"{path} is missing, which says from where each picture was taken")
        return np.zeros(0, dtype=np.int64), np.zeros((0, 3))
    lines = path.read_text(errors="replace").splitlines()
    cameras = {number: _camera(f"line {number + 1} of {path}", line, findings) for number, line in enumerate(lines)}
    numbers = []
    for number, camera in cameras.items():
        if f"{number:02d}.png" not in present:
            missing = f"there is no picture {pictures / f'{number:02d}.png'}, of which {path.name} has the camera"
            findings.refuse("views without a picture", missing)
        elif camera is not None:
            numbers.append(number)
    for file in sorted(present):
        if file.endswith(".png") and file[:-4].isdecimal() and int(file[:-4]) not in cameras:
            missing = f"{path} has {len(lines)} lines, none for the picture {file}"
            findings.refuse("views without a camera", missing)
    return np.array(numbers, dtype=np.int64), np.array([cameras[number] for number in numbers]).reshape(-1, 3)


def _camera(where: str, line: str, findings: Findings) -> tuple[float, float, float] | None:
    """Azimuth, elevation and distance."""
    try:
        azimuth, elevation, turn, distance, *_ = (float(word) for word in line.split())
    except ValueError:
        azimuth = elevation = turn = distance = np.nan
    if not (np.isfinite([azimuth, elevation]).all() and abs(elevation) < 90 and 0 < distance < np.inf and turn == 0):
        expected = "expected azimuth, elevation (between -90 and 90), a 0, distance (above 0) and field of view"
        findings.refuse("views whose camera makes no sense", f"{where} is {line[:80]!r}: {expected}")
        return None
    return azimuth, elevation, distance


# Splits


def find_lists(root: Path, named: dict[Split, str | None]) -> dict[Split, Path] | Path | None:
    """Lists of the models of each split, ShapeNet's table of all of them, or None.

    Raises:
        FileNotFoundError: One that is named is missing.
        ValueError: One is named for validation or testing, but none for training.
    """
    if any(named.values()):
        found: dict[Split, Path] = {split: root / name for split, name in named.items() if name}
    else:
        places = {split: [root / name for name in names] for split, names in LISTS.items()}
        existing = {split: next((p for p in paths if p.is_file()), None) for split, paths in places.items()}
        found = {split: path for split, path in existing.items() if path is not None}  # type: ignore[misc]
    if missing := [path for path in found.values() if not path.is_file()]:
        raise FileNotFoundError(f"there is no list {missing[0]}")
    if found and "train" not in found:
        raise ValueError(f"{next(iter(found.values()))} lists models, but there is no list for training: train_list")
    if not found and (root / CSV).is_file():
        return root / CSV
    return found or None


def read_lists(lists: dict[Split, Path] | Path, findings: Findings) -> dict[Split, Listed]:
    """The models of each split, and which of their views.

    Raises:
        ValueError: A line makes no sense, or a model is on two lists.
    """
    if isinstance(lists, Path):
        return _read_table(lists)
    listed: dict[Split, Listed] = {}
    for split, path in lists.items():
        listed[split] = _read_list(path, findings)
        for other in listed:
            if other != split and (both := listed[split].keys() & listed[other].keys()):
                shared = f"{min(both)} is both in {path} and in {lists[other]}"
                raise ValueError(f"{shared}: what is tested must not have been seen in training")
    return listed


def _read_list(path: Path, findings: Findings) -> Listed:
    """Lines ``…/category/id/rendering/00.dat``, of one view, or ``category/id``, of all."""
    listed: Listed = {}
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        parts = line.strip().replace("\\", "/").split("/")
        if parts == [""]:
            continue
        view = os.path.splitext(parts[-1])[0]
        if len(parts) >= 4 and parts[-2] == "rendering" and view.isdecimal():
            views = listed.setdefault("/".join(parts[-4:-2]), set())
            if views is not None:
                views.add(int(view))
        elif len(parts) >= 2 and "rendering" not in parts:
            listed["/".join(parts[-2:])] = None
        else:
            expected = "expected category/model, or category/model/rendering/00.dat"
            findings.refuse(
                "lines of lists that make no sense", f"line {number} of {path} is {line[:80]!r}: {expected}"
            )
    return listed


def _read_table(path: Path) -> dict[Split, Listed]:
    listed: dict[Split, Listed] = {"train": {}, "val": {}, "test": {}}
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if missing := {"synsetId", "modelId", "split"} - set(rows.fieldnames or ()):
            raise ValueError(f"{path} has no column {min(missing)}: it should be ShapeNet's all.csv")
        for row in rows:
            if row["split"] in listed:
                # Spreadsheets drop the leading zero of a number.
                listed[row["split"]][f"{row['synsetId'].zfill(8)}/{row['modelId']}"] = None
    return listed


def chosen_views(views: Views, listed: Listed) -> np.ndarray:
    """Indices of the views that are on a list, int64."""
    wanted = [listed.get(os.fsdecode(name), set()) for name in views.names.tolist()]
    on_list = [
        wanted[model] is None or number in (wanted[model] or ())
        for model, number in zip(views.models.tolist(), views.numbers.tolist(), strict=True)
    ]
    return np.flatnonzero(np.array(on_list, dtype=bool))
