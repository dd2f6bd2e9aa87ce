"""What training a mesh towards points of the true surface means: nearest points, Chamfer distance, Pixel2Mesh's losses.

Paper: Wang et al., 2018, Pixel2Mesh, https://arxiv.org/abs/1804.01654 (section 3.4), with the weights of its code.
Lecture: EECS 498-007, lecture 17, "Shape comparison".

Meshes are vertices (N, V, 3) with edges (E, 2) that all N share; the truth is points (N, M, 3) with unit normals.
Distances are squared throughout, as the paper and the lecture have them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

PAIRS = 2**24  # of points whose distances are held at a time on a GPU: 64 MiB
LEAF = 24  # points of a tree's leaf
SHORTEST = 1e-6  # length of an edge below which its direction counts for less; the published code's


def nearest(vertices: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """For each vertex the nearest of the points, and for each point the nearest of the vertices; of several, any.

    Exact, and without the N x V x M distances: on a CPU with trees, pynanoflann's where it is installed, else scipy's;
    elsewhere with all distances of a few at a time. The trees are no faster than that where one side is a small heap
    amidst the other. Where a coordinate is NaN or infinite, the answer is any place.

    Args:
        vertices: float (N, V, 3).
        points: float (N, M, 3).

    Returns:
        int64 (N, V), places among the M, and (N, M), places among the V.

    Raises:
        ValueError: The shapes do not fit, or there are no points.
        ImportError: The tensors are on a CPU, and neither pynanoflann nor scipy is installed.
    """
    _check(vertices, points)
    vertices, points = vertices.detach(), points.detach()
    if vertices.device.type == "cpu":
        return _by_trees(vertices, points)
    return _by_distances(vertices, points, PAIRS), _by_distances(points, vertices, PAIRS)


def _check(points: Tensor, others: Tensor) -> None:
    fits = points.ndim == others.ndim == 3 and points.shape[::2] == others.shape[::2] and points.shape[2] == 3
    if not fits or not points.shape[1] or not others.shape[1]:
        raise ValueError(
            f"points (N, V, 3) and (N, M, 3) with V and M above 0 are wanted: "
            f"got {tuple(points.shape)} and {tuple(others.shape)}"
        )


def _by_trees(vertices: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    # A tree refuses what is not finite; a loss that is NaN is for the run to tell, which knows the batch. Of numbers
    # that do not lie one behind the other pynanoflann takes others than are meant, and says nothing.
    sides = [each.cpu().double().nan_to_num(0, 0, 0).contiguous().numpy() for each in (vertices, points)]
    search: Callable[[np.ndarray, np.ndarray, int], list[np.ndarray]]
    try:
        from pynanoflann import KDTree
    except ImportError:
        search = _by_scipy
    else:
        search = partial(_by_nanoflann, KDTree)
    threads = torch.get_num_threads()
    found = [search(mesh, truth, threads) for mesh, truth in zip(*sides, strict=True)]
    there, back = (torch.from_numpy(np.stack(places).astype(np.int64)) for places in zip(*found, strict=True))
    return there, back


def _by_nanoflann(tree: Any, mesh: np.ndarray, truth: np.ndarray, threads: int) -> list[np.ndarray]:
    """Of each of either side the nearest of the other; takes 0.7 of scipy's time."""
    places = []
    for own, other in ((mesh, truth), (truth, mesh)):
        index = tree(n_neighbors=1, leaf_size=LEAF)
        index.fit(other)
        places.append(index.kneighbors(own, n_jobs=threads)[1][:, 0])
    return places


def _by_scipy(mesh: np.ndarray, truth: np.ndarray, threads: int) -> list[np.ndarray]:
    try:
        from scipy.spatial import cKDTree
    except ImportError as error:
        raise ImportError("distances between meshes need scipy: pip install 'zoo[mesh]'") from error
    trees = [cKDTree(each, leafsize=LEAF, balanced_tree=False) for each in (mesh, truth)]
    places = [np.empty(len(each), np.int64) for each in (mesh, truth)]
    for out, own, other in ((places[0], *trees), (places[1], *trees[::-1])):
        # Those of a leaf after each other need the same part of the other tree: a fifth of the time is saved.
        out[own.indices] = other.query(own.data[own.indices], workers=threads)[1]
    return places


def _by_distances(points: Tensor, others: Tensor, pairs: int) -> Tensor:
    """All distances of as many points at a time as make ``pairs``, each from the difference of the coordinates."""
    points, others = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (points, others))
    rows = max(1, pairs // max(1, others.shape[0] * others.shape[1]))
    # By a matrix product, which is cdist's way with many points, the smallest distances lose their digits.
    parts = [
        torch.cdist(part, others, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)
        for part in points.split(rows, dim=1)
    ]
    return torch.cat(parts, dim=1)


def take(values: Tensor, places: Tensor) -> Tensor:
    """Of values (N, M, C) those at places (N, V): (N, V, C)."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[2]))


def distances(vertices: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances to the nearest of the other side, both ways; gradients flow to both.

    Args:
        vertices: float (N, V, 3).
        points: float (N, M, 3).

    Returns:
        Of each vertex (N, V), of each point (N, M), and which point is nearest to each vertex, int64 (N, V).

    Raises:
        ValueError: As for :func:`nearest`.
        ImportError: As for :func:`nearest`.
    """
    places, back = nearest(vertices, points)
    to_points = (vertices - take(points, places)).square().sum(-1)
    to_vertices = (points - take(vertices, back)).square().sum(-1)
    return to_points, to_vertices, places


def exact_distances(vertices: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`distances`, for scores: float64 and without gradients, on the CPU, as not every device has float64.

    The nearest are looked for where the tensors are.

    Args:
        vertices: float (N, V, 3).
        points: float (N, M, 3).

    Returns:
        Of each vertex (N, V), and of each point (N, M).

    Raises:
        ValueError: As for :func:`nearest`.
        ImportError: As for :func:`nearest`.
    """
    places, back = (each.cpu() for each in nearest(vertices, points))
    vertices, points = (each.detach().cpu().double() for each in (vertices, points))
    to_points = (vertices - take(points, places)).square().sum(-1)
    return to_points, (points - take(vertices, back)).square().sum(-1)


def chamfer_distance(vertices: Tensor, points: Tensor) -> Tensor:
    """Mean squared distance of the vertices to the points, plus that of the points to the vertices.

    Args:
        vertices: float (N, V, 3).
        points: float (N, M, 3).

    Returns:
        float (N,). The lecture's definition has sums in place of the means.

    Raises:
        ValueError: As for :func:`nearest`.
        ImportError: As for :func:`nearest`.
    """
    to_points, to_vertices, _ = distances(vertices, points)
    return to_points.mean(1) + to_vertices.mean(1)


def edge_loss(vertices: Tensor, edges: Tensor) -> Tensor:
    """Mean squared length of the edges (E, 2) of vertices (N, V, 3)."""
    return (vertices[:, edges[:, 0]] - vertices[:, edges[:, 1]]).square().sum(-1).mean()


def normal_loss(vertices: Tensor, edges: Tensor, normals: Tensor) -> Tensor:
    """How far edges are from being at right angles to the surface's normals at both ends.

    Args:
        vertices: float (N, V, 3).
        edges: int64 (E, 2).
        normals: float (N, V, 3), for each vertex that of the true point nearest to it.

    Returns:
        Mean of the absolute cosine over both ends of all edges, in [0, 1].
    """
    directions = F.normalize(vertices[:, edges[:, 0]] - vertices[:, edges[:, 1]], dim=-1, eps=SHORTEST)
    units = F.normalize(normals, dim=-1)
    cosines = [(directions * units[:, ends]).sum(-1).abs() for ends in edges.unbind(1)]
    return torch.stack(cosines).mean()


def laplacian(vertices: Tensor, edges: Tensor) -> Tensor:
    """Of each vertex of (N, V, 3) the difference from the mean of its neighbours by edges (E, 2): (N, V, 3)."""
    both = torch.cat([edges, edges.flip(1)])
    sums = torch.zeros_like(vertices).index_add(1, both[:, 0], vertices[:, both[:, 1]])
    return vertices - sums / both[:, 0].bincount(minlength=vertices.shape[1])[:, None]


def laplacian_loss(after: Tensor, before: Tensor, edges: Tensor) -> Tensor:
    """Mean squared change of the vertices' differences from their neighbours, (N, V, 3) after and before."""
    return laplacian(after - before, edges).square().sum(-1).mean()


def move_loss(after: Tensor, before: Tensor) -> Tensor:
    """Mean squared way of the vertices (N, V, 3) from before to after."""
    return (after - before).square().sum(-1).mean()


class Pix2MeshLoss(nn.Module):
    """Pixel2Mesh's loss: five terms, each the sum over the stages, mean over the meshes.

    The defaults are those of the published code, which has 3000 times all of them; the paper names 0.3 for the
    Laplacian.

    Args:
        opposite: Weight of the mean squared distance of the vertices to the points; that of the points to the vertices
            weighs 1.
        normal: Weight of :func:`normal_loss`.
        laplacian: Weight of :func:`laplacian_loss`.
        first_laplacian: What it is multiplied by in the first stage, which the ellipsoid must leave.
        edge: Weight of :func:`edge_loss`.
        move: Weight of :func:`move_loss` in all stages but the first.
    """

    def __init__(
        self,
        opposite: float = 0.55,
        normal: float = 1.6e-4,
        laplacian: float = 0.5,
        first_laplacian: float = 0.1,
        edge: float = 0.1,
        move: float = 1 / 30,
    ) -> None:
        super().__init__()
        self.opposite = opposite
        self.normal = normal
        self.laplacian = laplacian
        self.first_laplacian = first_laplacian
        self.edge = edge
        self.move = move

    def forward(
        self, after: list[Tensor], before: list[Tensor], edges: list[Tensor], points: Tensor, normals: Tensor
    ) -> dict[str, Tensor]:
        """Compute the terms, weights included: the loss is their sum.

        Args:
            after: Vertices float (N, V_k, 3) after each stage.
            before: Those before, of the same shapes.
            edges: int64 (E_k, 2) of each stage.
            points: float (N, M, 3) on the true surface.
            normals: float (N, M, 3), the surface's there.

        Returns:
            ``chamfer``, ``normal``, ``laplacian``, ``edge`` and ``move``, scalars.

        Raises:
            ValueError: As for :func:`nearest`.
            ImportError: As for :func:`nearest`.
        """
        stages = zip(after, before, edges, strict=True)
        terms = [self._stage(k == 0, *stage, points, normals) for k, stage in enumerate(stages)]
        return {name: torch.stack([stage[name] for stage in terms]).sum() for name in terms[0]}

    def _stage(
        self, first: bool, after: Tensor, before: Tensor, edges: Tensor, points: Tensor, normals: Tensor
    ) -> dict[str, Tensor]:
        to_points, to_vertices, places = distances(after, points)
        change = laplacian_loss(after, before, edges) * (self.first_laplacian if first else 1)
        return {
            "chamfer": to_vertices.mean() + self.opposite * to_points.mean(),
            "normal": self.normal * normal_loss(after, edges, take(normals, places)),
            "laplacian": self.laplacian * change,
            "edge": self.edge * edge_loss(after, edges),
            "move": self.move * (after.new_zeros(()) if first else move_loss(after, before)),
        }
