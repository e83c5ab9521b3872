"""How many processes decode, and how they end with the process that started them."""

import multiprocessing
import os
import signal
import threading

# More would only take memory: at 600 images/s each, 32 feed eight chips of 2,000 images/s.
_MOST_WORKERS = 32
_MOST_THREADS = 16  # that decode in one process: each image holds the interpreter for a while


def choose(workers: int, threads: int) -> tuple[int, int]:
  """Return how many processes decode, and how many threads in each; -1 is chosen by the machine.

  Processes do not share an interpreter with the training loop, so on four cores or more there is
  one for each core but two. On fewer, up to two threads of the trainer decode. A process needs no
  threads: it decodes the next batch while the last one is fetched.
  """
  available = cores()
  if workers < 0:
    workers = min(available - 2, _MOST_WORKERS) if available >= 4 else 0
  if threads < 0:
    threads = 0 if workers else min(available, 2)
  return workers, threads


def choose_threads(threads: int) -> int:
  """Return how many threads decode where processes cannot; -1 is one for each core, at most 16."""
  return max(1, threads) if threads >= 0 else min(cores(), _MOST_THREADS)


def cores() -> int:
  """Return the number of cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):  # not on macOS
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def follow_parent() -> None:
  """Make this process ignore SIGINT and SIGTERM, and exit when its parent does.

  Ctrl-C, and the SIGTERM of a machine that shuts down, reach all processes of a job at once, but
  the parent needs its workers for an orderly end. If it is killed, it cannot stop them itself.
  """
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)

  def wait_for_parent() -> None:
    if parent := multiprocessing.parent_process():
      parent.join()
    os._exit(1)  # sys.exit would only end this thread

  threading.Thread(target=wait_for_parent, daemon=True).start()
