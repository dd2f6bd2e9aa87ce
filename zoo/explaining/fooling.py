"""Pictures that a network takes for something else, though a person sees no difference."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.explaining.looking import Progress, Targets, captum_part, chosen_classes, leaving_untouched


@dataclass(frozen=True)
class Fooling:
    """Changed pictures, and by how much.

    Attributes:
        images: (N, C, H, W) in [0, 1].
        fooled: bool (N,): whether the network now sees the wanted class, or, where none was wanted, another one.
        steps: int64 (N,): how many were taken.
        l2: (N,): Euclidean length of the change, in pixel values of [0, 1].
        largest: (N,): largest change of a pixel value.
    """

    images: Tensor
    fooled: Tensor
    steps: Tensor
    l2: Tensor
    largest: Tensor


def fool(
    model: nn.Module,
    images: Tensor,
    targets: int | list[int] | Tensor,
    steps: int = 100,
    rate: float = 0.1,
    as_file: bool = False,
    progress: Progress | None = None,
) -> Fooling:
    """Climb the score of a wanted class in steps of a fixed length until the network sees it.

    x ← x + rate · g / ‖g‖₂ with g = ds/dx, within [0, 1]; EECS 498-007, assignment 4, with a rate of 1 on standardised
    pictures, which is about 0.22 here. Each picture stops by itself.

    Args:
        model: Maps images to scores (N, K).
        images: (N, C, H, W) in [0, 1].
        targets: The wanted class, or one for each image.
        steps: At most so many.
        rate: Euclidean length of a step, in pixel values of [0, 1].
        as_file: Go on until the picture rounded to 8 bits, as a file has it, is seen so too, and give that. Where the
            network has just changed its mind rounding brings it back.
        progress: Is told the steps that are done, and all.

    Raises:
        ValueError: There is no such class.
    """
    changed = images.detach().clone()
    taken = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    fooled = torch.zeros_like(taken, dtype=torch.bool)
    with leaving_untouched(model):
        for step in range(steps + 1):
            left = (~fooled).nonzero()[:, 0]
            given = changed[left].requires_grad_()
            scores = model(given)
            wanted = chosen_classes(scores, _part(targets, left))
            reached = scores.argmax(1) == wanted
            if as_file and reached.any():
                reached[reached.clone()] = model(_rounded(given[reached])).argmax(1) == wanted[reached]
            fooled[left[reached]] = True
            if fooled.all() or step == steps:
                break
            (gradient,) = torch.autograd.grad(scores.gather(1, wanted[:, None]).sum(), given)
            moving, direction = left[~reached], gradient[~reached]
            lengths = direction.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None, None]
            changed[moving] = (changed[moving] + rate * direction / lengths).clamp(0, 1)
            taken[moving] += 1
            if progress is not None:
                progress(step + 1, steps)
    if progress is not None:
        progress(steps, steps)
    return _fooling(images, _rounded(changed) if as_file else changed, fooled, taken)


def fgsm(model: nn.Module, images: Tensor, epsilon: float = 2 / 255, targets: Targets = None) -> Fooling:
    """One step of the gradient's sign, by captum: Goodfellow et al., 2015, https://arxiv.org/abs/1412.6572.

    Args:
        model: Maps images to scores (N, K).
        images: (N, C, H, W) in [0, 1].
        epsilon: How much each pixel value changes.
        targets: The wanted class, or one for each image; None goes away from what the network sees.

    Raises:
        ImportError: captum is not installed.
        ValueError: There is no such class.
    """
    method = captum_part("robust").FGSM
    with leaving_untouched(model), _without_captums_warning():
        classes = _classes(model, images, targets)
        attack = method(model, nn.CrossEntropyLoss(reduction="none"), lower_bound=0, upper_bound=1)
        changed = attack.perturb(images.detach().clone(), epsilon, classes, targeted=targets is not None).detach()
        return _fooling(images, changed, _is_fooled(model, changed, classes, targets), 1)


def pgd(
    model: nn.Module,
    images: Tensor,
    radius: float = 2 / 255,
    rate: float = 0.5 / 255,
    steps: int = 10,
    targets: Targets = None,
) -> Fooling:
    """Steps of the gradient's sign that stay near the picture, by captum.

    Madry et al., 2018, https://arxiv.org/abs/1706.06083.

    Args:
        model: Maps images to scores (N, K).
        images: (N, C, H, W) in [0, 1].
        radius: How much a pixel value may change.
        rate: How much it changes in a step.
        steps: So many, also where fewer would do.
        targets: As for :func:`fgsm`.

    Raises:
        ImportError: captum is not installed.
        ValueError: There is no such class.
    """
    method = captum_part("robust").PGD
    with leaving_untouched(model), _without_captums_warning():
        classes = _classes(model, images, targets)
        attack = method(model, nn.CrossEntropyLoss(reduction="none"), lower_bound=0, upper_bound=1)
        changed = attack.perturb(
            images.detach().clone(),
            radius,
            rate,
            steps,
            classes,
            targeted=targets is not None,
            norm="Linf",
        ).detach()
        return _fooling(images, changed, _is_fooled(model, changed, classes, targets), steps)


@contextmanager
def _without_captums_warning() -> Iterator[None]:
    """It says that it asks for gradients of the pictures, which are its own copies."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Input Tensor")
        yield


def _rounded(images: Tensor) -> Tensor:
    return (images.detach() * 255).round() / 255


def _part(targets: int | list[int] | Tensor, left: Tensor) -> Tensor:
    classes = torch.as_tensor(targets, device=left.device)
    return classes[left] if classes.ndim else classes


def _classes(model: nn.Module, images: Tensor, targets: Targets) -> Tensor:
    with torch.no_grad():
        return chosen_classes(model(images), targets)


def _is_fooled(model: nn.Module, changed: Tensor, classes: Tensor, targets: Targets) -> Tensor:
    with torch.no_grad():
        seen = model(changed).argmax(1)
    return seen != classes if targets is None else seen == classes


def _fooling(images: Tensor, changed: Tensor, fooled: Tensor, steps: Tensor | int) -> Fooling:
    change = (changed - images).flatten(1)
    taken = steps if isinstance(steps, Tensor) else torch.full((len(images),), steps, device=images.device)
    return Fooling(changed, fooled, taken, change.norm(dim=1), change.abs().amax(1))
