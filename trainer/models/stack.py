"""Blocks one after the other: unrolled or scanned, recomputed or kept, with stochastic depth.

The state of a model has one form: each block its own leaves, by its own name. A scan stacks the
leaves of equal blocks inside the step, and gives each block its new statistics back, so that a
checkpoint fits a run with and without scan.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np


def _convolutions(primitive: jax.extend.core.Primitive, *_: Any, **__: Any) -> bool:
  return primitive.name == "conv_general_dilated"


# What the backward pass finds in memory, beside the input of each block: all | nothing | the
# outputs of convolutions | those of products with parameters. See jax.checkpoint.
REMAT: dict[str, Callable[..., bool] | None] = {
  "none": None,
  "blocks": jax.checkpoint_policies.nothing_saveable,
  "convs": _convolutions,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Block(Protocol):
  """A block of a net, an nnx.Module: (x, what Extras has for it, or None) -> y."""

  def __call__(self, x: jax.Array, extra: Any = None, /) -> jax.Array: ...


class Extras(Protocol):
  """What each block gets beside its input; Paths is one.

  Attributes:
    rates: numbers for every block of the net, [blocks, ...].
  """

  @property
  def rates(self) -> np.ndarray:
    """See the class."""
    ...

  def of_block(self, number: jax.Array | int, rate: jax.Array, examples: int, /) -> Any:
    """Return the second argument of a block, by its number in the net and its row of `rates`."""
    ...


class Paths(NamedTuple):
  """Stochastic depth (arXiv:1603.09382): a block's branch is skipped, for each example by itself.

  Attributes:
    key: of this micro-batch.
    rates: share of examples that skip the branch, for every block of the net.
    shape: of the factors of an example: each is drawn, and 1 stands for all of an axis.
    rescale: whether kept branches grow by 1/(1 - rate), so that the mean stays.
  """

  key: jax.Array
  rates: np.ndarray
  shape: tuple[int, ...] = (1, 1, 1)
  rescale: bool = True

  def of_block(self, number: jax.Array | int, rate: jax.Array, examples: int) -> jax.Array:
    """Return [examples, *shape]: 0 where a branch of the block is skipped, else 1/(1 - rate)."""
    key = jax.random.fold_in(self.key, number)
    kept = jax.random.bernoulli(key, 1 - rate, (examples, *self.shape))
    return kept / (1 - rate if self.rescale else 1)


def run(
  blocks: Sequence[Block],
  x: jax.Array,
  *,
  first: int,
  extras: Extras | None,
  scan: bool,
  remat: str,
) -> jax.Array:
  """Return the output of the last block for x [N, ...].

  Args:
    blocks: of one stage; all but the first are equal in shape.
    x: input of the first.
    first: its number in the net, from 0.
    extras: None where blocks get nothing but their input.
    scan: whether the equal blocks are one block in a loop, traced and compiled once. What is left
      for each block is to stack its leaves, and what the optimizer does.
    remat: a key of REMAT.
  """
  alone = blocks[:1] if scan and len(blocks) > 2 else blocks
  for number, block in enumerate(alone, first):
    extra = extras and extras.of_block(number, extras.rates[number], x.shape[0])
    if remat == "none":
      x = block(x, extra)
    else:
      graphdef, state = _split(block)
      x, statistics = jax.checkpoint(_pure(graphdef), policy=REMAT[remat])(state, x, extra)
      nnx.update(block, statistics)
  if len(alone) < len(blocks):
    x = _scan(blocks[1:], x, first=first + 1, extras=extras, remat=remat)
  return x


def _scan(
  blocks: Sequence[Block], x: jax.Array, *, first: int, extras: Extras | None, remat: str
) -> jax.Array:
  """Return the output of equal blocks, run in a loop."""
  graphdefs, states = zip(*map(_split, blocks), strict=True)
  if any(graphdef != graphdefs[0] for graphdef in graphdefs):
    raise ValueError("blocks that are scanned must be equal.")
  apply = _pure(graphdefs[0])
  if remat != "none":
    # A loop is not merged with its copy in the backward pass, which prevent_cse would guard from.
    apply = jax.checkpoint(apply, policy=REMAT[remat], prevent_cse=False)

  def body(x: jax.Array, block: tuple[Any, jax.Array, jax.Array]) -> tuple[jax.Array, Any]:
    state, number, rate = block
    return apply(state, x, extras and extras.of_block(number, rate, x.shape[0]))

  numbers = np.arange(first, first + len(blocks))
  rates = extras.rates[numbers] if extras else np.zeros(len(blocks), np.float32)
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
  x, statistics = jax.lax.scan(body, x, (stacked, jnp.asarray(numbers), jnp.asarray(rates)))
  for i, block in enumerate(blocks):
    nnx.update(block, jax.tree.map(lambda leaf, i=i: leaf[i], statistics))
  return x


def _split(block: Block) -> tuple[nnx.GraphDef[Block], Any]:
  graphdef, state = nnx.split(block)
  return graphdef, nnx.to_pure_dict(state)


def _pure(
  graphdef: nnx.GraphDef[Block],
) -> Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]:
  """Return a block as a function of its arrays: (arrays, x, extra) -> (y, new statistics)."""

  def apply(state: Any, x: jax.Array, extra: Any) -> tuple[jax.Array, Any]:
    block = nnx.merge(graphdef, state, copy=True)
    y = block(x, extra)
    return y, nnx.to_pure_dict(nnx.state(block, nnx.BatchStat))

  return apply
