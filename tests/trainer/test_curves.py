"""Curves of runs that were stopped and resumed, as TensorBoard and the report read them."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

from etils import epath
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer import tiny
from tests.trainer.shared import ENVIRONMENT
from trainer import train as train_lib
from trainer.reporting import events, json_lines
from trainer.reporting.telemetry import Telemetry
from trainer.step import METRICS

EVALUATED = (50, 100, 150)
READERS = ("report", "EventAccumulator", "plugin EventAccumulator")


class Clock:
  """A WallClock by which everything takes a second."""

  def __init__(self):
    self.seconds = 0.0

  def read(self):
    self.seconds += 1
    return {"input_wait": 0.0, "step": self.seconds, "checkpoint": 0.0}

  def goodput(self):
    return 1.0


def live(workdir, first, last, value, *, every=1, evaluated=EVALUATED, name="other"):
  """Be a process that is resumed at step `first` and ends after `last`; all its points are `value`.

  Evaluations have a second split, called `name`.
  """
  config = tiny.get_config()
  config.log.every_steps = every
  telemetry = Telemetry(
    workdir, config, Clock(), first_step=first, total_steps=1000, epoch=lambda step: step / 8
  )
  metrics = dict.fromkeys(("top1", "top5", "loss"), value) | {"examples": 29}
  result = metrics | {"splits": {name: metrics}}
  if first and first in evaluated:
    telemetry.evaluated(first, result)
  for step in range(first + 1, last + 1):
    telemetry.step(step, jnp.full(len(METRICS), value, np.float32))
    if step in evaluated:
      telemetry.flush()
      telemetry.evaluated(step, result)
  telemetry.flush()
  telemetry.close()


def draw(folder, reader):
  """Return {name: ([steps], [values])} in the order in which a reader has the points."""
  if reader == "report":
    return {
      name: (steps.tolist(), values.tolist())
      for name, (steps, values, _) in events.read_scalars(folder).items()
    }
  reason = "TensorBoard's own reader; it comes with [test]"
  module = "plugin_event_accumulator" if reader.startswith("plugin") else "event_accumulator"
  package = "tensorboard.backend.event_processing"
  accumulators = pytest.importorskip(f"{package}.{module}", reason=reason)
  if reader.startswith("plugin"):
    from tensorboard.util import tensor_util

    found = accumulators.EventAccumulator(str(folder), tensor_size_guidance={"scalars": 0})
    found.Reload()
    points = {
      name: [(e.step, tensor_util.make_ndarray(e.tensor_proto).item()) for e in found.Tensors(name)]
      for name in found.PluginTagToContent("scalars")  # texts are no curves
    }
  else:
    found = accumulators.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    points = {
      name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]
    }
  return {name: tuple(map(list, zip(*pairs))) for name, pairs in points.items() if pairs}


def lines(workdir):
  """Return the same of `metrics.jsonl`, in the order of its lines."""
  found = {}
  for text in (workdir / "metrics.jsonl").read_text().splitlines():
    line = json.loads(text)
    assert line.pop("time") > 1e9
    step = line.pop("step")
    for name, value in line.items():
      xs, ys = found.setdefault(name, ([], []))
      xs.append(step)
      ys.append(value)
  return found


def counting(lives):
  """Return {step: value} of the training steps and of the evaluations that count."""
  steps, evaluations = {}, {}
  for value, (first, last) in enumerate(lives):
    for found, start in ((steps, first + 1), (evaluations, first)):
      for step in [step for step in found if step >= start]:
        # The evaluation of the restored step counts until it is done again, which it is at once.
        del found[step]
    steps |= dict.fromkeys(range(first + 1, last + 1), float(value))
    evaluations |= {step: float(value) for step in EVALUATED if max(first, 1) <= step <= last}
  return steps, evaluations


def check(curves, lives):
  steps, evaluations = counting(lives)
  for name, (x, y) in curves.items():
    assert (np.diff(x) > 0).all(), f"{name} goes back: {x}"
    if name.startswith("train/") and "step_seconds" not in name:  # which the first step lacks
      assert x == sorted(steps), name
    if name.startswith("eval/"):
      assert x == sorted(evaluations), name
    if name in ("train/loss", "train/top1"):
      assert dict(zip(x, y)) == steps, name
    if name in ("eval/loss", "eval/other/top1"):
      assert dict(zip(x, y)) == evaluations, name
  assert {"train/loss", "eval/top1", "eval/other/top1", "steps_per_sec"} <= curves.keys()


HISTORIES = {
  "killed between saves": [(0, 110), (100, 150)],
  "killed before the first checkpoint": [(0, 60), (0, 150)],
  "killed twice, then at the end": [(0, 110), (100, 130), (100, 150), (150, 150)],
  "stopped, nothing lost": [(0, 110), (110, 150)],
  "newest checkpoint damaged": [(0, 110), (50, 150)],
  "falls back further each time": [(0, 130), (100, 120), (50, 70), (0, 150)],
}


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
  made = {}
  for history, lives in HISTORIES.items():
    made[history] = epath.Path(tmp_path_factory.mktemp("run"))
    for value, (first, last) in enumerate(lives):
      live(made[history], first, last, float(value))
  return made


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("history", HISTORIES)
def test_every_step_is_drawn_once_and_in_order(workdirs, history, reader):
  check(draw(workdirs[history] / "events", reader), HISTORIES[history])


@pytest.mark.parametrize("history", HISTORIES)
def test_lines_of_json_have_every_step_once_and_in_order(workdirs, history):
  found = lines(workdirs[history])
  assert "steps_per_sec" not in found  # clu's own, of no group
  check(found | {"steps_per_sec": ([], [])}, HISTORIES[history])


def test_a_torn_line_and_other_intervals_after_a_resume(tmp_path):
  workdir = epath.Path(tmp_path)
  live(workdir, 0, 110, 0.0, every=2, evaluated=(50, 100, 105), name="before")
  file = tmp_path / "metrics.jsonl"
  file.write_bytes(file.read_bytes()[:-30])
  live(workdir, 100, 120, 1.0, every=5, evaluated=(100, 120), name="after")
  found = lines(tmp_path)
  assert found["train/loss"][0] == [*range(2, 101, 2), 105, 110, 115, 120]
  assert found["eval/top1"] == ([50, 100, 120], [0.0, 1.0, 1.0])
  assert found["eval/before/top1"] == ([50, 100], [0.0, 0.0])
  assert found["eval/after/top1"] == ([100, 120], [1.0, 1.0])
  (config,) = [
    value.tensor.string_val[0].decode()
    for path in (tmp_path / "events").iterdir()
    for event in events._events(path)
    for value in event.summary.value
    if value.tag.startswith("config") and event.step == 100
  ]
  assert '    "seed": 0,' in config


def test_lines_in_a_bucket_are_the_same(tmp_path, monkeypatch):
  monkeypatch.setattr(json_lines.storage, "in_bucket", lambda path: True)
  for value, (first, last) in enumerate([(0, 60), (50, 120)]):
    live(epath.Path(tmp_path), first, last, float(value))
  check(lines(tmp_path) | {"steps_per_sec": ([], [])}, [(0, 60), (50, 120)])


def test_lines_that_cannot_be_written_end_no_run(tmp_path, caplog):
  (tmp_path / "metrics.jsonl").mkdir()
  live(epath.Path(tmp_path), 0, 5, 0.0)
  assert caplog.text.count("metrics.jsonl could not be written") == 1
  assert events.read_scalars(tmp_path / "events")["train/loss"][0].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("reader", READERS)
def test_files_of_before_without_a_mark_are_taken_back_too(tmp_path, reader):
  writer = events.EventWriter(str(tmp_path / "events"))
  for step in range(1, 111):
    writer.write_scalars(step, {"train/loss": 0.0})
  writer.close()
  live(epath.Path(tmp_path), 100, 120, 1.0)
  steps, values = draw(tmp_path / "events", reader)["train/loss"]
  assert steps == list(range(1, 121)) and values == 100 * [0.0] + 20 * [1.0]


@pytest.mark.parametrize("reader", READERS)
def test_what_is_not_written_again_does_not_stay(tmp_path, reader):
  """Other intervals and another split after a resume; a torn end of the file before it."""
  live(epath.Path(tmp_path), 0, 110, 0.0, every=2, evaluated=(50, 100, 105), name="before")
  (file,) = (tmp_path / "events").iterdir()
  file.write_bytes(file.read_bytes()[:-3])
  live(epath.Path(tmp_path), 100, 120, 1.0, every=5, evaluated=(100, 120), name="after")
  curves = draw(tmp_path / "events", reader)
  assert curves["train/loss"][0] == [*range(2, 101, 2), 105, 110, 115, 120]
  assert curves["eval/top1"] == ([50, 100, 120], [0.0, 1.0, 1.0])
  assert curves["eval/before/top1"] == ([50, 100], [0.0, 0.0])
  assert curves["eval/after/top1"] == ([100, 120], [1.0, 1.0])


@pytest.mark.parametrize("reader", READERS)
def test_the_clock_of_the_next_machine_may_be_behind(tmp_path, monkeypatch, reader):
  now = time.time
  live(epath.Path(tmp_path), 0, 60, 0.0)
  monkeypatch.setattr(events.time, "time", lambda: now() - 3600)
  live(epath.Path(tmp_path), 50, 70, 1.0)
  monkeypatch.setattr(events.time, "time", now)
  live(epath.Path(tmp_path), 60, 150, 2.0)
  check(draw(tmp_path / "events", reader), [(0, 60), (50, 70), (60, 150)])


KILLED = """
import os, signal, sys
from etils import epath
from tests.trainer import tiny
from trainer import train
from trainer.reporting import events

workdir, calls = epath.Path(sys.argv[1]), 0
events.FLUSH_SECONDS = 0.0

def stop():
  global calls
  calls += 1
  if calls > 25 and (workdir / "checkpoints" / "20").exists():
    if events.read_scalars(workdir / "events")["train/loss"][0][-1] > 23:
      os.kill(os.getpid(), signal.SIGKILL)
  return False

config = tiny.get_config()
config.data.kind, config.total_steps, config.checkpoint.every_steps = "synthetic", 400, 20
train.train(config, str(workdir), stop)
"""


def test_a_run_that_was_killed(tmp_path, config):
  process = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)],
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
    env=ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
  )
  assert process.returncode == -signal.SIGKILL, process.stderr
  saved = max(
    int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()
  )
  reached = events.read_scalars(tmp_path / "events")["train/loss"][0][-1]
  assert reached > saved  # else this test shows nothing
  config.checkpoint.every_steps, config.total_steps = 20, saved + 30
  config.resume.allow = "total_steps"
  train_lib.train(config, str(tmp_path))
  for reader in READERS:
    assert draw(tmp_path / "events", reader)["train/loss"][0] == list(range(1, saved + 31)), reader
