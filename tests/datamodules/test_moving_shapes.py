import av
import numpy as np
import pytest
import torch

from datamodules import MovingShapesDataModule
from datamodules.embedded import moving_shapes
from datamodules.embedded.moving_shapes import (
    MOTIONS,
    OPPOSITES,
    OUTLINES,
    SPEEDS,
    Look,
    draw_look,
    make_video,
    move,
    render,
    write_video,
    write_videos,
)

SIZES = {"train": 16, "val": 8, "test": 8}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A small set, written to disk."""
    module = make(tmp_path_factory.mktemp("data"))
    module.prepare_data()
    return module


def make(root, **options):
    sizes = {f"{split}_size": count for split, count in SIZES.items()}
    return MovingShapesDataModule(str(root), **(sizes | {"batch_size": 4} | options))


def start_and_speed(motion, seed):
    rng = np.random.default_rng(seed)
    return rng.random(4), rng.uniform(*SPEEDS[motion]) / moving_shapes.RATE


# The motions


def test_there_are_eight_motions_in_four_pairs():
    assert len(MOTIONS) == 8
    assert all(OPPOSITES[OPPOSITES[motion]] == motion != OPPOSITES[motion] for motion in MOTIONS)
    assert all(SPEEDS[motion] == SPEEDS[OPPOSITES[motion]] for motion in MOTIONS)


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_video_played_backwards_is_one_of_the_opposite_motion(motion):
    look = draw_look(np.random.default_rng(0), 64)
    start, speed = start_and_speed(motion, 1)
    states = move(motion, start, speed, 32)
    opposite = move(OPPOSITES[motion], states[-1], speed, 32)
    np.testing.assert_allclose(np.abs((states[::-1] - opposite + 0.5) % 1 - 0.5), 0, atol=1e-12)
    # Where a turn is at the border between two degrees of the outline rounding may take either.
    different = np.abs(render(look, states)[::-1] - render(look, opposite)) > 1
    assert different.mean() < 1e-3


@pytest.mark.parametrize("frame", [0, 13, 31])
def test_in_no_frame_the_state_depends_on_the_motion(frame):
    """Place, turn and size are even on [0, 1) in each frame, for each motion: by Kolmogorov and Smirnov."""
    from scipy.stats import kstest

    for motion in MOTIONS:
        rng = np.random.default_rng(5)
        states = [move(motion, rng.random(4), rng.uniform(*SPEEDS[motion]) / 16, frame + 1)[-1] for _ in range(2000)]
        for number in np.stack(states).T:
            assert kstest(number, "uniform").pvalue > 1e-4, motion
        correlation = np.corrcoef(np.stack(states).T) - np.eye(4)
        assert np.abs(correlation).max() < 0.1


@pytest.mark.parametrize(
    ("motion", "expected"), [("left", (-1, 0)), ("right", (1, 0)), ("up", (0, -1)), ("down", (0, 1))]
)
def test_a_shape_moves_where_its_name_says(motion, expected):
    states = move(motion, np.array([0.5, 0.5, 0.1, 0.3]), 0.02, 5)
    black = Look(OUTLINES[0], np.full(3, 255, np.float32), np.zeros((64, 64, 3), np.float32))
    centres = []
    for picture in render(black, states)[..., 0]:
        rows, columns = np.mgrid[:64, :64]
        centres.append([(columns * picture).sum() / picture.sum(), (rows * picture).sum() / picture.sum()])
    moved = np.array(centres[-1]) - centres[0]
    np.testing.assert_allclose(moved, np.array(expected) * 0.02 * 4 * 64, atol=0.3)


def test_a_bar_turns_clockwise_as_it_is_seen_and_shapes_grow():
    black = Look(OUTLINES[2], np.full(3, 255, np.float32), np.zeros((64, 64, 3), np.float32))
    rows, columns = np.mgrid[:64, :64] - 31.5
    angles = []
    for picture in render(black, move("clockwise", np.array([0.5, 0.5, 0.0, 0.9]), 0.02, 5))[..., 0]:
        xx, yy, xy = ((picture * value).sum() for value in (columns**2, rows**2, rows * columns))
        angles.append(0.5 * np.arctan2(2 * xy, xx - yy))  # of the long axis, from x towards y, which is down
    np.testing.assert_allclose(np.diff(angles), 2 * np.pi * 0.02, atol=0.03)
    sizes = render(black, move("grow", np.array([0.5, 0.5, 0.0, 0.1]), 0.1, 5))[..., 0].sum((1, 2))
    assert (np.diff(sizes) > 0).all()
    assert sizes[0] * (moving_shapes.LARGEST / moving_shapes.SMALLEST) ** 0.8 == pytest.approx(sizes[-1], rel=0.05)


def test_every_shape_looks_another_way_when_it_is_turned():
    for outline in OUTLINES:
        assert outline.max() == pytest.approx(1, abs=0.03)
        assert outline.min() > 0.1
        for turn in range(20, 60, 5):  # what it turns between the frames of a clip of 8 or 16
            assert np.abs(outline - np.roll(outline, turn)).mean() > 0.02


def test_what_leaves_at_one_side_comes_in_at_the_other():
    look = Look(OUTLINES[1], np.full(3, 255, np.float32), np.zeros((64, 64, 3), np.float32))
    middle, edge = render(look, np.array([[0.5, 0.5, 0.1, 0.5], [0.0, 0.75, 0.1, 0.5]]))[..., 0]
    np.testing.assert_allclose(np.roll(middle, (16, 32), (0, 1)), edge, atol=1)


def linear_accuracy(features, labels, seed=0):
    """Of ridge regression on half of the samples, on the other half."""
    order = np.random.default_rng(seed).permutation(len(labels))
    train, test = order[::2], order[1::2]
    features = np.concatenate([features - features.mean(0), np.ones((len(features), 1))], axis=1)
    targets = np.eye(8)[labels]
    gram = features[train].T @ features[train] + 10.0 * np.eye(features.shape[1])
    weights = np.linalg.solve(gram, features[train].T @ targets[train])
    return float(((features[test] @ weights).argmax(1) == labels[test]).mean())


def test_motion_tells_the_class_and_one_frame_does_not():
    """How far the bright middle moved tells left, right, up and down; where it is in a frame tells nothing."""
    rng = np.random.default_rng(0)
    labels = np.arange(800) % 8
    looks = [Look(OUTLINES[k % 5], np.full(3, 255, np.float32), np.zeros((24, 24, 3), np.float32)) for k in range(5)]
    clips = np.stack(
        [
            render(looks[k % 5], move(MOTIONS[label], rng.random(4), rng.uniform(*SPEEDS[MOTIONS[label]]) / 16, 2))
            for k, label in enumerate(labels)
        ]
    )[..., 0]
    places = np.exp(2j * np.pi * (np.arange(24) + 0.5) / 24)
    x, y = (clips.sum(axis) @ places for axis in (2, 3))  # on the ring, (800, 2)
    single = np.stack([x[:, 0].real, x[:, 0].imag, y[:, 0].real, y[:, 0].imag, clips[:, 0].sum((1, 2))], axis=1)
    grown = np.log(clips[:, 1].sum((1, 2)) / clips[:, 0].sum((1, 2)))
    moved = [np.angle(values[:, 1] * values[:, 0].conj()) for values in (x, y)]
    several = np.tanh(20 * np.stack([*moved, grown], axis=1))
    assert linear_accuracy(single / single.std(0), labels) < 0.19  # an eighth is chance
    assert linear_accuracy(several, labels) > 0.6


# The files


def test_the_same_seed_writes_the_same_videos_and_fewer_are_the_first_of_more(written, tmp_path):
    write_videos(tmp_path / "fewer", {"train": 9, "val": 0, "test": 1})
    names = sorted(str(path.relative_to(tmp_path / "fewer")) for path in (tmp_path / "fewer").rglob("*.mp4"))
    assert len(names) == 10
    assert all((tmp_path / "fewer" / name).read_bytes() == (written.root / name).read_bytes() for name in names)
    write_videos(tmp_path / "other", {"train": 8, "val": 0, "test": 0}, seed=1)
    first = "train/clockwise/00000.mp4"
    assert (tmp_path / "other" / first).read_bytes() != (written.root / first).read_bytes()


def test_files_are_h264_of_two_seconds_and_close_to_what_was_drawn(written):
    for number, split in enumerate(SIZES):
        for index in range(0, SIZES[split], 3):
            motion = MOTIONS[index % 8]
            drawn = make_video(motion, np.random.default_rng([0, number, index]))
            with av.open(str(written.root / split / motion / f"{index:05d}.mp4")) as container:
                stream = container.streams.video[0]
                assert (stream.codec_context.name, stream.average_rate, stream.frames) == ("h264", 16, 32)
                read = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
            assert read.shape == drawn.shape == (32, 64, 64, 3)
            error = ((read.astype(float) - drawn) ** 2).mean()
            assert 10 * np.log10(255**2 / error) > 30  # decibels; the colours have half the resolution


def test_a_run_that_is_killed_leaves_no_part(tmp_path, monkeypatch):
    count = 0

    def stop(*args):
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt
        return write_video(*args)

    monkeypatch.setattr(moving_shapes, "write_video", stop)
    module = make(tmp_path / "data")
    with pytest.raises(KeyboardInterrupt):
        module.prepare_data()
    assert not list((tmp_path / "data").iterdir())
    with pytest.raises(FileNotFoundError, match=r"run prepare_data\(\), which writes it"):
        module.setup("fit")


# The data module


def test_classes_and_batches(written):
    module = make(written.root.parent)
    assert module.class_names == MOTIONS == sorted(MOTIONS)
    assert (module.num_classes, module.flip) == (8, False)
    module.setup("fit")
    module.setup("test")
    assert [len(videos) for videos in (module.train_set, module.val_set, module.test_set)] == [16, 8, 8]
    clips, labels = next(iter(module.train_dataloader()))
    assert (clips.shape, clips.dtype, labels.shape) == ((4, 3, 16, 64, 64), torch.uint8, (4,))
    for split in SIZES:
        found = torch.cat([labels for _, labels in module.evaluation_dataloader(split)])
        assert found.tolist() == sorted(list(range(8)) * (SIZES[split] // 8))


def test_clips_are_frames_of_the_files_and_not_mirrored(written):
    """With the whole video in a clip there is one clip, whatever is drawn."""
    module = make(written.root.parent, num_frames=32)
    module.setup("fit")
    seen = {}
    for clips, labels in module.train_dataloader():
        for clip, label in zip(clips, labels.tolist(), strict=True):
            seen.setdefault(label, []).append(clip.permute(1, 2, 3, 0).numpy())
    for label, motion in enumerate(MOTIONS):
        for path in sorted((written.root / "train" / motion).iterdir()):
            with av.open(str(path)) as container:
                read = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
            assert any(np.array_equal(read, clip) for clip in seen[label])


def test_without_validation_or_test_videos(tmp_path):
    module = make(tmp_path, val_size=0, test_size=0)
    module.prepare_data()
    module.setup("fit")
    assert module.val_dataloader() == []
    with pytest.raises(ValueError, match="there is nothing to test on"):
        module.setup("test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_size": 7}, "train_size=7 must be at least 8, one of each class"),
        ({"test_size": 0.5}, "test_size=0.5 must be a number of videos, not a share"),
        ({"num_frames": 0}, "num_frames=0 must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **options)
