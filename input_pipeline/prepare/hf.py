"""The input of `prepare --from hf:...`: row groups of parquet, several for each shard."""

from collections.abc import Iterator
import dataclasses
import hashlib
from typing import Any, NamedTuple

import numpy as np

from input_pipeline.errors import DataError
from input_pipeline.prepare.archives import Images
from input_pipeline.records import Record
from input_pipeline.sources import catalog, hf
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
    splits: the row groups of train and val.
    ignored: always 0.
  """

  origin: dict[str, Any]
  classes: list[str]
  splits: dict[str, hf.HfSource]
  ignored: int = 0

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
    return hashlib.sha256(repr((found, list(self.classes))).encode()).hexdigest()


def from_hf(path: str, val_split: str) -> HfInputs:
  """Find the splits train and val of a data set; see `hf.find_splits`.

  Args:
    path: with the prefix hf:.
    val_split: name of the split that becomes val; "" is validation or val, if there is one.

  Raises:
    DataError: as `hf.HfSource`, and if the splits have different classes.
  """
  files, features = hf.find_splits(path)
  wanted = {"train": catalog.find_split("train", list(files), path)}
  if val_split or "validation" in files or "val" in files:
    wanted["val"] = catalog.find_split(val_split or "val", list(files), path)
  left = sorted(set(files) - set(wanted.values()))
  if left:
    print(f"left out the splits {', '.join(left)}; see --val-split", flush=True)
  found = {split: hf.HfSource(path, files[name], features, None) for split, name in wanted.items()}
  classes = found["train"].class_names
  if any(source.class_names != classes for source in found.values()):
    raise DataError(f"{path}: the splits {' and '.join(wanted.values())} have different classes.")
  return HfInputs({"kind": "hf", "name": path.removeprefix(HF_PREFIX)}, list(classes), found)
