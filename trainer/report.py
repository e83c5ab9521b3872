"""python -m trainer.report: the command; its code is in trainer.reporting.report."""

import sys

from trainer.reporting.report import main

if __name__ == "__main__":
  sys.exit(main())
