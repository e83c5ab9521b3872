"""Numbers at the edge: moments of groups far from 0, the warning about them, products, rates."""

import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer import program as program_lib
from trainer.models import norm
from trainer.pod.pod import Pod
from trainer.run import Run


@pytest.mark.parametrize("group, shards", [("4", 8), ("device", 2), ("global", 1)])
def test_shifted_moments_of_groups(group, shards):
  layer = norm.BatchNorm(
    2,
    momentum=0.75,
    epsilon=1e-5,
    dtype=jnp.float32,
    zero_scale=False,
    shifted=True,
    group=group,
    shards=shards,
  )
  groups = {"4": 4, "device": 2, "global": 1}[group]
  cells = max(groups, shards)
  start = np.array([990, -3020]) + 10 * np.arange(groups)[:, None]
  x = np.random.default_rng(0).normal((1000, -3000), (0.5, 2), (16, 3, 2, 2)).astype(np.float32)
  parts = x.astype(np.float64).reshape(groups, -1, 2)
  mean, var = parts.mean(1), parts.var(1)
  expected = (parts - mean[:, None]) / np.sqrt(var[:, None] + 1e-5)
  # In the first micro-batch of a step all groups have the same average, later each its own.
  for before in [start[:1], start]:
    each = np.broadcast_to(before, (groups, 2)).repeat(cells // groups, axis=0)
    layer.mean.set_value(jnp.asarray(each if len(before) > 1 else before[0], jnp.float32))
    layer.var.set_value(jnp.ones(2))
    y = layer(jnp.asarray(x))
    np.testing.assert_allclose(y, expected.reshape(x.shape), rtol=0, atol=1e-3)
    new = [m.get_value().reshape(-1, 2) for m in (layer.mean, layer.var)]
    assert {len(m) for m in new} == {cells if groups > 1 else 1}
    of_cells = cells // groups if groups > 1 else 1
    np.testing.assert_allclose(new[0][::of_cells], 0.75 * before + 0.25 * mean, rtol=1e-6)
    np.testing.assert_allclose(new[1][::of_cells], 0.75 + 0.25 * var, rtol=1e-4)


def test_ratios_by_path():
  def stats(mean, var):
    return {"mean": np.array(mean, np.float32), "var": np.array(var, np.float32)}

  tree = {
    "stem_bn": stats([3, -8], [1, 4]),
    "stage1_block1": {"bn1": stats([0, 500], [1, 1]), "bn2": stats([10], [0])},
    "other": {"count": np.zeros(())},
  }
  assert norm.means_over_deviations(tree, 0.01) == pytest.approx(
    {"stem_bn": 4, "stage1_block1/bn1": 500, "stage1_block1/bn2": 100}, rel=1e-2
  )
  assert norm.lost(100) == pytest.approx(1.4e-3) and norm.lost(1e9) == 1


def test_an_evaluation_warns_of_means_far_from_zero(config, caplog):
  far = {"mean": np.array([0, 300], np.float32), "var": np.array([1, 1], np.float32)}
  near = far | {"mean": np.array([99, 0], np.float32)}
  run = mock.Mock(config=config, pod=Pod(config.pod), best=None, step=3)
  run.evaluate.return_value = {"top1": 0.5}
  run.state.batch_stats = {"stem_bn": near, "stage1_block1": {"bn1": far}}
  assert Run.evaluate_now(run)
  assert "stage1_block1/bn1 and 0 more" in caplog.text and "300 times the deviation" in caplog.text
  assert "loses 1.3 % of the variance" in caplog.text
  caplog.clear()
  run.state.batch_stats["stage1_block1"]["bn1"] = near
  Run.evaluate_now(run)
  run.config.model.bn_shifted = True
  run.state.batch_stats = {"stem_bn": far}
  Run.evaluate_now(run)
  assert not caplog.text


@pytest.mark.parametrize("precision", ["default", "high", "highest"])
def test_precision_reaches_every_product_forward_and_backward(config, precision):
  config.model.precision, config.model.se_ratio = precision, 0.25
  program = program_lib.build(config, 64)
  kernels = [leaf for leaf in jax.tree.leaves(program.abstract_state.params) if leaf.ndim > 1]
  # In training two gradients for each, but that of the images.
  for mode, number in (("train", 3 * len(kernels) - 1), ("eval", len(kernels))):
    text = program.lower(mode, **program.sizes(mode)).as_text()
    products = re.findall(r"stablehlo\.(?:convolution|dot_general)\b.*", text)
    assert len(products) == number
    for line in products:
      found = re.findall(r"\b(DEFAULT|HIGH|HIGHEST)\b", line)
      assert found == 2 * [precision.upper()] or (precision == "default" and not found), line
