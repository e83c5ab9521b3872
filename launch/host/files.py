"""Files that processes of a host share: whole JSON, and locks that end with their process."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import fcntl
import json
import os
import pathlib
import time
from typing import Any, Dict

Json = Dict[str, Any]  # what a JSON object holds


def read_json(path: pathlib.Path) -> Json | None:
  """Return the object in a file, or None where there is none: a hard reboot may empty files."""
  try:
    value = json.loads(path.read_text())
  except (FileNotFoundError, ValueError):
    return None
  return value if isinstance(value, dict) else None


def write_json(path: pathlib.Path, value: Json) -> None:
  """Write an object so that a reader finds either the old or the new one."""
  partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
  partial.write_text(json.dumps(value) + "\n")
  partial.replace(path)


@contextlib.contextmanager
def locked(path: pathlib.Path, seconds: float, kind: int = fcntl.LOCK_EX) -> Iterator[int]:
  """Hold a lock that ends with the process; TimeoutError if another process holds it for longer."""
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
  """Whether no process holds a lock."""
  try:
    with locked(path, 0, fcntl.LOCK_SH):  # shared: two processes that ask do not block each other
      return True
  except TimeoutError:
    return False
