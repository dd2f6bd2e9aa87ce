"""Meshes to look at: a sheet from several sides, turning, to be turned by hand in a browser, and as files.

What is shown stands in a camera's frame as Pixel2Mesh's do: the camera looks down on it, and it turns around the axis
that is upright in the world.
"""

import base64
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from lightning import LightningModule
from PIL import Image
from torch import Tensor

from zoo.running.checkpoint import replacing
from zoo.running.pictures import log_file, log_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ELEVATION = 27.5  # degrees that ShapeNet's renderings look down: between 25 and 30
ANGLES = (0, 60, 180)  # degrees; at 0 a mesh is seen as in the image
SIDE = 180  # pixels of a mesh on a sheet
TURNING = 4  # meshes of an animation
FRAMES, FRAME_SIDE, MILLISECONDS = 24, 140, 90  # of a turn
AWAY = 4.0  # of the camera from the middle of what is shown, in its radii
PREDICTED, TRUE = (0.36, 0.55, 0.85), (0.80, 0.74, 0.66)
SMALL = 30_000  # triangles of a true mesh that a page carries; of larger ones it has points


class Surface(NamedTuple):
    """A mesh, or points of a surface.

    Attributes:
        points: float (P, 3).
        faces: int64 (F, 3); None if they are points alone.
        normals: Of such points, float (P, 3).
    """

    points: Tensor
    faces: Tensor | None
    normals: Tensor | None


class Pair(NamedTuple):
    """An image (3, H, W) in [0, 1], what was made of it, and what is true, if known."""

    image: Tensor
    predicted: Surface
    true: Surface | None
    caption: str


def write_mesh(path: Path, vertices: Tensor, faces: Tensor) -> None:
    """Write a mesh, complete or not at all, making its folder.

    Args:
        path: Ends in ``.obj``, ``.glb``, ``.ply`` or another format that trimesh writes.
        vertices: float (V, 3).
        faces: int64 (F, 3).

    Raises:
        ImportError: trimesh is not installed.
    """
    trimesh = _library("trimesh")
    arrays = vertices.detach().float().cpu().numpy(), faces.cpu().numpy()
    mesh = trimesh.Trimesh(*arrays, process=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    mesh.vertex_normals  # noqa: B018  (trimesh writes normals that it has computed before)
    content = mesh.export(file_type=path.suffix[1:])
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def _library(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"meshes need {error.name}: pip install 'zoo[mesh]'") from error


# What a camera sees of a surface


class Frame(NamedTuple):
    """Where a camera stands: what it looks at (3,), and how far that reaches around there."""

    centre: np.ndarray
    radius: float


def frame_of(pair: Pair) -> Frame:
    """A frame in which both meshes are whole, at every angle."""
    shown = [pair.predicted] if pair.true is None else [pair.predicted, pair.true]
    points = np.concatenate([each.points.numpy() for each in shown])
    points = points[np.isfinite(points).all(1)] if np.isfinite(points).any() else np.zeros((1, 3))
    centre = (points.min(0) + points.max(0)) / 2
    return Frame(centre, max(float(np.linalg.norm(points - centre, axis=1).max()), 1e-6))


def turned(angle: float) -> np.ndarray:
    """The rotation (3, 3) by an angle in degrees around what is upright in the world."""
    tilt, turn = math.radians(ELEVATION), math.radians(angle)
    upright = np.array([0, math.cos(tilt), math.sin(tilt)])
    across = np.cross(np.eye(3), upright)  # times a vector: what is at right angles to it and to the axis
    return math.cos(turn) * np.eye(3) + math.sin(turn) * across + (1 - math.cos(turn)) * np.outer(upright, upright)


class Looked:
    """A surface, prepared to be drawn from any side.

    Args:
        surface: The surface.
        frame: Where the camera stands.
        colour: Red, green and blue in [0, 1].

    Raises:
        ImportError: It is a mesh, and embreex or trimesh is not installed.
    """

    def __init__(self, surface: Surface, frame: Frame, colour: tuple[float, float, float]) -> None:
        self.colour = np.array(colour)
        self.points = np.nan_to_num((surface.points.numpy() - frame.centre) / frame.radius).astype(np.float64)
        self.rays: Any = None
        if surface.faces is None:
            self.normals = np.zeros_like(self.points) if surface.normals is None else surface.normals.numpy()
        else:
            mesh = _library("trimesh").Trimesh(self.points, surface.faces.numpy(), process=False)
            self.rays = _library("trimesh.ray.ray_pyembree").RayMeshIntersector(mesh)
            corners = mesh.triangles
            normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
            self.normals = normals / np.linalg.norm(normals, axis=1, keepdims=True).clip(1e-12)

    def draw(self, angle: float, side: int) -> np.ndarray:
        """Seen on white, turned by an angle in degrees: uint8 (side, side, 3)."""
        turn = turned(angle)
        fine = 2 * side  # two rays a pixel along each axis
        hit = self._points(turn, fine) if self.rays is None else self._mesh(turn, fine)
        light = _light(self.normals @ turn.T)
        seen = np.concatenate([light[:, None] * self.colour, np.ones((1, 3))])[hit].clip(0, 1)
        return (seen.reshape(side, 2, side, 2, 3).mean((1, 3)) * 255).round().astype(np.uint8)

    def _mesh(self, turn: np.ndarray, side: int) -> np.ndarray:
        """The triangle that each ray hits (side, side), -1 for none."""
        across = ((np.arange(side) + 0.5) / side * 2 - 1) / math.sqrt(AWAY**2 - 1)
        columns, rows = np.meshgrid(across, -across)
        directions = np.stack([columns, rows, -np.ones_like(columns)], axis=-1).reshape(-1, 3) @ turn
        origins = np.broadcast_to(AWAY * turn[2], directions.shape)
        return np.asarray(self.rays.intersects_first(origins, directions)).reshape(side, side)

    def _points(self, turn: np.ndarray, side: int) -> np.ndarray:
        """The point whose disc is seen at each place (side, side), -1 for none."""
        x, y, z = (self.points @ turn.T).T
        scale = math.sqrt(AWAY**2 - 1) / (AWAY - z) * side / 2
        size = max(1.0, 0.8 * side / math.sqrt(max(len(x), 1)))
        around = np.arange(-int(size), int(size) + 1)
        down, right = (each.ravel() for each in np.meshgrid(around, around, indexing="ij"))
        inside = down**2 + right**2 <= size**2
        rows = (side / 2 - y * scale).astype(int)[:, None] + down[inside]
        columns = (side / 2 + x * scale).astype(int)[:, None] + right[inside]
        order = np.argsort(z)  # the nearest last, over the others
        hit = np.full((side, side), -1)
        rows, columns = rows[order].clip(0, side - 1), columns[order].clip(0, side - 1)
        hit[rows.ravel(), columns.ravel()] = np.repeat(order, rows.shape[1])
        return hit


def _light(normals: np.ndarray) -> np.ndarray:
    """How bright (P,) what has those normals (P, 3) is; either side of it."""
    facing = np.where(normals[:, 2:] < 0, -normals, normals)
    key, fill = np.array([-0.45, 0.75, 0.5]), np.array([0.8, 0.1, 0.6])
    lamps = [share * (facing @ (lamp / np.linalg.norm(lamp))).clip(0) for lamp, share in ((key, 0.62), (fill, 0.3))]
    return np.asarray(0.36 + lamps[0] + lamps[1])


# Sheets


def meshes_figure(pairs: list[Pair], title: str = "") -> "Figure":
    """A sheet: in each row an image, the mesh that was made of it from three sides, and the true one.

    Args:
        pairs: What to show; there may be none.
        title: Heading of the sheet.

    Raises:
        ImportError: embreex or trimesh is not installed.
    """
    from matplotlib.figure import Figure

    truths = any(pair.true is not None for pair in pairs)
    columns = 1 + len(ANGLES) * (1 + truths)
    rows = max(1, len(pairs))
    figure = Figure(figsize=(1.7 * columns, 1.9 * rows + 0.7), layout="constrained")
    figure.suptitle(title or ("meshes" if pairs else "meshes: none"), fontsize=11)
    for row, pair in enumerate(pairs):
        pictures = [np.asarray(pair.image.clamp(0, 1).permute(1, 2, 0)), *_from_all_sides(pair)]
        for column, picture in enumerate(pictures):
            axes = figure.add_subplot(rows, columns, row * columns + column + 1)
            axes.imshow(picture, vmin=0, vmax=1)
            axes.axis("off")
            whose = "predicted" if column <= len(ANGLES) else "true"
            of_side = f"{whose}, {ANGLES[(column - 1) % len(ANGLES)]}°" if row == 0 else ""
            axes.set_title(of_side if column else pair.caption, fontsize=8, color="dimgrey" if column else "black")
    return figure


def _from_all_sides(pair: Pair) -> list[np.ndarray]:
    return [looked.draw(angle, SIDE) for looked in _prepared(pair) for angle in ANGLES]


def _prepared(pair: Pair) -> list[Looked]:
    """The predicted surface and, if known, the true one, in one frame."""
    frame = frame_of(pair)
    both = [(pair.predicted, PREDICTED), (pair.true, TRUE)]
    return [Looked(surface, frame, colour) for surface, colour in both if surface is not None]


def turntable(pairs: Sequence[Pair]) -> list[np.ndarray]:
    """The first four pairs, predicted above true, as they turn once: frames uint8 (height, width, 3).

    Raises:
        ImportError: embreex or trimesh is not installed.
    """
    prepared = [_prepared(pair) for pair in pairs[:TURNING]]
    return [
        np.concatenate([np.concatenate([one.draw(angle, FRAME_SIDE) for one in each]) for each in prepared], axis=1)
        for angle in np.arange(FRAMES) * 360 / FRAMES
    ]


def to_gif(frames: list[np.ndarray]) -> bytes:
    """An animation that goes round, as a GIF file's content."""
    buffer = io.BytesIO()
    # One palette for all: colours that each frame chose anew would flicker.
    some = np.concatenate(frames[:: max(1, len(frames) // 4)])
    palette = Image.fromarray(some).quantize(128, Image.Quantize.MAXCOVERAGE)  # most of it is white
    shown = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    shown[0].save(buffer, "GIF", save_all=True, append_images=shown[1:], duration=MILLISECONDS, loop=0)
    return buffer.getvalue()


def log_meshes(module: LightningModule, name: str, pairs: list[Pair]) -> None:
    """Log a sheet; write ``pictures/<name>.gif``, where they turn, and ``<name>.html``, to turn them by hand.

    Args:
        module: The module that is being run by a Trainer.
        name: As a metric's name, ``stage/what``.
        pairs: What to show, at least one.

    Raises:
        ImportError: embreex or trimesh is not installed.
    """
    trainer = module.trainer
    if trainer.fast_dev_run or trainer.sanity_checking or not trainer.loggers:  # type: ignore[attr-defined]
        return
    if trainer.is_global_zero:
        log_picture(module, name, meshes_figure(pairs, "what was made of the pictures, beside the truth"))
        log_file(module, name, ".gif", to_gif(turntable(pairs)))
        log_file(module, name, ".html", viewer_page(pairs).encode())


# A page to turn them by hand


def viewer_page(pairs: list[Pair], title: str = "meshes") -> str:
    """A page that needs nothing beside it: meshes that the mouse turns, the predicted one beside the true.

    Args:
        pairs: What to show.
        title: Heading of the page.
    """
    content = json.dumps({"pairs": [_packed(pair) for pair in pairs], "away": AWAY, "elevation": ELEVATION})
    return VIEWER.replace("{title}", title).replace("{content}", content.replace("</", "<\\/"))


def _packed(pair: Pair) -> dict[str, Any]:
    buffer = io.BytesIO()
    pixels = (pair.image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(buffer, "PNG")
    image = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    frame = frame_of(pair)
    shown = [(pair.predicted, PREDICTED), *([] if pair.true is None else [(pair.true, TRUE)])]
    surfaces = [_packed_surface(each, frame, colour) for each, colour in shown]
    return {"image": image, "caption": pair.caption, "surfaces": surfaces}


def _packed_surface(surface: Surface, frame: Frame, colour: tuple[float, float, float]) -> dict[str, Any]:
    """Places as int16, 32,767 to the frame's radius: finer than a screen shows."""
    places = np.nan_to_num((surface.points.numpy() - frame.centre) / frame.radius)
    packed = {"colour": colour, "places": _text((places * 32767).round().astype("<i2"))}
    if surface.faces is not None and len(surface.faces) <= SMALL:
        return packed | {"faces": _text(surface.faces.numpy().astype("<u4"))}
    normals = np.zeros_like(places) if surface.normals is None else surface.normals.numpy()
    return packed | {"normals": _text((normals * 127).round().astype("i1"))}


def _text(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


VIEWER = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body { display: flex; flex-direction: column; height: 100vh; margin: 0; color: #222; background: #fff; }
body { font: 13px/1.4 system-ui, sans-serif; }
#choice { display: flex; flex-wrap: wrap; gap: .4rem; padding: .5rem; }
#choice button { border: 2px solid #ddd; border-radius: 6px; background: #fff; padding: 2px; cursor: pointer; }
#choice button.chosen { border-color: #5c8cd9; }
#choice img { display: block; width: 72px; height: 72px; }
#said { padding: 0 .7rem; color: #555; }
canvas { flex: 1; min-height: 0; width: 100%; cursor: grab; touch-action: none; }
</style>
</head>
<body>
<div id="choice"></div>
<div id="said"></div>
<canvas id="view"></canvas>
<script>
"use strict";
const content = {content};
const canvas = document.getElementById("view"), said = document.getElementById("said");
const gl = canvas.getContext("webgl2", {antialias: true});
let turn = 0, tilt = 0, zoom = 1, spinning = true, shown = [], last = 0;

function program() {
  const made = gl.createProgram();
  const parts = [[gl.VERTEX_SHADER, `#version 300 es
    layout(location=0) in vec3 place; layout(location=1) in vec3 normal;
    uniform mat3 turned; uniform float away, zoom, ratio, dots;
    out vec3 where; out vec3 facing;
    void main() {
      where = turned * place; facing = turned * normal;
      float far = away - where.z, reach = sqrt(away * away - 1.0) * zoom;
      vec2 shape = vec2(max(ratio, 1.0), max(1.0 / ratio, 1.0));
      gl_Position = vec4(where.xy * reach / shape, 2.0 * far - 6.0, far);  // depths from 2 to 6
      gl_PointSize = dots * zoom;
    }`], [gl.FRAGMENT_SHADER, `#version 300 es
    precision highp float;
    in vec3 where; in vec3 facing; uniform vec3 colour; uniform float dots; out vec4 seen;
    void main() {
      vec3 n = dots > 0.0 ? facing : cross(dFdx(where), dFdy(where));
      if (dots > 0.0 && distance(gl_PointCoord, vec2(0.5)) > 0.5) discard;
      n = length(n) > 0.0 ? normalize(n) : vec3(0.0, 0.0, 1.0);
      n *= n.z < 0.0 ? -1.0 : 1.0;
      float key = max(0.0, dot(n, normalize(vec3(-0.45, 0.75, 0.5))));
      float fill = max(0.0, dot(n, normalize(vec3(0.8, 0.1, 0.6))));
      seen = vec4(colour * (0.36 + 0.62 * key + 0.3 * fill), 1.0);
    }`]];
  for (const [kind, source] of parts) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    gl.attachShader(made, shader);
  }
  gl.linkProgram(made);
  gl.useProgram(made);
  return name => gl.getUniformLocation(made, name);
}

function bytes(text) {
  return Uint8Array.from(atob(text), letter => letter.charCodeAt(0)).buffer;
}

function buffer(target, data) {
  gl.bindBuffer(target, gl.createBuffer());
  gl.bufferData(target, data, gl.STATIC_DRAW);
}

function prepared(surface) {
  const array = gl.createVertexArray(), places = new Int16Array(bytes(surface.places));
  gl.bindVertexArray(array);
  buffer(gl.ARRAY_BUFFER, places);
  gl.enableVertexAttribArray(0);
  gl.vertexAttribPointer(0, 3, gl.SHORT, true, 0, 0);
  if (surface.faces) {
    const faces = new Uint32Array(bytes(surface.faces));
    buffer(gl.ELEMENT_ARRAY_BUFFER, faces);
    return {array, colour: surface.colour, faces: faces.length};
  }
  buffer(gl.ARRAY_BUFFER, new Int8Array(bytes(surface.normals)));
  gl.enableVertexAttribArray(1);
  gl.vertexAttribPointer(1, 3, gl.BYTE, true, 0, 0);
  return {array, colour: surface.colour, points: places.length / 3};
}

function rotation() {  // around what is upright in the world, then towards the viewer; column by column
  const e = content.elevation * Math.PI / 180, s = Math.sin, c = Math.cos;
  const about = (x, y) => [[c(y), 0, s(y)], [s(x) * s(y), c(x), -s(x) * c(y)], [-c(x) * s(y), s(x), c(x) * c(y)]];
  const spin = about(e + tilt, turn), back = [[1, 0, 0], [0, c(e), s(e)], [0, -s(e), c(e)]];
  const rows = spin.map(row => [0, 1, 2].map(k => row[0] * back[0][k] + row[1] * back[1][k] + row[2] * back[2][k]));
  return [0, 1, 2].flatMap(k => rows.map(row => row[k]));
}

function draw(time) {
  const density = window.devicePixelRatio || 1, half = Math.floor(canvas.clientWidth * density / shown.length);
  const height = Math.floor(canvas.clientHeight * density);
  canvas.width = half * shown.length;
  canvas.height = height;
  if (spinning) turn += Math.min(60, time - last) * 0.0006;
  last = time;
  gl.clearColor(1, 1, 1, 1);
  gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
  gl.enable(gl.DEPTH_TEST);
  gl.uniformMatrix3fv(uniform("turned"), false, rotation());
  gl.uniform1f(uniform("away"), content.away);
  gl.uniform1f(uniform("zoom"), zoom);
  gl.uniform1f(uniform("ratio"), half / height);
  shown.forEach((surface, k) => {
    gl.viewport(k * half, 0, half, height);
    gl.bindVertexArray(surface.array);
    gl.uniform3fv(uniform("colour"), surface.colour);
    gl.uniform1f(uniform("dots"), surface.faces ? 0 : 0.9 * Math.min(half, height) / Math.sqrt(surface.points));
    if (surface.faces) gl.drawElements(gl.TRIANGLES, surface.faces, gl.UNSIGNED_INT, 0);
    else gl.drawArrays(gl.POINTS, 0, surface.points);
  });
  requestAnimationFrame(draw);
}

function choose(number) {
  const pair = content.pairs[number];
  shown = pair.ready ||= pair.surfaces.map(prepared);
  const which = pair.surfaces.length > 1 ? "predicted (left), true (right)" : "predicted";
  const texts = [...pair.caption.split("\\n"), which, "drag to turn, wheel to zoom"];
  said.textContent = texts.filter(Boolean).join(" \\u00b7 ");
  [...document.querySelectorAll("#choice button")].forEach((each, k) => each.classList.toggle("chosen", k === number));
}

content.pairs.forEach((pair, number) => {
  const button = document.createElement("button"), image = document.createElement("img");
  image.src = pair.image;
  image.alt = pair.caption;
  button.append(image);
  button.onclick = () => choose(number);
  document.getElementById("choice").append(button);
});
canvas.onpointerdown = event => { spinning = false; canvas.setPointerCapture(event.pointerId); };
canvas.onpointermove = event => {
  if (!event.buttons) return;
  turn += event.movementX * 0.01;
  tilt = Math.max(-2, Math.min(1.1, tilt + event.movementY * 0.01));
};
canvas.onwheel = event => {
  event.preventDefault();
  zoom = Math.max(0.4, Math.min(6, zoom * Math.exp(-event.deltaY * 0.001)));
};
let uniform = null;
if (gl) { uniform = program(); choose(0); requestAnimationFrame(draw); }
else said.textContent = "this browser shows no WebGL";
</script>
</body>
</html>
"""
