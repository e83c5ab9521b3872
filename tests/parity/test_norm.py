"""Batch norm far from 0 against torch in float64: outputs, gradients, running averages."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.models import norm

torch = pytest.importorskip("torch", reason="needs the extra parity")

CHANNELS, EPSILON = 4, 1e-5
# Mean over deviation, dtype of the input; bfloat16 has no deviations left at 1,000.
INPUTS = [(ratio, "float32") for ratio in (1, 30, 100, 300, 1000, 10_000)]
INPUTS += [(ratio, "bfloat16") for ratio in (1, 30, 100)]


def batch(ratio, dtype):
  """Return activations [8, 12, 12, 4] and a cotangent, in float64, exact in the dtype."""
  rng = np.random.default_rng(ratio)
  signs = np.array([1, -1, 1, -1])
  x = jnp.asarray(rng.normal(signs * ratio, 1, (8, 12, 12, CHANNELS)), dtype)
  return np.asarray(x, np.float64), rng.normal(size=x.shape).astype(np.float32).astype(np.float64)


def ours(x, cotangent, dtype, **options):
  """Return output, gradients of x, scale and bias, and the new running averages."""
  layer = norm.BatchNorm(
    CHANNELS, momentum=0.9, epsilon=EPSILON, dtype=jnp.float32, zero_scale=False, **options
  )
  layer.mean.set_value(jnp.asarray(x.mean((0, 1, 2)) + 0.3, jnp.float32))  # as training has it
  graphdef, params, statistics = nnx.split(layer, nnx.Param, nnx.BatchStat)

  @jax.jit
  def both(params, x):
    def f(params, x):
      merged = nnx.merge(graphdef, params, statistics, copy=True)
      return merged(x.astype(jnp.float32)), nnx.state(merged, nnx.BatchStat)

    y, back, new = jax.vjp(f, params, x.astype(jnp.float32), has_aux=True)
    return y, *back(jnp.asarray(cotangent, jnp.float32)), new

  y, of_params, of_x, new = both(params, jnp.asarray(x, dtype))
  return [
    y,
    of_x,
    of_params["scale"][...],
    of_params["bias"][...],
    new["mean"][...],
    new["var"][...],
  ]


def torchs(x, cotangent):
  image = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
  mean = torch.tensor(np.float32(x.mean((0, 1, 2)) + 0.3).astype(np.float64))
  var = torch.ones(CHANNELS, dtype=torch.float64)
  scale = torch.ones(CHANNELS, dtype=torch.float64, requires_grad=True)
  bias = torch.zeros(CHANNELS, dtype=torch.float64, requires_grad=True)
  y = torch.nn.functional.batch_norm(
    image, mean, var, scale, bias, training=True, momentum=0.1, eps=EPSILON
  )
  y.backward(torch.tensor(cotangent.transpose(0, 3, 1, 2)))
  found = [a.detach().numpy() for a in (y, image.grad, scale.grad, bias.grad, mean, var)]
  return [a.transpose(0, 2, 3, 1) if a.ndim == 4 else a for a in found]


@pytest.mark.parametrize("ratio, dtype", INPUTS)
def test_shifted_moments_hold_at_any_mean(ratio, dtype):
  x, cotangent = batch(ratio, dtype)
  found = ours(x, cotangent, dtype, shifted=True, unbiased=True)
  y, of_x, of_scale, of_bias, mean, var = map(np.asarray, found)
  expected = torchs(x, cotangent)
  # The mean itself is a float32, and so is off by this share of a deviation at most.
  rounding = ratio * np.finfo(np.float32).eps
  np.testing.assert_allclose(y, expected[0], rtol=0, atol=2e-6 + rounding)
  np.testing.assert_allclose(of_x, expected[1], rtol=0, atol=2e-5 + 5 * rounding)
  values = x.size / CHANNELS
  np.testing.assert_allclose(of_scale, expected[2], rtol=0, atol=values * (1e-6 + rounding))
  np.testing.assert_allclose(of_bias, expected[3], rtol=0, atol=values * 1e-6)
  np.testing.assert_allclose(mean, expected[4], rtol=3e-7)
  np.testing.assert_allclose(var, expected[5], rtol=1e-6)


@pytest.mark.parametrize("ratio", [100, 300, 1000])
def test_what_plain_moments_lose(ratio):
  x, cotangent = batch(ratio, "float32")
  *_, var = ours(x, cotangent, "float32", unbiased=True)
  expected = torchs(x, cotangent)[-1]
  loss = np.abs((np.asarray(var) - 0.9) / (expected - 0.9) - 1).max()  # of the batch's variance
  assert norm.lost(ratio) / 5 < loss < 2 * norm.lost(ratio)


def test_near_zero_both_are_the_same():
  x, cotangent = batch(1, "float32")
  for plain, shifted in zip(
    ours(x, cotangent, "float32"), ours(x, cotangent, "float32", shifted=True), strict=True
  ):
    np.testing.assert_allclose(plain, shifted, rtol=1e-5, atol=1e-5)
