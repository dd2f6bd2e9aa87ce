"""Training images per second on CIFAR-10, side by side in one run: a bare loop, the usual way, and this project.

    ZOO_DATA=… python benchmarks/classification.py [--root DIR] [--recipe …] [--batch_size 128] [--device cpu]
        [--precision bf16-mixed] [--compile default]

Three ways to train the network of a recipe with its optimizer, random crops and flips on the same pictures:

- bare: the fastest plain PyTorch loop we can write: uint8 tensors in memory, one index operation for a batch, crop and
  flip for the whole batch, ``channels_last``, no logging;
- usual: torchvision's CIFAR10 (PIL) with RandomCrop, RandomHorizontalFlip and ToTensor (the network standardises), a
  DataLoader with as many workers as serves it best, Lightning with its defaults, torchmetrics and ``self.log`` at every
  step, no ``channels_last``;
- zoo: ``zoo fit RECIPE`` with all that it adds to a run.

Beside them stands the hardware's limit: what the network's multiplications alone would allow at the speed of a large
matrix product in the same precision.

A small network shows the loaders (fully_connected/cifar10_two_layer), a convolutional one what is left of that beside
its own cost. Rounds are interleaved and the median of each way is compared; only ratios mean something.
"""

import argparse
import io
import logging
import os
import statistics
import tempfile
import warnings
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lightning import LightningModule, Trainer, seed_everything
from PIL import Image
from small_images import WARM_UP, Clock, chdir, now, report
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.classification import MulticlassAccuracy

from datamodules import CIFAR10DataModule
from datamodules.augmentation import random_flip, random_translate
from zoo.running.compiling import Compile
from zoo.running.starting import prepare


def build(recipe: str, batch_size: int, steps: int, device: torch.device, root: Path, precision: str):
    """Model, data and trainer of a recipe, for so many steps, with crop and flip alone."""
    overrides = {
        "trainer.precision": precision,
        "trainer.accelerator": device.type,
        "trainer.devices": 1,
        "trainer.max_steps": WARM_UP + steps,
        "trainer.max_epochs": -1,
        "trainer.limit_val_batches": 0,
        "data.init_args.root": root,
        "data.init_args.batch_size": batch_size,
        "data.init_args.val_size": 0,
        "data.init_args.translate": 4,
        "data.init_args.flip": True,
        "data.init_args.cutout": 0,
    }
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return prepare("fit", recipe, [f"--{key}={value}" for key, value in overrides.items()])


def ours(
    recipe: str, batch_size: int, steps: int, device: torch.device, root: Path, precision: str, compiled: str = ""
):
    """Seconds for ``steps`` steps of ``zoo fit``."""
    clock = Clock(steps, device)
    with tempfile.TemporaryDirectory() as folder, chdir(folder), redirect_stdout(io.StringIO()):
        cli = build(recipe, batch_size, steps, device, root, precision)
        cli.trainer.callbacks += [clock, *([Compile(compiled)] if compiled else [])]
        cli.run()
    return clock.seconds


def bare(
    recipe: str, batch_size: int, steps: int, device: torch.device, root: Path, precision: str, compiled: str = ""
):
    """Seconds for ``steps`` steps of a plain loop."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        cli = build(recipe, batch_size, steps, device, root, precision)
    images, labels = (tensor.to(device) for tensor in cli.datamodule.read(train=True))
    model = cli.model.to(device).train()
    if compiled:
        model.backbone.compile(mode=None if compiled == "default" else compiled, dynamic=False)
    optimizer = model.optimizer(model.parameters())
    schedule = model.scheduler(optimizer, WARM_UP + steps) if model.scheduler else None
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision.startswith("bf16"))
    orders = [
        torch.randperm(len(labels), device=device) for _ in range(2 + (WARM_UP + steps) * batch_size // len(labels))
    ]
    order = torch.cat(orders)
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            start = now(device)
        chosen = order[step * batch_size : (step + 1) * batch_size]
        pictures = random_flip(random_translate(images[chosen], 4)).float().div_(255)
        with autocast:
            loss = model.training_loss(pictures, labels[chosen])[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return now(device) - start


class Pictures(Dataset):
    """What torchvision's CIFAR10 does for each picture; it refuses files other than the official ones."""

    def __init__(self, images: np.ndarray, labels: list[int], transform) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


class Usual(LightningModule):
    """What most Lightning tutorials write around a network."""

    def __init__(self, model: LightningModule) -> None:
        super().__init__()
        self.model = model
        self.accuracy = MulticlassAccuracy(10)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss, logits = self.model.training_loss(images, labels)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.accuracy(logits, labels)
        self.log("train_accuracy", self.accuracy, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return self.model.optimizer(self.parameters())


def usual(
    recipe: str, batch_size: int, steps: int, device: torch.device, root: Path, precision: str, workers: int
) -> float:
    """Seconds for ``steps`` steps of the usual way."""
    from torchvision import transforms

    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        cli = build(recipe, batch_size, steps, device, root, precision)
    images, labels = cli.datamodule.read(train=True)
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
        ]
    )
    pictures = Pictures(images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist(), transform)
    loader = DataLoader(pictures, batch_size, shuffle=True, drop_last=True, num_workers=workers)
    model = cli.model.to(memory_format=torch.contiguous_format)  # as it is by default
    clock = Clock(steps, device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator=device.type,
            devices=1,
            precision=precision,
            max_steps=WARM_UP + steps,
            callbacks=[clock],
            default_root_dir=folder,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(Usual(model), loader)
    return clock.seconds


def limit(recipe: str, batch_size: int, device: torch.device, root: Path, precision: str) -> None:
    """Print the images/s that a training step's multiplications would allow at the speed of a large matrix product."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        model = build(recipe, batch_size, 1, device, root, precision).model.to(device).train()
    images, labels = torch.rand(batch_size, 3, 32, 32, device=device), torch.zeros(batch_size, device=device).long()
    with FlopCounterMode(display=False) as counter:
        model.training_loss(images, labels)[0].backward()
    side, dtype = (8192 if device.type == "cuda" else 1024), torch.float32
    if precision.startswith("bf16"):
        dtype = torch.bfloat16
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    seconds = []
    for _ in range(10):
        start = now(device)
        a @ b
        seconds.append(now(device) - start)
    rate = 2 * side**3 / statistics.median(seconds)
    print(f"batch {batch_size:4d}  limit {batch_size * rate / counter.get_total_flops():13.0f} images/s  "
          f"({counter.get_total_flops() / batch_size / 1e9:.2f} GFLOP each at {rate / 1e12:.1f} TFLOP/s)")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=None, help="folder with CIFAR-10's files")
    parser.add_argument(
        "--recipe",
        nargs="+",
        default=["fully_connected/cifar10_two_layer", "deep_conv_net/cifar10"],
        help="of CIFAR-10",
    )
    parser.add_argument("--batch_size", type=int, nargs="+", default=[128])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, nargs="+", default=[25_600, 6_400], help="per round, for each recipe")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2], help="of the usual way; the best counts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="32-true", help="of the Trainer: 32-true or bf16-mixed")
    parser.add_argument("--compile", default="", help="also with the backbone compiled, in this mode of torch.compile")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    device = torch.device(arguments.device)
    seed_everything(0, verbose=False)
    root = Path(arguments.root or CIFAR10DataModule().root).resolve()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {name}, {os.cpu_count()} cores; {arguments.precision}; "
          f"median of {arguments.rounds} rounds")  # fmt: skip
    for recipe, images in zip(arguments.recipe, arguments.images, strict=True):
        print(recipe)
        for batch_size in arguments.batch_size:
            steps = max(20, images // batch_size)
            setting = recipe, batch_size, steps, device, root, arguments.precision
            ways = {"bare": partial(bare, *setting), "zoo": partial(ours, *setting)}
            if arguments.compile:
                ways |= {
                    "bare, compiled": partial(bare, *setting, arguments.compile),
                    "zoo, compiled": partial(ours, *setting, arguments.compile),
                }
            for workers in arguments.workers:
                ways[f"usual, {workers} workers"] = partial(usual, *setting, workers)
            limit(recipe, batch_size, device, root, arguments.precision)
            report(batch_size, steps, ways, arguments.rounds)


if __name__ == "__main__":
    main()
