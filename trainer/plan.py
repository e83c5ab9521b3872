"""The command `python -m trainer.plan`; its code is in trainer/tools/plan.py."""

import sys

from trainer import command_line

if __name__ == "__main__" and not command_line.print_help_of("trainer.tools.plan", sys.argv):
  from trainer.tools import plan  # imports JAX

  sys.exit(plan.main(sys.argv))
