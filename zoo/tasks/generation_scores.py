"""How good generated pictures are, as numbers, in the features of a classifier of the same data.

The Fréchet distance of Heusel et al., 2017, https://arxiv.org/abs/1706.08500 (section 2), and precision and recall of
Kynkäänniemi et al., 2019, https://arxiv.org/abs/1904.06991 (section 2), not in the features of Inception, which knows
photographs, but in those of a classifier of this zoo. So the numbers are called ``classifier_fid`` and compare only
with others of the same classifier and as many pictures; none is comparable with a published FID.

All of it is in float64, in which a number does not depend on how the pictures were shared out among batches and
processes. As not every device has float64, it is on the CPU; the classifier looks at pictures where they are if that is
a GPU of CUDA.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.utilities.distributed import gather_all_tensors

from zoo import recipes
from zoo.tasks.classification import ClassificationTask
from zoo.weights import load

FEW = 0.1  # of an even share: a class that has less of the generated pictures counts as missing
ROWS = 1024  # pictures whose distances to all others are held at a time


def load_classifier(classifier: str) -> ClassificationTask:
    """The classifier in whose features pictures are compared, in evaluation mode and float64.

    Args:
        classifier: A ``.safetensors`` or ``.ckpt`` file of a classifier of the zoo, here or in the recipes' folder
            (``classifiers/digits.safetensors`` comes with them); or the name of a recipe, which stands for the
            ``best.ckpt`` of its newest run.

    Raises:
        FileNotFoundError: There is no such file, and no run of a recipe of that name.
        ValueError: The file holds no classifier of the zoo.
    """
    model = load(_find(classifier))
    if not isinstance(model, ClassificationTask):
        raise ValueError(f"classifier={classifier} holds a zoo.{type(model).__name__}, expected a classifier")
    return model.double().requires_grad_(False)


def _find(classifier: str) -> Path:
    from zoo.running.command import newest_checkpoint

    for path in (Path(classifier).expanduser(), recipes.FOLDER / classifier):
        if path.is_file():
            return path
    if classifier in recipes.names():
        if (found := newest_checkpoint(classifier, "best")) is not None:
            return found
        raise FileNotFoundError(
            f"classifier={classifier}: there is no run with a best.ckpt under runs/{classifier}: run `zoo fit "
            f"{classifier}` first, or set classifier to null for a run without the numbers that need one"
        )
    raise FileNotFoundError(f"classifier={classifier}: there is no such weights file, and no recipe of that name")


def as_saved(images: Tensor) -> Tensor:
    """Pictures as a file of 8 bits a channel has them: what is compared, as real ones come from such files.

    Args:
        images: In [0, 1], of any shape.

    Returns:
        float64, where they are if that is a GPU of CUDA, else on the CPU.
    """
    there = images.device if images.device.type == "cuda" else torch.device("cpu")
    return images.to(there).double().clamp(0, 1).mul(255).round().div(255)


def gather(tensor: Tensor, group: Any = None) -> list[Tensor]:
    """Every process's tensor, on the CPU, by way of GPUs where only these exchange anything."""
    if "nccl" in distributed.get_backend(group):
        tensor = tensor.cuda()
    return [share.cpu() for share in gather_all_tensors(tensor, group)]


class FrechetDistance(FrechetInceptionDistance):
    """The Fréchet distance between the Gaussians of two sets of features, by torchmetrics, in float64 on the CPU.

    NaN where a set has fewer than two samples. With fewer samples than features it comes out too large, the more so
    the fewer there are.

    Args:
        features: Length D of a feature vector.
        network: Gives features (N, D) of what ``update`` is given, where that is; None: it is given them.
    """

    def __init__(self, features: int, network: nn.Module | None = None) -> None:
        given = nn.Identity()
        given.num_features = features  # type: ignore[assignment]
        super().__init__(feature=given, dist_sync_fn=gather)
        self.network = network or nn.Identity()
        self.features = features
        self.orig_dtype = torch.float64

    def update(self, samples: Tensor, real: bool) -> None:
        """Add what the network takes, or features (N, D), of real or of generated pictures; N may be 0."""
        super().update(self.network(samples).cpu().double(), real)

    def compute(self) -> Tensor:
        """The distance, 0 for sets alike."""
        if min(int(self.real_features_num_samples), int(self.fake_features_num_samples)) < 2:
            return torch.tensor(torch.nan, dtype=torch.float64)
        return super().compute()


class PrecisionRecall(Metric):
    """Precision: the share of generated pictures among the real ones. Recall: that of real ones among the generated.

    A picture is among others where it is as near to one of them as that one's ``neighbours``-th nearest of its own kind
    (Kynkäänniemi et al., 2019, equation 1). NaN where a set has no more than ``neighbours`` samples.

    Args:
        neighbours: The paper's k.
    """

    real: list[Tensor]
    generated: list[Tensor]

    def __init__(self, neighbours: int = 3) -> None:
        super().__init__(dist_sync_fn=gather)
        self.neighbours = neighbours
        self.add_state("real", [], dist_reduce_fx="cat")
        self.add_state("generated", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, real: bool) -> None:
        """Add features (N, D) of real or of generated pictures; N may be 0."""
        (self.real if real else self.generated).append(features)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Precision and recall, each in [0, 1]."""
        real, generated = _all(self.real), _all(self.generated)
        if min(len(real), len(generated)) <= self.neighbours:
            return real.new_tensor(torch.nan), real.new_tensor(torch.nan)
        return self._among(generated, real), self._among(real, generated)

    def _among(self, samples: Tensor, others: Tensor) -> Tensor:
        """The share of samples (N, D) within the neighbourhood of any of the others (M, D)."""
        # The nearest of its own kind is each one itself, at distance 0.
        nearest = [torch.cdist(part, others).kthvalue(self.neighbours + 1).values for part in others.split(ROWS)]
        radius = torch.cat(nearest)  # (M,)
        inside = [(torch.cdist(part, others) <= radius).any(1) for part in samples.split(ROWS)]
        return torch.cat(inside).double().mean()


def _all(parts: list[Tensor] | Tensor) -> Tensor:
    """All features (N, D): a list before processes have exchanged them, one tensor after it."""
    return torch.cat(parts) if isinstance(parts, list) else parts


class SeenClasses(Metric):
    """What a classifier makes of generated pictures.

    Args:
        num_classes: Classes C of the classifier.
    """

    counts: Tensor
    confidence: Tensor
    asked: Tensor
    right: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(dist_sync_fn=gather)
        self.add_state("counts", torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("confidence", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("asked", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("right", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, asked: Tensor | None) -> None:
        """Add pictures' probabilities (N, C), and the classes (N,) that were asked for, where any were."""
        confidence, classes = probabilities.max(1)
        self.counts += classes.bincount(minlength=len(self.counts))
        self.confidence += confidence.sum()
        if asked is not None:
            self.asked += len(asked)
            self.right += (classes == asked).sum()

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures of each class, int64 (C,); mean probability of the likeliest class; share that is what was asked."""
        return self.counts, self.confidence / self.counts.sum(), self.right / self.asked


class GenerationScores(nn.Module):
    """All numbers of one evaluation; the same on any number of processes. It stays on the CPU, wherever its owner goes.

    ``classifier_fid``; ``sample_precision`` and ``sample_recall``; ``sample_confidence``, the mean probability of the
    class that the classifier sees; ``sample_classes``, of how many classes there are at least a tenth of an even share;
    and where classes are asked for ``sample_accuracy``, the share of pictures that the classifier takes for them.

    Args:
        classifier: What :func:`load_classifier` gives.
        neighbourhoods: Compute precision and recall, which take the distances between all pictures.
    """

    def __init__(self, classifier: ClassificationTask, neighbourhoods: bool = True) -> None:
        super().__init__()
        # In a list: neither trained nor saved with the model whose pictures it looks at.
        self._classifier = [classifier]
        features, classes = _widths(classifier)
        self.fid = FrechetDistance(features)
        self.neighbourhoods = PrecisionRecall() if neighbourhoods else None
        self.seen = SeenClasses(classes)
        self.conditional = False

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "GenerationScores":
        return self  # neither moved nor in another precision

    def update(self, images: Tensor, real: bool, asked: Tensor | None = None) -> None:
        """Add pictures (N, C, H, W) in [0, 1]; of generated ones the classes (N,) that were asked for, if any were."""
        features, probabilities = see(self._classifier[0], images)
        self.fid.update(features, real)
        if self.neighbourhoods is not None:
            self.neighbourhoods.update(features, real)
        if not real:
            self.conditional = asked is not None
            self.seen.update(probabilities, None if asked is None else asked.cpu())

    def compute(self) -> dict[str, Tensor]:
        """The numbers by name, each a scalar; every process takes part."""
        counts, confidence, accuracy = self.seen.compute()
        numbers = {"classifier_fid": self.fid.compute(), "sample_confidence": confidence}
        numbers["sample_classes"] = (counts >= FEW * counts.sum() / len(counts)).sum().double()
        if self.conditional:
            numbers["sample_accuracy"] = accuracy
        if self.neighbourhoods is not None:
            numbers["sample_precision"], numbers["sample_recall"] = self.neighbourhoods.compute()
        return numbers

    def missing(self) -> list[str]:
        """The names of the classes of which there are hardly any generated pictures."""
        counts, _, _ = self.seen.compute()
        few = (counts < FEW * counts.sum() / len(counts)).tolist()
        return [name for name, is_few in zip(self._classifier[0].class_names, few, strict=True) if is_few]

    def reset(self) -> None:
        """Begin anew."""
        for metric in (self.fid, self.neighbourhoods, self.seen):
            if metric is not None:
                metric.reset()


def see(classifier: ClassificationTask, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, D) and probabilities (N, classes) of pictures (N, C, H, W) in [0, 1] as they are saved.

    Pictures of another size are brought to the classifier's.

    Returns:
        float64, on the CPU, wherever the pictures are.

    Raises:
        ValueError: It was trained on pictures with another number of channels.
    """
    channels, *size = classifier.example_input_array.shape[1:]
    if images.shape[1] != channels:
        raise ValueError(f"the classifier wants pictures of {channels} channels, these have {images.shape[1]}")
    images = as_saved(images)
    classifier.to(images.device)
    if list(images.shape[2:]) != size:
        resized = F.interpolate(images, size, mode="bilinear", antialias=True) if len(images) else None
        images = images.new_zeros(0, channels, *size) if resized is None else resized
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        features = classifier.backbone(images).flatten(1)
        return features.cpu(), cast(Tensor, classifier.head(features)).softmax(1).cpu()


def _widths(classifier: ClassificationTask) -> tuple[int, int]:
    """How many features and classes a classifier has."""
    features, probabilities = see(classifier, torch.zeros_like(classifier.example_input_array))
    return features.shape[1], probabilities.shape[1]
