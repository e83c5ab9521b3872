"""One file per example, one local folder per class."""

from collections.abc import Sequence
import os
from typing import Self

import ml_collections

from input_pipeline.errors import BadRecordError, DataError
from input_pipeline.records import Record
from input_pipeline.sources import catalog, local
from input_pipeline.sources.base import Source


class FolderSource(Source):
  """FOLDER/SPLIT/CLASS/IMAGE."""

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

  @classmethod
  def open(cls, data: ml_collections.ConfigDict, split: str, num_classes: int | None) -> Self:
    """See Source."""
    del num_classes
    path = local.checked_folder(data.path)
    splits = local.list_classes(path)
    split = catalog.find_split(split, splits, path)
    classes = local.list_classes(os.path.join(path, split))
    # Labels are positions in a sorted list: a class missing from one split would shift the others.
    for other in sorted({"train", "val", "validation"}.intersection(splits)):
      unlike = set(classes).symmetric_difference(local.list_classes(os.path.join(path, other)))
      if unlike:
        raise DataError(
          f"{path}: {split} and {other} must have the same class folders, but {min(unlike)!r} is "
          "in only one of them."
        )
    files = [
      (os.path.join(split, name, image), label)
      for label, name in enumerate(classes)
      for image in local.list_images(os.path.join(path, split, name))
    ]
    if not files:
      suffixes = "|".join(local.IMAGE_SUFFIXES)
      raise DataError(f"{os.path.join(path, split)} holds no CLASS/*{suffixes}.")
    return cls(path, files, classes)

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> Record:
    name, label = self._files[index]
    try:
      with open(os.path.join(self._root, name), "rb") as f:
        return Record(f.read(), label, name)
    except OSError as e:
      raise BadRecordError(f"{name}: cannot be read ({e.strerror})") from e
