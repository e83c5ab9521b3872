"""Nets without normalisation: NF-ResNet (arXiv:2101.08692) and NFNet F0 to F6 (arXiv:2102.06171).

Kernels are standardised where they are used, activations keep their variance by a constant gain
gamma, and each block divides its input by the standard deviation that it should have: in block l of
a stage Var(x) = Var(x of the first) + l * alpha ** 2. There are no statistics of a batch, so that
training and evaluation differ by stochastic depth and dropout alone, and nothing but gradients
crosses devices.

By default the nets are those of the papers' code (github.com/google-deepmind/deepmind-research,
nfnets). timm's have the same leaves and other numbers, by activation, padding, gamma_in, shortcut,
skip_init, ws_rule and ws_epsilon.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
import functools
import math
from typing import Any, ClassVar, NamedTuple, Self

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from configs.fields import Fields
from trainer.models import names, staged
from trainer.models.convolution import convolve
from trainer.models.layers import ACTIVATIONS, Layers, halve, max_pool, refuse_split, scaled
from trainer.models.nfnet_fields import NF_RESNET, NFNET
from trainer.models.resnet import STAGES
from trainer.models.stack import Paths

# By name: the function, and the factor that makes the variance of f(x) 1 for x ~ N(0, 1), as in the
# papers' code.
GAINS: Mapping[str, tuple[Callable[[jax.Array], jax.Array], float]] = {
  "relu": (ACTIVATIONS["relu"], 1.7139588594436646),
  "gelu": (ACTIVATIONS["gelu"], 1.7015043497085571),
  "gelu_tanh": (functools.partial(nnx.gelu, approximate=True), 1.7015043497085571),
  "silu": (ACTIVATIONS["silu"], 1.7881293296813965),
  "elu": (ACTIVATIONS["elu"], 1.2716004848480225),
  "leaky_relu": (ACTIVATIONS["leaky_relu"], 1.70590341091156),
}
# Blocks of each stage of F0; those of FN are N + 1 times as many.
_BLOCKS = (1, 2, 6, 3)
_F_CHANNELS = (256, 512, 1536, 1536)
_GROUP_WIDTH = 128  # channels of a group of the 3x3 convolutions
DEPTHS: dict[int, tuple[int, ...]] = {26: (2, 2, 2, 2)} | {
  depth: numbers for depth, (numbers, bottlenecks) in STAGES.items() if bottlenecks
}
# timm's NormFreeNet.
_NAMES: names.Table = (
  (r"stem_conv(?P<layer>\d?)", "stem.conv{layer}"),
  (names.BLOCK, "stages.{previous}.{block}"),
  (names.BLOCK + r"/projection_conv", "stages.{previous}.{block}.downsample.conv"),
  (names.BLOCK + r"/se_reduce", "stages.{previous}.{block}.attn_last.fc1"),
  (names.BLOCK + r"/se_expand", "stages.{previous}.{block}.attn_last.fc2"),
  (names.BLOCK + r"/(?P<layer>\w+)", "stages.{previous}.{block}.{layer}"),
  (r"final_conv", "final_conv"),
  (r"head", "head.fc"),
)


class ScaledConv(nnx.Module):
  """A convolution with a standardised kernel (arXiv:2101.08692, section 4): kernel, gain, bias.

  Args:
    inputs: channels that come in.
    outputs: channels that go out.
    kernel: size.
    stride: of both directions.
    groups: of channels.
    layers: of the net.
    zero_gain: whether the gains start at 0 instead of 1.
  """

  def __init__(
    self,
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    *,
    layers: "_Layers",
    zero_gain: bool = False,
  ):
    shape, wide = (kernel, kernel, inputs // groups, outputs), layers.param_dtype
    init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
    self.kernel = nnx.Param(init(layers.rngs.params(), shape, wide))
    self.gain = nnx.Param(jnp.full(outputs, 0.0 if zero_gain else 1.0, wide))
    self.bias = nnx.Param(jnp.zeros(outputs, wide))
    self.stride, self.groups, self.dtype = stride, groups, layers.dtype
    self.padding: str | list[tuple[int, int]] = (
      "SAME" if layers.padding == "same" else [(kernel // 2, kernel // 2)] * 2
    )
    self.factor, self.adds, self.epsilon = layers.factor, layers.adds, layers.epsilon

  def standardised(self) -> jax.Array:
    """Return the kernel [h, w, in, out] that is convolved with, in the dtype of the parameters."""
    kernel = self.kernel.get_value()
    fan_in = math.prod(kernel.shape[:-1])
    mean = jnp.mean(kernel, (0, 1, 2))
    var = jnp.mean(jnp.square(kernel - mean), (0, 1, 2))
    added = (var + self.epsilon) * fan_in
    square = added if self.adds else jnp.maximum(var * fan_in, self.epsilon)
    return (kernel - mean) * (jax.lax.rsqrt(square) * self.gain.get_value() * self.factor)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return the convolution of x [N, H, W, inputs], in the model's dtype."""
    y = convolve(
      x.astype(self.dtype),  # means of 2x2 pixels are float32
      self.standardised().astype(self.dtype),
      self.stride,
      self.padding,
      self.groups,
    )
    return y + self.bias.get_value().astype(self.dtype)


class _Layers(Layers):
  """What the layers of one net have in common, by the fields of its family."""

  def __init__(self, fields: Mapping[str, Any], dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
    super().__init__(dtype, False, rngs)
    function, gamma = GAINS[fields["activation"]]
    in_kernel = fields["gamma_in"] == "kernel"
    self.activation = function if in_kernel else lambda x: function(x) * gamma
    self.factor = gamma if in_kernel else 1.0
    self.padding, self.epsilon = fields["padding"], fields["ws_epsilon"]
    self.adds = fields["ws_rule"] == "add"
    self.alpha, self.skip_init, self.se_ratio = (
      fields[name] for name in ("alpha", "skip_init", "se_ratio")
    )


class Shape(NamedTuple):
  """Of a block.

  Attributes:
    inputs: channels that come in.
    outputs: channels that go out.
    inner: channels between.
    stride: of the first 3x3 convolution, and of the shortcut.
    groups: of the 3x3 convolutions.
    second: whether there are two of them.
    pools: whether a shortcut with stride has a mean of 2x2 pixels for its stride.
  """

  inputs: int
  outputs: int
  inner: int
  stride: int
  groups: int = 1
  second: bool = False
  pools: bool = True


class Block(nnx.Module):
  """x + alpha * skip_gain * f(activation(x) * beta), a bottleneck; figure 6 of arXiv:2102.06171.

  Where the shape changes, the shortcut starts behind the activation.
  """

  def __init__(self, shape: Shape, layers: _Layers):
    conv = functools.partial(ScaledConv, layers=layers)
    inner, stride, groups = shape.inner, shape.stride, shape.groups
    self.activation, self.alpha = layers.activation, layers.alpha
    self.projects = stride != 1 or shape.inputs != shape.outputs
    self.pools = shape.pools and stride != 1
    if self.projects:
      strided = 1 if self.pools else stride
      self.projection_conv = conv(shape.inputs, shape.outputs, 1, strided)
    self.conv1 = conv(shape.inputs, inner, 1)
    self.conv2 = conv(inner, inner, 3, stride, groups)
    self.second = shape.second
    if self.second:
      self.conv2b = conv(inner, inner, 3, 1, groups)
    self.conv3 = conv(inner, shape.outputs, 1, zero_gain=not layers.skip_init)
    self.squeezes = layers.se_ratio > 0
    if self.squeezes:
      squeezed = max(1, int(shape.outputs * layers.se_ratio))
      self.se_reduce = layers.linear(shape.outputs, squeezed)
      self.se_expand = layers.linear(squeezed, shape.outputs)
    self.gained = layers.skip_init
    if self.gained:
      self.skip_gain = nnx.Param(jnp.zeros((), layers.param_dtype))

  def __call__(self, x: jax.Array, extra: tuple[jax.Array, jax.Array | None]) -> jax.Array:
    """Return [N, H/stride, W/stride, outputs], in the model's dtype.

    Args:
      x: [N, H, W, inputs].
      extra: beta; and [N, 1, 1, 1], which multiplies the branch, or None for 1.
    """
    beta, branch_scale = extra
    y = (self.activation(x) * beta).astype(x.dtype)
    if self.projects:
      x = self.projection_conv(halve(y) if self.pools else y)
    y = self.conv2(self.activation(self.conv1(y)))
    if self.second:
      y = self.conv2b(self.activation(y))
    y = self.conv3(self.activation(y))
    if self.squeezes:
      mean = jnp.mean(y, axis=(1, 2), dtype=self.se_reduce.dtype)
      gate = nnx.sigmoid(self.se_expand(nnx.relu(self.se_reduce(mean))))
      y = (y * (2 * gate[:, None, None])).astype(y.dtype)
    factor: Any = self.alpha
    if branch_scale is not None:
      factor = factor * branch_scale
    if self.gained:
      factor = factor * self.skip_gain.get_value()
    return x + (y * factor).astype(y.dtype)


class _Signals(NamedTuple):
  """What blocks get: beta, and the factor of stochastic depth if there is any; see stack.Extras."""

  betas: np.ndarray
  paths: Paths | None

  @property
  def rates(self) -> np.ndarray:
    """Return [blocks, 2], the rate of stochastic depth and beta."""
    rates = self.paths.rates if self.paths else np.zeros_like(self.betas)
    return np.stack([rates, self.betas], axis=1)

  def of_block(
    self, number: jax.Array | int, rate: jax.Array, examples: int
  ) -> tuple[jax.Array, jax.Array | None]:
    """Return (beta, factors [examples, 1, 1, 1] or None)."""
    return rate[1], self.paths and self.paths.of_block(number, rate[0], examples)


def betas(numbers: Sequence[int], alpha: float) -> list[float]:
  """Return 1 over the expected deviation of the input of every block.

  Args:
    numbers: blocks of each stage.
    alpha: factor of the branches.
  """
  result, variance = [], 1.0
  for number in numbers:
    for block in range(number):
      result.append(variance**-0.5)
      # What the first block puts in place of its input has variance 1.
      variance = (variance if block else 1.0) + alpha**2
  return result


class _NormFree(staged.Staged):
  """Stem, stages of blocks, mean and linear head; every stage but the first halves the image."""

  TITLE: ClassVar[str]
  CONVOLUTIONS = r".*\.attn_last\.fc[12]\.weight"

  @abc.abstractmethod
  def _build_stem(self, fields: Mapping[str, Any], layers: _Layers) -> int:
    """Make the layers before the first block; return the channels that they leave."""

  @abc.abstractmethod
  def _stem(self, x: jax.Array) -> jax.Array:
    """Return the input of the first block for images in the model's dtype."""

  @abc.abstractmethod
  def _shapes(self, fields: Mapping[str, Any], inputs: int) -> list[list[Shape]]:
    """Return the blocks of each stage, for the channels that the stem leaves."""

  def _build_end(self, inputs: int, layers: _Layers) -> int:
    """Make the layers behind the last block; return the channels that they leave."""
    del layers
    return inputs

  def _end(self, x: jax.Array) -> jax.Array:
    """Return the maps whose activations are averaged, for the output of the last block."""
    return x

  @classmethod
  def describe(cls, fields: Mapping[str, Any]) -> str:
    """Return "NFNet-F0, width 0.25" and the like."""
    size = fields["variant"].upper() if "variant" in fields else fields["depth"]
    return cls.titled(f"{cls.TITLE}-{size}", fields, "variant", "depth")

  @classmethod
  def torch_name(cls, leaf: str, fields: Mapping[str, Any]) -> str:
    """Return the name that timm uses; see Family."""
    del fields
    return names.torch_name(leaf, _NAMES)

  @classmethod
  def guess(cls, shapes: Mapping[str, tuple[int, ...]]) -> names.Looks | None:
    """Return "nf_resnet50", "dm_nfnet_f0" and the like; see Family."""
    if "stages.0.0.conv1.gain" not in shapes:
      return None
    blocks = names.count_blocks(r"stages\.(\d+)\.(\d+)\.", shapes, first=0)
    if "final_conv.gain" in shapes:
      return names.Looks(f"dm_nfnet_f{blocks[0] - 1}" if blocks else "an NFNet")
    depth = {numbers: depth for depth, numbers in DEPTHS.items()}.get(blocks)
    return names.Looks(f"nf_resnet{depth}" if depth else "an NF-ResNet", depth)

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
    return cls(fields, num_classes, _Layers(fields, dtype, rngs))

  def __init__(self, fields: Mapping[str, Any], num_classes: int, layers: _Layers):
    """Build stem, blocks and head.

    Args:
      fields: values of FIELDS.
      num_classes: of the head.
      layers: what all layers have in common.
    """
    self.dtype, self.activation = layers.dtype, layers.activation
    stages = self._shapes(fields, self._build_stem(fields, layers))
    for s, shapes in enumerate(stages, 1):
      for b, shape in enumerate(shapes, 1):
        setattr(self, f"stage{s}_block{b}", Block(shape, layers))
    features = self._build_end(stages[-1][-1].outputs, layers)
    self.head = layers.linear(
      features,
      num_classes,
      kernel_init=nnx.initializers.normal(0.01),
      bias_init=nnx.initializers.constant(fields["head_bias_init"]),
    )
    numbers = [len(shapes) for shapes in stages]
    self.betas = tuple(betas(numbers, fields["alpha"]))
    self.rescale = fields["drop_path_rescale"]
    rates = staged.rates_by_block(fields["drop_path"], sum(numbers), last=False)
    self._keep_stages(fields, numbers, rates, layers.rngs)

  def features(self, x: jax.Array) -> dict[str, jax.Array]:
    """Return the outputs of the stem and of each stage: "stem", "stage1", "stage2", ...

    They are sums without an activation.

    Args:
      x: normalised images, floating point [N, H, W, 3].

    Returns:
      Feature maps [N, h, w, C] in the model's dtype.
    """
    x = self._stem(x.astype(self.dtype))
    signals = _Signals(
      np.asarray(self.betas, self.head.dtype), self._draw_paths(rescale=self.rescale)
    )
    return {"stem": x} | self._run_stages(x, signals)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return float32 logits [N, num_classes].

    Args:
      x: normalised images, floating point [N, H, W, 3], of any height and width.
    """
    x = self.features(x)[f"stage{len(self.numbers)}"]
    return self._classify(self.activation(self._end(x)))


class NFNet(_NormFree):
  """NFNet: grouped convolutions, squeeze-and-excitation, two 3x3 convolutions in a block."""

  FIELDS: ClassVar[Fields] = NFNET
  TRIAL: ClassVar[Mapping[str, Any]] = {"variant": "f0", "width": 0.0625}
  TITLE = "NFNet"

  @classmethod
  def check(cls, fields: Mapping[str, Any]) -> None:
    """Refuse a width that leaves groups of no whole number of channels; see Family."""
    if not (_GROUP_WIDTH * fields["width"]).is_integer():
      raise ValueError(
        f"config.model.width is {fields['width']}, which makes groups of "
        f"{_GROUP_WIDTH * fields['width']:g} channels; give a multiple of 1/{_GROUP_WIDTH}."
      )

  @classmethod
  def check_image(cls, fields: Mapping[str, Any], *, name: str, size: int, space: int) -> None:
    """Refuse to split images; see Family."""
    del fields
    refuse_split(name, size, space)

  def _build_stem(self, fields: Mapping[str, Any], layers: _Layers) -> int:
    channels = [scaled(base, fields["width"]) for base in (16, 32, 64, 128)]
    conv = functools.partial(ScaledConv, kernel=3, layers=layers)
    self.stem_conv1 = conv(3, channels[0], stride=2)
    self.stem_conv2 = conv(channels[0], channels[1])
    self.stem_conv3 = conv(channels[1], channels[2])
    self.stem_conv4 = conv(channels[2], channels[3], stride=2)
    return channels[3]

  def _stem(self, x: jax.Array) -> jax.Array:
    x = self.stem_conv1(x)
    for conv in (self.stem_conv2, self.stem_conv3, self.stem_conv4):
      x = conv(self.activation(x))
    return x

  def _shapes(self, fields: Mapping[str, Any], inputs: int) -> list[list[Shape]]:
    times, stages = int(fields["variant"][1:]) + 1, []
    for s, (blocks, base) in enumerate(zip(_BLOCKS, _F_CHANNELS, strict=True)):
      outputs, shapes = round(base * fields["width"]), []
      for b in range(blocks * times):
        stride, groups = 2 if s and not b else 1, base // 2 // _GROUP_WIDTH
        shapes.append(Shape(inputs, outputs, outputs // 2, stride, groups, second=True))
        inputs = outputs
      stages.append(shapes)
    return stages

  def _build_end(self, inputs: int, layers: _Layers) -> int:
    self.final_conv = ScaledConv(inputs, 2 * inputs, 1, layers=layers)
    return 2 * inputs

  def _end(self, x: jax.Array) -> jax.Array:
    return self.final_conv(x)


class NFResNet(_NormFree):
  """NF-ResNet: the bottlenecks and the stem of ResNet, in the order of pre-activation."""

  FIELDS: ClassVar[Fields] = NF_RESNET
  TRIAL: ClassVar[Mapping[str, Any]] = {"depth": 26, "width": 0.125}
  TITLE = "NF-ResNet"

  def _build_stem(self, fields: Mapping[str, Any], layers: _Layers) -> int:
    self.pads_same = fields["padding"] == "same"
    channels = scaled(64, fields["width"])
    self.stem_conv = ScaledConv(3, channels, 7, 2, layers=layers)
    return channels

  def _stem(self, x: jax.Array) -> jax.Array:
    x = self.stem_conv(x)
    if self.pads_same:
      return nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
    return max_pool(x)

  def _shapes(self, fields: Mapping[str, Any], inputs: int) -> list[list[Shape]]:
    stages, pools = [], fields["shortcut"] == "pool"
    for s, blocks in enumerate(DEPTHS[fields["depth"]]):
      inner, shapes = scaled(64 * 2**s, fields["width"]), []
      for b in range(blocks):
        stride = 2 if s and not b else 1
        shapes.append(Shape(inputs, 4 * inner, inner, stride, pools=pools))
        inputs = 4 * inner
      stages.append(shapes)
    return stages
