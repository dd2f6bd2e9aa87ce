"""SlowFast against the paper's table, pytorchvideo's network, and the forward pass written out from published keys."""

import pytest
import torch
from torch.nn import functional as F

from zoo.layer_table import layer_table
from zoo.slowfast import SlowFast, slow_frames

EIGHT = {"alpha": 4, "lateral_kernel": 7}  # 8 x 8 with depth 50
BLOCKS = (3, 4, 6, 3)


@pytest.fixture(scope="module")
def networks():
    """The published networks, without memory for their weights."""
    with torch.device("meta"):
        return {"4x16": SlowFast(), "8x8": SlowFast(**EIGHT), "8x8_r101": SlowFast(depth=101, alpha=4)}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("name", "fusion", "total"), [("4x16", 216_608, 34_480_216), ("8x8", 302_880, 34_566_488)])
def test_parameters_are_the_published_ones(networks, name, fusion, total):
    network = networks[name].backbone.network
    assert count(network.slow) == 32_827_456
    assert count(network.fast) == 514_152
    assert count(network.laterals) == fusion
    assert count(networks[name]) == total


@pytest.mark.parametrize(
    ("name", "size", "billions"),
    # 36.1 and 65.7 are the paper's, table 2; 126 mmaction2's of depth 101.
    [("4x16", 224, 27.64), ("4x16", 256, 36.1), ("8x8", 224, 50.31), ("8x8", 256, 65.7), ("8x8_r101", 256, 126)],
)
def test_multiply_adds_are_the_published_ones(networks, name, size, billions):
    rows = layer_table(networks[name], torch.zeros(1, 3, 32, size, size, device="meta"))
    assert sum(row.multiply_adds for row in rows) / 1e9 == pytest.approx(billions, rel=0.02)


@pytest.mark.parametrize(("name", "frames"), [("4x16", 4), ("8x8", 8)])
def test_shapes_are_those_of_the_papers_table(networks, name, frames):
    rows = layer_table(networks[name], torch.zeros(1, 3, 32, 224, 224, device="meta"))
    outputs = {row.name.removeprefix("backbone.network."): row.output for row in rows}
    assert outputs["slow.stem.0.conv"] == (64, frames, 112, 112)
    assert outputs["fast.stem.0.conv"] == (8, 32, 112, 112)
    assert outputs["laterals.0.conv"] == (16, frames, 56, 56)
    for k, (channels, side) in enumerate([(256, 56), (512, 28), (1024, 14), (2048, 7)]):
        last = f"stages.{k}.{BLOCKS[k] - 1}.c.conv"
        assert outputs[f"slow.{last}"] == (channels, frames, side, side)
        assert outputs[f"fast.{last}"] == (channels // 8, 32, side, side)
    for k, channels in enumerate([64, 128, 256], start=1):
        assert outputs[f"laterals.{k}.conv"][0] == channels


@pytest.mark.parametrize(("alpha", "expected"), [(4, [0, 4, 8, 13, 17, 22, 26, 31]), (8, [0, 10, 20, 31])])
def test_slow_frames_are_the_published_ones(alpha, expected):
    assert slow_frames(32, alpha) == expected


def test_slow_frames_are_those_of_linspace():
    for frames in range(2, 129):
        for alpha in (a for a in range(1, frames) if frames % a == 0):
            # In float64: float32 ends a little below a whole number here and there.
            places = torch.linspace(0, frames - 1, frames // alpha, dtype=torch.float64) + 1e-9
            assert slow_frames(frames, alpha) == (places.long().tolist() if frames // alpha > 1 else [0])


def published_shapes(lateral_kernel, classes=400):
    """The 662 tensors of pytorchvideo's files by name: (name in PySlowFast's files, shape)."""
    tensors = {}

    def norm(theirs, other, channels):
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"{theirs}.{name}"] = f"{other}.{name}", (channels,)
        tensors[f"{theirs}.num_batches_tracked"] = f"{other}.num_batches_tracked", ()

    for p, (width, stem) in enumerate([(64, 1), (8, 5)]):
        theirs, other = f"blocks.0.multipathway_blocks.{p}", f"s1.pathway{p}_stem"
        tensors[f"{theirs}.conv.weight"] = f"{other}.conv.weight", (width, 3, stem, 7, 7)
        norm(f"{theirs}.norm", f"{other}.bn", width)
    for k, channels in enumerate([8, 32, 64, 128]):
        theirs, other = f"blocks.{k}.multipathway_fusion", f"s{k + 1}_fuse"
        shape = (2 * channels, channels, lateral_kernel, 1, 1)
        tensors[f"{theirs}.conv_fast_to_slow.weight"] = f"{other}.conv_f2s.weight", shape
        norm(f"{theirs}.norm", f"{other}.bn", 2 * channels)
    for k, blocks in enumerate(BLOCKS):
        for p, width in enumerate([64, 8]):
            inner = width * 2**k
            for b in range(blocks):
                before = 4 * inner if b else (80, 320, 640, 1280)[k] if p == 0 else (8, 32, 64, 128)[k]
                theirs = f"blocks.{k + 1}.multipathway_blocks.{p}.res_blocks.{b}"
                other = f"s{k + 2}.pathway{p}_res{b}"
                time = 3 if p == 1 or k >= 2 else 1
                shapes = {
                    "a": (inner, before, time, 1, 1),
                    "b": (inner, inner, 1, 3, 3),
                    "c": (4 * inner, inner, 1, 1, 1),
                }
                for name, shape in shapes.items():
                    tensors[f"{theirs}.branch2.conv_{name}.weight"] = f"{other}.branch2.{name}.weight", shape
                    norm(f"{theirs}.branch2.norm_{name}", f"{other}.branch2.{name}_bn", shape[0])
                if b == 0:
                    tensors[f"{theirs}.branch1_conv.weight"] = f"{other}.branch1.weight", (4 * inner, before, 1, 1, 1)
                    norm(f"{theirs}.branch1_norm", f"{other}.branch1_bn", 4 * inner)
    tensors["blocks.6.proj.weight"] = "head.projection.weight", (classes, 2304)
    tensors["blocks.6.proj.bias"] = "head.projection.bias", (classes,)
    return tensors


@pytest.mark.parametrize(("name", "kernel"), [("4x16", 5), ("8x8", 7)])
@pytest.mark.parametrize("of_pyslowfast", [False, True])
def test_published_tensors_are_ours_by_name_and_shape(networks, name, kernel, of_pyslowfast):
    tensors = published_shapes(kernel)
    assert len(tensors) == 662
    state = {o if of_pyslowfast else t: torch.empty(shape, device="meta") for t, (o, shape) in tensors.items()}
    published = networks[name].published
    assert published.recognises(state)
    found = {key: value.shape for key, value in published.rename(state).items()}
    own = {key: value.shape for key, value in networks[name].state_dict().items()}
    assert found == own
    assert not published.recognises(own)


def written_out(state, clips, alpha, window):
    """The forward pass from PySlowFast's tensors, in plain functions."""
    x = (clips - 0.45) / 0.225
    frames = torch.linspace(0, 31, 32 // alpha).long()

    def normed(y, name):
        parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(y, *parts, eps=1e-5)

    def conv(y, name, stride=1, time_stride=1):
        weight = state[f"{name}.weight"]
        padding = [size // 2 for size in weight.shape[2:]]
        return F.conv3d(y, weight, None, (time_stride, stride, stride), padding)

    def stem(y, p):
        y = normed(conv(y, f"s1.pathway{p}_stem.conv", 2), f"s1.pathway{p}_stem.bn").relu()
        return F.max_pool3d(y, (1, 3, 3), (1, 2, 2), (0, 1, 1))

    def block(y, name, stride):
        z = normed(conv(y, f"{name}.branch2.a"), f"{name}.branch2.a_bn").relu()
        z = normed(conv(z, f"{name}.branch2.b", stride), f"{name}.branch2.b_bn").relu()
        z = normed(conv(z, f"{name}.branch2.c"), f"{name}.branch2.c_bn")
        if f"{name}.branch1.weight" in state:
            y = normed(conv(y, f"{name}.branch1", stride), f"{name}.branch1_bn")
        return (y + z).relu()

    slow, fast = stem(x[:, :, frames], 0), stem(x, 1)
    for k, blocks in enumerate(BLOCKS):
        lateral = normed(conv(fast, f"s{k + 1}_fuse.conv_f2s", 1, alpha), f"s{k + 1}_fuse.bn").relu()
        slow = torch.cat([slow, lateral], 1)
        for b in range(blocks):
            stride = 2 if k and not b else 1
            slow = block(slow, f"s{k + 2}.pathway0_res{b}", stride)
            fast = block(fast, f"s{k + 2}.pathway1_res{b}", stride)
    sums = []  # of the probabilities of each window
    for i in range(slow.shape[3] - window + 1):
        for j in range(slow.shape[4] - window + 1):
            parts = [y[..., i : i + window, j : j + window].mean((2, 3, 4)) for y in (slow, fast)]
            logits = torch.cat(parts, 1) @ state["head.projection.weight"].T + state["head.projection.bias"]
            sums.append(logits.softmax(1))
    return torch.stack(sums).mean(0)


@pytest.fixture(scope="module")
def pyslowfast(tmp_path_factory):
    """A file with random tensors under PySlowFast's keys."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in published_shapes(5).values():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif len(shape) > 1:
            state[name] = torch.randn(shape, generator=generator) * (2 / (torch.tensor(shape).prod() / shape[0])) ** 0.5
        else:
            state[name] = 0.5 + torch.rand(shape, generator=generator)
    path = tmp_path_factory.mktemp("published") / "SLOWFAST_4x16_R50.pyth"
    torch.save({"epoch": 196, "model_state": state, "cfg": "TRAIN:\n"}, path)
    return state, str(path)


@pytest.mark.parametrize("size", [64, 96])
def test_pyslowfasts_file_gives_the_outputs_of_the_network_written_out(pyslowfast, size):
    """Also where clips are larger than in training: then windows of 64 pixels are averaged, four of them."""
    state, path = pyslowfast
    model = SlowFast(image_size=64, weights=path).eval().double()
    state = {key: value.double() for key, value in state.items()}
    clips = torch.rand(1, 3, 32, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = written_out(state, clips, 8, 2), model(clips).softmax(1)
    assert expected.std() > 1e-4, "outputs that are all alike prove nothing"
    # A mean over windows is taken in float32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9, check_dtype=False)


@pytest.mark.parametrize(("depth", "alpha", "kernel"), [(50, 8, 5), (50, 4, 7), (101, 4, 5)])
def test_pytorchvideos_network_gives_the_same_outputs(depth, alpha, kernel, tmp_path):
    """With random weights and statistics, saved as that project publishes them: to 1e-5."""
    slowfast = pytest.importorskip("pytorchvideo.models.slowfast")
    torch.manual_seed(0)
    theirs = slowfast.create_slowfast(
        model_depth=depth,
        slowfast_fusion_conv_kernel_size=(kernel, 1, 1),
        slowfast_fusion_conv_stride=(alpha, 1, 1),
        head_pool_kernel_sizes=((32 // alpha, 2, 2), (32, 2, 2)),  # clips of 64 pixels
    )
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            torch.nn.init.normal_(module.running_mean, 0, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.3, 0.8)  # else the outputs of a fresh network are far from 1
    torch.save({"model_state": theirs.state_dict()}, tmp_path / "theirs.pyth")
    arguments = {"depth": depth, "alpha": alpha, "lateral_kernel": kernel, "image_size": 64}
    ours = SlowFast(**arguments, weights=str(tmp_path / "theirs.pyth")).eval().double()
    clips = torch.rand(2, 3, 32, 64, 64, dtype=torch.float64)
    inputs = (clips - 0.45) / 0.225
    slow = inputs[:, :, torch.linspace(0, 31, 32 // alpha).long()]
    with torch.no_grad():
        expected, found = theirs.eval().double()([slow, inputs]), ours(clips)
    assert expected.std() > 1e-3, "outputs that are all alike prove nothing"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_block_starts_as_its_shortcut():
    block = SlowFast(depth=26, width=16, frames=8, alpha=4, image_size=32).backbone.network.slow.stages[0][1]
    x = torch.rand(2, 64, 2, 8, 8)
    torch.testing.assert_close(block.eval()(x), x)


def test_a_narrow_network_has_the_same_proportions():
    model = SlowFast(depth=14, num_classes=8, frames=16, alpha=4, beta_inv=4, width=16, image_size=64)
    slow, fast = model.backbone(torch.rand(2, 3, 16, 64, 64))
    assert slow.shape == (2, 512, 4, 2, 2)
    assert fast.shape == (2, 128, 16, 2, 2)
    assert model(torch.rand(2, 3, 16, 64, 64)).shape == (2, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 18}, "no SlowFast network of depth 18: there are 14, 26, 50, 101, 152"),
        ({"frames": 30}, "a clip of 30 frames does not go with alpha=8"),
        ({"width": 20}, "width=20 must be a multiple of beta_inv=8"),
        ({"image_size": 100}, "image_size=100 one of 32"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SlowFast(**arguments)


def test_a_clip_of_another_length_is_refused():
    model = SlowFast(depth=14, frames=8, alpha=4, beta_inv=4, width=8, image_size=32)
    with pytest.raises(ValueError, match="a clip of 7 frames does not go with alpha=4"):
        model(torch.rand(1, 3, 7, 32, 32))
