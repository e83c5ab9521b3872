"""What can be added from outside: a family, a loss, a mix, an optimizer, a schedule."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base, names, page
from tests.trainer import outside
from tests.trainer.shared import StopAt, fingerprints
from trainer import augment, losses
from trainer import config as config_lib
from trainer import program as program_lib
from trainer import step as step_lib
from trainer import train as train_lib
from trainer.errors import ConfigError, Preempted

HERE = "tests.trainer.outside"


@pytest.fixture
def config():
  return outside.get_config()


@pytest.fixture
def batch():
  rng = np.random.default_rng(0)
  return {
    "image": rng.integers(0, 256, (16, 16, 16, 3), np.uint8),
    "label": rng.integers(0, 6, 16, np.int32),
  }


def one_step(config, batch, step=0):
  """Returns the state before and after a step, and its metrics by name."""
  config_lib.validate(config)
  program = program_lib.build(config, num_examples=64)
  train_step = step_lib.make_train_step(
    program.model, program.optimizer, program.schedule, config, program.mesh
  )
  before = jax.jit(program.init)().replace(step=jnp.int32(step))
  after, output = jax.jit(train_step)(before, batch, np.zeros(1, np.int32))
  return before, after, dict(zip(step_lib.METRICS, np.asarray(output.metrics).tolist()))


def test_a_family_from_outside_runs_from_the_command_line(tmp_path):
  command = [sys.executable, "-m", "trainer", f"--config={outside.__file__}"]
  command += [f"--workdir={tmp_path}", "--config.model.channels=8", "--config.total_steps=3"]
  log = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stderr
  assert "Mixer, channels 8, 1,142 parameters" in log
  assert "weight decay 0.0001 on 5 of 13 leaves" in log  # not on the vectors, nor on the positions
  assert (tmp_path / "report.html").exists()
  evaluated = [*command, "--mode=eval"]
  subprocess.run(evaluated, capture_output=True, timeout=300, check=True)
  assert json.loads((tmp_path / "eval.json").read_text())["step"] == 3


@pytest.mark.parametrize(
  "field, value, words",
  [
    ("model.patch", 0, "config.model.patch must be 1 or more; it is 0"),
    ("model.dropout", 1.0, r"config.model.dropout must be in \[0, 1\)"),
    ("loss", "hinge", "config.loss is 'hinge'; there is softmax_cross_entropy"),
    ("loss", f"{HERE}:hinge", f"config.loss is '{HERE}:hinge', which cannot be imported"),
    ("augment", "mixpu(alpha=1)", "config.augment is 'mixpu'; did you mean mixup"),
    ("augment", "mixup(alpha=-1.0)", "config.augment: alpha of mixup must be positive"),
    ("augment", f"{HERE}:shade(strength=-1)", "strength of shade must be 0 or more"),
    ("augment", "mixup", "config.augment: mixup needs a value of alpha"),
    ("augment", "mixup(alfa=1.0)", "mixup has no argument 'alfa'; did you mean alpha"),
    ("augment", "mixup(alpha=x)", r"arguments of mixup\(alpha=x\) cannot be read"),
    ("augment", "mixup(1.0)", "arguments are given by name"),
    ("augment", "mixup(alpha=1.0", "config.augment"),
    ("optimizer.name", "sdg", "config.optimizer.name is 'sdg'; did you mean sgd"),
    ("optimizer.schedule", "cosin", "config.optimizer.schedule is 'cosin'; did you mean cosine"),
    ("optimizer.no_decay", "(", "config.optimizer.no_decay must be a regular expression"),
    ("resume.allow", "total_epoch", "resume.allow names total_epoch.*did you mean"),
    ("resume.allow", "model.patch", "resume.allow names model.patch, which no resume may change"),
  ],
)
def test_wrong_values_are_refused_by_name(config, field, value, words):
  config.update_from_flattened_dict({field: value})
  with pytest.raises(ConfigError, match=words) as error:
    config_lib.validate(config)
  assert "\n" not in str(error.value)


def test_a_family_has_its_own_fields_only(config):
  config.unlock()
  config.model.depth = 50
  with pytest.raises(
    ConfigError, match=f"config.model.depth is not a field of the model family {HERE}"
  ):
    config_lib.validate(config)
  del config.model["depth"], config.model["patch"]
  with pytest.raises(ConfigError, match=r"config\.model\.patch is missing"):
    config_lib.validate(config)
  resnet = base.get_config()
  resnet.model.name = f"{HERE}:Mixer"
  with pytest.raises(ConfigError, match=r"config\.model\.\w+ is not a field of the model family"):
    config_lib.validate(resnet)
  resnet.model.name = f"{HERE}:Seen"
  with pytest.raises(ConfigError, match=r"which is no trainer\.models\.family\.Family"):
    config_lib.validate(resnet)


def test_a_family_refuses_what_does_not_split(config):
  config.model.channels = 15
  with pytest.raises(ConfigError, match=r"config\.model\.channels must be even"):
    config_lib.check_split(config, num_devices=1)


def test_all_collections_and_no_random_state_travel(tmp_path, config):
  """Stopped anywhere and resumed, dropout and stochastic depth draw the same, bit for bit."""
  config.optimizer.ema_decay = 0.9
  train_lib.train(config, str(tmp_path / "quiet"))
  quiet = fingerprints(tmp_path / "quiet", 12)
  assert "others/seen" in quiet and not any("drop" in name or "rngs" in name for name in quiet)
  assert not any(name.startswith("batch_stats") for name in quiet)
  with pytest.raises(Preempted):
    train_lib.train(config, str(tmp_path / "stopped"), StopAt(6))
  train_lib.train(config, str(tmp_path / "stopped"))
  assert fingerprints(tmp_path / "stopped", 12) == quiet


def test_randomness_is_a_function_of_seed_step_and_micro_batch(config, batch):
  config.optimizer.name, config.optimizer.weight_decay = "sgd", 0.0

  def head(step=0, **fields):
    changed = outside.get_config()
    changed.update_from_flattened_dict(config_lib.flatten(config) | fields)
    return np.asarray(one_step(changed, batch, step)[1].params["head"]["kernel"])

  config.data.mean, config.data.std = (0.0, 0.0, 0.0), (255.0, 255.0, 255.0)
  np.testing.assert_array_equal(head(), head())
  assert (head(step=1) != head()).any()
  # The same rows four times over: micro-batches differ by what they draw, and by nothing else.
  batch = {name: np.repeat(rows[:4], 4, axis=0) for name, rows in batch.items()}
  without = {"model.dropout": 0.0, "model.drop_path": 0.0}
  np.testing.assert_allclose(head(**without, accumulation_steps=4), head(**without), rtol=1e-5)
  assert (head(accumulation_steps=4) != head()).any()


def test_evaluation_draws_nothing(config, batch):
  program = program_lib.build(config, num_examples=64)
  state = jax.jit(program.init)()
  image = augment.normalize(jnp.asarray(batch["image"]), config.data, jnp.float32)
  logits = program.model.merge(state.for_eval(), None)(image)
  again = program.model.merge(state.for_eval(), None)(image)
  trained = program.model.merge(state.for_eval(), jax.random.key(0))(image)
  np.testing.assert_array_equal(logits, again)
  assert (np.asarray(logits) != np.asarray(trained)).any()


def test_every_layer_draws_its_own(config, batch):
  config.model.dropout = 0.5
  program = program_lib.build(config, num_examples=64)
  state = jax.jit(program.init)()
  net = program.model.merge(state.for_eval(), jax.random.key(0))
  ones = jnp.ones((64, 64))
  assert (np.asarray(net.drop1(ones)) != np.asarray(net.drop2(ones))).any()


def test_losses_take_hard_soft_and_mixed_targets():
  rng = np.random.default_rng(0)
  logits, labels = jnp.asarray(rng.normal(size=(8, 6)), jnp.float32), jnp.arange(8) % 6
  one_hot = jax.nn.one_hot(labels, 6)
  mixed = 0.3 * one_hot + 0.7 * jnp.roll(one_hot, 1, axis=0)
  for name in (*losses.LOSSES, f"{HERE}:squared_error"):
    loss = names.find(losses.LOSSES, name, "config.loss")
    assert loss(logits, labels).shape == (8,)
    np.testing.assert_allclose(loss(logits, labels), loss(logits, one_hot), rtol=1e-6)
    assert (np.asarray(loss(logits, mixed)) != np.asarray(loss(logits, labels))).all()
  p, q = np.asarray(jax.nn.log_softmax(logits)), np.asarray(mixed)
  np.testing.assert_allclose(
    losses.softmax_cross_entropy(logits, mixed), -(p * q).sum(1), rtol=1e-5
  )
  x = np.asarray(logits)
  binary = q * np.log1p(np.exp(-x)) + (1 - q) * np.log1p(np.exp(x))
  np.testing.assert_allclose(losses.sigmoid_cross_entropy(logits, mixed), binary.mean(1), rtol=1e-5)


def test_a_loss_from_outside_is_what_the_step_minimises(config, batch):
  config.model.dropout = config.model.drop_path = config.label_smoothing = 0.0
  config.loss = f"{HERE}:squared_error"
  before, _, metrics = one_step(config, batch)
  net = program_lib.build(config, 64).model.merge(before.for_eval(), None)
  logits = net(augment.normalize(jnp.asarray(batch["image"]), config.data, jnp.float32))
  expected = outside.squared_error(logits, jnp.asarray(batch["label"])).mean()
  assert metrics["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_the_chain_of_mixes_changes_images_and_targets_alike():
  chain = augment.make_chain(f"mixup(alpha=0.5)|{HERE}:shade(strength=0.2)")
  # Images that hold their own targets: what mixes one must mix the other.
  targets = jax.nn.one_hot(jnp.arange(6), 6)
  images = jnp.broadcast_to(targets[:, None, None, :], (6, 4, 4, 6))
  mixed, mixed_targets = chain(jax.random.key(1), images, targets)
  np.testing.assert_allclose(mixed_targets.sum(1), 1, rtol=1e-6)
  assert ((np.asarray(mixed_targets) > 0).sum(1) == 2).all()
  factor = np.asarray(mixed[:, 0, 0].sum(1))  # what shade has multiplied each with
  np.testing.assert_allclose(mixed[:, 0, 0] / factor[:, None], mixed_targets, rtol=1e-5)
  assert len(set(factor.tolist())) == 6 and (abs(factor - 1) <= 0.2).all()
  same, _ = augment.make_chain("")(jax.random.key(1), images, targets)
  assert same is images


def test_mixup_draws_its_share_from_beta():
  key = jax.random.key(0)
  one = jax.vmap(lambda key: augment.mixup(key, jnp.eye(2), jnp.eye(2), alpha=0.4)[1][0, 0])
  shares = np.asarray(one(jax.random.split(key, 4000)))
  assert shares.mean() == pytest.approx(0.5, abs=0.03)
  assert shares.var() == pytest.approx(1 / (4 * (2 * 0.4 + 1)), rel=0.1)


def test_an_optimizer_and_a_schedule_from_outside(config, batch):
  config.optimizer.name, config.optimizer.schedule = f"{HERE}:signs", f"{HERE}:halves"
  config.optimizer.weight_decay = 0.0
  before, after, metrics = one_step(config, batch)
  moved = np.asarray(after.params["head"]["kernel"] - before.params["head"]["kernel"])
  np.testing.assert_allclose(abs(moved), metrics["learning_rate"], rtol=1e-3)
  schedule = program_lib.build(config, 64).schedule
  assert float(schedule(0)) == pytest.approx(0.02 * 16 / 256)
  assert float(schedule(7)) == pytest.approx(0.5 * 0.02 * 16 / 256)


@pytest.mark.parametrize("name, end", [("linear", 0.1), ("constant", 1.0), ("cosine", 0.1)])
def test_schedules_end_where_they_should(config, name, end):
  config.optimizer.schedule, config.optimizer.final_lr_fraction = name, 0.1
  schedule = program_lib.build(config, 64).schedule
  assert float(schedule(12)) == pytest.approx(end * float(schedule(0)))


def test_decay_is_by_rule(config):
  """On matrices and kernels, but for what the family or the config names."""
  config.optimizer.no_decay = "widen/kernel|head"
  program = program_lib.build(config, 64)
  mask = program.mask(program.abstract_state.params)
  decayed = {
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, value in jax.tree.leaves_with_path(mask)
    if value
  }
  assert decayed == {"embed/kernel", "mix/kernel", "narrow/kernel"}


def test_programs_are_compiled_once_for_each_size(config, batch):
  config.model.name, size = "cifar_resnet", {"image_size": 16, "batch_size": 16}
  config = base.get_config("cifar_resnet")
  config.model.depth, config.model.width, config.model.num_classes = 8, 0.25, 6
  config.model.dtype, config.global_batch_size, config.eval.batch_size = "float32", 16, 16
  program = program_lib.build(config, num_examples=64 * 90)
  steps = program_lib.Steps(program)
  asked = steps.prepare("train", **size)
  assert steps.prepare("train", **size) is asked
  larger = steps.prepare("train", image_size=24, batch_size=16)
  assert larger is not asked
  state = program.init_state()
  flags = np.zeros(1, np.int32)
  rng = np.random.default_rng(0)
  for side in (16, 24, 16):
    image = rng.integers(0, 256, (16, side, side, 3), np.uint8)
    state, output = steps.get("train", image_size=side, batch_size=16)(
      state, {"image": image, "label": batch["label"]}, flags
    )
    assert np.isfinite(np.asarray(output.metrics)).all()
  assert int(state.step) == 3
  steps.close()


def test_find_says_what_there_is():
  table = {"a": 1, "b": f"{HERE}:Mixer"}
  assert names.find(table, "a", "config.x") == 1
  assert names.find(table, "b", "config.x") is outside.Mixer
  with pytest.raises(ValueError, match=r"config\.x is 'c'; there is a, b\."):
    names.find(table, "c", "config.x")
  with pytest.raises(ValueError, match="cannot be imported"):
    names.find(table, "nowhere.at.all:x", "config.x")


def test_calls_keep_what_stands_in_brackets_together():
  def f(x, *, a, b="|"):
    return x, a, b

  first, second = names.find_calls({"f": f}, "f(a=(1, 2), b='x|y') | f(a={'k': 3})", "config.x")
  assert first(0) == (0, (1, 2), "x|y") and second(0) == (0, {"k": 3}, "|")
  assert names.find_calls({"f": f}, "  ", "config.x") == []


def test_every_field_has_words_and_its_default_is_allowed():
  from configs import families
  from configs.fields import ASK, NO, YES, problem

  fields = dict(base.RUN)
  for family in families.FAMILIES:
    fields |= base.all_fields(family)
  for name, field in fields.items():
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    assert not problem(name, field, default)
    assert field.words.endswith(".") and field.resume in (NO, ASK, YES), name


def test_fields_that_are_read_without_jax_are_those_of_the_models():
  from configs import families
  from trainer.models import (
    efficientnet,
    efficientnet_fields,
    layers,
    nfnet,
    nfnet_fields,
    resnet,
    resnet_fields,
  )

  for name in families.FAMILIES:
    assert families.fields(name) is families.find(name).FIELDS
  assert tuple(layers.ACTIVATIONS) == resnet_fields.ACTIVATIONS
  assert tuple(resnet.STAGES) == resnet_fields.DEPTHS
  assert tuple(resnet.RS_STAGES) == resnet_fields.RS_DEPTHS
  assert tuple(efficientnet.VARIANTS) == efficientnet_fields.VARIANTS
  assert tuple(nfnet.GAINS) == nfnet_fields.ACTIVATIONS
  assert tuple(nfnet.DEPTHS) == nfnet_fields.DEPTHS


def test_a_family_of_the_registry_may_keep_its_fields_in_its_class(monkeypatch):
  from configs import families

  monkeypatch.setitem(families.FAMILIES, "mixer", f"{HERE}:Mixer")
  assert families.fields("mixer") is outside.Mixer.FIELDS
  assert base.get_config("mixer").model.patch == 4


def test_help_shows_the_fields_of_the_config():
  def run(*flags):
    command = [sys.executable, "-m", "trainer", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

  text = run(f"--config={outside.__file__}", "--config.model.patch=8", "--help=patch")
  assert "--config.model.patch = 8 pixels (default 4); 1 or more" in text and "depth" not in text
  assert "--config.model.depth = 50 layers" in run("--helpfull")
  assert page.markdown().count("### config") == len(page.markdown().split("\n### "))
