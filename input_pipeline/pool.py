"""The processes of `prepare`: they make shards in parallel and show how far they are."""

from concurrent import futures
from concurrent.futures import process
import contextlib
import multiprocessing
import sys
import time
from typing import Any, Iterator, Sequence

import tqdm

from input_pipeline import processes
from input_pipeline import shards
from input_pipeline.errors import DataError

_LINE_SECONDS = 10.0  # between lines of progress where there is no terminal

_counter = None  # in a worker: images done, shared by all of them


def _start_worker(counter: Any) -> None:
  """Sets a worker process up."""
  global _counter
  _counter = counter
  processes.follow_parent()


def _make_in_worker(task: shards.Task) -> tuple[dict[str, Any], bool]:
  def report(images: int) -> None:
    with _counter.get_lock():
      _counter.value += images

  return shards.make_shard(task, report)


class Pool:
  """Worker processes and the number of images they have done."""

  def __init__(self, workers: int):
    # Fresh interpreters: array_record has threads, and a fork would copy their locks without them.
    context = multiprocessing.get_context("spawn")
    self.counter = context.Value("q", 0)
    self.executor = futures.ProcessPoolExecutor(workers, context, _start_worker, (self.counter,))


@contextlib.contextmanager
def start(workers: int) -> Iterator[Pool | None]:
  """Yields a pool whose processes are gone afterwards, however it is left; None for one worker.

  Raises:
    DataError: a process was killed.
  """
  if workers == 1:
    yield None
    return
  before = set(multiprocessing.active_children())
  pool = Pool(workers)
  try:
    yield pool
    pool.executor.shutdown()
  except process.BrokenProcessPool as e:
    raise DataError(
      "a worker process was killed, for lack of memory as a rule; run the same command again with "
      "fewer --workers."
    ) from e
  finally:
    for child in set(multiprocessing.active_children()) - before:
      child.kill()
    pool.executor.shutdown(cancel_futures=True)


def make_all(tasks: Sequence[shards.Task], pool: Pool | None) -> dict[str, dict[str, Any]]:
  """Makes all shards and shows how far it is; returns their journals by file name."""
  results = {}
  with _Progress(sum(len(task.images) for task in tasks)) as progress:
    if pool is None:
      for task in tasks:
        results[task.file] = shards.make_shard(task, progress.add)
    else:
      waiting = {pool.executor.submit(_make_in_worker, task): task for task in tasks}
      while waiting:
        done, _ = futures.wait(waiting, timeout=1, return_when=futures.FIRST_COMPLETED)
        progress.add(pool.counter.value - progress.done)
        for future in done:
          results[waiting.pop(future).file] = future.result()
  kept = sum(was_there for _, was_there in results.values())
  if kept:
    print(f"kept {kept} finished shards, made {len(results) - kept}", flush=True)
  return {file: entry for file, (entry, _) in results.items()}


class _Progress:
  """A bar on a terminal, a line now and then elsewhere."""

  def __init__(self, total: int):
    self.done = 0
    self._total = total
    self._start = self._printed = time.monotonic()
    self._bar = (
      tqdm.tqdm(total=total, unit=" images", unit_scale=True) if sys.stderr.isatty() else None
    )

  def __enter__(self) -> "_Progress":
    return self

  def __exit__(self, *unused) -> None:
    if self._bar is not None:
      self._bar.close()

  def add(self, images: int) -> None:
    """Counts images and shows the count if it is time to."""
    self.done += images
    now = time.monotonic()
    if self._bar is not None:
      self._bar.update(images)
    elif self.done and now - self._printed > _LINE_SECONDS:
      self._printed = now
      rate = self.done / (now - self._start)
      print(
        f"{self.done:,} of {self._total:,} images, {rate:,.0f}/s, "
        f"{(self._total - self.done) / rate / 60:.0f} min left",
        flush=True,
      )
