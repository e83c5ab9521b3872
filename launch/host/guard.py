"""The process that copies logs to the bucket and removes the slice when it should be gone."""

from __future__ import annotations

import pathlib
import sys
import time
import traceback

from launch.host.files import locked, number_in, write_json
from launch.host.google import gcloud, metadata
from launch.host.host import Host

_SAVE_SECONDS = 120.0  # for a trainer that was asked to end, before the slice goes
_UPLOAD_SECONDS = 60.0
_TURN_SECONDS = 5.0


class Guard:
  """Watches over one host until its machine is gone."""

  def __init__(self, host: Host):
    self.host = host
    self._uploaded: tuple[pathlib.Path, int] | None = None
    self._next_upload = self._next_delete = 0.0
    self._since: float | None = None

  def run(self) -> None:
    """Watch for ever."""
    with locked(self.host.home / "guard.lock", 5):
      while True:
        try:
          self._turn()
        except Exception:  # of any kind: without a guard nothing keeps the cost limit
          traceback.print_exc()
          sys.stderr.flush()
        time.sleep(_TURN_SECONDS)

  def _turn(self) -> None:
    host, now = self.host, time.time()
    log, told = host.log(), host.home / "preempted"
    if not told.exists() and (metadata("preempted") or "").strip() == "TRUE":
      told.touch()
      host.ask_to_end()
    if now > self._next_upload:
      self._next_upload = now + _UPLOAD_SECONDS
      size = log.stat().st_size if log.exists() else 0
      if size and (log, size) != self._uploaded and host.upload(log, f"host-{host.name}.log"):
        self._uploaded = (log, size)
      self._beat()
    reason = self.why_remove()
    self._since = (self._since or now) if reason else None
    if self._since is None or reason is None:
      return
    # Host 0 removes the slice; the others do it where host 0 does not.
    patience = -1 if host.name == "0-0" else 2 * _SAVE_SECONDS
    if now > max(self._next_delete, self._since + patience):
      self._remove(reason)
      self._next_delete = time.time() + 60

  def _beat(self, removing: str | None = None) -> None:
    """From host 0: leave in the bucket that the slice lives, or when and why it was removed."""
    if self.host.name == "0-0":
      path = self.host.home / "heartbeat.json"
      write_json(path, dict(self.host.status(), removing=removing))
      self.host.upload(path, "heartbeat.json")

  def why_remove(self) -> str | None:
    """Return why the slice should be gone: its time is up, or it is neither used nor watched."""
    home, now = self.host.home, time.time()
    deadline = number_in(home / "deadline")
    if deadline and now > deadline:
      return "deadline"
    contact = home / "contact"
    seen = contact.stat().st_mtime if contact.exists() else now
    last = max(seen, self.host.state().get("ended") or 0)
    idle = None if (home / "stop").exists() else self.host.spec().get("idle")
    return "idle" if idle and now > last + idle and not self.host.alive() else None

  def _remove(self, reason: str) -> None:
    """Let the trainer save, save the logs, and remove the queued resource of this machine."""
    host, spec = self.host, self.host.spec()
    print(f"{time.ctime()}: removing {host.run}: {reason}", file=sys.stderr, flush=True)
    host.ask_to_end()
    deadline = time.monotonic() + _SAVE_SECONDS
    while host.alive() and time.monotonic() < deadline:
      time.sleep(0.5)
    host.upload(host.log(), f"host-{host.name}.log")
    self._beat(reason)
    where = [f"--project={spec['project']}", f"--zone={spec['zone']}"]
    delete = ["compute", "tpus", "queued-resources", "delete", host.run, "--force", "--async"]
    try:
      gcloud(*delete, *where)
    except RuntimeError as error:
      (host.home / "guard.trouble").write_text(
        f"the slice should be gone ({reason}) and cannot remove itself: {error}"
      )
      print(f"{time.ctime()}: {error}", file=sys.stderr, flush=True)
