"""Points and normals of surfaces: sampled from meshes once and kept on disk, or read from Pixel2Mesh's files.

The published ``.dat`` files are pickles, which may hold any program. They are read here by something that knows how an
array is written in them, runs nothing of what they name, and refuses everything else.
"""

import hashlib
import io
import math
import os
import pickle
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.shapenet_files import Views

VERSION = 1  # of how points are sampled; another one samples anew
SCALE = 0.57  # Pixel2Mesh's: ShapeNet's meshes by this are as large as the pictures' cameras see them


class Surfaces:
    """Points and normals of what views show, by view.

    Those of a mesh are in its own frame, and the same for all of its views; those of a ``.dat`` file in the camera's.

    Args:
        views: What shows them.
        cache: Folder to keep them in.
        num_points: How many of each surface.
        seed: Seed of the points, together with the name of the model.
    """

    def __init__(self, views: Views, cache: Path, num_points: int, seed: int) -> None:
        self.views = views
        self.cache = cache
        self.num_points = num_points
        self.seed = seed

    def read(self, view: int) -> Tensor:
        """Points and normals, float32 (num_points, 6); sampled and kept if they were not before.

        Raises:
            ValueError: The file makes no sense; the message names it.
            OSError: The file cannot be read.
        """
        kept = self.kept(view)
        found = _load(kept, self.num_points)
        if found is None:
            name, path = self.views.surface(view)
            digits = hashlib.sha256(f"{self.seed} {name}".encode(errors="surrogateescape")).digest()
            rng = np.random.default_rng(int.from_bytes(digits, "little"))
            sample = sample_points if path.suffix == ".dat" else sample_mesh
            found = torch.from_numpy(sample(path, self.num_points, rng).astype(np.float32))
            _save(kept, found)
        return found

    def kept(self, view: int) -> Path:
        """Where the points of a view are kept: a file of another name when the mesh, or how it is sampled, changes."""
        name, path = self.views.surface(view)
        file = os.stat(path)
        # The time of the last change, since a copy that keeps the time of writing may have another content.
        state = (VERSION, name, str(path.resolve()), file.st_size, file.st_mtime_ns, file.st_ctime_ns)
        key = hashlib.sha256(repr((*state, self.num_points, self.seed)).encode(errors="surrogateescape")).hexdigest()
        return self.cache / key[:2] / f"{key}.safetensors"


def _load(path: Path, num_points: int) -> Tensor | None:
    """What was kept; None where there is nothing, or what is there is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        kept = load_file(path)
        surface = torch.cat([kept["points"], kept["normals"]], dim=1)
    except (FileNotFoundError, SafetensorError, KeyError, RuntimeError, IndexError):
        return None
    return surface if surface.shape == (num_points, 6) and surface.dtype == torch.float32 else None


def _save(path: Path, surface: Tensor) -> None:
    """Write a file whole or not at all: other processes may read it at the same time."""
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    content = save({"points": surface[:, :3].contiguous(), "normals": surface[:, 3:].contiguous()})
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".points-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


# Meshes


def sample_mesh(path: Path, num_points: int, rng: np.random.Generator) -> np.ndarray:
    """Points spread evenly over the surface of a mesh, and the normals of their triangles: float64 (num_points, 6).

    Normals point to where a triangle's corners are seen counter-clockwise. Triangles without area get no points.

    Raises:
        ValueError: The mesh cannot be read, or has no surface; the message names its file.
    """
    trimesh = mesh_library()
    vertices, faces = read_mesh(path)
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    points, chosen = trimesh.sample.sample_surface(mesh, num_points, seed=rng)
    sides = vertices[faces[chosen]]
    normals = np.cross(sides[:, 1] - sides[:, 0], sides[:, 2] - sides[:, 0])
    return np.concatenate([points, normals / np.linalg.norm(normals, axis=1, keepdims=True)], axis=1)


def read_mesh(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Vertices, float64 (V, 3), and the triangles that have an area, int64 (F, 3), of a mesh file.

    Raises:
        ValueError: The mesh cannot be read, or has no surface; the message names its file.
        OSError: The file cannot be read.
    """
    trimesh = mesh_library()
    try:
        mesh = trimesh.load(path, force="mesh", process=False, skip_materials=True)
        vertices, faces = np.array(mesh.vertices, dtype=np.float64), np.array(mesh.faces, dtype=np.int64)
    except OSError:
        raise
    except Exception as error:  # whatever a parser raises on a damaged file
        raise ValueError(f"{path} cannot be read as a mesh: {error or type(error).__name__}") from error
    if not len(faces):
        raise ValueError(f"{path} has no faces: it has no surface to learn")
    if vertices.ndim != 2 or vertices.shape[1] != 3:
        raise ValueError(f"{path} has vertices of {vertices.shape[-1]} numbers, expected 3")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(f"{path} has a face with vertex {faces.max() + 1}, but only {len(vertices)} vertices")
    corners = vertices[faces]
    with np.errstate(over="ignore", invalid="ignore"):
        areas = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    if not np.isfinite(areas).all():
        raise ValueError(f"{path} has vertices that are not finite: {int((~np.isfinite(areas)).sum())} faces have one")
    if not (areas > 0).any():
        raise ValueError(f"{path} has only degenerate triangles, without area: it has no surface to learn")
    return vertices, faces[areas > 0]


def mesh_library() -> Any:
    """The library that reads and samples meshes.

    Raises:
        ModuleNotFoundError: It is not installed; the message says how to install it.
    """
    try:
        import trimesh
        import trimesh.sample
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("meshes need trimesh: pip install 'zoo[mesh]'") from error
    return trimesh


# Cameras


def rotations(cameras: np.ndarray) -> np.ndarray:
    """Rotations from ShapeNet's frame (y up) to that of cameras that look at the origin.

    A camera sees x to the right, y up, and looks towards negative z: row by row the axes of Pixel2Mesh's
    ``camera_info``.

    Args:
        cameras: Azimuth and elevation in degrees, and distance, (N, 3).

    Returns:
        float64 (N, 3, 3), for columns.
    """
    azimuth, elevation = np.deg2rad(np.asarray(cameras, dtype=np.float64)[:, :2]).T
    zero = np.zeros_like(azimuth)
    right = np.stack([np.sin(azimuth), zero, -np.cos(azimuth)], axis=1)
    across = np.cos(elevation)
    back = np.stack([across * np.cos(azimuth), np.sin(elevation), across * np.sin(azimuth)], axis=1)
    return np.stack([right, np.cross(back, right), back], axis=1)


def seen_from(surfaces: Tensor, cameras: np.ndarray) -> Tensor:
    """Points and normals as cameras see them: in their frames, and by 0.57 as large as ShapeNet's meshes.

    Args:
        surfaces: Points and normals in ShapeNet's frame, float32 (N, P, 6).
        cameras: Azimuth and elevation in degrees, and distance, (N, 3). Distance 0 leaves points as they are: they are
            in the camera's frame already.

    Returns:
        float32 (N, P, 6).
    """
    posed = cameras[:, 2] > 0
    turns = np.where(posed[:, None, None], rotations(cameras), np.eye(3))
    shift = cameras[:, 2, None, None] * np.array([0, 0, 1])
    scale, turned, back = (
        torch.from_numpy(array.astype(np.float32))
        for array in (np.where(posed, SCALE, 1)[:, None, None], turns.transpose(0, 2, 1), shift)
    )
    return torch.cat([scale * (surfaces[..., :3] @ turned) - back, surfaces[..., 3:] @ turned], dim=-1)


def intrinsics(size: int, focal_length: float) -> Tensor:
    """What maps (x / depth, -y / depth, 1) to column and row in pixels, from the middle of the first one: (3, 3).

    Args:
        size: Side of the image in pixels.
        focal_length: In sides of the image.
    """
    focal, centre = focal_length * size, (size - 1) / 2
    return torch.tensor([[focal, 0, centre], [0, focal, centre], [0, 0, 1]])


# Pixel2Mesh's pickles


def sample_points(path: Path, num_points: int, rng: np.random.Generator) -> np.ndarray:
    """So many of the points and normals of a ``.dat`` file, none twice if there are enough: (num_points, 6).

    Raises:
        ValueError: The file has anything but points and normals; the message names it.
        OSError: The file cannot be read.
    """
    surface = read_pickled_points(path)
    rows = rng.permutation(len(surface))[:num_points]
    if len(rows) < num_points:
        rows = np.concatenate([rows, rng.integers(len(surface), size=num_points - len(rows))])
    return surface[rows]


def read_pickled_points(path: Path) -> np.ndarray:
    """Points and normals of a ``.dat`` file of Pixel2Mesh, float64 (P, 6), without running anything it names.

    Raises:
        ValueError: The file holds anything but one array of numbers of that shape; the message names it.
        OSError: The file cannot be read.
    """
    data = path.read_bytes()
    try:
        surface = _ArrayPickle(io.BytesIO(data)).load()
        surface = _decoded(surface)
    except Exception as error:  # a damaged pickle raises anything: its words make no sense to the interpreter
        raise ValueError(f"{path} is no array of points and normals: {error or type(error).__name__}") from error
    if not np.isfinite(surface).all():
        raise ValueError(f"{path} has points or normals that are not finite")
    return surface


class _Part:
    """What stands for a part of an array while a pickle is read: which one, and what the file says of it."""

    __slots__ = ("arguments", "kind", "state")

    def __init__(self, kind: str, arguments: tuple[Any, ...]) -> None:
        self.kind = kind
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Maker:
    """What stands for a function or class that a pickle names: to call it notes with what, and does nothing else."""

    __slots__ = ("kind",)

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, *arguments: Any) -> _Part:
        return _Part(self.kind, arguments)


# In Python: the interpreter in C sets aside as much memory as a file tells it to.
class _ArrayPickle(pickle._Unpickler):
    """Reads pickles of arrays, as Python 2 and 3 write them with any NumPy."""

    # Of newer protocols; such an array is made as large as the file says before it is read.
    dispatch = {key: run for key, run in pickle._Unpickler.dispatch.items() if key != pickle.BYTEARRAY8[0]}

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding="latin1")

    def find_class(self, module: str, name: str) -> _Maker:
        """One of the four names in an array's pickle."""
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _Maker("array")
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")):
            return _Maker(name)
        raise ValueError(f"it names {str(module)[:40]}.{str(name)[:40]}, and only numbers are read from such files")


def _decoded(array: Any) -> np.ndarray:
    """The array that the parts describe."""
    if not isinstance(array, _Part) or array.kind != "array":
        raise ValueError(f"it holds a {type(array).__name__}, expected an array")
    _, shape, described, by_column, data = array.state
    kind, order = described.arguments[0], described.state[1]
    if isinstance(data, _Part) and data.kind == "encode":  # bytes, as Python 3 writes them for Python 2
        data = data.arguments[0]
    data = data.encode("latin1") if isinstance(data, str) else data
    if described.kind != "dtype" or not re.fullmatch("f[48]", str(kind)) or order not in ("<", ">"):
        raise ValueError("it holds no floating-point numbers of 32 or 64 bits")
    if (
        not isinstance(shape, tuple)
        or len(shape) != 2
        or shape[1] != 6
        or not shape[0] > 0
        or not isinstance(data, bytes)
    ):
        raise ValueError(f"its shape is {str(shape)[:40]}, expected (points, 6): positions and normals")
    if len(data) != math.prod(shape) * int(kind[1]):
        raise ValueError(f"it has {len(data)} bytes, which do not make {shape[0]} rows")
    numbers = np.frombuffer(data, dtype=f"{order}{kind}")
    with np.errstate(invalid="ignore"):  # a NaN that signals is told as any other
        return numbers.reshape(shape, order="F" if by_column else "C").astype(np.float64)
