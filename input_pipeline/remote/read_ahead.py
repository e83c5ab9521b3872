"""Reads the records of an order ahead of the steps that need them."""

from collections.abc import Callable
from concurrent import futures
import functools
import threading
import time

import numpy as np

from input_pipeline.errors import BadRecordError, DataError
from input_pipeline.order import Run, WindowedOrder
from input_pipeline.workers.threads import CLOSE_SECONDS, Threads

Read = Callable[[Run], list[bytes | BadRecordError]]


class _Window:
  """The records of some runs, which are on their way."""

  def __init__(self, runs: list[Run], answers: list[futures.Future]):
    self._runs = runs
    self._answers = answers
    self._ends = np.cumsum([run.count for run in runs])
    self.steps = 0  # that are planned and not done

  def take(self, slots: np.ndarray) -> list[tuple[int, bytes | BadRecordError]]:
    """Waits for the records in `slots`; returns the index of each, and its bytes or what is wrong."""
    records = []
    places = np.searchsorted(self._ends, slots, side="right").tolist()
    for slot, place in zip(slots.tolist(), places, strict=True):
      run = self._runs[place]
      offset = slot - int(self._ends[place]) + run.count
      records.append((run.first + offset, self._answers[place].result()[offset]))
    return records


class ReadAhead:
  """Hands out the records of steps that are asked for more or less in order. Thread-safe."""

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
    """Reads nothing before the first step is asked for.

    Args:
      read: reads one run; called in threads.
      order: where the examples of a step come from.
      span: returns the number of the first example of a step that is wanted here, and how many.
      steps: those that will be asked for.
      ahead: steps whose records are asked for before they are needed.
      requests: runs that are read at the same time.
    """
    self._read = read
    self._order = order
    self._span = span
    self._next, self._end = steps.start, steps.stop  # to be planned
    self._ahead = ahead
    self._plans: dict[int, list[tuple[tuple[int, ...], np.ndarray]]] = {}
    self._windows: dict[tuple[int, ...], _Window] = {}
    self._lock = threading.Lock()
    self._threads = Threads(requests, "stream")

  def take(self, step: int) -> list[tuple[int, bytes | BadRecordError]]:
    """Returns the records of a step in the order of its rows: index, and bytes or what is wrong.

    Each step can be taken once.

    Raises:
      DataError: a shard is gone, has changed or cannot be reached.
    """
    try:
      return self._take(step)
    except futures.CancelledError as e:
      raise DataError("the loader was closed") from e

  def _take(self, step: int) -> list[tuple[int, bytes | BadRecordError]]:
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
        if not self._windows[key].steps:  # steps take windows in turn: no later one wants it
          del self._windows[key]
    return records

  def close(self) -> None:
    """Gives up what is not read yet, and waits for the rest, but not for long."""
    self._threads.close()
    self._threads.join(time.monotonic() + CLOSE_SECONDS)

  def _plan(self, step: int) -> list[tuple[tuple[int, ...], np.ndarray]]:
    plan = self._order.parts(*self._span(step))
    for key in {key: None for key, _ in plan}:
      if key not in self._windows:
        runs = self._order.runs(key)
        answers = [self._threads.submit(functools.partial(self._read, run)) for run in runs]
        self._windows[key] = _Window(runs, answers)
      self._windows[key].steps += 1
    return plan
