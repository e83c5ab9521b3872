"""Several hosts as real processes: the same numbers on any topology, and nobody waits for ever."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.trainer import tiny
from trainer import events
from trainer.errors import FAILED, HOST_LOST, PREEMPTED

TINY = pathlib.Path(tiny.__file__)
TIMEOUT = 12  # seconds that a host may be silent


def trainer(workdir, shards, *overrides):
  return [sys.executable, "-m", "trainer", f"--config={TINY}", f"--workdir={workdir}", f"--config.data.path={shards}",
          *[f"--config.{override}" for override in overrides]]


def local_pod(hosts, devices, command):
  return [sys.executable, "-m", "launch.local_pod", f"--hosts={hosts}", f"--devices-per-host={devices}", "--grace=60",
          "--", *command]


class Running:
  """A pod under way: its log so far, and the process of each host."""

  def __init__(self, process):
    self.process, self.log = process, ""

  def wait_for(self, words):
    for line in self.process.stdout:
      self.log += line
      if words in line:
        return
    pytest.fail(f"{words!r} never came:\n{self.log}")

  def pid(self, host):
    return int(self.log.split(f"[{host}] started as process ")[1].split()[0])

  def finish(self, timeout=120):
    self.log += self.process.communicate(timeout=timeout)[0]
    return self.process.returncode


@contextlib.contextmanager
def running(hosts, devices, command):
  with subprocess.Popen(local_pod(hosts, devices, command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                        text=True) as process:
    try:
      yield Running(process)
    finally:
      process.terminate()
      process.wait(timeout=90)


def curve(workdir, name="train/loss"):
  return events.read_scalars(str(workdir / "events"))[name][1]


def fingerprints(workdir, step):
  return json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())["fingerprints"]


def test_any_number_of_hosts_gives_the_same_numbers(tmp_path, shards):
  for hosts, devices in ((1, 4), (2, 2), (4, 1)):
    subprocess.run(local_pod(hosts, devices, trainer(tmp_path / f"{hosts}x{devices}", shards)), check=True,
                   capture_output=True)
  one = tmp_path / "1x4"
  for other in (tmp_path / "2x2", tmp_path / "4x1"):
    np.testing.assert_allclose(curve(other), curve(one), rtol=1e-5)
    np.testing.assert_allclose(curve(other, "eval/loss"), curve(one, "eval/loss"), rtol=1e-5)
    assert json.loads((other / "final.json").read_text())["examples"] == 29


def test_sigterm_to_one_host_stops_all_at_the_same_step(tmp_path, shards):
  overrides = ("total_steps=200", "log.every_steps=10", "checkpoint.every_steps=50")
  quiet, stopped = tmp_path / "quiet", tmp_path / "stopped"
  subprocess.run(local_pod(2, 1, trainer(quiet, shards, *overrides)), check=True, capture_output=True)
  with running(2, 1, trainer(stopped, shards, *overrides)) as pod:
    pod.wait_for("step 20/200")
    os.kill(pod.pid(1), signal.SIGTERM)
    assert pod.finish() == PREEMPTED, pod.log
  assert "[0] ended with code 75" in pod.log and "[1] ended with code 75" in pod.log
  saved = int(pod.log.split("Stopped and saved at step ")[1].split()[0])
  assert 20 <= saved < 200
  # The same topology goes on in the same bits, a single host in the same numbers.
  subprocess.run(["cp", "-r", stopped, tmp_path / "alone"], check=True)
  for hosts, workdir in ((2, stopped), (1, tmp_path / "alone")):
    log = subprocess.run(local_pod(hosts, 1, trainer(workdir, shards, *overrides)), check=True, text=True,
                         stdout=subprocess.PIPE).stdout
    assert f"Going on from checkpoint {saved} of 200" in log
  assert fingerprints(stopped, 200) == fingerprints(quiet, 200)
  np.testing.assert_allclose(curve(tmp_path / "alone", "eval/loss"), curve(quiet, "eval/loss"), rtol=0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_host_is_named_and_the_others_leave(tmp_path, shards, number):
  workdir = tmp_path / "run"
  command = trainer(workdir, shards, "total_steps=100000", "log.every_steps=10", "checkpoint.every_steps=20",
                    f"pod.timeout_seconds={TIMEOUT}")
  with running(2, 1, command) as pod:
    pod.wait_for("step 40/")
    os.kill(pod.pid(1), number)
    pod.wait_for("[0] ended with code")
    if number == signal.SIGSTOP:
      os.kill(pod.pid(1), signal.SIGKILL)
    assert pod.finish() != 0
  assert f"[0] ended with code {HOST_LOST}" in pod.log, pod.log
  assert "gives up: host 1 was last heard" in pod.log, pod.log
  assert not (workdir / "damaged").exists()
  assert [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]


def test_host_0_lost_ends_the_others(tmp_path, shards):
  """It coordinates, so JAX ends the others before they can say a sentence; but they do end, and nothing is lost."""
  command = trainer(tmp_path / "run", shards, "total_steps=100000", "log.every_steps=10", "checkpoint.every_steps=20")
  with running(2, 1, command) as pod:
    pod.wait_for("step 40/")
    os.kill(pod.pid(0), signal.SIGKILL)
    pod.wait_for("[1] ended with code")
    assert pod.finish() != 0
  assert "[1] ended with code 0" not in pod.log


def test_a_host_with_another_config_is_refused_by_name(tmp_path, shards):
  command = " ".join(trainer(tmp_path / "run", shards)) + " --config.seed=$JAX_PROCESS_ID"
  result = subprocess.run(local_pod(2, 1, ["bash", "-c", command]), capture_output=True, text=True, timeout=90)
  assert result.returncode == FAILED, result.stdout
  assert "Host 1 runs with seed=1, host 0 with seed=0" in result.stdout
