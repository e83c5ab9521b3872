"""The record of a run, BUCKET/RUN/run.json, and which launcher drives it.

The object is replaced only by generation: a writer must have read what it replaces. So of two
launchers one wins and the other notices, and neither undoes what the other did. The launcher that
drives a run leaves a sign of life in it every two minutes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import re
import socket
import tempfile
import time
from typing import Any
import uuid

from launch.cloud import commands
from launch.cloud.gcloud import Gcloud, GcloudError
from launch.cloud.settings import LAUNCHER, Place, Settings, UsageError
from launch.cloud.world import Memory

_BEAT = 120.0  # seconds between two signs of life of the launcher
_STALE = 360.0  # age of the last sign of life after which another may drive
_EVENTS = 500
_JUMP = 5.0  # seconds that the time of this machine may jump without being set again
_FIELDS = ("code", "archive", "commit", "dirty", "driver", "wanted", "result", "events")


class CloudClock:
  """The time by the clock of the cloud, as far as it is known: that of a laptop may be wrong.

  It is set by the time of an object that was just written, and must be set again when the time of
  this machine has jumped: it was set, or the machine has slept.
  """

  def __init__(self) -> None:
    self._offset, self._set_at = 0.0, (0.0, 0.0)

  def __call__(self) -> float:
    return time.time() + self._offset

  def is_set(self) -> bool:
    """Whether the offset is that of the time of this machine as it is now."""
    wall, steady = self._set_at
    return bool(wall) and abs((time.time() - wall) - (time.monotonic() - steady)) < _JUMP

  def set(self, now: float) -> None:
    """Take the time of the cloud as it is now."""
    self._offset, self._set_at = now - time.time(), (time.time(), time.monotonic())


class TakenOver(Exception):
  """Another launcher has written to the run since it was read here."""


def state_folder() -> pathlib.Path:
  """Returns where this machine keeps notes of runs."""
  base = os.environ.get("XDG_STATE_HOME") or pathlib.Path.home() / ".local/state"
  return pathlib.Path(base, LAUNCHER)


def note(settings: Settings) -> None:
  """Note the settings of a run on this machine, so that later commands need only its name."""
  folder = state_folder()
  folder.mkdir(parents=True, exist_ok=True)
  (folder / f"{settings.run}.json").write_text(json.dumps(settings.to_json()))


def noted(run: str) -> Settings | None:
  """Returns what `note` noted, or None."""
  try:
    return Settings.from_json(json.loads((state_folder() / f"{run}.json").read_text()))
  except (OSError, ValueError, KeyError):
    return None


@dataclasses.dataclass
class Run:
  """The content of run.json."""

  settings: Settings
  memory: Memory = dataclasses.field(default_factory=Memory)
  code: str = ""  # git tree of the code that the next attempt runs
  archive: str = ""  # SHA-256 of its archive in the bucket
  commit: str = ""
  dirty: bool = False
  driver: dict[str, Any] | None = None  # {id, host, pid, seen}
  wanted: str = "run"  # run | down
  result: dict[str, Any] | None = None  # {code, reason, time}
  events: list[dict[str, Any]] = dataclasses.field(default_factory=list)

  def to_json(self) -> dict[str, Any]:
    place = self.settings.place
    return {
      "run": place.run,
      "owner": self.settings.owner,
      "project": place.project,
      "zone": place.zone,
      "bucket": place.bucket,
      "settings": self.settings.to_json(),
      "memory": self.memory.to_json(),
      "attempt": self.memory.attempt,
    } | {name: getattr(self, name) for name in _FIELDS}

  @classmethod
  def from_json(cls, value: dict[str, Any]) -> Run:
    return cls(
      Settings.from_json(value["settings"]),
      Memory.from_json(value["memory"]),
      **{name: value[name] for name in _FIELDS if name in value},
    )

  def event(self, what: str, now: float) -> None:
    """Note what happened, unless it is the same as the last event."""
    if not self.events or self.events[-1]["what"] != what:
      self.events = [*self.events, {"time": round(now, 1), "what": what}][-_EVENTS:]


class Store:
  """Reads and writes run.json."""

  def __init__(self, gcloud: Gcloud, place: Place):
    self._gcloud, self._place, self.clock = gcloud, place, CloudClock()
    self.url = f"{place.url}/run.json"
    self.me = {"id": uuid.uuid4().hex[:12], "host": socket.gethostname(), "pid": os.getpid()}
    self._generation: str | None = None
    self._written: str | None = None
    self._beat = 0.0

  def read(self) -> Run | None:
    """Returns the run, or None where none is.

    Raises:
      GcloudError: if the bucket cannot be read.
    """
    for _ in range(5):
      try:
        generation = str(
          self._gcloud.json(commands.object_generation(self._place, self.url))["generation"]
        )
        text = self._gcloud.run(commands.read(self._place, f"{self.url}#{generation}"))
      except GcloudError as error:
        if error.kind != "not_found":
          raise
        # Absent, or replaced between the two lines.
        if not self._is_there():
          self._generation = "0"
          return None
        continue
      self._generation, self._written = generation, None
      try:
        return Run.from_json(json.loads(text))
      except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
          f"{self.url} was not written by a launcher of this version ({error!r}); use another run "
          "name, or move it away."
        ) from error
    raise GcloudError("unavailable", [], f"{self.url} keeps changing")

  def _is_there(self) -> bool:
    try:
      self._gcloud.run(commands.object_generation(self._place, self.url))
      return True
    except GcloudError as error:
      if error.kind == "not_found":
        return False
      raise

  def write(self, run: Run, driving: bool = True) -> None:
    """Write the run if it has changed, or if a sign of life is due.

    Raises:
      TakenOver: if it is no longer what was last read or written here.
      GcloudError: if the bucket cannot be written.
    """
    now = self.clock()
    value = run.to_json() | {"driver": None}
    text = json.dumps(_without_ticks(value), sort_keys=True)
    if text == self._written and driving and now < self._beat:
      return
    if driving:
      run.driver = self.me | {"seen": round(now, 1)}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
      json.dump(run.to_json(), file, indent=1)
      file.flush()
      try:
        created = self._gcloud.run(
          commands.upload(self._place, file.name, self.url, self._generation)
        )
      except GcloudError as error:
        if error.kind != "precondition":
          raise
        # Our own write may have succeeded although it was answered with an error.
        generation = str(
          self._gcloud.json(commands.object_generation(self._place, self.url))["generation"]
        )
        there = json.loads(self._gcloud.run(commands.read(self._place, f"{self.url}#{generation}")))
        if there != json.loads(json.dumps(run.to_json())):
          raise TakenOver(_describe_driver(there.get("driver"))) from error
        created = f"#{generation}"
    found = re.search(r"#(\d+)", created)
    if found:
      self._generation = found[1]
    if not found or not self.clock.is_set():
      there = self._gcloud.json(commands.object_generation(self._place, self.url))
      self._generation = str(there["generation"])
      self._set_clock(there.get("creation_time", ""))
    self._written, self._beat = text, now + _BEAT

  def _set_clock(self, written: str) -> None:
    """Set the clock by the time of an object that was written a moment ago."""
    with contextlib.suppress(ValueError):
      self.clock.set(datetime.datetime.fromisoformat(written).timestamp())

  def other_driver(self, run: Run) -> str | None:
    """Returns which other launcher drives the run, or None if none does any more."""
    driver = run.driver
    stale = max(_STALE, 3 * run.settings.poll)
    if not driver or driver["id"] == self.me["id"] or self.clock() - driver["seen"] > stale:
      return None
    if driver["host"] == self.me["host"] and not _is_alive(driver["pid"]):
      return None
    return _describe_driver(driver)


def _is_alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
    return True
  except ProcessLookupError:
    return False
  except PermissionError:  # another user's
    return True


def _describe_driver(driver: dict[str, Any] | None) -> str:
  return (
    f"the launcher on {driver['host']} (process {driver['pid']})" if driver else "another command"
  )


def _without_ticks(value: dict[str, Any]) -> dict[str, Any]:
  """Leave out what changes every turn and is found again by the next one."""
  memory = dict(value["memory"])
  memory["slices"] = [entry[2:] for entry in memory["slices"]]
  memory.pop("step_at")
  memory.pop("seen")
  memory.pop("step")
  memory.pop("step_now")
  return value | {"memory": memory}
