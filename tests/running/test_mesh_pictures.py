"""Pictures of meshes against shapes whose outlines are known."""

import base64
import io
import json
import math
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.running import mesh_pictures
from zoo.running.mesh_pictures import (
    AWAY,
    ELEVATION,
    Frame,
    Looked,
    Pair,
    Surface,
    meshes_figure,
    to_gif,
    turned,
    turntable,
    viewer_page,
    write_mesh,
)
from zoo.running.pictures import to_png

trimesh = pytest.importorskip("trimesh")
pytest.importorskip("embreex")
GREY = (0.5, 0.5, 0.5)


def made(mesh, shift=(0, 0, 0)):
    vertices = torch.tensor(np.array(mesh.vertices)).float() + torch.tensor(shift)
    return Surface(vertices, torch.tensor(np.array(mesh.faces)), None)


def pair(true=True):
    ball, box = made(trimesh.creation.icosphere(2, 0.2)), made(trimesh.creation.box((0.5, 0.1, 0.2)))
    return Pair(torch.rand(3, 16, 16), ball, box if true else None, "ball\nChamfer 1.00")


def points_of(mesh, count=3000):
    points, chosen = trimesh.sample.sample_surface(mesh, count, seed=0)
    return Surface(torch.tensor(points).float(), None, torch.tensor(mesh.face_normals[chosen]).float())


def test_a_turn_goes_around_what_is_upright_in_the_world():
    tilt = math.radians(ELEVATION)
    upright, right = np.array([0, math.cos(tilt), math.sin(tilt)]), np.array([1.0, 0, 0])
    assert np.allclose(turned(0), np.eye(3))
    for angle in (30, 90, 222):
        turn = turned(angle)
        assert np.allclose(turn @ upright, upright)
        assert np.allclose(turn @ turn.T, np.eye(3))
        assert np.linalg.det(turn) == pytest.approx(1)
        assert right @ turn @ right == pytest.approx(math.cos(math.radians(angle)))
    front = np.cross(right, upright)
    assert np.allclose(turned(90) @ front, right)  # what faces the viewer goes to the right


@pytest.mark.parametrize("as_points", [False, True])
@pytest.mark.parametrize("angle", [0, 75])
def test_a_ball_is_seen_as_a_disc_of_its_radius_wherever_it_turns(as_points, angle):
    ball = trimesh.creation.icosphere(4, 0.5)
    surface = points_of(ball) if as_points else made(ball)
    seen = Looked(surface, Frame(np.zeros(3), 1.0), GREY).draw(angle, 120)
    shown = (seen < 250).any(-1)
    radius = 60 * math.sqrt(AWAY**2 - 1) * math.tan(math.asin(0.5 / AWAY))
    assert shown.sum() == pytest.approx(math.pi * radius**2, rel=0.2 if as_points else 0.02)
    rows, columns = shown.nonzero()
    assert rows.mean() == pytest.approx(59.5, abs=0.7)
    assert columns.mean() == pytest.approx(59.5, abs=0.7)


@pytest.mark.parametrize("as_points", [False, True])
def test_what_is_in_front_hides_what_is_behind_and_up_is_up(as_points):
    small = trimesh.creation.box((0.5, 0.5, 0.02)).apply_translation((0, 0.4, 0.3))
    large = trimesh.creation.box((1.2, 1.2, 0.02)).apply_translation((0, 0, -0.3))
    frame = Frame(np.zeros(3), 1.0)
    both = [Looked(points_of(each, 20_000) if as_points else made(each), frame, GREY) for each in (small, large)]
    mesh = trimesh.util.concatenate([small, large])
    joint = Looked(points_of(mesh, 40_000) if as_points else made(mesh), frame, GREY)
    seen = joint._points(np.eye(3), 200) if as_points else joint._mesh(np.eye(3), 200)
    first = len(small.faces)
    of_small = joint.points[seen][..., 2] > 0 if as_points else seen < first
    of_small &= seen >= 0
    alone = (both[0]._points if as_points else both[0]._mesh)(np.eye(3), 200) >= 0
    assert (of_small == alone).mean() > 0.98
    rows, columns = of_small.nonzero()
    assert rows.mean() < 75  # above the middle
    assert columns.mean() == pytest.approx(99.5, abs=1)


def test_a_sheet_has_images_predictions_and_truths_and_may_have_none(monkeypatch):
    monkeypatch.setattr(mesh_pictures, "SIDE", 24)
    for pairs in ([pair(), pair()], [pair(False)], [pair(), pair(False)], []):
        with Image.open(io.BytesIO(to_png(meshes_figure(pairs)))) as sheet:
            assert min(sheet.size) > 40


def test_a_turntable_goes_round_once_without_a_jump(monkeypatch):
    monkeypatch.setattr(mesh_pictures, "FRAME_SIDE", 50)
    frames = turntable([pair(), pair(), pair(), pair(), pair()])
    assert {frame.shape for frame in frames} == {(100, 200, 3)}
    steps = [float(np.abs(a.astype(int) - b).mean()) for a, b in zip(frames, frames[1:] + frames[:1], strict=True)]
    assert max(steps) < 3 * np.median(steps)
    with Image.open(io.BytesIO(to_gif(frames))) as animation:
        assert animation.n_frames == len(frames)
        assert animation.info["loop"] == 0
        assert np.abs(np.asarray(animation.convert("RGB")).astype(int) - frames[0]).mean() < 6


@pytest.mark.parametrize("suffix", [".obj", ".glb", ".ply"])
def test_files_are_opened_by_trimesh_as_they_were(suffix, tmp_path):
    surface = pair().predicted
    write_mesh(tmp_path / "new" / f"ball{suffix}", surface.points, surface.faces)
    opened = trimesh.load(tmp_path / "new" / f"ball{suffix}", force="mesh", process=False)
    assert np.allclose(opened.vertices, surface.points, atol=1e-6)
    assert np.array_equal(opened.faces, surface.faces)
    assert np.allclose(opened.vertex_normals, opened.vertices / 0.2, atol=0.05)


def test_the_page_carries_the_meshes_and_needs_nothing_beside_it():
    evil = pair()._replace(caption="</script><b>bold</b>")
    page = viewer_page([evil, pair()._replace(true=points_of(trimesh.creation.box((1, 1, 1)), 100))])
    assert page.count("</script>") == 1
    assert "http" not in page
    content = json.loads(page.split("const content = ")[1].split(";\n")[0])
    ball, box = content["pairs"][0]["surfaces"]
    places = np.frombuffer(base64.b64decode(ball["places"]), "<i2").reshape(-1, 3)
    radius = 0.5 * np.linalg.norm([0.5, 0.1, 0.2])
    radius = max(radius, 0.2)
    assert np.allclose(places / 32767 * radius, evil.predicted.points, atol=2e-5)
    assert np.array_equal(np.frombuffer(base64.b64decode(box["faces"]), "<u4").reshape(-1, 3), evil.true.faces)
    points = content["pairs"][1]["surfaces"][1]
    assert "faces" not in points
    assert len(base64.b64decode(points["normals"])) == 300


@pytest.mark.slow
def test_a_browser_shows_the_page_as_the_sheet_shows_the_meshes(tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no chromium")
    page = viewer_page([pair()])
    for old, new in (
        ("spinning = true", "spinning = false"),
        ("flex: 1;", "position: fixed; bottom: 0; height: 300px;"),
    ):
        assert old in page
        page = page.replace(old, new)
    (tmp_path / "page.html").write_text(page)
    command = [browser, "--headless=new", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    command += ["--hide-scrollbars", "--window-size=600,430", "--virtual-time-budget=3000"]
    command += [f"--screenshot={tmp_path / 'shot.png'}", (tmp_path / "page.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    shot = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB"))[-300:].astype(int)
    if (shot > 250).all():
        pytest.skip("this chromium has no WebGL")
    from zoo.running.mesh_pictures import PREDICTED, TRUE, frame_of

    for half, surface, colour in ((shot[:, :300], pair().predicted, PREDICTED), (shot[:, 300:], pair().true, TRUE)):
        expected = Looked(surface, frame_of(pair()), colour).draw(0, 300).astype(int)
        assert np.abs(half - expected).mean() < 4
