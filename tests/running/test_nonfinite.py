"""A loss that is no number stops the run and names its batch."""

import pytest
import torch
from lightning import Trainer, seed_everything

import datamodules
from zoo import LeNet
from zoo.running.nonfinite import NonFiniteLossError, StopOnNonFiniteLoss


class Data(datamodules.DigitsDataModule):
    """One training picture in its third batch is not a number."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        images, labels = super().on_after_batch_transfer(batch, dataloader_idx)
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        if self.trainer.training and self.trainer.current_epoch == 1 and progress.current.ready == 2:
            images[3] = torch.nan
        return images, labels


def test_the_batch_and_its_samples_are_named_and_the_weights_stay_good():
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=3,
        limit_train_batches=4,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[StopOnNonFiniteLoss()],
    )
    model, data = LeNet(image_size=8), Data(image_size=8, batch_size=8)
    with pytest.raises(NonFiniteLossError, match="epoch 1, batch 2") as caught:
        trainer.fit(model, data)
    assert str(trainer.train_dataloader.batch_sampler.indices(2)) in str(caught.value)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert trainer.global_step == 6


def test_what_is_remembered_on_a_device_is_the_first_bad_batch_and_its_terms():
    class Run:
        current_epoch, train_dataloader = 2, None

    callback, nan, good = StopOnNonFiniteLoss(), torch.tensor(torch.nan), torch.tensor(1.0)
    callback._remember(3, {"": good, "box": good, "class": torch.tensor([1.0, 2.0])})
    callback._look(Run)
    callback._remember(4, {"": nan, "box": good, "class": torch.tensor([1.0, torch.inf])})
    callback._remember(5, {"": nan, "box": nan, "class": good})
    with pytest.raises(NonFiniteLossError, match=r"loss \(class\) is not finite at epoch 2, batch 4\."):
        callback._look(Run)
    callback._look(Run)
