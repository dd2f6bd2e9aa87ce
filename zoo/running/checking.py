"""The lecture's checks before training: initial loss, gradients, a few samples learnt by heart, step sizes, data.

Lecture 11, "Choosing hyperparameters" (steps 1 and 2) and "Track the ratio of weight update to weight magnitude".
Of a detector's data the true boxes are looked at too, and two pictures are learnt by heart, to a quarter of the loss:
what it looks at is drawn at random in each step.
"""

import math
import random
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import _TunerExitException
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from zoo.dqn import DQN
from zoo.recipes import RecipeError
from zoo.running.caching import CacheFeatures
from zoo.running.nonfinite import NonFiniteLossError, StopOnNonFiniteLoss
from zoo.running.starting import hushed, prepare
from zoo.running.views import replaced
from zoo.tasks.control import ControlTask
from zoo.tasks.generation import GenerationTask
from zoo.tasks.mesh import MeshTask

NEAR, FAR = 0.1, 0.3  # of the initial loss, as shares: a warning beyond the first, wrong beyond the second
RATIO = (1e-4, 1e-2)  # of the size of an update to that of the weights; the lecture's rule of thumb is 1e-3
FEW, BY_HEART = 10, 300  # samples to learn by heart, and steps to do it in
FEW_PICTURES = 2  # the same of a detector or of meshes, whose steps take long
LEARNT, LEARNT_OBJECTS = (0.1, "a tenth"), (0.25, "a quarter")  # of the first loss; a detector draws what it looks at
SECONDS = 10.0  # to look at each split

State = Literal["ok", "failed", "warning", "skipped"]


@dataclass
class Check:
    """One line of the table. Only ``failed`` says that something is wrong."""

    name: str
    expected: str
    found: str
    state: State


def check(recipe: str, overrides: list[str], steps: int = 50) -> list[Check]:
    """Check a recipe in a folder that is removed again; no run, no checkpoint, no log is kept.

    Args:
        recipe: A name of ``zoo list``, or a YAML file.
        overrides: Keys of the recipe.
        steps: Training steps of the recipe to look at.

    Raises:
        RecipeError: The recipe or an override cannot be meant.
    """
    if any(override.split("=")[0] == "--ckpt_path" for override in overrides):
        raise RecipeError("zoo check looks at the start of a training: leave --ckpt_path out")
    without_validation = ["--trainer.limit_val_batches", "0", "--trainer.num_sanity_val_steps", "0"]
    with hushed(), tempfile.TemporaryDirectory(prefix="zoo-check-") as folder:
        cli = prepare("fit", recipe, [*overrides, *without_validation], trial=Path(folder) / "trial")
        parts: Any = cli.model, cli.datamodule
        for part in parts:
            if getattr(part, "updates_per_step", 1) > 1:
                part.updates_per_step = 1  # one by one they can be looked at
        weights = cli.config["fit"].model.get("init_args.weights")
        beginning = Beginning(steps, pretrained=weights is not None)
        # A stop of the recipe's own asks for a validation that is left out here; the pictures themselves are looked at.
        given: list[Callback] = cli.trainer.callbacks  # type: ignore[attr-defined]
        kept = [callback for callback in given if not isinstance(callback, EarlyStopping | CacheFeatures)]
        cli.trainer.callbacks = [*kept, beginning]  # type: ignore[attr-defined]
        diverged = ""
        try:
            cli.run()
        except NonFiniteLossError as error:
            diverged = str(error)
        rows = list(beginning.checks)
        if beginning.few is not None:
            rows += [_gradients(beginning, diverged), _by_heart(cli.model, beginning, cli.trainer, Path(folder))]
            rows += _ratios(beginning)
        return [*rows, *_images(beginning), *beginning.data_checks]


class Beginning(Callback):
    """Looks at the first steps of a training, and ends it.

    Args:
        steps: Optimizer steps to look at.
        pretrained: Whether the model started from weights.
    """

    def __init__(self, steps: int, pretrained: bool) -> None:
        self.steps = steps
        self.pretrained = pretrained
        self.checks: list[Check] = []
        self.data_checks: list[Check] = []
        self.few: Any = None  # samples as the model gets them, without augmentation
        self.initial: dict[str, Tensor] = {}
        self.gradients = Gradients()
        self.ratios: dict[str, list[float]] = {}
        self.images = Range()
        self._before: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the data and the initial loss."""
        data: LightningDataModule = trainer.datamodule  # type: ignore[attr-defined]
        self.data_checks = _data(data, isinstance(pl_module, ControlTask))
        with _as_in_an_evaluation(trainer):
            batch = trainer.strategy.batch_to_device(next(iter(data.train_dataloader())))
        self.images.update(batch)
        if not _learns(trainer, pl_module):
            reason = f"{type(pl_module).__name__} does not learn by gradients: it has no optimizer"
            names = ("initial loss", "gradients", _by_heart_of(_first_few(batch)), "update / weight")
            self.checks = [Check(name, "", reason, "skipped") for name in names]
            raise _TunerExitException
        self.initial = {name: tensor.detach().clone() for name, tensor in pl_module.state_dict().items()}
        self.few = _first_few(batch, isinstance(pl_module, MeshTask))
        self.checks = [self._initial_loss(trainer, pl_module, batch)]
        pl_module.load_state_dict(self.initial)  # the forward pass has moved the statistics of batch norms

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look at the images as training gets them."""
        self.images.update(batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at the gradients, and keep the weights."""
        scaled = isinstance(trainer.precision_plugin, MixedPrecision) and trainer.precision_plugin.scaler is not None
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad:
                self.gradients.update(name, parameter.grad, scaled)
                if parameter.ndim >= 2:
                    self._before[name] = parameter.detach().clone()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare the weights with those before; end after enough steps."""
        for name, parameter in pl_module.named_parameters():
            if name in self._before:
                size = float(self._before[name].norm())
                if size:  # a layer that starts at zero has no ratio yet
                    step = parameter.detach() - self._before[name]
                    self.ratios.setdefault(name, []).append(float(step.norm()) / size)
        self._before = {}
        if trainer.global_step >= self.steps:
            raise _TunerExitException

    def _initial_loss(self, trainer: Trainer, module: LightningModule, batch: Any) -> Check:
        expected = getattr(module, "chance_loss", None)
        name = "initial loss"
        if not module.automatic_optimization:
            return Check(name, "", f"{type(module).__name__} takes steps of several optimizers by itself", "skipped")
        if self.pretrained:
            return Check(name, "", "the model starts from weights, which know more than chance", "skipped")
        with torch.no_grad(), _without_dropout(module), _silent(module):
            loss = _loss_of(trainer.strategy.training_step(batch, 0))
        if not math.isfinite(loss):
            return Check(name, "a number", f"{loss}", "failed")
        if expected is None:
            return Check(name, "", f"{loss:.4f}; {type(module).__name__} has no chance_loss to compare", "skipped")
        away = abs(loss - expected) / expected
        state: State = "ok" if away <= NEAR else "warning" if away <= FAR else "failed"
        return Check(name, f"{expected:.4f} ± {NEAR:.0%} (chance)", f"{loss:.4f}", state)


def _learns(trainer: Trainer, module: LightningModule) -> bool:
    """Whether an optimizer has parameters of the module; one of rate 0 that is stepped by hand only counts steps."""
    own = {id(parameter) for parameter in module.parameters()}
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    moving = [group for group in groups if module.automatic_optimization or group.get("initial_lr", group["lr"]) > 0]
    return any(id(parameter) in own for group in moving for parameter in group["params"])


@dataclass
class Gradients:
    """Which parameters have had a gradient: None, or zero at every step, is none."""

    seen: set[str] = field(default_factory=set)
    moved: set[str] = field(default_factory=set)
    bad: set[str] = field(default_factory=set)

    def update(self, name: str, gradient: Tensor | None, scaled: bool) -> None:
        """Count one parameter's gradient; ``scaled``: a loss scaler leaves out steps that overflow."""
        self.seen.add(name)
        if gradient is None:
            return
        largest = float(gradient.detach().abs().max()) if gradient.numel() else 0.0
        if not math.isfinite(largest):
            self.bad |= set() if scaled else {name}
        elif largest > 0:
            self.moved.add(name)


@dataclass
class Range:
    """The smallest and the largest value of the images, of batches that have any: a tensor, or a list of pictures."""

    low: float = math.inf
    high: float = -math.inf

    def update(self, batch: Any) -> None:
        """Look at a batch as the model gets it."""
        first = batch[0] if isinstance(batch, list | tuple) and batch else batch
        first = first.get("image") if isinstance(first, dict) else first
        for images in first if isinstance(first, list) else [first]:
            if isinstance(images, Tensor) and images.ndim == (3 if isinstance(first, list) else 4) and images.numel():
                self.low, self.high = min(self.low, float(images.min())), max(self.high, float(images.max()))


@contextmanager
def _as_in_an_evaluation(trainer: Trainer) -> Iterator[None]:
    """Data modules augment where ``trainer.training``."""
    trainer.sanity_checking = True
    try:
        yield
    finally:
        trainer.training = True


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    """Batch norms go on as in training, with the batch's statistics; what draws at random does not."""
    dropping = [
        m for m in module.modules() if ("Drop" in type(m).__name__ or "Stochastic" in type(m).__name__) and m.training
    ]
    for each in dropping:
        each.eval()
    try:
        yield
    finally:
        for each in dropping:
            each.train()


@contextmanager
def _silent(module: LightningModule) -> Iterator[None]:
    """A step outside of its loop may not log."""
    with ExitStack() as stack:
        for name in ("log", "log_dict"):
            stack.enter_context(replaced(module, name, lambda *_, **__: None))
        yield


def _loss_of(output: Any) -> float:
    loss = output["loss"] if isinstance(output, dict) else output
    return math.nan if loss is None else float(loss)


def _first(batch: Any, count: int) -> Any:
    """The first samples of a batch: of its tensors and lists, on whatever level they are."""
    if isinstance(batch, tuple):
        return tuple(_first(part, count) for part in batch)
    if isinstance(batch, dict):
        return {key: _first(part, count) for key, part in batch.items()}
    if isinstance(batch, Tensor) and batch.ndim:
        return batch[:count].clone()
    return batch[:count] if isinstance(batch, list) else batch


def _first_few(batch: Any, slow: bool = False) -> Any:
    return _first(batch, FEW_PICTURES if slow or _truths(batch) is not None else FEW)


def _truths(batch: Any) -> list[dict[str, Tensor]] | None:
    """The true objects of a detector's batch; None for other batches."""
    targets = batch[1] if isinstance(batch, list | tuple) and len(batch) == 2 else None
    found = isinstance(targets, list) and all(isinstance(t, dict) and {"boxes", "labels"} <= t.keys() for t in targets)
    return targets if found else None


def _by_heart_of(few: Any) -> str:
    return f"{_samples(few)} samples by heart"


def _gradients(beginning: Beginning, diverged: str) -> Check:
    gradients, expected = beginning.gradients, "finite and not all zero, for every parameter"
    if diverged:
        return Check("gradients", expected, diverged.split(". ")[0], "failed")
    still = sorted(gradients.seen - gradients.moved - gradients.bad)
    wrong = [f"not finite: {_some(sorted(gradients.bad))}"] if gradients.bad else []
    wrong += [f"none: {_some(still)}"] if still else []
    return Check(
        "gradients", expected, "; ".join(wrong) or f"{len(gradients.seen)} parameters", "failed" if wrong else "ok"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class _ByHeart(Callback):
    """Ends a training when its samples are known by heart."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.losses: list[float] = []
        self.accuracy: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
            if "weight_decay" in group:
                group["weight_decay"] = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(_loss_of(outputs))
        accuracy = trainer.callback_metrics.get("train/accuracy")
        self.accuracy = None if accuracy is None else float(accuracy)
        trainer.should_stop = self.known

    @property
    def known(self) -> bool:
        """By the accuracy where the task logs it, else by a loss of a share of the first."""
        return self.accuracy == 1 if self.accuracy is not None else self.losses[-1] < self.share * self.losses[0]


def _by_heart(module: LightningModule, beginning: Beginning, trainer: Trainer, folder: Path) -> Check:
    """Fit a few samples from the same start, with the recipe's optimizer at a constant rate and no regularization."""
    name = _by_heart_of(beginning.few)
    if isinstance(module, GenerationTask):
        return Check(name, "", "a generator makes new pictures: it is not to know any by heart", "skipped")
    if isinstance(module, ControlTask) and not isinstance(module, DQN):
        reason = "the loss of a policy's gradient is no measure of what it has learnt"
        return Check(name, "", reason, "skipped")
    module.load_state_dict(beginning.initial)
    share, in_words = LEARNT if _truths(beginning.few) is None else LEARNT_OBJECTS
    by_heart = _ByHeart(share)
    again = Trainer(
        accelerator=trainer.strategy.root_device.type,
        devices=1,
        max_steps=BY_HEART,
        max_epochs=-1,
        logger=False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[by_heart, StopOnNonFiniteLoss()],
    )
    batches: DataLoader = DataLoader([beginning.few] * BY_HEART, batch_size=None)  # type: ignore[arg-type]
    schedule = replaced(module, "scheduler", None) if hasattr(module, "scheduler") else ExitStack()
    try:
        with _without_dropout(module), schedule, warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")
            again.fit(module, batches)
    except NonFiniteLossError as error:
        return Check(name, "learnt", str(error).split(". ")[0], "failed")
    found, expected = f"loss {by_heart.losses[0]:.3g} to {by_heart.losses[-1]:.3g}", f"{in_words} of the loss"
    if by_heart.accuracy is not None:
        found, expected = f"accuracy {by_heart.accuracy:.2f}, {found}", "accuracy 1.00"
    state: State = "ok" if by_heart.known else "failed"
    return Check(name, f"{expected} within {BY_HEART} steps", f"{found}, {len(by_heart.losses)} steps", state)


def _ratios(beginning: Beginning) -> list[Check]:
    """The median over the steps of each layer, and over the layers: a warning where it is far from 1e-3."""
    low, high = RATIO
    layers = {name: statistics.median(values) for name, values in beginning.ratios.items()}
    if not layers:
        return [Check("update / weight", "", "no parameter with two or more dimensions was trained", "skipped")]
    steps = max(len(values) for values in beginning.ratios.values())

    def row(name: str, value: float, of: str) -> Check:
        return Check(name, "about 1e-3", f"{value:.1e}{of}", "ok" if low <= value <= high else "warning")

    of = f" (median of {len(layers)} layers over {steps} steps)"
    rows = [row("update / weight", statistics.median(layers.values()), of)]
    return rows + [row(f"  {name.removesuffix('.weight')}", value, "") for name, value in layers.items()]


def _images(beginning: Beginning) -> list[Check]:
    low, high = beginning.images.low, beginning.images.high
    if high < low:
        return []
    found = f"{low:.3g} to {high:.3g}"
    if 0 <= low < high <= 1:
        # Divided by 255 twice they would still lie in [0, 1].
        return [Check("images", "in [0, 1]", found, "ok" if high > 2 / 255 else "failed")]
    return [Check("images", "in [0, 1]", found, "failed")]


def _data(data: LightningDataModule, experience: bool = False) -> list[Check]:
    """Labels, sizes and whether a seed gives the same batches; what a data module does not have is left out."""
    splits, rows = {"train": _labels(data.train_dataloader())}, []
    for split, stage in (("val", "validate"), ("test", "test")):
        try:
            data.setup(stage)
            splits[split] = _labels(getattr(data, f"{split}_dataloader")())
        except Exception as error:  # a data module may raise what it likes where it has no such split
            rows.append(Check(f"{split} batches", "readable", f"{type(error).__name__}: {error}", "warning"))
    rows.append(_sizes(splits))
    classes = getattr(data, "num_classes", None)
    rows += [_label_range(splits, classes), _classes(splits["train"], classes, data)] if classes else []
    rows += [_boxes(splits["train"])] if splits["train"].of_objects else []
    if experience:
        reason = "experience goes on from where it is: a second first batch is a later one"
        return [*rows, Check("first batch", "", reason, "skipped")]
    return [*rows, _same_first_batch(data), *_report(data)]


@dataclass
class _Labels:
    counts: Counter[int] = field(default_factory=Counter)
    samples: int = 0
    complete: bool = True
    of_objects: bool = False  # then they begin at 1
    empty: int = 0  # pictures without an object
    wrong_boxes: int = 0

    def update(self, batch: Any) -> None:
        """Count a batch."""
        self.samples += _samples(batch)
        target = batch[1] if isinstance(batch, list | tuple) and len(batch) > 1 else None
        if isinstance(target, Tensor) and target.ndim == 1 and not target.is_floating_point():
            self.counts.update(target.tolist())
        if (truths := _truths(batch)) is not None:
            self.of_objects = True
            for image, truth in zip(batch[0], truths, strict=True):
                self.counts.update(truth["labels"].tolist())
                self.empty += not len(truth["labels"])
                self.wrong_boxes += _count_wrong(truth["boxes"], image)


def _count_wrong(boxes: Tensor, image: Tensor) -> int:
    """Boxes (R, 4) without an area, or beyond the picture (3, H, W)."""
    if not len(boxes):
        return 0
    height, width = image.shape[-2:]
    inside = (boxes[:, :2] >= 0).all(1) & (boxes[:, 2] <= width) & (boxes[:, 3] <= height)
    return int((~(inside & (boxes[:, 2:] > boxes[:, :2]).all(1))).sum())


def _labels(loaders: Any) -> _Labels:
    """Count the labels of one split, as long as the time allows."""
    labels, end = _Labels(), time.monotonic() + SECONDS
    loaders = [loaders] if hasattr(loaders, "__iter__") and not isinstance(loaders, list | tuple) else loaders or []
    for batch in (batch for loader in loaders for batch in loader):
        labels.update(batch)
        if time.monotonic() > end:
            labels.complete = False
            break
    return labels


def _samples(batch: Any) -> int:
    parts: Iterable[Any] = batch.values() if isinstance(batch, dict) else batch
    first = batch if isinstance(batch, Tensor) else next(iter(parts))
    return len(first)


def _sizes(splits: dict[str, _Labels]) -> Check:
    told = [f"{name} {s.samples:,}{'' if s.complete else ' or more'}" for name, s in splits.items()]
    empty = [name for name, split in splits.items() if not split.samples]
    state: State = "failed" if "train" in empty else "warning" if empty else "ok"
    return Check("samples of an epoch", "in every split", ", ".join(told), state)


def _label_range(splits: dict[str, _Labels], classes: int) -> Check:
    labels = set().union(*(split.counts for split in splits.values()))
    first = int(any(split.of_objects for split in splits.values()))
    last = classes - 1 + first
    expected = f"{first} to {last}"
    if not labels:
        return Check("labels", expected, "none that are class numbers", "skipped")
    inside = min(labels) >= first and max(labels) <= last
    return Check("labels", expected, f"{min(labels)} to {max(labels)}", "ok" if inside else "failed")


def _classes(train: _Labels, classes: int, data: LightningDataModule) -> Check:
    if not train.counts:
        return Check("classes", "", "no class numbers in the training batches", "skipped")
    names = getattr(data, "class_names", None) or [str(k + train.of_objects) for k in range(classes)]
    counts = [(train.counts.get(k + train.of_objects, 0), str(name)) for k, name in enumerate(names)]
    fewest, most = min(counts), max(counts)
    what = " objects" if train.of_objects else ""
    found = f"fewest {fewest[0]:,}{what} ({fewest[1]}), most {most[0]:,} ({most[1]})"
    # A set of objects may name classes that it has none of, as parts of COCO do.
    certain = train.complete and not train.of_objects
    state: State = "ok" if fewest[0] else "failed" if certain else "warning"
    return Check("classes in training", f"all {classes}", found, state)


def _boxes(train: _Labels) -> Check:
    objects = train.counts.total()
    found = f"{objects / max(train.samples, 1):.1f} a picture, {train.empty:,} pictures without one"
    if train.wrong_boxes:
        found = f"{train.wrong_boxes:,} of {objects:,} are not; {found}"
    state: State = "failed" if train.wrong_boxes or not objects else "ok"
    return Check("boxes in training", "with an area, inside of their pictures", found, state)


def _report(data: LightningDataModule) -> list[Check]:
    """What the data module itself says of its files, and below it what it found wrong with them."""
    report = getattr(data, "report", None)
    rows = []
    for line in report().splitlines() if callable(report) else []:
        split, _, found = line.partition(": ")
        own = not line.startswith(" ")
        rows.append(Check(f"files of {split}", "", found, "ok") if own else Check("", "", line.strip(), "warning"))
    return rows


def _same_first_batch(data: LightningDataModule) -> Check:
    first, second = (_seeded_batch(data) for _ in range(2))
    same = len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return Check(
        "first batch", "the same for the same seed", "the same" if same else "another", "ok" if same else "failed"
    )


def _seeded_batch(data: LightningDataModule) -> list[Tensor]:
    seed = torch.initial_seed()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return _tensors(next(iter(data.train_dataloader())))


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else []
    return [tensor for part in parts for tensor in _tensors(part)]


def print_checks(checks: list[Check]) -> None:
    """Print the table."""
    import sys

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colors = {"ok": "green", "failed": "bold red", "warning": "yellow", "skipped": "dim"}
    table = Table("check", "expected", "found", "", box=None, header_style="bold", padding=(0, 1))
    for each in checks:
        table.add_row(Text(each.name), Text(each.expected), Text(each.found), Text(each.state, colors[each.state]))
    Console(width=None if sys.stdout.isatty() else 200).print(table)
