"""Every second of a run belongs to one cause, also those of processes that left nothing behind."""

import json
import signal
import subprocess
import time
import types

import pytest

from tests.trainer import test_run
from trainer.reporting import clock as clock_lib


@pytest.fixture
def now(monkeypatch):
  """The time, to be set: [seconds]."""
  now = [1000.0]
  monkeypatch.setattr(
    clock_lib, "time", types.SimpleNamespace(time=lambda: now[0] + 1e9, monotonic=lambda: now[0])
  )
  return now


def test_causes_of_one_process(now):
  clock = clock_lib.WallClock()
  now[0] += 2
  with clock("compile"):
    now[0] += 30
  clock.switch("step")
  now[0] += 60
  with clock("checkpoint"):
    now[0] += 8
  first = 1e9 + 1000
  assert clock.start(None) == {
    "first_start": first,
    "starts": 1,
    "history": [{"step": 0, "time": first}],
  }
  assert clock.since_first_start() == {
    "compile": 30,
    "input_wait": 0,
    "step": 60,
    "eval": 0,
    "checkpoint": 8,
    "other": 2,
    "restart": 0,
  }
  assert clock.goodput() == pytest.approx(0.6)


@pytest.mark.parametrize("hours", [-10, 10])
def test_a_clock_that_is_set_meanwhile_is_no_restart(now, monkeypatch, hours):
  clock = clock_lib.WallClock()
  clock.start(None)
  clock.switch("step")
  now[0] += 60
  monkeypatch.setattr(clock_lib.time, "time", lambda: now[0] + 1e9 + 3600 * hours)
  assert clock.since_first_start()["restart"] == 0 and clock.goodput() == 1.0


def test_what_is_done_again_does_not_count(now):
  first = clock_lib.WallClock()
  starts = first.start(None)
  first.switch("step")
  now[0] += 100
  saved = first.read()
  now[0] += 50  # steps after the checkpoint, lost in a kill
  now[0] += 30  # until the next process is there
  second = clock_lib.WallClock()
  second.restore(saved)
  starts = second.start(starts)
  second.switch("step")
  now[0] += 20
  assert starts["starts"] == second.starts == 2
  seconds = second.since_first_start()
  assert (seconds["step"], seconds["restart"]) == (120, 80)
  assert second.goodput() == pytest.approx(0.6)


def test_killed_before_its_first_checkpoint(now):
  starts = clock_lib.WallClock().start(None)
  now[0] += 90
  second = clock_lib.WallClock()
  second.start(starts)
  second.switch("step")
  now[0] += 10
  assert second.since_first_start()["restart"] == 90
  assert second.goodput() == pytest.approx(0.1)


def test_killed_resumed_and_stopped_the_causes_sum_up_to_the_time_since_the_first_start(
  tmp_path, shards
):
  args = test_run.command(
    tmp_path, shards, "total_steps=400", "checkpoint.every_steps=20", "log.every_steps=50"
  )
  starts, pause = tmp_path / "starts.json", 1.0
  began = time.time()
  waits = (
    (signal.SIGKILL, lambda: starts.exists()),
    (signal.SIGKILL, lambda: list((tmp_path / "checkpoints").glob("?0"))),
    (signal.SIGTERM, lambda: json.loads(starts.read_text())["starts"] == 3),
  )
  for number, reached in waits:
    with subprocess.Popen(args, stderr=subprocess.DEVNULL) as process:
      while not reached() and process.poll() is None:
        time.sleep(0.02)
      process.send_signal(number)
    time.sleep(pause)
  subprocess.run(args, check=True, capture_output=True)
  ended = (tmp_path / "final.json").stat().st_mtime
  final = json.loads((tmp_path / "final.json").read_text())
  first_start = json.loads(starts.read_text())["first_start"]
  seconds = final["wall_seconds"]
  assert final["goodput"]["starts"] == 4
  assert began <= first_start
  assert seconds["total"] == pytest.approx(ended - first_start, abs=1)
  assert seconds["total"] == pytest.approx(sum(v for k, v in seconds.items() if k != "total"))
  assert seconds["restart"] >= len(waits) * pause
  assert final["goodput"]["share"] == pytest.approx(seconds["step"] / seconds["total"], abs=0.01)
  assert "restarts" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
  "seconds, text",
  [
    (0.04, "0.0 s"),
    (59.94, "59.9 s"),
    (60, "1 min 0 s"),
    (725, "12 min 5 s"),
    (12_000, "3 h 20 min"),
  ],
)
def test_seconds_in_words(seconds, text):
  assert clock_lib.format_seconds(seconds) == text
