"""What every model family keeps to: exact resumes in both dtypes, on any mesh."""

import jax
import optax
import pytest

from configs import families as families_lib
from tests.trainer import tiny
from tests.trainer.shared import StopAt, fingerprints
from trainer import models, state
from trainer import train as train_lib
from trainer.errors import Preempted

# What makes a net draw at random, and use all of its parts, where its family has the field.
_FIELDS = {
  "dropout": 0.1,
  "drop_path": 0.3,
  "scan": True,
  "layer_scale": 0.1,
  "unrolled_steps": 3,
  "jacobian_weight": 0.1,
  "jacobian_share": 0.5,
}
# Residual nets are those of most other tests.
FAMILIES = {
  name: {field: value for field, value in _FIELDS.items() if field in families_lib.fields(name)}
  for name, place in families_lib.FAMILIES.items()
  if not place.startswith("trainer.models.resnet:")
}
QUICK = ("vit",)


def families():
  return [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]


_SAMPLE = ("vit bfloat16", "efficientnet float32")


@pytest.mark.parametrize(
  ("family", "dtype"),
  [
    pytest.param(family, dtype, marks=[] if f"{family} {dtype}" in _SAMPLE else pytest.mark.slow)
    for family in FAMILIES
    for dtype in ("float32", "bfloat16")
  ],
)
def test_stopped_anywhere_the_result_is_bitwise_the_same(family, dtype, tmp_path):
  config = tiny.get_config(family)
  config.model.update(FAMILIES[family] | {"dtype": dtype})
  config.data.kind, config.total_steps = "synthetic", 6
  config.optimizer.ema_decay = 0.9
  quiet = train_lib.train(config, str(tmp_path / "quiet"))
  assert quiet["examples"] == 64
  with pytest.raises(Preempted):
    train_lib.train(config, str(tmp_path / "stopped"), StopAt(3))
  assert 0 < max(int(p.name) for p in (tmp_path / "stopped" / "checkpoints").iterdir()) < 6
  train_lib.train(config, str(tmp_path / "stopped"))
  assert fingerprints(tmp_path / "stopped", 6) == fingerprints(tmp_path / "quiet", 6)


@pytest.mark.parametrize(
  "name", [name for name in families_lib.FAMILIES if "bn_together" in families_lib.fields(name)]
)
def test_vectors_of_norms_are_rows_in_the_loop_over_micro_batches(name):
  config = tiny.get_config(name)
  family = models.family_of(config.model)
  _, init = state.make_init(config, optax.identity(), 1, 64)
  plain = jax.eval_shape(init).raw()

  def shapes(together):
    config.model.bn_together = together
    in_loop = jax.eval_shape(
      lambda variables: family.for_micro_batches(
        variables.params, variables.batch_stats, models.own_fields(config.model)
      ),
      plain,
    )
    return [leaf.shape for leaf in jax.tree.leaves(in_loop)]

  before = [leaf.shape for leaf in jax.tree.leaves(plain.params)]
  assert shapes(False) == before
  changed = [(x, y) for x, y in zip(before, shapes(True), strict=True) if x != y]
  assert changed and all(y == (*x[:-1], 1, x[-1]) for x, y in changed)
