"""What differs on a GPU; skipped without one."""

import pytest
import torch
from lightning import Trainer, seed_everything

import datamodules
from zoo import LeNet
from zoo.running.checkpoint import SafeCheckpointIO
from zoo.running.nonfinite import NonFiniteLossError, StopOnNonFiniteLoss
from zoo.running.resume import ExactResume

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


def model():
    return LeNet(scheduler=lambda optimizer, steps: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps))


def fit(module, callbacks=(), ckpt_path=None, **options):
    seed_everything(0, verbose=False)
    data = datamodules.DigitsDataModule(translate=2)
    plugins = [SafeCheckpointIO()]
    trainer = Trainer(
        **QUIET, accelerator="gpu", devices=1, callbacks=[ExactResume(), *callbacks], plugins=plugins, **options
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def test_data_is_held_on_the_device():
    trainer = fit(model(), max_steps=1)
    assert trainer.train_dataloader.tensors[0].device.type == "cuda"
    assert trainer.train_dataloader.tensors[0].dtype == torch.uint8


def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    straight = model()
    fit(straight, max_epochs=2, deterministic=True)

    from lightning import Callback

    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 25:
                trainer.save_checkpoint(tmp_path / "25.ckpt")

    fit(model(), [Save()], max_epochs=2, deterministic=True)
    resumed = model()
    fit(resumed, ckpt_path=tmp_path / "25.ckpt", max_epochs=2, deterministic=True)
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@pytest.mark.parametrize("batch", [0, 7])
def test_a_loss_that_is_no_number_stops_the_run_and_names_its_batch(batch):
    class Data(datamodules.DigitsDataModule):
        def on_after_batch_transfer(self, content, dataloader_idx):
            content = super().on_after_batch_transfer(content, dataloader_idx)
            if self.trainer.training and self.trainer.fit_loop.epoch_loop.batch_progress.current.ready == batch:
                content[0][0] = torch.nan
            return content

    seed_everything(0, verbose=False)
    trainer = Trainer(**QUIET, accelerator="gpu", devices=1, max_epochs=1, callbacks=[StopOnNonFiniteLoss()])
    with pytest.raises(NonFiniteLossError, match=f"epoch 0, batch {batch} "):
        trainer.fit(model(), Data())


def test_outputs_are_those_of_the_cpu():
    torch.manual_seed(0)
    module = model().eval()
    images = torch.rand(16, 1, 28, 28)
    expected = module(images)
    torch.testing.assert_close(module.cuda()(images.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)


def test_bf16_trains():
    trainer = fit(model(), max_epochs=2, precision="bf16-mixed")
    assert trainer.callback_metrics["val/accuracy"] > 0.3
