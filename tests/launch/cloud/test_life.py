"""Whole lives of a run: the real launcher and agent, a folder for a cloud, folders for hosts."""

import contextlib
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[3]
HERE = pathlib.Path(__file__).parent
TIMES = [
  "--poll=0.4",
  "--stall=3",
  "--unreachable=3",
  "--start-limit=20",
  "--exit-grace=3",
  "--backoff=0.5",
]


class Cloud:
  """The folder that stands for a cloud, and a user in front of it."""

  def __init__(self, folder):
    self.folder = folder / "cloud"
    self.folder.mkdir()
    binary = folder / "bin" / "gcloud"
    binary.parent.mkdir()
    binary.write_text(
      f'#!/bin/sh\nexec {shlex.join([sys.executable, "-ES", str(HERE / "gcloud.py")])} "$@"\n'
    )
    binary.chmod(0o755)
    # Everybody is root; there is no systemd.
    programs = {"sudo": 'shift; exec "$@"', "systemctl": "exit 1", "systemd-run": "exit 1"}
    for name, text in programs.items():
      program = binary.with_name(name)
      program.write_text(f"#!/bin/sh\n{text}\n")
      program.chmod(0o755)
    self.environment = os.environ | {
      "FAKE_CLOUD": str(self.folder),
      "PATH": f"{binary.parent}:{os.environ['PATH']}",
      "PYTHON": sys.executable,
      "XDG_STATE_HOME": str(folder / "state"),
      "CLOUDSDK_CORE_PROJECT": "my-project",
      "CLOUDSDK_COMPUTE_ZONE": "us-west4-a",
      "TPU_BUCKET": "gs://my-bucket/a",
      "USER": "me",
      "LOGNAME": "me",
    }

  def start(self, *words):
    return subprocess.Popen(
      [ROOT / "launch/tpu", *words],
      env=self.environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      cwd="/",
      # A shell in the background ignores Ctrl-C, and so would all that it starts.
      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )

  def run(self, *words):
    with self.start(*words) as process:
      output = process.communicate(timeout=300)[0]
    return process.returncode, output

  def up(self, *words):
    return (
      "up",
      "r1",
      "--type=v5litepod-8",
      "--spot",
      "--config=configs/smoke.py",
      "--no-check",
      f"--python={HERE / 'trainer.py'}",
      *TIMES,
      *words,
    )

  def write(self, name, value):
    (self.folder / name).write_text(json.dumps(value))

  def read(self, name):
    path = self.folder / name
    return json.loads(path.read_text()) if path.exists() else None

  def run_json(self):
    return self.read("objects/my-bucket/a/r1/run.json")

  def log(self, attempt, host="0-0"):
    return (
      self.folder / "objects/my-bucket/a/r1/logs" / f"attempt-{attempt}" / f"host-{host}.log"
    ).read_text()

  def lines(self, words):
    return [line for line in (self.folder / "log").read_text().splitlines() if words in line]

  def wait_for(self, condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
      assert time.monotonic() < deadline
      time.sleep(0.05)

  def step(self):
    path = self.folder / "checkpoint"
    return int(path.read_text() or 0) if path.exists() else 0

  def end_hosts(self, name=""):
    """Ends every process whose home is a host: its machine is gone."""
    found = True
    while found:  # until a pass finds none: they may start others meanwhile
      found = False
      for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
          if f"HOME={self.folder}/hosts/{name}".encode() in path.read_bytes():
            os.kill(int(path.parent.name), signal.SIGKILL)
            found = True

  def take_away(self):
    """What a preemption is: the machines end, and the queued resource is suspended."""
    self.write("nodes.json", {})
    queued = self.read("queued.json")
    queued["r1"]["state"]["state"] = "SUSPENDED"
    self.write("queued.json", queued)
    self.end_hosts()
    for state in (self.folder / "hosts").glob("*/state"):
      state.rename(state.with_name(f"lost-{time.time()}"))


@pytest.fixture
def cloud(tmp_path):
  cloud = Cloud(tmp_path)
  yield cloud
  cloud.end_hosts()


def test_from_nothing_to_complete_and_removed(cloud):
  code, output = cloud.run(*cloud.up("--config.data.path=a b'c\"$(touch /tmp/x)"))
  assert code == 0, output
  assert "r1: the run is complete." in output
  assert cloud.read("queued.json") == {} and cloud.read("nodes.json") == {}
  for host in ("0-0", "0-1"):
    log = cloud.log(1, host)
    assert "step 12/12" in log and "--workdir=gs://my-bucket/a/r1/workdir" in log
    assert repr("--config.data.path=a b'c\"$(touch /tmp/x)") in log
  assert cloud.run_json()["result"]["complete"]
  # The same command again requests nothing.
  code, output = cloud.run(*cloud.up("--config.data.path=a b'c\"$(touch /tmp/x)"))
  assert code == 0 and "has been complete since" in output
  assert len(cloud.lines("queued-resources create")) == 1


def test_taken_away_in_the_middle(cloud):
  cloud.write("plan.json", {"pause": 5})
  launcher = cloud.start(*cloud.up())
  cloud.wait_for(lambda: cloud.step() >= 4)
  cloud.take_away()
  cloud.write("plan.json", {})
  output = launcher.communicate(timeout=300)[0]
  assert launcher.returncode == 0, output
  assert "the slice was taken away" in output and "step 12/12" in cloud.log(2)
  assert len(cloud.run_json()["memory"]["slices"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
  "refusal, code, words",
  [
    (
      [
        "queued-resources create",
        9,
        "RESOURCE_EXHAUSTED: Quota limit 'TPUV5' has been exceeded. Limit: 8",
      ],
      3,
      "Quota limit 'TPUV5'",
    ),
    (
      ["queued-resources create", 9, "PERMISSION_DENIED: Permission 'tpu.nodes.create' denied"],
      1,
      "tpu.nodes.create",
    ),
    (
      ["queued-resources create", 2, "UNAVAILABLE: The service is currently unavailable."],
      0,
      "the run is complete",
    ),
    (
      ["queued-resources describe", 2, "RESOURCE_EXHAUSTED: Too Many Requests, 600 per minute"],
      0,
      "the run is complete",
    ),
  ],
)
def test_refusals(cloud, refusal, code, words):
  cloud.write("refuse.json", [refusal])
  found, output = cloud.run(*cloud.up())
  assert found == code, output
  assert words in output


@pytest.mark.slow
def test_never_granted(cloud):
  (cloud.folder / "grant").write_text("WAITING_FOR_RESOURCES")
  code, output = cloud.run(*cloud.up("--max-wait=3"))
  assert code == 3, output
  assert "no slice within --max-wait" in output and cloud.read("queued.json") == {}


def test_a_crash_is_started_again_and_the_second_at_the_same_step_ends_it(cloud):
  cloud.write(
    "plan.json",
    {
      "1": {"0-1": [5, "crash"], "0-0": [5, 76]},
      "2": {"0-1": [9, 1], "0-0": [9, 76]},
      "3": {"0-1": [9, 1], "0-0": [9, 76]},
    },
  )
  code, output = cloud.run(*cloud.up())
  assert code == 4, output
  assert "host 0-1 was the first to crash, with code -9, at step 5" in output
  assert "the last lines of host 0-1" in output and "about to end" in output
  assert "with code 1, for the second time at step 9" in output and cloud.read("queued.json") == {}


@pytest.mark.slow
def test_a_failure_that_a_rerun_does_not_fix(cloud):
  cloud.write("plan.json", {"1": {"0-1": [5, 76], "0-0": [5, 2]}})
  code, output = cloud.run(*cloud.up("--keep", "--max-hours=5"))
  assert code == 4, output
  assert "host 0-0 failed for a reason that a rerun does not fix" in output
  assert "launch/tpu down r1" in output and "r1" in cloud.read("queued.json")


@pytest.mark.slow
def test_a_stall_shows_where_every_host_is(cloud):
  cloud.write("plan.json", {"1": {"0-1": [5, "hang"], "0-0": [5, "hang"]}})
  code, output = cloud.run(*cloud.up())
  assert code == 0, output
  assert "requesting the stacks of every host" in output
  for host in ("0-0", "0-1"):
    assert "most recent call first" in cloud.log(1, host)


def test_a_launcher_that_is_killed_loses_nothing(cloud):
  cloud.write("plan.json", {"pause": 5})
  for seconds in (0.5, 1, 2):  # before, while and after the trainer is started
    launcher = cloud.start(*cloud.up())
    time.sleep(seconds)
    launcher.kill()
    launcher.communicate()
  cloud.write("plan.json", {})
  code, output = cloud.run(*cloud.up())
  assert code == 0, output
  assert "attempt 2" not in output
  assert len(cloud.lines("queued-resources create")) == 1 and cloud.log(1).count("attempt 1:") == 1


def test_two_launchers_of_one_run(cloud):
  cloud.write("plan.json", {"pause": 5})
  first = cloud.start(*cloud.up())
  cloud.wait_for(lambda: cloud.step() >= 4)
  second = cloud.start(*cloud.up())
  cloud.wait_for(lambda: len(cloud.lines("run.json#")) > 0)
  cloud.write("plan.json", {})
  outputs = [process.communicate(timeout=300)[0] for process in (first, second)]
  assert [first.returncode, second.returncode] == [0, 0], outputs
  assert "drives r1; this one only shows it" in outputs[1]
  assert len(cloud.lines("queued-resources create")) == 1 and cloud.log(1).count("attempt 1:") == 1


def test_faults_that_pass_do_not_end_the_launcher(cloud):
  cloud.write("plan.json", {"pause": 5})
  launcher = cloud.start(*cloud.up("--stall=10m"))
  cloud.wait_for(lambda: cloud.step() >= 4)
  faults = [
    "PERMISSION_DENIED: Permission 'tpu.nodes.get' denied",
    "There was a problem refreshing your current auth tokens; gcloud auth login",
    "INVALID_ARGUMENT: who knows",
    "gaierror: Name or service not known",
    "PRINT <html>",
    "PRINT [1, 2]",
  ]
  cloud.write("refuse.json", [["queued-resources describe", 1, fault] for fault in faults])
  cloud.wait_for(lambda: not any(entry[1] for entry in cloud.read("refuse.json")))
  cloud.write("refuse.json", [])
  cloud.write("plan.json", {})
  output = launcher.communicate(timeout=300)[0]
  assert launcher.returncode == 0, output
  assert "attempt 1, the run is complete" in output and "Traceback" not in output
  for words in (
    "tpu.nodes.get' denied; launch/tpu doctor prints the command that grants it",
    "type gcloud auth login in another terminal",
    "Meanwhile the slice costs 8 chip-hours an hour",
    "who knows",
    "makes no sense",
  ):
    assert words in output


def test_leaving_stopping_and_going_on(cloud):
  cloud.write("plan.json", {"pause": 5})
  labels = {"run": "r1", "owner": "me"}
  left_over = {"name": "x/nodes/r1-7", "state": "READY", "labels": labels, "networkEndpoints": [{}]}
  cloud.write("nodes.json", {"r1-7": left_over})
  launcher = cloud.start(*cloud.up("--max-hours=5"))
  cloud.wait_for(lambda: cloud.step() >= 4)
  launcher.send_signal(signal.SIGINT)
  output = launcher.communicate(timeout=300)[0]
  assert launcher.returncode == 130
  assert (
    "The slice stays and is paid for (8 chip-hours an hour)" in output
    and "launch/tpu down r1" in output
  )
  code, output = cloud.run("status", "r1", "--json")
  status = json.loads(output)
  assert (
    code == 0
    and status["state"] == "ACTIVE"
    and [report["phase"] for report in status["reports"]] == ["running"] * 2
  )
  code, output = cloud.run("stop", "r1")
  assert code == 0 and "saved and stopped at step" in output, output
  assert "r1" in cloud.read("queued.json")
  code, output = cloud.run(*cloud.up("--max-hours=5", "--type=v5litepod-16"))
  assert code == 2 and "still has 1 x v5litepod-8 spot in us-west4-a" in output
  code, output = cloud.run("logs", "r1", "--worker=all")
  assert code == 0 and "[0-0] saved" in output and "[0-1] saved" in output
  cloud.write("plan.json", {})
  code, output = cloud.run(*cloud.up("--max-hours=5"))
  assert code == 0, output
  assert "attempt 2, the run is complete" in output
  assert len(cloud.lines("queued-resources create")) == 1


@pytest.mark.slow
def test_down_with_an_orphan_and_a_launcher(cloud):
  cloud.write("plan.json", {"pause": 5})
  launcher = cloud.start(*cloud.up())
  cloud.wait_for(lambda: cloud.step() >= 4)
  queued, nodes = cloud.read("queued.json"), cloud.read("nodes.json")
  assert cloud.run("down", "r1", "--owner=somebody")[0] == 2
  code, output = cloud.run("down", "r1")
  assert code == 0, output
  assert "Nothing of r1 is left" in output and cloud.read("queued.json") == {}
  output = launcher.communicate(timeout=300)[0]
  assert launcher.returncode == 1 and "was taken down by another command" in output
  assert len(cloud.lines("queued-resources create")) == 1
  cloud.write("nodes.json", nodes)
  code, output = cloud.run("list")
  assert "no queued resource holds it: launch/tpu down" in output
  code, output = cloud.run("down", "--all")
  assert code == 0 and "removing the node r1" in output and cloud.read("nodes.json") == {}
  cloud.write("queued.json", queued)
  assert "removing the queued resource r1" in cloud.run("down", "--all")[1]


@pytest.mark.slow
def test_another_owner_is_left_alone(cloud):
  cloud.write("plan.json", {"pause": 5})
  (cloud.folder / "grant").write_text("WAITING_FOR_RESOURCES")
  launcher = cloud.start(*cloud.up("--owner=she"))
  cloud.wait_for(lambda: cloud.read("queued.json"))
  code, output = cloud.run(*cloud.up())
  assert code == 2 and "belongs to she" in output
  code, output = cloud.run(*cloud.up("--bucket=gs://other-bucket"))
  assert code == 2 and "belongs to she" in output
  assert "Nothing of yours is left" in cloud.run("down", "--all")[1]
  launcher.send_signal(signal.SIGTERM)
  assert launcher.wait(300) == 130 and cloud.read("queued.json")


@pytest.mark.slow
def test_the_cost_limit(cloud):
  cloud.write("plan.json", {"pause": 5})
  code, output = cloud.run(*cloud.up("--max-hours=0.003"))
  assert code == 5, output
  assert "the limit of --max-hours" in output and "saved" in cloud.log(1)
  assert cloud.read("queued.json") == {}


@pytest.mark.slow
def test_the_slice_removes_itself_at_the_cost_limit_when_nobody_looks(cloud):
  cloud.write("plan.json", {"pause": 5})
  code, output = cloud.run(*cloud.up("--no-watch", "--max-hours=0.006"))
  assert code == 0 and "Left." in output
  cloud.wait_for(lambda: cloud.read("queued.json") == {})
  assert "saved" in cloud.log(1)
  code, output = cloud.run(*cloud.up("--max-hours=0.006"))
  assert code == 5, output


def test_secrets_go_by_file_only(cloud):
  secret = cloud.folder.parent / "my env"
  secret.write_text("SECRET=hush $(hush) 'x\n")
  assert "chmod 600" in cloud.run(*cloud.up(f"--env-file={secret}"))[1]
  secret.chmod(0o600)
  code, output = cloud.run(*cloud.up(f"--env-file={secret}"))
  assert code == 0, output
  assert "hush $(hush) 'x" in cloud.log(1)  # the trainer of this test prints it
  assert (
    not cloud.lines("hush") and "hush" not in output and "hush" not in json.dumps(cloud.run_json())
  )
  (kept,) = (cloud.folder / "hosts/0-0").glob("lost-*/r1/env")
  assert kept.stat().st_mode & 0o777 == 0o600
  assert not (cloud.folder / "hosts/0-0/tpu-r1.env").exists()  # of the login
