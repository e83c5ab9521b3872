"""Event files and log of a run whose clocks are made up."""

import logging
import types

from etils import epath
import jax.numpy as jnp
import pytest

from trainer.reporting import events, flops
from trainer.reporting import telemetry as telemetry_lib
from trainer.step import METRICS


class Clock:
  """A WallClock whose seconds are set."""

  def __init__(self):
    self.seconds = {"input_wait": 0.0, "step": 0.0, "checkpoint": 0.0}

  def read(self):
    return dict(self.seconds)

  def goodput(self):
    return 0.75


@pytest.fixture
def run(tmp_path, config, monkeypatch, caplog):
  """Open telemetry on made-up time; take(step) is a step of 0.1 s, a fifth of it input wait."""
  config.log.every_steps = 4
  now = [50.0]
  monkeypatch.setattr(
    telemetry_lib, "time", types.SimpleNamespace(monotonic=lambda: now[0], time=lambda: now[0])
  )
  caplog.set_level(logging.INFO, logger="absl")

  def open_telemetry(**options):
    clock = Clock()
    telemetry = telemetry_lib.Telemetry(
      epath.Path(tmp_path),
      config,
      clock,
      first_step=0,
      total_steps=100,
      epoch=lambda step: step / 8,
      **options,
    )

    def take(step, seconds=0.1):
      now[0] += seconds
      clock.seconds["step"] += 0.8 * seconds
      clock.seconds["input_wait"] += 0.2 * seconds
      telemetry.step(step, jnp.ones(len(METRICS)))

    def stand_still(seconds):
      telemetry.flush()
      now[0] += seconds
      clock.seconds["checkpoint"] += seconds

    def read():
      telemetry.flush()
      telemetry.close()
      return {
        name.removeprefix("train/"): dict(zip(steps.tolist(), values))
        for name, (steps, values, _) in events.read_scalars(tmp_path / "events").items()
      }

    return types.SimpleNamespace(take=take, stand_still=stand_still, read=read, telemetry=telemetry)

  return open_telemetry


def test_speed_of_a_window(run, caplog):
  run = run(work=lambda start, stop: 4.0 * (stop - start), peak=100.0)
  for step in range(1, 11):
    run.take(step)
  scalars = run.read()
  assert scalars["step_seconds_median"][8] == pytest.approx(0.1)
  assert scalars["step_seconds_p99"][8] == pytest.approx(0.1)
  assert scalars["images_per_second"][8] == pytest.approx(80)
  assert scalars["input_wait"][8] == pytest.approx(0.2)
  assert scalars["mfu"][8] == pytest.approx(0.4)
  assert scalars["goodput"][8] == pytest.approx(0.75)
  assert scalars["checkpoint_stall_seconds"][8] == 0
  assert scalars["host_memory_bytes"][8] > 1e6
  line = next(
    record.getMessage() for record in caplog.records if "step 8/100" in record.getMessage()
  )
  assert "MFU 40.0%" in line and "step 100.0 ms (p99 100.0)" in line


def test_unknown_peak_and_one_host_say_nothing(run, caplog):
  run = run()
  for step in range(1, 7):
    run.take(step)
  assert not {"mfu", "straggler_host", "straggler_seconds"} & run.read().keys()
  assert "MFU" not in caplog.text and "last host" not in caplog.text


def test_standing_still_for_a_save_is_no_step_time(run):
  run = run()
  for step in range(1, 7):
    run.take(step)
  run.stand_still(7.0)
  for step in range(7, 11):
    run.take(step)
  scalars = run.read()
  assert scalars["checkpoint_stall_seconds"] == {4: 0, 8: pytest.approx(7.0)}
  assert scalars["step_seconds_p99"][8] < 0.2


def test_steps_that_nobody_has_waited_for_have_no_time(run, caplog):
  run = run()
  for step in range(1, 8):
    run.take(step)
  run.stand_still(7.0)  # reads the steps 6 and 7 at once, both ready since when is not known
  run.take(8)
  assert run.read()["step_seconds_median"][8] == pytest.approx(0.1)
  assert "step 8/100" in caplog.text and "step 0.0 ms" not in caplog.text


def test_a_slow_step_shows_in_the_99th_percentile(run):
  run = run()
  for step in range(1, 11):
    run.take(step, 0.5 if step == 8 else 0.1)
  scalars = run.read()
  assert scalars["step_seconds_median"][8] == pytest.approx(0.1)
  assert 0.45 < scalars["step_seconds_p99"][8] <= 0.5


def test_straggler_is_named(run, caplog):
  asked = []

  def exchange(step, mean):
    asked.append((step, mean))
    return {0: mean, 1: mean + 0.001, 2: mean + 0.002, 3: mean + 0.042} if step > 4 else {0: mean}

  run = run(exchange=exchange)
  for step in range(1, 11):
    run.take(step)
  scalars = run.read()
  assert [step for step, _ in asked] == [4, 8]
  assert asked[0][1] == pytest.approx(50.25)  # dispatched at 50.1, 50.2, 50.3 and 50.4
  assert scalars["straggler_host"] == {8: 3}
  assert scalars["straggler_seconds"][8] == pytest.approx(0.041, abs=1e-4)
  assert "last host: 3, 41 ms behind the median over the last 4 steps" in caplog.text


@pytest.mark.parametrize(
  "seconds, delay, late",
  [
    (0.1, 0.012, True),
    (0.1, 0.009, False),  # more than 5 % of a step, but clocks may differ by as much
    (1.0, 0.051, True),
    (1.0, 0.049, False),  # less than 5 % of a step
  ],
)
def test_only_a_host_that_is_late_is_logged(run, caplog, seconds, delay, late):
  run = run(exchange=lambda step, mean: {0: mean, 1: mean, 2: mean + delay})
  for step in range(1, 7):
    run.take(step, seconds)
  scalars = run.read()
  assert scalars["straggler_host"] == {4: 2}
  assert scalars["straggler_seconds"][4] == pytest.approx(delay, abs=1e-6)
  assert ("last host: 2" in caplog.text) == late


def test_only_process_0_writes_files(run, tmp_path, monkeypatch):
  monkeypatch.setattr(telemetry_lib.jax, "process_index", lambda: 1)
  run = run()
  for step in range(1, 9):
    run.take(step)
  with pytest.raises(FileNotFoundError):
    run.read()
  assert not (tmp_path / "events").exists()


@pytest.mark.parametrize(
  "means, expected",
  [
    ({0: 10.0}, (0, 0.0)),
    ({0: 10.0, 1: 10.5}, (1, 0.5)),
    ({0: 12.0, 1: 10.0, 2: 10.25}, (0, 1.75)),
    ({2: 10.0, 0: 10.0, 1: 10.0}, (0, 0.0)),
  ],
)
def test_straggler(means, expected):
  assert telemetry_lib.straggler(means) == expected


def test_what_was_read_from_a_bucket_is_written(run):
  reads = {"requests": 3, "retries": 1}
  opened = run(reads=lambda: reads)
  for step in range(1, 9):
    opened.take(step)
    reads["requests"] += 1
  scalars = opened.read()
  assert (
    sorted(scalars["read_requests"]) == [4, 8]
    and scalars["read_requests"][4] < scalars["read_requests"][8]
  )
  assert set(scalars["read_retries"].values()) == {1}


def test_the_time_left_is_that_of_the_sizes_to_come(run, caplog):
  """Steps from 50 on are four times the work of those before."""
  run = run(work=flops.Work([(0, 1.0), (50, 4.0)]).between, image_size=lambda step: 16 + step // 50)
  for step in range(1, 11):
    run.take(step)
  scalars = run.read()
  # After step 8 of 100: 42 steps of 0.1 s and 50 of 0.4 s.
  assert "ETA 24.2 s" in caplog.text and "16 px" in caplog.text
  assert scalars["image_size"] == {4: 16, 8: 16}


def test_the_time_left_has_the_evaluations_to_come(run, caplog):
  run = run(evaluations=lambda step: 2, evaluated_examples=24)
  for step in range(1, 11):
    run.take(step)
  # Two of 24 images each, every one a third of one in a step of 8 that takes 0.1 s.
  assert "step 8/100" in caplog.text and "ETA 9.4 s" in caplog.text
  result = {"top1": 0.5, "top5": 1.0, "loss": 1.0, "examples": 24}
  run.telemetry.evaluated(10, result, 5.0)
  assert "on 24 examples, in 5.0 s" in caplog.text
  for step in range(11, 15):
    run.take(step)
  assert "ETA 18.8 s" in caplog.text
