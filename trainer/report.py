"""The command `python -m trainer.report`; its code is in trainer/reporting/report.py."""

import sys

from trainer.reporting.report import main

if __name__ == "__main__":
  sys.exit(main())
