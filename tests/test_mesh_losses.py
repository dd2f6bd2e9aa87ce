"""Nearest points, Chamfer distance and Pixel2Mesh's losses against float64 brute force and cases by hand."""

import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import tensor
from torch.profiler import ProfilerActivity, profile

from zoo.pix2mesh import Graph, sphere
from zoo.tasks import mesh_losses
from zoo.tasks.mesh_losses import (
    Pix2MeshLoss,
    chamfer_distance,
    distances,
    edge_loss,
    laplacian,
    laplacian_loss,
    move_loss,
    nearest,
    normal_loss,
    take,
)

TETRAHEDRON = tensor([[0, 1, 2], [0, 2, 3], [0, 3, 1], [1, 3, 2]])


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pairwise(vertices, points):
    """All squared distances (N, V, M), from differences, in float64."""
    return (vertices.double()[:, :, None] - points.double()[:, None]).square().sum(-1)


def brute(vertices, points):
    """The Chamfer distance of each mesh."""
    squares = pairwise(vertices, points)
    return squares.amin(2).mean(1) + squares.amin(1).mean(1)


def both_by_distances(vertices, points, pairs):
    ways = ((vertices, points), (points, vertices))
    return [mesh_losses._by_distances(*way, pairs) for way in ways]


# Nearest points

SETS = {
    "random": (random(3, 70, 3), random(3, 90, 3, seed=1)),
    "near": (random(2, 80, 3) * 1e-3 + 5, random(2, 60, 3, seed=1) * 1e-3 + 5),  # where a matrix product loses all
    "far apart": (random(2, 50, 3) * 0.01, random(2, 40, 3, seed=1) * 0.01 + 3),
    "one point": (random(2, 1, 3), random(2, 1, 3, seed=1)),
    "all in one place": (torch.zeros(1, 30, 3, dtype=torch.float64), random(1, 40, 3)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SETS)
def test_the_nearest_are_found_by_tree_and_by_distances(name, dtype):
    vertices, points = (side.to(dtype) for side in SETS[name])
    squares = pairwise(vertices, points)
    for found, back in [nearest(vertices, points), *(both_by_distances(vertices, points, n) for n in (1, 200, 2**24))]:
        assert found.dtype == back.dtype == torch.int64
        # Of several as near any will do; what counts is the distance.
        tolerance = {"rtol": 1e-12 if dtype == torch.float64 else 1e-6, "atol": 0}
        torch.testing.assert_close(squares.gather(2, found[..., None])[..., 0], squares.amin(2), **tolerance)
        torch.testing.assert_close(squares.gather(1, back[:, None])[:, 0], squares.amin(1), **tolerance)


@pytest.mark.parametrize("name", SETS)
def test_the_trees_of_scipy_find_them_where_there_is_no_other(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynanoflann", None)
    vertices, points = SETS[name]
    squares = pairwise(vertices, points)
    found, back = nearest(vertices, points)
    torch.testing.assert_close(squares.gather(2, found[..., None])[..., 0], squares.amin(2), rtol=1e-12, atol=0)
    torch.testing.assert_close(squares.gather(1, back[:, None])[:, 0], squares.amin(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_points_of_half_precision_are_compared_as_they_are(dtype):
    vertices, points = random(1, 40, 3).to(dtype), random(1, 50, 3, seed=1).to(dtype)
    squares = pairwise(vertices, points)
    for found, _ in (nearest(vertices, points), both_by_distances(vertices, points, 300)):
        torch.testing.assert_close(squares.gather(2, found[..., None])[..., 0], squares.amin(2), rtol=1e-6, atol=0)


def test_one_element_of_a_batch_knows_nothing_of_the_others():
    vertices, points = random(4, 30, 3), random(4, 20, 3, seed=1)
    together = nearest(vertices, points)
    for i in range(4):
        for side, alone in zip(together, nearest(vertices[i : i + 1], points[i : i + 1]), strict=True):
            assert torch.equal(side[i : i + 1], alone)


@pytest.mark.parametrize(
    ("vertices", "points"),
    [
        (torch.zeros(2, 5, 3), torch.zeros(1, 5, 3)),
        (torch.zeros(2, 5, 3), torch.zeros(2, 5, 2)),
        (torch.zeros(2, 5, 2), torch.zeros(2, 5, 2)),
        (torch.zeros(2, 0, 3), torch.zeros(2, 5, 3)),
        (torch.zeros(2, 5, 3), torch.zeros(2, 0, 3)),
        (torch.zeros(5, 3), torch.zeros(5, 3)),
    ],
)
def test_what_has_no_nearest_points_is_told(vertices, points):
    with pytest.raises(ValueError, match=r"points \(N, V, 3\) and \(N, M, 3\)"):
        nearest(vertices, points)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_gives_a_loss_that_is_not(value):
    vertices = random(2, 10, 3)
    vertices[1, 3, 0] = value
    loss = chamfer_distance(vertices, random(2, 20, 3, seed=1))
    assert loss.isfinite().tolist() == [True, False]


def test_missing_scipy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynanoflann", None)
    monkeypatch.setitem(sys.modules, "scipy.spatial", None)
    with pytest.raises(ImportError, match=r"zoo\[mesh\]"):
        nearest(torch.zeros(1, 1, 3), torch.zeros(1, 1, 3))


# Chamfer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SETS)
def test_chamfer_and_its_gradients_are_brute_forces(name, dtype):
    vertices, points = (side.to(dtype).requires_grad_() for side in SETS[name])
    weight = torch.arange(1, len(vertices) + 1)
    found = chamfer_distance(vertices, points)
    expected = brute(vertices, points)
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 1e-7}
    torch.testing.assert_close(found.double(), expected, **tolerance)
    if name == "all in one place":  # the minimum has no single gradient
        return
    gradients = torch.autograd.grad((found * weight).sum(), [vertices, points])
    exact = torch.autograd.grad((expected * weight).sum(), [vertices, points])
    for one, other in zip(gradients, exact, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, **tolerance)


def test_chamfer_passes_gradcheck():
    vertices, points = random(2, 12, 3).requires_grad_(), random(2, 9, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(chamfer_distance, (vertices, points))


def test_chamfer_by_hand():
    vertices = tensor([[[0.0, 0, 0], [2, 0, 0]]])
    points = tensor([[[0.0, 1, 0], [0, 0, 3], [2, 0, 0], [2, 0, 0]]])
    assert chamfer_distance(vertices, points).item() == (1 + 0) / 2 + (1 + 9 + 0 + 0) / 4
    assert chamfer_distance(points, points).item() == 0
    to_points, to_vertices, places = distances(vertices, points)
    assert (to_points.tolist(), to_vertices.tolist()) == ([[1, 0]], [[1, 9, 0, 0]])
    assert places[0, 0] == 0
    assert places[0, 1] in (2, 3)


def test_chamfer_holds_no_matrix_of_distances():
    vertices = random(2, 2466, 3, dtype=torch.float32).requires_grad_()
    points = random(2, 9000, 3, seed=1, dtype=torch.float32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        chamfer_distance(vertices, points).sum().backward()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in record.events())
    assert 0 < allocated < 2 * 2466 * 9000 * 4 / 20  # all that torch ever asked for, of a matrix in float32


def test_chamfer_of_the_benchmarks_size_takes_hardly_any_memory():
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("the process's memory is read from /proc")

    def resident():
        return int(next(line for line in status.read_text().splitlines() if line.startswith("VmRSS")).split()[1]) / 1024

    points = random(8, 9000, 3, seed=1, dtype=torch.float32)
    vertices = (points[:, :2466] + 0.01).requires_grad_()
    chamfer_distance(vertices, points).sum().backward()  # libraries and pools of memory
    done, seen = threading.Event(), []

    def watch():
        while not done.is_set():
            seen.append(resident())
            time.sleep(0.002)

    before, thread = resident(), threading.Thread(target=watch)
    thread.start()
    chamfer_distance(vertices, points).sum().backward()
    done.set()
    thread.join()
    # The two matrices' worth that brute force holds is 1354 MiB in float32, and more for the gradients.
    assert max(seen) - before < 13


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the search by distances is what a GPU does")
def test_a_gpu_gives_the_same_and_holds_no_matrix():
    vertices = random(8, 2466, 3, dtype=torch.float32).cuda().requires_grad_()
    points = random(8, 9000, 3, seed=1, dtype=torch.float32).cuda()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = chamfer_distance(vertices, points)
    found.sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    torch.testing.assert_close(found.cpu(), chamfer_distance(vertices.cpu(), points.cpu()), rtol=1e-5, atol=1e-7)
    assert peak < 8 * 2466 * 9000 * 4 / 3


# The other losses


def by_loops(vertices, edges, normals):
    """Edge and normal loss, Laplacian coordinates, of one mesh, one edge at a time."""
    lengths, cosines = [], []
    sums, degrees = torch.zeros_like(vertices), torch.zeros(len(vertices), dtype=vertices.dtype)
    for i, j in edges.tolist():
        way = vertices[i] - vertices[j]
        lengths.append(way.square().sum())
        cosines += [(way @ normals[end]).abs() / (way.norm() * normals[end].norm()) for end in (i, j)]
        for one, other in ((i, j), (j, i)):
            sums[one] += vertices[other]
            degrees[one] += 1
    return torch.stack(lengths).mean(), torch.stack(cosines).mean(), vertices - sums / degrees[:, None]


def test_edge_normal_and_laplacian_are_their_formulas():
    edges = Graph(sphere()[1]).edges
    vertices, normals = random(2, 156, 3), random(2, 156, 3, seed=1)
    parts = [by_loops(v, edges, n) for v, n in zip(vertices, normals, strict=True)]
    torch.testing.assert_close(edge_loss(vertices, edges), (parts[0][0] + parts[1][0]) / 2)
    torch.testing.assert_close(normal_loss(vertices, edges, normals), (parts[0][1] + parts[1][1]) / 2)
    torch.testing.assert_close(laplacian(vertices, edges), torch.stack([parts[0][2], parts[1][2]]))
    other = random(2, 156, 3, seed=2)
    change = laplacian(vertices, edges) - laplacian(other, edges)
    torch.testing.assert_close(laplacian_loss(vertices, other, edges), change.square().sum(-1).mean())
    torch.testing.assert_close(move_loss(vertices, other), (vertices - other).norm(dim=-1).square().mean())


def test_losses_by_hand():
    edges = Graph(TETRAHEDRON).edges
    vertices = tensor([[[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]])
    assert edge_loss(vertices, edges).item() == pytest.approx((1 + 1 + 1 + 2 + 2 + 2) / 6)
    up = tensor([[[0.0, 0, 2]] * 4])  # of any length; the edges on the ground are at right angles to it
    expected = (3 * 0 + 1 + 2 * 0.5**0.5) / 6  # three lie on the ground, one stands, two lean
    assert normal_loss(vertices, edges, up).item() == pytest.approx(expected)
    torch.testing.assert_close(laplacian(vertices, edges)[0, 0], tensor([-1.0, -1, -1]) / 3)
    assert laplacian_loss(vertices + 7, vertices, edges).item() == pytest.approx(0, abs=1e-10)  # moved as a whole
    assert move_loss(vertices + tensor([1.0, 2, 2]), vertices).item() == 9


def test_gradients_stay_finite_where_edges_have_no_length():
    vertices = torch.zeros(1, 4, 3, requires_grad=True)
    loss = normal_loss(vertices, Graph(TETRAHEDRON).edges, random(1, 4, 3, dtype=torch.float32))
    loss.backward()
    assert loss.item() == 0
    assert vertices.grad.isfinite().all()


def test_take_takes_of_each_its_own():
    values = random(3, 5, 2)
    places = torch.randint(5, (3, 7), generator=torch.Generator().manual_seed(0))
    expected = torch.stack([values[n][places[n]] for n in range(3)])
    assert torch.equal(take(values, places), expected)


# All together


def stages():
    """Vertices after and before two stages, their edges, points and normals."""
    graphs = [Graph(sphere()[1])]
    graphs.append(graphs[0].unpooled())
    before = [random(2, len(graph.starts), 3, seed=2) * 0.1 for graph in graphs]
    after = [each + random(*each.shape, seed=3) * 0.1 for each in before]
    return after, before, [graph.edges for graph in graphs], random(2, 300, 3) * 0.1, random(2, 300, 3, seed=1)


def test_the_loss_is_the_published_codes_over_3000():
    after, before, edges, points, normals = stages()
    expected = 0.0
    for k in range(2):
        squares = pairwise(after[k], points)
        chamfer = 3000 * squares.amin(1).mean() + 3000 * 0.55 * squares.amin(2).mean()
        chosen = torch.stack([normals[n][squares[n].argmin(1)] for n in range(2)])
        parts = [by_loops(after[k][n], edges[k], chosen[n]) for n in range(2)]
        earlier = [by_loops(before[k][n], edges[k], chosen[n])[2] for n in range(2)]
        change = sum((parts[n][2] - earlier[n]).square().sum(1).mean() for n in range(2)) / 2
        expected += chamfer + 300 * (parts[0][0] + parts[1][0]) / 2 + 0.48 * (parts[0][1] + parts[1][1]) / 2
        expected += 1500 * change * (0.1 if k == 0 else 1)
        expected += 100 * (after[k] - before[k]).square().sum(-1).mean() * (k > 0)
    terms = Pix2MeshLoss()(after, before, edges, points, normals)
    assert list(terms) == ["chamfer", "normal", "laplacian", "edge", "move"]
    torch.testing.assert_close(3000 * sum(terms.values()), expected, rtol=1e-9, atol=0)
    assert all(term > 0 for term in terms.values())


@pytest.mark.parametrize(
    ("name", "argument"), [(n, n) for n in ("normal", "laplacian", "edge", "move")] + [("chamfer", "opposite")]
)
def test_a_weight_weighs_its_own_term(name, argument):
    given = stages()
    none, one, two = (Pix2MeshLoss(**{argument: weight})(*given) for weight in (0.0, 1.0, 2.0))
    torch.testing.assert_close(two[name] - none[name], 2 * (one[name] - none[name]))
    assert one[name] > none[name]
    assert all(torch.equal(one[other], two[other]) for other in one if other != name)


def test_the_loss_has_gradients_that_numbers_confirm():
    after, before, edges, points, normals = stages()
    first = after[0].requires_grad_()

    def loss(vertices):
        return sum(Pix2MeshLoss()([vertices], before[:1], edges[:1], points, normals).values())

    assert torch.autograd.gradcheck(loss, first, fast_mode=True)


def test_the_loss_moves_vertices_to_the_points():
    surface, faces = sphere()
    graph = Graph(faces)
    points = torch.nn.functional.normalize(random(1, 2000, 3, dtype=torch.float32), dim=-1) * 0.3
    start = (surface * tensor([0.276, 0.194, 0.2]))[None]
    vertices = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([vertices], lr=0.01)
    losses = []
    for _ in range(100):
        terms = Pix2MeshLoss()([vertices], [start], [graph.edges], points, points / 0.3)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        losses.append(chamfer_distance(vertices.detach(), points).item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("meshes", [1, 2, 3])
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 2, 0)])
def test_nearest_points_are_those_of_all_distances_however_the_numbers_lie_in_memory(meshes, order):
    generator = torch.Generator().manual_seed(0)
    back = [order.index(k) for k in range(3)]
    vertices, points = (
        torch.randn(meshes, count, 3, generator=generator).permute(order).contiguous().permute(back)
        for count in (156, 90)
    )
    squares = (vertices[:, :, None] - points[:, None]).square().sum(-1)
    to_points, to_vertices, places = distances(vertices, points)
    torch.testing.assert_close(to_points, squares.min(2).values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(to_vertices, squares.min(1).values, rtol=1e-5, atol=1e-6)
    assert torch.equal(places, squares.argmin(2))
