"""The gradient of a convolution on a CPU against the one that JAX derives."""

import jax
import numpy as np
import pytest

from trainer.models import convolution

AROUND = [(1, 1)] * 2


DENSE, SPLIT, DEPTHWISE = ((3, 5), 1), ((4, 6), 2), ((3, 3), 3)  # channels and groups


@pytest.mark.parametrize(
  ("kind", "kernel", "stride", "size", "padding"),
  [
    (DENSE, 3, 1, 4, AROUND),
    (DENSE, 3, 2, 4, AROUND),
    (DENSE, 3, 2, 5, AROUND),
    (DENSE, 1, 2, 4, "SAME"),
    (SPLIT, 3, 1, 4, "SAME"),
    (SPLIT, 3, 2, 5, AROUND),
    (DEPTHWISE, 3, 2, 4, "SAME"),
    (DEPTHWISE, 5, 2, 5, "SAME"),
    (DEPTHWISE, 5, 1, 1, "SAME"),
    (DEPTHWISE, 3, 2, 4, AROUND),
  ],
)
def test_gradients(kind, kernel, stride, size, padding):
  (inputs, outputs), groups = kind
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, size, size + 2, inputs))
    kernels = rng.normal(size=(kernel, kernel, inputs // groups, outputs))

    def ordinary(x, kernels):
      return jax.lax.conv_general_dilated(
        x,
        kernels,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
      )

    def ours(x, kernels):
      return convolution.convolve(x, kernels, stride, padding, groups)

    def gradients(convolve):
      return jax.grad(lambda *args: jax.numpy.sum(jax.numpy.sin(convolve(*args))), (0, 1))

    results = jax.jit(lambda *args: [gradients(f)(*args) for f in (ours, ordinary)])(x, kernels)
  for found, expected in zip(*results, strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
  ("kernel", "stride", "groups", "padding", "dilated"),
  [
    (1, 2, 1, [(0, 0)] * 2, False),
    (1, 3, 1, [(0, 0)] * 2, False),
    (1, 2, 2, [(0, 0)] * 2, True),
    (1, 2, 1, AROUND, True),
    (3, 2, 1, AROUND, True),
    (1, 1, 1, [(0, 0)] * 2, False),
  ],
)
def test_zeros_come_in_behind_the_convolution(kernel, stride, groups, padding, dilated):
  options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": groups}
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 6, 9, 4))
    kernels = rng.normal(size=(kernel, kernel, 4 // groups, 6))

    def gradients(convolve):
      def loss(x, kernels):
        y = convolve(x, kernels, (stride, stride), padding, **options)
        return jax.numpy.sum(jax.numpy.sin(y)), y

      return jax.grad(loss, (0, 1), has_aux=True)

    ours = gradients(convolution.zeros_last)
    results = [f(x, kernels) for f in (ours, gradients(jax.lax.conv_general_dilated))]
    of_x = str(jax.make_jaxpr(lambda x, kernels: ours(x, kernels)[0][0])(x, kernels))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12), *results)
  assert (f"lhs_dilation=({stride}, {stride})" in of_x) == dilated or stride == 1


def compiled(groups):
  """Returns the program of a CPU for the gradients of two convolutions in a loop."""

  def value(x, kernel):
    def layer(x, _):
      return convolution.convolve(x, kernel, 1, AROUND, groups), None

    return jax.lax.scan(layer, x, length=2)[0].sum()

  x, kernel = np.ones((2, 4, 4, 4), np.float32), np.ones((3, 3, 4 // groups, 4), np.float32)
  text = jax.jit(jax.grad(value, (0, 1))).lower(x, kernel).compile().as_text()
  return [line for line in text.splitlines() if " convolution(" in line]


def test_what_a_cpu_compiles_in_a_loop_is_in_the_order_that_is_fast():
  for groups, number in ((1, 3), (2, 5)):  # of the gradients two for each group
    convolutions = compiled(groups)
    assert len(convolutions) >= number
    assert all("dim_labels=b01f_01io->b01f" in line for line in convolutions)


def test_a_cpu_convolves_in_groups_forwards_alone():
  assert len(compiled(4)) == 1
  assert sum("group_count" in line for line in compiled(2)) == 1
