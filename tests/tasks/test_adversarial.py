"""The losses of two networks that play against each other."""

import math

import pytest
import torch

from zoo.tasks.adversarial import UNDECIDED, discriminator_loss, generator_loss


def scores():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, 50, generator=generator, dtype=torch.float64) * 4).requires_grad_()


def test_gan_is_the_lectures_formula_in_float64():
    real, generated = scores()
    d = torch.sigmoid
    expected = -(torch.log(d(real)).mean() + torch.log(1 - d(generated)).mean())
    torch.testing.assert_close(discriminator_loss(real, generated, "gan"), expected, rtol=1e-12, atol=0)
    expected = -torch.log(d(generated)).mean()
    torch.testing.assert_close(generator_loss(generated, "gan"), expected, rtol=1e-12, atol=0)


def test_lsgan_is_the_assignments_formula_in_float64():
    real, generated = scores()
    expected = sum(0.5 * (x - 1) ** 2 for x in real) / 50 + sum(0.5 * x**2 for x in generated) / 50
    torch.testing.assert_close(discriminator_loss(real, generated, "lsgan"), expected, rtol=1e-12, atol=0)
    expected = sum(0.5 * (x - 1) ** 2 for x in generated) / 50
    torch.testing.assert_close(generator_loss(generated, "lsgan"), expected, rtol=1e-12, atol=0)


def test_no_score_is_too_large():
    """log(1 - sigmoid(s)), written so, is minus infinity for s = 40 in float32."""
    far = torch.tensor([1000.0], requires_grad=True)
    loss = discriminator_loss(-far, far, "gan")
    assert loss == 2000
    assert torch.autograd.grad(loss, far)[0] == 2
    assert generator_loss(-far, "gan") == 1000


@pytest.mark.parametrize(("loss", "undecided"), [("gan", 0.0), ("lsgan", 0.5)])
def test_the_undecided_discriminators_loss(loss, undecided):
    score = torch.full((3,), undecided)
    assert float(discriminator_loss(score, score, loss)) == pytest.approx(UNDECIDED[loss])
    assert UNDECIDED["gan"] == pytest.approx(math.log(4))
