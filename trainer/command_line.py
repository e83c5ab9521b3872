"""--config and its overrides, read the same way by every command that takes a run file."""

from collections.abc import Iterator
import os
import traceback
from typing import Any

from absl import flags
import ml_collections
from ml_collections import config_flags

from configs import trial
from trainer.errors import TrainerError

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file(
  "config", None, "Run file; single fields are set by --config.field=value."
)


flags.DEFINE_bool("trial", False, "Shrink the run file to a minute on a CPU; see configs/trial.py.")


def parse(argv: list[str], needed: str) -> None:
  """Parse the flags that are defined so far and load the config file.

  Args:
    argv: the command line, with the name of the program first.
    needed: flags that must be given, as in "--config=configs/X.py --workdir=DIR".

  Raises:
    TrainerError: with one sentence where a flag, the file or a field is wrong.
  """
  try:
    _, *rest = FLAGS(argv)
    if rest:
      raise flags.Error(f"{rest[0]!r} is no flag; did you mean --{rest[0].lstrip('-')}?")
    if not all(FLAGS[flag.split("=")[0].lstrip("-")].value for flag in needed.split()):
      raise flags.Error(f"{' and '.join(needed.split())} are needed")
    FLAGS.config.to_dict()  # config_flags reports a file that cannot be loaded at its first use
    if FLAGS.trial:
      trial.shrink(FLAGS.config)
      flag: Any = FLAGS["config"]
      for name, value in flag.override_values.items():
        FLAGS.config.update_from_flattened_dict({name: value})
  except Exception as error:  # a run file is Python, and may raise anything
    raise TrainerError(_in_words(error, argv)) from error


def _in_words(error: Exception, argv: list[str]) -> str:
  """Return what is wrong with the command line or with the run file that it names."""
  words = [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]
  file = words[-1].split(":")[0] if words else ""
  if file and (where := _line_of(file, error)):
    return where
  config = FLAGS["config"].value
  if config is not None and not isinstance(config, ml_collections.ConfigDict):
    return f"{file}: get_config() returned {type(config).__name__} instead of a ConfigDict."
  if "get_config" in str(error):
    return f"{file} defines no function get_config."
  # The last line says what is wrong; config_flags puts a whole trace in front of it.
  lines = [line for line in str(error).splitlines() if line.strip()]
  return f"Command line: {lines[-1].strip() if lines else repr(error)}"


def _line_of(file: str, error: BaseException) -> str:
  """Return the line of a run file that raised, and what; "" if the error is not of that file."""
  for cause in _chain(error):
    name = type(cause).__name__
    if isinstance(cause, SyntaxError) and _same(cause.filename, file):
      return f"{file} line {cause.lineno}: {name}: {cause.msg}"
    frames = [f for f in traceback.extract_tb(cause.__traceback__) if _same(f.filename, file)]
    if frames:
      return f"{file} line {frames[-1].lineno}: {name}: {cause}"
  return ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
  while error is not None:
    yield error
    error = error.__cause__ or error.__context__


def _same(one: str | None, other: str) -> bool:
  return one is not None and os.path.realpath(one) == os.path.realpath(other)


def name_of(argv: list[str]) -> str:
  """Return the run file of a command line by name, as in "imagenet_ffcv:rn18_16"."""
  word = next(word for word in argv if word.startswith("--config="))
  file, _, variant = word.removeprefix("--config=").partition(":")
  name = os.path.basename(file).removesuffix(".py")
  return f"{name}:{variant}" if variant else name


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
