"""Residual nets: ResNet with its variants, ResNet-RS, and the three-stage nets for CIFAR.

Source: He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385, with two later
conventions: a bottleneck strides in its 3x3 convolution instead of the first 1x1 ("v1.5"), and the
last batch-norm scale of each residual branch may start at zero (Goyal et al., arXiv:1706.02677,
section 5.1). Every variant is a field, see resnet_fields.py; trainer/README.md lists the nets that
they make. torchvision's and timm's weights fit one to one, by the table of resnet_names.py.

Names are attributes, not entries of a list, so that the parameters are a dict of dicts with only
string keys: these become the names of checkpoint leaves.
"""

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from flax import nnx
import jax

from configs.fields import Fields
from trainer.models import names, norm, resnet_fields, resnet_names, staged
from trainer.models.blocks import BasicBlock, Block, Bottleneck
from trainer.models.layers import (
  Layers,
  conv_of_row_pairs,
  kernel_of_row_pairs,
  max_pool,
  refuse_split,
  scaled,
)
from trainer.models.repeat import repeat

# Depth: (blocks of each stage, whether they are bottlenecks).
STAGES: dict[int, tuple[tuple[int, ...], bool]] = {
  18: ((2, 2, 2, 2), False),
  34: ((3, 4, 6, 3), False),
  50: ((3, 4, 6, 3), True),
  101: ((3, 4, 23, 3), True),
  152: ((3, 8, 36, 3), True),
  200: ((3, 24, 36, 3), True),
}
# Of ResNet-RS (arXiv:2103.07579, appendix).
RS_STAGES: dict[int, tuple[tuple[int, ...], bool]] = {
  50: ((3, 4, 6, 3), True),
  101: ((3, 4, 23, 3), True),
  152: ((3, 8, 36, 3), True),
  200: ((3, 24, 36, 3), True),
  270: ((4, 29, 53, 4), True),
  350: ((4, 36, 72, 4), True),
  420: ((4, 44, 87, 4), True),
}


class _Trunk(staged.Staged):
  """Stem, stages of residual blocks, global average pool and linear head.

  Every stage but the first halves height and width.

  Attributes:
    TITLE: name of the family, before the depth.
    CHANNELS: of each stage; the stem has those of the first.
    STEM: kernel size and stride of the first convolution.
  """

  CONVOLUTIONS = r".*\.se\.fc[12]\.weight|head\.fc\.weight"
  TITLE: ClassVar[str]
  CHANNELS: ClassVar[tuple[int, ...]]
  STEM: ClassVar[tuple[int, int]]

  @staticmethod
  @abc.abstractmethod
  def _stages(fields: Mapping[str, Any]) -> tuple[Sequence[int], type[Block]]:
    """Return the number of blocks of each stage, and their kind."""

  @abc.abstractmethod
  def _build_stem(self, channels: int, fields: Mapping[str, Any], layers: Layers) -> None:
    """Make the layers before the first block, which leave so many channels."""

  @abc.abstractmethod
  def _stem(self, x: jax.Array) -> jax.Array:
    """Return the input of the first block for images in the model's dtype."""

  @classmethod
  def describe(cls, fields: Mapping[str, Any]) -> str:
    """Return "ResNet-50, width 0.5" and the like, with all values that are not the default."""
    return cls.titled(f"{cls.TITLE}-{fields['depth']}", fields, "depth")

  @classmethod
  def torch_name(cls, leaf: str, fields: Mapping[str, Any]) -> str:
    """Return the name that torchvision and timm use; see Family."""
    return resnet_names.torch_name(leaf, fields)

  @classmethod
  def guess(cls, shapes: Mapping[str, tuple[int, ...]]) -> names.Looks | None:
    """Return "resnext50_32x4d" and the like; see Family."""
    depths = {numbers: depth for depth, numbers in (STAGES | RS_STAGES).items()}
    return resnet_names.guess(shapes, depths)

  @classmethod
  def check(cls, fields: Mapping[str, Any]) -> None:
    """Refuse what needs bottlenecks in a net of basic blocks, and empty groups; see Family."""
    _, block = cls._stages(fields)
    net = f"{cls.TITLE}-{fields['depth']}"
    if block is not Bottleneck:
      for name in ("stride_at", "groups", "base_width"):
        if fields[name] != resnet_fields.COMMON[name].default:
          raise ValueError(
            f"config.model.{name} is {fields[name]!r}, which needs bottlenecks; {net} has basic "
            "blocks."
          )
    channels = scaled(cls.CHANNELS[0], fields["width"])
    if channels * fields["base_width"] < 64 and block is Bottleneck and fields["groups"] > 1:
      raise ValueError(
        f"config.model.base_width is {fields['base_width']}, which leaves no channel for a group "
        f"of the first stage, of {channels} channels."
      )

  @classmethod
  def check_image(cls, fields: Mapping[str, Any], *, name: str, size: int, space: int) -> None:
    """Refuse to split some images, and pairs of rows of an odd number; see Family."""
    if fields["groups"] > 1:
      refuse_split(name, size, space)
    if fields["row_pairs"] and space > 1:
      raise ValueError(
        f"{name} is {size}, whose height config.mesh.space = {space} would split, and "
        "config.model.row_pairs is True; set config.mesh.space to 1, or row_pairs to False."
      )
    if fields["row_pairs"] and size % 2 and name.startswith("config.data.image_size"):
      raise ValueError(
        f"{name} is {size}, an odd number of rows, and config.model.row_pairs is True; set that to "
        "False, or take an even size."
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
    del image_size
    layers = Layers(
      dtype,
      fields["zero_init_residual"],
      rngs,
      preact=fields["preact"],
      stride_at=fields["stride_at"],
      shortcut=fields["shortcut"],
      activation=fields["activation"],
      groups=fields["groups"],
      base_width=fields["base_width"],
      se_ratio=fields["se_ratio"],
      blur=fields["blurpool"] != "none",
      zeros_last=fields["zeros_last"],
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
    numbers, block = self._stages(fields)
    channels = [scaled(base, fields["width"]) for base in self.CHANNELS]
    self.dtype = layers.dtype
    self.activation = layers.activation
    self.preact = layers.preact
    self._build_stem(channels[0], fields, layers)
    inputs = channels[0]
    for s, (number, outputs) in enumerate(zip(numbers, channels, strict=True), 1):
      first = block(inputs, outputs, 2 if s > 1 else 1, layers)
      inputs = outputs * block.expansion

      def another(rngs: nnx.Rngs, inputs: int = inputs, outputs: int = outputs) -> Block:
        return block(inputs, outputs, 1, layers.drawn_from(rngs))

      others = repeat(another, number - 1, layers.rngs, loop=fields["scan"])
      for b, made in enumerate([first, *others], 1):
        setattr(self, f"stage{s}_block{b}", made)
    if self.preact:
      self.final_bn = layers.norm(inputs)
    # float32 under bfloat16 too: it costs nothing here, and the loss wants logits that are not
    # rounded to 8 bits. Standard deviation 0.01 as in arXiv:1706.02677, 5.1: the first loss is
    # close to log(num_classes).
    self.head = layers.linear(
      inputs,
      num_classes,
      kernel_init=nnx.initializers.normal(0.01),
      bias_init=nnx.initializers.constant(fields["head_bias_init"]),
    )
    self._keep_stages(fields, numbers, _drop_path_rates(fields, numbers), layers.rngs)

  def features(self, x: jax.Array) -> dict[str, jax.Array]:
    """Return the outputs of the stem and of each stage: "stem", "stage1", "stage2", ...

    Those of a net with `preact` are sums without an activation.

    Args:
      x: normalised images, floating point [N, H, W, 3].

    Returns:
      Feature maps [N, h, w, C] in the model's dtype.
    """
    x = self._stem(x.astype(self.dtype))
    return {"stem": x} | self._run_stages(x, self._draw_paths())

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return float32 logits [N, num_classes].

    Args:
      x: normalised images, floating point [N, H, W, 3], of any height and width.
    """
    x = self.features(x)[f"stage{len(self.numbers)}"]
    if self.preact:
      x = self.activation(self.final_bn(x))
    return self._classify(x)


def _drop_path_rates(fields: Mapping[str, Any], numbers: Sequence[int]) -> tuple[float, ...]:
  """Return the share of examples that skip the branch of each block; () if none ever does."""
  rate, stages = fields["drop_path"], len(numbers)
  if not rate or fields["drop_path_by"] == "block":
    return staged.rates_by_block(rate, sum(numbers), last=True)
  return tuple(
    rate * (s + 1) / (stages + 1) for s, number in enumerate(numbers, 1) for _ in range(number)
  )


class ResNet(_Trunk):
  """The four-stage net for ImageNet: it shrinks images 32-fold.

  A stage has 64, 128, 256 or 512 channels, and its bottlenecks return four times as many.
  """

  FIELDS: ClassVar[Fields] = resnet_fields.RESNET
  TRIAL: ClassVar[Mapping[str, Any]] = {"depth": 18, "width": 0.125}
  TITLE = "ResNet"
  CHANNELS = (64, 128, 256, 512)
  STEM = (7, 2)

  @staticmethod
  def _stages(fields: Mapping[str, Any]) -> tuple[Sequence[int], type[Block]]:
    numbers, bottleneck = STAGES[fields["depth"]]
    return numbers, Bottleneck if bottleneck else BasicBlock

  @classmethod
  def check(cls, fields: Mapping[str, Any]) -> None:
    """Refuse a blurred max-pool where there is none; see Family."""
    super().check(fields)
    if fields["blurpool"] == "all" and fields["stem_pool"] != "max":
      raise ValueError(
        "config.model.blurpool is 'all', which blurs the max-pool; config.model.stem_pool is "
        f"{fields['stem_pool']!r}: set config.model.blurpool to 'convs'."
      )
    if fields["row_pairs"] and fields["stem"] != "conv7":
      raise ValueError(
        f"config.model.row_pairs is True, which needs a 7x7 convolution; config.model.stem is "
        f"{fields['stem']!r}: set config.model.row_pairs to False."
      )
    if fields["pool_first"]:
      resnet_fields.check_pool_first(fields)

  @classmethod
  def for_micro_batches(
    cls, params: Mapping[str, Any], batch_stats: Mapping[str, Any], fields: Mapping[str, Any]
  ) -> dict[str, Any]:
    """Return the kernel before the pool as `_stem` needs it too, marked by a first axis of 1."""
    number = "3" if fields["stem"] == "deep" else ""
    conv, bn = f"stem_conv{number}", f"stem_bn{number}"
    in_loop = super().for_micro_batches(params, batch_stats, fields)
    if fields["pool_first"] or fields["row_pairs"]:
      scale = params[bn]["scale"] if fields["pool_first"] else None
      kernel = _stem_kernel(params[conv]["kernel"], scale, paired=fields["row_pairs"])
      in_loop[conv] = {"kernel": kernel[None]}
    return in_loop

  def _build_stem(self, channels: int, fields: Mapping[str, Any], layers: Layers) -> None:
    self.deep, self.blurs_pool = fields["stem"] == "deep", fields["blurpool"] == "all"
    self.pools_by_conv = fields["stem_pool"] == "conv"
    self.pool_first = fields["pool_first"]
    if self.deep:
      half = max(1, channels // 2)
      self.stem_conv1 = layers.conv(3, half, 3, 2)
      self.stem_bn1 = layers.norm(half)
      self.stem_conv2 = layers.conv(half, half, 3)
      self.stem_bn2 = layers.norm(half)
      self.stem_conv3 = layers.conv(half, channels, 3)
      if not self.preact:
        self.stem_bn3 = layers.norm(channels)
    else:
      self.stem_conv = layers.conv(3, channels, *self.STEM)
      if not self.preact:
        self.stem_bn = layers.norm(channels)
    if self.pools_by_conv:
      self.stem_pool_conv = layers.conv(channels, channels, 3, 2)
      self.stem_pool_bn = layers.norm(channels)

  def _stem(self, x: jax.Array) -> jax.Array:
    paired = x.shape[-1] == 6  # see `row_pairs`
    if self.deep:
      x = self.activation(self.stem_bn1(self.stem_conv1(x)))
      x = self.activation(self.stem_bn2(self.stem_conv2(x)))
    conv = self.stem_conv3 if self.deep else self.stem_conv
    own, bn, scale = conv.kernel.get_value(), None, None
    in_loop = own.ndim > 4  # see `for_micro_batches`
    if not self.preact:  # else the first block starts with norm and activation
      bn = self.stem_bn3 if self.deep else self.stem_bn
      if self.pool_first and (in_loop or not bn.use_running_average):
        scale = bn.scale.get_value()
    kernel = own.reshape(own.shape[1:]) if in_loop else _stem_kernel(own, scale, paired=paired)
    if paired:
      x = conv_of_row_pairs(x, kernel)
    else:
      conv.kernel.set_value(kernel)
      x = conv(x)
      conv.kernel.set_value(own)
    if bn is not None and scale is not None:
      return self.activation(bn(x, max_pool))
    if bn is not None:
      x = self.activation(bn(x))
    if self.pools_by_conv:
      return self.activation(self.stem_pool_bn(self.stem_pool_conv(x)))
    return max_pool(x, blurred=self.blurs_pool)


def _stem_kernel(kernel: jax.Array, scale: jax.Array | None, *, paired: bool) -> jax.Array:
  """Return the kernel of the last convolution of the stem as its computation needs it.

  Args:
    kernel: as a checkpoint has it.
    scale: of the norm behind it, whose signs are put in the kernel, where they cost nothing; None
      to leave them out.
    paired: whether it is for pairs of rows.
  """
  if scale is not None:
    kernel = kernel * norm.directions(scale)
  return kernel_of_row_pairs(kernel) if paired else kernel


class ResNetRS(ResNet):
  """ResNet-RS (arXiv:2103.07579): deep stem, convolutions for pools, squeeze-and-excitation."""

  FIELDS: ClassVar[Fields] = resnet_fields.RESNET_RS
  TRIAL: ClassVar[Mapping[str, Any]] = {"depth": 50, "width": 0.0625}
  TITLE = "ResNet-RS"

  @staticmethod
  def _stages(fields: Mapping[str, Any]) -> tuple[Sequence[int], type[Block]]:
    return RS_STAGES[fields["depth"]][0], Bottleneck


class CifarResNet(_Trunk):
  """The three-stage net for 32 px images: 3x3 stem, no pooling, 16, 32, 64 channels.

  arXiv:1512.03385, section 4.2, of depth 6n+2 with basic blocks. The published nets have the
  shortcut "pad" (option A).
  """

  FIELDS: ClassVar[Fields] = resnet_fields.CIFAR_RESNET
  TRIAL: ClassVar[Mapping[str, Any]] = {"depth": 8, "width": 0.25}
  TITLE = "CIFAR ResNet"
  CHANNELS = (16, 32, 64)
  STEM = (3, 1)

  @staticmethod
  def _stages(fields: Mapping[str, Any]) -> tuple[Sequence[int], type[Block]]:
    return ((fields["depth"] - 2) // 6,) * 3, BasicBlock

  @classmethod
  def check(cls, fields: Mapping[str, Any]) -> None:
    """Refuse another stem than the one there is; see Family."""
    super().check(fields)
    for name in ("stem", "stem_pool"):
      if fields[name] != resnet_fields.COMMON[name].default:
        raise ValueError(
          f"config.model.{name} is {fields[name]!r}; the stem of a {cls.TITLE} is one 3x3 "
          f"convolution: leave it at {resnet_fields.COMMON[name].default!r}."
        )
    if fields["blurpool"] == "all":
      raise ValueError(
        f"config.model.blurpool is 'all', which blurs the max-pool; a {cls.TITLE} has none: set it "
        "to 'convs'."
      )
    for name, missing in (("pool_first", "max-pool"), ("row_pairs", "7x7 convolution")):
      if fields[name]:
        raise ValueError(
          f"config.model.{name} is True; a {cls.TITLE} has no {missing}: set it to False."
        )

  def _build_stem(self, channels: int, fields: Mapping[str, Any], layers: Layers) -> None:
    del fields
    self.stem_conv = layers.conv(3, channels, *self.STEM)
    if not self.preact:
      self.stem_bn = layers.norm(channels)

  def _stem(self, x: jax.Array) -> jax.Array:
    x = self.stem_conv(x)
    return x if self.preact else self.activation(self.stem_bn(x))


class CifarResNetV2(CifarResNet):
  """The same with bottlenecks, of depth 9n+2: by default the pre-activation nets of 164 and 1001.

  arXiv:1603.05027, which strides in the first 1x1 convolution, and starts no branch at zero.
  """

  FIELDS: ClassVar[Fields] = resnet_fields.CIFAR_RESNET_V2
  TRIAL: ClassVar[Mapping[str, Any]] = {"depth": 11, "width": 0.25}
  TITLE = "CIFAR ResNet v2"

  @staticmethod
  def _stages(fields: Mapping[str, Any]) -> tuple[Sequence[int], type[Block]]:
    return ((fields["depth"] - 2) // 9,) * 3, Bottleneck
