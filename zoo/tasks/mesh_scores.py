"""How near meshes come to the true surface: Chamfer distance and F-score, as Pixel2Mesh's paper counts them.

Paper: Wang et al., 2018, Pixel2Mesh, https://arxiv.org/abs/1804.01654 (section 4.1): the predicted vertices against
points of the true surface, models at 0.57 times ShapeNet's size, squared distances throughout. Other protocols (points
sampled from both surfaces, meshes of another size) give other numbers, which cannot be compared with these.

Scales: the Chamfer distance is in squared units of length, of which papers print 1000 times; F-scores lie in [0, 1], of
which papers print 100 times.
"""

import math
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, distributed
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from zoo.tasks.mesh_losses import exact_distances

TAU = 1e-4  # squared distance up to which a point is right: 0.01 in length
NAMES = ["chamfer", "f_score", "f_score_2tau"]


def mesh_scores(vertices: Tensor, points: Tensor, tau: float = TAU) -> Tensor:
    """Chamfer distance and F-scores of each of N meshes.

    An F-score is the harmonic mean of two shares: of the vertices that have a point within the threshold (precision),
    and of the points that have a vertex there (recall); 0 where both are 0. The threshold itself is within.

    Args:
        vertices: float (N, V, 3).
        points: float (N, M, 3).
        tau: The threshold, of the squared distance.

    Returns:
        float64 (N, 3), on the CPU: Chamfer distance (mean squared distance one way plus that the other way), F-score at
        tau and at 2 tau. NaN for a mesh or points that are not finite.

    Raises:
        ValueError: The shapes do not fit, or there are no points.
        ImportError: The tensors are on a CPU and scipy is not installed.
    """
    to_points, to_vertices = exact_distances(vertices, points)
    chamfer = to_points.mean(1) + to_vertices.mean(1)
    columns = [chamfer]
    for threshold in (tau, 2 * tau):
        precision, recall = ((side <= threshold).double().mean(1) for side in (to_points, to_vertices))
        f_score = 2 * precision * recall / (precision + recall).clamp(min=torch.finfo(torch.float64).tiny)
        columns.append(torch.where(chamfer.isfinite(), f_score, math.nan))
    return torch.stack(columns, dim=1)


class MeshScores(Metric):
    """Chamfer distance and F-scores, the mean over categories of each one's mean, over all processes' meshes.

    What it keeps are four numbers a mesh, on the CPU. ``update`` and ``compute`` are what it is for; ``forward``, a
    value for a single batch, it has not.

    A sample (one view of a model) is known by its id. Given twice with the same truth, as a padding sampler does, it is
    counted once (with the mesh that came first), with a warning; given twice with different ones it is an error.

    Args:
        num_classes: Number of categories C.
        tau: Squared distance up to which a point is right.

    Raises:
        ValueError: There is no category, or ``tau`` is not positive.
    """

    full_state_update = False

    def __init__(self, num_classes: int = 1, tau: float = TAU) -> None:
        super().__init__(sync_on_compute=False)  # it gathers by itself, once for all
        if num_classes < 1 or not tau > 0:
            raise ValueError(f"num_classes={num_classes} must be at least 1 and tau={tau} above 0")
        self.num_classes = num_classes
        self.tau = tau
        self._rows: list[_Rows] = []
        self._everyones: _Rows | None = None

    def update(self, vertices: Tensor, points: Tensor, labels: Tensor, ids: Tensor) -> None:
        """Count a batch, which may be empty.

        Args:
            vertices: float (N, V, 3), what was predicted.
            points: float (N, M, 3) on the true surface. They must not be drawn anew each time.
            labels: int64 (N,), the categories, in 0…C - 1.
            ids: int64 (N,), by which samples are told apart, over all processes.

        Raises:
            ValueError: They are not equally many, a shape does not fit, or a label is no category.
            ImportError: The tensors are on a CPU and scipy is not installed.
        """
        if not len(vertices) == len(points) == len(labels) == len(ids):
            counts = f"{len(vertices)} meshes, {len(points)} sets of points, {len(labels)} labels and {len(ids)} ids"
            raise ValueError(f"{counts} were given: there must be one of each for every sample")
        if not len(ids):
            return
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(f"labels must be 0 to {self.num_classes - 1}: got {labels.unique().tolist()}")
        scores = mesh_scores(vertices, points, self.tau)
        truths = points.detach().cpu().double().sum((1, 2))  # enough to tell different truths
        self._everyones = None
        self._rows.append((torch.stack([ids, labels], 1).cpu(), torch.cat([scores, truths[:, None]], 1)))

    def compute(self) -> dict[str, float]:
        """The scores as the paper has them; every process must call it, and each gets the same.

        Returns:
            ``chamfer``, ``f_score`` and ``f_score_2tau``: the mean over those categories that have a sample. NaN
            without samples: as NaN it is nobody's best, and ModelCheckpoint takes any number for better.

        Raises:
            ValueError: Two samples with different truths have the same id.
        """
        if not self.samples():
            rank_zero_warn("there is no mesh that could be scored: the scores are NaN")
        means = self._means()[self._counts() > 0]
        return dict(zip(NAMES, means.mean(0).tolist(), strict=True))

    def per_class(self) -> dict[str, list[float]]:
        """Each score's mean over the samples of each of the C categories, NaN where it has none."""
        return dict(zip(NAMES, self._means().T.tolist(), strict=True))

    def over_samples(self) -> dict[str, float]:
        """Each score's mean over all samples, so that a category weighs as much as it has; NaN without samples."""
        return dict(zip(NAMES, self._all_rows()[1][:, :3].mean(0).tolist(), strict=True))

    def samples(self) -> int:
        """The number of samples that were counted, over all processes; every process must call it."""
        return len(self._all_rows()[0])

    def reset(self) -> None:
        """Forget all meshes."""
        super().reset()
        self._rows = []
        self._everyones = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Not there: a batch seldom has every category.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("call update() for each batch and compute() at the end")

    def _counts(self) -> Tensor:
        return self._all_rows()[0][:, 1].bincount(minlength=self.num_classes)

    def _means(self) -> Tensor:
        """Of each category: (C, 3)."""
        keys, values = self._all_rows()
        sums = torch.zeros(self.num_classes, 3, dtype=torch.float64).index_add(0, keys[:, 1], values[:, :3])
        return sums / self._counts()[:, None]

    def _all_rows(self) -> "_Rows":
        if self._everyones is None:
            none = (torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 4, dtype=torch.float64))
            keys, values = (torch.cat(parts) for parts in zip(none, *self._rows, strict=True))
            self._everyones = _once(_gather(keys, self.device), _gather(values, self.device))
        return self._everyones


_Rows = tuple[Tensor, Tensor]  # int64 (N, 2): id, category; float64 (N, 4): the scores, and a sum of the truth


def _gather(rows: Tensor, device: torch.device) -> Tensor:
    """Every process's rows, those of the first process first, on the CPU."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return rows
    return torch.cat([share.cpu() for share in gather_all_tensors(rows.to(device))])


def _once(keys: Tensor, values: Tensor) -> _Rows:
    """Each sample once, by its id."""
    order = keys[:, 0].argsort(stable=True)
    keys, values = keys[order], values[order]
    again = torch.zeros(len(keys), dtype=torch.bool)
    again[1:] = keys[1:, 0] == keys[:-1, 0]
    pairs = again.nonzero()[:, 0]
    alike = torch.isclose(values[pairs, 3], values[pairs - 1, 3], rtol=1e-9, atol=1e-9, equal_nan=True)
    if other := keys[pairs[~alike | (keys[pairs, 1] != keys[pairs - 1, 1])], 0].tolist():
        raise ValueError(f"two samples with different truths have the id {other[0]}: it must be unique")
    if len(pairs):
        rank_zero_warn(f"{len(pairs)} of {len(keys)} samples were scored twice (a padding sampler?) and count once")
    return keys[~again], values[~again]
