"""Residual blocks: a branch of convolutions beside a shortcut (arXiv:1512.03385, figure 5).

A block counts its layers from 1: conv1, bn1, and so on. Where the shape changes, the shortcut is
one of

- conv: a 1x1 convolution with stride, and a batch norm (option B of arXiv:1512.03385): leaves
  projection_conv, projection_bn
- pool: the mean over 2x2 pixels, then a 1x1 convolution without stride (arXiv:1812.01187, the D
  of ResNet-D): the same leaves
- pad: every second pixel, and channels of zeros on both sides (option A): no parameters
"""

import abc
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from trainer.models.layers import Layers, every_nth, halve, pad_channels


class Shape(NamedTuple):
  """Of one convolution of a branch."""

  inputs: int
  outputs: int
  kernel: int
  stride: int = 1
  groups: int = 1


class Block(nnx.Module):
  """A residual block; subclasses name the convolutions of its branch.

  By default the order is convolution, norm, activation, and the last activation follows the sum.
  With `layers.preact` it is norm, activation, convolution (arXiv:1603.05027): nothing follows the
  sum, and where the shape changes the shortcut starts behind the first activation and has no norm.

  Args:
    inputs: channels that come in.
    channels: of the stage; a block returns `expansion` times as many.
    stride: of one convolution of the branch, and of the shortcut.
    layers: maker of convolutions and norms.
  """

  expansion: ClassVar[int]  # channels that go out, over `channels`

  @classmethod
  @abc.abstractmethod
  def branch(cls, inputs: int, channels: int, stride: int, layers: Layers) -> Sequence[Shape]:
    """Return the convolutions of the branch, in their order."""

  def __init__(self, inputs: int, channels: int, stride: int, layers: Layers):
    outputs = channels * self.expansion
    shapes = self.branch(inputs, channels, stride, layers)
    self.convolutions = len(shapes)
    self.preact = layers.preact
    self.activation = layers.activation
    for i, shape in enumerate(shapes, 1):
      last = i == len(shapes)
      conv = layers.conv(*shape[:4], groups=shape.groups, last_of_branch=last)
      norm = layers.norm(
        shape.inputs if self.preact else shape.outputs, last_of_branch=last and not self.preact
      )
      setattr(self, f"conv{i}", conv)
      setattr(self, f"bn{i}", norm)
    changes = stride != 1 or inputs != outputs
    self.projects = changes and layers.shortcut != "pad"
    self.pools = self.projects and layers.shortcut == "pool" and stride != 1
    self.pads = changes and not self.projects
    self.stride, self.outputs = stride, outputs
    if self.projects:
      self.projection_conv = layers.conv(inputs, outputs, 1, 1 if self.pools else stride)
      if not self.preact:
        self.projection_bn = layers.norm(outputs)
    self.squeezes = layers.se_ratio > 0
    if self.squeezes:
      self.se_reduce = layers.linear(outputs, layers.squeezed(outputs))
      self.se_expand = layers.linear(layers.squeezed(outputs), outputs)

  def __call__(self, x: jax.Array, branch_scale: jax.Array | None = None) -> jax.Array:
    """Return [N, H/stride, W/stride, expansion * channels], in the model's dtype.

    Args:
      x: [N, H, W, inputs].
      branch_scale: [N, 1, 1, 1], multiplies the branch: stochastic depth. None for 1.
    """
    y = x
    for i in range(1, self.convolutions + 1):
      conv, norm = getattr(self, f"conv{i}"), getattr(self, f"bn{i}")
      if self.preact:
        y = self.activation(norm(y))
        if i == 1 and (self.projects or self.pads):
          x = y
        y = conv(y)
      else:
        y = norm(conv(y))
        if i < self.convolutions:
          y = self.activation(y)
    if self.squeezes:
      y = self._excite(y)
    if branch_scale is not None:
      y = (y * branch_scale).astype(y.dtype)
    y = self._shortcut(x) + y
    return y if self.preact else self.activation(y)

  def _shortcut(self, x: jax.Array) -> jax.Array:
    if self.pads:
      return pad_channels(every_nth(x, self.stride), self.outputs)
    if not self.projects:
      return x
    x = self.projection_conv(halve(x) if self.pools else x)
    return x if self.preact else self.projection_bn(x)

  def _excite(self, y: jax.Array) -> jax.Array:
    """Return y with its channels weighted by their means (arXiv:1709.01507)."""
    mean = jnp.mean(y, axis=(1, 2), dtype=self.se_reduce.dtype)
    gate = nnx.sigmoid(self.se_expand(nnx.relu(self.se_reduce(mean))))
    return (y * gate[:, None, None]).astype(y.dtype)


class BasicBlock(Block):
  """Two 3x3 convolutions, the stride on the first."""

  expansion = 1

  @classmethod
  def branch(cls, inputs: int, channels: int, stride: int, layers: Layers) -> Sequence[Shape]:
    """Return 3x3, 3x3."""
    return Shape(inputs, channels, 3, stride), Shape(channels, channels, 3)


class Bottleneck(Block):
  """1x1, 3x3 and 1x1 convolutions, the stride on the 3x3 ("v1.5") or on the first ("v1").

  The 3x3 convolution may have groups (ResNeXt, arXiv:1611.05431) and another width than the stage
  (wide nets, arXiv:1605.07146).
  """

  expansion = 4

  @classmethod
  def branch(cls, inputs: int, channels: int, stride: int, layers: Layers) -> Sequence[Shape]:
    """Return 1x1, 3x3, 1x1."""
    inner = layers.inner(channels)
    first, second = (stride, 1) if layers.stride_at == "1x1" else (1, stride)
    return (
      Shape(inputs, inner, 1, first),
      Shape(inner, inner, 3, second, layers.groups),
      Shape(inner, channels * cls.expansion, 1),
    )
