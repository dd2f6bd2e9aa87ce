"""Augmentation of a picture and what is on it: torchvision's (v2), for boxes, masks and keypoints alike."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.pictures import resize

Target = dict[str, Tensor]


class Augmentation(NamedTuple):
    """What happens to a training picture and what is on it, in this order.

    Attributes:
        flip: Mirror half of them.
        swaps: For each keypoint the one whose place it takes in a mirror.
        iou_crop: Cut out a random box.
        scale_jitter: Enlarge by a factor in this range and cut or pad to the old size.
    """

    flip: bool
    swaps: list[int]
    iou_crop: bool
    scale_jitter: tuple[float, ...] | None

    def __call__(self, image: Tensor, target: Target, seed: list[int]) -> tuple[Tensor, Target]:
        """Augment an image, uint8 (3, H, W), and its target, at random but always alike for a seed."""
        if not (self.flip or self.iou_crop or self.scale_jitter):
            return image, target
        state = torch.get_rng_state()
        try:
            # Not torch.manual_seed, which would seed the GPUs of a process without workers as well.
            torch.default_generator.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]) >> 1)
            return self._draw(image, target)
        finally:
            torch.set_rng_state(state)

    def _draw(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        if self.flip and torch.rand(()) < 0.5:
            image, target = mirrored(image, target, self.swaps)
        if self.iou_crop:
            image, target = random_iou_crop(image, target)
        if self.scale_jitter:
            image, target = random_scale(image, target, self.scale_jitter[0], self.scale_jitter[1])
        return image, target


def swapped_keypoints(names: list[str]) -> list[int]:
    """For each keypoint the one whose place it takes in a mirror: ``left_eye`` that of ``right_eye``."""
    mirror = {
        name: name.replace("left", "right") if "left" in name else name.replace("right", "left") for name in names
    }
    return [names.index(mirror[name]) if mirror[name] in names else i for i, name in enumerate(names)]


def mirrored(image: Tensor, target: Target, swaps: list[int]) -> tuple[Tensor, Target]:
    """Mirror left to right.

    Keypoints are numbers of pixels, so that x becomes W - 1 - x; boxes are edges, so that it becomes W - x.
    """
    from torchvision.transforms.v2 import functional  # imported here: it costs seconds

    width = image.shape[2]
    result = dict(target)
    result["boxes"] = functional.horizontal_flip_bounding_boxes(target["boxes"], _xyxy(), (image.shape[1], width))
    if "masks" in target:
        result["masks"] = functional.horizontal_flip_mask(target["masks"])
    if "keypoints" in target:
        points = target["keypoints"][:, swaps].clone()
        points[..., 0] = torch.where(points[..., 2] > 0, width - 1 - points[..., 0], points[..., 0])
        result["keypoints"] = points
    return functional.horizontal_flip_image(image), result


def _xyxy() -> Any:
    """What torchvision calls boxes x1, y1, x2, y2."""
    from torchvision.tv_tensors import BoundingBoxFormat

    return BoundingBoxFormat.XYXY


def random_iou_crop(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Cut out a random box, torchvision's ``RandomIoUCrop``; objects stay whose centres are in it."""
    from torchvision.transforms import v2

    if not len(target["boxes"]) or min(image.shape[1:]) < 8:
        return image, target
    return _cropped(image, target, v2.RandomIoUCrop())


def random_scale(image: Tensor, target: Target, least: float, most: float) -> tuple[Tensor, Target]:
    """Enlarge by a random factor, then cut out or pad with black, at a random place, to the old size."""
    from torchvision.transforms import v2

    height, width = image.shape[1:]
    factor = least + (most - least) * torch.rand(()).item()
    new = max(1, round(height * factor)), max(1, round(width * factor))
    image, target = resized(image, target, *new)
    return _cropped(image, target, v2.RandomCrop((height, width), pad_if_needed=True))


def _cropped(image: Tensor, target: Target, crop: Any) -> tuple[Tensor, Target]:
    """Apply a crop of torchvision's to an image and all that is on it, without objects of which nothing is left."""
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    size = (int(image.shape[1]), int(image.shape[2]))
    sample = {
        "image": tv_tensors.Image(image),
        "boxes": tv_tensors.BoundingBoxes(target["boxes"], format=_xyxy(), canvas_size=size),
        "rows": torch.arange(len(target["boxes"])),
    }
    if "masks" in target:
        sample["masks"] = tv_tensors.Mask(target["masks"])
    if "keypoints" in target:
        sample["points"] = key_points_of_torchvision()(target["keypoints"][..., :2], canvas_size=size)
    sample = v2.SanitizeBoundingBoxes(labels_getter=lambda inputs: inputs["rows"])(crop(sample))
    return _unwrapped(sample, target)


def _unwrapped(sample: dict[str, Tensor], before: Target) -> tuple[Tensor, Target]:
    from torchvision.ops import masks_to_boxes

    image, boxes, rows = (sample[key].as_subclass(Tensor) for key in ("image", "boxes", "rows"))
    after = {"image_id": before["image_id"], "boxes": boxes}
    after |= {key: before[key][rows] for key in ("labels", "area", "iscrowd")}
    after["area"] = after["area"] * _areas(boxes) / _areas(before["boxes"][rows])
    if "masks" in before:
        after["masks"] = sample["masks"].as_subclass(Tensor)
    if "keypoints" in before:
        points = sample["points"].as_subclass(Tensor)[rows]
        seen = before["keypoints"][rows][..., 2:]
        height, width = image.shape[1:]
        inside = ((points >= 0) & (points < torch.tensor([width, height]))).all(-1, keepdim=True)
        after["keypoints"] = torch.cat([points, seen], dim=-1) * (inside & (seen > 0))
    if "masks" in after and len(rows):
        # The box of a bent object may reach into the crop and nothing else of it, or less of it than the box.
        seen = after["masks"].flatten(1).any(1).bool()
        after = {key: value if key == "image_id" else value[seen] for key, value in after.items()}
        after["boxes"] = masks_to_boxes(after["masks"]) + torch.tensor([0.0, 0.0, 1.0, 1.0])
    return image, after


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def key_points_of_torchvision() -> Any:
    """Torchvision's tensor for keypoints; an error says so where it is too old to have one."""
    from torchvision import tv_tensors

    if not hasattr(tv_tensors, "KeyPoints"):
        raise ValueError(
            "iou_crop and scale_jitter move keypoints from torchvision 0.23 on: pip install -U torchvision"
        )
    return tv_tensors.KeyPoints


def new_size(height: int, width: int, size: tuple[int, ...] | int | None) -> tuple[int, int]:
    """Height and width of a resized picture; a single number is the longer side."""
    if size is None:
        return height, width
    if isinstance(size, tuple):
        return size[0], size[1]
    factor = size / max(height, width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def resized(image: Tensor, target: Target, height: int, width: int) -> tuple[Tensor, Target]:
    """Resize an image, uint8 (3, H, W), and what is on it: the image bilinear and antialiased, masks to the nearest."""
    if tuple(image.shape[1:]) != (height, width):
        target = resized_target(target, (int(image.shape[1]), int(image.shape[2])), (height, width))
        image = resize(image.permute(1, 2, 0).numpy(), height, width)
    return image, target


def resized_target(target: Target, old: tuple[int, int], new: tuple[int, int]) -> Target:
    """A target for a picture of another size, both (height, width)."""
    if old == new:
        return target
    scale = torch.tensor([new[1] / old[1], new[0] / old[0]])
    result = target | {"boxes": target["boxes"] * scale.repeat(2), "area": target["area"] * scale.prod()}
    if "masks" in target:
        masks = target["masks"][None]
        empty = masks.new_zeros(1, 0, *new)
        result["masks"] = (F.interpolate(masks, new, mode="nearest-exact") if masks.shape[1] else empty)[0]
    if "keypoints" in target:
        result["keypoints"] = target["keypoints"] * torch.cat([scale, torch.ones(1)])
    return result
