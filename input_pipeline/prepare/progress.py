"""The progress of long work, on a terminal or in a log."""

import sys
import time
from typing import Self

import tqdm

_LINE_SECONDS = 10.0  # between lines where there is no terminal


class Progress:
  """A bar on a terminal, else a line every ten seconds."""

  def __init__(self, total: int, unit: str):
    """Start the clock.

    Args:
      total: how much there is to do.
      unit: of what, in the plural.
    """
    self.done = 0
    self._total, self._unit = total, unit
    self._start = self._printed = time.monotonic()
    self._bar = (
      tqdm.tqdm(total=total, unit=f" {unit}", unit_scale=True) if sys.stderr.isatty() else None
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused: object) -> None:
    if self._bar is not None:
      self._bar.close()

  def add(self, count: int) -> None:
    """Add to what is done, and show it if it is time to."""
    self.done += count
    now = time.monotonic()
    if self._bar is not None:
      self._bar.update(count)
    elif self.done and now - self._printed > _LINE_SECONDS:
      self._printed = now
      rate = self.done / (now - self._start)
      print(
        f"{self.done:,} of {self._total:,} {self._unit}, {rate:,.0f}/s, "
        f"{(self._total - self.done) / rate / 60:.0f} min left",
        flush=True,
      )
