"""Average precision and recall after the COCO protocol, for boxes, masks and keypoints.

https://cocodataset.org/#detection-eval and https://cocodataset.org/#keypoints-eval. The numbers are those of
pycocotools, computed with faster-coco-eval where that is installed, several times as soon. On several processes every
image is counted once: the processes' shares are gathered, evaluated on the first one, and the result goes to all.
"""

import contextlib
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, distributed
from torchmetrics import Metric

from zoo.running.checkpoint import replacing

Kind = Literal["boxes", "masks", "keypoints"]
Backend = Literal["faster_coco_eval", "pycocotools"]

PREFIX = {"boxes": "", "masks": "mask_", "keypoints": "keypoint_"}  # of the numbers' names
IOU_TYPE = {"boxes": "bbox", "masks": "segm", "keypoints": "keypoints"}  # pycocotools' names
AREAS = {"boxes": ["small", "medium", "large"], "masks": ["small", "medium", "large"], "keypoints": ["medium", "large"]}
# Nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles: how people's placing spreads, as a share of scale.
PERSON_SIGMAS = [0.026, *[0.025] * 2, *[0.035] * 2, *[0.079] * 2, *[0.072] * 2, *[0.062] * 2,
                 *[0.107] * 2, *[0.087] * 2, *[0.089] * 2]  # fmt: skip
UNKNOWN_SIGMA = 0.05  # between a person's eyes and hips


class CocoEvaluation(Metric):
    """Average precision and recall of detections, as COCO counts them.

    What it keeps lies on the CPU and is small: boxes, labels, scores, masks as run lengths, keypoints. ``update`` and
    ``compute`` are what it is for; ``forward``, a value for a single batch, it has not.

    An image is known by its ``image_id``. Given twice with the same truths, as a padding sampler does, it is counted
    once, with a warning; given twice with different truths it is an error.

    Args:
        num_classes: Number of classes C, without the background; labels are 1…C.
        kinds: What to evaluate: ``boxes`` and ``masks`` by their intersection over union, ``keypoints`` by their object
            keypoint similarity.
        keypoint_sigmas: K standard deviations of the annotators' placing of each keypoint, as a share of the object's
            scale (the root of its area). None takes COCO's for 17 keypoints (a person's), and 0.05 for each of any
            other number: then the numbers can be compared with each other, but not with anyone else's.
        backend: The library that evaluates; None takes faster-coco-eval where it is installed.

    Raises:
        ValueError: There is no class, or a kind that is not known.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(
        self,
        num_classes: int,
        kinds: tuple[Kind, ...] = ("boxes",),
        keypoint_sigmas: list[float] | None = None,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(sync_on_compute=False)  # it gathers by itself, once for all
        if num_classes < 1 or not kinds or not set(kinds) <= set(PREFIX):
            raise ValueError(f"at least one class and kinds of {list(PREFIX)} are wanted: got {num_classes}, {kinds}")
        self.num_classes = num_classes
        self.kinds = tuple(kinds)
        self.keypoint_sigmas = keypoint_sigmas
        self.backend = backend
        self._images: list[dict[str, Any]] = []
        self._everyones: list[dict[str, Any]] | None = None  # on the first process those of all
        self._evaluated: dict[str, _Evaluation] | None = None

    def update(self, predictions: list[dict[str, Any]], targets: list[dict[str, Any]]) -> None:
        """Count a batch, which may be empty.

        Args:
            predictions: A detector's output, one dict of tensors an image: ``boxes`` (R, 4) as (x1, y1, x2, y2) in
                pixels, ``labels`` (R,), ``scores`` (R,); ``masks`` (R, 1, H, W) or (R, H, W), where more than 0.5 is
                the object; ``keypoints`` (R, K, 3) as (x, y, visibility).
            targets: The truths, with the same keys but no scores, and ``image_id``; ``iscrowd`` (R,), 1 where a region
                holds many objects that nobody counted (0 if missing); ``area`` (R,) in pixels, by which objects are
                small, medium or large (that of the box if missing).

        Raises:
            ValueError: A key is missing, a label is not in 1…C, or a number is NaN or infinite.
            ImportError: Neither pycocotools nor faster-coco-eval is installed.
        """
        if len(predictions) != len(targets):
            raise ValueError(f"{len(predictions)} predictions were given for {len(targets)} targets")
        _libraries(self.backend)  # fail before an epoch is spent
        self._everyones = self._evaluated = None
        for prediction, target in zip(predictions, targets, strict=True):
            self._images.append(self._image(prediction, target))

    def compute(self) -> dict[str, float]:
        """The numbers over all images; every process must call it, and each gets the same.

        Returns:
            ``map`` (mean over classes and overlaps 0.5, 0.55, …, 0.95), ``map_50``, ``map_75``, ``map_small`` (area up
            to 32²), ``map_medium``, ``map_large`` (from 96² on), ``mar_1``, ``mar_10``, ``mar_100`` (recall with so
            many detections an image), ``mar_small``, ``mar_medium``, ``mar_large``; those of masks are called
            ``mask_map`` and so on, those of keypoints ``keypoint_map``, …, with ``keypoint_mar``, ``…_50``, ``…_75``.

            Each in [0, 1]: 0 where nothing was detected. NaN, and not pycocotools' -1, where there is no object to be
            found: as NaN it is nobody's best, and ModelCheckpoint takes any number for better.
        """
        evaluated = self._evaluate()
        return {PREFIX[kind] + name: value for kind in self.kinds for name, value in evaluated[kind].numbers.items()}

    def per_class(self, kind: Kind = "boxes") -> list[float]:
        """Average precision (overlaps 0.5 to 0.95) of each of the C classes, NaN where it has no object."""
        return self._evaluate()[kind].per_class

    def curves(self, kind: Kind = "boxes") -> Tensor:
        """Precision at overlap 0.5 of each class at recall 0, 0.01, …, 1: (C, 101), NaN where it has no object."""
        return torch.from_numpy(self._evaluate()[kind].curves)

    def samples(self) -> int:
        """The number of images that were counted, over all processes."""
        return self._evaluate()[self.kinds[0]].samples

    def results(self, category_ids: list[int], kind: Kind = "boxes") -> list[dict[str, Any]]:
        """All detections in COCO's format for results, for its server or for ``pycocotools.COCO.loadRes``.

        One kind at a time: if masks came with boxes, pycocotools would take the boxes' area for the masks'. Nothing is
        rounded, so that pycocotools finds the numbers of :meth:`compute`.

        Args:
            category_ids: C original ids; that of label k is ``category_ids[k - 1]``.
            kind: ``boxes`` become ``bbox`` [x, y, width, height], ``masks`` become ``segmentation`` (run lengths as
                text), ``keypoints`` [x, y, visibility, …].

        Returns:
            On the first process the detections of all, image by image; on others nothing. Every process must call it.

        Raises:
            ValueError: ``category_ids`` are not ``num_classes`` many, or the kind is not one that is evaluated.
        """
        if len(category_ids) != self.num_classes or kind not in self.kinds:
            raise ValueError(
                f"{self.num_classes} category_ids and a kind of {list(self.kinds)} are wanted: "
                f"got {len(category_ids)}, {kind!r}"
            )
        self._evaluate()
        results = _results(self._everyones or [], kind)
        return [found | {"category_id": category_ids[found["category_id"] - 1]} for found in results]

    def write_results(self, path: Path, category_ids: list[int], kind: Kind = "boxes") -> None:
        """Write :meth:`results` as json, whole or not at all; every process must call it, the first one writes.

        Raises:
            OSError: The file cannot be written; what was there before is untouched.
        """
        results = self.results(category_ids, kind)
        if _rank() == 0:
            with replacing(path) as partial:
                partial.write_text(json.dumps(results))

    def reset(self) -> None:
        """Forget all images."""
        super().reset()
        self._images = []
        self._everyones = self._evaluated = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Not there: the average precision of a batch says nothing about that of the set.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("call update() for each batch and compute() at the end")

    def _image(self, prediction: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
        """An image's detections and truths as arrays on the CPU, checked."""
        if "image_id" not in target:
            raise ValueError(f"a target has no image_id, by which images are counted; it has {', '.join(target)}")
        image_id = int(target["image_id"])
        truths = self._objects(target, f"target of image {image_id}")
        found = self._objects(prediction, f"prediction of image {image_id}", ["scores"])
        sizes = {what["size"] for what in (truths, found) if what["size"] is not None}
        if len(sizes) > 1:
            raise ValueError(f"image {image_id}: masks of prediction and target differ in (height, width): {sizes}")
        truths["iscrowd"] = _array(target["iscrowd"]) if "iscrowd" in target else np.zeros(len(truths["labels"]), int)
        truths["area"] = _array(target["area"]) if "area" in target else _sides(truths["boxes"]).prod(1)
        return {"image_id": image_id, "size": next(iter(sizes), (0, 0)), "truths": truths, "predictions": found}

    def _objects(self, given: dict[str, Any], whose: str, more: list[str] | None = None) -> dict[str, Any]:
        keys = ["boxes", "labels", *(more or []), *(kind for kind in self.kinds if kind != "boxes")]
        if missing := [key for key in keys if key not in given]:
            raise ValueError(f"{whose} has no {', '.join(missing)}; it has {', '.join(given)}")
        objects: dict[str, Any] = {key: _array(given[key]) for key in keys if key != "masks"}
        for key, values in objects.items():
            if len(values) != len(objects["labels"]) or not np.isfinite(values).all():
                raise ValueError(f"{whose}: {key} are NaN or infinite, or not as many as the labels")
        labels = objects["labels"]
        if len(labels) and not (labels.min() >= 1 and labels.max() <= self.num_classes):
            raise ValueError(f"{whose}: labels from {labels.min()} to {labels.max()}, not in 1…{self.num_classes}")
        objects["size"] = None
        if "masks" in keys:
            if len(given["masks"]) != len(labels):
                raise ValueError(f"{whose}: masks are not as many as the labels")
            objects["masks"], objects["size"] = _encode(given["masks"], objects["boxes"])
        return objects

    def _evaluate(self) -> "dict[str, _Evaluation]":
        """Evaluate all processes' images once, on the first one; its result, or its error, goes to all."""
        if self._evaluated is None:
            shares = _gather(self._images)
            outcome: Any = None
            if _rank() == 0:
                try:
                    self._everyones = _once([image for share in shares for image in share])
                    outcome = {kind: self._evaluate_kind(self._everyones, kind) for kind in self.kinds}
                except Exception as error:
                    outcome = error  # raised here alone, it would leave the others waiting
            outcome = _broadcast(outcome)
            if isinstance(outcome, Exception):
                raise outcome
            self._evaluated = outcome
        return self._evaluated

    def _evaluate_kind(self, images: list[dict[str, Any]], kind: Kind) -> "_Evaluation":
        areas = 1 + len(AREAS[kind])
        precision = np.full((10, 101, self.num_classes, areas, 3 if kind != "keypoints" else 1), -1.0)
        recall = precision[:, 0]
        if images:
            sigmas = _sigmas(images, self.keypoint_sigmas) if kind == "keypoints" else None
            precision, recall = _accumulated(images, kind, self.num_classes, sigmas, self.backend)
        if not (recall[0, :, 0, -1] > -1).any():
            rank_zero_warn(f"none of {len(images)} images has a truth to evaluate {kind} against: the numbers are NaN")
        return _Evaluation(
            numbers=_keypoint_numbers(precision, recall) if kind == "keypoints" else _numbers(precision, recall),
            per_class=[_mean(precision[:, :, k, 0, -1]) for k in range(self.num_classes)],
            curves=np.where(precision[0, :, :, 0, -1] > -1, precision[0, :, :, 0, -1], math.nan).T.copy(),
            samples=len(images),
        )


@dataclass(frozen=True)
class _Evaluation:
    """What is known of one kind."""

    numbers: dict[str, float]
    per_class: list[float]
    curves: np.ndarray  # (C, 101)
    samples: int


def _accumulated(
    images: list[dict[str, Any]], kind: Kind, num_classes: int, sigmas: list[float] | None, backend: Backend | None
) -> tuple[np.ndarray, np.ndarray]:
    """Precision (overlaps, recalls, classes, areas, limits), recall (overlaps, classes, areas, limits); -1 for none."""
    coco, evaluator, _ = _libraries(backend)
    sides = []
    for annotations in (_truths(images, kind), _detections(images, kind, backend)):
        for number, annotation in enumerate(annotations, 1):  # 0 would mean that nothing matches
            annotation["id"] = number
        side = coco()
        side.dataset = {
            "images": [{"id": i["image_id"], "height": i["size"][0], "width": i["size"][1]} for i in images],
            "categories": [{"id": k, "name": str(k)} for k in range(1, num_classes + 1)],
            "annotations": annotations,
        }
        sides.append(side)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        for side in sides:
            side.createIndex()
        evaluation = evaluator(*sides, IOU_TYPE[kind])
        evaluation.params.imgIds = [image["image_id"] for image in images]
        evaluation.params.catIds = list(range(1, num_classes + 1))
        if sigmas is not None:
            evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"]), np.asarray(evaluation.eval["recall"])


def _truths(images: list[dict[str, Any]], kind: Kind) -> list[dict[str, Any]]:
    annotations = []
    for image in images:
        objects = image["truths"]
        boxes = _corner_and_sides(objects["boxes"]).tolist()
        labels, areas, crowds = (objects[key].tolist() for key in ("labels", "area", "iscrowd"))
        for i, label in enumerate(labels):
            annotation = {"image_id": image["image_id"], "category_id": label, "bbox": boxes[i]}
            annotation |= {"area": areas[i], "iscrowd": int(crowds[i])}
            if kind == "masks":
                annotation["segmentation"] = objects["masks"][i]
            elif kind == "keypoints":
                points = objects["keypoints"][i]
                annotation |= {"keypoints": points.ravel().tolist(), "num_keypoints": int((points[:, 2] > 0).sum())}
            annotations.append(annotation)
    return annotations


def _results(images: list[dict[str, Any]], kind: Kind) -> list[dict[str, Any]]:
    """The detections in COCO's format, but with labels for category ids."""
    results = []
    for image in images:
        objects = image["predictions"]
        if kind == "boxes":
            key, values = "bbox", _corner_and_sides(objects["boxes"]).tolist()
        elif kind == "masks":
            key, values = "segmentation", objects["masks"]
        else:
            key, values = "keypoints", [points.ravel().tolist() for points in objects["keypoints"]]
        for label, score, value in zip(objects["labels"].tolist(), objects["scores"].tolist(), values, strict=True):
            results.append({"image_id": image["image_id"], "category_id": label, "score": score, key: value})
    return results


def _detections(images: list[dict[str, Any]], kind: Kind, backend: Backend | None) -> list[dict[str, Any]]:
    """The results with what ``loadRes`` adds to them: an area, and that they are no crowds."""
    results = _results(images, kind)
    if kind == "boxes":
        areas = [result["bbox"][2] * result["bbox"][3] for result in results]
    elif kind == "masks":
        mask = _libraries(backend)[2]
        areas = mask.area([result["segmentation"] for result in results]).tolist() if results else []
    else:
        points = [image["predictions"]["keypoints"] for image in images]
        points = [each[..., :2].astype(float) for each in points if len(each)]
        areas = [area for each in points for area in np.ptp(each, axis=1).prod(1).tolist()]
    for result, area in zip(results, areas, strict=True):
        result |= {"area": float(area), "iscrowd": 0}
    return results


def _numbers(precision: np.ndarray, recall: np.ndarray) -> dict[str, float]:
    numbers = {
        "map": _mean(precision[..., 0, -1]),
        "map_50": _mean(precision[0, ..., 0, -1]),
        "map_75": _mean(precision[5, ..., 0, -1]),
    }
    numbers |= {f"map_{area}": _mean(precision[..., i, -1]) for i, area in enumerate(AREAS["boxes"], 1)}
    numbers |= {f"mar_{limit}": _mean(recall[..., 0, i]) for i, limit in enumerate((1, 10, 100))}
    return numbers | {f"mar_{area}": _mean(recall[..., i, -1]) for i, area in enumerate(AREAS["boxes"], 1)}


def _keypoint_numbers(precision: np.ndarray, recall: np.ndarray) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name, values in (("map", precision), ("mar", recall)):
        numbers |= {
            name: _mean(values[..., 0, -1]),
            f"{name}_50": _mean(values[0, ..., 0, -1]),
            f"{name}_75": _mean(values[5, ..., 0, -1]),
        }
        numbers |= {f"{name}_{area}": _mean(values[..., i, -1]) for i, area in enumerate(AREAS["keypoints"], 1)}
    return numbers


def _mean(values: np.ndarray) -> float:
    """Over what is known. Rounded, since a 2e-16 in pycocotools' denominators makes 1 a little less."""
    known = values[values > -1]
    return round(float(known.mean()), 12) if known.size else math.nan


def _sigmas(images: list[dict[str, Any]], given: list[float] | None) -> list[float]:
    counts = {image[side]["keypoints"].shape[1] for image in images for side in ("truths", "predictions")
              if len(image[side]["keypoints"])}  # fmt: skip
    count = next(iter(counts), len(given or PERSON_SIGMAS))
    sigmas = given or (PERSON_SIGMAS if count == len(PERSON_SIGMAS) else [UNKNOWN_SIGMA] * count)
    if len(counts) > 1 or len(sigmas) != count:
        raise ValueError(f"the objects have {sorted(counts)} keypoints, and there are {len(sigmas)} keypoint_sigmas")
    return sigmas


def _once(images: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each image once, by its id."""
    unique: dict[int, dict[str, Any]] = {}
    for image in images:
        first = unique.setdefault(image["image_id"], image)
        if any(not np.array_equal(first["truths"][key], image["truths"][key]) for key in ("boxes", "labels")):
            raise ValueError(
                f"two images with different truths have the image_id {image['image_id']}: it must be unique"
            )
    if repeated := len(images) - len(unique):
        rank_zero_warn(f"{repeated} of {len(images)} images were evaluated twice (a padding sampler?) and count once")
    return [unique[image_id] for image_id in sorted(unique)]


def _array(values: Any) -> np.ndarray:
    tensor = torch.as_tensor(values).detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()  # numpy has no bfloat16


def _encode(masks: Tensor, boxes: np.ndarray) -> tuple[list[dict[str, Any]], tuple[int, int]]:
    """Run lengths of masks (R, 1, H, W) or (R, H, W), which lie about where their boxes (R, 4) say, and (H, W)."""
    height, width = masks.shape[-2:]
    masks = masks.detach().reshape(len(masks), height, width)
    if masks.is_floating_point():
        masks = masks.to(torch.promote_types(masks.dtype, torch.float32))  # numpy has no bfloat16
    elif masks.dtype != torch.uint8:
        masks = (masks != 0).to(torch.uint8)
    turns = _turns_on_gpu(masks) if masks.is_cuda else _turns(masks.cpu().numpy(), boxes)
    starts = np.arange(len(turns) + 1) * (height * width)  # of the masks, one laid after the other
    pieces = [piece for start, places in zip(starts, turns, strict=False) for piece in ([start], start + places)]
    counts = np.diff(np.concatenate([*pieces, starts[-1:]]))
    runs = np.split(counts, np.cumsum([1 + len(places) for places in turns]))[: len(turns)]
    return _compressed(runs, height, width), (height, width)


def _compressed(runs: list[np.ndarray], height: int, width: int) -> list[dict[str, Any]]:
    """COCO's texts for the lengths of runs, of nothing and of the object in turn."""
    if not runs:
        return []
    objects = [{"size": [height, width], "counts": counts} for counts in runs]
    encoded = _libraries("pycocotools")[2].frPyObjects(objects, height, width)
    return [{"size": [height, width], "counts": run["counts"].decode("ascii")} for run in encoded]


def _turns(masks: np.ndarray, boxes: np.ndarray) -> list[np.ndarray]:
    """Where each of the masks (R, H, W) begins or ends, on the way down its columns from the left one to the right.

    Only the part of a mask around its box is looked at closely, if there is nothing outside of it.
    """
    _, height, width = masks.shape
    least = 0.5 if masks.dtype.kind == "f" else 0
    turns = []
    for mask, (left, top, right, bottom) in zip(masks, _surroundings(boxes, height, width), strict=True):
        outside = (mask[:top], mask[bottom:], mask[top:bottom, :left], mask[top:bottom, right:])
        if not all(strip.size == 0 or strip.max() <= least for strip in outside):
            left, top, right, bottom = 0, 0, width, height
        # What follows belongs to it, to see where the mask ends.
        inside = mask[top : bottom + 1, left : right + 1] > least
        turns.append(_turns_of_part(inside, left, top, height) if inside.any() else np.zeros(0, dtype=np.int64))
    return turns


def _surroundings(boxes: np.ndarray, height: int, width: int) -> list[list[int]]:
    """Boxes with a margin, in whole pixels; one that reaches the lower edge of the picture reaches the upper one too.

    So the pixel that comes before the first of a column, the last of the column to its left, is known in each of them.
    """
    low, high = boxes[:, :2].astype(float), boxes[:, 2:].astype(float)
    margin = 1 + (high - low).clip(min=0) / 16
    low = np.floor(low - margin).clip(0, [width, height])
    high = np.ceil(high + margin).clip(low, [width, height])
    low[high[:, 1] == height, 1] = 0
    return np.concatenate([low, high], axis=1).astype(np.int64).tolist()


def _turns_of_part(inside: np.ndarray, left: int, top: int, height: int) -> np.ndarray:
    """Where the columns of a mask so high turn, of which all that is inside is in this part."""
    turned = np.empty(inside.shape, dtype=bool)
    np.not_equal(inside[1:], inside[:-1], out=turned[1:])
    np.not_equal(inside[0, 1:], inside[-1, :-1], out=turned[0, 1:])
    turned[0, 0] = inside[0, 0]
    places = np.flatnonzero(turned)
    rows = places // inside.shape[1]
    places = (left + places - rows * inside.shape[1]) * height + top + rows
    places.sort()
    return places


def _turns_on_gpu(masks: Tensor) -> list[np.ndarray]:
    """As :func:`_turns`, of a tensor: no more than the places come to the CPU."""
    _, height, width = masks.shape
    turns: list[np.ndarray] = []
    for some in masks.split(max(1, 2**28 // (height * width))):  # nonzero takes less than 2**31 elements
        inside = some > (0.5 if some.is_floating_point() else 0)
        turned = torch.empty_like(inside)
        torch.ne(inside[:, 1:], inside[:, :-1], out=turned[:, 1:])
        torch.ne(inside[:, 0, 1:], inside[:, -1, :-1], out=turned[:, 0, 1:])
        turned[:, 0, 0] = inside[:, 0, 0]
        which, rows, columns = turned.nonzero(as_tuple=True)
        places = ((which * width + columns) * height + rows).sort()[0].cpu().numpy()
        starts = np.arange(len(some)) * (height * width)
        parts = np.split(places, np.searchsorted(places, starts[1:]))
        turns += [part - start for part, start in zip(parts, starts, strict=True)]
    return turns


def _sides(boxes: np.ndarray) -> np.ndarray:
    """Width and height (R, 2); 0 where a box is turned inside out, whose area pycocotools would ignore."""
    return (boxes[:, 2:].astype(float) - boxes[:, :2]).clip(min=0)


def _corner_and_sides(boxes: np.ndarray) -> np.ndarray:
    """(x, y, width, height) in float64 of (x1, y1, x2, y2)."""
    return np.concatenate([boxes[:, :2].astype(float), _sides(boxes)], axis=1)


def _libraries(backend: Backend | None) -> tuple[Any, Any, Any]:
    """The classes for data and evaluation and the module for masks."""
    if backend != "pycocotools":
        try:
            from faster_coco_eval import COCO, COCOeval_faster
            from faster_coco_eval.core import mask

            return COCO, COCOeval_faster, mask
        except ImportError as error:
            if backend is not None:
                raise ImportError(
                    "faster-coco-eval is not installed; get it with: pip install zoo[detection]"
                ) from error
    try:
        from pycocotools import mask
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ImportError("evaluating detections needs pycocotools; get it with: pip install zoo[detection]") from error
    return COCO, COCOeval, mask


def _world_size() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _rank() -> int:
    return distributed.get_rank() if _world_size() > 1 else 0


def _gather(images: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """On the first process every process's images."""
    if _world_size() == 1:
        return [images]
    shares: list[Any] | None = [None] * _world_size() if _rank() == 0 else None
    distributed.gather_object(images, shares, dst=0)
    return shares or []


def _broadcast(outcome: Any) -> Any:
    """The first process's."""
    if _world_size() == 1:
        return outcome
    outcomes = [outcome]
    distributed.broadcast_object_list(outcomes, src=0)
    return outcomes[0]
