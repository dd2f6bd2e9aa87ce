"""AlexNet against torchvision's and the lecture's table."""

import pytest
import torch
from torchvision.models import alexnet

from zoo import AlexNet
from zoo.layer_table import layer_table


def test_torchvisions_checkpoint_gives_the_same_outputs(tmp_path, published_outputs):
    published_outputs(alexnet(weights=None), AlexNet, {}, 224)


def test_parameters_are_torchvisions():
    with torch.device("meta"):
        assert sum(p.numel() for p in AlexNet().parameters()) == 61_100_840


def test_layer_table_is_the_lectures():
    """Lecture 8, input 3x227x227: output, KB, thousands of parameters, millions of operations, row by row.

    The slide has 145 MFLOP for conv4; its own formula gives 256 * 13 * 13 * 384 * 3 * 3 = 149,520,384. It leaves out
    the biases of the fully connected layers, and writes 0 for pools, which make less than half a million comparisons.
    """
    lecture = [
        ("Conv2d", (64, 56, 56), 784, 23, 73),
        ("MaxPool2d", (64, 27, 27), 182, 0, 0),
        ("Conv2d", (192, 27, 27), 547, 307, 224),
        ("MaxPool2d", (192, 13, 13), 127, 0, 0),
        ("Conv2d", (384, 13, 13), 254, 664, 112),
        ("Conv2d", (256, 13, 13), 169, 885, 150),  # slide: 145
        ("Conv2d", (256, 13, 13), 169, 590, 100),
        ("MaxPool2d", (256, 6, 6), 36, 0, 0),
        ("Flatten", (9216,), 36, 0, 0),
        ("Linear", (4096,), 16, 37_749, 38),
        ("Linear", (4096,), 16, 16_777, 17),
        ("Linear", (1000,), 4, 4_096, 4),
    ]
    with torch.device("meta"):
        rows = layer_table(AlexNet(), torch.zeros(1, 3, 227, 227))
    found = [
        (
            row.kind,
            row.output,
            round(row.memory_kb),
            round((row.parameters - (row.output[0] if row.kind == "Linear" else 0)) / 1e3),
            round(row.multiply_adds / 1e6),
        )
        for row in rows
    ]
    assert found == lecture
    assert rows[0].parameters == 64 * 3 * 11 * 11 + 64 == 23_296
    assert rows[0].multiply_adds == 64 * 56 * 56 * 3 * 11 * 11 == 72_855_552
    assert rows[5].multiply_adds == 256 * 13 * 13 * 384 * 3 * 3 == 149_520_384
    assert rows[9].multiply_adds == 9216 * 4096 == 37_748_736
    assert sum(row.parameters for row in rows) == 61_100_840


@pytest.mark.parametrize("size", [31, 32, 64])
def test_the_small_stem_takes_small_pictures(size):
    model = AlexNet(num_classes=5, stem="small", hidden=16).eval()
    assert model(torch.rand(2, 3, size, size)).shape == (2, 5)
