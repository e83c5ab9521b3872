"""The step of Flax's ImageNet example, written anew, to compare ours with.

github.com/google/flax, examples/imagenet: ResNet-50 v1.5 in Linen, batch norm over the global
batch, SGD with Nesterov momentum, weight decay of kernels as a part of the loss, a cosine after a
warm-up. Its images come normalised from the host, in the dtype of its activations: bfloat16 on
accelerators. Only `trainer.bench step` and tests import this.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

CLASSES, SIZE = 1000, 224
_STEPS_PER_EPOCH = 1252  # of 1,024 images


class Block(nn.Module):
  """A bottleneck of 1x1, 3x3 and 1x1 convolutions, the stride on the second."""

  channels: int
  stride: int
  conv: Callable[..., Any]
  norm: Callable[..., Any]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    strides = (self.stride, self.stride)
    y = nn.relu(self.norm()(self.conv(self.channels, (1, 1))(x)))
    y = nn.relu(self.norm()(self.conv(self.channels, (3, 3), strides)(y)))
    y = self.norm(scale_init=nn.initializers.zeros_init())(self.conv(4 * self.channels, (1, 1))(y))
    if x.shape != y.shape:
      x = self.norm(name="norm_proj")(
        self.conv(4 * self.channels, (1, 1), strides, name="conv_proj")(x)
      )
    return nn.relu(x + y)


class ResNet50(nn.Module):
  """ResNet v1.5 of 50 layers."""

  numbers: tuple[int, ...] = (3, 4, 6, 3)
  classes: int = CLASSES
  dtype: Any = jnp.bfloat16

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
    conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
    norm = functools.partial(
      nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype
    )
    x = conv(64, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], name="conv_init")(x)
    x = nn.relu(norm(name="bn_init")(x))
    x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
    for stage, number in enumerate(self.numbers):
      for block in range(number):
        x = Block(64 * 2**stage, 2 if stage and not block else 1, conv, norm)(x)
    x = jnp.mean(x, axis=(1, 2))
    return jnp.asarray(nn.Dense(self.classes, dtype=self.dtype)(x), self.dtype)


class State(NamedTuple):
  """What a step reads and writes."""

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any


def make_step(
  dtype: Any = jnp.bfloat16,
) -> tuple[Callable[[], State], Callable[[State, Any, Any], tuple[State, Any]]]:
  """Return init() -> state and step(state, images, labels) -> (state, metrics)."""
  net = ResNet50(dtype=dtype)
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, 0.4, 5 * _STEPS_PER_EPOCH, 100 * _STEPS_PER_EPOCH
  )
  optimizer = optax.sgd(schedule, momentum=0.9, nesterov=True)

  def init() -> State:
    variables = net.init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3), dtype))
    params = variables["params"]
    return State(jnp.int32(0), params, variables["batch_stats"], optimizer.init(params))

  def step(
    state: State, images: jax.Array, labels: jax.Array
  ) -> tuple[State, dict[str, jax.Array]]:
    one_hot = jax.nn.one_hot(labels, CLASSES)

    def loss_fn(params: Any) -> tuple[jax.Array, tuple[Any, jax.Array]]:
      logits, new = net.apply(
        {"params": params, "batch_stats": state.batch_stats}, images, mutable=["batch_stats"]
      )
      loss = optax.softmax_cross_entropy(logits, one_hot).mean()
      kernels = [x for x in jax.tree.leaves(params) if x.ndim > 1]
      decay = 0.0001 * 0.5 * sum(jnp.sum(x**2) for x in kernels)
      return loss + decay, (new["batch_stats"], logits)

    grads, (batch_stats, logits) = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics = {
      "loss": optax.softmax_cross_entropy(logits, one_hot).mean(),
      "accuracy": jnp.mean(jnp.argmax(logits, -1) == labels),
      "learning_rate": schedule(state.step),
    }
    params = optax.apply_updates(state.params, updates)
    return State(state.step + 1, params, batch_stats, opt_state), metrics

  return init, step


class Program(NamedTuple):
  """The example over some devices: the state whole on each, the batch split."""

  init: Callable[[], State]  # not traced yet
  lowered: jax.stages.Lowered
  whole: NamedSharding
  split: NamedSharding


def build(
  devices: Sequence[jax.Device], batch: int, size: int = SIZE, dtype: Any = jnp.bfloat16
) -> Program:
  """Trace the step for a global batch of images of size x size px, activations of `dtype`."""
  mesh = Mesh(np.array(devices), ("batch",), axis_types=(AxisType.Auto,))
  whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("batch"))
  init, step = make_step(dtype)
  state = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), jax.eval_shape(init)
  )
  images = jax.ShapeDtypeStruct((batch, size, size, 3), dtype, sharding=split)
  labels = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=split)
  lowered = jax.jit(step, donate_argnums=0, out_shardings=whole).lower(state, images, labels)
  return Program(init, lowered, whole, split)
