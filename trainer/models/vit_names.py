"""Names of Vision Transformers in state dicts, and what theirs look like."""

from collections.abc import Mapping
import math
from typing import Any

import numpy as np

from trainer.models import names

# timm's VisionTransformer.
_BLOCK = r"block(?P<block>\d+)"
_TABLE: names.Table = (
  (r"patch_embed", "patch_embed.proj"),
  (_BLOCK + r"/qkv", "blocks.{block}.attn.qkv"),
  (_BLOCK + r"/projection", "blocks.{block}.attn.proj"),
  (_BLOCK + r"/mlp(?P<layer>\d)", "blocks.{block}.mlp.fc{layer}"),
  (_BLOCK + r"/scale(?P<layer>\d)", "blocks.{block}.ls{layer}"),
  (_BLOCK + r"/(?P<layer>\w+)", "blocks.{block}.{layer}"),
  (r"pre_logits", "pre_logits.fc"),
  (r"norm", "{norm}"),
  (r"head", "head"),
)
_LEAVES = {"class_token": "cls_token", "positions": "pos_embed"}
# timm's names, and torchvision's.
_IN_BLOCKS = "encoder.layers.encoder_layer_{block}"
_LIBRARIES: names.Table = (
  ("cls_token", "class_token"),
  ("pos_embed", "encoder.pos_embedding"),
  ("patch_embed.proj.{end}", "conv_proj.{end}"),
  ("blocks.{block}.norm1.{end}", f"{_IN_BLOCKS}.ln_1.{{end}}"),
  ("blocks.{block}.norm2.{end}", f"{_IN_BLOCKS}.ln_2.{{end}}"),
  ("blocks.{block}.attn.qkv.{end}", f"{_IN_BLOCKS}.self_attention.in_proj_{{end}}"),
  ("blocks.{block}.attn.proj.{end}", f"{_IN_BLOCKS}.self_attention.out_proj.{{end}}"),
  ("blocks.{block}.mlp.fc1.{end}", f"{_IN_BLOCKS}.mlp.0.{{end}}"),
  ("blocks.{block}.mlp.fc2.{end}", f"{_IN_BLOCKS}.mlp.3.{{end}}"),
  ("norm.{end}", "encoder.ln.{end}"),
  ("pre_logits.fc.{end}", "heads.pre_logits.{end}"),
  ("head.{end}", "heads.head.{end}"),
)
# Width of a token: size in timm's names.
_SIZES = {
  192: "tiny",
  384: "small",
  512: "medium",
  768: "base",
  1024: "large",
  1280: "huge",
}


def torch_name(leaf: str, fields: Mapping[str, Any]) -> str:
  """Return the name of a leaf of a Vision Transformer: block1/qkv/bias, blocks.0.attn.qkv.bias.

  Args:
    leaf: path in params.
    fields: of the family.
  """
  norm = "fc_norm" if fields.get("pool_first") else "norm"
  return _LEAVES.get(leaf) or names.torch_name(leaf, _TABLE, norm=norm)


def respell(tensors: Mapping[str, np.ndarray], library: str) -> dict[str, np.ndarray]:
  """Return a state dict as another library has it; see Family.respell."""
  new = names.respelt(tensors, _LIBRARIES, library)
  if not new or (library == "torchvision" and len(new) < len(tensors)):
    return {}
  return {new.get(name, name): tensor for name, tensor in tensors.items()}


def guess(shapes: Mapping[str, tuple[int, ...]]) -> names.Looks | None:
  """Return which Vision Transformer a state dict is of; see Family.guess."""
  kernel, positions = shapes.get("patch_embed.proj.weight"), shapes.get("pos_embed", ())
  if kernel is None:
    return None
  if len(kernel) != 4 or kernel[0] not in _SIZES:
    return names.Looks("a Vision Transformer")
  name = f"vit_{_SIZES[kernel[0]]}_patch{kernel[2]}"
  if len(positions) == 3:
    name += f"_{math.isqrt(positions[1]) * kernel[2]}"
  return names.Looks(name)
