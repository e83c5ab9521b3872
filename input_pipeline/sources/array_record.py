"""ArrayRecord shards of tf.train.Example, ours or those of TFDS, on a local disk."""

import bisect
import copy
import itertools
import resource
import threading
from typing import Any, Self

from array_record.python import array_record_module
import ml_collections
import numpy as np

from input_pipeline import records
from input_pipeline.errors import BadRecordError, DataError
from input_pipeline.records import Record
from input_pipeline.sources import catalog, local
from input_pipeline.sources.base import Source

# What the library advises for random access.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_FIRST = 16  # records that are read to find out whether there are labels
_READER_BUFFER = 32 << 10  # bytes; the default of 1 MiB would be kept for each of 1,024 shards


class ShardedSource(Source):
  """Records in ArrayRecord shards, wherever these are.

  Attributes:
    folder: where the shards are.
    shards: which, in order; none is empty.
  """

  folder: catalog.Folder

  def __init__(self, folder: catalog.Folder, split: catalog.Split):
    """Store what is known; no shard is opened yet.

    Args:
      folder: where the shards are.
      split: which ones.
    """
    self.class_names = tuple(split.class_names)
    self.num_classes = len(self.class_names)
    self.class_counts = split.class_counts
    self.shards = split.shards
    self.folder = folder
    self.digest = split.digest
    self.notes = split.notes
    self._keys = split.keys
    self._mend = split.mend
    self._ends = list(itertools.accumulate(shard.count for shard in split.shards))
    self._chosen: np.ndarray | None = None

  def __len__(self) -> int:
    return self._ends[-1] if self._chosen is None else len(self._chosen)

  def subset(self, indices: np.ndarray) -> Self:
    """See Source."""
    part = copy.copy(self)
    part._chosen = indices if self._chosen is None else self._chosen[indices]
    part.class_counts = None
    return part

  def _find(self, index: int) -> tuple[int, int]:
    """Return the shard of an example and its position there."""
    if not 0 <= index < len(self):
      raise IndexError(f"example {index} of {len(self)}")
    if self._chosen is not None:
      index = int(self._chosen[index])
    shard = bisect.bisect_right(self._ends, index)
    return shard, index - self._ends[shard] + self.shards[shard].count

  def _decode(self, data: bytes, shard: int, position: int) -> Record:
    name = f"{self.shards[shard].name}[{position}]"
    try:
      record = records.decode(data, name, self._keys)
    except BadRecordError as e:
      raise BadRecordError(f"{name}: {e}") from e
    if not 0 <= record.label < self.num_classes:
      none = ", which stands for no label" if record.label == -1 else ""
      raise BadRecordError(
        f"{name}: has label {record.label}, but there are {self.num_classes} classes{none}"
      )
    return record


class ArrayRecordSource(ShardedSource):
  """Shards on a disk. Thread-safe; a shard is opened when it is first read."""

  def __init__(self, folder: catalog.LocalFolder, split: catalog.Split):
    super().__init__(folder, split)
    _allow_open_files(len(self.shards))
    self._forget_readers()

  @classmethod
  def open(cls, data: ml_collections.ConfigDict, split: str, num_classes: int | None) -> Self:
    """See Source."""
    folder = catalog.LocalFolder(local.checked_folder(data.path))
    columns = (data.image_column, data.label_column)
    source = cls(folder, catalog.read(folder, split, columns, num_classes))
    source.refuse_unlabelled(split)
    return source

  def refuse_unlabelled(self, split: str) -> None:
    """Raise DataError if the first records of TFDS are all unlabelled, or lack their features.

    Shards of `prepare` were checked when they were made.
    """
    if all(shard.sha256 is not None for shard in self.shards):
      return
    reasons = []
    for index in range(min(_FIRST, self.shards[0].count)):
      try:
        self[index]
      except BadRecordError as e:
        reasons.append(str(e))
      except DataError:  # of the whole shard, which reading it says
        return
      else:
        return
    raise DataError(
      f"{self.folder.path_of('')}: no example of {split} can be used ({reasons[0]}); choose a "
      "split with labels, and with config.data.image_column and label_column the features."
    )

  def _forget_readers(self) -> None:
    self._readers: list[array_record_module.ArrayRecordReader | None] = [None] * len(self.shards)
    self._lock = threading.Lock()

  def __getstate__(self) -> dict[str, Any]:
    state = self.__dict__.copy()
    del state["_readers"], state["_lock"]
    return state

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._forget_readers()

  def __getitem__(self, index: int) -> Record:
    shard, position = self._find(index)
    try:
      data = self._reader(shard).read([position])[0]
    except (RuntimeError, ValueError, IndexError) as e:  # a wrong checksum, or the disk
      local.check_there(self.folder.path_of(self.shards[shard].name))
      name = f"{self.shards[shard].name}[{position}]"
      raise BadRecordError(f"{name}: cannot be read ({e})") from e
    return self._decode(data, shard, position)

  def _reader(self, shard: int) -> array_record_module.ArrayRecordReader:
    """Return the open reader of a shard; raise DataError if it does not hold what it should."""
    if self._readers[shard] is None:
      with self._lock:
        if self._readers[shard] is None:
          self._readers[shard] = self._open(shard)
    return self._readers[shard]

  def _open(self, shard: int) -> array_record_module.ArrayRecordReader:
    path = self.folder.path_of(self.shards[shard].name)
    try:
      with open(path, "rb"):  # the library takes any failure to open a file for an empty one
        pass
    except OSError as e:
      local.check_this_process(path, e)
      raise DataError(f"{path} cannot be opened ({e.strerror}); {self._mend}.") from e
    reader = array_record_module.ArrayRecordReader(
      path, _READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER
    )
    if not reader.ok():
      raise DataError(f"{path} is damaged or no ArrayRecord file; {self._mend}.")
    found, count = reader.num_records(), self.shards[shard].count
    if found != count:
      raise DataError(f"{path} holds {found} records instead of {count}; {self._mend}.")
    return reader


def _allow_open_files(shards: int) -> None:
  """Raise the soft limit of open files, usually 1,024: one stays open for each shard."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  wanted = shards + 1024  # for all else that a trainer opens
  if hard != resource.RLIM_INFINITY and wanted > hard:
    wanted = hard
  if soft != resource.RLIM_INFINITY and soft < wanted:
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
