"""Every bad value is refused with one sentence that names the field; durations become steps."""

import importlib
import pathlib

import jax
from jax.experimental.compilation_cache import compilation_cache
import pytest

from configs import base
from trainer import config as config_lib
from trainer import program as program_lib
from trainer.errors import ConfigError

RUN_FILES = sorted(
  p.stem
  for p in (pathlib.Path(__file__).parents[2] / "configs").glob("*.py")
  if "\ndef get_config(" in p.read_text()
)


@pytest.mark.parametrize("name", RUN_FILES)
def test_every_run_file_is_valid_on_its_own(name):
  config = importlib.import_module(f"configs.{name}").get_config()
  config_lib.validate(config)


@pytest.mark.parametrize("name", RUN_FILES)
def test_run_files_only_override(name):
  config = importlib.import_module(f"configs.{name}").get_config()
  assert (
    config_lib.flatten(config).keys()
    == config_lib.flatten(base.get_config(config.model.name)).keys()
  )


@pytest.mark.parametrize(
  "field, value, words",
  [
    ("model.name", "vgg", ["config.model.name", "resnet", "cifar_resnet", "vgg"]),
    ("model.depth", 51, ["config.model.depth", "18", "50", "200", "51"]),
    ("model.dtype", "int8", ["config.model.dtype", "bfloat16", "int8"]),
    ("model.num_classes", 1, ["config.model.num_classes", "2 or more"]),
    ("model.bn_momentum", 1.0, ["config.model.bn_momentum", "[0, 1)"]),
    ("global_batch_size", 0, ["config.global_batch_size", "1 or more"]),
    ("global_batch_size", 1023, ["config.global_batch_size", "1023", "8 devices", "1024"]),
    (
      "accumulation_steps",
      3,
      ["config.global_batch_size", "8 devices times config.accumulation_steps = 3", "1032"],
    ),
    ("accumulation_steps", 0, ["config.accumulation_steps", "1 or more"]),
    ("mesh.data", 0, ["config.mesh.data", "-1"]),
    ("mesh.data", 4, ["config.mesh.data", "config.mesh.fsdp", "config.mesh.space", "8 devices"]),
    ("mesh.fsdp", 16, ["config.mesh.fsdp", "8 devices"]),
    ("sharding.params", "data", ["config.sharding.params", "replicated, fsdp"]),
    ("sharding.params", "fsdp", ["config.sharding.params", "config.mesh.fsdp above 1"]),
    ("sharding.opt_state", "fsdp", ["config.sharding.opt_state", "replicated, data"]),
    ("model.bn_group", "host", ["config.model.bn_group", "global, device or a number"]),
    ("model.bn_group", "0", ["config.model.bn_group"]),
    ("model.bn_group", "48", ["config.model.bn_group is 48", "1024 examples"]),
    ("model.dtype", "float64", ["config.model.dtype", "JAX_ENABLE_X64"]),
    ("eval.batch_size", 100, ["config.eval.batch_size", "8 devices"]),
    ("label_smoothing", -0.1, ["config.label_smoothing"]),
    ("data.crop_area", (0.5, 0.2), ["config.data.crop_area"]),
    ("data.std", (1.0, 0.0, 1.0), ["config.data.std"]),
    ("data.kind", "tfrecord", ["config.data.kind", "array_record", "tfrecord"]),
    ("optimizer.name", "shampoo", ["config.optimizer.name", "sgd", "adamw", "shampoo"]),
    ("optimizer.lr_per_256", 0.0, ["config.optimizer.lr_per_256", "positive"]),
    ("checkpoint.keep_last", 0, ["config.checkpoint.keep_last", "1 or more"]),
    ("total_steps", 10, ["config.total_epochs", "config.total_steps", "set one of them to 0"]),
    ("total_epochs", 0.0, ["config.total_epochs", "config.total_steps", "both 0"]),
    ("optimizer.warmup_steps", -1, ["config.optimizer.warmup_steps", "0 or more"]),
    ("eval.every_steps", 7, ["config.eval.every_epochs", "config.eval.every_steps"]),
  ],
)
def test_out_of_range_is_refused_by_name(field, value, words):
  config = base.get_config()
  config.update_from_flattened_dict({field: value})
  with pytest.raises(ConfigError) as error:
    config_lib.validate(config)
    config_lib.check_split(config, num_devices=8)
  for word in words:
    assert word in str(error.value)
  assert "\n" not in str(error.value)


def test_unknown_field_is_refused_with_the_nearest_name():
  config = base.get_config().unlock()
  config.optimizer.momentun = 0.9
  with pytest.raises(
    ConfigError, match=r"config\.optimizer\.momentun.*did you mean config\.optimizer\.momentum\?"
  ):
    config_lib.validate(config)


def test_missing_field_is_refused():
  config = base.get_config().unlock()
  del config.data.flip
  with pytest.raises(ConfigError, match=r"config\.data\.flip is missing"):
    config_lib.validate(config)


@pytest.mark.parametrize(
  "section, name, value",
  [
    ("model", "depth", "50"),
    ("model", "depth", 50.0),
    ("data", "flip", 1),
    ("data", "workers", True),
    ("optimizer", "lr_per_256", "0.1"),
    ("data", "mean", ("a", "b", "c")),
  ],
)
def test_wrong_type_is_refused(section, name, value):
  config = base.get_config().unlock()
  with config[section].ignore_type():
    config[section][name] = value
  with pytest.raises(ConfigError, match=rf"config\.{section}\.{name} must"):
    config_lib.validate(config)


def test_durations_in_steps():
  config = base.get_config()
  config.global_batch_size = 100
  config.total_epochs, config.optimizer.warmup_epochs, config.eval.every_epochs = 3.0, 0.5, 1.0
  config.checkpoint.every_steps = 7
  lengths = config_lib.durations(config, num_examples=1050)
  assert lengths == config_lib.Durations(
    total=32,
    warmup=5,
    eval_every=10,
    checkpoint_every=7,
    per_epoch=10.5,
    sizes=((0, 224),),
  )


def test_evaluations_to_come():
  for every, offset in ((0, 0), (3, 0), (5, 2), (20, 0), (30, 1)):
    lengths = config_lib.Durations(20, 0, every, 0, 1.0, offset=offset)
    for step in range(lengths.last + 1):
      due = [s for s in range(step + 1, lengths.last + 1) if lengths.is_evaluated(s)]
      assert lengths.evaluations_after(step) == len(due), (every, offset, step)


def test_warmup_longer_than_the_run_is_refused():
  config = base.get_config()
  config.total_epochs = 4.0
  with pytest.raises(ConfigError, match="warm-up must be shorter"):
    config_lib.durations(config, num_examples=10_000)


@pytest.mark.parametrize(
  "field, value, refused",
  [
    ("model.depth", 18, True),
    ("seed", 1, True),
    ("global_batch_size", 512, True),
    ("optimizer.momentum", 0.8, True),
    ("total_epochs", 100.0, True),
    ("data.crop_area", (0.2, 1.0), True),
    ("label_smoothing", 0.0, True),
    ("mesh.fsdp", 4, False),
    ("sharding.opt_state", "data", False),
    ("accumulation_steps", 4, True),
    ("model.bn_group", "32", True),
    ("data.workers", 7, False),
    ("data.path", "elsewhere", False),
    ("log.every_steps", 3, False),
    ("checkpoint.keep_last", 9, False),
    ("data.stream_requests", 9, False),
    ("data.stream_window", 9, True),
    ("data.kind", "stream", True),
    ("data.path", "gs://bucket/x", True),
    ("eval.batch_size", 64, False),
    ("data.eval_image_size", 288, False),
    ("data.eval_split", "test", False),
  ],
)
def test_what_may_change_between_runs_of_one_workdir(field, value, refused):
  config = base.get_config()
  saved = config_lib.flatten(config)
  config.update_from_flattened_dict({field: value})
  if not refused:
    config_lib.check_same_run(saved, config, "runs/a")
    return
  with pytest.raises(ConfigError) as error:
    config_lib.check_same_run(saved, config, "runs/a")
  named = "config.data.kind" if field == "data.path" else f"config.{field}"
  assert named in str(error.value) and "runs/a" in str(error.value)


@pytest.mark.parametrize(
  "overrides, words",
  [
    ({"augment": "mixup(alpha=0.2)"}, ["config.augment is 'mixup(alpha=0.2)'", "row_pairs"]),
    ({"data.image_size": 223}, ["config.data.image_size is 223, an odd", "an even size"]),
    ({"mesh.space": 2}, ["config.mesh.space = 2", "config.model.row_pairs is True"]),
  ],
)
def test_what_pairs_of_rows_cannot_do_is_refused(overrides, words):
  config = base.get_config()
  config.update_from_flattened_dict({"model.row_pairs": True} | overrides)
  with pytest.raises(ConfigError) as error:
    config_lib.validate(config)
  for word in words:
    assert word in str(error.value)


@pytest.mark.parametrize(
  "overrides, words",
  [
    (
      {"mesh.space": 8, "data.image_size": 100},
      ["config.data.image_size is 100", "config.mesh.space = 8"],
    ),
    (
      {"mesh.space": 2, "global_batch_size": 1022},
      ["config.global_batch_size", "config.mesh.space = 2", "1024"],
    ),
    (
      {"model.bn_group": "32", "global_batch_size": 768 // 2},
      ["config.model.bn_group is 32", "12 groups", "8 parts"],
    ),
    (
      {"accumulation_steps": 2, "model.bn_group": "1024"},
      ["config.model.bn_group", "512 examples of a micro-batch"],
    ),
  ],
)
def test_what_does_not_split_evenly_is_refused_by_name(overrides, words):
  config = base.get_config()
  config.update_from_flattened_dict(overrides)
  with pytest.raises(ConfigError) as error:
    config_lib.check_split(config, num_devices=8)
  for word in words:
    assert word in str(error.value)


@pytest.mark.parametrize(
  "overrides",
  [
    {"mesh.fsdp": 2, "sharding.params": "fsdp"},
    {"mesh.space": 2, "global_batch_size": 1020, "eval.batch_size": 4},
    {"model.bn_group": "device"},
    {"model.bn_group": "64", "accumulation_steps": 2},
    {"model.bn_group": "512"},
  ],
)
def test_what_splits_evenly_is_taken(overrides):
  config = base.get_config()
  config.update_from_flattened_dict(overrides)
  config_lib.check_split(config, num_devices=8)


@pytest.mark.parametrize(
  "field, environment, expected",
  [
    ("workdir", None, "WORKDIR/compiled"),
    ("gs://bucket/compiled", None, "gs://bucket/compiled"),
    ("", None, None),
    ("workdir", "elsewhere", None),
  ],
)
def test_where_compiled_programs_are_kept(
  config, monkeypatch, tmp_path, field, environment, expected
):
  settings = {}
  monkeypatch.setattr(program_lib.jax.config, "update", settings.__setitem__)
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  if environment:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", environment)
  config.compilation_cache = field
  program_lib.use_compilation_cache(config, tmp_path / "compiled")
  assert settings.get("jax_compilation_cache_dir") == (
    expected and expected.replace("WORKDIR", str(tmp_path))
  )


def test_keys_of_compiled_programs_do_not_depend_on_their_folder(tmp_path):
  options = [
    "jax_compilation_cache_dir",
    "jax_persistent_cache_enable_xla_caches",
    "jax_persistent_cache_min_compile_time_secs",
  ]
  before = {option: getattr(jax.config, option) for option in options}
  try:
    for folder in ("here", "there"):
      program_lib.keep_compiled(str(tmp_path / folder))
      compilation_cache.reset_cache()
      jax.jit(lambda x: 3 * x).lower(jax.ShapeDtypeStruct((2,), "float32")).compile()
  finally:
    for option, value in before.items():
      jax.config.update(option, value)
    compilation_cache.reset_cache()
  here, there = (sorted(p.name for p in (tmp_path / f).iterdir()) for f in ("here", "there"))
  assert here == there and len(here) > 0
