"""What a config field is: default, unit, allowed values, whether a resume may change it, and words.

A field stands in one table: `configs/base.py` for what every run has, the class of a model family
for what only that family has. The checks at start, `--help`, the page of all fields and the rules
of a resume are made of these entries.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
import re
from typing import Any

import ml_collections

# Whether the config of a run may differ from that of the checkpoint it resumes from.
NO = "no"  # never: it would change what the saved numbers mean, or they would not fit
ASK = "if allowed"  # only where `resume.allow` names it: the rest of the run becomes another one
YES = "yes"  # always: the same run by other means


@dataclasses.dataclass(frozen=True)
class Check:
  """A condition on a value, and its words after "must be"."""

  words: str
  holds: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Field:
  """One field of a config.

  Attributes:
    default: value of `configs.base.get_config()`; its type is the type of the field.
    words: what it is, in a line.
    unit: of a number; "" where there is none.
    check: which values are allowed; None for any of the type.
    resume: NO, ASK or YES.
  """

  default: Any
  words: str
  unit: str = ""
  check: Check | None = None
  resume: str = NO


Fields = Mapping[str, Field]


def at_least(least: float) -> Check:
  """Numbers from `least` on."""
  return Check(f"{least:g} or more", lambda v: v >= least)


def one_of(*values: str) -> Check:
  """Some words."""
  return Check(f"one of {', '.join(values)}", lambda v: v in values)


def between(low: float, high: float) -> Check:
  """Numbers in [low, high]."""
  return Check(f"in [{low:g}, {high:g}]", lambda v: low <= v <= high)


def _is_pattern(text: str) -> bool:
  try:
    re.compile(text)
  except re.error:
    return False
  return True


PATTERN = Check("a regular expression", _is_pattern)
POSITIVE = Check("positive", lambda v: v > 0)
SHARE = Check("in [0, 1)", lambda v: 0 <= v < 1)
COUNT_OR_AUTO = Check("0 or more, or -1 to choose by the machine", lambda v: v >= -1)


def problem(name: str, field: Field, value: Any) -> str:
  """Return what is wrong with the value of a field, as a sentence; "" if nothing is.

  Args:
    name: of the field, as in "model.depth".
    field: its entry.
    value: as JSON gives it back, so a tuple is a list.
  """
  default: Any = list(field.default) if isinstance(field.default, tuple) else field.default
  expected: Any = (int, float) if isinstance(default, float) else type(default)
  if isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, expected):
    kind = "tuple" if isinstance(default, list) else type(default).__name__
    return f"config.{name} must be of type {kind}; it is {value!r} of type {type(value).__name__}."
  if isinstance(default, list) and not all(isinstance(v, int | float) for v in value):
    return f"config.{name} must hold numbers; it is {value!r}."
  if isinstance(default, list) and not all(math.isfinite(v) for v in value):
    return f"config.{name} must hold finite numbers; it is {value!r}."
  if isinstance(default, float) and not math.isfinite(value):
    return f"config.{name} must be a finite number; it is {value!r}."
  if field.check and not field.check.holds(value):
    return f"config.{name} must be {field.check.words}; it is {value!r}."
  return ""


def to_config(fields: Fields) -> ml_collections.ConfigDict:
  """Return the defaults as a config; the dots of a name are its sections."""
  config = ml_collections.ConfigDict()
  for name, field in fields.items():
    *sections, leaf = name.split(".")
    node = config
    for section in sections:
      if section not in node:
        node[section] = ml_collections.ConfigDict()
      node = node[section]
    node[leaf] = field.default
  return config
