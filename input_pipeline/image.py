"""From the bytes of an image file to the uint8 RGB square that the model sees."""

import io
import math
import warnings

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError
import simplejpeg

from input_pipeline.errors import BadRecordError, UnusableData

# Images are decoded in parallel already; threads of OpenCV would only compete for the same cores.
cv2.setNumThreads(0)

# Pillow warns about metadata that is not used here, and would do so in each process.
warnings.filterwarnings("ignore", module=r"PIL\.")

# A larger image is an accident or an attack: decoding it would take a gigabyte.
MAX_PIXELS = 89_478_485  # where Pillow starts to warn
# Those of tf.io.decode_image, and WebP. Of Pillow's other plugins one starts a program.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")

# A JPEG has at least one bit per block of 8x8 pixels; a header that claims more has no pixels.
_MAX_PIXELS_PER_BYTE = 8 * 64
# Each scan of a progressive JPEG passes over all pixels. Files have about ten; thousands of a few
# bytes each would take minutes. They are counted only where pixels times bytes make that possible.
_MAX_SCANS = 100
_COUNT_SCANS_FROM = 1 << 37

# A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size by leaving out the higher frequencies of each
# 8x8 block: faster than all pixels, and without the aliasing of skipped pixels.
_REDUCTIONS = (8, 4, 2)

# Before an antialiased resize an image is decoded to at least this multiple of the size that it is
# resized to. The resize then hides the reduced decoding: 0.05 of 255 levels on average.
_MARGIN = 2

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def decode(data: bytes, reduction: int = 1) -> np.ndarray:
  """Decode a file of one of FORMATS; EXIF rotation is ignored, as is usual.

  Damage that a decoder can conceal passes, as in other trainers: a JPEG that lost its middle is
  grey or torn from there on.

  Args:
    data: the whole file.
    reduction: 1, 2, 4 or 8; both sides of the result are divided by it.

  Returns:
    uint8 [ceil(height / reduction), ceil(width / reduction), 3], RGB.

  Raises:
    BadRecordError: the file is empty, truncated, of another format, or larger than MAX_PIXELS.
    MemoryError: this host has none left, which is no fault of the file.
  """
  rgb = decode_plain_jpeg(data, reduction)
  if rgb is None:
    rgb = decode_with_pillow(data)
    if reduction > 1:
      rgb = np.asarray(Image.fromarray(rgb).reduce(reduction))
  return rgb


def decode_plain_jpeg(data: bytes, reduction: int = 1) -> np.ndarray | None:
  """Return what `decode` does for an intact grey or YCbCr JPEG (the fast path), else None."""
  try:
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    # libjpeg does not convert CMYK, and Adobe stores it inverted; Pillow handles both.
    if colorspace in ("CMYK", "YCCK") or _too_much(data, height, width, jpeg=True):
      return None
    if reduction == 1:
      return simplejpeg.decode_jpeg(data, "RGB")
    return simplejpeg.decode_jpeg(
      data,
      "RGB",
      min_height=-(-height // reduction),
      min_width=-(-width // reduction),
      min_factor=reduction,
    )
  except ValueError:
    return None


def _too_much(data: bytes, height: int, width: int, jpeg: bool) -> str:
  """Return why an image whose header has this size must not be decoded, or an empty string."""
  pixels = height * width
  if pixels > MAX_PIXELS:
    return f"{width}x{height} pixels are more than {MAX_PIXELS}"
  if jpeg and pixels > _MAX_PIXELS_PER_BYTE * len(data):
    return f"{width}x{height} pixels are more than a JPEG of {len(data)} bytes can hold"
  if jpeg and pixels * len(data) > _COUNT_SCANS_FROM and data.count(b"\xff\xda") > _MAX_SCANS:
    return f"has more than {_MAX_SCANS} scans"
  return ""


def _webp_size(data: bytes) -> tuple[int, int]:
  """Return height and width in the header of a WebP (RFC 9649); zeros for anything else."""
  if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
    return 0, 0
  if data[12:16] == b"VP8X":
    width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
  elif data[12:16] == b"VP8L":
    bits = int.from_bytes(data[21:25], "little")
    width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
  else:
    width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
  return height, width


def decode_with_pillow(data: bytes) -> np.ndarray:
  """Return uint8 [height, width, 3], decoded by Pillow; raise BadRecordError if it cannot."""
  if not data:
    raise BadRecordError("zero bytes")
  try:
    # Pillow allocates the size in the header of a WebP, up to 2 GB, before that can be checked.
    if reason := _too_much(data, *_webp_size(data), jpeg=False):
      raise BadRecordError(reason)
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
      jpeg = opened.format in ("JPEG", "MPO")  # the latter is a JPEG with a second picture appended
      reason = _too_much(data, opened.height, opened.width, jpeg)
      if reason:
        raise BadRecordError(reason)
      if opened.mode.startswith("I"):
        # 16 bits per pixel, which Pillow would clip to 255 instead of scaling.
        grey = (np.asarray(opened) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
      return np.asarray(opened if opened.mode == "RGB" else opened.convert("RGB"))
  except (BadRecordError, MemoryError):
    raise
  except UnidentifiedImageError as e:  # its text holds an address, so it is never the same
    raise BadRecordError("is no JPEG, PNG, GIF, BMP or WebP") from e
  except Exception as e:  # Pillow's plugins raise anything for a malformed file
    if str(e).startswith("out of memory"):  # what its decoders in C return as an OSError
      raise MemoryError(str(e)) from e
    raise BadRecordError(f"{type(e).__name__}: {e}") from e


def draw_box(
  height: int,
  width: int,
  rng: np.random.Generator,
  area: tuple[float, float],
  aspect: tuple[float, float],
) -> tuple[int, int, int, int]:
  """Draw the box of a random-resized crop: the augmentation of Inception, as in torchvision.

  Args:
    height: of the image, in pixels.
    width: likewise.
    rng: source of the draws.
    area: bounds of the share of the image's area, which is uniform.
    aspect: bounds of width / height, which is log-uniform.

  Returns:
    (top, left, height, width) of the box in pixels.
  """
  # All numbers in one call: the call costs more than the numbers.
  draws = rng.random((10, 4)).tolist()
  low, high = math.log(aspect[0]), math.log(aspect[1])
  for u_area, u_aspect, u_top, u_left in draws:
    target = height * width * (area[0] + (area[1] - area[0]) * u_area)
    ratio = math.exp(low + (high - low) * u_aspect)
    w = round(math.sqrt(target * ratio))
    h = round(math.sqrt(target / ratio))
    if 0 < w <= width and 0 < h <= height:
      return int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w
  # An extreme shape: take the largest central box of an allowed shape.
  w = max(1, min(width, round(height * aspect[1])))
  h = max(1, min(height, round(width / aspect[0])))
  return (height - h) // 2, (width - w) // 2, h, w


def train_view(
  data: bytes,
  rng: np.random.Generator,
  size: int,
  area: tuple[float, float],
  aspect: tuple[float, float],
  flip: bool,
  out: np.ndarray | None = None,
  *,
  crop: str = "random_resized",
  padding: int = 0,
  interpolation: str = "bilinear",
) -> np.ndarray:
  """Decode an image, crop it, resize it, and mirror it with probability 1/2 if `flip`.

  A bilinear resize is without antialiasing, which is several times faster. Boxes of twice the
  `size` and more are decoded at a reduced size instead, which is both faster and smoother. A
  bicubic one is antialiased, as Pillow's.

  Args:
    data: the whole file.
    rng: source of the draws of box, interpolation and flip.
    size: side of the result in pixels.
    area: see `draw_box`.
    aspect: see `draw_box`.
    flip: whether to mirror at random.
    out: uint8 [size, size, 3] to write the result to, e.g. a row of a batch.
    crop: random_resized; or padded, a box of `size` at a random place of the image and a black
      margin; or none, the whole image.
    padding: width of the margin in pixels.
    interpolation: bilinear, bicubic, or random, one of the two.

  Returns:
    uint8 [size, size, 3]: `out` if given.

  Raises:
    BadRecordError: as `decode`.
    UnusableData: the image and its margin are smaller than the crop.
  """
  height, width, rgb = _measure(data)
  if crop == "padded":
    view = _padded(decode(data) if rgb is None else rgb, rng, size, padding, out)
    return cv2.flip(view, 1, view) if flip and rng.random() < 0.5 else view
  box = (0, 0, height, width) if crop == "none" else draw_box(height, width, rng, area, aspect)
  if interpolation == "random":
    interpolation = "bilinear" if rng.random() < 0.5 else "bicubic"
  bicubic = interpolation == "bicubic"
  reduction = 1
  if rgb is None:
    reduction = _reduction(min(box[2:]), _MARGIN * size if bicubic else size)
    rgb = decode(data, reduction)
  top, left, bottom, right = box[0], box[1], box[0] + box[2], box[1] + box[3]
  top, left, bottom, right = (round(x / reduction) for x in (top, left, bottom, right))
  part = rgb[top:bottom, left:right]
  if bicubic:
    view = _resize(part, size, interpolation, None, out)
  else:
    # Where a reduced size is not possible; bilinear interpolation would skip pixels.
    method = cv2.INTER_AREA if min(part.shape[:2]) >= 2 * size else cv2.INTER_LINEAR
    view = cv2.resize(part, (size, size), out, interpolation=method)
  return cv2.flip(view, 1, view) if flip and rng.random() < 0.5 else view


def _padded(
  rgb: np.ndarray, rng: np.random.Generator, size: int, padding: int, out: np.ndarray | None
) -> np.ndarray:
  """Return a box of `size` at a random place of an image with a black margin."""
  height, width = rgb.shape[:2]
  free = (height + 2 * padding - size, width + 2 * padding - size)
  if min(free) < 0:
    raise UnusableData(
      f"an image of {width}x{height} pixels with config.data.crop_padding={padding} is smaller "
      f"than the crop of config.data.image_size={size}; prepare larger images, or use "
      "config.data.crop=random_resized."
    )
  top, left = (int(u * (n + 1)) - padding for u, n in zip(rng.random(2), free, strict=True))
  view = np.empty((size, size, 3), np.uint8) if out is None else out
  view[...] = 0
  y, x = max(-top, 0), max(-left, 0)
  part = rgb[max(top, 0) : top + size, max(left, 0) : left + size]
  view[y : y + part.shape[0], x : x + part.shape[1]] = part
  return view


def _resize(
  rgb: np.ndarray,
  size: int,
  interpolation: str,
  box: tuple[float, float, float, float] | None,
  out: np.ndarray | None = None,
) -> np.ndarray:
  """Resize an image, or a box (left, top, right, bottom) of it, antialiased, as Pillow."""
  resized = Image.fromarray(rgb).resize((size, size), _RESAMPLING[interpolation], box=box)
  if out is None:
    return np.array(resized)  # that of Pillow is not to be written to
  out[...] = np.asarray(resized)
  return out


def eval_view(data: bytes, resize: int, size: int, interpolation: str = "bilinear") -> np.ndarray:
  """Decode an image, resize its shorter side to `resize`, antialiased, and crop the centre.

  Equal to torchvision to less than a level. Only the pixels under the crop are resized, to the same
  values, which saves a third of the time.

  Args:
    data: the whole file.
    resize: pixels of the shorter side, at least `size`; 0 to crop the image as it is.
    size: side of the result in pixels.
    interpolation: bilinear or bicubic.

  Returns:
    uint8 [size, size, 3].

  Raises:
    BadRecordError: as `decode`.
    UnusableData: the image is smaller than `size`, and not resized.
  """
  height, width, rgb = _measure(data)
  if not resize:
    if min(height, width) < size:
      raise UnusableData(
        f"an image of {width}x{height} pixels is smaller than config.data.eval_image_size={size}; "
        "set config.data.eval_resize to resize it."
      )
    top, left = round((height - size) / 2), round((width - size) / 2)
    whole = decode(data) if rgb is None else rgb
    return whole[top : top + size, left : left + size]
  reduction = 1
  if rgb is None:
    reduction = _reduction(min(height, width), _MARGIN * resize)
    rgb = decode(data, reduction)
  if width <= height:
    new_width, new_height = resize, int(resize * height / width)
  else:
    new_width, new_height = int(resize * width / height), resize
  left, top = round((new_width - size) / 2), round((new_height - size) / 2)
  x, y = width / reduction / new_width, height / reduction / new_height
  # min: rounding may put the far edge slightly outside the image, which Pillow refuses.
  right, bottom = min((left + size) * x, rgb.shape[1]), min((top + size) * y, rgb.shape[0])
  box = (left * x, top * y, right, bottom)
  return _resize(rgb, size, interpolation, box)


def _measure(data: bytes) -> tuple[int, int, np.ndarray | None]:
  """Return height and width, and the pixels if they had to be decoded for that."""
  try:
    return *simplejpeg.decode_jpeg_header(data)[:2], None
  except ValueError:
    rgb = decode_with_pillow(data)
    return *rgb.shape[:2], rgb


def _reduction(side: int, least: int) -> int:
  """Return the largest reduction of a side of `side` pixels that leaves at least `least`."""
  return next((r for r in _REDUCTIONS if side >= r * least), 1)
