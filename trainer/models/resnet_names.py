"""Names of residual nets in state dicts, and what theirs look like."""

from collections.abc import Mapping
from typing import Any

from trainer.models import names
from trainer.models.names import BLOCK

_RESNET: names.Table = (
  (r"stem_conv", "conv1"),
  (r"stem_bn|stem_bn3", "bn1"),
  (r"stem_conv1", "conv1.0"),
  (r"stem_bn1", "conv1.1"),
  (r"stem_conv2", "conv1.3"),
  (r"stem_bn2", "conv1.4"),
  (r"stem_conv3", "conv1.6"),
  (r"stem_pool_conv", "maxpool.0"),
  (r"stem_pool_bn", "maxpool.1"),
  (BLOCK + r"/projection_conv", "layer{stage}.{block}.downsample.{projection}"),
  (BLOCK + r"/projection_bn", "layer{stage}.{block}.downsample.{projection_bn}"),
  (BLOCK + r"/se_reduce", "layer{stage}.{block}.se.fc1"),
  (BLOCK + r"/se_expand", "layer{stage}.{block}.se.fc2"),
  (BLOCK + r"/(?P<layer>\w+)", "layer{stage}.{block}.{layer}"),
  (r"head", "fc"),
)
# timm's ResNetV2, for nets with model.preact.
_RESNET_V2: names.Table = (
  (r"stem_conv", "stem.conv"),
  (r"stem_conv(?P<layer>\d)", "stem.conv{layer}"),
  (r"stem_bn(?P<layer>\d)", "stem.norm{layer}"),
  (BLOCK + r"/projection_conv", "stages.{previous}.blocks.{block}.downsample.conv"),
  (BLOCK + r"/bn(?P<layer>\d)", "stages.{previous}.blocks.{block}.norm{layer}"),
  (BLOCK + r"/(?P<layer>\w+)", "stages.{previous}.blocks.{block}.{layer}"),
  (r"final_bn", "norm"),
  (r"head", "head.fc"),
)


def torch_name(leaf: str, fields: Mapping[str, Any]) -> str:
  """Return the name of a leaf of a residual net: stage3_block1/conv2/kernel, layer3.0.conv2.weight.

  Args:
    leaf: path in params or batch_stats.
    fields: of the family.
  """
  # timm numbers the parts of a shortcut: with a pool, which is an identity without stride, the
  # convolution is the second.
  pools = int(fields.get("shortcut") == "pool")
  table = _RESNET_V2 if fields.get("preact") else _RESNET
  return names.torch_name(leaf, table, projection=pools, projection_bn=pools + 1)


def guess(
  shapes: Mapping[str, tuple[int, ...]], depths: Mapping[tuple[tuple[int, ...], bool], int]
) -> names.Looks | None:
  """Return which residual net a state dict is of; see Family.guess.

  Args:
    shapes: of its tensors.
    depths: by the blocks of each stage, and whether they are bottlenecks.
  """
  v2 = names.count_blocks(r"stages\.(\d+)\.blocks\.(\d+)\.", shapes, first=0)
  blocks = v2 or names.count_blocks(r"layer(\d+)\.(\d+)\.", shapes, first=1)
  start = "stages.0.blocks.0" if v2 else "layer1.0"
  inner = shapes.get(f"{start}.conv2.weight", ())
  if not blocks or len(inner) != 4:
    return None
  bottleneck = f"{start}.conv3.weight" in shapes
  if len(blocks) == 3:
    depth = (3 if bottleneck else 2) * sum(blocks) + 2
    option = "B" if any("downsample" in name for name in shapes) else "A"
    return names.Looks(f"a CIFAR ResNet-{depth} with option {option}", depth)
  known = depths.get((blocks, bottleneck))
  if known is None:
    kind = "bottlenecks" if bottleneck else "basic blocks"
    return names.Looks(f"a ResNet of {', '.join(map(str, blocks))} {kind}")
  return names.Looks(_variant(known, shapes, inner, bottleneck, start), known)


def _variant(
  depth: int,
  shapes: Mapping[str, tuple[int, ...]],
  inner: tuple[int, ...],
  bottleneck: bool,
  start: str,
) -> str:
  """Return the name of a net of known depth; `inner` is the shape of its first 3x3 kernel."""
  se = "se" if f"{start}.se.fc1.weight" in shapes else ""
  deep = "conv1.0.weight" in shapes or "stem.conv1.weight" in shapes
  groups = inner[0] // max(inner[1], 1)
  if start.startswith("stages"):
    name = f"resnetv2_{depth}{'d' if deep else ''}"
    return name if "norm.running_mean" in shapes else f"{name} without batch norm"
  if bottleneck and groups > 1:
    return f"{se}resnext{depth}{'d' if deep else ''}_{groups}x{inner[1]}d"
  if bottleneck and inner[0] == 128:
    return f"wide_resnet{depth}_2"
  plain = f"resnetrs{depth}" if se and deep else f"{se}resnet{depth}{'d' if deep else ''}"
  return plain if inner[0] == 64 else f"{plain} of width {inner[0] / 64:g}"
