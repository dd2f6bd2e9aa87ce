"""The assignment's variational autoencoder."""

import pytest
import torch
from lightning import Trainer
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

from zoo import VAE
from zoo.vae import lower_bound


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_parameters_are_the_assignments():
    assert parameters(VAE()) == 1_288_414
    assert parameters(VAE(conditional=True)) == 1_296_414


def test_the_bound_is_that_of_torchs_distributions_in_float64():
    generator = torch.Generator().manual_seed(0)
    logits, images = torch.randn(2, 5, 1, 4, 4, generator=generator, dtype=torch.float64)
    mean, log_variance = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    reconstruction, kl = lower_bound(logits, images, mean, log_variance)
    likelihood = Independent(Bernoulli(logits=logits, validate_args=False), 3).log_prob(images)
    torch.testing.assert_close(reconstruction, -likelihood, rtol=1e-12, atol=0)
    prior = Normal(torch.zeros(3, dtype=torch.float64), 1.0)
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), prior).sum(1)
    torch.testing.assert_close(kl, expected, rtol=1e-12, atol=0)


def test_no_logit_is_too_large():
    reconstruction, _ = lower_bound(torch.full((1, 1, 1, 1), 500.0), torch.zeros(1, 1, 1, 1), *torch.zeros(2, 1, 1))
    assert reconstruction.tolist() == [500]


def test_a_code_is_drawn_with_the_mean_and_deviation_of_the_encoder():
    torch.manual_seed(0)
    model = VAE(image_size=8, code_size=3)
    seen = []
    model.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    image = torch.rand(1, 1, 8, 8)
    with torch.no_grad():
        model.encoder.log_variance.bias += 2
        mean, log_variance = model.encoder(image)
        model.losses(image.expand(20_000, -1, -1, -1), None, torch.randn(20_000, 3))
    torch.testing.assert_close(seen[0].mean(0), mean[0], rtol=0, atol=0.1)
    torch.testing.assert_close(seen[0].std(0), (log_variance[0] / 2).exp(), rtol=0.05, atol=0)


def test_the_class_is_known_to_both_networks():
    torch.manual_seed(0)
    model = VAE(conditional=True, num_classes=3, image_size=8)
    images, codes = torch.rand(1, 1, 8, 8).expand(3, -1, -1, -1), torch.zeros(3, 15)
    assert len(model.encoder(images, torch.arange(3))[0].unique(dim=0)) == 3
    assert len(model(codes, torch.arange(3)).unique(dim=0)) == 3


def test_an_evaluation_logs_both_terms_of_the_bound():
    torch.manual_seed(0)
    model = VAE(image_size=8)
    batch = torch.rand(6, 1, 8, 8), torch.arange(6)
    loader = torch.utils.data.DataLoader([batch, (batch[0][:2], batch[1][:2])], batch_size=None)
    trainer = Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    numbers = trainer.test(model, loader, verbose=False)[0]
    assert numbers["test/loss"] == pytest.approx(numbers["test/reconstruction"] + numbers["test/kl"], rel=1e-5)
    noise = model._codes_at(range(8))
    losses = model.losses(torch.cat([batch[0], batch[0][:2]]), None, noise)["loss"]
    assert numbers["test/loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert model.monitor == "val/loss"


def test_a_walk_over_a_plane_of_codes_starts_and_ends_at_opposite_quantiles():
    model = VAE(image_size=8, code_size=2)
    pictures = model._walk(torch.tensor([1.0, 2.0]))
    far = torch.special.ndtri(torch.tensor(0.02))
    assert pictures.shape == (144, 1, 8, 8)
    torch.testing.assert_close(pictures[0], model.decode(far.expand(1, 2))[0])
    torch.testing.assert_close(pictures[-1], model.decode(-far.expand(1, 2))[0])
