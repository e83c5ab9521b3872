"""Two spellings of EfficientNet's state dict: torchvision counts layers, timm names them."""

from collections.abc import Iterable, Mapping
import re
from typing import NamedTuple


class _Spelling(NamedTuple):
  """How a library names the tensors of a net.

  Attributes:
    layer: regular expression of (stage, block, layer) of a layer in a block.
    name: of such a layer.
    first: number of the first stage.
    ends: layers outside of blocks, in a fixed order; {} is the number behind the last stage.
  """

  layer: re.Pattern[str]
  name: str
  first: int
  ends: tuple[str, ...]


_LIBRARIES: Mapping[str, _Spelling] = {
  "timm": _Spelling(
    re.compile(r"blocks\.(\d{1,3})\.(\d{1,3})\.([\w.]+)"),
    "blocks.{}.{}.{}",
    0,
    ("conv_stem", "bn1", "conv_head", "bn2", "classifier"),
  ),
  "torchvision": _Spelling(
    re.compile(r"features\.(\d{1,3})\.(\d{1,3})\.block\.([\w.]+)"),
    "features.{}.{}.block.{}",
    1,
    ("features.0.0", "features.0.1", "features.{}.0", "features.{}.1", "classifier.1"),
  ),
}
LIBRARIES = tuple(_LIBRARIES)
# The layers of a block, for each kind of block, as timm and as torchvision call them.
_KINDS: tuple[Mapping[str, str], ...] = (
  {"conv": "0.0", "bn1": "0.1"},
  {"conv_exp": "0.0", "bn1": "0.1", "conv_pwl": "1.0", "bn2": "1.1"},
  {
    "conv_dw": "0.0",
    "bn1": "0.1",
    "se.conv_reduce": "1.fc1",
    "se.conv_expand": "1.fc2",
    "conv_pw": "2.0",
    "bn2": "2.1",
  },
  {
    "conv_pw": "0.0",
    "bn1": "0.1",
    "conv_dw": "1.0",
    "bn2": "1.1",
    "se.conv_reduce": "2.fc1",
    "se.conv_expand": "2.fc2",
    "conv_pwl": "3.0",
    "bn3": "3.1",
  },
)


def respell(names: Iterable[str], source: str, target: str) -> dict[str, str]:
  """Return the names of an EfficientNet's tensors as another library has them.

  Args:
    names: of tensors, such as "features.0.0.weight".
    source: whose they are, one of LIBRARIES.
    target: the other one.

  Returns:
    The new name of each; empty if they are not all of such a net.
  """
  ours, theirs = _LIBRARIES[source], _LIBRARIES[target]
  parts = [(name, *name.rpartition(".")[::2]) for name in names]
  blocks: dict[tuple[int, int], set[str]] = {}
  for _, module, _ in parts:
    if match := ours.layer.fullmatch(module):
      blocks.setdefault((int(match[1]), int(match[2])), set()).add(match[3])
  if not blocks:
    return {}
  last = max(stage for stage, _ in blocks) - ours.first
  ends = {
    end.format(last + ours.first + 1): other.format(last + theirs.first + 1)
    for end, other in zip(ours.ends, theirs.ends, strict=True)
  }
  result = {}
  for name, module, kind in parts:
    new = ends.get(module)
    if match := ours.layer.fullmatch(module):
      stage, block, layer = int(match[1]), int(match[2]), match[3]
      layers = _layers(blocks[stage, block], source == "timm")
      if layer in layers:
        new = theirs.name.format(stage - ours.first + theirs.first, block, layers[layer])
    if new is None:
      return {}
    result[name] = f"{new}.{kind}"
  return result


def _layers(found: set[str], of_timm: bool) -> Mapping[str, str]:
  """Return what the layers of a block are called elsewhere; nothing if they are of no block."""
  for kind in _KINDS:
    layers = kind if of_timm else {theirs: ours for ours, theirs in kind.items()}
    if layers.keys() == found:
      return layers
  return {}
