"""Requests to stop from outside: SIGTERM of a preempted machine, Ctrl-C, or a closed terminal."""

from collections.abc import Callable, Iterator
import contextlib
import signal
import sys
import threading

from trainer.errors import Preempted

_installed: "StopRequest | None" = None  # whose handlers this process has


class _AtOnce(KeyboardInterrupt):
  """Raised by a handler; of this kind, because `asyncio` and others let it pass."""


class StopRequest:
  """Whether a stop was requested; the loop calls it between steps, where the state is whole.

  Ctrl-C after the first request ends the process at once; the last checkpoint is safe in any case.

  Attributes:
    reason: name of the signal that came first, or None.
    waits_for: returns what is under way, in words, which a stop waits for.
    raises: whether the first signal raises, see `at_once`.
  """

  def __init__(self) -> None:
    self.reason: str | None = None
    self.waits_for: Callable[[], str] = lambda: "this step"
    self.raises = False
    self._second: signal.Handlers | Callable[..., object] = signal.SIG_DFL
    self._answer = "ends at once"

  def __call__(self) -> bool:
    return self.reason is not None

  def install(self) -> None:
    """Handle SIGTERM, SIGINT and SIGHUP of this process; call it on the main thread.

    SIGHUP stays ignored where it is, as under nohup.
    """
    _install(self)
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._on_signal)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
      signal.signal(signal.SIGHUP, self._on_signal)

  def _on_signal(self, number: int, frame: object) -> None:
    del frame
    if self.reason is None:
      self.reason = signal.Signals(number).name
      # A second Ctrl-C is a person who will not wait. A second SIGTERM is not: a machine that is
      # taken away, its guard and a launcher may each send one.
      signal.signal(signal.SIGINT, self._second)
      # Not by logging: this handler may interrupt the logger while it holds its lock. On a terminal
      # it takes the place of the row that shows the progress.
      after = "at once" if self.raises else f"after {self.waits_for()} and saving"
      sys.stderr.write(
        ("\r\x1b[K" if sys.stderr.isatty() else "\n")
        + f"{self.reason}: stopping {after}; Ctrl-C now {self._answer}.\n"
      )
      if self.raises:
        raise _AtOnce


class _Interrupt(StopRequest):
  """Ctrl-C alone; the second raises KeyboardInterrupt."""

  def __init__(self) -> None:
    super().__init__()
    self._second, self._answer = signal.default_int_handler, "raises KeyboardInterrupt"

  def install(self) -> None:
    _install(self)
    signal.signal(signal.SIGINT, self._on_signal)


@contextlib.contextmanager
def interrupts(waits_for: Callable[[], str]) -> Iterator[StopRequest]:
  """Take Ctrl-C as a request to stop in the body, where the program has no handler of its own.

  A KeyboardInterrupt in the middle of the compiler or of a save would leave threads behind that
  bring the process down.

  Args:
    waits_for: returns what is under way, in words.
  """
  request = _Interrupt()
  request.waits_for = waits_for
  main = threading.current_thread() is threading.main_thread()
  if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
    yield request
    return
  request.install()
  try:
    yield request
  finally:
    _install(None)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _install(request: StopRequest | None) -> None:
  global _installed
  _installed = request


def requested() -> bool:
  """Whether a signal has asked this process to stop."""
  return _installed is not None and _installed()


@contextlib.contextmanager
def at_once(sentence: str) -> Iterator[None]:
  """End the body, wherever it is, when a signal asks for a stop: there is nothing to save yet.

  What it waits for may never come: a data server, a bucket, the owner of the workdir.

  Args:
    sentence: of the error.

  Raises:
    Preempted: on this host alone; the others are to be notified.
  """
  request = _installed
  if request is None or threading.current_thread() is not threading.main_thread():
    yield  # handlers run in the main thread, where they would end something else
    return
  try:
    request.raises = True
    if request():
      raise _AtOnce
    yield
  except _AtOnce:
    stopped = Preempted(sentence)
    stopped.agreed = False
    raise stopped from None
  finally:
    request.raises = False
