"""The command `python -m trainer.bench`; its code is in trainer/tools/bench.py."""

import sys

from trainer import command_line

if __name__ == "__main__" and not command_line.print_help_of("trainer.tools.bench", sys.argv):
  from trainer.tools import bench  # imports JAX

  bench.main()
