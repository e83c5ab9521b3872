"""Optimizers, rates and averages: what is refused, what decays, what a step leaves behind.

Their numbers are compared with other implementations in tests/parity.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from trainer import config as config_lib
from trainer import optimizer, schedules
from trainer import program as program_lib
from trainer import step as step_lib
from trainer.errors import ConfigError


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"lr": 1.7}, ["lr is 1.7", "lr_per_256 is 0.1", "set one of them to 0"]),
    ({"lr_per_256": 0.0}, ["lr and config.optimizer.lr_per_256 are both 0"]),
    ({"warmup_start": 0.1, "warmup_epochs": 0.0}, ["warmup_start is 0.1", "no warm-up"]),
    ({"eta": 0.002}, ["eta is 0.002", "sgd", "a field of lars"]),
    ({"name": "lars", "nesterov": False}, ["nesterov is False", "lars", "a field of sgd"]),
    ({"name": "rmsprop", "eps": 1e-3}, ["eps is 0.001", "rmsprop", "a field of adamw"]),
    ({"name": "adamw", "lamb_clip_norm": 0.0}, ["lamb_clip_norm is 0.0", "a field of lamb"]),
    ({"mu_dtype": "bfloat16"}, ["mu_dtype is 'bfloat16'", "adamw and lamb"]),
    ({"name": "adamw", "mu_dtype": "int8"}, ["mu_dtype", "params, bfloat16"]),
    ({"name": "lamb", "decay": "coupled"}, ["decay is coupled", "lamb", "trust ratio"]),
    ({"decay": "none"}, ["decay", "own, coupled, decoupled, scheduled"]),
    ({"agc": -0.1}, ["agc", "0 or more"]),
    ({"no_agc": "("}, ["no_agc", "a regular expression"]),
    ({"ema_every_steps": 32}, ["ema_every_steps is 32", "ema_decay is 0"]),
    ({"ema_decay": 0.9, "ema_every_steps": 0}, ["ema_every_steps", "1 or more"]),
    ({"ema_decay": 0.9, "ema_rule": "tff"}, ["ema_rule", "did you mean tf?"]),
    ({"ema_decay": 0.9, "ema_rule": "timm(gama=1.0)"}, ["ema_rule", "did you mean gamma?"]),
    ({"ema_decay": 0.9, "ema_rule": "timm(power=0)"}, ["ema_rule", "must be positive"]),
    ({"ema_decay": 0.9, "ema_rule": "timm(power='a')"}, ["ema_rule", "cannot be computed"]),
    ({"ema_decay": 0.9, "ema_rule": "tf|tf"}, ["ema_rule", "one rule"]),
    ({"schedule": ""}, ["schedule", "one schedule"]),
    ({"schedule": "cosine|linear"}, ["schedule", "one schedule"]),
    ({"schedule": "cosin(power=2)"}, ["schedule", "did you mean cosine?"]),
    ({"schedule": "cosine(power=2)"}, ["schedule", "cosine has no argument 'power'"]),
    ({"schedule": "polynomial"}, ["schedule", "polynomial needs a value of power"]),
    ({"schedule": "polynomial(power=0)"}, ["power of polynomial must be positive"]),
    ({"schedule": "polynomial(power='2')"}, ["schedule", "cannot be made"]),
    ({"schedule": "polynomial(power=2, extra_steps=-1)"}, ["extra_steps", "0 or more"]),
    ({"schedule": "step(at=(60, 30), factor=0.1)"}, ["at of step", "ascending order"]),
    ({"schedule": "step(at=(30, 91), factor=0.1)"}, ["at of step", "91", "epoch 90"]),
    ({"schedule": "step(at=(3, 30), factor=0.1)"}, ["begins with epoch 3", "after the warm-up"]),
    ({"schedule": "step(at=(30), factor=0.1)"}, ["at of step", "a tuple"]),
    ({"schedule": "step(at=(30,), factor=0)"}, ["factor of step must be positive"]),
    ({"schedule": "exponential(every=0, factor=0.9)"}, ["every of exponential", "positive"]),
    ({"schedule": "exponential(every=1, factor=-1)"}, ["factor of exponential", "in (0, 1)", "-1"]),
    (
      {"schedule": "exponential(every=1, factor=1)"},
      ["factor of exponential", "in (0, 1)", "is 1"],
    ),
    ({"schedule": "one_cycle"}, ["one_cycle has a rise of its own", "warmup_epochs"]),
    ({"schedule": "piecewise(points=((0, 1), (9, 0)))"}, ["piecewise has a rise of its own"]),
  ],
)
def test_what_does_not_fit_is_refused_by_name(fields, words):
  refused(fields, words)


@pytest.mark.parametrize(
  "schedule, words",
  [
    ("piecewise(points=((2, 1), (0, 0)))", ["points of piecewise", "ascending order"]),
    ("piecewise(points=((-1, 1), (2, 0)))", ["points of piecewise", "from 0 on"]),
    ("piecewise(points=((0, 1), (95, 0)))", ["points of piecewise", "95", "epoch 90"]),
    ("piecewise(points=((0, 1), (9, -1)))", ["shares", "0 or more"]),
    ("piecewise(points=(0, 1))", ["points of piecewise must be pairs"]),
    ("piecewise(points=((0, 'a'),))", ["points of piecewise must be pairs"]),
    ("one_cycle(rise=1.0)", ["rise of one_cycle", "(0, 1)"]),
    ("one_cycle(start=0)", ["start of one_cycle", "(0, 1]"]),
  ],
)
def test_a_schedule_without_warmup_is_refused_by_name(schedule, words):
  refused({"schedule": schedule, "warmup_epochs": 0.0}, words)


def refused(fields, words):
  config = base.get_config()
  config.optimizer.update(fields)
  with pytest.raises(ConfigError) as error:
    config_lib.validate(config)
  for word in ["config.optimizer.", *words]:
    assert word in str(error.value)
  assert "\n" not in str(error.value)


def test_points_past_the_end_are_refused_in_steps_too(config):
  config.total_steps = 30
  config.optimizer.schedule = "step(at=(3, 5), factor=0.1)"
  config_lib.validate(config)  # how long an epoch is, is known with the data
  with pytest.raises(ConfigError, match=r"past the end of the run at epoch 3\.75"):
    program_lib.build(config, num_examples=64)


@pytest.mark.parametrize("steps", [10, 90_000])
def test_rates_of_the_default_keep_their_bits(steps):
  """Warm-up and cosine as they were before schedules had options."""
  config = base.get_config()
  warmup = steps // 10
  before = optax.join_schedules(
    [
      optax.linear_schedule(0.0, 0.4, warmup),
      optax.cosine_decay_schedule(0.4, steps - warmup, alpha=0.0 / 0.4),
    ],
    [warmup],
  )
  now = schedules.make_schedule(
    config, warmup_steps=warmup, total_steps=steps, per_epoch=steps / 90
  )
  at = jnp.arange(0, steps + 1, max(1, steps // 1000), dtype=jnp.int32)
  np.testing.assert_array_equal(jax.jit(now)(at), jax.jit(before)(at))


@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
def test_a_rate_of_one_step_is_that_among_many(config, schedule):
  config.optimizer.schedule = {
    "polynomial": "polynomial(power=2, per_epoch=True)",
    "step": "step(at=(2, 3), factor=0.1)",
    "piecewise": "piecewise(points=((0, 0.1), (1, 1.0), (4, 0.0)))",
    "exponential": "exponential(every=0.7, factor=0.9)",
  }.get(schedule, schedule)
  warmup = 0 if schedule in ("piecewise", "one_cycle") else 5
  rate = schedules.make_schedule(config, warmup_steps=warmup, total_steps=42, per_epoch=10.4)
  shifted = schedules.make_schedule(
    config, warmup_steps=warmup, total_steps=42, per_epoch=10.4, offset=7
  )
  many = np.broadcast_to(rate(np.arange(42)), 42)
  assert (many >= 0).all() and many.max() <= schedules.peak_rate(config) * (1 + 1e-6)
  for step in (0, 4, 5, 21, 41):
    np.testing.assert_allclose(rate(np.int32(step)), many[step], rtol=1e-6, atol=1e-9)
    if step > 7:
      np.testing.assert_allclose(shifted(step - 7), many[step], rtol=1e-6, atol=1e-9)


def test_a_rate_by_epoch_changes_with_the_first_step_of_an_epoch(config):
  config.optimizer.schedule = "linear(per_epoch=True)"
  rate = schedules.make_schedule(config, warmup_steps=0, total_steps=25, per_epoch=6.25)
  changes = 1 + np.flatnonzero(np.diff(rate(np.arange(25))))
  assert changes.tolist() == [6, 12, 19]  # 6.25, 12.5 and 18.75


def test_which_vectors_decay_may_be_chosen(config):
  """torchvision's second recipe: none of the normalisation layers, but the bias of the head."""
  config.optimizer.decay_bn_and_bias, config.optimizer.no_decay = True, "bn"
  program = program_lib.build(config, 64)
  mask = program.mask(program.abstract_state.params)
  assert mask["head"] == {"kernel": True, "bias": True}
  assert mask["stem_bn"] == {"scale": False, "bias": False}
  config.optimizer.no_decay = ""
  assert program_lib.build(config, 64).mask is None


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_first_moments_may_be_bfloat16(config, name):
  config.optimizer.name, config.optimizer.mu_dtype = name, "bfloat16"
  rule = optimizer.make_optimizer(config, lambda step: 0.1)
  state = rule.init({"kernel": jnp.ones((2, 2))})
  dtypes = {
    jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-2]: leaf.dtype
    for path, leaf in jax.tree.leaves_with_path(state)
    if leaf.ndim
  }
  assert dtypes == {"mu": jnp.bfloat16, "nu": jnp.float32}


def test_clipping_by_unit_leaves_the_head_alone(config):
  config.optimizer.agc, config.optimizer.weight_decay, config.optimizer.momentum = 0.01, 0.0, 0.0
  rule = optimizer.make_optimizer(config, lambda step: 1.0)
  params = {"head": {"kernel": jnp.ones((4, 2))}, "conv": {"kernel": jnp.ones((1, 2, 2, 2))}}
  grads = jax.tree.map(jnp.ones_like, params)
  grads["conv"]["kernel"] = grads["conv"]["kernel"].at[..., 1].set(0.001)
  updates, _ = rule.update(grads, rule.init(params), params)
  np.testing.assert_array_equal(updates["head"]["kernel"], -1.0)
  np.testing.assert_allclose(updates["conv"]["kernel"][..., 0], -0.01, rtol=1e-6)
  np.testing.assert_allclose(updates["conv"]["kernel"][..., 1], -0.001, rtol=1e-6)


def test_averages_every_third_step_with_statistics_of_the_last(config, batch):
  """Copies until epoch 0.5, which is step 4; on by 0, 3 and 6; and the same after a resume."""
  config.optimizer.update(
    {
      "ema_decay": 0.9,
      "ema_rule": "constant",
      "ema_every_steps": 3,
      "ema_start_epochs": 0.5,
      "ema_batch_stats": False,
    }
  )
  config.optimizer.name, config.optimizer.decay = "adamw", "scheduled"
  program = program_lib.build(config, num_examples=64)
  assert program.lengths.ema_start == 4

  train_step = jax.jit(
    step_lib.make_train_step(
      program.model,
      program.optimizer,
      program.schedule,
      config,
      program.mesh,
      ema_start=program.lengths.ema_start,
    )
  )
  states = [jax.jit(program.init)()]
  for _ in range(10):
    states.append(train_step(states[-1], batch, np.zeros(1, np.int32))[0])
  weights = [np.asarray(state.params["head"]["kernel"]) for state in states]
  expected = weights[0]
  for step, state in enumerate(states[1:]):
    if step in (0, 3, 6):  # the first update from step 4 on is that of step 6
      expected = weights[step + 1]
    elif step == 9:
      expected = 0.9 * expected + 0.1 * weights[step + 1]
    variables = state.for_eval()
    np.testing.assert_allclose(variables.params["head"]["kernel"], expected, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, variables.batch_stats, state.batch_stats)
  resumed = jax.tree.map(jnp.asarray, jax.device_get(states[5]))
  for _ in range(5):
    resumed = train_step(resumed, batch, np.zeros(1, np.int32))[0]
  jax.tree.map(np.testing.assert_array_equal, resumed, states[-1])
