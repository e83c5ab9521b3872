"""The state of a run: abstract first, then born in place by one jitted function."""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple
import zlib

from flax import nnx, struct
import jax
import jax.numpy as jnp
import ml_collections
import optax

from configs import image_sizes
from trainer import models
from trainer.models import packing
from trainer.models.rngs import streams

# A pytree of arrays, or of their shapes; its exact structure is the business of who made it.
Tree = Any
# Nested dicts of arrays with string keys: {"head": {"kernel": ..., "bias": ...}, ...}.
Params = dict[str, Any]
BatchStats = dict[str, Any]


class Variables(NamedTuple):
  """What a model computes with.

  Attributes:
    params: trained by gradients, nested dict of float32 arrays; float64 if the model is.
    batch_stats: running means and variances, likewise; empty without batch norm.
    others: variables of any other kind; empty for most models.
  """

  params: Params
  batch_stats: BatchStats
  others: dict[str, Any]


@struct.dataclass
class TrainState:
  """Everything that a step reads and writes. Nothing random is in it: see `step_key`.

  While a net with `config.model.scan` trains, equal blocks are stacked leaves: see
  trainer/models/packing.py. A checkpoint has each block by itself.

  Attributes:
    step: int32 scalar, steps taken.
    params: see Variables.
    batch_stats: see Variables.
    others: see Variables.
    opt_state: state of the optax chain.
    ema: {"params", "batch_stats"} averaged over steps, or None.
    masks: bool, which weights are not zero, of the sparse leaves of params; None of a dense run.
  """

  step: jax.Array
  params: Params
  batch_stats: BatchStats
  others: dict[str, Any]
  opt_state: optax.OptState
  ema: dict[str, Any] | None
  masks: dict[str, Any] | None = None

  def for_eval(self) -> Variables:
    """Return what evaluation uses: the averaged parameters and statistics where there are any."""
    averaged = self.ema or {"params": self.params, "batch_stats": self.batch_stats}
    return Variables(averaged["params"], averaged["batch_stats"], self.others)

  def raw(self) -> Variables:
    """Return what training computes with, averaged or not."""
    return Variables(self.params, self.batch_stats, self.others)


@dataclasses.dataclass(frozen=True)
class Model:
  """A model without its arrays.

  Attributes:
    graphdef: of nnx.split(model, nnx.Param, nnx.BatchStat, nnx.RngState, ...).
    random: shapes of its random streams.
    streams: their names.
    packed: whether its variables are those of trainer/models/packing.py.
  """

  graphdef: nnx.GraphDef[Any]
  random: Tree
  streams: tuple[str, ...]
  packed: bool = False

  def merge(self, variables: Variables, key: jax.Array | None) -> nnx.Module:
    """Return the model with these arrays: in training mode with a key, else in evaluation mode."""
    streams = jax.tree.map(_placeholder, self.random)
    params, batch_stats, others = variables
    if self.packed:
      params = packing.unpack_params(params)
      batch_stats, others = packing.unpack(batch_stats), packing.unpack(others)
    model = nnx.merge(self.graphdef, params, batch_stats, streams, others, copy=True)
    if key is None:
      model.eval()
    else:
      model.train()
      keys: dict[str, Any] = {
        name: jax.random.fold_in(key, zlib.crc32(name.encode())) for name in self.streams
      }
      nnx.reseed(model, policy="match_shape", **keys)
    return model

  def variables(self, model: nnx.Module) -> Variables:
    """Return the arrays of what `merge` returned, say after a step has updated its statistics."""
    variables = variables_of(model)
    return packing.pack(variables) if self.packed else variables


def split(model: nnx.Module) -> tuple[Model, Variables]:
  """Return a model without its arrays, and the arrays but for its random streams."""
  graphdef, *states = nnx.split(model, nnx.Param, nnx.BatchStat, nnx.RngState, ...)
  params, batch_stats, random, others = states
  streams = {stream.tag for stream in jax.tree.leaves(random, is_leaf=_is_variable)}
  shapes = jax.eval_shape(lambda: nnx.to_pure_dict(random))
  arrays = Variables(
    nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats), nnx.to_pure_dict(others)
  )
  return Model(graphdef, shapes, tuple(sorted(streams))), arrays


def _is_variable(x: object) -> bool:
  return isinstance(x, nnx.Variable)


def variables_of(model: nnx.Module) -> Variables:
  """Return the arrays of a model as it is."""
  return split(model)[1]


def _placeholder(shape: jax.ShapeDtypeStruct) -> jax.Array:
  """Return what a random stream holds until it is seeded: a key, or a count of draws."""
  if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
    return jnp.broadcast_to(jax.random.key(0), shape.shape)
  return jnp.zeros(shape.shape, shape.dtype)


def step_key(seed: int, step: jax.Array, micro_batch: jax.Array | int) -> jax.Array:
  """Return the key of all randomness in a micro-batch: dropout, stochastic depth, mixing.

  It is a function of these three alone, and what is drawn from it for an example depends on the
  example's place in the micro-batch. So the draws are the same on any number of devices and hosts,
  and after any resume, with nothing random in a checkpoint.
  """
  key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"step"))  # not that of the parameters
  return jax.random.fold_in(jax.random.fold_in(key, step), micro_batch)


def make_init(
  config: ml_collections.ConfigDict,
  optimizer: optax.GradientTransformation,
  shards: int,
  image_size: int = 0,
) -> tuple[Model, Callable[[], TrainState]]:
  """Return the model without its arrays, and a function to be jitted that makes those of step 0.

  Args:
    config: config of the run.
    optimizer: of its parameters.
    shards: number of parts that the examples of a batch are split in over devices.
    image_size: of training images, in pixels; 0 is the largest of the run.
  """

  def create() -> nnx.Module:
    # Streams that the model keeps are seeded in each step; their first keys are never used.
    rngs = streams(default=jax.random.key(0), params=jax.random.key(config.seed))
    size = image_size or max(image_sizes.distinct(config.data))
    return models.create(config.model, image_size=size, rngs=rngs, shards=shards)

  def init() -> TrainState:
    params, batch_stats, others = model.variables(create())
    ema = {"params": params, "batch_stats": batch_stats} if config.optimizer.ema_decay else None
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, params, batch_stats, others, optimizer.init(params), ema)

  # A graph definition holds no arrays, so one traced without memory serves every later merge.
  traced: list[Model] = []
  jax.eval_shape(lambda: traced.append(split(create())[0]))
  model = dataclasses.replace(traced[0], packed=bool(config.model.get("scan", False)))
  return model, init


def path_name(path: tuple[Any, ...]) -> str:
  """Return the path of a leaf in words: "params/head/kernel"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def by_path(tree: Tree) -> dict[str, Any]:
  """Return the leaves of a tree by their path in words."""
  return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def fingerprints(tree: Tree) -> dict[str, int]:
  """Return a 32-bit hash of every leaf of `tree`, by its path.

  Each element's bits are mixed with its position and pushed through a bijection of 32 bits (the
  finaliser of MurmurHash3), so any change of one element changes its term; terms are summed
  modulo 2**32. Integer sums do not depend on their order, so the hash is the same on any mesh,
  sharding and number of hosts.
  """
  hashes = {}
  for path, leaf in jax.tree.leaves_with_path(tree):
    hashes[path_name(path)] = found = leaf_hash(leaf)
    # Sums over shards are collectives, and those of several CPU devices in several processes wait
    # for each other for ever when many of them are queued.
    if jax.default_backend() == "cpu":
      found.block_until_ready()
  return {name: int(value) for name, value in jax.device_get(hashes).items()}


@jax.jit  # for itself, not over the tree: a net repeats a few dozen shapes over hundreds of leaves
def leaf_hash(x: jax.Array) -> jax.Array:
  """Return the uint32 hash of an array; see `fingerprints`."""
  if x.dtype == bool:
    x = x.astype(jnp.uint8)
  bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
  words = [bits] if x.dtype.itemsize <= 4 else [bits >> 32, bits & 0xFFFFFFFF]
  position = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  terms = [
    _mix(word.astype(jnp.uint32) ^ _mix(2 * position + jnp.uint32(index + 1)))
    for index, word in enumerate(words)
  ]
  return sum((jnp.sum(term, dtype=jnp.uint32) for term in terms), jnp.uint32(0))


def _mix(h: jax.Array) -> jax.Array:
  h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
  return h ^ (h >> 16)
