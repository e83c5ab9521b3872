"""python -m trainer.plan; see trainer/tools/plan.py."""

import sys

from trainer.tools.plan import main

if __name__ == "__main__":
  sys.exit(main(sys.argv))
