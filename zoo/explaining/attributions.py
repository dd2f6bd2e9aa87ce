"""Which pixels a score depends on: saliency, guided backpropagation, Grad-CAM and occlusion, by captum."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.explaining.looking import Targets, captum_part, chosen_classes, find_layer, leaving_untouched

# Pixels of covered pictures in a forward pass: maps of more than 32 MB the C library takes anew from the system.
TOGETHER = 2**18


def saliency(model: nn.Module, images: Tensor, targets: Targets = None) -> Tensor:
    """How much each pixel moves the score of a class: the largest |ds/dx| of its channels.

    Simonyan et al., 2014, https://arxiv.org/abs/1312.6034, section 3. Of the score, not of the probability.

    Args:
        model: Maps images to scores (N, K); of clips (N, C, T, H, W) the map has the frames too.
        images: (N, C, H, W) in [0, 1].
        targets: A class, one for each image, or None for the best of each.

    Returns:
        (N, H, W), none below 0.

    Raises:
        ImportError: captum is not installed.
        ValueError: There is no such class.
    """
    method = captum_part("attr").Saliency
    with leaving_untouched(model):
        gradients = method(model).attribute(_pixels(images), target=_classes(model, images, targets), abs=True)
    return gradients.detach().amax(1)


def guided_backpropagation(model: nn.Module, images: Tensor, targets: Targets = None) -> Tensor:
    """The gradient of a class's score that passes rectifiers only where it and their input are above 0.

    Springenberg et al., 2015, https://arxiv.org/abs/1412.6806. Sharper than a gradient; the rectifiers must be
    ``nn.ReLU``, others pass the gradient as ever.

    Args:
        model: As for :func:`saliency`.
        images: (N, C, H, W) in [0, 1].
        targets: As for :func:`saliency`.

    Returns:
        (N, C, H, W), with sign.

    Raises:
        ImportError: captum is not installed.
        ValueError: There is no such class.
    """
    import warnings

    method = captum_part("attr").GuidedBackprop
    with leaving_untouched(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting backward hooks")  # they are taken off again
        gradients = method(model).attribute(_pixels(images), target=_classes(model, images, targets))
    return gradients.detach()


def grad_cam(model: nn.Module, images: Tensor, layer: str, targets: Targets = None) -> Tensor:
    """Where a layer's maps speak for a class: their sum, each weighted by its mean gradient, rectified.

    Selvaraju et al., 2017, https://arxiv.org/abs/1610.02391, section 3.

    Args:
        model: As for :func:`saliency`.
        images: (N, C, H, W) in [0, 1], or clips (N, C, T, H, W).
        layer: Its name, as ``zoo show`` prints it; the last convolution as a rule.
        targets: As for :func:`saliency`.

    Returns:
        (N, H, W), or (N, T, H, W) of clips, none below 0, brought to the images' size linearly.

    Raises:
        ImportError: captum is not installed.
        ValueError: There is no such class or layer, the layer has no maps, or the score does not depend on it.
    """
    method = captum_part("attr").LayerGradCam
    chosen = find_layer(model, layer)
    with leaving_untouched(model):
        classes = _classes(model, images, targets)
        try:
            maps = method(model, chosen).attribute(_pixels(images), target=classes, relu_attributions=True)
        except RuntimeError as error:
            if "not have been used" not in str(error):
                raise
            raise ValueError(f"the score does not depend on layer {layer}") from error
    if not isinstance(maps, Tensor) or maps.ndim != images.ndim:
        raise ValueError(f"layer {layer} gives no maps (N, K, h, w): name a convolution or a pool")
    linear = "bilinear" if images.ndim == 4 else "trilinear"
    return F.interpolate(maps.detach(), images.shape[2:], mode=linear)[:, 0]


def occlusion(
    model: nn.Module,
    images: Tensor,
    targets: Targets = None,
    patch: int | None = None,
    stride: int | None = None,
    of: Literal["probability", "score"] = "probability",
    batch_size: int | None = None,
) -> Tensor:
    """How far a class falls when a patch of the picture's mean colour covers a place.

    Zeiler and Fergus, 2014, https://arxiv.org/abs/1311.2901, section 4.2. Many patches go through the network at once.

    Args:
        model: As for :func:`saliency`.
        images: (N, C, H, W) in [0, 1].
        targets: As for :func:`saliency`.
        patch: Its side in pixels; None is a fifth of the shorter side.
        stride: From one patch to the next; None is half of a patch.
        of: What falls: the probability of the class, or its score.
        batch_size: Covered pictures in one forward pass; None is as many as have 2**18 pixels, 5 of 224 x 224 and 64 of
            64 x 64, which is fast on a CPU. On a GPU more are faster.

    Returns:
        (N, H, W): the mean fall over the patches that cover a pixel; below 0 where covering helps.

    Raises:
        ImportError: captum is not installed.
        ValueError: There is no such class, or a patch is larger than the picture.
    """
    channels, height, width = images.shape[1:]
    patch = patch or max(1, min(height, width) // 5)
    stride = stride or max(1, patch // 2)
    if not stride <= patch <= min(height, width):
        raise ValueError(
            f"patch={patch} must lie between stride={stride} and the picture's {min(height, width)} pixels"
        )

    batch_size = batch_size or max(1, TOGETHER // (height * width))

    def answer(given: Tensor) -> Tensor:
        scores = model(given.clone())  # its first layer may work in place
        return scores.softmax(1) if of == "probability" else scores

    method = captum_part("attr").Occlusion
    with leaving_untouched(model, in_place=True), torch.no_grad():
        falls = method(answer).attribute(
            images,
            sliding_window_shapes=(channels, patch, patch),
            strides=(channels, stride, stride),
            baselines=images.mean((2, 3), keepdim=True).expand_as(images),
            target=_classes(model, images.clone(), targets),
            perturbations_per_eval=max(1, batch_size // max(1, len(images))),
        )
    return falls[:, 0]


def _pixels(images: Tensor) -> Tensor:
    """A copy to take gradients of; in evaluation under inference mode a plain tensor again."""
    return images.detach().clone().requires_grad_()


def _classes(model: nn.Module, images: Tensor, targets: Targets) -> Tensor:
    with torch.no_grad():
        return chosen_classes(model(images), targets)
