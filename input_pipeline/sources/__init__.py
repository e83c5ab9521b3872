"""Where examples come from: random access by index to (bytes of the image, class, name).

source = open_source(config.data, config.data.train_split, config.model.num_classes)
source[7]  # Record(image=b"...", label=3, name="n01440764_18.JPEG")
"""

import bisect
from collections.abc import Sequence
import itertools
import os
import resource
import threading
from typing import Any, Protocol

from array_record.python import array_record_module
import numpy as np
import simplejpeg

from input_pipeline import records
from input_pipeline.errors import BadRecordError, DataError
from input_pipeline.order import Run
from input_pipeline.records import Record
from input_pipeline.remote import tensorstore as bucket_lib
from input_pipeline.remote.record_reader import RemoteShard
from input_pipeline.remote.tensorstore import Bucket, Patience, has_scheme
from input_pipeline.sources import catalog, hf

KINDS = ("auto", "array_record", "stream", "folder", "hf", "synthetic")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")

_READER_OPTIONS = (
  "readahead_buffer_size:0,max_parallelism:0"  # what the library advises for random access
)
_READER_BUFFER = 32 << 10  # bytes; the default of 1 MiB would be kept for each of 1,024 shards


class Source(Protocol):
  """Examples by index. Can be pickled, so that decoding processes can open their own.

  Attributes:
    num_classes: labels are in 0..num_classes-1.
    class_names: one per label.
  """

  num_classes: int
  class_names: tuple[str, ...]

  def __len__(self) -> int:
    """Returns the number of examples."""

  def __getitem__(self, index: int) -> Record:
    """Returns example `index`; raises BadRecordError if it alone is bad, DataError if more is."""


class ShardedSource:
  """Records of tf.train.Example in ArrayRecord shards, ours or those of TFDS.

  Attributes:
    folder: where the shards are.
    shards: which, in order; none is empty.
    class_counts: number of records of each class, where it is known without reading them.
  """

  def __init__(self, folder: catalog.Folder, split: catalog.Split):
    """Opens no shard yet.

    Args:
      folder: where the shards are.
      split: which ones.
    """
    self.class_names = tuple(split.class_names)
    self.num_classes = len(self.class_names)
    self.class_counts = split.class_counts
    self.shards = split.shards
    self.folder = folder
    self._mend = split.mend
    self._ends = list(itertools.accumulate(shard.count for shard in split.shards))

  def __len__(self) -> int:
    return self._ends[-1]

  def _find(self, index: int) -> tuple[int, int]:
    """Returns the shard of an example and its position there."""
    if not 0 <= index < len(self):
      raise IndexError(f"example {index} of {len(self)}")
    shard = bisect.bisect_right(self._ends, index)
    return shard, index - self._ends[shard] + self.shards[shard].count

  def _decode(self, data: bytes, shard: int, position: int) -> Record:
    name = f"{self.shards[shard].name}[{position}]"
    try:
      record = records.decode(data, name)
    except BadRecordError as e:
      raise BadRecordError(f"{name}: {e}") from e
    if not 0 <= record.label < self.num_classes:
      raise BadRecordError(
        f"{name}: has label {record.label}, but there are {self.num_classes} classes"
      )
    return record


class ArrayRecordSource(ShardedSource):
  """Shards on a disk, any example at any time. Thread-safe; each shard is opened when it is needed."""

  def __init__(self, folder: catalog.LocalFolder, split: catalog.Split):
    super().__init__(folder, split)
    _allow_open_files(len(self.shards))
    self._forget_readers()

  def _forget_readers(self) -> None:
    self._readers: list[Any] = [None] * len(self.shards)
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
      name = f"{self.shards[shard].name}[{position}]"
      raise BadRecordError(f"{name}: cannot be read ({e})") from e
    return self._decode(data, shard, position)

  def _reader(self, shard: int) -> Any:
    """Returns the open reader of a shard; raises DataError if it does not hold what it should."""
    if self._readers[shard] is None:
      with self._lock:
        if self._readers[shard] is None:
          self._readers[shard] = self._open(shard)
    return self._readers[shard]

  def _open(self, shard: int) -> Any:
    path = self.folder.path_of(self.shards[shard].name)
    try:
      with open(path, "rb"):  # the library takes any failure to open a file for an empty one
        pass
    except OSError as e:
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


class StreamSource(ShardedSource):
  """Shards anywhere, read by ranges: for runs of neighbours, which `stream.ReadAhead` asks for."""

  def __init__(self, bucket: Bucket, split: catalog.Split):
    super().__init__(bucket, split)
    self.bucket = bucket
    self._open_shards()

  def _open_shards(self) -> None:
    self._remote = [
      RemoteShard(self.bucket, shard.name, shard.count, shard.size, self._mend)
      for shard in self.shards
    ]

  def __getstate__(self) -> dict[str, Any]:
    state = self.__dict__.copy()
    del state["_remote"]
    return state

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._open_shards()

  def __getitem__(self, index: int) -> Record:
    return self.decode(index, self.read_run(Run(index, 1))[0])

  def read_run(self, run: Run) -> list[bytes | BadRecordError]:
    """Returns the records of a run, which lies in one shard; see RemoteShard.read."""
    shard, position = self._find(run.first)
    return self._remote[shard].read(position, position + run.count)

  def decode(self, index: int, data: bytes | BadRecordError) -> Record:
    """Returns the example that one of the answers of `read_run` holds, as __getitem__ does."""
    if isinstance(data, BadRecordError):
      # Another one: raised, `data` would hold this frame and with it the whole batch until the
      # garbage collector comes.
      raise BadRecordError(str(data))
    return self._decode(data, *self._find(index))


class FolderSource:
  """One file per example, one folder per class."""

  def __init__(self, folder: str, files: Sequence[tuple[str, int]], class_names: Sequence[str]):
    """Stores the list.

    Args:
      folder: what the files are relative to.
      files: path and label of each.
      class_names: one per label.
    """
    self.class_names = tuple(class_names)
    self.num_classes = len(self.class_names)
    self._folder = folder
    self._files = files

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> Record:
    name, label = self._files[index]
    try:
      with open(os.path.join(self._folder, name), "rb") as f:
        return Record(f.read(), label, name)
    except OSError as e:
      raise BadRecordError(f"{name}: cannot be read ({e.strerror})") from e


class SyntheticSource:
  """Noise, to measure a run without its input."""

  def __init__(self, num_examples: int, num_classes: int):
    self.class_names = tuple(str(i) for i in range(num_classes))
    self.num_classes = num_classes
    self._num_examples = num_examples

  def __len__(self) -> int:
    return self._num_examples

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < len(self):
      raise IndexError(f"example {index} of {len(self)}")
    noise = np.random.default_rng(index).integers(0, 256, (32, 32, 3), np.uint8)
    return Record(simplejpeg.encode_jpeg(noise), index % self.num_classes, f"synthetic {index}")


def open_source(data: Any, split: str, num_classes: int | None) -> Source:
  """Opens one split of the data of a config.

  Args:
    data: `config.data`; reads `path`, `kind` and, for synthetic data, `synthetic_examples`.
    split: name of the split; `val` and `validation` are taken for the same.
    num_classes: `config.model.num_classes`; None takes what there is, unless data are synthetic.

  Raises:
    DataError: the path, the split or the number of classes do not fit what is there.
  """
  if data.kind not in KINDS:
    raise DataError(f"config.data.kind is {data.kind!r}; it must be one of {', '.join(KINDS)}.")
  if data.kind == "synthetic":
    if data.synthetic_examples < 1:
      raise DataError("config.data.synthetic_examples must be at least 1.")
    return SyntheticSource(data.synthetic_examples, num_classes)
  order = order_of(data.kind, data.path)
  if order == "parquet":
    path = data.path
    source = hf.open_source(path, split, num_classes)
  elif order == "lanes":
    path = _checked_url(data.path) if has_scheme(data.path) else _local_folder(data.path)
    patience = Patience(
      data.stream_timeout_seconds, data.stream_hedge_seconds, data.stream_give_up_seconds
    )
    bucket = Bucket(path, patience)
    source = StreamSource(bucket, catalog.read(bucket, split))
  else:
    path = _local_folder(data.path)
    kind = _guess_kind(path) if data.kind == "auto" else data.kind
    if kind == "folder":
      source = _open_folder(path, split)
    else:
      folder = catalog.LocalFolder(path)
      source = ArrayRecordSource(folder, catalog.read(folder, split))
  if num_classes is not None and source.num_classes != num_classes:
    raise DataError(
      f"{path} has {source.num_classes} classes, but config.model.num_classes is {num_classes}; "
      f"give --config.model.num_classes={source.num_classes}."
    )
  return source


def check_kind(kind: str) -> None:
  """Raises ValueError, one sentence, if there is no such `config.data.kind`."""
  if kind not in KINDS:
    raise ValueError(f"config.data.kind must be one of {', '.join(KINDS)}; it is {kind!r}.")


def order_of(kind: str, path: str) -> str:
  """Returns in which of three orders the examples of a config come, by its data.kind and data.path.

  global: of local data | lanes: read by ranges, see order.py | parquet: see hf_stream.py
  """
  if kind == "hf" or (kind == "auto" and path.startswith(hf.PREFIX)):
    return "parquet"
  return "lanes" if kind == "stream" or (kind == "auto" and has_scheme(path)) else "global"


def list_classes(folder: str) -> list[str]:
  """Returns the names of the folders in a folder, sorted; hidden ones are left out."""
  with os.scandir(folder) as entries:
    return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def list_images(folder: str) -> list[str]:
  """Returns the names of the image files in a folder, by their suffix, sorted."""
  with os.scandir(folder) as entries:
    return sorted(
      e.name
      for e in entries
      if e.name.lower().endswith(IMAGE_SUFFIXES) and not e.name.startswith(".")
    )


def _checked_url(url: str) -> str:
  """Returns a URL that can be streamed from; raises DataError for others."""
  scheme = url.partition("://")[0]
  if scheme not in bucket_lib.SCHEMES:
    raise DataError(
      f"config.data.path is {url}, but {scheme}:// is not supported; it may be "
      f"{', '.join(f'{s}://' for s in bucket_lib.SCHEMES)} or a folder."
    )
  return url


def _local_folder(path: str) -> str:
  """Returns the path of an existing, non-empty local folder or raises DataError."""
  if not path:
    raise DataError(
      "config.data.path is empty; give --config.data.path=FOLDER, "
      "or --config.data.kind=synthetic to run without data."
    )
  if has_scheme(path):
    raise DataError(
      f"config.data.path is {path}, but only a local folder can be read with this config.data.kind;"
      " give --config.data.kind=stream."
    )
  path = os.path.expanduser(path)
  if not os.path.exists(path):
    raise DataError(f"config.data.path is {path}, which does not exist.")
  if not os.path.isdir(path):
    raise DataError(
      f"config.data.path is {path}, which is a file; make shards of it with "
      "`python -m input_pipeline.prepare` and give their folder."
    )
  try:
    if not os.listdir(path):
      raise DataError(
        f"config.data.path is {path}, which is empty; fill it with input_pipeline.prepare."
      )
  except PermissionError as e:
    raise DataError(f"config.data.path is {path}, which may not be read: {e.strerror}.") from e
  return path


def _guess_kind(path: str) -> str:
  """Returns array_record or folder by what a folder holds."""
  names = os.listdir(path)
  if (
    records.MANIFEST in names
    or catalog.TFDS_INFO in names
    or any(".array_record" in name for name in names)
  ):
    return "array_record"
  # TFDS nests DATASET/VERSION, and the parent is an easy mistake.
  for parent, folders, files in os.walk(path):
    if records.MANIFEST in files or catalog.TFDS_INFO in files:
      raise DataError(
        f"config.data.path is {path}, but the data are in {parent}; give that folder."
      )
    if os.path.relpath(parent, path).count(os.sep) >= 1:
      folders.clear()
    folders[:] = sorted(folders)[:20]
  if any(list_classes(os.path.join(path, name)) for name in list_classes(path)):
    return "folder"
  raise DataError(
    f"{path} holds neither {records.MANIFEST} nor {catalog.TFDS_INFO} with ArrayRecord shards, nor "
    "SPLIT/CLASS/*.jpg; make shards with `python -m input_pipeline.prepare`."
  )


def _open_folder(path: str, split: str) -> FolderSource:
  splits = list_classes(path)
  split = catalog.find_split(split, splits, path)
  classes = list_classes(os.path.join(path, split))
  # Labels are positions in a sorted list: a class that one split lacks would shift those behind it.
  for other in sorted({"train", "val", "validation"}.intersection(splits)):
    unlike = set(classes).symmetric_difference(list_classes(os.path.join(path, other)))
    if unlike:
      raise DataError(
        f"{path}: {split} and {other} must have the same class folders, but {min(unlike)!r} is in "
        "only one of them."
      )
  files = [
    (os.path.join(split, name, image), label)
    for label, name in enumerate(classes)
    for image in list_images(os.path.join(path, split, name))
  ]
  if not files:
    raise DataError(f"{os.path.join(path, split)} holds no CLASS/*{'|'.join(IMAGE_SUFFIXES)}.")
  return FolderSource(path, files, classes)


def _allow_open_files(shards: int) -> None:
  """Raises the soft limit of open files, usually 1,024: one stays open for each shard."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  wanted = shards + 1024  # for all else that a trainer opens
  if hard != resource.RLIM_INFINITY and wanted > hard:
    wanted = hard
  if soft != resource.RLIM_INFINITY and soft < wanted:
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
