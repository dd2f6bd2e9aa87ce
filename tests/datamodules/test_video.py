import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer, seed_everything
from numbered_videos import number, write, write_sound

from datamodules import VideoFolderDataModule
from datamodules.sampling import EvaluationBatches, TrainingBatches
from datamodules.video import EvaluationClips, TrainingClips, VideoLoader
from datamodules.video_files import VideoFile
from datamodules.video_lists import VideoSet, held_out

WORKERS = pytest.mark.parametrize("workers", [0, 2])
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
SHORT = {"g": "8", "preset": "ultrafast"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A file of 60 numbered frames, 30 a second."""
    return write(tmp_path_factory.mktemp("clip") / "60.mp4", 60, options=SHORT)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Class folders of 12, 6 and 5 videos of 20 to 46 frames, whose first frame is number 0."""
    root = tmp_path_factory.mktemp("shelf")
    for place, (name, count) in enumerate({"run": 12, "jump": 6, "wave": 5}.items()):
        (root / name).mkdir()
        for k in range(count):
            write(root / name / f"g{k // 3:02d}_c{k:02d}.mp4", 20 + 2 * k + place, options=SHORT)
    return root


@pytest.fixture
def broken(shelf, tmp_path):
    """The same with an empty file, one of sound only, and one that is cut."""
    root = tmp_path / "broken"
    shutil.copytree(shelf, root)
    (root / "run" / "g00_c00.mp4").write_bytes(b"")
    write_sound(root / "run" / "sound.mp4")
    cut = root / "jump" / "g00_c01.mp4"
    cut.write_bytes(cut.read_bytes()[:400])
    return root


def data(root, stage="fit", **options):
    options = {
        "num_frames": 4,
        "seconds": 0.4,
        "size": 16,
        "batch_size": 4,
        "eval_batch_size": 4,
        "workers": 0,
    } | options
    module = VideoFolderDataModule(str(root), **options)
    if stage:
        module.setup(stage)
    return module


def batches(loader, count=None):
    taken = []
    for clips, labels in loader:
        taken.append((clips.clone(), labels))
        if len(taken) == count:
            break
    return taken


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True)
    )


def numbers(clip):
    """The numbers that the frames of a clip, (3, T, H, W), show."""
    return [number(frame.permute(1, 2, 0).numpy()) for frame in clip.unbind(1)]


def files(videos):
    return [str(videos.path(i).relative_to(videos.root)) for i in range(len(videos))]


def one(path, count=1):
    """A set of the same video many times."""
    names = np.array([path.name.encode()] * count)
    return VideoSet(path.parent, names, np.zeros(count, dtype=np.int64))


# Clips


def evaluated(path, size=64, **options):
    """The views of a video."""
    views = EvaluationClips(one(path), options.pop("num_frames", 4), options.pop("seconds", 0.4), size, **options)
    return views.__getitems__((0, 0, [0]))[0]


def wide(path):
    """The frame numbers of the middle clip, read from whole frames."""
    with VideoFile(path) as video:
        return [number(frame) for frame in video.frames(np.array([0.8, 0.9, 1.0, 1.1]))]


def test_the_middle_of_a_video_is_seen(clip):
    """Of 2 s a clip of 0.4 s is from 0.8 s on, and its frames 0.1 s apart: 24, 27, 30 and 33 of 30 a second."""
    views = evaluated(clip, clips=1, crops=1)
    assert views.shape == (3, 4, 64, 64)
    assert wide(clip) == [24, 27, 30, 33]
    with VideoFile(clip) as video:
        for step, frame in enumerate(video.frames(np.array([0.8, 0.9, 1.0, 1.1]), 64)):
            assert np.array_equal(views[:, step].permute(1, 2, 0), frame[:, 16:80])


def test_views_are_spread_over_time_and_the_long_side(clip):
    views = evaluated(clip, clips=3, crops=3)
    assert views.shape == (9, 3, 4, 64, 64)
    for part, start in enumerate((0.0, 0.8, 1.6)):
        with VideoFile(clip) as video:
            frames = video.frames(start + np.arange(4) / 10, 64)
        for crop, left in enumerate((0, 16, 32)):
            for step, frame in enumerate(frames):
                view = views[3 * part + crop, :, step].permute(1, 2, 0)
                assert np.array_equal(view, frame[:, left : left + 64])


def test_frames_are_apart_in_time_whatever_the_rate(tmp_path):
    """The same motion filmed at 10, 25 and 60 frames a second gives clips of the same times."""
    for rate in (10, 25, 60):
        path = write(tmp_path / f"{rate}.mp4", 3 * rate, rate=rate, options=SHORT)
        training = TrainingClips(one(path), 8, 1.6, 64, 64, 64, False)
        for epoch in range(5):
            frames = training._decoded(0, np.random.default_rng(epoch).random(), 0.0)
            shown = np.array([number(frame) for frame in frames]) / rate
            assert np.abs(np.diff(shown) - 0.2).max() <= 1 / rate + 1e-6
            assert 0 <= shown[0] <= 1.4


def test_random_clips_reach_the_whole_video_evenly(clip):
    training = TrainingClips(one(clip, 300), 4, 0.4, 64, 64, 64, False)
    first = []
    for index in range(300):
        when = np.random.default_rng([0, 0, index]).random(5)[0]
        first.append(number(training._decoded(index, when, 0.0)[0]))
    assert min(first) == 0
    assert max(first) >= 46  # of 48, the last that a clip of 12 frames can begin with
    counts, _ = np.histogram(first, bins=4, range=(0, 48))
    assert counts.min() > 50


def test_a_shorter_video_keeps_its_last_frame(tmp_path):
    path = write(tmp_path / "two.mp4", 2, options=SHORT)
    (clips,) = TrainingClips(one(path), 6, 2.0, 64, 64, 64, False).__getitems__((0, 0, [0]))
    with VideoFile(path) as video:
        first, last = video.frames(np.array([0.0, 0.05]), 64)
    assert not np.array_equal(first, last)
    left = [k for k in range(33) if np.array_equal(clips[:, 0].permute(1, 2, 0), first[:, k : k + 64])]
    assert len(left) == 1
    for step in range(1, 6):
        assert np.array_equal(clips[:, step].permute(1, 2, 0), last[:, left[0] : left[0] + 64])


def test_a_crop_and_a_mirror_are_the_same_in_all_frames_of_a_clip_and_differ_between_clips(tmp_path):
    """A still video whose columns are all different."""
    import av

    ramp = np.repeat(np.linspace(0, 255, 96)[None, :, None], 64, axis=0).repeat(3, axis=2).astype(np.uint8)
    with av.open(str(tmp_path / "still.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(ramp, "rgb24")))
        container.mux(stream.encode(None))
    videos = one(tmp_path / "still.mp4", 40)
    for flip in (False, True):
        clips = TrainingClips(videos, 4, 0.4, 32, 32, 48, flip).__getitems__((0, 0, list(range(40)))).float()
        assert (clips - clips[:, :, :1]).abs().max() < 12
        edges = clips[..., 0].mean((1, 2, 3)), clips[..., -1].mean((1, 2, 3))
        mirrored = int((edges[0] > edges[1]).sum())
        assert 10 <= mirrored <= 30 if flip else mirrored == 0
        assert torch.minimum(*edges).std() > 15  # the place
        assert (edges[0] - edges[1]).abs().std() > 5  # the scale


def test_clips_lie_channels_last_and_become_floats(shelf):
    module = data(shelf)
    clips, labels = next(iter(module.train_dataloader()))
    assert (clips.dtype, clips.shape, labels.dtype) == (torch.uint8, (4, 3, 4, 16, 16), torch.int64)
    floats, _ = module.on_after_batch_transfer((clips, labels), 0)
    for tensor in (clips, floats):
        assert tensor.is_contiguous(memory_format=torch.channels_last_3d)
    assert floats.dtype == torch.float32
    assert 0 <= floats.min() < 0.2 < 0.8 < floats.max() <= 1
    assert torch.equal((floats * 255).round().to(torch.uint8), clips)


# Folders, csv files and the split


def test_class_folders(shelf, tmp_path):
    module = data(shelf, stage=None)
    assert (module.class_names, module.num_classes) == (["jump", "run", "wave"], 3)
    for split in ("train", "val", "test"):
        shutil.copytree(shelf, tmp_path / split)
    (tmp_path / "val" / "run" / "notes.txt").write_text("no video")
    shutil.rmtree(tmp_path / "test" / "wave")
    (tmp_path / "test" / "wave").mkdir()
    module = data(tmp_path)
    module.setup("test")
    assert [len(videos) for videos in (module.train_set, module.val_set, module.test_set)] == [23, 23, 18]
    assert files(module.train_set)[0] == "train/jump/g00_c00.mp4"


def test_a_drawn_split_keeps_what_is_cut_from_one_video_together(shelf):
    module = data(shelf, val_size=0.25, test_size=4, groups=r"(\w+)/(g\d+)_c")
    module.setup("test")
    parts = [files(videos) for videos in (module.train_set, module.val_set, module.test_set)]
    assert sorted([*parts[0], *parts[1], *parts[2]]) == sorted(
        str(path.relative_to(shelf)) for path in shelf.glob("*/*.mp4")
    )
    assert len(parts[1]) >= 6
    assert len(parts[2]) >= 4
    sources = [{name.split("_")[0] for name in part} for part in parts]
    assert not sources[0] & sources[1]
    assert not sources[1] & sources[2]
    assert not sources[0] & sources[2]
    again = data(shelf, val_size=0.25, test_size=4, groups=r"(\w+)/(g\d+)_c", workers=2)
    assert files(again.val_set) == parts[1]
    assert files(data(shelf, val_size=0.25, groups=r"(\w+)/(g\d+)_c", split_seed=1).val_set) != parts[1]
    with pytest.raises(ValueError, match=r"groups='film_' does not match jump/g00_c00\.mp4"):
        data(shelf, groups="film_")


def test_a_split_without_groups_has_of_each_class_its_share():
    videos = VideoSet(None, np.array([b"%d" % k for k in range(100)]), np.repeat([0, 1, 2], [50, 30, 20]))
    parts = held_out(videos, 0.2, 10, None, 0)
    assert {split: len(part) for split, part in parts.items()} == {"train": 70, "val": 20, "test": 10}
    assert sorted(np.concatenate(list(parts.values()))) == list(range(100))
    assert np.bincount(videos.labels[parts["val"]]).tolist() == [10, 6, 4]


def write_csv(path, lines):
    path.write_text("\n".join(lines) + "\n")


def test_csv_files_with_paths(shelf, tmp_path):
    root = tmp_path / "listed"
    shutil.copytree(shelf, root)
    write_csv(
        root / "all.csv",
        [
            "path,label,split",
            *(f"run/g00_c{k:02d}.mp4,10,train" for k in range(3)),
            *("jump/g00_c00.mp4,9,train", "jump/g01_c03.mp4,9,validate", "run/g01_c04.mp4,10,test"),
        ],
    )
    module = data(root, labels=["all.csv"])
    module.setup("test")
    assert module.class_names == ["9", "10"]
    assert files(module.train_set)[0] == "run/g00_c00.mp4"
    assert module.train_set.labels.tolist() == [1, 1, 1, 0]
    assert (files(module.val_set), files(module.test_set)) == (["jump/g01_c03.mp4"], ["run/g01_c04.mp4"])
    write_csv(root / "train.csv", ["path,label", "run/g00_c00.mp4,run", "jump/g00_c00.mp4,jump"])
    write_csv(root / "my_val.csv", ["label,path", "jump,jump/g01_c03.mp4"])
    module = data(root, labels=["train.csv", "my_val.csv"])
    assert module.class_names == ["jump", "run"]
    assert (len(module.train_set), files(module.val_set)) == (2, ["jump/g01_c03.mp4"])


def test_csv_files_of_kinetics(clip, tmp_path):
    """Files of the part alone, and whole videos of which it is a part."""
    for name in ("train/riding/abc_000007_000017.mp4", "riding/xyz.mp4", "-x_y/waving.mp4", "-x_y.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, tmp_path / name)
    head = "label,youtube_id,time_start,time_end,split"
    write_csv(
        tmp_path / "train.csv", [head, "riding,abc,7,17,train", "riding,xyz,1,1.5,train", "waving,-x_y,0,1,train"]
    )
    write_csv(tmp_path / "validate.csv", [head, "waving,-x_y,1,2,validate"])
    module = data(tmp_path, labels=["train.csv", "validate.csv"], short_side=[64, 64], size=64)
    assert files(module.train_set) == ["train/riding/abc_000007_000017.mp4", "riding/xyz.mp4", "-x_y.mp4"]
    assert module.train_set.windows.tolist() == [[0, np.inf], [1, 1.5], [0, 1]]
    reader = TrainingClips(module.train_set, 4, 0.4, 64, 64, 64, False)
    for when in (0.0, 0.5, 0.99):
        shown = [number(frame) for frame in reader._decoded(1, when, 0.0)]
        assert 30 <= shown[0] <= shown[-1] < 45
        assert number(reader._decoded(0, when, 0.0)[0]) == int(48 * when + 0.03)
    write_csv(tmp_path / "train.csv", [head, "riding,abc,7,17,train", "waving,xyz,50,60,train"])
    module = data(tmp_path, labels=["train.csv"], val_size=0, batch_size=2)
    with pytest.raises(ValueError, match=r"xyz\.mp4 lasts 2\.0 seconds, but its csv line asks for 50 to 60"):
        batches(module.train_dataloader())


def test_lines_without_a_file_are_counted(shelf, tmp_path):
    root = tmp_path / "listed"
    shutil.copytree(shelf, root)
    lines = [f"{name}/g00_c0{k}.mp4,{name}" for name in ("run", "jump") for k in range(3)]
    write_csv(root / "all.csv", ["path,label", *lines, "run/gone.mp4,run", "wave/gone.mp4,run"])
    with pytest.raises(ValueError, match=r"2 of 8 videos of the csv files are not in .*: run/gone\.mp4 \(.*line 8"):
        data(root, labels=["all.csv"])
    with pytest.warns(UserWarning, match="2 of 8 videos of the csv files are not in"):
        module = data(root, labels=["all.csv"], corrupt="skip", val_size=0)
    assert len(module.train_set) == 6
    write_csv(root / "all.csv", ["path,label", "run/g00_c00.mp4,run", *(f"jump/gone{k}.mp4,jump" for k in range(3))])
    with pytest.raises(ValueError, match=r"3 of 4 videos .* too many to leave out"):
        data(root, labels=["all.csv"], corrupt="skip")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["name,kind", "a,b"], "has the columns name, kind: expected a first line that names"),
        (["path,label"], "has no lines"),
        (["path,label", "run/g00_c00.mp4,"], "line 2 lacks its label"),
        (["path,label,split", "run/g00_c00.mp4,run,dev"], "line 2: split 'dev' must be train, val or test"),
        (["youtube_id,label,time_start,time_end", "x,run,9,3"], "time_start 9 must not be negative, and be before"),
        (["youtube_id,label,time_start,time_end", "x,run,soon,3"], "must both be seconds"),
        (["path,label", "run/g00_c00.mp4,run"], "a classifier needs two classes"),
        (["path,label,split", "a.mp4,a,train", "b.mp4,b,train", "c.mp4,c,val"], "line 4: no line for training has"),
    ],
)
def test_a_csv_file_that_makes_no_sense_is_named(shelf, tmp_path, lines, message):
    shutil.copytree(shelf, tmp_path / "listed")
    write_csv(tmp_path / "listed" / "all.csv", lines)
    with pytest.raises(ValueError, match=message):
        data(tmp_path / "listed", labels=["all.csv"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, "num_frames=0 must be at least 1"),
        ({"seconds": 0.0}, "seconds=0.0 must be greater than 0"),
        ({"short_side": [8, 20]}, r"short_side=\[8, 20\] must be \[least, most\], and least not below size=16"),
        ({"test_crops": 2}, "test_crops=2 must be 1 or 3"),
        ({"corrupt": "ignore"}, "corrupt='ignore' must be refuse or skip"),
        ({"labels": ["nowhere.csv"]}, "there is no file .*nowhere.csv"),
        ({"val_size": 23}, "leave none of 23 to train on"),
    ],
)
def test_wrong_arguments_are_named(shelf, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data(shelf, **options)


def test_other_layouts_are_named(shelf, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        data(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"has no folders, and a classifier needs two classes at least: expected <root>/"
    ):
        data(tmp_path)
    for split in ("train", "val"):
        shutil.copytree(shelf, tmp_path / split)
    shutil.move(tmp_path / "val" / "run", tmp_path / "val" / "runn")
    with pytest.raises(ValueError, match=r"val has class folders that training has not: runn\."):
        data(tmp_path)
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(ValueError, match="has a folder val with classes but no such folder train"):
        data(tmp_path)
    with pytest.raises(ValueError, match="no video to train on is left in"):
        data(shelf, val_size=21)


# What cannot be read


@WORKERS
def test_a_video_that_cannot_be_read_is_named(broken, workers):
    (broken / "jump" / "g00_c01.mp4").unlink()
    (broken / "run" / "sound.mp4").unlink()
    loader = data(broken, val_size=0, workers=workers).train_dataloader()
    with pytest.raises(
        ValueError, match=r"g00_c00\.mp4 is empty \(0 bytes\)\. Mend or remove it, or have such files left"
    ):
        batches(loader)


@pytest.mark.parametrize(("workers", "cache"), [(0, False), (2, False), (0, True), (2, True)])
def test_what_cannot_be_read_is_left_out_and_counted(broken, workers, cache):
    with pytest.warns(
        UserWarning, match="3 of 24 videos of split train cannot be read, and are left out: .*has no pict"
    ):
        module = data(broken, val_size=0, corrupt="skip", workers=workers, cache=cache)
    assert len(module.train_set) == 21
    assert not {"run/g00_c00.mp4", "run/sound.mp4", "jump/g00_c01.mp4"} & set(files(module.train_set))
    assert sum(len(labels) for _, labels in batches(module.train_dataloader())) == 20
    assert batches(module.evaluation_dataloader("train"))[0][1].tolist() == [0, 0, 0, 0]


def test_a_cache_refuses_what_cannot_be_read(broken):
    with pytest.raises(ValueError, match=r"cannot be read as a video.*\. Mend or remove it"):
        data(broken, val_size=0, cache=True)


def test_more_than_half_is_not_left_out(broken):
    for path in (broken / "run").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"14 of 24 videos of split train cannot be read: .*too many to leave out"):
        data(broken, val_size=0, corrupt="skip")


# The cache


def test_kept_clips_are_frames_of_the_video(shelf):
    """Each begins at a multiple of the distance between frames, and they are what is read without the cache."""
    module = data(shelf, cache=True, val_size=6, size=32, short_side=[32, 32], flip=False)
    plain = data(shelf, val_size=6, size=32, short_side=[32, 32], flip=False)
    assert same(batches(module.val_dataloader()), batches(plain.val_dataloader()))
    assert same(batches(module.evaluation_dataloader("train")), batches(plain.evaluation_dataloader("train")))
    first = []
    for index in range(len(module.train_set)):
        frames = module.train_set.kept.frames(index)
        with VideoFile(module.train_set.path(index)) as video:
            expected = video.frames(np.arange(len(frames)) * 0.1, 32)
            assert len(frames) == round(video.duration * 10)
        assert np.array_equal(frames, np.stack(expected))
    for clips, _ in batches(module.train_dataloader()):
        for sample in clips:
            shown = [round(float(frame.float().mean()), 1) for frame in sample.unbind(1)]
            first.append(shown[0])
    assert len(set(first)) > 1


def test_a_taken_part_keeps_its_frames(shelf):
    kept = data(shelf, cache=True, val_size=0).train_set
    part = kept.take(np.array([4, 2, 7]))
    assert files(part) == [files(kept)[k] for k in (4, 2, 7)]
    assert all(np.array_equal(part.kept.frames(k), kept.kept.frames(row)) for k, row in enumerate((4, 2, 7)))


def test_the_test_videos_have_their_own_views_with_and_without_the_cache(shelf):
    """Where there are none for testing the validation videos are taken, by the views of the test."""
    found = []
    for cache in (False, True):
        module = data(shelf, val_size=6, cache=cache, test_clips=2, test_crops=3, eval_size=20, eval_batch_size=12)
        module.setup("test")
        found.append(batches(module.test_dataloader()))
        assert next(iter(module.val_dataloader()))[0].shape == (6, 3, 4, 20, 20)
    assert same(*found)
    assert [clips.shape for clips, _ in found[0]] == [(2, 6, 3, 4, 20, 20)] * 3


# Order, workers, processes, resuming


def test_workers_do_not_change_a_batch(shelf):
    torch.manual_seed(3)
    expected = [batches(loader) for loader in [data(shelf).train_dataloader()] for _ in range(2)]
    assert not same(*expected)
    for workers in (1, 2):
        torch.manual_seed(3)
        loader = data(shelf, workers=workers).train_dataloader()
        assert [same(batches(loader), epoch) for epoch in expected] == [True, True]


@pytest.mark.parametrize(("workers", "cache", "done"), [(0, False, 3), (2, False, 1), (2, False, 5), (0, True, 3)])
def test_resumed_in_the_middle_of_an_epoch_the_same_batches_follow(shelf, workers, cache, done):
    torch.manual_seed(3)
    straight = data(shelf, cache=cache).train_dataloader()
    epochs = [batches(straight) for _ in range(3)]
    torch.manual_seed(3)
    stopped = data(shelf, workers=workers, cache=cache).train_dataloader()
    batches(stopped)
    assert same(batches(stopped, done), epochs[1][:done])
    state = stopped.state_dict()
    assert (state["epoch"], state["next_batch"]) == (1, done)  # not where the workers are
    torch.manual_seed(4)
    resumed = data(shelf, workers=workers, cache=cache).train_dataloader()
    resumed.load_state_dict(json.loads(json.dumps(state)))
    if done < 5:  # of the five batches of an epoch
        assert same(batches(resumed), epochs[1][done:])
    assert same(batches(resumed), epochs[2])


def test_resuming_on_other_videos_or_clips_is_refused(shelf):
    loader = data(shelf).train_dataloader()
    batches(loader, 2)
    for other in ({"split_seed": 1}, {"seconds": 0.5}):
        with pytest.raises(ValueError, match="trained on other samples"):
            data(shelf, **other).train_dataloader().load_state_dict(loader.state_dict())


def test_loading_draws_nothing_from_the_runs_random_numbers(shelf):
    loader = data(shelf, workers=1).train_dataloader()
    before = torch.get_rng_state()
    batches(loader, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_workers_get_can_be_pickled(shelf):
    """As where processes are spawned, not forked."""
    for cache in (False, True):
        clips = data(shelf, cache=cache).train_dataloader()._reader.dataset
        again = pickle.loads(pickle.dumps(clips))
        assert torch.equal(again.__getitems__((0, 0, [1, 2])), clips.__getitems__((0, 0, [1, 2])))


def test_processes_share_a_global_training_batch(shelf):
    videos = data(shelf).train_set
    clips = TrainingClips(videos, 4, 0.4, 16, 18, 24, True)
    whole = batches(VideoLoader(clips, TrainingBatches(len(videos), 6, seed=1), 0))
    shares = [
        batches(VideoLoader(clips, TrainingBatches(len(videos), 6, 1, rank=rank, world_size=2), 0)) for rank in range(2)
    ]
    joined = [tuple(torch.cat(pair) for pair in zip(*parts, strict=True)) for parts in zip(*shares, strict=True)]
    assert same(joined, whole)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 7])
def test_processes_together_evaluate_each_video_once(shelf, size, world_size):
    videos = data(shelf).train_set.take(np.arange(0, 3 * size, 3))
    clips = EvaluationClips(videos, 4, 0.4, 16, 2, 3)
    shares = [
        batches(VideoLoader(clips, EvaluationBatches(size, 2, rank, world_size), 0)) for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    assert all(views.shape[1:] == (6, 3, 4, 16, 16) for share in shares for views, _ in share)
    labels = [label for share in shares for _, some in share for label in some.tolist()]
    assert sorted(labels) == sorted(videos.labels.tolist())


class Counting(LightningModule):
    """Counts what is tested, over all processes."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def test_step(self, batch, batch_idx):
        clips, labels = batch
        assert clips.dtype == torch.float32
        sums = torch.stack([torch.tensor(float(len(labels))), clips.double().sum().float()])
        self.counted = getattr(self, "counted", torch.zeros(2)) + sums

    def on_test_epoch_end(self):
        total = self.all_gather(self.counted).reshape(-1, 2).sum(0)
        self.log_dict({"videos": total[0], "sum": total[1]}, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("views", [(1, 1), (2, 3)])
def test_a_trainer_tests_each_video_once_on_any_number_of_processes(broken, views):
    results = []
    for strategy, devices in (("auto", 1), ("ddp_fork", 2)):
        seed_everything(0, verbose=False)
        module = data(
            broken,
            stage=None,
            workers=1,
            corrupt="skip",
            val_size=0,
            test_size=11,
            test_clips=views[0],
            test_crops=views[1],
        )
        trainer = Trainer(**QUIET, strategy=strategy, devices=devices)
        results.append(trainer.test(Counting(), module, verbose=False)[0])
    assert results[0]["videos"] == results[1]["videos"]
    assert 9 <= results[0]["videos"] <= 11
    assert results[0]["sum"] == pytest.approx(results[1]["sum"], rel=1e-6)


# Real videos


@pytest.mark.parametrize("labels", [None, ["labels.csv"]])
def test_the_small_real_set_is_read_by_folders_and_by_its_csv_file(zoo_data, labels):
    module = data(zoo_data / "video" / "mini", labels=labels, num_frames=4, seconds=2.0, size=32, workers=0)
    module.setup("test")
    assert module.class_names == ["basketball", "soccer_juggling", "using_segway", "wave"]
    assert (len(module.train_set), len(module.val_set)) == (19, 13)
    counts = np.bincount(module.train_set.labels).tolist()
    assert counts == [5, 3, 9, 2]
    assert sum(len(labels) for _, labels in batches(module.train_dataloader())) == 16
    assert sum(len(labels) for _, labels in batches(module.test_dataloader())) == 13
    sources = data(zoo_data / "video" / "mini" / "train", groups=r"(.+)_\d+\.mp4", val_size=0.3)
    assert not {f.rsplit("_", 1)[0] for f in files(sources.train_set)} & {
        f.rsplit("_", 1)[0] for f in files(sources.val_set)
    }
