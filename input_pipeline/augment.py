"""Operations on uint8 images on the host, after crop and flip: `config.data.operations`.

    --config.data.operations="grayscale(p=0.2)|solarize(p=0.1, threshold=128)"

An operation is a function of an image, uint8 [height, width, 3], and the random generator of its
example; what a config may set are its keyword-only parameters. It returns an array of the same
shape and dtype, and may write to the one it was given. It draws from this generator alone: so its
result depends on the seed and the number of the example, not on hosts, processes or restarts.
"""

from collections.abc import Callable, Sequence

import cv2
import numpy as np

from configs import names
from input_pipeline.errors import DataError

Image = np.ndarray  # uint8 [height, width, 3]
Operation = Callable[[Image, np.random.Generator], Image]

_FIELD = "config.data.operations"


def grayscale(image: Image, rng: np.random.Generator, *, p: float) -> Image:
  """Replace, with probability `p`, the colours by their luminance (ITU-R BT.601)."""
  if not _occurs(p, rng):
    return image
  return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB, image)


def invert(image: Image, rng: np.random.Generator, *, p: float) -> Image:
  """Replace, with probability `p`, each value v by 255 - v."""
  return np.bitwise_not(image, image) if _occurs(p, rng) else image


def solarize(image: Image, rng: np.random.Generator, *, p: float, threshold: int = 128) -> Image:
  """Replace, with probability `p`, each value v of at least `threshold` by 255 - v."""
  if not 0 <= threshold <= 255:
    raise ValueError(f"threshold={threshold!r} must be in [0, 255]")
  return np.bitwise_not(image, image, where=image >= threshold) if _occurs(p, rng) else image


# A config may also name one from elsewhere, as "package.module:name".
OPERATIONS: dict[str, Callable[..., Image]] = {
  "grayscale": grayscale,
  "invert": invert,
  "solarize": solarize,
}


def parse(spec: str) -> list[Operation]:
  """Return the operations of a config, in order, each tried once on a small image.

  Args:
    spec: `config.data.operations`: names joined by `|`, each with its arguments in brackets; "" is
      no operation.

  Raises:
    DataError: one sentence, if there is no such operation, or its arguments do not fit.
  """
  try:
    operations = names.find_calls(OPERATIONS, spec, _FIELD)
  except ValueError as e:
    raise DataError(str(e)) from e
  for operation in operations:
    try:
      apply([operation], np.zeros((8, 8, 3), np.uint8), np.random.default_rng(0))
    except (TypeError, ValueError) as e:
      raise DataError(f"{_FIELD}: {_name(operation)} refuses its arguments: {e}.") from e
  return list(operations)


def apply(operations: Sequence[Operation], image: Image, rng: np.random.Generator) -> None:
  """Apply operations, one after the other, to an image in place.

  Raises:
    DataError: an operation returns something else than an image of this shape and dtype.
  """
  for operation in operations:
    result = operation(image, rng)
    if result is image:
      continue
    if (
      not isinstance(result, np.ndarray)
      or result.shape != image.shape
      or result.dtype != image.dtype
    ):
      found = (
        f"{result.dtype} {list(result.shape)}"
        if isinstance(result, np.ndarray)
        else type(result).__name__
      )
      raise DataError(
        f"{_FIELD}: {_name(operation)} returned {found} for an image of uint8 "
        f"{list(image.shape)}; an operation must keep shape and dtype."
      )
    image[...] = result


def _occurs(p: float, rng: np.random.Generator) -> bool:
  """Draw whether something of probability `p` happens."""
  if not 0 <= p <= 1:
    raise ValueError(f"p={p!r} must be in [0, 1]")
  return rng.random() < p


def _name(operation: Operation) -> str:
  """Return the name of an operation for a message; functions may be wrapped by arguments."""
  function = getattr(operation, "func", operation)
  return getattr(function, "__name__", repr(function))
