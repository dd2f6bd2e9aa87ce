"""Furniture, lamps and planes, modelled and rendered, written to disk as ShapeNet's meshes and 3D-R2N2's pictures.

Each shape is a closed surface: parts are joined by manifold3d, so that nothing lies inside of it. Embree, through
trimesh, shoots the rays of its pictures. Cameras are drawn as those of 3D-R2N2: Choy et al., 2016, arXiv:1604.00449.
"""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from datamodules.embedded.writing import encoded, whole_folder
from datamodules.shapenet import ShapeNetDataModule
from datamodules.shapenet_files import LISTS, NAMES, Split
from datamodules.surfaces import SCALE, mesh_library, rotations

VERSION = 1  # of the shapes; another one makes another folder
SIDE = 137  # of the pictures, in pixels
FOCAL_LENGTH = 248 / 224  # of the camera, in sides of the picture
SAMPLES = 2  # rays a pixel along each axis
TOLERANCE = 5e-4  # edges that are shorter are joined, which the union leaves where parts nearly touch
DIGITS = 6  # of a vertex in its file
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class ShapesDataModule(ShapeNetDataModule):
    """Batches of pictures of generated shapes and of the points on these; see :class:`ShapeNetDataModule`.

    Shapes are planes, cabinets, chairs, lamps, couches and tables, each made of parts of random measures, numbers and
    kinds, and seen from random places. The set is written once, into a folder of ``root`` that its arguments name, in
    the layout of ShapeNet (version 1) and the renderings of 3D-R2N2, and read by what reads these. Shapes for
    validation and testing are of the same kinds with other measures.

    Args:
        root: Folder in which the set's own is made.
        categories: Names of the categories, in the order of their numbers; None takes all six.
        train_size: Number of training shapes, evenly of all categories.
        val_size: Number of shapes for validation; 0 trains without it.
        test_size: Number of shapes for testing; 0 tests on those for validation.
        views: Pictures of each shape.
        seed: Seed of the shapes and cameras, apart from the run's seed so that runs compare.
        size: Side of the images in pixels; the pictures, of 137 x 137 pixels, are resized to it.
        num_points: Points of each shape.
        batch_size: Views of a global training batch: all processes together.
        eval_batch_size: Views per process in validation, test and prediction.
        cache: Keep pictures and points in memory, in each training process; None does so where those of a split need
            no more than 1 GiB.
        workers: Processes that read, for each process that trains; None means one per processor, at most 4.

    Raises:
        ValueError: A number is out of range, or there is no such category.
    """

    def __init__(
        self,
        root: str = "data",
        categories: list[str] | None = None,
        train_size: int = 240,
        val_size: int = 60,
        test_size: int = 60,
        views: int = 5,
        seed: int = 0,
        size: int = SIDE,
        num_points: int = 2000,
        batch_size: int = 16,
        eval_batch_size: int = 32,
        cache: bool | None = True,
        workers: int | None = 0,
    ) -> None:
        if train_size < 1 or views < 1:
            raise ValueError(f"train_size={train_size} and views={views} must be at least 1")
        self.sizes: dict[Split, int] = {"train": train_size, "val": val_size, "test": test_size}
        if wrong := [f"{split}_size={count}" for split, count in self.sizes.items() if count != int(count)]:
            raise ValueError(f"{wrong[0]} must be a number of shapes, not a share")
        self.seed = seed
        super().__init__(
            root,
            categories=categories,
            views=views,
            size=size,
            focal_length=FOCAL_LENGTH,
            num_points=num_points,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_size=val_size,
            test_size=test_size,
            cache=cache,
            workers=workers,
        )
        self.cache_folder = self.folder / "points"

    def _find(self, renderings: Any, meshes: Any, categories: list[str] | None, lists: Any) -> None:
        """There is nothing to look for: the files are those that :meth:`prepare_data` writes."""
        chosen = list(MAKERS) if categories is None else categories
        if unknown := [name for name in chosen if name not in MAKERS]:
            raise ValueError(f"categories: there is no {unknown[0]!r}, there are {', '.join(MAKERS)}")
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(f"categories={categories} must name one category at least, and none twice")
        if self.sizes["train"] < len(chosen):
            raise ValueError(
                f"train_size={self.sizes['train']} must be at least {len(chosen)}, a shape of each category"
            )
        self.category_folders = {FOLDERS[name]: name for name in chosen}
        self.renderings, self.meshes = self.folder / "ShapeNetRendering", self.folder / "ShapeNetCore.v1"
        self.lists = {split: self.folder / LISTS[split][0] for split, count in self.sizes.items() if count}

    @property
    def folder(self) -> Path:
        """Where this set lies."""
        counts = "-".join(str(count) for count in self.sizes.values())
        names = "all" if self.class_names == list(MAKERS) else "-".join(self.class_names)
        return self.root / f"shapes-v{VERSION}-{names}-{counts}-{self.views}views-seed{self.seed}"

    def prepare_data(self) -> None:
        """Write the set, if it is not there."""
        if not self.folder.is_dir():
            rank_zero_info(f"writing {sum(self.sizes.values())} shapes, {self.views} views each, to {self.folder}")
            write_shapes(self.folder, self.class_names, self.sizes, self.views or 1, self.seed)

    def setup(self, stage: str) -> None:
        """Sample points and read pictures.

        Raises:
            FileNotFoundError: The set is not there: :meth:`prepare_data` writes it.
            ValueError: There is nothing to test on.
        """
        if not self.folder.is_dir():
            raise FileNotFoundError(f"there is no folder {self.folder}: run prepare_data(), which writes it")
        super().setup(stage)


# Writing


def write_shapes(folder: Path, categories: list[str], sizes: dict[Split, int], views: int = 5, seed: int = 0) -> None:
    """Write a set: ``ShapeNetCore.v1`` with the meshes, ``ShapeNetRendering`` with the pictures, and a list per split.

    It is written beside ``folder`` and moved there when it is whole: a run that is killed leaves no part of it.

    Args:
        folder: Where to; must not be there yet, unless another process was sooner with the same.
        categories: Names of the categories.
        sizes: Number of shapes of each split, which are of all categories in turn.
        views: Pictures of each shape.
        seed: Shapes are the same for the same seed, split and categories; fewer are the first of more.
    """
    with whole_folder(folder, "ShapeNetRendering") as whole:
        for split, count in sizes.items():
            names = [_write_shape(whole, categories[i % len(categories)], split, i, views, seed) for i in range(count)]
            if count:
                (whole / LISTS[split][0]).write_text("".join(f"{name}\n" for name in names))


def _write_shape(folder: Path, category: str, split: Split, index: int, views: int, seed: int) -> str:
    """Write the files of a shape; its name."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    shape = make_shape(category, rng)
    number = hashlib.md5(f"{VERSION} {seed} {split} {index}".encode(), usedforsecurity=False).hexdigest()
    name = f"{FOLDERS[category]}/{number}"
    mesh, pictures = folder / "ShapeNetCore.v1" / name, folder / "ShapeNetRendering" / name / "rendering"
    mesh.mkdir(parents=True)
    pictures.mkdir(parents=True)
    lines = [" ".join(["v", *(f"{value:.{DIGITS}f}" for value in vertex)]) for vertex in shape.vertices.tolist()]
    lines += ["f {} {} {}".format(*face) for face in (shape.faces + 1).tolist()]
    (mesh / "model.obj").write_text("\n".join(lines) + "\n")
    # As those of 3D-R2N2: azimuth, elevation, in-plane rotation, distance, field of view.
    cameras = [(rng.uniform(0, 360), rng.uniform(25, 30), 0, rng.uniform(0.65, 0.99), 25) for _ in range(views)]
    lines = [" ".join(f"{number:.6f}" for number in camera) for camera in cameras]
    (pictures / "rendering_metadata.txt").write_text("\n".join(lines) + "\n")
    seen = np.array([[float(word) for word in line.split()] for line in lines])[:, [0, 1, 3]]
    for view, pixels in enumerate(render(shape, seen)):
        (pictures / f"{view:02d}.png").write_bytes(encoded(pixels, ".png", 95))
    return name


# Pictures


class MadeShape(NamedTuple):
    """A closed mesh: vertices (V, 3) in a box around the origin of diagonal 1, y up; triangles (F, 3); their colours
    (F, 3) in [0, 1]."""  # noqa: D205, D209

    vertices: np.ndarray
    faces: np.ndarray
    colours: np.ndarray


def render(shape: MadeShape, cameras: np.ndarray, side: int = SIDE, samples: int = SAMPLES) -> list[np.ndarray]:
    """Pictures of a shape, uint8 (side, side, 4): red, green, blue, not multiplied by what is the share covered.

    Args:
        shape: What is seen.
        cameras: Azimuth and elevation in degrees, and distance, (N, 3).
        side: Of the pictures, in pixels.
        samples: Rays a pixel along each axis.
    """
    trimesh = mesh_library()
    try:
        from trimesh.ray.ray_pyembree import RayMeshIntersector
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("to render shapes needs embreex: pip install 'zoo[mesh]'") from error
    mesh = trimesh.Trimesh(shape.vertices * SCALE, shape.faces, process=False)
    rays = RayMeshIntersector(mesh)
    normals = np.cross(*(mesh.triangles[:, 1:] - mesh.triangles[:, :1]).transpose(1, 0, 2))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    pictures = []
    for turn, camera in zip(rotations(cameras), cameras, strict=True):
        directions, top, left = _rays(mesh.vertices @ turn.T - (0, 0, camera[2]), side, samples)
        flat = directions.reshape(-1, 3) @ turn
        hit = rays.intersects_first(np.broadcast_to(camera[2] * turn[2], flat.shape), flat)
        colours = shape.colours * _light(normals @ turn.T)[:, None]
        # The last row is what a ray that hits nothing, number -1, sees.
        seen = np.concatenate([np.pad(colours, ((0, 0), (0, 1)), constant_values=1), np.zeros((1, 4))])[hit]
        pictures.append(_picture(seen.reshape(*directions.shape[:2], 4), top, left, side, samples))
    return pictures


def _picture(seen: np.ndarray, top: int, left: int, side: int, samples: int) -> np.ndarray:
    """A picture, uint8 (side, side, 4), of a part of which is known what rays see: (h * samples, w * samples, 4)."""
    height, width = seen.shape[0] // samples, seen.shape[1] // samples
    total = seen.reshape(height, samples, width, samples, 4).sum((1, 3))
    total[..., :3] /= total[..., 3:].clip(1)
    total[..., 3] /= samples**2
    picture = np.zeros((side, side, 4), dtype=np.uint8)
    picture[top : top + height, left : left + width] = (total.clip(0, 1) * 255).round()
    return picture


def _rays(vertices: np.ndarray, side: int, samples: int) -> tuple[np.ndarray, int, int]:
    """Directions of the rays of the pixels that may see something, (h, w, 3), in the camera's frame.

    Args:
        vertices: What is to be seen, (V, 3), in the camera's frame.
        side: Of the picture, in pixels.
        samples: Rays a pixel along each axis.

    Returns:
        The directions, and the first row and column of these pixels.
    """
    places = vertices[:, :2] * (1, -1) / -vertices[:, 2:] * FOCAL_LENGTH * side + side / 2
    left, top = np.floor(places.min(0)).astype(int).clip(0, side - 1).tolist()
    right, bottom = np.ceil(places.max(0)).astype(int).clip(1, side).tolist()
    columns, rows = (
        ((np.arange(first * samples, last * samples) + 0.5) / samples - side / 2) / (FOCAL_LENGTH * side)
        for first, last in ((left, right), (top, bottom))
    )
    across, down = np.meshgrid(columns, rows)
    return np.stack([across, -down, -np.ones_like(across)], axis=-1), top, left


def _light(normals: np.ndarray) -> np.ndarray:
    """How bright triangles are, (F,): two lamps beside the camera, and the sky. Normals are in the camera's frame."""
    key, fill = np.array([-0.5, 0.75, 0.45]), np.array([0.8, 0.1, 0.6])
    lamps = 0.6 * (normals @ (key / np.linalg.norm(key))).clip(0) + 0.22 * (
        normals @ (fill / np.linalg.norm(fill))
    ).clip(0)
    return 0.4 + lamps + 0.06 * normals[:, 1]


# Shapes


class Part(NamedTuple):
    """A solid of manifold3d's, and its colour."""

    solid: Any
    colour: tuple[float, float, float]


def make_shape(category: str, rng: np.random.Generator) -> MadeShape:
    """A random shape of a category: one closed surface, y up, its front towards positive z."""
    while True:
        shape = _clean(_joined(MAKERS[category](rng)))
        mesh = mesh_library().Trimesh(shape.vertices, shape.faces, process=False)
        if mesh.is_watertight and mesh.is_winding_consistent and mesh.body_count == 1:
            return shape


def _joined(parts: list[Part]) -> MadeShape:
    """The union of solids."""
    library = _solids()
    whole = library.Manifold.batch_boolean([part.solid for part in parts], library.OpType.Add).simplify(TOLERANCE)
    mesh = whole.to_mesh()
    vertices, faces = np.array(mesh.vert_properties[:, :3], dtype=np.float64), np.array(mesh.tri_verts, dtype=np.int64)
    least, most = vertices.min(0), vertices.max(0)
    colours = {part.solid.original_id(): part.colour for part in parts}
    each = np.array([colours[number] for number in np.array(mesh.run_original_id).tolist()])
    colours_of_faces = np.repeat(each, np.diff(np.array(mesh.run_index)) // 3, axis=0)
    return MadeShape((vertices - (least + most) / 2) / np.linalg.norm(most - least), faces, colours_of_faces)


def _clean(shape: MadeShape) -> MadeShape:
    """A shape as its file will have it, without the slivers that a union leaves: what its digits say is one vertex."""
    vertices, index = np.unique(shape.vertices.round(DIGITS), axis=0, return_inverse=True)
    faces = np.sort(index.reshape(-1)[shape.faces], axis=1)
    distinct = (np.diff(faces, axis=1) > 0).all(axis=1)
    _, which, counts = np.unique(faces, axis=0, return_inverse=True, return_counts=True)
    good = distinct & (counts[which.reshape(-1)] == 1)  # two with the same corners are back to back
    used, faces = np.unique(index.reshape(-1)[shape.faces[good]], return_inverse=True)
    return MadeShape(vertices[used], faces.reshape(-1, 3), shape.colours[good])


def _planes(rng: np.random.Generator) -> list[Part]:
    """A hull, wings, a tail and engines; the nose towards positive z."""
    paint, trim = _colour(rng, WHITES), _colour(rng, BRIGHT)
    length, radius = rng.uniform(1.0, 1.4), rng.uniform(0.055, 0.1)
    nose, tail = rng.uniform(0.1, 0.25) * length, rng.uniform(0.25, 0.4) * length
    ends = [(0.0, -length / 2), (0.25 * radius, -length / 2), (radius, tail - length / 2)]
    ends += [(radius * math.cos(a), length / 2 - nose * (1 - math.sin(a))) for a in np.linspace(0, 1.4, 6)]
    parts = [_part(_lathe([*ends, (0.0, length / 2)]).rotate([90, 0, 0]), paint)]
    span, chord, sweep = rng.uniform(0.4, 0.7), rng.uniform(0.18, 0.32), rng.uniform(0.0, 0.4)
    middle, height = rng.uniform(-0.05, 0.15) * length, rng.choice([-0.5, 0.0, 0.7]) * radius
    rise = rng.uniform(0, 0.06)
    for side in (-1, 1):
        root, tip = (0.0, height, middle), (side * span, height + rise, middle - sweep * span)
        parts.append(_part(_wing(root, tip, chord, chord * 0.4, 0.03), trim))
        root, tip = (0.0, 0.0, -0.42 * length), (side * span * 0.38, 0.02, -0.46 * length - 0.2 * sweep * span)
        parts.append(_part(_wing(root, tip, chord * 0.55, chord * 0.3, 0.02), trim))
    root, tip = (0.0, 0.0, -0.4 * length), (0.0, radius + rng.uniform(0.14, 0.24), -0.48 * length)
    parts.append(_part(_wing(root, tip, chord * 0.7, chord * 0.35, 0.022), trim))
    grey, size = _colour(rng, METALS), rng.uniform(0.4, 0.6) * radius
    for place in [0.3, 0.6][: rng.integers(0, 3)]:
        for side in (-1, 1):
            x, y, z = side * place * span, height + place * rise - 0.7 * size, middle - sweep * place * span
            parts.append(_part(_rod((x, y, z - 0.3 * chord), (x, y, z + 0.75 * chord), 0.8 * size, size), grey))
    return parts


def _cabinets(rng: np.random.Generator) -> list[Part]:
    """A box with doors or drawers, their handles, and feet or a plinth."""
    wood, front, metal = _colour(rng, WOODS), _colour(rng, WOODS + WHITES), _colour(rng, METALS)
    width, height, depth = rng.uniform(0.4, 1.2), rng.uniform(0.4, 1.4), rng.uniform(0.3, 0.55)
    parts = [_part(_box((0, height / 2, 0), (width, height, depth)), wood)]
    columns, rows = (int(n) for n in rng.integers(1, (4, 5)))
    gap, z = 0.025, depth / 2
    for column in range(columns):
        for row in range(rows):
            x, y = ((column + 0.5) / columns - 0.5) * width, (row + 0.5) / rows * height
            extents = (width / columns - gap, height / rows - gap, 0.04)
            parts.append(_part(_box((x, y, z), extents), front))
            upright = extents[1] > extents[0]
            handle = (0.02, 0.4 * extents[1], 0.08) if upright else (0.4 * extents[0], 0.02, 0.08)
            parts.append(_part(_box((x + 0.36 * extents[0] * upright, y, z + 0.02), handle), metal))
    if rng.random() < 0.3:
        over = rng.uniform(0.02, 0.06)
        parts.append(_part(_box((0, height, 0), (width + 2 * over, 0.05, depth + 2 * over)), wood))
    return parts + _feet(width, depth, 0.02, rng.uniform(0.05, 0.2), rng.uniform(0.025, 0.05), 0.0, wood, rng)


def _chairs(rng: np.random.Generator) -> list[Part]:
    """A seat on legs or on a column, a back of a panel, slats or rails, and arms or none."""
    wood, cloth = _colour(rng, WOODS + METALS), _colour(rng, WOODS + BRIGHT)
    width, depth, height = rng.uniform(0.42, 0.6), rng.uniform(0.42, 0.58), rng.uniform(0.38, 0.52)
    thick, back = rng.uniform(0.04, 0.1), rng.uniform(0.38, 0.65)
    parts = [_part(_box((0, height, 0), (width, thick, depth)), cloth)]
    if rng.random() < 0.25:
        parts += _column(height, 0.55 * min(width, depth), rng.uniform(0.03, 0.05), wood, rng)
    else:
        parts += _feet(width, depth, height, height, rng.uniform(0.025, 0.05), rng.uniform(0, 0.1), wood, rng)
    lean, z = rng.uniform(0, 0.15), -depth / 2 + 0.03
    parts += _backrest(width, height, back, lean, z, rng.uniform(0.03, 0.06), wood, cloth, rng)
    if rng.random() < 0.4:
        rise, bar = rng.uniform(0.18, 0.26), rng.uniform(0.035, 0.06)
        for side in (-1, 1):
            x = side * (width / 2 - bar / 2)
            parts.append(_part(_box((x, height + rise, 0), (bar, bar, depth)), wood))
            parts.append(_part(_box((x, height + rise / 2, depth * 0.35), (bar, rise, bar)), wood))
            parts.append(_part(_box((x, height + rise / 2, z), (bar, rise + bar, 0.06)), wood))
    return parts


def _lamps(rng: np.random.Generator) -> list[Part]:
    """A foot, a pole, straight or bent, and a shade or a ball."""
    metal, shade = _colour(rng, METALS + WOODS), _colour(rng, WHITES + BRIGHT)
    height, foot, pole = rng.uniform(0.5, 1.5), rng.uniform(0.13, 0.22), rng.uniform(0.018, 0.04)
    parts = [_part(_lathe([(0, 0), (foot, 0), (foot, 0.03), (pole, rng.uniform(0.04, 0.1)), (0, 0.12)]), metal)]
    top = (0.0, height, 0.0)
    if rng.random() < 0.35:  # a desk lamp's arm, towards the front
        reach = rng.uniform(0.25, 0.5)
        knee = (0.0, 0.62 * height, -0.5 * reach)
        top = (0.0, height, 0.6 * reach)
        parts += [_part(_rod((0, 0.02, 0), knee, pole), metal), _part(_rod(knee, top, pole), metal)]
        parts += [_part(_ball(radius).translate(at), metal) for radius, at in ((1.3 * pole, knee), (0.05, top))]
    else:
        parts.append(_part(_rod((0, 0.02, 0), (0, height + 0.045, 0), pole), metal))
    size = rng.uniform(0.16, 0.32)
    if rng.random() < 0.25:
        return [*parts, _part(_ball(0.8 * size).translate(top), shade)]
    drop, upper = rng.uniform(0.8, 1.5) * size, rng.uniform(0.3, 0.9) * size
    wall = 0.02
    outline = [(0, 0.04), (upper - wall, 0.04 - wall), (size - wall, -drop), (size, -drop), (upper, 0.06), (0, 0.06)]
    hollow = _lathe(outline) if upper > 3 * wall else _lathe([(0, -drop), (size, -drop), (upper, 0.06), (0, 0.06)])
    return [*parts, _part(hollow.translate(top), shade)]


def _couches(rng: np.random.Generator) -> list[Part]:
    """A base, cushions, a back and arms; some with a longer seat at one end."""
    cloth, dark = _colour(rng, BRIGHT + WOODS), _colour(rng, WOODS)
    width, depth, height = rng.uniform(1.0, 2.1), rng.uniform(0.65, 0.9), rng.uniform(0.28, 0.42)
    back, arm = rng.uniform(0.3, 0.5), rng.uniform(0.1, 0.22)
    parts = [_part(_box((0, height / 2, 0), (width, height, depth)), cloth)]
    lean = rng.uniform(0, 0.15)
    low = _slab((0, height - 0.05, -depth / 2 + 0.1), (0, height + back, -depth / 2 + 0.1 - lean), width, 0.2)
    parts.append(_part(low, cloth))
    rise = rng.uniform(0.1, 0.75) * back
    for side in (-1, 1):
        centre = (side * (width - arm) / 2, (height + rise) / 2, 0.0)
        parts.append(_part(_box(centre, (arm, height + rise, depth)), cloth))
    count, inner = int(rng.integers(1, 4)), width - 2 * arm
    bright = (min(1.0, 1.12 * cloth[0]), min(1.0, 1.12 * cloth[1]), min(1.0, 1.12 * cloth[2]))
    for seat in range(count):
        centre = (((seat + 0.5) / count - 0.5) * inner, height + 0.03, 0.1)
        parts.append(_part(_box(centre, (inner / count - 0.03, 0.16, depth - 0.19)), bright))
    if rng.random() < 0.3:
        side, long = rng.choice([-1, 1]), rng.uniform(0.3, 0.6)
        extents = (width / 3, height + 0.08, long + 0.1)
        parts.append(_part(_box((side * width / 3, extents[1] / 2, depth / 2 + long / 2 - 0.05), extents), cloth))
    return parts + _feet(width, depth, 0.02, rng.uniform(0.05, 0.14), rng.uniform(0.03, 0.06), 0.0, dark, rng)


def _tables(rng: np.random.Generator) -> list[Part]:
    """A top, round or not, on legs, a column or two panels, with a shelf or none."""
    wood, other = _colour(rng, WOODS + WHITES), _colour(rng, WOODS + METALS)
    width, height, thick = rng.uniform(0.7, 1.7), rng.uniform(0.4, 0.8), rng.uniform(0.03, 0.08)
    if rng.random() < 0.35:
        radius = width / 2.4
        depth, leg_width = 2 * radius, 1.3 * radius
        top = _lathe([(0, -thick / 2), (radius, -thick / 2), (radius, thick / 2), (0, thick / 2)], 48)
        parts = [_part(top.translate([0, height, 0]), wood)]
    else:
        depth = leg_width = rng.uniform(0.45, 0.95)
        parts = [_part(_box((0, height, 0), (width, thick, depth)), wood)]
        leg_width = width
    span, bar = min(leg_width, width), rng.uniform(0.035, 0.08)
    kind = rng.random()
    if kind < 0.25:
        return parts + _column(height, 0.6 * min(span, depth), rng.uniform(0.04, 0.08), other, rng)
    if kind < 0.4:
        for side in (-1, 1):
            panel = (0.05, height, 0.6 * depth)
            parts.append(_part(_box((side * 0.4 * span, height / 2, 0), panel), other))
        return [*parts, _part(_box((0, 0.5 * height, 0), (0.8 * span, 0.1, 0.05)), other)]
    inset = span if span < width else min(depth, span)
    splay = rng.uniform(0, 0.06)
    parts += _feet(span, inset if span < width else depth, height, height, bar, splay, other, rng)
    if rng.random() < 0.3 and span == width:
        less = 2 * bar - 1.4 * splay  # to the middle of the legs
        parts.append(_part(_box((0, 0.3 * height, 0), (width - less, 0.035, depth - less)), wood))
    return parts


def _feet(
    width: float,
    depth: float,
    top: float,
    length: float,
    bar: float,
    splay: float,
    colour: tuple[float, float, float],
    rng: np.random.Generator,
) -> list[Part]:
    """Four legs under the corners of a box, from ``top`` down; square or round, and apart by ``splay`` at the floor."""
    round_ones = rng.random() < 0.5
    parts = []
    for x in (-1, 1):
        for z in (-1, 1):
            above = (x * (width / 2 - bar), top, z * (depth / 2 - bar))
            below = (above[0] + x * splay, top - length, above[2] + z * splay)
            leg = _rod(above, below, bar / 2, bar / 2 if splay == 0 else bar / 3, 10 if round_ones else 4)
            parts.append(_part(leg, colour))
    return parts


def _column(
    height: float, reach: float, radius: float, colour: tuple[float, float, float], rng: np.random.Generator
) -> list[Part]:
    """One leg in the middle, on a disc or a star of four or five."""
    parts = [_part(_rod((0, 0.01, 0), (0, height, 0), radius), colour)]
    if rng.random() < 0.5:
        disc = _lathe([(0, 0), (reach, 0), (reach, 0.025), (0, 0.07)])
        return [*parts, _part(disc, colour)]
    count = int(rng.integers(4, 6))
    for angle in 2 * math.pi * np.arange(count) / count:
        end = (reach * math.sin(angle), 0.02, reach * math.cos(angle))
        parts.append(_part(_rod((0, 0.06, 0), end, 0.03, 0.02), colour))
    return parts


def _backrest(
    width: float,
    height: float,
    back: float,
    lean: float,
    z: float,
    thick: float,
    wood: tuple[float, float, float],
    cloth: tuple[float, float, float],
    rng: np.random.Generator,
) -> list[Part]:
    """A panel, upright slats or rails between two posts, from the seat up."""

    def at(share: float) -> tuple[float, float, float]:
        return 0.0, height + share * back, z - share * lean

    kind = rng.choice(["panel", "slats", "rails"])
    if kind == "panel":
        return [_part(_slab(at(0), at(1), width, thick), cloth)]
    bar = 0.05
    posts = [-width / 2 + bar / 2, width / 2 - bar / 2]
    if kind == "slats":
        posts += np.linspace(posts[0], posts[1], int(rng.integers(3, 6)))[1:-1].tolist()
    parts = [_part(_slab(at(0), at(1), bar, thick).translate([x, 0, 0]), wood) for x in posts]
    rails = [0.9] if kind == "slats" else np.linspace(0.3, 0.92, int(rng.integers(2, 5))).tolist()
    tall = 0.07 / back
    return parts + [_part(_slab(at(share - tall), at(share + tall), width, 0.8 * thick), wood) for share in rails]


MAKERS: dict[str, Callable[[np.random.Generator], list[Part]]] = {
    "plane": _planes,
    "cabinet": _cabinets,
    "chair": _chairs,
    "lamp": _lamps,
    "couch": _couches,
    "table": _tables,
}
FOLDERS = {name: folder for folder, name in NAMES.items() if name in MAKERS}


# Parts of shapes

WOODS = [(0.55, 0.36, 0.2), (0.72, 0.52, 0.32), (0.36, 0.22, 0.13), (0.8, 0.66, 0.46), (0.45, 0.27, 0.2)]
METALS = [(0.5, 0.52, 0.55), (0.68, 0.69, 0.72), (0.27, 0.28, 0.3), (0.75, 0.62, 0.35)]
WHITES = [(0.88, 0.87, 0.84), (0.8, 0.83, 0.88), (0.93, 0.88, 0.76)]
BRIGHT = [
    (0.72, 0.22, 0.2),
    (0.2, 0.38, 0.66),
    (0.22, 0.52, 0.36),
    (0.88, 0.62, 0.2),
    (0.42, 0.32, 0.6),
    (0.2, 0.56, 0.6),
]


def _colour(rng: np.random.Generator, palette: list[tuple[float, float, float]]) -> tuple[float, float, float]:
    """One of a palette, a little lighter or darker."""
    red, green, blue = (
        (np.array(palette[int(rng.integers(len(palette)))]) * rng.uniform(0.85, 1.08)).clip(0, 1).tolist()
    )
    return red, green, blue


def _solids() -> Any:
    """The library that joins solids.

    Raises:
        ModuleNotFoundError: It is not installed; the message says how to install it.
    """
    try:
        import manifold3d
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("to make shapes needs manifold3d: pip install 'zoo[mesh]'") from error
    return manifold3d


def _part(solid: Any, colour: tuple[float, float, float]) -> Part:
    return Part(solid.as_original(), colour)


def _box(centre: tuple[float, ...], extents: tuple[float, ...]) -> Any:
    return _solids().Manifold.cube(extents, True).translate(centre)


def _hull(points: np.ndarray) -> Any:
    """The smallest convex solid around points (P, 3)."""
    return _solids().Manifold.hull_points(np.asarray(points, dtype=np.float64))


def _ball(radius: float) -> Any:
    return _solids().Manifold.sphere(radius, 40)


def _lathe(outline: list[tuple[float, float]], segments: int = 32) -> Any:
    """What turns around the y axis, from its outline (radius, height) counter-clockwise."""
    library = _solids()
    return library.Manifold.revolve(library.CrossSection([outline]), segments).rotate([-90, 0, 0])


def _rod(
    start: tuple[float, ...], end: tuple[float, ...], radius: float, last: float | None = None, corners: int = 14
) -> Any:
    """A rod between two points, which becomes thinner or thicker towards its end."""
    along = np.subtract(end, start)
    along = along / np.linalg.norm(along)
    across = np.cross(along, [1, 0, 0] if abs(along[0]) < 0.8 else [0, 0, 1])
    across /= np.linalg.norm(across)
    angles = 2 * np.pi * (np.arange(corners) + 0.5) / corners
    ring = np.cos(angles)[:, None] * across + np.sin(angles)[:, None] * np.cross(along, across)
    grow = math.sqrt(2) if corners == 4 else 1.0  # a square is as wide as the circle
    return _hull(np.concatenate([start + grow * radius * ring, end + grow * (radius if last is None else last) * ring]))


def _slab(low: tuple[float, ...], high: tuple[float, ...], width: float, thick: float) -> Any:
    """A board between two places, above each other, of some width in x and thickness in z."""
    corners = np.array([(x * width / 2, 0, z * thick / 2) for x in (-1, 1) for z in (-1, 1)])
    return _hull(np.concatenate([corners + low, corners + high]))


def _wing(root: tuple[float, ...], tip: tuple[float, ...], chord: float, last: float, thick: float) -> Any:
    """A wing between two places: thick before its middle, and sharp at both edges."""
    outward = np.subtract(tip, root)
    up = np.cross(outward / np.linalg.norm(outward), [0, 0, 1])
    profile = np.array([(0.5, 0.0), (0.2, 0.5), (0.2, -0.5), (-0.5, 0.08), (-0.5, -0.08)])
    ends = [
        np.array(place) + profile[:, :1] * (0, 0, size) + profile[:, 1:] * thick * share * up
        for place, size, share in ((root, chord, 1.0), (tip, last, 0.5))
    ]
    return _hull(np.concatenate(ends))
