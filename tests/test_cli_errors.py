"""Wrong commands as users type them: one readable line, status 2, and nothing written anywhere."""

import os
import pickle
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from zoo.cli import main
from zoo.tasks.classification import ClassificationTask

RECIPE = """\
expect:
  - metric: test/accuracy
    at_least: 0.9
    source: this test
seed_everything: 0
model:
  class_path: zoo.LeNet
  init_args:
    optimizer:
      class_path: torch.optim.Adam
      init_args:
        lr: 1.0e-3
    scheduler:
      class_path: torch.optim.lr_scheduler.CosineAnnealingLR
data:
  class_path: datamodules.DigitsDataModule
  init_args:
    batch_size: 64
trainer:
  max_epochs: 1
"""


def without(key: str) -> str:
    return yaml.safe_dump({k: v for k, v in yaml.safe_load(RECIPE).items() if k != key}, sort_keys=False)


CALLBACK = "trainer:\n  callbacks:\n  - class_path: "
YAML_FILES = {
    "good": RECIPE,
    "overlay": "trainer:\n  accumulate_grad_batch: 2\n",
    "empty": "",
    "comment": "# nothing but a comment\n",
    "broken": "model:\n  class_path: [zoo.LeNet\ndata: 3\n",
    "tabs": "model:\n\tclass_path: zoo.LeNet\n",
    "members": "recipes: 3\n",
    "list": "- model\n- data\n",
    "text": "hello\n",
    "no_model": without("model"),
    "no_data": without("data"),
    "no_expect": without("expect"),
    # a misspelt or wrong part in place of the right one
    "zoo_class": RECIPE.replace("zoo.LeNet", "zoo.LeNett"),
    "module_class": RECIPE.replace("zoo.LeNet", "zoo.lenet.LeNt"),
    "no_module": RECIPE.replace("zoo.LeNet", "nosuch.Module"),
    "no_lightning": RECIPE.replace("zoo.LeNet", "torch.nn.Linear"),
    "class_is_number": RECIPE.replace("zoo.LeNet", "3"),
    "data_class": RECIPE.replace("DigitsDataModule", "DigitDataModule"),
    "data_is_model": RECIPE.replace("datamodules.DigitsDataModule", "zoo.LeNet"),
    "optimizer_class": RECIPE.replace("optim.Adam", "optim.Adm"),
    "scheduler_class": RECIPE.replace("CosineAnnealingLR", "CosineAnealingLR"),
    "callback_class": RECIPE.replace("trainer:\n", CALLBACK + "EarlyStoping\n"),
    "callback_key": RECIPE.replace("trainer:\n", CALLBACK + "EarlyStopping\n    init_args: {monitr: val/loss}\n"),
    "top_key": RECIPE.replace("trainer:", "trainr:"),
    "seed_key": RECIPE.replace("seed_everything", "seed"),
    "optimizer_at_top": RECIPE + "optimizer: adam\n",
    "trainer_key": RECIPE.replace("max_epochs", "max_epoch"),
    "trainer_value": RECIPE.replace("max_epochs: 1", "max_epochs: three"),
    "trainer_is_number": RECIPE.replace("trainer:\n  max_epochs: 1", "trainer: 3"),
    "data_key": RECIPE.replace("batch_size", "batchsize"),
    "data_value": RECIPE.replace("batch_size: 64", "batch_size: x"),
    "class_path_key": RECIPE.replace("class_path: zoo", "class_pat: zoo"),
    "init_args_key": RECIPE.replace("zoo.LeNet\n  init_args", "zoo.LeNet\n  init_arg"),
    "model_key": RECIPE.replace("    optimizer:", "    labelsmoothing: 0.1\n    optimizer:"),
    "linked_key": RECIPE.replace("    optimizer:", "    num_classes: 3\n    optimizer:"),
    "folder": RECIPE.replace("DigitsDataModule", "ImageFolderDataModule").replace("batch_size: 64", "root: nowhere"),
    "rate_key": RECIPE.replace("lr:", "learning_rate:"),
    "rate_value": RECIPE.replace("1.0e-3", "fast"),
    "model_is_number": without("model") + "model: 3\n",
    "expect_is_number": without("expect") + "expect: 3\n",
    "claim_key": RECIPE.replace("at_least", "atleast"),
    "claim_value": RECIPE.replace("0.9", "high"),
    "claim_without_source": RECIPE.replace("    source: this test\n", ""),
}


class Malice:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch marker",)


@pytest.fixture(autouse=True)
def _files(tmp_path, _own_folder):
    for name, text in YAML_FILES.items():
        Path(f"{name}.yaml").write_text(text, encoding="utf-8")
    Path("binary.yaml").write_bytes(bytes(range(256)))
    Path("folder.ckpt").mkdir()
    Path("text.ckpt").write_text("no checkpoint\n" * 10)
    Path("empty.ckpt").touch()
    torch.save({"weights": torch.zeros(1000)}, "state_dict.ckpt")
    Path("cut.ckpt").write_bytes(Path("state_dict.ckpt").read_bytes()[:1500])
    torch.save([1, 2], "list.ckpt")
    torch.save({"state_dict": {}, "more": Malice()}, "evil.ckpt")
    Path("evil.pkl").write_bytes(pickle.dumps(Malice()))
    save_file({"backbone.conv1.weight": torch.zeros(2, 2)}, "shapes.safetensors")
    Path("junk.safetensors").write_bytes(b"junk")


def every_file() -> dict[Path, tuple[int, bytes]]:
    """When each file was written last, and what is in it."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in Path().rglob("*")}


def fit(*overrides: str) -> list[tuple[str, list[str]]]:
    """Pairs of an override of ``fit good.yaml`` and words of the answer, ``|`` between."""
    pairs = (override.split(" => ") for override in overrides)
    return [(f"fit good.yaml {override}", answer.split(" | ")) for override, answer in pairs]


COMMANDS = [
    ("fti", ["no command 'fti'", "did you mean fit?"]),
    ("frobnicate", ["no command", "reproduce"]),
    ("fit", ["zoo fit needs a recipe", "lenet/mnist"]),
    ("fit --trainer.max_epochs 3", ["zoo fit needs a recipe first"]),
    ("fit lenet/mnst", ["no recipe or file 'lenet/mnst'", "did you mean lenet/mnist"]),
    ("fit no/such.yaml", ["no recipe or file 'no/such.yaml'"]),
    ("fit folder.ckpt", ["no recipe or file 'folder.ckpt'"]),
    ("fit ''", ["no recipe or file ''"]),
    ("list --jso", ["zoo list", "--jso", "did you mean --json?"]),
    ("list lenet", ["zoo list", "lenet"]),
    ("show", ["zoo show", "architecture"]),
    ("show lenett", ["no architecture 'lenett'", "did you mean lenet"]),
    ("show lenet --input 3x", ["--input", "'3x'", "3x224x224"]),
    ("show lenet --input 3x28x28 --in_channels 1", ["does not take 3x28x28", "in_channels"]),
    ("show lenet --inpt 1x28x28", ["--inpt", "did you mean --input?"]),
    ("show lenet --image_size two", ["--image_size", "int", "'two'"]),
    ("show lenet --image_size", ["--image_size", "expected one argument"]),
    ("show lenet --image_size 2", ["image_size=2", "at least 4"]),
    ("reproduce", ["zoo reproduce", "RECIPE"]),
    ("reproduce good.yaml lenet/mnits", ["'lenet/mnits'", "did you mean lenet/mnist"]),
    ("reproduce good.yaml trainer_key.yaml", ["trainer_key.yaml, line 20", "trainer.max_epochs"]),
    ("reproduce good.yaml no_expect.yaml", ["no_expect.yaml", "`expect`"]),
    ("reproduce good.yaml --trainer.max_epoch 1", ["--trainer.max_epoch", "trainer.max_epochs"]),
    ("reproduce good.yaml --out", ["--out", "expected one argument"]),
    ("reproduce lectur", ["no recipe, list or file 'lectur'", "did you mean lecture or"]),
    ("reproduce members.yaml", ["members.yaml, line 1", "recipes must be a list of names"]),
    ("reproduce good.yaml x=3 --trainer.max_epochs 1", ["no recipe, list or file 'x=3'"]),
    ("fit lecture", ["lecture is a list of recipes", "zoo reproduce lecture"]),
    ("check", ["zoo check", "RECIPE"]),
    ("check lenet/mnst", ["no recipe or file 'lenet/mnst'", "did you mean lenet/mnist"]),
    ("check good.yaml --steps 0", ["--steps", "'0'"]),
    ("check good.yaml 3", ["'3' is no override"]),
    ("check good.yaml --trainer.max_epoch 1", ["--trainer.max_epoch", "trainer.max_epochs"]),
    ("find_lr", ["zoo find_lr", "RECIPE"]),
    ("search good.yaml", ["zoo search", "--over"]),
    ("test good.yaml --ensemble", ["--ensemble", "expected at least one argument"]),
    ("test good.yaml --ensemble text.ckpt empty.ckpt", ["text.ckpt"]),
    ("fit good.yaml --test_time_augmentation twist", ["--test_time_augmentation", "'flip'", "'twist'"]),
    ("predict text.ckpt", ["zoo predict", "PICTURE"]),
    ("predict evil.ckpt good.yaml", ["evil.ckpt is refused"]),
    ("export", ["zoo export", "checkpoint", "--format"]),
    ("export no.ckpt --format pt2", ["no.ckpt"]),
    ("export state_dict.ckpt --format onx", ["--format", "'onx'", "onnx"]),
    ("export state_dict.ckpt --formt onnx", ["--formt", "did you mean --format"]),
    ("export state_dict.ckpt --format pt2", ["state_dict.ckpt", "zoo.LeNet"]),
    ("export text.ckpt --format pt2", ["text.ckpt"]),
    ("export evil.ckpt --format pt2", ["evil.ckpt is refused"]),
    ("test good.yaml", ["learnt nothing", "--ckpt_path best", "--model.init_args.weights"]),
    ("test good.yaml --ckpt_path best", ["no run with a best.ckpt", "zoo fit good"]),
    ("predict good.yaml --ckpt last", ["--ckpt ", "did you mean ckpt_path?"]),
    ("check-data", ["zoo check-data", "RECIPE"]),
    ("check-dat good.yaml", ["no command 'check-dat'", "did you mean check-data"]),
    ("check-data lenet/mnst", ["no recipe or file 'lenet/mnst'", "did you mean lenet/mnist"]),
    ("check-data broken.yaml", ["broken.yaml, line 3", "no YAML"]),
    ("check-data good.yaml --data.init_args.batchsize 3", ["batchsize is no key", "did you mean batch_size"]),
    ("check-data good.yaml --ckpt_path best", ["leave --ckpt_path out"]),
    ("check-data folder.yaml", ["there is no folder", "nowhere", "expected <root>/<class>"]),
    ("explain", ["zoo explain", "MODEL"]),
    ("explain text.ckpt", ["zoo explain", "PICTURE"]),
    ("explain text.ckpt binary.yaml", ["text.ckpt is refused"]),
    ("explain lenett saliency binary.yaml", ["no architecture or checkpoint 'lenett'", "did you mean lenet"]),
    ("explain resnet salency binary.yaml", ["no method and no picture 'salency'", "did you mean saliency?"]),
    ("explain text.ckpt saliency binary.yaml --stps 3", ["--stps", "did you mean --steps?"]),
    ("explain text.ckpt saliency binary.yaml --steps 0", ["--steps", "'0'"]),
    ("probe", ["zoo probe", "RECIPE"]),
    ("probe good.yaml --cahe x", ["--cahe", "did you mean --cache?"]),
    ("probe lenet/mnst", ["no recipe or file 'lenet/mnst'", "did you mean lenet/mnist"]),
    ("reproduce good.yaml --resum", ["--resum", "did you mean --resume?"]),
    ("find_lr good.yaml --min_lr fast", ["--min_lr", "'fast'"]),
    ("find_lr good.yaml --min_lr 1 --max_lr 0.1", ["--min_lr 1", "below --max_lr 0.1"]),
    ("search good.yaml --over model.lr", ["--over 'model.lr'", "KEY=LOW..HIGH"]),
    ("search good.yaml --over model.init_args.nothere=1,2", ["model.init_args.nothere is no key"]),
    ("search good.yaml --over seed_everything=1,2 --method bayes", ["--method", "'bayes'", "grid"]),
    ("show resnet --depth 19", ["no ResNet of depth 19", "18"]),
    ("predict no.ckpt binary.yaml", ["no weights file no.ckpt"]),
    ("predict text.ckpt binary.yaml --device gpu", ["--device", "'gpu'", "cuda"]),
]
RECIPES = [
    ("empty", ["holds nothing", "expected a mapping"]),
    ("comment", ["holds nothing"]),
    ("broken", ["broken.yaml, line 3", "no YAML"]),
    ("tabs", ["tabs.yaml, line 2", "no YAML"]),
    ("list", ["holds a list", "expected a mapping"]),
    ("text", ["holds a str"]),
    ("binary", ["not readable as YAML"]),
    ("no_model", ["no_model.yaml: model is missing", "a class of zoo"]),
    ("no_data", ["no_data.yaml: data is missing", "a class of datamodules"]),
    ("zoo_class", ["line 6", "zoo.LeNett", "did you mean zoo.LeNet"]),
    ("module_class", ["line 6", "zoo.lenet.LeNt", "did you mean zoo.LeNet"]),
    ("no_module", ["line 6", "nosuch.Module", "No module named 'nosuch'", "zoo.LeNet"]),
    ("no_lightning", ["line 6", "torch.nn.Linear", "no LightningModule", "zoo."]),
    ("class_is_number", ["line 6: model must have class_path"]),
    ("data_class", ["line 15", "DigitDataModule", "did you mean datamodules.DigitsDataModule"]),
    ("data_is_model", ["line 15", "zoo.LeNet", "no LightningDataModule", "datamodules.DigitsDataModule"]),
    ("optimizer_class", ["line 9: model.init_args.optimizer", "torch.optim.Adm", "did you mean torch.optim.Adam"]),
    ("scheduler_class", ["line 13: model.init_args.scheduler", "lr_scheduler.CosineAnnealingLR"]),
    ("callback_class", ["line 20: trainer.callbacks", "did you mean lightning.pytorch.callbacks.EarlyStopping?"]),
    ("callback_key", ["line 22: trainer.callbacks.init_args.monitr", "did you mean monitor?"]),
    ("top_key", ["line 20: trainr.max_epochs", "did you mean trainer.max_epochs"]),
    ("seed_key", ["line 5: seed is no key", "did you mean seed_everything?"]),
    ("optimizer_at_top", ["line 21: optimizer is no key", "did you mean model.init_args.optimizer?"]),
    ("trainer_key", ["line 20: trainer.max_epoch is no key", "did you mean trainer.max_epochs"]),
    ("trainer_value", ["line 20: trainer.max_epochs must be int or null, not 'three'"]),
    ("trainer_is_number", ["line 19: trainer", "no single value"]),
    ("data_key", ["line 18: data.init_args.batchsize is no key", "did you mean batch_size"]),
    ("data_value", ["line 18: data.init_args.batch_size must be int, not 'x'"]),
    ("class_path_key", ["line 6: model must have class_path", "'class_pat'"]),
    ("init_args_key", ["line 8: model", "init_arg is no key", "did you mean init_args?"]),
    ("model_key", ["line 9: model.init_args.labelsmoothing is no key", "did you mean label_smoothing?"]),
    ("linked_key", ["line 9: model.init_args.num_classes comes from the data"]),
    ("rate_key", ["line 12: model.init_args.optimizer.init_args.learning_rate is no key", " lr,"]),
    ("rate_value", ["line 12: model.init_args.optimizer.init_args.lr must be float, not 'fast'"]),
    ("model_is_number", ["line 12: model must have class_path", "not 3"]),
    ("expect_is_number", ["expect must be list, not '3'"]),
    ("claim_key", ["line 1: expect", "'atleast'", "did you mean at_least?"]),
    ("claim_value", ["line 1: expect must have a number as at_least, not 'high'"]),
    ("claim_without_source", ["line 1: expect needs metric, source"]),
]
OVERRIDES = fit(
    "--trainer.max_epoch 3 => --trainer.max_epoch is no key | did you mean trainer.max_epochs",
    "--trainer.max_epochs three => --trainer.max_epochs must be int or null, not 'three'",
    "--trainer.max_epochs => --trainer.max_epochs needs a value",
    "--max_epochs 3 => --max_epochs is no key | did you mean trainer.max_epochs",
    "max_epochs=3 => 'max_epochs=3' is no override | did you mean --trainer.max_epochs",
    "--trainer x => --trainer | no single value",
    "--model.init_args.labelsmoothing 1 => --model.init_args.labelsmoothing is no key | did you mean label_smoothing?",
    "--model.init_args.num_classes 3 => --model.init_args.num_classes comes from the data",
    "--model.class_names=[a] => --model.init_args.class_names comes from the data",
    "--model.init_args.image_size 2 => image_size=2 | at least 4",
    "--model Perceptron => --model names Perceptron | zoo.",
    "--model.init_args.optimizer torch.optim.Adm => --model.init_args.optimizer | torch.optim.Adm | torch.optim.Adam",
    "--model.init_args.optimizer.class_path torch.nn.ReLU => --model.init_args.optimizer names torch.nn.ReLU",
    "--model.init_args.optimizer.init_args.learning_rate 1 => optimizer.init_args.learning_rate is no key |  lr,",
    "--optimiser.lr 1 => --optimiser.lr is no key | did you mean model.init_args.optimizer?",
    "--data MNIST => --data names MNIST | datamodules.MNISTDataModule",
    "--data.init_args.batchsize 3 => --data.init_args.batchsize is no key | did you mean batch_size",
    "--data.batch_size x => --data.init_args.batch_size must be int, not 'x'",
    "--data.init_args.batch_size 0 => batch_size=0 | positive",
    "--data.init_args.batch_size -1 => batch_size=-1 | positive",
    "--data.init_args.val_size 100000 => val_size=100000 | 1436",
    "--seed_everything abc => --seed_everything must be bool or int, not 'abc'",
    "--seed 1 => --seed is no key | did you mean seed_everything?",
    "--ckpt_path no.ckpt => 'no.ckpt' | best or last",
    "--ckpt_path folder.ckpt => 'folder.ckpt' | best or last",
    "--ckpt_path= => no checkpoint '' | best or last",
    "--ckpt_path => --ckpt_path needs a value",
    "--ckpt_path text.ckpt => text.ckpt",
    "--ckpt_path empty.ckpt => empty.ckpt | no checkpoint",
    "--ckpt_path cut.ckpt => cut.ckpt is truncated",
    "--ckpt_path list.ckpt => list.ckpt holds a list",
    "--ckpt_path state_dict.ckpt => state_dict.ckpt holds no model of the zoo | --model.init_args.weights",
    "--model.init_args.weights no.safetensors => no weights file no.safetensors",
    "--model.init_args.weights shapes.safetensors => shapes.safetensors does not fit LeNet | (2, 2) | (20, 1, 5, 5)",
    "--model.init_args.weights junk.safetensors => junk.safetensors is damaged",
    "--model.init_args.weights state_dict.ckpt => state_dict.ckpt does not fit LeNet",
    "--config => --config needs a value",
    "--config wndb => no overlay or file 'wndb' | did you mean wandb",
    "--config overlay.yaml => overlay.yaml, line 2 | did you mean trainer.accumulate_grad_batches",
    "-c broken.yaml => broken.yaml, line 3 | no YAML",
    "--trainer.accelerator gpux => gpux | cuda",
    "--trainer.accelerator tpu => accelerator tpu",
    "--trainer.accelerator cpu --trainer.devices 0 => accelerator cpu, devices 0",
    "--trainer.accelerator cpu --trainer.devices x => accelerator cpu, devices x",
    "--trainer.precision fp16 => --trainer.precision must be | 'bf16-mixed' | not 'fp16'",
    "--model.init_args.optimizer torch.nn.ReLU => torch.nn.ReLU, which is no Optimizer",
    "--trainer.callbacks Early => --trainer.callbacks names Early | EarlyStopping",
)


def refused(arguments: list[str], capsys) -> str:
    """Run a wrong command, hold it to what every wrong command owes, and return the error."""
    before = every_file()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert every_file() == before
    assert len(captured.err.splitlines()) <= 5
    assert not {"Traceback", "usage:"} & set(captured.err.split())
    (error,) = [line for line in captured.err.splitlines() if line.startswith("zoo: error: ")]
    assert len(error) < 1000
    return error


@pytest.mark.parametrize(("arguments", "expected"), COMMANDS + OVERRIDES)
def test_a_wrong_command_is_refused_in_one_line(arguments, expected, capsys):
    error = refused(shlex.split(arguments), capsys)
    assert [words for words in expected if words not in error] == [], error


@pytest.mark.parametrize(("name", "expected"), RECIPES)
def test_a_wrong_recipe_is_refused_with_its_file_and_key(name, expected, capsys):
    error = refused(["fit", f"{name}.yaml"], capsys)
    assert [words for words in [f"{name}.yaml", *expected] if words not in error] == [], error


@pytest.mark.parametrize("option", ["--ckpt_path", "--model.init_args.weights"])
@pytest.mark.parametrize("file", ["evil.ckpt", "evil.pkl"])
def test_a_malicious_file_is_refused_and_its_code_never_runs(file, option, capsys):
    assert f"{file} is refused" in refused(["test", "good.yaml", option, file], capsys)
    assert not Path("marker").exists()
    # The file is what it is said to be: read without care it does run.
    torch.load(file, weights_only=False) if file.endswith("ckpt") else pickle.loads(Path(file).read_bytes())
    assert Path("marker").exists()


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"optimizer": {"class_path": "marking.Boom", "init_args": {}}}, None),
        ({"scheduler": {"class_path": "marking.run"}}, None),
        ({"image_size": {"class_path": "marking.Boom"}}, "is refused: its argument 'image_size' is no number"),
        ({"class_names": [{"class_path": "marking.Boom"}]}, "is refused: its argument 'class_names' is no number"),
        (7, "does not say which class"),
        (None, "does not say which class"),
    ],
)
@pytest.mark.parametrize("command", ["test", "fit"])
def test_a_checkpoint_makes_no_module_be_imported(described, said, command, capsys, monkeypatch):
    """The module lies where ``python -m zoo`` would find it."""
    Path("marking.py").write_text("open('marker', 'w')")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    assert main(["fit", "good.yaml", "--trainer.max_steps", "2"]) == 0
    content = torch.load("runs/good/version_0/checkpoints/last.ckpt", weights_only=True)
    if isinstance(described, dict):
        content["zoo"]["arguments"] |= described
    elif described is None:
        content["zoo"] = {"x": 1}
    else:
        content["zoo"]["arguments"] = described
    torch.save(content, "imports.ckpt")
    asked = [command, "good.yaml", "--ckpt_path", "imports.ckpt"]
    capsys.readouterr()
    if said is None:  # such an argument of a file is left aside
        assert main(asked) == 0
    else:
        assert f"imports.ckpt {said}" in refused(asked, capsys)
    assert not Path("marker").exists()


@pytest.mark.parametrize(
    "command", ["list", "show", "reproduce", "check", "check-data", "find_lr", "search", "probe", "explain", "export"]
)
def test_help_is_no_error(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"usage: zoo {command}" in capsys.readouterr().out


def test_a_run_that_fails_after_its_start_is_status_one_and_keeps_its_files(monkeypatch, capsys):
    def fail(self, batch, batch_idx):
        raise ValueError("image 7 is damaged")

    monkeypatch.setattr(ClassificationTask, "training_step", fail)
    assert main(["fit", "good.yaml"]) == 1
    assert "zoo: error: image 7 is damaged" in capsys.readouterr().err
    assert Path("runs/good/version_0/config.yaml").is_file()


def test_a_bug_keeps_its_traceback(monkeypatch):
    def bug(self, batch, batch_idx):
        raise KeyError("labels")

    monkeypatch.setattr(ClassificationTask, "training_step", bug)
    with pytest.raises(KeyError):
        main(["fit", "good.yaml"])
