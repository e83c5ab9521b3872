"""Whole lives of runs with the real gcloud and trainer, each with one disturbance."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.launch import lives
from tests.launch.lives import NAME, needs_gcloud, up, wait_until
from tests.trainer.shared import fingerprints
from trainer.errors import FAILED

pytestmark = needs_gcloud
slow = pytest.mark.slow
DONE, ERROR, NO_CAPACITY, CRASHED, COST, LEFT = 0, 1, 3, 4, 5, 130
CREATE, DELETE = r"^POST .*/queuedResources$", rf"^DELETE .*/queuedResources/{NAME}\b"
PROBE = r"^DELETE .*/queuedResources/may-i-delete-"  # each host proves that it may remove the slice
LONG = 200  # steps, of which some are left when something happens after the first checkpoint


@pytest.fixture
def bed(tmp_path):
  with lives.bed(tmp_path) as made:
    yield made


def calls(bed, pattern):
  return bed.cloud.count(pattern)


def assert_complete(bed, log, steps, attempts=1):
  """Fails unless the run is complete, nothing is paid for any more, and all logs are in the bucket.

  An overloaded machine may need more attempts: hosts wait for each other for 30 s only.
  """
  run = bed.json("run.json")
  assert run["result"]["code"] == DONE and run["result"]["complete"], log
  attempt = run["attempt"]
  assert attempt >= attempts, log
  assert bed.json("workdir/final.json")["step"] == steps
  assert not bed.cloud.resources and not bed.cloud.nodes, log
  assert {
    f"logs/attempt-{attempt}/{kind}"
    for kind in ("host-0-0.log", "host-0-1.log", "exit-0-0.json", "exit-0-1.json")
  } <= set(bed.names("logs/"))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
  """Returns the final fingerprints of LONG undisturbed steps on two hosts, without a launcher."""
  workdir = tmp_path_factory.mktemp("undisturbed")
  words = [word for word in up(steps=LONG) if word.startswith("--config")]
  subprocess.run(
    [
      sys.executable,
      "-m",
      "launch.local_pod",
      "--hosts=2",
      "--",
      sys.executable,
      "-m",
      "trainer",
      f"--workdir={workdir}",
      *words,
    ],
    check=True,
    env=os.environ,
    cwd=lives.ROOT,
    stdout=subprocess.DEVNULL,
  )
  return fingerprints(workdir, LONG)


# What is refused at once; cheap, for no trainer runs.


def test_a_quota_that_is_used_up(bed):
  bed.cloud.refuse(
    CREATE,
    429,
    "RESOURCE_EXHAUSTED",
    "Quota limit 'TPUV4sPreemptiblePodPerProjectPerZoneForTPUAPI' has "
    "been exceeded. Limit: 32 in zone us-central2-b.",
  )
  code, log = bed.run(*up())
  assert code == NO_CAPACITY, log
  assert (
    "Quota limit 'TPUV4sPreemptiblePodPerProjectPerZoneForTPUAPI'" in log and "Traceback" not in log
  )
  assert calls(bed, CREATE) == 1


def test_a_life(bed):
  """And hostile words reach the trainer as they are."""
  hostile = """a "b" 'c' $(touch pwned) `id` ; & | \\ %s * ~"""
  code, log = bed.run(*up(f"--config.data.path={hostile}", "--poll=10s"))
  assert code == DONE, log
  assert_complete(bed, log, 40)
  assert bed.json("workdir/config.json")["data"]["path"] == hostile
  assert bed.json("workdir/final.json")["examples"] > 0
  assert calls(bed, CREATE) == 1 and calls(bed, DELETE) == 1
  assert calls(bed, PROBE) >= 2
  assert [bed.started(1, host) for host in range(2)] == [1, 1]


@slow
def test_a_refused_permission(bed):
  bed.cloud.refuse(CREATE, 403, "PERMISSION_DENIED", "The caller does not have permission")
  code, log = bed.run(*up())
  assert code == ERROR, log
  assert "does not have permission" in log and "Traceback" not in log
  assert calls(bed, CREATE) == 1


@slow
def test_never_granted(bed):
  bed.cloud.allow(False)
  code, log = bed.run(*up("--max-wait=20s"))
  assert code == NO_CAPACITY, log
  assert not bed.cloud.resources, log


# Preemption.


@slow
@pytest.mark.parametrize("notice, stale", [(0, 2), (10, 0)], ids=["in an instant", "with a notice"])
def test_preempted(bed, undisturbed, notice, stale):
  process = bed.start(*up(steps=LONG))
  bed.wait_for_checkpoint()
  bed.cloud.preempt(NAME, notice, stale)
  assert bed.json("run.json")["result"] is None
  assert process.finish() == DONE, process.log
  assert_complete(bed, process.log, LONG, attempts=2)
  assert "Resuming from checkpoint" in bed.read(
    f"logs/attempt-{bed.json('run.json')['attempt']}/host-0-0.log"
  )
  assert bed.fingerprints(LONG) == undisturbed
  assert calls(bed, CREATE) == 2


@slow
def test_preempted_in_the_first_save(bed, undisturbed):
  process = bed.start(*up(steps=LONG))
  wait_until(lambda: bed.names("workdir/checkpoints/"))
  bed.cloud.preempt(NAME)
  assert process.finish() == DONE, process.log
  assert_complete(bed, process.log, LONG, attempts=2)
  assert bed.fingerprints(LONG) == undisturbed


@slow
def test_two_slices_preempted(bed):
  process = bed.start(*up("--slices=2", accelerator_type="v5litepod-4", steps=LONG))
  bed.wait_for_checkpoint()
  assert len(bed.trainers()) == 2
  bed.cloud.preempt(NAME)
  assert process.finish() == DONE, process.log
  assert bed.json("workdir/final.json")["step"] == LONG
  assert "logs/attempt-2/host-0-0.log" in bed.names(
    "logs/"
  ) and "logs/attempt-2/host-1-0.log" in bed.names("logs/")
  assert not bed.cloud.resources and not bed.cloud.nodes


# The service, and the way to the hosts.


@slow
def test_a_service_that_is_down_and_busy_for_a_while(bed):
  bed.cloud.refuse(
    CREATE, 503, "UNAVAILABLE", "The service is currently unavailable.", times=1, too_late=True
  )
  process = bed.start(*up(steps=LONG))
  bed.wait_for_checkpoint()
  look = "^GET .*/(queuedResources|nodes)"
  bed.cloud.refuse(look, 503, "UNAVAILABLE", "The service is currently unavailable.", times=12)
  bed.cloud.refuse(
    look,
    429,
    "RESOURCE_EXHAUSTED",
    "Quota exceeded for quota metric 'Read requests' and limit 'Read requests per minute'",
    times=4,
  )
  bed.bucket.refuse("^POST .*run.json|^POST .*uploadType", 503)
  time.sleep(30)
  bed.bucket.answer()
  assert process.finish() == DONE, process.log
  assert_complete(bed, process.log, LONG)


@slow
def test_a_dead_host_costs_the_slice(bed, undisturbed):
  process = bed.start(
    *up(
      "--unreachable=30s",
      "--exit-grace=20s",
      "--call-limit=20s",
      "--config.pod.timeout_seconds=8",
      steps=LONG,
    )
  )
  bed.wait_for_checkpoint()
  bed.cloud.set_link(NAME, 1, "down", dead=True)
  assert process.finish() == DONE, process.log
  assert "host 0-1" in process.log
  assert bed.fingerprints(LONG) == undisturbed
  assert calls(bed, CREATE) == 2
  assert not bed.cloud.resources and not bed.cloud.nodes


@slow
@pytest.mark.parametrize("link", ["down", "hung"])
def test_a_host_that_cannot_be_reached_for_a_while_goes_on(bed, undisturbed, link):
  process = bed.start(*up("--unreachable=10m", "--call-limit=20s", steps=LONG))
  bed.wait_for_checkpoint()
  bed.cloud.set_link(NAME, 1, link)
  time.sleep(45)
  bed.cloud.set_link(NAME, 1, "up")
  assert process.finish() == DONE, process.log
  assert_complete(bed, process.log, LONG)
  assert bed.fingerprints(LONG) == undisturbed
  assert calls(bed, CREATE) == 1


# The trainer.


@slow
def test_a_trainer_that_is_killed_is_started_again(bed, undisturbed):
  process = bed.start(*up("--config.pod.timeout_seconds=8", steps=LONG))
  bed.wait_for_checkpoint()
  trainer = bed.hosts()[1].processes("trainer")[0]
  trainer.kill()
  assert process.finish() == DONE, process.log
  assert "host 0-1 was the first to crash, with code -9" in process.log
  assert_complete(bed, process.log, LONG, attempts=2)
  assert bed.fingerprints(LONG) == undisturbed
  assert calls(bed, CREATE) == 1


@slow
def test_a_trainer_that_always_crashes_is_given_up(bed, tmp_path):
  python = tmp_path / "python"
  python.write_text("#!/bin/sh\necho 'no such chip'; exit 134\n")
  python.chmod(0o755)
  code, log = bed.run(*up(f"--python={python}"))
  assert code == CRASHED, log
  assert (
    "no such chip" in log
    and "code 134" in log
    and "for the second time before the first step" in log
  )
  assert not bed.cloud.resources and not bed.cloud.nodes


@slow
def test_a_trainer_that_a_rerun_does_not_fix_is_not_run_again(bed):
  code, log = bed.run(*up("--config.optimizer.lr_per_256=1e30"))
  assert code == CRASHED, log
  assert bed.json("logs/attempt-1/exit-0-0.json")["code"] == FAILED
  assert bed.json("run.json")["attempt"] == 1
  assert "does not fix" in log
  assert not bed.cloud.resources and not bed.cloud.nodes


@slow
def test_a_trainer_that_stands_still_is_started_again(bed, undisturbed):
  process = bed.start(*up("--stall=60s", steps=LONG))
  bed.wait_for_checkpoint()
  for trainer in bed.trainers():
    trainer.send_signal(signal.SIGSTOP)
  assert process.finish() == DONE, process.log
  assert "no new step for" in process.log
  assert_complete(bed, process.log, LONG, attempts=2)
  assert bed.fingerprints(LONG) == undisturbed


# The launcher.


@slow
@pytest.mark.parametrize(
  "stage",
  [
    "attempt 1, there is no slice",
    "in the queue",
    "PROVISIONING",
    "starting attempt 1",
    "training",
    "the run is complete",
  ],
)
def test_a_launcher_that_is_killed_is_started_again(bed, stage):
  killed = bed.start(*up())
  killed.wait_for(stage)
  killed.kill()
  process = bed.start(*up())
  assert process.finish() == DONE, process.log
  assert_complete(bed, process.log, 40)
  assert calls(bed, CREATE) == 1
  assert [bed.started(1, host) for host in range(2)] == [1, 1]


@slow
def test_ctrl_c_leaves_the_run_alone_and_secrets_stay_secret(bed, tmp_path):
  file = tmp_path / "a file"
  file.write_text("# comment\nFROM_FILE=another $secret\n")
  file.chmod(0o600)
  left = bed.start(*up(f"--env-file={file}", "--secret=FROM_MANAGER=key", steps=10**6))
  bed.wait_for_checkpoint()
  left.interrupt()
  assert left.finish(60) == LEFT and f"launch/tpu down {NAME}" in left.log
  trainers = bed.trainers()
  assert len(trainers) == 2
  for trainer in trainers:
    environment = trainer.environ()
    assert (
      environment["FROM_FILE"] == "another $secret"
      and environment["FROM_MANAGER"] == "the secret key"
    )
  written = left.log + "".join(
    map(bed.read, ["run.json", "launch/attempt-1.json", *bed.names("logs/")])
  )
  assert "another $secret" not in written and "the secret key" not in written
  code, log = bed.run("down", NAME)
  assert (
    code == DONE and not bed.hosts() and not any(trainer.is_running() for trainer in trainers)
  ), log


@slow
def test_a_preemption_that_nobody_saw(bed, undisturbed):
  killed = bed.start(*up(steps=LONG))
  bed.wait_for_checkpoint()
  killed.kill()
  bed.cloud.preempt(NAME)
  process = bed.start(*up(steps=LONG))
  assert process.finish() == DONE, process.log
  assert_complete(bed, process.log, LONG, attempts=2)
  assert bed.fingerprints(LONG) == undisturbed


@slow
def test_two_launchers_of_one_run(bed):
  first, second = bed.start(*up()), bed.start(*up())
  assert [first.finish(), second.finish()] == [DONE, DONE], first.log + second.log
  assert_complete(bed, first.log + second.log, 40)
  assert calls(bed, CREATE) == 1
  assert [bed.started(1, host) for host in range(2)] == [1, 1]
  # What is complete costs nothing when it is asked for again, and its logs are still there.
  code, log = bed.run(*up())
  assert code == DONE and "has been complete" in log and calls(bed, CREATE) == 1
  code, log = bed.run("logs", NAME, "--worker=all", "--lines=5")
  assert code == DONE and "[0-0] " in log and "[0-1] " in log


# Money.


@slow
def test_the_cost_limit_saves_and_removes(bed):
  code, log = bed.run(*up("--max-hours=0.05", capacity="--on-demand", steps=10**6))
  assert code == COST, log
  assert not bed.cloud.resources and not bed.cloud.nodes
  assert bed.checkpoints() and "--max-hours" in log


@slow
def test_the_cost_limit_holds_without_a_launcher(bed):
  launcher = bed.start(*up("--max-hours=0.05", capacity="--on-demand", steps=10**6))
  bed.wait_for_checkpoint()
  launcher.kill()
  wait_until(lambda: not bed.cloud.nodes)
  code, log = bed.run(*up("--max-hours=0.05", capacity="--on-demand", steps=10**6))
  assert code == COST, log
  assert calls(bed, CREATE) == 1


@slow
def test_stop_saves_and_keeps_and_down_leaves_nothing(bed):
  launcher = bed.start(*up(steps=10**6))
  bed.wait_for_checkpoint()
  code, log = bed.run("stop", NAME)
  assert code == DONE, log
  assert launcher.finish() == DONE, launcher.log
  assert not bed.trainers() and len(bed.cloud.nodes) == 1
  stopped = max(bed.checkpoints())
  again = bed.start(*up(steps=10**6))
  bed.wait_for_checkpoint(stopped + 1)
  log = (bed.hosts()[0].state / NAME / "attempt-2" / "host.log").read_text()
  assert f"Resuming from checkpoint {stopped}" in log
  bed.cloud.add_node(
    f"{NAME}-7", lives.ZONE, {"run": NAME, "owner": "me", "launcher": "resnet-pod"}
  )
  bed.cloud.add_node("other", lives.ZONE, {"run": "other", "owner": "me", "launcher": "resnet-pod"})
  code, log = bed.run("down", NAME)
  assert code == DONE, log
  assert list(bed.cloud.nodes) == ["other"] and not bed.cloud.resources
  assert again.finish() == ERROR and "taken down" in again.log
