"""Convolutions of maps that are too thin to be split, and gradients that are fast on a CPU or TPU.

Where the height of images is split over the axis `space` of the mesh in context, a map that has no
more rows than the axis has devices is whole on each of them. Split, it would be convolved wrongly
by XLA (of jax 0.10.2), whose partitioner then splits the rows of kernels that a step computes, by a
cast to bfloat16 as well as by standardisation. Gradients are wrong with any kernels where two
convolutions read the same map.

XLA's compiler for CPUs (jax 0.10.2) has a fast implementation of dense convolutions, for one order
of axes. It brings others into that order, but only outside of loops: the two of a gradient took 30
times as long in a `scan` as outside. Gradients with groups are computed value by value: that of the
kernels of 6 groups of 32 channels took 700 ms for 64 maps of 8 px, and takes 8 ms here.
"""

from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

_LAYOUTS = ("NHWC", "HWIO", "NHWC")
_NO_PADS = ((0, 0), (0, 0))
_Pads = tuple[tuple[int, int], ...]
_Pair = tuple[jax.Array, jax.Array]


def dense(
  x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, **options: Any
) -> jax.Array:
  """Return `jax.lax.conv_general_dilated` of x [N, H, W, I], for the layers of an nnx.Conv."""
  rows = -(-x.shape[1] // strides[0])
  x = _whole_if_thin(x, rows)
  y = jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
  return _whole_if_thin(y, rows)


def zeros_last(
  x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, **options: Any
) -> jax.Array:
  """Return what `dense` does; the gradient of x takes less time where a 1x1 kernel has a stride.

  It is zero between the pixels that are read. Ordinarily zeros are put between those of a cotangent
  first, and a TPU multiplies them all; here they are put in behind the convolution.
  """
  height, width = strides
  if kernel.shape[:2] != (1, 1) or height == 1 or height != width:
    return dense(x, kernel, strides, padding, **options)
  if options["feature_group_count"] > 1 or any(map(any, padding)) or _space() > 1:
    return dense(x, kernel, strides, padding, **options)
  return _pointwise(x, kernel, height)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _pointwise(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  return _plain(stride, _NO_PADS, 1, x, kernel)


def _pointwise_forward(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, _Pair]:
  return _plain(stride, _NO_PADS, 1, x, kernel), (x, kernel)


def _pointwise_backward(stride: int, saved: _Pair, cotangent: jax.Array) -> _Pair:
  x, kernel = saved
  _, pull = jax.vjp(functools.partial(_plain, stride, _NO_PADS, 1, x), kernel)
  read = _plain(1, _NO_PADS, 1, cotangent, kernel.swapaxes(2, 3))
  ends = [
    (0, n - stride * (outputs - 1) - 1, stride - 1)
    for n, outputs in zip(x.shape[1:3], cotangent.shape[1:3], strict=True)
  ]
  of_x = jax.lax.pad(read, jnp.zeros((), x.dtype), ((0, 0, 0), *ends, (0, 0, 0)))
  return of_x, *pull(cotangent)


_pointwise.defvjp(_pointwise_forward, _pointwise_backward)


def _space() -> int:
  """Return how many devices the height of images is split over."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.shape["space"] if "space" in mesh.auto_axes else 1


def _whole_if_thin(x: jax.Array, rows: int) -> jax.Array:
  """Return x [N, H, W, C], whole along H if the smaller maps of a convolution have so few rows."""
  space = _space()
  if space == 1 or rows > space:
    return x
  free = P.UNCONSTRAINED
  return jax.lax.with_sharding_constraint(x, P(free, None, free, free))


def convolve(
  x: jax.Array,
  kernel: jax.Array,
  stride: int,
  padding: str | Sequence[tuple[int, int]],
  groups: int = 1,
) -> jax.Array:
  """Return x [N, H, W, I] convolved with a square kernel [K, K, I / groups, O].

  On other devices the gradient is the ordinary one.

  Args:
    x: images.
    kernel: in the dtype of x.
    stride: of both directions.
    padding: "SAME", or zeros before and behind, for height and width.
    groups: of channels.
  """
  if isinstance(padding, str):
    padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (stride,) * 2, padding)
  pads = tuple((before, behind) for before, behind in padding)
  rows = -(-x.shape[1] // stride)
  return _whole_if_thin(_convolve(_whole_if_thin(x, rows), kernel, stride, pads, groups), rows)


def for_conv(
  x: jax.Array,
  kernel: jax.Array,
  strides: tuple[int, int],
  padding: str | Sequence[tuple[int, int]],
  *,
  feature_group_count: int,
  **_: Any,
) -> jax.Array:
  """Return `convolve` of what an nnx.Conv passes on, which is not dilated."""
  return convolve(x, kernel, strides[0], padding, feature_group_count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve(x: jax.Array, kernel: jax.Array, stride: int, pads: _Pads, groups: int) -> jax.Array:
  return _plain(stride, pads, groups, x, kernel)


def _plain(stride: int, pads: _Pads, groups: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
  return jax.lax.conv_general_dilated(
    x, kernel, (stride,) * 2, pads, dimension_numbers=_LAYOUTS, feature_group_count=groups
  )


def _forward(
  x: jax.Array, kernel: jax.Array, stride: int, pads: _Pads, groups: int
) -> tuple[jax.Array, _Pair]:
  return _plain(stride, pads, groups, x, kernel), (x, kernel)


def _backward(stride: int, pads: _Pads, groups: int, saved: _Pair, cotangent: jax.Array) -> _Pair:
  def ordinary(x: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> _Pair:
    _, pull = jax.vjp(functools.partial(_plain, stride, pads, groups), x, kernel)
    of_x, of_kernel = pull(cotangent)
    return of_x, of_kernel

  depthwise = groups > 1 and saved[1].shape[2:] == (1, groups)
  fast = _by_taps if depthwise else functools.partial(_by_group, groups)
  of_x, of_kernel = jax.lax.platform_dependent(
    *saved, cotangent, cpu=functools.partial(fast, stride, pads), default=ordinary
  )
  return of_x, of_kernel


_convolve.defvjp(_forward, _backward)


def _by_group(
  groups: int, stride: int, pads: _Pads, x: jax.Array, kernel: jax.Array, cotangent: jax.Array
) -> _Pair:
  """Return both gradients, each group by itself."""
  if groups == 1:
    return _in_order(stride, pads, x, kernel, cotangent)
  parts = zip(*(jnp.split(a, groups, axis=3) for a in (x, kernel, cotangent)), strict=True)
  of_x, of_kernel = zip(*(_in_order(stride, pads, *part) for part in parts), strict=True)
  return jnp.concatenate(of_x, axis=3), jnp.concatenate(of_kernel, axis=3)


def _in_order(
  stride: int, pads: _Pads, x: jax.Array, kernel: jax.Array, cotangent: jax.Array
) -> _Pair:
  """Return both gradients by convolutions in _LAYOUTS, with arrays transposed in their place."""
  spread, around = _edges(stride, pads, x, kernel, cotangent)
  of_x = jax.lax.conv_general_dilated(
    cotangent,
    jnp.flip(kernel, (0, 1)).swapaxes(2, 3),
    (1, 1),
    spread,
    lhs_dilation=(stride,) * 2,
    dimension_numbers=_LAYOUTS,
  )
  of_kernel = jax.lax.conv_general_dilated(
    x.transpose(3, 1, 2, 0),
    cotangent.transpose(1, 2, 0, 3),
    (1, 1),
    around,
    rhs_dilation=(stride,) * 2,
    dimension_numbers=_LAYOUTS,
  )
  return of_x, of_kernel.transpose(1, 2, 0, 3)


def _by_taps(
  stride: int, pads: _Pads, x: jax.Array, kernel: jax.Array, cotangent: jax.Array
) -> _Pair:
  """Return both gradients of a depthwise convolution, by products with shifted images."""
  spread, around = _edges(stride, pads, x, kernel, cotangent)
  wide = jnp.promote_types(x.dtype, jnp.float32)
  size, (height, width), channels = kernel.shape[0], x.shape[1:3], x.shape[3]
  zero = jnp.zeros((), x.dtype)
  gaps = [(*edges, stride - 1) for edges in spread]
  apart = jax.lax.pad(cotangent, zero, ((0, 0, 0), *gaps, (0, 0, 0))).astype(wide)
  taps = np.argwhere(np.ones((size, size), bool))
  of_x = jnp.zeros_like(x, wide)
  for i, j in taps.tolist():
    shifted = apart[:, i : i + height, j : j + width]
    of_x += shifted * kernel[size - 1 - i, size - 1 - j, 0].astype(wide)
  padded = jax.lax.pad(x, zero, ((0, 0, 0), *((*edges, 0) for edges in around), (0, 0, 0)))
  spans = [n - size + 1 for n in padded.shape[1:3]]

  def of_tap(tap: jax.Array) -> jax.Array:
    window = jax.lax.dynamic_slice(padded, (0, tap[0], tap[1], 0), (x.shape[0], *spans, channels))
    seen = window[:, ::stride, ::stride].astype(wide)
    # Of each example: summed over all at once, the compiler reads memory in the wrong order.
    return jnp.sum(seen * cotangent, axis=(1, 2))

  of_kernel = jnp.sum(jax.lax.map(of_tap, taps), axis=1).reshape(kernel.shape)
  return of_x.astype(x.dtype), of_kernel.astype(kernel.dtype)


def _edges(
  stride: int, pads: _Pads, x: jax.Array, kernel: jax.Array, cotangent: jax.Array
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
  """Return the zeros around the cotangent in the gradient of x, and around x in the kernel's.

  Where there are too many pixels they are negative. In both gradients stride - 1 zeros are between
  the pixels of the cotangent.
  """
  size = kernel.shape[0]
  spread, around = [], []
  for (before, _), n, outputs in zip(pads, x.shape[1:3], cotangent.shape[1:3], strict=True):
    span = stride * (outputs - 1) + 1
    spread.append((size - 1 - before, n + before - span))
    around.append((before, span + size - 1 - n - before))
  return spread, around
