"""Captioning's training step, beam search and kept features, each beside what it would replace, and the baselines.

    python benchmarks/captioning.py training [--cell lstm] [--batch_size 64] [--steps 40] [--device cpu]
    python benchmarks/captioning.py beam [--cell lstm] [--images 64] [--width 5]
    python benchmarks/captioning.py cache [--network mobilenet_v2] [--pictures 320]
    python benchmarks/captioning.py baselines CHECKPOINT RECIPE [--key value …]

training: words of a vocabulary of 1,000, vectors of 256, states of 512, on kept features (128, 8, 8) of generated
scenes; a caption has at most 16 tokens to be foretold.

- bare: an Embedding, ``torch.nn.LSTM`` (or ``RNN``; the attention as a loop over ``torch.nn.LSTMCell`` steps is not
  compared: torch has none) and two Linear layers in a plain loop, with the same loss and a fused Adam;
- zoo: ``zoo fit`` with all that it adds to a run.

beam: the best captions of all images at once, and image by image, by the same network.

cache: an epoch of training on pictures through a frozen encoder, and one on its features, which were computed before.

baselines: BLEU-4 and CIDEr-D on the test split of a recipe's data

- of the checkpoint;
- of retrieval: the first caption of the training picture whose pooled features, of the checkpoint's own encoder, have
  the greatest cosine with those of the test picture; also with their mean over the training pictures taken away;
- of the caption that training pictures have most often, said of every picture.

Rounds are interleaved and the median of each way is compared, since machines are noisy; only ratios mean something.

Measured on 23 November 2026 on one core of an Intel Xeon at 2.5 GHz that three to five other processes used as well
(torch 2.14.1, one thread), medians of three rounds, of the cache a single one:

    training, lstm           zoo / bare 1.15 (30 steps a round; zoo's rounds 108 to 143 captions/s, bare's 97 to 118)
    beam of 5, 64 images     zoo / image by image 7.4, 7.5 (lstm), 8.8 (rnn), 10.2 (attention)
    cache, mobilenet_v2      zoo, cached / pictures 5.65 (128 pictures of 112 px)
    baselines, embedded      attention 3.17 (BLEU-4 0.730), retrieval 2.21 (0.525; centred 2.20), common 0.64 (0.219)
    baselines, photographs   lstm 0.399 (0.186), retrieval 0.233 (0.087; centred 0.245), most common 0.062 (0.033)

The network of the beam search is untrained: its captions hardly end before 15 words, or image by image would gain.
Two thirds of the time of all images at once are products of matrices, which no batch makes fewer: the gain on a core is
that of reading the weights once for 64 images, and small steps once.
"""

import argparse
import contextlib
import io
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from detection import compare, prepared
from lightning import Callback, seed_everything
from small_images import WARM_UP, Clock, chdir, now
from torch import Tensor, nn
from torch.nn import functional as F

import zoo
from zoo.captioning_lstm import CaptioningLSTM, CaptioningNetwork
from zoo.running.command import RecipeCLI
from zoo.running.starting import prepare
from zoo.tasks.caption_scores import CaptionScores, tokenize
from zoo.tasks.captioning import NULL, SPECIAL

WORDVEC, HIDDEN, FEATURES, VOCABULARY = 256, 512, 128, 1000


def recipe(folder: Path, model: dict[str, Any], data: dict[str, Any], trainer: dict[str, Any], cached: bool) -> Path:
    """A recipe of captions of generated scenes, with or without kept features."""
    callbacks = [{"class_path": "zoo.running.caching.CacheFeatures", "init_args": {"folder": str(folder / "features")}}]
    content = {
        "seed_everything": 0,
        "model": {"class_path": "zoo.CaptioningLSTM", "init_args": model},
        "data": {"class_path": "datamodules.CaptionedScenesDataModule", "init_args": {"root": str(folder)} | data},
        "trainer": {"devices": 1, "callbacks": callbacks if cached else []} | trainer,
    }
    path = folder / ("cached.yaml" if cached else "pictures.yaml")
    path.write_text(yaml.safe_dump(content))
    return path


def run(path: Path, callback: Callback) -> RecipeCLI:
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        cli = prepared(path)
        cli.trainer.callbacks.append(callback)
        with contextlib.redirect_stdout(io.StringIO()):
            cli.run()
    return cli


# Training


def our_steps(path: Path, steps: int, device: torch.device) -> float:
    """Seconds for the steps of ``zoo fit``."""
    clock = Clock(steps, device)
    run(path, clock)
    return clock.seconds


class Bare(nn.Module):
    """The same network of torch's own layers."""

    def __init__(self, cell: str) -> None:
        super().__init__()
        self.start = nn.Linear(FEATURES, HIDDEN)
        self.words = nn.Embedding(VOCABULARY, WORDVEC)
        self.recurrence = {"rnn": nn.RNN, "lstm": nn.LSTM}[cell](WORDVEC, HIDDEN, batch_first=True)
        self.scores = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        h = self.start(features.mean((2, 3)))[None]
        state = (h, torch.zeros_like(h)) if isinstance(self.recurrence, nn.LSTM) else h
        states, _ = self.recurrence(self.words(tokens[:, :-1]), state)
        return self.scores(states)


def bare_steps(
    features: Tensor, samples: tuple[Tensor, Tensor], cell: str, batch_size: int, steps: int, device: torch.device
) -> float:
    """Seconds for the steps of a plain loop."""
    network = Bare(cell).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    rows, tokens = samples
    order = torch.randperm(len(rows))
    start = 0.0
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            start = now(device)
        chosen = order[step * batch_size % len(rows) :][:batch_size]
        given = tokens[chosen].to(device, non_blocking=True)
        scores = network(features[rows[chosen]].to(device, non_blocking=True), given)
        targets = given[:, 1:].flatten()
        loss = F.cross_entropy(scores.flatten(0, 1), targets, ignore_index=NULL, reduction="sum") / len(chosen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return now(device) - start


class Kept(Callback):
    """Takes what training sees: the features and the samples."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pictures = trainer.datamodule.train_set
        self.features, self.samples = pictures.images, pictures.samples()


def compare_training(arguments: argparse.Namespace) -> None:
    device, steps = torch.device(arguments.device), arguments.steps
    words = [*SPECIAL, *(f"word{k}" for k in range(len(SPECIAL), VOCABULARY))]
    model = {"cell": arguments.cell, "network": "small", "wordvec_dim": WORDVEC, "hidden_dim": HIDDEN}
    size = max(500, (WARM_UP + steps) * arguments.batch_size // 5 + 1)
    data = {"words": words, "train_size": size, "val_size": 0, "test_size": 0, "batch_size": arguments.batch_size}
    trainer = {"max_steps": WARM_UP + steps, "max_epochs": -1, "accelerator": device.type}
    with tempfile.TemporaryDirectory() as folder:
        path = recipe(Path(folder), model | {"image_size": 64}, data, trainer, cached=True)
        kept = Kept()
        run(path, kept)  # writes the scenes and computes their features
        bare = (kept.features, kept.samples, arguments.cell, arguments.batch_size, steps, device)
        ways = {"bare": partial(bare_steps, *bare), "zoo": partial(our_steps, path, steps, device)}
        setting = f"training, {arguments.cell}, batch {arguments.batch_size}"
        tokens = int((kept.samples[1][:, 1:] != NULL).sum()) / len(kept.samples[1])
        print(f"{setting}  {tokens:.1f} tokens a caption; images/s times that are tokens/s")
        compare(steps * arguments.batch_size, ways, arguments.rounds, setting)


# Beam search


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare_beam(arguments: argparse.Namespace) -> None:
    seed_everything(0, verbose=False)
    network = CaptioningNetwork(VOCABULARY, arguments.cell, FEATURES, WORDVEC, HIDDEN).eval()
    features = torch.rand(arguments.images, FEATURES, 4, 4)
    together = partial(network.beam_search, features, arguments.width)

    def one_by_one() -> None:
        for image in features.split(1):
            network.beam_search(image, arguments.width)

    ways = {"image by image": partial(seconds, one_by_one), "zoo": partial(seconds, together)}
    setting = f"beam of {arguments.width}, {arguments.cell}, {arguments.images} images"
    compare(arguments.images, ways, arguments.rounds, setting)


# Kept features


class LastEpoch(Callback):
    """Times the last epoch's training."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seconds = time.perf_counter() - self.start


def last_epoch(path: Path) -> float:
    clock = LastEpoch()
    run(path, clock)
    return clock.seconds


def compare_cache(arguments: argparse.Namespace) -> None:
    model = {"cell": "lstm", "network": arguments.network, "image_size": 112}
    data = {"image_size": 112, "train_size": arguments.pictures, "val_size": 0, "test_size": 0, "batch_size": 64}
    with tempfile.TemporaryDirectory() as folder:
        trainer = {"max_epochs": 1, "accelerator": "cpu"}
        paths = [recipe(Path(folder), model, data, trainer, cached) for cached in (False, True)]
        last_epoch(paths[1])  # writes the scenes and computes their features
        ways = {"pictures": partial(last_epoch, paths[0]), "zoo, cached": partial(last_epoch, paths[1])}
        compare(5 * arguments.pictures, ways, arguments.rounds, f"cache, {arguments.network}, an epoch")


# Baselines


def scores(captions: list[str], references: list[list[str]]) -> str:
    metric = CaptionScores()
    metric.update(captions, references, torch.arange(len(captions)))
    numbers = metric.compute()
    return f"BLEU-4 {numbers['bleu_4']:.4f}  CIDEr-D {numbers['cider']:.4f}"


@torch.no_grad()
def pooled(model: CaptioningLSTM, data: Any, split: str) -> Tensor:
    """The mean of each picture's features over the grid (N, C)."""
    means = []
    for batch in data.evaluation_dataloader(split):
        means.append(model.features(data.on_after_batch_transfer(batch, 0)[0]).mean((2, 3)))
    return torch.cat(means)


@torch.no_grad()
def written(model: CaptioningLSTM, data: Any) -> list[str]:
    texts = []
    for batch in data.evaluation_dataloader("test"):
        texts += model.sentences(model(data.on_after_batch_transfer(batch, 0)[0]))
    return texts


def show_baselines(arguments: argparse.Namespace, overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cli = prepare("fit", arguments.recipe, overrides, trial=Path(folder) / "trial")
    data: Any = cli.datamodule
    data.trainer = None
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    model = zoo.load(arguments.checkpoint)
    assert isinstance(model, CaptioningLSTM)
    training, references = data.train_set.captions, data.test_set.captions
    print(f"{len(references)} test pictures\ncheckpoint             {scores(written(model, data), references)}")
    train, test = pooled(model, data, "train"), pooled(model, data, "test")
    for name, mean in (("retrieval", torch.zeros_like(train[0])), ("retrieval, centred", train.mean(0))):
        nearest = F.normalize(test - mean) @ F.normalize(train - mean).T
        captions = [training[index][0] for index in nearest.argmax(1).tolist()]
        print(f"{name:22s} {scores(captions, references)}")
    ((common, count),) = Counter(" ".join(tokenize(text)) for texts in training for text in texts).most_common(1)
    print(f"{'most common caption':22s} {scores([common] * len(references), references)}  ({count} times: {common!r})")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["training", "beam", "cache", "baselines"])
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("--cell", choices=["rnn", "lstm", "attention"], default="lstm")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--width", type=int, default=5)
    parser.add_argument("--network", default="mobilenet_v2")
    parser.add_argument("--pictures", type=int, default=320)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    arguments, overrides = parser.parse_known_args()
    if arguments.what == "baselines":
        show_baselines(arguments, overrides)
    else:
        {"training": compare_training, "beam": compare_beam, "cache": compare_cache}[arguments.what](arguments)


if __name__ == "__main__":
    main()
