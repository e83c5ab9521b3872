"""How many processes decode, and what they do when the one that started them stops or dies."""

import multiprocessing
import os
import signal
import threading

# More would only take memory: at 600 images a second each they feed eight chips of 2,000.
_MOST_WORKERS = 32
_MOST_THREADS = 16  # that decode in one process: each image needs the interpreter for a while


def choose(workers: int, threads: int) -> tuple[int, int]:
  """Returns how many processes decode and how many threads in each; a value of -1 is chosen here.

  Processes decode without sharing an interpreter with the training loop, so they are chosen where
  there are cores for it: all but two of four or more. With fewer, up to two threads of the trainer
  do it. A process needs no threads: it decodes the next batch while the last one is fetched.
  """
  available = cores()
  if workers < 0:
    workers = min(available - 2, _MOST_WORKERS) if available >= 4 else 0
  if threads < 0:
    threads = 0 if workers else min(available, 2)
  return workers, threads


def choose_threads(threads: int) -> int:
  """Returns how many threads decode what no other process can; -1 is one for each core."""
  return max(1, threads) if threads >= 0 else min(cores(), _MOST_THREADS)


def cores() -> int:
  """Returns the number of cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):  # not on macOS
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def follow_parent() -> None:
  """Makes this process leave signals to its parent and end when that ends, however it does.

  Ctrl-C, and the SIGTERM of a machine that shuts down, reach all processes of a job at once; the
  parent still needs its workers to end in good order. Killed outright, it cannot stop them itself.
  """
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)

  def wait_for_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)  # sys.exit would only end this thread

  threading.Thread(target=wait_for_parent, daemon=True).start()
