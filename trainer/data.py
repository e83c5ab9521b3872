"""What the data of a run are: kept in its checkpoints, and compared when it resumes.

The same data may be moved, or copied to a bucket. Other data under the same names would make
another run of it, or give results that mean nothing, so they are refused by what differs.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import hashlib
import json
from typing import Any
import unicodedata

from absl import logging
from etils import epath
import ml_collections
import numpy as np

from input_pipeline import records, sources
from input_pipeline.errors import DataError, first_line
from input_pipeline.sources import Source, slices
from trainer.errors import ConfigError

# {"classes": names by label, "train": facts of a split, "eval": {split: facts}}, as JSON gives it
# back.
Facts = dict[str, Any]

_COMPARED = {"examples": "examples", "class_counts": "examples of each class"}


def describe(train: Source, evaluated: Mapping[str, Source]) -> Facts:
  """Return what the data of a run are."""
  return {
    "classes": list(train.class_names),
    "train": _facts(train),
    "eval": {name: _facts(source) for name, source in evaluated.items()},
  }


def with_classes(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Return the config with the number of classes of the data, where it leaves that to them.

  Raises:
    DataError: the data cannot be opened.
  """
  if config.model.num_classes:
    return config
  data = config.data
  try:
    source = sources.open_source(data, data.train_split, None)
  except DataError:  # an evaluation needs no training images
    source = sources.open_source(
      data, slices.several(data.eval_split, "config.data.eval_split")[0], None
    )
  found = config.copy_and_resolve_references()
  found.model.num_classes = source.num_classes
  return found


def _facts(source: Source) -> dict[str, Any]:
  counts = source.class_counts
  return {
    "examples": len(source),
    "class_counts": None if counts is None else list(counts),
    "digest": source.digest,
    "revision": source.revision,
  }


def summary(source: Source) -> list[Any]:
  """Return what all hosts must see alike, in a few bytes."""
  names = hashlib.sha256("\n".join(source.class_names).encode("utf-8", "surrogateescape"))
  return [len(source), source.digest, names.hexdigest()[:16]]


def words_of(path: str, names: Sequence[str]) -> dict[str, str]:
  """Return what class names mean, where the folder of the data says so.

  Args:
    path: `config.data.path`. Words are those that `prepare` has found in the devkit of ImageNet,
      or lines "n01440764 tench, Tinca tinca" of words.txt or LOC_synset_mapping.txt.
    names: of the classes.
  """
  if not path or ("://" in path and not path.startswith("gs://")):
    return {}
  folder, words = epath.Path(path), dict[str, str]()
  try:
    if (file := folder / records.MANIFEST).exists():
      words = json.loads(file.read_text()).get("source", {}).get("words", {})
    for file in (folder / "words.txt", folder / "LOC_synset_mapping.txt"):
      if not words and file.exists():
        lines = (line.split(None, 1) for line in file.read_text().splitlines())
        words = {line[0]: line[1].strip() for line in lines if len(line) > 1}
  except Exception as error:  # of a bucket, or a file that is none; words are only for readers
    logging.warning("The words of the classes could not be read (%s).", first_line(error))
  return {name: words[name] for name in names if name in words}


def check_same(saved: Facts | None, now: Facts, source: Source, workdir: str, allow: bool) -> None:
  """Refuse to resume on other data than those of the checkpoint.

  Args:
    saved: of the checkpoint; None if an earlier version wrote it, which kept none.
    now: of this start.
    source: the training data of this start.
    workdir: named in the message.
    allow: whether other images and numbers of them are allowed; other classes never are.

  Raises:
    ConfigError: naming what differs.
  """
  if saved is None:
    if source.renumbered:
      raise ConfigError(
        f"{workdir} holds checkpoints of an earlier version, which numbered these classes in "
        "alphabetical order, as 0, 1, 10, 11, 2; give --config.data.class_order=text."
      )
    return
  then = f"{workdir} holds checkpoints of a run on other data"
  if trouble := other_classes(saved["classes"], now["classes"]):
    raise ConfigError(
      f"{then}: {trouble}. Give the data of that run, or another --workdir; --mode=eval evaluates "
      "on other data."
    )
  differs = [
    _in_words(words, saved["train"][key], now["train"][key], now["classes"])
    for key, words in _COMPARED.items()
    if None not in (saved["train"][key], now["train"][key])
    and saved["train"][key] != now["train"][key]
  ]
  was, is_ = saved["train"]["digest"], now["train"]["digest"]
  if was.partition(" ")[0] == is_.partition(" ")[0] and was != is_:
    differs.append("its images, or their order, are others")
  if not differs:
    if was != is_:
      logging.warning(
        "The data are read in another way than before (%s, now %s), so whether the images are the "
        "same cannot be seen, and some are used twice in this epoch.",
        was or "unknown",
        is_ or "unknown",
      )
    return
  if not allow:
    revision = saved["train"]["revision"]
    raise ConfigError(
      f"{then}: {'; '.join(differs)}. Give the data of that run"
      f"{f' (revision {revision} of the hub)' if revision else ''}, or another --workdir; to train "
      "on with the data as they are now: --config.resume.allow=data."
    )
  logging.warning("By config.resume.allow, the data differ: %s.", "; ".join(differs))


def other_classes(before: Sequence[str], now: Sequence[str]) -> str:
  """Return in words how two lists of classes differ; "" if they do not."""
  if _is_numbers(before) != _is_numbers(now) and len(before) == len(now):
    return ""  # one of the two has no names
  for label, (old, new) in enumerate(zip(before, now)):
    if _nfc(old) != _nfc(new):
      return f"class {label} was {old!r} and is {new!r}"
  return f"it had {len(before)} classes and has {len(now)}" if len(before) != len(now) else ""


def _in_words(words: str, old: Any, new: Any, classes: Sequence[str]) -> str:
  if isinstance(old, list):
    label = next(i for i, (a, b) in enumerate(zip(old, new)) if a != b)
    return f"class {classes[label]!r} had {old[label]:,} examples and has {new[label]:,}"
  return f"it had {old:,} {words} and has {new:,}"


def label_table(classes: Sequence[str], source: Source, split: str) -> np.ndarray | None:
  """Return by label of an evaluated split the label that the run has for it; None if the same.

  Args:
    classes: of the run, by label.
    source: the split.
    split: its name, for messages.

  Raises:
    ConfigError: the split has a class that the run does not have, or has twice.
  """
  theirs = list(source.class_names)
  if theirs == list(classes):
    return None
  if _is_numbers(theirs) or _is_numbers(classes):
    if len(theirs) != len(classes):
      raise ConfigError(
        f"config.data.eval_split={split} has {len(theirs)} classes and the run {len(classes)}, of "
        "which one has numbers instead of names; evaluate on data with the names of the classes."
      )
    logging.warning("%s: numbers instead of names of classes; they are taken as labels.", split)
    return None
  ours: dict[str, list[int]] = {}
  for label, name in enumerate(classes):
    ours.setdefault(_nfc(name), []).append(label)
  table = np.zeros(len(theirs), np.int32)
  counts = source.class_counts
  for label, name in enumerate(theirs):
    found = ours.get(_nfc(name), [])
    if len(found) == 1:
      table[label] = found[0]
    elif counts is None or counts[label]:
      what = f"which {len(found)} classes of the run are called" if found else "which the run lacks"
      raise ConfigError(
        f"config.data.eval_split={split} has the class {name!r}, {what} "
        f"({_some(classes)}); evaluate on data with the classes of the run."
      )
  moved = int((table != np.arange(len(theirs))).sum())
  logging.info(
    "%s: %d classes are mapped by name to the %d of the run, %d of them to another number.",
    split,
    len(theirs),
    len(classes),
    moved,
  )
  return table if moved else None


def relabelled(
  batches: Iterable[dict[str, np.ndarray]], table: np.ndarray | None
) -> Iterator[dict[str, np.ndarray]]:
  """Yield batches with their labels looked up in a table; None leaves them as they are."""
  for batch in batches:
    yield batch if table is None else batch | {"label": table[batch["label"]]}


def _is_numbers(names: Sequence[str]) -> bool:
  """Whether classes have their own labels as names, and thus none."""
  return list(names) == [str(i) for i in range(len(names))]


def _nfc(name: str) -> str:
  return unicodedata.normalize("NFC", name)


def _some(names: Sequence[str]) -> str:
  return ", ".join(names[:5]) + ", ..." * (len(names) > 5)
