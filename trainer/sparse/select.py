"""The k largest of each layer, exactly, the same on any mesh.

A sort of millions of scores would gather them on every device. Here the k-th largest is found bit
by bit: each round counts the scores that reach a candidate, in all layers at once, and an integer
count over shards does not depend on their order. A second search of this kind, over positions,
decides between equal scores. That is 64 passes over float32 scores, whatever k is, and k may be
traced.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def magnitudes(x: jax.Array) -> jax.Array:
  """Return unsigned integers in the order of the absolute values of floats."""
  return jax.lax.bitcast_convert_type(jnp.abs(x), jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def largest(
  scores: Sequence[jax.Array], allowed: Sequence[jax.Array], counts: Sequence[jax.Array]
) -> list[jax.Array]:
  """Return where the largest scores of each layer are; of equal ones those that come first.

  Args:
    scores: of each layer, unsigned [blocks, ...], all of one dtype.
    allowed: bool, likewise: which of them count.
    counts: int32 [blocks], how many to take of each block; no more than are allowed.

  Returns:
    bool [blocks, ...] for each layer, True at exactly so many of the allowed.
  """
  if not scores:
    return []
  wanted = [_beside(count, score) for count, score in zip(counts, scores, strict=True)]

  def reach(limits: Sequence[jax.Array]) -> list[jax.Array]:
    reached = [
      _count(may & (score >= limit))
      for score, may, limit in zip(scores, allowed, limits, strict=True)
    ]
    return [number >= want for number, want in zip(reached, wanted, strict=True)]

  limits = _highest(reach, [jnp.zeros(want.shape, scores[0].dtype) for want in wanted])
  above = [may & (s > limit) for s, may, limit in zip(scores, allowed, limits, strict=True)]
  equal = [may & (s == limit) for s, may, limit in zip(scores, allowed, limits, strict=True)]
  missing = [want - _count(more) for want, more in zip(wanted, above, strict=True)]
  places = [_positions(score) for score in scores]

  def fit(ends: Sequence[jax.Array]) -> list[jax.Array]:
    before = [
      _count(same & (place < end)) for same, place, end in zip(equal, places, ends, strict=True)
    ]
    return [number <= few for number, few in zip(before, missing, strict=True)]

  ends = _highest(fit, [jnp.zeros(want.shape, jnp.uint32) for want in wanted])
  return [
    more | (same & (place < end))
    for more, same, place, end in zip(above, equal, places, ends, strict=True)
  ]


def _highest(
  holds: Callable[[Sequence[jax.Array]], list[jax.Array]], zeros: list[jax.Array]
) -> list[jax.Array]:
  """Return the highest integers for which a condition holds that holds up to some point."""
  bits = 8 * zeros[0].dtype.itemsize

  def add_bit(number: jax.Array, found: list[jax.Array]) -> list[jax.Array]:
    bit = jnp.ones((), zeros[0].dtype) << (bits - 1 - number).astype(zeros[0].dtype)
    tried = [value | bit for value in found]
    return [
      jnp.where(yes, new, old) for yes, new, old in zip(holds(tried), tried, found, strict=True)
    ]

  return jax.lax.fori_loop(0, bits, add_bit, zeros)


def _count(which: jax.Array) -> jax.Array:
  """Return how many of each block, int32 [blocks, 1, ...]."""
  return jnp.sum(which, axis=range(1, which.ndim), dtype=jnp.int32, keepdims=True)


def _beside(count: jax.Array, score: jax.Array) -> jax.Array:
  return count.reshape(-1, *[1] * (score.ndim - 1))


def _positions(score: jax.Array) -> jax.Array:
  """Return the number of each element in its block, in the order of memory."""
  position = jnp.zeros(score.shape, jnp.uint32)
  for axis in range(1, score.ndim):
    size = jnp.uint32(score.shape[axis])
    position = position * size + jax.lax.broadcasted_iota(jnp.uint32, score.shape, axis)
  return position
