import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from torchvision.transforms.v2 import functional as V

from datamodules import augmentation
from datamodules.augmentation import (
    BatchAugmentation,
    adjust_colours,
    cutmix,
    mixup,
    random_cutout,
    random_flip,
    random_jitter,
    random_translate,
)
from datamodules.in_memory import InMemoryDataModule

DTYPES = [torch.uint8, torch.float32, torch.float16, torch.int64]


def random_images(*shape, dtype=torch.uint8):
    # No zeros: what moves in at the edge differs from every pixel.
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, shape, generator=generator).to(dtype)


def shifted(image, down, right):
    """``image`` (C, H, W) moved by whole pixels, zeros moving in: one pixel at a time."""
    height, width = image.shape[1:]
    result = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                result[:, row, column] = image[:, row - down, column - right]
    return result


def drawn_shifts(images, translated, pixels):
    """For each image the one shift in the allowed range that explains the result; None where there is none."""
    shifts = []
    for image, result in zip(images.numpy(), translated.numpy(), strict=True):
        allowed = [(y, x) for y in range(-pixels, pixels + 1) for x in range(-pixels, pixels + 1)]
        found = [shift for shift in allowed if np.array_equal(result, shifted(image, *shift))]
        shifts.append(found[0] if len(found) == 1 else None)
    return shifts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 1, 5, 5), (6, 3, 4, 7), (1, 2, 6, 3)])
def test_translated_images_equal_a_reference_shift_of_each_image(shape, dtype):
    images = random_images(*shape, dtype=dtype)
    translated = random_translate(images, 2)
    assert translated.dtype == dtype
    assert translated.shape == images.shape
    assert None not in drawn_shifts(images, translated, 2)


def test_translation_draws_every_shift_about_equally_often_and_none_outside_the_range():
    images = random_images(1, 1, 4, 4).expand(900, 1, 4, 4)
    torch.manual_seed(0)
    shifts = drawn_shifts(images, random_translate(images, 1), 1)
    counts = [shifts.count((down, right)) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    assert sum(counts) == 900
    assert all(60 <= count <= 140 for count in counts)  # expected 100, deviation 9


def test_images_of_a_batch_get_different_shifts():
    images = random_images(1, 1, 6, 6).expand(16, 1, 6, 6)
    assert len(set(drawn_shifts(images, random_translate(images, 2), 2))) > 4


def test_all_channels_of_an_image_move_together():
    images = random_images(8, 1, 6, 6).expand(8, 3, 6, 6)
    translated = random_translate(images, 2)
    assert torch.equal(translated, translated[:, :1].expand(8, 3, 6, 6))


def test_translation_by_nothing_changes_nothing():
    images = random_images(4, 1, 5, 5)
    assert torch.equal(random_translate(images, 0), images)


def test_translation_by_more_than_the_image_is_allowed():
    images = random_images(50, 1, 2, 2)
    translated = random_translate(images, 3)
    assert translated.shape == images.shape
    assert (translated == 0).flatten(1).all(dim=1).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_flipped_image_is_itself_or_its_mirror_image(dtype):
    images = random_images(64, 3, 4, 5, dtype=dtype)
    torch.manual_seed(0)
    flipped = random_flip(images)
    assert flipped.dtype == dtype
    assert flipped.shape == images.shape
    mirrored = []
    for image, result in zip(images.numpy(), flipped.numpy(), strict=True):
        mirrored.append(np.array_equal(result, image[:, :, ::-1]))
        assert mirrored[-1] or np.array_equal(result, image)
    assert 16 <= sum(mirrored) <= 48  # expected 32, deviation 4


# Cutout


def paper_squares(height, width, side):
    """Every mask of Cutout for an even side, as the authors' code cuts it: centre plus and minus half, clipped."""
    masks = []
    for y in range(height):
        for x in range(width):
            mask = np.zeros((height, width), dtype=bool)
            mask[max(0, y - side // 2) : y + side // 2, max(0, x - side // 2) : x + side // 2] = True
            masks.append(mask)
    return masks


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
@pytest.mark.parametrize("side", [2, 4, 6])
def test_cutout_fills_the_papers_squares_with_the_mean_and_leaves_the_rest(side, dtype):
    images, fill = random_images(60, 3, 5, 7, dtype=dtype).clamp(max=200), torch.tensor([210, 220, 230]).to(dtype)
    squares = {mask.tobytes() for mask in paper_squares(5, 7, side)}
    cut = random_cutout(images, side, fill)
    assert cut.dtype == dtype
    for image, result in zip(images.numpy(), cut.numpy(), strict=True):
        mask = result[0] == 210
        assert mask.tobytes() in squares
        assert (result[:, mask] == fill.numpy()[:, None]).all()
        assert np.array_equal(result[:, ~mask], image[:, ~mask])


def test_every_centre_of_cutout_is_about_equally_likely():
    images = torch.full((1, 1, 4, 4), 9, dtype=torch.uint8).expand(1600, 1, 4, 4)
    torch.manual_seed(0)
    found = [mask.tobytes() for mask in (random_cutout(images, 2, torch.zeros(1, dtype=torch.uint8)) == 0).numpy()]
    counts = [found.count(mask.tobytes()) for mask in paper_squares(4, 4, 2)]
    assert sum(counts) == 1600
    assert all(65 <= count <= 135 for count in counts)  # expected 100, deviation 10


@pytest.mark.parametrize(("side", "filled"), [(1, {1}), (3, {4, 6, 9}), (7, {16}), (99, {16})])
def test_cutout_of_odd_and_of_large_squares(side, filled):
    images = torch.full((300, 1, 4, 4), 9, dtype=torch.uint8)
    cut = random_cutout(images, side, torch.zeros(1, dtype=torch.uint8))
    assert set((cut == 0).sum((1, 2, 3)).tolist()) == filled


# Colours


def torchvisions_colours(image, brightness, contrast, saturation):
    image = V.adjust_brightness(image, brightness)
    return V.adjust_saturation(V.adjust_contrast(image, contrast), saturation)


@pytest.mark.parametrize("channels", [1, 3])
def test_each_images_colours_change_as_torchvision_changes_them(channels):
    images = random_images(20, channels, 6, 5).float() / 255
    factors = torch.rand(3, 20, generator=torch.Generator().manual_seed(1)) * 2
    factors[:, 0] = 1
    changed = adjust_colours(images, *factors)
    expected = [torchvisions_colours(image, *each) for image, each in zip(images, factors.T.tolist(), strict=True)]
    torch.testing.assert_close(changed, torch.stack(expected), rtol=0, atol=2e-6)
    torch.testing.assert_close(changed[0], images[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_of_bytes_are_those_of_floats_rounded_once(channels):
    images = random_images(20, channels, 6, 5)
    factors = torch.rand(3, 20, generator=torch.Generator().manual_seed(2)) * 2
    changed = adjust_colours(images, *factors)
    exact = adjust_colours(images.double() / 255, *factors.double()) * 255
    assert changed.dtype == torch.uint8
    assert (changed - exact).abs().max() <= 0.501


def test_extreme_factors_give_black_grey_mean_and_colourless_pictures():
    images = random_images(1, 3, 4, 4).float() / 255
    one, none = torch.ones(1), torch.zeros(1)
    grey = V.rgb_to_grayscale(images[0])
    assert (adjust_colours(images, none, one, one) == 0).all()
    torch.testing.assert_close(adjust_colours(images, one, none, one)[0], grey.mean().expand(3, 4, 4))
    torch.testing.assert_close(adjust_colours(images, one, one, none)[0], grey.expand(3, 4, 4))


@pytest.mark.parametrize(("strength", "low", "high"), [(0.4, 0.6, 1.4), (1.0, 0.0, 2.0), (1.5, 0.0, 2.5)])
def test_factors_are_drawn_for_each_image_uniformly_around_one(strength, low, high, monkeypatch):
    drawn = []
    monkeypatch.setattr(augmentation, "adjust_colours", lambda images, *factors: drawn.extend(factors))
    torch.manual_seed(0)
    random_jitter(random_images(4000, 3, 1, 1), strength)
    for factors in drawn:
        assert factors.min() >= low
        assert factors.max() <= high
        assert len(factors.unique()) > 3900
        assert factors.mean().item() == pytest.approx((low + high) / 2, abs=0.05)
        assert factors.var().item() == pytest.approx((high - low) ** 2 / 12, rel=0.1)
    correlation = torch.corrcoef(torch.stack(drawn))
    assert (correlation - torch.eye(3)).abs().max() < 0.06


def test_colours_of_two_channels_are_refused():
    with pytest.raises(ValueError, match="2 channels"):
        random_jitter(random_images(2, 2, 4, 4), 0.5)


# Mixtures. Every image has a class of its own, so that the labels say which images it is made of.


def test_mixed_images_are_the_sum_of_the_images_in_the_shares_that_the_labels_say():
    images, labels = random_images(12, 3, 4, 5).double() / 255, torch.randperm(12)
    mixed, targets = mixup(images, labels, 1.0, 12)
    shares = targets[:, labels]  # of image j in mixture i
    assert targets.dtype == torch.float32
    torch.testing.assert_close(mixed, torch.einsum("ij,jchw->ichw", shares.double(), images))
    torch.testing.assert_close(targets.sum(1), torch.ones(12))
    assert ((targets > 0).sum(1) == 2).all()
    assert (targets.gather(1, labels[:, None]) > 0).all()
    assert len(targets.gather(1, labels[:, None]).unique()) == 12  # a share of its own for each


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_of_mixup_are_distributed_as_beta(alpha):
    torch.manual_seed(0)
    labels = torch.arange(2).repeat(2000)
    _, targets = mixup(torch.zeros(4000, 1, 1, 1), labels, alpha, 2)
    share = targets.gather(1, labels[:, None])
    assert share.mean().item() == pytest.approx(0.5, abs=0.03)
    assert share.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.08)  # variance of Beta(a, a)


@pytest.mark.parametrize("alpha", [1e-3, 0.01, 100.0])
def test_extreme_shares_are_finite(alpha):
    images, targets = mixup(torch.rand(500, 1, 2, 2), torch.zeros(500, dtype=torch.int64), alpha, 3)
    assert images.isfinite().all()
    torch.testing.assert_close(targets[:, 0], torch.ones(500))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_pasted_boxes_take_the_share_of_the_label_that_their_pixels_take_of_the_image(dtype):
    torch.manual_seed(0)
    values, labels = torch.arange(10, 22), torch.randperm(12)
    images = values.to(dtype)[:, None, None, None].expand(12, 3, 16, 20)
    shares = []
    for _ in range(40):
        pasted, targets = cutmix(images, labels, 1.0, 12)
        assert pasted.dtype == dtype
        pixels = torch.stack([(pasted == value).float().mean((1, 2, 3)) for value in values], dim=1)
        torch.testing.assert_close(targets[:, labels], pixels)
        torch.testing.assert_close(targets.sum(1), torch.ones(12))
        own = (pasted == images)[:, 0]
        for kept in own.numpy():
            rows, columns = np.nonzero(~kept)
            box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1) if len(rows) else 0
            assert box == len(rows)  # what is pasted is a rectangle
        shares.append(targets[0, labels[0]].item())
    assert len(set(shares)) > 10
    assert min(shares) < 0.5
    assert max(shares) > 0.9


def test_mixtures_of_one_image_are_that_image():
    images, labels = random_images(1, 3, 4, 4), torch.tensor([2])
    for mixed, targets in (mixup(images.float(), labels, 1.0, 3), cutmix(images, labels, 1.0, 3)):
        torch.testing.assert_close(mixed.float(), images.float())
        torch.testing.assert_close(targets, torch.tensor([[0.0, 0.0, 1.0]]))


# All of it


def fill_of(images):
    return torch.full((images.shape[1],), 100, dtype=torch.uint8)


AUGMENTATIONS = {
    "flip": random_flip,
    "translate": lambda images: random_translate(images, 2),
    "jitter": lambda images: random_jitter(images, 0.5),
    "cutout": lambda images: random_cutout(images, 3, fill_of(images)),
    "mixup": lambda images: mixup(images.float(), torch.arange(len(images)), 1.0, 64)[0],
    "cutmix": lambda images: cutmix(images, torch.arange(len(images)), 1.0, 64)[0],
}
augmentations = pytest.mark.parametrize("augment", AUGMENTATIONS.values(), ids=AUGMENTATIONS)


@augmentations
def test_same_seed_repeats_the_augmentation_and_the_next_batch_differs(augment):
    images = random_images(32, 1, 6, 6)
    torch.manual_seed(5)
    first, second = augment(images), augment(images)
    torch.manual_seed(5)
    assert torch.equal(augment(images), first)
    assert not torch.equal(first, second)


@augmentations
def test_augmentation_leaves_its_input_alone(augment):
    images = random_images(8, 3, 6, 6)
    before = images.clone()
    augment(images)
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", ["flip", "translate", "jitter", "cutout"])
def test_augmentation_keeps_bytes_and_takes_an_empty_batch(name):
    images = random_images(8, 3, 6, 6)
    assert AUGMENTATIONS[name](images).dtype == torch.uint8
    assert AUGMENTATIONS[name](images[:0]).shape == (0, 3, 6, 6)


def test_without_augmentation_images_become_floats_and_labels_stay():
    images, labels = random_images(4, 3, 5, 5), torch.tensor([0, 1, 2, 0])
    result, targets = BatchAugmentation()(images, labels, 3, fill_of(images))
    np.testing.assert_allclose(result.numpy(), images.numpy() / 255.0, rtol=1e-6)
    assert torch.equal(targets, labels)


def test_mixup_and_cutmix_take_turns_by_a_coin():
    images, labels = random_images(6, 1, 4, 4), torch.arange(6)
    augment = BatchAugmentation(mixup=1.0, cutmix=1.0)
    torch.manual_seed(0)
    pasted = 0
    for _ in range(100):
        result, targets = augment(images, labels, 6, fill_of(images))
        assert targets.shape == (6, 6)
        whole = (result * 255 - (result * 255).round()).abs().max() < 1e-4
        pasted += int(whole)  # CutMix leaves pixels as they were, mixup gives others
    assert 30 <= pasted <= 70  # expected 50, deviation 5


@pytest.mark.parametrize("name", ["translate", "jitter", "cutout", "mixup", "cutmix"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_impossible_strength_is_a_clear_error(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must be at least 0"):
        BatchAugmentation(**{name: value})


class Pictures(InMemoryDataModule):
    num_classes = 4
    class_names = list("abcd")

    def read(self, train):
        return random_images(40, 3, 6, 6), torch.arange(40) % 4


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.batches = {"fit": [], "validate": [], "test": []}

    def training_step(self, batch, batch_idx):
        self.batches["fit"].append(batch)
        return self.layer(batch[0].mean()[None]).sum()

    def validation_step(self, batch, batch_idx):
        self.batches["validate"].append(batch)

    def test_step(self, batch, batch_idx):
        self.batches["test"].append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(**augmentations):
    data, model = Pictures(16, 8, 8, 0, **augmentations), Recorder()
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **silent)
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    return data, model.batches


def is_subset(images, of):
    known = {image.tobytes() for image in of.numpy()}
    return {image.tobytes() for image in (images * 255).round().to(torch.uint8).numpy()} <= known


EVERYTHING = {"translate": 2, "flip": True, "cutout": 3, "mixup": 1.0, "cutmix": 1.0, "jitter": 0.5}


@pytest.mark.parametrize("name", EVERYTHING)
def test_training_is_augmented_and_evaluation_is_not(name):
    data, batches = run(**{name: EVERYTHING[name]})
    images, labels = batches["fit"][0]
    assert images.dtype == torch.float32
    assert 0 <= images.min() <= images.max() <= 1
    assert not is_subset(images, data.train_set[0])
    assert labels.shape == ((16, 4) if name in ("mixup", "cutmix") else (16,))
    assert labels.dtype == (torch.float32 if name in ("mixup", "cutmix") else torch.int64)
    for stage, held in (("validate", data.val_set), ("test", data.test_set)):
        seen = [torch.cat(parts) for parts in zip(*batches[stage], strict=True)]
        assert is_subset(seen[0], held[0])
        assert seen[1].dtype == torch.int64


def test_without_augmentation_training_sees_the_pictures_unchanged():
    data, batches = run()
    assert all(is_subset(images, data.train_set[0]) for images, _ in batches["fit"])


def test_cutout_fills_with_the_mean_of_the_training_images():
    data, batches = run(cutout=99)
    mean = data.train_set[0].double().mean((0, 2, 3))
    for images, _ in batches["fit"]:
        assert ((images * 255).double() - mean[:, None, None]).abs().max() <= 0.501
