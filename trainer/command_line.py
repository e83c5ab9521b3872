"""--config and its overrides, read the same way by every command that takes a run file."""

from absl import flags
from ml_collections import config_flags

from trainer.errors import TrainerError

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file(
  "config", None, "Run file; single fields are set by --config.field=value."
)


def parse(argv: list[str], needed: str) -> None:
  """Parse the flags that are defined so far and load the config file.

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
    FLAGS.config.to_dict()  # config_flags reports a file that cannot be loaded at its first use
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    # The last line says what is wrong; config_flags puts a whole trace in front of it.
    lines = [line for line in str(error).splitlines() if line.strip()]
    raise TrainerError(f"Command line: {lines[-1].strip() if lines else repr(error)}") from error


def help_wanted(argv: list[str]) -> str | None:
  """Return the word behind --help=, "" for a plain --help or -h, and None without any of them."""
  for argument in argv[1:]:
    name, _, word = argument.partition("=")
    if name in ("-h", "--help", "-help"):
      return word
  return None


def help_text(argv: list[str], usage: str, word: str) -> str:
  """Return the usage, and every field of the given config with its value, range and words.

  Args:
    argv: the command line; without --config the fields are those of `configs/base.py`.
    usage: of the program.
    word: only fields with this in their name or words.

  Raises:
    TrainerError: as `parse`.
  """
  from configs import base, page
  from trainer import config as config_lib  # imports JAX

  rest = [argument for argument in argv if help_wanted(["", argument]) is None]
  config = base.get_config()
  if any(argument.split("=")[0] == "--config" for argument in rest):
    parse(rest, "--config=configs/X.py")
    config = FLAGS.config
  fields = config_lib.fields_of(config)
  return f"{usage}\n\n{page.text(fields, config_lib.flatten(config), word)}"
