import builtins
import os

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from scipy.spatial import ConvexHull

import datamodules
from datamodules import ShapeNetDataModule, ShapesDataModule
from datamodules.embedded import shapes
from datamodules.embedded.shapes import FOCAL_LENGTH, FOLDERS, MAKERS, MadeShape, make_shape, render, write_shapes
from datamodules.shapenet_files import LISTS

SIZES = {"train": 12, "val": 6, "test": 6}


def options(root, **more):
    sizes = {f"{split}_size": count for split, count in SIZES.items()}
    return {"root": str(root), "views": 2, "num_points": 300, "batch_size": 6} | sizes | more


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    module = ShapesDataModule(**options(tmp_path_factory.mktemp("shapes")))
    module.prepare_data()
    return module


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def meshes(module):
    for path in sorted((module.folder / "ShapeNetCore.v1").glob("*/*/model.obj")):
        yield path.parent, trimesh.load(path, process=False)


# Shapes


@pytest.mark.parametrize("category", MAKERS)
def test_shapes_are_closed_and_of_one_piece(category):
    for number in range(12):
        shape = make_shape(category, np.random.default_rng([5, number]))
        mesh = trimesh.Trimesh(shape.vertices, shape.faces)  # which takes vertices at one place for one
        assert mesh.is_watertight
        assert mesh.is_winding_consistent
        assert mesh.body_count == 1
        assert mesh.volume > 0  # else it would be inside out
        assert np.abs(mesh.bounds.sum(0)).max() < 1e-5
        assert np.linalg.norm(np.ptp(mesh.bounds, axis=0)) == pytest.approx(1, abs=1e-5)
        assert shape.colours.shape == shape.faces.shape
        assert 0 <= shape.colours.min() <= shape.colours.max() <= 1


def test_normals_point_outward(written):
    """A step along a normal leaves a shape, one against it enters it: counted by the solid angle of all triangles."""
    written.setup("fit")
    for row in range(0, 24, 5):
        view = written.train_set.views.surface(row)[1]
        mesh = trimesh.load(view, process=False)
        surface = written.train_set.surfaces.read(row).double().numpy()[:40]
        for sign, expected in ((1, 0), (-1, 1)):
            corners = mesh.triangles[None] - (surface[:, None, None, :3] + sign * 1e-4 * surface[:, None, None, 3:])
            a, b, c = corners.transpose(2, 0, 1, 3)
            lengths = [np.linalg.norm(v, axis=-1) for v in (a, b, c)]
            top = np.einsum("pfi,pfi->pf", a, np.cross(b, c))
            products = [(x * y).sum(-1) * z for x, y, z in ((a, b, lengths[2]), (b, c, lengths[0]), (c, a, lengths[1]))]
            turns = np.arctan2(top, np.prod(lengths, axis=0) + sum(products)).sum(1) / (2 * np.pi)
            assert (np.abs(turns - expected) < 0.01).mean() > 0.95, view  # at an edge a step may do neither


def test_the_six_categories_differ_and_so_do_their_shapes(written):
    volumes = {}
    for folder, mesh in meshes(written):
        volumes.setdefault(folder.parent.name, []).append(mesh.volume)
    assert set(volumes) == set(FOLDERS.values())
    assert {folder: len(found) for folder, found in volumes.items()} == dict.fromkeys(volumes, 4)
    assert all(len(set(np.round(found, 6))) == 4 for found in volumes.values())
    average = {shapes.NAMES[folder]: np.mean(found) for folder, found in volumes.items()}
    assert average["cabinet"] > 5 * average["chair"] > 5 * average["plane"] / 2


# Pictures


def test_a_picture_shows_what_the_camera_sees():
    """A tetrahedron's corners are at the pixels that the published code would say."""
    vertices = np.array([(0.4, -0.3, 0.1), (-0.3, -0.3, 0.35), (-0.2, -0.2, -0.4), (0.05, 0.45, 0.0)])
    faces = np.array([(0, 1, 2), (0, 3, 1), (1, 3, 2), (0, 2, 3)])
    mesh = trimesh.Trimesh(vertices, faces)
    mesh.fix_normals()
    colours = np.array([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)], dtype=float)
    cameras = np.array([(30, 25, 0.9), (200, 30, 0.7), (310, 28, 0.8)])
    shape = MadeShape(vertices, np.array(mesh.faces), colours)
    for (azimuth, elevation, distance), pixels in zip(cameras, render(shape, cameras), strict=True):
        theta, phi = np.deg2rad([azimuth, elevation])
        back = np.array([np.cos(phi) * np.cos(theta), np.sin(phi), np.cos(phi) * np.sin(theta)])
        right = np.cross([0, 1, 0], back)
        right /= np.linalg.norm(right)
        places = (0.57 * vertices - distance * back) @ np.array([right, np.cross(back, right), back]).T
        pixel = 248 / 224 * 137 * places[:, :2] * (1, -1) / -places[:, 2:] + 68.5  # from the picture's corner
        covered = pixels[..., 3] > 0
        rows, columns = np.nonzero(covered)
        reach = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(reach, [*pixel.min(0), *pixel.max(0)], atol=1.1)
        assert pixels[..., 3].sum() / 255 == pytest.approx(ConvexHull(pixel).volume, rel=0.02)  # in a plane: its area


def test_what_is_in_front_hides_what_is_behind():
    front, behind = (
        trimesh.creation.box((0.02, size, size)).apply_translation((x, 0, 0)) for x, size in ((0.3, 0.3), (-0.3, 0.8))
    )
    both = trimesh.util.concatenate([front, behind])
    colours = np.repeat([(1.0, 0, 0), (0, 0, 1.0)], 12, axis=0)
    (pixels,) = render(MadeShape(np.array(both.vertices), np.array(both.faces), colours), np.array([(0.0, 0.0, 0.9)]))
    assert pixels[68, 68, 0] > 100
    assert pixels[68, 68, 2] == 0
    assert pixels[68, 42, 2] > 100  # beside the nearer one
    assert pixels[68, 42, 0] == 0
    assert pixels[2, 2].tolist() == [0, 0, 0, 0]


def test_an_edge_is_covered_in_part_and_keeps_its_colour():
    shape = make_shape("table", np.random.default_rng(0))
    (pixels,) = render(shape._replace(colours=np.full_like(shape.colours, 0.5)), np.array([(40.0, 27.0, 0.8)]))
    assert set(np.unique(pixels[..., 3]).tolist()) == {0, 64, 128, 191, 255}
    assert pixels[pixels[..., 3] > 0][:, :3].min() > 40  # nothing is mixed with the ground
    assert (pixels[pixels[..., 3] == 0] == 0).all()


def test_points_lie_in_their_pictures_and_reach_their_edges(written):
    written.setup("fit")
    written.setup("test")
    for split in SIZES:
        for batch in written.evaluation_dataloader(split):
            points = batch["points"]
            rays = torch.stack([points[..., 0], -points[..., 1], -points[..., 2]], dim=-1) / -points[..., 2:]
            column, row = (rays @ batch["intrinsics"].transpose(1, 2))[..., :2].round().long().unbind(-1)
            shown = (batch["image"] < 255).any(1)
            here = torch.arange(len(points))[:, None]
            assert shown[here, row, column].float().mean() > 0.97
            near = torch.nn.functional.max_pool2d(shown[:, None].float(), 3, 1, 1)[:, 0]
            assert near[here, row, column].float().mean() > 0.999
            for view in range(len(points)):
                vertices, _ = written.mesh(split, view)
                place = FOCAL_LENGTH * 137 * vertices[:, :2] / -vertices[:, 2:] * torch.tensor([1, -1]) + 68.5
                rows, columns = torch.nonzero(shown[view]).T
                reach = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
                torch.testing.assert_close(reach, torch.cat([place.amin(0), place.amax(0)]), atol=1.1, rtol=0)


# Files


def test_files_are_those_of_shapenet_and_of_its_renderings(written):
    assert sorted(path.name for path in written.folder.iterdir() if path.name != "points") == [
        "ShapeNetCore.v1", "ShapeNetRendering", "test_list.txt", "train_list.txt", "val_list.txt"
    ]  # fmt: skip
    listed = [line for split in SIZES for line in (written.folder / f"{split}_list.txt").read_text().split()]
    assert len(set(listed)) == len(listed) == 24
    for name in listed:
        pictures = written.folder / "ShapeNetRendering" / name / "rendering"
        assert sorted(os.listdir(pictures)) == ["00.png", "01.png", "rendering_metadata.txt"]
        for number in range(2):
            with Image.open(pictures / f"{number:02d}.png") as picture:
                assert (picture.size, picture.mode) == ((137, 137), "RGBA")
        cameras = np.loadtxt(pictures / "rendering_metadata.txt")
        assert cameras.shape == (2, 5)
        assert ((cameras >= [0, 25, 0, 0.65, 25]) & (cameras <= [360, 30, 0, 0.99, 25])).all()


def test_files_are_what_the_general_reader_reads(written):
    reader = ShapeNetDataModule(str(written.folder), focal_length=FOCAL_LENGTH, size=137, num_points=300, workers=0)
    reader.setup("fit")
    written.setup("fit")
    assert reader.class_names == sorted(written.class_names, key=lambda name: FOLDERS[name]) == written.class_names
    theirs, ours = (list(module.evaluation_dataloader("val")) for module in (reader, written))
    assert len(theirs) == len(ours) == 1
    for key, value in ours[0].items():
        assert torch.equal(theirs[0][key], value), key


def test_the_set_is_the_same_each_time_and_fewer_are_the_first_of_more(written, tmp_path):
    ours = {path: data for path, data in files(written.folder).items() if path.parts[0] != "points"}
    write_shapes(tmp_path / "few", list(MAKERS), {"train": 3, "val": 6}, 2)
    few = files(tmp_path / "few")
    lists = {path for path in few if path.parts[0] == LISTS["train"][0]}
    assert len(lists) == 1
    assert {path: ours[path] for path in few.keys() - lists} == {path: few[path] for path in few.keys() - lists}
    write_shapes(tmp_path / "other", list(MAKERS), {"train": 3}, 2, seed=1)
    assert not files(tmp_path / "other").items() & {k: v for k, v in few.items() if k.suffix == ".png"}.items()


def test_shapes_of_splits_are_others(written):
    contents = [path.read_bytes() for path in written.folder.rglob("model.obj")]
    assert len(set(contents)) == 24


def test_a_set_that_is_there_is_not_written_again(written, monkeypatch):
    monkeypatch.setattr(shapes, "write_shapes", None)
    written.prepare_data()


def test_a_run_that_is_killed_leaves_nothing(tmp_path, monkeypatch):
    module = ShapesDataModule(**options(tmp_path))

    def killed(shape, cameras):
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "render", killed)
    with pytest.raises(KeyboardInterrupt):
        module.prepare_data()
    assert os.listdir(tmp_path) == []
    with pytest.raises(FileNotFoundError, match=r"run prepare_data\(\), which writes it"):
        module.setup("fit")


def test_some_categories_in_their_order(tmp_path):
    module = ShapesDataModule(**options(tmp_path, categories=["table", "chair"], train_size=4, val_size=0, test_size=0))
    module.prepare_data()
    module.setup("fit")
    assert module.class_names == ["table", "chair"]
    assert module.num_classes == 2
    (batch,) = list(module.train_dataloader())
    assert sorted(batch["category"].tolist()) in ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1])
    assert module.val_dataloader() == []
    assert "table 2, chair 2" in module.report()
    with pytest.raises(ValueError, match="nothing to test on"):
        module.setup("test")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train_size": 0}, "train_size=0 and views=2 must be at least 1"),
        ({"train_size": 5}, "train_size=5 must be at least 6, a shape of each category"),
        ({"views": 0}, "views=0 must be at least 1"),
        ({"val_size": 0.5}, "val_size=0.5 must be a number of shapes"),
        ({"categories": ["boat"]}, "there is no 'boat', there are plane, cabinet"),
        ({"categories": ["table", "table"]}, "none twice"),
        ({"categories": []}, "one category at least"),
    ],
)
def test_arguments_out_of_range(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        ShapesDataModule(**options(tmp_path, **wrong))


@pytest.mark.parametrize("library", ["manifold3d", "trimesh", "embreex"])
def test_without_a_library_the_extra_is_named(tmp_path, monkeypatch, library):
    real = builtins.__import__
    wanted = "trimesh.ray.ray_pyembree" if library == "embreex" else library

    def without(name, *rest):
        if name == wanted:
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'zoo\[mesh\]'"):
        ShapesDataModule(**options(tmp_path)).prepare_data()


def test_the_class_is_exported():
    assert datamodules.ShapesDataModule is ShapesDataModule
