"""Training images per second on MNIST, side by side in one run: a bare loop, the usual way, and this project.

    ZOO_DATA=… python benchmarks/small_images.py [--batch_size 64 512] [--rounds 5] [--device cpu]

Three ways to train the same function with the same optimizer on the same pictures:

- bare: the fastest plain PyTorch loop we can write: uint8 tensors in memory, one index operation for a batch,
  ``channels_last``, fused Adam, no logging;
- usual: torchvision's data set with ToTensor, a DataLoader with as many workers as serves it best, Lightning with its
  defaults, torchmetrics and ``self.log`` at every step, Adam and the network as a tutorial writes them;
- zoo: ``zoo fit lenet/mnist`` with all that it adds to a run.

Rounds are interleaved and the median of each way is compared, since machines are noisy; only ratios mean something.
"""

import argparse
import io
import logging
import os
import statistics
import tempfile
import time
import warnings
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from datamodules import MNISTDataModule
from datamodules.mnist import FILES, find_idx, read_idx
from zoo.lenet import LeNetBackbone
from zoo.running.starting import prepare

WARM_UP = 10  # steps before the clock starts


class Clock(Callback):
    """Times the steps after the warm-up."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self.steps, self.device, self.seconds = steps, device, 0.0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == WARM_UP:
            self.start = now(self.device)
        elif trainer.global_step == WARM_UP + self.steps:
            self.seconds = now(self.device) - self.start


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def bare(batch_size: int, steps: int, device: torch.device) -> float:
    """Seconds for ``steps`` steps of a plain loop."""
    data = MNISTDataModule(val_size=0)
    data.prepare_data()
    images, labels = (tensor.to(device) for tensor in data.read(train=True))
    network = nn.Sequential(LeNetBackbone(), nn.Linear(500, 10)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    order = torch.cat(
        [torch.randperm(len(labels), device=device) for _ in range(1 + steps * batch_size // len(labels))]
    )
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            start = now(device)
        chosen = order[step * batch_size % len(labels) :][:batch_size]
        loss = F.cross_entropy(network(images[chosen].float().div_(255)), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return now(device) - start


class Usual(LightningModule):
    """What most Lightning tutorials write."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 20, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(20, 50, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2450, 500),
            nn.ReLU(),
            nn.Linear(500, 10),
        )
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
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def usual(batch_size: int, steps: int, device: torch.device, workers: int, root: Path) -> float:
    """Seconds for ``steps`` steps of the usual way."""
    from torchvision.datasets import MNIST
    from torchvision.transforms import ToTensor

    loader = DataLoader(MNIST(root, transform=ToTensor()), batch_size, shuffle=True, num_workers=workers)
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
        trainer.fit(Usual(), loader)
    return clock.seconds


def ours(batch_size: int, steps: int, device: torch.device) -> float:
    """Seconds for ``steps`` steps of ``zoo fit lenet/mnist``, without augmentation, smoothing and validation."""
    clock = Clock(steps, device)
    overrides = {
        "trainer.accelerator": device.type,
        "trainer.devices": 1,
        "trainer.max_steps": WARM_UP + steps,
        "trainer.max_epochs": -1,
        "trainer.limit_val_batches": 0,
        "data.init_args.batch_size": batch_size,
        "data.init_args.translate": 0,
        "model.init_args.label_smoothing": 0.0,
        "model.init_args.scheduler": "null",
    }
    with tempfile.TemporaryDirectory() as folder, chdir(folder), redirect_stdout(io.StringIO()):
        cli = prepare("fit", "lenet/mnist", [f"--{key}={value}" for key, value in overrides.items()])
        cli.trainer.callbacks.append(clock)
        cli.run()
    return clock.seconds


@contextmanager
def chdir(folder: str):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def torchvision_copy(folder: Path) -> Path:
    """The files unpacked as torchvision wants them."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    root = MNISTDataModule().root
    for pair in FILES.values():
        for name, dimensions in zip(pair, (3, 1), strict=True):
            array = read_idx(find_idx(root, "MNIST", name), dimensions)
            header = bytes([0, 0, 8, dimensions]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            (raw / name).write_bytes(header + array.tobytes())
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=16_000, help="images per round and way")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="of the usual way; the best counts")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    device = torch.device(arguments.device)
    seed_everything(0, verbose=False)
    MNISTDataModule().prepare_data()
    with tempfile.TemporaryDirectory() as folder:
        root = torchvision_copy(Path(folder))
        name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
        print(f"torch {torch.__version__}, {name}, {os.cpu_count()} cores; median of {arguments.rounds} rounds")
        for batch_size in arguments.batch_size:
            steps = max(20, arguments.images // batch_size)
            ways = {"bare": partial(bare, batch_size, steps, device), "zoo": partial(ours, batch_size, steps, device)}
            for workers in arguments.workers:
                ways[f"usual, {workers} workers"] = partial(usual, batch_size, steps, device, workers, root)
            report(batch_size, steps, ways, arguments.rounds)


def report(batch_size: int, steps: int, ways: dict, rounds: int) -> None:
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            speeds[name].append(steps * batch_size / way())
    median = {name: statistics.median(values) for name, values in speeds.items()}
    for name, value in median.items():
        print(f"batch {batch_size:4d}  {name:18s} {value:9.0f} images/s  (max {max(speeds[name]):.0f})")
    ratios = [f"zoo / bare {median['zoo'] / median['bare']:.2f}"]
    if "zoo, compiled" in median:
        ratios.append(f"both compiled {median['zoo, compiled'] / median['bare, compiled']:.2f}")
    usual_ways = [value for name, value in median.items() if name.startswith("usual")]
    if usual_ways:
        ratios.append(f"zoo / usual {median['zoo'] / max(usual_ways):.2f}")
    print(f"batch {batch_size:4d}  {'   '.join(ratios)}")


if __name__ == "__main__":
    main()
