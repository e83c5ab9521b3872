"""Where the wall time of a run goes, over all the processes that it took."""

from collections.abc import Iterator
import contextlib
import time
from typing import Any


class WallClock:
  """Splits wall time into causes; every second of this process belongs to exactly one.

  `restore` brings back the clock of the checkpoint that a run goes on from, so the causes hold what still counts: the
  steps that an earlier process took after that checkpoint are done again, and their time is in none of them. `start`
  brings back when the run was first started. What has passed since then and is in no cause is the price of restarts:
  the time between two processes, the imports of the later one, and the work that is done again.
  """

  CAUSES = ("compile", "input_wait", "step", "eval", "checkpoint", "other")

  def __init__(self):
    self.seconds = dict.fromkeys(self.CAUSES, 0.0)
    self.starts = 1
    self._cause = "other"
    self._since = time.monotonic()
    self._first_start = time.time()  # not monotonic: the clock that machines share

  def switch(self, cause: str) -> str:
    """Counts time towards `cause` from now on, and returns the cause before."""
    now = time.monotonic()
    self.seconds[self._cause] += now - self._since
    before, self._cause, self._since = self._cause, cause, now
    return before

  @contextlib.contextmanager
  def __call__(self, cause: str) -> Iterator[None]:
    """Counts the body towards `cause`."""
    before = self.switch(cause)
    try:
      yield
    finally:
      self.switch(before)

  def read(self) -> dict[str, float]:
    """Returns seconds by cause, up to now."""
    self.switch(self._cause)
    return dict(self.seconds)

  def restore(self, seconds: dict[str, float]) -> None:
    """Adds what the clock held at the checkpoint that this process goes on from."""
    for cause, value in seconds.items():
      self.seconds[cause] += value

  def start(self, earlier: dict[str, Any] | None) -> dict[str, Any]:
    """Takes note of the earlier starts of this run.

    Args:
      earlier: what the process before was given by this function; None for the first.

    Returns:
      {'first_start': seconds since 1970, 'starts': number of processes with this one}, for the next process.
    """
    if earlier:
      self._first_start, self.starts = earlier["first_start"], earlier["starts"] + 1
    return {"first_start": self._first_start, "starts": self.starts}

  def since_first_start(self) -> dict[str, float]:
    """Returns seconds by cause, `restart` among them; they sum up to the time since the first start."""
    seconds = self.read()
    # Below 0 only by as much as the clocks of two machines differ.
    return seconds | {"restart": max(0.0, time.time() - self._first_start - sum(seconds.values()))}

  def goodput(self) -> float:
    """Returns the share of the time since the first start that went into steps that count."""
    seconds = self.since_first_start()
    total = sum(seconds.values())
    return seconds["step"] / total if total else 0.0


def format_seconds(seconds: float) -> str:
  """Return seconds in the two units that matter: '48.2 s', '12 min 5 s', '3 h 20 min'."""
  if seconds < 60:
    return f"{seconds:.1f} s"
  minutes = int(seconds // 60)
  if minutes < 60:
    return f"{minutes} min {int(seconds % 60)} s"
  return f"{minutes // 60} h {minutes % 60} min"
