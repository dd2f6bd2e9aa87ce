"""Fine-tuning in two phases: first the head on frozen features, then everything at a fraction of the rate."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch.nn import Module, Parameter


class FreezeBackbone(Callback):
    """Freezes a module's ``backbone``; releases it at an epoch, at a tenth of the head's rate.

    Lecture 11, "Transfer learning": feature extraction first, then fine-tuning with about a tenth of the rate. Frozen
    means that no parameter and no buffer changes by a bit: no gradient, no weight decay, and the backbone in evaluation
    mode, so that its batch norms stand still and it drops nothing out. What of it is to be frozen follows from the
    epoch alone: a resumed run does not freeze again what was released (Lightning's ``BackboneFinetuning`` does,
    https://github.com/Lightning-AI/pytorch-lightning/issues/21901).

    The optimizer is built once and has the backbone in a group of its own
    (:func:`zoo.running.optimizing.configure_optimizers`), so that the backbone follows the schedule from its release
    on; its momentum starts there.

    Args:
        until_epoch: The first epoch, from 0, that trains the backbone; None never does.
        ratio: Its rate then, as a share of the head's.

    Raises:
        ValueError: A number is out of range, the module has no ``backbone``, or the strategy shards the model.
    """

    def __init__(self, until_epoch: int | None = None, ratio: float = 0.1) -> None:
        if until_epoch is not None and until_epoch < 0:
            raise ValueError(f"until_epoch={until_epoch} must be at least 0, or null to freeze for ever")
        if ratio <= 0:
            raise ValueError(f"ratio={ratio} must be above 0: the backbone's share of the head's learning rate")
        self.until_epoch = until_epoch
        self.ratio = ratio
        self.frozen = False
        self._parameters: list[Parameter] = []  # the backbone's, those that are trained when nothing is frozen
        self._modes: list[tuple[Module, bool]] = []  # the backbone's modules and whether each trained; itself first

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Freeze, before Lightning wraps the module for several processes and asks for its optimizer."""
        if stage != "fit":
            return
        backbone = getattr(pl_module, "backbone", None)
        if not isinstance(backbone, Module):
            raise ValueError(f"FreezeBackbone needs a module with a `backbone`: {type(pl_module).__name__} has none")
        if self.until_epoch is not None and not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ValueError(
                f"FreezeBackbone cannot release a backbone under {type(trainer.strategy).__name__}: use strategy ddp, "
                "or until_epoch null"
            )
        self._parameters = [p for p in backbone.parameters() if p.requires_grad]
        if not self._parameters and self.until_epoch is not None:
            raise ValueError(
                f"FreezeBackbone(until_epoch={self.until_epoch}) has nothing to release: no parameter of the backbone "
                f"of {type(pl_module).__name__} is trained (frozen_backbone false, where there is such an argument)"
            )
        self._modes = [(module, module.training) for module in backbone.modules()]
        self.frozen = self.until_epoch != 0
        if self.frozen:
            backbone.requires_grad_(False)

    def parameter_groups(self, module: LightningModule) -> list[dict[str, Any]]:
        """The optimizer's groups: the backbone, if ever trained, with its ``ratio`` of the rate, and the rest."""
        ours = {id(p) for p in self._parameters}
        rest = [p for p in module.parameters() if p.requires_grad and id(p) not in ours]
        groups: list[dict[str, Any]] = [{"params": rest, "name": "head"}]
        if self.until_epoch is not None:
            groups.insert(0, {"params": self._parameters, "name": "backbone", "ratio": self.ratio})
        return groups

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse an optimizer that would train the backbone at the head's rate, or not at all."""
        names = [group.get("name") for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if self.until_epoch is not None and "backbone" not in names:
            raise ValueError(
                f"FreezeBackbone(until_epoch={self.until_epoch}): the optimizer of {type(pl_module).__name__} has no "
                "group for the backbone; build it with zoo.running.optimizing.configure_optimizers"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Release what a resumed run had released, and say when the rest will be."""
        self._release_if_due(trainer)
        if self.frozen:
            self._modes[0][0].eval()
        if self.frozen and self.until_epoch is not None:
            rank_zero_info(f"the backbone is trained after {self.until_epoch} epochs, at {self.ratio:g} of the rate")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Release the backbone when its epoch has come."""
        if self._release_if_due(trainer):
            rank_zero_info(f"the backbone is trained from here on, at {self.ratio:g} of the rate")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Undo a ``model.train()`` that somebody called."""
        if self.frozen and self._modes[0][0].training:
            self._modes[0][0].eval()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        if self.frozen:
            self._thaw()

    def _release_if_due(self, trainer: Trainer) -> bool:
        if not self.frozen or self.until_epoch is None or trainer.current_epoch < self.until_epoch:
            return False
        self._thaw()
        strategy: Any = trainer.strategy
        if isinstance(strategy, DDPStrategy):
            # DDP averages the gradients of those parameters only that wanted one when it was made: make it again.
            strategy.model = trainer.lightning_module
            strategy.configure_ddp()
        return True

    def _thaw(self) -> None:
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        for module, training in self._modes:
            module.training = training
        self.frozen = False
