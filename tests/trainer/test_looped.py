"""The gradient of a convolution in a loop against the one that JAX derives."""

import jax
import numpy as np
import pytest

from trainer.models import looped


@pytest.mark.parametrize(("kernel", "stride", "size"), [(3, 1, 4), (3, 2, 4), (3, 2, 5), (1, 1, 3)])
def test_gradients(kernel, stride, size):
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, size, size + 2, 3))
    kernels = rng.normal(size=(kernel, kernel, 3, 5))

    def value(convolve, x, kernels):
      return jax.numpy.sum(jax.numpy.sin(convolve(x, kernels)))

    def both(x, kernels):
      ours, ordinary = (
        jax.grad(lambda *args, f=f: value(f, *args), (0, 1))(x, kernels)
        for f in (
          lambda x, k: looped.convolve(x, k, stride),
          lambda x, k: looped._plain(stride, x, k),
        )
      )
      return ours, ordinary

    ours, ordinary = jax.jit(both)(x, kernels)
  for found, expected in zip(ours, ordinary, strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_what_a_cpu_compiles_in_a_loop_is_in_the_order_that_is_fast():
  def value(x, kernel):
    x, _ = jax.lax.scan(lambda x, _: (looped.convolve(x, kernel, 1), None), x, length=2)
    return x.sum()

  x, kernel = np.ones((2, 4, 4, 3), np.float32), np.ones((3, 3, 3, 3), np.float32)
  text = jax.jit(jax.grad(value, (0, 1))).lower(x, kernel).compile().as_text()
  convolutions = [line for line in text.splitlines() if " convolution(" in line]
  assert len(convolutions) >= 3
  assert all("dim_labels=b01f_01io->b01f" in line for line in convolutions)
