"""One file per example, one local folder per class."""

import collections
from collections.abc import Sequence
import hashlib
import os
from typing import Any, Self

import ml_collections

from input_pipeline.errors import BadRecordError, DataError
from input_pipeline.records import Record
from input_pipeline.sources import layout, local, slices, splits
from input_pipeline.sources.base import Source

_SIZES = 1000  # files whose size counts: asking for a million takes long on a network


class FolderSource(Source):
  """FOLDER/SPLIT/CLASS/IMAGE; `sources/layout.py` decides what these are."""

  def __init__(self, folder: str, files: Sequence[tuple[str, int]], class_names: Sequence[str]):
    """Store the list.

    Args:
      folder: which the files are relative to.
      files: path and label of each.
      class_names: one per label.
    """
    self.class_names = tuple(class_names)
    self.num_classes = len(self.class_names)
    self._root = folder
    self._files = files
    counts = collections.Counter(label for _, label in files)
    self.class_counts = [counts[label] for label in range(self.num_classes)]
    self.digest = f"folder {_digest(folder, files)}"

  @classmethod
  def open(cls, data: ml_collections.ConfigDict, split: str, num_classes: int | None) -> Self:
    """See Source."""
    del num_classes
    path = local.checked_folder(data.path)
    allow, by_text = layout.words(data.allow), data.class_order == layout.TEXT
    contents = _held_out(layout.arrange(local.walk(path), path, allow), data)
    split = splits.find(split, list(contents.splits), path)
    # One numbering for the splits of a run: that of train, whichever is opened.
    others = [n for n in contents.splits if splits.canonical(n) in ("train", "val") and n != split]
    names = sorted([split, *others], key=lambda name: splits.canonical(name) != "train")
    classes = layout.number(contents, names, allow, by_text)
    files = [
      (image.entry.path, label)
      for label, name in enumerate(classes)
      for image in contents.splits[split].get(name, ())
    ]
    source = cls(path, files, classes)
    source.left_out = contents.left_out
    source.notes = (*contents.notes, *_unused(contents, [split]))
    source.renumbered = classes != sorted(classes)
    return source

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {"left_out": {}, "notes": ()}  # decoding processes need no lists

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> Record:
    name, label = self._files[index]
    try:
      with open(os.path.join(self._root, name), "rb") as f:
        return Record(f.read(), label, name)
    except OSError as e:
      local.check_this_process(os.path.join(self._root, name), e)
      local.check_there(os.path.join(self._root, name.split("/")[0]))
      raise BadRecordError(f"{name}: cannot be read ({e.strerror})") from e


def _held_out(contents: layout.Contents, data: ml_collections.ConfigDict) -> layout.Contents:
  """Hold `config.data.val_fraction` out of train.

  Raises:
    DataError: another split may be the val that it is held out for; `prepare` asks as well.
  """
  held = layout.hold_out(contents, data.val_fraction, data.val_seed)
  used = [data.train_split, *slices.several(data.eval_split, "config.data.eval_split")]
  known = {*splits.SYNONYMS, *(slices.parse(name).name for name in used)}
  unknown = [name for name in contents.splits if not {name, splits.canonical(name)} & known]
  if held is not contents and unknown:
    name = unknown[0]
    raise DataError(
      f"{contents.where} has the split {name}, which is none of train, val and test, and "
      f"config.data.val_fraction={data.val_fraction:g} would hold images out of train beside it; "
      f"give --config.data.eval_split={name} --config.data.val_fraction=0, or move {name} "
      "elsewhere if it is no validation."
    )
  return held


def _unused(contents: layout.Contents, names: Sequence[str]) -> list[str]:
  unused = sorted(contents.splits.keys() - set(names))
  return [f"{layout.UNUSED}{name}" for name in unused]


def _digest(folder: str, files: Sequence[tuple[str, int]]) -> str:
  """Return a hash of the names and labels, and of the sizes of files from all over the list."""
  digest = hashlib.sha256()
  for name, label in files:
    digest.update(f"{label} {name}\n".encode("utf-8", "surrogateescape"))
  for name, _ in files[:: -(-len(files) // _SIZES) or 1]:
    try:
      size = os.stat(os.path.join(folder, name)).st_size
    except OSError:  # gone meanwhile, which reading it says
      size = -1
    digest.update(f"{size}\n".encode())
  return digest.hexdigest()[:32]
