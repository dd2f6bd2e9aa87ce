"""Textured shapes on cluttered grounds: what generated scenes are drawn of."""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

KINDS = {1: "circle", 3: "square", 4: "triangle", 7: "star", 9: "person"}  # with gaps, as COCO's ids have them
COLOURS = {
    "red": (205, 45, 40), "orange": (235, 130, 25), "yellow": (232, 210, 50), "green": (50, 160, 60),
    "blue": (45, 90, 205), "purple": (145, 60, 175),
}  # fmt: skip
GROUNDS = {"grey": (125, 128, 132), "brown": (138, 116, 96), "olive": (112, 122, 98)}


class Shape(NamedTuple):
    """A shape in a picture.

    Attributes:
        kind: Its category id.
        outlines: Polygons (V, 2) in pixels, which together cover it; edges of the picture are at 0 and at its side.
        points: Its keypoints (K, 2), if it is a person.
        centre: x, y.
        radius: Of a circle around it.
        colour: Its name.
        crowd: Whether it is a heap.
    """

    kind: int
    outlines: list[np.ndarray]
    points: np.ndarray | None
    centre: tuple[float, float]
    radius: float
    colour: str
    crowd: bool = False


class Placed(NamedTuple):
    """A shape and how deep in it each pixel lies (H, W), negative outside, in pixels."""

    shape: Shape
    depth: np.ndarray


def polygon(kind: int, x: float, y: float, radius: float, turn: float) -> np.ndarray:
    """The corners (V, 2) of a shape; a circle has 32."""
    corners = {"circle": 32, "square": 4, "triangle": 3, "star": 10}[KINDS[kind]]
    angles = turn + 2 * math.pi * np.arange(corners) / corners
    lengths = np.where(np.arange(corners) % 2, 0.45, 1.0) if KINDS[kind] == "star" else np.ones(corners)
    return np.stack([x + radius * lengths * np.cos(angles), y + radius * lengths * np.sin(angles)], axis=1)


def _window(corners: np.ndarray, side: int, margin: float = 3.0) -> tuple[slice, slice]:
    """Rows and columns of the picture around points (V, 2)."""
    left, top = (min(side, max(0, math.floor(value))) for value in (corners.min(0) - margin).tolist())
    right, bottom = (min(side, max(0, math.ceil(value))) for value in (corners.max(0) + margin).tolist())
    return slice(top, bottom), slice(left, right)


def _centres(window: tuple[slice, slice]) -> tuple[np.ndarray, np.ndarray]:
    """Of the centres of pixels, y (H, 1) and x (1, W)."""
    rows, columns = (np.arange(part.start, part.stop, dtype=np.float32) + np.float32(0.5) for part in window)
    return rows[:, None], columns[None]


def place(shape: Shape, side: int) -> Placed:
    """How deep each pixel of a picture lies in a shape."""
    depth = np.full((side, side), -side, dtype=np.float32)
    for outline in shape.outlines:
        window = _window(outline, side)
        y, x = _centres(window)
        convex = len(outline) < 10 or shape.kind != 7
        found = (_depth_in_convex if convex else _depth)(outline.astype(np.float32), x, y)
        depth[window] = np.maximum(depth[window], found)
    return Placed(shape, depth)


def _depth_in_convex(outline: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The distance of points to the nearest edge, as a line, of a convex polygon whose corners go from x to y."""
    if len(outline) > 16:  # a circle
        centre = outline.mean(0)
        return np.hypot(*(outline[0] - centre)) - np.hypot(x - centre[0], y - centre[1])
    depth = np.full((y.shape[0], x.shape[1]), np.inf, dtype=np.float32)
    for (ax, ay), (bx, by) in zip(outline, np.roll(outline, -1, axis=0), strict=True):
        ex, ey = np.array([bx - ax, by - ay]) / np.hypot(bx - ax, by - ay)
        depth = np.minimum(depth, (ex * y + (ey * ax - ex * ay)) - ey * x)
    return depth


def _depth(outline: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The distance of points to a polygon's edges, negative outside of it."""
    nearest = np.full((y.shape[0], x.shape[1]), np.inf, dtype=np.float32)
    inside = np.zeros(nearest.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(outline, np.roll(outline, -1, axis=0), strict=True):
        ex, ey, wx, wy = bx - ax, by - ay, x - ax, y - ay
        along = ((wx * ex + wy * ey) / (ex * ex + ey * ey)).clip(0, 1)
        nearest = np.minimum(nearest, (wx - along * ex) ** 2 + (wy - along * ey) ** 2)
        crossed = (ay <= y) != (by <= y)  # by a line to the right, if the edge is there
        inside ^= crossed & (wx * ey < wy * ex if ey > 0 else wx * ey > wy * ex)
    return np.where(inside, np.float32(1), np.float32(-1)) * np.sqrt(nearest)


# Painting


def draw_ground(side: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """A cloudy ground with strokes and rings on it, float32 (side, side, 3) in about [0, 255], and its colour."""
    name = str(rng.choice(list(GROUNDS)))
    clouds = sum(
        _clouds((side, side), cells, rng) * np.float32(weight) for cells, weight in ((3, 40), (8, 22), (24, 12))
    )
    ground = clouds[..., None] + (np.array(GROUNDS[name]) + rng.uniform(-25, 25)).astype(np.float32)
    for _ in range(int(rng.integers(5, 11))):
        tone = (rng.uniform(-45, 45) + rng.normal(0, 8, 3)).astype(np.float32)
        first, second = rng.uniform(0, side, (2, 2)).astype(np.float32)
        ring = rng.random() < 0.4
        radius = np.float32(rng.uniform(0.04, 0.12) * side)
        window = _window(np.array([first - radius, first + radius] if ring else [first, second]), side)
        y, x = _centres(window)
        away = abs(np.hypot(x - first[0], y - first[1]) - radius) if ring else _from_stroke(x, y, first, second)
        ground[window] += (np.float32(rng.uniform(1.2, 2.5)) - away).clip(0, 1)[..., None] * tone
    return ground, name


def _from_stroke(x: np.ndarray, y: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How far points are from the line between two others."""
    (ex, ey), wx, wy = second - first, x - first[0], y - first[1]
    along = ((wx * ex + wy * ey) / (ex * ex + ey * ey + np.float32(1e-6))).clip(0, 1)
    return np.hypot(wx - along * ex, wy - along * ey)


def _clouds(shape: tuple[int, ...], cells: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise, float32, in about [-1, 1]."""
    small = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(small.resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def paint(
    pixels: np.ndarray, one: Placed, rng: np.random.Generator, variation: float = 12.0, least_period: float = 3.0
) -> None:
    """Draw a shape on a picture, and its shadow beside it.

    Args:
        pixels: The picture, float32 (side, side, 3), changed in place.
        one: The shape.
        rng: What its texture and its shade of the colour are drawn from.
        variation: How far that shade is from the colour's own: the standard deviation of red, green and blue.
        least_period: Least distance of a texture's stripes or dots in pixels.
    """
    side = len(pixels)
    shift = max(1, side // 50)
    window = _window(np.concatenate(one.shape.outlines), side, 6 + shift)
    depth = one.depth[window]
    shadow = np.zeros_like(depth)
    shadow[shift:, shift:] = ((depth[:-shift, :-shift] + 2.5) / 5).clip(0, 1) * np.float32(0.35)
    alpha = (depth + 0.5).clip(0, 1)
    light = np.linspace(1.12, 0.82, side, dtype=np.float32)[window[0], None]
    edge = 1 - np.float32(0.45) * ((1 - depth / 1.5).clip(0, 1) * (depth > 0))
    colour = (np.array(COLOURS[one.shape.colour]) + rng.normal(0, variation, 3)).astype(np.float32)
    surface = alpha * _texture(one.shape, depth.shape, rng, least_period) * light * edge
    pixels[window] *= ((1 - shadow) * (1 - alpha))[..., None]
    pixels[window] += surface[..., None] * colour


def _texture(shape: Shape, size: tuple[int, ...], rng: np.random.Generator, least_period: float) -> np.ndarray:
    """How bright a shape's surface is, about 1: plain, striped, chequered, dotted or cloudy."""
    kind = int(rng.integers(5))
    turn, period = rng.uniform(0, math.pi), max(least_period, shape.radius * rng.uniform(0.3, 0.6))
    y, x = np.ogrid[: size[0], : size[1]]
    across, along = (np.float32(2 * math.pi / period * part) for part in (math.cos(turn), math.sin(turn)))
    u, v = x * across + y * along, y * across - x * along
    if kind == 1:
        return 1 + np.float32(0.28) * np.sign(np.sin(u))
    if kind == 2:
        return 1 + np.float32(0.25) * np.sign(np.sin(u) * np.sin(v))
    if kind == 3:
        return np.float32(0.9) + np.float32(0.35) * (np.cos(u) + np.cos(v) > 0.8)
    return 1 + np.float32(0.35) * _clouds(size, max(3, min(size) // 5), rng) if kind == 4 else np.ones(size, np.float32)
