"""Milliseconds to augment one batch: this project, torchvision and kornia, side by side in one run.

    python benchmarks/augmentation.py [--batch_size 512] [--image_size 32] [--rounds 15] [--device cpu]

Wanted is a draw for each image, for the whole batch at once, on the device that trains. torchvision's transforms
draw one parameter for a batch, so that they are called image by image here (as a DataLoader does), but for MixUp and
CutMix, which are made for batches. kornia draws for each image of a batch, of floats only. Each is given what it
likes best: bytes here and in torchvision, floats in kornia, whose conversion is not counted; mixup is timed on floats
for all. RandomErasing of the libraries is what they have for Cutout: a square of the same area that never sticks out.
Rounds are interleaved and medians compared, since machines are noisy; only ratios mean something.

The rule: where a library is within 10 % of what we can write, the library is used. Measured on 2026-11-23 (torch
2.14.1, torchvision 0.29.1, kornia 0.9.0; one thread of an Intel Xeon at 2.5 GHz that was busy with other work, so that
all times are long; 512 x 3 x 32 x 32, median of 25 rounds, ms; a second run gave the same order in every row):

                                             own  torchvision    kornia   library / own
    translate                               6.35       169.88     37.37           5.88
    flip                                    1.78        47.79      9.24           5.20
    jitter                                 44.86       740.19    119.39           2.66
    cutout                                  6.98       404.84     20.48           2.93
    mixup                                  12.33        17.96     71.23           1.46
    cutmix                                 11.85         2.44    258.85           0.21
    translate, flip, cutout, to float      24.55      1233.67     98.38           4.01

So CutMix is torchvision's, with one box for a batch as in the paper's code, and the rest is written here. Not measured
on a GPU.
"""

import argparse
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from datamodules.augmentation import (
    BatchAugmentation,
    mixup,
    random_cutout,
    random_flip,
    random_jitter,
    random_translate,
)

PIXELS = 4  # of translation
JITTER = 0.4
CLASSES = 10
Ways = dict[str, Callable[[], object]]


def own_cutmix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The fastest CutMix with a box for each image that we could write; what torchvision's is held against."""
    one = torch.ones((), device=images.device)
    kept = torch.distributions.Beta(one, one, validate_args=False).sample((len(images), 1))
    bits, share = [], torch.ones_like(kept)
    for size in images.shape[2:]:
        centre = torch.randint(0, size, (len(images), 1), device=images.device)
        half = (0.5 * (1 - kept).sqrt() * size).long()
        first, last = (centre - half).clamp_(min=0), (centre + half).clamp_(max=size)
        place = torch.arange(size, device=images.device)
        bits.append(((place >= first) & (place < last)).to(torch.uint8).neg_())
        share *= (last - first) / size
    box = bits[0][:, None, :, None] & bits[1][:, None, None, :]
    pasted = (images ^ images.roll(1, 0)).bitwise_and_(box).bitwise_xor_(images)
    targets = F.one_hot(labels, CLASSES).float()
    return pasted, torch.lerp(targets, targets.roll(1, 0), share)


def each(transform: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """A transform called image by image."""
    return torch.stack([transform(image) for image in images])


def ways(images: Tensor, labels: Tensor) -> dict[str, Ways]:
    """For each augmentation the ways to do it."""
    floats = images.float().div(255)
    size = images.shape[-1]
    side = size // 2
    area = (side / size) ** 2
    fill = torch.full((3,), 120, dtype=torch.uint8, device=images.device)
    crop, mirror = v2.RandomCrop(size, padding=PIXELS), v2.RandomHorizontalFlip()
    colours = v2.ColorJitter(JITTER, JITTER, JITTER)
    erase = v2.RandomErasing(p=1, scale=(area, area), ratio=(1, 1), value=120)
    chain = v2.Compose([crop, mirror, erase, v2.ToDtype(torch.float32, scale=True)])
    whole = BatchAugmentation(translate=PIXELS, flip=True, cutout=side)
    mix, cut = v2.MixUp(alpha=1.0, num_classes=CLASSES), v2.CutMix(alpha=1.0, num_classes=CLASSES)
    rows: dict[str, Ways] = {
        "translate": {"own": lambda: random_translate(images, PIXELS), "torchvision": lambda: each(crop, images)},
        "flip": {"own": lambda: random_flip(images), "torchvision": lambda: each(mirror, images)},
        "jitter": {"own": lambda: random_jitter(images, JITTER), "torchvision": lambda: each(colours, images)},
        "cutout": {"own": lambda: random_cutout(images, side, fill), "torchvision": lambda: each(erase, images)},
        "mixup": {"own": lambda: mixup(floats, labels, 1.0, CLASSES), "torchvision": lambda: mix(floats, labels)},
        "cutmix": {"own": lambda: own_cutmix(images, labels), "torchvision": lambda: cut(images, labels)},
        "translate, flip, cutout, to float": {
            "own": lambda: whole(images, labels, CLASSES, fill),
            "torchvision": lambda: each(chain, images),
        },
    }
    for row, way in kornia_ways(floats, labels, size, area).items():
        rows[row]["kornia"] = way
    return rows


def kornia_ways(floats: Tensor, labels: Tensor, size: int, area: float) -> Ways:
    """The same with kornia; nothing where it is not installed."""
    try:
        import kornia.augmentation as K
    except ImportError:
        return {}
    crop, mirror = K.RandomCrop((size, size), padding=PIXELS), K.RandomHorizontalFlip(p=0.5)
    colours = K.ColorJiggle(JITTER, JITTER, JITTER, p=1.0)
    erase = K.RandomErasing(scale=(area, area), ratio=(1.0, 1.0), value=120 / 255, p=1.0)
    chain = torch.nn.Sequential(crop, mirror, erase)
    mix, cut = (
        K.RandomMixUpV2(data_keys=["input", "class"], p=1.0),
        K.RandomCutMixV2(data_keys=["input", "class"], p=1.0),
    )
    return {
        "translate": lambda: crop(floats),
        "flip": lambda: mirror(floats),
        "jitter": lambda: colours(floats),
        "cutout": lambda: erase(floats),
        "mixup": lambda: mix(floats, labels),
        "cutmix": lambda: cut(floats, labels),
        "translate, flip, cutout, to float": lambda: chain(floats),
    }


def seconds(way: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    way()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    shape = (arguments.batch_size, 3, arguments.image_size, arguments.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    labels = torch.randint(0, CLASSES, shape[:1], device=device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"torch {torch.__version__}, {name}, {os.cpu_count()} cores; {shape}; median of {arguments.rounds} rounds, ms"
    )
    print(f"{'':34}{'own':>10}{'torchvision':>13}{'kornia':>10}   library / own")
    for row, choices in ways(images, labels).items():
        times: dict[str, list[float]] = {choice: [] for choice in choices}
        for turn in range(arguments.rounds + 1):
            for choice, way in choices.items():
                taken = seconds(way, device)
                if turn:  # the first one warms up
                    times[choice].append(taken)
        print(line(row, {choice: 1000 * statistics.median(taken) for choice, taken in times.items()}))


def line(row: str, medians: dict[str, float]) -> str:
    best = min(medians.get(choice, math.inf) for choice in ("torchvision", "kornia"))
    kornia = f"{medians['kornia']:10.2f}" if "kornia" in medians else f"{'absent':>10}"
    return f"{row:34}{medians['own']:10.2f}{medians['torchvision']:13.2f}{kornia}{best / medians['own']:15.2f}"


if __name__ == "__main__":
    main()
