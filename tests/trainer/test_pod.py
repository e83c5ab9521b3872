"""Several hosts as real processes: they stop together, and none waits for ever."""

import contextlib
import os
import shutil
import signal
import subprocess

import numpy as np
import pytest

from tests.trainer.shared import ENVIRONMENT, TINY, fingerprints, free_port, run, running, trainer
from trainer.errors import FAILED, HOST_LOST, PREEMPTED
from trainer.reporting import events

ENDLESS = ("total_steps=1000000", "log.every_steps=10", "checkpoint.every_steps=20")


def eval_losses(workdir):
  return events.read_scalars(str(workdir / "events"))["eval/loss"][1]


def test_sigterm_to_one_host_stops_all_at_the_same_step(tmp_path):
  overrides = (
    "total_steps=200",
    "log.every_steps=10",
    "checkpoint.every_steps=50",
    "optimizer.lr_per_256=0.1",
  )
  quiet, stopped, alone = tmp_path / "quiet", tmp_path / "stopped", tmp_path / "alone"
  run(2, 1, trainer(quiet, *overrides))
  with running(2, 1, trainer(stopped, *overrides)) as pod:
    pod.wait_for("step 20/200")
    os.kill(pod.pids()[1], signal.SIGTERM)
    assert pod.finish() == PREEMPTED, pod.log
  assert pod.codes() == {0: PREEMPTED, 1: PREEMPTED}
  saved = int(pod.log.split("Stopped and saved at step ")[1].split()[0])
  assert 20 <= saved < 200
  # The same topology resumes bit for bit, a single host up to the order of sums.
  shutil.copytree(stopped, alone)
  for hosts, workdir in ((2, stopped), (1, alone)):
    assert f"Resuming from checkpoint {saved} of 200" in run(hosts, 1, trainer(workdir, *overrides))
  assert fingerprints(stopped, 200) == fingerprints(quiet, 200)
  np.testing.assert_allclose(eval_losses(alone)[-1], eval_losses(quiet)[-1], rtol=0.02)


@pytest.mark.parametrize("moment", ["start", "compile"])
def test_sigterm_before_the_first_step_stops_all(tmp_path, moment):
  with running(2, 1, trainer(tmp_path, *ENDLESS, "pod.start_seconds=15")) as pod:
    pod.wait_for(r"\[1\] started" if moment == "start" else "Compiling the training step")
    os.kill(pod.pids()[1], signal.SIGTERM)
    assert pod.finish() != 0
  codes = set(pod.codes().values())
  # A signal that comes before Python can handle it ends that process; the other host names it.
  assert codes == {PREEMPTED} or (moment == "start" and codes == {-signal.SIGTERM, HOST_LOST}), (
    pod.log
  )


@pytest.mark.parametrize(
  "host, number, seconds",
  [
    (0, signal.SIGKILL, 100),
    pytest.param(1, signal.SIGKILL, 100, marks=pytest.mark.slow),
    pytest.param(0, signal.SIGSTOP, 8, marks=pytest.mark.slow),
    (1, signal.SIGSTOP, 8),
  ],
)
def test_a_lost_host_is_named_and_the_others_leave(tmp_path, host, number, seconds):
  with running(2, 1, trainer(tmp_path, *ENDLESS, f"pod.timeout_seconds={seconds}")) as pod:
    # The save of step 20 is whole when step 60 is logged, for that of 40 began after it.
    pod.wait_for("step 60/")
    os.kill(pod.pids()[host], number)
    pod.wait_for(rf"\[{1 - host}\] ended with code")
    with contextlib.suppress(ProcessLookupError):
      os.kill(pod.pids()[host], signal.SIGKILL)
    assert pod.finish() == (128 + signal.SIGKILL if number == signal.SIGKILL else HOST_LOST)
  assert pod.codes() == {host: -signal.SIGKILL, 1 - host: HOST_LOST}, pod.log
  sentence = next(line for line in pod.log.splitlines() if "gives up" in line)
  assert (
    f"host {host}" in sentence and "at '" in sentence and "Run the same command again" in sentence
  )
  # The last periodic checkpoint is whole.
  saved = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
  assert saved >= 20 and not (tmp_path / "damaged").exists()


@pytest.mark.slow
@pytest.mark.parametrize("host", [0, 1])
def test_a_host_that_was_suspended_leaves_and_says_so(tmp_path, host):
  """The others have left meanwhile. Its devices may wait for them without an end."""
  with running(2, 1, trainer(tmp_path, *ENDLESS, "pod.timeout_seconds=8")) as pod:
    pod.wait_for("step 60/")
    os.kill(pod.pids()[host], signal.SIGSTOP)
    pod.wait_for(rf"\[{1 - host}\] ended with code")
    os.kill(pod.pids()[host], signal.SIGCONT)
    assert pod.finish() == HOST_LOST
  assert pod.codes() == {0: HOST_LOST, 1: HOST_LOST} and "Traceback" not in pod.log, pod.log
  said = [line for line in pod.log.splitlines() if f"[{host}]" in line and "gives up" in line]
  reason = "host 0 was last heard from" if host == 0 else "cannot be reached"
  assert said and reason in said[0], pod.log


def alone(host, hosts, command, port):
  return subprocess.run(
    command,
    capture_output=True,
    text=True,
    timeout=60,
    env=ENVIRONMENT
    | {
      "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
      "JAX_NUM_PROCESSES": str(hosts),
      "JAX_PROCESS_ID": str(host),
    },
  )


@pytest.fixture
def port():
  return free_port()


def test_a_host_that_never_comes_is_named(tmp_path, port):
  result = alone(0, 3, trainer(tmp_path, "pod.start_seconds=2"), port)
  assert (
    result.returncode == HOST_LOST and "Host 0 waited 2 s for host 1, 2 to come up" in result.stderr
  )
  assert "Traceback" not in result.stderr


def test_a_coordinator_that_cannot_be_reached_is_named(tmp_path, port):
  result = alone(1, 2, trainer(tmp_path, "pod.start_seconds=2"), port)
  assert (
    result.returncode == HOST_LOST
    and f"could not reach host 0 at localhost:{port} within 2 s" in result.stderr
  )
  assert "Traceback" not in result.stderr


def test_half_an_environment_is_refused(tmp_path, port):
  environment = ENVIRONMENT | {
    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
    "JAX_NUM_PROCESSES": "2",
  }
  result = subprocess.run(
    trainer(tmp_path), capture_output=True, text=True, timeout=60, env=environment
  )
  assert (
    result.returncode == FAILED
    and "needs the numbers JAX_NUM_PROCESSES and JAX_PROCESS_ID" in result.stderr
  )


@pytest.mark.parametrize(
  "setting, words",
  [
    ("--config.seed=$JAX_PROCESS_ID", "Host 1 has seed = 1, host 0 has 0"),
    ("--workdir=$0/$JAX_PROCESS_ID", "is not the same folder on host 1 as on host 0"),
    (
      "--config.label_smoothing=$JAX_PROCESS_ID --config.pod.start_seconds=3",
      "waited 3 s for host 1 to come up",
    ),
  ],
)
def test_hosts_that_differ_are_refused_by_name(tmp_path, setting, words):
  command = " ".join(trainer(tmp_path / "run")) + f" {setting}"
  log = run(2, 1, ["bash", "-c", command, str(tmp_path)], FAILED)
  assert words in log and "Traceback" not in log


def test_other_code_is_refused(tmp_path):
  root = TINY.parents[2]
  shutil.copytree(root, tmp_path / "code", ignore=shutil.ignore_patterns(".*"))
  with open(tmp_path / "code" / "trainer" / "augment.py", "a") as file:
    file.write("# another version\n")
  command = " ".join(trainer(tmp_path / "run"))
  log = run(
    2,
    1,
    ["bash", "-c", f"test $JAX_PROCESS_ID = 1 && cd {tmp_path}/code; PYTHONPATH= {command}"],
    FAILED,
  )
  assert "Host 1 has source code =" in log or "Host 0 has source code =" in log


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
  log = run(3, 1, trainer(tmp_path), FAILED)
  assert (
    "config.global_batch_size is 8, which 3 devices do not divide; the nearest that fits is 9"
    in log
  )


FULL_ON_HOST_1 = """
import collections, os, shutil
from tests.trainer import tiny

usage = shutil.disk_usage

def full(path):
  return usage(path) if os.path.exists({sign!r}) else usage(path)._replace(free=0)

if os.environ["JAX_PROCESS_ID"] == "1":
  shutil.disk_usage = full

get_config = tiny.get_config
"""


def test_a_full_disk_of_one_host_delays_the_save_of_all(tmp_path):
  sign, config = tmp_path / "room", tmp_path / "config.py"
  config.write_text(FULL_ON_HOST_1.format(sign=str(sign)))
  with running(
    2, 1, trainer(tmp_path / "run", *ENDLESS, "checkpoint.retry_seconds=1", config=config)
  ) as pod:
    pod.wait_for(r"could not be saved \(host 1: No space left on device")
    sign.touch()
    pod.wait_for(r"Checkpoint \d+ is saved")
    os.kill(pod.pids()[0], signal.SIGTERM)
    assert pod.finish() == PREEMPTED, pod.log
  assert (tmp_path / "run" / "checkpoints" / pod.log.split("saved at step ")[1].split()[0]).exists()
