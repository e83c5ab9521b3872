"""Threads that read and decode ahead."""

from collections.abc import Callable
from concurrent import futures
import contextlib
import queue
import threading
import time
from typing import Any, TypeVar

T = TypeVar("T")

CLOSE_SECONDS = 5.0  # how long to wait at the end for threads that wait for a server


class Threads:
  """Threads that run tasks; unlike those of an executor they do not keep a process alive."""

  def __init__(self, count: int, name: str):
    self._tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    self._closed, self._lock = False, threading.Lock()
    self._threads = [
      threading.Thread(target=self._work, name=name, daemon=True) for _ in range(count)
    ]
    for thread in self._threads:
      thread.start()

  def _work(self) -> None:
    while task := self._tasks.get():
      future, call = task
      if future.set_running_or_notify_cancel():
        try:
          future.set_result(call())
        except BaseException as e:  # raised where the result is wanted
          future.set_exception(e)
      del task, future, call  # and with them the examples of a window

  def submit(self, call: Callable[[], T]) -> futures.Future[T]:
    """Return the future of a task; raise CancelledError if the threads are closed."""
    future: futures.Future[T] = futures.Future()
    with self._lock:
      if self._closed:
        raise futures.CancelledError
      self._tasks.put((future, call))
    return future

  def close(self) -> None:
    """Cancel tasks that have not begun; the threads end after those that have."""
    with self._lock:
      if self._closed:
        return
      self._closed = True
      with contextlib.suppress(queue.Empty):
        while True:
          self._tasks.get_nowait()[0].cancel()
      for _ in self._threads:
        self._tasks.put(None)

  def join(self, deadline: float) -> None:
    """Wait until `deadline` of the monotonic clock for the threads to end after `close`.

    A thread that returns from C++ while the interpreter exits would abort the process.
    """
    for thread in self._threads:
      thread.join(max(0.0, deadline - time.monotonic()))
