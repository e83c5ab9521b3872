"""Decoding processes that are replaced one by one when they are killed, hang or run out of memory.

Process i of n makes the tasks i, i + n, i + 2n, ... of a loader. Grain's own processes end the
iterator with the first that dies. A task is a pure function of its number, so the process that
replaces another makes what is due anew, and no batch changes.
"""

import collections
from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import multiprocessing
from multiprocessing import connection, util
import pickle
import signal
import time
import traceback
from typing import TYPE_CHECKING

from absl import logging
import cloudpickle
import grain

from input_pipeline.errors import InputLost
from input_pipeline.workers import processes, slots

if TYPE_CHECKING:
  from input_pipeline.rows import Made, Rows

_HOUR = 3600.0
_AHEAD = 1  # results of a process that wait to be fetched, beside the one that it is making
_END_SECONDS = 5.0  # how long to wait for a process that was killed
_FETCHED = b"1"  # sent to a process for each of its results


class Replacements:
  """How many processes of a host were replaced, and whether one more may be.

  Attributes:
    count: those so far.
  """

  def __init__(self, per_hour: int):
    """Allow so many within any hour."""
    self.count = 0
    self._per_hour = per_hour
    self._times: collections.deque[float] = collections.deque()

  def allow(self) -> bool:
    """Whether one more may be; it then counts."""
    now = time.monotonic()
    while self._times and now - self._times[0] > _HOUR:
      self._times.popleft()
    if len(self._times) >= self._per_hour:
      return False
    self._times.append(now)
    self.count += 1
    return True


@dataclasses.dataclass
class _Worker:
  """A process, the parent's end of its pipe, and the first task that was not taken from it."""

  process: multiprocessing.process.BaseProcess
  pipe: connection.Connection
  due: int


class Pool:
  """The results of `rows` for a range of tasks in their order, made by processes."""

  def __init__(
    self, rows: "Rows", tasks: range, ahead: int, timeout: float, replacements: Replacements
  ):
    """Start the processes.

    Args:
      rows: makes a task of its number; pickled to the processes.
      tasks: their numbers, one after the other.
      ahead: tasks that the threads of a process make ahead.
      timeout: seconds for which a result is waited for until its process counts as hung.
      replacements: how many processes may be replaced.
    """
    self._pickled, self._ahead = cloudpickle.dumps(rows), ahead
    self._slots = rows.slots
    self._threads = rows.threads
    self._tasks, self._timeout, self._replacements = tasks, timeout, replacements
    self._next = tasks.start
    self._context = multiprocessing.get_context("spawn")
    self._count = rows.workers
    self._workers: list[_Worker] = []
    # Before multiprocessing ends its daemons at exit by a signal that ours ignore.
    self._end = util.Finalize(self, _end, args=(self._workers,), exitpriority=1)
    for index in range(self._count):
      self._workers.append(self._start(index, tasks.start + index))

  def __iter__(self) -> "Iterator[Made]":
    return self

  def __next__(self) -> "Made":
    """Return the next result.

    Raises:
      StopIteration: after the last task.
      InputLost: too many processes had to be replaced.
      Exception: what `rows` raised.
    """
    if self._next >= self._tasks.stop:
      raise StopIteration
    index = (self._next - self._tasks.start) % self._count
    while True:
      worker = self._workers[index]
      trouble, result = _receive(worker, self._timeout)
      if not trouble:
        break
      self._replace(index, trouble)
    if isinstance(result, Exception):
      raise result
    assert result is not None  # as there is no trouble
    worker.due += self._count
    self._next += 1
    return result

  def close(self) -> None:
    """End the processes, whatever they are at; may be called twice."""
    self._end()

  def _start(self, index: int, due: int) -> _Worker:
    ours, theirs = self._context.Pipe()
    tasks = range(due, self._tasks.stop, self._count)
    process = self._context.Process(
      target=_work,
      args=(self._pickled, index, tasks, self._threads, self._ahead, theirs),
      name=f"decode-{index}",
      daemon=True,
    )
    process.start()
    theirs.close()  # so that ours ends with the process
    return _Worker(process, ours, due)

  def _replace(self, index: int, trouble: str) -> None:
    worker = self._workers[index]
    if not self._end.still_active():
      raise InputLost("The loader was closed.")
    _end([worker])
    what = f"decoding process {index} (pid {worker.process.pid}) {trouble}"
    if not self._replacements.allow():
      raise InputLost(
        f"A {what}, and config.data.worker_restarts allows no further one within the hour; if "
        "memory is short, lower config.data.workers or config.data.prefetch_batches."
      )
    logging.warning(
      "A %s. It is replaced, and makes what is due again; replaced so far: %d.",
      what,
      self._replacements.count,
    )
    if self._slots:
      self._slots.free(index)
    self._workers[index] = self._start(index, worker.due)


def _receive(worker: _Worker, timeout: float) -> "tuple[str, Made | Exception | None]":
  """Return what is wrong with a process, "" if nothing is, and its next result."""
  ready = connection.wait([worker.pipe, worker.process.sentinel], timeout)
  if not ready:
    return f"has made nothing for {timeout:g} s", None
  if worker.pipe in ready or worker.pipe.poll():
    try:
      result = worker.pipe.recv()
    except (EOFError, OSError):
      pass  # it has ended
    else:
      with contextlib.suppress(OSError):  # what came is whole, even if its process has ended
        worker.pipe.send_bytes(_FETCHED)
      return ("ran out of memory" if isinstance(result, MemoryError) else ""), result
  worker.process.join(_END_SECONDS)
  return _words(worker.process.exitcode), None


def _words(code: int | None) -> str:
  """Return how a process ended, by its exit code."""
  if code == -signal.SIGKILL:
    return "was killed by SIGKILL, as the system does where memory runs out"
  if code is not None and code < 0:
    return f"was killed by {signal.Signals(-code).name}"
  return f"ended with exit code {code}"


def _end(workers: Sequence[_Worker]) -> None:
  """Kill processes: they hold nothing that is worth an orderly end."""
  for worker in workers:
    worker.process.kill()
    worker.pipe.close()
  for worker in workers:
    worker.process.join(_END_SECONDS)


def _work(
  pickled: bytes,
  index: int,
  tasks: range,
  threads: int,
  ahead: int,
  pipe: connection.Connection,
) -> None:
  """Make tasks and send them to the parent, until the last or until the parent closes the pipe."""
  slots.set_worker(index)
  processes.follow_parent()
  results = _make(pickled, tasks, threads, ahead)
  free = _AHEAD
  try:
    for result in results:
      if free:
        free -= 1
      else:
        pipe.recv_bytes()
      pipe.send(result)
  except (EOFError, OSError):
    pass


def _make(pickled: bytes, tasks: range, threads: int, ahead: int) -> "Iterator[Made | Exception]":
  """Yield the results of tasks; an exception is the last."""
  try:
    rows = cloudpickle.loads(pickled)
    if tasks:
      numbers = grain.MapDataset.range(tasks.start, tasks.stop, tasks.step)
      yield from numbers.map(rows).to_iter_dataset(grain.ReadOptions(threads, ahead))
  except Exception as error:
    error.add_note(f"In a decoding process:\n{traceback.format_exc()}")
    try:
      pickle.loads(pickle.dumps(error))
    except Exception:  # an error of a library may hold anything
      error = RuntimeError(f"{type(error).__name__}: {error}")
    yield error
