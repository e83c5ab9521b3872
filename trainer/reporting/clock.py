"""Where the wall time of a run goes, over all its processes."""

from collections.abc import Iterator, Mapping
import contextlib
import time
from typing import Any, ClassVar


class WallClock:
  """Splits wall time into causes; every second of this process belongs to exactly one.

  `restore` adds the clock of the checkpoint that the run resumes from. So the causes hold only time
  that still counts: steps that an earlier process took after that checkpoint are repeated, and
  their time is in no cause. `start` restores the time of the first start. Time since then that is
  in no cause is the cost of restarts: the pause between two processes, the imports of the later
  one, and the repeated work.
  """

  # Entries of what `start` returns.
  STARTS: ClassVar[Mapping[str, Any]] = {"first_start": (int, float), "starts": int}

  CAUSES = ("compile", "input_wait", "step", "eval", "checkpoint", "other")

  def __init__(self) -> None:
    self.seconds = dict.fromkeys(self.CAUSES, 0.0)
    self.starts = 1
    self.noted: dict[str, Any] | None = None  # what `start` returned
    self._cause = "other"
    self._since = time.monotonic()
    # By the clock of the day, which all machines share; it may be set while this process runs.
    self._first_start = time.time()
    self._offset = self._first_start - self._since

  def switch(self, cause: str) -> str:
    """Count time towards `cause` from now on, and return the cause before."""
    now = time.monotonic()
    self.seconds[self._cause] += now - self._since
    before, self._cause, self._since = self._cause, cause, now
    return before

  @contextlib.contextmanager
  def __call__(self, cause: str) -> Iterator[None]:
    """Count the body towards `cause`."""
    before = self.switch(cause)
    try:
      yield
    finally:
      self.switch(before)

  def read(self) -> dict[str, float]:
    """Return seconds by cause, up to now."""
    self.switch(self._cause)
    return dict(self.seconds)

  def restore(self, seconds: dict[str, float], noted: dict[str, Any] | None = None) -> None:
    """Take up the seconds by cause and the starts of the checkpoint that this process resumes from.

    Args:
      seconds: what `read` returned.
      noted: what `start` returned; None of a checkpoint that holds none.
    """
    self.noted = noted
    for cause, value in seconds.items():
      self.seconds[cause] += value

  def start(
    self, earlier: dict[str, Any] | None, step: int = 0, changes: Mapping[str, Any] | None = None
  ) -> dict[str, Any]:
    """Note this start beside the earlier ones of the run.

    Args:
      earlier: what this method returned in the process before. None in the first, and where it is
        lost; then that of the checkpoint counts.
      step: steps taken before it.
      changes: fields of the config that differ from the start before: {name: [before, now]}.

    Returns:
      {'first_start': seconds since 1970, 'starts': number of processes including this one,
      'history': [{'step', 'time', 'changes'}, ...] of each}.
    """
    earlier = earlier or self.noted
    now = self._first_start
    if earlier:
      self._first_start, self.starts = earlier["first_start"], earlier["starts"] + 1
    this: dict[str, Any] = {"step": step, "time": now}
    if changes:
      this["changes"] = changes
    self.noted = {
      "first_start": self._first_start,
      "starts": self.starts,
      "history": [*(earlier or {}).get("history", []), this],
    }
    return self.noted

  def since_first_start(self) -> dict[str, float]:
    """Return seconds by cause, with `restart`; they sum up to the time since the first start."""
    seconds = self.read()
    total = self._since + self._offset - self._first_start
    # Negative only by as much as the clocks of two machines differ.
    return seconds | {"restart": max(0.0, total - sum(seconds.values()))}

  def goodput(self) -> float:
    """Return the share of the time since the first start that went into steps that count."""
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
