"""One standard for all: every architecture that ``zoo`` exports passes the same checks with its embedded recipe.

A new architecture is found by itself: nothing to register. A check that cannot apply to a task is skipped here, with
its reason, in ``NOT_APPLICABLE``.
"""

import copy
import inspect
import json
import math
import tempfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from PIL import Image

import zoo
from zoo import recipes
from zoo.cli import main
from zoo.export import export
from zoo.running.checking_data import LookAtSamples
from zoo.running.checkpoint import SafeCheckpointIO, checkpoint_callbacks, read_checkpoint
from zoo.running.freezing import FreezeBackbone
from zoo.running.nonfinite import NonFiniteLossError, StopOnNonFiniteLoss
from zoo.running.report import hold_against
from zoo.running.resume import ExactResume
from zoo.running.starting import finish, prepare
from zoo.weights import describe

ARCHITECTURES = sorted(zoo.ARCHITECTURES)


def folder_of(name: str) -> str:
    return zoo.ARCHITECTURES[name].removeprefix("zoo.")


TASKS = {row["architecture"]: row["task"] for row in recipes.table()}


def task_of(name: str) -> str:
    return TASKS[name]


NOT_APPLICABLE: dict[tuple[str, str], str] = {  # (architecture, test) -> reason
    ("KNearestNeighbors", "test_it_is_final_documented_and_takes_plain_arguments"):
        "it optimizes nothing, so it has no optimizer and no scheduler; test_knn.py asks the rest of it",
    ("KNearestNeighbors", "test_it_starts_at_the_loss_of_chance_and_overfits_one_batch"):
        "it remembers and has no training loss",
    ("KNearestNeighbors", "test_every_parameter_gets_a_gradient"): "it remembers: there is no backward pass",
    ("KNearestNeighbors", "test_two_processes_train_where_every_parameter_is_waited_for"):
        "it remembers: there is no backward pass; test_knn.py: two processes remember as one does",
    ("KNearestNeighbors", "test_fine_tuning_to_another_number_of_classes_replaces_the_head_and_only_the_head"):
        "its memory holds the labels of its classes: with others there is nothing to go on from",
    ("KNearestNeighbors", "test_bf16_autocast_gives_a_finite_loss"):
        "it has no training loss; that its outputs are those of full precision is in test_knn.py",
    ("KNearestNeighbors", "test_a_loss_that_is_no_number_stops_the_run_and_names_the_batch"):
        "it has no training loss",
}  # fmt: skip

NOT_APPLICABLE |= {
    (name, test): "zoo export refuses detectors, and test_export.py tests that: what they select depends on values"
    for name in ARCHITECTURES
    if task_of(name) == "detection"
    for test in ("test_it_exports_and_gives_the_same_outputs", "test_it_exports_to_onnx_and_gives_the_same_outputs")
}

NOT_APPLICABLE |= {
    (name, "test_it_starts_at_the_loss_of_chance_and_overfits_one_batch"):
        "two networks that play against each other have no loss that falls; test_generation.py follows their steps"
    for name in ("DCGAN", "GAN")
} | {
    (name, "test_fine_tuning_to_another_number_of_classes_replaces_the_head_and_only_the_head"):
        "a class is what its networks are given, not a head; test_dcgan.py: other numbers are refused by name"
    for name in ("DCGAN", "VAE")
}  # fmt: skip

NOT_APPLICABLE |= {
    (name, test): "zoo export refuses captioners, and test_captioned_files.py tests that: they stop at <END>"
    for name in ARCHITECTURES
    if task_of(name) == "captioning"
    for test in ("test_it_exports_and_gives_the_same_outputs", "test_it_exports_to_onnx_and_gives_the_same_outputs")
}

NOT_APPLICABLE |= {
    (name, "test_fine_tuning_to_another_number_of_classes_replaces_the_head_and_only_the_head"):
        "it has no head: no weight depends on the categories; test_pix2mesh.py: a file starts a model for others"
    for name in ARCHITECTURES
    if task_of(name) == "mesh"
}  # fmt: skip

NOT_APPLICABLE |= {
    (name, test): reason
    for name in ARCHITECTURES
    if task_of(name) == "control"
    for test, reason in {
        "test_two_processes_evaluate_to_the_same_metrics_as_one":
            "there are no samples to share out: each process plays all episodes; test_dqn.py asks two of them",
        "test_a_loss_that_is_no_number_stops_the_run_and_names_the_batch":
            "experience has no place in a data set; test_dqn.py: the batch is named by its number",
        "test_two_processes_train_where_every_parameter_is_waited_for":
            "it trains on one process, whose experience is its own; test_gym.py: more are refused",
        "test_the_smallest_training_sets_are_trained_on_or_refused_in_a_line": "it has no training set",
    }.items()
} | {
    (name, "test_it_starts_at_the_loss_of_chance_and_overfits_one_batch"):
        "a policy's loss on steps that were taken has no least value; their tests hold it against the formula"
    for name in ("ActorCritic", "REINFORCE")
}  # fmt: skip

VIDEOS = tempfile.TemporaryDirectory()  # written once for all checks
SHAPES = tempfile.TemporaryDirectory()  # modelled and rendered once for all checks
# Of generated data so much as a check needs.
SMALL = {
    "captioning": ["train_size 24", "val_size 8", "test_size 24", "batch_size 8"],
    "control": ["val_episodes 4", "test_episodes 4", "eval_envs 4"],
    "detection": ["train_size 24", "val_size 8", "test_size 24", "batch_size 2"],
    "mesh": [
        *("train_size 24", "val_size 6", "test_size 24", "views 1", "batch_size 6", "num_points 500"),
        f"root {SHAPES.name}",
    ],
    "video": ["train_size 32", "val_size 8", "test_size 24", "batch_size 8", f"root {VIDEOS.name}"],
}
# One batch learnt by heart, without augmentation as the lecture says: what makes it always the same, the steps it
# takes, and the part of the loss that may be left.
BY_HEART = {
    "captioning": (["train_size 24", "val_size 8", "batch_size 16"], 100, 0.2),
    "classification": (["batch_size 16", "translate 0"], 50, 0.1),
    "control": (["batch_size 16"], 120, 0.1),  # while the target network stays as it is
    "detection": (["flip false", "scale_jitter null"], 24, 0.3),
    "mesh": (["train_size 8", "val_size 6", "views 1", "batch_size 4", "num_points 500"], 80, 0.2),
    "video": (["train_size 16", "batch_size 16", "seconds 2"], 100, 0.3),
    "generation": (["batch_size 16"], 240, 0.3),  # of what is above the entropy of grey pixels
}


def each(*slow: str) -> pytest.MarkDecorator:
    """All architectures; those named are asked by ``make test-slow``.

    Those of one architecture run in one process, so that :func:`trained` trains it once.
    """
    marks = {name: [pytest.mark.xdist_group(name), *[pytest.mark.slow] * (name in slow)] for name in ARCHITECTURES}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks[name]) for name in ARCHITECTURES])


EVERY = each()
LIKE_FASTER_RCNN = ("KeypointRCNN", "MaskRCNN")  # it and a head: their trainings take long
LIKE_RESNET = ("AlexNet", "GoogLeNet", "SqueezeNet", "VGG")  # torchvision's, of the same task, and larger
LIKE_FRAME_FUSION = ("C3D", "CNNLSTM", "I3D", "SlowFast")  # the same task, with larger networks
LARGE = (*LIKE_FASTER_RCNN, *LIKE_RESNET, *LIKE_FRAME_FUSION)  # what others of their task show is asked less often
LARGER = ("FasterRCNN", *LARGE)  # TwoStageDetector is the same task and the same two stages, and smaller
WITH_BACKBONE = ("captioning", "classification", "detection", "mesh", "video")  # tasks whose architectures have one
SMALL_NETWORKS = (
    "DQN", "DeepConvNet", "FullyConnectedNet", "KNearestNeighbors", "LeNet", "LinearClassifier", "PreActResNet"
)  # fmt: skip
RECIPES = pytest.mark.parametrize("recipe", recipes.names())
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(autouse=True)
def _applicable(request):
    test = request.node.originalname
    name = request.node.callspec.params.get("name", "")
    if reason := NOT_APPLICABLE.get((name, test)):
        pytest.skip(reason)


def build(name: str, *overrides: str) -> tuple[LightningModule, LightningDataModule]:
    """A fresh model and data of the embedded recipe, as the command line makes them."""
    nothing = ["--trainer.limit_train_batches", "0", "--trainer.limit_val_batches", "0", "--trainer.logger", "false"]
    cli = finish(prepare("fit", f"{folder_of(name)}/embedded", [*nothing, *small(name), *overrides]))
    cli.model.trainer = None
    cli.datamodule.trainer = None
    return cli.model, cli.datamodule


def small(name: str) -> list[str]:
    one_update = ["updates_per_step 1"] if name == "DQN" else []  # test_dqn.py: several are as many steps, bit for bit
    return of_data([*SMALL.get(task_of(name), []), *one_update])


def of_data(settings: list[str]) -> list[str]:
    """Overrides of the data module's arguments."""
    return [word for setting in settings for word in f"--data.init_args.{setting}".split()]


def fit(model, data, callbacks=(), ckpt_path=None, **options):
    seed_everything(3, verbose=False)
    options = {
        "max_epochs": 2,
        "limit_val_batches": 1,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
    } | options
    trainer = Trainer(**QUIET, callbacks=[ExactResume(), *callbacks], plugins=[SafeCheckpointIO()], **options)
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return trainer


def numbers(trainer: Trainer) -> dict[str, float]:
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def first_batch(data: LightningDataModule):
    data.prepare_data()
    data.setup("predict")
    return data.on_after_batch_transfer(next(iter(data.predict_dataloader())), 0)


def example(model: LightningModule, data: LightningDataModule, count: int):
    """What the model maps to outputs: images, of a generator codes, of a policy observations."""
    if task_of(type(model).__name__) == "generation":
        return model.draw_codes(count, torch.Generator().manual_seed(0))
    batch = first_batch(data)
    return (batch["obs" if "obs" in batch else "image"] if isinstance(batch, dict) else batch[0])[:count]


def same(one, other) -> bool:
    """Whether outputs are alike to the last bit: tensors, or lists and dicts of them."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))


def shortened(split, samples):
    """The first samples of a split: tensors side by side, annotated pictures, or anything that can be sliced."""
    if hasattr(split, "take"):
        return split.take(np.arange(samples))
    if hasattr(split, "views"):  # of meshes: pictures and points are found by the view's place
        split.views = split.views.take(np.arange(samples))
        return split
    return tuple(part[:samples] for part in split) if isinstance(split, tuple) else split[:samples]


def same_weights(one, other) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.fixture(scope="session")
def runs():
    """What :func:`trained` has made so far, by architecture: its tests only look at it."""
    return {}


@pytest.fixture
def trained(name, runs, tmp_path_factory):
    """A checkpoint of the architecture after a few steps, the model that it was written from, and its data."""
    if name not in runs:
        folder = tmp_path_factory.mktemp(name)
        model, data = build(name)
        keep = checkpoint_callbacks(None, "min")
        fit(model, data, keep, max_steps=3, enable_checkpointing=True, default_root_dir=folder)
        runs[name] = folder / "checkpoints" / "last.ckpt", model.eval(), data
    return runs[name]


@EVERY
def test_it_has_an_embedded_recipe_and_another_one_and_a_test(name):
    own = [recipe for recipe in recipes.names() if recipe.split("/")[0] == folder_of(name)]
    assert f"{folder_of(name)}/embedded" in own
    assert len(own) >= 2
    assert (Path(__file__).parent / f"test_{folder_of(name)}.py").is_file()


@RECIPES
def test_its_recipe_parses_and_says_what_to_expect_and_who_says_so(recipe, capsys):
    content = recipes.read(recipes.find(recipe))
    claims = hold_against(recipe, content["expect"], {})
    assert claims
    assert all(claim.source for claim in claims)
    assert "measured" in content["expect"][0], "say what was measured, or that it was not"
    with pytest.raises(SystemExit) as stop:
        main(["fit", recipe, "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err
    assert content["model"]["class_path"] in capsys.readouterr().out


@EVERY
def test_it_is_final_documented_and_takes_plain_arguments(name):
    architecture = getattr(zoo, name)
    assert architecture.__name__ == name
    assert architecture.__mro__.index(LightningModule) == 2, "LightningModule -> task -> architecture"
    assert not [c for c in architecture.__subclasses__() if c.__module__.split(".")[0] == "zoo"]
    parameters = inspect.signature(architecture).parameters
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values()), "no **kwargs"
    undocumented = [p for p in parameters if f"{p}:" not in inspect.getdoc(architecture)]
    assert not undocumented
    assert {"optimizer", "scheduler", "weights"} <= set(parameters)


@each(*LARGER)
def test_fast_dev_run_of_every_command(name, tmp_path):
    model, _ = build(name)
    zoo.save(model, tmp_path / "start.safetensors")
    for command in ("fit", "validate", "test", "predict"):
        weights = ["--model.init_args.weights", str(tmp_path / "start.safetensors")]
        options = ["--trainer.fast_dev_run", "true", *weights, *small(name)]
        assert main([command, f"{folder_of(name)}/embedded", *options]) == 0
    assert not (tmp_path / "runs").exists()


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"]))
        self.batch = batch


def least_loss(name: str, batch) -> float:
    """What no network goes below: a VAE's cross-entropy with grey pixels holds their own entropy, in nats a picture."""
    if task_of(name) != "generation":
        return 0.0
    grey = batch[0].double().flatten(1)
    return float(-(torch.special.xlogy(grey, grey) + torch.special.xlogy(1 - grey, 1 - grey)).sum(1).mean())


@each(*(name for name in ARCHITECTURES if name not in SMALL_NETWORKS))
def test_it_starts_at_the_loss_of_chance_and_overfits_one_batch(name):
    losses = Losses()
    settings, steps, left = BY_HEART[task_of(name)]
    model, data = build(name, *of_data(settings))
    fit(model, data, [losses], max_steps=steps, max_epochs=-1, overfit_batches=1, limit_val_batches=0)
    if task_of(name) in ("classification", "video"):
        assert losses.values[0] == pytest.approx(model.chance_loss, rel=0.1)
    least = least_loss(name, losses.batch)
    assert min(losses.values[-5:]) - least < left * (losses.values[0] - least)


@each(*LARGE)
def test_a_checkpoint_gives_the_same_outputs_bit_for_bit_also_through_safetensors(name, trained, tmp_path):
    path, model, data = trained
    torch.load(path, weights_only=True)
    images = example(model, data, 8)
    expected = model(images)
    from_checkpoint = zoo.load(path)
    assert same(from_checkpoint(images), expected)
    zoo.save(from_checkpoint, tmp_path / "w.safetensors")
    assert same(zoo.load(tmp_path / "w.safetensors")(images), expected)
    assert same(type(model).load_from_checkpoint(path).eval()(images), expected)
    json.dumps(read_checkpoint(path)["zoo"])


class StopAfter(Callback):
    """Asks the run to stop after so many steps, as SIGTERM does."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.steps:
            trainer._signal_connector.received_sigterm = True


@each("Pix2Mesh", *LARGER)
def test_stopped_in_the_middle_of_an_epoch_and_resumed_it_ends_with_the_same_weights(name, tmp_path):
    straight, data = build(name)
    reference = fit(straight, data, limit_train_batches=4)
    stopped, data = build(name)
    keep = [*checkpoint_callbacks(None, "min"), StopAfter(6)]
    options = {"limit_train_batches": 4, "enable_checkpointing": True, "default_root_dir": tmp_path}
    with pytest.raises(SIGTERMException):
        fit(stopped, data, keep, **options)
    assert not same_weights(stopped, straight)
    resumed, data = build(name)
    last = fit(resumed, data, limit_train_batches=4, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert same_weights(resumed, straight)
    assert last.global_step == reference.global_step == 8
    assert numbers(last) == pytest.approx(numbers(reference), abs=0, rel=0, nan_ok=True)


@pytest.mark.parametrize(
    ("name", "samples"),
    [
        # A single sample, so that a process has none, concerns the task more than the architecture.
        pytest.param(
            name,
            samples,
            marks=[pytest.mark.xdist_group(name), *[pytest.mark.slow] * (name in LARGE or name not in few)],
        )
        for samples, few in (
            (1, ("FasterRCNN", "LeNet", "YOLOv3")),
            (21, [name for name in ARCHITECTURES if name != "FasterRCNN"]),
        )
        for name in ARCHITECTURES
    ],
)
def test_two_processes_evaluate_to_the_same_metrics_as_one(name, samples):
    metrics = []
    for strategy, devices in (("auto", 1), ("ddp_fork", 2)):
        seed_everything(0, verbose=False)
        model, data = build(name)
        data.prepare_data()
        data.setup("test")
        data.test_set = shortened(data.test_set, samples)
        data.eval_batch_size = 4
        trainer = Trainer(**QUIET, accelerator="cpu", strategy=strategy, devices=devices, enable_checkpointing=False)
        metrics.append({k: float(v) for k, v in trainer.test(model, data, verbose=False)[0].items()})
    # Their losses are sums of tens or hundreds of nats: a last digit of float32 is more than 1e-6.
    relative = 1e-6 if task_of(name) in ("captioning", "generation") else 0
    # Not a number are COCO's numbers without objects of a size.
    assert metrics[0] == pytest.approx(metrics[1], rel=relative, abs=1e-6, nan_ok=True)
    assert metrics[0]["test/samples"] == samples


class WithoutGradient(Callback):
    """Looks at a step as a whole: what a network of several backward passes has by its last one is not all."""

    def on_train_start(self, trainer, pl_module):
        self.names = {name for name, parameter in pl_module.named_parameters() if parameter.requires_grad}
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda _, name=name: self.names.discard(name))


class WithoutObjects(Callback):
    """Takes the objects out of a detector's batch, as pictures without any have it."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for target in batch[1]:
            count = len(target["labels"])
            for key, value in target.items():
                if isinstance(value, torch.Tensor) and value.ndim and len(value) == count:
                    target[key] = value[:0]


def callbacks_of(case: str) -> list[Callback]:
    return {"plain": [], "frozen": [FreezeBackbone()], "without objects": [WithoutObjects()]}[case]


def cases(*slow: str) -> pytest.MarkDecorator:
    """All architectures; those with a backbone also with it frozen, and detectors with pictures that have no object."""
    found = [(name, "plain") for name in ARCHITECTURES]
    found += [(n, "frozen") for n in ARCHITECTURES if task_of(n) in WITH_BACKBONE and n != "KNearestNeighbors"]
    found += [(name, "without objects") for name in ARCHITECTURES if task_of(name) == "detection"]
    marks = {name: [pytest.mark.xdist_group(name), *[pytest.mark.slow] * (name in slow)] for name in ARCHITECTURES}
    return pytest.mark.parametrize(("name", "case"), [pytest.param(*pair, marks=marks[pair[0]]) for pair in found])


@cases()
def test_every_parameter_gets_a_gradient(name, case):
    """Else training on several processes stops with "parameters that were not used"."""
    model, data = build(name)
    without = WithoutGradient()
    fit(model, data, [*callbacks_of(case), without], max_steps=1, limit_val_batches=0)
    assert not without.names


@cases(*LARGER, "DCGAN", "Pix2Mesh", "TwoStageDetector", "YOLOv3")
def test_two_processes_train_where_every_parameter_is_waited_for(name, case):
    """A parameter without a gradient is an error at the second step."""
    model, data = build(name)
    before = copy.deepcopy(model.state_dict())
    strategy = DDPStrategy(start_method="fork", find_unused_parameters=False, timeout=timedelta(seconds=60))
    options = {"accelerator": "cpu", "devices": 2, "strategy": strategy, "max_steps": 3, "max_epochs": -1}
    fit(model, data, callbacks_of(case), limit_val_batches=0, **options)
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())


@each(*LARGER)
def test_fine_tuning_to_another_number_of_classes_replaces_the_head_and_only_the_head(name, trained):
    path, model, _ = trained
    if "num_classes" not in inspect.signature(type(model)).parameters:
        pytest.skip("it has no classes")
    arguments = {k: v for k, v in read_checkpoint(path)["zoo"]["arguments"].items() if k != "class_names"}
    classes = model.hparams.num_classes + 2
    started = type(model)(**arguments | {"num_classes": classes}, weights=str(path))
    before = model.state_dict()
    others = {key: value for key, value in started.state_dict().items() if not key.startswith("head.")}
    assert all(torch.equal(value, before[key]) for key, value in others.items())
    more = [len(value) - len(before[f"head.{key}"]) for key, value in started.head.state_dict().items() if value.ndim]
    assert max(more) >= 2, "two more classes have rows of their own"
    assert all(rows % 2 == 0 for rows in more)
    again = type(model)(**arguments, weights=str(path))
    assert same_weights(again, model), "the head of as many classes is kept"


@each(*LARGER)
def test_it_trains_in_a_plain_trainer_with_a_foreign_loader(name):
    model, data = build(name)
    control = task_of(name) == "control"  # it learns from experience and is evaluated by the returns of episodes
    batch = next(iter(data.train_dataloader())) if control else first_batch(data)
    loader = torch.utils.data.DataLoader([batch], batch_size=None)
    played = {"returns": torch.tensor([1.0, 3.0]), "lengths": torch.tensor([1, 3])}
    evaluation = torch.utils.data.DataLoader([played], batch_size=None) if control else loader
    Trainer(**QUIET, max_epochs=2, enable_checkpointing=False).fit(
        type(model)(**describe(model)["arguments"]), loader, evaluation
    )


@each(*LARGE)
def test_bf16_autocast_gives_a_finite_loss(name):
    losses = Losses()
    collected_whole = task_of(name) == "control" and name != "DQN"  # a batch is what the policy has just done
    model, data = build(name, *([] if collected_whole else of_data(["batch_size 8"])))
    fit(model, data, [losses], max_steps=1, limit_val_batches=0, precision="bf16-mixed")
    assert math.isfinite(losses.values[0])


@each(*LARGER)
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_batch(name):
    model, data = build(name)
    with torch.no_grad():
        next(iter((model.head if hasattr(model, "head") else model).parameters())).fill_(torch.nan)
    with pytest.raises(NonFiniteLossError, match=r"epoch 0, batch 0 \(training samples \["):
        fit(model, data, [StopOnNonFiniteLoss()])


@each(*LARGER)
def test_predict_writes_what_a_person_can_look_at(name, trained, tmp_path):
    path, _, _ = trained
    assert main(["predict", f"{folder_of(name)}/embedded", "--ckpt_path", str(path), *small(name)]) == 0
    run = tmp_path / "runs" / folder_of(name) / "embedded" / "version_0"
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert rows
    with Image.open(run / "predictions.png") as picture:
        assert min(picture.size) > 200
        assert len(set(picture.convert("L").tobytes())) > 20, "an empty picture"


@each("Pix2Mesh", *LARGE)
def test_it_exports_and_gives_the_same_outputs(name, trained, tmp_path):
    path, model, data = trained
    images = example(model, data, 5)
    program = torch.export.load(export(path, "pt2", tmp_path / "model.pt2"))
    torch.testing.assert_close(program.module()(images), model(images), rtol=1e-5, atol=1e-5)


@each("Pix2Mesh", *LARGE)
def test_it_exports_to_onnx_and_gives_the_same_outputs(name, trained, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    path, model, data = trained
    images = example(model, data, 5)
    session = runtime.InferenceSession(
        export(path, "onnx", tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(images), rtol=1e-4, atol=1e-5)


def as_numpys(value):
    """A value as numpy has it: numbers, texts, and arrays where its entries are of one kind."""
    if isinstance(value, list | tuple) and value and len({type(entry) for entry in value}) == 1:
        return np.asarray(value)
    return np.asarray(value)[()] if isinstance(value, bool | int | float | str) else value


@each(*LARGER)
def test_numpys_values_are_plain_ones_in_its_checkpoint(name, tmp_path):
    """Else the file is refused when the training is over."""
    model, _ = build(name)
    arguments = describe(model)["arguments"]
    given = {key: as_numpys(value) for key, value in arguments.items()}
    assert given.keys() == arguments.keys()
    other = type(model)(**given)
    trainer = Trainer(**QUIET, plugins=[SafeCheckpointIO()])
    trainer.strategy.connect(other)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    found = torch.load(tmp_path / "model.ckpt", weights_only=True)["hyper_parameters"]
    assert json.loads(json.dumps({key: found[key] for key in arguments})) == json.loads(json.dumps(arguments))
    assert describe(other) == describe(model)
    assert same_weights(zoo.load(tmp_path / "model.ckpt"), other)
    zoo.save(other, tmp_path / "model.safetensors")
    assert same_weights(zoo.load(tmp_path / "model.safetensors"), other)


ONE_VALUE = r"^a batch of 1 sample .* batch norm: .*samples: 1, processes: 1.*$"
TOO_FEW = {  # the largest training set that is refused, and with which words
    "DCGAN": (1, ONE_VALUE),
    "GoogLeNet": (1, ONE_VALUE),
    "KNearestNeighbors": (4, "^[12] training images are too few for 5 folds$"),
}


@pytest.mark.parametrize("samples", ["1", "2", "batch + 1"])
@each(*LARGER, "Pix2Mesh", "TwoStageDetector")
def test_the_smallest_training_sets_are_trained_on_or_refused_in_a_line(name, samples):
    model, data = build(name)
    data.prepare_data()
    data.setup("fit")
    count = data.batch_size + 1 if samples == "batch + 1" else int(samples)
    data.train_set = shortened(data.train_set, count)
    options = {"max_epochs": 1, "limit_val_batches": 0}
    most, message = TOO_FEW.get(name, (0, ""))
    if count <= most:
        with pytest.raises(ValueError, match=message):
            fit(model, data, [LookAtSamples()], **options)
    else:
        assert fit(model, data, [LookAtSamples()], **options).global_step >= 1


def tensors_in(content) -> list[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        return [content]
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, list | tuple) else []
    return [tensor for part in parts for tensor in tensors_in(part)]


EXPERIENCE = "GymDataModule"  # where a checkpoint has what a policy learns from


@each(*LARGE)
def test_a_checkpoint_is_weights_and_optimizer_and_little_else(name, trained):
    path, _, _ = trained
    content = torch.load(path, weights_only=True)
    assert len(json.dumps(content["hyper_parameters"])) < 100_000
    wanted = [content["state_dict"], content["optimizer_states"], content.get(EXPERIENCE)]
    assert path.stat().st_size <= 1.05 * sum(t.numel() * t.element_size() for t in tensors_in(wanted)) + 65_536
