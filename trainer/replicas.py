"""The copies of the state on different devices, compared with each other.

What is replicated over an axis of the mesh has a copy on each of its devices, and every step keeps
the copies equal, bit for bit. A bit that flips in one copy, or a device that computes an update
wrong, makes them drift apart, and nothing else in a run shows it: the gradients are summed over
devices, and a checkpoint holds one copy. So each device hashes its own copies, and the hashes are
compared by one minimum over the devices.

A device that computes a wrong gradient leaves the copies equal, because all take the same sum. It
shows when every device computes the gradient of the same examples (`make_recompute`).
"""

import collections
from collections.abc import Callable, Iterable, Sequence
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
import ml_collections
import numpy as np
import optax

from trainer import augment
from trainer import mesh as mesh_lib
from trainer.errors import ReplicasDiffer
from trainer.pod.pod import Pod
from trainer.pod.requests import LAG, NOTHING
from trainer.state import Model, Params, Tree, Variables, leaf_hash, path_name

_NAMED = 3  # leaves and devices that a sentence names


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A leaf of which several devices have the same part.

  Attributes:
    name: its path.
    axes: of the mesh, over which it is replicated.
  """

  name: str
  axes: tuple[str, ...]


class Comparison(NamedTuple):
  """What a comparison returns.

  Attributes:
    differs: int32, 1 if any two copies differ, else 0; the same on all devices.
    hashes: uint32 [devices, leaves], in the order of the mesh and of `copied`.
  """

  differs: jax.Array
  hashes: jax.Array


# int32 [devices] of zeros -> comparison
Compare = Callable[[jax.Array], Comparison]


def copied(state: Tree, mesh: Mesh) -> dict[int, Leaf]:
  """Return the leaves that are replicated over several devices, by their number in the tree.

  Args:
    state: tree of arrays or of their shapes, with shardings over the mesh.
    mesh: the mesh.
  """
  found = {}
  for number, (path, leaf) in enumerate(jax.tree.leaves_with_path(state)):
    split = {axis for axes in leaf.sharding.spec for axis in np.atleast_1d(axes or ())}
    axes = tuple(axis for axis in mesh.axis_names if axis not in split and mesh.shape[axis] > 1)
    if axes:
      found[number] = Leaf(path_name(path), axes)
  return found


def make_compare(state: Tree, mesh: Mesh) -> jax.stages.Wrapped:
  """Return the jitted compare(state, zeros) -> Comparison.

  The argument `zeros` is int32 [devices], a zero on each. To the compiler it is what makes hashes
  differ between devices: minima over equal values would be optimised away.

  Args:
    state: shapes and shardings of the state.
    mesh: the mesh.
  """
  leaves = copied(state, mesh)
  specs = [jax.tree.leaves(state)[number].sharding.spec for number in leaves]
  by_axes: dict[tuple[str, ...], list[int]] = collections.defaultdict(list)
  for place, leaf in enumerate(leaves.values()):
    by_axes[leaf.axes].append(place)
  partly = any(
    mesh.shape[axis] > 1 and axis not in axes for axes in by_axes for axis in mesh.axis_names
  )

  def on_device(copies: list[jax.Array], zeros: jax.Array) -> tuple[jax.Array, jax.Array]:
    hashes = hash_each(copies) ^ zeros.astype(jnp.uint32)
    differs = jnp.zeros((), bool)
    for axes, places in by_axes.items():
      differs |= _differ(hashes[np.array(places)], axes)
    if partly:  # what one group of devices has found, all have to learn
      differs = jax.lax.pmax(differs.astype(jnp.int32), mesh.axis_names) > 0
    return differs.astype(jnp.int32), hashes[None]

  def compare(state: Tree, zeros: jax.Array) -> Comparison:
    flat = jax.tree.leaves(state)
    everywhere = P(mesh.axis_names)
    mapped = jax.shard_map(
      on_device,
      mesh=mesh,
      in_specs=(specs, everywhere),
      out_specs=(P(), everywhere),
      check_vma=False,
    )
    return Comparison(*mapped([flat[number] for number in leaves], zeros))

  return jax.jit(compare)


def hash_each(leaves: Sequence[jax.Array]) -> jax.Array:
  """Return the hash of each leaf, uint32 [leaves].

  Vectors of one length are hashed together: most leaves of a net are, and the program is smaller.
  """
  alike: dict[tuple[object, ...], list[int]] = collections.defaultdict(list)
  for place, leaf in enumerate(leaves):
    alike[(leaf.shape, leaf.dtype) if leaf.ndim < 2 else (place,)].append(place)
  hashes = [
    jax.vmap(leaf_hash)(jnp.stack([leaves[place] for place in places]))
    if len(places) > 1
    else leaf_hash(leaves[places[0]])[None]
    for places in alike.values()
  ]
  order = np.argsort(np.concatenate(list(alike.values())))
  return jnp.concatenate(hashes)[order]


def make_recompute(
  config: ml_collections.ConfigDict, mesh: Mesh, model: Model, rows: int
) -> jax.stages.Wrapped:
  """Return the jitted recompute(variables, batch, zeros) -> Comparison of gradients.

  Every device computes the gradient of the first examples of the batch by itself: the same program
  with the same numbers, so that all bits are equal. (A step taken again with its rows dealt to
  other devices would not equal the first: sums over devices depend on their order.)

  Args:
    config: config of the run.
    mesh: the mesh.
    model: of one device, whose batch norms have one group.
    rows: number of examples.
  """
  dtype = jnp.dtype(config.model.dtype)

  def on_device(
    variables: Variables, images: jax.Array, labels: jax.Array, zeros: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    def loss(params: Params) -> jax.Array:
      net = model.merge(variables._replace(params=params), jax.random.key(0))
      logits = net(augment.normalize(images, config.data, dtype))
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    grads = jax.grad(loss)(variables.params)
    hashes = hash_each(jax.tree.leaves(grads)) ^ zeros.astype(jnp.uint32)
    return _differ(hashes, mesh.axis_names).astype(jnp.int32), hashes[None]

  def recompute(variables: Variables, batch: dict[str, jax.Array], zeros: jax.Array) -> Comparison:
    everywhere = P(mesh.axis_names)
    mapped = jax.shard_map(
      on_device,
      mesh=mesh,
      in_specs=(P(), P(), P(), everywhere),
      out_specs=(P(), everywhere),
      check_vma=False,
    )
    return Comparison(*mapped(variables, batch["image"][:rows], batch["label"][:rows], zeros))

  return jax.jit(recompute)


def gradients(params: Tree, mesh: Mesh) -> list[Leaf]:
  """Return what `make_recompute` compares."""
  names = [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
  return [Leaf(f"the gradient of {name}", tuple(mesh.axis_names)) for name in names]


def _differ(hashes: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """Return, on each device, whether any of its hashes differs over these axes of the mesh."""
  low, high = jax.lax.pmin(jnp.stack([hashes, ~hashes]), axes)  # the least, and not the greatest
  return jnp.any(low != ~high)


class Replicas:
  """Has devices compare what must be equal on them, every N steps and whenever it is asked to.

  A comparison is read two steps later, as metrics are, so that no step waits for it.
  """

  def __init__(self, pod: Pod, mesh: Mesh, leaves: Iterable[Leaf], every_steps: int):
    """Prepare for comparisons.

    Args:
      pod: this host among the others.
      mesh: the mesh of the run.
      leaves: what is compared.
      every_steps: steps between comparisons.
    """
    self._pod, self._mesh, self._leaves = pod, mesh, list(leaves)
    self._every_steps = every_steps
    self._zeros = mesh_lib.flags(mesh, NOTHING)
    self._pending: collections.deque[tuple[int, Comparison]] = collections.deque()
    self._last = -1

  def step(self, step: int, compare: Compare) -> None:
    """Start to compare, if this step is due, and read what was started `LAG` steps before.

    Raises:
      ReplicasDiffer: naming devices and leaves, on all hosts at the same step.
    """
    if step % self._every_steps == 0:
      self._start(step, compare)
    while self._pending and self._pending[0][0] <= step - LAG:
      self._read()

  def check(self, step: int, compare: Compare) -> None:
    """Compare after this step, unless that was done, and wait for the result.

    Raises:
      ReplicasDiffer: as `step` does.
    """
    self._start(step, compare)
    self.flush()

  def flush(self) -> None:
    """Wait for the results of what was started.

    Raises:
      ReplicasDiffer: as `step` does.
    """
    while self._pending:
      self._read()

  def _start(self, step: int, compare: Compare) -> None:
    if step != self._last:
      self._last = step
      self._pending.append((step, compare(self._zeros)))

  def _read(self) -> None:
    step, comparison = self._pending.popleft()
    if jax.device_get(comparison.differs):
      raise ReplicasDiffer(
        f"After step {step}, {self._found(comparison.hashes)}. Nothing of it was saved: the same "
        "command resumes from the checkpoint before. A device that is named again is broken."
      )

  def _found(self, hashes: jax.Array) -> str:
    """Return which copies differ, the same on all hosts, which all wait here for each other."""
    mine = {shard.index[0].start or 0: shard.data[0] for shard in hashes.addressable_shards}
    # Without the numbers of the devices: equal values of many hosts travel as one.
    by_host = self._pod.gather("replicas differ", [mine[row].tolist() for row in sorted(mine)])
    table = np.zeros(hashes.shape, np.uint32)
    for host, values in by_host.items():
      rows = [i for i, d in enumerate(self._mesh.devices.flat) if d.process_index == host]
      table[rows] = values
    return describe(self._mesh, self._leaves, table)


def describe(mesh: Mesh, leaves: Sequence[Leaf], hashes: np.ndarray) -> str:
  """Return in words which devices have other copies than most, and of what.

  Args:
    mesh: the mesh.
    leaves: what was compared.
    hashes: uint32 [devices, leaves].
  """
  odd: dict[int, None] = {}  # numbers in the mesh, in the order found
  unsure: dict[int, None] = {}
  names = []
  for leaf, column in zip(leaves, hashes.T, strict=True):
    groups = _groups(mesh, leaf.axes)
    values = column[groups]
    differ = values.min(axis=1) != values.max(axis=1)
    if differ.any():
      names.append(leaf.name)
    for group, value in zip(groups[differ], values[differ], strict=True):
      (most, count), *_ = collections.Counter(value.tolist()).most_common(1)
      if 2 * count > len(group):
        odd |= dict.fromkeys(group[value != most].tolist())
      else:
        unsure |= dict.fromkeys(group.tolist())
  devices = odd or unsure
  one = len(names) == len(devices) == 1
  which = f"{_some(names)} on {_devices(mesh, devices)} {'is' if one else 'are'} not "
  return which + (
    "what the other devices have" if odd else "the same, and nothing shows which is right"
  )


def _groups(mesh: Mesh, axes: tuple[str, ...]) -> np.ndarray:
  """Return int [groups, size]: numbers in the mesh of devices that differ only along these axes."""
  numbers = np.arange(mesh.size).reshape(mesh.devices.shape)
  places = [mesh.axis_names.index(axis) for axis in axes]
  size = int(np.prod([mesh.shape[axis] for axis in axes]))
  return np.moveaxis(numbers, places, range(-len(places), 0)).reshape(-1, size)


def _devices(mesh: Mesh, rows: Iterable[int]) -> str:
  found = [mesh.devices.flat[row] for row in sorted(rows)]
  return _some([f"device {d.id} of host {d.process_index}" for d in found])


def _some(names: Sequence[str]) -> str:
  """Return the first few names, and how many more there are."""
  more = len(names) - _NAMED
  first = list(names[:_NAMED]) + ([f"{more} more"] if more > 0 else [])
  return first[0] if len(first) == 1 else f"{', '.join(first[:-1])} and {first[-1]}"
