"""Batch normalisation (Ioffe and Szegedy, arXiv:1502.03167), float32 statistics under any dtype.

nnx.BatchNorm does not serve here, for two reasons seen in flax 0.12.8. With `dtype=bfloat16` it
rounds the running mean and variance, the scale and the bias to 8 bits before it uses them, so that
evaluation is not of the statistics that were kept. And its updates by index (`mean[...] = x`) look
for a sharding on a tracer, which searches the whole trace so far: the time to trace grows with the
square of depth.
"""

from flax import nnx
import jax
import jax.numpy as jnp


class BatchNorm(nnx.Module):
  """Normalises over all axes but the last; under `jit` over the global batch, however sharded.

  `train()` and `eval()` choose between the statistics of the batch and their running averages; a
  new layer trains. The running variance averages the biased variance of the batch, the one that
  normalises. State: Params `scale` and `bias`, BatchStats `mean` and `var`, float32 [channels].

  Args:
    channels: length of the last axis.
    momentum: share of the old running average kept at each step.
    epsilon: added to the variance.
    dtype: of the output; all arithmetic is float32.
    zero_scale: whether the scale starts at 0 instead of 1.
  """

  def __init__(self, channels: int, *, momentum: float, epsilon: float,
               dtype: jax.typing.DTypeLike, zero_scale: bool):
    self.momentum = momentum
    self.epsilon = epsilon
    self.dtype = jnp.dtype(dtype)
    self.use_running_average = False  # the name that nnx.Module.train() and eval() look for
    self.scale = nnx.Param(jnp.full(channels, 0.0 if zero_scale else 1.0, jnp.float32))
    self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))
    self.mean = nnx.BatchStat(jnp.zeros(channels, jnp.float32))
    self.var = nnx.BatchStat(jnp.ones(channels, jnp.float32))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns x [..., channels] normalised, scaled and shifted, in `dtype`."""
    x = x.astype(jnp.float32)
    if self.use_running_average:
      mean, var = self.mean.get_value(), self.var.get_value()
    else:
      axes = tuple(range(x.ndim - 1))
      mean = jnp.mean(x, axes)
      # E[x^2] - E[x]^2 reads the activations once, not twice. float32 holds it unless the mean is
      # a thousand times the deviation, which it is not behind a convolution without bias.
      var = jnp.maximum(0.0, jnp.mean(jnp.square(x), axes) - jnp.square(mean))
      for average, new in ((self.mean, mean), (self.var, var)):
        average.set_value(self.momentum * average.get_value()
                          + (1 - self.momentum) * jax.lax.stop_gradient(new))
    factor = jax.lax.rsqrt(var + self.epsilon) * self.scale.get_value()
    return ((x - mean) * factor + self.bias.get_value()).astype(self.dtype)
