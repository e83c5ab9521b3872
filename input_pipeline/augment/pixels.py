"""What operations do to pixels: functions of a uint8 image [height, width, 3] and of fixed numbers.

Each returns the result, and may have written it to the image it was given. The results are those of
Pillow, on which torchvision's and timm's operations on images are built, to one level of 255
(tests/parity/test_host_augment.py), most of them by cheaper means.
"""

import functools
import math
from typing import Literal

import cv2
import numpy as np
from PIL import Image as pillow

Image = np.ndarray  # uint8 [height, width, 3]
Color = tuple[int, int, int]
Interpolation = Literal["nearest", "bilinear", "bicubic"]

_RESAMPLING = {
  "nearest": pillow.Resampling.NEAREST,
  "bilinear": pillow.Resampling.BILINEAR,
  "bicubic": pillow.Resampling.BICUBIC,
}

# Pillow cuts off what OpenCV rounds: x + _CUT rounds to the integer below x, and n + _CUT to n.
_CUT = -0.499


def invert(image: Image) -> Image:
  """Replace each value v by 255 - v."""
  return cv2.bitwise_not(image, image)


def grayscale(image: Image) -> Image:
  """Replace the colours by their luminance (ITU-R BT.601)."""
  return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB, image)


def solarize(image: Image, threshold: float) -> Image:
  """Invert the values of at least `threshold`."""
  # THRESH_BINARY compares by >, and all values are integers.
  _, above = cv2.threshold(image, math.ceil(threshold) - 1, 255, cv2.THRESH_BINARY)
  return cv2.bitwise_xor(image, above, image)


def solarize_add(image: Image, amount: int) -> Image:
  """Add `amount` to the values below 128."""
  _, added = cv2.threshold(image, 127, amount, cv2.THRESH_BINARY_INV)
  return cv2.add(image, added, image)


def posterize(image: Image, bits: int) -> Image:
  """Keep the `bits` highest bits of each value."""
  return np.bitwise_and(image, 0xFF & ~(0xFF >> bits), image)


def auto_contrast(image: Image) -> Image:
  """Stretch each channel to the whole range."""
  low = image.min(0).min(0).tolist()
  high = image.max(0).max(0).tolist()
  table = np.empty((1, 256, 3), np.uint8)
  for c in range(3):
    if low[c] < high[c]:
      scale = 255 / (high[c] - low[c])
      table[0, :, c] = np.clip(_LEVELS * scale - low[c] * scale, 0, 255)
    else:
      table[0, :, c] = _LEVELS
  return cv2.LUT(image, table, image)


def equalize(image: Image) -> Image:
  """Make the histogram of each channel flat."""
  table = np.empty((1, 256, 3), np.uint8)
  for c in range(3):
    counts = cv2.calcHist([image], [c], None, [256], [0, 256]).ravel().astype(np.int64)
    below = np.cumsum(counts) - counts
    present = np.flatnonzero(counts)
    step = int(below[present[-1]]) // 255
    table[0, :, c] = np.minimum((step // 2 + below) // step, 255) if step else _LEVELS
  return cv2.LUT(image, table, image)


def brightness(image: Image, factor: float) -> Image:
  """Multiply all values."""
  return cv2.convertScaleAbs(image, image, factor, _CUT)


def contrast(image: Image, factor: float) -> Image:
  """Multiply the distance of all values from the mean luminance."""
  mean = int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5)
  return cv2.addWeighted(image, factor, image, 0, mean * (1 - factor) + _CUT, image)


def saturation(image: Image, factor: float) -> Image:
  """Multiply the distance of the colours from their luminance; timm calls it color."""
  grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
  return cv2.addWeighted(image, factor, grey, 1 - factor, _CUT, image)


def sharpness(image: Image, factor: float) -> Image:
  """Multiply the distance of all values from those of a smoothed image; its edge stays."""
  smooth = cv2.filter2D(image, -1, _SMOOTH)
  smooth[[0, -1]], smooth[:, [0, -1]] = image[[0, -1]], image[:, [0, -1]]
  return cv2.addWeighted(image, factor, smooth, 1 - factor, _CUT, image)


def hue(image: Image, turn: float) -> Image:
  """Turn the hue by a share of the circle, in HSV of 8 bits as torchvision does."""
  hsv = np.array(pillow.fromarray(image).convert("HSV"))
  hsv[..., 0] += np.uint8(int(turn * 255) & 0xFF)
  np.copyto(image, np.asarray(pillow.fromarray(hsv, "HSV").convert("RGB")))
  return image


def blur(image: Image, radius: float) -> Image:
  """Blur with a Gaussian of standard deviation `radius`, which Pillow builds of three boxes."""
  variance = radius * radius / 3
  whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
  edge = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
  edge /= 6 * (variance - (whole + 1) ** 2)
  box = np.ones((1, 2 * whole + 3))
  box[0, [0, -1]] = edge
  box /= box.sum()
  for kernel in (box, box.T):
    for _ in range(3):
      # Pillow's weights are rounded down, so that halves are, too.
      image = cv2.filter2D(image, -1, kernel, delta=-1e-4, borderType=cv2.BORDER_REPLICATE)
  return image


def shear_x(image: Image, factor: float, interpolation: Interpolation, fill: Color) -> Image:
  """Move row y by factor * y to the left."""
  return affine(image, (1, factor, 0, 0, 1, 0), interpolation, fill)


def shear_y(image: Image, factor: float, interpolation: Interpolation, fill: Color) -> Image:
  """Move column x by factor * x upwards."""
  return affine(image, (1, 0, 0, factor, 1, 0), interpolation, fill)


def translate_x(image: Image, pixels: float, interpolation: Interpolation, fill: Color) -> Image:
  """Move the image to the left."""
  return affine(image, (1, 0, pixels, 0, 1, 0), interpolation, fill)


def translate_y(image: Image, pixels: float, interpolation: Interpolation, fill: Color) -> Image:
  """Move the image upwards."""
  return affine(image, (1, 0, 0, 0, 1, pixels), interpolation, fill)


def rotate(image: Image, degrees: float, interpolation: Interpolation, fill: Color) -> Image:
  """Turn the image anticlockwise about its centre."""
  height, width = image.shape[:2]
  angle = -math.radians(degrees % 360)
  # As Pillow, so that multiples of 90 degrees are exact.
  cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
  x, y = width / 2, height / 2
  matrix = (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)
  return affine(image, matrix, interpolation, fill)


def affine(
  image: Image,
  matrix: tuple[float, float, float, float, float, float],
  interpolation: Interpolation,
  fill: Color,
) -> Image:
  """Fetch the pixel at (x, y) from (a x + b y + c, d x + e y + f), as Pillow's AFFINE does.

  The centre of a pixel is at + 0.5. What would come from outside of the image is `fill`.

  Args:
    image: uint8 [height, width, 3].
    matrix: a, b, c, d, e, f.
    interpolation: OpenCV does not have Pillow's bicubic kernel (a = -1). Shears and translations
      by it are a sum of four shifted images; the rest, and nearest, is left to Pillow.
    fill: red, green, blue.
  """
  a, b, c, d, e, f = matrix
  height, width = image.shape[:2]
  if (a, b, d, e) == (1, 0, 0, 1) and c == int(c) and f == int(f):
    return _shift(image, int(c), int(f), fill)
  along_x, along_y = (a, d, e, f) == (1, 0, 1, 0), (a, b, c, e) == (1, 0, 0, 1)
  if interpolation == "bicubic" and along_x:
    moved = _slide(image, b * (np.arange(height) + 0.5) + c)
  elif interpolation == "bicubic" and along_y:
    turned = _slide(cv2.transpose(image), d * (np.arange(width) + 0.5) + f)
    moved = cv2.transpose(turned)
  elif interpolation != "bilinear":
    how = _RESAMPLING[interpolation]
    transform = pillow.Transform.AFFINE
    result = pillow.fromarray(image).transform((width, height), transform, matrix, how, 1, fill)
    np.copyto(image, np.asarray(result))  # that of Pillow is not to be written to
    return image
  else:
    # OpenCV's centres are at + 0. In floating point since OpenCV 5; before, in 32nds of a pixel.
    centred = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    moved = cv2.warpAffine(
      image, centred, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE
    )
  xs, ys = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
  inside = np.ones((height, width), bool)
  for x_step, y_step, start, size in ((a, b, c, width), (d, e, f, height)):
    if (x_step, y_step, start) not in ((1, 0, 0), (0, 1, 0)):
      place = x_step * xs + (y_step * ys + start)
      inside &= (place >= 0) & (place < size)
  np.copyto(image, _plain(height, width, fill))
  return cv2.copyTo(moved, inside.view(np.uint8), image)


def _slide(image: Image, shifts: np.ndarray) -> Image:
  """Fetch row y from `shifts[y]` to the right, bicubic as in Pillow, edges repeated.

  Args:
    image: uint8 [height, width, 3].
    shifts: float64 [height], in pixels.
  """
  height, width = image.shape[:2]
  whole = np.floor(shifts)
  t = (shifts - whole).astype(np.float32)[:, None]
  margin = width + 2  # beyond it, all pixels are those of the edge
  wide = cv2.copyMakeBorder(image, 0, 0, margin, margin, cv2.BORDER_REPLICATE)
  starts = np.clip(whole.astype(np.int64) - 1 + margin, 0, width + margin - 1)
  windows = np.lib.stride_tricks.sliding_window_view(
    wide.reshape(height, -1), 3 * (width + 3), axis=1
  )
  values = windows[np.arange(height), 3 * starts].astype(np.float32)
  weights = (-t + 2 * t**2 - t**3, 1 - 2 * t**2 + t**3, t + t**2 - t**3, t**3 - t**2)
  moved = sum(w * values[:, 3 * k : 3 * (k + width)] for k, w in enumerate(weights))
  return np.clip(moved, 0, 255).astype(np.uint8).reshape(height, width, 3)


def _shift(image: Image, left: int, up: int, fill: Color) -> Image:
  height, width = image.shape[:2]
  moved = _plain(height, width, fill).copy()
  rows, columns = height - abs(up), width - abs(left)
  if rows > 0 and columns > 0:
    y, x = max(up, 0), max(left, 0)
    moved[y - up :, x - left :][:rows, :columns] = image[y:, x:][:rows, :columns]
  return moved


def erase(image: Image, top: int, left: int, height: int, width: int, fill: Color) -> Image:
  """Fill a box."""
  image[top : top + height, left : left + width] = _plain(height, width, fill)
  return image


@functools.lru_cache(maxsize=4)
def _plain(height: int, width: int, fill: Color) -> Image:
  """Return an image of one colour, not to be written to."""
  return np.full((height, width, 3), fill, np.uint8)


_LEVELS = np.arange(256)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
