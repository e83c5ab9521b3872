"""python -m launch.check_config --config=configs/X.py [--config.field=value ...]

Checks the config of a run as the trainer would, without training; `launch/tpu up` runs it in the
environment of the clone before it buys anything. Exit code 2 and one sentence if it is refused.
"""

import sys

from absl import flags

from trainer import command_line
from trainer.errors import DONE, FAILED, TrainerError

FLAGS = flags.FLAGS


def main(argv: list[str]) -> int:
  """Returns the exit code of trainer.errors."""
  try:
    if command_line.answered(argv, __doc__):
      return DONE
    command_line.parse(argv, "--config=configs/X.py")
    from trainer import config as config_lib  # imports JAX

    config_lib.validate(FLAGS.config)
  except TrainerError as error:
    print(error, file=sys.stderr)
    return FAILED
  return DONE


if __name__ == "__main__":
  sys.exit(main(sys.argv))
