"""The input of `prepare --from hf:...`: row groups of parquet, several for each shard."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import hashlib
from typing import Any, NamedTuple

import numpy as np

from input_pipeline.prepare.archives import Images
from input_pipeline.records import Record
from input_pipeline.sources import hf, layout, parquet, parquet_files, splits
from input_pipeline.sources.base import HF_PREFIX


@dataclasses.dataclass(frozen=True)
class RowGroups:
  """The images of some row groups, in an order drawn from `seed`; all are held in memory."""

  source: hf.HfSource
  seed: tuple[int, ...]

  def __len__(self) -> int:
    return len(self.source)

  def __iter__(self) -> Iterator[Record]:
    found = [record for group in self.source.row_groups for record in self.source.read(group)]
    for i in np.random.default_rng(self.seed).permutation(len(found)):
      yield found[i]


class HfInputs(NamedTuple):
  """The splits of a data set, with the methods of `archives.Inputs`.

  Attributes:
    origin: what they were made of, for the manifest.
    classes: names, by label.
    splits: the row groups of train, val and test, as far as there are any.
    left_out: other files, by reason; see `layout.REASONS`.
    notes: what a user should know, a line each.
    asked: the columns that a user has chosen.
  """

  origin: dict[str, Any]
  classes: list[str]
  splits: dict[str, hf.HfSource]
  left_out: Mapping[str, Sequence[str]]
  notes: Sequence[str]
  asked: tuple[str, str]

  def count(self, split: str) -> int:
    """Return the number of images of a split."""
    return len(self.splits[split])

  def size(self, split: str) -> int:
    """Return the bytes of all images of a split, as the parquet files have them."""
    return sum(group.bytes for group in self.splits[split].row_groups)

  def most_shards(self, split: str) -> tuple[int, str]:
    """Return the largest number of shards of a split, and the unit that limits it."""
    return len(self.splits[split].row_groups), "row groups"

  def deal(self, split: str, shards: int, seed: int) -> list[Images]:
    """Shuffle the row groups by the seed; return the images of each shard."""
    source = self.splits[split]
    groups = list(source.row_groups)
    order = np.random.default_rng([seed, split == "train"]).permutation(len(groups))
    return [
      RowGroups(source.only([groups[i] for i in part]), (seed, int(split == "train"), number))
      for number, part in enumerate(np.array_split(order, shards))
    ]

  def fingerprint(self) -> str:
    """Return a hash that changes if a file is added, renamed, or cut into other row groups."""
    found = [(split, source.fingerprint) for split, source in self.splits.items()]
    value = (found, list(self.classes), *([self.asked] * any(self.asked)))
    return hashlib.sha256(repr(value).encode()).hexdigest()


def from_hf(
  path: str,
  asked: Mapping[str, str],
  columns: tuple[str, str] = ("", ""),
  num_classes: int | None = None,
  allow: Sequence[str] = (),
) -> HfInputs:
  """Find the splits train, val and test of a data set; see `parquet_files.find_splits`.

  Args:
    path: with the prefix hf:.
    asked: see `splits.choose`.
    columns: of images and labels; "" for the only ones.
    num_classes: number of classes where labels are integers without names.
    allow: faults that are allowed.

  Raises:
    DataError: as `hf.HfSource`.
  """
  found = parquet_files.find_splits(path, allow)
  chosen, left = splits.choose(list(found.splits), asked, path)
  meaning = hf.read_labelling(found, next(iter(chosen.values())), columns, num_classes)
  made, notes = {}, [f"left out the split {name}, as it was asked" for name in left]
  for split, name in chosen.items():
    try:
      made[split] = hf.HfSource(found, name, meaning)
    except parquet.UnlabelledError:
      if split == "train" or split in asked:
        raise
      notes.append(f"left out the split {name}, which has no labels: all are -1")
  for split, source in made.items():
    if chosen[split] != split:
      notes.append(f"the split {chosen[split]} becomes {split}")
    notes += [
      note for note in source.notes if note not in notes and not note.startswith(layout.UNUSED)
    ]
  origin = {"kind": "hf", "name": path.removeprefix(HF_PREFIX)}
  return HfInputs(origin, list(meaning.names), made, found.left_out, notes, columns)
