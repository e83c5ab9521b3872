"""What nets are made of; one `Layers` makes the convolutions and batch norms of a residual net.

Convolutions and the max-pool pad symmetrically, as torchvision does, not "SAME": under stride 2
"SAME" pads the end more than the start, which shifts the sampling grid.
"""

from collections.abc import Callable
import copy
import functools
from typing import Any, Self

from flax import nnx
import jax
import jax.numpy as jnp

from trainer.models import convolution
from trainer.models.norm import BatchNorm

Activation = Callable[[jax.Array], jax.Array]

# As torch defines them; gelu is the exact one.
ACTIVATIONS: dict[str, Activation] = {
  "relu": nnx.relu,
  "leaky_relu": nnx.leaky_relu,
  "elu": nnx.elu,
  "gelu": functools.partial(nnx.gelu, approximate=False),
  "silu": nnx.silu,
  "hard_swish": nnx.hard_swish,
}

# Fan-out keeps the variance of gradients; that of activations is batch norm's task. The normal is
# not truncated, as in torchvision.
_KERNEL_INIT = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class Layers:
  """The layers of one model, which differ only in shape.

  Args:
    dtype: of activations; parameters and batch-norm statistics are float32, or float64 with it.
    zero_init_residual: whether residual branches start at zero: by the scale of their last batch
      norm, or by their last kernel if they end in a convolution.
    rngs: with a `params` stream.
    preact: whether blocks are in the order norm, activation, convolution (arXiv:1603.05027).
    stride_at: "3x3" or "1x1", the convolution of a bottleneck that strides.
    shortcut: what a shortcut does where the shape changes: "conv", "pool" or "pad"; see Block.
    activation: a name of ACTIVATIONS.
    groups: of the 3x3 convolution of a bottleneck.
    base_width: channels of each group there, in a stage of 64 channels.
    se_ratio: channels of squeeze-and-excitation over those that leave the block; 0 for none.
    blur: whether a convolution with stride blurs its input first; see BlurredConv.
    zeros_last: whether convolutions are `convolution.zeros_last`.
    norm_options: further arguments of every BatchNorm.
  """

  def __init__(
    self,
    dtype: jax.typing.DTypeLike,
    zero_init_residual: bool,
    rngs: nnx.Rngs,
    *,
    preact: bool = False,
    stride_at: str = "3x3",
    shortcut: str = "conv",
    activation: str = "relu",
    groups: int = 1,
    base_width: int = 64,
    se_ratio: float = 0.0,
    blur: bool = False,
    zeros_last: bool = False,
    **norm_options: Any,
  ):
    self.dtype = jnp.dtype(dtype)
    self.param_dtype = jnp.promote_types(dtype, jnp.float32)
    self.zero_init_residual = zero_init_residual
    self.rngs = rngs
    self.preact = preact
    self.stride_at = stride_at
    self.shortcut = shortcut
    self.activation = ACTIVATIONS[activation]
    self.groups = groups
    self.base_width = base_width
    self.se_ratio = se_ratio
    self.blur = blur
    self.convolve = convolution.zeros_last if zeros_last else convolution.dense
    self.norm_options = norm_options

  def drawn_from(self, rngs: nnx.Rngs) -> Self:
    """Return a maker of the same layers that draws from another stream."""
    other = copy.copy(self)
    other.rngs = rngs
    return other

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
    """Return a square convolution without bias: the batch norm behind it has one."""
    zero = last_of_branch and self.preact and self.zero_init_residual
    kind = BlurredConv if self.blur and stride > 1 and inputs >= 16 else nnx.Conv
    return kind(
      inputs,
      outputs,
      (kernel, kernel),
      strides=stride,
      padding=kernel // 2,
      # On a TPU groups are slow: 4 channels of a group fill 4 of the 128 lanes of its matrix unit.
      feature_group_count=groups,
      use_bias=False,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      rngs=self.rngs,
      kernel_init=nnx.initializers.zeros_init() if zero else _KERNEL_INIT,
      conv_general_dilated=self.convolve,
    )

  def norm(self, channels: int, last_of_branch: bool = False) -> BatchNorm:
    """Return a batch norm, with scale 0 where the residual branch is to start at zero."""
    return BatchNorm(
      channels,
      dtype=self.dtype,
      **self.norm_options,
      zero_scale=last_of_branch and self.zero_init_residual,
    )

  def linear(self, inputs: int, outputs: int, **options: Any) -> nnx.Linear:
    """Return a linear layer in float32, or float64: there are few, behind a mean over the image."""
    return nnx.Linear(
      inputs,
      outputs,
      dtype=self.param_dtype,
      param_dtype=self.param_dtype,
      rngs=self.rngs,
      **options,
    )

  def inner(self, channels: int) -> int:
    """Return the channels of the 3x3 convolution of a bottleneck (arXiv:1611.05431, 1605.07146)."""
    return max(1, channels * self.base_width // 64) * self.groups

  def squeezed(self, channels: int) -> int:
    """Return the channels of squeeze-and-excitation: a multiple of 8, as in timm."""
    return max(8, int(channels * self.se_ratio + 4) // 8 * 8)


def scaled(channels: int, width: float) -> int:
  """Return `channels` times `width`, rounded, at least 1."""
  return max(1, round(channels * width))


def refuse_split(name: str, size: int, space: int) -> None:
  """Refuse to split the height of images over devices in a net with grouped convolutions.

  Where the parts of a batch are not all of the devices, as in maps that are too small to be split,
  XLA (of jax 0.10.2) computes wrong gradients of their kernels.

  Args:
    name: of the field that has the size.
    size: of images.
    space: `config.mesh.space`.

  Raises:
    ValueError: one sentence that begins with the name, if there is more than one part.
  """
  if space > 1:
    raise ValueError(
      f"{name} is {size}, whose height config.mesh.space = {space} would split, and of grouped "
      "convolutions the compiler has wrong gradients then; set config.mesh.space to 1."
    )


class LayerScale(nnx.Module):
  """A factor for each channel of a branch (arXiv:2103.17239)."""

  def __init__(self, width: int, start: float, dtype: jax.typing.DTypeLike):
    self.gamma = nnx.Param(jnp.full(width, start, dtype))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return x [..., width], scaled, in its dtype."""
    return (x * self.gamma.get_value()).astype(x.dtype)


def layer_norm(
  channels: int, epsilon: float, wide: jax.typing.DTypeLike, rngs: nnx.Rngs
) -> nnx.LayerNorm:
  """Return a layer norm that computes in `wide`; in another dtype nnx would round its scale."""
  return nnx.LayerNorm(
    channels, epsilon=epsilon, use_fast_variance=False, dtype=wide, param_dtype=wide, rngs=rngs
  )


class BlurredConv(nnx.Conv):
  """A convolution with stride whose input is blurred first (BlurPool, arXiv:1904.11486).

  In the order of FFCV and of Composer's `blur_first`: blur without stride, then convolve.
  """

  def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
    """Return the convolution of the blurred x [N, H, W, C]."""
    return super().__call__(blur(x), out_sharding)


def blur(x: jax.Array) -> jax.Array:
  """Return x [N, H, W, C] under the filter [1 2 1]/4 along height and width, zeros outside.

  Sums of shifted images, in float32 at least, which the compiler fuses into one pass; a
  convolution of one channel a group would leave the matrix unit of a TPU empty.
  """
  y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  for axis in (1, 2):
    size = x.shape[axis]
    padded = jnp.pad(y, [(int(a == axis),) * 2 for a in range(x.ndim)])
    before, here, after = (jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(3))
    y = (before + 2 * here + after) / 4
  return y.astype(x.dtype)


def max_pool(x: jax.Array, *, blurred: bool = False) -> jax.Array:
  """Return the 3x3 maxima of x [N, H, W, C] at every second place.

  Args:
    x: activations.
    blurred: whether all maxima are blurred before every second is taken, as in Composer.
  """
  # nnx.max_pool pads with -inf, so that the border never wins.
  stride = 1 if blurred else 2
  x = nnx.max_pool(x, (3, 3), strides=(stride, stride), padding=((1, 1), (1, 1)))
  return every_nth(blur(x), 2) if blurred else x


def row_pairs(x: jax.Array) -> jax.Array:
  """Return images [N, H, W, C] as [N, H/2, W, 2C]: the channels of two rows, the upper's first."""
  n, height, width, channels = x.shape
  x = x.reshape(n, height // 2, 2, width, channels).swapaxes(2, 3)
  return x.reshape(n, height // 2, width, 2 * channels)


def kernel_of_row_pairs(kernel: jax.Array) -> jax.Array:
  """Return a kernel [7, 7, I, O] as that of `conv_of_row_pairs`, [4, 7, 2I, O].

  The same weights and zeros for an eighth row: half of a space to depth (Ying et al.,
  arXiv:1811.06992).
  """
  kernel = jnp.pad(kernel, ((1, 0), (0, 0), (0, 0), (0, 0)))
  _, width, inputs, outputs = kernel.shape
  kernel = kernel.reshape(4, 2, width, inputs, outputs).swapaxes(1, 2)
  return kernel.reshape(4, width, 2 * inputs, outputs)


def conv_of_row_pairs(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Return a 7x7 convolution of stride 2 of images, for x = row_pairs(images): of 4x7 here."""
  return jax.lax.conv_general_dilated(
    x,
    kernel.astype(x.dtype),
    (1, 2),
    ((2, 1), (3, 3)),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


def every_nth(x: jax.Array, n: int) -> jax.Array:
  """Return every n-th pixel of both directions of x [N, H, W, C].

  Not by an index, which becomes a gather where the number of images is free.
  """
  return jax.lax.slice(x, (0, 0, 0, 0), x.shape, (1, n, n, 1))


def halve(x: jax.Array) -> jax.Array:
  """Return the means of 2x2 pixels of x [N, H, W, C]; of what is there at an odd border."""
  odd = tuple((0, size % 2) for size in x.shape[1:3])
  return nnx.avg_pool(x, (2, 2), strides=(2, 2), padding=odd, count_include_pad=False)


def pad_channels(x: jax.Array, outputs: int) -> jax.Array:
  """Return x [N, H, W, C] with channels of zeros on both sides, `outputs` in all."""
  missing = outputs - x.shape[-1]
  return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))
