"""The pixels of each operation, against Pillow's, and what the laws refuse."""

import io
import math

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
import pytest

from input_pipeline.augment import pixels
from tests.input_pipeline.conftest import picture

_FILL = (124, 116, 104)


@pytest.fixture(scope="module")
def images(request):
  """Views of 224 px, of originals where they are, else of smooth pictures and noise; two of 32."""
  try:
    files = sorted(request.getfixturevalue("originals").rglob("*.JPEG"))[::50]
  except pytest.skip.Exception:
    files = []
  full = [Image.open(io.BytesIO(file.read_bytes())).convert("RGB") for file in files]
  if not full:
    noise = np.random.default_rng(0).integers(0, 256, (300, 260, 3), np.uint8)
    full = [Image.fromarray(rgb) for rgb in (picture(0, 300, 260), picture(1, 250, 400), noise)]
  views = [i.resize((224, 224), Image.Resampling.BICUBIC) for i in full]
  views += [i.resize((32, 32), Image.Resampling.BICUBIC) for i in full[:2]]
  views.append(full[0].resize((160, 96), Image.Resampling.BICUBIC))  # not a square
  flat = np.full((40, 40, 3), (7, 7, 200), np.uint8)
  flat[3, 4] = 9
  return [np.asarray(view) for view in views] + [flat]


def _lut(function):
  return lambda image: image.point([function(v) for v in range(256)] * 3)


def _transformed(matrix, how):
  resampling = Image.Resampling[how.upper()]
  return lambda image: image.transform(
    image.size, Image.Transform.AFFINE, matrix, resampling, fillcolor=_FILL
  )


def _turned(degrees, how):
  return lambda image: image.rotate(degrees, Image.Resampling[how.upper()], fillcolor=_FILL)


def _hue(turn):
  def turned(image):
    h, s, v = image.convert("HSV").split()
    h = Image.fromarray(np.asarray(h) + np.uint8(int(turn * 255) % 256))
    return Image.merge("HSV", (h, s, v)).convert("RGB")

  return turned


_CASES = [
  (pixels.invert, (), ImageOps.invert),
  (pixels.grayscale, (), lambda image: image.convert("L").convert("RGB")),
  (pixels.auto_contrast, (), ImageOps.autocontrast),
  (pixels.equalize, (), ImageOps.equalize),
  *((pixels.hue, (t,), _hue(t)) for t in (-0.3, 0.1)),
  *(
    (pixels.blur, (r,), lambda i, r=r: i.filter(ImageFilter.GaussianBlur(r)))
    for r in (0.11, 0.47, 0.83, 1.02, 1.37, 1.71, 1.99)
  ),
  *(
    (pixels.posterize, (b,), lambda i, b=b: ImageOps.posterize(i, b) if b else i.point(lambda v: 0))
    for b in (0, 1, 2, 4, 7, 8)
  ),
  *(
    (pixels.solarize, (t,), lambda i, t=t: ImageOps.solarize(i, t))
    for t in (0, 1, 76, 127.5, 128, 255, 256)
  ),
  *(
    (pixels.solarize_add, (a,), _lut(lambda v, a=a: min(255, v + a) if v < 128 else v))
    for a in (0, 33, 77, 110)
  ),
  *(
    (ours, (f,), lambda i, enhance=enhance, f=f: enhance(i).enhance(f))
    for ours, enhance in (
      (pixels.brightness, ImageEnhance.Brightness),
      (pixels.contrast, ImageEnhance.Contrast),
      (pixels.saturation, ImageEnhance.Color),
      (pixels.sharpness, ImageEnhance.Sharpness),
    )
    for f in (0.0, 0.01, 0.37, 1.0, 1.63, 1.99)
  ),
  *(
    (pixels.rotate, (d, how, _FILL), _turned(d, how))
    for d in (0.0, -21.0, 13.7, 90.0, -135.0, 180.0)
    for how in ("nearest", "bilinear", "bicubic")
  ),
  *(
    (ours, (v, how, _FILL), _transformed(matrix(v), how))
    for ours, matrix in (
      (pixels.shear_x, lambda v: (1, v, 0, 0, 1, 0)),
      (pixels.shear_y, lambda v: (1, 0, 0, v, 1, 0)),
      (pixels.translate_x, lambda v: (1, 0, v, 0, 1, 0)),
      (pixels.translate_y, lambda v: (1, 0, 0, 0, 1, v)),
    )
    for v in (0.0, -0.21, 0.99, 10.0, -33.7, 500.0)
    for how in ("nearest", "bilinear", "bicubic")
  ),
]


def _id(case):
  function, arguments, _ = case
  return " ".join([function.__name__, *(str(a) for a in arguments if a != _FILL)])


@pytest.mark.parametrize("case", _CASES, ids=_id)
def test_pixels_are_those_of_pillow_to_one_level(case, images):
  ours, arguments, reference = case
  for image in images:
    found = ours(image.copy(), *arguments)
    expected = np.asarray(reference(Image.fromarray(image)))
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found.astype(int), expected.astype(int), atol=1, rtol=0)


def test_erase_fills_the_box_alone():
  image = picture(3)
  erased = pixels.erase(image.copy(), 5, 7, 10, 20, _FILL)
  inside = np.zeros(image.shape[:2], bool)
  inside[5:15, 7:27] = True
  assert (erased[inside] == _FILL).all()
  np.testing.assert_array_equal(erased[~inside], image[~inside])
  assert math.prod(erased[inside].shape) == 600
