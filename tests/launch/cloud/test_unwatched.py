"""No slice is paid for without end, whatever becomes of the launcher: lives on a cloud in a folder.

Each begins a sequence in which a slice would stay, ends the launcher, and waits for the slice to
remove itself.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.launch.cloud import test_life
from tests.launch.cloud.test_life import cloud as cloud  # a fixture

IDLE = 8  # seconds
POLL = 5  # of the guard
LATE = 2 * POLL + 10  # seconds after the limit; a busy machine needs some for itself


def granted(cloud):
  """Lets a request leave the queue: what the service does by itself, hours later."""
  queued = cloud.read("queued.json")
  queued["r1"]["state"]["state"] = "ACTIVE"
  cloud.write("queued.json", queued)
  (cloud.folder / "grant").unlink()
  subprocess.run(
    [sys.executable, test_life.HERE / "gcloud.py", "grant", "r1"], env=cloud.environment, check=True
  )


def assert_removes_itself(cloud, since, within):
  """Fails unless the slice is gone within some seconds, with the launcher gone."""
  cloud.wait_for(lambda: cloud.read("queued.json") == {}, within + 60)
  assert time.monotonic() - since < within + LATE
  assert len(cloud.lines("queued-resources create")) == 1


def trains(cloud):
  cloud.write("plan.json", {"pause": 5})
  launcher = cloud.start(*cloud.up(f"--idle={IDLE}"))
  cloud.wait_for(lambda: cloud.step() >= 4)
  return launcher


def end(launcher):
  launcher.kill()
  launcher.communicate()


def guards(cloud):
  """Returns the process ids of guards."""
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
      words = path.read_bytes().split(b"\0")
      home = f"HOME={cloud.folder}/hosts/".encode()
      if (
        b"guard" in words and b"-c" not in words and home in (path.parent / "environ").read_bytes()
      ):
        found.append(int(path.parent.name))
    except OSError:
      continue
  return found


@pytest.mark.parametrize(
  "how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_granted_when_the_launcher_is_gone(cloud, how):
  (cloud.folder / "grant").write_text("WAITING_FOR_RESOURCES")
  launcher = cloud.start(*cloud.up(f"--idle={IDLE}"))
  cloud.wait_for(lambda: cloud.read("queued.json"))
  time.sleep(1)
  launcher.send_signal(how)
  output = launcher.communicate(timeout=60)[0]
  if how == signal.SIGINT:
    assert "If it is granted, its hosts count from then" in output
    assert "If the slice is lost, nothing asks for another one until a launcher runs" in output
  granted(cloud)
  assert_removes_itself(cloud, time.monotonic(), IDLE)


def test_a_start_that_fails(cloud):
  """The hosts cannot read the bucket, so no trainer starts and no log is written."""
  cloud.write("refuse.json", [["storage cp gs://", 99, "HTTPError 403: forbidden"]])
  launcher = cloud.start(*cloud.up(f"--idle={IDLE}"))
  cloud.wait_for(lambda: (cloud.folder / "log").exists() and cloud.lines("start 1"))
  end(launcher)
  assert_removes_itself(cloud, time.monotonic(), IDLE)


def test_hosts_that_reboot(cloud):
  """They go on with the next attempt, and the slice goes when that has ended."""
  end(trains(cloud))
  cloud.end_hosts()
  (cloud.folder / "booted").write_text(str(time.clock_gettime(time.CLOCK_BOOTTIME)))
  cloud.write("plan.json", {})
  subprocess.run(
    [sys.executable, test_life.HERE / "gcloud.py", "reboot"], env=cloud.environment, check=True
  )
  cloud.wait_for(lambda: cloud.step() == 12)
  assert_removes_itself(cloud, time.monotonic(), IDLE)
  assert "step 12/12" in cloud.log(2) and cloud.log(2).count("attempt 2:") == 1


def test_a_guard_that_is_killed(cloud):
  end(trains(cloud))
  killed = guards(cloud)
  assert len(killed) == 2
  trainers = []
  for host in ("0-0", "0-1"):
    state = cloud.folder / "hosts" / host / "state" / "r1" / "state.json"
    # On a busy machine the second host starts its trainer after the first has taken steps.
    cloud.wait_for(lambda state=state: "pid" in test_life.json.loads(state.read_text()))
    trainers.append(test_life.json.loads(state.read_text())["pid"])
  for process in [*killed, *trainers]:  # the machine has no memory left
    os.kill(process, signal.SIGKILL)
  assert_removes_itself(cloud, time.monotonic(), IDLE)


def test_a_service_account_that_may_not_delete(cloud):
  """No trainer starts on a slice that could not remove itself."""
  refusal = "PERMISSION_DENIED: Permission 'tpu.nodes.delete' denied"
  cloud.write("refuse.json", [["delete may-i-delete", 99, refusal]])
  code, output = cloud.run(*cloud.up())
  assert code == 1, output
  assert "may not delete queued resources" in output and "tpu.nodes.delete" in output
  assert cloud.read("queued.json") == {} and not cloud.lines("start 1")


@pytest.mark.slow
def test_the_limit_of_a_run_that_trains(cloud):
  cloud.write("plan.json", {"pause": 5})
  launcher = cloud.start(*cloud.up("--max-hours=0.01"))
  cloud.wait_for(lambda: cloud.read("queued.json"))
  since = time.monotonic()
  cloud.wait_for(lambda: cloud.step() >= 4)
  end(launcher)
  assert_removes_itself(cloud, since, 36)
  assert "saved" in cloud.log(1)
  shutil.rmtree(cloud.folder / "state", ignore_errors=True)
  code, output = cloud.run(*cloud.up("--max-hours=0.01"))
  assert code == 5, output  # what was paid for unseen counts
