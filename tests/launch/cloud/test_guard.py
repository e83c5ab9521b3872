"""The guard of a host: when a slice removes itself, by clocks that the test moves."""

import contextlib
import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from launch.cloud import boot, bundle
from launch.cloud.settings import Place, Settings
from launch.cloud.world import Memory
from launch.host import files, guard, meter
from launch.host.google import ApiError
from launch.host.host import Host

SETTINGS = Settings(
  Place("r1", "my-project", "us-west4-a", "gs://bucket"), "me", "v5litepod-16", max_seconds=3600
)

LATE = 15.0  # of a removal whose reason the bucket does not take: a poll, and two to tell it


class Api:
  """What the cloud would answer."""

  def __init__(self):
    self.deleted, self.refusal, self.true_age = [], None, None

  def delete(self, name):
    if self.refusal:
      raise self.refusal
    self.deleted.append(name)

  def may_delete(self):
    if self.refusal:
      raise self.refusal

  def age(self, node):
    if self.true_age is None:
      raise ApiError(0, "no network")
    return self.true_age


class Slice:
  """One host, its guard, and the time."""

  def __init__(self, folder, monkeypatch, **limits):
    self.now, self.api = 100.0, Api()
    monkeypatch.setattr(meter, "boottime", lambda: self.now)
    monkeypatch.setattr(guard, "boottime", lambda: self.now)
    monkeypatch.setenv("GCE_METADATA_HOST", "localhost:9")
    monkeypatch.setattr(guard.Guard, "api", property(lambda _: self.api))
    self.host = Host("gs://bucket/r1", folder)
    request = boot.request(SETTINGS, Memory(request="1-0")) | limits
    files.write_json(folder / "request.json", request)
    self.restart()

  def restart(self):
    """Starts the guard again, as after a kill or a boot."""
    self.guard = guard.Guard(self.host)

  def boot(self, monkeypatch, seconds):
    """Boots the machine, which takes some time."""
    monkeypatch.setenv("TPU_FAKE_BOOT", str(self.now))
    self.now = seconds
    self.host = Host("gs://bucket/r1", self.host.home)
    self.restart()

  def wait(self, seconds, step=5.0):
    """Lets time pass; returns after how much of it the slice was deleted, or None."""
    for turn in range(int(seconds / step)):
      self.now += step
      self.guard.turn()
      if self.api.deleted:
        return (turn + 1) * step
    return None


@pytest.fixture
def slice_(tmp_path, monkeypatch):
  monkeypatch.setenv("TPU_WORKER_ID", "0")
  return lambda **limits: Slice(tmp_path, monkeypatch, **limits)


def test_a_slice_that_nobody_ever_asks_removes_itself(slice_):
  one = slice_(max_seconds=None, idle=1200)
  assert one.wait(3600) == 1200 + LATE


def test_the_limit_counts_from_the_creation(slice_):
  one = slice_(idle=None)
  one.api.true_age = 600  # it was created before it booted
  one.guard.meter.correct(one.api, "r1")
  assert 3000 <= one.wait(7200) <= 3000 + LATE


def test_whatever_kills_the_guard_it_counts_on(slice_):
  one = slice_(max_seconds=None, idle=1200)
  for _ in range(10):
    assert one.wait(100) is None
    one.now += 15  # until systemd has restarted it
    one.restart()
  assert one.wait(3600) == 50 + LATE


def test_a_reboot_does_not_begin_again(slice_, monkeypatch):
  one = slice_(idle=None)
  assert one.wait(3000) is None
  one.boot(monkeypatch, seconds=60)
  assert one.wait(7200) <= 450  # age is 100 + 3000 + 60


def test_no_clock_of_the_host_counts(slice_, monkeypatch):
  one = slice_(max_seconds=None, idle=1200)
  monkeypatch.setattr("time.time", lambda: 0.0)
  assert one.wait(600) is None
  monkeypatch.setattr("time.time", lambda: 1e12)
  assert one.wait(3600) == 600 + LATE


def test_a_launcher_or_a_trainer_keeps_it(slice_):
  one = slice_(max_seconds=None, idle=1200)
  for number in range(5):
    os.utime(one.host.home / "contact", (number, number)) if number else one.host.contacted()
    assert one.wait(1000) is None
  with files.locked(one.host.home / "attempt.lock", 0):
    assert one.wait(3600) is None
  assert one.wait(3600) == 1200 + LATE


def test_a_trainer_saves_before_the_limit(slice_, monkeypatch):
  one, asked = slice_(idle=None), []
  monkeypatch.setattr(one.host, "ask_to_end", lambda: asked.append(one.now))
  with files.locked(one.host.home / "attempt.lock", 0):
    assert one.wait(3600) == 3500  # the 100 s since its boot count
  assert asked == [one.now - 115] and one.host.removing() == "deadline"


def test_when_the_trainer_has_saved_it_goes_at_once(slice_, monkeypatch):
  one = slice_(idle=None)
  monkeypatch.setattr(one.host, "ask_to_end", lambda: None)
  with files.locked(one.host.home / "attempt.lock", 0):
    assert one.wait(3400) is None
  assert one.wait(60) <= 15


def test_later_limits_of_the_launcher_replace_those_of_the_request(slice_):
  one = slice_(idle=None)
  later = {"max_seconds": 7200, "idle": None, "save_seconds": 120}
  files.write_json(one.host.home / "limits.json", later)
  assert one.wait(6000) is None
  assert one.wait(3600) == 1105


def test_a_stopped_slice_is_kept_for_twelve_hours(slice_):
  one = slice_(max_seconds=None, idle=1200)
  (one.host.home / "stop").touch()
  assert one.wait(24 * 3600, step=60.0) == 12 * 3600 + 2 * 60


def test_a_refused_removal_is_tried_again_and_told(slice_):
  one = slice_(max_seconds=None, idle=60)
  one.api.refusal = ApiError(503, "busy")
  assert one.wait(300) is None
  assert "cannot remove itself: busy" in one.host.status()["guard"]
  one.api.refusal = None
  assert one.wait(60) <= 10


def test_a_full_disk_and_emptied_files_stop_no_limit(slice_, monkeypatch):
  one = slice_(max_seconds=None, idle=600)
  assert one.wait(300) is None

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(meter, "write_json", full)
  monkeypatch.setattr("pathlib.Path.write_text", full)
  assert one.wait(600) == 300 + LATE
  one.api.deleted.clear()
  monkeypatch.undo()
  for name in ("meter.json", "state.json", "limits.json", "identity.json"):
    (one.host.home / name).write_bytes(b"")
  monkeypatch.setattr(meter, "boottime", lambda: one.now)
  monkeypatch.setattr(guard, "boottime", lambda: one.now)
  monkeypatch.setattr(guard.Guard, "api", property(lambda _: one.api))
  one.host = Host("gs://bucket/r1", one.host.home)
  one.restart()
  assert one.wait(1200) == 600 + LATE


@pytest.mark.parametrize(
  "code, flag, starts",
  [(75, None, 1), (76, None, 1), (1, None, 0), (0, None, 0), (2, None, 0), (76, "stop", 0)],
)
def test_what_a_rerun_fixes_is_run_again_where_no_launcher_does(
  slice_, monkeypatch, code, flag, starts
):
  one, started = slice_(max_seconds=None, idle=1200), []
  monkeypatch.setattr(Host, "leave_behind", lambda self, verb, log: started.append(verb))
  one.host.change(attempt=3, phase="ended", code=code, ended=0.0, boot="x", started=0.0)
  if flag:
    (one.host.home / flag).touch()
  one.host.contacted()
  assert one.wait(300) is None and not started  # a launcher may come
  assert one.wait(20) is None
  assert started == ["supervise"] * starts
  assert one.host.state()["attempt"] == 3 + starts


def test_hosts_that_reboot_go_on_by_themselves_three_times_without_a_step(slice_, monkeypatch):
  one, started = slice_(max_seconds=None, idle=1200), []
  monkeypatch.setattr(Host, "leave_behind", lambda self, verb, log: started.append(self.state()))
  one.host.change(attempt=1, phase="running", pid=1, boot=one.host.me["boot"], started=0.0)
  for number in range(5):
    one.boot(monkeypatch, seconds=10 + number)
    one.guard.meter.idle = 0.0
    assert one.wait(400) is None
  assert [state["attempt"] for state in started] == [2, 3, 4]
  assert one.wait(1200) is not None


def test_the_proof_of_the_right_to_remove(slice_):
  one = slice_()
  for refusal, words in (
    (ApiError(403, "denied"), "may not delete queued resources: denied"),
    (ApiError(0, "no network"), "not proven yet: no network"),
    (None, guard.ABLE),
  ):
    one.api.refusal = refusal
    one.guard.prove()
    assert words in one.host.status()["guard"]


@pytest.mark.parametrize("worker, seconds", [("0", 1200 + LATE), ("3", 1445)])
def test_other_hosts_remove_it_where_host_0_does_not(tmp_path, monkeypatch, worker, seconds):
  monkeypatch.setenv("TPU_WORKER_ID", worker)
  one = Slice(tmp_path, monkeypatch, max_seconds=None, idle=1200)
  assert one.wait(3600) == seconds


@pytest.mark.parametrize("shell", ["dash", "bash --posix", "busybox sh"])
def test_the_startup_script_runs_under_any_sh(tmp_path, shell):
  program, *options = shell.split()
  if subprocess.run(["which", program], capture_output=True).returncode:
    pytest.skip(f"{program} is not installed")
  binaries = tmp_path / "bin"
  binaries.mkdir()
  for name, text in {
    "systemctl": "exit 3",
    "systemd-run": f'printf "%s\\n" "$@" >"{tmp_path}/unit"',
  }.items():
    (binaries / name).write_text(f"#!/bin/sh\n{text}\n")
    (binaries / name).chmod(0o755)
  script = boot.write(SETTINGS, Memory(request="1-0"), tmp_path)
  environment = {"PATH": f"{binaries}:{os.environ['PATH']}", "TPU_STATE": str(tmp_path / "a state")}
  for _ in range(2):  # at every boot
    done = subprocess.run(
      [program, *options, script], env=environment, capture_output=True, text=True, cwd="/"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
  folder = tmp_path / "a state" / "r1"
  assert (folder / bundle.agent_name()).read_bytes() == bundle.agent()
  assert json.loads((folder / "request.json").read_text())["max_seconds"] == 3600
  unit = (tmp_path / "unit").read_text().splitlines()
  assert "--property=Restart=always" in unit and "--property=OOMScoreAdjust=-1000" in unit
  assert unit[-4:] == ["python3", str(folder / bundle.agent_name()), "gs://bucket/r1", "guard"]


def test_the_startup_script_fits_into_the_metadata():
  assert len(boot.script(SETTINGS, Memory(request="1-0"))) < 64 << 10


def test_the_guard_starts_from_what_the_startup_script_brings(tmp_path):
  """Without systemd, a loop keeps it; it runs on the zip file alone."""
  binaries = tmp_path / "bin"
  binaries.mkdir()
  for name in ("systemctl", "systemd-run", "gcloud"):
    (binaries / name).write_text("#!/bin/sh\nexit 1\n")
    (binaries / name).chmod(0o755)
  (binaries / "python3").symlink_to(sys.executable)
  script = boot.write(SETTINGS, Memory(request="1-0"), tmp_path)
  environment = {
    "PATH": f"{binaries}:{os.environ['PATH']}",
    "TPU_STATE": str(tmp_path),
    "HOME": str(tmp_path),
    "GCE_METADATA_HOST": "localhost:9",
    "TPU_WORKER_ID": "0",
  }
  processes = ProcessesOf(tmp_path)
  try:
    subprocess.run(["sh", script], env=environment, check=True, cwd="/")
    processes.wait_for(tmp_path / "r1" / "meter.json")
    first = processes.guards()
    assert len(first) == 1
    os.kill(first[0], 9)
    (tmp_path / "r1" / "meter.json").unlink()
    processes.wait_for(tmp_path / "r1" / "meter.json")
    assert len(processes.guards()) == 1 and processes.guards() != first
  finally:
    processes.end()


class ProcessesOf:
  """The processes whose home is a folder."""

  def __init__(self, folder):
    self.folder = folder

  def wait_for(self, path, seconds=60):
    deadline = time.monotonic() + seconds
    while not path.exists():
      assert time.monotonic() < deadline, (self.folder / "r1" / "guard.log").read_text()
      time.sleep(0.1)

  def all(self):
    found = []
    for process in psutil.process_iter():
      try:
        if process.environ().get("HOME") == str(self.folder):
          found.append(process)
      except psutil.Error:
        continue
    return found

  def guards(self):
    found = []
    for process in self.all():
      with contextlib.suppress(psutil.Error):
        line = process.cmdline()
        if line[-1:] == ["guard"] and "-c" not in line:
          found.append(process)
    # A child that has not become another program yet has the words of its parent.
    pids = {process.pid for process in found}
    with contextlib.suppress(psutil.Error):
      return [process.pid for process in found if process.ppid() not in pids]
    return self.guards()

  def end(self):
    while found := self.all():
      for process in found:
        with contextlib.suppress(psutil.Error):
          process.kill()
