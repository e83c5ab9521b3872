"""Streams of random keys that cost the same at every draw."""

from flax import nnx
import jax


class Stream(nnx.RngStream):
  """The same keys as those of nnx.RngStream.

  Where a model is traced, `count[...] += 1` of nnx looks for the sharding of a traced value. There
  is none, and JAX words the error by going through all that was traced before: the time to trace a
  net grew with the square of its depth, by a factor of three to four for 152 layers.
  """

  def __call__(self) -> jax.Array:
    """Return the next key."""
    key = jax.random.fold_in(self.key.get_value(), self.count.get_value())
    self.count.set_value(self.count.get_value() + 1)
    return key


def streams(**keys: jax.Array) -> nnx.Rngs:
  """Return nnx.Rngs(**keys), made of `Stream`."""
  rngs = nnx.Rngs(**keys)
  for name, key in keys.items():
    setattr(rngs, name, Stream(key, tag=name))
  return rngs
