"""ResNet v1.5 for ImageNet and the three-stage ResNet for CIFAR, in Flax NNX.

Source: He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385, with two later
conventions: a bottleneck strides in its 3x3 convolution instead of the first 1x1 ("v1.5"), and the
last batch-norm scale of each residual branch may start at zero (Goyal et al., arXiv:1706.02677,
section 5.1).

Convolutions and the max-pool pad symmetrically, as torchvision does, not "SAME": under stride 2
"SAME" pads the end more than the start, which shifts the sampling grid. With equal padding
torchvision's weights fit one to one, after the transpose of a kernel from [out, in, h, w] to
[h, w, in, out] and of the head from [out, in] to [in, out]:

    conv1, bn1            stem_conv, stem_bn
    layer3.0.conv2        stage3_block1/conv2  (we count blocks from 1, torchvision from 0)
    layer3.0.downsample   stage3_block1/projection_conv, stage3_block1/projection_bn
    fc                    head

Names are attributes, not entries of a list, so that the parameters are a dict of dicts with only
string keys: these become the names of checkpoint leaves.
"""

import abc
from collections.abc import Mapping, Sequence
import re
from typing import Any, ClassVar, Self

from flax import nnx
import jax
import jax.numpy as jnp

from configs.fields import POSITIVE, SHARE, Check, Field, Fields
from trainer.models.family import Family
from trainer.models.norm import BatchNorm

# Depth: (blocks of each stage, whether they are bottlenecks).
STAGES = {
  18: ((2, 2, 2, 2), False),
  34: ((3, 4, 6, 3), False),
  50: ((3, 4, 6, 3), True),
  101: ((3, 4, 23, 3), True),
  152: ((3, 8, 36, 3), True),
  200: ((3, 24, 36, 3), True),
}


class Layers:
  """The convolutions and batch norms of one model, which differ only in shape.

  Args:
    dtype: of activations; parameters and batch-norm statistics are float32, or float64 with it.
    zero_init_residual: whether the last batch norm of a residual branch starts with scale 0.
    rngs: with a `params` stream.
    norm_options: further arguments of every BatchNorm.
  """

  def __init__(
    self, dtype: jax.typing.DTypeLike, zero_init_residual: bool, rngs: nnx.Rngs, **norm_options: Any
  ):
    self.dtype = jnp.dtype(dtype)
    self.param_dtype = jnp.promote_types(dtype, jnp.float32)
    self.zero_init_residual = zero_init_residual
    self.rngs = rngs
    self.norm_options = norm_options

  def conv(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> nnx.Conv:
    """Return a square convolution without bias: the batch norm behind it has one."""
    return nnx.Conv(
      inputs,
      outputs,
      (kernel, kernel),
      strides=stride,
      padding=kernel // 2,
      use_bias=False,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      rngs=self.rngs,
      # Fan-out keeps the variance of gradients; that of activations is batch norm's task. The
      # normal is not truncated, as in torchvision.
      kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
    )

  def norm(self, channels: int, last_of_branch: bool = False) -> BatchNorm:
    """Return a batch norm, with scale 0 where the residual branch is to start at zero."""
    return BatchNorm(
      channels,
      dtype=self.dtype,
      **self.norm_options,
      zero_scale=last_of_branch and self.zero_init_residual,
    )


class BasicBlock(nnx.Module):
  """Two 3x3 convolutions beside a shortcut (arXiv:1512.03385, figure 5 left).

  Args:
    inputs: channels that come in.
    channels: of both convolutions.
    stride: of the first convolution and of the projection.
    layers: maker of convolutions and norms.
  """

  expansion = 1  # channels that go out, over `channels`

  def __init__(self, inputs: int, channels: int, stride: int, layers: Layers):
    self.conv1 = layers.conv(inputs, channels, 3, stride)
    self.bn1 = layers.norm(channels)
    self.conv2 = layers.conv(channels, channels, 3)
    self.bn2 = layers.norm(channels, last_of_branch=True)
    self.projects = stride != 1 or inputs != channels
    if self.projects:
      self.projection_conv = layers.conv(inputs, channels, 1, stride)
      self.projection_bn = layers.norm(channels)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return [N, H/stride, W/stride, channels] for x [N, H, W, inputs], in the model's dtype."""
    y = nnx.relu(self.bn1(self.conv1(x)))
    y = self.bn2(self.conv2(y))
    if self.projects:
      x = self.projection_bn(self.projection_conv(x))
    return nnx.relu(x + y)


class Bottleneck(nnx.Module):
  """1x1, 3x3 and 1x1 convolutions beside a shortcut, the stride on the 3x3 ("v1.5").

  Args:
    inputs: channels that come in.
    channels: of the first two convolutions; the last has `expansion` times as many.
    stride: of the 3x3 convolution and of the projection.
    layers: maker of convolutions and norms.
  """

  expansion = 4  # channels that go out, over `channels`

  def __init__(self, inputs: int, channels: int, stride: int, layers: Layers):
    outputs = channels * self.expansion
    self.conv1 = layers.conv(inputs, channels, 1)
    self.bn1 = layers.norm(channels)
    self.conv2 = layers.conv(channels, channels, 3, stride)
    self.bn2 = layers.norm(channels)
    self.conv3 = layers.conv(channels, outputs, 1)
    self.bn3 = layers.norm(outputs, last_of_branch=True)
    self.projects = stride != 1 or inputs != outputs
    if self.projects:
      self.projection_conv = layers.conv(inputs, outputs, 1, stride)
      self.projection_bn = layers.norm(outputs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return [N, H/stride, W/stride, 4*channels] for x [N, H, W, inputs], in the model's dtype."""
    y = nnx.relu(self.bn1(self.conv1(x)))
    y = nnx.relu(self.bn2(self.conv2(y)))
    y = self.bn3(self.conv3(y))
    if self.projects:
      x = self.projection_bn(self.projection_conv(x))
    return nnx.relu(x + y)


def _fields(depth: Field) -> Fields:
  """Return the fields of both families, which differ in their depths."""
  return {
    "depth": depth,
    "width": Field(1.0, "Multiplies the channels of the stem and of every stage.", "", POSITIVE),
    "zero_init_residual": Field(
      True, "Whether the last BN scale of each block starts at 0 (arXiv:1706.02677, 5.1)."
    ),
    "bn_momentum": Field(0.9, "Share of the old running average kept at each step.", "", SHARE),
    "bn_epsilon": Field(1e-5, "Added to the variance.", "", POSITIVE),
    "bn_group": Field(
      "global",
      "Whose examples share BN statistics: global (the whole batch, or micro-batch) | device (each "
      "device its own: results depend on the number of devices) | a number of examples, as in '64' "
      "(the same numbers on any number of devices).",
      check=Check(
        "global, device or a number of examples",
        lambda v: re.fullmatch("global|device|[1-9][0-9]*", v) is not None,
      ),
    ),
  }


class _Trunk(Family):
  """Stages of residual blocks, global average pool and linear head; subclasses add the stem.

  Every stage but the first halves height and width. Block b of stage s is the attribute
  `stage{s}_block{b}`, both counted from 1.

  Attributes:
    TITLE: name of the family, before the depth.
    CHANNELS: of each stage; the stem has those of the first.
    STEM: kernel size and stride of the first convolution.
  """

  TITLE: ClassVar[str]
  CHANNELS: ClassVar[tuple[int, ...]]
  STEM: ClassVar[tuple[int, int]]

  @staticmethod
  @abc.abstractmethod
  def _stages(depth: int) -> tuple[Sequence[int], type[BasicBlock] | type[Bottleneck]]:
    """Return the number of blocks of each stage, and their kind."""

  @classmethod
  def describe(cls, fields: Mapping[str, Any]) -> str:
    """Return "ResNet-50, width 0.5" and the like, with all values that are not the default."""
    others = {name: value for name, value in fields.items() if name != "depth"}
    _, *changed = super().describe(others).split(", ")
    return ", ".join([f"{cls.TITLE}-{fields['depth']}", *changed])

  @classmethod
  def check_split(cls, fields: Mapping[str, Any], *, examples: int, shards: int) -> None:
    """Refuse BN groups that do not lie evenly on the batch and on the devices; see Family."""
    if not fields["bn_group"].isdigit():
      return
    group = int(fields["bn_group"])
    if examples % group:
      raise ValueError(
        f"config.model.bn_group is {group}, which does not divide the {examples} examples of a "
        "micro-batch (config.global_batch_size over config.accumulation_steps)."
      )
    groups = examples // group
    if max(groups, shards) % min(groups, shards):
      raise ValueError(
        f"config.model.bn_group is {group}, which makes {groups} groups that do not lie evenly on "
        f"the {shards} parts that the batch is split in over config.mesh.data and config.mesh.fsdp."
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
      momentum=fields["bn_momentum"],
      epsilon=fields["bn_epsilon"],
      group=fields["bn_group"],
      shards=shards,
    )
    return cls(fields["depth"], fields["width"], num_classes, layers)

  def __init__(self, depth: int, width: float, num_classes: int, layers: Layers):
    """Build stem, blocks and head.

    Args:
      depth: number of layers, as the family counts them.
      width: multiplies the channels of the stem and of every stage.
      num_classes: of the head.
      layers: maker of convolutions and norms.
    """
    numbers, block = self._stages(depth)
    channels = [scaled(base, width) for base in self.CHANNELS]
    self.dtype = layers.dtype
    self.stem_conv = layers.conv(3, channels[0], *self.STEM)
    self.stem_bn = layers.norm(channels[0])
    self.blocks = tuple(
      f"stage{s}_block{b}" for s, number in enumerate(numbers, 1) for b in range(1, number + 1)
    )
    inputs = channels[0]
    for s, (number, outputs) in enumerate(zip(numbers, channels, strict=True), 1):
      for b in range(1, number + 1):
        stride = 2 if s > 1 and b == 1 else 1
        setattr(self, f"stage{s}_block{b}", block(inputs, outputs, stride, layers))
        inputs = outputs * block.expansion
    # float32 under bfloat16 too: it costs nothing here, and the loss wants logits that are not
    # rounded to 8 bits. Standard deviation 0.01 as in arXiv:1706.02677, 5.1: the first loss is
    # close to log(num_classes).
    self.head = nnx.Linear(
      inputs,
      num_classes,
      dtype=layers.param_dtype,
      param_dtype=layers.param_dtype,
      kernel_init=nnx.initializers.normal(0.01),
      rngs=layers.rngs,
    )

  def _classify(self, x: jax.Array) -> jax.Array:
    """Return float32 logits [N, num_classes] of the stem's output [N, H, W, C]."""
    for name in self.blocks:
      x = getattr(self, name)(x)
    return self.head(jnp.mean(x, axis=(1, 2), dtype=self.head.dtype))


class ResNet(_Trunk):
  """The four-stage ImageNet net: 7x7/2 stem, 3x3/2 max-pool, 64, 128, 256, 512 channels."""

  FIELDS: ClassVar[Fields] = _fields(
    Field(
      50,
      "Layers with weights.",
      "layers",
      Check(f"one of {', '.join(map(str, STAGES))} (resnet)", lambda v: v in STAGES),
    )
  )
  TITLE = "ResNet"
  CHANNELS = (64, 128, 256, 512)
  STEM = (7, 2)

  @staticmethod
  def _stages(depth: int) -> tuple[Sequence[int], type[BasicBlock] | type[Bottleneck]]:
    numbers, bottleneck = STAGES[depth]
    return numbers, Bottleneck if bottleneck else BasicBlock

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return float32 logits [N, num_classes].

    Args:
      x: normalised images, floating point [N, H, W, 3]; any H and W, the net shrinks them 32-fold.
    """
    x = nnx.relu(self.stem_bn(self.stem_conv(x.astype(self.dtype))))
    # nnx.max_pool pads with -inf, so that the border never wins.
    x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    return self._classify(x)


class CifarResNet(_Trunk):
  """The three-stage net of depth 6n+2 for 32 px images: 3x3 stem, no pooling, 16, 32, 64 channels.

  arXiv:1512.03385, section 4.2, with basic blocks. The shortcut is a projection wherever the shape
  changes (option B), where the paper's CIFAR nets pad with zeros (option A).
  """

  FIELDS: ClassVar[Fields] = _fields(
    Field(
      20,
      "Layers with weights; n blocks in each stage.",
      "layers",
      Check("6n+2 (cifar_resnet: 8, 14, 20, 26, ...)", lambda v: v >= 8 and v % 6 == 2),
    )
  )
  TITLE = "CIFAR ResNet"
  CHANNELS = (16, 32, 64)
  STEM = (3, 1)

  @staticmethod
  def _stages(depth: int) -> tuple[Sequence[int], type[BasicBlock] | type[Bottleneck]]:
    return ((depth - 2) // 6,) * 3, BasicBlock

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return float32 logits [N, num_classes].

    Args:
      x: normalised images, floating point [N, H, W, 3]; any H and W, the net shrinks them fourfold.
    """
    x = nnx.relu(self.stem_bn(self.stem_conv(x.astype(self.dtype))))
    return self._classify(x)


def scaled(channels: int, width: float) -> int:
  """Return `channels` times `width`, rounded, at least 1."""
  return max(1, round(channels * width))
