"""Detection's training step, loader and evaluation, each beside what it would replace, in one run.

    python benchmarks/detection.py step [--network squeezenet1_0] [--size 128] [--batch_size 4] [--device cpu]
        [--precision bf16-mixed]
    python benchmarks/detection.py loader --root DIR [--masks] [--workers 2] [--batch_size 4]
    python benchmarks/detection.py evaluation [--kind boxes masks keypoints] [--images 1000] [--detections 20]

step: training of a Faster R-CNN from random weights on generated scenes, which both ways take from the same loader.

- bare: torchvision's network, built of the same pieces and laid out in memory as ours, its optimizer and its
  schedule in a plain loop, without any logging;
- zoo: ``zoo fit`` with all that it adds to a run.

loader: epochs of a folder in COCO's format, half of its pictures mirrored; each way ends with images as float32 in
[0, 1] in the process that trains. Workers stay from epoch to epoch.

- torchvision: as its references/detection load it: CocoDetection (Pillow, pycocotools), RandomHorizontalFlip,
  PILToTensor and ToDtype, a DataLoader;
- torchvision.io: the same, but the files are decoded by torchvision.io;
- zoo: COCODataModule, from files; with Pillow where simplejpeg would be installed; and with the pictures in memory.

evaluation: a generated set after COCO's shape (80 classes and seven objects an image, some crowds; of keypoints one
class). Each way starts with the tensors of a batch of 8, as a detector gives them, and ends with COCO's numbers.

- pycocotools: masks through ``encode(asfortranarray(…))``, results in its own format, ``loadRes``, ``COCOeval``; the
  truths are in its index before the clock starts;
- zoo: ``update`` and ``compute``, which must encode the truths' masks too.

Masks are uint8; with ``--probabilities`` what is found is float32, to be cut at 0.5, as by a Mask R-CNN.

Rounds are interleaved and the median of each way is compared, since machines are noisy; only ratios mean something.

Measured on 23 November 2026 on two cores of an Intel Xeon at 2.5 GHz that two to four other processes used as well
(torch 2.14.1, one thread; simplejpeg 1.9.0, pycocotools 2.0.11, faster-coco-eval 1.8.0), medians of three rounds:

    step, squeezenet1_0                    zoo / bare 1.02 (15 steps a round; zoo's rounds 2.3 to 3.8 images/s)
    loader, BCCD                           zoo / torchvision 2.19, / torchvision.io 1.95; cached 2.48 and 2.21
    loader, COCO's pictures of 128 px      zoo / torchvision 2.03, / torchvision.io 1.67 (with masks)
    loader, nuclei                         zoo / torchvision 1.63, / torchvision.io 1.58 (with masks)
    evaluation, boxes                      zoo / pycocotools 6.42
    evaluation, masks                      zoo / pycocotools 2.35
    evaluation, keypoints                  zoo / pycocotools 4.02

Of masks of probabilities it is 2.29 (300 images, processor time). An image's 26.5 masks take the zoo 3.3 ms, of which
0.7 are to read them from memory, and COCO's protocol 1.5 to 1.8 ms (processor time).
"""

import argparse
import contextlib
import io
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from jpeg_folder import without_simplejpeg
from lightning import seed_everything
from PIL import Image
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from small_images import WARM_UP, Clock, chdir, now
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection
from torchvision.io import ImageReadMode, decode_image
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.transforms.v2 import functional as transforms

from datamodules import COCODataModule, pictures
from zoo.running.command import RecipeCLI
from zoo.running.starting import prepare
from zoo.tasks.coco_evaluation import IOU_TYPE, PERSON_SIGMAS, CocoEvaluation, Kind

CLASSES = {"boxes": 80, "masks": 80, "keypoints": 1}
SIDE = 480  # of the images whose detections are evaluated
BATCH = 8  # of them

Detections = list[dict[str, torch.Tensor]]


def compare(images: int, ways: dict[str, Callable[[], float]], rounds: int, setting: str) -> None:
    """Print the images/s of each way, which gives the seconds that it took, and how much of the others' ours is."""
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            speeds[name].append(images / way())
    median = {name: statistics.median(values) for name, values in speeds.items()}
    for name, value in median.items():
        print(f"{setting}  {name:15s} {value:9.2f} images/s  ({min(speeds[name]):.2f} to {max(speeds[name]):.2f})")
    ours = [name for name in median if name.startswith("zoo")]
    others = [name for name in median if name not in ours]
    ratios = [f"{one} / {other} {median[one] / median[other]:.2f}" for one in ours for other in others]
    print(f"{setting}  {'   '.join(ratios)}")


# The training step


def recipe(arguments: argparse.Namespace, folder: Path) -> Path:
    """A recipe of what is timed, with as many scenes as it has steps: no epoch ends while the clock runs."""
    model = {
        "network": arguments.network,
        "min_size": arguments.size,
        "max_size": 2 * arguments.size,
        "frozen_batch_norm": False,
        "proposals": arguments.proposals,
        "sampled_regions": arguments.sampled_regions,
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e-3, "momentum": 0.9}},
    }
    pictures_needed = (WARM_UP + arguments.steps + 1) * arguments.batch_size
    data = {"root": str(folder), "train_size": pictures_needed, "val_size": 0, "test_size": 0}
    data |= {"batch_size": arguments.batch_size, "workers": arguments.workers}
    trainer = {"max_steps": WARM_UP + arguments.steps, "max_epochs": -1, "precision": arguments.precision}
    trainer |= {"accelerator": torch.device(arguments.device).type, "devices": 1}
    content = {
        "seed_everything": 0,
        "model": {"class_path": "zoo.FasterRCNN", "init_args": model},
        "data": {"class_path": "datamodules.ScenesDataModule", "init_args": data},
        "trainer": trainer,
    }
    path = folder / "faster_rcnn.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def prepared(path: Path) -> RecipeCLI:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return prepare("fit", str(path), [])


def our_steps(path: Path, arguments: argparse.Namespace) -> float:
    """Seconds for the steps of ``zoo fit``."""
    clock = Clock(arguments.steps, torch.device(arguments.device))
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        cli = prepared(path)
        cli.trainer.callbacks.append(clock)
        with contextlib.redirect_stdout(io.StringIO()):
            cli.run()
    return clock.seconds


def bare_steps(path: Path, arguments: argparse.Namespace) -> float:
    """Seconds for the steps of a plain loop around torchvision's network."""
    device = torch.device(arguments.device)
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        cli = prepared(path)
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    pieces = cli.model.to(device)
    network = GeneralizedRCNN(pieces.backbone, pieces.rpn, pieces.head, pieces.resize).train()
    optimizer = pieces.optimizer(network.parameters())
    schedule = pieces.scheduler(optimizer, WARM_UP + arguments.steps)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision.startswith("bf16"))
    start = 0.0
    for step, (images, targets) in enumerate(cli.datamodule.train_dataloader()):
        if step == WARM_UP:
            start = now(device)
        elif step == WARM_UP + arguments.steps:
            break
        images = [image.to(device, non_blocking=True).float().div_(255) for image in images]
        targets = [{key: value.to(device, non_blocking=True) for key, value in target.items()} for target in targets]
        with autocast:
            loss = sum(network(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return now(device) - start


def compare_steps(arguments: argparse.Namespace) -> None:
    seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        path = recipe(arguments, Path(folder))
        ways = {"bare": partial(bare_steps, path, arguments), "zoo": partial(our_steps, path, arguments)}
        setting = f"{arguments.network}, {arguments.size} px, batch {arguments.batch_size}, {arguments.precision}"
        compare(arguments.steps * arguments.batch_size, ways, arguments.rounds, setting)


# The loader


class Reference(CocoDetection):
    """What torchvision's references/detection do for each picture.

    Args:
        root: Folder of the pictures.
        annotations: The json file.
        masks: Make masks; the references always do.
        by_torchvision: Decode by torchvision.io instead of Pillow.
    """

    def __init__(self, root: Path, annotations: Path, masks: bool, by_torchvision: bool) -> None:
        super().__init__(root, annotations)
        self.masks = masks
        self.by_torchvision = by_torchvision

    def _load_image(self, id: int) -> Image.Image | torch.Tensor:
        if not self.by_torchvision:
            return super()._load_image(id)
        return decode_image(os.path.join(self.root, self.coco.imgs[id]["file_name"]), ImageReadMode.RGB)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        image, annotations = super().__getitem__(index)
        target = self.target(
            self.ids[index], [a for a in annotations if a["iscrowd"] == 0], *transforms.get_size(image)
        )
        if torch.rand(1) < 0.5:
            image, width = transforms.horizontal_flip(image), transforms.get_size(image)[1]
            target["boxes"][:, [0, 2]] = width - target["boxes"][:, [2, 0]]
            if self.masks:
                target["masks"] = target["masks"].flip(-1)
        image = image if self.by_torchvision else transforms.pil_to_tensor(image)
        return transforms.to_dtype(image, torch.float32, scale=True), target

    def target(self, image_id: int, annotations: list[dict], height: int, width: int) -> dict[str, torch.Tensor]:
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(min=0, max=width)
        boxes[:, 1::2].clamp_(min=0, max=height)
        good = (boxes[:, 3] > boxes[:, 1]) & (boxes[:, 2] > boxes[:, 0])
        target = {
            "boxes": boxes[good],
            "labels": torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64)[good],
            "image_id": torch.tensor(image_id),
            "area": torch.tensor([a["area"] for a in annotations], dtype=torch.float32)[good],
            "iscrowd": torch.tensor([a["iscrowd"] for a in annotations], dtype=torch.int64)[good],
        }
        if self.masks:
            masks = [torch.from_numpy(self.coco.annToMask(a)) for a in annotations]
            target["masks"] = (torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.uint8))[good]
        return target


def as_lists(samples: list) -> tuple[list, list]:
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def reference_epoch(data: COCODataModule, arguments: argparse.Namespace, by_torchvision: bool) -> Callable[[], int]:
    """An epoch of torchvision's references; it gives the number of images."""
    files = data.files["train"]
    with contextlib.redirect_stdout(io.StringIO()):
        pictures = Reference(files.pictures, files.annotations, arguments.masks, by_torchvision)
    loader = DataLoader(
        pictures,
        arguments.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=arguments.workers,
        collate_fn=as_lists,
        persistent_workers=arguments.workers > 0,
    )
    return lambda: sum(len(images) for images, _ in loader)


def our_epoch(arguments: argparse.Namespace, cache: bool) -> Callable[[], int]:
    """An epoch of the data module, with what it does after the transfer."""
    data = our_data(arguments, cache)
    data.setup("fit")
    loader = data.train_dataloader()
    return lambda: sum(len(data.on_after_batch_transfer(batch, 0)[0]) for batch in loader)


def our_data(arguments: argparse.Namespace, cache: bool) -> COCODataModule:
    return COCODataModule(
        arguments.root,
        masks=arguments.masks,
        batch_size=arguments.batch_size,
        val_size=0,
        cache=cache,
        workers=arguments.workers,
    )


def compare_loaders(arguments: argparse.Namespace) -> None:
    data = our_data(arguments, cache=False)
    epochs = {
        "torchvision": reference_epoch(data, arguments, by_torchvision=False),
        "torchvision.io": reference_epoch(data, arguments, by_torchvision=True),
        "zoo": our_epoch(arguments, cache=False),
        "zoo, Pillow": our_epoch(arguments, cache=False),
        "zoo, cached": our_epoch(arguments, cache=True),
    }
    if pictures.simplejpeg is None:
        epochs.pop("zoo, Pillow")
    # In the first epoch workers start, and files come into memory.
    images = {name: without_simplejpeg(epoch) if name == "zoo, Pillow" else epoch() for name, epoch in epochs.items()}
    if len(set(images.values())) > 1:
        raise ValueError(f"the ways do not give the same number of images: {images}")
    count = images["zoo"]
    repeats = -(-arguments.images // count)
    ways = {name: partial(seconds_for, epoch, repeats) for name, epoch in epochs.items()}
    setting = f"{Path(arguments.root).name}{' with masks' if arguments.masks else ''}, {arguments.workers} workers"
    compare(count * repeats, ways, arguments.rounds, setting)


def seconds_for(epoch: Callable[[], int], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        epoch()
    return time.perf_counter() - start


# The evaluation


def generated_set(images: int, detections: int, kind: Kind) -> tuple[Detections, Detections]:
    """Predictions and truths of so many images: two thirds of the detections near a true object."""
    generator = torch.Generator().manual_seed(0)
    predictions, targets = [], []
    for image in range(images):
        count = int(torch.randint(1, 14, (1,), generator=generator))
        truths = random_boxes(count, generator)
        labels = torch.randint(1, CLASSES[kind] + 1, (count,), generator=generator)
        near = torch.randint(count, (detections,), generator=generator)
        noise = (
            torch.randn(detections, 4, generator=generator) * (truths[near, 2:] - truths[near, :2]).repeat(1, 2) / 12
        )
        hit = torch.rand(detections, 1, generator=generator) < 2 / 3
        boxes = torch.where(hit, truths[near] + noise, random_boxes(detections, generator)).clamp(0, SIDE)
        boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        scores = torch.rand(detections, generator=generator)
        predictions.append({"boxes": boxes, "labels": labels[near], "scores": scores})
        area = (truths[:, 2:] - truths[:, :2]).prod(1)
        crowd = (torch.rand(count, generator=generator) < 0.02).long()
        targets.append({"boxes": truths, "labels": labels, "area": area, "iscrowd": crowd, "image_id": image + 1})
        if kind == "keypoints":
            places = torch.rand(count, len(PERSON_SIGMAS), 2, generator=generator)
            shift = torch.randn(detections, len(PERSON_SIGMAS), 2, generator=generator) / 30
            predictions[-1]["keypoints"] = keypoints(boxes, places[near] + shift, 1)
            visible = torch.randint(0, 3, (*places.shape[:2], 1), generator=generator)
            targets[-1]["keypoints"] = keypoints(truths, places, visible)
    return predictions, targets


def random_boxes(count: int, generator: torch.Generator) -> torch.Tensor:
    sides = 8 + 250 * torch.rand(count, 2, generator=generator) ** 2
    corners = torch.rand(count, 2, generator=generator) * (SIDE - sides)
    return torch.cat([corners, corners + sides], dim=1)


def keypoints(boxes: torch.Tensor, places: torch.Tensor, visible: torch.Tensor | int) -> torch.Tensor:
    """Keypoints (R, K, 3) at places (R, K, 2) that are shares of their boxes' sides."""
    points = boxes[:, None, :2] + places * (boxes[:, 2:] - boxes[:, :2])[:, None]
    return torch.cat([points, torch.ones_like(points[..., :1]) * visible], dim=2)


def filled(boxes: torch.Tensor) -> torch.Tensor:
    """Masks (R, SIDE, SIDE) of the boxes' areas."""
    places = torch.arange(SIDE)
    x1, y1, x2, y2 = (side[:, None] for side in boxes.T)
    across, down = (places >= x1) & (places < x2), (places >= y1) & (places < y2)
    return (down[:, :, None] & across[:, None, :]).to(torch.uint8)


def batches(
    predictions: Detections, targets: Detections, kind: Kind, probabilities: bool
) -> Iterator[tuple[Detections, Detections]]:
    """Predictions and truths of a few images; masks are made here, since those of all would not go into memory."""
    for start in range(0, len(targets), BATCH):
        found, truths = predictions[start : start + BATCH], targets[start : start + BATCH]
        if kind == "masks":
            found = [each | {"masks": filled(each["boxes"])[:, None]} for each in found]
            truths = [each | {"masks": filled(each["boxes"])} for each in truths]
            if probabilities:
                found = [each | {"masks": each["masks"] * 0.9} for each in found]
        yield found, truths


class Pycocotools:
    """Evaluation as its documentation has it.

    Args:
        all_batches: Makes the batches, of which it takes the truths.
        kind: What is evaluated.
    """

    def __init__(self, all_batches: Callable[[], Iterator], kind: Kind) -> None:
        self.kind = kind
        annotations, images = [], []
        for _, targets in all_batches():
            annotations += self.annotations(targets, targets)
            images += [{"id": target["image_id"], "height": SIDE, "width": SIDE} for target in targets]
        self.truths = COCO()
        self.truths.dataset = {
            "images": images,
            "categories": [{"id": k} for k in range(1, CLASSES[kind] + 1)],
            "annotations": [annotation | {"id": n} for n, annotation in enumerate(annotations, 1)],
        }
        self.truths.createIndex()

    def begin(self) -> None:
        self.found: list[dict] = []

    def update(self, predictions: Detections, targets: Detections) -> None:
        self.found += self.annotations(predictions, targets)

    def compute(self) -> list[float]:
        evaluation = COCOeval(self.truths, self.truths.loadRes(self.found), IOU_TYPE[self.kind])
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return evaluation.stats.tolist()

    def annotations(self, sides: Detections, targets: Detections) -> list[dict]:
        """Truths or detections in pycocotools' format."""
        listed = []
        for side, target in zip(sides, targets, strict=True):
            labels, boxes = side["labels"].tolist(), side["boxes"].double()
            boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
            areas = runs(side["masks"]) if self.kind == "masks" else []
            points = side["keypoints"].double().flatten(1).tolist() if self.kind == "keypoints" else []
            more = {key: side[key].tolist() for key in ("scores", "area", "iscrowd") if key in side}
            for i, label in enumerate(labels):
                annotation = {"image_id": target["image_id"], "category_id": label}
                annotation |= {("score" if key == "scores" else key): values[i] for key, values in more.items()}
                if self.kind == "boxes" or "area" in more:
                    annotation["bbox"] = boxes[i]
                if self.kind == "masks":
                    annotation["segmentation"] = areas[i]
                elif self.kind == "keypoints":
                    annotation["keypoints"] = points[i]
                    annotation["num_keypoints"] = sum(visible > 0 for visible in points[i][2::3])
                listed.append(annotation)
        return listed


def runs(masks: torch.Tensor) -> list[dict]:
    """Encode masks (R, 1, H, W) or (R, H, W), all of an image at once."""
    array = masks.reshape(-1, *masks.shape[-2:]).numpy()
    binary = (array > 0.5).view(np.uint8) if array.dtype.kind == "f" else array
    return mask.encode(np.asfortranarray(binary.transpose(1, 2, 0)))


class Ours:
    """Evaluation as the zoo's task does it.

    Args:
        kind: What is evaluated.
    """

    def __init__(self, kind: Kind) -> None:
        self.metric = CocoEvaluation(CLASSES[kind], kinds=(kind,))
        self.begin, self.update = self.metric.reset, self.metric.update

    def compute(self) -> list[float]:
        return list(self.metric.compute().values())


def evaluated(
    way: Pycocotools | Ours, all_batches: Callable[[], Iterator], numbers: dict[str, list[float]], name: str
) -> float:
    """Seconds for an evaluation, without what it takes to make the batches; its numbers are kept."""
    seconds = 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        way.begin()
        for batch in all_batches():
            start = time.perf_counter()
            way.update(*batch)
            seconds += time.perf_counter() - start
        start = time.perf_counter()
        numbers[name] = way.compute()
        return seconds + time.perf_counter() - start


def compare_evaluation(arguments: argparse.Namespace, kind: Kind) -> None:
    def few(images: int) -> Callable[[], Iterator]:
        found, truths = generated_set(images, arguments.detections, kind)
        return partial(batches, found, truths, kind, arguments.probabilities)

    evaluated(Ours(kind), few(BATCH), {}, "zoo")  # the libraries are imported
    all_batches, numbers = few(arguments.images), {}
    with contextlib.redirect_stdout(io.StringIO()):
        ways = {"pycocotools": Pycocotools(all_batches, kind), "zoo": Ours(kind)}
    timed = {name: partial(evaluated, way, all_batches, numbers, name) for name, way in ways.items()}
    made_of = " of probabilities" if kind == "masks" and arguments.probabilities else ""
    compare(arguments.images, timed, arguments.rounds, f"{kind}{made_of}")
    greatest = max(abs(a - b) for a, b in zip(*numbers.values(), strict=True))
    print(f"{kind}{made_of}  the numbers differ by {greatest:.0e}; the first is {numbers['zoo'][0]:.4f}")


# The command line


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    step, loader, evaluation = (parts.add_parser(name) for name in ("step", "loader", "evaluation"))
    for part in (step, loader, evaluation):
        part.add_argument("--rounds", type=int, default=3)
    for part, workers in ((step, 0), (loader, 2)):
        part.add_argument("--batch_size", type=int, default=4)
        part.add_argument("--workers", type=int, default=workers)
    step.add_argument("--network", default="squeezenet1_0", help="the trunk, as zoo.FasterRCNN has it")
    step.add_argument("--size", type=int, default=128, help="shorter side that images are brought to")
    step.add_argument("--proposals", type=int, default=100)
    step.add_argument("--sampled_regions", type=int, default=32)
    step.add_argument("--steps", type=int, default=20, help=f"per round, after {WARM_UP}")
    step.add_argument("--device", default="cpu")
    step.add_argument("--precision", default="32-true", help="of the Trainer: 32-true or bf16-mixed")
    loader.add_argument("--root", required=True, help="folder in COCO's format")
    loader.add_argument("--masks", action="store_true")
    loader.add_argument("--images", type=int, default=400, help="at least, per round; whole epochs")
    evaluation.add_argument("--images", type=int, default=1000)
    evaluation.add_argument("--detections", type=int, default=20, help="of an image")
    evaluation.add_argument("--kind", nargs="+", default=["boxes", "masks", "keypoints"], choices=list(CLASSES))
    evaluation.add_argument("--probabilities", action="store_true", help="masks are found as float32")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    warnings.filterwarnings("ignore")
    for part in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{part}").setLevel(logging.ERROR)
    on_gpu = getattr(arguments, "device", "cpu") != "cpu"
    name = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {name}, {os.cpu_count()} cores; median of {arguments.rounds} rounds")
    if arguments.part == "step":
        compare_steps(arguments)
    elif arguments.part == "loader":
        compare_loaders(arguments)
    else:
        for kind in arguments.kind:
            compare_evaluation(arguments, kind)


if __name__ == "__main__":
    main()
