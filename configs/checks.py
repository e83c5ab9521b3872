"""Checks of a config that need its table of fields alone, and so no JAX."""

from collections.abc import Iterator, Mapping
import difflib
import json
from typing import Any

import ml_collections

from configs import base
from configs.fields import Field, problem


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Return {"model.depth": 50, ...} with tuples as lists, as JSON gives them back."""

  def walk(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
      if isinstance(value, dict):
        yield from walk(value, f"{prefix}{key}.")
      else:
        yield prefix + key, value

  return dict(walk(json.loads(json.dumps(config.to_dict())), ""))


def check(config: ml_collections.ConfigDict) -> None:
  """Refuse fields that are unknown, missing, of another type than their default, or out of range.

  Raises:
    ValueError: one sentence that names the first of them, or fields that exclude each other.
  """
  fields, values = base.all_fields(config.model.name), flatten(config)
  for name in sorted(values.keys() - fields.keys()):
    raise ValueError(f"config.{name} {not_a_field(name, fields, config.model.name)}")
  for name, field in fields.items():
    if name not in values:
      raise ValueError(f"config.{name} is missing; build the config on configs.base.get_config().")
    if trouble := problem(name, field, values[name]):
      raise ValueError(trouble)
  for name in base.DURATIONS:
    epochs, steps = values[f"{name}_epochs"], values[f"{name}_steps"]
    if epochs and steps:
      raise ValueError(
        f"config.{name}_epochs is {epochs} and config.{name}_steps is {steps}; "
        "set one of them to 0."
      )
  if values["distill.teacher"] and not values["distill.weight"]:
    raise ValueError(
      f"config.distill.teacher is {values['distill.teacher']}, but config.distill.weight is 0; set "
      "it to 1 to learn from the teacher alone, or to the share that it has beside the labels."
    )
  if not values["total_epochs"] and not values["total_steps"]:
    raise ValueError("config.total_epochs and config.total_steps are both 0; set one of them.")


def not_a_field(name: str, fields: Mapping[str, Field], family: str) -> str:
  """Return what follows "config.NAME": that it is none, and which one was probably meant."""
  of = f"the model family {family}" if name.startswith("model.") else "configs/base.py"
  return f"is not a field of {of}" + (
    f"; did you mean config.{near}?" if (near := _nearest(name, fields)) else "."
  )


def _nearest(name: str, fields: Mapping[str, Field]) -> str:
  """Return the field whose section and name are spelled most like these; "" if none is near.

  A name that is right in another section comes first: lr of optimizer, typed without the section.
  """
  section, _, leaf = name.rpartition(".")
  same = [field for field in fields if field.rpartition(".")[2] == leaf]
  if len(same) == 1:
    return same[0]
  beside = {
    field.rpartition(".")[2]: field for field in fields if field.rpartition(".")[0] == section
  }
  if close := difflib.get_close_matches(leaf, beside, n=1):
    return beside[close[0]].lstrip(".")
  return next(iter(difflib.get_close_matches(name, fields, n=1)), "")
