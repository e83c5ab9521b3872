"""How long the slice has existed, and how long it has been idle, whatever the host's clock shows.

Both are counted by the kernel's clock since boot and saved every few seconds, so they survive a
kill, a reboot, and any setting of the time. The cloud's own figure corrects the age where it can be
read.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import time

from launch.host.files import read_json, write_json
from launch.host.google import Api, ApiError

# When the machine was booted, by its kernel's clock: set only where machines are folders.
FAKE_BOOT = "TPU_FAKE_BOOT"
_CORRECT_SECONDS = 600.0
_RETRY_SECONDS = 60.0


def boottime() -> float:
  """Return the seconds since boot, suspension included."""
  return time.clock_gettime(time.CLOCK_BOOTTIME) - float(os.environ.get(FAKE_BOOT, 0))


class Meter:
  """Counts both; `age` and `idle` are seconds."""

  def __init__(self, path: pathlib.Path, boot: str):
    self._path, self._boot = path, boot
    self._at = boottime()
    self._correct_at = 0.0
    self._corrected: tuple[float, float] | None = None  # (age, when)
    saved = read_json(path)
    if saved is None:  # the machine is at least as old as its first boot
      self.age, self.idle = self._at, 0.0
    elif saved["boot"] == boot:
      passed = max(0.0, self._at - saved["at"])
      self.age, self.idle = saved["age"] + passed, saved["idle"] + passed
    else:  # the time that the reboot took is known to the cloud only
      self.age, self.idle = saved["age"] + self._at, saved["idle"] + self._at

  def count(self, busy: bool) -> None:
    """Add the time since the last call, and save; busy time is not idle."""
    now = boottime()
    passed, self._at = max(0.0, now - self._at), now
    corrected, self._corrected = self._corrected, None
    self.age = corrected[0] + now - corrected[1] if corrected else self.age + passed
    self.idle = 0.0 if busy else self.idle + passed
    saved = {"boot": self._boot, "at": now, "age": self.age, "idle": self.idle}
    with contextlib.suppress(OSError):  # a full disk stops no clock
      write_json(self._path, saved)

  def correct(self, api: Api, node: str) -> None:
    """Read the age from the cloud now and then, for the next `count`; from any thread."""
    if boottime() < self._correct_at:
      return
    try:
      self._corrected = api.age(node), boottime()
      self._correct_at = boottime() + _CORRECT_SECONDS
    except ApiError:
      self._correct_at = boottime() + _RETRY_SECONDS
