"""torch.compile for the part of a module that costs the time."""

from lightning import Callback, LightningModule, Trainer
from torch.nn import Module


class Compile(Callback):
    """Compiles a module's ``backbone`` in place: names in checkpoints stay as they are.

    The first step of each kind (training, evaluation, another batch size) takes up to a minute and needs a compiler; it
    pays on GPUs from some thousand steps on. Losses differ from those without it by rounding, as operations are fused.

    Args:
        mode: As in ``torch.compile``: ``default``, ``reduce-overhead``, ``max-autotune``, ….
        backend: As in ``torch.compile``.
        dynamic: Compile once for all batch sizes (True), for each of them (False), or as torch sees fit (None).

    Raises:
        ValueError: The module has no ``backbone``.
    """

    def __init__(self, mode: str = "default", backend: str = "inductor", dynamic: bool | None = False) -> None:
        self.mode = mode
        self.backend = backend
        self.dynamic = dynamic

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Mark the backbone; it is compiled when the first batch arrives."""
        backbone = getattr(pl_module, "backbone", None)
        if not isinstance(backbone, Module):
            raise ValueError(f"Compile needs a module with a `backbone`: {type(pl_module).__name__} has none")
        # A mode is inductor's; other backends refuse the word, also for the mode that they have.
        mode = None if self.mode == "default" else self.mode
        backbone.compile(mode=mode, backend=self.backend, dynamic=self.dynamic)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was found."""
        pl_module.backbone._compiled_call_impl = None  # type: ignore[union-attr]
