"""Three ways to make the batches of a reader ahead of time: as tasks, in order, once."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
import functools
import sys
import time
from typing import Protocol

from absl import logging
import grain
import ml_collections
import numpy as np

from input_pipeline.errors import InputLost, Stopped
from input_pipeline.rows import Batch, Made, Rows
from input_pipeline.workers.pool import Pool, Replacements
from input_pipeline.workers.threads import CLOSE_SECONDS, Threads

# How long a batch is waited for once the process was asked to stop: of a machine that is taken away
# in half a minute, the rest is for the save.
STOP_SECONDS = 3.0
_POLL_SECONDS = 0.25
_SLOTS_IN_FLIGHT = 6  # tasks of a process being written, waiting to be fetched, and in use


class Batches(Protocol):
  """The batches of a host, in the order of their steps."""

  def __next__(self) -> Made:
    """Return the next batch and its notes; raise StopIteration after the last one."""

  def close(self) -> None:
    """Stop threads and processes; may be called twice."""


def start(rows: Rows, data: ml_collections.ConfigDict, replacements: Replacements) -> Batches:
  """Return the batches of `rows.reader`, which threads begin to make when the first is asked for.

  Args:
    rows: makes them.
    data: `config.data`.
    replacements: of decoding processes.
  """
  if rows.reader.distinct:
    return _Repeated(rows, rows.reader.distinct)
  # A read may take all of its own time before it is an error, which is not to be cut short.
  timeout = data.worker_timeout_seconds + data.stream_give_up_seconds
  if rows.reader.in_order:
    return _InTime(_InOrder(rows, data.prefetch_batches), timeout)
  if rows.workers:
    return _Joined(_pool(rows, data, timeout, replacements), rows)
  return _InTime(_Joined(_threads(rows, data), rows), timeout)


class _InTime:
  """Batches of threads, which unlike processes cannot be replaced when they hang."""

  def __init__(self, batches: Batches, timeout: float):
    self._batches, self._timeout = batches, timeout
    self._thread = Threads(1, "batches")

  def __next__(self) -> Made:
    future = self._thread.submit(self._batches.__next__)
    try:
      return future.result(self._timeout)
    except futures.TimeoutError:
      if future.done():  # an error of the batch itself
        raise
      raise InputLost(
        f"A thread that reads and decodes has made nothing for {self._timeout:g} s "
        "(config.data.worker_timeout_seconds + config.data.stream_give_up_seconds), as where a "
        "mounted folder no longer answers."
      ) from None

  def close(self) -> None:
    self._thread.close()
    self._batches.close()


class _Joined:
  """Batches whose parts were made by different tasks."""

  def __init__(self, tasks: Iterator[Made], rows: Rows):
    self._tasks = tasks
    self._rows = rows

  def __next__(self) -> Made:
    batch, notes = self._rows.open(next(self._tasks))
    if self._rows.reader.parts == 1:
      return batch, notes
    parts = [batch]
    for _ in range(self._rows.reader.parts - 1):
      part, its_notes = self._rows.open(next(self._tasks))
      parts.append(part)
      notes.add(its_notes)
    return {key: np.concatenate([part[key] for part in parts]) for key in batch}, notes

  def close(self) -> None:
    self._rows.reader.close()
    self._tasks.close()  # type: ignore[attr-defined]  # Grain's iterators have it, and Pool


def _tasks(rows: Rows) -> range:
  """A whole batch is a task, or a part of one for each process: no rows are copied together."""
  steps, parts = rows.reader.steps, rows.reader.parts
  return range(steps.start * parts, steps.stop * parts)


def _threads(rows: Rows, data: ml_collections.ConfigDict) -> Iterator[Made]:
  numbers, ahead = _tasks(rows), _ahead(rows, data)
  tasks = grain.MapDataset.range(numbers.start, numbers.stop).map(rows)
  return iter(tasks.to_iter_dataset(grain.ReadOptions(rows.threads, ahead)))


def _pool(
  rows: Rows, data: ml_collections.ConfigDict, timeout: float, replacements: Replacements
) -> Pool:
  ahead = _ahead(rows, data)
  if sys.platform == "linux":  # elsewhere arrays are sent by value, which is slower
    rows.make_slots(ahead + _SLOTS_IN_FLIGHT)
  return Pool(rows, _tasks(rows), ahead, timeout, replacements)


def _ahead(rows: Rows, data: ml_collections.ConfigDict) -> int:
  """Return how many tasks the threads of a process make ahead."""
  return max(data.prefetch_batches, rows.threads) if rows.threads else 0


class _InOrder:
  """Batches whose examples are taken step by step in this process, and decoded in threads."""

  def __init__(self, rows: Rows, prefetch_batches: int):
    self._rows = rows
    self._steps = iter(rows.reader.steps)
    self._ahead = max(prefetch_batches, rows.threads)
    self._threads = Threads(rows.threads, "decode")
    self._waiting: collections.deque[futures.Future[Made]] = collections.deque()

  def __next__(self) -> Made:
    while len(self._waiting) <= self._ahead:
      step = next(self._steps, None)
      if step is None:
        break
      examples = list(self._rows.reader.examples(step))
      make = functools.partial(self._rows.make, step, examples)
      self._waiting.append(self._threads.submit(make))
    if not self._waiting:
      raise StopIteration
    return self._waiting.popleft().result()

  def close(self) -> None:
    self._threads.close()
    self._rows.reader.close()
    self._threads.join(time.monotonic() + CLOSE_SECONDS)


class _Repeated:
  """The same few batches over and over, each of which is made once."""

  def __init__(self, rows: Rows, distinct: int):
    self._rows = rows
    self._distinct = distinct
    self._steps = iter(rows.reader.steps)
    self._last = rows.reader.steps.stop - 1
    self._made: dict[tuple[int, int], Made] = {}

  def __next__(self) -> Made:
    step = next(self._steps)
    # The last batch of an evaluation is one of its own: rows of it may be padding.
    number = step if step == self._last else step % self._distinct
    key = number, self._rows.size_at(step)
    if key not in self._made:
      examples = self._rows.reader.examples(number)
      self._made[key] = self._rows.make(number, examples, size=key[1])
    return self._made[key]

  def close(self) -> None:
    self._rows.reader.close()


def substituted(
  batches: Iterable[Batch],
  count: float,
  empty: Callable[[int], Batch],
  fail: Callable[[int, Exception], None],
  stop: Callable[[], bool] = lambda: False,
) -> Iterator[Batch]:
  """Yield batches; from one that fails on empty ones, so that this host can take part in steps.

  After a request to stop, a batch that does not come within `STOP_SECONDS` fails with `Stopped`.

  Args:
    batches: of this host.
    count: how many batches all hosts have.
    empty: returns an empty batch in place of one of this number.
    fail: called with the number of the batch that failed, and with the error.
    stop: whether the run is asked to stop; polled by the thread that waits for a batch.
  """
  number = 0
  thread, following = Threads(1, "input"), functools.partial(next, iter(batches), None)
  try:
    while (batch := _unless_stopped(thread.submit(following), stop)) is not None:
      yield batch
      number += 1
    return
  except Exception as error:  # of the input, of memory, of a library
    fail(number, error)
  finally:
    thread.close()
  while number < count:
    yield empty(number)
    number += 1


def _unless_stopped(future: futures.Future[Batch | None], stop: Callable[[], bool]) -> Batch | None:
  """Return a result; raise Stopped if it has not come within STOP_SECONDS of a request to stop."""
  waited = 0.0
  while not futures.wait([future], _POLL_SECONDS).done:
    waited += _POLL_SECONDS if stop() else 0.0
    if waited >= STOP_SECONDS:
      logging.warning("No batch has come for %g s; stopping without it.", STOP_SECONDS)
      raise Stopped
  return future.result()
