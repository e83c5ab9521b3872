"""What is frozen, and what has a rate of its own: config.optimizer.freeze and lr_scales."""

import jax
import numpy as np
import pytest

from trainer import config as config_lib
from trainer import optimizer, step
from trainer import program as program_lib
from trainer.errors import ConfigError
from trainer.weights import net as net_lib


def one_step(config, batch):
  """Return leaves before and after a step, its metrics, and the state of the optimizer."""
  program = program_lib.build(config, 64)
  train_step = step.make_train_step(
    program.model, program.optimizer, program.schedule, config, program.mesh
  )
  state = jax.jit(program.init)()
  new, output = jax.jit(train_step)(state, batch, np.zeros(1, np.int32))
  leaves = [
    {name: np.asarray(x) for name, x in net_lib.flatten(s.raw()).items()} for s in (state, new)
  ]
  return *leaves, dict(zip(step.METRICS, np.asarray(output.metrics))), new.opt_state


def test_frozen_parts_stay_and_scales_multiply_the_whole_update(config, batch):
  config.optimizer.weight_decay, config.model.zero_init_residual = 0.1, False
  # Without a zero in the residual branches every parameter has a gradient.
  before, plain, metrics, state = one_step(config, batch)
  config.optimizer.lr_scales = "^head/kernel:10, head:3,^stem:0.5"
  _, scaled, _, same = one_step(config, batch)
  assert jax.tree.structure(same) == jax.tree.structure(state)  # so that a resume may change it
  for name, old in before.items():
    factor = {"head/kernel": 10, "head/bias": 3}.get(name, 0.5 if "stem" in name else 1)
    if name.split("/")[-1] in ("mean", "var"):
      factor = 1
    expected = factor * (plain[name] - old)
    np.testing.assert_allclose(scaled[name] - old, expected, atol=2e-6, rtol=1e-3, err_msg=name)
  config.optimizer.update(lr_scales="", freeze="^stem_|^stage1|stage2_block1/bn1/scale")
  _, after, frozen_metrics, smaller = one_step(config, batch)
  same = {name for name in before if np.array_equal(before[name], after[name])}
  assert same == {n for n in before if n.startswith(("stem_", "stage1"))} | {
    "stage2_block1/bn1/scale"
  }
  assert {"stem_bn/mean", "stage1_block1/bn1/var"} <= same
  assert frozen_metrics["grad_norm"] < metrics["grad_norm"]
  sizes = [sum(leaf.size for leaf in jax.tree.leaves(s)) for s in (state, smaller)]
  assert sizes[1] < sizes[0]


@pytest.mark.parametrize(
  ("field", "value", "words"),
  [
    ("freeze", "(", ["optimizer.freeze", "a regular expression"]),
    ("lr_scales", "head", ["'head'", "PATTERN:FACTOR"]),
    ("lr_scales", "head:x", ["'head:x'", "PATTERN:FACTOR"]),
    ("lr_scales", "head:0", ["positive factor"]),
    ("lr_scales", "head:nan", ["positive factor"]),
    ("lr_scales", "head:inf", ["positive factor"]),
    ("lr_scales", "(:2", ["'(:2'", "PATTERN:FACTOR"]),
  ],
)
def test_refused_at_start(config, field, value, words):
  config.optimizer[field] = value
  with pytest.raises(ConfigError) as caught:
    config_lib.validate(config)
  assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
  ("field", "value", "words"),
  [
    ("freeze", "^layer1", ["freeze has '^layer1'", "no parameter", "head/bias"]),
    ("freeze", ".", ["matches every parameter"]),
    ("lr_scales", "head:10, fc:2", ["lr_scales has 'fc'", "no parameter"]),
  ],
)
def test_patterns_that_fit_no_model_are_refused(config, field, value, words):
  config.optimizer[field] = value
  with pytest.raises(ConfigError) as caught:
    program_lib.build(config, 64)
  assert all(word in str(caught.value) for word in words), caught.value


def test_blocks_that_are_scanned_are_frozen_together(config):
  config.model.update(depth=20, scan=True)
  config.optimizer.freeze = "stage2_block3/bn1"
  with pytest.raises(ConfigError, match=r"the blocks of stage2 alike; config\.model\.scan"):
    program_lib.build(config, 64)
  config.optimizer.freeze = "^stage2|stage3_block1/"
  program_lib.build(config, 64)


@pytest.mark.parametrize("name", sorted(optimizer.OPTIMIZERS))
def test_every_optimizer_freezes_and_decays_only_the_rest(config, name):
  config.optimizer.update(name=name, freeze="^a/", weight_decay=0.1, clip_norm=1.0)
  rule = optimizer.make_optimizer(config, lambda step: 0.1)
  params = {part: {"kernel": np.full((2, 3), 0.5, np.float32)} for part in "ab"}
  grads = jax.tree.map(lambda x: x * 3, params)
  updates, _ = jax.jit(rule.update)(grads, rule.init(params), params)
  assert not np.any(updates["a"]["kernel"]) and np.all(updates["b"]["kernel"])
