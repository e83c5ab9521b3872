"""Choices by name: an entry of a table, or `package.module:attribute` from elsewhere.

And the order of names with numbers in them.
"""

import ast
from collections.abc import Callable, Mapping
import difflib
import functools
import importlib
import inspect
import re
import traceback
from typing import Any

_CALL = re.compile(r"\s*(?P<name>[\w.:]+)\s*(\((?P<arguments>.*)\))?\s*", re.DOTALL)


def find(table: Mapping[str, Any], name: str, field: str) -> Any:
  """Return what a name stands for.

  Args:
    table: entries by name. An entry "module:attribute" is imported when it is asked for.
    name: a key of the table, or "package.module:attribute" of an object that can be imported.
    field: config field that holds the name, for the message.

  Raises:
    ValueError: one sentence with the field, the name and what there is.
  """
  entry = table.get(name, name)
  if not isinstance(entry, str):
    return entry
  module, _, attribute = entry.partition(":")
  if not attribute:
    raise ValueError(f"{field} is {name!r}; {_there_is(table, name)}")
  try:
    return getattr(importlib.import_module(module), attribute)
  except (Exception, SystemExit) as error:  # a module from elsewhere may raise anything
    raise ValueError(f"{field} is {name!r}, which cannot be imported: {_said(error)}.") from error


def _said(error: BaseException) -> str:
  """Return what an import has raised, in one line; of the code of a module with the line of it."""
  text = " ".join(str(error).split()).rstrip(".")
  if isinstance(error, SyntaxError):
    return f"{error.filename} line {error.lineno}: {type(error).__name__}: {error.msg}"
  frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is ours
  own = [frame for frame in frames if "importlib" not in frame.filename]
  if not own:
    return text
  return f"{own[-1].filename} line {own[-1].lineno}: {type(error).__name__}: {text}"


def find_calls(
  table: Mapping[str, Callable[..., Any]], text: str, field: str
) -> list[functools.partial[Any]]:
  """Return the functions of a chain such as "mixup(alpha=0.2)|erase(p=0.25)", with arguments bound.

  Args:
    table: functions by name. What a config may set are their keyword-only parameters.
    text: names joined by `|`, each with keyword arguments that are Python literals; "" is no chain.
    field: config field that holds the text, for the message.

  Raises:
    ValueError: one sentence, if a function or an argument is unknown, missing or no literal.
  """
  return [_bind(table, part, field) for part in _parts(text)]


def counted(number: int, noun: str) -> str:
  """Return a number and its noun: "1 class", "1,024 classes"."""
  plural = "" if number == 1 else "es" if noun.endswith("s") else "s"
  return f"{number:,} {noun}{plural}"


def natural(name: str) -> list[tuple[int, str]]:
  """Return a key that sorts names as a person counts: layer3.2 before layer3.10."""
  # Of very long numbers the first nine digits, in case that a name from outside has thousands.
  return [(int(part[:9]) if part.isdecimal() else 0, part) for part in re.split(r"([0-9]+)", name)]


def _bind(table: Mapping[str, Any], part: str, field: str) -> functools.partial[Any]:
  match = _CALL.fullmatch(part)
  if not match:
    raise ValueError(f"{field} holds {part.strip()!r}, which is not NAME(ARGUMENT=VALUE, ...).")
  name = match["name"]
  function = find(table, name, field)
  parameters = {
    parameter.name: parameter.default is parameter.empty
    for parameter in inspect.signature(function).parameters.values()
    if parameter.kind is parameter.KEYWORD_ONLY
  }
  try:
    call = ast.parse(f"f({match['arguments'] or ''})", mode="eval").body
    if not isinstance(call, ast.Call) or call.args:
      raise ValueError("arguments are given by name")
    arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
  except (SyntaxError, ValueError) as error:
    raise ValueError(
      f"{field}: the arguments of {part.strip()} cannot be read ({error}); "
      "write them as NAME(ARGUMENT=VALUE, ...), each value a number, a string or a tuple."
    ) from error
  for argument in arguments:
    if argument not in parameters:
      raise ValueError(
        f"{field}: {name} has no argument {argument!r}; {_there_is(parameters, argument)}"
      )
  missing = [name for name, required in parameters.items() if required and name not in arguments]
  if missing:
    raise ValueError(f"{field}: {name} needs a value of {' and '.join(missing)}.")
  return functools.partial(function, **arguments)


def _parts(text: str) -> list[str]:
  """Return the parts between those `|` that stand outside of brackets."""
  parts, depth = [""], 0
  for character in text:
    depth += (character in "([{") - (character in ")]}")
    if character == "|" and not depth:
      parts.append("")
    else:
      parts[-1] += character
  return parts if text.strip() else []


def _there_is(table: Mapping[str, Any], name: str) -> str:
  close = difflib.get_close_matches(name, table, n=1)
  if close:
    return f"did you mean {close[0]}?"
  return f"there is {', '.join(table) or 'none'}."
