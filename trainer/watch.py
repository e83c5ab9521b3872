"""The command `python -m trainer.watch`; its code is in trainer/reporting/watch.py."""

import signal
import sys

from trainer import command_line

if __name__ == "__main__" and not command_line.print_help_of("trainer.reporting.watch", sys.argv):
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is written that could be left torn
  from trainer.reporting import watch  # imports JAX

  sys.exit(watch.main())
