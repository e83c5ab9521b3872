"""Decoding of odd files, random crops, and the crop of evaluation."""

import io
import pathlib
import struct
import subprocess
import sys

from PIL import Image
from input_pipeline import image
from input_pipeline import shards
from input_pipeline.errors import BadRecordError
import numpy as np
import pytest

from tests.input_pipeline.conftest import encoded
from tests.input_pipeline.conftest import picture
from tests.input_pipeline.conftest import rotated

_AREA = (0.08, 1.0)
_ASPECT = (3 / 4, 4 / 3)


def _with_pillow(data: bytes) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


_ODD = {
  "plain": encoded(picture(0)),
  "progressive": encoded(picture(0), progressive=True),
  "4:4:4": encoded(picture(0), subsampling=0),
  "grey": encoded(picture(0), mode="L"),
  "cmyk": encoded(picture(0), mode="CMYK"),
  "png": encoded(picture(0), "PNG"),
  "transparent png": encoded(picture(0), "PNG", "RGBA"),
  "palette png": encoded(picture(0), "PNG", "P"),
  "gif": encoded(picture(0), "GIF"),
  "exif rotation": rotated(picture(0)),
  "trailing junk": encoded(picture(0)) + b"junk" * 99,
}


@pytest.mark.parametrize("name", _ODD)
def test_odd_files_are_decoded_as_pillow_does(name):
  rgb = image.decode(_ODD[name])
  assert rgb.dtype == np.uint8
  assert rgb.shape == (40, 50, 3)  # not rotated
  # Two builds of libjpeg may differ in a bit or two.
  assert np.abs(rgb.astype(int) - _with_pillow(_ODD[name])).max() <= 4


def test_16_bits_are_scaled_and_not_clipped():
  file = io.BytesIO()
  Image.fromarray(np.full((5, 6), 0x8000, np.uint16)).save(file, "PNG")
  assert (image.decode(file.getvalue()) == 0x80).all()


@pytest.mark.parametrize(
  ("data", "says"),
  [
    pytest.param(b"", "zero bytes", id="empty"),
    pytest.param(b"not an image", "is no JPEG, PNG, GIF or BMP", id="text"),
    pytest.param(encoded(picture(0), "TIFF"), "is no JPEG", id="a format that is not read"),
    pytest.param(encoded(picture(0), "EPS"), "is no JPEG", id="a format that starts a program"),
    pytest.param(encoded(picture(0))[:-200], "truncated", id="the end is missing"),
    pytest.param(encoded(picture(0))[:100], "OSError|Error", id="only a header"),
    pytest.param(encoded(picture(0), "PNG")[:-200], "truncated", id="png without its end"),
  ],
)
def test_what_is_no_image_is_a_bad_record(data, says):
  with pytest.raises(BadRecordError, match=says):
    image.decode(data)


def test_an_enormous_image_is_refused_before_it_fills_the_memory(monkeypatch):
  monkeypatch.setattr(image, "MAX_PIXELS", 40 * 50 - 1)
  for kind in ("JPEG", "PNG"):
    with pytest.raises(BadRecordError, match="50x40 pixels"):
      image.decode(encoded(picture(0), kind))


def _claiming(data: bytes, height: int, width: int) -> bytes:
  """Returns a baseline JPEG with another size in its header."""
  at = data.index(b"\xff\xc0") + 5
  return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_that_claims_more_pixels_than_it_can_hold_is_refused(mode):
  data = encoded(picture(0), mode=mode)
  with pytest.raises(BadRecordError, match="9000x8000 pixels are more than a JPEG of .* can hold"):
    image.decode(_claiming(data, 8000, 9000))
  with pytest.raises(BadRecordError, match="65535x65535 pixels|4294836225 pixels"):
    image.decode(_claiming(data, 65535, 65535))


def test_the_smallest_jpeg_of_many_pixels_is_read():
  black = np.zeros((2000, 3000, 3), np.uint8)
  for options in ({"mode": "L"}, {"mode": "L", "progressive": True}, {"optimize": True}):
    assert image.decode(encoded(black, **options)).shape == (2000, 3000, 3)


def test_a_progressive_jpeg_of_endless_scans_is_refused():
  data = encoded(np.zeros((2500, 2500, 3), np.uint8), progressive=True)
  last = data[data.rindex(b"\xff\xda") : -2]
  assert image.decode(data).shape == (2500, 2500, 3)
  with pytest.raises(BadRecordError, match="has more than 100 scans"):
    image.decode(data[:-2] + last * 2000 + data[-2:])  # would take about 15 s


def test_what_is_said_of_a_bad_image_is_always_the_same():
  def said():
    with pytest.raises(BadRecordError) as e:
      image.decode(b"not an image")
    return str(e.value)

  assert said() == said()


def test_odd_metadata_make_no_noise():
  exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12"  # five entries, and the end of the first is missing
  odd = encoded(picture(0), mode="CMYK", exif=exif)
  with pytest.warns(UserWarning, match="Corrupt EXIF data"):
    _with_pillow(odd)
  program = "import sys; from input_pipeline import image; image.decode(sys.stdin.buffer.read())"
  done = subprocess.run([sys.executable, "-c", program], input=odd, capture_output=True, check=True)
  assert done.stderr == b""


@pytest.mark.parametrize(
  "shape", [(1, 1), (1, 300), (300, 1), (3, 2), (500, 375), (224, 224), (1, 65500)]
)
def test_any_shape_gives_a_square(shape):
  rgb = image.decode(encoded(picture(0, *shape)))
  assert rgb.shape == (*shape, 3)
  for seed in range(5):
    view = image.train_view(rgb, np.random.default_rng(seed), 32, _AREA, _ASPECT, flip=True)
    assert view.shape == (32, 32, 3)
    assert view.dtype == np.uint8
  assert image.eval_crop(rgb, 40, 32).shape == (32, 32, 3)
  assert image.eval_crop(rgb, 32, 32).shape == (32, 32, 3)


def test_a_box_that_ends_at_the_edge_is_not_rounded_beyond_it():
  # 225 / 224 * 224 is a little more than 225.
  assert image.eval_crop(picture(0, 225, 225), 224, 224).shape == (224, 224, 3)


def test_random_boxes_have_the_shares_and_shapes_asked_for():
  # The two channels are ramps, so a crop tells its own box.
  y, x = np.mgrid[0:200, 0:200].astype(np.uint8)
  rgb = np.stack([y, x, x], axis=2)
  shares, ratios = [], []
  rng = np.random.default_rng(0)
  for _ in range(2000):
    crop = image.random_resized_crop(rgb, rng, 50, _AREA, _ASPECT).astype(float)
    height = (crop[-1, 0, 0] - crop[0, 0, 0]) * 50 / 49
    width = (crop[0, -1, 1] - crop[0, 0, 1]) * 50 / 49
    shares.append(height * width / 200**2)
    ratios.append(width / height)
  assert min(shares) > 0.06
  assert 0.07 < np.quantile(shares, 0.01) < 0.13
  assert 0.90 < max(shares) <= 1.05
  # Not quite the middle of 0.08..1: large boxes of extreme shapes do not fit and are drawn again.
  assert 0.45 < np.mean(shares) < 0.55
  assert 0.7 < min(ratios) < 0.80
  assert 1.25 < max(ratios) < 1.45
  assert abs(np.mean(np.log(ratios))) < 0.02


def test_a_fixed_box_is_the_whole_image():
  rgb = picture(3, 32, 32)
  crop = image.random_resized_crop(rgb, np.random.default_rng(0), 32, (1.0, 1.0), (1.0, 1.0))
  np.testing.assert_array_equal(crop, rgb)


def test_a_large_box_is_averaged_and_a_small_one_interpolated():
  noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
  crop = image.random_resized_crop(noise, np.random.default_rng(0), 32, (1.0, 1.0), (1.0, 1.0))
  means = noise.reshape(32, 3, 32, 3, 3).mean(axis=(1, 3))
  assert np.abs(crop - means).max() <= 1
  smooth = picture(3, 20, 20)
  crop = image.random_resized_crop(smooth, np.random.default_rng(0), 64, (1.0, 1.0), (1.0, 1.0))
  larger = Image.fromarray(smooth).resize((64, 64), Image.Resampling.BILINEAR)
  assert np.abs(crop.astype(int) - np.asarray(larger)).max() <= 1


def test_half_of_the_views_are_mirrored():
  rgb = picture(3, 32, 32)
  views = [
    image.train_view(rgb, np.random.default_rng(i), 32, (1.0, 1.0), (1.0, 1.0), flip=True)
    for i in range(400)
  ]
  mirrored = sum(np.array_equal(view, rgb[:, ::-1]) for view in views)
  assert mirrored + sum(np.array_equal(view, rgb) for view in views) == 400
  assert 160 < mirrored < 240
  plain = image.train_view(rgb, np.random.default_rng(0), 32, (1.0, 1.0), (1.0, 1.0), flip=False)
  np.testing.assert_array_equal(plain, rgb)


@pytest.mark.parametrize("shape", [(375, 500), (500, 375), (256, 256), (60, 91), (301, 1000)])
def test_the_crop_of_evaluation_is_resize_then_centre_crop(shape):
  rgb = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
  height, width = shape
  size = (256, int(256 * height / width)) if width <= height else (int(256 * width / height), 256)
  whole = np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BILINEAR))
  top, left = round((size[1] - 224) / 2), round((size[0] - 224) / 2)
  expected = whole[top : top + 224, left : left + 224].astype(int)
  assert np.abs(image.eval_crop(rgb, 256, 224) - expected).max() <= 1


def test_the_real_originals_are_decoded_like_pillow_does(originals: pathlib.Path):
  files = sorted(originals.glob("*/*.JPEG"))
  assert len(files) >= 200
  found = []
  for file in files:
    data = file.read_bytes()
    rgb, kinds, _ = shards.inspect(data, file.name)
    found += kinds
    if file.stat().st_size < 60_000:
      difference = np.abs(rgb.astype(int) - _with_pillow(data))
      assert difference.mean() < 0.5, file
  assert found.count("greyscale") == 23
  assert found.count("exif_rotated") == 1
  assert len(found) == 24
