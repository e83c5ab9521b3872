"""--config and its overrides, read the same way by every command that takes a run file."""

from absl import flags
from ml_collections import config_flags

from trainer.errors import TrainerError

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file(
  "config", None, "Run file; single fields are set by --config.field=value."
)


def parse(argv: list[str], needed: str) -> None:
  """Parses the flags that are defined so far and loads the config file.

  Args:
    argv: the command line, with the name of the program first.
    needed: flags that must be given, as in "--config=configs/X.py --workdir=DIR".

  Raises:
    TrainerError: with one sentence where a flag, the file or a field is wrong.
  """
  try:
    FLAGS(argv)
    if not all(FLAGS[flag.split("=")[0].lstrip("-")].value for flag in needed.split()):
      raise flags.Error(f"{' and '.join(needed.split())} are needed")
    FLAGS.config.to_dict()  # config_flags tells of a file that cannot be loaded when it is first used
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    # The last line says what is wrong; config_flags puts a whole trace in front of it.
    lines = [line for line in str(error).splitlines() if line.strip()]
    raise TrainerError(f"Command line: {lines[-1].strip() if lines else repr(error)}") from error
