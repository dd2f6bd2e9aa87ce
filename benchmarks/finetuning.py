"""Train a detection recipe's model the way torchvision's references do, to compare with ``zoo reproduce``.

    python benchmarks/finetuning.py faster_rcnn/bccd [--device cuda] [--seed 0] [--data.init_args.root …]

The same model from the same weights, the same pictures, number of steps, optimizer and schedule; everything else is
what people write from torchvision's ``references/detection``: ``CocoDetection`` with Pillow and pycocotools, transforms
v2 on one picture after the other, a plain loop over the sum of the losses, pycocotools' COCOeval on the original file.
What comes out should differ from ``zoo reproduce`` by no more than seeds do.
"""

import argparse
import contextlib
import io
import math
import time
from typing import Any

import numpy as np
import torch
from lightning import seed_everything
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection
from torchvision.transforms import v2

from datamodules.coco import Files
from zoo.running.starting import finish, prepare


class Pictures(CocoDetection):
    """Pictures with boxes, labels and masks, after a transform; crowds are left out."""

    def __init__(self, files: Files, transform: v2.Transform, masks: bool) -> None:
        super().__init__(str(files.pictures), str(files.annotations))
        self.transform_both = transform
        self.masks = masks
        self.label_of = {category: k for k, category in enumerate(sorted(self.coco.getCatIds()), 1)}

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        """Picture float32 (3, H, W) and target with torchvision's keys."""
        picture, entries = super().__getitem__(index)
        entries = [entry for entry in entries if not entry["iscrowd"] and min(entry["bbox"][2:]) > 0]
        width, height = picture.size
        boxes = torch.tensor([entry["bbox"] for entry in entries]).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(0, width)
        boxes[:, 1::2].clamp_(0, height)
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),  # type: ignore[call-overload]
            "labels": torch.tensor([self.label_of[entry["category_id"]] for entry in entries], dtype=torch.int64),
        }
        if self.masks:
            bitmaps = [self.coco.annToMask(entry) for entry in entries]
            stacked = np.stack(bitmaps) if bitmaps else np.zeros((0, height, width), np.uint8)
            target["masks"] = tv_tensors.Mask(torch.from_numpy(stacked))
        image, target = self.transform_both(
            tv_tensors.Image(v2.functional.pil_to_tensor(picture.convert("RGB"))), target
        )
        return image.as_subclass(Tensor), {**target, "image_id": self.ids[index]}


def batches(pictures: Pictures, batch_size: int, shuffle: bool) -> DataLoader:
    """A loader of lists of pictures and targets."""
    return DataLoader(
        pictures,
        batch_size,
        shuffle=shuffle,
        num_workers=2,
        drop_last=shuffle,
        collate_fn=lambda rows: tuple(zip(*rows, strict=True)),
    )


def train(model: Any, loader: DataLoader, epochs: int, device: str) -> None:
    """A plain loop over the sum of the losses."""
    optimizer = model.optimizer([p for p in model.parameters() if p.requires_grad])
    schedule = model.scheduler(optimizer, epochs * len(loader))
    model.train()
    for epoch in range(epochs):
        start, total = time.perf_counter(), 0.0
        for images, targets in loader:
            images = [image.to(device) for image in images]
            targets = [{k: v.to(device) for k, v in target.items() if k != "image_id"} for target in targets]
            loss = sum(model.losses(images, targets).values())
            if not math.isfinite(float(loss)):
                raise SystemExit(f"the loss is {float(loss)}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss)
        print(
            f"epoch {epoch + 1}/{epochs}  loss {total / len(loader):.3f}  {time.perf_counter() - start:.0f} s",
            flush=True,
        )


def evaluate(model: Any, pictures: Pictures, device: str) -> dict[str, float]:
    """AP of boxes (and masks) by pycocotools, against the original file."""
    category_of = {k: category for category, k in pictures.label_of.items()}
    rows = []
    model.eval()
    for images, targets in batches(pictures, 4, shuffle=False):
        with torch.inference_mode():
            outputs = model.detect([image.to(device) for image in images])
        for target, found in zip(targets, outputs, strict=True):
            rows += results(found, target["image_id"], category_of)
    numbers = {}
    for kind in ("bbox", "segm") if pictures.masks else ("bbox",):
        with contextlib.redirect_stdout(io.StringIO()):
            judged = COCOeval(pictures.coco, pictures.coco.loadRes(rows), kind)
            judged.evaluate()
            judged.accumulate()
            judged.summarize()
        numbers |= {f"{kind} AP": float(judged.stats[0]), f"{kind} AP50": float(judged.stats[1])}
    return numbers


def results(found: dict[str, Tensor], image_id: int, category_of: dict[int, int]) -> list[dict[str, Any]]:
    """Rows of COCO's results file."""
    rows = []
    boxes = found["boxes"].cpu().clone()
    boxes[:, 2:] -= boxes[:, :2]
    for k, (box, score, label) in enumerate(
        zip(boxes.tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True)
    ):
        row = {"image_id": image_id, "category_id": category_of[label], "bbox": box, "score": score}
        if "masks" in found:
            bitmap = (found["masks"][k, 0] > 0.5).byte().cpu().numpy()
            row["segmentation"] = coco_mask.encode(np.asfortranarray(bitmap))
        rows.append(row)
    return rows


def main() -> None:
    """Train and evaluate; print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    options, overrides = parser.parse_known_args()
    nothing = ["--trainer.limit_train_batches", "0", "--trainer.limit_val_batches", "0", "--trainer.logger", "false"]
    cli = finish(prepare("fit", options.recipe, [*overrides, *nothing, "--seed_everything", str(options.seed)]))
    model, data = cli.model.to(options.device), cli.datamodule
    model.trainer = None
    masks = "masks" in model.kinds
    flip = v2.Compose([v2.RandomHorizontalFlip(0.5), v2.ToDtype(torch.float32, scale=True)])
    still = v2.ToDtype(torch.float32, scale=True)
    train_files, test_files = data.files["train"], data.files.get("test", data.files.get("val"))
    seed_everything(options.seed)
    start = time.perf_counter()
    train(
        model,
        batches(Pictures(train_files, flip, masks), data.batch_size, True),
        cli.trainer.max_epochs,
        options.device,
    )
    seconds = time.perf_counter() - start
    numbers = evaluate(model, Pictures(test_files, still, masks), options.device)
    print(f"{options.recipe}, seed {options.seed}: {numbers}, {seconds:.0f} s")


if __name__ == "__main__":
    main()
