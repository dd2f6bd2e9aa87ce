"""Is the data of a recipe what it should be? All of it on request, before any training; the cheap part in each run."""

from importlib import import_module
from pathlib import Path
from typing import Any

from lightning import Callback, LightningDataModule, LightningModule, Trainer

from zoo import recipes
from zoo.recipes import RecipeError, refusing
from zoo.running.starting import hushed, name_of, quieten, with_overlays


class LookAtSamples(Callback):
    """Refuses to train on an empty split or on labels that are no class, as far as memory tells; opens no file.

    A data module of the zoo says what is wrong by ``check_samples(files=False)``; one without that is not looked at.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look at what the data module made ready.

        Raises:
            ValueError: Something is wrong; each thing is named.
        """
        look = getattr(trainer.datamodule, "check_samples", None)  # type: ignore[attr-defined]
        if stage == "fit" and look is not None and (wrong := look(files=False)):
            raise ValueError(f"{'; '.join(wrong)}. `zoo check-data` looks at the files too")


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
