import numpy as np
import pytest
import torch

from datamodules.augmentation import random_flip, random_translate

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


@pytest.mark.parametrize("augment", [random_flip, lambda images: random_translate(images, 2)])
def test_same_seed_repeats_the_augmentation_and_the_next_batch_differs(augment):
    images = random_images(32, 1, 6, 6)
    torch.manual_seed(5)
    first, second = augment(images), augment(images)
    torch.manual_seed(5)
    assert torch.equal(augment(images), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("augment", [random_flip, lambda images: random_translate(images, 2)])
def test_augmentation_leaves_its_input_alone_and_takes_an_empty_batch(augment):
    images = random_images(8, 1, 6, 6)
    before = images.clone()
    augment(images)
    assert torch.equal(images, before)
    assert augment(images[:0]).shape == (0, 1, 6, 6)
