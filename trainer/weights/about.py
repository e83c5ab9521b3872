"""What travels with weights: names of the classes, config, step, how images are prepared."""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
from typing import Any

import ml_collections

from trainer.weights.errors import WeightsError

_MOST_WORDS = 16 << 20  # characters of an entry


@dataclasses.dataclass(frozen=True)
class About:
  """Facts about weights; what is not known is empty.

  Attributes:
    classes: their names by label.
    config: of the run that made them, flat: {"model.depth": 50, ...}.
    step: steps taken.
    weights: "ema" if they are averages over steps, "raw" if not.
    top1: share of right answers in the newest evaluation of this step.
  """

  classes: tuple[str, ...] = ()
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  step: int | None = None
  weights: str = ""
  top1: float | None = None

  def words(self) -> dict[str, str]:
    """Return the facts as metadata of a file."""
    result = {"format": "pt"}  # that of the library: names and layouts are those of torch
    if self.config:
      fields = ("mean", "std", "eval_resize", "eval_image_size", "eval_interpolation")
      result["preprocessing"] = json.dumps({f: self.config.get(f"data.{f}") for f in fields})
      result["config"] = json.dumps(dict(self.config))
    if self.classes:
      result["classes"] = json.dumps(list(self.classes), ensure_ascii=False)
    for name in ("step", "weights", "top1"):
      if (value := getattr(self, name)) not in (None, ""):
        result[name] = str(value)
    return result


def about(words: Mapping[str, str]) -> About:
  """Return the facts that metadata hold; foreign ones are left out.

  Raises:
    WeightsError: half a sentence, if one of ours is damaged.
  """
  classes, config = _read(words, "classes", list), _read(words, "config", dict)
  if not all(isinstance(name, str) for name in classes):
    raise WeightsError("has class names in its metadata that are no words")
  if config:
    flat_values = (str, int, float, bool, list)
    if not all(isinstance(value, flat_values) for value in config.values()):
      raise WeightsError("has a config in its metadata that is none of this program")
  try:
    step = int(words["step"][:20]) if words.get("step") else None
    top1 = float(words["top1"][:30]) if words.get("top1") else None
  except ValueError as error:
    raise WeightsError("has a step or a top1 in its metadata that is no number") from error
  kind = words.get("weights", "")
  return About(tuple(classes), config, step, kind if kind in ("ema", "raw") else "", top1)


def _read(words: Mapping[str, str], name: str, kind: type) -> Any:
  text = words.get(name, "")
  if not text or len(text) > _MOST_WORDS:
    return kind()
  try:
    value = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise WeightsError(f"has {name!r} in its metadata that cannot be read") from error
  if not isinstance(value, kind):
    raise WeightsError(f"has {name!r} in its metadata that cannot be read")
  return value


def read_classes(file: str) -> tuple[str, ...]:
  """Return the names of classes in the file of --classes; see `parse_classes`.

  Raises:
    WeightsError: likewise, and if it cannot be read.
  """
  try:
    text = pathlib.Path(file).read_text()
  except (OSError, UnicodeDecodeError) as error:
    raise WeightsError(f"--classes={file} cannot be read ({error}).") from error
  return parse_classes(text, f"--classes={file}")


def parse_classes(text: str, name: str) -> tuple[str, ...]:
  """Return the names of classes that a file lists: one a line, or a JSON list.

  Args:
    text: of the file.
    name: of the file, for messages.

  Raises:
    WeightsError: if there are none, or one is empty.
  """
  classes: Any = [line.strip() for line in text.strip().splitlines()]
  if text.lstrip().startswith(("[", "{")):
    try:
      classes = json.loads(text)
    except (ValueError, RecursionError) as error:
      raise WeightsError(f"{name} is no JSON; give one class name a line.") from error
    if isinstance(classes, dict):
      classes = classes.get("classes")
  if (
    not isinstance(classes, list)
    or not classes
    or not all(isinstance(c, str) and c for c in classes)
  ):
    raise WeightsError(f"{name} is no list of class names; give one a line.")
  return tuple(classes)


def check_classes(classes: tuple[str, ...], model: ml_collections.ConfigDict, name: str) -> None:
  """Refuse another number of names than the head has logits.

  Raises:
    WeightsError: naming both.
  """
  if classes and len(classes) != model.num_classes:
    raise WeightsError(
      f"{name} names {len(classes):,} classes, but config.model.num_classes is "
      f"{model.num_classes:,}; give the names of the classes that the head was trained on."
    )
