"""Evaluation of detections, side by side in one run: pycocotools and this project's.

    python benchmarks/detection_evaluation.py [--images 1000] [--detections 20] [--kind boxes] [--rounds 3]

A generated set after COCO's shape (80 classes, about seven objects an image, some crowds); each way starts from the
same tensors, as a detector gives them, and ends with COCO's numbers:

- pycocotools: results as its own format, ``loadRes``, ``COCOeval``; the truths are in its index already;
- zoo: ``update`` in batches of 8 and ``compute``, which also makes the truths' index, and of masks encodes the truths'.

Rounds are interleaved; the ratio of the best times is given, and the greatest difference of the twelve numbers.
"""

import argparse
import contextlib
import io
import time
from collections.abc import Callable

import numpy as np
import torch
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from zoo.tasks.coco_evaluation import IOU_TYPE, CocoEvaluation, Kind

CLASSES = 80
SIZE = 480


def generated_set(images: int, detections: int, masks: bool) -> tuple[list[dict], list[dict]]:
    """Predictions and truths of so many images: two thirds of the detections near a true object."""
    generator = torch.Generator().manual_seed(0)
    predictions, targets = [], []
    for image in range(images):
        count = int(torch.randint(1, 14, (1,), generator=generator))
        truths = random_boxes(count, generator)
        labels = torch.randint(1, CLASSES + 1, (count,), generator=generator)
        near = torch.randint(count, (detections,), generator=generator)
        noise = (
            torch.randn(detections, 4, generator=generator) * (truths[near, 2:] - truths[near, :2]).repeat(1, 2) / 12
        )
        hit = torch.rand(detections, 1, generator=generator) < 2 / 3
        boxes = torch.where(hit, truths[near] + noise, random_boxes(detections, generator)).clamp(0, SIZE)
        boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        scores = torch.rand(detections, generator=generator)
        predictions.append({"boxes": boxes, "labels": labels[near], "scores": scores})
        area = (truths[:, 2:] - truths[:, :2]).prod(1)
        crowd = (torch.rand(count, generator=generator) < 0.02).long()
        targets.append({"boxes": truths, "labels": labels, "area": area, "iscrowd": crowd, "image_id": image + 1})
        if masks:
            predictions[-1]["masks"] = filled(boxes)[:, None]
            targets[-1]["masks"] = filled(truths)
    return predictions, targets


def random_boxes(count: int, generator: torch.Generator) -> torch.Tensor:
    sides = 8 + 250 * torch.rand(count, 2, generator=generator) ** 2
    corners = torch.rand(count, 2, generator=generator) * (SIZE - sides)
    return torch.cat([corners, corners + sides], dim=1)


def filled(boxes: torch.Tensor) -> torch.Tensor:
    """Masks (R, SIZE, SIZE) of the boxes' areas."""
    places = torch.arange(SIZE)
    x1, y1, x2, y2 = (side[:, None] for side in boxes.T)
    across, down = (places >= x1) & (places < x2), (places >= y1) & (places < y2)
    return (down[:, :, None] & across[:, None, :]).to(torch.uint8)


def runs(masks: torch.Tensor) -> list[dict]:
    return mask.encode(np.asfortranarray(masks.reshape(-1, SIZE, SIZE).permute(1, 2, 0).numpy()))


def annotations(sides: list[dict], kind: Kind, ids: list[int]) -> list[dict]:
    """Truths or detections in pycocotools' format."""
    listed = []
    for image, side in zip(ids, sides, strict=True):
        labels, boxes = side["labels"].tolist(), side["boxes"].double()
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
        areas = runs(side["masks"]) if kind == "masks" else []
        more = {key: side[key].tolist() for key in ("scores", "area", "iscrowd") if key in side}
        for i, label in enumerate(labels):
            annotation = {"image_id": image, "category_id": label}
            annotation |= {("score" if key == "scores" else key): values[i] for key, values in more.items()}
            if kind == "boxes" or "area" in more:
                annotation["bbox"] = boxes[i]
            if kind == "masks":
                annotation["segmentation"] = areas[i]
            listed.append(annotation)
    return listed


def pycocotools_way(predictions: list[dict], targets: list[dict], kind: Kind) -> Callable[[], list[float]]:
    ids = [target["image_id"] for target in targets]
    truth = COCO()
    truth.dataset = {
        "images": [{"id": image, "height": SIZE, "width": SIZE} for image in ids],
        "categories": [{"id": k} for k in range(1, CLASSES + 1)],
        "annotations": [a | {"id": n} for n, a in enumerate(annotations(targets, kind, ids), 1)],
    }
    truth.createIndex()

    def way() -> list[float]:
        found = truth.loadRes(annotations(predictions, kind, ids))
        evaluation = COCOeval(truth, found, IOU_TYPE[kind])
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return evaluation.stats.tolist()

    return way


def zoo_way(predictions: list[dict], targets: list[dict], kind: Kind) -> Callable[[], list[float]]:
    def way() -> list[float]:
        evaluation = CocoEvaluation(CLASSES, kinds=(kind,))
        for start in range(0, len(targets), 8):
            evaluation.update(predictions[start : start + 8], targets[start : start + 8])
        return list(evaluation.compute().values())

    return way


def compare_evaluation(images: int, detections: int, kind: Kind, rounds: int) -> str:
    """Times of both ways in seconds, their ratio, and the greatest difference of the twelve numbers."""
    predictions, targets = generated_set(images, detections, kind == "masks")
    times: dict[str, list[float]] = {"pycocotools": [], "zoo": []}
    numbers: dict[str, list[float]] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        ways = {"pycocotools": pycocotools_way(predictions, targets, kind), "zoo": zoo_way(predictions, targets, kind)}
        zoo_way(predictions[:8], targets[:8], kind)()  # the libraries are imported
        for _ in range(rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                numbers[name] = way()
                times[name].append(time.perf_counter() - start)
    theirs, ours = (min(times[name]) for name in ways)
    difference = max(abs(a - b) for a, b in zip(*numbers.values(), strict=True))
    return (
        f"{kind}: {images} images x {detections} detections, {CLASSES} classes, map {numbers['zoo'][0]:.4f}: "
        f"pycocotools {theirs:.2f} s, zoo {ours:.2f} s, {theirs / ours:.1f} x as fast; "
        f"numbers differ by {difference:.0e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--detections", type=int, default=20)
    parser.add_argument("--kind", default="boxes", choices=["boxes", "masks"])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(compare_evaluation(arguments.images, arguments.detections, arguments.kind, arguments.rounds))


if __name__ == "__main__":
    main()
