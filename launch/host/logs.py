"""The log of a trainer: its last line of progress, its last lines, and those that follow."""

from __future__ import annotations

import os
import pathlib
import re
import sys
import time

from launch.host.files import Json

_TAIL_BYTES = 1 << 16
_PROGRESS = re.compile(rb"step (\d+)/(\d+) [^\r\n]*")


def progress(log: pathlib.Path | None) -> Json:
  """Return the last line of progress in the end of a log."""
  none: Json = {"step": None, "total": None, "progress": None}
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


def tail(path: pathlib.Path, name: str, lines: int, follow: bool) -> None:
  """Print the last lines of a log, each after the name of its host.

  With `follow`, print all later ones too, until the process that asked is gone.
  """
  parent = os.getppid()
  with open(path, "rb") as log:
    log.seek(max(0, path.stat().st_size - max(_TAIL_BYTES, 200 * lines)))
    rest = log.read().splitlines(keepends=True)[-lines:]
    while True:
      for line in rest:
        sys.stdout.write(f"[{name}] {line.decode(errors='replace').rstrip()}\n")
      sys.stdout.flush()
      if not follow or os.getppid() != parent:
        return
      time.sleep(1)
      rest = log.read().splitlines(keepends=True)
