"""The names of splits, which every way in understands alike."""

from collections.abc import Mapping, Sequence

from input_pipeline.errors import DataError

# Case does not count.
SYNONYMS = {
  "train": ("train", "training"),
  "val": ("val", "valid", "validation", "dev"),
  "test": ("test", "testing", "eval", "evaluation"),
}
_CANONICAL = {word: name for name, words in SYNONYMS.items() for word in words}


def canonical(name: str) -> str:
  """Return train, val or test for one of their synonyms, and any other name as it is."""
  return _CANONICAL.get(name.lower(), name)


def is_split(name: str) -> bool:
  """Whether a folder of this name is a split and not a class."""
  return name.lower() in _CANONICAL


def find(wanted: str, available: Sequence[str], path: str, advice: str = "") -> str:
  """Return the name that a split has among those of a data set: itself, or a synonym.

  Args:
    wanted: as the user calls it.
    available: the names there.
    path: of the data set, for messages.
    advice: what to do where there is none; by default, which fields of a config name the splits.

  Raises:
    DataError: there is no such split, or several have the meaning.
  """
  if wanted in available:
    return wanted
  alike = [name for name in available if canonical(name) == canonical(wanted)]
  if len(alike) > 1:
    raise DataError(f"{path} has the splits {' and '.join(alike)} for {wanted!r}; name one.")
  if alike:
    return alike[0]
  if not advice:
    advice = "set config.data.train_split and config.data.eval_split"
    if canonical(wanted) == "val":
      advice += (
        ", or hold a share of the images out of class folders: --config.data.val_fraction=0.1, "
        "--val-fraction=0.1 of prepare"
      )
  raise DataError(
    f"{path} has no split {wanted!r}, only {', '.join(sorted(available)) or 'none at all'}; "
    f"{advice}."
  )


def choose(
  available: Sequence[str], asked: Mapping[str, str], path: str
) -> tuple[dict[str, str], list[str]]:
  """Decide which splits of a data set `prepare` makes.

  Args:
    available: their names there.
    asked: by --split: the name there of each that is to be made, "" for one to leave out.
    path: of the data set, for messages.

  Returns:
    The names there of train, val and test, as far as there are any, and those that are left out.

  Raises:
    DataError: one is asked for that is not there, or one is there that is none of the three.
  """
  chosen = {
    target: find(name, available, path, f"give one of those to --split {target}=NAME")
    for target, name in asked.items()
    if name
  }
  left = []
  for name in available:
    target = canonical(name)
    if name in chosen.values():
      continue
    if target in asked or name in asked:
      left.append(name)
    elif target not in SYNONYMS:
      raise DataError(
        f"{path} has the split {name}, which is none of train, val and test; make it one of them "
        f"with --split val={name}, for example, or leave it out with --split {name}= (nothing)."
      )
    elif target in chosen:
      raise DataError(
        f"{path} has the splits {chosen[target]} and {name}, which are both {target}; choose with "
        f"--split {target}={name}, for example."
      )
    else:
      chosen[target] = name
  if not chosen:
    find("train", [], path)
  return {name: chosen[name] for name in SYNONYMS if name in chosen}, left
