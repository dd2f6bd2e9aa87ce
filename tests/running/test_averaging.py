"""Averages of weights against their formulas; nothing is lost when a run is stopped, and checkpoints hold them."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import SWALR, update_bn

import datamodules
import zoo
from datamodules.sampling import EvaluationBatches, TensorLoader, TrainingBatches
from zoo.cli import main
from zoo.running.averaging import EMA, SWA, Snapshots
from zoo.running.checkpoint import SafeCheckpointIO, checkpoint_callbacks, read_checkpoint
from zoo.running.freezing import FreezeBackbone
from zoo.running.nonfinite import StopOnNonFiniteLoss
from zoo.running.optimizing import LinearScaling, configure_optimizers, warm_up
from zoo.running.resume import ExactResume
from zoo.running.schedules import Cosine, CosineRestarts

EPOCHS, BATCHES = 5, 4
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Tiny(LightningModule):
    def __init__(self, norm=True, scheduler=Cosine):
        super().__init__()
        torch.manual_seed(7)
        norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.backbone = nn.Sequential(nn.Linear(6, 8), norm, nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(8, 3)
        self.scheduler = scheduler
        self.optimizer = lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, weight_decay=0.01)

    def forward(self, images):
        return self.head(self.backbone(images))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]), batch_size=len(batch[1]))

    def configure_optimizers(self):
        return configure_optimizers(self, self.optimizer, self.scheduler)


def data():
    generator = torch.Generator().manual_seed(0)
    tensors = torch.randn(8 * BATCHES, 6, generator=generator), torch.arange(8 * BATCHES) % 3
    return tensors, TrainingBatches(8 * BATCHES, 8), EvaluationBatches(8 * BATCHES, 8)


def fit(callbacks, ckpt_path=None, folder=None, model=None, epochs=EPOCHS, **options):
    """A run with what the command line adds; in ``folder`` it keeps its checkpoints."""
    seed_everything(1, verbose=False)
    model = model or Tiny()
    tensors, training, evaluation = data()
    keep = checkpoint_callbacks("val/loss", "min") if folder else []
    trainer = Trainer(
        **QUIET, max_epochs=epochs, callbacks=[*callbacks, ExactResume(), StopOnNonFiniteLoss(), *keep],
        plugins=[SafeCheckpointIO()], enable_checkpointing=bool(folder), default_root_dir=folder, **options,
    )  # fmt: skip
    trainer.fit(model, TensorLoader(tensors, training), TensorLoader(tensors, evaluation), ckpt_path=ckpt_path)
    return model, trainer


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert not [name for name, value in one.items() if not torch.equal(other[name], value)]


class Watch(Callback):
    """The weights after every step and at every epoch's start, those that were validated, and the rates."""

    def __init__(self):
        self.steps, self.starts, self.validated, self.rates = [], [], [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.starts.append(state(pl_module))
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(state(pl_module))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 0 and not trainer.sanity_checking:
            self.validated.append(state(pl_module))


class StopAfter(Callback):
    """Asks the run to stop after so many steps, with a real signal."""

    def __init__(self, steps):
        self.steps = steps

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.steps - 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)


class SaveAfter(Callback):
    def __init__(self, epoch, path):
        self.epoch, self.path = epoch, path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def moving_average(steps, decay):
    """In float64, as its docstring says: the first value, then decays that grow to ``decay``; counters as they are."""
    average = {name: value.double() for name, value in steps[0].items()}
    for n, weights in enumerate(steps[1:], start=1):
        keep = min(decay, (1 + n) / (10 + n))
        for name, value in weights.items():
            counter = not value.is_floating_point()
            average[name] = value.double() if counter else keep * average[name] + (1 - keep) * value.double()
    return average


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_ema_is_its_formula_validated_saved_and_left_behind(tmp_path, decay):
    watch = Watch()
    model, _ = fit([EMA(decay), watch], folder=tmp_path)
    for epoch, validated in enumerate(watch.validated, start=1):
        expected = moving_average(watch.steps[: epoch * BATCHES], decay)
        for name, value in validated.items():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert_same(watch.validated[-1], state(model))
    last = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert_same(last["state_dict"], state(model))
    assert_same(last["current_model_state"], watch.steps[-1])
    assert not torch.equal(watch.steps[-1]["head.weight"], model.head.weight)


def test_the_best_checkpoint_of_an_ema_loads_as_the_average_that_was_validated(tmp_path):
    class Best(Callback):
        accuracy, weights = -1.0, None

        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            self.now = state(pl_module)

        def on_validation_end(self, trainer, pl_module):
            accuracy = float(trainer.callback_metrics["val/accuracy"])
            if accuracy > self.accuracy and not trainer.sanity_checking:
                self.accuracy, self.weights = accuracy, self.now

    seed_everything(0, verbose=False)
    best = Best()
    model = zoo.LeNet(image_size=8)
    trainer = Trainer(
        **QUIET, max_epochs=3, callbacks=[EMA(0.9), best, *checkpoint_callbacks("val/accuracy", "max")],
        plugins=[SafeCheckpointIO()], default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, datamodules.DigitsDataModule(image_size=8, batch_size=64))
    loaded = zoo.load(tmp_path / "checkpoints" / "best.ckpt")
    assert_same(state(loaded), best.weights)
    current = read_checkpoint(tmp_path / "checkpoints" / "best.ckpt")["current_model_state"]
    assert not torch.equal(current["head.weight"], loaded.head.weight)


needs_swa = pytest.mark.skipif("state_dict" not in vars(SWALR), reason="SWA needs a torch newer than 2.6")
AVERAGES = {"ema": lambda: EMA(0.9), "swa": lambda: SWA(0.4, 0.25, 2)}
EACH = ["ema", pytest.param("swa", marks=needs_swa)]


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("steps", [4, 6, 18])
def test_stopped_anywhere_and_resumed_it_ends_as_an_unbroken_run_does(tmp_path, kind, norm, steps):
    make = AVERAGES[kind]
    straight, _ = fit([make()], model=Tiny(norm))
    with pytest.raises(SystemExit):
        fit([make(), StopAfter(steps)], folder=tmp_path, model=Tiny(norm))
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert read_checkpoint(last)["global_step"] == steps
    resumed, _ = fit([make()], last, model=Tiny(norm))
    assert_same(state(straight), state(resumed))


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize("epoch", range(EPOCHS - 1))
def test_resumed_from_the_end_of_any_epoch_it_ends_as_an_unbroken_run_does(tmp_path, kind, epoch):
    make = AVERAGES[kind]
    straight, _ = fit([make()])
    fit([make(), SaveAfter(epoch, tmp_path / "epoch.ckpt")])
    resumed, _ = fit([make()], tmp_path / "epoch.ckpt")
    assert_same(state(straight), state(resumed))


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize("norm", [True, False])
def test_a_finished_run_that_is_resumed_leaves_the_average_behind(tmp_path, kind, norm):
    make = AVERAGES[kind]
    straight, _ = fit([make()], folder=tmp_path, model=Tiny(norm))
    resumed, _ = fit([make()], tmp_path / "checkpoints" / "last.ckpt", model=Tiny(norm))
    assert_same(state(straight), state(resumed))


def test_a_validation_that_breaks_off_leaves_the_weights_where_they_belong(tmp_path):
    class Break(Callback):
        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            if trainer.current_epoch == 1:
                raise SIGTERMException

    watch = Watch()
    with pytest.raises(SystemExit):
        fit([EMA(0.9), watch, Break()], folder=tmp_path)
    last = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert last["global_step"] == 2 * BATCHES
    assert_same(last["current_model_state"], watch.steps[-1])


def test_a_frozen_backbone_is_not_moved_by_its_average():
    model = Tiny()
    model.backbone[1].num_batches_tracked += 77
    before = state(model)
    fit([FreezeBackbone(), EMA(0.9)], model=model)
    changed = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}


@needs_swa
@pytest.mark.parametrize("by_callback", [True, False])
def test_swa_leaves_the_statistics_of_a_frozen_backbone(by_callback):
    """Lightning's forgets those of every batch norm, for an epoch that renews them; a frozen one it would not renew."""
    model = Tiny()
    nn.init.normal_(model.backbone[1].running_mean)
    model.backbone.requires_grad_(by_callback).train(by_callback)
    before, weights = state(model.backbone), state(model.head)
    fit([*[FreezeBackbone()] * by_callback, SWA(0.4, 0.25, 1)], model=model)
    assert_same(state(model.backbone), before)
    assert not torch.equal(model.head.weight, weights["weight"])
    assert model.backbone[1].momentum == 0.1


@needs_swa
@pytest.mark.parametrize("norm", [True, False])
def test_swa_is_the_mean_of_the_weights_at_the_start_of_the_last_epochs(tmp_path, norm):
    watch = Watch()
    model, _ = fit([SWA(0.4, 0.25, 2), watch], folder=tmp_path, model=Tiny(norm))
    # Of five epochs from 0.4 on: Lightning counts from 1, so that the second one is the first.
    for name, parameter in model.named_parameters():
        expected = torch.stack([start[name].double() for start in watch.starts[1:EPOCHS]]).mean(0)
        torch.testing.assert_close(parameter.double(), expected, rtol=1e-5, atol=1e-7)
    assert_same(read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["state_dict"], state(model))
    if norm:
        own = state(model)
        model.backbone[3].p = 0.0
        tensors, training, _ = data()
        training.set_epoch(EPOCHS)
        update_bn(TensorLoader(tensors, training), model)
        torch.testing.assert_close(state(model)["backbone.1.running_mean"], own["backbone.1.running_mean"])
        torch.testing.assert_close(state(model)["backbone.1.running_var"], own["backbone.1.running_var"])
    assert watch.rates[3] == pytest.approx([0.25 * 0.2]), "the steady rate"


@needs_swa
def test_swa_keeps_the_ratio_of_the_groups():
    watch = Watch()
    fit([FreezeBackbone(0, 0.1), SWA(0.4, 0.25, 1), watch])
    assert watch.rates[4] == pytest.approx([0.25 * 0.02, 0.25 * 0.2])


def test_early_stopping_stops_keeps_the_best_and_is_resumed(tmp_path):
    class Worse(Tiny):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", float(self.current_epoch), batch_size=len(batch[1]))

    stopping = EarlyStopping("val/loss", patience=2)
    _, trainer = fit([stopping], folder=tmp_path, model=Worse())
    assert trainer.current_epoch == 3
    assert read_checkpoint(tmp_path / "checkpoints" / "best.ckpt")["global_step"] == BATCHES
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 3 * BATCHES
    with pytest.raises(SystemExit):
        fit([EarlyStopping("val/loss", patience=2), StopAfter(2 * BATCHES)], folder=tmp_path / "b", model=Worse())
    last = tmp_path / "b" / "checkpoints" / "last.ckpt"
    _, resumed = fit([EarlyStopping("val/loss", patience=2)], last, model=Worse())
    assert resumed.current_epoch == 3


def restarts(cycles):
    return lambda optimizer, steps: CosineRestarts(optimizer, steps, cycles)


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").glob("snapshot*"))


@pytest.mark.parametrize(("cycles", "epochs", "accumulated", "ends"), [
    (5, 5, 1, [4, 8, 12, 16, 20]),
    (2, 5, 1, [10, 20]),
    (3, 5, 1, [7, 14, 20]),
    (2, 4, 2, [4, 8]),
    (4, 3, 2, [2, 4, 6]),
])  # fmt: skip
def test_a_snapshot_is_kept_at_the_end_of_every_cycle(tmp_path, cycles, epochs, accumulated, ends):
    watch = Watch()
    model = Tiny(scheduler=restarts(cycles))
    fit([Snapshots(), watch], folder=tmp_path, model=model, epochs=epochs, accumulate_grad_batches=accumulated)
    assert names(tmp_path) == [f"snapshot-{k + 1}.ckpt" for k in range(len(ends))]
    for name, end in zip(names(tmp_path), ends, strict=True):
        content = read_checkpoint(tmp_path / "checkpoints" / name)
        assert content["global_step"] == end
        assert torch.equal(content["state_dict"]["head.weight"], watch.steps[end * accumulated - 1]["head.weight"])


def test_a_resumed_run_keeps_the_snapshots_that_are_left(tmp_path):
    fit([Snapshots(), EMA(0.9)], folder=tmp_path / "whole", model=Tiny(scheduler=restarts(5)))
    with pytest.raises(SystemExit):
        fit([Snapshots(), EMA(0.9), StopAfter(10)], folder=tmp_path / "first", model=Tiny(scheduler=restarts(5)))
    last = tmp_path / "first" / "checkpoints" / "last.ckpt"
    fit([Snapshots(), EMA(0.9)], last, tmp_path / "second", Tiny(scheduler=restarts(5)))
    assert names(tmp_path / "first") == ["snapshot-1.ckpt", "snapshot-2.ckpt"]
    assert names(tmp_path / "second") == ["snapshot-3.ckpt", "snapshot-4.ckpt", "snapshot-5.ckpt"]
    for folder in ("first", "second"):
        for name in names(tmp_path / folder):
            one, other = (read_checkpoint(tmp_path / f / "checkpoints" / name) for f in (folder, "whole"))
            assert_same(one["state_dict"], other["state_dict"])


def test_snapshots_follow_the_cycles_behind_a_warm_up(tmp_path):
    model = Tiny(scheduler=lambda optimizer, steps: warm_up(optimizer, steps, 2, restarts(3)))
    fit([Snapshots()], folder=tmp_path, model=model)
    steps = [read_checkpoint(tmp_path / "checkpoints" / name)["global_step"] for name in names(tmp_path)]
    assert steps == [8, 14, 20]


def test_snapshots_without_cycles_are_refused():
    with pytest.raises(ValueError, match="CosineRestarts"):
        fit([Snapshots()], folder=Path("here"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EMA(1.0), r"decay=1\.0"),
        pytest.param(lambda: SWA(ratio=0), "ratio=0", marks=needs_swa),
        pytest.param(lambda: SWA(2), "swa", marks=needs_swa),
    ],
)
def test_a_wrong_number_is_named(make, message):
    with pytest.raises(Exception, match=message):
        make()


SHORT = [
    "--data.init_args.image_size", "8", "--model.init_args.image_size", "8", "--data.init_args.batch_size", "256",
    "--trainer.max_epochs", "6", "--trainer.log_every_n_steps", "1",
]  # fmt: skip
RUN = Path("runs/lenet/embedded/version_0")


def callbacks_of(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    return [callback["class_path"].rsplit(".", 1)[-1] for callback in config["trainer"]["callbacks"]]


def test_overlays_compose_and_what_they_make_is_there():
    overlays = ["freeze", "early_stopping", "ema", "snapshots"]
    assert main(["fit", "lenet/embedded", *SHORT, *(part for name in overlays for part in ("--config", name))]) == 0
    assert callbacks_of(RUN) == ["FreezeBackbone", "EarlyStopping", "EMA", "Snapshots"]
    files = sorted(path.name for path in (RUN / "checkpoints").iterdir())
    assert files == ["best.ckpt", "last.ckpt", *(f"snapshot-{k}.ckpt" for k in range(1, 7))]
    last = read_checkpoint(RUN / "checkpoints" / "last.ckpt")
    assert last["recipe"] == "lenet/embedded"
    assert_same(state(zoo.load(RUN / "checkpoints" / "last.ckpt")), last["state_dict"])
    assert "current_model_state" in last


@needs_swa
def test_an_overlay_adds_to_the_callbacks_of_a_recipe(tmp_path):
    content = yaml.safe_load((zoo.recipes.FOLDER / "lenet" / "embedded.yaml").read_text())
    content["trainer"]["callbacks"] = [{"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    assert main(["fit", "own.yaml", *SHORT, "--config", "swa", "--trainer.max_epochs", "2"]) == 0
    run = Path("runs/own/version_0")
    assert callbacks_of(run) == ["LearningRateMonitor", "SWA"]
    assert zoo.load(run / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize(
    "name",
    [
        "EMAWeightAveraging: {decay: 0.9}",
        pytest.param("StochasticWeightAveraging: {swa_lrs: 1.0e-3}", marks=needs_swa),
    ],
)
def test_lightnings_own_callbacks_work_from_a_recipe(tmp_path, name):
    kind, arguments = name.split(": ", 1)
    path = f"lightning.pytorch.callbacks.{kind}"
    (tmp_path / "own.yaml").write_text(f"trainer: {{callbacks+: [{{class_path: {path}, init_args: {arguments}}}]}}")
    assert main(["fit", "lenet/embedded", *SHORT, "--config", "own.yaml"]) == 0
    assert callbacks_of(RUN) == [kind]
    assert zoo.load(RUN / "checkpoints" / "last.ckpt")
    assert main(["fit", "lenet/embedded", *SHORT, "--config", "own.yaml", "--ckpt_path", "best"]) == 0


def test_the_average_is_a_copy_of_the_model_and_not_of_the_command_and_its_data(monkeypatch):
    """What jsonargparse makes of an optimizer refers to all of them; under DDP they cannot even be copied."""
    seen = []
    monkeypatch.setattr(EMA, "on_train_start", lambda self, trainer, module: seen.append((self._average_model, module)))
    assert main(["fit", "lenet/embedded", "--config", "ema", "--trainer.fast_dev_run", "true"]) == 0
    ((average, model),) = seen
    assert average.module.optimizer is model.optimizer
    assert average.module.scheduler is model.scheduler
    assert average.module.head.weight is not model.head.weight


def test_linear_scaling_goes_with_an_average():
    """Both wrap or copy the module at the same moment."""

    class World:
        world_size = 2
        datamodule = None

    model = Tiny()
    scaling = LinearScaling(warmup_steps=1)
    scaling.setup(World, model, "fit")
    _, trainer = fit([EMA(0.9)], model=model)
    assert trainer.optimizers[0].param_groups[0]["initial_lr"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("overlay", "expected"),
    [
        (
            "    - class_path: zoo.running.averaging.EMM",
            ["own.yaml, line 2: trainer.callbacks", "zoo.running.averaging.EMA?"],
        ),
        (
            "    - class_path: zoo.running.averaging.EMA\n      init_args: {deccay: 0.9}",
            ["line 4: trainer.callbacks.init_args.deccay", "did you mean decay?"],
        ),
    ],
)
def test_a_mistake_in_an_added_callback_is_found_where_it_is(tmp_path, capsys, overlay, expected):
    (tmp_path / "own.yaml").write_text(f"trainer:\n  callbacks+:\n{overlay}\n")
    assert main(["fit", "lenet/embedded", "--config", "own.yaml"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert not [words for words in expected if words not in error], error
