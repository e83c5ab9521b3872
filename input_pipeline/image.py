"""From the bytes of an image file to the uint8 RGB square that the model sees."""

import io
import math
import warnings

import cv2
import numpy as np
from PIL import Image
from PIL import UnidentifiedImageError
import simplejpeg

from input_pipeline.errors import BadRecordError

# Images are decoded in parallel already; threads of OpenCV would only compete for the same cores.
cv2.setNumThreads(0)

# Pillow warns of metadata that nobody uses here, and would do so again in each process.
warnings.filterwarnings("ignore", module=r"PIL\.")

# A larger one is no photograph but an accident or an attack: decoding would take a gigabyte.
MAX_PIXELS = 89_478_485  # where Pillow begins to warn
# What tf.io.decode_image reads. Of Pillow's other plugins one starts a program, and WebP takes the
# memory for the size in the header, up to 2 GB, before that can be looked at.
FORMATS = ("JPEG", "PNG", "GIF", "BMP")

# A block of 8x8 pixels takes a bit of a JPEG at least; what claims more has lost its pixels.
_MAX_PIXELS_PER_BYTE = 8 * 64
# Each scan of a progressive JPEG passes over all pixels. Files have about ten; thousands of a few
# bytes each would take minutes. They are counted only where pixels times bytes allow for that.
_MAX_SCANS = 100
_COUNT_SCANS_FROM = 1 << 37

# Bilinear interpolation looks at 2x2 pixels; from this factor on it would skip much of the source.
_AREA_FROM = 1.5


def decode(data: bytes) -> np.ndarray:
  """Decodes a file of one of FORMATS; EXIF rotation is ignored, as is usual.

  What damage a decoder makes up for passes, as in other trainers: a JPEG of which the middle was
  lost comes out grey or torn from there on.

  Args:
    data: the whole file.

  Returns:
    uint8 [height, width, 3], RGB.

  Raises:
    BadRecordError: the bytes are empty, truncated, of no such format, or more than MAX_PIXELS.
  """
  rgb = decode_plain_jpeg(data)
  return decode_with_pillow(data) if rgb is None else rgb


def decode_plain_jpeg(data: bytes) -> np.ndarray | None:
  """Returns uint8 [height, width, 3] of an intact grey or YCbCr JPEG (the fast path), else None."""
  try:
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    # libjpeg has no colour profile for CMYK, and Adobe's is stored inverted; Pillow knows both.
    if colorspace in ("CMYK", "YCCK") or _too_much(data, height, width, jpeg=True):
      return None
    return simplejpeg.decode_jpeg(data, "RGB")
  except ValueError:
    return None


def _too_much(data: bytes, height: int, width: int, jpeg: bool) -> str:
  """Returns why an image of this size in its header must not be decoded, or an empty string."""
  pixels = height * width
  if pixels > MAX_PIXELS:
    return f"{width}x{height} pixels are more than {MAX_PIXELS}"
  if jpeg and pixels > _MAX_PIXELS_PER_BYTE * len(data):
    return f"{width}x{height} pixels are more than a JPEG of {len(data)} bytes can hold"
  if jpeg and pixels * len(data) > _COUNT_SCANS_FROM and data.count(b"\xff\xda") > _MAX_SCANS:
    return f"has more than {_MAX_SCANS} scans"
  return ""


def decode_with_pillow(data: bytes) -> np.ndarray:
  """Returns uint8 [height, width, 3] of what Pillow decodes; raises BadRecordError for the rest."""
  if not data:
    raise BadRecordError("zero bytes")
  try:
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
      jpeg = opened.format in ("JPEG", "MPO")  # the latter has a second picture behind the first
      reason = _too_much(data, opened.height, opened.width, jpeg)
      if reason:
        raise BadRecordError(reason)
      if opened.mode.startswith("I"):
        # 16 bits a pixel, which Pillow would clip to 255 instead of scaling them.
        grey = (np.asarray(opened) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
      return np.asarray(opened if opened.mode == "RGB" else opened.convert("RGB"))
  except BadRecordError:
    raise
  except UnidentifiedImageError as e:  # whose text holds an address and so is never the same
    raise BadRecordError(f"is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]}") from e
  except Exception as e:  # Pillow's plugins raise whatever a malformed file makes them trip over
    raise BadRecordError(f"{type(e).__name__}: {e}") from e


def random_resized_crop(
  rgb: np.ndarray,
  rng: np.random.Generator,
  size: int,
  area: tuple[float, float],
  aspect: tuple[float, float],
) -> np.ndarray:
  """Cuts a random box and resizes it: the augmentation of Inception, as torchvision draws it.

  Args:
    rgb: uint8 [height, width, 3].
    rng: where the box is drawn from.
    size: side of the result in pixels.
    area: smallest and largest share of the area of `rgb`, uniform.
    aspect: smallest and largest width / height, log-uniform.

  Returns:
    uint8 [size, size, 3].
  """
  height, width = rgb.shape[:2]
  # All numbers in one call: a call from Python costs more than the numbers.
  draws = rng.random((10, 4)).tolist()
  low, high = math.log(aspect[0]), math.log(aspect[1])
  for u_area, u_aspect, u_top, u_left in draws:
    target = height * width * (area[0] + (area[1] - area[0]) * u_area)
    ratio = math.exp(low + (high - low) * u_aspect)
    w = round(math.sqrt(target * ratio))
    h = round(math.sqrt(target / ratio))
    if 0 < w <= width and 0 < h <= height:
      top, left = int(u_top * (height - h + 1)), int(u_left * (width - w + 1))
      break
  else:  # an extreme shape: the largest central box of an allowed shape
    w = max(1, min(width, round(height * aspect[1])))
    h = max(1, min(height, round(width / aspect[0])))
    top, left = (height - h) // 2, (width - w) // 2
  shrink = max(h, w) > _AREA_FROM * size
  return cv2.resize(
    rgb[top : top + h, left : left + w],
    (size, size),
    interpolation=cv2.INTER_AREA if shrink else cv2.INTER_LINEAR,
  )


def train_view(
  rgb: np.ndarray,
  rng: np.random.Generator,
  size: int,
  area: tuple[float, float],
  aspect: tuple[float, float],
  flip: bool,
) -> np.ndarray:
  """Returns uint8 [size, size, 3]: a random resized crop, mirrored every other time if `flip`."""
  crop = random_resized_crop(rgb, rng, size, area, aspect)
  return cv2.flip(crop, 1) if flip and rng.random() < 0.5 else crop


def eval_crop(rgb: np.ndarray, resize: int, size: int) -> np.ndarray:
  """Resizes the shorter side to `resize`, antialiased, and cuts the centre, as torchvision does.

  Only the pixels under the crop are resized, to the same values, which saves a third of the time.

  Args:
    rgb: uint8 [height, width, 3].
    resize: pixels of the shorter side, at least `size`.
    size: side of the result in pixels.

  Returns:
    uint8 [size, size, 3].
  """
  height, width = rgb.shape[:2]
  if width <= height:
    new_width, new_height = resize, int(resize * height / width)
  else:
    new_width, new_height = int(resize * width / height), resize
  left, top = round((new_width - size) / 2), round((new_height - size) / 2)
  x, y = width / new_width, height / new_height
  # min: rounding may put the far edge a hair outside of the image, which Pillow refuses.
  box = (left * x, top * y, min((left + size) * x, width), min((top + size) * y, height))
  return np.asarray(Image.fromarray(rgb).resize((size, size), Image.Resampling.BILINEAR, box=box))
