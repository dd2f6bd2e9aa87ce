"""GoogLeNet against torchvision's and the lecture's table."""

import math

import pytest
import torch
from torch.nn import functional as F
from torchvision.models import googlenet

from zoo import GoogLeNet
from zoo.layer_table import layer_table


def test_torchvisions_checkpoint_gives_the_same_outputs(published_outputs):
    """With torchvision's ``transform_input``, which its weights come with: ours has mean and deviation 0.5 for it."""
    theirs = googlenet(weights=None, init_weights=False, aux_logits=True, transform_input=True)
    published_outputs(theirs, GoogLeNet, {}, 96)


def test_training_outputs_are_torchvisions(tmp_path):
    """Three outputs, of which the loss is the weighted sum of cross-entropies (section 5: 0.3 for each auxiliary)."""
    torch.manual_seed(0)
    theirs = googlenet(weights=None, init_weights=False, aux_logits=True, num_classes=7, dropout=0.0, dropout_aux=0.0)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    ours = GoogLeNet(7, dropout=0.0, dropout_aux=0.0, weights=str(tmp_path / "w.pth")).double()
    images, labels = torch.rand(3, 3, 64, 64, dtype=torch.float64), torch.tensor([0, 3, 6])
    out = theirs.double().train()((images - 0.5) / 0.5)
    expected = sum(
        weight * F.cross_entropy(scores, labels)
        for weight, scores in ((1, out.logits), (0.3, out.aux_logits1), (0.3, out.aux_logits2))
    )
    loss, logits = ours.train().training_loss(images, labels)
    torch.testing.assert_close(logits, out.logits)
    torch.testing.assert_close(loss, expected)
    frozen = ours.eval().training_loss(images, labels)[0]
    torch.testing.assert_close(frozen, F.cross_entropy(ours(images), labels))


def test_auxiliary_classifiers_learn_on_a_frozen_backbone():
    """Released, it is moved by their gradients: the loss is that of all three, on features of evaluation."""
    torch.manual_seed(0)
    model = GoogLeNet(7, stem="small", dropout=0.5, dropout_aux=0.0).train()
    model.backbone.requires_grad_(False).eval()
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    images, labels = torch.rand(3, 3, 32, 32), torch.tensor([0, 3, 6])
    loss, logits = model.training_loss(images, labels)
    loss.backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is None} == {"backbone"}
    torch.testing.assert_close(logits, model.head(model.backbone(images)))
    assert not model.backbone.get_submodule("network").training
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.state_dict().items())
    assert loss.item() == pytest.approx(model.chance_loss, rel=0.1)


def test_parameters_are_torchvisions():
    with torch.device("meta"):
        model = GoogLeNet()
    counts = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(counts.values()) == 13_004_888
    assert sum(count for name, count in counts.items() if "aux" not in name) == 6_624_904


def test_layer_table_of_the_stem_is_the_lectures():
    """Lecture 8: KB, thousands of parameters and MFLOP of the layers before the first inception block.

    The slide's total of 418 MFLOP is not the sum of its rows, which is 481; its ratio 17.8 to VGG-16 follows from it.
    Its 124 thousand parameters have a bias per filter, which batch norm replaces here.
    """
    with torch.device("meta"):
        rows = layer_table(GoogLeNet(), torch.zeros(1, 3, 224, 224))[:5]
    found = [
        (row.output, round(row.memory_kb), round(row.parameters / 1e3), round(row.multiply_adds / 1e6)) for row in rows
    ]
    assert found == [
        ((64, 112, 112), 3136, 9, 118),
        ((64, 56, 56), 784, 0, 2),
        ((64, 56, 56), 784, 4, 13),
        ((192, 56, 56), 2352, 111, 347),
        ((192, 28, 28), 588, 0, 1),
    ]
    assert round(sum(row.memory_kb for row in rows) / 1024, 1) == 7.5
    assert round(sum(row.multiply_adds for row in rows) / 1e6) == 481  # slide: 418
    with_biases = sum(row.parameters for row in rows) + 64 + 64 + 192
    assert round(with_biases / 1e3) == 124


def test_without_auxiliary_losses_their_heads_are_not_trained():
    model = GoogLeNet(7, aux_weight=0.0).train()
    assert model.chance_loss == pytest.approx(math.log(7))
    loss, _ = model.training_loss(torch.rand(2, 3, 32, 32), torch.tensor([1, 2]))
    loss.backward()
    assert {n.split(".")[1] for n, p in model.named_parameters() if p.grad is None} == {"aux1", "aux2"}


def test_the_small_stem_keeps_the_pictures_size():
    with torch.device("meta"):
        rows = layer_table(GoogLeNet(stem="small", image_size=32), torch.zeros(1, 3, 32, 32))
    assert [row.output[1] for row in rows[:3]] == [32, 32, 32]
    assert GoogLeNet(5, stem="small").eval()(torch.rand(1, 3, 16, 16)).shape == (1, 5)
