"""Streams of keys: those of nnx, at a cost that does not grow with the net that is traced."""

from flax import nnx
import jax
import numpy as np

from configs import base
from trainer import models
from trainer.models.rngs import streams


def made_of(rngs):
  """Return the program that makes the variables of a small net, as text."""
  config = base.get_config("resnet")
  config.model.depth = 18

  def variables():
    net = models.create(config.model, image_size=32, rngs=rngs())
    return nnx.to_pure_dict(nnx.state(net))

  return str(jax.make_jaxpr(variables)())


def test_keys_are_those_of_nnx():
  keys = {"default": jax.random.key(3), "params": jax.random.key(7)}
  ours, theirs = (make(**keys) for make in (streams, nnx.Rngs))
  for draw in (lambda r: r.params(), lambda r: r.dropout(), lambda r: r.params()):
    one, other = (jax.random.key_data(draw(rngs)) for rngs in (ours, theirs))
    np.testing.assert_array_equal(one, other)


def test_a_net_is_the_same_program_and_asks_no_traced_value_for_its_sharding(monkeypatch):
  keys = {"default": jax.random.key(0), "params": jax.random.key(1)}
  expected = made_of(lambda: nnx.Rngs(**keys))
  asked, sharding = [], jax.core.Tracer.sharding

  def counted(tracer):
    asked.append(tracer)
    return sharding.fget(tracer)

  monkeypatch.setattr(jax.core.Tracer, "sharding", property(counted))
  assert made_of(lambda: streams(**keys)) == expected
  assert len(asked) < 4  # not at each of 62 draws
