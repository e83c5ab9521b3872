"""The startup script of a slice: its limits and its guard, which hosts start at every boot."""

from __future__ import annotations

import base64
import gzip
import json
import pathlib
import shlex
import textwrap
from typing import Any

from launch.cloud import bundle
from launch.cloud.settings import Settings
from launch.cloud.world import Memory

_TEMPLATE = bundle.ROOT / "launch" / "host" / "boot.sh"
_MAX_BYTES = 256 << 10  # of one value of the metadata


def limits(settings: Settings, memory: Memory) -> dict[str, Any]:
  """Returns the limits of the newest slice, read by launch/host/guard.py; durations in seconds.

  `max_seconds` counts from the creation of the slice by the clock of the cloud; after
  `resume_seconds` without a launcher the guard itself starts the next attempt.
  """
  left = None
  if settings.max_seconds is not None:
    left = max(0.0, settings.max_seconds - memory.seconds_before())
  return {
    "max_seconds": left,
    "idle": None if settings.keep else settings.idle,
    "save_seconds": settings.save_seconds,
    "resume_seconds": max(3 * settings.poll, min(300.0, settings.idle / 4)),
  }


def request(settings: Settings, memory: Memory) -> dict[str, Any]:
  """Returns what the guard of the newest slice needs, its limits included."""
  place = settings.place
  return limits(settings, memory) | {
    "run": place.run,
    "project": place.project,
    "zone": place.zone,
    "slices": settings.slices,
    "request": memory.request,
  }


def script(settings: Settings, memory: Memory) -> str:
  """Returns the startup script of the next slice."""
  agent = base64.b64encode(gzip.compress(bundle.agent(), mtime=0)).decode()
  words = [settings.run, settings.place.url, f"agent-{bundle.agent_sha()[:12]}.pyz"]
  lines = [
    _TEMPLATE.read_text(),
    f"boot {shlex.join(words)} <<'END'",
    json.dumps(request(settings, memory)),
    *textwrap.wrap(agent, 76),
    "END",
  ]
  text = "\n".join(lines) + "\n"
  assert len(text) < _MAX_BYTES
  return text


def write(settings: Settings, memory: Memory, folder: pathlib.Path) -> pathlib.Path:
  """Write the startup script of the next slice into a folder."""
  path = folder / "boot.sh"
  path.write_text(script(settings, memory))
  return path
