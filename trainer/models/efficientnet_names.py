"""Names of EfficientNets in state dicts: timm names layers, torchvision counts them."""

from collections.abc import Iterable, Mapping, Sequence
import re
from typing import NamedTuple

from trainer.models.names import BLOCK, KINDS


class _Layer(NamedTuple):
  """What a layer of a block is called: here, by timm, by torchvision."""

  own: str
  timm: str
  torchvision: str


# Layers outside of blocks: ours, timm's.
_ENDS = {
  "stem_conv": "conv_stem",
  "stem_bn": "bn1",
  "head_conv": "conv_head",
  "head_bn": "bn2",
  "head": "classifier",
}
# By (fused, expands).
_BLOCKS: Mapping[tuple[bool, bool], tuple[_Layer, ...]] = {
  (False, True): (
    _Layer("expand_conv", "conv_pw", "0.0"),
    _Layer("expand_bn", "bn1", "0.1"),
    _Layer("depthwise_conv", "conv_dw", "1.0"),
    _Layer("depthwise_bn", "bn2", "1.1"),
    _Layer("se_reduce", "se.conv_reduce", "2.fc1"),
    _Layer("se_expand", "se.conv_expand", "2.fc2"),
    _Layer("project_conv", "conv_pwl", "3.0"),
    _Layer("project_bn", "bn3", "3.1"),
  ),
  (False, False): (
    _Layer("depthwise_conv", "conv_dw", "0.0"),
    _Layer("depthwise_bn", "bn1", "0.1"),
    _Layer("se_reduce", "se.conv_reduce", "1.fc1"),
    _Layer("se_expand", "se.conv_expand", "1.fc2"),
    _Layer("project_conv", "conv_pw", "2.0"),
    _Layer("project_bn", "bn2", "2.1"),
  ),
  (True, True): (
    _Layer("expand_conv", "conv_exp", "0.0"),
    _Layer("expand_bn", "bn1", "0.1"),
    _Layer("project_conv", "conv_pwl", "1.0"),
    _Layer("project_bn", "bn2", "1.1"),
  ),
  (True, False): (
    _Layer("project_conv", "conv", "0.0"),
    _Layer("project_bn", "bn1", "0.1"),
  ),
}


def torch_name(leaf: str, stages: Sequence[tuple[bool, bool]]) -> str:
  """Return timm's name of a leaf of an EfficientNet: head_bn/mean, bn2.running_mean.

  Args:
    leaf: path in params or batch_stats.
    stages: whether the blocks of each are fused, and whether they expand.
  """
  module, _, kind = leaf.rpartition("/")
  end = KINDS.get(kind, kind)
  if match := re.fullmatch(BLOCK + r"/(?P<layer>\w+)", module):
    stage, block = int(match["stage"]) - 1, int(match["block"]) - 1
    layer = next(row for row in _BLOCKS[stages[stage]] if row.own == match["layer"])
    return f"blocks.{stage}.{block}.{layer.timm}.{end}"
  return f"{_ENDS[module]}.{end}"


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


def respelt(names: Iterable[str], library: str) -> dict[str, str]:
  """Return the names of an EfficientNet's tensors as a library has them.

  Args:
    names: the other one's, such as "features.0.0.weight".
    library: "timm" or "torchvision".

  Returns:
    The new name of each; empty if they are not all of such a net.
  """
  of_timm = library == "torchvision"
  ours, theirs = _LIBRARIES["timm" if of_timm else "torchvision"], _LIBRARIES[library]
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
      layers = _layers(blocks[stage, block], of_timm)
      if layer in layers:
        new = theirs.name.format(stage - ours.first + theirs.first, block, layers[layer])
    if new is None:
      return {}
    result[name] = f"{new}.{kind}"
  return result


def _layers(found: set[str], of_timm: bool) -> Mapping[str, str]:
  """Return what the layers of a block are called elsewhere; nothing if they are of no block."""
  for rows in _BLOCKS.values():
    pairs = {row.timm: row.torchvision for row in rows}
    layers = pairs if of_timm else {theirs: ours for ours, theirs in pairs.items()}
    if layers.keys() == found:
      return layers
  return {}
