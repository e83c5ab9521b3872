"""What runs on each host of a slice; shipped as this one file, for any Python from 3.8 on, without a package.

    python3 agent.py gs://BUCKET/RUN VERB [argument]

    status          where this host is, as one line of JSON
    end ATTEMPT     ends the trainer of an earlier attempt; status
    start ATTEMPT   starts the trainer of an attempt, once, however often it is asked; status
    stop            asks the trainer to save and end, and keeps the slice; status
    stacks          makes the trainer write where each of its threads is into its log; status
    tail LINES      the last lines of the trainer's log, each with the number of this host in front
    follow          those and all that come

Nothing here stays connected to who asked: `start` leaves two processes behind. The supervisor fetches the code,
installs, runs the trainer and writes down its exit code. The guard copies logs to the bucket, tells the trainer when
the machine is about to be taken away, and removes the slice when its time is up, or when nobody trains and nobody
looks.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import fcntl
import glob
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import traceback
from typing import Any
import urllib.request

CRASHED = 1
HOST_LOST = 76  # of trainer.errors: the same command on all hosts goes on from the last checkpoint
_SAVE_SECONDS = 120.0  # for a trainer that was asked to end, before the slice goes
_END_SECONDS = 40.0  # the same before another attempt, within one call over ssh
_BEGIN_SECONDS = 60.0  # for a supervisor to take its lock
_UPLOAD_SECONDS = 60.0
_GUARD_SECONDS = 5.0
_TAIL_BYTES = 1 << 16
_PROGRESS = re.compile(rb"step (\d+)/(\d+) [^\r\n]*")
_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")


def metadata(path: str) -> str | None:
  """Returns a value of the machine's metadata server, or None where there is none."""
  server = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
  request = urllib.request.Request(
    f"http://{server}/computeMetadata/v1/instance/{path}", headers={"Metadata-Flavor": "Google"}
  )
  try:
    with urllib.request.urlopen(request, timeout=2) as reply:
      return reply.read().decode()
  except (OSError, ValueError):
    return None


def identity(home: pathlib.Path) -> dict[str, Any]:
  """Returns the slice and the worker that this host is, from the environment or from the metadata of TPU VMs."""
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
  if worker is not None:  # else the metadata server did not answer, or this is no TPU VM
    write_json(path, known)
  return known


def boot_id() -> str:
  return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    return None


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
  partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
  partial.write_text(json.dumps(value) + "\n")
  partial.replace(path)


def number_in(path: pathlib.Path) -> float | None:
  try:
    return float(path.read_text())
  except (FileNotFoundError, ValueError):
    return None


@contextlib.contextmanager
def locked(path: pathlib.Path, seconds: float, kind: int = fcntl.LOCK_EX) -> Iterator[int]:
  """Holds a lock that ends with the process; TimeoutError if another holds it for longer."""
  file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
  deadline = time.monotonic() + seconds
  while True:
    try:
      fcntl.flock(file, kind | fcntl.LOCK_NB)
      break
    except BlockingIOError:
      if time.monotonic() > deadline:
        os.close(file)
        raise TimeoutError(f"{path} is held by another process") from None
      time.sleep(0.1)
  try:
    yield file
  finally:
    os.close(file)


def is_free(path: pathlib.Path) -> bool:
  try:
    with locked(path, 0, fcntl.LOCK_SH):  # who looks must not be in the way of others who look
      return True
  except TimeoutError:
    return False


def gcloud(*words: str, seconds: float = 120.0) -> str:
  """Runs gcloud on this host, as its service account; RuntimeError with its last line if it fails."""
  try:
    done = subprocess.run(
      ["gcloud", *words, "--quiet"],
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      timeout=seconds,
      check=False,
    )
  except (OSError, subprocess.TimeoutExpired) as error:
    raise RuntimeError(f"gcloud {' '.join(words[:4])}: {error}") from error
  if done.returncode:
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    raise RuntimeError(f"gcloud {' '.join(words[:4])}: {lines[-1][:300]}")
  return done.stdout


class Host:
  """This host's part of a run; everything is in files below ~/tpu/RUN, so any process may ask or go on."""

  def __init__(self, url: str):
    self.url, self.run = url, url.rsplit("/", 1)[1]
    self.home = pathlib.Path.home() / "tpu" / self.run
    self.home.mkdir(parents=True, exist_ok=True)
    self.me = identity(self.home)
    self.name = f"{self.me['slice']}-{self.me['worker']}"

  def state(self) -> dict[str, Any]:
    return read_json(self.home / "state.json") or {"attempt": None, "phase": "none"}

  def change(self, **values: Any) -> None:
    write_json(self.home / "state.json", dict(self.state(), **values))

  def spec(self) -> dict[str, Any]:
    return read_json(self.home / "spec.json") or {}

  def log(self) -> pathlib.Path:
    return self.home / f"attempt-{self.state()['attempt']}" / "host.log"

  def alive(self) -> bool:
    """Tells whether a supervisor or a trainer is there: each holds this lock as long as it lives."""
    return not is_free(self.home / "attempt.lock")

  def status(self) -> dict[str, Any]:
    state, now = self.state(), time.time()
    report = dict(self.me, tpu_agent=1, now=now, code=None, started=None, ended=None, trouble=None)
    report.update({key: state[key] for key in state if key not in ("pid", "supervisor")})
    beginning = state["phase"] == "installing" and now < state["started"] + _BEGIN_SECONDS
    if state["phase"] in ("installing", "running") and not beginning and not self.alive():
      rebooted = state["boot"] != self.me["boot"]
      report.update(
        phase="ended",
        ended=now,
        code=HOST_LOST if rebooted else CRASHED,
        trouble="the host was restarted"
        if rebooted
        else "the trainer is gone and left no exit code",
      )
    report.update(progress(self.log()) if state["attempt"] else progress(None))
    guard = self.home / "guard.trouble"
    if not report["trouble"] and guard.exists():
      report["trouble"] = guard.read_text()[:300]
    return dict(
      report,
      stop_requested=(self.home / "stop").exists(),
      preempted=(self.home / "preempted").exists(),
      deadline=number_in(self.home / "deadline"),
    )

  def contacted(self) -> None:
    (self.home / "contact").touch()

  def start(self, attempt: int) -> None:
    """Starts an attempt unless it, or a later one, was started here before."""
    with locked(self.home / "lock", 60):
      state = self.state()
      if state["attempt"] is not None and state["attempt"] >= attempt:
        self.take_limits(f"attempt-{state['attempt']}.json")
        return
      self.end_trainer(_END_SECONDS)
      free_devices()
      self.take_limits(f"attempt-{attempt}.json")
      for flag in ("stop", "guard.trouble", "preempted"):
        with contextlib.suppress(FileNotFoundError):
          (self.home / flag).unlink()
      folder = self.home / f"attempt-{attempt}"
      folder.mkdir(exist_ok=True)
      write_json(
        self.home / "state.json",
        {
          "attempt": attempt,
          "phase": "installing",
          "started": time.time(),
          "boot": self.me["boot"],
        },
      )
      self.leave_behind("supervise", folder / "supervisor.log")

  def keep_guard(self) -> None:
    """Sees to it that a host on which a trainer was started has a guard, also after it was restarted."""
    if self.state()["attempt"] is not None and is_free(self.home / "guard.lock"):
      self.leave_behind("guard", self.home / "guard.log")

  def end(self, attempt: int) -> None:
    """Ends what runs of attempts before this one."""
    with locked(self.home / "lock", 60):
      state = self.state()
      if state["attempt"] is not None and state["attempt"] < attempt:
        self.end_trainer(_END_SECONDS)
        if self.state()["phase"] != "ended":
          self.change(
            phase="ended", code=CRASHED, ended=time.time(), trouble="ended for the next attempt"
          )

  def take_limits(self, name: str) -> None:
    """Fetches what an attempt is, and until when the slice may stay: a later `up` may have given it more time."""
    partial = self.home / f"spec.{os.getpid()}.tmp"
    gcloud("storage", "cp", f"{self.url}/launch/{name}", str(partial))
    partial.replace(self.home / "spec.json")
    deadline = self.spec().get("deadline")
    if deadline:
      (self.home / "deadline").write_text(str(deadline))

  def leave_behind(self, verb: str, log: pathlib.Path) -> None:
    """Starts this file again as a process that stays when the connection ends."""
    with open(log, "ab") as output:
      subprocess.Popen(
        [sys.executable, os.path.abspath(__file__), self.url, verb],
        stdin=subprocess.DEVNULL,
        cwd="/",
        stdout=output,
        stderr=output,
        start_new_session=True,
      )

  def signal_trainer(self, number: int) -> None:
    state = self.state()
    if state["phase"] == "running" and state["pid"] and self.alive():
      with contextlib.suppress(ProcessLookupError):
        os.kill(state["pid"], number)

  def ask_to_end(self) -> None:
    """Lets the trainer save and end; once, whoever asks, because it takes a second SIGTERM for one to end at once."""
    if self.state()["phase"] == "running":
      with contextlib.suppress(FileExistsError):
        os.close(os.open(self.log().with_name("asked"), os.O_CREAT | os.O_EXCL))
        self.signal_trainer(signal.SIGTERM)

  def stop(self) -> None:
    (self.home / "stop").touch()
    self.ask_to_end()

  def end_trainer(self, seconds: float) -> None:
    """Asks what runs here to end, and kills what does not."""
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
        raise RuntimeError("what runs on this host could not be ended")

  def supervise(self) -> None:
    """Runs the trainer of the current attempt to its end."""
    with locked(self.home / "attempt.lock", 5) as lock:
      self.change(supervisor=os.getpid())
      trainer = None
      try:
        with open(self.log(), "ab") as log:
          command, folder, environment = self.prepare(log)
          trainer = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=[lock],
          )
        self.change(phase="running", pid=trainer.pid, running=time.time())
        if (self.home / "stop").exists():
          self.ask_to_end()
        code, trouble = trainer.wait(), None
      except Exception as error:  # whatever it is, it must be told: nobody is there to see it
        if trainer:
          trainer.kill()
        code, trouble = (
          CRASHED,
          str(error).splitlines()[0][:300] if str(error) else type(error).__name__,
        )
        with open(self.log(), "a") as log:
          log.write(f"agent: {trouble}\n{traceback.format_exc()}")
      ended = {"phase": "ended", "code": code, "ended": time.time(), "trouble": trouble}
      self.change(pid=None)
      exit_file = self.log().with_name("exit.json")
      write_json(exit_file, dict(self.status(), **ended))
      self.upload(exit_file, f"exit-{self.name}.json", seconds=60)
      self.upload(self.log(), f"host-{self.name}.log", seconds=60)
      self.change(**ended)  # last: who hears it may remove this machine

  def prepare(self, log: Any) -> tuple[list[str], str, dict[str, str]]:
    """Fetches the code, installs what it needs, and returns command, folder and environment of the trainer."""
    spec = self.spec()
    code = self.home / "code" / spec["code"]
    if not code.exists():
      partial = self.home / "code" / f"{spec['code']}.tmp"
      shutil.rmtree(partial, ignore_errors=True)
      partial.mkdir(parents=True)
      archive = partial.with_suffix(".tar.gz")
      gcloud(
        "storage", "cp", f"{self.url}/launch/code-{spec['code']}.tar.gz", str(archive), seconds=300
      )
      with tarfile.open(archive) as tar:
        tar.extractall(partial, **({"filter": "tar"} if hasattr(tarfile, "tar_filter") else {}))
      partial.rename(code)
    environment = dict(os.environ, PYTHONUNBUFFERED="1", PYTHONPATH=str(code))
    environment.update(read_environment(self.home / "env"))
    for name, secret in spec["secrets"].items():
      environment[name] = gcloud(
        "secrets",
        "versions",
        "access",
        "latest",
        f"--secret={secret}",
        f"--project={spec['project']}",
      )
    python = spec["python"] or install(code, log)
    return [python, "-m", "trainer", *spec["argv"]], str(code), environment

  def upload(self, path: pathlib.Path, name: str, seconds: float = 300.0) -> bool:
    """Copies a file into the logs of its attempt in the bucket."""
    try:
      gcloud(
        "storage",
        "cp",
        str(path),
        f"{self.url}/logs/attempt-{self.state()['attempt']}/{name}",
        seconds=seconds,
      )
      return True
    except RuntimeError as error:
      print(f"{time.ctime()}: {error}", file=sys.stderr, flush=True)
      return False

  def guard(self) -> None:
    """Watches over the machine until it is gone."""
    with locked(self.home / "guard.lock", 5):
      self.uploaded: Any = None
      self.next_upload = self.next_delete = 0.0
      self.since: float | None = None
      while True:
        try:
          self.watch_over()
        except Exception:  # of whatever kind: without a guard nobody keeps the cost limit
          traceback.print_exc()
          sys.stderr.flush()
        time.sleep(_GUARD_SECONDS)

  def watch_over(self) -> None:
    """One turn of the guard."""
    now, log = time.time(), self.log()
    told = self.home / "preempted"
    if not told.exists() and (metadata("preempted") or "").strip() == "TRUE":
      told.touch()
      self.ask_to_end()
    if now > self.next_upload:
      self.next_upload = now + _UPLOAD_SECONDS
      size = log.stat().st_size if log.exists() else 0
      if size and (log, size) != self.uploaded and self.upload(log, f"host-{self.name}.log"):
        self.uploaded = (log, size)
      self.beat()
    reason = self.why_remove()
    self.since = (self.since or now) if reason else None
    # Host 0 removes the slice; the others do where it does not.
    if reason and now > max(
      self.next_delete, self.since + (-1 if self.name == "0-0" else 2 * _SAVE_SECONDS)
    ):
      self.remove(reason)
      self.next_delete = time.time() + 60

  def beat(self, removing: str | None = None) -> None:
    """Host 0 says in the bucket that the slice lives: who asks when it is gone finds when and why."""
    if self.name == "0-0":
      path = self.home / "heartbeat.json"
      write_json(path, dict(self.status(), removing=removing))
      self.upload(path, "heartbeat.json")

  def why_remove(self) -> str | None:
    """Returns why the slice should be gone: its time is up, or nobody trains and nobody looks."""
    deadline, now = number_in(self.home / "deadline"), time.time()
    if deadline and now > deadline:
      return "deadline"
    contact = self.home / "contact"
    seen = contact.stat().st_mtime if contact.exists() else now
    last = max(seen, self.state().get("ended") or 0)
    idle = None if (self.home / "stop").exists() else self.spec().get("idle")
    return "idle" if idle and now > last + idle and not self.alive() else None

  def remove(self, reason: str) -> None:
    """Lets the trainer save, saves the logs, and removes the queued resource with this machine in it."""
    spec = self.spec()
    print(f"{time.ctime()}: removing {self.run}: {reason}", file=sys.stderr, flush=True)
    self.ask_to_end()
    deadline = time.monotonic() + _SAVE_SECONDS
    while self.alive() and time.monotonic() < deadline:
      time.sleep(0.5)
    self.upload(self.log(), f"host-{self.name}.log")
    self.beat(reason)
    try:
      gcloud(
        "compute",
        "tpus",
        "queued-resources",
        "delete",
        self.run,
        f"--project={spec['project']}",
        f"--zone={spec['zone']}",
        "--force",
        "--async",
      )
    except RuntimeError as error:
      (self.home / "guard.trouble").write_text(
        f"the slice should be gone ({reason}) and cannot remove itself: {error}"
      )
      print(f"{time.ctime()}: {error}", file=sys.stderr, flush=True)

  def tail(self, lines: int, follow: bool) -> None:
    """Prints the last lines of the log, and with `follow` all later ones, until who asked is gone."""
    path, parent = self.log(), os.getppid()
    with open(path, "rb") as log:
      log.seek(max(0, path.stat().st_size - max(_TAIL_BYTES, 200 * lines)))
      rest = log.read().splitlines(keepends=True)[-lines:]
      while True:
        for line in rest:
          sys.stdout.write(f"[{self.name}] {line.decode(errors='replace').rstrip()}\n")
        sys.stdout.flush()
        if not follow or os.getppid() != parent:
          return
        time.sleep(1)
        rest = log.read().splitlines(keepends=True)


def progress(log: pathlib.Path | None) -> dict[str, Any]:
  """Returns the last line of progress in the end of a log."""
  none = {"step": None, "total": None, "progress": None}
  if not log or not log.exists():
    return none
  with open(log, "rb") as file:
    file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
    found = list(_PROGRESS.finditer(file.read()))
  if not found:
    return none
  return {
    "step": int(found[-1].group(1)),
    "total": int(found[-1].group(2)),
    "progress": found[-1].group(0).decode(errors="replace")[:300],
  }


def read_environment(path: pathlib.Path) -> dict[str, str]:
  """Returns NAME=VALUE lines of a file that only its owner reads; the value is taken as it is, without a shell."""
  if not path.exists():
    return {}
  path.chmod(0o600)
  lines = [
    line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")
  ]
  return dict(line.split("=", 1) for line in lines)


def install(code: pathlib.Path, log: Any) -> str:
  """Makes the environment that the lock file of the code describes, once on this host; returns its Python."""
  lock, tool = code / "launch" / "requirements-tpu.lock", code / "launch" / "requirements-uv.lock"
  folder = pathlib.Path.home() / "tpu" / f"env-{hashlib.sha256(lock.read_bytes()).hexdigest()[:12]}"
  with locked(folder.with_suffix(".lock"), 1800):
    if (folder / "complete").exists():
      return str(folder / "bin" / "python")
    version = re.search(r"--python-version[ =](\S+)", lock.read_text()).group(
      1
    )  # of the command in its first lines
    pip = [
      sys.executable,
      "-m",
      "pip",
      "install",
      "--user",
      "--quiet",
      "--require-hashes",
      "-r",
      str(tool),
    ]
    sync = [
      "uv",
      "pip",
      "sync",
      "--quiet",
      "--python",
      str(folder / "bin" / "python"),
      "--require-hashes",
      str(lock),
    ]
    steps = [pip, ["uv", "venv", "--quiet", "--clear", "--python", version, str(folder)], sync]
    if shutil.which("uv", path=_path_with_uv()):
      del steps[0]
    for step in steps:
      run_step(step, log)
    (folder / "complete").touch()
  return str(folder / "bin" / "python")


def _path_with_uv() -> str:
  return f"{pathlib.Path.home()}/.local/bin:{os.environ['PATH']}"


def run_step(step: list[str], log: Any) -> None:
  """Runs a step of the installation, three times at most, for registries that are busy."""
  for pause in (5, 20, None):
    code = subprocess.call(
      step,
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=log,
      env=dict(os.environ, PATH=_path_with_uv(), PIP_BREAK_SYSTEM_PACKAGES="1"),
    )
    if code == 0:
      return
    if pause:
      time.sleep(pause)
  raise RuntimeError(
    f"installation failed: {' '.join(step[:4])} ... ended with code {code}; its words are in the log"
  )


def free_devices() -> None:
  """Ends whoever still holds the chips, of an earlier run or another user, and only then removes libtpu's lock."""
  devices = [path for pattern in _DEVICES for path in glob.glob(pattern)]
  if not devices:
    return
  for number in (signal.SIGTERM, signal.SIGKILL):
    holders = subprocess.run(
      ["sudo", "-n", "lsof", "-t", *devices],
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
      check=False,
    ).stdout.split()
    if not holders:
      break
    subprocess.call(["sudo", "-n", "kill", f"-{int(number)}", *holders])
    time.sleep(5)
  subprocess.call(["sudo", "-n", "rm", "-f", "/tmp/libtpu_lockfile"])


def main(argv: list[str]) -> int:
  url, verb = argv[1:3]
  host = Host(url)
  if verb in ("supervise", "guard"):
    getattr(host, verb)()
    return 0
  host.contacted()
  if verb in ("tail", "follow"):
    if not host.log().exists():
      print(f"[{host.name}] no trainer was started here yet", flush=True)
      return 0
    host.tail(int(argv[3]), follow=verb == "follow")
    return 0
  trouble = None
  try:
    if verb == "start":
      host.start(int(argv[3]))
    elif verb == "end":
      host.end(int(argv[3]))
    elif verb == "stop":
      host.stop()
    elif verb == "stacks":
      host.signal_trainer(signal.SIGUSR1)  # faulthandler of trainer.__main__
      time.sleep(1)
      host.upload(host.log(), f"host-{host.name}.log")
    host.keep_guard()
  except (OSError, RuntimeError) as error:
    trouble = str(error)
  status = host.status()
  # One write: print() without a buffer (PYTHONUNBUFFERED) writes the end of the line by itself, and that of another host
  # may come between.
  sys.stdout.write(json.dumps(dict(status, trouble=trouble or status["trouble"])) + "\n")
  sys.stdout.flush()
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
