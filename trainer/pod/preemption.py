"""Requests to stop from outside: SIGTERM of a preempted machine, Ctrl-C, or a closed terminal."""

import signal
import sys


class StopRequest:
  """Whether a stop was requested; the loop calls it between steps, where the state is whole.

  Ctrl-C after the first request ends the process at once; the last checkpoint is safe in any case.

  Attributes:
    reason: name of the signal that came first, or None.
  """

  def __init__(self) -> None:
    self.reason: str | None = None

  def __call__(self) -> bool:
    return self.reason is not None

  def install(self) -> None:
    """Handle SIGTERM, SIGINT and SIGHUP of this process; call it on the main thread.

    SIGHUP stays ignored where it is, as under nohup.
    """
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
      signal.signal(signal.SIGINT, signal.SIG_DFL)
      # Not by logging: this handler may interrupt the logger while it holds its lock.
      sys.stderr.write(
        f"\n{self.reason}: stopping after this step and saving; Ctrl-C now ends at once.\n"
      )
