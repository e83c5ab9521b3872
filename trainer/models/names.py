"""Names of leaves in the state dicts of timm and torchvision: what all families need for theirs.

A family returns them from `torch_name`. How a leaf lies follows from the two shapes: a kernel is
[height, width, in, out] here and [out, in, height, width] there, a matrix [in, out] here and
[out, in] there, or [out, in, 1, 1] where timm has a 1x1 convolution (squeeze-and-excitation, and
the head of pre-activation nets).
"""

from collections.abc import Iterable, Sequence
import re
from typing import Any, NamedTuple

# The last part of a leaf's path: ours, theirs.
KINDS = {
  "skip_gain": "skipinit_gain",
  "kernel": "weight",
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}
# A block of staged nets, as a regular expression.
BLOCK = r"stage(?P<stage>\d+)_block(?P<block>\d+)"
# Names of modules: ours as a regular expression, theirs with its groups.
Table = Sequence[tuple[str, str]]


class Looks(NamedTuple):
  """What a state dict looks like.

  Attributes:
    name: of the net, as torchvision or timm have it, or words; "" if it is nothing known.
    depth: layers, where that is a field of the net and they are known.
    classes: length of the logits, if they are known; a family leaves them out.
  """

  name: str = ""
  depth: int | None = None
  classes: int | None = None

  def __str__(self) -> str:
    name = self.name or "no net of this family"
    return name + (f" with {self.classes:,} classes" if self.classes else "")


def torch_name(leaf: str, table: Table, **more: Any) -> str:
  """Return the name by the first row that matches the module of a leaf; else its own, with dots.

  Args:
    leaf: its path.
    table: blocks and stages of ours count from 1; in theirs {block} counts from 0, {stage} from 1,
      and {previous} is the stage from 0.
    more: what their modules may have besides.
  """
  module, _, kind = leaf.rpartition("/")
  for ours, theirs in table:
    if match := re.fullmatch(ours, module):
      parts: dict[str, Any] = match.groupdict() | more
      for name, part in (("block", "block"), ("previous", "stage")):
        if part in parts:
          parts[name] = int(parts[part]) - 1
      return f"{theirs.format(**parts)}.{KINDS.get(kind, kind)}"
  return leaf.replace("/", ".")


def respelt(names: Iterable[str], table: Table, library: str) -> dict[str, str]:
  """Return what a library calls the tensors of another, of those that a table has.

  Args:
    names: of tensors.
    table: timm's and torchvision's names, with {block} for any number and {end} for the last word.
    library: "timm" or "torchvision", whose names are wanted.
  """
  rows = [row if library == "torchvision" else row[::-1] for row in table]
  patterns = [(_pattern(source), target) for source, target in rows]
  result = {}
  for name in names:
    for pattern, target in patterns:
      if match := pattern.fullmatch(name):
        result[name] = target.format(**match.groupdict())
        break
  return result


def _pattern(template: str) -> re.Pattern[str]:
  parts = re.split(r"\{(block|end)\}", template)
  for i, part in enumerate(parts):
    parts[i] = {"block": r"(?P<block>\d{1,3})", "end": r"(?P<end>\w+)"}.get(part, re.escape(part))
  return re.compile("".join(parts))


def count_blocks(pattern: str, names: Iterable[str], first: int) -> tuple[int, ...]:
  """Return the number of blocks of each stage; none unless they count without gaps.

  Args:
    pattern: regular expression of (stage, block), for the beginning of a name.
    names: of tensors.
    first: number of the first stage.
  """
  found: dict[int, set[int]] = {}
  for name in names:
    if match := re.match(pattern, name):
      found.setdefault(int(match[1][:6]), set()).add(int(match[2][:6]))
  whole = sorted(found) == list(range(first, first + len(found)))
  whole = whole and all(len(blocks) == max(blocks) + 1 for blocks in found.values())
  return tuple(len(found[stage]) for stage in sorted(found)) if whole else ()
