"""The non-local block against its formula, place by place, in float64."""

import pytest
import torch
from torch import nn

from zoo.non_local import NonLocalBlock, insert_non_local


@pytest.mark.parametrize("affinity", ["softmax", "dot_product"])
def test_a_fresh_block_gives_what_it_gets(affinity):
    x = torch.rand(2, 8, 3, 4, 4)
    assert torch.equal(NonLocalBlock(8, affinity)(x), x)


@pytest.mark.parametrize("affinity", ["softmax", "dot_product"])
@pytest.mark.parametrize("pool", [False, True])
def test_it_is_the_formula_place_by_place(affinity, pool):
    torch.manual_seed(0)
    block = NonLocalBlock(4, affinity, pool).double().eval()
    nn.init.normal_(block.norm.weight)
    x = torch.rand(1, 4, 2, 4, 4, dtype=torch.float64)
    theta, phi, g = (layer(x)[0] for layer in (block.theta, block.phi, block.g))  # (2, T, H, W)
    if pool:
        phi, g = (each.unflatten(2, (2, 2)).unflatten(4, (2, 2)).amax((3, 5)) for each in (phi, g))
    places = [(t, i, j) for t in range(2) for i in range(phi.shape[2]) for j in range(phi.shape[3])]
    seen = torch.zeros_like(theta)
    for t in range(2):
        for i in range(4):
            for j in range(4):
                products = torch.stack([theta[:, t, i, j] @ phi[(slice(None), *place)] for place in places])
                f = products.softmax(0) if affinity == "softmax" else products / len(places)
                seen[:, t, i, j] = sum(f[k] * g[(slice(None), *place)] for k, place in enumerate(places))
    torch.testing.assert_close(block(x), x + block.norm(block.out(seen[None])))


def test_it_is_put_behind_layers_of_a_3d_network_and_changes_nothing_at_first():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(3, 6, 3, padding=1), nn.Sequential(nn.ReLU(), nn.Conv3d(6, 4, 1)))
    clip = torch.rand(1, 3, 2, 4, 4)
    before = network(clip)
    insert_non_local(network, ["0", "1.1"], clip)
    torch.testing.assert_close(network(clip), before)
    assert [type(m).__name__ for m in network.modules()].count("NonLocalBlock") == 2
    assert network.training
    assert network[1][1][1].theta.in_channels == 4


@pytest.mark.parametrize(("after", "message"), [(["2"], "there is no layer 2: there are 0, 1"), (["1"], "no map")])
def test_layers_that_are_not_there_or_give_no_map_are_refused(after, message):
    network = nn.Sequential(nn.Conv3d(3, 6, 1), nn.Flatten())
    with pytest.raises(ValueError, match=message):
        insert_non_local(network, after, torch.rand(1, 3, 2, 4, 4))
