"""How processes that decode behave when the one that started them is stopped or dies."""

import multiprocessing
import os
import signal
import threading


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
