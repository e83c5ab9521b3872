"""The fields of a config as text for a terminal, and as the tables of configs/fields.md."""

from collections.abc import Mapping
import itertools
import textwrap
from typing import Any

from configs import base, families
from configs.fields import NO, Field

_WIDTH = 100


def text(
  fields: Mapping[str, Field], values: Mapping[str, Any] | None = None, search: str = ""
) -> str:
  """Return two lines or more for each field: value, unit, range, resume; then its words.

  Each section has a headline.

  Args:
    fields: by name, as in "model.depth".
    values: of a config; where one differs from its default, both are shown.
    search: only fields with this in their name or words.
  """
  lines: list[str] = []
  section = None
  for name, field in fields.items():
    if search.lower() not in f"{name} {field.words}".lower():
      continue
    if section != (section := _section(name)):
      lines += ["", f"config.{section}" if section else "config"]
    value = field.default if values is None else values.get(name, field.default)
    if isinstance(value, list):
      value = tuple(value)
    shown = f"{_literal(value)} {field.unit}".strip()
    if value != field.default:
      shown += f" (default {_literal(field.default)})"
    facts = [shown]
    if field.check:
      facts.append(field.check.words)
    if field.resume != NO:
      facts.append(f"a resume may change it: {field.resume}")
    lines.append(f"--config.{name} = {'; '.join(facts)}")
    lines += textwrap.wrap(field.words, _WIDTH - 4, initial_indent="    ", subsequent_indent="    ")
  return "\n".join(lines[1:])


def markdown() -> str:
  """Return a table for each section, and one for each model family's own fields."""
  parts = []
  for section, entries in itertools.groupby(base.RUN.items(), lambda item: _section(item[0])):
    parts.append(_table(f"config.{section}" if section else "config", dict(entries)))
  for name in families.FAMILIES:
    own = {f"model.{key}": field for key, field in families.fields(name).items()}
    parts.append(_table(f"config.model of the family {name}", own))
  return "\n\n".join(parts)


def _section(name: str) -> str:
  return name.rpartition(".")[0]


def _table(title: str, fields: Mapping[str, Field]) -> str:
  lines = [
    f"### {title}",
    "",
    "| field | default | unit | must be | a resume may change it | what it is |",
    "|---|---|---|---|---|---|",
  ]
  for name, field in fields.items():
    cells = [
      f"`{name.rpartition('.')[2]}`",
      f"`{_literal(field.default)}`",
      field.unit,
      field.check.words if field.check else "",
      field.resume,
      field.words,
    ]
    lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
  return "\n".join(lines)


def _literal(value: Any) -> str:
  """Return a value as it is written in Python, with numbers in few digits."""
  if isinstance(value, float):
    return f"{value:.6g}" if value != int(value) else f"{value:g}"
  if isinstance(value, tuple):
    return f"({', '.join(map(_literal, value))})"
  return repr(value)
