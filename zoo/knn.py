"""k-nearest neighbours: a classifier that remembers the training images and lets the nearest ones vote.

Lecture: EECS 498-007, lecture 2, "Image classification"; assignment 1: the distance of raw pixels, the majority of the
k nearest, the smallest label where classes have equally many votes, and a choice of k by cross-validation.
"Training" is one pass over the data and no optimization; the images are part of the checkpoint.
"""

from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn, optim

from zoo.arguments import plain_arguments
from zoo.running.pictures import contact_sheet, log_picture
from zoo.tasks.classification import ClassificationTask
from zoo.weights import load_weights, locate, read_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLOCK = 2**24  # numbers of remembered images that are float at a time: 64 MB
QUERIES = 500  # images whose distances are computed at a time in cross-validation
SHOWN = 8  # test images whose neighbours are shown

Accuracies = dict[int, list[float]]  # k -> the accuracy on each fold


class Neighbours(nn.Module):
    """A memory of labelled images: images (N, C, S, S) to the labels (N, k) of the nearest ones, nearest first.

    The images are uint8 and, like the labels, buffers, which are as long as the memory: a state dict of any length
    can be loaded. With fewer than k images all of them are neighbours; which of two that are equally far comes first
    is left to torch.

    Args:
        k: Number of neighbours.
        distance: ``l2``: the square root of the sum of squares (Euclidean); ``l1``: the sum of absolute differences.
        in_channels: Channels C of the images.
        image_size: Side S of the images in pixels.
    """

    images: Tensor
    labels: Tensor

    def __init__(self, k: int, distance: Literal["l2", "l1"], in_channels: int, image_size: int) -> None:
        super().__init__()
        self.k = k
        self.distance = distance
        self.register_buffer("images", torch.zeros(0, in_channels, image_size, image_size, dtype=torch.uint8))
        self.register_buffer("labels", torch.zeros(0, dtype=torch.long))

    def make_room(self, size: int) -> None:
        """A memory of ``size`` black images, to be overwritten; 0 forgets all."""
        self.images = self.images.new_zeros(size, *self.images.shape[1:])
        self.labels = self.labels.new_zeros(size)

    def remember(self, images: Tensor, labels: Tensor) -> None:
        """Add uint8 images (N, C, S, S) and their labels, int64 (N,)."""
        if images.shape[1:] != self.images.shape[1:]:
            ours, theirs = ("x".join(map(str, shape[1:])) for shape in (self.images.shape, images.shape))
            raise ValueError(f"the images are {theirs}, expected {ours}: set in_channels and image_size of the model")
        self.images = torch.cat([self.images, images])
        self.labels = torch.cat([self.labels, labels])

    def nearest(self, images: Tensor, k: int) -> Tensor:
        """The places (N, k) in the memory of the k images nearest to ``images`` (N, C, S, S) in [0, 1].

        In full precision whatever the run's is: in bf16 most distances would be equal.
        """
        device = "cpu" if images.is_meta else images.device.type  # autocast knows no meta tensors, as of `zoo show`
        with torch.autocast(device, enabled=False):
            exact = torch.promote_types(images.dtype, torch.float32)
            queries = images.flatten(1).to(exact) * 255 - 127.5  # (N, D), around 0: smaller squares lose less below
            step = max(k, BLOCK // queries.shape[1])
            distances, places = [queries[:, :0]], [torch.zeros_like(queries[:, :0], dtype=torch.long)]
            for start in range(0, len(self.images), step):
                block = self.images[start : start + step]
                found = self._distances(queries, block).topk(min(k, len(block)), largest=False)
                distances.append(found.values)
                places.append(found.indices + start)
            best = torch.cat(distances, 1).topk(min(k, len(self.images)), largest=False).indices
            return torch.cat(places, 1).gather(1, best)

    def _distances(self, queries: Tensor, block: Tensor) -> Tensor:
        """What orders a block of the memory (M, C, S, S) by its distance to queries (N, D): (N, M)."""
        known = block.flatten(1).to(queries.dtype) - 127.5
        if self.distance == "l1":
            return torch.cdist(queries, known, p=1)
        # |q - x|^2 = |q|^2 - 2 q x + |x|^2, one matrix product; |q|^2 is the same for all x.
        return torch.linalg.vector_norm(known, dim=1).square() - 2 * queries @ known.T

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, S, S) in [0, 1] to the labels (N, k) of their neighbours."""
        return self.labels[self.nearest(images, self.k)]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        labels = state_dict.get(f"{prefix}labels")
        if labels is not None:
            self.make_room(len(labels))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Votes(nn.Module):
    """Labels (N, k) to logits (N, num_classes), whose softmax is each class's share of the votes, smoothed.

    ``log(votes + smoothing)``: a class without a vote gets a small probability, not none, so that losses are finite.

    Args:
        num_classes: Number of classes.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        # Votes that every class has beforehand. A parameter: several processes (DDP) train no model without one.
        self.smoothing = nn.Parameter(torch.tensor(0.01))

    def forward(self, labels: Tensor) -> Tensor:
        """Map labels (N, k) to logits (N, num_classes); of classes with equal votes the smallest label is largest."""
        classes = torch.arange(self.num_classes, device=labels.device)
        votes = (labels[:, :, None] == classes).sum(1).to(self.smoothing)  # (N, num_classes)
        return torch.log(votes + self.smoothing) - 1e-6 * classes


class KNearestNeighbors(ClassificationTask):
    """k-nearest-neighbours image classifier.

    It remembers the images of the last training epoch, so one epoch is enough, in float images rounded to 1/255. Of
    several processes each remembers all images. It logs what a :class:`ClassificationTask` logs of evaluations, nothing
    of training; and under ``cross_validate`` the chosen ``cross_validation/k`` with its mean
    ``cross_validation/accuracy``.

    Args:
        k: Number of neighbours that vote.
        distance: Of pixels: ``l2`` (Euclidean) or ``l1`` (sum of absolute differences).
        num_classes: Number of classes.
        class_names: Their names, in the order of the labels; None calls them "0", "1", ….
        in_channels: Channels of the images: 1 for grey, 3 for RGB.
        image_size: Side of the square images in pixels.
        cross_validate: Values of k; at the end of the epoch the one with the best mean accuracy over the folds is
            taken, and kept in the checkpoint. None leaves ``k`` as it is.
        folds: Number of parts of the training images, each of which is once held out.
        weights: File to start from (``.safetensors``, ``.ckpt``, ``.pth``) or ``hf://owner/name``.

    Raises:
        ValueError: A number is too small, or ``weights`` remembers other classes.
    """

    @plain_arguments
    def __init__(
        self,
        k: int = 10,
        distance: Literal["l2", "l1"] = "l2",
        num_classes: int = 10,
        class_names: list[str] | None = None,
        in_channels: int = 3,
        image_size: int = 32,
        cross_validate: list[int] | None = None,
        folds: int = 5,
        weights: str | None = None,
    ) -> None:
        # An optimizer that moves nothing: its steps are what Lightning, and with it our checkpoints, count.
        super().__init__(num_classes, class_names, lambda parameters: optim.SGD(parameters, lr=0.0), None)
        if min([k, *(cross_validate or [])]) < 1 or folds < 2:
            raise ValueError(
                f"k={k}, cross_validate={cross_validate} and folds={folds}: at least 1, 1 and 2 are needed"
            )
        self.automatic_optimization = False
        self.cross_validate = cross_validate
        self.folds = folds
        self.example_input_array = torch.zeros(1, in_channels, image_size, image_size)
        self.backbone: Neighbours = Neighbours(k, distance, in_channels, image_size)
        self.head: Votes = Votes(num_classes)
        self._queries: tuple[Tensor, Tensor] | None = None
        if weights is not None:
            self._load(weights)

    def _load(self, weights: str) -> None:
        state, _ = read_weights(locate(weights))
        self.backbone.make_room(len(state.get("backbone.labels", ())))  # else the lengths would not match
        load_weights(self, weights)
        labels = self.backbone.labels
        if len(labels) and labels.max() >= self.hparams["num_classes"]:
            raise ValueError(f"{weights} remembers labels up to {labels.max()}, this model has {self.head.num_classes}")

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, S, S) in [0, 1] to logits (N, num_classes), all equal while nothing is remembered."""
        return cast(Tensor, self.head(self.backbone(images)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        """Remember a batch, after the first one of an epoch has made the memory empty."""
        images, labels = batch
        if labels.is_floating_point():
            raise ValueError("k-nearest neighbours needs one label for each image: switch mixup and cutmix off")
        if batch_idx == 0:
            self.backbone.make_room(0)
        self.backbone.remember(self._of_all((images * 255).round().clamp(0, 255).to(torch.uint8)), self._of_all(labels))
        self.optimizers().step()  # type: ignore[union-attr]  # one optimizer
        if self.trainer.is_last_batch:
            self._warn_of_what_is_left_out()
            if self.cross_validate is not None:
                self._choose(self.cross_validate)

    def _of_all(self, batch: Tensor) -> Tensor:
        """The batches (n, …) of all processes after each other, in the order in which one process has them."""
        gathered = cast(Tensor, self.all_gather(batch))
        return gathered.flatten(0, 1) if gathered.ndim > batch.ndim else gathered

    def _warn_of_what_is_left_out(self) -> None:
        loader: Any = self.trainer.train_dataloader
        size = getattr(getattr(loader, "batch_sampler", None), "size", 0)  # datamodules.sampling.TrainingBatches
        known = len(self.backbone.labels)
        if known < size:
            rank_zero_warn(
                f"{known} of {size} training images are remembered; what fills no batch is left out, so a batch size "
                f"that divides {size} is better"
            )

    def _choose(self, ks: list[int]) -> None:
        """Take the k with the best mean accuracy over the folds, the smallest of equal ones."""
        accuracies = cross_validation(self.backbone, self.head, ks, self.folds)
        means = {k: sum(found) / len(found) for k, found in accuracies.items()}
        best = max(sorted(means), key=lambda k: means[k])
        rank_zero_info(_table(accuracies, best))
        self.backbone.k = best
        self.hparams["k"] = best
        found = {"cross_validation/k": float(best), "cross_validation/accuracy": means[best]}
        self.log_dict(found, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        log_picture(self, "train/cross_validation", cross_validation_figure(accuracies, best))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Also keep the first images, to show their neighbours."""
        super().test_step(batch, batch_idx)
        if batch_idx == 0:
            self._queries = batch[0][:SHOWN], batch[1][:SHOWN]

    def on_test_epoch_end(self) -> None:
        """Also show some test images with their nearest neighbours, those of another class in red."""
        super().on_test_epoch_end()
        if self._queries is not None:
            log_picture(self, "test/neighbours", self._neighbours_figure(*self._queries))
        self._queries = None

    def _neighbours_figure(self, images: Tensor, labels: Tensor) -> "Figure":
        """A row for each image: itself, then the seven nearest, since a sheet has eight columns."""
        places = self.backbone.nearest(images, 7)  # (N, 7)
        sheet, captions, wrong = [], [], []
        for image, label, row in zip(images, labels, places, strict=True):
            sheet += [image[None], self.backbone.images[row].float() / 255]
            known = self.backbone.labels[row]
            captions += [f"test: {self.class_names[label]}", *(self.class_names[k] for k in known)]
            wrong += [False, *(known != label).tolist()]
        pictures = torch.cat(sheet) if sheet else images
        return contact_sheet(pictures, captions, "test images and their nearest training images", wrong)


def cross_validation(memory: Neighbours, votes: Votes, ks: list[int], folds: int) -> Accuracies:
    """The accuracy of each k on each of ``folds`` parts of a memory, by the votes of the other parts.

    Raises:
        ValueError: There are fewer images than folds.
    """
    if len(memory.labels) < folds:
        raise ValueError(f"{len(memory.labels)} training images are too few for {folds} folds")
    place = torch.arange(len(memory.labels), device=memory.labels.device)
    accuracies: Accuracies = {k: [] for k in ks}
    for part in place.tensor_split(folds):
        others = Neighbours(max(ks), memory.distance, *memory.images.shape[1:3]).to(place.device)
        rest = torch.cat([place[: part[0]], place[part[-1] + 1 :]])
        others.remember(memory.images[rest], memory.labels[rest])
        nearest = torch.cat([others(images.float() / 255) for images in memory.images[part].split(QUERIES)])
        for k in ks:
            right = votes(nearest[:, :k]).argmax(1) == memory.labels[part]
            accuracies[k].append(right.float().mean().item())
    return accuracies


def _table(accuracies: Accuracies, best: int) -> str:
    lines = [f"{'k':>4}  mean    folds"]
    for k, found in accuracies.items():
        folds = "  ".join(f"{value:.4f}" for value in found)
        lines.append(f"{k:>4}  {sum(found) / len(found):.4f}  {folds}{'  <- taken' if k == best else ''}")
    return "cross-validation:\n" + "\n".join(lines)


def cross_validation_figure(accuracies: Accuracies, best: int) -> "Figure":
    """Accuracy against k: a dot for each fold, their mean with one standard deviation up and down."""
    from matplotlib.figure import Figure

    ks = sorted(accuracies)
    folds = torch.tensor([accuracies[k] for k in ks], dtype=torch.float64)  # (K, folds)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    shares = folds.cpu().numpy()  # older versions of matplotlib take no tensors
    axes.plot(ks, shares, "o", color="tab:gray", markersize=4, alpha=0.7)
    axes.errorbar(ks, shares.mean(1), shares.std(1), color="tab:blue", capsize=3)
    axes.axvline(best, color="tab:orange", linestyle="--", label=f"k = {best} is taken")
    axes.set_xlabel("k")
    axes.set_ylabel("accuracy on the fold held out")
    axes.set_title(f"cross-validation over {folds.shape[1]} folds")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
