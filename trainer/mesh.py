"""The device mesh, where each array lives on it, and how a host's batch gets there."""

import collections
import itertools
from typing import Any, Iterator

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np


def make_mesh() -> Mesh:
  """Returns a mesh with the axis `data` over every device of every process."""
  return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Examples are split over `data`."""
  return NamedSharding(mesh, P("data"))


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, P())


def to_global(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """Joins this host's rows [b/hosts, ...] with those of the others into global arrays [b, ...] over `data`."""
  sharding = batch_sharding(mesh)

  def join(rows: np.ndarray) -> jax.Array:
    first = jax.process_index() * len(rows)

    def shard(index: tuple[slice, ...]) -> np.ndarray:
      start, stop, _ = index[0].indices(jax.process_count() * len(rows))
      return rows[start - first:stop - first]

    # A third of the time of make_array_from_process_local_data, which first finds out what is known here.
    return jax.make_array_from_callback((jax.process_count() * len(rows), *rows.shape[1:]), sharding, shard)

  return {name: join(rows) for name, rows in batch.items()}


def flags(mesh: Mesh, value: int) -> jax.Array:
  """Returns int32 [number of devices] with `value` on the devices of this host; other hosts may hold another one."""
  return jax.make_array_from_callback((mesh.size,), NamedSharding(mesh, P(mesh.axis_names)),
                                      lambda index: np.full(1, value, np.int32))


def prefetch(mesh: Mesh, host_batches: Iterator[dict[str, np.ndarray]], names: tuple[str, ...],
             ahead: int = 2) -> Iterator[dict[str, jax.Array]]:
  """Yields global batches, with the next `ahead` already on their way to the devices.

  Transfers are asynchronous, so two batches in flight hide them behind the running step; more would only hold memory.

  Args:
    mesh: the mesh of the run.
    host_batches: this host's rows of each global batch.
    names: the entries that the devices need.
    ahead: batches on the devices before they are asked for.
  """
  queue: collections.deque[Any] = collections.deque()
  for batch in itertools.islice(host_batches, ahead):
    queue.append(to_global(mesh, {name: batch[name] for name in names}))
  while queue:
    yield queue.popleft()
    for batch in itertools.islice(host_batches, 1):
      queue.append(to_global(mesh, {name: batch[name] for name in names}))
