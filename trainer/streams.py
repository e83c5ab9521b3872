"""Standard streams that never end a run: closed ones, full disks, pipes whose reader is gone."""

import io
import os
import sys


class _Stream(io.TextIOWrapper):
  """A text stream that drops what cannot be written, from the first failure on."""

  def write(self, text: str, /) -> int:
    """Write text, or drop it."""
    try:
      return super().write(text)
    except (OSError, ValueError):
      self._drop()
      return len(text)

  def flush(self) -> None:
    """Flush, or drop what is buffered."""
    try:
      super().flush()
    except (OSError, ValueError):
      self._drop()

  def _drop(self) -> None:
    """Point the file descriptor nowhere, for libraries that write to it by themselves as well."""
    if not self.closed:
      _point_nowhere(self.fileno())
      super().flush()


def protect() -> None:
  """Make all three standard streams of this process harmless; before anything else opens a file.

  A closed one would lend its number to the next file that is opened, which libraries would then
  print into. What they print to standard output by themselves, as Gloo does for every pair of
  hosts, goes nowhere: only what Python prints is of this program.
  """
  for descriptor in range(3):
    try:
      os.fstat(descriptor)
    except OSError:
      _point_nowhere(descriptor)
  for name, descriptor in (("stdout", 1), ("stderr", 2)):
    stream = getattr(sys, name)
    if stream is None:  # it was closed when Python started
      stream = os.fdopen(descriptor, "w", encoding="utf-8", closefd=False)
    if descriptor == 1:
      encoding, buffered = stream.encoding, not stream.line_buffering
      stream.flush()
      stream = os.fdopen(os.dup(1), "w", encoding=encoding, buffering=-1 if buffered else 1)
      _point_nowhere(1)
    setattr(
      sys,
      name,
      _Stream(
        stream.detach(),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=descriptor == 2 or stream.line_buffering,
      ),
    )


def _point_nowhere(descriptor: int) -> None:
  nowhere = os.open(os.devnull, os.O_RDWR)
  if nowhere != descriptor:
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
