"""A linear probe: features of a pretrained backbone, computed once and kept, and a head fitted to them.

Lecture 11, "Transfer learning": the network as a feature extractor under a new linear classifier.
"""

import copy
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional as F

import zoo
from zoo.recipes import RecipeError, refusing
from zoo.running.checkpoint import replacing
from zoo.running.starting import prepare
from zoo.tasks.classification import ClassificationTask

DECAYS = tuple(10.0**power for power in range(-6, 1))  # lambda of the L2 term, tried on the validation split
STEPS = 200  # of L-BFGS, each over all features


@dataclass
class Probe:
    """What a probe found: accuracies in [0, 1] by split, the decay that was chosen, and how many images it had."""

    accuracy: dict[str, float]
    decay: float
    samples: int


def probe_recipe(recipe: str, overrides: list[str], cache: Path, out: Path) -> Probe:
    """Probe the model and data of a recipe, print what was found, and write the probed model's weights file.

    Raises:
        RecipeError: The recipe or an override is wrong, or no weights are named.
    """
    cli = prepare("fit", recipe, overrides)
    if not cli.config["fit"].model.init_args.get("weights"):
        raise RecipeError(
            f"zoo probe {recipe} would look at features of a network that has learnt nothing: add "
            "--model.init_args.weights FILE (or the name of torchvision's weights)"
        )
    if not isinstance(cli.model, ClassificationTask):
        raise RecipeError(f"zoo probe fits the head of a classifier, and {recipe} has a {type(cli.model).__name__}")
    with refusing():
        found = probe(cli.model, cli.datamodule, cache, cli.trainer.strategy.root_device)
    cli.model.evaluation = getattr(cli.datamodule, "evaluation", None)  # type: ignore[assignment]
    metrics = {f"{split}/accuracy": accuracy for split, accuracy in found.accuracy.items()}
    zoo.save(cli.model.cpu(), out, f"{recipe} (probe)", metrics)
    shown = ", ".join(f"{split} {accuracy:.4f}" for split, accuracy in found.accuracy.items())
    print(f"accuracy of the head fitted to {found.samples} features, weight decay {found.decay:g}: {shown}\n{out}")
    return found


def probe(model: LightningModule, data: Any, cache: Path, device: torch.device) -> Probe:
    """Fit ``model.head`` to the features of ``model.backbone``; the decay is the one that is best on validation.

    Args:
        model: A model with ``backbone`` and ``head``, whose head is replaced by the fitted one.
        data: A data module with ``evaluation_dataloader(split)`` and ``fingerprint(split)``.
        cache: Folder of the features' files.
        device: Where to compute.

    Raises:
        ValueError: There is no validation split to choose the decay on.
    """
    if not data.val_size:
        raise ValueError("a probe chooses its weight decay on the validation split: set --data.init_args.val_size")
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    model.to(device).eval()
    backbone, head = cast(nn.Module, model.backbone), cast(nn.Module, model.head)
    known = digest_of(backbone)
    splits = {split: features_of(backbone, data, split, known, cache, device) for split in ("train", "val", "test")}
    best: tuple[float, float, nn.Module] | None = None
    for decay in DECAYS:
        fitted = fit_head(copy.deepcopy(head), *splits["train"], decay)
        accuracy = accuracy_of(fitted, *splits["val"])
        if best is None or accuracy > best[0]:
            best = accuracy, decay, fitted
    assert best is not None
    model.head = best[2]
    accuracies = {split: accuracy_of(best[2], *tensors) for split, tensors in splits.items()}
    return Probe(accuracies, best[1], len(splits["train"][1]))


def features_of(
    backbone: nn.Module, data: Any, split: str, known: str, cache: Path, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Features of a split, float32 (N, …), and labels (N,), on ``device``; from the cache if they are there.

    The file's name is made of the backbone's tensors and structure and of the images, so that it never goes stale.
    """
    from safetensors.torch import load_file, save_file

    key = hashlib.sha256(json.dumps([known, data.fingerprint(split)]).encode()).hexdigest()[:32]
    path = cache / f"{key}.safetensors"
    if path.is_file():
        stored = load_file(path)
        rank_zero_info(f"{split}: {len(stored['labels'])} features from {path}")
    else:
        features, labels = compute_features(backbone, data, data.evaluation_dataloader(split), device)
        stored = {"features": features, "labels": labels}
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            save_file(stored, partial)
        rank_zero_info(f"{split}: {len(labels)} features computed and kept in {path}")
    return stored["features"].to(device), stored["labels"].to(device)


@torch.no_grad()
def compute_features(backbone: nn.Module, data: Any, batches: Iterable, device: torch.device) -> tuple[Tensor, Tensor]:
    """Run a backbone over batches, without augmentation: features (N, …) and labels (N,), on the CPU."""
    features, labels = [], []
    for batch in batches:
        batch = tuple(tensor.to(device) for tensor in batch)
        images, classes = data.on_after_batch_transfer(batch, 0)
        features.append(backbone(images).float().cpu().contiguous())
        labels.append(classes.cpu())
    return torch.cat(features), torch.cat(labels)


def fit_head(head: nn.Module, features: Tensor, labels: Tensor, decay: float) -> nn.Module:
    """Minimise mean cross-entropy + decay / 2 * sum of squared weights, over all features at once, by L-BFGS."""
    head.train()
    for module in head.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    optimizer = torch.optim.LBFGS(trained, max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(features), labels)
        for parameter in trained:
            if parameter.ndim > 1:  # biases are not regularised
                loss = loss + decay / 2 * parameter.square().sum()
        loss.backward()
        return loss

    if not math.isfinite(float(optimizer.step(closure))):
        raise ValueError("the features are no numbers: the backbone's weights are damaged")
    return head.eval()


@torch.no_grad()
def accuracy_of(head: nn.Module, features: Tensor, labels: Tensor) -> float:
    """Share of the features whose highest score is their label's."""
    return float((head(features).argmax(1) == labels).float().mean())


def digest_of(backbone: nn.Module) -> str:
    """A fingerprint of a network's structure and tensors."""
    digest = hashlib.sha256(str(backbone).encode())
    for name, tensor in backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
