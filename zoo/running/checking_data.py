"""Is the data of a recipe what it should be? All of it on request, before any training; the cheap part in each run."""

from collections.abc import Sized
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zoo import recipes
from zoo.recipes import RecipeError, refusing
from zoo.running.starting import hushed, name_of, quieten, with_overlays


class LookAtSamples(Callback):
    """Refuses to train on an empty split or on labels that are no class, as far as memory tells; opens no file.

    A data module of the zoo says what is wrong by ``check_samples(files=False)``; one without that is not looked at.
    A batch of a single sample is refused where it leaves a batch norm one value of each channel, not where it has many
    positions in a picture.
    """

    def __init__(self) -> None:
        self._hooks: list[RemovableHandle] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look at what the data module made ready.

        Raises:
            ValueError: Something is wrong; each thing is named.
        """
        look = getattr(trainer.datamodule, "check_samples", None)  # type: ignore[attr-defined]
        if stage == "fit" and look is not None and (wrong := look(files=False)):
            raise ValueError(f"{'; '.join(wrong)}. `zoo check-data` looks at the files too")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what batch norms are given, where batches can be so small; which that is depends on the pictures."""
        samples, least = _samples_and_least_batch(trainer)
        for name, module in pl_module.named_modules() if least == 1 else []:
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                refuse = partial(_refuse_single_values, name, samples, trainer.world_size)
                self._hooks.append(module.register_forward_pre_hook(refuse))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _samples_and_least_batch(trainer: Trainer) -> tuple[int, int]:
    """Training samples of all processes, and samples of this process's smallest batch; 0 where they are not known."""
    loader: Any = trainer.train_dataloader
    sampler = getattr(loader, "batch_sampler", None)
    if sampler is not None and hasattr(sampler, "world_size"):
        # It counts the samples of all processes, and leaves out what fills no batch.
        return sampler.size, sampler.batch_size // sampler.world_size
    size, samples = getattr(loader, "batch_size", None), getattr(loader, "sampler", None)
    if size is None or not isinstance(samples, Sized):
        return 0, 0
    rest = 0 if getattr(loader, "drop_last", False) else len(samples) % size
    return len(samples) * trainer.world_size, rest or size


def _refuse_single_values(name: str, samples: int, processes: int, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Raise what torch is about to raise, with what there is to do."""
    if norm.training and inputs[0].numel() == inputs[0].shape[1]:
        raise ValueError(
            f"a batch of 1 sample is too small for batch norm: {name} gets one value of each channel, which has no "
            f"variance (training samples: {samples}, processes: {processes}). Train on at least 2 samples of each "
            "process (--data.init_args.train_size, --data.init_args.batch_size), on fewer processes, or on larger "
            "pictures"
        )


def check_data(recipe: str, overrides: list[str]) -> int:
    """Look at all samples of a recipe's data and print what is wrong, a line for each kind of thing.

    Args:
        recipe: A name of ``zoo list``, or a YAML file.
        overrides: Keys of the recipe.

    Returns:
        1 if something is wrong, else 0.

    Raises:
        RecipeError: The recipe or an override cannot be meant, or its data cannot be found.
    """
    data = data_of(recipe, overrides)
    name = type(data).__name__
    look = getattr(data, "check_samples", None)
    if look is None:
        print(f"{name} has no samples that could be looked at before training: they are made while it runs")
        return 0
    with hushed():
        with refusing():
            data.prepare_data()
        wrong = look(files=True)
    for line in wrong:
        print(f"wrong: {line}")
    if not wrong:
        print(f"{name}: nothing wrong was found")
    return 1 if wrong else 0


def data_of(recipe: str, overrides: list[str]) -> LightningDataModule:
    """The data module of a recipe, without its model; entries that make no sense are noted, not refused.

    Raises:
        RecipeError: The recipe or an override cannot be meant, or its data cannot be found.
    """
    if any(override.split("=")[0] == "--ckpt_path" for override in overrides):
        raise RecipeError("zoo check-data looks at data alone: leave --ckpt_path out")
    path = recipes.find(recipe)
    recipes.read(path)  # its own error for broken YAML
    from zoo.running.command import RecipeCLI

    class DataCLI(RecipeCLI):
        def instantiate_classes(self) -> None:
            config = self.config[self.asked].data
            module, name = config.class_path.rsplit(".", 1)
            arguments: dict[str, Any] = vars(config.get("init_args")).copy() if config.get("init_args") else {}
            if "corrupt" in arguments:
                arguments["corrupt"] = "skip"
            with refusing():
                self.datamodule = getattr(import_module(module), name)(**arguments)

    quieten()
    with hushed():
        arguments = ["fit", "--config", str(path), *with_overlays(overrides)]
        return DataCLI(arguments, name_of(recipe), trial=Path("unused")).datamodule
