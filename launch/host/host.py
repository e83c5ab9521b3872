"""One host's part of a run: which attempt runs here, and how it is started, asked and ended."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from launch.host.files import Json, is_free, locked, read_json, write_json
from launch.host.google import gcloud, metadata
from launch.host.install import fetch, free_devices
from launch.host.logs import progress
from launch.host.meter import FAKE_BOOT

CRASHED = 1
# Of trainer.errors: the same command on all hosts resumes from the last checkpoint.
PREEMPTED, HOST_LOST = 75, 76
_END_SECONDS = 40.0  # for a trainer to save before another attempt, within one call over ssh
_BEGIN_SECONDS = 60.0  # for a supervisor to take its lock


def boot_id() -> str:
  """Return a word that changes when the machine is booted."""
  fake = os.environ.get(FAKE_BOOT)
  return fake or pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def identity(home: pathlib.Path) -> Json:
  """Return slice and worker of this host, from the environment or the metadata of TPU VMs."""
  path, boot = home / "identity.json", boot_id()
  known = read_json(path)
  if known and known["boot"] == boot:
    return known
  worker = os.environ.get("TPU_WORKER_ID") or metadata("attributes/agent-worker-number")
  number = os.environ.get("MEGASCALE_SLICE_ID")
  if number is None:
    found = re.search(r"MEGASCALE_SLICE_ID:\s*'?(\d+)", metadata("attributes/tpu-env") or "")
    number = found.group(1) if found else "0"
  known = {
    "slice": int(number),
    "worker": int(worker or 0),
    "hostname": socket.gethostname(),
    "boot": boot,
  }
  if worker is not None:  # else the metadata server did not answer, or this is not a TPU VM
    write_json(path, known)
  return known


class Host:
  """All state is in files of one folder of the run, so any process may ask or take over.

  The folder belongs to root, not to a login, so there is one trainer whichever login asks.

  Attributes:
    url: the folder of the run in the bucket.
    home: the folder of the run on this host.
    me: slice and worker of this host.
    name: both as "SLICE-WORKER".
  """

  def __init__(self, url: str, home: pathlib.Path):
    self.url, self.home = url, home
    self.me = identity(self.home)
    self.name = f"{self.me['slice']}-{self.me['worker']}"

  def state(self) -> Json:
    """Return the newest attempt on this host and its phase."""
    return read_json(self.home / "state.json") or {"attempt": None, "phase": "none"}

  def change(self, **values: Any) -> None:
    """Replace entries of the state."""
    write_json(self.home / "state.json", dict(self.state(), **values))

  def spec(self) -> Json:
    """Return what the newest attempt is to run; see attempt_spec of launch/cloud/driver.py."""
    return read_json(self.home / "spec.json") or {}

  def log(self) -> pathlib.Path:
    """Return the log of the newest attempt."""
    return self.home / f"attempt-{self.state()['attempt']}" / "host.log"

  def alive(self) -> bool:
    """Whether a supervisor or a trainer runs: each holds this lock as long as it lives."""
    return not is_free(self.home / "attempt.lock")

  def status(self) -> Json:
    """Return what the launcher reads as states.Report."""
    state, now = self.state(), time.time()
    report = dict(self.me, tpu_agent=1, now=now, code=None, started=None, ended=None, trouble=None)
    report.update({key: state[key] for key in state if key not in ("pid", "supervisor")})
    rebooted = state.get("boot") != self.me["boot"]
    beginning = state["phase"] == "installing" and now < state["started"] + _BEGIN_SECONDS
    beginning = beginning and not rebooted
    if state["phase"] in ("installing", "running") and not beginning and not self.alive():
      report.update(
        phase="ended",
        ended=now,
        code=HOST_LOST if rebooted else CRASHED,
        trouble="the host was restarted"
        if rebooted
        else "the trainer is gone and left no exit code",
      )
    report.update(progress(self.log()) if state["attempt"] else progress(None))
    return dict(
      report,
      stop_requested=(self.home / "stop").exists(),
      preempted=(self.home / "preempted").exists(),
      guard=self.ability(),
      removing=self.removing(),
      age=(read_json(self.home / "meter.json") or {}).get("age"),
    )

  def ability(self) -> str:
    """Return "able" if the guard has proven that it may remove the slice, else why not."""
    path = self.home / "guard.txt"
    return path.read_text() if path.exists() else ""

  def removing(self) -> str | None:
    """Return why the guard is about to remove the slice, or None."""
    path = self.home / "removing"
    return path.read_text() if path.exists() else None

  def contacted(self) -> None:
    """Note that a launcher asked."""
    (self.home / "contact").touch()

  def start(self, attempt: int, sha: str) -> None:
    """Start an attempt, unless it or a later one was started here before, and take its limits.

    Args:
      attempt: its number.
      sha: SHA-256 of its spec, which comes from the bucket.
    """
    with locked(self.home / "lock", 60):
      state = self.state()
      if state["attempt"] is not None and state["attempt"] > attempt:
        return
      self.take_spec(f"attempt-{attempt}.json", sha)
      if state["attempt"] == attempt:
        return
      self.end_trainer(_END_SECONDS)
      free_devices()
      for flag in ("stop", "preempted"):
        with contextlib.suppress(FileNotFoundError):
          (self.home / flag).unlink()
      self._begin(attempt)

  def _begin(self, attempt: int) -> None:
    folder = self.home / f"attempt-{attempt}"
    folder.mkdir(exist_ok=True)
    state = {"attempt": attempt, "phase": "installing", "started": time.time()}
    write_json(self.home / "state.json", dict(state, boot=self.me["boot"]))
    self.leave_behind("supervise", folder / "supervisor.log")

  def can_resume(self) -> bool:
    """Whether the trainer has ended, is still wanted, and a rerun on all hosts would go on."""
    report = self.status()
    wanted = not (report["stop_requested"] or report["preempted"] or report["removing"])
    return wanted and report["phase"] == "ended" and report["code"] in (PREEMPTED, HOST_LOST)

  def resume(self) -> None:
    """Start the next attempt with what the last one ran, as a launcher would."""
    with locked(self.home / "lock", 60):
      if self.can_resume():
        attempt = self.state()["attempt"] + 1
        free_devices()
        write_json(self.home / "spec.json", dict(self.spec(), attempt=attempt))
        self._begin(attempt)

  def keep_guard(self) -> None:
    """Start the guard if none runs: systemd does that too, where the startup script has run."""
    if (self.home / "request.json").exists() and is_free(self.home / "guard.lock"):
      self.leave_behind("guard", self.home / "guard.log")

  def end(self, attempt: int) -> None:
    """End what runs of attempts before this one."""
    with locked(self.home / "lock", 60):
      state = self.state()
      if state["attempt"] is not None and state["attempt"] < attempt:
        self.end_trainer(_END_SECONDS)
        if self.state()["phase"] != "ended":
          trouble = "ended for the next attempt"
          self.change(phase="ended", code=CRASHED, ended=time.time(), trouble=trouble)

  def take_spec(self, name: str, sha: str) -> None:
    """Fetch the spec of an attempt; a later `up` may have changed the limits of the slice."""
    partial = self.home / f"spec.{os.getpid()}.tmp"
    fetch(f"{self.url}/launch/{name}", partial, sha)
    partial.replace(self.home / "spec.json")
    spec = self.spec()
    write_json(self.home / "limits.json", spec["limits"])
    if not (self.home / "request.json").exists():  # the startup script has not run
      write_json(self.home / "request.json", spec["request"])

  def leave_behind(self, verb: str, log: pathlib.Path) -> None:
    """Start this program again as a process that survives the end of the connection."""
    with open(log, "ab") as output:
      subprocess.Popen(
        [sys.executable, os.path.abspath(sys.argv[0]), self.url, verb],
        stdin=subprocess.DEVNULL,
        cwd="/",
        stdout=output,
        stderr=output,
        start_new_session=True,
      )

  def signal_trainer(self, number: int) -> None:
    """Send a signal to the trainer, if one runs."""
    state = self.state()
    if state["phase"] == "running" and state["pid"] and self.alive():
      with contextlib.suppress(ProcessLookupError):
        os.kill(state["pid"], number)

  def ask_to_end(self) -> None:
    """Send SIGTERM to the trainer, once per attempt: a second one would end it without a save."""
    if self.state()["phase"] == "running":
      with contextlib.suppress(FileExistsError):
        os.close(os.open(self.log().with_name("asked"), os.O_CREAT | os.O_EXCL))
        self.signal_trainer(signal.SIGTERM)

  def stop(self) -> None:
    """Ask the trainer to save and end, and keep the slice."""
    (self.home / "stop").touch()
    self.ask_to_end()

  def end_trainer(self, seconds: float) -> None:
    """Ask what runs here to end, and kill it after a time."""
    self.ask_to_end()
    deadline = time.monotonic() + (seconds if self.state()["phase"] == "running" else 0)
    while self.alive() and time.monotonic() < deadline:
      time.sleep(0.2)
    for pid in (self.state().get("pid"), self.state().get("supervisor")):
      if pid and self.alive():
        with contextlib.suppress(ProcessLookupError):
          os.killpg(pid, signal.SIGKILL)
        time.sleep(0.5)
    if not is_free(self.home / "attempt.lock"):
      time.sleep(2)
      if self.alive():
        raise RuntimeError("the processes of this host could not be ended")

  def upload_log(self, seconds: float = 300.0) -> bool:
    """Copy the log of the newest attempt to the bucket; False if that failed."""
    return self.upload(self.log(), self.log_url(f"host-{self.name}.log"), seconds)

  def log_url(self, name: str) -> str:
    """Return where a file of the newest attempt lies in the bucket."""
    return f"{self.url}/logs/attempt-{self.state()['attempt']}/{name}"

  def upload(self, path: pathlib.Path, url: str, seconds: float) -> bool:
    """Copy a file to the bucket; False if that failed."""
    try:
      gcloud("storage", "cp", str(path), url, seconds=seconds)
      return True
    except RuntimeError as error:
      print(f"{time.ctime()}: {error}", file=sys.stderr, flush=True)
      return False
