"""Pictures per second of one training epoch of loading from a folder of JPEGs, side by side in one run.

    ZOO_DATA=… python benchmarks/jpeg_folder.py [--pictures 400] [--rounds 7] [--workers 2] [--device cpu]

All ways give the same kind of batch: 32 random crops of 224 x 224 pixels, half of them mirrored, float32 and
standardised, on the device:

- usual: torchvision's ImageFolder (Pillow) with RandomResizedCrop, RandomHorizontalFlip, ToTensor and Normalize, in a
  DataLoader whose workers stay from epoch to epoch;
- zoo: ImageFolderDataModule, whose workers decode and crop, and whose device does the rest for the whole batch;
- zoo, Pillow: the same without simplejpeg;
- zoo, cached: the same with ``cache``, in an epoch after the pictures were read.

The folder is written first: 500 x 375 pixels, about ImageNet's average, each a mosaic of real photographs of
``$ZOO_DATA/coco_small``, or a synthetic texture without it. Rounds are interleaved and the median of each way is
compared, since machines are noisy; only ratios mean something.

Measured on 23 November 2026 on two cores of an Intel Xeon at 2.5 GHz that five to nine other processes used as well
(torch 2.14.1, torchvision 0.29.1, Pillow 13.0.0, simplejpeg 1.9.0; 400 mosaics, two workers, CPU), three runs, pictures
per second and times usual:

    usual             65  1.00      78  1.00      43  1.00
    zoo              113  1.75     134  1.72      81  1.87
    zoo, Pillow       85  1.32     112  1.44      57  1.32
    zoo, cached      292  4.52     304  3.91     190  4.40
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, RandomResizedCrop, ToTensor

from datamodules import ImageFolderDataModule, pictures

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's models want it
BATCH = 32


def write_folder(root: Path, count: int, width: int, height: int) -> str:
    """Two classes of JPEGs; says what they are."""
    rng = np.random.default_rng(0)
    source = Path(os.environ.get("ZOO_DATA", "")) / "coco_small"
    photographs = [Image.open(path).convert("RGB") for path in sorted(source.glob("*2017/*.jpg"))]
    size = 0
    for i in range(count):
        picture = mosaic(photographs, rng, width, height) if photographs else texture(rng, width, height)
        path = root / f"class{i % 2}" / f"{i:05d}.jpg"
        path.parent.mkdir(exist_ok=True)
        picture.save(path, quality=90)
        size += path.stat().st_size
    kind = "mosaics of photographs" if photographs else "synthetic textures"
    return f"{count} {kind} of {width} x {height} pixels, {size / count / 1024:.0f} KiB each"


def mosaic(photographs: list, rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Photographs side by side at their own size, so that there is as much detail as in a larger photograph."""
    picture = Image.new("RGB", (width, height))
    top = 0
    while top < height:
        left, row = 0, height
        while left < width:
            photograph = photographs[rng.integers(len(photographs))]
            picture.paste(photograph, (left, top))
            left, row = left + photograph.width, min(row, photograph.height)
        top += row
    return picture


def texture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Noise whose power falls with its frequency as that of photographs does."""
    pixels = np.zeros((height, width, 3))
    for octave in range(2, 9):
        noise = rng.normal(size=(2**octave, 2**octave, 3)).clip(-3, 3) * 20 + 128
        layer = Image.fromarray(noise.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        pixels += (np.asarray(layer) - 128.0) * 4 / octave
    return Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8))


def usual(root: Path, workers: int, device: torch.device) -> Callable[[], int]:
    """An epoch as most training scripts load it; gives the number of pictures."""
    transform = Compose([RandomResizedCrop(224), RandomHorizontalFlip(), ToTensor(), Normalize(MEAN, STD)])
    loader = DataLoader(
        ImageFolder(root, transform),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )
    return lambda: sum(len(images.to(device, non_blocking=True)) for images, _ in loader)


def zoo(root: Path, workers: int, device: torch.device, cache: bool = False) -> Callable[[], int]:
    """An epoch of the data module, with the standardisation that a model does."""
    data = ImageFolderDataModule(str(root), batch_size=BATCH, val_size=0, workers=workers, cache=cache)
    data.setup("fit")
    loader = data.train_dataloader()
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))

    def epoch() -> int:
        count = 0
        for batch in loader:
            images, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
            images, labels = data.augment(images, labels, data.num_classes, torch.zeros(3, dtype=torch.uint8))
            count += len(images.sub_(mean).div_(std))
        return count

    return epoch


def without_simplejpeg(epoch: Callable[[], int]) -> int:
    """The first epoch of a way without simplejpeg: its workers stay as they are when they begin."""
    before, pictures.simplejpeg = pictures.simplejpeg, None
    try:
        return epoch()
    finally:
        pictures.simplejpeg = before


def speed(epoch: Callable[[], int], device: torch.device) -> float:
    """Pictures per second of an epoch."""
    start = time.perf_counter()
    count = epoch()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {name}, {os.cpu_count()} cores, {arguments.workers} workers", end="; ")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        print(write_folder(root, arguments.pictures, arguments.width, arguments.height), end="; ")
        print(f"median of {arguments.rounds} rounds")
        ways = {"usual": usual(root, arguments.workers, device), "zoo": zoo(root, arguments.workers, device)}
        if pictures.simplejpeg is not None:
            ways["zoo, Pillow"] = zoo(root, arguments.workers, device)
        ways["zoo, cached"] = zoo(root, arguments.workers, device, cache=True)
        report(ways, arguments.rounds, device)


def report(ways: dict[str, Callable[[], int]], rounds: int, device: torch.device) -> None:
    for way, epoch in ways.items():  # workers start, files come into memory
        without_simplejpeg(epoch) if way == "zoo, Pillow" else epoch()
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, epoch in ways.items():
            speeds[way].append(speed(epoch, device))
    median = {way: statistics.median(values) for way, values in speeds.items()}
    for way, value in median.items():
        ratio = f"{value / median['usual']:.2f} x usual"
        print(f"{way:12s} {value:7.0f} pictures/s  (max {max(speeds[way]):.0f})  {ratio}")


if __name__ == "__main__":
    main()
