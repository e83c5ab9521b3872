"""Names of layers reach the metadata of a traced step, and leave the step as it was."""

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

from tests.trainer import tiny
from trainer import program as program_lib
from trainer.tools import layers


class Inner(nnx.Module):
  def __init__(self, rngs):
    self.dense = nnx.Linear(2, 2, rngs=rngs)

  def __call__(self, x):
    return jnp.tanh(self.dense(x))


class Outer(nnx.Module):
  """Calls a module of a list, one by name, and one that is split and merged before its call."""

  def __init__(self, rngs):
    self.parts = nnx.List([Inner(rngs)])
    self.head = Inner(rngs)
    self.merged = Inner(rngs)

  def __call__(self, x):
    x = self.head(self.parts[0](x))
    return nnx.merge(*nnx.split(self.merged))(jnp.sin(x))


def names(function):
  text = jax.jit(function).lower(jnp.ones((1, 2))).as_text(debug_info=True)
  return {line.split('"')[1] for line in text.splitlines() if 'loc("jit(' in line}


def test_layers_have_the_names_of_their_attributes():
  net = Outer(nnx.Rngs(0))
  plain = jax.jit(lambda x: net(x)).lower(jnp.ones((1, 2))).as_text()
  with layers.named(net):
    found = names(lambda x: jax.value_and_grad(lambda x: net(x).sum())(x))
    assert jax.jit(lambda x: net(x)).lower(jnp.ones((1, 2))).as_text() == plain
  inside = "jit(<lambda>)/jvp("
  assert f"{inside}parts/0)/tanh" in found
  assert f"{inside}parts/0)/dense/dot_general" in found
  assert f"{inside}head)/dense/dot_general" in found
  assert "jit(<lambda>)/transpose(jvp(head))/dense/dot_general" in found
  assert f"{inside})/sin" in found
  assert f"{inside}dense)/dot_general" in found  # of the one that is merged
  assert not any("head" in name for name in names(lambda x: net(x)))


def test_names_end_with_an_error():
  net = Outer(nnx.Rngs(0))
  call = Inner.__call__
  with pytest.raises(TypeError), layers.named(net):
    assert Inner.__call__ is not call
    net("no array")
  assert Inner.__call__ is call
  with layers.named(net):
    assert "jit(<lambda>)/head/tanh" in names(lambda x: net(x))


def test_a_net_whose_blocks_are_stacked_has_a_structure():
  config = tiny.get_config()
  config.model.depth, config.model.scan = 20, True
  program = program_lib.build(config, 64, jax.devices()[:1])
  net = layers.structure(program.model, program.abstract_state.raw())
  paths = {"/".join(map(str, path)) for path, _ in nnx.iter_modules(net)}
  assert {"stage1_block1/conv1", "stage1_block3/conv1", "head"} <= paths
