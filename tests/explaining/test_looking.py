"""A network is looked into and left as it was."""

import copy

import pytest
import torch
from torch import nn

from zoo.explaining.looking import chosen_classes, class_number, layer_outputs, leaving_untouched, stages


class Network(nn.Module):
    """In training mode but for its norm, with a layer in place, a frozen weight, a gradient and a hook."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.rectify = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.second = nn.Conv2d(4, 5, 3)
        self.unused = nn.Linear(1, 1)
        self.head = nn.Linear(5, 3)
        self.norm.eval()
        self.first.weight.requires_grad_(False)
        self.head.weight.grad = torch.ones_like(self.head.weight)
        self.calls = 0
        self.head.register_forward_hook(self.count)

    def count(self, module, inputs, output):
        self.calls += 1

    def forward(self, images):
        maps = self.rectify(self.second(self.pool(self.rectify(self.norm(self.first(images))))))
        return self.head(maps.mean((2, 3)))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network()


def state(model):
    return (
        [(module.training, getattr(module, "inplace", None)) for module in model.modules()],
        [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        [[list(value) for name, value in vars(module).items() if "_hooks" in name] for module in model.modules()],
        copy.deepcopy(model.state_dict()),
    )


def assert_same(before, after):
    assert before[0] == after[0]
    assert before[2] == after[2]
    for (required, gradient), (now_required, now_gradient) in zip(before[1], after[1], strict=True):
        assert required == now_required
        assert (gradient is None) == (now_gradient is None)
        assert gradient is None or torch.equal(gradient, now_gradient)
    assert all(torch.equal(value, after[3][key]) for key, value in before[3].items())


def test_it_is_in_evaluation_without_gradients_or_layers_in_place_and_then_as_before(network):
    before = state(network)
    with leaving_untouched(network):
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert not network.rectify.inplace
        network.first.register_forward_hook(lambda *_: None)
        network.first.register_full_backward_hook(lambda *_: None)
        network.head.weight.grad = None
        network(torch.rand(2, 3, 8, 8))
    assert_same(before, state(network))
    calls = network.calls
    network(torch.rand(1, 3, 8, 8))
    assert network.calls == calls + 1, "its own hook still runs"


def test_it_is_as_before_after_an_error_too(network):
    before = state(network)

    def fail():
        with leaving_untouched(network):
            network.first.register_forward_pre_hook(lambda *_: None)
            raise KeyError("in the middle")

    with pytest.raises(KeyError):
        fail()
    assert_same(before, state(network))


def test_outputs_are_those_before_what_follows_works_in_place(network):
    images = torch.rand(2, 3, 8, 8)
    with leaving_untouched(network):
        found = layer_outputs(network, images, ["norm", "second"])
        norm = network.norm(network.first(images))
        second = network.second(network.pool(norm.relu()))
    torch.testing.assert_close(found["norm"], norm)
    torch.testing.assert_close(found["second"], second)
    assert norm.min() < 0
    assert network.calls == 0, "the network runs no further than needed"


@pytest.mark.parametrize(
    ("name", "said"), [("secnd", "did you mean second"), ("unused", "does not run"), ("", "has no layer")]
)
def test_a_wrong_layer_is_answered(network, name, said):
    before = state(network)
    with pytest.raises(ValueError, match=said), leaving_untouched(network):
        layer_outputs(network, torch.rand(1, 3, 8, 8), [name])
    assert_same(before, state(network))


def test_stages_are_the_last_layers_at_each_size(network):
    before = state(network)
    # The rectifier runs twice, so that it cannot name a place.
    assert stages(network, torch.rand(1, 3, 12, 12)) == ["pool", "second"]
    assert_same(before, state(network))


def test_stages_of_squeezenet_are_those_before_its_pools():
    from zoo import SqueezeNet

    model = SqueezeNet()
    names = stages(model, torch.rand(1, 3, 64, 64))
    assert names == [f"backbone.network.features.{place}" for place in (1, 5, 10, 12)]


@pytest.mark.parametrize(
    ("targets", "expected"), [(None, [1, 0]), (2, [2, 2]), ([2, 1], [2, 1]), (torch.tensor([0, 1]), [0, 1])]
)
def test_classes(targets, expected):
    scores = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert chosen_classes(scores, targets).tolist() == expected


@pytest.mark.parametrize(("targets", "said"), [(3, r"0…2"), ([-1, 0], r"0…2"), ([1], "1 targets .* 2 images")])
def test_wrong_classes(targets, said):
    with pytest.raises(ValueError, match=said):
        chosen_classes(torch.zeros(2, 3), targets)
    with pytest.raises(ValueError, match="expected scores"):
        chosen_classes(torch.zeros(2), 0)


def test_a_class_by_number_or_name():
    names = ["tench", "goldfish", "7"]
    assert [class_number(name, names) for name in ("goldfish", "0", "7")] == [1, 0, 2]
    with pytest.raises(ValueError, match="did you mean goldfish"):
        class_number("goldfsh", names)
    with pytest.raises(ValueError, match="no class '3'"):
        class_number("3", names)
