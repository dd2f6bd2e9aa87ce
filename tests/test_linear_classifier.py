"""The linear classifier and the lecture's two losses, against numbers and gradients derived by hand in float64."""

import math

import pytest
import torch
from lightning import Trainer
from PIL import Image
from torch.autograd import gradcheck
from torch.utils.data import DataLoader, TensorDataset

from zoo import LinearClassifier
from zoo.linear_classifier import svm_losses

# Lecture 3: the scores of cat, car and frog for a picture of each.
SCORES = [[3.2, 5.1, -1.7], [1.3, 4.9, 2.0], [2.2, 2.5, -3.1]]
LABELS = [0, 1, 2]


def tiny(loss="softmax", **options):
    torch.manual_seed(0)
    return LinearClassifier(loss, num_classes=4, image_size=3, init_std=1.0, **options).double()


def batch(samples=6):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(samples, 3, 3, 3, generator=generator, dtype=torch.float64)
    return images, torch.randint(4, (samples,), generator=generator)


def pixels(model, images):
    """The data matrix (N, D) that the assignment's formulas take."""
    return (images - model.backbone.standardize.mean).reshape(len(images), -1)


def test_the_svm_loss_is_the_lectures_example():
    losses = svm_losses(torch.tensor(SCORES, dtype=torch.float64), torch.tensor(LABELS))
    assert losses.tolist() == pytest.approx([2.9, 0.0, 12.9])
    assert losses.mean().item() == pytest.approx(5.27, abs=0.005)


def test_the_softmax_loss_is_the_lectures_example():
    losses = LinearClassifier().losses(torch.tensor(SCORES, dtype=torch.float64), torch.tensor(LABELS))
    assert losses[0].item() == pytest.approx(2.04, abs=0.005)
    assert losses[0].item() == pytest.approx(math.log(sum(math.exp(s) for s in SCORES[0])) - 3.2)


@pytest.mark.parametrize(("loss", "expected"), [("softmax", math.log(4)), ("svm", 3.0)])
def test_equal_scores_cost_what_chance_costs(loss, expected):
    model = LinearClassifier(loss, num_classes=4, image_size=3, init_std=0.0)
    images, labels = batch()
    assert model.training_loss(images.float(), labels)[0].item() == pytest.approx(expected, rel=1e-6)
    assert model.chance_loss == pytest.approx(expected)


def test_the_scores_are_the_lectures_formula():
    model, (images, _) = tiny(), batch()
    torch.testing.assert_close(model(images), pixels(model, images) @ model.head.weight.T + model.head.bias)


def test_the_softmax_gradient_is_the_hand_derived_one():
    model, (images, labels) = tiny(), batch()
    loss, scores = model.training_loss(images, labels)
    loss.backward()
    exponentials = torch.exp(scores - scores.max(1, keepdim=True).values)
    d_scores = exponentials / exponentials.sum(1, keepdim=True)
    chosen = d_scores[torch.arange(6), labels]
    assert loss.item() == pytest.approx(-chosen.log().mean().item(), abs=1e-12)
    d_scores[torch.arange(6), labels] -= 1
    torch.testing.assert_close(model.head.weight.grad, (d_scores / 6).T @ pixels(model, images))
    torch.testing.assert_close(model.head.bias.grad, d_scores.mean(0))


def test_the_svm_gradient_is_the_hand_derived_one():
    """Each violated margin adds the picture to the wrong class's row and takes it from the right class's."""
    model, (images, labels) = tiny("svm"), batch()
    loss, scores = model.training_loss(images, labels)
    loss.backward()
    expected_loss, gradient, x = 0.0, torch.zeros_like(model.head.weight), pixels(model, images)
    for i in range(6):
        for j in range(4):
            margin = (scores[i, j] - scores[i, labels[i]] + 1).item()
            if j != labels[i] and margin > 0:
                expected_loss += margin / 6
                gradient[j] += x[i] / 6
                gradient[labels[i]] -= x[i] / 6
    assert 0 < loss.item() == pytest.approx(expected_loss, abs=1e-12)
    torch.testing.assert_close(model.head.weight.grad, gradient)


@pytest.mark.parametrize("loss", ["softmax", "svm"])
def test_the_gradient_is_that_of_finite_differences(loss):
    model, (images, labels) = tiny(loss), batch()
    scores = model(images).detach().requires_grad_()
    assert gradcheck(lambda s: model.losses(s, labels), scores)


def test_shares_of_classes_fit_the_softmax_only():
    images, labels = batch()
    shares = torch.nn.functional.one_hot(labels, 4).double()
    softmax = tiny()
    assert softmax.training_loss(images, shares)[0].item() == pytest.approx(
        softmax.training_loss(images, labels)[0].item(), abs=1e-12
    )
    with pytest.raises(ValueError, match="mixup and cutmix off"):
        tiny("svm").training_loss(images, shares)


def test_weight_decay_of_twice_reg_is_the_assignments_regularization():
    reg, rate = 0.05, 0.1
    model, (images, labels) = tiny(), batch()
    before = [p.detach().clone() for p in model.head.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, weight_decay=2 * reg)
    loss = model.training_loss(images, labels)[0]
    penalty = reg * sum(p.square().sum() for p in model.head.parameters())
    expected = torch.autograd.grad(loss + penalty, model.head.parameters(), retain_graph=True)
    loss.backward()
    optimizer.step()
    for old, new, gradient in zip(before, model.head.parameters(), expected, strict=True):
        torch.testing.assert_close(new, old - rate * gradient)


def test_the_initial_weights_are_the_assignments():
    torch.manual_seed(0)
    model = LinearClassifier()
    assert model.head.weight.shape == (10, 3072)
    assert model.head.weight.std().item() == pytest.approx(1e-4, rel=0.02)
    assert not model.head.bias.any()


def test_the_templates_are_drawn(tmp_path, monkeypatch):
    from lightning.pytorch.loggers import CSVLogger

    import zoo.linear_classifier as module

    drawn = []
    figure = module.filters_figure
    monkeypatch.setattr(module, "filters_figure", lambda *a: drawn.append(a) or figure(*a))
    model = tiny().float()
    images, labels = batch()
    trainer = Trainer(logger=CSVLogger(tmp_path), enable_progress_bar=False, enable_model_summary=False)
    trainer.test(model, DataLoader(TensorDataset(images.float(), labels), 6), verbose=False)
    templates, _, names = drawn[0]
    assert names == ["0", "1", "2", "3"]
    assert torch.equal(templates[2, 1, 0], model.head.weight[2, 9:12]), "class 2, second colour, first row"
    with Image.open(f"{trainer.log_dir}/pictures/test_templates.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**6)) > 20
