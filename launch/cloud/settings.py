"""The settings of a run, checked before anything costs money."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

LAUNCHER = "resnet-pod"  # label of everything that this launcher creates


class UsageError(Exception):
  """An argument is missing or wrong; one sentence names it and what to do."""


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a run lives."""

  run: str
  project: str
  zone: str
  bucket: str  # gs://BUCKET or gs://BUCKET/FOLDER

  @property
  def url(self) -> str:
    """The folder of the run in the bucket."""
    return f"{self.bucket}/{self.run}"


@dataclasses.dataclass(frozen=True)
class Settings:
  """The arguments of `up`; durations are seconds."""

  place: Place
  owner: str
  type: str
  slices: int = 1
  capacity: str = "on-demand"  # on-demand | spot | reserved | flex-start
  reservation: str = ""
  runtime_version: str = ""
  service_account: str = ""
  network: str = ""
  subnetwork: str = ""
  internal_ips: bool = False
  iap: bool = False
  autocheckpoint: bool = False
  labels: tuple[tuple[str, str], ...] = ()
  env_file: str = ""
  secrets: tuple[tuple[str, str], ...] = ()  # (variable, name in Secret Manager)
  python: str = ""
  keep: bool = False
  argv: tuple[str, ...] = ()  # of the trainer
  dollars_per_chip_hour: float = 0.0
  max_wait: float = 6 * 3600
  max_seconds: float | None = None  # that slices may exist, over all attempts
  idle: float = 1200
  poll: float = 60
  stall: float = 900
  unreachable: float = 600
  start_limit: float = 1800
  provision_limit: float = 1800
  exit_grace: float = 300
  backoff: float = 60
  call_limit: float = 120

  @property
  def save_seconds(self) -> float:
    """How long before the cost limit trainers are asked to save and end."""
    return min(120.0, 0.1 * self.max_seconds) if self.max_seconds else 120.0

  @property
  def run(self) -> str:
    return self.place.run

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, value: dict[str, Any]) -> Settings:
    """Reads the result of `to_json`; fields of other versions are left out."""
    known = {field.name for field in dataclasses.fields(cls)}
    value = {name: _tuples(entry) for name, entry in value.items() if name in known}
    return cls(**value | {"place": Place(**value["place"])})


def _tuples(value: Any) -> Any:
  return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True)
class Generation:
  """A kind of TPU, with the names of cloud.google.com/tpu/docs/runtimes and .../regions-zones."""

  runtime_version: str
  per_chip: int  # what a chip adds to the number in the type: 2 where that counts cores, else 1


_GENERATIONS = {
  "v2": Generation("tpu-ubuntu2204-base", 2),
  "v3": Generation("tpu-ubuntu2204-base", 2),
  "v4": Generation("tpu-ubuntu2204-base", 2),
  "v5litepod": Generation("v2-alpha-tpuv5-lite", 1),
  "v5p": Generation("v2-alpha-tpuv5", 2),
  "v6e": Generation("v2-alpha-tpuv6e", 1),
}


def generation(accelerator_type: str) -> Generation | None:
  """Returns the kind of a type such as v5litepod-64, or None if it is not in the table."""
  return _GENERATIONS.get(accelerator_type.rpartition("-")[0])


def chips(settings: Settings) -> int | None:
  """Returns the number of chips of all slices, or None if the type is not in the table."""
  kind = generation(settings.type)
  return settings.slices * int(settings.type.rpartition("-")[2]) // kind.per_chip if kind else None


def duration(text: str) -> float:
  """Returns the seconds of 90s, 15m, 6h, 2d, or of a number of seconds.

  Raises:
    UsageError: if it is not a duration, or not above 0.
  """
  found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
  if not found or not float(found[1]):
    raise UsageError(f"{text!r} is not a duration; write 90s, 15m, 6h or 2d.")
  return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def describe_seconds(seconds: float) -> str:
  """Returns a duration for a person."""
  if seconds < 120:
    return f"{seconds:.0f} s"
  if seconds < 7200:
    return f"{seconds / 60:.0f} min"
  return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def check_run(name: str) -> str:
  """Returns a run name that can name a queued resource, nodes, a label and a folder.

  Raises:
    UsageError: if it cannot.
  """
  if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
    raise UsageError(
      f"The run name {name!r} must be 1 to 40 of a-z, 0-9 and -, start with a letter and not end "
      "with -."
    )
  return name


def check_place(place: Place) -> Place:
  """Returns a place whose parts are safe in any command line.

  Raises:
    UsageError: naming the part that is not.
  """
  check_run(place.run)
  for name, value, pattern in (
    ("project", place.project, r"[a-z][-a-z0-9.:]{2,61}[a-z0-9]"),
    ("zone", place.zone, r"[a-z]+-[a-z]+\d+-[a-z]"),
    ("bucket", place.bucket, r"gs://[a-z0-9][-_.a-z0-9]+[a-z0-9](/[-_.a-zA-Z0-9]+)*"),
  ):
    if not re.fullmatch(pattern, value):
      raise UsageError(
        f"--{name} {value!r} is not the name of a {name}"
        f"{', as in gs://BUCKET or gs://BUCKET/FOLDER' if name == 'bucket' else ''}."
      )
  return place


def label(text: str) -> str:
  """Returns the nearest text that is a valid value of a label."""
  return re.sub(r"[^a-z0-9_-]", "-", text.lower())[:63]


def check(settings: Settings) -> Settings:
  """Returns settings that a slice can be requested with, with the defaults of its type.

  Raises:
    UsageError: naming what is wrong.
  """
  check_place(settings.place)
  if not settings.runtime_version:
    kind = generation(settings.type)
    if not kind:
      raise UsageError(
        f"--type {settings.type}: --runtime-version is needed; there is a default only for "
        f"{', '.join(_GENERATIONS)}."
      )
    settings = dataclasses.replace(settings, runtime_version=kind.runtime_version)
  if settings.slices < 1:
    raise UsageError(f"--slices {settings.slices} must be 1 or more.")
  if len(f"{settings.run}-{settings.slices - 1}") > 40 and settings.slices > 1:
    raise UsageError(
      f"The run name {settings.run} is too long for {settings.slices} slices, whose names append a "
      "number."
    )
  if settings.capacity in ("on-demand", "flex-start") and settings.max_seconds is None:
    raise UsageError(
      f"--{settings.capacity} needs --max-hours: how long slices of this run may exist, over "
      "all attempts."
    )
  if settings.keep and settings.max_seconds is None:
    raise UsageError("--keep needs --max-hours: a slice that is kept must end some day.")
  if settings.reservation and settings.capacity != "reserved":
    raise UsageError("--reservation needs --reserved.")
  if settings.autocheckpoint and settings.capacity == "spot":
    raise UsageError(
      "--autocheckpoint is for the maintenance of --on-demand and --reserved slices; when a --spot "
      "slice is preempted, the trainer saves without it."
    )
  for name, value, pattern in (
    ("runtime-version", settings.runtime_version, r"[-a-z0-9.]+"),
    ("service-account", settings.service_account, r"([^@\s,=]+@[^@\s,=]+)?"),
    ("reservation", settings.reservation, r"[-a-z0-9/._]*"),
    ("network", settings.network, r"[-a-z0-9/._]*"),
    ("subnetwork", settings.subnetwork, r"[-a-z0-9/._]*"),
    ("python", settings.python, r"(/[^\0\n]*)?"),
  ):
    if not re.fullmatch(pattern, value):
      raise UsageError(f"--{name} {value!r} is not valid.")
  for key, value in settings.labels:
    if not re.fullmatch(r"[a-z][a-z0-9_-]{0,62}", key) or label(value) != value:
      raise UsageError(f"--label {key}={value}: labels are at most 63 of a-z, 0-9, _ and -.")
    if key in ("run", "owner", "attempt", "launcher"):
      raise UsageError(f"--label {key} is set by the launcher itself.")
  for word in settings.argv:
    if not word.startswith("--"):
      raise UsageError(f"{word!r} is not a flag of the trainer; write --flag=value.")
  flags = [word.split("=")[0] for word in settings.argv]
  if "--config" not in flags:
    raise UsageError("The trainer needs --config=configs/X.py.")
  for word in settings.argv:
    if word.startswith("--workdir=") and not re.match(r"--workdir=(gs://|/)", word):
      raise UsageError(
        f"{word}: hosts need a bucket, or the absolute path of a folder that all of them mount."
      )
  if "--workdir" not in flags:
    settings = dataclasses.replace(
      settings, argv=(*settings.argv, f"--workdir={settings.place.url}/workdir")
    )
  return settings
