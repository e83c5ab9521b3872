"""The device mesh, where each array lives on it, and how a host's batch gets there.

Axes: examples are split over `data` and `fsdp` together, parameters may be sharded over `fsdp`, and
the height of images over `space`. What crosses the devices follows from where arrays live: the
compiler (GSPMD, arXiv:2105.04663) inserts the collectives and the halos of convolutions.
"""

import collections
from collections.abc import Generator, Iterator, Sequence
import concurrent.futures
import itertools
import math
import os
import re

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import ml_collections
import numpy as np

from input_pipeline.errors import first_line
from trainer import config as config_lib
from trainer.errors import ConfigError, NoDevices
from trainer.models import packing
from trainer.state import Tree, path_name

BATCH_AXES = ("data", "fsdp")


def device_count() -> int:
  """Return the number of devices of all hosts.

  Raises:
    NoDevices: if JAX has none of the kind that it is asked for.
  """
  try:
    return jax.device_count()
  except (RuntimeError, AssertionError) as error:  # the latter, without words, for want of a plugin
    asked = os.environ.get("JAX_PLATFORMS")
    where = f" with JAX_PLATFORMS={asked}" if asked else ""
    reason = f" ({first_line(error)})" if str(error) else ""
    raise NoDevices(
      f"JAX finds no devices{where}{reason}. What it needs for TPUs comes with pip install -e "
      "'.[tpu]', for NVIDIA GPUs with '.[cuda]'; JAX_PLATFORMS=cpu does without."
    ) from error


def make_mesh(
  mesh_config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Return the mesh of `config.mesh`, with the axes `data`, `fsdp` and `space`.

  Devices come by slice, by process, then by number, the last axis first. So host h holds the h-th
  contiguous rows of every global batch, `space` and then `fsdp` are neighbours, and only `data`
  crosses the slow network between slices. (`jax.experimental.mesh_utils` folds an axis over the
  torus instead, and scatters the rows of a host.)

  Args:
    mesh_config: `config.mesh`.
    devices: instead of all devices of all processes.

  Raises:
    ConfigError: if the axes do not make up the devices, or if `fsdp` or `space` would cross slices,
      or `space` processes.
  """
  devices = sorted(
    jax.devices() if devices is None else devices,
    key=lambda device: (_slice(device), device.process_index, device.id),
  )
  shape = config_lib.mesh_shape(mesh_config, len(devices))
  _, fsdp, space = shape
  for border, size in collections.Counter(_slice(device) for device in devices).items():
    if size % (fsdp * space):
      raise ConfigError(
        f"config.mesh.fsdp x config.mesh.space is {fsdp * space}, which does not divide the "
        f"{size} devices of slice {border}."
      )
  for border, size in collections.Counter(device.process_index for device in devices).items():
    if size % space:
      raise ConfigError(
        f"config.mesh.space is {space}, which does not divide the {size} devices of process "
        f"{border}."
      )
  return Mesh(
    np.array(devices).reshape(shape), (*BATCH_AXES, "space"), axis_types=(AxisType.Auto,) * 3
  )


def crosses_slices(mesh: Mesh) -> bool:
  """Return whether there are devices of several slices, which a slow network joins."""
  return len({_slice(device) for device in mesh.devices.flat}) > 1


def _slice(device: jax.Device) -> int:
  return getattr(device, "slice_index", 0)  # only TPUs have it


def batch_shards(mesh: Mesh) -> int:
  """Return the number of parts that the examples of a batch are split in."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
  """Examples are split over `data` and `fsdp`; of images, [N, H, W, 3], the height over `space`."""
  return NamedSharding(mesh, P(BATCH_AXES, "space") if ndim == 4 else P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, P())


def sharding_rules(config: ml_collections.ConfigDict) -> tuple[tuple[str, tuple[str, ...]], ...]:
  """Return rows of (start of a leaf's path, mesh axes to shard it over); the first fit counts.

  With `config.sharding.opt_state=data` the update is computed in shards (arXiv:2004.13336):
  momentum and averaged weights never leave them, gradients are reduced into them, and new
  parameters gathered from them.
  """
  params = ("fsdp",) if config.sharding.params == "fsdp" else ()
  # fsdp first: a shard of the update then lies within the shard of its parameter.
  update = ("fsdp", "data") if config.sharding.opt_state == "data" else params
  return (
    ("params/", params),
    ("(opt_state|ema/params|masks)/", update),
    ("", ()),  # the step, BN statistics and their averages
  )


def state_shardings(config: ml_collections.ConfigDict, mesh: Mesh, state: Tree) -> Tree:
  """Return the NamedSharding of every leaf of a state, by `sharding_rules`.

  A kernel is cut along the first dimension that the axes divide, preferably one that all devices
  of the batch divide, so that parameter and update are cut alike; the last dimension lies along
  the 128 lanes of a TPU, which a thin shard would leave empty. A leaf without such a dimension
  stays replicated, and so do vectors: they are small, and a BN scale in shards would put a
  collective between two layers. A stacked leaf is cut as those of its blocks are.

  Args:
    config: config of the run.
    mesh: its mesh.
    state: tree of arrays or of their shapes, whose paths start as those of
      `trainer.state.TrainState`.
  """
  rules = sharding_rules(config)

  def sharding(path: tuple[object, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    name = path_name(path)
    axes = next(axes for start, axes in rules if re.match(start, name))
    parts = math.prod(mesh.shape[axis] for axis in axes)
    first = int(packing.is_packed(name))
    fit = [d for d in range(first, leaf.ndim) if leaf.shape[d] % parts == 0]
    if parts == 1 or leaf.ndim - first < 2 or not fit:
      return replicated(mesh)
    dimension = min(fit, key=lambda dimension: leaf.shape[dimension] % batch_shards(mesh) != 0)
    return NamedSharding(mesh, P(*[None] * dimension, axes))

  return jax.tree.map_with_path(sharding, state)


def scatter(sums: Tree, shardings: Tree) -> Tree:
  """Put sums over all devices of the batch into the shards of `state_shardings`, over `fsdp` first.

  In one step the compiler of TPUs (libtpu 0.0.42) scatters a sum over 4 or 8 chips of a slice, but
  over 16 and more makes it whole on each and cuts it. In two steps of few chips each it scatters
  both.
  """
  over_fsdp = jax.tree.map(
    lambda x: NamedSharding(x.mesh, P(*[axes and "fsdp" for axes in x.spec])), shardings
  )
  return jax.lax.with_sharding_constraint(
    jax.lax.with_sharding_constraint(sums, over_fsdp), shardings
  )


def describe_shardings(state: Tree) -> list[str]:
  """Return a line for each part of a state and each sharding in it: leaves, bytes, the largest."""
  groups = collections.defaultdict(list)
  for path, leaf in jax.tree.leaves_with_path(state):
    part, *rest = path_name(path).split("/")
    groups[part, str(leaf.sharding.spec).replace("PartitionSpec", "P")].append(
      (leaf, "/".join(rest))
    )
  lines = []
  for (part, spec), leaves in groups.items():
    total = sum(leaf.size * leaf.dtype.itemsize for leaf, _ in leaves)
    local = sum(
      math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, _ in leaves
    )
    largest, name = max(leaves, key=lambda item: item[0].size)
    lines.append(
      f"{part:11} {spec}: {len(leaves)} leaves, {total / 2**20:.2f} MiB, "
      f"{local / 2**20:.2f} on each device" + f"; largest {name} {list(largest.shape)}" * bool(name)
    )
  return lines


def to_global(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """Join this host's rows [b/hosts, ...] with those of the others into global arrays [b, ...]."""

  def join(rows: np.ndarray) -> jax.Array:
    first = jax.process_index() * len(rows)

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
      assert index is not None  # it is only for arrays without dimensions
      start, stop, _ = index[0].indices(jax.process_count() * len(rows))
      return rows[(slice(start - first, stop - first), *index[1:])]

    # A third of the time of make_array_from_process_local_data, which first finds out what is
    # known here.
    return jax.make_array_from_callback(
      (jax.process_count() * len(rows), *rows.shape[1:]), batch_sharding(mesh, rows.ndim), shard
    )

  return {name: join(rows) for name, rows in batch.items()}


def abstract_flags(mesh: Mesh) -> jax.ShapeDtypeStruct:
  """Return the shape of `flags`."""
  return jax.ShapeDtypeStruct(
    (mesh.size,), np.int32, sharding=NamedSharding(mesh, P(mesh.axis_names))
  )


def flags(mesh: Mesh, value: int) -> jax.Array:
  """Return int32 [devices] with `value` on the devices of this host; other hosts give their own."""
  like = abstract_flags(mesh)
  return jax.make_array_from_callback(
    like.shape, like.sharding, lambda index: np.full(1, value, like.dtype)
  )


def prefetch(
  mesh: Mesh, host_batches: Iterator[dict[str, np.ndarray]], names: tuple[str, ...], ahead: int = 2
) -> Generator[dict[str, jax.Array], None, None]:
  """Yield global batches, with the next `ahead` already on their way to the devices.

  A thread waits for the host, so that a batch which is there is handed out while a later one is
  late. Transfers are asynchronous, so two batches in flight hide them behind the running step; more
  would only hold memory.

  Args:
    mesh: the mesh of the run.
    host_batches: this host's rows of each global batch; not to be used elsewhere until the
      generator is closed.
    names: the entries that the devices need.
    ahead: batches on the devices before they are asked for.
  """

  def load() -> dict[str, jax.Array] | None:
    batch = next(endless)
    return to_global(mesh, {name: batch[name] for name in names}) if batch else None

  endless: Iterator[dict[str, np.ndarray] | None] = itertools.chain(
    host_batches, itertools.repeat(None)
  )
  thread = concurrent.futures.ThreadPoolExecutor(1, "prefetch")
  try:
    queue = collections.deque(thread.submit(load) for _ in range(ahead))
    while (batch := queue.popleft().result()) is not None:
      queue.append(thread.submit(load))
      yield batch
  finally:
    thread.shutdown(cancel_futures=True)
