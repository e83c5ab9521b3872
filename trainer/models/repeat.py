"""Equal parts of a model, drawn in a loop, so that the program that makes a state stays small."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from flax import nnx
import jax

from trainer.models.rngs import streams

Part = TypeVar("Part", bound=nnx.Module)


def repeat(
  make: Callable[[nnx.Rngs], Part], number: int, rngs: nnx.Rngs, *, loop: bool
) -> Sequence[Part]:
  """Return so many equal parts, with the values that `make(rngs)` would give them one by one.

  Drawn one by one, a thousand layers are a thousand generators of random numbers to compile.

  Args:
    make: draws from the stream `params` alone.
    number: of parts.
    rngs: with that stream.
    loop: whether to draw them in a loop, with the same values.
  """
  if number < 2 or not loop:
    return [make(rngs) for _ in range(number)]
  key, graphdefs = rngs.params.key.get_value(), []

  def draw(count: jax.Array, _: None) -> tuple[jax.Array, Any]:
    own = streams(params=key)
    own.params.count.set_value(count)
    graphdef, state = nnx.split(make(own))
    graphdefs.append(graphdef)
    return own.params.count.get_value(), nnx.to_pure_dict(state)

  count, states = jax.lax.scan(draw, rngs.params.count.get_value(), length=number)
  rngs.params.count.set_value(count)
  return [nnx.merge(graphdefs[0], jax.tree.map(lambda x, i=i: x[i], states)) for i in range(number)]
