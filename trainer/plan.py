"""The command `python -m trainer.plan`; its code is in trainer/tools/plan.py."""

import sys

from trainer.tools.plan import main

if __name__ == "__main__":
  sys.exit(main(sys.argv))
