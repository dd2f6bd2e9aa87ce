"""Darknet's weights files: the bytes, the sizes of the published ones, and what can be wrong with a file."""

import struct

import numpy as np
import pytest
import torch
from torch import nn

from zoo.darknet import convolution, layers_of, load_darknet, read_header, read_values, write_darknet
from zoo.yolov3 import YOLOv3Network

HEADER = struct.pack("<iiiq", 0, 2, 0, 7)


def network(classes: int = 2) -> YOLOv3Network:
    """A small network with statistics that are not those of a fresh one."""
    torch.manual_seed(classes)
    net = YOLOv3Network(classes, tiny=True, width=0.125)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return net


def written(tmp_path, net=None):
    path = tmp_path / "own.weights"
    write_darknet(net or network(), path)
    return path


def same(a: nn.Module, b: nn.Module, prefix: str = "") -> bool:
    theirs = b.state_dict()
    ours = {key: value for key, value in a.state_dict().items() if key.startswith(prefix)}
    return all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize(
    ("arguments", "backbone_only", "size"),
    [({}, False, 248_007_048), ({"tiny": True}, False, 35_434_956), ({}, True, 162_482_580)],
    ids=["yolov3.weights", "yolov3-tiny.weights", "darknet53.conv.74"],
)
def test_the_published_files_have_as_many_values(arguments, backbone_only, size):
    with torch.device("meta"):
        net = YOLOv3Network(**arguments)
    assert 20 + 4 * sum(layer.size for layer in layers_of(net.backbone if backbone_only else net)) == size


def test_the_bytes_of_two_layers_by_hand(tmp_path):
    net = nn.Sequential(convolution(1, 2, 1), nn.Conv2d(2, 1, (1, 2)))
    with torch.no_grad():
        for start, tensor in enumerate(
            (net[0][1].bias, net[0][1].weight, net[0][1].running_mean, net[0][1].running_var, net[0][0].weight)
        ):
            tensor.copy_(torch.tensor([10.0 * start, 10.0 * start + 1]).view(tensor.shape))
        net[1].bias.fill_(50)
        net[1].weight.copy_(torch.arange(60.0, 64).view(1, 2, 1, 2))
    write_darknet(net.to(memory_format=torch.channels_last), tmp_path / "w", seen=7)
    values = [0, 1, 10, 11, 20, 21, 30, 31, 40, 41, 50, 60, 61, 62, 63]
    assert (tmp_path / "w").read_bytes() == HEADER + np.array(values, "<f4").tobytes()
    header, found = read_values(tmp_path / "w")
    assert header == (0, 2, 0, 7)
    assert found.tolist() == values


@pytest.mark.parametrize(
    ("version", "form", "seen"),
    [((0, 1, 0), "<i", 5), ((0, 2, 0), "<q", 2**40), ((0, 2, 5), "<q", 9), ((1, 0, 0), "<q", 9)],
)
def test_the_pictures_seen_are_wide_from_version_0_2_on(tmp_path, version, form, seen):
    path = written(tmp_path)
    path.write_bytes(struct.pack("<iii", *version) + struct.pack(form, seen) + path.read_bytes()[20:])
    assert read_header(path) == ((*version, seen), 20 if form == "<q" else 16)
    fresh = YOLOv3Network(2, tiny=True, width=0.125)
    load_darknet(fresh, path)
    assert same(fresh, network())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_network_survives_the_file(tmp_path, layout):
    path = written(tmp_path, network().to(memory_format=layout))
    fresh = YOLOv3Network(2, tiny=True, width=0.125).to(memory_format=layout)
    transfer = load_darknet(fresh, str(path))
    assert same(fresh, network())
    assert transfer.fresh == []
    own = {key for key in fresh.state_dict() if not key.endswith("num_batches_tracked")}
    assert set(transfer.loaded) == own


def test_outputs_for_other_classes_stay_and_all_else_is_loaded(tmp_path):
    path = written(tmp_path)
    fresh = network(5)
    before = {key: value.clone() for key, value in fresh.state_dict().items() if ".output." in key}
    transfer = load_darknet(fresh, path)
    assert sorted(transfer.fresh) == sorted(before)
    state, theirs = fresh.state_dict(), network().state_dict()
    for key, value in state.items():
        assert torch.equal(value, before[key] if key in before else theirs[key]), key


@pytest.mark.parametrize("more", [0, 1, 2])
def test_a_file_may_end_behind_the_backbone(tmp_path, more):
    """``more`` convolutions of the head are in it too, as in yolov3-tiny.conv.15."""
    path = written(tmp_path)
    layers = layers_of(network())
    kept = sum(layer.name.startswith("backbone.") for layer in layers) + more
    cut = sum(layer.size for layer in layers[:kept])
    path.write_bytes(path.read_bytes()[: 20 + 4 * cut])
    fresh = network(5)
    head = {key: value.clone() for key, value in fresh.state_dict().items() if key.startswith("head.")}
    transfer = load_darknet(fresh, path)
    assert same(fresh, network(), "backbone.")
    assert len(transfer.loaded) == sum(len(layer.tensors) for layer in layers[:kept])
    for key in transfer.fresh:
        assert torch.equal(fresh.state_dict()[key], head[key])


def broken(data: bytes, how: str) -> bytes:
    values = np.frombuffer(data[20:], "<f4").copy()
    if how == "negative":
        values[24:32] = -1  # of the first layer: 8 biases, scales, means, variances
    if how == "nan":
        values[1000] = np.nan
    return {
        "empty": b"",
        "cut header": data[:17],
        "page": b"<!DOCTYPE html><html><body>not found</body></html>",
        "cut value": data[:-2],
        "cut": data[:-4],
        "cut deep": data[: 20 + 4 * 10],
        "header only": data[:20],
        "more": data + b"\0" * 4,
        "twice": data + data[20:],
        "negative": data[:20] + values.tobytes(),
        "nan": data[:20] + values.tobytes(),
    }[how]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("empty", "no file of Darknet's weights: .* found an empty file"),
        ("cut header", "no file of Darknet's weights"),
        ("page", "no file of Darknet's weights: expected a header .* found 3c 21 44 4f"),
        ("cut value", r"bytes, which are not 20 of a header and 4 for each value: it is truncated"),
        (
            "cut",
            r"holds 139,841 values \(559,384 bytes\), expected 140,430 \(561,740 bytes\).* of the backbone alone",
        ),
        ("cut deep", "it holds 10 values"),
        ("header only", "it holds 0 values"),
        ("more", "it holds 139,843 values"),
        ("twice", "it holds 279,684 values"),
        ("negative", "variances below 0 in backbone.fine.0.1.running_var"),
        ("nan", "values that are no numbers"),
    ],
)
def test_a_broken_file_is_one_clear_error_and_changes_nothing(tmp_path, how, said):
    path = written(tmp_path)
    path.write_bytes(broken(path.read_bytes(), how))
    net, untouched = network(4), network(4)
    with pytest.raises(ValueError, match=said) as error:
        load_darknet(net, path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert same(net, untouched)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.weights: there is no such file"):
        load_darknet(network(), tmp_path / "none.weights")


def test_a_file_of_the_other_network_does_not_fit(tmp_path):
    path = written(tmp_path)
    with pytest.raises(ValueError, match="is truncated or of another network"):
        load_darknet(YOLOv3Network(2, width=0.125), path)


def test_a_file_without_classes_does_not_fit(tmp_path):
    path = written(tmp_path, network(0))
    with pytest.raises(ValueError, match="is truncated or of another network"):
        load_darknet(network(2), path)


def test_a_convolution_without_bias_and_batch_norm_is_named():
    with pytest.raises(ValueError, match="0 has neither a bias nor a batch norm behind it"):
        layers_of(nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1)))


def test_nothing_half_written_stays(tmp_path):
    net = network()
    net.head.scales[1].output.weight = nn.Parameter(torch.zeros(3, device="meta"))
    with pytest.raises((RuntimeError, NotImplementedError)):
        write_darknet(net, tmp_path / "w")
    assert list(tmp_path.iterdir()) == []
