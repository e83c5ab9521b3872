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

from collections.abc import Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

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


class _Layers:
  """Makes the convolutions and batch norms of one model, which differ only in shape.

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
    """Returns a square convolution without bias: the batch norm behind it has one."""
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
    """Returns a batch norm, with scale 0 where the residual branch is to start at zero."""
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

  def __init__(self, inputs: int, channels: int, stride: int, layers: _Layers):
    self.conv1 = layers.conv(inputs, channels, 3, stride)
    self.bn1 = layers.norm(channels)
    self.conv2 = layers.conv(channels, channels, 3)
    self.bn2 = layers.norm(channels, last_of_branch=True)
    self.projects = stride != 1 or inputs != channels
    if self.projects:
      self.projection_conv = layers.conv(inputs, channels, 1, stride)
      self.projection_bn = layers.norm(channels)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns [N, H/stride, W/stride, channels] for x [N, H, W, inputs], in the model's dtype."""
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

  def __init__(self, inputs: int, channels: int, stride: int, layers: _Layers):
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
    """Returns [N, H/stride, W/stride, 4*channels] for x [N, H, W, inputs], in the model's dtype."""
    y = nnx.relu(self.bn1(self.conv1(x)))
    y = nnx.relu(self.bn2(self.conv2(y)))
    y = self.bn3(self.conv3(y))
    if self.projects:
      x = self.projection_bn(self.projection_conv(x))
    return nnx.relu(x + y)


class _Trunk(nnx.Module):
  """Stages of residual blocks, global average pool and linear head; subclasses add the stem.

  Every stage but the first halves height and width. Block b of stage s is the attribute
  `stage{s}_block{b}`, both counted from 1.
  """

  def _build(
    self,
    block: type[nnx.Module],
    inputs: int,
    stages: Sequence[tuple[int, int]],
    num_classes: int,
    layers: _Layers,
  ):
    """Adds blocks and head.

    Args:
      block: BasicBlock or Bottleneck.
      inputs: channels of the stem.
      stages: (number of blocks, channels) of each stage.
      num_classes: of the head.
      layers: maker of convolutions and norms.
    """
    self.dtype = layers.dtype
    self.blocks = tuple(
      f"stage{s}_block{b}" for s, (number, _) in enumerate(stages, 1) for b in range(1, number + 1)
    )
    for s, (number, channels) in enumerate(stages, 1):
      for b in range(1, number + 1):
        stride = 2 if s > 1 and b == 1 else 1
        setattr(self, f"stage{s}_block{b}", block(inputs, channels, stride, layers))
        inputs = channels * block.expansion
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
    """Returns float32 logits [N, num_classes] of the stem's output [N, H, W, C]."""
    for name in self.blocks:
      x = getattr(self, name)(x)
    return self.head(jnp.mean(x, axis=(1, 2), dtype=self.head.dtype))


class ResNet(_Trunk):
  """The four-stage ImageNet net: 7x7/2 stem, 3x3/2 max-pool, 64, 128, 256, 512 channels.

  `train()` and `eval()` choose between the statistics of the batch and their running averages; a
  new model trains.

  Args:
    depth: key of `STAGES`.
    width: multiplies the channels of the stem and of every stage.
    num_classes: of the head.
    dtype: of activations; parameters and batch-norm statistics are float32, or float64 with it.
    zero_init_residual: whether the last batch-norm scale of each block starts at 0.
    bn_momentum: share of the old running average kept at each step.
    bn_epsilon: added to the variance.
    bn_group: whose examples share batch-norm statistics; see BatchNorm.
    rngs: with a `params` stream; nothing random is left in the model.
    shards: number of parts that the examples of a batch are split in over devices.

  Raises:
    ValueError: for another depth.
  """

  def __init__(
    self,
    depth: int,
    *,
    width: float = 1.0,
    num_classes: int = 1000,
    dtype: jax.typing.DTypeLike = jnp.float32,
    zero_init_residual: bool = True,
    bn_momentum: float = 0.9,
    bn_epsilon: float = 1e-5,
    bn_group: str = "global",
    rngs: nnx.Rngs,
    shards: int = 1,
  ):
    self.check_depth(depth)
    numbers, bottleneck = STAGES[depth]
    layers = _Layers(
      dtype,
      zero_init_residual,
      rngs,
      momentum=bn_momentum,
      epsilon=bn_epsilon,
      group=bn_group,
      shards=shards,
    )
    channels = [scaled(base, width) for base in (64, 128, 256, 512)]
    self.stem_conv = layers.conv(3, channels[0], 7, 2)
    self.stem_bn = layers.norm(channels[0])
    self._build(
      Bottleneck if bottleneck else BasicBlock,
      channels[0],
      tuple(zip(numbers, channels)),
      num_classes,
      layers,
    )

  @staticmethod
  def check_depth(depth: int):
    """Raises ValueError unless there is such a ResNet."""
    if depth not in STAGES:
      depths = ", ".join(map(str, STAGES))
      raise ValueError(f"config.model.depth: resnet has {depths}; got {depth}")

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns float32 logits [N, num_classes].

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

  Args:
    depth: 6n+2 with n blocks in each stage, at least 8.
    width: multiplies the channels of the stem and of every stage.
    num_classes: of the head.
    dtype: of activations; parameters and batch-norm statistics are float32, or float64 with it.
    zero_init_residual: whether the last batch-norm scale of each block starts at 0.
    bn_momentum: share of the old running average kept at each step.
    bn_epsilon: added to the variance.
    bn_group: whose examples share batch-norm statistics; see BatchNorm.
    rngs: with a `params` stream; nothing random is left in the model.
    shards: number of parts that the examples of a batch are split in over devices.

  Raises:
    ValueError: for another depth.
  """

  def __init__(
    self,
    depth: int,
    *,
    width: float = 1.0,
    num_classes: int = 10,
    dtype: jax.typing.DTypeLike = jnp.float32,
    zero_init_residual: bool = True,
    bn_momentum: float = 0.9,
    bn_epsilon: float = 1e-5,
    bn_group: str = "global",
    rngs: nnx.Rngs,
    shards: int = 1,
  ):
    self.check_depth(depth)
    layers = _Layers(
      dtype,
      zero_init_residual,
      rngs,
      momentum=bn_momentum,
      epsilon=bn_epsilon,
      group=bn_group,
      shards=shards,
    )
    channels = [scaled(base, width) for base in (16, 32, 64)]
    self.stem_conv = layers.conv(3, channels[0], 3)
    self.stem_bn = layers.norm(channels[0])
    self._build(
      BasicBlock, channels[0], tuple(((depth - 2) // 6, c) for c in channels), num_classes, layers
    )

  @staticmethod
  def check_depth(depth: int):
    """Raises ValueError unless there is such a ResNet."""
    if depth < 8 or (depth - 2) % 6:
      raise ValueError(
        f"config.model.depth: cifar_resnet has 6n+2 (8, 14, 20, 26, ...); got {depth}"
      )

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns float32 logits [N, num_classes].

    Args:
      x: normalised images, floating point [N, H, W, 3]; any H and W, the net shrinks them fourfold.
    """
    x = nnx.relu(self.stem_bn(self.stem_conv(x.astype(self.dtype))))
    return self._classify(x)


def scaled(channels: int, width: float) -> int:
  """Returns `channels` times `width`, rounded, at least 1."""
  return max(1, round(channels * width))
