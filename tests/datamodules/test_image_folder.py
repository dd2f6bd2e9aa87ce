import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import SIGTERMException
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from datamodules import ImageFolderDataModule
from datamodules.image_folder import _number, readable_names, stratified_order
from datamodules.pictures import Picture
from datamodules.reading import Crops, PictureLoader, PictureSet
from datamodules.sampling import EvaluationBatches, TrainingBatches
from zoo import LeNet
from zoo.running.checkpoint import SafeCheckpointIO, checkpoint_callbacks
from zoo.running.resume import ExactResume

WORKERS = pytest.mark.parametrize("workers", [0, 2])
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def write(path, seed=0, height=30, width=40, **options):
    """A picture of smooth random pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path, **options)


def fill(folder, counts, ending="jpg"):
    """So many pictures in each class folder, each of its own size."""
    for place, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            write(folder / name / f"{i:03d}.{ending}", seed=100 * place + i, height=24 + i % 5, width=30 + i % 7)
    return folder


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    """One folder, three classes of 20, 10 and 4 pictures."""
    return fill(tmp_path_factory.mktemp("flowers"), {"rose": 20, "aster": 10, "lily": 4})


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Folders for training, validation and test."""
    root = tmp_path_factory.mktemp("split")
    fill(root / "train", {"b": 9, "a": 7})
    fill(root / "val", {"b": 3, "a": 4}, "png")
    fill(root / "test", {"b": 2, "a": 3}, "png")
    return root


def data(root, stage="fit", **options):
    options = {"image_size": 16, "batch_size": 4, "eval_batch_size": 4, "workers": 0} | options
    module = ImageFolderDataModule(str(root), **options)
    if stage:
        module.setup(stage)
    return module


def names(pictures):
    return [str(pictures.path(i).relative_to(pictures.root)) for i in range(len(pictures))]


def batches(loader, count=None):
    taken = []
    for images, labels in loader:
        taken.append((images.clone(), labels))
        if len(taken) == count:
            break
    return taken


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True)
    )


# Folders and classes


def test_classes_are_the_folders_names_before_anything_is_read(flowers, split):
    module = data(flowers, stage=None)
    assert module.class_names == ["aster", "lily", "rose"] == ImageFolder(flowers).classes
    assert module.num_classes == 3
    assert data(split, stage=None).class_names == ["a", "b"]


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_folders_for_validation_have_usual_names(tmp_path, val):
    fill(tmp_path / "train", {"a": 2, "b": 2})
    fill(tmp_path / val, {"a": 1, "b": 2})
    module = data(tmp_path)
    assert [len(module.train_set), len(module.val_set)] == [4, 3]


def test_pictures_and_labels_are_those_of_torchvision(split):
    module = data(split)
    module.setup("test")
    for name, pictures in (("train", module.train_set), ("val", module.val_set), ("test", module.test_set)):
        expected = ImageFolder(split / name).samples
        assert [(str(pictures.path(i)), int(k)) for i, k in enumerate(pictures.labels)] == expected


def test_hidden_and_foreign_files_are_no_pictures(tmp_path):
    fill(tmp_path, {"a": 2, "b": 2})
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "readme.txt").write_text("hello")
    (tmp_path / "a" / "._000.jpg").write_bytes(b"what macOS leaves behind")
    (tmp_path / "a" / "Thumbs.db").write_bytes(b"what Windows leaves behind")
    write(tmp_path / "a" / "more" / "x.JPEG", format="JPEG")
    module = data(tmp_path, val_size=0)
    assert module.class_names == ["a", "b"]
    assert names(module.train_set) == ["a/000.jpg", "a/001.jpg", "a/more/x.JPEG", "b/000.jpg", "b/001.jpg"]


def test_pictures_may_lie_deeper_in_the_folders_of_a_split(tmp_path):
    for name in ("train/a/1/x.jpg", "train/a/2/x.jpg", "train/b/1/x.jpg"):
        write(tmp_path / name)
    assert data(tmp_path, val_size=0).train_set.labels.tolist() == [0, 0, 1]


def test_a_class_may_be_called_train(tmp_path):
    fill(tmp_path, {"train": 3, "bus": 3})
    assert data(tmp_path, stage=None).class_names == ["bus", "train"]


def test_imagenets_folders_get_readable_names():
    names = readable_names([f"n{1440764 + i:08d}" for i in range(1000)])
    assert (names[0], names[1], names[999]) == ("tench", "goldfish", "toilet tissue")
    assert readable_names(["n01440764", "n01443537"]) == ["n01440764", "n01443537"]


def test_a_missing_root_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere: expected <root>/<class>/"):
        data(tmp_path / "nowhere", stage=None)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["x.jpg"], "has no folders, and a classifier needs two"),
        (["a/x.jpg"], "has only the folder a"),
        (["train/a/x.jpg", "val/a/x.jpg"], "train has only the folder a"),
        (["Training/a/x.jpg", "Testing/a/x.jpg"], "Testing holds folders and no pictures"),
        (["val/a/x.jpg", "val/b/x.jpg", "test/a/x.jpg"], "has a folder val with classes but no such folder train"),
    ],
)
def test_another_layout_is_a_clear_error(tmp_path, files, message):
    for file in files:
        write(tmp_path / file)
    with pytest.raises(ValueError, match=message):
        data(tmp_path, stage=None)


@pytest.mark.parametrize("name", ["val", "test"])
def test_class_folders_that_differ_from_trainings_are_named(tmp_path, name):
    fill(tmp_path / "train", {"a": 2, "b": 2, "c": 2})
    fill(tmp_path / name, {"a": 1, "b": 1, "d": 1})
    stage = {"val": "fit", "test": "test"}[name]
    with pytest.raises(ValueError, match=rf"{name} has class folders that training has not: d\."):
        data(tmp_path, stage)
    shutil.rmtree(tmp_path / name / "d")
    with pytest.raises(ValueError, match=rf"{name} lacks class folders that training has: c\."):
        data(tmp_path, stage)
    (tmp_path / name / "c").mkdir()
    assert data(tmp_path, stage)


def test_imagenets_validation_pictures_in_one_heap_are_explained(tmp_path):
    fill(tmp_path / "train", {"n01440764": 2, "n01443537": 2})
    write(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG", format="JPEG")
    with pytest.raises(ValueError, match=r"val has no class folders: .* sorted by torchvision\.datasets\.ImageNet"):
        data(tmp_path)


def test_a_class_without_training_pictures_is_named(tmp_path):
    fill(tmp_path / "train", {"a": 2, "b": 2, "c": 0})
    with pytest.raises(ValueError, match=r"no picture to train on is left in c\."):
        data(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size=0 must be at least 1"),
        ({"resize_size": 15}, "resize_size=15 must be at least 16"),
        ({"eval_batch_size": 0}, "eval_batch_size=0"),
        ({"workers": -1}, "workers=-1"),
        ({"crop_scale": 0.0}, "crop_scale=0.0"),
        ({"crop_scale": 1.5}, "crop_scale=1.5"),
        ({"jitter": -1.0}, "jitter=-1.0"),
        ({"val_size": -1}, "val_size=-1"),
        ({"corrupt": "ignore"}, "corrupt='ignore' must be refuse or skip"),
    ],
)
def test_wrong_arguments_are_named(flowers, options, message):
    with pytest.raises(ValueError, match=message):
        data(flowers, stage=None, **options)


# The split


def test_a_held_out_split_is_disjoint_whole_and_stratified(flowers):
    module = data(flowers, val_size=0.2, test_size=7)
    module.setup("test")
    parts = [names(pictures) for pictures in (module.train_set, module.val_set, module.test_set)]
    assert [len(part) for part in parts] == [20, 7, 7]
    everything = [os.path.relpath(path, flowers) for path, _ in ImageFolder(flowers).samples]
    assert sorted(name for part in parts for name in part) == sorted(everything)
    for part, share in zip(parts, (20 / 34, 7 / 34, 7 / 34), strict=True):
        counts = [sum(name.startswith(kind) for name in part) for kind in ("rose", "aster", "lily")]
        assert np.abs(np.array(counts) - share * np.array([20, 10, 4])).max() <= 1


def test_a_split_is_stable_and_another_seed_gives_another(flowers, tmp_path):
    first, again, other = data(flowers), data(flowers), data(flowers, split_seed=1)
    assert names(first.val_set) == names(again.val_set) != names(other.val_set)
    # Pinned: neither a version of numpy nor the next change may move pictures from validation to training.
    assert names(first.val_set) == ["aster/002.jpg", "rose/005.jpg", "rose/009.jpg", "rose/011.jpg"]
    torch.manual_seed(5)
    shutil.copytree(flowers, tmp_path / "moved")
    moved = data(tmp_path / "moved", split_seed=0, workers=1)
    assert names(moved.val_set) == names(first.val_set)
    assert moved._split == first._split != other._split


@pytest.mark.parametrize("seed", range(5))
def test_every_beginning_of_the_stratified_order_has_each_class_in_its_share(seed):
    labels = np.random.default_rng(seed).choice(5, 200, p=[0.5, 0.3, 0.1, 0.05, 0.05])
    order = stratified_order(labels, seed)
    assert sorted(order) == list(range(200))
    totals = np.bincount(labels, minlength=5)
    for length in range(1, 200):
        counts = np.bincount(labels[order[:length]], minlength=5)
        assert np.abs(counts - totals * length / 200).max() <= 1.0 + 1e-9


@pytest.mark.parametrize(("size", "number"), [(0, 0), (0.0, 0), (0.1, 4), (0.5, 17), (1, 1), (1.0, 1), (33, 33)])
def test_a_size_is_a_number_or_below_one_a_share(size, number):
    assert _number(size, 34) == number


@pytest.mark.parametrize("size", [34, 0.99, 100])
def test_a_split_that_leaves_nothing_is_refused(flowers, size):
    with pytest.raises(ValueError, match=rf"{size} of 34 pictures leaves nothing to train on|is left in lily"):
        data(flowers, val_size=size)


def test_existing_folders_are_used_whatever_the_sizes_are(split):
    module = data(split, val_size=0.3, test_size=0.3)
    module.setup("test")
    assert [len(part) for part in (module.train_set, module.val_set, module.test_set)] == [16, 7, 5]


def test_without_validation(flowers, split):
    for root in (flowers, split):
        module = data(root, val_size=0)
        assert module.val_dataloader() == []
    with pytest.raises(ValueError, match="there is nothing to test on"):
        data(flowers, "test", val_size=0)


def test_without_test_pictures_the_validation_pictures_are_tested_on(flowers):
    module = data(flowers, "test")
    assert same(batches(module.test_dataloader()), batches(module.val_dataloader()))
    assert same(batches(module.predict_dataloader()), batches(module.val_dataloader()))


# What is in a batch


@WORKERS
def test_evaluation_images_are_torchvisions_to_within_a_level(split, workers):
    module = data(split, image_size=20, workers=workers)
    usual = ImageFolder(split / "val", v2.Compose([v2.Resize(22), v2.CenterCrop(20), v2.PILToTensor()]))
    seen = 0
    for batch in module.val_dataloader():
        images, labels = module.on_after_batch_transfer(batch, 0)
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        for image, label in zip(images, labels, strict=True):
            expected, expected_label = usual[seen]
            assert label == expected_label
            torch.testing.assert_close(image, expected / 255, rtol=0, atol=1.01 / 255)
            seen += 1
    assert seen == len(usual)


def test_a_training_batch(flowers):
    module = data(flowers, image_size=24)
    images, labels = next(iter(module.train_dataloader()))
    assert images.shape == (4, 3, 24, 24)
    assert images.dtype == torch.uint8
    assert images.is_contiguous()
    images, labels = module.on_after_batch_transfer((images, labels), 0)
    assert 0 <= images.min() < images.max() <= 1
    assert labels.shape == (4,)


def test_training_crops_resemble_their_picture_also_when_it_is_decoded_small(tmp_path):
    """A JPEG eight times as large as asked: crops from 1/2, 1/4 and 1/8 of it are those of all its pixels."""
    write(tmp_path / "a.jpg", height=600, width=800, quality=95)
    Image.open(tmp_path / "a.jpg").save(tmp_path / "a.png")
    files = np.array([b"a.jpg", b"a.png"])
    pictures = PictureSet(tmp_path, files, np.zeros(2, dtype=np.int64))
    turned = PictureSet(tmp_path, files[::-1], np.zeros(2, dtype=np.int64))
    differences = []
    for seed in range(20):
        small, large = (Crops(one, 64, 72, 0.08).random(seed, 0, 0, 0.08).float() for one in (pictures, turned))
        differences.append((small - large).abs().mean().item())
    assert 0 < max(differences) < 4  # of 255; half a pixel of the smaller picture is nowhere more
    assert np.mean(differences) < 1.5


def test_random_crops_follow_seed_epoch_and_picture_alone(flowers):
    pictures = data(flowers).train_set
    crops = Crops(pictures, 16, 18, 0.08)
    images = crops.__getitems__((3, 1, [5, 7]))
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(images, crops.__getitems__((3, 1, [5, 7])))
    assert torch.equal(images[1], crops.__getitems__((3, 1, [7]))[0])
    assert not torch.equal(images, crops.__getitems__((3, 2, [5, 7])))
    assert not torch.equal(images, crops.__getitems__((4, 1, [5, 7])))


def test_augmentation_is_for_training_only(flowers):
    module = data(flowers, mixup=0.2, jitter=0.4)
    images, labels = next(iter(module.train_dataloader()))

    class InTraining:
        training = True

    module.trainer = InTraining
    mixed, shares = module.on_after_batch_transfer((images, labels), 0)
    assert mixed.shape == (4, 3, 16, 16)
    assert mixed.dtype == torch.float32
    assert shares.shape == (4, 3)
    InTraining.training = False
    plain, kept = module.on_after_batch_transfer((images, labels), 0)
    assert torch.equal(plain, images / 255)
    assert torch.equal(kept, labels)


def test_a_cache_keeps_evaluation_and_the_order_and_reads_no_file_again(flowers, tmp_path):
    shutil.copytree(flowers, tmp_path / "copy")
    plain = data(flowers)
    cached = data(tmp_path / "copy", cache=True, workers=2)
    expected, order = batches(plain.val_dataloader()), [labels for _, labels in batches(plain.train_dataloader())]
    shutil.rmtree(tmp_path / "copy")
    assert same(batches(cached.val_dataloader()), expected)
    loader = cached.train_dataloader()
    loader.load_state_dict(plain.train_dataloader().state_dict())
    taken = batches(loader)
    assert all(torch.equal(labels, k) for (_, labels), k in zip(taken, order, strict=True))
    assert not torch.equal(taken[0][0], batches(loader)[0][0])  # another epoch, other crops
    height, width = cached.train_set.kept.pixels(0).shape[:2]
    assert min(height, width) == cached.resize_size == 18


# Corrupt pictures


@pytest.fixture
def damaged(tmp_path, flowers):
    root = tmp_path / "damaged"
    shutil.copytree(flowers, root)
    (root / "rose" / "003.jpg").write_bytes(b"")
    (root / "rose" / "004.jpg").write_bytes(b"<html>not found</html>")
    whole = (root / "aster" / "001.jpg").read_bytes()
    (root / "aster" / "001.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    return root


BAD = {"rose/003.jpg", "rose/004.jpg", "aster/001.jpg"}


@WORKERS
def test_a_corrupt_picture_is_refused_in_one_line_that_names_it(damaged, workers):
    module = data(damaged, workers=workers, val_size=0)
    with pytest.raises(ValueError, match=r"(003|004|001)\.jpg") as caught:
        batches(module.train_dataloader())
    assert str(caught.value).count("\n") == 0
    assert "--data.init_args.corrupt skip" in str(caught.value)
    with pytest.raises(ValueError, match=r"(003|004|001)\.jpg .*corrupt skip"):
        data(damaged, workers=workers, val_size=0, cache=True)


@pytest.mark.parametrize("cache", [False, True])
def test_workers_end_with_an_error_also_where_it_is_kept(flowers, monkeypatch, cache):
    def fail(self, shrink=1):
        raise PermissionError("not for you")

    monkeypatch.setattr(Picture, "pixels", fail)  # the workers are forked
    before = set(multiprocessing.active_children())
    with pytest.raises(PermissionError, match="not for you") as kept:
        batches(data(flowers, workers=2, val_size=0, cache=cache).train_dataloader())
    assert set(multiprocessing.active_children()) <= before, "workers outlived their loader"
    assert kept.tb is not None  # it leads to every frame from here to the loader, whose workers it would keep alive


@WORKERS
@pytest.mark.parametrize("cache", [False, True])
def test_skipped_pictures_are_named_and_the_others_stay_in_their_split(damaged, flowers, workers, cache):
    plain = data(flowers, val_size=12)
    with pytest.warns(UserWarning, match="cannot be read") as caught:
        module = data(damaged, corrupt="skip", workers=workers, cache=cache, val_size=12)
    text = " ".join(str(one.message) for one in caught)
    assert all(name in text for name in BAD)
    for pictures, expected in ((module.train_set, plain.train_set), (module.val_set, plain.val_set)):
        assert names(pictures) == [name for name in names(expected) if name not in BAD]
    assert len(module.train_set) + len(module.val_set) == 31
    loader = module.train_dataloader()
    assert sum(len(labels) for _ in range(2) for _, labels in batches(loader)) == 2 * (len(module.train_set) // 4 * 4)
    evaluated = batches(module.val_dataloader())
    good = Crops(module.val_set, 16, 18, None).__getitems__((0, 0, list(range(len(module.val_set)))))
    assert torch.equal(torch.cat([images for images, _ in evaluated]), good)
    assert torch.cat([labels for _, labels in evaluated]).tolist() == module.val_set.labels.tolist()


def test_too_many_corrupt_pictures_are_not_skipped(flowers, tmp_path):
    shutil.copytree(flowers, tmp_path / "copy")
    for file in (tmp_path / "copy").glob("*/*.jpg"):
        file.write_bytes(b"\0" * 1000)
    with pytest.raises(ValueError, match=r"30 of 30 training pictures cannot be read: .* and 20 more\. Those are too"):
        data(tmp_path / "copy", corrupt="skip")


def test_skipping_a_whole_class_is_refused(tmp_path):
    fill(tmp_path, {"a": 9, "b": 9, "c": 2})
    for file in (tmp_path / "c").glob("*.jpg"):
        file.write_bytes(b"")
    with pytest.warns(UserWarning, match="2 of 20"), pytest.raises(ValueError, match="is left in c"):
        data(tmp_path, corrupt="skip", val_size=0)


@WORKERS
def test_a_file_that_vanished_is_named(flowers, tmp_path, workers):
    shutil.copytree(flowers, tmp_path / "copy")
    module = data(tmp_path / "copy", workers=workers)
    shutil.rmtree(tmp_path / "copy" / "rose")
    with pytest.raises(FileNotFoundError, match=r"rose/0\d\d\.jpg"):
        batches(module.train_dataloader())


# Processes and resuming


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("size", [1, 7])
def test_processes_together_evaluate_each_picture_once(flowers, size, world_size):
    pictures = data(flowers).train_set.take(np.arange(0, 4 * size, 4))
    crops = Crops(pictures, 16, 18, None)
    shares = []
    for rank in range(world_size):
        loader = PictureLoader(crops, EvaluationBatches(size, 2, rank, world_size), workers=0)
        shares.append(batches(loader))
    assert len({len(share) for share in shares}) == 1
    images = torch.cat([images for share in shares for images, _ in share])
    expected = crops.__getitems__((0, 0, list(range(size))))
    assert sorted(image.sum().item() for image in images) == sorted(image.sum().item() for image in expected)
    labels = [label for share in shares for _, some in share for label in some.tolist()]
    assert sorted(labels) == sorted(pictures.labels.tolist())


def test_processes_share_a_global_training_batch(flowers):
    pictures = data(flowers).train_set
    crops = Crops(pictures, 16, 18, 0.08)
    whole = batches(PictureLoader(crops, TrainingBatches(len(pictures), 6, seed=1), 0))
    shares = [
        batches(PictureLoader(crops, TrainingBatches(len(pictures), 6, 1, rank=rank, world_size=2), 0))
        for rank in range(2)
    ]
    joined = [tuple(torch.cat(pair) for pair in zip(*parts, strict=True)) for parts in zip(*shares, strict=True)]
    assert same(joined, whole)


def test_workers_do_not_change_a_batch(flowers):
    torch.manual_seed(3)
    expected = [batches(loader) for loader in [data(flowers).train_dataloader()] for _ in range(2)]
    for workers in (1, 2):
        torch.manual_seed(3)
        loader = data(flowers, workers=workers).train_dataloader()
        assert [same(batches(loader), epoch) for epoch in expected] == [True, True]


@pytest.mark.parametrize(("workers", "cache", "done"), [(0, False, 3), (2, False, 1), (2, False, 7), (2, True, 3)])
def test_resumed_in_the_middle_of_an_epoch_the_same_batches_follow(flowers, workers, cache, done):
    torch.manual_seed(3)
    straight = data(flowers, cache=cache).train_dataloader()
    epochs = [batches(straight) for _ in range(3)]
    torch.manual_seed(3)
    stopped = data(flowers, workers=workers, cache=cache).train_dataloader()
    batches(stopped)
    assert same(batches(stopped, done), epochs[1][:done])
    state = stopped.state_dict()
    assert (state["epoch"], state["next_batch"]) == (1, done)  # not where the workers are
    torch.manual_seed(4)
    resumed = data(flowers, workers=workers, cache=cache).train_dataloader()
    resumed.load_state_dict(state)
    if done < 7:  # of the seven batches of an epoch
        assert same(batches(resumed), epochs[1][done:])
    assert same(batches(resumed), epochs[2])


def test_an_epoch_that_was_left_early_leaves_nothing_behind(flowers):
    torch.manual_seed(3)
    straight = data(flowers).train_dataloader()
    epochs = [batches(straight) for _ in range(3)]
    torch.manual_seed(3)
    loader = data(flowers, workers=2).train_dataloader()
    assert [same(batches(loader, 2), epoch[:2]) for epoch in epochs] == [True] * 3


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="this system does not tell who has sent a signal")
@pytest.mark.parametrize(
    "method", ["fork", *(pytest.param(m, marks=pytest.mark.faults) for m in ("spawn", "forkserver"))]
)
def test_a_worker_ends_where_its_own_process_asks_for_it_and_nobody_else(flowers, monkeypatch, method):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    loader = data(flowers, workers=1).train_dataloader()
    loader._reader.multiprocessing_context = multiprocessing.get_context(method)
    batches(loader, 1)
    (worker,) = loader._iterator._workers
    script = f"import os, signal; os.kill({worker.pid}, signal.SIGTERM)"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert len(batches(loader)) == 7
    assert worker.is_alive()
    torch.utils.data._utils.signal_handling._remove_worker_pids(id(loader._iterator))  # its death is no surprise
    loader._iterator._worker_pids_set = False
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 128 + signal.SIGTERM


def test_loading_draws_nothing_from_the_runs_random_numbers(flowers):
    loader = data(flowers, workers=1).train_dataloader()
    before = torch.get_rng_state()
    batches(loader, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_workers_get_can_be_pickled(flowers):
    """As where processes are spawned, not forked."""
    for cache in (False, True):
        crops = Crops(data(flowers, cache=cache).train_set, 16, 18, 0.08)
        again = pickle.loads(pickle.dumps(crops))
        assert torch.equal(again.__getitems__((0, 0, [1, 2])), crops.__getitems__((0, 0, [1, 2])))


def test_resuming_on_other_pictures_is_refused(flowers):
    loader = data(flowers).train_dataloader()
    batches(loader, 2)
    with pytest.raises(ValueError, match="trained on other samples"):
        data(flowers, split_seed=1).train_dataloader().load_state_dict(loader.state_dict())


def fit(root, folder, workers, stop=None, **options):
    from lightning import Callback

    class StopAfter(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == stop:
                trainer._signal_connector.received_sigterm = True

    seed_everything(3, verbose=False)
    module = data(root, stage=None, workers=workers)
    model = LeNet(num_classes=3, class_names=module.class_names, in_channels=3, image_size=16)
    callbacks = [ExactResume(), *checkpoint_callbacks(None, "min"), StopAfter()]
    trainer = Trainer(**QUIET, callbacks=callbacks, plugins=[SafeCheckpointIO()], max_epochs=2, default_root_dir=folder)
    trainer.fit(model, module, **options)
    return model, trainer


@WORKERS
def test_a_run_stopped_in_the_middle_of_an_epoch_ends_with_the_weights_of_one_that_was_not(flowers, tmp_path, workers):
    straight, reference = fit(flowers, tmp_path / "straight", 0)
    with pytest.raises(SIGTERMException):
        fit(flowers, tmp_path / "stopped", workers, stop=10)
    assert not multiprocessing.active_children(), "workers outlived their run"
    last = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    resumed, trainer = fit(flowers, tmp_path / "stopped", workers, ckpt_path=last)
    assert trainer.global_step == reference.global_step == 14
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert trainer.callback_metrics == reference.callback_metrics


def test_a_plain_trainer_fits_tests_and_predicts(split):
    seed_everything(0, verbose=False)
    module = data(split, stage=None, workers=2)
    model = LeNet(num_classes=2, class_names=module.class_names, in_channels=3, image_size=16)
    trainer = Trainer(**QUIET, max_epochs=1, enable_checkpointing=False)
    trainer.fit(model, module)
    assert trainer.global_step == 4
    assert not multiprocessing.active_children(), "workers outlived their run"
    assert trainer.test(model, module, verbose=False)[0]["test/samples"] == 5
    assert sum(map(len, trainer.predict(model, module))) == 5


def test_two_processes_leave_out_the_same_pictures_and_evaluate_each_of_the_others_once(damaged):
    results = []
    for strategy, devices in (("auto", 1), ("ddp_fork", 2)):
        seed_everything(0, verbose=False)
        module = data(damaged, stage=None, workers=1, corrupt="skip", val_size=12, flip=False)
        model = LeNet(num_classes=3, class_names=module.class_names, in_channels=3, image_size=16)
        trainer = Trainer(**QUIET, strategy=strategy, devices=devices, max_epochs=1, enable_checkpointing=False)
        trainer.fit(model, module)
        results.append(trainer.test(model, module, verbose=False)[0])
    assert results[0]["test/samples"] == results[1]["test/samples"] == 11
    assert results[0] == pytest.approx(results[1], abs=1e-3)  # the global batches are the same
