"""The command `python -m trainer.mixed`; its code is in trainer/tools/mixed.py."""

import sys

from trainer import command_line

if __name__ == "__main__" and not command_line.print_help_of("trainer.tools.mixed", sys.argv):
  from trainer.tools import mixed  # imports JAX

  sys.exit(mixed.main(sys.argv))
