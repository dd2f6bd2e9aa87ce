"""Pixel2Mesh's network against the published counts, torchvision, trimesh and formulas in float64."""

import hashlib

import pytest
import torch
from lightning import Trainer
from torch import nn, optim
from torch.nn import functional as F

import zoo
from zoo.cli import main
from zoo.pix2mesh import (
    Graph,
    GraphConv,
    Pix2MeshNetwork,
    ResNetEncoder,
    VGGEncoder,
    edges_of,
    pool_features,
    project,
    published_intrinsics,
    sphere,
)

COUNTS = [(156, 462, 308), (618, 1848, 1232), (2466, 7392, 4928)]  # vertices, edges, faces: table in the paper's code


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small(seed=0, **arguments):
    torch.manual_seed(seed)
    return Pix2MeshNetwork(**({"width": 2, "hidden": 8, "residuals": 1} | arguments))


def dense(graph):
    """The adjacency matrix from the faces alone."""
    adjacency = torch.zeros(len(graph.starts), len(graph.starts), dtype=torch.float64)
    for a, b in ((0, 1), (1, 2), (2, 0)):
        adjacency[graph.faces[:, a], graph.faces[:, b]] = adjacency[graph.faces[:, b], graph.faces[:, a]] = 1
    return adjacency


# The meshes


@pytest.mark.parametrize("stage", range(3))
def test_meshes_are_closed_manifolds_of_the_published_size(stage):
    graph = small().graphs[stage]
    vertices, edges, faces = COUNTS[stage]
    assert (len(graph.starts), len(graph.edges), len(graph.faces)) == (vertices, edges, faces)
    assert vertices - edges + faces == 2
    directed = torch.cat([graph.faces[:, [0, 1]], graph.faces[:, [1, 2]], graph.faces[:, [2, 0]]])
    # Each edge has two faces, which pass it in opposite directions: closed, and of one orientation.
    assert len(directed.unique(dim=0)) == 2 * edges
    assert torch.equal(directed.unique(dim=0), directed.flip(1).unique(dim=0))
    for vertex in range(vertices):  # the faces at a vertex are one fan
        around = graph.faces[(graph.faces == vertex).any(1)].tolist()
        follows = dict((face * 2)[face.index(vertex) + 1 : face.index(vertex) + 3] for face in around)
        start = place = next(iter(follows))
        for _ in range(len(follows)):
            place = follows[place]
            assert place != start or _ == len(follows) - 1
        assert place == start


def test_the_sphere_is_round_even_and_seen_from_outside():
    vertices, faces = sphere()
    torch.testing.assert_close(vertices.norm(dim=1), torch.ones(156))
    edges = edges_of(faces)
    lengths = (vertices[edges[:, 0]] - vertices[edges[:, 1]]).norm(dim=1)
    assert lengths.max() / lengths.min() < 1.6
    degrees = edges.flatten().bincount()
    assert degrees.min() >= 4
    assert degrees.max() <= 8
    a, b, c = vertices[faces].unbind(1)
    outward = (torch.linalg.cross(b - a, c - a) * (a + b + c)).sum(1)
    assert (outward > 0).all()


def test_trimesh_takes_the_ellipsoid_for_a_volume():
    trimesh = pytest.importorskip("trimesh", reason="trimesh is what the meshes are checked with")
    network = small()
    for graph, vertices in zip(network.graphs, network(torch.ones(1, 3, 32, 32)).before, strict=True):
        mesh = trimesh.Trimesh(vertices[0].detach().numpy(), graph.faces.numpy(), process=False)
        assert mesh.is_watertight
        assert mesh.is_winding_consistent
        assert mesh.euler_number == 2
    first = trimesh.Trimesh(network.ellipsoid.numpy(), network.graphs[0].faces.numpy(), process=False)
    exact = 4 / 3 * torch.pi * 0.276 * 0.194 * 0.2
    assert 0.93 * exact < first.volume < exact
    torch.testing.assert_close(torch.tensor(first.bounds[:, 2]), torch.tensor([-1.0, -0.6]).double(), atol=0.01, rtol=0)
    torch.testing.assert_close(torch.tensor(first.bounds[:, 1]), torch.tensor([-0.194, 0.194]).double())


def test_the_triangles_stay_as_they_are():
    # Trained weights belong to them: what is written in a checkpoint is of no use on others.
    vertices, faces = sphere()
    assert hashlib.sha256(faces.numpy().tobytes()).hexdigest().startswith("ccf24ae554fc7320")
    assert float((vertices.double() * torch.arange(468).view(156, 3)).sum()) == pytest.approx(-11397.7205, abs=1e-2)


def test_unpooling_adds_the_middle_of_every_edge():
    graph = small().graphs[0]
    x = random(156, 2, 5)
    after = graph.unpool(x)
    assert torch.equal(after[:156], x)
    for e in (0, 100, 461):
        i, j = graph.edges[e]
        torch.testing.assert_close(after[156 + e], (x[i] + x[j]) / 2)
    # Every face lies in its parent: the middles of a parent's edges are where the child's corners are.
    vertices, finer = random(156, 1, 3, seed=1), graph.unpooled()
    corners = graph.unpool(vertices)[finer.faces][:, :, 0].view(308, 4, 3, 3)
    parents = vertices[graph.faces][:, :, 0]
    normal = torch.linalg.cross(parents[:, 1] - parents[:, 0], parents[:, 2] - parents[:, 0])
    children = torch.linalg.cross(corners[:, :, 1] - corners[:, :, 0], corners[:, :, 2] - corners[:, :, 0])
    torch.testing.assert_close(children, normal[:, None].expand(-1, 4, -1) / 4)


# Graph convolution


def test_graph_convolution_is_the_papers_formula_in_values_and_gradients():
    torch.manual_seed(0)
    graph, conv = small().graphs[1], GraphConv(5, 4).double()
    nn.init.normal_(conv.own.bias)
    x, weight = random(618, 3, 5).requires_grad_(), random(618, 3, 4, seed=1)
    found = conv(x, graph)
    w0, w1, b = conv.own.weight, conv.neighbours.weight, conv.own.bias
    expected = torch.einsum("oi,vni->vno", w0, x) + torch.einsum("vu,oi,uni->vno", dense(graph), w1, x) + b
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    inputs = [x, w0, w1, b]
    gradients = torch.autograd.grad((found * weight).sum(), inputs)
    for one, other in zip(gradients, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_graph_convolution_by_hand_on_a_tetrahedron():
    graph, conv = Graph(torch.tensor([[0, 1, 2], [0, 2, 3], [0, 3, 1], [1, 3, 2]])), GraphConv(1, 1)
    for parameter, value in ((conv.own.weight, 2.0), (conv.neighbours.weight, 0.5), (conv.own.bias, 1.0)):
        nn.init.constant_(parameter, value)
    x = torch.tensor([1.0, 10.0, 100.0, 1000.0])[:, None, None]
    assert conv(x, graph).flatten().tolist() == [558, 571.5, 706.5, 2056.5]  # 2 x + (sum of the other three) / 2 + 1


def test_graph_convolution_has_gradients_that_numbers_confirm():
    graph = Graph(sphere()[1])
    x = random(156, 1, 1).requires_grad_()
    assert torch.autograd.gradcheck(graph.sum_neighbours, x)


# The camera, and what it sees


def test_projection_is_the_published_one():
    vertices = random(2, 50, 3) * 0.2 + torch.tensor([0.0, 0.0, -0.8])
    x, y, z = vertices.unbind(-1)
    expected = torch.stack([250 * x / -z + 112, 250 * -y / -z + 112], -1)
    torch.testing.assert_close(project(vertices, published_intrinsics(224, 224)), expected)
    torch.testing.assert_close(published_intrinsics(448, 448)[:2], 2 * published_intrinsics(224, 224)[:2])


def test_projection_takes_a_camera_for_each_image():
    vertices = random(2, 5, 3) * 0.1 - torch.tensor([0.0, 0.0, 1.0])
    cameras = torch.stack([published_intrinsics(64, 64), published_intrinsics(96, 128)])
    found = project(vertices, cameras)
    for i in range(2):
        torch.testing.assert_close(found[i], project(vertices[i : i + 1], cameras[i])[0])
    assert project(torch.tensor([[[0.1, 0.1, 0.5]]]), cameras[:1]).isfinite().all()  # behind the camera


def bilinear(feature_map, column, row):
    """A map (C, H, W) at one place, in plain numbers."""
    height, width = feature_map.shape[1:]
    column, row = min(max(column, 0), width - 1), min(max(row, 0), height - 1)
    left, top = min(int(column), width - 1), min(int(row), height - 1)
    right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
    u, v = column - left, row - top
    upper = (1 - u) * feature_map[:, top, left] + u * feature_map[:, top, right]
    lower = (1 - u) * feature_map[:, bottom, left] + u * feature_map[:, bottom, right]
    return (1 - v) * upper + v * lower


def test_pooling_is_bilinear_and_constant_beyond_the_edge():
    maps = [random(2, 3, 16, 12), random(2, 5, 4, 3, seed=1), random(2, 1, 1, 1, seed=2)]
    places = torch.rand(2, 40, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 80 - 10
    places[:, 0], places[:, 1] = torch.tensor([8.0, 20.0]), torch.tensor([44.0, 60.0])  # whole places, a corner
    found = pool_features(maps, (4, 16, 64), places)
    assert found.shape == (40, 2, 9)
    for n in range(2):
        for v in range(40):
            column, row = places[n, v].tolist()
            parts = [bilinear(m[n], column / s, row / s) for m, s in zip(maps, (4, 16, 64), strict=True)]
            torch.testing.assert_close(found[v, n], torch.cat(parts))
    torch.testing.assert_close(found[0, :, :3], maps[0][:, :, 5, 2])  # the published code gives zeros here


def test_pooled_features_have_gradients_for_maps_and_places():
    maps = random(1, 2, 6, 6).requires_grad_()
    places = (torch.rand(1, 4, 2, dtype=torch.float64) * 18 + 1.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda m, p: pool_features([m], (4,), p), (maps, places))


@pytest.mark.parametrize("encoder", ["vgg", "resnet50"])
def test_a_place_of_a_map_sees_the_pixels_around_the_one_that_it_is_taken_for(encoder):
    torch.manual_seed(0)
    network = (VGGEncoder(2) if encoder == "vgg" else ResNetEncoder()).double().eval()
    for module in network.modules():  # linear, so that what is seen is symmetric about its middle
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
    for stride, k in zip(network.strides[:2], range(2), strict=True):
        images = torch.rand(1, 3, 128, 128, dtype=torch.float64).add(1).requires_grad_()
        feature_map = network(images)[k]
        place = 64 // stride
        (seen,) = torch.autograd.grad(feature_map[0, :, place, place].sum(), images)
        weights = seen[0].abs().sum(0)
        if encoder == "vgg":
            assert (weights.sum(0) * torch.arange(128)).sum() / weights.sum() == pytest.approx(64, abs=1e-6)
        extent = weights.sum(0).nonzero()
        assert abs(float(extent[0] + extent[-1]) / 2 - 64) <= (0 if encoder == "vgg" else 1)


# The network


def test_parameters_are_as_many_as_the_published():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        network, paper = Pix2MeshNetwork(), Pix2MeshNetwork(hidden=192)
    assert count(network.encoder) == 12_843_632
    assert [count(block) for block in network.blocks] == [2_070_787, 2_201_859, 2_266_755]
    assert count(network) == 19_383_033
    assert count(paper) == 16_802_009


def test_the_encoders_maps_have_the_published_shapes():
    with torch.device("meta"):
        encoder = VGGEncoder()
        shapes = [tuple(m.shape[1:]) for m in encoder(torch.rand(1, 3, 224, 224))]
    assert shapes == [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]
    assert encoder.features == 960


def test_the_resnets_maps_are_torchvisions():
    from torchvision.models import resnet50
    from torchvision.models.feature_extraction import create_feature_extractor

    torch.manual_seed(0)
    ours, theirs = ResNetEncoder().eval(), resnet50(weights=None).eval()
    ours.network.load_state_dict(theirs.state_dict(), strict=False)
    images = torch.rand(1, 3, 64, 64)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    layers = {f"layer{k}": f"layer{k}" for k in range(1, 5)}
    expected = create_feature_extractor(theirs, layers)((images - mean) / std)
    found = ours(images)
    for one, other in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(one, other)
    assert sum(m.shape[1] for m in found) == ours.features


@pytest.mark.parametrize(("encoder", "offsets"), [("vgg", False), ("vgg", True), ("resnet50", True)])
def test_stages_have_their_shapes_and_every_weight_a_gradient(encoder, offsets):
    network = small(encoder=encoder, offsets=offsets)
    stages = network(torch.rand(2, 3, 64, 64))
    for k, (vertices, _, _) in enumerate(COUNTS):
        assert stages.after[k].shape == stages.before[k].shape == (2, vertices, 3)
    if offsets:  # nothing is deformed at first
        for k in range(3):
            assert torch.equal(stages.after[k], stages.before[k])
        for block in network.blocks:
            nn.init.normal_(block.places.own.weight, std=0.01)
        stages = network(torch.rand(2, 3, 64, 64))
    torch.testing.assert_close(stages.before[0], network.ellipsoid.expand(2, -1, -1))
    for k in (1, 2):
        expected = network.graphs[k - 1].unpool(stages.after[k - 1].transpose(0, 1)).transpose(0, 1)
        torch.testing.assert_close(stages.before[k], expected)
    (sum(after.square().sum() for after in stages.after)).backward()
    still = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


def test_a_block_is_the_published_sequence_of_layers():
    torch.manual_seed(0)
    network = small().double()
    block, graph = network.blocks[2], network.graphs[2]
    adjacency = dense(graph)

    def conv(layer, x):
        return x @ layer.own.weight.T + adjacency @ x @ layer.neighbours.weight.T + layer.own.bias

    x = random(2466, block.first.own.in_features)
    places, hidden = block(x[:, None], graph)
    y = F.relu(conv(block.first, x))
    for residual in block.residuals:
        y = 0.5 * (y + F.relu(conv(residual.conv2, F.relu(conv(residual.conv1, y)))))
    torch.testing.assert_close(hidden[:, 0], y)
    torch.testing.assert_close(places[:, 0], conv(block.places, F.relu(conv(block.last, y))))


def test_meshes_of_a_batch_do_not_touch_each_other():
    network = small().eval()
    images, cameras = torch.rand(3, 3, 64, 64), torch.stack([published_intrinsics(64, 64)] * 3)
    cameras[1, 0, 0] *= 1.3
    together = network(images, cameras).after[-1]
    for i in range(3):
        alone = network(images[i : i + 1], cameras[i : i + 1]).after[-1]
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[1], network(images).after[-1][1])  # the camera matters


def test_places_keep_their_precision_in_bfloat16():
    network = small()
    with torch.autocast("cpu", torch.bfloat16):
        stages = network(torch.rand(2, 3, 64, 64))
    assert {vertices.dtype for vertices in stages.after} == {torch.float32}
    stages.after[-1].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


def test_a_state_dict_has_the_weights_alone():
    network = small()
    assert set(network.state_dict()) == {name for name, _ in network.named_parameters()}
    other = small(seed=1)
    other.load_state_dict(network.state_dict())
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(network(images).after[-1], other(images).after[-1])


@pytest.mark.slow
def test_the_network_exports_with_any_number_of_images():
    class Result(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, images):
            return self.network(images).after[-1]

    model = Result(small().eval())
    program = torch.export.export(model, (torch.rand(2, 3, 64, 64),), dynamic_shapes=({0: torch.export.Dim("n")},))
    images = torch.rand(3, 3, 64, 64)
    torch.testing.assert_close(program.module()(images), model(images))


def test_an_unknown_encoder_is_named():
    with pytest.raises(ValueError, match="encoder='vgg16' is neither vgg nor resnet50"):
        Pix2MeshNetwork(encoder="vgg16")


# The model


def model(seed=0, **arguments):
    torch.manual_seed(seed)
    return zoo.Pix2Mesh(**({"width": 2, "hidden": 8, "residuals": 1, "image_size": 48} | arguments)).eval()


def test_the_default_model_is_the_papers():
    with torch.device("meta"):
        made = zoo.Pix2Mesh()
    assert sum(p.numel() for p in made.parameters()) == 16_802_009
    assert made.example_input_array.shape == (1, 3, 224, 224)
    (group,) = made.optimizer(made.parameters()).param_groups
    assert (group["lr"], group["weight_decay"]) == (3e-5, 1e-5)
    optimizer = optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)
    schedule = made.scheduler(optimizer, 50)
    assert [schedule.factor(step) for step in (0, 39, 40, 49)] == pytest.approx([1, 1, 1 / 3, 1 / 3])


def test_the_models_meshes_are_the_networks_by_the_camera_of_each_image():
    made = model()
    images, camera = torch.rand(2, 3, 48, 48), published_intrinsics(48, 48).repeat(2, 1, 1)
    for one, other in zip(made.meshes(images, camera), made.network(images, camera), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    own = torch.tensor([[248 / 224 * 48, 0, 23.5], [0, 248 / 224 * 48, 23.5], [0, 0, 1]])
    torch.testing.assert_close(made.camera(48, 48), own)
    assert torch.equal(made(images), made.network(images, own).after[-1])
    assert [tuple(edges.shape) for edges in made.edges] == [(edges, 2) for _, edges, _ in COUNTS]
    assert made.faces.shape == (4928, 3)


def test_a_file_starts_a_model_for_other_categories_and_keeps_their_names(tmp_path):
    trained = model(class_names=["chair", "lamp"])
    zoo.save(trained, tmp_path / "w.safetensors")
    other = model(1, class_names=["plane"], weights=str(tmp_path / "w.safetensors"))
    assert other.class_names == ["plane"]
    images = torch.rand(1, 3, 48, 48)
    assert torch.equal(other(images), trained(images))
    assert zoo.load(tmp_path / "w.safetensors").class_names == ["chair", "lamp"]
    with pytest.raises(ValueError, match=r"does not fit Pix2Mesh: network\.blocks.* has shape"):
        model(hidden=16, weights=str(tmp_path / "w.safetensors"))


def test_the_resnet_starts_from_a_classifiers_weights_and_nothing_else_does(tmp_path):
    from torchvision.models import resnet50

    torch.manual_seed(1)
    theirs = resnet50(weights=None)
    torch.save(theirs.state_dict(), tmp_path / "published.pth")
    made = model(encoder="resnet50", backbone_weights=str(tmp_path / "published.pth"))
    assert torch.equal(made.backbone.network.layer4[2].conv3.weight, theirs.layer4[2].conv3.weight)
    with pytest.raises(ValueError, match="backbone_weights='DEFAULT' are for encoder resnet50, this is vgg"):
        model(backbone_weights="DEFAULT")


def test_a_frozen_encoder_stands_still_and_the_rest_learns(tmp_path):
    from zoo.running.freezing import FreezeBackbone

    made = model()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    views = {
        "image": torch.rand(2, 3, 48, 48),
        "points": random(2, 30, 3).float() * 0.1 - torch.tensor([0, 0, 0.8]),
        "normals": F.normalize(random(2, 30, 3, seed=1).float(), dim=-1),
    }
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(**quiet, max_epochs=1, enable_checkpointing=False, callbacks=[FreezeBackbone()])
    trainer.fit(made, torch.utils.data.DataLoader([views], batch_size=None))
    changed = {name for name, value in made.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if not name.startswith("network.encoder.")}


def test_show_tells_what_its_layers_cost(capsys):
    assert main(["show", "pix2mesh", "--width", "2", "--hidden", "8", "--residuals", "1"]) == 0
    table = capsys.readouterr().out
    parameters = sum(p.numel() for p in model().parameters())
    assert f"{parameters:,}" in table
    # Features of 2 * 60 channels and three coordinates, and 8 of the stage before, to 8, of 2466 vertices.
    assert f"{2466 * (120 + 3 + 8) * 8 / 1e6:.3f}" in table
