"""The processes of `prepare`, which make shards in parallel, and their progress."""

from collections.abc import Iterator, Sequence
from concurrent import futures
from concurrent.futures import process
import contextlib
import multiprocessing
from typing import Any

from input_pipeline.errors import DataError
from input_pipeline.prepare import shards
from input_pipeline.prepare.progress import Progress
from input_pipeline.workers import processes

_counter: Any = None  # in a worker: images done, shared by all workers


def _start_worker(counter: Any) -> None:
  """Set up a worker process."""
  global _counter
  _counter = counter
  processes.follow_parent()


def _make_in_worker(task: shards.Task) -> tuple[dict[str, Any], bool]:
  def report(images: int) -> None:
    with _counter.get_lock():
      _counter.value += images

  return shards.make_shard(task, report)


class Pool:
  """Worker processes, and the number of images that they have finished."""

  def __init__(self, workers: int):
    # Not by fork: array_record has threads, whose locks a fork would copy in any state.
    context = multiprocessing.get_context("spawn")
    self.counter = context.Value("q", 0)
    self.executor = futures.ProcessPoolExecutor(workers, context, _start_worker, (self.counter,))


@contextlib.contextmanager
def start(workers: int) -> Iterator[Pool | None]:
  """Yield a pool whose processes are gone afterwards, whatever happens; None for one worker.

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
      "a worker process was killed, probably for lack of memory; run the same command again with "
      "fewer --workers."
    ) from e
  finally:
    for child in set(multiprocessing.active_children()) - before:
      child.kill()
    pool.executor.shutdown(cancel_futures=True)


def make_all(tasks: Sequence[shards.Task], pool: Pool | None) -> dict[str, dict[str, Any]]:
  """Make all shards, with progress; return their journals by file name."""
  results = {}
  with Progress(sum(len(task.images) for task in tasks), "images") as progress:
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
