"""One step on the devices: loss, gradients, weight decay, averages and the masks of evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.trainer import tiny
from trainer import augment, evaluate
from trainer import program as program_lib
from trainer import step as step_lib
from trainer.optimizer import decay_mask, make_optimizer
from trainer.pod.requests import FAIL, STOP
from trainer.schedules import make_schedule


def run_steps(config, batch, steps=1):
  program = program_lib.build(config, num_examples=64)
  train_step = jax.jit(
    step_lib.make_train_step(
      program.model, program.optimizer, program.schedule, config, program.mesh
    )
  )
  state, output = jax.jit(program.init)(), None
  states = [state]
  for _ in range(steps):
    state, output = train_step(state, batch, np.zeros(1, np.int32))
    states.append(state)
  return states, dict(zip(step_lib.METRICS, np.asarray(output.metrics)))


def test_a_guarded_step_with_a_failure_leaves_every_leaf_as_it_is(config, batch):
  config.optimizer.ema_decay, config.accumulation_steps = 0.9, 2
  program = program_lib.build(config, num_examples=64)
  options = (program.model, program.optimizer, program.schedule, config, program.mesh)
  guarded = jax.jit(step_lib.make_train_step(*options, guarded=True))
  first, _ = guarded(program.init_state(), batch, np.array([STOP], np.int32))
  (_, plain), _ = run_steps(config, batch)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), first, plain)
  # As of a host without a batch: zeros, and numbers that are not finite would not matter.
  empty = {name: np.zeros_like(rows) for name, rows in batch.items()}
  second, output = guarded(first, empty, np.array([FAIL], np.int32))
  assert int(output.request) == FAIL
  jax.tree.map(np.testing.assert_array_equal, second, first)


def test_first_loss_is_that_of_a_guess_and_a_repeated_batch_is_learnt(config, batch):
  config.total_steps, config.optimizer.lr_per_256 = 100, 3.0
  (_, first), (_, last) = run_steps(config, batch), run_steps(config, batch, steps=60)
  assert first["loss"] == pytest.approx(np.log(config.model.num_classes), rel=0.1)
  assert last["loss"] < 0.5 * first["loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
  "variant",
  [
    {"pool_first": True, "row_pairs": True},
    {"bn_together": True, "zeros_last": True},
    {"bn_together": True, "bn_group": "8"},
  ],
  ids=lambda fields: " ".join(fields),
)
def test_a_step_is_the_same_with_fields_that_save_time_on_tpus(variant):
  """In float32; in bfloat16 it is as near to that of float32 as the plain step is."""
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.integers(0, 256, (32, 64, 64, 3), np.uint8),
    "label": rng.integers(0, 6, 32, np.int32),
  }

  def step(dtype, fields):
    config = tiny.get_config("resnet")
    config.global_batch_size = config.eval.batch_size = 32
    config.data.image_size = 64
    config.model.update({"dtype": dtype, "zero_init_residual": False})
    config.model.bn_group = variant.get("bn_group", "global")
    config.model.update(fields)
    config.accumulation_steps, config.optimizer.warmup_epochs = 2, 0.0
    (_, state), metrics = run_steps(config, batch)
    # The first momentum of SGD is the gradient.
    leaves = jax.tree.leaves((state.opt_state, state.batch_stats))
    return [np.float64(leaf) for leaf in (metrics["loss"], *leaves)]

  def distances(leaves):
    return np.array([np.linalg.norm(x - y) for x, y in zip(leaves, exact, strict=True)])

  exact = step("float32", {})
  sizes = np.array([np.linalg.norm(leaf) for leaf in exact])
  assert (distances(step("float32", variant)) <= 1e-5 * sizes).all()
  plain, other = (distances(step("bfloat16", fields)) / sizes for fields in ({}, variant))
  # Where rounding is half of a gradient, that of one leaf differs by a third on another processor.
  assert np.mean(other) <= 1.1 * np.mean(plain)
  assert (other <= 2 * plain + 0.005).all()
  assert (plain > 0.1).any()  # so much is the rounding of this net


def test_label_smoothing_changes_the_loss_as_defined(config, batch):
  states, plain = run_steps(config, batch)
  config.label_smoothing = 0.2
  _, smooth = run_steps(config, batch)
  program = program_lib.build(config, 64)
  model = program.model.merge(states[0].for_eval(), jax.random.key(0))
  logp = jax.nn.log_softmax(
    model(augment.normalize(jnp.asarray(batch["image"]), config.data, jnp.float32))
  )
  picked = jnp.take_along_axis(logp, batch["label"][:, None], 1)[:, 0]
  assert plain["loss"] == pytest.approx(-float(picked.mean()), rel=1e-5)
  assert smooth["loss"] == pytest.approx(
    -float((0.8 * picked + 0.2 * logp.mean(1)).mean()), rel=1e-5
  )


def test_weight_decay_leaves_bn_and_biases_alone(config, batch):
  (state, _), _ = run_steps(config, batch)
  mask = decay_mask(())(state.params)
  flat = {
    jax.tree_util.keystr(path, simple=True, separator="/"): value
    for path, value in jax.tree.leaves_with_path(mask)
  }
  assert {name.rsplit("/", 1)[1] for name, value in flat.items() if value} == {"kernel"}
  assert {name.rsplit("/", 1)[1] for name, value in flat.items() if not value} == {"scale", "bias"}

  for everything in (False, True):
    config.optimizer.decay_bn_and_bias = everything
    optimizer = make_optimizer(config, lambda step: 1.0)
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    updates, _ = optimizer.update(zeros, optimizer.init(state.params), state.params)
    ones = updates["stem_bn"]["scale"]
    assert np.any(np.asarray(ones)) == everything
    assert np.any(np.asarray(updates["head"]["kernel"]))


def test_sgd_is_nesterov_momentum_with_decay_in_the_gradient(config):
  config.optimizer.weight_decay, config.optimizer.momentum = 0.1, 0.9
  optimizer = make_optimizer(config, lambda step: 0.5)
  w, trace = 2.0, 0.0
  params = {"kernel": jnp.full((1, 1), w)}
  opt_state = optimizer.init(params)
  for gradient in (1.0, -3.0, 0.5):
    updates, opt_state = optimizer.update({"kernel": jnp.full((1, 1), gradient)}, opt_state, params)
    params = optax.apply_updates(params, updates)
    g = gradient + 0.1 * w
    trace = g + 0.9 * trace
    w -= 0.5 * (g + 0.9 * trace)
    assert float(params["kernel"][0, 0]) == pytest.approx(w, rel=1e-6)


def test_adamw_decays_apart_from_the_moments(config):
  config.optimizer.name, config.optimizer.weight_decay = "adamw", 0.1
  optimizer = make_optimizer(config, lambda step: 0.5)
  params = {"kernel": jnp.full((1, 1), 2.0), "bias": jnp.full(1, 2.0)}
  updates, _ = optimizer.update(
    jax.tree.map(lambda x: 1.5 * x, params), optimizer.init(params), params
  )
  # The first Adam update is the sign of the gradient, whatever its size.
  assert float(updates["kernel"][0, 0]) == pytest.approx(-0.5 * (1 + 0.1 * 2.0), rel=1e-5)
  assert float(updates["bias"][0]) == pytest.approx(-0.5, rel=1e-5)


def test_clipping_bounds_the_update(config, batch):
  config.optimizer.weight_decay, config.optimizer.momentum = 0.0, 0.0
  config.optimizer.clip_norm = 0.01
  states, metrics = run_steps(config, batch)
  assert metrics["grad_norm"] > 0.01  # what is logged is the gradient before it is clipped
  moved = optax.tree.norm(jax.tree.map(lambda a, b: a - b, states[0].params, states[1].params))
  assert float(moved) == pytest.approx(0.01 * metrics["learning_rate"], rel=1e-2)


def test_schedule_warms_up_and_ends_where_it_should(config):
  config.global_batch_size, config.optimizer.lr_per_256, config.optimizer.final_lr_fraction = (
    1024,
    0.1,
    0.01,
  )
  schedule = make_schedule(config, warmup_steps=10, total_steps=110, per_epoch=1)
  assert float(schedule(0)) == 0.0
  assert float(schedule(5)) == pytest.approx(0.2)
  assert float(schedule(10)) == pytest.approx(0.4)
  assert float(schedule(60)) == pytest.approx(0.4 * (0.01 + 0.99 * 0.5))
  assert float(schedule(110)) == pytest.approx(0.004)
  schedule = make_schedule(config, warmup_steps=0, total_steps=100, per_epoch=1)
  assert float(schedule(0)) == pytest.approx(0.4)


def test_ema_averages_weights_and_is_what_evaluation_sees(config, batch):
  config.optimizer.ema_decay = 0.5
  states, _ = run_steps(config, batch, steps=2)
  first = [np.asarray(s.params["head"]["kernel"]) for s in states]
  decay = [0.1, 2 / 11]  # (1 + t) / (10 + t) while that is below ema_decay
  expected = first[0]
  for d, new in zip(decay, first[1:]):
    expected = d * expected + (1 - d) * new
  params, batch_stats, _ = states[2].for_eval()
  np.testing.assert_allclose(params["head"]["kernel"], expected, rtol=1e-5)
  assert jax.tree.structure(batch_stats) == jax.tree.structure(states[2].batch_stats)


def test_eval_counts_each_real_example_once(config, batch):
  program = program_lib.build(config, num_examples=64)
  state = jax.jit(program.init)()
  eval_step = jax.jit(step_lib.make_eval_step(program.model, config, program.mesh))
  mask = np.array([True] * 5 + [False] * 3)
  ruined = batch["image"].copy()
  ruined[5:] = 255
  totals = [
    jax.device_get(
      eval_step(
        state.for_eval(),
        evaluate.zero_totals(program.abstract_totals()),
        {"image": image, "label": batch["label"], "mask": mask},
        np.zeros(1, np.int32),
      )
    )
    for image in (batch["image"], ruined)
  ]
  assert totals[0]["examples"] == 5
  assert totals[0] == totals[1]
  assert totals[0]["top1"] <= totals[0]["top5"] <= 5


def test_equal_logits_are_no_free_hits(config, batch):
  program = program_lib.build(config, num_examples=64)
  state = jax.jit(program.init)()
  params = jax.tree.map(jnp.zeros_like, state.params)
  eval_step = jax.jit(step_lib.make_eval_step(program.model, config, program.mesh))
  labels = np.array([0, 1, 2, 3, 4, 5, 0, 1], np.int32)
  totals = jax.device_get(
    eval_step(
      state.for_eval()._replace(params=params),
      evaluate.zero_totals(program.abstract_totals()),
      {"image": batch["image"], "label": labels, "mask": np.ones(8, bool)},
      np.zeros(1, np.int32),
    )
  )
  assert totals["top1"] == 2 and totals["top5"] == 7
