"""Records of a windowed order, read ahead of the steps that need them."""

from collections.abc import Callable
from concurrent import futures
import functools
import threading
import time

import numpy as np

from input_pipeline.errors import BadRecordError, DataError
from input_pipeline.order import Part, Run, WindowedOrder
from input_pipeline.workers.threads import CLOSE_SECONDS, Threads

Answer = bytes | BadRecordError  # a record, or what is wrong with it
Read = Callable[[Run], list[Answer]]


class _Window:
  """The records of some runs, requested but perhaps not here yet."""

  def __init__(self, runs: list[Run], answers: list[futures.Future[list[Answer]]]):
    self._runs = runs
    self._answers = answers
    self._ends = np.cumsum([run.count for run in runs])
    self.steps = 0  # planned and not finished

  def take(self, slots: np.ndarray) -> list[tuple[int, Answer]]:
    """Wait for the records in `slots`; return index and answer of each."""
    records = []
    places = np.searchsorted(self._ends, slots, side="right").tolist()
    for slot, place in zip(slots.tolist(), places, strict=True):
      run = self._runs[place]
      offset = slot - int(self._ends[place]) + run.count
      records.append((run.first + offset, self._answers[place].result()[offset]))
    return records


class ReadAhead:
  """The records of steps that are taken more or less in order. Thread-safe."""

  def __init__(
    self,
    read: Read,
    order: WindowedOrder,
    span: Callable[[int], tuple[int, int]],
    *,
    steps: range,
    ahead: int,
    requests: int,
  ):
    """Store the arguments; nothing is read before the first step is taken.

    Args:
      read: reads one run; called in threads.
      order: where the examples of a step come from.
      span: returns the number of the first example of a step that is wanted here, and the count.
      steps: those that will be taken.
      ahead: steps whose records are requested before they are needed.
      requests: runs that are read at the same time.
    """
    self._read = read
    self._order = order
    self._span = span
    self._next, self._end = steps.start, steps.stop  # to be planned
    self._ahead = ahead
    self._plans: dict[int, list[Part]] = {}
    self._windows: dict[tuple[int, ...], _Window] = {}
    self._lock = threading.Lock()
    self._threads = Threads(requests, "stream")

  def take(self, step: int) -> list[tuple[int, Answer]]:
    """Return the records of a step in the order of its rows, as (index, answer).

    Each step can be taken once.

    Raises:
      DataError: a shard is gone, has changed or cannot be reached.
    """
    try:
      return self._take(step)
    except futures.CancelledError as e:
      raise DataError("the loader was closed") from e

  def _take(self, step: int) -> list[tuple[int, Answer]]:
    with self._lock:
      while self._next <= min(step + self._ahead, self._end - 1):
        self._plans[self._next] = self._plan(self._next)
        self._next += 1
      plan = self._plans.pop(step)
      windows = [self._windows[key] for key, _ in plan]
    records = []
    for window, (_, slots) in zip(windows, plan, strict=True):
      records += window.take(slots)
    with self._lock:
      for key in {key for key, _ in plan}:
        self._windows[key].steps -= 1
        if not self._windows[key].steps:  # no later step needs it: steps use windows in turn
          del self._windows[key]
    return records

  def close(self) -> None:
    """Cancel what is not being read yet, and wait a few seconds at most for the rest."""
    self._threads.close()
    self._threads.join(time.monotonic() + CLOSE_SECONDS)

  def _plan(self, step: int) -> list[Part]:
    """Request the windows of a step that are not requested yet; return its parts."""
    plan = self._order.parts(*self._span(step))
    for key in dict.fromkeys(key for key, _ in plan):
      if key not in self._windows:
        runs = self._order.runs(key)
        answers = [self._threads.submit(functools.partial(self._read, run)) for run in runs]
        self._windows[key] = _Window(runs, answers)
      self._windows[key].steps += 1
    return plan
