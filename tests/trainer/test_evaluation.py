"""What is evaluated: several splits, mirrors, averaged and raw weights, BN statistics made anew."""

import json

import jax
import numpy as np
import pytest

from input_pipeline import sources
from tests.trainer import tiny
from tests.trainer.shared import fingerprints
from trainer import augment, evaluate
from trainer import config as config_lib
from trainer import mesh as mesh_lib
from trainer import program as program_lib
from trainer import train as train_lib
from trainer.errors import ConfigError
from trainer.pod.requests import NOTHING
from trainer.reporting import events
from trainer.state import variables_of


@pytest.fixture
def run_config(shards):
  config = tiny.get_config()
  config.data.path = str(shards)
  return config


def test_several_splits_and_raw_weights(tmp_path, run_config):
  run_config.data.train_split, run_config.data.eval_split = "train[:75%]", "train[75%:], val"
  run_config.optimizer.ema_decay, run_config.eval.raw = 0.9, True
  run_config.eval.every_steps = 5
  final = train_lib.train(run_config, str(tmp_path))
  assert final["examples"] == 18 and final["splits"]["val"]["examples"] == 29
  assert final["epochs"] == pytest.approx(10 * 8 / 54)
  for result in (final, final["splits"]["val"]):
    assert {"top1", "top5", "loss", "raw_top1", "raw_top5", "raw_loss"} <= result.keys()
    assert result["loss"] != result["raw_loss"]
  curves = events.read_scalars(tmp_path / "events")
  assert curves["eval/top1"][0].tolist() == curves["eval/val/raw_top1"][0].tolist() == [5, 10]
  assert curves["eval/top1"][1][-1] == pytest.approx(final["top1"])
  assert curves["eval/val/top1"][1][-1] == pytest.approx(final["splits"]["val"]["top1"])
  tops = dict(zip(*[c.tolist() for c in curves["eval/top1"][:2]], strict=True))
  assert final["best"]["top1"] == pytest.approx(max(tops.values()))
  report = (tmp_path / "report.html").read_text()
  assert "top-1 on val" in report and "top-1 of weights that are not averaged" in report

  # The splits apart, and the raw weights as a run without averages has them.
  run_config.data.eval_split, run_config.eval.raw = "val", False
  alone = train_lib.evaluate_only(run_config, str(tmp_path))
  kept = ("top1", "top5", "loss", "examples")
  assert {name: alone[name] for name in kept} == {
    name: final["splits"]["val"][name] for name in kept
  }
  assert json.loads((tmp_path / "eval.json").read_text()) == alone
  assert "raw_top1" not in alone and "splits" not in alone
  run_config.optimizer.ema_decay = 0.0
  without = train_lib.train(run_config, str(tmp_path / "without"))
  assert without["loss"] == pytest.approx(final["splits"]["val"]["raw_loss"], rel=1e-6)
  assert without["top1"] == final["splits"]["val"]["raw_top1"]


@pytest.fixture(scope="module")
def net():
  """A program on one device, and a state whose running statistics are not 0 and 1."""
  config = tiny.get_config()
  config.model.dtype = "float32"
  program = program_lib.build(config, 64, jax.devices()[:1])
  state = program.init_state()
  rng = np.random.default_rng(0)
  stats = jax.tree.map(
    lambda x: jax.device_put(rng.uniform(0.5, 1.5, x.shape).astype(x.dtype), x.sharding),
    state.batch_stats,
  )
  images = rng.integers(0, 256, (24, 16, 16, 3), np.uint8)
  return config, program, state.replace(batch_stats=stats), images


def logits_of(config, program, variables, images):
  net = program.model.merge(variables, None)
  return np.asarray(net(augment.normalize(images, config.data, "float32")), np.float64)


def test_logits_of_an_image_and_its_mirror(net):
  config, program, state, images = net
  config = config.copy_and_resolve_references()
  config.eval.flip = True
  labels = np.arange(24, dtype=np.int32) % 6
  batches = [
    {"image": images[i : i + 8], "label": labels[i : i + 8], "mask": np.ones(8, bool)}
    for i in (0, 8, 16)
  ]
  found, nothing = {}, mesh_lib.flags(program.mesh, NOTHING)
  for flip in (False, True):
    config.eval.flip = flip
    step = program_lib.build(config, 64, jax.devices()[:1]).compile("eval", **program.sizes("eval"))
    found[flip] = evaluate.evaluate(
      step, program.mesh, [state.for_eval()], iter(batches), lambda: nothing
    )
  plain, mirrored = (
    logits_of(config, program, state.for_eval(), x) for x in (images, images[:, :, ::-1])
  )
  for flip, logits in ((False, plain), (True, (plain + mirrored) / 2)):
    shifted = logits - logits.max(-1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(24), labels]
    assert found[flip]["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert found[flip]["top1"] == pytest.approx(np.mean(logits.argmax(-1) == labels))
  assert found[True]["loss"] != pytest.approx(found[False]["loss"], rel=1e-4)


def test_precise_bn_is_the_moments_of_all_its_images(net):
  """The first layer against numpy; later ones against a net that sees each batch in training."""
  config, program, state, images = net
  step = program.compile("statistics", **program.sizes("statistics"))
  batches = iter([{"image": images[i : i + 8]} for i in (0, 8, 16)])
  found = evaluate.precise_bn(step, program.mesh, state.for_eval(), batches).batch_stats

  x = np.asarray(augment.normalize(images, config.data, "float32"), np.float64)
  kernel = np.asarray(state.params["stem_conv"]["kernel"], np.float64)
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
  y = np.einsum("nhwcij,ijco->nhwo", windows, kernel)
  np.testing.assert_allclose(found["stem_bn"]["mean"], y.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(found["stem_bn"]["var"], y.var((0, 1, 2)), rtol=1e-4)

  # A training step in mode of training keeps `momentum` of the old averages.
  momentum, moments = config.model.bn_momentum, []
  for i in (0, 8, 16):
    trained = program.model.merge(state.for_eval(), jax.random.key(0))
    trained(augment.normalize(images[i : i + 8], config.data, "float32"))
    new = variables_of(trained).batch_stats
    moments.append(
      jax.tree.map(
        lambda new, old: (
          (np.asarray(new, np.float64) - momentum * np.asarray(old)) / (1 - momentum)
        ),
        new,
        state.batch_stats,
      )
    )
  for name, leaf in found["stage3_block1"].items():
    means = np.stack([m["stage3_block1"][name]["mean"] for m in moments])
    variances = np.stack([m["stage3_block1"][name]["var"] for m in moments])
    np.testing.assert_allclose(leaf["mean"], means.mean(0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(leaf["var"], variances.mean(0) + means.var(0), rtol=1e-3, atol=1e-4)


def test_precise_bn_of_a_run_leaves_its_state_alone(tmp_path, run_config, caplog):
  run_config.total_steps = 4
  plain = train_lib.train(run_config, str(tmp_path / "plain"))
  run_config.eval.precise_bn_examples = 64
  final = train_lib.train(run_config, str(tmp_path / "precise"))
  assert fingerprints(tmp_path / "precise", 4) == fingerprints(tmp_path / "plain", 4)
  assert final["loss"] != plain["loss"] and final["examples"] == 29
  run_config.data.eval_split = "val, train[50%:]"
  again = train_lib.evaluate_only(run_config, str(tmp_path / "plain"))
  assert "train[50%:] is evaluated, but trained on as well: train." in caplog.text
  assert again["splits"]["train[50%:]"]["examples"] == 36
  assert again["loss"] == final["loss"] and again["top1"] == final["top1"]


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"eval.raw": True}, "config.eval.raw is True, but no weights are averaged"),
    (
      {"eval.precise_bn_examples": 20},
      "must be a multiple of config.eval.batch_size = 8; the near",
    ),
    (
      {"eval.precise_bn_examples": 16, "optimizer.ema_decay": 0.9},
      "config.optimizer.ema_batch_stats averages the BN statistics that it would replace",
    ),
    ({"data.eval_split": "val, val"}, "config.data.eval_split is 'val, val', which names"),
    ({"data.train_split": "train[1%"}, "config.data.train_split is 'train[1%'; write a split as"),
  ],
)
def test_what_does_not_fit_together_is_refused(fields, words):
  config = tiny.get_config()
  config.update_from_flattened_dict(fields)
  with pytest.raises(ConfigError) as error:
    config_lib.validate(config)
  assert words in str(error.value) and "\n" not in str(error.value)


def test_averaged_weights_without_averaged_statistics_may_have_precise_ones():
  config = tiny.get_config()
  config.optimizer.ema_decay, config.optimizer.ema_batch_stats = 0.9, False
  config.eval.precise_bn_examples, config.eval.raw = 16, True
  config_lib.validate(config)


def test_precise_bn_that_the_data_or_the_model_cannot_have(run_config):
  source = sources.open_source(run_config.data, "train", 6)
  stats = program_lib.build(run_config, 72).abstract_state.batch_stats
  run_config.eval.precise_bn_examples = 72
  config_lib.check_precise_bn(run_config, source, stats)
  with pytest.raises(ConfigError, match=r"the model family .* has no batch norm; set it to 0"):
    config_lib.check_precise_bn(run_config, source, {})
  run_config.eval.precise_bn_examples = 80
  with pytest.raises(ConfigError, match=r"more than the 72 examples .* set it to 72 or less"):
    config_lib.check_precise_bn(run_config, source, stats)
