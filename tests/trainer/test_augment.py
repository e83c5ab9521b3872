"""Mixing and erasing inside the step: what they do to images and targets, and where it is drawn."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer import outside, shared, tiny
from trainer import augment, losses
from trainer import config as config_lib
from trainer import train as train_lib
from trainer.errors import ConfigError, Preempted

CLASSES = 6


@pytest.fixture(scope="module")
def batch():
  """Images that hold their own targets: 16 examples, a channel for each class."""
  targets = jax.nn.one_hot(jnp.arange(16) % CLASSES, CLASSES)
  return jnp.broadcast_to(targets[:, None, None, :], (16, 12, 10, CLASSES)), targets


OPTIONS = ("mixup", "cutmix", "p", "switch", "group", "per", "partner", "box", "fold")
JITTED = jax.jit(augment.mix, static_argnames=OPTIONS)


def mix(batch, seed=0, **options):
  return JITTED(jax.random.key(seed), *batch, **options)


@pytest.mark.parametrize(
  "options",
  [
    {"mixup": 0.4},
    {"mixup": 0.2, "cutmix": 1.0, "group": 4},
    {"mixup": 0.2, "cutmix": 1.0, "group": 8, "per": "example", "partner": "roll"},
    {"mixup": 0.2, "cutmix": 1.0, "group": 2, "per": "example", "box": "torchvision", "p": 0.5},
  ],
  ids=str,
)
def test_targets_are_what_the_pixels_are(batch, options):
  for seed in range(4):
    images, targets = mix(batch, seed, **options)
    np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(images.mean((1, 2)), targets, atol=1e-6)
    # Nothing but the own class and that of the partner, who is in the same group.
    size = options.get("group", 16)
    number = np.arange(16)
    place, first = number % size, number - number % size
    other = first + ((place + 1) % size if options.get("partner") == "roll" else size - 1 - place)
    both = np.asarray(batch[1] + batch[1][other])
    assert ((np.asarray(targets) > 0) <= (both > 0)).all()


def test_a_draw_belongs_to_a_group_or_an_example(batch):
  def shares(**options):
    # The own share of examples whose partner has another class.
    images, targets = jnp.zeros((16, 8, 8, 3)), jnp.eye(16)
    _, mixed = mix((images, targets), mixup=1.0, **options)
    return np.diagonal(mixed).round(6)

  assert len(set(shares(group=4))) == 4
  assert [len(set(part)) for part in shares(group=4).reshape(4, 4)] == [1] * 4
  each, folded = (shares(group=4, per="example", fold=fold) for fold in (False, True))
  assert len(set(each)) == len(set(folded)) == 16
  np.testing.assert_allclose(folded, np.maximum(each, 1 - each), atol=2e-6)
  assert each.min() < 0.5


def test_probabilities_and_choice(batch):
  images, targets = mix(batch, mixup=0.2, cutmix=1.0, p=0.0)
  np.testing.assert_array_equal(images, batch[0])
  np.testing.assert_array_equal(targets, batch[1])
  for switch, cut in ((0.0, False), (1.0, True)):
    images, _ = mix(batch, mixup=0.2, cutmix=1.0, group=2, per="example", switch=switch)
    whole = ((images == 0) | (images == 1)).all((1, 2, 3))
    assert np.asarray(whole).all() == cut


def test_cutmix_is_mix_without_mixup(batch):
  short, long = (
    jax.make_jaxpr(function)(jax.random.key(0), *batch)
    for function in (
      functools.partial(augment.cutmix, alpha=0.5, group=4),
      functools.partial(augment.mix, cutmix=0.5, group=4),
    )
  )
  assert str(short) == str(long)


def test_random_erasing_replaces_rectangles():
  images, targets = jnp.full((400, 20, 24, 3), 7.0), jnp.eye(400)
  for mode in ("pixel", "const"):
    erase = jax.jit(functools.partial(augment.random_erasing, p=0.5, mode=mode))
    erased, same = erase(jax.random.key(0), images, targets)
    np.testing.assert_array_equal(same, targets)
    gone = np.asarray(erased != 7)
    assert (gone.all(3) == gone.any(3)).all()
    assert gone.any((1, 2, 3)).mean() == pytest.approx(0.5, abs=0.08)
    for example in gone[gone.any((1, 2, 3))][:50, :, :, 0]:
      rows, columns = example.any(1), example.any(0)
      assert (example == (rows[:, None] & columns)).all()  # one rectangle, nothing beside it
      assert 0.01 < example.mean() < 0.36
    noise = np.asarray(erased)[gone]
    if mode == "const":
      assert (noise == 0).all()
    else:
      assert noise.mean() == pytest.approx(0, abs=0.02) and noise.std() == pytest.approx(
        1, abs=0.02
      )
      assert len(np.unique(noise)) > 0.99 * len(noise)  # in each pixel and channel its own


@pytest.mark.parametrize(
  "field, value, words",
  [
    ("augment", "mix()", "mixup or cutmix of mix must be positive"),
    ("augment", "mix(mixup=-0.1)", "mixup of mix must be 0 or more; it is -0.1"),
    ("augment", "mix(cutmix=-1)", "cutmix of mix must be 0 or more"),
    ("augment", "cutmix(alpha=0)", "alpha of cutmix must be positive"),
    ("augment", "mix(mixup=1.0, p=1.5)", r"p of mix must be in \[0, 1\]; it is 1.5"),
    ("augment", "mix(mixup=1.0, cutmix=1.0, switch=-1)", r"switch of mix must be in \[0, 1\]"),
    ("augment", "mix(mixup=1.0, group=3)", "group of mix makes 3 .*the micro-batch of 8 "),
    ("augment", "mix(mixup=1.0, group=1)", "group of mix makes 1 .*2 or more"),
    ("augment", "mix(mixup=1.0, group=256)", "group of mix makes 256 .*the micro-batch of 8 "),
    ("augment", "mix(mixup=1.0, group=-4)", "group of mix must be 0 or more examples; it is -4"),
    ("augment", "mix(mixup=1.0, per='pair')", "per of mix must be one of group, example"),
    ("augment", "mix(mixup=1.0, partner='x')", "partner of mix must be one of flip, roll"),
    ("augment", "mix(mixup=1.0, box='x')", "box of mix must be one of timm, torchvision"),
    ("augment", "mix(mixup='much')", "config.augment is .*not supported"),
    ("augment", "random_erasing(p=2)", r"p of random_erasing must be in \[0, 1\]; it is 2"),
    ("augment", "random_erasing(p=1, area=(0.5, 1.2))", r"area .*shares of the image in \(0, 1\]"),
    ("augment", "random_erasing(p=1, aspect=(3, 1))", r"aspect of random_erasing must be \(min"),
    ("augment", "random_erasing(p=1, mode='rand')", "mode .*one of pixel, const"),
    ("augment", "random_erasing(p=1, area=0.3)", "config.augment is .*has no len"),
    ("augment_until_epochs", -1.0, "config.augment_until_epochs must be 0 or more"),
    ("model.num_classes", 1, "config.model.num_classes must be 2 or more"),
    ("loss", "", "config.loss is ''; it must name one loss"),
    ("loss", "softmax_cross_entropy|sigmoid_cross_entropy", "it must name one loss"),
    ("loss", "sigmoid_cross_entropy(reduction='max')", "reduction .*must be one of mean, sum"),
    ("loss", "sigmoid_cross_entropy(threshold=1.0)", r"threshold .*None or in \[0, 1\); it is 1.0"),
    ("loss", "sigmoid_cross_entropy(treshold=0.2)", "no argument 'treshold'; did you mean thresh"),
    ("loss", "jax.numpy:add", "which does not return one value per example"),
    ("loss", "tests.trainer.outside:get_config", "config.loss is .*takes 0 positional arguments"),
  ],
)
def test_nonsense_is_refused_by_name_before_anything_compiles(config, field, value, words):
  config.update_from_flattened_dict({field: value})
  with pytest.raises(ConfigError, match=words) as error:
    config_lib.validate(config)
  assert "\n" not in str(error.value) and str(error.value).endswith((".", "?"))


def test_groups_are_of_a_micro_batch(config):
  config.augment = "mix(mixup=0.2, group=4)"
  config_lib.validate(config)
  config.accumulation_steps = 4
  with pytest.raises(ConfigError, match=r"makes 4 .*the micro-batch of 2 \("):
    config_lib.validate(config)


def test_one_class_cannot_be_mixed(batch):
  with pytest.raises(ValueError, match="mix needs 2 classes"):
    augment.mix(jax.random.key(0), batch[0], batch[1][:, :1], mixup=0.2)


def test_a_threshold_and_the_sum_of_a_sigmoid_loss():
  logits = jnp.asarray([[2.0, -1.0, 0.5]])
  mixed = jnp.asarray([[0.7, 0.3, 0.0]])
  loss = losses.make_loss("sigmoid_cross_entropy(reduction='sum', threshold=0.2)")
  expected = np.log1p(np.exp(-2.0)) + np.log1p(np.exp(1.0)) + np.log1p(np.exp(0.5))
  np.testing.assert_allclose(loss(logits, mixed), [expected], rtol=1e-6)
  plain, summed = map(
    losses.make_loss, ("sigmoid_cross_entropy", "sigmoid_cross_entropy(reduction='sum')")
  )
  np.testing.assert_allclose(summed(logits, mixed), 3 * plain(logits, mixed), rtol=1e-6)


def test_the_chain_is_off_from_an_epoch_on(config):
  config.augment = "mix(mixup=0.2, group=2)|random_erasing(p=1.0)"
  config.augment_until_epochs = 2.0
  lengths = config_lib.durations(config, num_examples=20)
  assert lengths.augment == 5 == lengths.augment_until
  # Where a resume has changed the batch size, the steps taken count otherwise.
  assert config_lib.durations(config, num_examples=20, offset=3).augment_until == 2
  assert config_lib.durations(config, num_examples=20, offset=9).augment_until == -4
  config.augment_until_epochs = 0.01
  assert config_lib.durations(config, num_examples=20).augment_until == 1
  config.augment_until_epochs = 0.0
  assert config_lib.durations(config, num_examples=20).augment_until is None

  rng = np.random.default_rng(0)
  rows = {
    "image": rng.integers(0, 256, (8, 16, 16, 3), np.uint8),
    "label": np.arange(8, dtype=np.int32) % 6,
  }
  always, ending = (jax.jit(augment.make_inputs(config, until)) for until in (None, 5))
  config.augment = ""
  never = jax.jit(augment.make_inputs(config))
  key = jax.random.key(0)
  for step in (0, 4, 5, 100):
    seen = ending(key, rows, jnp.int32(step))
    expected = (always if step < 5 else never)(key, rows, jnp.int32(step))
    for one, other in zip(seen, expected, strict=True):
      np.testing.assert_array_equal(one, other)
  assert (np.asarray(always(key, rows, 0)[0]) != np.asarray(never(key, rows, 0)[0])).any()


def test_stops_and_the_end_of_mixing_change_no_bit(tmp_path):
  """Two runs of a seed, one of them stopped and resumed, end with the same bits."""

  def config(until):
    config = outside.get_config()
    config.augment = "mix(mixup=0.2, cutmix=1.0, group=4, per='example')|random_erasing(p=0.5)"
    config.loss = "sigmoid_cross_entropy(reduction='sum', threshold=0.2)"
    config.augment_until_epochs = until  # an epoch is 4 steps
    return config

  train_lib.train(config(2.0), str(tmp_path / "quiet"))
  with pytest.raises(Preempted):
    train_lib.train(config(2.0), str(tmp_path / "stopped"), shared.StopAt(10))
  train_lib.train(config(2.0), str(tmp_path / "stopped"))
  quiet, stopped = (shared.fingerprints(tmp_path / name, 12) for name in ("quiet", "stopped"))
  assert quiet == stopped
  with pytest.raises(ConfigError, match=r"config\.augment_until_epochs: 2\.0 -> 3\.0"):
    train_lib.train(config(3.0), str(tmp_path / "stopped"))


def run_mixed(file, *counts):
  """Return what tests/trainer/mixed.py writes, on so many devices of one host."""
  result = subprocess.run(
    [sys.executable, "-m", "tests.trainer.mixed", file, *counts],
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "8"},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  return json.loads(file.read_text())


@pytest.fixture(scope="module")
def on_devices(tmp_path_factory):
  return run_mixed(tmp_path_factory.mktemp("mixed") / "one.json", "1", "8")


def test_devices_do_not_change_a_batch(on_devices):
  for by_count in on_devices.values():
    first, second = by_count["1"]["hashes"]
    assert first != second
    assert by_count["8"]["hashes"] == [first, second]


@pytest.mark.slow
def test_two_and_four_devices_do_not_change_a_batch(on_devices, tmp_path):
  for chain, by_count in run_mixed(tmp_path / "others.json", "2", "4").items():
    for seen in by_count.values():
      assert seen["hashes"] == on_devices[chain]["1"]["hashes"]


def test_groups_of_a_device_send_nothing(on_devices):
  """Neither images nor the loops that draw: mixing adds no collective to a step."""
  for seen in on_devices["own"].values():
    assert seen["collectives"] == []
  assert "collective-permute" in on_devices["wide"]["8"]["collectives"]
  # And no device makes the noise of all: a micro-batch has 16 rows, in whatever shape.
  rows = [
    int(np.prod([int(size) for size in shape.split(",")[:-3]]))
    for shape in on_devices["own"]["8"]["images"]
  ]
  assert max(rows) == 4  # both micro-batches of a device


def test_hosts_do_not_change_a_batch(on_devices, tmp_path):
  file = tmp_path / "two.json"
  shared.run(2, 4, [sys.executable, "-m", "tests.trainer.mixed", file, "0"])
  for chain, seen in json.loads(file.read_text()).items():
    assert seen["0"]["hashes"] == on_devices[chain]["8"]["hashes"]


def test_mixing_keeps_the_dtype_of_activations():
  config = tiny.get_config()
  config.augment = "mix(mixup=0.2, cutmix=1.0)|random_erasing(p=0.5)"
  config.model.dtype = "bfloat16"
  rows = {"image": jnp.zeros((8, 16, 16, 3), jnp.uint8), "label": jnp.arange(8) % 6}
  images, targets = jax.eval_shape(
    augment.make_inputs(config, 3), jax.random.key(0), rows, jnp.int32(0)
  )
  assert images.dtype == jnp.bfloat16 and targets.dtype == jnp.float32
