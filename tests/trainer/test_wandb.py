"""Scalars for Weights & Biases: what its package is given, and what it has written offline."""

import importlib.machinery
import json
import os
import struct
import subprocess
import sys
import types

from etils import epath
import pytest

from tests.trainer.shared import ENVIRONMENT, trainer
from trainer.errors import ConfigError
from trainer.reporting import wandb_writer
from trainer.train import train
from trainer.workdir.paths import Workdir


class Package(types.ModuleType):
  """What the writer uses of wandb; notes what it is given."""

  def __init__(self):
    super().__init__("wandb")
    self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    self.mode, self.key, self.broken = "online", True, False
    self.begun, self.logged, self.finished = [], [], 0

  def setup(self, settings):
    assert settings["silent"]
    return types.SimpleNamespace(settings=types.SimpleNamespace(mode=self.mode))

  def login(self, *, prompt, verify):
    assert not prompt and not verify
    return self.key

  def Settings(self, **settings):
    return settings

  def init(self, **options):
    self.begun.append(options)
    return types.SimpleNamespace(
      log=self.log, finish=self.finish, offline=False, url="https://...", dir="..."
    )

  def log(self, values, *, step):
    if self.broken:
      raise OSError("no network\nand more")
    self.logged.append((step, values))

  def finish(self):
    self.finished += 1


@pytest.fixture
def package(monkeypatch):
  package = Package()
  monkeypatch.setitem(sys.modules, "wandb", package)
  return package


def open_writer(folder, config):
  return wandb_writer.WandbWriter(Workdir(epath.Path(folder)), config)


def test_a_run_without_the_package_is_refused_at_its_start(tmp_path, config, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)  # what an import takes for absent
  config.log.wandb = "resnets"
  with pytest.raises(ConfigError, match=r"needs the package wandb; run: pip install .*wandb"):
    train(config, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_a_key_is_needed_unless_offline(package):
  assert not wandb_writer.problem()
  package.key = False
  assert "WANDB_MODE=offline" in wandb_writer.problem()
  package.mode = "offline"
  assert not wandb_writer.problem()


def test_a_resume_continues_the_same_run(tmp_path, config, package):
  config.log.wandb = "team/resnets"
  writer = open_writer(tmp_path, config)
  assert not package.begun  # a start waits for no server
  writer.write_scalars(4, {"train/loss": 2.0, "steps_per_sec": 3.0})
  writer.write_scalars(4, {"uptime": 9.0})
  writer.write_scalars(4, {"eval/top1": 0.5})
  writer.close()
  writer = open_writer(tmp_path, config)
  writer.write_scalars(8, {"train/loss": 1.0})
  writer.close()
  assert package.logged == [
    (4, {"train/loss": 2.0}),
    (4, {"eval/top1": 0.5}),
    (8, {"train/loss": 1.0}),
  ]
  first, second = package.begun
  assert (first["entity"], first["project"]) == ("team", "resnets") and package.finished == 2
  assert first["config"] == config.to_dict() and first["resume"] == "allow"
  assert first["name"] == tmp_path.name and first["dir"] == str(tmp_path)
  assert first["id"] == second["id"]
  config.log.wandb = "others"
  open_writer(tmp_path, config).write_scalars(12, {"train/loss": 1.0})
  assert package.begun[-1]["id"] != first["id"] and package.begun[-1]["entity"] is None


def test_what_fails_there_ends_no_run(tmp_path, config, package, caplog):
  config.log.wandb = "resnets"
  writer = open_writer(tmp_path, config)
  writer.write_scalars(1, {"train/loss": 2.0})
  package.broken = True
  writer.write_scalars(2, {"train/loss": 2.0})
  package.broken = False
  writer.write_scalars(3, {"train/loss": 2.0})
  writer.close()
  assert [step for step, _ in package.logged] == [1] and package.finished == 1
  assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [
    "Weights & Biases gets nothing more: OSError: no network"
  ]


def records(path):
  """Yield the records of a .wandb file, a log in the format of LevelDB behind 7 bytes."""
  data, start, parts = path.read_bytes(), 7, b""
  while start + 7 <= len(data):
    left = 32768 - start % 32768
    if left < 7:
      start += left
      continue
    _, length, kind = struct.unpack("<IHB", data[start : start + 7])
    if not kind:
      break
    parts += data[start + 7 : start + 7 + length]
    start += 7 + length
    if kind in (1, 4):  # whole, or the last part
      yield parts
      parts = b""


def read_runs(folder):
  """Return the scalars of all offline runs by step, their ids, and the config of each."""
  from wandb.proto import wandb_internal_pb2

  found, ids, configs = {}, set(), []
  for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=os.path.getmtime):
    for data in records(path):
      record = wandb_internal_pb2.Record.FromString(data)
      kind = record.WhichOneof("record_type")
      if kind == "run":
        ids.add(record.run.run_id)
        configs.append({u.key: json.loads(u.value_json) for u in record.run.config.update})
      elif kind == "history":
        items = record.history.item
        values = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in items}
        before = found.setdefault(values["_step"], {})
        values = {name: value for name, value in values.items() if not name.startswith("_")}
        # Only the evaluation of the step that is resumed at comes twice.
        assert not before or {*values} == {name for name in before if name.startswith("eval/")}
        assert all(before.get(name, value) == value for name, value in values.items())
        before.update(values)
  return found, ids, configs


@pytest.mark.slow
def test_offline_runs_have_the_lines_of_metrics_jsonl(tmp_path):
  """Two starts of a run, each an offline run of the same id with the scalars of its steps."""
  pytest.importorskip("wandb", reason="wandb is not installed")
  run = tmp_path / "run"
  overrides = ("total_steps=8", "eval.every_steps=4", "log.every_steps=2", "log.wandb=resnets")
  for more in (["total_steps=4"], ["resume.allow=total_steps"]):
    ended = subprocess.run(
      trainer(run, *overrides, *more),
      env=ENVIRONMENT | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)},
      capture_output=True,
      text=True,
      check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("Weights & Biases: ") == 1 and "wandb: " not in ended.stderr
  found, ids, configs = read_runs(run)
  wanted = {}
  for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
    step = line.pop("step")
    del line["time"]
    wanted.setdefault(step, {}).update(line)
  assert list(found) == [2, 4, 6, 8] and found == wanted
  assert ids == {json.loads((run / "wandb.json").read_text())["id"]}
  saved = json.loads((run / "config.json").read_text())
  assert json.loads(json.dumps(configs[-1]["model"])) == saved["model"]
  assert configs[-1]["total_steps"] == 8
