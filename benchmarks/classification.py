"""Training images per second on CIFAR-10, side by side in one run: a bare loop, the usual way, and this project.

    ZOO_DATA=… python benchmarks/classification.py [--root DIR] [--recipe …] [--batch_size 128] [--device cpu]

Three ways to train the network of a recipe with its optimizer, random crops and flips on the same pictures:

- bare: the fastest plain PyTorch loop we can write: uint8 tensors in memory, one index operation for a batch, crop and
  flip for the whole batch, ``channels_last``, no logging;
- usual: torchvision's CIFAR10 (PIL) with RandomCrop, RandomHorizontalFlip, ToTensor and Normalize, a DataLoader with as
  many workers as serves it best, Lightning with its defaults, torchmetrics and ``self.log`` at every step;
- zoo: ``zoo fit RECIPE`` with all that it adds to a run.

A small network shows the loaders (fully_connected/cifar10_two_layer), a convolutional one what is left of that beside
its own cost. Rounds are interleaved and the median of each way is compared; only ratios mean something.
"""

import argparse
import io
import logging
import os
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
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

from datamodules import CIFAR10DataModule
from datamodules.augmentation import random_flip, random_translate
from zoo.running.starting import prepare


def build(recipe: str, batch_size: int, steps: int, device: torch.device, root: Path):
    """Model, data and trainer of a recipe, for so many steps, with crop and flip alone."""
    overrides = {
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
    }
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return prepare("fit", recipe, [f"--{key}={value}" for key, value in overrides.items()])


def ours(recipe: str, batch_size: int, steps: int, device: torch.device, root: Path) -> float:
    """Seconds for ``steps`` steps of ``zoo fit``."""
    clock = Clock(steps, device)
    with tempfile.TemporaryDirectory() as folder, chdir(folder), redirect_stdout(io.StringIO()):
        cli = build(recipe, batch_size, steps, device, root)
        cli.trainer.callbacks.append(clock)
        cli.run()
    return clock.seconds


def bare(recipe: str, batch_size: int, steps: int, device: torch.device, root: Path) -> float:
    """Seconds for ``steps`` steps of a plain loop."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        cli = build(recipe, batch_size, steps, device, root)
    images, labels = (tensor.to(device) for tensor in cli.datamodule.read(train=True))
    model = cli.model.to(device).train()
    optimizer = model.optimizer(model.parameters())
    orders = [
        torch.randperm(len(labels), device=device) for _ in range(2 + (WARM_UP + steps) * batch_size // len(labels))
    ]
    order = torch.cat(orders)
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            start = now(device)
        chosen = order[step * batch_size : (step + 1) * batch_size]
        pictures = random_flip(random_translate(images[chosen], 4)).float().div_(255)
        loss = F.cross_entropy(model(pictures), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
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

    def __init__(self, network: torch.nn.Module, optimizer) -> None:
        super().__init__()
        self.network, self.make = network, optimizer
        self.accuracy = MulticlassAccuracy(10)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        logits = self.network(images)
        loss = F.cross_entropy(logits, labels)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.accuracy(logits, labels)
        self.log("train_accuracy", self.accuracy, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return self.make(self.parameters())


def usual(recipe: str, batch_size: int, steps: int, device: torch.device, root: Path, workers: int) -> float:
    """Seconds for ``steps`` steps of the usual way."""
    from torchvision import transforms

    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        cli = build(recipe, batch_size, steps, device, root)
    images, labels = cli.datamodule.read(train=True)
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ]
    )
    pictures = Pictures(images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist(), transform)
    loader = DataLoader(pictures, batch_size, shuffle=True, drop_last=True, num_workers=workers)
    # The same network, in the layout that it has by default.
    network = torch.nn.Sequential(cli.model.backbone, cli.model.head).to(memory_format=torch.contiguous_format)
    clock = Clock(steps, device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator=device.type,
            devices=1,
            max_steps=WARM_UP + steps,
            callbacks=[clock],
            default_root_dir=folder,
            enable_model_summary=False,
        )
        trainer.fit(Usual(network, cli.model.optimizer), loader)
    return clock.seconds


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
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="of the usual way; the best counts")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    device = torch.device(arguments.device)
    seed_everything(0, verbose=False)
    root = Path(arguments.root or CIFAR10DataModule().root).resolve()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {name}, {os.cpu_count()} cores; median of {arguments.rounds} rounds")
    for recipe, images in zip(arguments.recipe, arguments.images, strict=True):
        print(recipe)
        for batch_size in arguments.batch_size:
            steps = max(20, images // batch_size)
            ways = {
                "bare": partial(bare, recipe, batch_size, steps, device, root),
                "zoo": partial(ours, recipe, batch_size, steps, device, root),
            }
            for workers in arguments.workers:
                ways[f"usual, {workers} workers"] = partial(usual, recipe, batch_size, steps, device, root, workers)
            report(batch_size, steps, ways, arguments.rounds)


if __name__ == "__main__":
    main()
