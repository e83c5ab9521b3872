"""Decoding of odd files, random crops, and the crop of evaluation."""

import io
import pathlib
import struct
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from input_pipeline import image
from input_pipeline.errors import BadRecordError
from input_pipeline.prepare import shards
from tests.input_pipeline.conftest import encoded, picture, rotated

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
    pytest.param(b"not an image", "is no JPEG, PNG, GIF, BMP or WebP", id="text"),
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


@pytest.mark.parametrize(
  "error", [MemoryError(), OSError("out of memory error when reading image file")]
)
def test_a_host_without_memory_is_no_fault_of_an_image(monkeypatch, error):
  """Else its neighbour would take its place, and a batch would depend on the host."""

  def full(*unused):
    raise error

  file = io.BytesIO()
  Image.new("L", (8, 8)).save(file, "PNG")
  monkeypatch.setattr(Image.Image, "convert", full)
  with pytest.raises(MemoryError):
    image.decode(file.getvalue())


def test_an_enormous_image_is_refused_before_it_fills_the_memory(monkeypatch):
  monkeypatch.setattr(image, "MAX_PIXELS", 40 * 50 - 1)
  for kind in ("JPEG", "PNG"):
    with pytest.raises(BadRecordError, match="50x40 pixels"):
      image.decode(encoded(picture(0), kind))


def _claiming(data: bytes, height: int, width: int) -> bytes:
  """Return a baseline JPEG with another size in its header."""
  at = data.index(b"\xff\xc0") + 5
  return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_that_claims_more_pixels_than_it_can_hold_is_refused(mode):
  data = encoded(picture(0), mode=mode)
  with pytest.raises(BadRecordError, match=r"9000x8000 pixels are more than a JPEG of .* can hold"):
    image.decode(_claiming(data, 8000, 9000))
  with pytest.raises(BadRecordError, match=r"65535x65535 pixels|4294836225 pixels"):
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
  exif = (
    b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12"  # five entries, and the end of the first is missing
  )
  odd = encoded(picture(0), mode="CMYK", exif=exif)
  with pytest.warns(UserWarning, match="Corrupt EXIF data"):
    _with_pillow(odd)
  program = "import sys; from input_pipeline import image; image.decode(sys.stdin.buffer.read())"
  done = subprocess.run([sys.executable, "-c", program], input=odd, capture_output=True, check=True)
  assert done.stderr == b""


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(
  "shape", [(1, 1), (1, 300), (300, 1), (3, 2), (500, 375), (224, 224), (1, 65500)]
)
def test_any_shape_gives_a_square(shape, kind):
  data = encoded(picture(0, *shape), kind)
  assert image.decode(data).shape == (*shape, 3)
  for seed in range(5):
    view = image.train_view(data, np.random.default_rng(seed), 32, _AREA, _ASPECT, flip=True)
    assert view.shape == (32, 32, 3)
    assert view.dtype == np.uint8
  assert image.eval_view(data, 40, 32).shape == (32, 32, 3)
  assert image.eval_view(data, 32, 32).shape == (32, 32, 3)


def test_a_box_that_ends_at_the_edge_is_not_rounded_beyond_it():
  # 225 / 224 * 224 is a little more than 225.
  assert image.eval_view(encoded(picture(0, 225, 225)), 224, 224).shape == (224, 224, 3)


@pytest.mark.parametrize("kind", ["plain", "progressive", "grey", "cmyk", "png"])
@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_a_reduced_decode_is_the_mean_of_blocks(kind, reduction):
  rgb = image.decode(_ODD[kind], reduction)
  height, width = -(-40 // reduction), -(-50 // reduction)
  assert rgb.shape == (height, width, 3)
  means = Image.fromarray(image.decode(_ODD[kind])).reduce(reduction)
  inner = slice(0, 40 // reduction), slice(0, 50 // reduction)  # whole blocks
  assert np.abs(rgb.astype(int) - np.asarray(means))[inner].mean() < 3


def test_a_view_is_written_where_it_is_asked_for():
  for flip_seed in range(4):
    batch = np.full((3, 32, 32, 3), 7, np.uint8)
    arguments = (_ODD["plain"], np.random.default_rng(flip_seed), 32, _AREA, _ASPECT, True)
    assert np.shares_memory(image.train_view(*arguments, out=batch[1]), batch)
    arguments = (_ODD["plain"], np.random.default_rng(flip_seed), 32, _AREA, _ASPECT, True)
    np.testing.assert_array_equal(batch[1], image.train_view(*arguments))
    assert (batch[0] == 7).all() and (batch[2] == 7).all()


def test_random_boxes_have_the_shares_and_shapes_asked_for():
  shares, ratios = [], []
  rng = np.random.default_rng(0)
  for _ in range(2000):
    top, left, height, width = image.draw_box(200, 200, rng, _AREA, _ASPECT)
    assert 0 <= top <= 200 - height
    assert 0 <= left <= 200 - width
    shares.append(height * width / 200**2)
    ratios.append(width / height)
  assert min(shares) > 0.07
  assert 0.07 < np.quantile(shares, 0.01) < 0.13
  assert 0.90 < max(shares) <= 1.01
  # Not quite the middle of 0.08..1: large boxes of extreme shapes do not fit and are drawn again.
  assert 0.45 < np.mean(shares) < 0.55
  assert 0.74 < min(ratios) < 0.77
  assert 1.30 < max(ratios) < 1.36
  assert abs(np.mean(np.log(ratios))) < 0.02


@pytest.mark.parametrize("reduced", [False, True])
def test_the_view_is_the_box_that_was_drawn(reduced):
  # The channels are ramps, so that a view tells its own box.
  y, x = np.mgrid[0:250, 0:250].astype(np.uint8)
  data = encoded(np.stack([y, x, x], axis=2), "JPEG" if reduced else "PNG", quality=100)
  for seed in range(30):
    box = image.draw_box(250, 250, np.random.default_rng(seed), (0.4, 1.0), _ASPECT)
    view = image.train_view(data, np.random.default_rng(seed), 50, (0.4, 1.0), _ASPECT, False)
    assert (image._reduction(min(box[2:]), 50) > 1) == (min(box[2:]) >= 100)
    # Pixel i of 50 lies at (i + 1/2) / 50 of the box; the outer ones may lack a neighbour.
    at = (np.array([10, 40]) + 0.5) / 50
    np.testing.assert_allclose(view[[10, 40], 25, 0], box[0] + at * box[2] - 0.5, atol=4)
    np.testing.assert_allclose(view[25, [10, 40], 1], box[1] + at * box[3] - 0.5, atol=4)


def test_a_fixed_box_is_the_whole_image():
  rgb = picture(3, 32, 32)
  np.testing.assert_array_equal(_view(encoded(rgb, "PNG")), rgb)


def _view(data, seed=0, size=32, flip=False):
  """Return the view of a whole square image."""
  rng = np.random.default_rng(seed)
  return image.train_view(data, rng, size, (1.0, 1.0), (1.0, 1.0), flip)


def test_a_large_box_is_averaged_and_a_small_one_interpolated():
  noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
  means = noise.reshape(32, 3, 32, 3, 3).mean(axis=(1, 3))
  assert np.abs(_view(encoded(noise, "PNG")) - means).max() <= 1
  smooth = picture(3, 20, 20)
  larger = Image.fromarray(smooth).resize((64, 64), Image.Resampling.BILINEAR)
  found = _view(encoded(smooth, "PNG"), size=64)
  assert np.abs(found.astype(int) - np.asarray(larger)).max() <= 1


@pytest.mark.parametrize("size", [31, 32, 33, 224])
def test_half_of_the_views_are_mirrored(size):
  rgb = picture(3, size, size)
  data = encoded(rgb, "PNG")
  views = [_view(data, seed=i, size=size, flip=True) for i in range(200)]
  mirrored = sum(np.array_equal(view, rgb[:, ::-1]) for view in views)
  assert mirrored + sum(np.array_equal(view, rgb) for view in views) == 200
  assert 75 < mirrored < 125
  np.testing.assert_array_equal(_view(data, size=size), rgb)


def _eval_reference(rgb):
  """Return int [224, 224, 3]: shorter side resized to 256, centre cut out, all by Pillow."""
  height, width = rgb.shape[:2]
  size = (256, int(256 * height / width)) if width <= height else (int(256 * width / height), 256)
  whole = np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BILINEAR))
  top, left = round((size[1] - 224) / 2), round((size[0] - 224) / 2)
  return whole[top : top + 224, left : left + 224].astype(int)


def _train_reference(rgb, seed):
  """Return int [224, 224, 3]: the same box and flip as of a view, antialiased by Pillow."""
  rng = np.random.default_rng(seed)
  top, left, height, width = image.draw_box(*rgb.shape[:2], rng, _AREA, _ASPECT)
  box = Image.fromarray(rgb[top : top + height, left : left + width])
  square = np.asarray(box.resize((224, 224), Image.Resampling.BILINEAR)).astype(int)
  return square[:, ::-1] if rng.random() < 0.5 else square


def _differences(data, seed):
  """Return the mean absolute differences of a training and an evaluated view to the references."""
  rgb = _with_pillow(data)
  view = image.train_view(data, np.random.default_rng(seed), 224, _AREA, _ASPECT, True)
  return (
    np.abs(view - _train_reference(rgb, seed)).mean(),
    np.abs(image.eval_view(data, 256, 224) - _eval_reference(rgb)).mean(),
  )


def _photograph(height, width):
  """Return uint8 [height, width, 3] with detail of all sizes, as photographs have it."""
  rng = np.random.default_rng(0)
  layers = [
    np.asarray(
      Image.fromarray(rng.integers(0, 256, (n, n, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
      ),
      np.float32,
    )
    / octave
    for octave, n in enumerate((4, 8, 16, 32, 64, 128), 1)
  ]
  return (sum(layers) / sum(1 / i for i in range(1, 7))).astype(np.uint8)


_SIZES = {
  "56 px": encoded(_photograph(56, 56)),
  "small and wide": encoded(_photograph(60, 500)),
  "as most of ImageNet": encoded(_photograph(375, 500)),
  "2400 px": encoded(_photograph(2400, 2400)),
  "2400 px progressive": encoded(_photograph(2400, 1800), progressive=True),
  "2400 px grey": encoded(_photograph(2400, 1800), mode="L"),
  "2400 px CMYK": encoded(_photograph(1800, 2400), mode="CMYK"),
  "1600 px PNG": encoded(_photograph(1200, 1600), "PNG", compress_level=1),
}


@pytest.mark.parametrize("name", _SIZES)
def test_views_of_any_size_are_what_antialiased_ones_would_be(name):
  train, evaluated = np.array([_differences(_SIZES[name], seed) for seed in range(3)]).T
  assert train.max() < 2.5
  assert evaluated.max() < 1.5


@pytest.mark.parametrize("shape", [(375, 500), (500, 375), (256, 256), (60, 91), (301, 1000)])
def test_the_crop_of_evaluation_is_resize_then_centre_crop(shape):
  rgb = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
  found = image.eval_view(encoded(rgb, "PNG"), 256, 224)
  assert np.abs(found - _eval_reference(rgb)).max() <= 1


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


def test_views_of_the_real_originals_are_what_antialiased_ones_would_be(originals: pathlib.Path):
  files = sorted(originals.glob("*/*.JPEG"))[::4]
  found = np.array([_differences(f.read_bytes(), seed) for seed, f in enumerate(files)])
  train, evaluated = found.mean(axis=0)
  assert train < 2
  assert evaluated < 0.1
  assert found[:, 1].max() < 1.5


def test_padded_crops_are_those_of_the_padded_image():
  rgb = picture(5, 32, 32)
  margin = np.pad(rgb, ((4, 4), (4, 4), (0, 0)))
  options = {"crop": "padded", "padding": 4}
  found, out = set(), np.full((32, 32, 3), 9, np.uint8)
  for seed in range(400):
    rng = np.random.default_rng(seed)
    view = image.train_view(encoded(rgb, "PNG"), rng, 32, _AREA, _ASPECT, False, out, **options)
    assert view is out
    places = [
      (y, x)
      for y in range(9)
      for x in range(9)
      if np.array_equal(margin[y : y + 32, x : x + 32], view)
    ]
    assert len(places) == 1
    found.update(places)
  assert len(found) > 70  # of 81
  mirrored = [
    image.train_view(
      encoded(rgb, "PNG"),
      np.random.default_rng(s),
      32,
      _AREA,
      _ASPECT,
      True,
      crop="padded",
      padding=0,
    )
    for s in range(40)
  ]
  same = sum(np.array_equal(view, rgb) for view in mirrored)
  assert same + sum(np.array_equal(view, rgb[:, ::-1]) for view in mirrored) == 40
  assert 10 <= same <= 30


def test_without_a_crop_the_whole_image_is_taken():
  rgb = picture(6, 32, 32)
  rng = np.random.default_rng(0)
  view = image.train_view(encoded(rgb, "PNG"), rng, 32, _AREA, _ASPECT, False, crop="none")
  np.testing.assert_array_equal(view, rgb)
  rgb = picture(7, 60, 90)
  view = image.train_view(
    encoded(rgb, "PNG"), rng, 40, _AREA, _ASPECT, False, crop="none", interpolation="bicubic"
  )
  expected = Image.fromarray(rgb).resize((40, 40), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(view, expected)


def test_interpolation_is_pillows_bicubic_or_drawn_for_each_image():
  rgb = picture(8, 90, 70)
  data = encoded(rgb, "PNG")
  kinds = {"bilinear": 0, "bicubic": 0}
  for seed in range(60):
    top, left, height, width = image.draw_box(90, 70, np.random.default_rng(seed), _AREA, _ASPECT)
    box = (left, top, left + width, top + height)
    expected = Image.fromarray(rgb).crop(box).resize((32, 32), Image.Resampling.BICUBIC)
    arguments = (32, _AREA, _ASPECT, False)
    views = {
      how: image.train_view(data, np.random.default_rng(seed), *arguments, interpolation=how)
      for how in ("bilinear", "bicubic", "random")
    }
    np.testing.assert_array_equal(views["bicubic"], expected)
    (how,) = (h for h in kinds if np.array_equal(views[h], views["random"]))
    kinds[how] += 1
  assert min(kinds.values()) >= 15


def test_evaluation_without_a_resize_is_exact_and_bicubic_is_pillows():
  rgb = picture(9, 32, 32)
  np.testing.assert_array_equal(image.eval_view(encoded(rgb, "PNG"), 0, 32), rgb)
  np.testing.assert_array_equal(image.eval_view(encoded(rgb, "PNG"), 0, 28), rgb[2:30, 2:30])
  rgb = picture(10, 100, 140)
  resized = Image.fromarray(rgb).resize((67, 48), Image.Resampling.BICUBIC)
  expected = np.asarray(resized).astype(int)[8:40, 18:50]
  found = image.eval_view(encoded(rgb, "PNG"), 48, 32, "bicubic")
  np.testing.assert_allclose(found.astype(int), expected, atol=1)


@pytest.mark.parametrize(
  "options", [{}, {"lossless": True}, {"save_all": True, "append_images": []}]
)
def test_webp_is_decoded_and_its_size_checked_before(options, monkeypatch):
  rgb = picture(3, 40, 56)
  data = encoded(rgb, "WEBP", **options)
  decoded = image.decode(data)
  assert decoded.shape == rgb.shape
  assert np.abs(decoded.astype(int) - rgb).mean() < (1 if "lossless" in options else 8)
  assert image._webp_size(data) == (40, 56)
  extended = Image.new("RGBA", (50, 30), (1, 2, 3, 4))
  file = io.BytesIO()
  extended.save(file, "WEBP", **options)
  assert file.getvalue()[12:16] in (b"VP8X", b"VP8L") and image._webp_size(file.getvalue()) == (
    30,
    50,
  )
  # A header that claims more is refused before anything is allocated for it.
  monkeypatch.setattr(image, "MAX_PIXELS", 40 * 56 - 1)
  monkeypatch.setattr(image.Image, "open", None)
  with pytest.raises(BadRecordError, match="56x40 pixels are more than 2239"):
    image.decode(data)
