import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy.stats import ks_2samp
from torchvision.transforms import v2

from datamodules import pictures
from datamodules.pictures import Picture, centre, random_box, read_image, resize, resize_short_side

BOTH_DECODERS = pytest.mark.parametrize("decoder", ["simplejpeg", "Pillow"])


def texture(height, width, channels=3, seed=0):
    """Smooth random pixels, uint8 (height, width, channels), or (height, width) for one channel."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.array(image)
    return pixels[..., 0] if channels == 1 else pixels[..., :channels]


def jpeg(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def array(path):
    return read_image(path).permute(1, 2, 0).numpy()


@pytest.fixture
def _decoder(decoder, monkeypatch):
    if decoder == "Pillow":
        monkeypatch.setattr(pictures, "simplejpeg", None)
    else:
        pytest.importorskip("simplejpeg")


# Formats


@BOTH_DECODERS
@pytest.mark.usefixtures("_decoder")
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "YCbCr"])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_have_the_pixels_that_pillow_gives(tmp_path, mode, subsampling, progressive):
    data = jpeg(Image.fromarray(texture(37, 51)).convert(mode), subsampling=subsampling, progressive=progressive)
    (tmp_path / "a.jpg").write_bytes(data)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    image = read_image(tmp_path / "a.jpg")
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    assert image.shape == (3, 37, 51)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


@BOTH_DECODERS
@pytest.mark.usefixtures("_decoder")
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (67, 93), (8, 70)])
def test_shrunk_jpegs_are_alike_with_both_decoders(tmp_path, mode, shrink, height, width):
    data = jpeg(Image.fromarray(texture(height, width)).convert(mode))
    (tmp_path / "a.jpg").write_bytes(data)
    image = Image.open(io.BytesIO(data))
    image.draft(image.mode, (width // shrink, height // shrink))
    picture = Picture(tmp_path / "a.jpg")
    pixels = picture.pixels(shrink)
    assert (picture.height, picture.width) == (height, width)
    assert np.array_equal(pixels, np.asarray(image.convert("RGB")))
    assert pixels.shape == (-(-height // shrink), -(-width // shrink), 3)


@BOTH_DECODERS
@pytest.mark.usefixtures("_decoder")
def test_a_jpeg_smaller_than_the_fraction_is_readable(tmp_path, recwarn):
    (tmp_path / "a.jpg").write_bytes(jpeg(Image.new("RGB", (1, 3), (9, 9, 9))))
    assert Picture(tmp_path / "a.jpg").pixels(8).size
    assert read_image(tmp_path / "a.jpg").shape == (3, 3, 1)
    assert not recwarn.list


@pytest.mark.parametrize("ending", ["png", "bmp", "webp", "tiff", "ppm", "gif"])
def test_lossless_formats_keep_their_pixels(tmp_path, ending):
    pixels = texture(9, 7) // 128 * 255  # eight colours, so that a GIF's palette holds them
    Image.fromarray(pixels).save(tmp_path / f"a.{ending}", **({"lossless": True} if ending == "webp" else {}))
    assert np.array_equal(array(tmp_path / f"a.{ending}"), pixels)


def test_grey_and_palette_and_bilevel_become_rgb(tmp_path):
    grey = texture(9, 7, 1)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(array(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, 2))
    palette = Image.fromarray(texture(9, 7)).quantize(16)
    palette.save(tmp_path / "palette.png")
    assert np.array_equal(array(tmp_path / "palette.png"), np.asarray(palette.convert("RGB")))
    Image.fromarray(grey > 99).save(tmp_path / "two.png")
    assert np.array_equal(array(tmp_path / "two.png"), np.repeat(np.where(grey > 99, 255, 0)[..., None], 3, 2))


def test_transparency_is_dropped_without_a_warning(tmp_path, recwarn):
    pixels = texture(9, 7)
    alpha = np.full((9, 7, 1), 30, dtype=np.uint8)
    Image.fromarray(np.concatenate([pixels, alpha], 2)).save(tmp_path / "rgba.png")
    assert np.array_equal(array(tmp_path / "rgba.png"), pixels)
    Image.fromarray(np.concatenate([pixels[..., :1], alpha], 2)).save(tmp_path / "la.png")
    assert np.array_equal(array(tmp_path / "la.png"), np.repeat(pixels[..., :1], 3, 2))
    palette = Image.fromarray(pixels // 128 * 255).quantize(8)
    palette.save(tmp_path / "palette.png", transparency=bytes([0, 128, 255]))
    assert np.array_equal(array(tmp_path / "palette.png"), np.asarray(palette.convert("RGB")))
    assert not recwarn.list


def test_sixteen_bits_keep_the_upper_eight(tmp_path):
    values = np.array([[0, 255, 256, 511], [512, 32768, 65279, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    expected = [[0, 0, 1, 1], [2, 128, 254, 255]]
    assert read_image(tmp_path / "a.png").tolist() == [expected] * 3
    Image.fromarray(values).save(tmp_path / "a.tiff")
    assert read_image(tmp_path / "a.tiff").tolist() == [expected] * 3


def test_an_animation_shows_its_first_frame(tmp_path):
    frames = [Image.fromarray(np.full((4, 5, 3), value, dtype=np.uint8)) for value in (10, 200, 90)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert np.array_equal(array(tmp_path / "a.gif"), np.full((4, 5, 3), 10))


def test_the_pictures_of_a_telephone_in_mpo_are_jpegs(tmp_path):
    frames = [Image.fromarray(texture(20, 30, seed=seed)) for seed in (0, 1)]
    frames[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=frames[1:])
    expected = np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB"))
    assert Image.open(tmp_path / "a.jpg").format == "MPO"
    assert np.array_equal(array(tmp_path / "a.jpg"), expected)


def test_one_pixel(tmp_path):
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").tolist() == [[[1]], [[2]], [[3]]]


# Orientation

UPRIGHT = np.array([[[10] * 3, [20] * 3, [30] * 3], [[40] * 3, [50] * 3, [60] * 3]], dtype=np.uint8)  # 2 x 3
STORED = {  # what a camera held in each way stores of it, by the EXIF standard
    1: [[10, 20, 30], [40, 50, 60]],
    2: [[30, 20, 10], [60, 50, 40]],
    3: [[60, 50, 40], [30, 20, 10]],
    4: [[40, 50, 60], [10, 20, 30]],
    5: [[10, 40], [20, 50], [30, 60]],
    6: [[30, 60], [20, 50], [10, 40]],
    7: [[60, 30], [50, 20], [40, 10]],
    8: [[40, 10], [50, 20], [60, 30]],
}


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("ending", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_a_picture_is_turned_upright_by_its_exif_orientation(tmp_path, orientation, ending):
    stored = np.repeat(np.array(STORED[orientation], dtype=np.uint8)[..., None], 3, 2)
    options = {"lossless": True} if ending == "webp" else {}
    Image.fromarray(stored).save(tmp_path / f"a.{ending}", exif=turned(orientation), **options)
    assert np.array_equal(array(tmp_path / f"a.{ending}"), UPRIGHT)
    picture = Picture(tmp_path / f"a.{ending}")
    assert (picture.height, picture.width) == (2, 3)


@BOTH_DECODERS
@pytest.mark.usefixtures("_decoder")
@pytest.mark.parametrize("shrink", [1, 2])
@pytest.mark.parametrize("orientation", STORED)
def test_a_jpeg_is_turned_as_pillow_turns_it(tmp_path, orientation, shrink):
    data = jpeg(Image.fromarray(texture(24, 40)), exif=turned(orientation))
    (tmp_path / "a.jpg").write_bytes(data)
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (40 // shrink, 24 // shrink))
    picture = Picture(tmp_path / "a.jpg")
    assert np.array_equal(picture.pixels(shrink), np.asarray(ImageOps.exif_transpose(image)))
    assert (picture.height, picture.width) == ((24, 40) if orientation < 5 else (40, 24))


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_orientation_that_means_nothing_is_upright(tmp_path, orientation):
    Image.fromarray(UPRIGHT).save(tmp_path / "a.png", exif=turned(orientation))
    assert np.array_equal(array(tmp_path / "a.png"), UPRIGHT)


# What cannot be read


def png_bytes(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def bomb():
    """A PNG that says it has 30,000 x 30,000 pixels."""
    data = bytearray(png_bytes(texture(8, 8)))
    data[16:24] = struct.pack(">II", 30_000, 30_000)
    import zlib

    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def float_tiff():
    buffer = io.BytesIO()
    Image.fromarray(np.ones((3, 3), dtype=np.float32)).save(buffer, "TIFF")
    return buffer.getvalue()


BAD = {
    "empty.jpg": (lambda: b"", r"is empty \(0 bytes\)"),
    "truncated.jpg": (lambda: jpeg(Image.fromarray(texture(64, 64)))[:900], "truncated"),
    "header.jpg": (lambda: jpeg(Image.fromarray(texture(64, 64)))[:20], "cannot be read as a picture"),
    "page.jpg": (lambda: b"<!DOCTYPE html><p>404", "begins with b'<!DOCTYPE html><'"),
    "truncated.png": (lambda: png_bytes(texture(64, 64))[:2000], "cannot be read as a picture"),
    "flipped.png": (lambda: png_bytes(texture(64, 64)).replace(b"IDAT", b"IDAQ"), "cannot be read as a picture"),
    "truncated.gif": (lambda: b"GIF89a\x05", "cannot be read as a picture"),
    "bomb.png": (bomb, "exceeds limit"),
    "float.tiff": (float_tiff, "floating-point"),
}


@BOTH_DECODERS
@pytest.mark.usefixtures("_decoder")
@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_named_with_the_reason(tmp_path, name):
    content, reason = BAD[name]
    (tmp_path / name).write_bytes(content())
    with pytest.raises(ValueError, match=rf"{name}.*{reason}"):
        read_image(tmp_path / name)


def test_a_missing_file_is_no_corrupt_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
        read_image(tmp_path / "gone.jpg")


# Boxes and sizes


def boxes(height, width, count, least_area):
    ours = [random_box(np.random.default_rng([0, i]), height, width, least_area) for i in range(count)]
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(8, scale=(least_area, 1.0), antialias=True)
    image = torch.empty(1, height, width)
    theirs = [crop.make_params([image]) for _ in range(count)]
    return np.array(ours), np.array([[one[k] for k in ("top", "left", "height", "width")] for one in theirs])


@pytest.mark.parametrize(("height", "width", "least_area"), [(375, 500, 0.08), (500, 300, 0.5), (64, 64, 0.9)])
def test_random_boxes_are_distributed_as_torchvisions(height, width, least_area):
    ours, theirs = boxes(height, width, 3000, least_area)
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    assert ks_2samp(ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2]).pvalue > 1e-3
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    assert (ours >= [0, 0, 1, 1]).all()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3000), (3000, 1), (10, 100), (100, 10), (2, 3)])
def test_boxes_of_odd_pictures_lie_in_them(height, width):
    for seed in range(50):
        top, left, h, w = random_box(np.random.default_rng(seed), height, width, 0.08)
        assert 0 <= top < top + h <= height
        assert 0 <= left < left + w <= width
    ours, theirs = boxes(height, width, 1, 1.0)
    assert ours.tolist() == theirs.tolist() or height * width < 10


@pytest.mark.parametrize(
    ("height", "width"), [(375, 500), (500, 375), (300, 300), (10, 13), (257, 2000), (1, 1), (224, 225), (640, 480)]
)
def test_resize_and_centre_are_torchvisions_on_pillow_pictures_to_within_a_level(height, width):
    pixels = texture(height, width)
    usual = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])
    expected = np.asarray(usual(Image.fromarray(pixels))).astype(int)
    ours = centre(resize_short_side(pixels, 256), 224).permute(1, 2, 0).numpy().astype(int)
    assert ours.shape == (224, 224, 3)
    assert np.abs(ours - expected).max() <= 1


def test_views_of_turned_pictures_are_resized_alike():
    pixels = texture(30, 40)
    for view in (pixels[::-1], pixels[:, ::-1], pixels.transpose(1, 0, 2)[::-1, ::-1]):
        assert torch.equal(resize(view, 16, 16), resize(np.ascontiguousarray(view), 16, 16))


@pytest.mark.parametrize(("height", "width"), [(1, 60_000), (60_000, 1)])
def test_a_line_of_pixels_does_not_become_a_picture_of_gigabytes(height, width):
    image = resize_short_side(np.zeros((height, width, 3), dtype=np.uint8), 256)
    assert sorted(image.shape) == [3, 256, 16 * 256]
