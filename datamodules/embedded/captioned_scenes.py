"""Pictures of two groups of shapes, with captions, written to disk in COCO's format, always alike for a seed.

A group is one to three shapes of one kind and colour: "two red circles left of a blue square". What a caption says is
taken from what is drawn. Some pairs of colour and shape are in no picture that is trained on, but in every one that is
tested on: who describes these has learnt what the words mean, not which of them come together.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from datamodules.caption_files import SPLITS
from datamodules.captions import COCOCaptionsDataModule
from datamodules.coco import Files
from datamodules.detection import Split
from datamodules.embedded.drawing import COLOURS, KINDS, Shape, draw_ground, paint, place, polygon
from datamodules.embedded.writing import encoded, whole_folder, write_json

VERSION = 1  # of the pictures; another one makes another folder
NUMBERS = {name: number for number, name in KINDS.items() if name != "person"}
# Each colour is kept from one shape, each shape from one or two colours: all words are learnt with others.
HELD_OUT = [
    ("green", "circle"), ("yellow", "square"), ("purple", "square"), ("red", "triangle"), ("blue", "star"),
    ("orange", "star"),
]  # fmt: skip
PAIRS = [(colour, shape) for colour in COLOURS for shape in NUMBERS]
TRAINED = [pair for pair in PAIRS if pair not in HELD_OUT]


class CaptionedScenesDataModule(COCOCaptionsDataModule):
    """Batches of generated scenes with five captions each; see :class:`COCOCaptionsDataModule` for what is in them.

    A scene is two groups of shapes on a cluttered ground, beside or above each other: one, two or three circles,
    squares, triangles or stars, all red, orange, yellow, green, blue or purple. Its captions say number, colour, shape
    and place of both, each in other words. The set is written once, into a folder of ``root`` that its arguments name,
    and read by what reads any captions in COCO's format.

    Attributes:
        held_out: Pairs ``(colour, shape)`` that no picture for training or validation has. Every test picture has one
            at least; their words occur in training too, in other pairs (in a set of some hundred pictures, that is).

    Args:
        root: Folder in which the set's own is made.
        image_size: Side of the pictures in pixels.
        train_size: Number of training pictures.
        val_size: Number of pictures for validation; 0 trains without it.
        test_size: Number of pictures for testing; 0 tests on those for validation.
        seed: Seed of the scenes, apart from the run's seed so that runs compare.
        words: The vocabulary, such as a checkpoint's; None makes it from the training captions.
        min_count: Words that occur less often in the training captions become ``<UNK>``.
        max_length: Words of a caption that are kept; none has more than 15.
        batch_size: Samples of a global training batch, each a picture with one of its captions: all processes together.
        eval_batch_size: Pictures per process in validation, test and prediction.
        cache: Keep the pictures in memory, in each training process; None does so where those of a split need no more
            than 1 GiB.
        workers: Processes that read pictures, for each process that trains; None means one per processor, at most 4.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        root: str = "data",
        image_size: int = 64,
        train_size: int = 4000,
        val_size: int = 400,
        test_size: int = 400,
        seed: int = 0,
        words: list[str] | None = None,
        min_count: int = 1,
        max_length: int = 15,
        batch_size: int = 64,
        eval_batch_size: int = 64,
        cache: bool | None = True,
        workers: int | None = 0,
    ) -> None:
        super().__init__(
            root,
            words=words,
            min_count=min_count,
            max_length=max_length,
            size=image_size,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_size=val_size,
            test_size=test_size,
            cache=cache,
            workers=workers,
        )
        if image_size < 48 or train_size < 1:
            raise ValueError(f"image_size={image_size} must be at least 48, and train_size={train_size} at least 1")
        self.sizes: dict[Split, int] = {"train": train_size, "val": val_size, "test": test_size}
        if wrong := [f"{split}_size={count}" for split, count in self.sizes.items() if count != int(count)]:
            raise ValueError(f"{wrong[0]} must be a number of pictures, not a share")
        self.seed = seed
        self.held_out = list(HELD_OUT)
        self.files = {
            split: Files(self.folder / "annotations" / f"captions_{split}.json", self.folder / split)
            for split, count in self.sizes.items()
            if count
        }

    def _find(self, *named: Any) -> None:
        """There is nothing to look for: the files are those that :meth:`prepare_data` writes."""
        self.images = None

    @property
    def folder(self) -> Path:
        """Where this set lies."""
        counts = "-".join(str(count) for count in self.sizes.values())
        return self.root / f"captioned-scenes-v{VERSION}-{self.size}px-{counts}-seed{self.seed}"

    @property
    def words(self) -> list[str]:
        """The vocabulary; writes the set, if need be, since it is made from its captions."""
        if self._words is None:
            self.prepare_data()
        return super().words

    def prepare_data(self) -> None:
        """Write the set, if it is not there."""
        if not self.folder.is_dir():
            rank_zero_info(f"writing {sum(self.sizes.values())} scenes with captions to {self.folder}")
            write_captioned_scenes(self.folder, self.sizes, self.size, self.seed)

    def setup(self, stage: str) -> None:
        """Read captions and pictures.

        Raises:
            FileNotFoundError: The set is not there: :meth:`prepare_data` writes it.
            ValueError: There is nothing to test on.
        """
        if not self.folder.is_dir():
            raise FileNotFoundError(f"there is no folder {self.folder}: run prepare_data(), which writes it")
        super().setup(stage)


# Writing


def write_captioned_scenes(folder: Path, sizes: dict[Split, int], image_size: int = 64, seed: int = 0) -> None:
    """Write a set: ``train`` and so on with the pictures, and ``annotations`` with the captions of each.

    It is written beside ``folder`` and moved there when it is whole: a run that is killed leaves no part of it.

    Args:
        folder: Where to; must not be there yet, unless another process was sooner with the same.
        sizes: Number of pictures of each split; those for testing have held-out pairs.
        image_size: Side of the pictures in pixels.
        seed: Scenes are the same for the same seed, size and split; fewer are the first of more.
    """
    with whole_folder(folder, "annotations") as whole:
        (whole / "annotations").mkdir()
        for split, count in sizes.items():
            if count:
                _write_split(whole, split, count, image_size, seed)


def _write_split(folder: Path, split: Split, count: int, image_size: int, seed: int) -> None:
    (folder / split).mkdir()
    images: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    for i in range(count):
        scene = make_captioned_scene(image_size, split, np.random.default_rng([seed, SPLITS.index(split), i]))
        number = 100_000 * (SPLITS.index(split) + 1) + 7 * i  # no one should count on ids that count
        name = f"{number:08d}.{'png' if i % 4 == 3 else 'jpg'}"
        (folder / split / name).write_bytes(encoded(scene.pixels, name, 95, subsampling=0))
        images.append({"id": number, "file_name": name, "height": image_size, "width": image_size})
        for text in scene.captions:
            captions.append({"id": len(captions) + 1, "image_id": number, "caption": text})
    content = {"images": images, "annotations": captions}
    write_json(folder / "annotations" / f"captions_{split}.json", "Generated groups of shapes", VERSION, content)


# Scenes


class Group(NamedTuple):
    """Some shapes that are alike."""

    number: int
    colour: str
    shape: str


class CaptionedScene(NamedTuple):
    """A picture, uint8 (H, W, 3); its groups, the left or upper one first; how they lie; and five captions."""

    pixels: np.ndarray
    groups: tuple[Group, Group]
    above: bool
    captions: list[str]


def make_captioned_scene(side: int, split: Split, rng: np.random.Generator) -> CaptionedScene:
    """Draw a scene; one of a ``test`` split has a held-out pair of colour and shape at least."""
    groups = _groups(split, rng)
    above = bool(rng.random() < 0.5)
    pixels, _ = draw_ground(side, rng)
    for half, group in enumerate(groups):
        for shape in _shapes(group, _half(side, half, above), side, rng):
            paint(pixels, place(shape, side), rng, variation=6, least_period=5)
    pixels += 4 * rng.standard_normal(pixels.shape, dtype=np.float32)  # a sensor's noise
    captions = _captions(*groups, above)
    order = rng.permutation(len(captions)).tolist()
    return CaptionedScene(pixels.clip(0, 255).astype(np.uint8), groups, above, [captions[i] for i in order])


def _groups(split: Split, rng: np.random.Generator) -> tuple[Group, Group]:
    first = _one_of(HELD_OUT if split == "test" else TRAINED, rng)
    second = _one_of([pair for pair in (PAIRS if split == "test" else TRAINED) if pair != first], rng)
    one, other = (Group(int(rng.integers(1, 4)), *pair) for pair in (first, second))
    return (one, other) if rng.random() < 0.5 else (other, one)


def _one_of(pairs: list[tuple[str, str]], rng: np.random.Generator) -> tuple[str, str]:
    return pairs[int(rng.integers(len(pairs)))]


def _half(side: int, half: int, above: bool) -> tuple[tuple[float, float], tuple[float, float]]:
    """Least and greatest x, and y, of a half of the picture, without a margin."""
    along, across = (half * side / 2 + 2, (half + 1) * side / 2 - 2), (1.0, side - 1.0)
    return (across, along) if above else (along, across)


def _shapes(
    group: Group, box: tuple[tuple[float, float], tuple[float, float]], side: int, rng: np.random.Generator
) -> list[Shape]:
    """The shapes of a group, in a box, apart from each other."""
    # A circle looks larger than what lies in it. 5.8 pixels make a square of 8, and three of them fit into 20 by 46.
    share = 0.85 if group.shape == "circle" else 1.0
    least, most = max(5.8, 0.092 * side), side * (0.2, 0.15, 0.13)[group.number - 1]
    found: list[tuple[float, float, float]] = []
    while len(found) < group.number:
        found = []
        for size, x, y in rng.random((group.number, 3)).tolist():
            radius = share * (least + size * (max(least, most) - least))
            centre = [
                low + radius + at * (high - low - 2 * radius) for at, (low, high) in zip((x, y), box, strict=True)
            ]
            if all(math.dist(centre, other[:2]) >= radius + other[2] + 2 for other in found):
                found.append((*centre, radius))
    return [_shape(group, x, y, radius, rng) for x, y, radius in found]


def _shape(group: Group, x: float, y: float, radius: float, rng: np.random.Generator) -> Shape:
    """One that stands upright, or nearly so."""
    turn = (math.pi / 4 if group.shape == "square" else -math.pi / 2) + rng.uniform(-0.3, 0.3)
    kind = NUMBERS[group.shape]
    return Shape(kind, [polygon(kind, x, y, radius, turn)], None, (x, y), radius, group.colour)


# Captions


def _captions(one: Group, other: Group, above: bool) -> list[str]:
    """Five sentences, in which ``one`` is to the left of ``other`` or above it."""
    a, b = _noun(one), _noun(other)
    a_is, b_is = (f"{noun} {_is(group)}" for noun, group in ((a, one), (b, other)))
    is_a, is_b = (f"{_is(group)} {noun}" for noun, group in ((a, one), (b, other)))
    if above:
        return [
            f"{a} above {b}",
            f"{b} below {a}",
            f"there {is_a} above {b}",
            f"{b_is} at the bottom and {a_is} at the top",
            f"at the top {is_a} and at the bottom {is_b}",
        ]
    return [
        f"{a} left of {b}",
        f"{b} right of {a}",
        f"there {is_a} to the left of {b}",
        f"{b_is} on the right and {a_is} on the left",
        f"on the left {is_a} and on the right {is_b}",
    ]


def _noun(group: Group) -> str:
    if group.number == 1:
        return f"{'an' if group.colour[0] in 'aeiou' else 'a'} {group.colour} {group.shape}"
    return f"{('two', 'three')[group.number - 2]} {group.colour} {group.shape}s"


def _is(group: Group) -> str:
    return "is" if group.number == 1 else "are"
