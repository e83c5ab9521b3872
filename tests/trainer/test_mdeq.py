"""Deep equilibrium models: sizes, what a step and a run have of them, neighbours, refusals."""

import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from tests.trainer import tiny
from tests.trainer.shared import assert_refused
from tests.trainer.test_variants import Step
from trainer import config as config_lib
from trainer import mesh as mesh_lib
from trainer import models, program, state, step
from trainer.models import family, mdeq
from trainer.reporting import flops


def shapes_of(config):
  model, init = state.make_init(config, optax.identity(), 1)
  return model, jax.eval_shape(init).raw()


def count(tree):
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  ("variant", "classes", "size", "parameters", "of_function"),
  [
    # Of the nets that the public code builds.
    ("tiny", 10, 32, 158_890, 111_696),
    pytest.param(*("large", 10, 32, 11_097_438, 8_715_232), marks=pytest.mark.slow),
    pytest.param(*("small", 1000, 224, 16_808_936, 8_716_192), marks=pytest.mark.slow),
    pytest.param(*("small_reg", 1000, 224, 18_613_496, 8_715_232), marks=pytest.mark.slow),
  ],
)
def test_sizes_are_as_published(variant, classes, size, parameters, of_function):
  config = base.get_config("mdeq")
  config.model.update({"variant": variant, "num_classes": classes})
  config.data.image_size = size
  _, variables = shapes_of(config)
  assert count(variables.params) == parameters
  assert count(variables.params["function"]) == of_function
  assert count(variables.others) == 1


def net_of(size=16, **fields):
  """Returns a small model, and random variables of which no leaf is constant."""
  config = tiny.get_config("mdeq")
  config.data.image_size = size
  config.model.update(fields)
  model, shapes = shapes_of(config)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(0.2, 0.3, x.shape).astype(x.dtype), shapes.params)
  statistics = jax.tree.map(
    lambda x: rng.uniform(0.5, 1.5, x.shape).astype(x.dtype), shapes.batch_stats
  )
  return model, state.Variables(params, statistics, {"steps_taken": jnp.int32(family.ENDLESS)})


# Programs that run once: what the compiler would gain is less than it costs.
QUICKLY = {"xla_backend_optimization_level": 0}
IMAGES = np.random.default_rng(1).normal(size=(4, 16, 16, 3)).astype(np.float32)
SCALES = np.array([0.01, 1, 10, 0.1], np.float32)[:, None, None, None]


def test_an_answer_does_not_depend_on_its_neighbours():
  """Also where they need more iterations; and the cost of an image is that of all of them."""
  model, variables = net_of(forward_iterations=30, tolerance=0.1)

  @functools.partial(jax.jit, compiler_options=QUICKLY)
  def run(variables, images):
    net = model.merge(variables, None)
    return net(images), net.fixed_point(*net.inputs(images))

  logits, found = run(variables, IMAGES * SCALES)
  others = (IMAGES * SCALES)[::-1].copy()
  others[0] = IMAGES[0] * SCALES[0]
  again, found_again = run(variables, others)
  np.testing.assert_array_equal(again[0], logits[0])
  assert len(set(np.asarray(found.iterations))) > 1
  assert found.iterations[0] == found_again.iterations[0]
  done = np.asarray(found.iterations) < 30
  assert done.any() and (np.asarray(found.residual)[done] < 0.1).all()

  def cost(iterations):
    model, variables = net_of(forward_iterations=iterations)
    return flops.forward_flops(model, variables, 16)

  conv = 2 * (16 * 16 + 8 * 8) * (2 * 9 + 1) * 8 * 8  # of both branches, and behind the sums
  fuse = 2 * 8 * 8 * (9 + 1) * 8 * 8
  assert cost(7) - cost(4) == 3 * (conv + fuse)


@pytest.mark.slow
def test_weights_that_were_not_trained_here_are_at_the_fixed_point():
  model, variables = net_of(unrolled_steps=5)
  solved, _ = net_of()

  def run(model, variables):
    logits = jax.jit(lambda v: model.merge(v, None)(IMAGES), compiler_options=QUICKLY)
    return logits(variables)

  np.testing.assert_allclose(run(model, variables), run(solved, variables), rtol=1e-6)
  unrolled = run(model, variables._replace(others={"steps_taken": jnp.int32(5)}))
  assert np.abs(unrolled - run(solved, variables)).max() > 1e-3


@pytest.mark.slow
def test_norms_together_change_no_number():
  fields = tiny.get_config("mdeq").model.to_dict() | {"dtype": "float64"}
  del fields["name"]
  Step("mdeq", **fields | {"bn_together": True}).check_equals(Step("mdeq", **fields))


@pytest.fixture(scope="module")
def trained():
  """States and metrics of three steps in two micro-batches; the first is unrolled."""
  config = tiny.get_config("mdeq")
  config.data.kind, config.accumulation_steps = "synthetic", 2
  config.optimizer.lr_per_256 = 0.1
  config.model.update(
    {"dropout": 0.3, "unrolled_steps": 1, "unrolled_layers": 2, "jacobian_weight": 0.5}
  )
  config.model.jacobian_steps = 2
  config_lib.validate(config)
  built = program.build(config, 64)
  compiled = built.lower("train", **built.sizes("train")).compile(QUICKLY)
  rng = np.random.default_rng(0)
  batch = mesh_lib.to_global(
    built.mesh,
    {
      "image": rng.integers(0, 256, (8, 16, 16, 3), np.uint8),
      "label": rng.integers(0, 6, 8, np.int32),
    },
  )
  requests = mesh_lib.flags(built.mesh, 0)
  now, metrics = built.init_state(), []
  for _ in range(3):
    now, output = compiled(now, batch, requests)
    metrics.append(dict(zip(step.metric_names(config), np.asarray(output.metrics))))
  return now, metrics


@pytest.mark.slow
def test_a_step_unrolls_first_and_then_solves(trained):
  now, metrics = trained
  assert int(now.others["steps_taken"]) == int(now.step) == 3
  assert set(now.others) == {"steps_taken"}
  assert metrics[0]["iterations"] == 2 and metrics[1]["iterations"] > 2
  assert all(0 < each["residual"] < 10 for each in metrics)


@pytest.mark.slow
def test_the_loss_of_the_jacobian_is_a_part_of_the_loss(trained):
  """Until its last step; the cross entropy of six classes changes little."""
  _, metrics = trained
  assert metrics[0]["jacobian_loss"] > 0 and metrics[1]["jacobian_loss"] > 0
  assert metrics[2]["jacobian_loss"] == 0
  before, after = (each["loss"] - 0.5 * each["jacobian_loss"] for each in metrics[1:])
  assert before == pytest.approx(after, rel=0.2)


def test_what_is_sown_is_reaped_and_leaves_no_state():
  class Model(nnx.Module):
    def __init__(self):
      self.steps_taken = family.StepsTaken(jnp.int32(family.ENDLESS))

    def __call__(self, x):
      family.sow(self, family.AuxiliaryLoss, "auxiliary_loss", 2 * x)
      family.sow(self, family.Metric, "residual", x)

  model = Model()
  for value in (1.0, 3.0):  # the second call counts
    model(jnp.float32(value))
  family.set_steps_taken(model, jnp.int32(4))
  sown = family.reap(model)
  assert [float(loss) for loss in sown.losses] == [6] and sown.metrics == {"residual": 3}
  assert nnx.to_pure_dict(nnx.state(model)) == {"steps_taken": 4}
  assert family.reap(model) == ([], {})


def test_one_mask_serves_all_iterations():
  model, variables = net_of(dropout=0.5)
  masks = model.merge(variables, jax.random.key(0)).inputs(IMAGES)[0]["masks"]
  assert [mask.shape for mask in masks] == [(4, 1, 1, 8)] * 2
  assert set(np.unique(masks[0])) == {0, 2} and (masks[0] != masks[1]).any()
  assert model.merge(variables, None).inputs(IMAGES)[0]["masks"] == ()


def test_solvers_compute_in_float32_whatever_the_dtype():
  model, variables = net_of(dtype="bfloat16")

  def run(variables):
    net = model.merge(variables, None)
    found = net.fixed_point(*net.inputs(IMAGES))
    return net.classify(found.z), found

  logits, found = jax.eval_shape(run, variables)
  wide = {x.dtype for x in (logits, found.residual, *found.z)}
  assert wide == {jnp.dtype(jnp.float32)}


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["implicit", "phantom"])
@pytest.mark.parametrize("solver", ["broyden", "anderson"])
def test_gradients_of_a_net_are_those_of_unrolled_steps(gradient, solver):
  """Where f is a contraction; the phantom of so many steps is the gradient through them."""
  images = np.random.default_rng(1).normal(size=(2, 32, 32, 3))
  with jax.enable_x64(True):

    def gradients(**fields):
      model, variables = net_of(32, dtype="float64", variant="small", **fields)
      params = jax.tree.map(np.copy, variables.params)
      for i in range(4):
        params["function"][f"post{i}_norm"]["scale"] *= 0.02
      steps = jnp.int32(1 if "unrolled_steps" in fields else family.ENDLESS)
      variables = variables._replace(others={"steps_taken": steps})

      def loss(params):
        net = model.merge(variables._replace(params=params), jax.random.key(0))
        return jnp.sum(jnp.square(net(images)))

      return jax.jit(jax.grad(loss))(params)

    found = gradients(
      solver=solver,
      gradient=gradient,
      phantom_steps=100,
      tolerance=1e-11,
      forward_iterations=60,
      backward_iterations=60,
    )
    expected = gradients(unrolled_steps=1, unrolled_layers=200)
  largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
  for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert np.abs(ours - theirs).max() <= 1e-6 * max(np.abs(theirs).max(), 1e-6 * largest)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (
      {"model.variant": "huge"},
      "config.model.variant must be one of tiny, large, small, small_reg",
    ),
    ({"model.forward_iterations": 0}, "config.model.forward_iterations must be 1 or more; it is 0"),
    ({"model.backward_iterations": 0}, "config.model.backward_iterations must be 1 or more"),
    ({"model.tolerance": 0.0}, "config.model.tolerance must be positive; it is 0.0"),
    ({"model.tolerance": -1.0}, "config.model.tolerance must be positive; it is -1.0"),
    ({"model.solver": "newton"}, "config.model.solver must be one of broyden, anderson"),
    ({"model.jacobian_share": 0.0}, "config.model.jacobian_share must be in (0, 1]"),
    ({"data.image_size": 17}, "config.data.image_size has 17 pixels, which the lowest resolution"),
    (
      {"model.variant": "small", "data.image_size": 32, "data.eval_image_size": 40},
      "config.data.eval_image_size has 40 pixels, which the lowest resolution of config.model.var",
    ),
    ({"model.bn_group": "3"}, "config.model.bn_group is 3, which does not divide the 8 examples"),
  ],
)
def test_what_cannot_be_is_refused(fields, message):
  assert_refused("mdeq", fields, message)


def test_description():
  fields = models.own_fields(base.get_config("mdeq").model)
  assert mdeq.MDEQ.describe(fields) == "MDEQ-tiny"
  assert mdeq.MDEQ.describe(fields | {"solver": "anderson"}) == "MDEQ-tiny, solver anderson"
