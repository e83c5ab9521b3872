"""The cost of operations on the host, for `input_pipeline.bench`."""

from collections.abc import Callable, Sequence
import functools
import time

import numpy as np

from configs import base
from input_pipeline import augment, image
from input_pipeline.augment import pixels
from input_pipeline.errors import BadRecordError
from input_pipeline.records import Record

SIZE = 224  # pixels of the images

# Laws with the options of the recipes that use them.
CHAINS = (
  "timm_rand_augment(m=7, mstd=0.5, inc=1)",
  "rand_augment(n=2, m=9)",
  "trivial_augment()",
  "auto_augment()",
  "auto_augment(policy='v0')",
  "three_augment()",
  "color_jitter(brightness=0.4, contrast=0.4, saturation=0.4)",
  "random_erasing(p=0.25)",
  "grayscale(p=1)",
  "invert(p=1)",
  "solarize(p=1)",
)

_FILL = (124, 116, 104)
_STEPS: tuple[tuple[Callable[..., np.ndarray], tuple[object, ...]], ...] = (
  (pixels.posterize, (4,)),
  (pixels.solarize_add, (77,)),
  (pixels.brightness, (1.6,)),
  (pixels.contrast, (1.6,)),
  (pixels.saturation, (1.6,)),
  (pixels.sharpness, (1.6,)),
  (pixels.auto_contrast, ()),
  (pixels.equalize, ()),
  (pixels.hue, (0.1,)),
  (pixels.blur, (1.3,)),
  *((pixels.translate_x, (30.5, how, _FILL)) for how in ("bilinear", "bicubic")),
  *((pixels.shear_x, (0.2, how, _FILL)) for how in ("bilinear", "bicubic")),
  *((pixels.rotate, (21.0, how, _FILL)) for how in ("nearest", "bilinear", "bicubic")),
)


def report(examples: Sequence[Record], turns: int) -> str:
  """Return a table of microseconds of CPU per image of each law and of each step of theirs.

  Args:
    examples: images, of which some are used.
    turns: over which the least is taken, as other work only adds.
  """
  views = [view for view in map(_view, examples[:32]) if view is not None]
  lines = ["  us/image  images/CPU-s"]
  for chain in CHAINS:
    operations, rng = augment.parse(chain), np.random.default_rng(0)
    cost = _cost(functools.partial(_apply, operations, rng), views, 8 * turns)
    lines.append(f"  {1e6 * cost:8.0f}  {1 / cost:12,.0f}  {chain}")
  for do, arguments in _STEPS:
    cost = _cost(functools.partial(_do, do, arguments), views, turns)
    name = " ".join([do.__name__, *(str(a) for a in arguments if a != _FILL)])
    lines.append(f"  {1e6 * cost:8.0f}  {1 / cost:12,.0f}    {name}")
  return "\n".join(lines)


def _view(example: Record) -> np.ndarray | None:
  data = base.get_config().data
  try:
    return image.train_view(
      example.image, np.random.default_rng(0), SIZE, data.crop_area, data.crop_aspect, True
    )
  except BadRecordError:
    return None


def _apply(
  operations: Sequence[augment.Operation], rng: np.random.Generator, view: np.ndarray
) -> None:
  augment.apply(operations, view, rng)


def _do(do: Callable[..., np.ndarray], arguments: Sequence[object], view: np.ndarray) -> np.ndarray:
  return do(view, *arguments)


def _cost(
  function: Callable[[np.ndarray], object], views: Sequence[np.ndarray], turns: int
) -> float:
  """Return seconds of CPU per image: the mean of the faster half of the turns."""
  spent = []
  for _ in range(turns):
    copies = [view.copy() for view in views]
    start = time.thread_time()
    for view in copies:
      function(view)
    spent.append((time.thread_time() - start) / len(views))
  faster = sorted(spent)[: max(1, (turns + 1) // 2)]
  return sum(faster) / len(faster)
