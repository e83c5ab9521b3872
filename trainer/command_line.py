"""--config and its overrides, --help, --list: the same for every command with a run file."""

import ast
from collections.abc import Mapping
import importlib.util
import os
import pathlib
import textwrap
from typing import Any

from absl import flags, logging
import ml_collections
from ml_collections import config_flags

from configs import base, checks, page, recipes, run_file, trial
from trainer.errors import TrainerError
from trainer.workdir import saved

FLAGS = flags.FLAGS
_typed: list[str] = []  # the command line that `parse` was given, where ml_collections finds fields
config_flags.DEFINE_config_file(
  "config", None, "Run file; single fields are set by --config.field=value.", sys_argv=_typed
)
flags.DEFINE_bool("trial", False, "Shrink the run file to a minute on a CPU; see configs/trial.py.")

# Pairs of which a config sets at most one: a flag that sets one takes the other back.
_EITHER = (
  *((f"{name}_epochs", f"{name}_steps") for name in base.DURATIONS),
  ("optimizer.lr_per_256", "optimizer.lr"),
)
_MORE = """\
--help --config=X    every field of that config with its value, range and words
--help=WORD          only the fields about a word, as --help=optimizer or --help=crop
--helpfull           this text and every field
--list               the configs that there are"""


def parse(argv: list[str], needed: str, by_workdir: bool = False) -> None:
  """Parse the flags that are defined so far and load the config file.

  Args:
    argv: the command line, with the name of the program first.
    needed: flags that must be given, as in "--config=configs/X.py --workdir=DIR".
    by_workdir: whether the config is that of --workdir where --config is not given.

  Raises:
    TrainerError: with one sentence where a flag, the file or a field is wrong.
  """
  FLAGS.mark_as_parsed()  # otherwise absl warns of every line that is logged before
  try:
    argv = recipes.with_paths(argv)
    if by_workdir and not any(_name(a) == "config" for a in argv[1:] if a.startswith("-")):
      argv = _with_saved(argv)
  except ValueError as error:
    raise TrainerError(str(error)) from error
  _typed[:] = argv
  try:
    _, *rest = FLAGS(argv)
    if rest:
      word = rest[0].lstrip("-")
      known = _name(word).split(".")[0] in FLAGS
      hint = f"did you mean --{word}?" if known else "--help shows a typical line."
      raise flags.Error(f"{rest[0]!r} is no flag; {hint}")
    missing = [flag for flag in needed.split() if not FLAGS[_name(flag)].value]
    if missing:
      are = "are" if len(missing) > 1 else "is"
      raise flags.Error(f"{' and '.join(missing)} {are} needed; --help shows a typical line.")
    if FLAGS.config is None:
      return
    FLAGS.config.to_dict()  # config_flags reports a file that cannot be loaded at its first use
    flag: Any = FLAGS["config"]
    if FLAGS.trial:
      trial.shrink(FLAGS.config)
      for name, value in flag.override_values.items():
        FLAGS.config.update_from_flattened_dict({name: value})
  except run_file.RAISED as error:
    raise TrainerError(run_file.trouble(error, argv, FLAGS["config"])) from error
  for line in give_way(FLAGS.config, flag.override_values):
    logging.info("%s", line)
  try:
    checks.check(FLAGS.config)
  except (AttributeError, ValueError) as error:
    raise TrainerError(str(error)) from error


def give_way(config: ml_collections.ConfigDict, given: Mapping[str, Any]) -> list[str]:
  """Take back what the run file sets where the command line sets the same in another unit.

  Args:
    config: with the fields of the command line; changed in place.
    given: fields of the command line by name.

  Returns:
    What was taken back, a line each.
  """
  lines = []
  for pair in _EITHER:
    for ours, other in (pair, pair[::-1]):
      if given.get(ours) and other not in given and (value := _get(config, other)):
        config.update_from_flattened_dict({other: type(value)(0)})
        lines.append(f"config.{other}={value:g} gives way to config.{ours}={given[ours]:g}.")
  total, warmup = given.get("total_steps"), config.optimizer.warmup_steps
  if total and "optimizer.warmup_steps" not in given and trial.cut_warmup(config, total):
    now = config.optimizer.warmup_steps
    lines.append(f"config.optimizer.warmup_steps={warmup} is cut to {now} of {total} steps.")
  return lines


def _get(config: ml_collections.ConfigDict, name: str) -> Any:
  section, _, leaf = name.rpartition(".")
  return (config[section] if section else config)[leaf]


def _name(flag: str) -> str:
  return flag.split("=")[0].lstrip("-")


def _with_saved(argv: list[str]) -> list[str]:
  """Return a command line with the config of its --workdir, if it has one.

  Raises:
    ValueError: the folder holds none; one sentence.
  """
  words = [a.partition("=")[2] for a in argv[1:] if a.startswith("-") and _name(a) == "workdir"]
  if not words or not words[-1]:
    return argv
  saved.get_config(words[-1])  # its own sentence, not that of a run file that fails
  return [argv[0], f"--config={saved.__file__}:{words[-1]}", *argv[1:]]


def name_of(argv: list[str]) -> str:
  """Return the run file of a command line by name, as in "imagenet_ffcv:rn18_16"."""
  word = next(word for word in recipes.joined(argv) if word.startswith("--config="))
  file, _, variant = word.removeprefix("--config=").partition(":")
  name = os.path.basename(file).removesuffix(".py")
  return f"{name}:{variant}" if variant else name


def answered(argv: list[str], usage: str | None) -> bool:
  """Answer --help, -h, --helpfull, --help=WORD and --list; return whether one of them was given.

  Args:
    argv: the command line.
    usage: of the program.

  Raises:
    TrainerError: as `parse`, or if no field is about the word.
  """
  argv = recipes.joined(argv)
  given = [argument.partition("=") for argument in argv[1:]]
  names = {name.lstrip("-") for name, _, _ in given if name.startswith("-")}
  if "list" in names:
    print(recipes.listing())
    return True
  if not names & {"h", "help", "helpfull"}:
    return False
  word = next((word for name, _, word in given if name in ("-h", "--help", "-help")), "")
  rest = [a for a in argv if a.partition("=")[0].lstrip("-") not in ("h", "help", "helpfull")]
  with_config = "config" in names
  text = textwrap.dedent(usage or "").strip()
  print(f"{text}\n\n{_MORE}" if not word else "", end="")
  if word or with_config or "helpfull" in names:
    print(f"\n\n{_fields(rest if with_config else None, word)}".lstrip("\n" if word else ""))
  else:
    print()
  return True


def _fields(argv: list[str] | None, word: str) -> str:
  """Return the fields of the config of a command line, or of configs/base.py, about a word."""
  config = base.get_config()
  if argv is not None:
    parse(argv, "--config=configs/X.py")
    config = FLAGS.config
  text = page.text(base.all_fields(config.model.name), checks.flatten(config), word)
  if not text:
    raise TrainerError(f"No field of the config has {word!r} in its name or words.")
  return text


def print_help_of(module: str, argv: list[str]) -> bool:
  """Print the docstring of a module, without importing it, if --help is all that was asked.

  Returns:
    Whether it was.
  """
  if argv[1:] not in (["-h"], ["--help"], ["--helpfull"]):
    return False
  spec = importlib.util.find_spec(module)
  assert spec and spec.origin
  print(ast.get_docstring(ast.parse(pathlib.Path(spec.origin).read_text())))
  return True
