"""EfficientNet B0 to B8 and EfficientNetV2: inverted bottlenecks with squeeze-and-excitation.

Sources: Tan and Le, arXiv:1905.11946 (blocks of MobileNetV2 and MnasNet, arXiv:1801.04381 and
1807.11626, scaled in width, depth and image size) and arXiv:2104.00298 (the first stages have
fused blocks: one dense kxk convolution for the first 1x1 and the depthwise one).

TensorFlow's nets and torch's have the same leaves and other numbers. `padding` is "same", which
under stride 2 pads an even size more at its end, or "torch", half of the kernel on all sides; the
epsilon of batch norm is 1e-3 in TensorFlow's and in torchvision's from B5 on, else 1e-5.
"""

from collections.abc import Mapping
import functools
import math
from typing import Any, ClassVar, NamedTuple, Self

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from configs.fields import Fields
from trainer.models import efficientnet_names, names, norm, staged
from trainer.models.convolution import for_conv
from trainer.models.efficientnet_fields import EFFICIENTNET as FIELDS
from trainer.models.layers import Layers, refuse_split


class Stage(NamedTuple):
  """Equal blocks but for the first, which has the stride and takes other channels.

  Attributes:
    blocks: number of them, before the depth of the variant.
    kernel: of the spatial convolution.
    stride: of the first block.
    expand: channels of the spatial convolution over those that come in.
    channels: that come out, before the width of the variant.
    fused: whether the spatial convolution is dense, and there is no squeeze-and-excitation.
  """

  blocks: int
  kernel: int
  stride: int
  expand: int
  channels: int
  fused: bool = False


class Variant(NamedTuple):
  """A published net.

  Attributes:
    stages: before scaling.
    stem: channels of the first convolution, before scaling.
    width: multiplies all channels.
    depth: multiplies the blocks of a stage, rounded up.
    nine_tenths: whether channels that rounding makes less than 0.9 of their number get 8 more.
  """

  stages: tuple[Stage, ...]
  stem: int
  width: float = 1.0
  depth: float = 1.0
  nine_tenths: bool = True

  def numbers(self, times: float = 1.0) -> tuple[int, ...]:
    """Return the blocks of each stage of a net of `times` this depth."""
    return tuple(math.ceil(stage.blocks * (self.depth * times)) for stage in self.stages)

  def scaled(self, channels: int, times: float = 1.0) -> int:
    """Return the channels of a net of `times` this width, a multiple of 8."""
    wanted = channels * (self.width * times)
    result = max(8, int(wanted + 4) // 8 * 8)
    return result + 8 if self.nine_tenths and result < 0.9 * wanted else result


_V1 = (
  Stage(1, 3, 1, 1, 16),
  Stage(2, 3, 2, 6, 24),
  Stage(2, 5, 2, 6, 40),
  Stage(3, 3, 2, 6, 80),
  Stage(3, 5, 1, 6, 112),
  Stage(4, 5, 2, 6, 192),
  Stage(1, 3, 1, 6, 320),
)
_V2_BASE = (
  Stage(1, 3, 1, 1, 16, fused=True),
  Stage(2, 3, 2, 4, 32, fused=True),
  Stage(2, 3, 2, 4, 48, fused=True),
  Stage(3, 3, 2, 4, 96),
  Stage(5, 3, 1, 6, 112),
  Stage(8, 3, 2, 6, 192),
)


def _v2(*stages: tuple[int, int, int]) -> tuple[Stage, ...]:
  """Return the stages of V2 by (blocks, expand, channels); the 1st, 5th and 7th do not stride."""
  return tuple(
    Stage(blocks, 3, 1 if s in (0, 4, 6) else 2, expand, channels, fused=s < 3)
    for s, (blocks, expand, channels) in enumerate(stages)
  )


VARIANTS: Mapping[str, Variant] = {
  "b0": Variant(_V1, 32),
  "b1": Variant(_V1, 32, 1.0, 1.1),
  "b2": Variant(_V1, 32, 1.1, 1.2),
  "b3": Variant(_V1, 32, 1.2, 1.4),
  "b4": Variant(_V1, 32, 1.4, 1.8),
  "b5": Variant(_V1, 32, 1.6, 2.2),
  "b6": Variant(_V1, 32, 1.8, 2.6),
  "b7": Variant(_V1, 32, 2.0, 3.1),
  "b8": Variant(_V1, 32, 2.2, 3.6),
  "v2_b0": Variant(_V2_BASE, 32, nine_tenths=False),
  "v2_b1": Variant(_V2_BASE, 32, 1.0, 1.1, nine_tenths=False),
  "v2_b2": Variant(_V2_BASE, 32, 1.1, 1.2, nine_tenths=False),
  "v2_b3": Variant(_V2_BASE, 32, 1.2, 1.4, nine_tenths=False),
  "v2_s": Variant(
    _v2((2, 1, 24), (4, 4, 48), (4, 4, 64), (6, 4, 128), (9, 6, 160), (15, 6, 256)), 24
  ),
  "v2_m": Variant(
    _v2((3, 1, 24), (5, 4, 48), (5, 4, 80), (7, 4, 160), (14, 6, 176), (18, 6, 304), (5, 6, 512)),
    24,
  ),
  "v2_l": Variant(
    _v2((4, 1, 32), (7, 4, 64), (7, 4, 96), (10, 4, 192), (19, 6, 224), (25, 6, 384), (7, 6, 640)),
    32,
  ),
}
_HEAD = 1280  # channels of the last convolution, before scaling


class _Layers(Layers):
  """Convolutions with TensorFlow's padding or torch's, and the first weights of the sources."""

  def __init__(self, padding: str, *args: Any, **options: Any):
    super().__init__(*args, **options)
    self.padding = padding

  def conv(
    self,
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int = 1,
    *,
    groups: int = 1,
    last_of_branch: bool = False,
  ) -> nnx.Conv:
    """Return a square convolution without bias, whose gradients keep their variance at first."""
    del last_of_branch
    fan_out = kernel * kernel * outputs / groups
    return nnx.Conv(
      inputs,
      outputs,
      (kernel, kernel),
      strides=stride,
      padding="SAME" if self.padding == "same" else kernel // 2,
      # Depthwise, the matrix unit of a TPU has nothing to do.
      feature_group_count=groups,
      conv_general_dilated=for_conv if groups > 1 else jax.lax.conv_general_dilated,
      use_bias=False,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      rngs=self.rngs,
      kernel_init=nnx.initializers.normal(math.sqrt(2 / fan_out)),
    )


class Block(nnx.Module):
  """An inverted bottleneck (MBConv), or a fused one, with a shortcut where the shape stays.

  Leaves: expand_conv, expand_bn (unless `expand` is 1), depthwise_conv, depthwise_bn, se_reduce,
  se_expand, project_conv, project_bn; a fused one has expand_* and project_*, and only project_*,
  which then has the kxk convolution and an activation behind it, if `expand` is 1.

  Args:
    stage: of the block; `blocks` and `channels` are not read.
    inputs: channels that come in.
    outputs: channels that go out.
    stride: of the spatial convolution.
    squeezed: channels inside squeeze-and-excitation, 0 for none.
    layers: maker of convolutions and norms.
  """

  def __init__(
    self, stage: Stage, inputs: int, outputs: int, stride: int, squeezed: int, layers: Layers
  ):
    inner = inputs * stage.expand
    self.activation = layers.activation
    self.skips = stride == 1 and inputs == outputs
    self.expands, self.fused, self.squeezes = stage.expand > 1, stage.fused, squeezed > 0
    kernel, spatial = (stage.kernel, stride) if stage.fused else (1, 1)
    if self.expands:
      self.expand_conv = layers.conv(inputs, inner, kernel, spatial)
      self.expand_bn = layers.norm(inner)
    if not stage.fused:
      self.depthwise_conv = layers.conv(inner, inner, stage.kernel, stride, groups=inner)
      self.depthwise_bn = layers.norm(inner)
    if self.squeezes:
      self.se_reduce = layers.linear(inner, squeezed)
      self.se_expand = layers.linear(squeezed, inner)
    last = (1, 1) if self.expands else (kernel, spatial)
    self.project_conv = layers.conv(inner, outputs, *last)
    self.project_bn = layers.norm(outputs)

  def __call__(self, x: jax.Array, branch_scale: jax.Array | None = None) -> jax.Array:
    """Return [N, H/stride, W/stride, outputs], in the model's dtype.

    Args:
      x: [N, H, W, inputs].
      branch_scale: [N, 1, 1, 1], multiplies the branch where there is a shortcut; None for 1.
    """
    y = x
    if self.expands:
      y = self.activation(self.expand_bn(self.expand_conv(y)))
    if not self.fused:
      y = self.activation(self.depthwise_bn(self.depthwise_conv(y)))
    if self.squeezes:
      mean = jnp.mean(y, axis=(1, 2), dtype=self.se_reduce.dtype)
      gate = nnx.sigmoid(self.se_expand(self.activation(self.se_reduce(mean))))
      y = (y * gate[:, None, None]).astype(y.dtype)
    y = self.project_bn(self.project_conv(y))
    if self.fused and not self.expands:
      y = self.activation(y)
    if not self.skips:
      return y
    if branch_scale is not None:
      y = (y * branch_scale).astype(y.dtype)
    return x + y


class EfficientNet(staged.Staged):
  """EfficientNet and EfficientNetV2, by `variant`; they shrink images 32-fold."""

  FIELDS: ClassVar[Fields] = FIELDS
  TRIAL: ClassVar[Mapping[str, Any]] = {"variant": "b0", "width": 0.25, "repeats": 0.3}
  CONVOLUTIONS = r".*\.se\.conv_(reduce|expand)\.weight"

  @classmethod
  def describe(cls, fields: Mapping[str, Any]) -> str:
    """Return "EfficientNet-B0, padding torch" and the like."""
    version, _, size = fields["variant"].rpartition("_")
    return cls.titled(f"EfficientNet{version.upper()}-{size.upper()}", fields, "variant")

  @classmethod
  def torch_name(cls, leaf: str, fields: Mapping[str, Any]) -> str:
    """Return the name that timm uses; see Family."""
    variant = VARIANTS[fields["variant"]]
    return efficientnet_names.torch_name(
      leaf, [(stage.fused, stage.expand > 1) for stage in variant.stages]
    )

  @classmethod
  def respell(cls, tensors: Mapping[str, np.ndarray], library: str) -> dict[str, np.ndarray]:
    """Return a state dict as torchvision has it, or timm; see Family."""
    new = efficientnet_names.respelt(tensors, library)
    return {new[name]: tensor for name, tensor in tensors.items()} if new else {}

  @classmethod
  def guess(cls, shapes: Mapping[str, tuple[int, ...]]) -> names.Looks | None:
    """Return "efficientnetv2_s" and the like; see Family."""
    if "conv_stem.weight" not in shapes:
      return None
    blocks = names.count_blocks(r"blocks\.(\d+)\.(\d+)\.", shapes, first=0)
    last = shapes.get("conv_head.weight", ())[:1]
    for name, variant in VARIANTS.items():
      if (variant.numbers(), (variant.scaled(_HEAD),)) == (blocks, last):
        version, _, size = name.rpartition("_")
        return names.Looks(f"efficientnet{version}_{size}")
    return names.Looks("an EfficientNet")

  @classmethod
  def check_image(cls, fields: Mapping[str, Any], *, name: str, size: int, space: int) -> None:
    """Refuse to split images; see Family."""
    del fields
    refuse_split(name, size, space)

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
    del image_size
    layers = _Layers(
      fields["padding"],
      dtype,
      False,
      rngs,
      activation=fields["activation"],
      **norm.options(fields, shards),
    )
    return cls(fields, num_classes, layers)

  def __init__(self, fields: Mapping[str, Any], num_classes: int, layers: Layers):
    """Build stem, blocks and head.

    Args:
      fields: values of FIELDS.
      num_classes: of the head.
      layers: maker of convolutions and norms.
    """
    variant = VARIANTS[fields["variant"]]
    scaled = functools.partial(variant.scaled, times=fields["width"])
    self.dtype, self.activation = layers.dtype, layers.activation
    self.stem_conv = layers.conv(3, scaled(variant.stem), 3, 2)
    self.stem_bn = layers.norm(scaled(variant.stem))
    numbers = variant.numbers(fields["repeats"])
    inputs = scaled(variant.stem)
    for s, (stage, number) in enumerate(zip(variant.stages, numbers, strict=True), 1):
      outputs = scaled(stage.channels)
      for b in range(1, number + 1):
        stride = stage.stride if b == 1 else 1
        squeezes = fields["se_ratio"] > 0 and not stage.fused
        squeezed = max(1, int(inputs * fields["se_ratio"])) if squeezes else 0
        setattr(self, f"stage{s}_block{b}", Block(stage, inputs, outputs, stride, squeezed, layers))
        inputs = outputs
    self.head_conv = layers.conv(inputs, scaled(_HEAD), 1)
    self.head_bn = layers.norm(scaled(_HEAD))
    self.head = layers.linear(
      scaled(_HEAD),
      num_classes,
      kernel_init=nnx.initializers.variance_scaling(1 / 3, "fan_out", "uniform"),
      bias_init=nnx.initializers.constant(fields["head_bias_init"]),
    )
    rates = staged.rates_by_block(fields["drop_path"], sum(numbers), last=False)
    self._keep_stages(fields, numbers, rates, layers.rngs)

  def features(self, x: jax.Array) -> dict[str, jax.Array]:
    """Return the outputs of the stem and of each stage: "stem", "stage1", "stage2", ...

    Args:
      x: normalised images, floating point [N, H, W, 3].

    Returns:
      Feature maps [N, h, w, C] in the model's dtype.
    """
    x = self.activation(self.stem_bn(self.stem_conv(x.astype(self.dtype))))
    return {"stem": x} | self._run_stages(x, self._draw_paths())

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return float32 logits [N, num_classes].

    Args:
      x: normalised images, floating point [N, H, W, 3], of any height and width.
    """
    x = self.features(x)[f"stage{len(self.numbers)}"]
    return self._classify(self.activation(self.head_bn(self.head_conv(x))))
