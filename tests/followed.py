"""The output of a process, read as it comes."""

import re
import subprocess
import threading


class Followed:
  """Reads the output of a process in a thread.

  Attributes:
    log: all output so far.
    ended: whether it was closed.
  """

  def __init__(self, process: subprocess.Popen):
    self._process = process
    self.log, self.ended, self._lines = "", False, threading.Condition()
    threading.Thread(target=self._read, daemon=True).start()

  def _read(self) -> None:
    for line in self._process.stdout:
      with self._lines:
        self.log += line
        self._lines.notify_all()
    with self._lines:
      self.ended = True
      self._lines.notify_all()

  def wait_for(self, pattern: str, limit: float) -> None:
    """Returns when the log matches; fails at once if the output ends without it."""
    with self._lines:
      self._lines.wait_for(lambda: re.search(pattern, self.log) or self.ended, timeout=limit)
      assert re.search(pattern, self.log), (
        f"{pattern!r} did not come within {limit} s:\n{self.log[-5000:]}"
      )

  def wait(self, limit: float) -> int:
    """Returns the exit code; fails if there is none within `limit` seconds."""
    with self._lines:
      assert self._lines.wait_for(lambda: self.ended, timeout=limit), (
        f"no end within {limit} s:\n{self.log[-5000:]}"
      )
    return self._process.wait()
