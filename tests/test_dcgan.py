"""The assignment's and the paper's DCGAN."""

import pytest
import torch
from torch import nn

from zoo import DCGAN


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_parameters_are_the_assignments():
    model = DCGAN()
    assert parameters(model.discriminator) == 1_102_721
    assert parameters(model.generator) == 6_675_009
    assert parameters(DCGAN(code_size=4).generator) == 6_580_801


def test_parameters_are_those_of_the_papers_code():
    model = DCGAN("paper", code_size=100, in_channels=3)
    assert parameters(model.generator) == 3_576_704
    assert parameters(model.discriminator) == 2_765_568


@pytest.mark.parametrize(
    ("network", "channels", "side"), [("assignment", 1, 28), ("assignment", 3, 28), ("paper", 3, 64)]
)
@pytest.mark.parametrize("conditional", [False, True])
def test_shapes(network, channels, side, conditional):
    model = DCGAN(network, conditional, num_classes=5, in_channels=channels)
    images = model.sample(3, labels=[4, 0, 4] if conditional else None)
    assert images.shape == (3, channels, side, side)
    assert model.score(images, torch.tensor([4, 0, 4])).shape == (3,)


def shapes(network, inputs):
    """The layers that a table of the assignment or the paper names, with the sizes of their outputs."""
    seen = []

    def see(module, _, output):
        seen.append((type(module).__name__, tuple(output.shape[1:])))

    handles = [module.register_forward_hook(see) for module in network.modules() if not list(module.children())]
    network.eval()(inputs)
    for handle in handles:
        handle.remove()
    return [row for row in seen if row[0] not in ("Flatten", "Unflatten")]


def test_layers_are_the_assignments():
    model = DCGAN()
    assert shapes(model.generator, torch.rand(1, 96)) == [
        ("Linear", (1024,)), ("ReLU", (1024,)), ("BatchNorm1d", (1024,)),
        ("Linear", (6272,)), ("ReLU", (6272,)), ("BatchNorm1d", (6272,)),
        ("ConvTranspose2d", (64, 14, 14)), ("ReLU", (64, 14, 14)), ("BatchNorm2d", (64, 14, 14)),
        ("ConvTranspose2d", (1, 28, 28)), ("Tanh", (1, 28, 28)),
    ]  # fmt: skip
    assert shapes(model.discriminator, torch.rand(1, 1, 28, 28)) == [
        ("Conv2d", (32, 24, 24)), ("LeakyReLU", (32, 24, 24)), ("MaxPool2d", (32, 12, 12)),
        ("Conv2d", (64, 8, 8)), ("LeakyReLU", (64, 8, 8)), ("MaxPool2d", (64, 4, 4)),
        ("Linear", (1024,)), ("LeakyReLU", (1024,)), ("Linear", (1,)),
    ]  # fmt: skip


def test_layers_are_the_papers():
    model = DCGAN("paper", code_size=100, in_channels=3)
    maps = [(512, 4, 4), (256, 8, 8), (128, 16, 16), (64, 32, 32)]
    each = [row for size in maps for row in (("ConvTranspose2d", size), ("BatchNorm2d", size), ("ReLU", size))]
    assert shapes(model.generator, torch.rand(1, 100)) == [
        *each,
        ("ConvTranspose2d", (3, 64, 64)),
        ("Tanh", (3, 64, 64)),
    ]
    each = [row for size in maps[::-1] for row in (("Conv2d", size), ("BatchNorm2d", size), ("LeakyReLU", size))]
    del each[1]
    assert shapes(model.discriminator, torch.rand(1, 3, 64, 64)) == [*each, ("Conv2d", (1, 1, 1))]


def test_weights_start_as_in_the_papers_code():
    torch.manual_seed(0)
    for layer in DCGAN("paper", code_size=100, in_channels=3).modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            assert float(layer.weight.std()) == pytest.approx(0.02, rel=0.1)
            assert layer.bias is None
        if isinstance(layer, nn.BatchNorm2d):
            assert float(layer.weight.mean()) == pytest.approx(1, abs=0.02)
            assert not layer.bias.any()


def test_the_class_is_judged_by_projection_in_float64():
    torch.manual_seed(0)
    model = DCGAN(conditional=True, num_classes=4).double()
    images, labels = torch.rand(6, 1, 28, 28, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    network = model.discriminator
    features = network.features(2 * images - 1)
    scores = model.score(images, labels)
    for row, label in enumerate(labels.tolist()):
        expected = network.judge.bias[0] + (network.judge.weight[0] + network.classes.weight[label]) @ features[row]
        torch.testing.assert_close(scores[row], expected, rtol=0, atol=1e-12)


def test_real_and_generated_images_do_not_share_the_statistics_of_a_batch_norm():
    torch.manual_seed(0)
    model = DCGAN("paper")
    images = torch.rand(4, 1, 64, 64)
    seen = []
    model.discriminator.features[3].register_forward_pre_hook(lambda m, inputs: seen.append(len(inputs[0])))
    model.discriminator_loss(images, None)
    assert seen == [4, 4]


def test_weights_of_other_classes_are_refused_by_their_names(tmp_path):
    import zoo

    zoo.save(DCGAN(conditional=True, num_classes=3), tmp_path / "three.safetensors")
    with pytest.raises(ValueError, match=r"discriminator\.classes\.weight has shape \(3, 1024\), expected \(4, 1024\)"):
        DCGAN(conditional=True, num_classes=4, weights=str(tmp_path / "three.safetensors"))
