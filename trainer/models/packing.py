"""The state of scanned blocks while a run trains: equal blocks are one stacked leaf.

In checkpoints, in files of weights and in the patterns of a config each block has its own leaves
by its own name, scanned or not. A thousand layers have thousands of leaves, and an update for each
of them takes the compiler longer than the net itself. So while a scanned net trains, the leaves of
`stage1_block2` to `stage1_block18`, say, are those of the one entry `stage1_block2..18`, with the
blocks as their first axis. The slices that `unpack` makes in a step and the stacks of `pack` cancel
in the compiler.
"""

from collections.abc import Callable
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

Tree = Any
_BLOCK = re.compile(r"(.*block)(\d+)")
_PACKED = re.compile(r"([^/]*block)(\d+)\.\.(\d+)")


def pack(tree: Tree) -> Tree:
  """Stack the leaves of equal blocks in all dicts of a tree, but for a first block, as a scan does.

  Args:
    tree: of arrays, or of anything that jnp.stack takes while it is traced.
  """
  return _map_dicts(_pack, _BLOCK, tree)


def unpack(tree: Tree, part: Callable[[Any, int], Any] | None = None) -> Tree:
  """Give each block its own leaves again: the inverse of `pack`.

  Args:
    tree: what `pack` returns, or a tree of the same form.
    part: (leaf, i) -> leaf of the i-th block; by default `leaf[i]`.
  """
  return _map_dicts(functools.partial(_unpack, part or _index), _PACKED, tree)


@jax.custom_vjp
def unpack_params(params: Tree) -> Tree:
  """Return `unpack`, whose gradient is `pack`.

  Without that a stacked leaf would have as gradient a sum of one array of its size for each block.
  """
  return unpack(params)


unpack_params.defvjp(lambda params: (unpack(params), None), lambda _, gradient: (pack(gradient),))


def names(path: str) -> list[str]:
  """Return the paths that a path stands for: those of all blocks, or itself."""
  match = _PACKED.search(path)
  if not match:
    return [path]
  start, first, last = match.groups()
  before, after = path[: match.start()], path[match.end() :]
  return [f"{before}{start}{number}{after}" for number in range(int(first), int(last) + 1)]


def is_packed(path: str) -> bool:
  """Whether a leaf of this path is of several blocks."""
  return bool(_PACKED.search(path))


def _map_dicts(change: Callable[[dict[str, Any]], Any], key: re.Pattern[str], tree: Tree) -> Tree:
  def concerned(node: Any) -> bool:
    return isinstance(node, dict) and any(
      isinstance(name, str) and key.fullmatch(name) for name in node
    )

  return jax.tree.map(
    lambda node: change(node) if concerned(node) else node, tree, is_leaf=concerned
  )


def _pack(blocks: dict[str, Any]) -> dict[str, Any]:
  numbers: dict[str, list[int]] = {}
  for name in blocks:
    if (match := _BLOCK.fullmatch(name)) and match[2] != "1":
      numbers.setdefault(match[1], []).append(int(match[2]))
  packed = dict(blocks)
  for start, found in numbers.items():
    if len(found) > 1:
      own = [packed.pop(f"{start}{number}") for number in sorted(found)]
      stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)
      packed[f"{start}{min(found)}..{max(found)}"] = stacked
  return packed


def _unpack(part: Callable[[Any, int], Any], packed: dict[str, Any]) -> dict[str, Any]:
  blocks = dict(packed)
  for name in packed:
    if match := _PACKED.fullmatch(name):
      stacked, first = blocks.pop(name), int(match[2])
      for number in range(first, int(match[3]) + 1):
        blocks[f"{match[1]}{number}"] = jax.tree.map(
          lambda leaf, i=number - first: part(leaf, i), stacked
        )
  return blocks


def _index(leaf: jax.Array, i: int) -> jax.Array:
  return leaf[i]


def take(leaf: Any, i: int) -> Any:
  """Return what is of the i-th block in a leaf: an array in place on its devices, or its shape."""
  sharding = leaf.sharding
  if isinstance(sharding, NamedSharding):
    sharding = NamedSharding(sharding.mesh, P(*sharding.spec[1:]))
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)
  return _taker(sharding)(leaf, i)


@functools.cache
def _taker(sharding: jax.sharding.Sharding) -> Callable[[jax.Array, int], jax.Array]:
  """Return a function that is compiled once for a shape, not once for a block."""
  return jax.jit(
    lambda leaf, i: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), out_shardings=sharding
  )
