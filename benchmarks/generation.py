"""Pictures per second of a full step of a GAN, both networks, side by side in one run: a bare loop and this project.

    python benchmarks/generation.py [--recipe gan/mnist dcgan/embedded] [--steps 40] [--rounds 5] [--device cpu]

Both train the same networks with the same losses and optimizers on the recipe's data, in memory:

- bare: the fastest plain PyTorch loop we can write: uint8 tensors in memory, one index operation for a batch, fused
  Adam, the discriminator frozen in the generator's step, no logging;
- zoo: ``zoo fit`` with all that it adds to a run, without validation.

Rounds are interleaved and the medians compared. On a CPU the process's own seconds count, so that other work on the
machine weighs less; only ratios mean something.

Measured on 23 November 2026 on one core of an Intel Xeon at 2.5 GHz that other processes used as well (torch 2.14.1,
one thread), medians of five rounds:

    gan/mnist       zoo / bare 0.99 (batches of 128)
    dcgan/embedded  zoo / bare 1.00
    gan/embedded    zoo / bare 0.83, 0.90: last.ckpt is written after every epoch, which has 19 steps there
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

import torch
from lightning import Callback, seed_everything
from torch.nn import functional as F

from zoo.running.starting import prepare

WARM_UP = 5  # steps before the clock starts


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
    return time.process_time()


def prepared(recipe: str, batch_size: int, steps: int, device: torch.device):
    """The recipe's model, data and trainer for so many steps."""
    overrides = {
        "trainer.accelerator": device.type,
        "trainer.devices": 1,
        "trainer.max_steps": WARM_UP + steps,
        "trainer.max_epochs": -1,
        "trainer.limit_val_batches": 0,
        "data.init_args.batch_size": batch_size,
        "model.init_args.classifier": "null",
    }
    return prepare("fit", recipe, [f"--{key}={value}" for key, value in overrides.items()])


def bare(recipe: str, batch_size: int, steps: int, device: torch.device) -> float:
    """Seconds for ``steps`` steps of a plain loop around the recipe's networks; its loss is that of gan or lsgan."""
    cli = prepared(recipe, batch_size, steps, device)
    model, data = cli.model.to(device), cli.datamodule
    data.prepare_data()
    data.setup("fit")
    images = data.train_set[0].to(device)
    d, g, size = model.discriminator, model.generator, model.code_size
    optimizers = [torch.optim.Adam(n.parameters(), lr=2e-4, betas=(0.5, 0.999), fused=True) for n in (d, g)]
    ones, zeros = torch.ones(batch_size, device=device), torch.zeros(batch_size, device=device)
    decide = F.mse_loss if model.loss == "lsgan" else F.binary_cross_entropy_with_logits
    share = 0.5 if model.loss == "lsgan" else 1.0
    whole = len(images) // batch_size * batch_size  # of an epoch, in which no batch is smaller
    order = torch.cat([torch.randperm(len(images), device=device)[:whole] for _ in range(WARM_UP + steps)])
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            start = now(device)
        real = images[order[step * batch_size :][:batch_size]].float().div_(255)
        with torch.no_grad():
            generated = g(2 * torch.rand(batch_size, size, device=device) - 1)
        loss = share * (decide(d(real), ones) + decide(d(generated), zeros))
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        d.requires_grad_(False)
        loss = share * decide(d(g(2 * torch.rand(batch_size, size, device=device) - 1)), ones)
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        d.requires_grad_(True)
    return now(device) - start


def ours(recipe: str, batch_size: int, steps: int, device: torch.device) -> float:
    """Seconds for ``steps`` steps of ``zoo fit``."""
    clock = Clock(steps, device)
    cli = prepared(recipe, batch_size, steps, device)
    cli.trainer.callbacks.append(clock)
    cli.run()
    return clock.seconds


@contextmanager
def elsewhere():
    """Work in a folder that is removed again, and print nothing."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", nargs="+", default=["gan/embedded", "dcgan/embedded"])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    device = torch.device(arguments.device)
    seed_everything(0, verbose=False)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {name}, {os.cpu_count()} cores; median of {arguments.rounds} rounds")
    for recipe in arguments.recipe:
        speeds: dict[str, list[float]] = {"bare": [], "zoo": []}
        for _ in range(arguments.rounds):
            for way, train in (("bare", bare), ("zoo", ours)):
                with elsewhere():
                    seconds = train(recipe, arguments.batch_size, arguments.steps, device)
                speeds[way].append(arguments.steps * arguments.batch_size / seconds)
        median = {way: statistics.median(values) for way, values in speeds.items()}
        for way, value in median.items():
            print(f"{recipe:16s} {way:5s} {value:8.0f} images/s  (max {max(speeds[way]):.0f})")
        print(f"{recipe:16s} zoo / bare {median['zoo'] / median['bare']:.2f}")


if __name__ == "__main__":
    main()
