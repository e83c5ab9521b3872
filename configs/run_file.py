"""What is wrong with a run file or with the fields of a command line, in one sentence.

Every command with a --config answers from here, so that all of them answer alike.
"""

from collections.abc import Iterator, Sequence
import os
import re
import traceback
from typing import Any

import ml_collections

from configs import base, checks, recipes
from configs.fields import Field

# What a run file may raise: it is Python, and may also end the program.
RAISED = (Exception, SystemExit)

_KINDS = {bool: "True or False", int: "a whole number", float: "a number", tuple: "a tuple"}
_OWN_PACKAGES = os.path.join(os.path.dirname(__file__), "own_packages.py")
_UNKNOWN = re.compile(r"Unknown command line flag '(?P<name>[^']+)'")


def trouble(error: BaseException, argv: Sequence[str], flag: Any) -> str:
  """Return what is wrong with a command line, or with the run file that it names.

  Args:
    error: what parsing it, or loading the file, has raised; one of RAISED.
    argv: the command line, each flag in one word and the run file by its path.
    flag: the flag --config of `config_flags`.

  Raises:
    SystemExit: the error, if it is of own_packages.py, which has said why.
  """
  if isinstance(error, SystemExit):
    *_, last = traceback.extract_tb(error.__traceback__)
    if _same(last.filename, _OWN_PACKAGES):
      raise error
  words = [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]
  file, _, variant = words[-1].partition(":") if words else ("", "", "")
  if file and (where := _line_of(file, error)):
    known = recipes.variants_of(os.path.realpath(file))
    if variant and known and variant not in known:
      return f"{file} has no variant {variant!r}; there is {', '.join(known)}."
    return where
  if flag.value is not None and not isinstance(flag.value, ml_collections.ConfigDict):
    return f"{file}: get_config() returned {type(flag.value).__name__} instead of a ConfigDict."
  texts = [str(cause) for cause in _chain(error)]
  if any("get_config() missing" in text for text in texts):
    return f"{file} needs a variant, as in --config={file}:VARIANT."
  if any("get_config() takes" in text for text in texts):
    return f"{file} has no variants; give it without {f':{variant}'!r}."
  if any("'get_config'" in text or "is not callable" in text for text in texts):
    return f"{file} defines no function get_config."
  try:
    config = flag.parser.parse(words[-1]) if words else None
  except RAISED:  # `error` is of the file, whatever it is
    config = None
  if config is not None and (wrong := _wrong_field(argv, config)):
    return wrong
  # The last line says what is wrong; config_flags puts a whole trace in front of it.
  lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
  return f"Command line: {lines[-1]}{_meant(lines[-1])}"


def _meant(said: str) -> str:
  """Return the field that an unknown flag probably is, as the end of a sentence, or ""."""
  unknown = _UNKNOWN.search(said)
  if not unknown or "Did you mean" in said:
    return ""
  field = checks.nearest(unknown["name"].replace("-", "_"), base.all_fields("resnet"))
  return f"; did you mean --config.{field}?" if field else "; --help shows a typical line."


def _wrong_field(argv: Sequence[str], config: ml_collections.ConfigDict) -> str:
  """Return what is wrong with a --config.FIELD=VALUE of a command line, "" if nothing is.

  Args:
    argv: the command line.
    config: of the run file in it.
  """
  values, family = checks.flatten(config), config.model.name
  fields = base.all_fields(family)
  for argument in argv[1:]:
    if not (match := re.fullmatch(r"--?(?:no)?config\.([^=]*)(?:=(.*))?", argument, re.DOTALL)):
      continue
    name, text = match[1], match[2]
    if name not in values:
      inside = [field for field in values if field.startswith(f"{name}.")]
      if inside:
        first = f"{name}.name" if f"{name}.name" in inside else inside[0]
        return f"config.{name} is a section; set a field of it, as --config.{first}=VALUE."
      return f"config.{name} {checks.not_a_field(name, fields, family)}"
    if text is not None and name in fields and not _reads(text, fields[name]):
      kind = _KINDS.get(type(fields[name].default), "")
      return f"config.{name} must be {kind}; it is {text!r}."
  return ""


def _reads(text: str, field: Field) -> bool:
  """Whether the text of a flag is of the type of a field; those of tuples are left to absl."""
  kind = type(field.default)
  if kind is bool:
    return text.lower() in ("true", "t", "1", "false", "f", "0")
  try:
    return kind not in (int, float) or kind(text) is not None
  except ValueError:
    return False


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
