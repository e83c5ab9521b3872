"""A stop that somebody asks for: SIGTERM of a preempted machine, or Ctrl-C."""

import signal
import sys


class StopRequest:
  """Remembers that a stop was asked for; the loop looks at it between steps, where the state is whole.

  Call it to ask. Ctrl-C after that ends the process at once: what the last checkpoint holds is safe in any case.
  """

  def __init__(self):
    self.reason: str | None = None

  def __call__(self) -> bool:
    return self.reason is not None

  def install(self) -> None:
    """Takes over SIGTERM and SIGINT of this process; call it on the main thread."""
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._on_signal)

  def _on_signal(self, number: int, frame: object) -> None:
    del frame
    if self.reason is None:
      self.reason = signal.Signals(number).name
      # A person who is impatient. Of SIGTERM a machine that is taken away, its guard and a launcher may each send one.
      signal.signal(signal.SIGINT, signal.SIG_DFL)
      # Not by logging: a handler may interrupt the logger while it holds its lock.
      sys.stderr.write(
        f"\n{self.reason}: stopping after this step and saving; Ctrl-C now ends at once.\n"
      )
