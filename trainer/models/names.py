"""Names of leaves in the state dicts of torchvision and timm, a table for each family.

A family returns them from `torch_name`. How a leaf lies follows from the two shapes: a kernel is
[height, width, in, out] here and [out, in, height, width] there, a matrix [in, out] here and
[out, in] there, or [out, in, 1, 1] where timm has a 1x1 convolution (squeeze-and-excitation, and
the head of pre-activation nets).
"""

from collections.abc import Mapping, Sequence
import re
from typing import Any

# The last part of a leaf's path: ours, theirs.
_KINDS = {
  "skip_gain": "skipinit_gain",
  "kernel": "weight",
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}
# Modules of the residual nets: ours as a regular expression of the path, theirs. We count blocks
# from 1, they do from 0: see _BLOCK.
_BLOCK = r"stage(?P<stage>\d+)_block(?P<block>\d+)"
RESNET: tuple[tuple[str, str], ...] = (
  (r"stem_conv", "conv1"),
  (r"stem_bn|stem_bn3", "bn1"),
  (r"stem_conv1", "conv1.0"),
  (r"stem_bn1", "conv1.1"),
  (r"stem_conv2", "conv1.3"),
  (r"stem_bn2", "conv1.4"),
  (r"stem_conv3", "conv1.6"),
  (r"stem_pool_conv", "maxpool.0"),
  (r"stem_pool_bn", "maxpool.1"),
  (_BLOCK + r"/projection_conv", "layer{stage}.{block}.downsample.{projection}"),
  (_BLOCK + r"/projection_bn", "layer{stage}.{block}.downsample.{projection_bn}"),
  (_BLOCK + r"/se_reduce", "layer{stage}.{block}.se.fc1"),
  (_BLOCK + r"/se_expand", "layer{stage}.{block}.se.fc2"),
  (_BLOCK + r"/(?P<layer>\w+)", "layer{stage}.{block}.{layer}"),
  (r"head", "fc"),
)
# timm's ResNetV2, for nets with model.preact.
RESNET_V2: tuple[tuple[str, str], ...] = (
  (r"stem_conv", "stem.conv"),
  (r"stem_conv(?P<layer>\d)", "stem.conv{layer}"),
  (r"stem_bn(?P<layer>\d)", "stem.norm{layer}"),
  (_BLOCK + r"/projection_conv", "stages.{previous}.blocks.{block}.downsample.conv"),
  (_BLOCK + r"/bn(?P<layer>\d)", "stages.{previous}.blocks.{block}.norm{layer}"),
  (_BLOCK + r"/(?P<layer>\w+)", "stages.{previous}.blocks.{block}.{layer}"),
  (r"final_bn", "norm"),
  (r"head", "head.fc"),
)
# timm's VisionTransformer, where its modules have other names than ours.
_VIT_BLOCK = r"block(?P<block>\d+)"
VIT: tuple[tuple[str, str], ...] = (
  (r"patch_embed", "patch_embed.proj"),
  (_VIT_BLOCK + r"/qkv", "blocks.{block}.attn.qkv"),
  (_VIT_BLOCK + r"/projection", "blocks.{block}.attn.proj"),
  (_VIT_BLOCK + r"/mlp(?P<layer>\d)", "blocks.{block}.mlp.fc{layer}"),
  (_VIT_BLOCK + r"/scale(?P<layer>\d)", "blocks.{block}.ls{layer}"),
  (_VIT_BLOCK + r"/(?P<layer>\w+)", "blocks.{block}.{layer}"),
  (r"pre_logits", "pre_logits.fc"),
)
_VIT_LEAVES = {"class_token": "cls_token", "positions": "pos_embed"}


def vit_name(leaf: str, fields: Mapping[str, Any]) -> str:
  """Return the name of a leaf of a Vision Transformer: block1/qkv/bias, blocks.0.attn.qkv.bias.

  Args:
    leaf: path in params.
    fields: of the family.
  """
  if leaf in _VIT_LEAVES:
    return _VIT_LEAVES[leaf]
  module, _, kind = leaf.rpartition("/")
  name = module
  for ours, theirs in VIT:
    if match := re.fullmatch(ours, module):
      parts = match.groupdict()
      if "block" in parts:
        parts["block"] = int(parts["block"]) - 1
      name = theirs.format(**parts)
      break
  if name == "norm" and fields["pool_first"]:
    name = "fc_norm"
  return f"{name}.{_KINDS.get(kind, kind)}"


# timm's EfficientNet; its blocks of each kind name their layers in their own way.
_EFFICIENTNET = {
  "stem_conv": "conv_stem",
  "stem_bn": "bn1",
  "head_conv": "conv_head",
  "head_bn": "bn2",
  "head": "classifier",
}
# (fused, expands): ours, theirs.
_INVERTED: Mapping[tuple[bool, bool], dict[str, str]] = {
  (False, True): {
    "expand_conv": "conv_pw",
    "expand_bn": "bn1",
    "depthwise_conv": "conv_dw",
    "depthwise_bn": "bn2",
    "project_conv": "conv_pwl",
    "project_bn": "bn3",
  },
  (False, False): {
    "depthwise_conv": "conv_dw",
    "depthwise_bn": "bn1",
    "project_conv": "conv_pw",
    "project_bn": "bn2",
  },
  (True, True): {
    "expand_conv": "conv_exp",
    "expand_bn": "bn1",
    "project_conv": "conv_pwl",
    "project_bn": "bn2",
  },
  (True, False): {"project_conv": "conv", "project_bn": "bn1"},
}
_EXCITE = {"se_reduce": "se.conv_reduce", "se_expand": "se.conv_expand"}


def efficientnet_name(leaf: str, stages: Sequence[tuple[bool, bool]]) -> str:
  """Return timm's name of a leaf of an EfficientNet: head_bn/mean, bn2.running_mean.

  Args:
    leaf: path in params or batch_stats.
    stages: whether the blocks of each are fused, and whether they expand.
  """
  module, _, kind = leaf.rpartition("/")
  end = _KINDS.get(kind, kind)
  if match := re.fullmatch(_BLOCK + r"/(?P<layer>\w+)", module):
    stage, block = int(match["stage"]) - 1, int(match["block"]) - 1
    layer = (_INVERTED[stages[stage]] | _EXCITE)[match["layer"]]
    return f"blocks.{stage}.{block}.{layer}.{end}"
  return f"{_EFFICIENTNET[module]}.{end}"


# timm's NormFreeNet.
_NFNET: tuple[tuple[str, str], ...] = (
  (r"stem_conv(?P<layer>\d?)", "stem.conv{layer}"),
  (_BLOCK, "stages.{previous}.{block}"),
  (_BLOCK + r"/projection_conv", "stages.{previous}.{block}.downsample.conv"),
  (_BLOCK + r"/se_reduce", "stages.{previous}.{block}.attn_last.fc1"),
  (_BLOCK + r"/se_expand", "stages.{previous}.{block}.attn_last.fc2"),
  (_BLOCK + r"/(?P<layer>\w+)", "stages.{previous}.{block}.{layer}"),
  (r"final_conv", "final_conv"),
  (r"head", "head.fc"),
)


def nfnet_name(leaf: str) -> str:
  """Return timm's name of a leaf of a net without normalisation: head/kernel, head.fc.weight.

  Args:
    leaf: path in params.
  """
  return _by_table(leaf, _NFNET)


def resnet_name(leaf: str, fields: Mapping[str, Any]) -> str:
  """Return the name of a leaf of a residual net: stage3_block1/conv2/kernel, layer3.0.conv2.weight.

  Args:
    leaf: path in params or batch_stats.
    fields: of the family.
  """
  # timm numbers the parts of a shortcut: with a pool, which is an identity without stride, the
  # convolution is the second.
  pools = int(fields.get("shortcut") == "pool")
  table = RESNET_V2 if fields.get("preact") else RESNET
  return _by_table(leaf, table, projection=pools, projection_bn=pools + 1)


def _by_table(leaf: str, table: Sequence[tuple[str, str]], **more: int) -> str:
  """Return the name by the first row that matches the module of a leaf.

  Args:
    leaf: its path.
    table: our module as a regular expression, their module with its groups.
    more: what their modules may have besides.
  """
  module, _, kind = leaf.rpartition("/")
  for ours, theirs in table:
    if match := re.fullmatch(ours, module):
      parts: dict[str, Any] = match.groupdict() | more
      if "block" in parts:
        parts |= {"block": int(parts["block"]) - 1, "previous": int(parts["stage"]) - 1}
      return f"{theirs.format(**parts)}.{_KINDS.get(kind, kind)}"
  return leaf.replace("/", ".")
