"""Operations on uint8 images on the host, after crop and flip: `config.data.operations`.

    --config.data.operations="timm_rand_augment(m=7, mstd=0.5, inc=1)|random_erasing(p=0.1)"

An operation is a function of an image, uint8 [height, width, 3], and the random generator of its
example; what a config may set are its keyword-only parameters. It returns an array of the same
shape and dtype, and may write to the one it was given. It draws from this generator alone: so its
result depends on the seed and the number of the example, not on hosts, processes or restarts.

Those of this package are laws, which draw steps (`policies`), and the pixels of steps (`pixels`).
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import numpy as np

from configs import names
from input_pipeline.augment import policies
from input_pipeline.augment.pixels import Image
from input_pipeline.augment.policies import Law, Step
from input_pipeline.errors import DataError

Operation = Callable[[Image, np.random.Generator], Image]

_FIELD = "config.data.operations"


def _operation(law: Law) -> Callable[..., Image]:
  """Return the operation that does the steps which a law draws."""

  @functools.wraps(law)
  def operation(image: Image, rng: np.random.Generator, **options: Any) -> Image:
    return _do(law(image.shape[:2], rng, **options), image)

  return operation


def _do(steps: Sequence[Step], image: Image) -> Image:
  for step in steps:
    image = step.do(image, *step.arguments)
  return image


# A config may also name one from elsewhere, as "package.module:name".
OPERATIONS: dict[str, Callable[..., Image]] = {
  law.__name__: _operation(law)
  for law in (
    policies.grayscale,
    policies.invert,
    policies.solarize,
    policies.color_jitter,
    policies.random_erasing,
    policies.rand_augment,
    policies.timm_rand_augment,
    policies.trivial_augment,
    policies.auto_augment,
    policies.three_augment,
  )
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


def apply_named(
  operations: Sequence[Operation], image: Image, rng: np.random.Generator
) -> list[str]:
  """Apply operations as `apply` does; return what was done, step by step."""
  said = []
  for operation in operations:
    law = getattr(getattr(operation, "func", operation), "__wrapped__", None)
    if law is None:
      said.append(_name(operation))
      apply([operation], image, rng)
      continue
    steps = law(image.shape[:2], rng, **getattr(operation, "keywords", {}))
    said += [str(step) for step in steps]
    image[...] = _do(steps, image)
  return said


def _name(operation: Operation) -> str:
  """Return the name of an operation for a message; functions may be wrapped by arguments."""
  function = getattr(operation, "func", operation)
  return getattr(function, "__name__", repr(function))
