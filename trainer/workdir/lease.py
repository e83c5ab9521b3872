"""One owner of a workdir at a time: WORKDIR/owner.json, held by process 0 and renewed.

Two runs that write to one folder remove each other's checkpoints. So a run takes the lease before
it reads or writes anything else there. A lease is free if there is none, if its process is known to
be gone (same machine), or if it was not renewed for `config.pod.lease_seconds` while this process
watched: no clock of another machine is believed.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from typing import Any, Protocol

from absl import logging
from etils import epath

from trainer.errors import WorkdirBusy
from trainer.workdir import storage

_POLL = 0.5  # seconds between two looks at the lease of another
_REQUEST_SECONDS = 10.0  # of a bucket, and for all pauses between its retries
_RENEWALS = 6  # within the time after which it is lost


class _Store(Protocol):
  """A small file that is created, replaced and removed only as it was last read."""

  def read(self) -> tuple[str, Any] | None:
    """Return its text and version, or None if there is none."""

  def create(self, text: str) -> bool:
    """Write it if there is none; whether this was so."""

  def replace(self, text: str, version: Any) -> bool:
    """Write it if it has this version; whether this was so."""

  def remove(self, version: Any) -> None:
    """Remove it if it has this version."""


class _Folder:
  """On a disk, local or shared: links and renames are atomic there.

  A mounted bucket has no links, nor has exFAT: a lock has to do.
  """

  def __init__(self, path: epath.Path):
    self._path = pathlib.Path(path)

  def read(self) -> tuple[str, Any] | None:
    try:
      text = self._path.read_text()
    except FileNotFoundError:
      return None
    return text, text

  def create(self, text: str) -> bool:
    own = self._beside(text)
    try:
      os.link(own, self._path)
    except FileExistsError:
      return False
    except OSError:  # no links here
      with self._locked():
        if self.read() is not None:
          return False
        own.replace(self._path)
    finally:
      own.unlink(missing_ok=True)
    return True

  def replace(self, text: str, version: Any) -> bool:
    with self._locked():
      if self.read() != (version, version):
        return False
      self._beside(text).replace(self._path)
      return True

  def remove(self, version: Any) -> None:
    with self._locked():
      if self.read() == (version, version):
        self._path.unlink()

  @contextlib.contextmanager
  def _locked(self) -> Iterator[None]:
    """Keep others from writing between a read and a write.

    Some shared mounts cannot lock a folder. There, of two that take over within a millisecond, the
    first finds the other's file at its next renewal, and ends.
    """
    folder = os.open(self._path.parent, os.O_RDONLY)
    try:
      with contextlib.suppress(OSError):
        fcntl.flock(folder, fcntl.LOCK_EX)
      yield
    finally:
      os.close(folder)

  def _beside(self, text: str) -> pathlib.Path:
    own = self._path.with_name(f"{self._path.name}.{secrets.token_hex(4)}")
    own.write_text(text)
    return own


class _Object:
  """In a bucket: every write names the generation that it replaces."""

  def __init__(self, path: epath.Path):
    from google.cloud import storage as gcs
    from google.cloud.storage import retry

    bucket, _, name = str(path).removeprefix("gs://").partition("/")
    self._blob = gcs.Client().bucket(bucket).blob(name)
    # The defaults are two minutes, for which the end of a run would wait where the bucket is gone.
    self._limits: dict[str, Any] = {
      "timeout": _REQUEST_SECONDS,
      "retry": retry.DEFAULT_RETRY.with_timeout(_REQUEST_SECONDS),
    }

  def read(self) -> tuple[str, Any] | None:
    from google.api_core import exceptions

    try:
      self._blob.reload(**self._limits)
      generation = self._blob.generation
      text = self._blob.download_as_text(if_generation_match=generation, **self._limits)
      return text, generation
    except (exceptions.NotFound, exceptions.PreconditionFailed):
      return None

  def create(self, text: str) -> bool:
    return self.replace(text, 0)

  def replace(self, text: str, version: Any) -> bool:
    from google.api_core import exceptions

    try:
      self._blob.upload_from_string(text, if_generation_match=version, **self._limits)
      return True
    except exceptions.PreconditionFailed:
      return False

  def remove(self, version: Any) -> None:
    from google.api_core import exceptions

    with contextlib.suppress(exceptions.NotFound, exceptions.PreconditionFailed):
      self._blob.delete(if_generation_match=version, **self._limits)


@dataclasses.dataclass
class Lease:
  """The lease of this process; `hold` makes one.

  Attributes:
    lost: why it is this run's no more, or "".
  """

  store: _Store
  owner: dict[str, Any]
  seconds: float
  lost: str = ""

  def __post_init__(self) -> None:
    self._done = threading.Event()
    self._lock, self._written = threading.Lock(), 0.0
    self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

  def check(self) -> None:
    """Raise if another run has taken the workdir, as it may after a long silence of this one.

    After such a silence, of a process or machine that was suspended, the storage is asked here: the
    thread that renews may come a moment too late.

    Raises:
      WorkdirBusy: naming the other.
    """
    if _now() - self._written > self.seconds:
      self._renew()
    if self.lost:
      raise WorkdirBusy(self.lost)

  def take(self, workdir: epath.Path) -> None:
    """Take the lease; wait for one whose owner may be gone.

    Raises:
      WorkdirBusy: if another process holds it and is alive.
    """
    until, first = time.monotonic() + self.seconds, None
    while True:
      found = self.store.read()
      if found is None:
        if self.store.create(self._text()):
          break
        continue
      text, version = found
      theirs = _parse(text)
      if theirs is None or _is_gone(theirs) or time.monotonic() > until:
        if self.store.replace(self._text(), version):
          logging.info("Taken over from %s, which is gone.", _words(theirs))
          break
        continue
      if first not in (None, text) or _is_here(theirs):
        raise WorkdirBusy(
          f"{workdir} is in use by {_words(theirs)}. Wait until it has ended, stop it, or give "
          "another --workdir."
        )
      if first is None:
        logging.info(
          "%s was in use by %s; waiting up to %.0f s for a sign of it.",
          workdir,
          _words(theirs),
          self.seconds,
        )
      first = text
      time.sleep(_POLL)
    self._written = _now()
    self._thread.start()

  def release(self) -> None:
    """Give the lease back, if it is still this run's."""
    self._done.set()
    self._thread.join()
    try:
      found = self.store.read()
      if found and self._is_own(found[0]):
        self.store.remove(found[1])
    except Exception as error:  # the next run takes it over after a while
      if not storage.is_failure(error):
        raise
      logging.warning("The lease could not be removed (%s).", storage.first_line(error))

  def _is_own(self, text: str) -> bool:
    owner = _parse(text)
    return owner is not None and owner["token"] == self.owner["token"]

  def _text(self) -> str:
    self.owner["renewed"] = time.time()
    return json.dumps(self.owner, indent=2) + "\n"

  def _keep(self) -> None:
    while not self.lost and not self._done.wait(self.seconds / _RENEWALS):
      self._renew()

  def _renew(self) -> None:
    with self._lock:
      asked = _now()
      try:
        found = self.store.read()
        if found and self._is_own(found[0]):
          renewed = self.store.replace(self._text(), found[1])
        else:
          renewed = found is None and self.store.create(self._text())
        if renewed:
          self._written = asked
        elif not found or not self._is_own(found[0]):
          theirs = _words(_parse(found[0])) if found else "another process"
          self.lost = f"This workdir was taken over by {theirs}; this run has to stop."
      except Exception as error:  # whatever the storage has, the next renewal may succeed
        logging.warning("The lease could not be renewed (%s).", storage.first_line(error))


@contextlib.contextmanager
def hold(path: epath.Path, workdir: epath.Path, seconds: float) -> Iterator[Lease]:
  """Hold the lease of a workdir for the body; on process 0 only.

  Args:
    path: of the file.
    workdir: for messages.
    seconds: after which a lease that is not renewed is lost.

  Raises:
    WorkdirBusy: if another process holds it.
    StorageError: if the storage fails.
  """
  try:
    store: _Store = _Object(path) if storage.in_bucket(path) else _Folder(path)
    lease = Lease(store, _owner(), seconds)
    lease.take(workdir)
  except Exception as error:
    if not storage.is_failure(error):
      raise
    raise storage.failed(f"{path} could not be written", error) from error
  try:
    yield lease
  finally:
    lease.release()


def _now() -> float:
  """Return seconds of a clock that is never set, and also runs while the machine is suspended."""
  return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _owner() -> dict[str, Any]:
  return {
    "token": secrets.token_hex(8),
    "host": socket.gethostname(),
    "machine": _machine(),
    "pid": os.getpid(),
    "started": _started(os.getpid()),
    "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
  }


def _machine() -> str:
  """Return what two processes share exactly if each can see whether the other is alive."""
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return ""


def _started(pid: int) -> str:
  """Return when a process of this machine started, in ticks since boot; "" if it is gone."""
  try:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
  except OSError:
    return ""
  return "" if fields[0] in "ZX" else fields[19]


def _is_here(owner: dict[str, Any]) -> bool:
  """Whether the owner is a process of this machine, dead or alive."""
  return bool(owner["machine"]) and owner["machine"] == _machine()


def _is_gone(owner: dict[str, Any]) -> bool:
  return _is_here(owner) and _started(owner["pid"]) != owner["started"]


def _parse(text: str) -> dict[str, Any] | None:
  """Return the owner that a file names; None if it is damaged."""
  try:
    owner = json.loads(text)
    whole = isinstance(owner["pid"], int) and all(
      isinstance(owner[key], str) for key in ("token", "host", "machine", "started")
    )
  except (ValueError, KeyError, TypeError):
    return None
  return owner if whole else None


def _words(owner: dict[str, Any] | None) -> str:
  if owner is None:
    return "an owner whose owner.json is damaged"
  return f"process {owner['pid']} of {owner['host']} since {owner.get('since')}"
