"""Features of a frozen encoder: the same training, computed once, never of other pictures or another encoder."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning import Trainer, seed_everything
from PIL import Image
from safetensors.torch import load_file

from datamodules import COCOCaptionsDataModule, DigitsDataModule
from zoo import CaptioningLSTM, LeNet
from zoo.running.caching import CacheFeatures
from zoo.running.freezing import FreezeBackbone

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
SMALL = {"network": "small", "image_size": 32, "wordvec_dim": 8, "hidden_dim": 16}


@pytest.fixture
def root(tmp_path):
    """Twelve pictures to train on and four to validate, with two captions each."""
    rng = np.random.default_rng(0)
    for split, numbers in (("train", range(12)), ("val", range(12, 16))):
        (tmp_path / split).mkdir()
        images, annotations = [], []
        for number in numbers:
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png"})
            texts = (f"a picture of noise {number % 3}", "some noise")
            annotations += [{"image_id": number, "id": 2 * number + k, "caption": t} for k, t in enumerate(texts)]
        content = {"images": images, "annotations": annotations}
        (tmp_path / f"captions_{split}.json").write_text(json.dumps(content))
    return tmp_path


def data_of(root):
    return COCOCaptionsDataModule(str(root), size=32, min_count=1, batch_size=8, workers=0)


def train(root, callbacks, seed=0, trainer=None, **options):
    """A fresh model after two epochs on the pictures, or on their features."""
    seed_everything(seed, verbose=False)
    data = data_of(root)
    model = CaptioningLSTM(data.words, **SMALL | options)
    seed_everything(1, verbose=False)
    trainer = Trainer(**QUIET | {"max_epochs": 2, "callbacks": callbacks, "num_sanity_val_steps": 1} | (trainer or {}))
    trainer.fit(model, data)
    return model, data, trainer


def files(folder):
    return sorted(Path(folder).glob("*.safetensors"))


def test_training_on_features_is_training_on_pictures(root):
    reference, _, without = train(root, [])
    model, data, trainer = train(root, [CacheFeatures(str(root / "features"))])
    for (name, value), expected in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=name)
    for name, value in without.callback_metrics.items():
        assert float(trainer.callback_metrics[name]) == pytest.approx(float(value), rel=1e-4)
    assert data.train_set.images.dtype == torch.uint8, "the pictures are back in their place"


def test_the_files_hold_what_the_encoder_makes_of_each_picture(root):
    model, data, _ = train(root, [CacheFeatures(str(root / "features"))])
    stored = {len(features): features for features in (load_file(f)["features"] for f in files(root / "features"))}
    assert sorted(stored) == [4, 12]
    for pictures in (data.train_set, data.val_set):
        for index, expected in enumerate(stored[len(pictures)]):
            pixels = np.asarray(Image.open(pictures.path(index))).astype(np.float32) / 255
            with torch.no_grad():
                found = model.eval().features(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_two_processes_train_on_the_features_of_all_pictures_as_one_does(root):
    one, _, _ = train(root, [CacheFeatures(str(root / "one"))])
    ddp = {"accelerator": "cpu", "strategy": "ddp_fork", "devices": 2}
    two, _, _ = train(root, [CacheFeatures(str(root / "two"))], trainer=ddp)
    assert [path.name for path in files(root / "two")] == [path.name for path in files(root / "one")]
    for found, expected in zip(files(root / "two"), files(root / "one"), strict=True):
        torch.testing.assert_close(load_file(found)["features"], load_file(expected)["features"])
    for (name, value), expected in zip(two.state_dict().items(), one.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_a_process_that_does_not_see_the_file_says_so(tmp_path):
    strategy = SimpleNamespace(barrier=lambda name: None)
    second = SimpleNamespace(is_global_zero=False, global_rank=1, strategy=strategy)
    with pytest.raises(FileNotFoundError, match=r"process 1 does not see .*that all machines share"):
        CacheFeatures(str(tmp_path))._features(second, torch.nn.Identity(), "train", tmp_path / "f.safetensors")


def test_features_are_computed_once_for_the_same_pictures_and_encoder(root):
    folder = root / "features"
    train(root, [CacheFeatures(str(folder))])
    before = {path: path.stat().st_mtime_ns for path in files(folder)}
    train(root, [CacheFeatures(str(folder))])
    assert {path: path.stat().st_mtime_ns for path in files(folder)} == before


def changed_picture(root):
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(root / "train" / "3.png")


def renamed_picture(root):
    content = json.loads((root / "captions_train.json").read_text())
    content["images"][3]["file_name"] = "other.png"
    os.rename(root / "train" / "3.png", root / "train" / "other.png")
    (root / "captions_train.json").write_text(json.dumps(content))


def touched_picture(root):
    os.utime(root / "train" / "3.png", (1, 1))


@pytest.mark.parametrize("change", [changed_picture, renamed_picture, touched_picture])
def test_other_pictures_have_a_file_of_their_own(root, change):
    folder = root / "features"
    train(root, [CacheFeatures(str(folder))])
    before = files(folder)
    change(root)
    train(root, [CacheFeatures(str(folder))])
    assert len(files(folder)) == len(before) + 1, "the training pictures', not those for validation"


@pytest.mark.parametrize("other", [{"seed": 5}, {"grid": 2}])
def test_another_encoder_has_files_of_its_own(root, other):
    folder = root / "features"
    train(root, [CacheFeatures(str(folder))])
    train(root, [CacheFeatures(str(folder))], **other)
    assert len(files(folder)) == 4


def test_other_captions_of_the_same_pictures_need_no_new_features(root):
    folder = root / "features"
    train(root, [CacheFeatures(str(folder))])
    content = json.loads((root / "captions_train.json").read_text())
    content["annotations"][0]["caption"] = "a picture of something else"
    (root / "captions_train.json").write_text(json.dumps(content))
    train(root, [CacheFeatures(str(folder))])
    assert len(files(folder)) == 2


def test_a_damaged_file_is_an_error_that_names_it(root):
    folder = root / "features"
    train(root, [CacheFeatures(str(folder))])
    damaged = files(folder)[0]
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(ValueError, match=f"{damaged.name} is damaged.*remove it"):
        train(root, [CacheFeatures(str(folder))])


def test_an_encoder_that_is_trained_is_refused(root):
    with pytest.raises(ValueError, match=r"a backbone that stands still, and network\.0\.weight is trained"):
        train(root, [CacheFeatures(str(root / "features"))], frozen_backbone=False)


def test_an_encoder_that_will_be_trained_is_refused(root):
    callbacks = [FreezeBackbone(until_epoch=1), CacheFeatures(str(root / "features"))]
    with pytest.raises(ValueError, match=r"a backbone that stands still, and network\.0\.weight is trained"):
        train(root, callbacks, frozen_backbone=False)
    assert not (root / "features").exists()


def test_an_encoder_that_a_callback_freezes_for_ever_is_looked_at_as_in_an_evaluation(root):
    frozen, _, _ = train(root, [CacheFeatures(str(root / "features"))])
    by_callback, _, _ = train(root, [FreezeBackbone(), CacheFeatures(str(root / "features"))], frozen_backbone=False)
    for name, value in by_callback.state_dict().items():
        torch.testing.assert_close(value, frozen.state_dict()[name], msg=name)
    assert len(files(root / "features")) == 2


def test_a_fast_run_sees_pictures(root):
    train(root, [CacheFeatures(str(root / "features"))], trainer={"fast_dev_run": True})
    assert not (root / "features").exists()


def test_data_that_cannot_take_features_is_refused(tmp_path):
    model = LeNet(image_size=12)
    model.backbone.requires_grad_(False)
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[CacheFeatures(str(tmp_path))])
    with pytest.raises(
        ValueError, match=r"a data module that tells when its pictures change.*there is a DigitsDataModule"
    ):
        trainer.fit(model, DigitsDataModule(image_size=12))


def test_the_pictures_are_back_after_a_run_that_failed(root):
    data = data_of(root)
    model = CaptioningLSTM(data.words, **SMALL)

    def fail(*arguments):
        raise RuntimeError("on purpose")

    model.training_step = fail
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[CacheFeatures(str(root / "features"))])
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(model, data)
    assert data.train_set.images.dtype == torch.uint8
