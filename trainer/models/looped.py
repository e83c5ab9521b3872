"""A convolution whose gradient is fast in a loop on a CPU.

XLA's compiler for CPUs (jax 0.10.2) brings the layouts of convolutions into the order that its fast
implementation takes, but only those outside of loops. The two of a gradient are not in that order
by themselves, and then took 30 times as long in a `scan` as outside.
"""

import functools

import jax
import jax.numpy as jnp

_LAYOUTS = ("NHWC", "HWIO", "NHWC")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """Return x [N, H, W, I] convolved with a square kernel [K, K, I, O], padded by K // 2.

  On other devices the gradient is the ordinary one.
  """
  return _plain(stride, x, kernel)


def _plain(stride: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
  around = (kernel.shape[0] // 2,) * 2
  return jax.lax.conv_general_dilated(
    x, kernel, (stride,) * 2, (around,) * 2, dimension_numbers=_LAYOUTS
  )


def _forward(
  x: jax.Array, kernel: jax.Array, stride: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _plain(stride, x, kernel), (x, kernel)


def _backward(
  stride: int, saved: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
  def ordinary(x: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, ...]:
    _, pull = jax.vjp(functools.partial(_plain, stride), x, kernel)
    return tuple(pull(cotangent))

  of_x, of_kernel = jax.lax.platform_dependent(
    *saved, cotangent, cpu=functools.partial(_in_order, stride), default=ordinary
  )
  return of_x, of_kernel


def _in_order(
  stride: int, x: jax.Array, kernel: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Return both gradients by convolutions in _LAYOUTS, with arrays transposed in their place."""
  size, before = kernel.shape[0], kernel.shape[0] // 2
  spans = [stride * (n - 1) + 1 for n in cotangent.shape[1:3]]  # with stride - 1 zeros in between
  lengths = list(zip(x.shape[1:3], spans, strict=True))
  of_x = jax.lax.conv_general_dilated(
    cotangent,
    jnp.flip(kernel, (0, 1)).swapaxes(2, 3),
    (1, 1),
    [(size - 1 - before, n + before - span) for n, span in lengths],
    lhs_dilation=(stride,) * 2,
    dimension_numbers=_LAYOUTS,
  )
  of_kernel = jax.lax.conv_general_dilated(
    x.transpose(3, 1, 2, 0),
    cotangent.transpose(1, 2, 0, 3),
    (1, 1),
    [(before, span + size - 1 - n - before) for n, span in lengths],
    rhs_dilation=(stride,) * 2,
    dimension_numbers=_LAYOUTS,
  )
  return of_x, of_kernel.transpose(1, 2, 0, 3)


convolve.defvjp(_forward, _backward)
