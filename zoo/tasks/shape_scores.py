"""How near shapes come to true ones as solids and as clouds of points: voxel IoU, Chamfer distances, F1 at a radius.

Lecture: EECS 498-007, lecture 17, "Shape comparison". :mod:`zoo.tasks.mesh_scores` has what Pixel2Mesh's paper counts.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zoo.tasks.mesh_losses import exact_distances

RADIUS = 0.01  # length up to which a point is right, with models at 0.57 times ShapeNet's size


class PointScores(NamedTuple):
    """Scores of N clouds of points, each float64 (N,) on the CPU; NaN where a point is not finite.

    Attributes:
        chamfer_l1: Mean distance to the nearest point of the other cloud, one way plus the other way.
        chamfer_l2: The same of squared distances.
        precision: Share of the points with a true one within the radius, in [0, 1].
        recall: Share of the true points with one within the radius.
        f1: Harmonic mean of both; 0 where both are 0.
    """

    chamfer_l1: Tensor
    chamfer_l2: Tensor
    precision: Tensor
    recall: Tensor
    f1: Tensor


def point_scores(points: Tensor, true: Tensor, radius: float = RADIUS) -> PointScores:
    """Hold clouds of points against true ones.

    The Chamfer distances weigh a few points far away as much as many nearby ones; F1 does not, the lecture says.

    Args:
        points: float (N, P, 3), best sampled evenly over the surface that they stand for.
        true: float (N, M, 3).
        radius: Distance up to which a point is right, in units of length.

    Raises:
        ValueError: The shapes do not fit, or there are no points.
        ImportError: The tensors are on a CPU and scipy is not installed.
    """
    squares = exact_distances(points, true)
    one_way, other_way = (side.sqrt() for side in squares)
    finite = (one_way.mean(1) + other_way.mean(1)).isfinite()
    precision, recall = ((side <= radius).double().mean(1) for side in (one_way, other_way))
    f1 = 2 * precision * recall / (precision + recall).clamp(min=torch.finfo(torch.float64).tiny)
    return PointScores(
        one_way.mean(1) + other_way.mean(1),
        squares[0].mean(1) + squares[1].mean(1),
        *(torch.where(finite, score, torch.nan) for score in (precision, recall, f1)),
    )


def voxel_iou(mesh: tuple[Tensor, Tensor], true: tuple[Tensor, Tensor], cells: int = 32) -> float:
    """Volume that two solids share, over the volume that either has, counted on a grid.

    The grid has ``cells`` cells along each side of the box around both, and a cell is inside of a solid if its middle
    is: if a ray from there passes the surface an odd number of times. What a mesh that passes through itself covers
    twice is thus outside of it. Parts thinner than a cell are seen by chance, which the lecture holds against this
    score.

    Args:
        mesh: Vertices float (V, 3) and triangles int64 (F, 3) of a closed surface.
        true: Likewise.
        cells: Along each side of the grid.

    Returns:
        In [0, 1]; NaN if a vertex is not finite, or if no cell is inside of either.

    Raises:
        ValueError: A surface is not closed, or ``cells`` is below 1.
        ImportError: embreex or trimesh is not installed.
    """
    if cells < 1:
        raise ValueError(f"cells={cells} must be at least 1")
    vertices = [each[0].detach().cpu().double().numpy() for each in (mesh, true)]
    if not all(np.isfinite(each).all() for each in vertices):
        return float("nan")
    both = np.concatenate(vertices)
    low, high = both.min(0), both.max(0)
    middles = (np.arange(cells) + 0.5) / cells
    grid = np.stack(np.meshgrid(middles, middles, middles, indexing="ij"), axis=-1).reshape(-1, 3)
    # In units of the box: rays are shot in float32, whose digits small shapes far from the origin would lose.
    scaled = [(each - low) / np.maximum(high - low, np.finfo(np.float64).tiny) for each in vertices]
    inside, truly = (
        _inside(each, faces.cpu().numpy(), grid) for each, (_, faces) in zip(scaled, (mesh, true), strict=True)
    )
    either = int((inside | truly).sum())
    return int((inside & truly).sum()) / either if either else float("nan")


def _inside(vertices: np.ndarray, faces: np.ndarray, grid: np.ndarray) -> Any:
    """Which points of a grid (G, 3) are inside of a closed surface: bool (G,)."""
    try:
        import trimesh
        from trimesh.ray.ray_pyembree import RayMeshIntersector
    except ImportError as error:
        raise ImportError(f"voxels of meshes need {error.name}: pip install 'zoo[mesh]'") from error
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    if not mesh.is_watertight:
        raise ValueError(f"a surface of {len(vertices)} vertices and {len(faces)} triangles is not closed: no volume")
    return RayMeshIntersector(mesh).contains_points(grid)
