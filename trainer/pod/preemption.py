"""Requests to stop from outside: SIGTERM of a preempted machine, Ctrl-C, a closed terminal.

A program that calls `train` may request it as well, by its function `stop`. All mean the same.
"""

from collections.abc import Callable, Iterator
import contextlib
import signal
import sys
import threading

from trainer.errors import Preempted

_POLL_SECONDS = 0.25  # between two calls of a program's `stop`

_installed: "StopRequest | None" = None  # of this process


class _AtOnce(KeyboardInterrupt):
  """Raised by a handler; of this kind, because `asyncio` and others let it pass."""


class StopRequest:
  """Whether a stop was requested; the loop calls it between steps, where the state is whole.

  Ctrl-C after the first request ends the process at once; the last checkpoint is safe in any case.

  Attributes:
    reason: name of the signal that came first, "stop" after `ask`, or None.
    waits_for: returns what is under way, in words, which a stop waits for.
    handles: whether this process has its handlers.
    raises: whether a request raises in the main thread, see `at_once`.
  """

  def __init__(self) -> None:
    self.reason: str | None = None
    self.waits_for: Callable[[], str] = lambda: "this step"
    self.handles = self.raises = False
    self._lock = threading.Lock()  # not for handlers, which may interrupt the thread that holds it
    self._woken = self._signalled = False
    self._second: signal.Handlers | Callable[..., object] = signal.SIG_DFL
    self._answer = "ends at once"

  def __call__(self) -> bool:
    return self.reason is not None

  def install(self) -> None:
    """Handle SIGTERM, SIGINT and SIGHUP of this process; call it on the main thread.

    SIGHUP stays ignored where it is, as under nohup.
    """
    _install(self)
    self.handles = True
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._on_signal)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
      signal.signal(signal.SIGHUP, self._on_signal)

  def _on_signal(self, number: int, frame: object) -> None:
    del frame
    if self._woken:  # by `ask`
      self._woken = False
    elif self._signalled:
      return
    else:
      self._signalled = True
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
      self.raises = False  # what cleans up is left in peace
      raise _AtOnce

  def ask(self) -> None:
    """Request a stop, from any thread."""
    with self._lock:
      self.reason = self.reason or "stop"
      self._woken = self.raises
    if self._woken:  # a signal ends what the main thread waits for, also in C
      signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

  def begin_to_raise(self) -> bool:
    """Make requests raise from now on; return whether there was one before."""
    with self._lock:
      self.raises = True
      return self()


class _Interrupt(StopRequest):
  """Ctrl-C alone; the second raises KeyboardInterrupt."""

  def __init__(self) -> None:
    super().__init__()
    self._second, self._answer = signal.default_int_handler, "raises KeyboardInterrupt"

  def install(self) -> None:
    _install(self)
    self.handles = True
    signal.signal(signal.SIGINT, self._on_signal)


@contextlib.contextmanager
def interrupts(
  waits_for: Callable[[], str], stop: Callable[[], bool] = lambda: False
) -> Iterator[StopRequest]:
  """Take `stop` and Ctrl-C as requests to stop in the body.

  Ctrl-C only in the main thread and where the program has no handler of its own. A
  KeyboardInterrupt in the middle of the compiler or of a save would leave threads behind that bring
  the process down.

  Args:
    waits_for: returns what is under way, in words.
    stop: of the program; a thread calls it several times a second. A StopRequest is yielded as it
      is.
  """
  if isinstance(stop, StopRequest):
    yield stop
    return
  request = _Interrupt()
  request.waits_for = waits_for
  main = threading.current_thread() is threading.main_thread()
  if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    request.install()
  else:
    _install(request)
  over = threading.Event()
  thread = threading.Thread(target=_poll, args=(stop, request, over), name="stop", daemon=True)
  thread.start()
  try:
    yield request
  finally:
    over.set()
    thread.join(2 * _POLL_SECONDS)  # so that no signal of it comes later
    _install(None)
    if request.handles:
      signal.signal(signal.SIGINT, signal.default_int_handler)


def _poll(stop: Callable[[], bool], request: StopRequest, over: threading.Event) -> None:
  while not over.wait(_POLL_SECONDS):
    if stop():
      request.ask()
      return


def _install(request: StopRequest | None) -> None:
  global _installed
  _installed = request


def requested() -> bool:
  """Whether this process was asked to stop, by whatever means."""
  return _installed is not None and _installed()


@contextlib.contextmanager
def at_once(sentence: str) -> Iterator[None]:
  """End the body, wherever it is, when a stop is requested: there is nothing to save yet.

  What it waits for may never come: a data server, a bucket, the owner of the workdir.

  Args:
    sentence: of the error.

  Raises:
    Preempted: on this host alone; the others are to be notified.
  """
  request = _installed
  if (
    request is None
    or not request.handles
    or threading.current_thread() is not threading.main_thread()
  ):
    yield  # handlers run in the main thread, where they would end something else
    return
  try:
    try:
      if request.begin_to_raise():
        raise _AtOnce
      yield
    finally:  # inside: a request may raise up to here
      request.raises = False
  except _AtOnce:
    stopped = Preempted(sentence)
    stopped.agreed = False
    raise stopped from None
