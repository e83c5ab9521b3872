"""ConvNeXt: residual nets of depthwise 7x7 convolutions and MLPs (arXiv:2201.03545).

timm's and torchvision's weights fit one to one.

The residual stream has the dtype of the config; norms, and all that follows the last block, are
float32 at least.
"""

from collections.abc import Mapping
import math
from typing import Any, ClassVar, Self

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from configs.fields import Fields
from trainer.models import names, staged
from trainer.models.convnext_fields import CONVNEXT as FIELDS
from trainer.models.convnext_fields import VARIANTS
from trainer.models.layers import LayerScale, layer_norm, refuse_split, scaled
from trainer.models.names import BLOCK
from trainer.models.repeat import repeat

_SIZES = {"t": "tiny", "s": "small", "b": "base", "l": "large"}  # in names of timm
_NORMAL = nnx.initializers.normal(0.02)  # the source truncates it at 100 deviations
_THEIRS = "stages.{previous}.blocks.{block}"
_NAMES: names.Table = (
  (r"stem_conv", "stem.0"),
  (r"stem_norm", "stem.1"),
  (BLOCK + r"/halve_norm", "stages.{previous}.downsample.0"),
  (BLOCK + r"/halve_conv", "stages.{previous}.downsample.1"),
  (BLOCK + r"/depthwise_conv", _THEIRS + ".conv_dw"),
  (BLOCK + r"/norm", _THEIRS + ".norm"),
  (BLOCK + r"/mlp(?P<layer>\d)", _THEIRS + ".mlp.fc{layer}"),
  (BLOCK + r"/scale", _THEIRS),
  (r"head_norm", "head.norm"),
  (r"head", "head.fc"),
)
# timm's names, and torchvision's.
_LIBRARIES: names.Table = (
  ("stem.0.{end}", "features.0.0.{end}"),
  ("stem.1.{end}", "features.0.1.{end}"),
  *(
    (f"stages.{s}.downsample.{layer}.{{end}}", f"features.{2 * s}.{layer}.{{end}}")
    for s in (1, 2, 3)
    for layer in (0, 1)
  ),
  *(
    (f"stages.{s}.blocks.{{block}}.{timm}", f"features.{2 * s + 1}.{{block}}.{torchvision}")
    for s in range(4)
    for timm, torchvision in (
      ("conv_dw.{end}", "block.0.{end}"),
      ("norm.{end}", "block.2.{end}"),
      ("mlp.fc1.{end}", "block.3.{end}"),
      ("mlp.fc2.{end}", "block.5.{end}"),
      ("gamma", "layer_scale"),
    )
  ),
  ("head.norm.{end}", "classifier.0.{end}"),
  ("head.fc.{end}", "classifier.2.{end}"),
)


class Block(nnx.Module):
  """A depthwise 7x7 convolution and an MLP of each pixel, beside a shortcut.

  Args:
    inputs: channels that come in.
    outputs: channels that go out.
    halves: whether a norm and a 2x2 convolution with stride 2 come before both.
    fields: values of ConvNeXt.FIELDS.
    dtype: of activations.
    rngs: with the stream `params`.
  """

  def __init__(
    self,
    inputs: int,
    outputs: int,
    halves: bool,
    fields: Mapping[str, Any],
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ):
    wide, epsilon = jnp.promote_types(dtype, jnp.float32), fields["norm_epsilon"]
    options: dict[str, Any] = {"dtype": dtype, "param_dtype": wide, "rngs": rngs}
    options["kernel_init"] = _NORMAL
    self.dtype, self.halves, self.scales = dtype, halves, fields["layer_scale"] > 0
    if halves:
      self.halve_norm = layer_norm(inputs, epsilon, wide, rngs)
      self.halve_conv = nnx.Conv(inputs, outputs, (2, 2), strides=2, padding="VALID", **options)
    self.depthwise_conv = nnx.Conv(
      outputs, outputs, (7, 7), padding=3, feature_group_count=outputs, **options
    )
    self.norm = layer_norm(outputs, epsilon, wide, rngs)
    self.mlp1 = nnx.Linear(outputs, 4 * outputs, **options)
    self.mlp2 = nnx.Linear(4 * outputs, outputs, **options)
    if self.scales:
      self.scale = LayerScale(outputs, fields["layer_scale"], wide)

  def __call__(self, x: jax.Array, branch_scale: jax.Array | None = None) -> jax.Array:
    """Return [N, H, W, outputs], or half of the height and width, in the model's dtype.

    Args:
      x: [N, H, W, inputs].
      branch_scale: [N, 1, 1, 1], multiplies the branch: stochastic depth. None for 1.
    """
    if self.halves:
      x = self.halve_conv(self.halve_norm(x).astype(self.dtype))
    y = self.norm(self.depthwise_conv(x)).astype(self.dtype)
    y = self.mlp2(nnx.gelu(self.mlp1(y), approximate=False))
    if self.scales:
      y = self.scale(y)
    if branch_scale is not None:
      y = (y * branch_scale).astype(y.dtype)
    return x + y


class ConvNeXt(staged.Staged):
  """Patches, four stages of blocks, mean, norm, linear head; it shrinks images 32-fold."""

  FIELDS: ClassVar[Fields] = FIELDS
  TRIAL: ClassVar[Mapping[str, Any]] = {"patch": 2, "width": 0.125, "repeats": 0.3}

  @classmethod
  def describe(cls, fields: Mapping[str, Any]) -> str:
    """Return "ConvNeXt-T, width 0.5" and the like."""
    return cls.titled(f"ConvNeXt-{fields['variant'].upper()}", fields, "variant")

  @classmethod
  def torch_name(cls, leaf: str, fields: Mapping[str, Any]) -> str:
    """Return the name that timm uses; see Family."""
    del fields
    return names.torch_name(leaf, _NAMES)

  @classmethod
  def respell(cls, tensors: Mapping[str, np.ndarray], library: str) -> dict[str, np.ndarray]:
    """Return a state dict as torchvision has it, or timm; see Family."""
    new = names.respelt(tensors, _LIBRARIES, library)
    scales = {name for name in new if name.endswith(("gamma", "layer_scale"))}
    if not scales or len(new) < len(tensors):
      return {}
    ones = (1, 1) if library == "torchvision" else ()  # scales are [C, 1, 1] there
    return {
      new[name]: tensor.reshape(-1, *ones) if name in scales else tensor
      for name, tensor in tensors.items()
    }

  @classmethod
  def guess(cls, shapes: Mapping[str, tuple[int, ...]]) -> names.Looks | None:
    """Return "convnext_tiny" and the like; see Family."""
    if "stages.0.blocks.0.conv_dw.weight" not in shapes:
      return None
    blocks = names.count_blocks(r"stages\.(\d+)\.blocks\.(\d+)\.", shapes, first=0)
    channels = shapes.get("stem.0.weight", ())[:1]
    for variant, (numbers, base) in VARIANTS.items():
      if (numbers, (base,)) == (blocks, channels):
        return names.Looks(f"convnext_{_SIZES[variant]}")
    return names.Looks("a ConvNeXt")

  @classmethod
  def check_image(cls, fields: Mapping[str, Any], *, name: str, size: int, space: int) -> None:
    """Refuse to split images, and sizes that the strides do not divide; see Family."""
    refuse_split(name, size, space)
    patch = fields["patch"]
    if size % (8 * patch):
      raise ValueError(
        f"{name} has {size} pixels, which config.model.patch = {patch} and three halvings do not "
        f"divide; the nearest that fits is {max(1, round(size / 8 / patch)) * 8 * patch}."
      )

  @classmethod
  def build(
    cls,
    fields: Mapping[str, Any],
    *,
    num_classes: int,
    dtype: jax.typing.DTypeLike,
    image_size: int,
    shards: int,
    rngs: nnx.Rngs,
  ) -> Self:
    """Return a new model of any image size; see Family."""
    del image_size, shards
    return cls(fields, num_classes, jnp.dtype(dtype), rngs)

  def __init__(
    self,
    fields: Mapping[str, Any],
    num_classes: int,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ):
    """Build stem, blocks and head.

    Args:
      fields: values of FIELDS.
      num_classes: of the head.
      dtype: of activations.
      rngs: see Family.build.
    """
    blocks, base = VARIANTS[fields["variant"]]
    numbers = [math.ceil(number * fields["repeats"]) for number in blocks]
    channels = [scaled(base * 2**s, fields["width"]) for s in range(4)]
    wide, patch = jnp.promote_types(dtype, jnp.float32), fields["patch"]
    options: dict[str, Any] = {"kernel_init": _NORMAL, "param_dtype": wide, "rngs": rngs}
    self.dtype, inputs = dtype, channels[0]
    self.stem_conv = nnx.Conv(
      3, inputs, (patch, patch), strides=patch, padding="VALID", dtype=dtype, **options
    )
    self.stem_norm = layer_norm(inputs, fields["norm_epsilon"], wide, rngs)
    for s, (number, outputs) in enumerate(zip(numbers, channels, strict=True), 1):
      first = Block(inputs, outputs, s > 1, fields, dtype, rngs)
      inputs = outputs

      def another(rngs: nnx.Rngs, channels: int = outputs) -> Block:
        return Block(channels, channels, False, fields, dtype, rngs)

      others = repeat(another, number - 1, rngs, loop=fields["scan"])
      for b, block in enumerate([first, *others], 1):
        setattr(self, f"stage{s}_block{b}", block)
    self.head_norm = layer_norm(inputs, fields["norm_epsilon"], wide, rngs)
    self.head = nnx.Linear(
      inputs,
      num_classes,
      bias_init=nnx.initializers.constant(fields["head_bias_init"]),
      dtype=wide,
      **options,
    )
    rates = staged.rates_by_block(fields["drop_path"], sum(numbers), last=True)
    self._keep_stages(fields, numbers, rates, rngs)

  def features(self, x: jax.Array) -> dict[str, jax.Array]:
    """Return the outputs of the stem and of each stage: "stem", "stage1", "stage2", ...

    Args:
      x: normalised images, floating point [N, H, W, 3].

    Returns:
      Feature maps [N, h, w, C] in the model's dtype.
    """
    x = self.stem_norm(self.stem_conv(x.astype(self.dtype))).astype(self.dtype)
    return {"stem": x} | self._run_stages(x, self._draw_paths())

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return float32 logits [N, num_classes].

    Args:
      x: normalised images, floating point [N, H, W, 3]. Pixels beyond the last whole patch are left
        out, as in timm and torchvision.
    """
    x = self.features(x)[f"stage{len(self.numbers)}"]
    x = self.head_norm(jnp.mean(x, axis=(1, 2), dtype=self.head.dtype))
    return self.head(self.dropout(x) if self.drops else x)
