"""Meshes from images: Pixel2Mesh's losses by term, and the meshes held against points of the true surface."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric

from zoo.running.mesh_pictures import Pair, Surface, log_meshes, meshes_figure, write_mesh
from zoo.running.optimizing import SchedulerCallable, configure_optimizers
from zoo.tasks.mesh_losses import Pix2MeshLoss
from zoo.tasks.mesh_scores import MeshScores, mesh_scores
from zoo.weights import NOT_SAVED, describe

THOUSANDTHS = 1000  # papers print Chamfer distances so many times as large
PUBLISHED_FACTOR = 3000  # of the loss in the published code, to which its weight decay goes
SHOWN = 6  # meshes in a report, drawn at random

Batch = dict[str, Tensor]


class Meshes(NamedTuple):
    """The vertices of N meshes after each of K deformations, in the camera's frame.

    Attributes:
        after: float (N, V_k, 3), after each deformation; the last are the result.
        before: Of the same shapes, before each: what the first starts from, and the stage before with a vertex more on
            each edge.
    """

    after: list[Tensor]
    before: list[Tensor]


class MeshTask(LightningModule):
    """Abstract: a subclass sets ``loss`` and defines ``meshes``, ``camera``, ``edges`` and ``faces``.

    A batch is a dict: ``image`` float32 (N, 3, H, W) in [0, 1], on white; ``points`` float32 (N, M, 3) on the true
    surface and ``normals`` float32 (N, M, 3) there, in the camera's frame (x to the right, y up, what is seen has a
    negative z; lengths are ShapeNet's by 0.57); ``intrinsics`` float32 (N, 3, 3), which map (x / -z, -y / -z, 1) to
    column and row in pixels; without them the model's own camera is taken; ``category`` int64 (N,). N may be 0.

    Logs ``train/loss`` and its terms ``train/chamfer_loss``, ``train/normal_loss``, ``train/laplacian_loss``,
    ``train/edge_loss`` and ``train/move_loss``, weighted and 3000 times as in the published code (every
    ``log_every_n_steps``); ``val/loss``, ``val/chamfer``, ``val/f_score``; on the test split ``test/chamfer``,
    ``test/f_score`` and ``test/f_score_2tau``, the means over the categories, each of them for every category that has
    a view (``test/chamfer_chair``), the first three after each deformation but the last (``test/chamfer_block_1``), and
    ``test/samples``, the number of views. Scores are those of :mod:`zoo.tasks.mesh_scores`, to which a mesh of more
    vertices is nearer; Chamfer distances are logged 1000 times as large, as papers print them.

    Args:
        class_names: Names of the categories, by which the scores are told; no weight depends on them. None takes all
            views for one category.
        optimizer: Makes the optimizer from the parameters.
        scheduler: Makes the schedule from the optimizer and the run's number of steps.
    """

    monitor = "val/chamfer"
    monitor_mode = "min"

    loss: Pix2MeshLoss
    example_input_array: Tensor

    def __init__(
        self, class_names: list[str] | None, optimizer: OptimizerCallable, scheduler: SchedulerCallable | None
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=[*NOT_SAVED])
        self.class_names = list(class_names or [])
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.val_loss = MeanMetric(nan_strategy="disable")
        self.val_scores = MeshScores(max(1, len(self.class_names)))
        self.test_scores = MeshScores(max(1, len(self.class_names)))
        self._block_scores: list[MeshScores] = []  # of a test: after each deformation but the last
        self._counted = 0  # views of this evaluation, in this process
        self._drawn: list[tuple[float, int, Pair]] = []  # a number that was drawn, the view's place, and what it shows
        self._draw = torch.Generator()

    @property
    def edges(self) -> list[Tensor]:
        """The edges int64 (E_k, 2) of the meshes of each stage."""
        raise NotImplementedError(f"{type(self).__name__} must define edges")

    @property
    def faces(self) -> Tensor:
        """The triangles int64 (F, 3) of the last stage's meshes, counter-clockwise from outside."""
        raise NotImplementedError(f"{type(self).__name__} must define faces")

    def meshes(self, images: Tensor, intrinsics: Tensor) -> Meshes:
        """The vertices of each stage of images (N, 3, H, W) and cameras (N, 3, 3) or (3, 3)."""
        raise NotImplementedError(f"{type(self).__name__} must define meshes()")

    def camera(self, height: int, width: int) -> Tensor:
        """The camera (3, 3) of images of that size that come without one."""
        raise NotImplementedError(f"{type(self).__name__} must define camera()")

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 3, H, W) in [0, 1], on white, to vertices (N, V, 3) of the last stage's meshes."""
        return self.meshes(images, self.camera(*images.shape[-2:])).after[-1]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The recipe's optimizer over all trainable parameters, its schedule in steps."""
        return configure_optimizers(self, self.optimizer, self.scheduler)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch; its terms are logged only at the steps that reach a logger."""
        terms = self._terms(self._meshes_of(batch), batch)
        self.loss_terms = {f"{name}_loss": value.detach() for name, value in terms.items()}  # for zoo.running.nonfinite
        loss = torch.stack(list(terms.values())).sum()
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            self.log("train/loss", loss, prog_bar=True)
            self.log_dict({f"train/{name}_loss": value for name, value in terms.items()})
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count a batch of the validation split."""
        if len(batch["image"]):
            meshes = self._meshes_of(batch)
            loss = torch.stack(list(self._terms(meshes, batch).values())).sum()
            self.val_loss.update(loss.expand(len(batch["image"])))  # not by a weight: torchmetrics drops it here
            self._count(meshes, batch, self.val_scores)

    def on_validation_epoch_end(self) -> None:
        """Log over the epoch and all processes; every process takes part, also one that had no view."""
        scores = self.val_scores.compute()
        self.log("val/loss", self.val_loss)
        # Every process has all meshes' scores.
        chamfer = _printed("chamfer", scores["chamfer"])
        self.log("val/chamfer", chamfer, prog_bar=True, rank_zero_only=False, sync_dist=False)
        self.log("val/f_score", scores["f_score"], prog_bar=True, rank_zero_only=False, sync_dist=False)
        self.val_scores.reset()
        self._counted = 0

    def on_test_epoch_start(self) -> None:
        """Draw the same views again."""
        self._draw.manual_seed(0)
        classes = max(1, len(self.class_names))
        self._block_scores = [MeshScores(classes).to(self.device) for _ in self.edges[:-1]]

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Count a batch of the test split; six views of all are drawn to be shown, good or bad."""
        if not len(batch["image"]):
            return
        meshes = self._meshes_of(batch)
        places = self._count(meshes, batch, self.test_scores, *self._block_scores).tolist()
        numbers = torch.rand(len(places), generator=self._draw).tolist()
        worst = self._drawn[-1][0] if len(self._drawn) == SHOWN else math.inf
        for row in (row for row, number in enumerate(numbers) if number < worst):
            self._drawn.append((numbers[row], places[row], self._pair(meshes.after[-1][row], batch, row)))
        self._drawn = sorted(self._drawn, key=lambda each: each[0])[:SHOWN]

    def on_test_epoch_end(self) -> None:
        """Log all scores, and the drawn views with their meshes: as a sheet, turning, and to be turned by hand."""
        scores = self.test_scores.compute()
        self.log_dict({f"test/{name}": _printed(name, value) for name, value in scores.items()})
        if len(self.class_names) > 1:
            self.log_dict(
                {
                    f"test/{name}_{category}": _printed(name, value)
                    for name, values in self.test_scores.per_class().items()
                    for category, value in zip(self.class_names, values, strict=True)
                    if not math.isnan(value)
                }
            )
        for number, block in enumerate(self._block_scores, 1):
            self.log_dict(
                {f"test/{name}_block_{number}": _printed(name, each) for name, each in block.compute().items()}
            )
        self.log("test/samples", float(self.test_scores.samples()))
        if self._drawn:
            log_meshes(self, "test/meshes", [self._with_true_mesh(place, pair) for _, place, pair in self._drawn])
        self.test_scores.reset()
        self._block_scores = []
        self._counted, self._drawn = 0, []

    def predict_step(self, batch: Batch | Tensor, batch_idx: int) -> list[dict[str, Any]]:
        """For each image the ``vertices`` float32 (V, 3), in the camera's frame, and the ``faces`` of its mesh.

        A batch is as in training, but only ``image`` and ``intrinsics`` are looked at, or images alone.
        """
        meshes = self._meshes_of(batch if isinstance(batch, dict) else {"image": batch})
        return [{"vertices": vertices, "faces": self.faces} for vertices in meshes.after[-1]]

    def write_prediction(self, folder: Path, number: int, prediction: dict[str, Any]) -> dict[str, Any]:
        """Write one of :meth:`predict_step`'s meshes to ``<folder>/meshes/<number>.glb``.

        Returns:
            What ``predictions.jsonl`` says of it: ``mesh``, its file in the folder, and ``extents``, width, height and
            depth.

        Raises:
            ImportError: trimesh is not installed.
        """
        name = f"meshes/{number:05d}.glb"
        write_mesh(folder / name, prediction["vertices"], prediction["faces"])
        return {"mesh": name, "extents": extents(prediction["vertices"])}

    def draw_predictions(self, batch: Batch | Tensor, predictions: list[dict[str, Any]]) -> Any:
        """Six images evenly over a batch with their meshes, and the true points where there are any."""
        if isinstance(batch, Tensor):
            batch = {"image": batch}
        rows = torch.linspace(0, len(predictions) - 1, min(SHOWN, len(predictions))).long().tolist()
        return meshes_figure([self._pair(predictions[row]["vertices"], batch, row) for row in rows])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in the file what it is, so that ``zoo.load`` can rebuild it without a recipe."""
        checkpoint["zoo"] = describe(self)

    def _meshes_of(self, batch: Batch) -> Meshes:
        images = batch["image"]
        own = batch.get("intrinsics")
        return self.meshes(images, self.camera(*images.shape[-2:]) if own is None else own)

    def _terms(self, meshes: Meshes, batch: Batch) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = self.loss(*meshes, self.edges, batch["points"], batch["normals"])
        return {name: PUBLISHED_FACTOR * value for name, value in terms.items()}

    def _count(self, meshes: Meshes, batch: Batch, scores: MeshScores, *earlier: MeshScores) -> Tensor:
        """Count a batch of an evaluation, and its earlier stages; the places int64 (N,) of its views in the split."""
        count = len(batch["image"])
        ranks = self.trainer.world_size
        places = torch.arange(self._counted, self._counted + count) * ranks + self.trainer.global_rank
        self._counted += count
        labels = batch["category"].cpu() if self.class_names else torch.zeros(count, dtype=torch.int64)
        for vertices, metric in zip([meshes.after[-1], *meshes.after], [scores, *earlier], strict=False):
            metric.update(vertices, batch["points"], labels, places)
        return places

    def _pair(self, vertices: Tensor, batch: Batch, row: int) -> Pair:
        """An image of a batch beside its mesh and, where there are any, the true points; on the CPU."""
        predicted = Surface(vertices.detach().float().cpu(), self.faces.cpu(), None)
        image = batch["image"][row].detach().float().cpu()
        if "points" not in batch:
            return Pair(image, predicted, None, "")
        points, normals = batch["points"][row].cpu(), batch["normals"][row].cpu()
        chamfer, f_score, _ = mesh_scores(predicted.points[None], points[None])[0].tolist()
        name = self.class_names[int(batch["category"][row])] if self.class_names and "category" in batch else ""
        caption = f"{name}\nChamfer {_printed('chamfer', chamfer):.2f}, F {f_score:.1%}".strip()
        return Pair(image, predicted, Surface(points, None, normals), caption)

    def _with_true_mesh(self, place: int, pair: Pair) -> Pair:
        """In place of the true points the mesh that they are from, if the data module can give it."""
        mesh_of = getattr(getattr(self.trainer, "datamodule", None), "mesh", None)
        if mesh_of is None:
            return pair
        try:
            vertices, faces = mesh_of("test", place)
        except ValueError:  # it has points only
            return pair
        return pair._replace(true=Surface(vertices, faces, None))


def extents(vertices: Tensor) -> list[float]:
    """Width, height and depth of vertices (V, 3)."""
    return [round(float(value), 4) for value in vertices.amax(0) - vertices.amin(0)]


def _printed(name: str, score: float) -> float:
    """A score as papers print it."""
    return THOUSANDTHS * score if name == "chamfer" else score
