"""Any picture is read upright: at its own size, or as torchvision's evaluation reads it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

from zoo.running.picture_files import read_picture, read_pixels, read_whole_picture


def noise(width, height, mode="RGB", seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height)).convert(mode)


def read_bytes(path, channels, size):
    """As uint8, which torchvision's resized pictures are."""
    return (read_picture(Path(path), channels, size) * 255).round().byte()


def most_levels_apart(one, other):
    """Torch resizes in whole grey levels, and rounds otherwise than Pillow."""
    return (one.int() - other.int()).abs().max()


@pytest.mark.parametrize(("width", "height"), [(300, 400), (640, 333), (100, 50), (224, 224), (61, 970)])
def test_large_inputs_are_resized_and_cropped_as_torchvision_evaluates(width, height):
    noise(width, height).save("picture.png")
    same = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])
    assert most_levels_apart(read_bytes("picture.png", 3, 224), same(Image.open("picture.png"))) <= 1


@pytest.mark.parametrize(("width", "height"), [(40, 60), (500, 32), (32, 32), (10, 10)])
def test_small_inputs_lose_nothing_but_the_longer_sides_ends(width, height):
    noise(width, height, "L").save("picture.png")
    same = v2.Compose([v2.Resize(32), v2.CenterCrop(32), v2.PILToTensor()])
    assert most_levels_apart(read_bytes("picture.png", 1, 32), same(Image.open("picture.png"))) <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright_whatever_the_camera_wrote(orientation):
    upright = noise(32, 32)
    # How the sensor stored it: the inverse of what the viewer must do.
    inverse = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    stored = upright if inverse is None else upright.transpose(Image.Transpose(inverse))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save("picture.png", exif=exif)
    assert ImageOps.exif_transpose(Image.open("picture.png")).tobytes() == upright.tobytes()
    expected = torch.from_numpy(np.array(upright)).permute(2, 0, 1)
    assert torch.equal(read_bytes("picture.png", 3, 32), expected)
    assert torch.equal((read_whole_picture(Path("picture.png")) * 255).round().byte(), expected)


@pytest.mark.parametrize(("width", "height"), [(640, 333), (31, 77), (1, 1)])
def test_a_whole_picture_has_its_own_size(width, height):
    picture = noise(width, height)
    picture.save("picture.png")
    found = read_whole_picture(Path("picture.png"))
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), np.asarray(picture, dtype=np.float32) / 255)


def test_of_what_is_transparent_the_colour_stays_and_of_sixteen_bits_the_upper_eight():
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save("clear.png")
    red = torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 32, 32)
    assert torch.equal(read_picture(Path("clear.png"), 3, 32), red)
    assert torch.equal(read_whole_picture(Path("clear.png")), red)
    assert torch.equal(read_pixels(Path("clear.png"), ground=255), torch.full((3, 32, 32), 255, dtype=torch.uint8))
    deep = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(deep).save("deep.png")
    found = read_picture(Path("deep.png"), 1, 32)[0]
    np.testing.assert_allclose(found.numpy(), (deep // 256) / 255, atol=1e-6)
    for channel in read_whole_picture(Path("deep.png")):
        np.testing.assert_allclose(channel.numpy(), (deep // 256) / 255, atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "name"), [("CMYK", "c.jpg"), ("P", "p.gif"), ("1", "b.png"), ("LA", "l.png"), ("L", "g.jpg")]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_gives_grey_or_rgb(mode, name, channels):
    noise(40, 50, mode).save(name)
    found = read_picture(Path(name), channels, 28)
    assert found.shape == (channels, 28, 28)
    assert found.dtype == torch.float32
    assert 0 <= found.min() < found.max() <= 1
    assert read_whole_picture(Path(name)).shape == (3, 50, 40)
