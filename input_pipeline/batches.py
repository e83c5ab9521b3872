"""Three ways to make the batches of a reader ahead of time: as tasks of Grain, in order, once."""

import collections
from collections.abc import Iterator
from concurrent import futures
import functools
import sys
import time
from typing import Protocol

from absl import flags
import grain
import numpy as np

from input_pipeline.rows import Made, Rows
from input_pipeline.workers import processes, slots
from input_pipeline.workers.threads import CLOSE_SECONDS, Threads

_SLOTS_IN_FLIGHT = 6  # tasks of a process being written, waiting to be fetched, and in use


class Batches(Protocol):
  """The batches of a host, in the order of their steps."""

  def __next__(self) -> Made:
    """Return the next batch and its notes; raise StopIteration after the last one."""

  def close(self) -> None:
    """Stop threads and processes; may be called twice."""


def start(rows: Rows, prefetch_batches: int) -> Batches:
  """Return the batches of `rows.reader`, which begin to be made when the first is asked for.

  Args:
    rows: makes them.
    prefetch_batches: batches that threads decode ahead, in each process.
  """
  if rows.reader.distinct:
    return _Repeated(rows, rows.reader.distinct)
  if rows.reader.in_order:
    return _InOrder(rows, prefetch_batches)
  return _in_tasks(rows, prefetch_batches)


class _Joined:
  """Batches whose parts were made by different tasks."""

  def __init__(self, tasks: Iterator[Made], rows: Rows):
    self._tasks = tasks
    self._rows = rows

  def __next__(self) -> Made:
    batch, notes = next(self._tasks)
    if self._rows.reader.parts == 1:
      return batch, notes
    parts = [batch]
    for _ in range(self._rows.reader.parts - 1):
      part, its_notes = next(self._tasks)
      parts.append(part)
      notes.add(its_notes)
    return {key: np.concatenate([part[key] for part in parts]) for key in batch}, notes

  def close(self) -> None:
    self._rows.reader.close()
    self._tasks.close()  # type: ignore[attr-defined]  # Grain's iterators have it


def _in_tasks(rows: Rows, prefetch_batches: int) -> _Joined:
  """Make batches as tasks of Grain, in any order, in threads or in processes."""
  steps, parts = rows.reader.steps, rows.reader.parts
  # A whole batch is a task, or a part of one for each process: no rows are copied together.
  tasks = grain.MapDataset.range(steps.start * parts, steps.stop * parts).map(rows)
  ahead = max(prefetch_batches, rows.threads) if rows.threads else 0
  batches = tasks.to_iter_dataset(grain.ReadOptions(rows.threads, ahead))
  if rows.workers:
    if sys.platform == "linux":  # elsewhere Grain hands batches over by its own, slower way
      rows.make_slots(ahead + _SLOTS_IN_FLIGHT)
    # Grain reads absl flags of its own when it starts processes, and fails outside of absl.app.run.
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=rows.workers, per_worker_buffer_size=1)
    batches = batches.mp_prefetch(options, worker_init_fn=_start_worker).map(rows.open)
  return _Joined(iter(batches), rows)


def _start_worker(index: int, count: int) -> None:
  """Set up a new decoding process, number `index` of `count`."""
  del count
  slots.set_worker(index)
  processes.follow_parent()


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
