"""The state of a run: abstract first, then born in place by one jitted function."""

from collections.abc import Callable
from typing import Any

from flax import nnx, struct
import jax
import jax.numpy as jnp
import ml_collections
import optax

from trainer import models


@struct.dataclass
class TrainState:
  """Everything that a step reads and writes.

  Attributes:
    step: int32 scalar, steps taken.
    params: nested dict of float32 arrays; float64 if `config.model.dtype` is.
    batch_stats: nested dict of running means and variances, of the same dtype.
    opt_state: state of the optax chain.
    ema: {'params', 'batch_stats'} averaged over steps, or None.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: optax.OptState
  ema: Any

  def for_eval(self) -> tuple[Any, Any]:
    """Returns the (params, batch_stats) that evaluation uses: the averaged ones where there are any."""
    return (
      (self.params, self.batch_stats)
      if self.ema is None
      else (self.ema["params"], self.ema["batch_stats"])
    )


def make_init(
  config: ml_collections.ConfigDict, optimizer: optax.GradientTransformation, shards: int
) -> tuple[nnx.GraphDef, Callable[[], TrainState]]:
  """Returns the static part of the model, and a function to be jitted that makes the state of step 0 from the seed.

  Args:
    config: config of the run.
    optimizer: of its parameters.
    shards: number of parts that the examples of a batch are split in over devices.
  """

  def init() -> TrainState:
    model = models.create(
      config.model, rngs=nnx.Rngs(params=jax.random.key(config.seed)), shards=shards
    )
    _, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    params, batch_stats = nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)
    ema = {"params": params, "batch_stats": batch_stats} if config.optimizer.ema_decay else None
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params), ema)

  # A graph definition holds no arrays, so one traced without memory serves every later merge.
  graphdefs = []
  jax.eval_shape(
    lambda: graphdefs.append(
      nnx.graphdef(models.create(config.model, rngs=nnx.Rngs(0), shards=shards))
    )
  )
  return graphdefs[0], init


def fingerprints(tree: Any) -> dict[str, int]:
  """Returns a 32-bit hash of every leaf of `tree`, by its path.

  Each element's bits are mixed with its position and pushed through a bijection of 32 bits (the finaliser of
  MurmurHash3), so any change of one element changes its term; terms are summed modulo 2**32. Integer sums do not
  depend on their order, so the hash is the same on any mesh, sharding and number of hosts.
  """
  hashes = {
    jax.tree_util.keystr(path, simple=True, separator="/"): _leaf_hash(leaf)
    for path, leaf in jax.tree.leaves_with_path(tree)
  }
  return {name: int(value) for name, value in jax.device_get(hashes).items()}


@jax.jit  # for itself, not over the tree: a net repeats a few dozen shapes over hundreds of leaves
def _leaf_hash(x: jax.Array) -> jax.Array:
  bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
  words = [bits] if x.dtype.itemsize <= 4 else [bits >> 32, bits & 0xFFFFFFFF]
  position = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  terms = [
    _mix(word.astype(jnp.uint32) ^ _mix(2 * position + jnp.uint32(index + 1)))
    for index, word in enumerate(words)
  ]
  return sum(jnp.sum(term, dtype=jnp.uint32) for term in terms)


def _mix(h: jax.Array) -> jax.Array:
  h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
  return h ^ (h >> 16)
