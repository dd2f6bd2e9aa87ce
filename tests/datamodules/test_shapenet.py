import builtins
import csv
import multiprocessing
import os
import pickle
import shutil
import warnings

import numpy as np
import pytest
import torch
import trimesh
from lightning import Callback, LightningModule, Trainer, seed_everything
from PIL import Image
from safetensors.torch import load_file
from scipy import stats

from datamodules import ShapeNetDataModule
from datamodules.sampling import EvaluationBatches, TrainingBatches
from datamodules.shapenet import MeshLoader
from datamodules.surfaces import intrinsics, read_mesh, read_pickled_points, rotations, sample_mesh, seen_from

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
FEW = {"size": 16, "num_points": 40, "workers": 0, "batch_size": 4, "eval_batch_size": 3, "val_size": 0, "test_size": 0}
CHAIR, TABLE = "03001627", "04379243"
CAMERAS = ["30 25 0 0.8 25", "120.5 28 0 0.7 25", "270 30 0 0.95 25"]


def model(root, name="a", category=CHAIR, cameras=CAMERAS, mesh=None, combined=False, extents=(0.5, 0.6, 0.4)):
    """Write a box and pictures of it: a disc on a clear ground, whose colour says which picture it is."""
    mesh_folder = root / ("" if combined else "ShapeNetCore.v1") / category / name
    pictures = root / ("" if combined else "ShapeNetRendering") / category / name / "rendering"
    mesh_folder.mkdir(parents=True, exist_ok=True)
    pictures.mkdir(parents=True, exist_ok=True)
    text = mesh if mesh is not None else trimesh.creation.box(extents).export(file_type="obj")
    (mesh_folder / "model.obj").write_text(text)
    (pictures / "rendering_metadata.txt").write_text("\n".join(cameras) + "\n")
    for number in range(len(cameras)):
        picture(pictures / f"{number:02d}.png", (10 * number, 40, ord(name[0]), 255))
    return pictures


def picture(path, colour, side=24):
    pixels = np.zeros((side, side, 4), dtype=np.uint8)
    rows, columns = np.mgrid[:side, :side] - side / 2 + 0.5
    pixels[rows**2 + columns**2 < (0.46 * side) ** 2] = colour
    Image.fromarray(pixels).save(path)


@pytest.fixture
def shelf(tmp_path):
    """Three chairs and two tables with three views each, in the two official folders."""
    for name in ("a1", "b2", "c3"):
        model(tmp_path / "set", name)
    for name in ("d4", "e5"):
        model(tmp_path / "set", name, TABLE)
    return tmp_path / "set"


def data(root, stage="fit", **options):
    module = ShapeNetDataModule(str(root), **FEW | options)
    if stage:
        module.setup(stage)
    return module


def batches(loader):
    return list(loader)


def same(one, other):
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(one, other, strict=True)
    )


# Cameras


def camera_of_the_paper(azimuth, elevation, distance):
    """``camera_info`` of the published code, written down anew."""
    theta, phi = np.deg2rad(azimuth), np.deg2rad(elevation)
    place = np.array([np.cos(phi) * np.cos(theta), np.sin(phi), np.cos(phi) * np.sin(theta)]) * distance
    right = np.cross([0, 1, 0], place)
    axes = np.array([right, np.cross(place, right), place])
    return axes / np.linalg.norm(axes, axis=1, keepdims=True), place


def test_points_are_seen_as_in_the_published_code():
    rng = np.random.default_rng(0)
    cameras = np.stack([rng.uniform(0, 360, 6), rng.uniform(-80, 80, 6), rng.uniform(0.6, 1, 6)], axis=1)
    surfaces = rng.normal(size=(6, 50, 6))
    seen = seen_from(torch.from_numpy(surfaces).float(), cameras).numpy()
    for row, camera in enumerate(cameras):
        axes, place = camera_of_the_paper(*camera)
        expected = (0.57 * surfaces[row, :, :3] - place) @ axes.T
        np.testing.assert_allclose(seen[row, :, :3], expected, atol=1e-5)
        np.testing.assert_allclose(seen[row, :, 3:], surfaces[row, :, 3:] @ axes.T, atol=1e-5)


def test_a_camera_by_hand():
    """At azimuth 0 and elevation 0 the camera is on the x axis: it sees z to the left, and x comes towards it."""
    surface = torch.tensor([[[0.0, 0, 1, 0, 0, 1], [0, 1, 0, 0, 1, 0], [1, 0, 0, 1, 0, 0]]])
    seen = seen_from(surface, np.array([[0, 0, 2.0]]))[0]
    expected = [[-0.57, 0, -2, -1, 0, 0], [0, 0.57, -2, 0, 1, 0], [0, 0, -1.43, 0, 0, 1]]
    torch.testing.assert_close(seen, torch.tensor(expected), atol=1e-6, rtol=0)
    rays = torch.tensor([0.1, 0.2, 1.0])  # x / depth, -y / depth: right of and below the middle
    column, row, one = (intrinsics(137, 2.0) @ rays).tolist()
    assert (column, row, one) == pytest.approx((68 + 27.4, 68 + 54.8, 1))


def test_rotations_are_proper():
    turns = rotations(np.random.default_rng(1).uniform(-80, 80, (20, 3)))
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.broadcast_to(np.eye(3), (20, 3, 3)), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(turns), 1)


# Batches


@pytest.mark.parametrize("cache", [True, False])
def test_a_batch(shelf, cache):
    module = data(shelf, cache=cache, size=24)
    assert module.class_names == ["chair", "table"]
    assert module.num_classes == 2
    loaded = batches(module.evaluation_dataloader("train"))
    assert [len(batch["image"]) for batch in loaded] == [3, 3, 3, 3, 3]
    batch = loaded[1]  # of model b2
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
        "image": ((3, 3, 24, 24), torch.uint8),
        "points": ((3, 40, 3), torch.float32),
        "normals": ((3, 40, 3), torch.float32),
        "intrinsics": ((3, 3, 3), torch.float32),
        "category": ((3,), torch.int64),
    }
    assert torch.cat([batch["category"] for batch in loaded]).tolist() == [0] * 9 + [1] * 6
    image = module.on_after_batch_transfer(batch, 0)["image"]
    assert image[:, :, 0, 0].eq(1).all()  # white where the picture is clear
    torch.testing.assert_close(image[2, :, 12, 12] * 255, torch.tensor([20.0, 40, ord("b")]))
    for row, line in enumerate(CAMERAS):
        azimuth, elevation, _, distance, _ = map(float, line.split())
        axes, place = camera_of_the_paper(azimuth, elevation, distance)
        points = (batch["points"][row].numpy() @ axes + place) / 0.57
        outside = np.abs(points) / (0.25, 0.3, 0.2)
        np.testing.assert_allclose(outside.max(1), 1, atol=1e-5)  # on a side of the box
        normals = batch["normals"][row].numpy() @ axes
        on = outside.argmax(1)
        np.testing.assert_allclose(normals[np.arange(40), on], np.sign(points[np.arange(40), on]), atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-5)


def test_half_clear_pixels_keep_their_colour_as_in_the_published_code(tmp_path):
    pictures = model(tmp_path, cameras=CAMERAS[:1])
    picture(pictures / "00.png", (200, 100, 50, 3))
    image = next(iter(data(tmp_path, size=24).train_dataloader()))["image"]
    assert image[0, :, 12, 12].tolist() == [200, 100, 50]


def test_other_values_pass_on_their_way_to_the_device(shelf):
    module = data(shelf)
    example = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    assert module.on_after_batch_transfer(example, 0) is example
    floats = {"image": torch.ones(1, 3, 4, 4)}
    assert module.on_after_batch_transfer(floats, 0) is floats


def test_the_order_follows_the_seed_and_goes_on_from_a_place(shelf):
    module = data(shelf)
    loader = module.train_dataloader()
    whole = batches(loader)
    assert len(whole) == 3  # of four views; the remainder of 15 is left out
    again, torch_seed = module.train_dataloader(), torch.initial_seed()
    assert same(batches(again), whole)
    running = iter(second := module.train_dataloader())
    next(running)
    state = second.state_dict()
    resumed = module.train_dataloader()
    resumed.load_state_dict(state)
    assert same(batches(resumed), whole[1:])
    assert torch.initial_seed() == torch_seed
    other = data(shelf, num_points=20).train_dataloader()
    with pytest.raises(ValueError, match="trained on other samples"):
        other.load_state_dict(state)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_takes_each_view_once_over_all_processes(shelf, world_size):
    module = data(shelf)
    views = []
    for rank in range(world_size):
        batching = EvaluationBatches(15, 2, rank, world_size)
        loader = MeshLoader(module.train_set, batching, 16, 1.1, workers=0)
        taken = batches(loader)
        assert len(taken) == len(batching)
        views += [
            (*image[:, 8, 8].tolist(), int(kind))
            for b in taken
            for image, kind in zip(b["image"], b["category"], strict=True)
        ]
    assert len(views) == 15
    assert len(set(views)) == 15


def test_processes_share_a_training_batch(shelf):
    module = data(shelf)

    def images(rank, world_size):
        order = TrainingBatches(15, 4, 5, rank=rank, world_size=world_size)
        return [batch["image"] for batch in MeshLoader(module.train_set, order, 16, 1.1, workers=0)]

    for whole, *shares in zip(images(0, 1), images(0, 2), images(1, 2), strict=True):
        assert torch.equal(whole, torch.cat(shares))


def test_workers_read_what_one_process_reads(shelf):
    alone = batches(data(shelf, cache=False).train_dataloader())
    module = data(shelf, cache=False, workers=2)
    loader = module.train_dataloader()
    assert same(batches(loader), alone)
    assert same(batches(data(shelf, cache=True).train_dataloader()), alone)
    loader._iterator._shutdown_workers()


class Taken(Callback):
    def __init__(self):
        self.batches = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.batches.append({key: value.clone() for key, value in batch.items()})


class Small(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))

    def training_step(self, batch, index):
        assert batch["image"].dtype == torch.float32
        return ((batch["points"].mean((0, 1)) - self.weight) ** 2).sum()

    def validation_step(self, batch, index):
        assert 0 <= batch["image"].min() <= batch["image"].max() <= 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_trainer_trains_and_validates(shelf):
    seed_everything(0)
    taken = Taken()
    module = data(shelf, stage=None, val_size=1, test_size=1)
    Trainer(max_epochs=2, callbacks=[taken], **QUIET).fit(Small(), module)
    assert len(taken.batches) == 2 * 2  # nine views in batches of four
    assert all(batch["image"].shape == (4, 3, 16, 16) for batch in taken.batches)


class Counts(LightningModule):
    """Counts what is tested, and how often each view was, over all processes."""

    def on_test_epoch_start(self):
        self.seen = torch.zeros(256 * 256)

    def test_step(self, batch, index):
        images = (batch["image"][:, :, 8, 8] * 255).round().long()
        self.seen.index_add_(0, images[:, 0] * 256 + images[:, 2], torch.ones(len(images)))

    def on_test_epoch_end(self):
        seen = self.trainer.strategy.reduce(self.seen, reduce_op="sum")
        self.log_dict({"views": seen.sum(), "different": (seen > 0).float().sum(), "most": seen.max()})


@pytest.mark.parametrize(("strategy", "devices"), [("auto", 1), ("ddp_fork", 2)])
@pytest.mark.parametrize("cache", [True, False])
def test_processes_leave_out_the_same_and_test_the_others_once(shelf, strategy, devices, cache):
    broken(shelf, "nan")
    (shelf / "ShapeNetRendering" / CHAIR / "c3" / "rendering" / "02.png").write_bytes(b"none")
    module = data(shelf, stage=None, corrupt="skip", cache=cache, workers=2, test_size=4)
    trainer = Trainer(**QUIET, strategy=strategy, devices=devices, enable_checkpointing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = trainer.test(Counts(), module, verbose=False)[0]
    left = sum({"a1": 3, "b2": 0, "c3": 2, "d4": 3, "e5": 3}[name] for name in drawn(shelf, 4))
    assert results == {"views": left, "different": left, "most": 1}
    assert not multiprocessing.active_children(), "workers outlived their run"


def drawn(shelf, test_size):
    """The models that are drawn for testing, without the one of which no points can be sampled."""
    order = np.random.default_rng(0).permutation(5)[:test_size]
    return [["a1", "b2", "c3", "d4", "e5"][number] for number in order]


def test_the_mesh_of_a_view_is_where_its_points_are(shelf):
    module = data(shelf)
    vertices, faces = module.mesh("train", 4)
    assert faces.dtype == torch.int64
    points = list(module.evaluation_dataloader("train"))[1]["points"][1].numpy()
    _, distance, _ = trimesh.proximity.closest_point_naive(trimesh.Trimesh(vertices.numpy(), faces.numpy()), points)
    assert distance.max() < 1e-5


# Points


def test_points_are_spread_evenly_over_the_surface(tmp_path):
    """The numbers of points on triangles of very different area are those of their areas."""
    vertices = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 3), (5, 0, 0), (0, 0.2, 0.1)]
    faces = [(0, 1, 2), (0, 2, 3), (0, 4, 3), (1, 4, 5), (0, 1, 1)]  # the last has no area
    path = tmp_path / "model.obj"
    lines = ["v {} {} {}".format(*v) for v in vertices] + ["f {} {} {}".format(*(k + 1 for k in f)) for f in faces]
    path.write_text("\n".join(lines))
    surface = sample_mesh(path, 20000, np.random.default_rng(3))
    corners = np.array(vertices, dtype=float)[np.array(faces[:4])]
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    areas = np.linalg.norm(cross, axis=1) / 2
    normals = cross / (2 * areas[:, None])
    off = np.abs(np.einsum("pfx,fx->pf", surface[:, None, :3] - corners[:, 0], normals))
    matching = (surface[:, 3:] @ normals.T > 1 - 1e-9) & (off < 1e-9)
    assert (matching.sum(1) == 1).all()
    counts = matching.sum(0)
    assert stats.chisquare(counts, 20000 * areas / areas.sum()).pvalue > 1e-3
    # Inside of one: the shares of its corners are uniform on the simplex, so that each is Beta(1, 2).
    inside = surface[matching[:, 2], :3] - corners[2, 0]
    sides = (corners[2, 1:] - corners[2, 0]).T
    shares = np.linalg.lstsq(sides, inside.T, rcond=None)[0]
    assert (shares >= -1e-9).all()
    assert stats.kstest(shares[0], stats.beta(1, 2).cdf).pvalue > 1e-3
    assert stats.kstest(1 - shares.sum(0), stats.beta(1, 2).cdf).pvalue > 1e-3


def test_points_are_the_same_whenever_and_wherever_they_are_sampled(shelf, tmp_path):
    first = batches(data(shelf).evaluation_dataloader("train"))
    shutil.copytree(shelf, tmp_path / "moved")
    elsewhere = data(tmp_path / "moved", cache_folder=str(tmp_path / "other"))
    assert same(batches(elsewhere.evaluation_dataloader("train")), first)
    other = data(shelf, points_seed=1)
    assert not same(batches(other.evaluation_dataloader("train")), first)
    points = first[0]["points"], first[1]["points"]  # of two models with the same mesh
    assert not torch.equal(*points)


def kept(folder):
    return {path: path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_points_are_kept_and_not_sampled_twice(shelf, tmp_path, monkeypatch):
    first = batches(data(shelf).evaluation_dataloader("train"))
    files = kept(tmp_path / "data" / "points")
    assert len(files) == 5
    tensors = load_file(next(iter(files)))
    assert {name: tensor.shape for name, tensor in tensors.items()} == {"points": (40, 3), "normals": (40, 3)}
    monkeypatch.setattr("datamodules.surfaces.sample_mesh", None)
    assert same(batches(data(shelf).evaluation_dataloader("train")), first)


def test_kept_points_are_never_those_of_another_mesh(shelf, tmp_path):
    module = data(shelf)
    before = module.fingerprint("train")
    path = shelf / "ShapeNetCore.v1" / CHAIR / "a1" / "model.obj"
    old = path.stat()
    text = path.read_text()
    path.write_text(text.replace("0.25", "0.35"))
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))  # as a copy that keeps times: same size, same time
    assert path.stat().st_size == old.st_size
    changed = data(shelf)
    vertices, _ = read_mesh(path)
    assert np.abs(vertices).max() > 0.34
    assert changed.train_set.surfaces.read(0)[:, :3].abs().max() > 0.34
    assert changed.fingerprint("train") != before
    assert len(kept(tmp_path / "data" / "points")) == 6


def test_a_damaged_kept_file_is_written_anew(shelf, tmp_path):
    first = batches(data(shelf).evaluation_dataloader("train"))
    files = kept(tmp_path / "data" / "points")
    for number, path in enumerate(files):
        path.write_bytes([b"", b"x" * 100, files[path][:-7], files[path][:60], b"\0" * 8][number])
    assert same(batches(data(shelf).evaluation_dataloader("train")), first)
    assert kept(tmp_path / "data" / "points") == files


def test_a_write_that_fails_leaves_nothing(shelf, tmp_path, monkeypatch):
    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("datamodules.surfaces.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        data(shelf)
    assert [path for path in (tmp_path / "data" / "points").rglob("*") if path.is_file()] == []


# Splits


def names(module, split):
    views = module._set(split).views
    return {os.fsdecode(name).split("/")[1] for name in views.names.tolist()}


def test_a_drawn_split_is_by_model(tmp_path):
    for number in range(20):
        model(tmp_path, f"m{number:02d}")
    module = data(tmp_path, val_size=0.25, test_size=3)
    module.setup("test")
    parts = [names(module, split) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [12, 5, 3]
    assert len(set.union(*parts)) == 20
    again = data(tmp_path, val_size=0.25, test_size=3)
    assert names(again, "train") == parts[0]
    assert names(data(tmp_path, val_size=0.25, test_size=3, split_seed=1), "train") != parts[0]
    for split, size in (("train", 12), ("val", 5), ("test", 3)):
        assert len(module._set(split).views) == 3 * size


def test_lists_of_the_paper(shelf):
    (shelf / "train_list.txt").write_text(
        f"Data/ShapeNetP2M/{CHAIR}/a1/rendering/00.dat\nData/ShapeNetP2M/{CHAIR}/a1/rendering/02.dat\n\n"
        f"Data\\ShapeNetP2M\\{TABLE}\\d4\\rendering\\01.dat\r\n{CHAIR}/b2\n"
    )
    (shelf / "test_list.txt").write_text(f"{CHAIR}/c3\n")
    module = data(shelf)
    module.setup("test")
    views = module.train_set.views
    assert [views.name(view).replace("/rendering", "") for view in range(len(views))] == [
        f"{CHAIR}/a1/00", f"{CHAIR}/a1/02", f"{CHAIR}/b2/00", f"{CHAIR}/b2/01", f"{CHAIR}/b2/02", f"{TABLE}/d4/01"
    ]  # fmt: skip
    assert names(module, "test") == {"c3"}
    assert "1 model that is on no list left out" in module.report()
    assert module.val_dataloader() == []
    held_out = data(shelf, val_size=1)
    assert len(names(held_out, "val")) == 1
    assert names(held_out, "val") | names(held_out, "train") == {"a1", "b2", "d4"}


def test_a_model_on_two_lists_is_refused(shelf):
    (shelf / "one.txt").write_text(f"{CHAIR}/a1/rendering/00.dat\n")
    (shelf / "two.txt").write_text(f"{CHAIR}/a1/rendering/01.dat\n")
    with pytest.raises(ValueError, match=f"{CHAIR}/a1 is both in .*two.txt and in .*one.txt"):
        data(shelf, train_list="one.txt", test_list="two.txt")


def test_shapenets_own_table(shelf):
    with (shelf / "all.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "synsetId", "subSynsetId", "modelId", "split"])
        rows = [(CHAIR, "a1", "train"), (TABLE.lstrip("0"), "d4", "train"), (CHAIR, "b2", "val"), (TABLE, "e5", "test")]
        for number, (category, name, split) in enumerate([*rows, (CHAIR, "zz", "train")]):
            table.writerow([number, category, category, name, split])
    module = data(shelf)
    module.setup("test")
    assert [names(module, split) for split in ("train", "val", "test")] == [{"a1", "d4"}, {"b2"}, {"e5"}]
    assert "1 model on the list without renderings" in module.report()


def test_some_categories_and_views(shelf):
    module = data(shelf, categories=["table"], views=2)
    assert module.class_names == ["table"]
    assert len(module.train_set.views) == 4
    assert module.train_set.views.numbers.tolist() == [0, 1, 0, 1]
    turned = data(shelf, categories=[TABLE, "chair"])
    assert turned.class_names == ["table", "chair"]
    assert next(iter(turned.evaluation_dataloader("train")))["category"].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="has no 'sofa', it has chair, table"):
        data(shelf, categories=["sofa"])


def test_validation_is_tested_on_where_there_is_nothing_else(shelf):
    module = data(shelf, "test", val_size=1)
    assert module.test_set is module.val_set
    with pytest.raises(ValueError, match="nothing to test on"):
        data(shelf, "test")


# What is wrong


def broken(root, kind):
    """Break model b2; what the message says, and the report's line."""
    mesh = root / "ShapeNetCore.v1" / CHAIR / "b2" / "model.obj"
    pictures = root / "ShapeNetRendering" / CHAIR / "b2" / "rendering"
    metadata = pictures / "rendering_metadata.txt"
    corner = "v 0 0 0\nv 1 0 0\nv 0 1 0\n"
    match kind:
        case "no faces":
            mesh.write_text(corner)
            return "model.obj (has no faces|cannot be read as a mesh)", "1 surface that cannot be used"
        case "empty":
            mesh.write_text("")
            return "model.obj (has no faces|cannot be read as a mesh)", "1 surface that cannot be used"
        case "nan":
            mesh.write_text("v 0 nan 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
            return "model.obj has vertices that are not finite", "1 surface that cannot be used"
        case "inf":
            mesh.write_text("v 0 1e300 0\nv 1e300 0 0\nv 0 1 0\nf 1 2 3\n")
            return "model.obj has vertices that are not finite", "1 surface that cannot be used"
        case "degenerate":
            mesh.write_text(corner + "f 1 2 2\nf 1 1 1\n")
            return "model.obj has only degenerate triangles", "1 surface that cannot be used"
        case "face without vertex":
            mesh.write_text(corner + "f 1 2 9\n")
            return "model.obj", "1 surface that cannot be used"
        case "no mesh":
            mesh.unlink()
            return "there is no mesh .*model.obj", "1 model without a mesh"
        case "no metadata":
            metadata.unlink()
            return "rendering_metadata.txt is missing", "1 model without metadata"
        case "short metadata":
            metadata.write_text("\n".join(CAMERAS[:2]))
            return "has 2 lines, none for the picture 02.png", "1 view without a camera"
        case "words":
            metadata.write_text("\n".join([*CAMERAS[:2], "north up 0 far 25"]))
            return "line 3 of .*metadata.txt is 'north up 0 far 25'", "1 view whose camera makes no sense"
        case "turned":
            metadata.write_text("\n".join([*CAMERAS[:2], "10 20 5 0.8 25"]))
            return "line 3 of .* expected azimuth", "1 view whose camera makes no sense"
        case "no picture":
            (pictures / "01.png").unlink()
            return "there is no picture .*01.png", "1 view without a picture"
        case "no views":
            shutil.rmtree(pictures)
            pictures.mkdir()
            metadata.write_text("")
            return "rendering has no picture 00.png", "1 model without views"
        case "cut picture":
            (pictures / "01.png").write_bytes((pictures / "01.png").read_bytes()[:60])
            return "01.png cannot be read as a picture", "1 picture that cannot be read"
        case "oblong":
            Image.new("RGBA", (20, 24)).save(pictures / "01.png")
            return "01.png has 20 x 24 pixels: expected a square", "1 picture that cannot be read"
    raise AssertionError(kind)


KINDS = [
    "no faces", "empty", "nan", "inf", "degenerate", "face without vertex", "no mesh", "no metadata", "short metadata",
    "words", "turned", "no picture", "no views", "cut picture", "oblong",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*are left out")
def test_what_is_broken_is_named_or_left_out(shelf, kind):
    message, line = broken(shelf, kind)
    with pytest.raises(ValueError, match=message):
        data(shelf)
    module = data(shelf, corrupt="skip")
    assert line in module.report()
    wrong_view = line.split(" ", 1)[1].startswith(("view ", "picture "))
    kind_of_view = {"short metadata": 1, "words": 1, "turned": 1, "no picture": 1, "cut picture": 1, "oblong": 1}
    assert wrong_view == (kind in kind_of_view)
    assert len(module.train_set.views) == 15 - (1 if wrong_view else 3)
    assert len(batches(module.evaluation_dataloader("train"))) == (5 if wrong_view else 4)


def test_a_picture_that_breaks_later_is_named(shelf):
    module = data(shelf, cache=False)
    broken(shelf, "cut picture")
    with pytest.raises(ValueError, match=r"01\.png cannot be read as a picture.*corrupt skip"):
        batches(module.evaluation_dataloader("train"))


def test_too_many_broken_meshes_are_an_error(shelf):
    for name in ("a1", "b2", "c3"):
        (shelf / "ShapeNetCore.v1" / CHAIR / name / "model.obj").write_text("v 0 0 0\n")
    with pytest.raises(ValueError, match="3 of 5 surfaces of split train cannot be used"):
        data(shelf, corrupt="skip")


def test_models_without_renderings_are_counted(tmp_path):
    for name in ("a1", "b2"):
        model(tmp_path, name, combined=True)
    shutil.rmtree(tmp_path / CHAIR / "b2" / "rendering")
    module = data(tmp_path)
    assert names(module, "train") == {"a1"}
    assert f"1 model without renderings left out: {CHAIR}/b2" in module.report()


def test_the_second_version_of_meshes(tmp_path):
    model(tmp_path, "a1")
    folder = tmp_path / "ShapeNetCore.v1" / CHAIR / "a1"
    (folder / "models").mkdir()
    (folder / "model.obj").rename(folder / "models" / "model_normalized.obj")
    (tmp_path / "ShapeNetCore.v1").rename(tmp_path / "ShapeNetCore.v2")
    assert len(data(tmp_path).train_set.views) == 3


def test_points_beside_the_pictures_are_warned_of(tmp_path):
    model(tmp_path, mesh=trimesh.creation.box((0.1, 0.1, 0.1)).apply_translation((0, 0.9, 0)).export(file_type="obj"))
    with pytest.warns(UserWarning, match=r"only .*% of the points of split train lie in what the pictures show"):
        data(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size=0 must be at least 1"),
        ({"num_points": 0}, "num_points=0 must be at least 1"),
        ({"views": 0}, "views=0 must be at least 1"),
        ({"focal_length": 0.0}, "focal_length=0.0 must be greater"),
        ({"corrupt": "maybe"}, "must be refuse or skip"),
        ({"val_size": 5}, "leave none of 5"),
        ({"train_list": "none.txt"}, "there is no list .*none.txt"),
        ({"meshes": "none"}, "meshes: there is no folder .*none"),
    ],
)
def test_arguments_out_of_range(shelf, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data(shelf, **options)


def test_a_folder_that_is_none_or_has_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere: expected <root>/ShapeNetCore"):
        data(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no renderings: expected"):
        data(tmp_path / "empty")


def test_without_trimesh_the_extra_is_named(shelf, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == "trimesh":
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'zoo\[mesh\]'"):
        data(shelf)


# Pixel2Mesh's pickles


def reference(count=50, dtype=np.float32):
    return np.random.default_rng(0).normal(size=(count, 6)).astype(dtype)


def hand_written(array):
    """A pickle as Python 2 wrote it: protocol 2, the data as a short string."""
    data = array.tobytes()
    kind = array.dtype.str[1:].encode()
    text = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85q\x03U\x01bq\x04\x87q\x05R"
    )
    text += b"q\x06(K\x01K" + bytes([array.shape[0]]) + b"K\x06\x86q\x07cnumpy\ndtype\nq\x08U\x02" + kind
    text += b"q\x09K\x00K\x01\x87q\x0aRq\x0b(K\x03U\x01<q\x0cNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0db\x89T"
    return text + len(data).to_bytes(4, "little") + data + b"q\x0etq\x0fb."


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5, "python 2", "columns"])
def test_published_points_are_read(tmp_path, protocol, dtype):
    array = reference(dtype=dtype)
    path = tmp_path / "00.dat"
    if protocol == "python 2":
        path.write_bytes(hand_written(array))
        assert np.array_equal(pickle.loads(path.read_bytes(), encoding="latin1"), array)  # it is what it should be
    elif protocol == "columns":
        path.write_bytes(pickle.dumps(np.asfortranarray(array), protocol=2))
    else:
        path.write_bytes(pickle.dumps(array, protocol=protocol))
    if protocol == 5:
        with pytest.raises(ValueError, match=r"it names numpy.*_frombuffer"):
            read_pickled_points(path)
    else:
        assert np.array_equal(read_pickled_points(path), array.astype(np.float64))


class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


HOSTILE = {
    "system": pickle.dumps(Runs(os.system, "touch ran")),
    "eval": pickle.dumps(Runs(eval, "open('ran', 'w')")),
    "exec in protocol 0": b"cbuiltins\nexec\n(S\"open('ran', 'w')\"\ntR.",
    "inst": b"(S\"open('ran', 'w')\"\nibuiltins\neval\n.",
    "stack global": b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x10open('ran', 'w')\x85R.",
    "numpy's own loader": pickle.dumps(Runs(np.load, "x.npy")),
    "getattr": b"cbuiltins\ngetattr\n(cnumpy\nndarray\nS'dump'\ntR.",
    "dotted": b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.tofile\x93.",
    "objects": pickle.dumps(np.array([[1, "a", None, 2, 3, 4]], dtype=object), protocol=2),
    "wrong shape": pickle.dumps(np.zeros((4, 5)), protocol=2),
    "one dimension": pickle.dumps(np.zeros(6), protocol=2),
    "integers": pickle.dumps(np.zeros((4, 6), dtype=np.int64), protocol=2),
    "none": pickle.dumps(np.zeros((0, 6)), protocol=2),
    "nan": pickle.dumps(np.full((4, 6), np.nan), protocol=2),
    "a list": pickle.dumps([[1.0] * 6]),
    "a number": pickle.dumps(3),
    "a large claim": hand_written(reference()).replace(b"K\x32K\x06\x86", b"J\xff\xff\xff\x7fK\x06\x86"),
    "a large memo": b"\x80\x02]r\xff\xff\xff\x7f.",
    "empty": b"",
    "text": b"no pickle\n",
    "persistent": b"Pos.system\n.",
    "extension": b"\x80\x02\x82\x01.",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_pickle_of_anything_else_is_refused_and_not_run(tmp_path, kind):
    path = tmp_path / "00.dat"
    path.write_bytes(HOSTILE[kind])
    with pytest.raises(ValueError, match=r"00\.dat (is no array of points and normals|has points or normals)"):
        read_pickled_points(path)
    assert os.listdir(tmp_path) == ["00.dat"]


def test_the_hostile_pickles_do_run_where_nothing_stops_them(tmp_path):
    pickle.loads(HOSTILE["stack global"])
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("mutations", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_changed_pickle_is_read_as_numbers_or_refused(mutations, tmp_path, monkeypatch):
    """Seeded mutations; whatever they name, nothing but the four stand-ins is ever looked up."""
    monkeypatch.setattr(pickle, "_getattribute", None)  # what would look a name up
    rng = np.random.default_rng(7)
    originals = [hand_written(reference(20)), pickle.dumps(reference(20), protocol=4), pickle.dumps(reference(3), 0)]
    path, refused, read = tmp_path / "00.dat", 0, 0
    for number in range(mutations):
        content = bytearray(originals[number % 3])
        head = min(len(content), 200)  # what is not the numbers themselves
        for _ in range(int(rng.integers(1, 3))):
            place = int(rng.integers(head if rng.random() < 0.8 else len(content)))
            match int(rng.integers(4)):
                case 0:
                    content[place] = int(rng.integers(256))
                case 1:
                    del content[place : place + int(rng.integers(1, 20))]
                case 2:
                    content[place:place] = bytes(rng.integers(0, 256, int(rng.integers(1, 8)), dtype=np.uint8))
                case 3:
                    content = content[: place + 1]
            head = min(head, len(content)) or 1
            content = content or bytearray(b".")
        path.write_bytes(bytes(content))
        try:
            array = read_pickled_points(path)
            assert array.dtype == np.float64
            assert array.shape[1] == 6
        except ValueError as error:
            refused += str(path) in str(error)
        else:
            read += 1
    assert refused + read == mutations
    assert min(refused, read) > mutations / 40
    assert os.listdir(tmp_path) == ["00.dat"]


def test_a_set_of_published_points(tmp_path):
    rng = np.random.default_rng(1)
    written = {}
    for name, count in (("a1", 30), ("b2", 100)):
        folder = tmp_path / "ShapeNetP2M" / CHAIR / name / "rendering"
        folder.mkdir(parents=True)
        for view in (0, 3, 11):
            points = np.concatenate([rng.uniform(-0.1, 0.1, (count, 3)) - (0, 0, 0.8), rng.normal(size=(count, 3))], 1)
            written[f"{name}{view}"] = points.astype(np.float32)
            (folder / f"{view:02d}.dat").write_bytes(pickle.dumps(points.astype(np.float32), protocol=2))
            picture(folder / f"{view:02d}.png", (view, 0, ord(name[0]), 255))
    module = data(tmp_path)
    batch = {
        key: torch.cat([batch[key] for batch in module.evaluation_dataloader("train")])
        for key in ("image", "points", "normals")
    }
    assert batch["image"][:, 0, 8, 8].tolist() == [0, 3, 11, 0, 3, 11]
    for row, name in enumerate(["a10", "a13", "a111", "b20", "b23", "b211"]):
        chosen = torch.cat([batch["points"][row], batch["normals"][row]], dim=1).numpy()
        found = {tuple(line) for line in written[name].tolist()}
        lines = [tuple(line) for line in chosen.tolist()]
        assert set(lines) <= found
        assert len(set(lines)) == min(40, len(found))  # none twice while there are others
    with pytest.raises(ValueError, match=r"00\.dat has points and normals, but no mesh"):
        module.mesh("train", 0)
    (tmp_path / "ShapeNetP2M" / CHAIR / "b2" / "rendering" / "03.dat").write_bytes(HOSTILE["system"])
    with pytest.raises(ValueError, match=r"03\.dat is no array .* it names"):
        data(tmp_path)
    left = data(tmp_path, corrupt="skip")
    assert len(left.train_set.views) == 5
    assert not (tmp_path / "ran").exists()


# Real meshes


def real(zoo_data, **options):
    if not (zoo_data / "meshes").is_dir():
        pytest.skip("ZOO_DATA has no meshes")
    return data(zoo_data / "meshes", **{"num_points": 1000, "size": 137, "val_size": 4, "test_size": 9} | options)


def test_real_meshes_lie_in_what_their_pictures_show(zoo_data):
    module = real(zoo_data)
    module.setup("test")
    assert "4 models without renderings left out" in module.report()
    count = 0
    for split in ("train", "val", "test"):
        shares = []
        for batch in module.evaluation_dataloader(split):
            places = torch.stack([batch["points"][..., 0], -batch["points"][..., 1], -batch["points"][..., 2]], dim=-1)
            pixels = torch.einsum("nij,npj->npi", batch["intrinsics"], places / places[..., 2:])[..., :2]
            shown = torch.nn.functional.max_pool2d((batch["image"] < 255).any(1, keepdim=True).float(), 3, 1, 1)
            columns, rows = pixels.round().long().clamp(-1, 137).unbind(-1)
            shown = torch.nn.functional.pad(shown, (1, 1, 1, 1))  # what is not on the picture is not shown
            shares.append(shown[torch.arange(len(rows))[:, None], 0, rows + 1, columns + 1].mean(1))
            assert (batch["normals"].norm(dim=-1) - 1).abs().max() < 1e-5
        count += len(torch.cat(shares))
        assert torch.cat(shares).mean() > 0.999, split
    assert count == 53 * 8


def test_points_of_real_meshes_are_where_others_sampled_theirs(zoo_data):
    """Chamfer distance to the points that came with a mesh is that of two samples of one surface, and normals agree."""
    from scipy.spatial import cKDTree

    folder = zoo_data / "meshes" / "models"
    for name in ("animal/spot", "vehicle/beetle", "kitting/kit13", "figure/suzanne"):
        theirs = np.load(folder / name / "points.npz")
        vertices, faces = read_mesh(folder / name / "model.obj")
        ours = sample_mesh(folder / name / "model.obj", 2048, np.random.default_rng(0))
        spacing = np.sqrt(trimesh.Trimesh(vertices, faces).area / 2048)
        for a, b in ((ours[:, :3], theirs["points"]), (theirs["points"], ours[:, :3])):
            distance, _ = cKDTree(b).query(a)
            assert 0.3 * spacing < distance.mean() < 0.7 * spacing  # Clark and Evans: half, if both are at random
        _, nearest = cKDTree(theirs["points"]).query(ours[:, :3])
        assert np.median(np.abs((ours[:, 3:] * theirs["normals"][nearest]).sum(1))) > 0.97
