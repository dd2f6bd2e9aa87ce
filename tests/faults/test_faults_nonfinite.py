"""A loss that is no number: the run stops, and its term and samples are named; such a metric is never the best."""

import re
from types import MethodType

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from small_runs import QUIET, build, trainer

from zoo.running.checkpoint import SafeCheckpointIO, checkpoint_callbacks, read_checkpoint
from zoo.running.nonfinite import NonFiniteLossError, StopOnNonFiniteLoss

pytestmark = pytest.mark.faults

BAD = 1  # the batch


def poison(model, function: str, term: str | None, value: float) -> None:
    """From the second call on what ``function`` gives, or one term of it, is no number."""
    right, calls = getattr(model, function), []

    def wrong(self, *given, **named):
        found = right(*given, **named)
        calls.append(1)
        if len(calls) <= BAD:
            return found
        if isinstance(found, tuple):
            return found[0] * value, *found[1:]
        if term is None:
            return found * value
        return found | {name: found[name] * value for name in (term, "loss") if name in found}

    setattr(model, function, MethodType(wrong, model))


@pytest.mark.parametrize(
    ("task", "function", "term", "said", "value"),
    [
        ("classification", "forward", None, "", torch.nan),
        ("captioning", "scores", None, "", torch.nan),
        ("video", "training_loss", None, "", torch.inf),
        ("detection", "losses", "loss_box", "loss_box", torch.inf),
        ("generation", "losses", "kl", "kl", torch.nan),
        ("adversarial", "discriminator_loss", None, "discriminator_loss", torch.nan),
        ("adversarial", "generator_loss", None, "generator_loss", torch.inf),
        ("mesh", "_terms", "edge", "edge_loss", torch.nan),
    ],
)
def test_the_term_and_the_samples_are_named(task, function, term, said, value):
    model, data = build(task)
    poison(model, function, term, value)
    run = trainer(callbacks=[StopOnNonFiniteLoss()], limit_val_batches=0, max_epochs=2)
    before = {}

    class Keep(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            before.update({name: value.clone() for name, value in pl_module.state_dict().items()})

    run.callbacks.append(Keep())
    with pytest.raises(NonFiniteLossError, match=f"epoch 0, batch {BAD} ") as caught:
        run.fit(model, data)
    named = re.search(r"the training loss(?: \((.*?)\))? is not", str(caught.value))[1] or ""
    assert named == said
    indices = run.train_dataloader.batch_sampler.indices(BAD)
    assert len(indices) > 1
    assert f"(training samples {indices})" in str(caught.value)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    if said != "generator_loss":  # the discriminator has stepped by then, on a loss that was good
        weights = dict(model.named_parameters())
        assert all(torch.equal(weights[name], before[name]) for name in weights)


class Measured(BoringModel):
    """Its validation metric is what the test says, epoch by epoch."""

    values: tuple[float, ...]

    def on_validation_epoch_end(self):
        self.log("val/accuracy", self.values[self.current_epoch])


@pytest.mark.parametrize("nothing", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_metric_that_is_no_number_is_never_the_best(tmp_path, mode, nothing):
    good = 0.5
    for values, best in (
        ((nothing, good, nothing), 2),  # the step of the epoch that is the best: two in each
        ((good, nothing, nothing), 1),
        ((nothing, nothing, nothing), None),
    ):
        folder = tmp_path / f"{values}"
        model = Measured()
        model.values = values
        callbacks, files = checkpoint_callbacks("val/accuracy", mode), SafeCheckpointIO()
        options = QUIET | {"enable_checkpointing": True}
        small = {"limit_train_batches": 1, "limit_val_batches": 1, "num_sanity_val_steps": 0, "max_epochs": 3}
        run = Trainer(**options, **small, default_root_dir=folder, callbacks=callbacks, plugins=[files])
        with pytest.warns(UserWarning, match="never the best"):
            run.fit(model)
        path = folder / "checkpoints" / "best.ckpt"
        assert (read_checkpoint(path)["global_step"] if path.exists() else None) == best
        assert read_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] == 3
