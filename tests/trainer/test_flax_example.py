"""The net that ours is compared with on TPUs is a ResNet-50."""

import jax

from tests.trainer import flax_example


def test_parameters():
  init, _ = flax_example.make_step()
  state = jax.eval_shape(init)
  # As torchvision counts them.
  assert sum(x.size for x in jax.tree.leaves(state.params)) == 25_557_032
  assert sum(x.size for x in jax.tree.leaves(state.batch_stats)) == 53_120
