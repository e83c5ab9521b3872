"""Parts of a split by name: train[:99%], train[99%:], train[1000:5000].

Folders and many shards are in the order of classes, so a slice is not one of that order. The
examples of the split are put in a pseudo-random order by a fixed key, and bounds count in that:
the slice has examples of all classes, [:99%] and [99%:] share none and leave none out, and both are
the same in every run and on every host. The order depends on the number of examples alone: the
same data have the same slices as kind array_record and as kind stream.
"""

import dataclasses
from fractions import Fraction
import re

import numpy as np

from input_pipeline.errors import DataError

_KEY = 20_120_630  # another one would put training examples into the minival of old runs

_SPLIT = re.compile(r"(?P<name>[^\[\],\s]+)(\[(?P<begin>[^\[\]:]*):(?P<end>[^\[\]:]*)\])?")
_BOUND = re.compile(r"(?P<number>\d+)|(?P<percent>\d+(\.\d+)?)%")


@dataclasses.dataclass(frozen=True)
class Part:
  """A split or a part of it.

  Attributes:
    text: as the config has it.
    name: of the whole split.
    begin: where the part begins, in examples or, with a %, in hundredths; "" is the start.
    end: where it ends; "" is the end.
  """

  text: str
  name: str
  begin: str = ""
  end: str = ""

  @property
  def whole(self) -> bool:
    """Whether it is the split itself, in its own order."""
    return not self.begin and not self.end

  def bounds(self, total: int) -> tuple[int, int]:
    """Return the first position of the part and the one behind its last, of `total` examples.

    Raises:
      DataError: there is no example between them.
    """
    begin = _position(self.begin, total) if self.begin else 0
    end = _position(self.end, total) if self.end else total
    if not 0 <= begin < end <= total:
      raise DataError(
        f"split {self.text!r} is [{begin}:{end}] of the {total:,} examples of {self.name!r}, which "
        "holds none or goes beyond them; set config.data.train_split and config.data.eval_split."
      )
    return begin, end


def parse(text: str, field: str = "the split") -> Part:
  """Return the part of a split that a text such as "train[:99%]" stands for.

  Raises:
    DataError: it is something else.
  """
  match = _SPLIT.fullmatch(text.strip())
  bounds = [match["begin"] or "", match["end"] or ""] if match else []
  if not match or not all(_BOUND.fullmatch(bound) for bound in bounds if bound):
    raise DataError(
      f"{field} is {text!r}; write a split as NAME or NAME[BEGIN:END], with bounds in examples or, "
      "with a %, in hundredths of all, as in train[:99%]."
    )
  return Part(text.strip(), match["name"], *bounds)


def several(text: str, field: str) -> list[str]:
  """Return the splits of a text such as "train[99%:], val", each once.

  Raises:
    DataError: one is no split, or is given twice.
  """
  found = [parse(part, field).text for part in text.split(",")]
  for name in found:
    if found.count(name) > 1:
      raise DataError(f"{field} is {text!r}, which names {name!r} twice.")
  return found


def choose(total: int, begin: int, end: int) -> np.ndarray:
  """Return the indices of the examples at the positions begin, ..., end - 1, in rising order.

  Rising, so that one pass over them reads the data from front to back.
  """
  # Not numpy's own shuffle, whose algorithm may change with its version.
  numbers = np.random.Generator(np.random.Philox(key=[_KEY, 0])).random(total)
  return np.sort(np.argsort(numbers, kind="stable")[begin:end])


def _position(bound: str, total: int) -> int:
  match = _BOUND.fullmatch(bound)
  assert match
  return (
    int(match["number"]) if match["number"] else round(total * Fraction(match["percent"]) / 100)
  )
