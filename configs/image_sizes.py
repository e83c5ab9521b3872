"""The size of training images as a function of the epoch: `config.data.image_sizes`.

"0:128, 11:160, 13:192" is 128 pixels from the start, 160 from epoch 11 and 192 from epoch 13 on.
The data are in the same order whatever the sizes.
"""

import bisect
from collections.abc import Sequence
import itertools
import re

import ml_collections

_FIELD = "config.data.image_sizes"
_POINT = re.compile(r"\s*(?P<epoch>\d+(\.\d+)?)\s*:\s*(?P<size>\d+)\s*")

# Epochs, rising from 0, and the height and width of images from there on, in pixels.
Points = tuple[tuple[float, int], ...]


def parse(text: str) -> Points:
  """Return the points of a text such as "0:128, 11:160"; none of "".

  Raises:
    ValueError: one sentence, if it is no such text.
  """
  matches = [_POINT.fullmatch(part) for part in text.split(",")] if text.strip() else []
  points = tuple((float(match["epoch"]), int(match["size"])) for match in matches if match)
  if len(points) < len(matches) or any(size < 1 for _, size in points):
    raise ValueError(
      f"{_FIELD} is {text!r}; write EPOCH:PIXELS, EPOCH:PIXELS, ... as in '0:128, 11:160'."
    )
  if points and points[0][0]:
    raise ValueError(
      f"{_FIELD} is {text!r}, which begins at epoch {points[0][0]:g}; the first must be 0:PIXELS."
    )
  for (before, _), (epoch, _) in itertools.pairwise(points):
    if epoch <= before:
      raise ValueError(
        f"{_FIELD} is {text!r}, where epoch {epoch:g} follows {before:g}; write rising epochs."
      )
  return points


def of(data: ml_collections.ConfigDict) -> Points:
  """Return the points of `config.data`; without `image_sizes` it is `image_size` throughout."""
  return parse(data.image_sizes) or ((0.0, int(data.image_size)),)


def at(firsts: Sequence[tuple[int, int]], step: int) -> int:
  """Return the size at a step of [(first step, size), ...], which rise from step 0."""
  return firsts[bisect.bisect_right(firsts, step, key=lambda point: point[0]) - 1][1]


def distinct(data: ml_collections.ConfigDict) -> list[int]:
  """Return the sizes of `config.data`, each once, in the order of their first use."""
  return list(dict.fromkeys(size for _, size in of(data)))


def ramp(
  *, min_size: int, max_size: int, start_epoch: int, end_epoch: int, multiple: int = 32
) -> str:
  """Return a text for `config.data.image_sizes`: the progressive sizes of FFCV's ImageNet recipes.

  The size is `min_size` up to `start_epoch`, `max_size` from `end_epoch` on and linear between,
  rounded to a multiple (github.com/libffcv/ffcv-imagenet, get_resolution). Each of them is compiled
  on its own: on TPUs let there be few.

  Args:
    min_size: pixels at the start.
    max_size: pixels at the end.
    start_epoch: last epoch of `min_size`.
    end_epoch: first epoch of `max_size`.
    multiple: of which the sizes between are.

  Raises:
    ValueError: if the ramp does not rise.
  """
  if not (0 < min_size <= max_size and 0 <= start_epoch < end_epoch):
    raise ValueError(
      f"A ramp from {min_size} to {max_size} px over the epochs {start_epoch} to {end_epoch} does "
      "not rise."
    )

  def size(epoch: int) -> int:
    share = (epoch - start_epoch) / (end_epoch - start_epoch)
    if share <= 0 or share >= 1:
      return min_size if share <= 0 else max_size
    return round((min_size + share * (max_size - min_size)) / multiple) * multiple

  points = {0: min_size}
  for epoch in range(1, end_epoch + 1):
    if size(epoch) != size(epoch - 1):
      points[epoch] = size(epoch)
  return ", ".join(f"{epoch}:{pixels}" for epoch, pixels in points.items())


def equal_stages(sizes: Sequence[int], epochs: float) -> str:
  """Return a text for `config.data.image_sizes`: all equally long, as in EfficientNetV2.

  Args:
    sizes: in pixels.
    epochs: of all of them together.
  """
  return ", ".join(f"{i * epochs / len(sizes):g}:{size}" for i, size in enumerate(sizes))
