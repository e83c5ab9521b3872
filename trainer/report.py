"""The command `python -m trainer.report`; its code is in trainer/reporting/report.py."""

import sys

from trainer import command_line

if __name__ == "__main__" and not command_line.print_help_of("trainer.reporting.report", sys.argv):
  from trainer.reporting import report  # imports JAX

  sys.exit(report.main())
