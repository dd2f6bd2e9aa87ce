"""Training two networks in Lightning, sampling, and what is said of failures."""

import math
import warnings

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.plugins import MixedPrecision
from torch import optim
from torch.nn import functional as F

import zoo
from zoo.running import generated_pictures
from zoo.running.averaging import EMA
from zoo.running.checkpoint import SafeCheckpointIO, checkpoint_callbacks
from zoo.running.resume import ExactResume
from zoo.tasks.generation_scores import GenerationScores

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def batches(count=4, size=6):
    generator = torch.Generator().manual_seed(5)
    return [(torch.rand(size, 1, 8, 8, generator=generator), torch.arange(size) % 10) for _ in range(count)]


def loader(count=4, size=6):
    return torch.utils.data.DataLoader(batches(count, size), batch_size=None)


def small(**arguments):
    torch.manual_seed(0)
    return zoo.GAN(image_size=8, code_size=4, **arguments)


def fit(model, data=None, callbacks=(), ckpt_path=None, **options):
    seed_everything(1, verbose=False)
    options = {"enable_checkpointing": False, "max_epochs": 1} | options
    trainer = Trainer(**QUIET, callbacks=[ExactResume(), *callbacks], **options)
    trainer.fit(model, data or loader(), ckpt_path=ckpt_path)
    return trainer


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


class Steps(Callback):
    """Of which network each optimizer step was."""

    def __init__(self):
        self.names = []

    def on_train_start(self, trainer, pl_module):
        for name, optimizer in zip(("discriminator", "generator"), trainer.optimizers, strict=True):
            optimizer.register_step_pre_hook(lambda *_, name=name: self.names.append(name))


def test_each_batch_is_a_step_of_either_network_and_one_of_the_run():
    steps, model = Steps(), small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = fit(model, callbacks=[steps], max_epochs=2)
    assert steps.names == ["discriminator", "generator"] * 8
    assert trainer.global_step == 8
    assert not any(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_max_steps_counts_batches():
    steps = Steps()
    assert fit(small(), callbacks=[steps], max_steps=3, max_epochs=-1).global_step == 3
    assert len(steps.names) == 6


def by_hand(model, window, codes, rate):
    """Two steps of gradient descent as the lecture writes them."""
    d, g = model.discriminator, model.generator
    real, fake = (torch.cat([images for images, _ in window]), torch.cat(codes[: len(window)]))
    loss = F.softplus(-d(real)).mean() + F.softplus(d(g(fake).detach())).mean()
    for parameter, gradient in zip(d.parameters(), torch.autograd.grad(loss, list(d.parameters())), strict=True):
        parameter.data -= rate * gradient
    fooling = F.softplus(-d(g(torch.cat(codes[len(window) :])))).mean()
    for parameter, gradient in zip(g.parameters(), torch.autograd.grad(fooling, list(g.parameters())), strict=True):
        parameter.data -= rate * gradient


@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_step_is_the_lectures_also_over_several_batches(accumulated, monkeypatch):
    """The discriminator first; the generator against the discriminator that has moved, on other codes."""
    model, other = small(optimizer=lambda params: optim.SGD(params, lr=0.5)), small()
    generator = torch.Generator().manual_seed(9)
    codes = [2 * torch.rand(6, 4, generator=generator) - 1 for _ in range(2 * accumulated)]
    drawn = iter(codes)
    monkeypatch.setattr(model, "draw_codes", lambda n: next(drawn))
    fit(model, loader(accumulated), accumulate_grad_batches=accumulated)
    by_hand(other, batches(accumulated), codes, 0.5)
    for (name, value), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, msg=name, rtol=1e-4, atol=1e-6)


def test_an_epoch_that_does_not_divide_ends_with_a_step_of_what_is_left():
    steps = Steps()
    assert fit(small(), loader(5), [steps], accumulate_grad_batches=2).global_step == 3


def moved(**options):
    """How far either network's weights move in a step of gradient descent at rate 1."""
    model = small(optimizer=lambda params: optim.SGD(params, lr=1.0))
    before = {name: value.clone() for name, value in model.named_parameters()}
    fit(model, loader(1), **options)
    steps = {name: value.detach() - before[name].detach() for name, value in model.named_parameters()}
    return [
        float(torch.cat([step.flatten() for name, step in steps.items() if name.startswith(network)]).norm())
        for network in ("discriminator", "generator")
    ]


def test_gradients_of_either_network_are_clipped():
    assert min(moved()) > 0.02
    assert moved(gradient_clip_val=0.02) == pytest.approx([0.02, 0.02], rel=1e-4)


def test_under_float16_gradients_are_clipped_after_their_scale_is_taken_out():
    """Lightning's own advice for optimizing by hand clips before, at a scale of 65,536 times too much."""

    def half():
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))

    assert moved(plugins=[half()]) == pytest.approx(moved(), rel=0.02)
    assert moved(plugins=[half()], gradient_clip_val=0.02) == pytest.approx([0.02, 0.02], rel=1e-3)


def test_a_module_can_be_fitted_twice_with_flags_of_the_trainer():
    model = small()
    for _ in range(2):
        assert fit(model, gradient_clip_val=1.0, accumulate_grad_batches=2).global_step == 2


def test_a_schedule_takes_as_many_steps_as_the_generator():
    rates = []

    class Rates(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            rates.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers])

    planned = []

    def linear(optimizer, steps):
        planned.append(steps)
        return optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)

    fit(small(optimizer=lambda params: optim.SGD(params, lr=1.0), scheduler=linear), callbacks=[Rates()])
    assert planned == [4, 4]
    assert rates == [pytest.approx([rate, rate]) for rate in (0.75, 0.5, 0.25, 0)]


class StopAfter(Callback):
    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.batch:
            trainer._signal_connector.received_sigterm = True


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("stop", [3, 4])
def test_stopped_between_two_accumulated_batches_and_resumed_it_ends_the_same(stop, ema, tmp_path):
    from datamodules import DigitsDataModule

    def run(folder, callbacks=(), ckpt_path=None):
        model = small()
        data = DigitsDataModule(image_size=8, batch_size=6, val_size=0)
        callbacks = [*([EMA(0.9)] if ema else []), *callbacks]
        options = {"limit_train_batches": 6, "max_epochs": 1, "accumulate_grad_batches": 2}
        seed_everything(1, verbose=False)
        keep = [*checkpoint_callbacks(None, "min"), ExactResume(), *callbacks]
        trainer = Trainer(**QUIET, callbacks=keep, plugins=[SafeCheckpointIO()], default_root_dir=folder, **options)
        try:
            trainer.fit(model, data, ckpt_path=ckpt_path)
        except BaseException as error:
            if "SIGTERM" not in type(error).__name__:
                raise
        return model

    straight = run(tmp_path / "a")
    stopped = run(tmp_path / "b", [StopAfter(stop)])
    assert not same_weights(stopped, straight)
    resumed = run(tmp_path / "c", ckpt_path=tmp_path / "b" / "checkpoints" / "last.ckpt")
    assert same_weights(resumed, straight)


def test_the_average_of_the_weights_is_what_generates_in_the_end():
    last, averaged = small(), small()
    fit(last)
    fit(averaged, callbacks=[EMA(0.5)])
    codes = torch.rand(3, 4)
    assert not torch.allclose(last.decode(codes), averaged.decode(codes))


def test_two_processes_train_one_network():
    """They see other pictures, average their gradients and end alike."""
    from datamodules import DigitsDataModule

    class Compare(Callback):
        def on_train_end(self, trainer, pl_module):
            state = torch.cat([value.flatten() for value in pl_module.state_dict().values()])
            others = trainer.strategy.all_gather(state)
            assert torch.equal(others[0], others[1])

    torch.manual_seed(0)
    model = zoo.DCGAN(conditional=True)
    before = {name: value.clone() for name, value in model.named_parameters()}
    data = DigitsDataModule(batch_size=8, val_size=8)
    trainer = Trainer(
        **QUIET, accelerator="cpu", strategy="ddp_fork", devices=2, max_epochs=1, limit_train_batches=2,
        limit_val_batches=1, callbacks=[Compare()], enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(model, data)
    assert not any(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_samples_are_those_of_their_seed_in_evaluation_mode():
    torch.manual_seed(0)
    model = zoo.DCGAN().train()
    images = model.sample(5, seed=3)
    assert images.shape == (5, 1, 28, 28)
    assert 0 <= images.min() <= images.max() <= 1
    assert model.training, "it is left as it was"
    assert torch.equal(images, model.sample(5, seed=3))
    assert not torch.equal(images, model.sample(5, seed=4))
    assert not torch.equal(model.sample(5), model.sample(5))
    torch.testing.assert_close(images[:2], model.sample(2, seed=3), rtol=1e-4, atol=1e-5)
    assert len(model.sample(0)) == 0


def test_labels_of_samples():
    model = zoo.VAE(conditional=True, num_classes=3, image_size=8)
    in_turn = model.sample(7, seed=0)
    assert torch.equal(in_turn, model.sample(7, labels=[0, 1, 2, 0, 1, 2, 0], seed=0))
    assert torch.equal(model.sample(2, labels=1, seed=0), model.sample(2, labels=torch.tensor([1, 1]), seed=0))
    for wrong in (3, -1, [0, 1], [0.5, 1.0, 1.0]):
        with pytest.raises(ValueError, match="labels must be one class, or 3, each from 0 to 2"):
            model.sample(3, labels=wrong)
    with pytest.raises(ValueError, match="it takes no labels"):
        small().sample(2, labels=[0, 1])


def test_a_discriminator_that_always_knows_is_told():
    model = small()
    model.draw_codes = lambda n, generator=None: torch.zeros(n, 4)
    white = torch.ones(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64)
    real = torch.utils.data.DataLoader([white] * 40, batch_size=None)

    class Frozen(Callback):
        def on_train_start(self, trainer, pl_module):
            for group in trainer.optimizers[1].param_groups:
                group["lr"] = 0.0

    with pytest.warns(UserWarning, match="discriminator tells real from generated pictures nearly always"):
        fit(model, real, [Frozen()], max_epochs=5)


def test_lost_classes_are_told(tmp_path):
    judge = zoo.LeNet(image_size=8)
    with torch.no_grad():
        judge.head.weight.zero_()
        judge.head.bias.copy_(torch.eye(10)[4])
    zoo.save(judge, tmp_path / "judge.safetensors")
    model = small(classifier=str(tmp_path / "judge.safetensors"))
    trainer = Trainer(**QUIET, enable_checkpointing=False)
    with pytest.warns(UserWarning, match="of 0, 1, 2, 3, 5, 6, 7, 8, 9 there are hardly any"):
        numbers = trainer.test(model, loader(), verbose=False)[0]
    assert numbers["test/samples"] == 24
    assert numbers["test/sample_classes"] == 1
    model._most_classes = 6
    with pytest.warns(UserWarning, match="of 6 classes that were generated 1 are left"):
        trainer.validate(model, loader(), verbose=False)


def test_without_a_classifier_its_numbers_are_left_out():
    trainer = Trainer(**QUIET, enable_checkpointing=False)
    assert trainer.test(small(), loader(), verbose=False) == [{"test/samples": 24.0}]
    assert small().monitor is None


def test_evaluation_is_the_same_each_time_and_for_the_best_generator_zero(tmp_path, monkeypatch):
    """A generator that gives the real pictures back has a distance of 0, full precision and recall."""
    zoo.save(zoo.LeNet(image_size=8), tmp_path / "judge.safetensors")
    model = small(classifier=str(tmp_path / "judge.safetensors"))
    trainer = Trainer(**QUIET, enable_checkpointing=False)
    numbers = [trainer.test(model, loader(), verbose=False)[0] for _ in range(2)]
    assert numbers[0] == numbers[1]
    real = iter([images for images, _ in batches()])
    monkeypatch.setattr(model, "decode", lambda codes, labels=None: next(real))
    perfect = trainer.test(model, loader(), verbose=False)[0]
    assert perfect["test/classifier_fid"] == pytest.approx(0, abs=1e-3 * numbers[0]["test/classifier_fid"] + 1e-4)
    assert perfect["test/sample_precision"] == perfect["test/sample_recall"] == 1


@pytest.mark.parametrize(("count", "doubted"), [(83, True), (84, False)])
def test_a_distance_of_no_more_pictures_than_features_is_marked(tmp_path, count, doubted):
    zoo.save(zoo.LeNet(image_size=8), tmp_path / "judge.safetensors")
    model = small(classifier=str(tmp_path / "judge.safetensors"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(**QUIET, enable_checkpointing=False).test(model, loader(count), verbose=False)
    said = [str(each.message) for each in caught if "classifier_fid" in str(each.message)]
    assert [*model.doubts] == ["test/classifier_fid"] * doubted
    assert len(said) == doubted
    assert all(f"unreliable: of {6 * count} pictures, which with 500 features" in each for each in said)


def test_of_many_sheets_a_bounded_number_is_kept_the_same_after_a_resume(monkeypatch):
    monkeypatch.setattr(generated_pictures, "FRAMES", 4)
    shown = []
    monkeypatch.setattr("zoo.tasks.generation.log_animation", lambda _, __, frames: shown.append([*map(int, frames)]))
    whole, before, after = small(), small(), small()
    for epoch in range(40):
        whole._animate(np.array(epoch))
        (before if epoch < 17 else after)._animate(np.array(epoch))
        if epoch == 16:
            checkpoint: dict = {}
            before.on_save_checkpoint(checkpoint)
            after.on_load_checkpoint(checkpoint)
        assert len(whole._frames) <= 4
        assert shown[-1] == [frame for frame in shown[-2] if frame >= 17 or epoch < 17]
    assert shown[6] == [0, 1, 2, 3]
    assert shown[-2] == [0, 16, 32, 39]
    assert shown[-1] == [32, 39]


def test_the_classifier_is_no_part_of_the_model(tmp_path):
    zoo.save(zoo.LeNet(image_size=8), tmp_path / "judge.safetensors")
    model = small(classifier=str(tmp_path / "judge.safetensors"))
    assert isinstance(model.val_scores, GenerationScores)
    assert set(model.state_dict()) == set(small().state_dict())
    zoo.save(model, tmp_path / "gan.safetensors")
    (tmp_path / "judge.safetensors").unlink()
    again = zoo.load(tmp_path / "gan.safetensors")
    assert torch.equal(again.sample(2, seed=0), model.sample(2, seed=0))


def test_a_wrong_code_is_refused():
    with pytest.raises(ValueError, match="code_size=0"):
        zoo.GAN(code_size=0)
    with pytest.raises(ValueError, match="2 class_names were given for num_classes=3"):
        zoo.VAE(conditional=True, num_classes=3, class_names=["a", "b"])


def test_the_losses_are_logged():
    logged = fit(small(loss="lsgan"), log_every_n_steps=1).callback_metrics
    assert all(math.isfinite(logged[f"train/{network}_loss"]) for network in ("discriminator", "generator"))
