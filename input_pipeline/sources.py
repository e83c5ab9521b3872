"""Where examples come from: random access by index to (bytes of the image, class, name).

source = open_source(config.data, config.data.train_split, config.model.num_classes)
source[7]  # Record(image=b"...", label=3, name="n01440764_18.JPEG")
"""

import bisect
import itertools
import os
import re
import resource
import threading
from typing import Any, Protocol, Sequence

from array_record.python import array_record_module
import numpy as np
import simplejpeg

from input_pipeline import records
from input_pipeline.errors import BadRecordError
from input_pipeline.errors import DataError
from input_pipeline.records import Record

KINDS = ("auto", "array_record", "folder", "hf", "synthetic")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")

_TFDS_INFO = "dataset_info.json"
_READER_OPTIONS = (
  "readahead_buffer_size:0,max_parallelism:0"  # what the library advises for random access
)
_READER_BUFFER = 32 << 10  # bytes; the default of 1 MiB would be kept for each of 1,024 shards
_PREPARE = "rerun `python -m input_pipeline.prepare` as before, it keeps the good shards"
_TFDS_PREPARE = "prepare the data with TFDS again"


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


class ArrayRecordSource:
  """Records of tf.train.Example in ArrayRecord shards, ours or those of TFDS. Thread-safe."""

  def __init__(
    self,
    folder: str,
    shards: Sequence[tuple[str, int]],
    class_names: Sequence[str],
    mend: str = _PREPARE,
  ):
    """Opens no shard yet: each is opened when the first of its records is read.

    Args:
      folder: where the shards are.
      shards: file name and number of records of each, in order.
      class_names: one per label.
      mend: what to do about a damaged shard, for messages.
    """
    self.class_names = tuple(class_names)
    self.num_classes = len(self.class_names)
    self._folder = folder
    self._mend = mend
    self._files = [name for name, _ in shards]
    self._counts = [count for _, count in shards]
    self._ends = list(itertools.accumulate(self._counts))
    _allow_open_files(len(self._files))
    self._forget_readers()

  def _forget_readers(self) -> None:
    self._readers: list[Any] = [None] * len(self._files)
    self._lock = threading.Lock()

  def __getstate__(self) -> dict[str, Any]:
    state = self.__dict__.copy()
    del state["_readers"], state["_lock"]
    return state

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._forget_readers()

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < len(self):
      raise IndexError(f"example {index} of {len(self)}")
    shard = bisect.bisect_right(self._ends, index)
    position = index - self._ends[shard] + self._counts[shard]
    name = f"{self._files[shard]}[{position}]"
    try:
      data = self._reader(shard).read([position])[0]
    except (RuntimeError, ValueError, IndexError) as e:  # a wrong checksum, or the disk
      raise BadRecordError(f"{name}: cannot be read ({e})") from e
    try:
      record = records.decode(data, name)
    except BadRecordError as e:
      raise BadRecordError(f"{name}: {e}") from e
    if not 0 <= record.label < self.num_classes:
      raise DataError(
        f"{name} in {self._folder} ({record.name}) has label {record.label}, but there are "
        f"{self.num_classes} classes; {self._mend}."
      )
    return record

  def _reader(self, shard: int) -> Any:
    """Returns the open reader of a shard; raises DataError if it does not hold what it should."""
    if self._readers[shard] is None:
      with self._lock:
        if self._readers[shard] is None:
          self._readers[shard] = self._open(shard)
    return self._readers[shard]

  def _open(self, shard: int) -> Any:
    path = os.path.join(self._folder, self._files[shard])
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
    found = reader.num_records()
    if found != self._counts[shard]:
      raise DataError(
        f"{path} holds {found} records instead of {self._counts[shard]}; {self._mend}."
      )
    return reader


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


def open_source(data: Any, split: str, num_classes: int) -> Source:
  """Opens one split of the data of a config.

  Args:
    data: `config.data`; reads `path`, `kind` and, for synthetic data, `synthetic_examples`.
    split: name of the split; `val` and `validation` are taken for the same.
    num_classes: `config.model.num_classes`.

  Raises:
    DataError: the path, the split or the number of classes do not fit what is there.
  """
  if data.kind not in KINDS:
    raise DataError(f"config.data.kind is {data.kind!r}; it must be one of {', '.join(KINDS)}.")
  if data.kind == "synthetic":
    if data.synthetic_examples < 1:
      raise DataError("config.data.synthetic_examples must be at least 1.")
    return SyntheticSource(data.synthetic_examples, num_classes)
  if data.kind == "hf" or (data.kind == "auto" and data.path.startswith("hf:")):
    from input_pipeline import hf  # which imports this module

    return _with_classes(hf.open_source(data.path, split, num_classes), data.path, num_classes)
  path = _local_folder(data.path)
  kind = _guess_kind(path) if data.kind == "auto" else data.kind
  if kind == "folder":
    source = _open_folder(path, split)
  elif os.path.exists(os.path.join(path, records.MANIFEST)):
    source = _open_manifest(path, split)
  else:
    source = _open_tfds(path, split)
  return _with_classes(source, path, num_classes)


def _with_classes(source: Source, path: str, num_classes: int) -> Source:
  """Returns a source that has as many classes as the model; raises DataError for another."""
  if source.num_classes != num_classes:
    raise DataError(
      f"{path} has {source.num_classes} classes, but config.model.num_classes is {num_classes}; "
      f"give --config.model.num_classes={source.num_classes}."
    )
  return source


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


def find_split(wanted: str, available: Sequence[str], path: str) -> str:
  """Returns the name under which a split is there.

  Raises:
    DataError: it is not.
  """
  twin = {"val": "validation", "validation": "val"}.get(wanted, wanted)
  for name in (wanted, twin):
    if name in available:
      return name
  raise DataError(
    f"{path} has no split {wanted!r}, only {', '.join(sorted(available)) or 'none at all'}; "
    "set config.data.train_split and config.data.eval_split."
  )


def _local_folder(path: str) -> str:
  """Returns the path of an existing, non-empty local folder or raises DataError."""
  if not path:
    raise DataError(
      "config.data.path is empty; give --config.data.path=FOLDER, "
      "or --config.data.kind=synthetic to run without data."
    )
  scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", path)
  if scheme:
    raise DataError(
      f"config.data.path is {path}, but {scheme[1]}:// is not supported; copy the shards to a local"
      " disk or mount the bucket as a folder."
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
    or _TFDS_INFO in names
    or any(".array_record" in name for name in names)
  ):
    return "array_record"
  # TFDS nests DATASET/VERSION, and the parent is an easy mistake.
  for parent, folders, files in os.walk(path):
    if records.MANIFEST in files or _TFDS_INFO in files:
      raise DataError(
        f"config.data.path is {path}, but the data are in {parent}; give that folder."
      )
    if os.path.relpath(parent, path).count(os.sep) >= 1:
      folders.clear()
    folders[:] = sorted(folders)[:20]
  if any(list_classes(os.path.join(path, name)) for name in list_classes(path)):
    return "folder"
  raise DataError(
    f"{path} holds neither {records.MANIFEST} nor {_TFDS_INFO} with ArrayRecord shards, nor "
    "SPLIT/CLASS/*.jpg; make shards with `python -m input_pipeline.prepare`."
  )


def _open_folder(path: str, split: str) -> FolderSource:
  splits = list_classes(path)
  split = find_split(split, splits, path)
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


def _open_manifest(path: str, split: str) -> ArrayRecordSource:
  """Opens shards written by `input_pipeline.prepare`, checked by name and size."""
  file = os.path.join(path, records.MANIFEST)
  manifest = records.read_json(file)
  version = manifest.get("format_version") if isinstance(manifest, dict) else None
  if version != records.FORMAT_VERSION:
    raise DataError(
      f"{file} has format_version {version}, this program reads {records.FORMAT_VERSION}; "
      "make the shards again with `python -m input_pipeline.prepare`."
    )
  try:
    splits = manifest["splits"]
    split = find_split(split, list(splits), path)
    shards = [(s["file"], s["examples"], s["bytes"]) for s in splits[split]["shards"]]
    classes = manifest["classes"]
  except (KeyError, TypeError) as e:
    raise DataError(f"{file} is not complete ({type(e).__name__}: {e}); {_PREPARE}.") from e
  with os.scandir(path) as entries:
    sizes = {e.name: e.stat().st_size for e in entries if e.is_file()}
  for name, _, size in shards:
    if name not in sizes:
      raise DataError(
        f"{os.path.join(path, name)} is missing, but {records.MANIFEST} lists it; {_PREPARE}."
      )
    if sizes[name] != size:
      raise DataError(
        f"{os.path.join(path, name)} has {sizes[name]:,} bytes, but {records.MANIFEST} says "
        f"{size:,}; {_PREPARE}."
      )
  shards = [(name, count) for name, count, _ in shards if count]
  if not shards:
    raise DataError(f"split {split!r} of {path} holds no examples.")
  return ArrayRecordSource(path, shards, classes)


def _open_tfds(path: str, split: str) -> ArrayRecordSource:
  """Opens shards that TFDS wrote with file_format=array_record."""
  file = os.path.join(path, _TFDS_INFO)
  if not os.path.exists(file):
    raise DataError(
      f"{path} holds neither {records.MANIFEST} nor {_TFDS_INFO}, without which shards cannot be "
      "used; if prepare was stopped, run the same command again."
    )
  info = records.read_json(file)
  try:
    if info.get("fileFormat") != "array_record":
      raise DataError(
        f"{path} was written by TFDS as {info.get('fileFormat', 'tfrecord')}; prepare it with "
        "file_format=array_record."
      )
    splits = {s["name"]: s for s in info["splits"]}
    split = find_split(split, list(splits), path)
    counts = [int(n) for n in splits[split]["shardLengths"]]
    template = splits[split].get(
      "filepathTemplate", "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    )
    names = [
      template.format(
        DATASET=info["name"],
        SPLIT=split,
        FILEFORMAT="array_record",
        SHARD_X_OF_Y=f"{i:05d}-of-{len(counts):05d}",
      )
      for i in range(len(counts))
    ]
  except (KeyError, TypeError, ValueError, AttributeError) as e:
    raise DataError(
      f"{file} is not what TFDS writes ({type(e).__name__}: {e}); {_TFDS_PREPARE}."
    ) from e
  present = set(os.listdir(path))
  for name in names:
    if name not in present:
      raise DataError(
        f"{os.path.join(path, name)} is missing, but {_TFDS_INFO} lists it; {_TFDS_PREPARE}."
      )
  shards = [(name, count) for name, count in zip(names, counts, strict=True) if count]
  if not shards:
    raise DataError(f"split {split!r} of {path} holds no examples.")
  return ArrayRecordSource(path, shards, _tfds_classes(path), _TFDS_PREPARE)


def _tfds_classes(path: str) -> list[str]:
  """Returns the names of the classes in the order of the labels, as far as TFDS wrote them down."""
  file = os.path.join(path, "label.labels.txt")
  if os.path.exists(file):
    with open(file, encoding="utf-8") as f:
      return [line.strip() for line in f if line.strip()]
  file = os.path.join(path, "features.json")
  features = records.read_json(file)
  try:
    label = features["featuresDict"]["features"]["label"]
    return [str(i) for i in range(int(label["classLabel"]["numClasses"]))]
  except (KeyError, TypeError, ValueError) as e:
    raise DataError(
      f"{file} describes no feature `label` with a number of classes; only datasets of labelled "
      "images can be used."
    ) from e


def _allow_open_files(shards: int) -> None:
  """Raises the soft limit of open files, usually 1,024: one stays open for each shard."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  wanted = shards + 1024  # for all else that a trainer opens
  if hard != resource.RLIM_INFINITY and wanted > hard:
    wanted = hard
  if soft != resource.RLIM_INFINITY and soft < wanted:
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
