"""Chamfer distance, graph convolution and Pixel2Mesh's training step, each beside what it would replace, in one run.

    python benchmarks/mesh.py chamfer [--batch_size 8] [--vertices 2466] [--points 9000] [--device cpu]
    python benchmarks/mesh.py convolution [--batch_size 4] [--features 256]
    python benchmarks/mesh.py step [--batch_size 1] [--width 16] [--hidden 256] [--size 224] [--encoder vgg]
    python benchmarks/mesh.py baselines CHECKPOINT RECIPE [--candidates 40] [--targets 60] [--solids 60] [--KEY VALUE …]
    python benchmarks/mesh.py overfit ROOT CATEGORY/MODEL … [--steps 500] [--out overfit]

chamfer: the Chamfer distance of vertices near a sphere to points on it, and its gradients; each way in a process of its
own, whose memory is read before and at its highest.

- cdist: ``torch.cdist(…).square()`` and the least of each row and column;
- cdist, differences: the same with ``compute_mode="donot_use_mm_for_euclid_dist"``, which keeps the digits;
- zoo: ``chamfer_distance``.

How far each way's gradients are from those of float64 brute force is printed as a share of the largest.

convolution: ``W0 f_i + sum over neighbours of W1 f_j`` on the mesh of 2466 vertices, and its gradients.

- dense: a matmul with the dense adjacency;
- torch_geometric: its GraphConv, where it is installed;
- zoo: ``GraphConv``.

sum: the sum over the neighbours alone, by each of torch's ways of having it; this is where GraphConv's was chosen.

step: where the time of a training step goes. There is nothing to compare with.

baselines: a trained model on its test views, after each of its three deformations, beside two that do not look at the
image: the ellipsoid as it is, with as many vertices; and of each category the training shape, as a camera saw it, that
is nearest to the others in the mean: of ``--candidates`` training views to ``--targets`` others. What follows are
overrides of the recipe.

Rounds are interleaved and the median of each way is compared, since machines are noisy; only ratios mean something.
Times on a CPU are those of all its threads together.

Measured on 23 November 2026 on two cores of an Intel Xeon at 2.5 GHz that several other processes used as well (torch
2.14.1, torch_geometric 2.8.1, scipy 1.17.1, one thread):

    chamfer, B=8, V=2466, M=9000           with pynanoflann 0.10: cdist / zoo 140, cdist of differences / zoo 128;
                                           medians of three rounds, of which zoo's took 69 to 74 ms, cdist's 9.5 to
                                           10.0 s. With scipy's trees 81 and 70 (zoo 143 to 151 ms)
    its memory                             cdist 3558 MiB, zoo 5.6 MiB (scipy's trees 3.3)
    its gradients                          cdist 2e-2 off, cdist of differences and zoo 1e-7
    convolution, N=4, C=256                dense / zoo 3.3, torch_geometric / zoo 2.1
    its sum alone                          dense / zoo 18.5, index_add 7.1, padded gather 5.9, sparse 1.3
    step, vgg, 224 px, batch 1, H=256      forward 26 %, losses 5 %, backward 52 %, optimizer 17 %

On a GPU nothing was measured. pynanoflann has no wheels for Python 3.13 and is therefore in no extra: it is used where
it is installed. What was tried, as shares of the time of scipy's tree with 16 points a leaf (medians of six rounds, of
one run or two; the answers were the same throughout):

    scipy, 24 points a leaf                0.95 and 0.89
    scipy, 8 points a leaf                 1.09 in one run
    scipy, 10 points a leaf                1.23 in one run
    scipy, 32 points a leaf                0.98 in one run
    scipy, compact_nodes=False             1.03 with 16 points a leaf in one run
    pynanoflann 0.10, 16 points a leaf     0.76 and 0.70
    pynanoflann, float64, 24 a leaf        0.73 in one run: taken
    pynanoflann, points in order of place  0.82 with 24 points a leaf in one run, of which the sort is a part

overfit of animal/spot, animal/tm_rabbit, figure/suzanne, tableware/teapot and vehicle/vehicle-truck-green of freely
licensed models in ShapeNet's layout: 500 steps, 239 s of one processor, Chamfer distance 0.176 (times 1000) and F-score
0.742, means over the five views that were learnt; the truck, of thin parts, has 0.31 and 0.52, the others 0.12 to 0.19
and 0.71 to 0.85.
"""

import argparse
import math
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn, optim

import zoo
from zoo.pix2mesh import Graph, GraphConv, Pix2MeshNetwork, pool_features, project, published_intrinsics, sphere
from zoo.tasks.mesh_losses import Pix2MeshLoss, chamfer_distance
from zoo.tasks.mesh_scores import MeshScores
from zoo.tasks.shape_scores import point_scores, voxel_iou

PLAIN = {"cdist": "use_mm_for_euclid_dist_if_necessary", "cdist, differences": "donot_use_mm_for_euclid_dist"}
ROUND = 0.2  # a sphere's radius
FEWER = 4  # one of so many points chooses the best training shape


def report(milliseconds: dict[str, list[float]], setting: str) -> None:
    """Print the median of each way, and how many times as long as ours it takes."""
    median = {name: statistics.median(values) for name, values in milliseconds.items()}
    for name, values in milliseconds.items():
        print(f"{setting}  {name:24s} {median[name]:9.1f} ms  ({min(values):.1f} to {max(values):.1f})")
    ratios = [f"{name} / zoo {value / median['zoo']:.1f}" for name, value in median.items() if name != "zoo"]
    print(f"{setting}  {'   '.join(ratios)}")


def clocked(work: Callable[[], object], device: str = "cpu") -> float:
    """Milliseconds that it takes: on a CPU the processor's, which others on the machine disturb less."""
    if device == "cpu":
        start = time.process_time()
        work()
        return 1000 * (time.process_time() - start)
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


# Chamfer


def generated(batch_size: int, vertices: int, points: int, device: str) -> tuple[Tensor, Tensor]:
    """Vertices a little off a sphere, and points on it."""
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(batch_size, count, 3, generator=generator) for count in (vertices, points)]
    mesh, truth = (ROUND * nn.functional.normalize(side, dim=-1) for side in sides)
    mesh += 0.01 * torch.randn(mesh.shape, generator=generator)
    return mesh.to(device).requires_grad_(), truth.to(device)


def by_cdist(mode: str, vertices: Tensor, points: Tensor) -> Tensor:
    squares = torch.cdist(vertices, points, compute_mode=mode).square()
    return squares.amin(2).mean(1) + squares.amin(1).mean(1)


def exact_gradients(vertices: Tensor, points: Tensor) -> Tensor:
    """By brute force in float64, one mesh at a time."""
    exact = vertices.detach().double().requires_grad_()
    for mesh, truth in zip(exact, points.double(), strict=True):
        with torch.no_grad():
            all_distances = torch.cdist(mesh, truth, compute_mode="donot_use_mm_for_euclid_dist")
        there, back = all_distances.argmin(1), all_distances.argmin(0)
        loss = (mesh - truth[there]).square().sum(-1).mean() + (truth - mesh[back]).square().sum(-1).mean()
        loss.backward()
    return exact.grad


def memory(key: str) -> float:
    """MiB of this process: VmRSS now, VmHWM the most since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def serve(way: str, arguments: argparse.Namespace, pipe) -> None:
    """Answer each message with milliseconds and MiB for one run, the first with the gradients' error."""
    torch.set_num_threads(arguments.threads)
    sides = generated(arguments.batch_size, arguments.vertices, arguments.points, arguments.device)
    chamfer = partial(by_cdist, PLAIN[way]) if way in PLAIN else chamfer_distance
    few = generated(1, 50, 50, arguments.device)
    chamfer(*few).sum().backward()  # the libraries are loaded
    while pipe.recv():
        sides[0].grad = None
        on_gpu = arguments.device.startswith("cuda")
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() / 2**20
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
            before = memory("VmRSS")
        spent = clocked(lambda: chamfer(*sides).sum().backward(), arguments.device)
        peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else memory("VmHWM")
        gradients = sides[0].grad.detach().cpu().numpy()
        pipe.send((spent, peak - before, gradients))


def compare_chamfer(arguments: argparse.Namespace) -> None:
    context = multiprocessing.get_context("spawn")
    ends, milliseconds, mebibytes, gradients = {}, {}, {}, {}
    for way in (*PLAIN, "zoo"):
        ends[way], theirs = context.Pipe()
        context.Process(target=serve, args=(way, arguments, theirs), daemon=True).start()
        milliseconds[way], mebibytes[way] = [], []
    for _ in range(arguments.rounds):
        for way, end in ends.items():
            end.send(True)
            spent, more, gradients[way] = end.recv()
            milliseconds[way].append(spent)
            mebibytes[way].append(more)
    for end in ends.values():
        end.send(False)
    setting = f"B={arguments.batch_size}, V={arguments.vertices}, M={arguments.points}"
    report(milliseconds, setting)
    exact = exact_gradients(*generated(arguments.batch_size, arguments.vertices, arguments.points, "cpu"))
    for way, values in mebibytes.items():
        error = (torch.from_numpy(gradients[way]) - exact).abs().max() / exact.abs().max()
        print(f"{setting}  {way:24s} {max(values):9.1f} MiB at most, of gradients {error:.0e} off")


# Graph convolution


def mesh() -> Graph:
    """The third stage's, of 2466 vertices."""
    return Graph(sphere()[1]).unpooled().unpooled()


def adjacency(graph: Graph) -> Tensor:
    both = torch.cat([graph.edges, graph.edges.flip(1)])
    matrix = torch.zeros(len(graph.starts), len(graph.starts))
    matrix[both[:, 0], both[:, 1]] = 1
    return matrix


def dense(conv: GraphConv, matrix: Tensor, x: Tensor) -> Tensor:
    """Meshes first, (N, V, C), as one would write it."""
    return conv.own(x) + matrix @ conv.neighbours(x)


def geometric(features: int, graph: Graph) -> Callable[[Tensor], Tensor] | None:
    try:
        from torch_geometric.nn import GraphConv as Theirs
    except ImportError:
        print("torch_geometric is not installed: it is left out")
        return None
    layer, both = Theirs(features, features), torch.cat([graph.edges, graph.edges.flip(1)]).T.contiguous()
    return lambda x: layer(x, both)  # meshes first, which it takes too


def both_directions(work: Callable[[Tensor], Tensor], x: Tensor) -> None:
    x = x.detach().requires_grad_()
    y = work(x)
    y.backward(torch.ones_like(y))


def interleaved(ways: dict[str, tuple[Callable, Tensor]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each way with its gradients, after one that does not count."""
    milliseconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, (work, x) in ways.items():
            milliseconds[name].append(clocked(partial(both_directions, work, x), str(x.device)))
    return {name: values[1:] for name, values in milliseconds.items()}


def compare_convolution(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    graph, conv = mesh(), GraphConv(arguments.features, arguments.features)
    x = torch.randn(len(graph.starts), arguments.batch_size, arguments.features)
    other = x.transpose(0, 1).contiguous()
    matrix = adjacency(graph)
    ways = {"dense": (partial(dense, conv, matrix), other)}
    if theirs := geometric(arguments.features, graph):
        ways["torch_geometric"] = (theirs, other)
    ways["zoo"] = (partial(conv, graph=graph), x)
    difference = (dense(conv, matrix, other).transpose(0, 1) - conv(x, graph)).abs().max()
    setting = f"N={arguments.batch_size}, C={arguments.features}"
    report(interleaved(ways, arguments.rounds), setting)
    print(f"{setting}  dense and zoo differ by {difference:.0e}")
    report(interleaved(ways_to_sum(graph, matrix, x, other), arguments.rounds), f"sum, {setting}")


def ways_to_sum(graph: Graph, matrix: Tensor, x: Tensor, other: Tensor) -> dict[str, tuple[Callable, Tensor]]:
    """The sum over the neighbours of features with vertices first, x, or meshes first."""
    both = torch.cat([graph.edges, graph.edges.flip(1)])
    to, of = both.unbind(1)
    vertices, most = len(graph.starts), int(to.bincount().max())
    padded = torch.full((vertices, most), vertices)
    ends = torch.cat([graph.starts[1:], torch.tensor([len(graph.neighbours)])])
    for k in range(most):
        there = graph.starts + k < ends
        padded[there, k] = graph.neighbours[graph.starts[there] + k]
    sparse = matrix.to_sparse_coo().coalesce()
    rows = matrix.to_sparse_csr()

    def gathered(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[padded].sum(1)

    return {
        "dense": (lambda x: matrix @ x, other),
        "index_add, meshes first": (lambda x: torch.zeros_like(x).index_add(1, to, x[:, of]), other),
        "index_add": (lambda x: torch.zeros_like(x).index_add(0, to, x[of]), x),
        "padded gather": (gathered, x),
        "sparse, coordinates": (lambda x: torch.sparse.mm(sparse, x.flatten(1)).view_as(x), x),
        "sparse, rows": (lambda x: (rows @ x.flatten(1)).view_as(x), x),
        "zoo": (graph.sum_neighbours, x),
    }


# A training step


def parts_of_a_step(network: Pix2MeshNetwork, images: Tensor, truth: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Milliseconds of each part of one step, one after the other."""
    device = str(images.device)
    optimizer, loss = optim.Adam(network.parameters(), lr=3e-5), Pix2MeshLoss()
    spent, held = {}, {}

    def forward() -> None:
        held["meshes"] = network(images)

    def losses() -> None:
        edges = [graph.edges for graph in network.graphs]
        held["loss"] = sum(loss(*held["meshes"], edges, *truth).values())

    steps = {"forward": forward, "losses": losses, "backward": lambda: held["loss"].backward()}
    for name, work in (steps | {"optimizer": optimizer.step}).items():
        spent[name] = clocked(work, device)
    optimizer.zero_grad()
    with torch.no_grad():  # what the forward pass is made of
        spent["  encoder"] = clocked(lambda: held.update(maps=network.encoder(images)), device)
        places = project(held["meshes"].after[1], published_intrinsics(*images.shape[-2:]).to(images))
        pool = partial(pool_features, held["maps"], network.encoder.strides, places)
        spent["  pooling at 618 vertices"] = clocked(pool, device)
        block, graph = network.blocks[2], network.graphs[2]
        x = torch.randn(len(graph.starts), len(images), block.first.own.in_features, device=images.device)
        spent["  third deformation"] = clocked(lambda: block(x, graph), device)
    return spent


def split_step(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    device = arguments.device
    network = Pix2MeshNetwork(arguments.encoder, arguments.width, arguments.hidden, offsets=True).to(device)
    images = torch.rand(arguments.batch_size, 3, arguments.size, arguments.size, device=device)
    points = generated(arguments.batch_size, 1, arguments.points, device)[1]
    truth = (points + network.centre, points / ROUND)
    rounds = [parts_of_a_step(network, images, truth) for _ in range(arguments.rounds + 1)][1:]
    median = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    whole = sum(value for name, value in median.items() if not name.startswith(" "))
    setting = f"{arguments.encoder}, {arguments.size} px, batch {arguments.batch_size}, H={arguments.hidden}"
    for name, value in median.items():
        print(f"{setting}  {name:26s} {value:9.1f} ms  {100 * value / whole:5.1f} % of the step")


# A trained model beside what does not look


def best_shapes(points: Tensor, categories: Tensor, number: int, candidates: int, targets: int) -> Tensor:
    """Of each category the training view whose points have the least mean Chamfer distance to others': int64 (number,).

    Args:
        points: Of all training views, (V, P, 3).
        categories: int64 (V,).
        number: Of the categories.
        candidates: Views of a category that are tried, evenly among all.
        targets: Views that they are held against.
    """
    best = []
    for category in range(number):
        own = (categories == category).nonzero()[:, 0]
        tried = own[torch.linspace(0, len(own) - 1, min(candidates, len(own))).long()]
        held = points[own[torch.linspace(0, len(own) - 1, min(targets, len(own))).long()], ::FEWER]
        means = [chamfer_distance(points[view, None, ::FEWER].expand(len(held), -1, -1), held).mean() for view in tried]
        best.append(tried[torch.stack(means).argmin()])
    return torch.stack(best)


def training_views(data) -> tuple[Tensor, Tensor]:
    """Points (V, P, 3) and categories (V,) of all training views, as their cameras see them."""
    batches = [(batch["points"], batch["category"]) for batch in data.evaluation_dataloader("train")]
    points, categories = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return points, categories


def ellipsoids(network: Pix2MeshNetwork) -> Tensor:
    """The undeformed mesh with the vertices of the last stage: (2466, 3)."""
    vertices = network.ellipsoid[:, None]
    for graph in network.graphs[:-1]:
        vertices = graph.unpool(vertices)
    return vertices[:, 0]


class Solids:
    """Voxel IoU and scores of sampled points of some views, by what made the mesh."""

    def __init__(self, views: range | list[int]) -> None:
        self.views = set(views)
        self.rows: dict[str, list[list[float]]] = {}
        self.open = 0

    def update(self, name: str, mesh: tuple[Tensor, Tensor], true: tuple[Tensor, Tensor], points: Tensor) -> None:
        """Hold a mesh against the true one and its points (P, 3)."""
        import trimesh

        sampled, _ = trimesh.sample.sample_surface(trimesh.Trimesh(*mesh, process=False), len(points), seed=0)
        scores = point_scores(torch.from_numpy(sampled)[None], points[None].double())
        try:
            iou = voxel_iou(mesh, true)
        except ValueError:  # not closed
            self.open += 1
            iou = math.nan
        self.rows.setdefault(name, []).append([iou, *(float(score) for score in scores)])

    def print(self) -> None:
        """The means over the views; of voxels, over those whose meshes are closed."""
        print(f"{len(self.views)} of these views; voxels of 32 x 32 x 32; points sampled from both surfaces")
        for name, rows in self.rows.items():
            iou, l1, l2, precision, recall, f1 = torch.tensor(rows).nanmean(0).tolist()
            told = f"L1 {l1:.4f}  L2 times 1000 {1000 * l2:.3f}  precision {precision:.4f}  recall {recall:.4f}"
            print(f"{name:24s} IoU {iou:.4f}  {told}  F1 {f1:.4f}")
        if self.open:
            print(f"{self.open} meshes beside true ones of which either is not closed have no IoU")


def data_of(recipe: str, overrides: list[str]):
    """The data module of a recipe, ready to train and to test on."""
    from zoo.running.starting import hushed, prepare, quieten

    quieten()
    with hushed(), tempfile.TemporaryDirectory() as folder:
        nothing = ["--trainer.limit_train_batches", "0", "--trainer.limit_val_batches", "0"]
        data = prepare("fit", recipe, [*nothing, *overrides], trial=Path(folder) / "trial").datamodule
    data.trainer = None
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    return data


@torch.no_grad()
def compare_baselines(arguments: argparse.Namespace) -> None:
    data = data_of(arguments.recipe, arguments.overrides)
    model = zoo.load(arguments.checkpoint)
    points, categories = training_views(data)
    best = best_shapes(points, categories, data.num_classes, arguments.candidates, arguments.targets)
    blocks = [f"deformation {k}" for k in (1, 2, 3)]
    scores = {name: MeshScores(data.num_classes) for name in ("ellipsoid", "best training shape", *blocks)}
    views = len(data.test_set.views)
    solids = Solids(torch.linspace(0, views - 1, min(arguments.solids, views)).long().unique().tolist())
    done = 0
    for batch in data.test_dataloader():
        batch = data.on_after_batch_transfer(batch, 0)
        count = len(batch["image"])
        stages = model.meshes(batch["image"], batch["intrinsics"]).after
        ellipsoid = ellipsoids(model.network)
        found = [ellipsoid.expand(count, -1, -1), points[best[batch["category"]]], *stages]
        for name, vertices in zip(scores, found, strict=True):
            scores[name].update(vertices, batch["points"], batch["category"], torch.arange(done, done + count))
        for row in (row for row in range(count) if done + row in solids.views):
            true, own = data.mesh("test", done + row), batch["points"][row]
            solids.update("ellipsoid", (ellipsoid, model.faces), true, own)
            solids.update("best training shape", data.mesh("train", int(best[batch["category"][row]])), true, own)
            solids.update("model", (stages[-1][row], model.faces), true, own)
        done += count
    print_scores({name: score.compute() for name, score in scores.items()}, done)
    solids.print()


def print_scores(scores: dict[str, dict[str, float]], views: int) -> None:
    print(f"{views} test views, means over the categories; Chamfer distance times 1000")
    for name, each in scores.items():
        shown = f"{1000 * each['chamfer']:9.3f}  F {each['f_score']:.4f}  F at 2 tau {each['f_score_2tau']:.4f}"
        print(f"{name:24s} Chamfer {shown}")


# Some models learnt by heart


def overfit(arguments: argparse.Namespace) -> None:
    from lightning import Trainer, seed_everything

    from datamodules import ShapeNetDataModule
    from zoo.running.mesh_pictures import Surface, meshes_figure
    from zoo.running.pictures import to_png
    from zoo.running.schedules import Cosine

    seed_everything(0, verbose=False)
    out, count = Path(arguments.out), len(arguments.models)
    out.mkdir(parents=True, exist_ok=True)
    (out / "models.txt").write_text("\n".join(arguments.models) + "\n")
    wanted = {"train_list": str((out / "models.txt").absolute()), "val_size": 0, "test_size": 0, "views": 1}
    kept = {"num_points": 2000, "cache_folder": str(out / "points"), "batch_size": count, "eval_batch_size": count}
    data = ShapeNetDataModule(arguments.root, size=137, workers=0, **wanted, **kept)
    model = zoo.Pix2Mesh(
        data.class_names,
        width=4,
        hidden=32,
        residuals=2,
        offsets=True,
        image_size=137,
        optimizer=lambda parameters: optim.Adam(parameters, lr=2e-3),
        scheduler=lambda optimizer, steps: Cosine(optimizer, steps, warmup=0.05),
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    start = time.process_time()
    Trainer(max_steps=arguments.steps, max_epochs=-1, enable_model_summary=False, **quiet).fit(model, data)
    print(f"{arguments.steps} steps, {time.process_time() - start:.0f} s of the processor")
    batch = data.on_after_batch_transfer(next(iter(data.evaluation_dataloader("train"))), 0)
    with torch.no_grad():
        predictions = model.eval().predict_step(batch, 0)
    pairs = []
    for row, (name, prediction) in enumerate(zip(sorted(arguments.models), predictions, strict=True)):
        pair = model._pair(prediction["vertices"], batch, row)
        said = pair.caption.splitlines()[-1]
        print(f"{name}: {said}")
        pairs.append(pair._replace(caption=f"{name}\n{said}", true=Surface(*data.mesh("train", row), None)))
    (out / "sheet.png").write_bytes(to_png(meshes_figure(pairs, "meshes learnt by heart, beside the true ones")))
    zoo.save(model, out / "model.safetensors")


# The command line


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    chamfer, convolution, step = (parts.add_parser(name) for name in ("chamfer", "convolution", "step"))
    for part, rounds, batch_size in ((chamfer, 3, 8), (convolution, 5, 4), (step, 5, 1)):
        part.add_argument("--rounds", type=int, default=rounds)
        part.add_argument("--batch_size", type=int, default=batch_size)
        part.add_argument("--threads", type=int, default=1)
    for part in (chamfer, step):
        part.add_argument("--points", type=int, default=9000, help="of the true surface")
        part.add_argument("--device", default="cpu")
    baselines = parts.add_parser("baselines")
    baselines.add_argument("checkpoint")
    baselines.add_argument("recipe")
    baselines.add_argument("--candidates", type=int, default=40, help="training views that are tried, of a category")
    baselines.add_argument("--targets", type=int, default=60, help="training views that they are held against")
    baselines.add_argument("--solids", type=int, default=60, help="test views whose volumes and points are compared")
    baselines.add_argument("--threads", type=int, default=1)
    learnt = parts.add_parser("overfit")
    learnt.add_argument("root")
    learnt.add_argument("models", nargs="+")
    learnt.add_argument("--steps", type=int, default=500)
    learnt.add_argument("--out", default="overfit")
    learnt.add_argument("--threads", type=int, default=1)
    chamfer.add_argument("--vertices", type=int, default=2466)
    convolution.add_argument("--features", type=int, default=256)
    step.add_argument("--encoder", default="vgg")
    step.add_argument("--width", type=int, default=16)
    step.add_argument("--hidden", type=int, default=256)
    step.add_argument("--size", type=int, default=224)
    arguments, arguments_of_recipe = parser.parse_known_args()
    if arguments_of_recipe and arguments.part != "baselines":
        parser.error(f"unrecognized arguments: {' '.join(arguments_of_recipe)}")
    arguments.overrides = arguments_of_recipe
    return arguments


def main() -> None:
    arguments = parse()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    if arguments.part in ("baselines", "overfit"):
        {"baselines": compare_baselines, "overfit": overfit}[arguments.part](arguments)
        return
    on_gpu = getattr(arguments, "device", "cpu") != "cpu"
    name = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {name}, {os.cpu_count()} cores; median of {arguments.rounds} rounds")
    {"chamfer": compare_chamfer, "convolution": compare_convolution, "step": split_step}[arguments.part](arguments)


if __name__ == "__main__":
    main()
