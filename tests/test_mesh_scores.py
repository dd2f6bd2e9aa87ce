"""Chamfer distance and F-score against brute force and cases by hand; on one process and on two."""

import json
import math

import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing
from torch import tensor

from zoo.tasks.mesh_scores import NAMES, MeshScores, mesh_scores


def batch(meshes=11, seed=0):
    """Vertices near points of three categories, one of four without a sample; ids in no order."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(meshes, 60, 3, generator=generator) * 0.2 - tensor([0.1, 0.1, 0.9])
    noise = torch.rand(meshes, 1, 1, generator=generator) * 0.02
    vertices = points[:, :40] + noise * torch.randn(meshes, 40, 3, generator=generator)
    return vertices, points, tensor([0, 3, 1] * meshes)[:meshes], 1000 - 7 * torch.arange(meshes)


def brute(vertices, points, tau):
    """The three numbers of one mesh, in float64."""
    squares = (vertices.double()[:, None] - points.double()[None]).square().sum(-1)
    there, back = squares.amin(1), squares.amin(0)
    scores = [float(there.mean() + back.mean())]
    for threshold in (tau, 2 * tau):
        precision, recall = float((there <= threshold).double().mean()), float((back <= threshold).double().mean())
        scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return scores


@pytest.mark.parametrize("tau", [1e-5, 1e-4, 1e-2])
def test_scores_are_brute_forces(tau):
    vertices, points, _, _ = batch()
    found = mesh_scores(vertices, points, tau)
    expected = tensor([brute(v, p, tau) for v, p in zip(vertices, points, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert 0 < found[:, 1:].mean() < 1


def test_scores_by_hand():
    # Of four vertices three are within 0.01 of a point; of two points one is within 0.01 of a vertex.
    vertices = tensor([[[0.0, 0, 0], [0.005, 0, 0], [0, 0.009, 0], [0, 0, 0.5]]])
    points = tensor([[[0.0, 0, 0], [0, 0, 0.513]]])
    chamfer, f_score, wider = mesh_scores(vertices, points)[0].tolist()
    assert chamfer == pytest.approx((0.005**2 + 0.009**2 + 0.013**2) / 4 + 0.013**2 / 2, rel=1e-5)
    assert f_score == pytest.approx(2 * 0.75 * 0.5 / 1.25)
    assert wider == 1  # 0.013² = 1.69e-4 lies between tau and 2 tau


def test_the_thresholds_are_of_squared_distances_and_within():
    points, vertices = torch.zeros(1, 1, 3, dtype=torch.float64), torch.zeros(1, 1, 3, dtype=torch.float64)
    vertices[..., 0] = 0.5
    assert mesh_scores(vertices, points, 0.25)[0].tolist() == [0.5, 1, 1]
    assert mesh_scores(vertices, points, 0.2499)[0].tolist() == [0.5, 0, 1]
    assert mesh_scores(vertices, points, 0.1249)[0].tolist() == [0.5, 0, 0]


def test_the_truth_against_itself_is_perfect():
    _, points, labels, ids = batch()
    metric = MeshScores(4)
    metric.update(points, points, labels, ids)
    assert metric.compute() == {"chamfer": 0, "f_score": 1, "f_score_2tau": 1}


def test_categories_weigh_alike_whatever_their_size():
    vertices, points, labels, ids = batch()
    metric = MeshScores(4)
    for cut in (slice(0, 4), slice(4, 4), slice(4, 11)):
        metric.update(vertices[cut], points[cut], labels[cut], ids[cut])
    scores = tensor([brute(v, p, 1e-4) for v, p in zip(vertices, points, strict=True)], dtype=torch.float64)
    means = torch.stack([scores[labels == k].mean(0) for k in (0, 1, 3)])
    assert metric.compute() == pytest.approx(dict(zip(NAMES, means.mean(0).tolist(), strict=True)), rel=1e-9)
    assert metric.over_samples() == pytest.approx(dict(zip(NAMES, scores.mean(0).tolist(), strict=True)), rel=1e-9)
    assert metric.compute() != pytest.approx(metric.over_samples(), rel=1e-4)
    for k, name in enumerate(NAMES):
        found = metric.per_class()[name]
        assert [found[0], found[1], found[3]] == pytest.approx(means[:, k].tolist(), rel=1e-9)
        assert math.isnan(found[2])
    assert metric.samples() == 11
    metric.reset()
    assert metric.samples() == 0


def test_without_samples_the_scores_are_nan():
    metric = MeshScores(2)
    with pytest.warns(UserWarning, match="no mesh"):
        assert all(math.isnan(value) for value in metric.compute().values())
    assert all(math.isnan(value) for value in metric.over_samples().values())


def test_a_mesh_that_is_not_finite_makes_the_scores_nan():
    vertices, points, labels, ids = batch()
    vertices[4, 3] = torch.nan
    metric = MeshScores(4)
    metric.update(vertices, points, labels, ids)
    assert all(math.isnan(value) for value in metric.compute().values())


def test_a_sample_given_twice_is_counted_once():
    vertices, points, labels, ids = batch()
    metric = MeshScores(4)
    metric.update(vertices, points, labels, ids)
    once = metric.compute()
    metric.update(points[:2], points[:2], labels[:2], ids[:2])  # with another mesh: the first one counts
    with pytest.warns(UserWarning, match="2 of 13 samples"):
        assert metric.compute() == once
    metric.update(vertices[:1], points[1:2], labels[:1], ids[:1])
    with pytest.raises(ValueError, match="the id 1000"):
        metric.compute()


def test_the_same_id_in_two_categories_is_an_error():
    vertices, points, _, _ = batch()
    metric = MeshScores(2)
    metric.update(vertices[[0, 0]], points[[0, 0]], tensor([0, 1]), tensor([5, 5]))
    with pytest.raises(ValueError, match="the id 5"):
        metric.compute()


def test_bad_input_is_told():
    vertices, points, labels, ids = batch()
    with pytest.raises(ValueError, match="11 meshes, 11 sets of points, 10 labels and 11 ids"):
        MeshScores(4).update(vertices, points, labels[:10], ids)
    with pytest.raises(ValueError, match=r"0 to 2: got \[0, 1, 3\]"):
        MeshScores(3).update(vertices, points, labels, ids)
    for arguments in ({"num_classes": 0}, {"tau": 0.0}):
        with pytest.raises(ValueError, match="at least 1 and tau"):
            MeshScores(**arguments)
    with pytest.raises(NotImplementedError):
        MeshScores()(vertices, points, labels, ids)


def share(rank, world, folder, cuts, same_id):
    """One process's part of the samples; its scores as a file."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    vertices, points, labels, ids = (side[slice(*cuts[rank])] for side in batch())
    metric = MeshScores(4)
    metric.update(vertices, points, labels, ids * (0 if same_id else 1))
    try:
        outcome = {"scores": metric.compute(), "over": metric.over_samples(), "samples": metric.samples()}
    except ValueError as error:
        outcome = {"error": str(error)}
    (folder / f"{rank}.json").write_text(json.dumps(outcome))
    distributed.barrier()  # and no destroy_process_group(), in which torch 2.6 hangs at times


def outcomes(folder, cuts, same_id=False):
    torch.multiprocessing.start_processes(share, (2, folder, cuts, same_id), nprocs=2, start_method="fork")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("cuts", [[(0, 5), (5, 11)], [(0, 11), (11, 11)], [(0, 0), (0, 11)], [(0, 6), (5, 11)]])
def test_two_processes_count_each_sample_once_also_if_one_has_none_or_one_is_padded(tmp_path, cuts):
    alone = MeshScores(4)
    alone.update(*batch())
    expected = {"scores": alone.compute(), "over": alone.over_samples(), "samples": 11}
    assert outcomes(tmp_path, cuts) == [expected, expected]


def test_an_error_in_what_processes_have_together_reaches_each(tmp_path):
    for outcome in outcomes(tmp_path, [(0, 5), (5, 11)], same_id=True):
        assert "the id 0" in outcome["error"]
