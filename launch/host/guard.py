"""The process that keeps the limits of the slice, from its first boot to its end.

The startup script of the machine runs it as root at every boot, and systemd restarts it. It needs
no laptop, login, ssh, bucket, or correct clock: its limits are in request.json, which the startup
script carries, and it deletes the queued resource by the API with the machine's own token. The
launcher may replace the limits by limits.json.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import pathlib
import sys
import threading
import time
import traceback

from launch.host.files import Json, is_free, locked, read_json, write_json
from launch.host.google import Api, ApiError, metadata
from launch.host.host import Host
from launch.host.meter import Meter, boottime

ABLE = "able"
SAVE_SECONDS = 120.0  # for a trainer that was asked to end, before the slice goes
_UPLOAD_SECONDS = 60.0
_TURN_SECONDS = 5.0
_MAX_RESUMES = 3  # in a row without a new step
_STOPPED_SECONDS = 12 * 3600.0  # without a launcher, for a slice that `launch/tpu stop` keeps


class Guard:
  """Watches over one host until its machine is gone."""

  def __init__(self, host: Host):
    self.host = host
    self.request: Json = read_json(host.home / "request.json") or {}
    self.meter = Meter(host.home / "meter.json", host.me["boot"])
    self._contact = self._contact_time()
    self._since: float | None = None
    self._next_delete = 0.0
    self._uploaded: tuple[pathlib.Path, int] | None = None
    self._hurry = threading.Event()  # something is to be uploaded now
    self._told = False  # the bucket holds why the slice goes

  @property
  def api(self) -> Api:
    """The API at the place of the slice."""
    return Api(self.request["project"], self.request["zone"])

  def run(self) -> None:
    """Watch for ever; return if another guard does."""
    if not is_free(self.host.home / "guard.lock"):
      return
    with locked(self.host.home / "guard.lock", 5):
      threading.Thread(target=self._report_for_ever, daemon=True).start()
      while True:
        with _survived():
          self.turn()
        time.sleep(_TURN_SECONDS)

  def turn(self) -> None:
    """Keep the limits; nothing here waits for a bucket."""
    self.request = read_json(self.host.home / "request.json") or self.request
    if not self.request:  # a slice without a startup script, before its first attempt
      return
    contact = self._contact_time()
    busy = self.host.alive() or contact != self._contact
    self._contact = contact
    self.meter.count(busy)
    self._keep_limits()
    self._resume()

  def _report_for_ever(self) -> None:
    """Exchange with the cloud what may take long, in a thread of its own."""
    next_upload = next_proof = 0.0
    while True:
      with _survived():
        if self.request:
          self.meter.correct(self.api, self._node())
          if boottime() > next_proof and self.ability() != ABLE:
            next_proof = boottime() + 30
            self.prove()
        self._pass_on_preemption()
        if self._hurry.is_set() or boottime() > next_upload:
          self._hurry.clear()
          next_upload = boottime() + _UPLOAD_SECONDS
          self._upload()
          self._told = self._since is not None
      self._hurry.wait(_TURN_SECONDS)

  def _pass_on_preemption(self) -> None:
    announced = self.host.home / "preempted"
    if not announced.exists() and (metadata("preempted") or "").strip() == "TRUE":
      announced.touch()
      self.host.ask_to_end()

  def _upload(self) -> None:
    """Copy to the bucket a heartbeat of host 0, and the log if it has grown."""
    host = self.host
    if host.name == "0-0":
      path = host.home / "heartbeat.json"
      request = self.request.get("request")
      write_json(path, dict(host.status(), age=self.meter.age, request=request))
      host.upload(path, f"{host.url}/heartbeat.json", seconds=60)
    log = host.log()
    size = log.stat().st_size if log.exists() else 0
    if size and (log, size) != self._uploaded and host.upload_log():
      self._uploaded = (log, size)

  def _node(self) -> str:
    slices, run = self.request.get("slices", 1), self.request["run"]
    return str(run) if slices == 1 else f"{run}-{self.host.me['slice']}"

  def _contact_time(self) -> float:
    contact = self.host.home / "contact"
    return contact.stat().st_mtime if contact.exists() else 0.0

  def limits(self) -> tuple[float | None, float | None, float]:
    """Return the seconds that the slice may exist, those that it may be idle, and those to save."""
    limits = read_json(self.host.home / "limits.json") or self.request
    longest, idle = limits.get("max_seconds"), limits.get("idle")
    if (self.host.home / "stop").exists():
      idle = max(idle, _STOPPED_SECONDS) if idle else None
    return longest, idle, limits.get("save_seconds", SAVE_SECONDS)

  def why_remove(self) -> str | None:
    """Return why the slice should be gone: its time is up, or it is idle.

    A running trainer is asked to save before the limit, so that the limit is the end.
    """
    longest, idle, save = self.limits()
    if self.host.removing() is None and not self.host.alive():
      save = 0.0
    if longest is not None and self.meter.age > longest - save:
      return "deadline"
    return "idle" if idle and self.meter.idle > idle else None

  def _keep_limits(self) -> None:
    """Let the trainer save, and remove the slice, once there is a reason."""
    reason, now, removing = self.why_remove(), boottime(), self.host.home / "removing"
    if not reason:
      self._since, self._told = None, False
      with contextlib.suppress(FileNotFoundError):
        removing.unlink()
      return
    if self._since is None:
      self._since = now
      self._say(f"{reason}: age {self.meter.age:.0f} s, idle {self.meter.idle:.0f} s")
      self._hurry.set()
      with _survived():  # on a full disk as well, it goes
        removing.write_text(reason)
      with _survived():
        self.host.ask_to_end()
    longest, _, save = self.limits()
    until = self._since + save
    if longest is not None:
      until = min(until, now + longest - self.meter.age)
    if self.host.name != "0-0":  # host 0 removes the slice; the others do it where it does not
      until = until + 4 * _TURN_SECONDS if reason == "deadline" else self._since + 2 * save
    telling = not self._told and now < self._since + 2 * _TURN_SECONDS
    if now < until and (self.host.name != "0-0" or self.host.alive() or telling):
      return
    if now >= self._next_delete:
      self._next_delete = now + 2 * _TURN_SECONDS
      self._delete(reason)

  def _resume(self) -> None:
    """Start the next attempt where no launcher does: after a reboot, or the loss of a host.

    Every host does so for itself; the trainers wait for each other at their start. After some
    attempts in a row that reached no new step the slice is left to its idle limit.
    """
    limits = read_json(self.host.home / "limits.json") or self.request
    patience = limits.get("resume_seconds")
    if not patience or self.meter.idle < patience or self._since or not self.host.can_resume():
      return
    step = self.host.status()["step"]
    path = self.host.home / "resumed.json"
    before = read_json(path) or {"step": None, "times": 0}
    times = before["times"] + 1 if before["step"] == step else 1
    if times > _MAX_RESUMES:
      return
    write_json(path, {"step": step, "times": times})
    self._say(
      f"no launcher for {self.meter.idle:.0f} s: starting the next attempt, from step {step}"
    )
    self.host.resume()

  def _delete(self, reason: str) -> None:
    try:
      self.api.delete(self.request["run"])
      self._say(f"removed the slice: {reason}")
    except ApiError as error:
      if error.code != 404:
        self._note(f"the slice should be gone ({reason}) and cannot remove itself: {error}")
    self._hurry.set()

  def prove(self) -> None:
    """Find out whether this machine could remove its slice, and note the answer."""
    try:
      self.api.may_delete()
      self._note(ABLE)
    except ApiError as error:
      if error.code == 403:
        self._note(f"the service account may not delete queued resources: {error}")
      else:
        self._note(f"not proven yet: {error}")

  def ability(self) -> str:
    """Return what is known of the right to remove the slice."""
    return self.host.ability()

  def _note(self, text: str) -> None:
    with contextlib.suppress(OSError):
      (self.host.home / "guard.txt").write_text(text[:400])
    self._say(text)

  def _say(self, text: str) -> None:
    with contextlib.suppress(OSError):
      print(f"{time.ctime()}: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _survived() -> Iterator[None]:
  """Print an error of any kind and continue: without a guard nothing keeps the limits."""
  try:
    yield
  except Exception:
    with contextlib.suppress(OSError):
      traceback.print_exc()
      sys.stderr.flush()
