"""The command `python -m trainer.mixed`; its code is in trainer/tools/mixed.py."""

import sys

from trainer.tools.mixed import main

if __name__ == "__main__":
  sys.exit(main(sys.argv))
