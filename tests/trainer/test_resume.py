"""What a resume may change: longer or shorter runs, rate, batch size; and checkpoints of old."""

import json
import pathlib
import shutil
import tarfile

import numpy as np
import pytest

from configs import base
from tests.trainer import tiny
from tests.trainer.shared import StopAt, fingerprints
from trainer import config as config_lib
from trainer import train as train_lib
from trainer.errors import ConfigError, Preempted
from trainer.reporting import events

# Written by the commit before the state had a part `others` and the config a field `loss`: the net
# of tests/trainer/tiny.py on synthetic images with optimizer.ema_decay=0.9, stopped at step 7.
OLD = pathlib.Path(__file__).with_name("checkpoint_of_before.tar.xz")


@pytest.fixture
def run_config(shards):
  config = tiny.get_config()
  config.data.path = str(shards)
  return config


def stop_after(calls):
  """Returns a stop that is asked for after so many calls."""
  return StopAt(calls + 1)


@pytest.mark.parametrize(
  "fields, allow, refused",
  [
    ({"total_steps": 20}, "", "config.resume.allow=total_steps"),
    ({"total_steps": 20}, "optimizer", "config.resume.allow=total_steps"),
    ({"total_steps": 20}, "total_steps", None),
    ({"optimizer.lr_per_256": 0.5}, "config.optimizer.lr_per_256", None),
    ({"optimizer.lr_per_256": 0.5, "optimizer.momentum": 0.8}, "optimizer", None),
    ({"optimizer.lr_per_256": 0.5, "total_steps": 20}, "total_steps, optimizer", None),
    ({"optimizer.name": "adamw"}, "optimizer", "config.optimizer.name"),
    ({"model.depth": 14}, "model", "config.model.depth: 8 -> 14"),
    ({"seed": 3, "total_steps": 20}, "total_steps", "config.seed: 0 -> 3"),
  ],
)
def test_what_is_allowed_and_what_never(fields, allow, refused):
  config = tiny.get_config()
  saved = config_lib.flatten(config)
  config.update_from_flattened_dict(fields | {"resume.allow": allow})
  config_lib.validate(config)
  if refused:
    with pytest.raises(ConfigError) as error:
      config_lib.check_same_run(saved, config, "runs/a")
    assert refused in str(error.value) and "\n" not in str(error.value)
  else:
    changes = config_lib.check_same_run(saved, config, "runs/a")
    assert changes == {name: [saved[name], value] for name, value in fields.items()}


def test_a_field_that_an_older_config_lacks_had_its_default():
  config = tiny.get_config()
  saved = config_lib.flatten(config)
  for name in ("loss", "augment", "data.operations", "optimizer.schedule", "resume.allow"):
    del saved[name]
  assert config_lib.check_same_run(saved, config, "runs/a") == {}
  config.loss = "sigmoid_cross_entropy"
  with pytest.raises(ConfigError, match=r"config\.loss: 'softmax_cross_entropy' -> 'sigmoid"):
    config_lib.check_same_run(saved, config, "runs/a")


def test_a_field_that_is_no_more_is_named():
  config = tiny.get_config()
  saved = config_lib.flatten(config) | {"optimizer.gone": 1}
  with pytest.raises(ConfigError, match=r"config\.optimizer\.gone: 1 -> None"):
    config_lib.check_same_run(saved, config, "runs/a")


def test_a_finished_run_is_made_longer(tmp_path, run_config):
  run_config.optimizer.schedule = "constant"
  run_config.total_steps = 16
  train_lib.train(run_config, str(tmp_path / "whole"))
  run_config.total_steps = 9
  train_lib.train(run_config, str(tmp_path / "longer"))
  run_config.total_steps, run_config.resume.allow = 16, "total_steps"
  final = train_lib.train(run_config, str(tmp_path / "longer"))
  # A constant rate does not depend on the length, so this is the run that was never cut in two.
  assert fingerprints(tmp_path / "longer", 16) == fingerprints(tmp_path / "whole", 16)
  assert final["history"] == [{"step": 9, "changes": {"total_steps": [9, 16]}}]
  assert json.loads((tmp_path / "longer" / "final.json").read_text())["history"] == final["history"]
  # What was allowed once needs no leave again, and the run is complete.
  run_config.resume.allow = ""
  assert train_lib.train(run_config, str(tmp_path / "longer")) == final


def test_a_run_is_made_shorter_than_it_is(tmp_path, run_config):
  with pytest.raises(Preempted):
    train_lib.train(run_config, str(tmp_path), stop_after(7))
  step = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
  assert step > 4
  run_config.total_steps, run_config.resume.allow = 4, "total_steps"
  final = train_lib.train(run_config, str(tmp_path))
  assert final["step"] == step and final["examples"] == 29


def test_another_batch_size_resumes_the_data_where_they_were(tmp_path, run_config, monkeypatch):
  """Examples follow each other as in a run that always had this batch, counted by examples."""
  from input_pipeline import loader

  seen = []
  original = loader.train_batches

  def traced(*args, **kwargs):
    seen.append((kwargs["first_step"], kwargs["global_batch_size"]))
    return original(*args, **kwargs)

  monkeypatch.setattr(loader, "train_batches", traced)
  run_config.total_steps, run_config.total_epochs = 0, 4.0  # 72 examples: 36 steps of 8
  run_config.eval.every_epochs = 1.0
  with pytest.raises(Preempted):
    train_lib.train(run_config, str(tmp_path), stop_after(18))
  step = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
  run_config.global_batch_size, run_config.resume.allow = 24, "global_batch_size"
  final = train_lib.train(run_config, str(tmp_path))
  assert seen == [(0, 8), (step * 8 // 24, 24)]
  # 4 epochs are 12 steps of 24; of these the first took `step` steps of 8.
  assert final["step"] == step + 12 - step * 8 // 24
  assert final["epochs"] == 4.0
  assert final["history"] == [{"step": step, "changes": {"global_batch_size": [8, 24]}}]
  scalars = events.read_scalars(tmp_path / "events")
  steps, rates, _ = scalars["train/learning_rate"]
  cosine = 24 / 256 * 0.5 * (1 + np.cos(np.pi * (step * 8 // 24) / 12))
  assert rates[steps.tolist().index(step + 1)] == pytest.approx(cosine, rel=1e-4)
  assert scalars["eval/top1"][0][-1] == final["step"]


def test_resumed_again_after_another_batch_size(tmp_path, run_config):
  run_config.total_steps, run_config.total_epochs = 0, 2.0
  with pytest.raises(Preempted):
    train_lib.train(run_config, str(tmp_path / "a"), stop_after(5))
  shutil.copytree(tmp_path / "a", tmp_path / "b")
  run_config.global_batch_size, run_config.resume.allow = 4, "global_batch_size"
  quiet = train_lib.train(run_config, str(tmp_path / "a"))
  with pytest.raises(Preempted):
    train_lib.train(run_config, str(tmp_path / "b"), stop_after(3))
  final = train_lib.train(run_config, str(tmp_path / "b"))
  assert final["step"] == quiet["step"] and final["history"] == quiet["history"]
  assert fingerprints(tmp_path / "b", final["step"]) == fingerprints(tmp_path / "a", final["step"])


def test_a_checkpoint_of_an_earlier_version(tmp_path):
  with tarfile.open(OLD) as tar:
    tar.extractall(tmp_path, filter="data")
  config = tiny.get_config()
  config.data.kind, config.optimizer.ema_decay = "synthetic", 0.9
  # That restoring compares a hash of every leaf is test_checkpoint's business.
  evaluated = train_lib.evaluate_only(config, str(tmp_path))
  assert (evaluated["step"], evaluated["examples"]) == (7, 64)
  assert evaluated["loss"] == pytest.approx(1.7917256, rel=1e-5)
  final = train_lib.train(config, str(tmp_path))
  assert final["step"] == 10 and final["loss"] == pytest.approx(1.7917063, rel=1e-5)


def test_what_is_said_of_a_field_is_what_happens():
  """Every field that a resume may change at will may be changed, and no other."""
  for name, field in base.all_fields("resnet").items():
    config = base.get_config()
    saved = config_lib.flatten(config)
    other = saved[name] + 1 if isinstance(saved[name], int | float) else "other"
    if isinstance(saved[name], bool):
      other = not saved[name]
    if isinstance(saved[name], list) or name in ("model.name", "data.kind"):
      continue
    saved[name] = other
    if field.resume == "yes":
      assert config_lib.check_same_run(saved, config, "runs/a") == {}
    else:
      with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        config_lib.check_same_run(saved, config, "runs/a")
