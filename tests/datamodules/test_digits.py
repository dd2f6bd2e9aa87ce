import inspect
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer

from datamodules import DigitsDataModule
from datamodules.in_memory import InMemoryDataModule

STAGES = ["fit", "test"]


@pytest.fixture(scope="module")
def official():
    from sklearn.datasets import load_digits

    return load_digits()


def digits(**arguments):
    data = DigitsDataModule(**arguments)
    for stage in STAGES:
        data.setup(stage)
    return data


def collect(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def keys(images, labels):
    """How often each labelled picture occurs: equal for two sets exactly when they hold the same samples."""
    pictures = [np.asarray(image, dtype=np.uint8).tobytes() for image in images]
    return Counter(zip(pictures, map(int, labels), strict=True))


def splits(data):
    return [data.train_set, data.val_set, data.test_set]


def test_sizes_of_the_splits(official):
    data = digits()
    assert [len(labels) for _, labels in splits(data)] == [1257, 180, 360]
    assert len(official.target) == 1257 + 180 + 360


def test_small_pictures_are_the_official_ones_each_in_exactly_one_split(official):
    expected = keys(np.round(official.images * 255 / 16), official.target)
    found = [keys(images.numpy(), labels) for images, labels in splits(digits(image_size=8))]
    assert sum(found, Counter()) == expected  # nothing lost and nothing twice: the splits are disjoint


def test_every_split_has_every_digit():
    data = digits()
    assert all(labels.unique().tolist() == list(range(10)) for _, labels in splits(data))
    assert data.class_names == list("0123456789")
    assert data.num_classes == 10


@pytest.mark.parametrize("image_size", [8, 16, 28])
def test_pictures_are_enlarged_by_bilinear_interpolation_between_pixel_centres(image_size, official):
    def enlarge(values):
        return np.interp((np.arange(image_size) + 0.5) * 8 / image_size - 0.5, np.arange(8), values)

    enlarged = np.apply_along_axis(enlarge, 2, np.apply_along_axis(enlarge, 1, official.images / 16)) * 255
    small, large = digits(image_size=8), digits(image_size=image_size)
    place = {picture.tobytes(): number for number, picture in enumerate(np.round(official.images * 255 / 16))}
    for (few, labels), (many, same_labels) in zip(splits(small), splits(large), strict=True):
        chosen = [place[picture.tobytes()] for picture in few[:, 0].numpy().astype(float)]
        assert torch.equal(labels, same_labels)
        assert many.shape == (len(labels), 1, image_size, image_size)
        assert np.abs(many[:, 0].numpy() - enlarged[chosen]).max() <= 0.501  # rounded to whole numbers


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_three_channels_repeat_the_grey_picture(stage):
    (grey, labels), (colour, same_labels) = splits(digits())[stage], splits(digits(channels=3))[stage]
    assert colour.shape == (len(labels), 3, 28, 28)
    assert torch.equal(colour, torch.cat([grey, grey, grey], dim=1))
    assert torch.equal(labels, same_labels)


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_other_numbers_of_channels_are_a_clear_error(channels):
    with pytest.raises(ValueError, match=f"channels={channels} must be 1"):
        DigitsDataModule(channels=channels)


def test_test_digits_stay_the_same_whatever_the_split_and_torchs_seed():
    torch.manual_seed(1)
    first = digits(split_seed=0)
    torch.manual_seed(2)
    second = digits(split_seed=1, val_size=300)
    assert torch.equal(first.test_set[0], second.test_set[0])
    assert keys(*first.val_set) != keys(*second.val_set)


def test_split_is_the_same_for_two_instances_and_independent_of_torchs_seed():
    torch.manual_seed(1)
    first = digits(split_seed=3)
    torch.manual_seed(2)
    second = digits(split_seed=3)
    for (images, labels), (other_images, other_labels) in zip(splits(first), splits(second), strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def test_loaders_give_the_splits_in_batches_of_the_asked_size():
    data = digits(batch_size=100, eval_batch_size=50)
    assert {len(labels) for _, labels in data.train_dataloader()} == {100}
    assert [len(labels) for _, labels in data.val_dataloader()] == [50, 50, 50, 30]
    for loader in (data.test_dataloader(), data.predict_dataloader()):
        images, labels = collect(loader)
        assert torch.equal(images, data.test_set[0])
        assert torch.equal(labels, data.test_set[1])


def test_transferred_batch_is_the_same_picture_as_floats_between_0_and_1():
    data = digits(image_size=8, translate=2)
    images, labels = next(iter(data.val_dataloader()))
    scaled, same_labels = data.on_after_batch_transfer((images, labels), 0)
    assert scaled.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert torch.equal(labels, same_labels)
    assert (scaled.min(), scaled.max()) == (0, 1)
    np.testing.assert_allclose(scaled.numpy(), images.numpy() / 255.0, rtol=1e-6)


def test_without_validation_all_but_the_test_digits_are_trained_on():
    data = digits(val_size=0)
    assert len(data.train_set[1]) == 1437
    assert data.val_dataloader() == []


@pytest.mark.parametrize("val_size", [-1, 1437, 5000])
def test_impossible_validation_size_is_a_clear_error(val_size):
    with pytest.raises(ValueError, match=f"val_size={val_size} must lie between 0 and 1436"):
        DigitsDataModule(val_size=val_size).setup("fit")


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader"])
def test_asking_for_batches_before_setup_is_a_clear_error(loader):
    with pytest.raises(RuntimeError, match=r"DigitsDataModule.setup\(\)"):
        getattr(DigitsDataModule(), loader)()


def test_arguments_are_plain_values_that_a_checkpoint_can_keep():
    defaults = [p.default for p in inspect.signature(DigitsDataModule).parameters.values()]
    assert all(type(default) is int for default in defaults)


# In Lightning


class Recorder(LightningModule):
    """Keeps what each step was given; in training by epoch."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
        self.train_batches, self.val_batches, self.test_batches = [], [], []

    def training_step(self, batch, batch_idx):
        self.train_batches.append((self.current_epoch, *batch))
        images, labels = batch
        return torch.nn.functional.cross_entropy(self.layer(images.flatten(1)), labels)

    def validation_step(self, batch, batch_idx):
        self.val_batches.append(batch)

    def test_step(self, batch, batch_idx):
        self.test_batches.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, seed=0, **settings):
    torch.manual_seed(seed)
    model = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(model, data)
    return model, trainer


def labels_by_epoch(model, epochs):
    return [[y.tolist() for epoch, _, y in model.train_batches if epoch == wanted] for wanted in range(epochs)]


def test_training_augments_and_validation_and_test_do_not(official):
    model, trainer = fit(DigitsDataModule(image_size=8, translate=2), max_epochs=1)
    trainer.test(model, verbose=False, datamodule=trainer.datamodule)
    known = set(keys(np.round(official.images * 255 / 16), official.target))

    def unchanged(batches):
        images, labels = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
        found = keys((images * 255).round(), labels)
        return sum(count for key, count in found.items() if key in known) / len(labels)

    training = unchanged([(x, y) for _, x, y in model.train_batches])
    assert 0.01 < training < 0.2  # one of the 25 shifts changes nothing
    assert unchanged(model.val_batches) == 1
    assert unchanged(model.test_batches) == 1


def test_without_augmentation_training_sees_the_pictures_unchanged(official):
    model, _ = fit(DigitsDataModule(image_size=8, batch_size=419), max_epochs=1)
    known = keys(np.round(official.images * 255 / 16), official.target)
    images, labels = (torch.cat(parts) for parts in list(zip(*model.train_batches, strict=True))[1:])
    assert len(labels) == 1257
    assert keys((images * 255).round(), labels) <= known


def test_each_epoch_has_its_own_order_and_the_runs_seed_repeats_them():
    def orders(seed):
        model, _ = fit(DigitsDataModule(image_size=8, batch_size=256), seed=seed, max_epochs=3)
        return labels_by_epoch(model, 3)

    first = orders(0)
    assert all(before != after for before, after in pairwise(first))
    assert orders(0) == first
    assert orders(1) != first


@pytest.mark.parametrize("overfit_batches", [2, 0.5])
def test_overfit_batches_gives_the_same_batches_in_every_epoch_whatever_the_seed(overfit_batches):
    def epochs(seed):
        data = DigitsDataModule(image_size=8, batch_size=256, eval_batch_size=45)
        model, _ = fit(data, seed=seed, max_epochs=2, overfit_batches=overfit_batches)
        return labels_by_epoch(model, 2)

    first, second = epochs(0)
    assert first == second
    assert [len(batch) for batch in first] == [256, 256]
    assert epochs(1) == [first, second]


def test_training_without_validation_runs():
    model, _ = fit(DigitsDataModule(image_size=8, val_size=0, batch_size=479), max_epochs=1)
    assert len(model.train_batches) == 3
    assert model.val_batches == []


def test_all_images_are_brought_to_a_size_after_augmentation():
    from torch.nn import functional as F

    small, large = CIFARLike(), CIFARLike(resize=40)
    batch = torch.arange(2 * 3 * 8 * 8, dtype=torch.uint8).view(2, 3, 8, 8), torch.tensor([0, 1])
    images, _ = small.on_after_batch_transfer(batch, 0)
    enlarged, labels = large.on_after_batch_transfer(batch, 0)
    assert torch.equal(labels, batch[1])
    torch.testing.assert_close(enlarged, F.interpolate(images, scale_factor=5, mode="bilinear"), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="resize=0"):
        CIFARLike(resize=0)


def test_an_evaluation_sees_the_training_images_as_they_are():
    data = DigitsDataModule(image_size=8, translate=2, eval_batch_size=100)
    data.setup("fit")
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.evaluation_dataloader("train")]
    images = torch.cat([images for images, _ in batches])
    assert torch.equal(images, data.train_set[0].float() / 255)
    assert torch.equal(torch.cat([labels for _, labels in batches]), data.train_set[1])


def test_a_fingerprint_changes_with_images_labels_and_size():
    def fingerprint(change=None, **arguments):
        data = CIFARLike(**arguments)
        data.setup("fit")
        if change:
            change(data.train_set)
        return data.fingerprint("train")

    known = fingerprint()
    assert fingerprint() == known
    others = {
        fingerprint(resize=9),
        fingerprint(lambda tensors: tensors[0][0, 0, 0].add_(1)),
        fingerprint(lambda tensors: tensors[1][0].add_(1)),
    }
    assert len(others) == 3
    assert known not in others


class CIFARLike(InMemoryDataModule):
    num_classes, class_names = 2, ["a", "b"]

    def __init__(self, resize=None):
        super().__init__(2, 2, 2, 0, resize=resize)

    def read(self, train):
        return torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.arange(8) % 2
