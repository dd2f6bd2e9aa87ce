"""What a checkpoint remembers of its run."""

from typing import Any

from lightning import Callback, LightningModule, Trainer


class Provenance(Callback):
    """Writes the recipe's name and the metrics known so far into every checkpoint.

    Args:
        recipe: Name of the recipe.
    """

    def __init__(self, recipe: str) -> None:
        self.recipe = recipe

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the two keys, as plain values."""
        checkpoint["recipe"] = self.recipe
        checkpoint["metrics"] = {name: float(value) for name, value in trainer.callback_metrics.items()}
