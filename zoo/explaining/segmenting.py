"""Cutting an object out of its picture by what a network looks at, with no mask to learn from."""

import numpy as np
import torch
from torch import Tensor

OBJECT, BACKGROUND = 0.95, 0.30  # quantiles of the saliency that are taken for granted


def segment(image: Tensor, saliency: Tensor, iterations: int = 5) -> Tensor:
    """GrabCut that starts from saliency: Simonyan et al., 2014, https://arxiv.org/abs/1312.6034, section 3.2.

    The twentieth of the pixels with the largest saliency is the object, the 30 % with the least are background, and the
    colours of both decide about the others. Saliency is blurred a little: of pixels beside each other it says less.

    Args:
        image: (3, H, W) in [0, 1].
        saliency: (H, W), none below 0.
        iterations: Of GrabCut.

    Returns:
        bool (H, W): the object.

    Raises:
        ImportError: OpenCV is not installed.
        ValueError: The picture has not three channels, or the saliency is the same all over.
    """
    try:
        import cv2
    except ImportError as error:
        raise ImportError("segmentation needs OpenCV: pip install 'opencv-python-headless<5'") from error
    if image.shape[0] != 3 or image.shape[1:] != saliency.shape:
        raise ValueError(
            f"an image {tuple(image.shape)} and a saliency {tuple(saliency.shape)} must be (3, H, W), (H, W)"
        )
    values = cv2.GaussianBlur(saliency.detach().cpu().float().numpy(), (0, 0), max(saliency.shape) / 50)
    high, low = np.quantile(values, [OBJECT, BACKGROUND])
    if not high > low:
        raise ValueError("the saliency is the same all over: it shows no object")
    mask = np.full(values.shape, cv2.GC_PR_BGD, np.uint8)
    mask[values > np.quantile(values, (OBJECT + 0.6) / 2)] = cv2.GC_PR_FGD
    mask[values >= high] = cv2.GC_FGD
    mask[values <= low] = cv2.GC_BGD
    pixels = (image.detach().cpu().permute(1, 2, 0).flip(2).clamp(0, 1) * 255).round().byte().numpy()
    cv2.setRNGSeed(0)  # its colours start from clusters that are drawn by lot
    colours = np.zeros((2, 1, 65))  # what it keeps of the colours of background and object
    cv2.grabCut(
        np.ascontiguousarray(pixels), mask, (0, 0, 1, 1), colours[0], colours[1], iterations, cv2.GC_INIT_WITH_MASK
    )
    return torch.from_numpy((mask == cv2.GC_FGD) | (mask == cv2.GC_PR_FGD))
