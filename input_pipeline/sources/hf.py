"""Images in parquet files: of a data set of the Hugging Face hub, or of a folder, local or remote.

`datasets` finds the files and the features of a data set on the hub, with the token of the
environment (HF_TOKEN). The files are read by row group: some hundred neighbouring images, usually
in one request.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
import copy
import hashlib
import logging
import os
import re
import threading
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import ml_collections
import numpy as np

from input_pipeline.errors import DataError
from input_pipeline.records import Record
from input_pipeline.remote import fsspec as remote
from input_pipeline.remote import has_scheme
from input_pipeline.sources import catalog, hf_stream
from input_pipeline.sources.base import HF_PREFIX, Plan, Reader, Source

if TYPE_CHECKING:
  import datasets

_FOOTER_THREADS = 32
_DEPTH = 4  # of folders below the one that is given
_SPLITS = {
  "train": ("train", "training"),
  "validation": ("validation", "valid", "dev", "val"),
  "test": ("test", "testing", "eval", "evaluation"),
}
_OTHER = "other"
_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?")


class RowGroup(NamedTuple):
  """A part of a parquet file: `rows` examples in `bytes` bytes of the file."""

  file: int
  index: int  # type: ignore[assignment]  # hides tuple.index
  rows: int
  bytes: int


class HfSource(Source):
  """One split: its row groups, and how to read them. There is no quick access to one example.

  Attributes:
    row_groups: all of them, in the order of the files.
    fingerprint: changes if a file is added, renamed or cut differently, but not if all files move.
  """

  order = "windows"
  indexed = False

  def __init__(
    self,
    path: str,
    files: Sequence[str],
    features: "datasets.Features | None",
    num_classes: int | None,
  ):
    """Read the footer of each file.

    Args:
      path: what the user gave, for messages.
      files: URLs or local paths.
      features: `datasets.Features`, or None to take those of the first file.
      num_classes: how many there are, if the features have no names of classes.

    Raises:
      DataError: a file cannot be read, or the columns are not those of labelled images.
    """
    self._path = path
    self._files = list(files)
    with futures.ThreadPoolExecutor(_FOOTER_THREADS) as pool:
      self._footers = list(pool.map(_read_footer, self._files))
    self._image, self._label, names = _columns(path, features, self._footers[0][1])
    if names is None and num_classes is None:
      raise DataError(
        f"{path}: the column {self._label!r} has no names of classes, so their number is unknown."
      )
    self.class_names = tuple(names or map(str, range(num_classes or 0)))
    self.num_classes = len(self.class_names)
    self.row_groups = tuple(self._row_groups())
    # Which rows of a row group (URL, index) there are; None for all of every one.
    self._rows: Mapping[tuple[str, int], np.ndarray] | None = None
    digest = hashlib.sha256(repr([os.path.basename(f) for f in files]).encode())
    digest.update(repr(self.row_groups).encode())
    self.fingerprint = digest.hexdigest()[:16]
    if not len(self):
      raise DataError(f"{path} holds no examples.")

  @classmethod
  def open(cls, data: ml_collections.ConfigDict, split: str, num_classes: int | None) -> Self:
    """See Source; `num_classes` is used where labels are plain integers."""
    splits, features = find_splits(data.path)
    name = catalog.find_split(split, list(splits), data.path)
    return cls(data.path, splits[name], features, num_classes)

  def __len__(self) -> int:
    return sum(group.rows for group in self.row_groups)

  def subset(self, indices: np.ndarray) -> "HfSource":
    """See Source; a row group is still read as a whole."""
    part, groups = copy.copy(self), []
    rows: dict[tuple[str, int], np.ndarray] = {}
    ends = np.cumsum([group.rows for group in self.row_groups])
    cuts = np.searchsorted(indices, [0, *ends])
    for group, end, first, last in zip(self.row_groups, ends, cuts, cuts[1:], strict=False):
      if first == last:
        continue
      chosen = indices[first:last] - (end - group.rows)
      key = self._files[group.file], group.index
      rows[key] = chosen if self._rows is None else self._rows[key][chosen]
      groups.append(group._replace(rows=len(chosen)))
    part.row_groups, part._rows = tuple(groups), rows
    digest = hashlib.sha256(self.fingerprint.encode())
    digest.update(np.ascontiguousarray(indices, np.int64).tobytes())
    part.fingerprint = digest.hexdigest()[:16]
    return part

  def only(self, groups: Sequence[RowGroup]) -> "HfSource":
    """Return a source of these row groups alone, which is small when pickled."""
    part = copy.copy(self)
    files = sorted({group.file for group in groups})
    part._files, part._footers = [self._files[i] for i in files], [self._footers[i] for i in files]
    part.row_groups = tuple(group._replace(file=files.index(group.file)) for group in groups)
    if self._rows is not None:
      keys = [(self._files[group.file], group.index) for group in groups]
      part._rows = {key: self._rows[key] for key in keys}
    return part

  def _row_groups(self) -> Iterator[RowGroup]:
    for number, (_, footer) in enumerate(self._footers):
      columns = [
        i
        for i in range(footer.num_columns)
        if footer.schema.column(i).path.split(".")[0] in (self._image, self._label)
      ]
      for index in range(footer.num_row_groups):
        group = footer.row_group(index)
        if group.num_rows:
          size = sum(group.column(i).total_compressed_size for i in columns)
          yield RowGroup(number, index, group.num_rows, size)

  def read(self, group: RowGroup, stop: threading.Event | None = None) -> Iterator[Record]:
    """Yield the examples of a row group, in order.

    Raises:
      DataError: it cannot be read, or holds a label that is out of range.
    """
    url = self._files[group.file]
    table = remote.retried(url, lambda: self._read_table(group), stop)
    images, labels = table.column(self._image), table.column(self._label).to_pylist()
    name = f"{os.path.basename(url)}[{group.index}]"
    rows = range(len(labels)) if self._rows is None else self._rows[url, group.index].tolist()
    for row in rows:
      image, label = images[row].as_py(), labels[row]
      shown = f"{name}[{row}]"
      if isinstance(image, dict):
        shown = os.path.basename(image.get("path") or "") or shown
        image = image["bytes"]
      if label is None or not 0 <= label < self.num_classes:
        raise DataError(
          f"{url}, row {row} of row group {group.index}: the label is {label}, but there are "
          f"{self.num_classes} classes; choose a split with labels."
        )
      yield Record(image or b"", label, shown)

  def train_reader(self, plan: Plan) -> Reader:
    """See Source."""
    return hf_stream.train_reader(self, plan)

  def eval_reader(self, plan: Plan) -> Reader:
    """See Source."""
    return hf_stream.eval_reader(self, plan)

  def describe_order(
    self, data: ml_collections.ConfigDict, *, global_batch_size: int, hosts: int
  ) -> str:
    """See Source."""
    del global_batch_size, hosts
    return (
      f"parquet, {data.hf_streams} row groups at once, shuffled in windows of {data.hf_window:,}"
    )

  def _read_table(self, group: RowGroup) -> Any:
    import pyarrow
    from pyarrow import parquet

    url, (size, footer) = self._files[group.file], self._footers[group.file]
    try:
      with remote.open_file(url, size) as f:
        file = parquet.ParquetFile(f, metadata=footer, pre_buffer=has_scheme(url))
        return file.read_row_group(group.index, [self._image, self._label], use_threads=False)
    except pyarrow.ArrowInvalid as e:
      raise DataError(f"{url} is damaged: {remote.said(e)}.") from e


def find_splits(path: str) -> "tuple[dict[str, list[str]], datasets.Features | None]":
  """Return the parquet files of each split, and the features where the data set declares them.

  Args:
    path: [hf:]NAME[:CONFIG][@REVISION] on the hub, or a folder: local, gs://, https:// (where the
      server lists it).

  Raises:
    DataError: there is no such data set, this token may not read it, or it is not parquet.
  """
  datasets = _import_datasets()
  where = path.removeprefix(HF_PREFIX)
  local = os.path.expanduser(where)
  try:
    if has_scheme(where) or os.path.isdir(local):
      splits, features = (
        _in_folder(path, where.rstrip("/") if has_scheme(where) else local),
        None,
      )
    else:
      name = _NAME.fullmatch(where)
      if where.startswith(("/", ".", "~")) or not name:
        raise DataError(
          f"{path}: {where} is neither a folder nor NAME[:CONFIG][@REVISION] on the hub."
        )
      builder = datasets.load_dataset_builder(
        name["name"], name["config"], revision=name["revision"]
      )
      splits, features = dict(builder.config.data_files or {}), builder.info.features
  except DataError:
    raise
  except Exception as e:  # of `datasets`, its hub library, fsspec and their HTTP clients
    raise DataError(f"{path} cannot be opened: {remote.said(e)}; {_advice(e)}.") from e
  splits = {str(name): [str(f) for f in files] for name, files in splits.items()}
  for files in splits.values():
    for file in files:
      if not file.endswith(".parquet"):
        raise DataError(
          f"{path} holds {os.path.basename(file)}, but only parquet is read; many data sets of the "
          f"hub have a copy in parquet: give {HF_PREFIX}NAME@refs/convert/parquet."
        )
  return splits, features


def _in_folder(path: str, folder: str) -> dict[str, list[str]]:
  """Return the parquet files below a folder by split, by their names as `datasets` does it."""
  fs, root = remote.filesystem(folder)
  # One walk for all names and sizes: `datasets` walks once for each of dozens of patterns.
  found = remote.retried(folder, lambda: sorted(fs.find(root, maxdepth=_DEPTH)))
  files = [name for name in found if name.endswith(".parquet")]
  if not files:
    raise DataError(
      f"{path} holds no parquet files" + " that the server lists" * has_scheme(folder) + "."
    )
  splits: dict[str, list[str]] = {}
  for file in files:
    splits.setdefault(_split_of(file.removeprefix(root)), []).append(
      fs.unstrip_protocol(file) if has_scheme(folder) else file
    )
  if list(splits) == [_OTHER]:
    splits = {"train": splits[_OTHER]}
  return splits


def _split_of(name: str) -> str:
  """Return the split in the path of a file: SPLIT-00000-of-00009.parquet, or .../train/..."""
  if numbered := re.fullmatch(r"(?:.*/)?([\w.]+)-\d{5}-of-\d{5}\.parquet", name):
    return numbered[1]
  words = re.split(r"[-._ /0-9]+", name)
  return next((split for split, synonyms in _SPLITS.items() if set(synonyms) & set(words)), _OTHER)


def _import_datasets() -> Any:
  try:
    import datasets
  except ImportError as e:
    raise DataError(f"{HF_PREFIX} needs the library datasets ({e}): pip install -e '.[hf]'.") from e
  datasets.disable_progress_bars()
  for name in ("httpx", "httpx2"):  # a line for each request
    logging.getLogger(name).setLevel(logging.WARNING)
  return datasets


def _advice(error: Exception) -> str:
  text = f"{type(error).__name__} {error}"
  if any(word in text for word in ("gated", "Gated", "401", "403", "NotFound", "doesn't exist")):
    return (
      "check the name, accept its terms on the hub, and give a token in the environment as HF_TOKEN"
    )
  return "check the name and the network"


def _read_footer(url: str) -> tuple[int, Any]:
  """Return the size of a parquet file and its metadata."""
  import pyarrow
  from pyarrow import parquet

  def read() -> tuple[int, Any]:
    with remote.open_file(url) as f:
      f.seek(0, os.SEEK_END)
      return f.tell(), parquet.read_metadata(f)

  try:
    return remote.retried(url, read)
  except pyarrow.ArrowInvalid as e:
    raise DataError(f"{url} is no parquet file, or cut off: {remote.said(e)}.") from e


def _columns(path: str, features: Any, footer: Any) -> tuple[str, str, Sequence[str] | None]:
  """Return the columns of images and of labels, and the names of the classes if there are any."""
  import datasets

  features = features or datasets.Features.from_arrow_schema(footer.schema.to_arrow_schema())
  binary = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
  images = [n for n, f in features.items() if isinstance(f, datasets.Image)] or [
    n for n, f in features.items() if f in (binary, datasets.Value("binary"))
  ]
  labels = [n for n, f in features.items() if isinstance(f, datasets.ClassLabel)] or [
    n for n, f in features.items() if isinstance(f, datasets.Value) and "int" in f.dtype
  ]
  if "label" in labels:
    labels = ["label"]
  if len(images) != 1 or len(labels) != 1:
    raise DataError(
      f"{path} must have one column of images, and one of integer labels or one named `label`; "
      f"it has {', '.join(features)}."
    )
  label = features[labels[0]]
  return images[0], labels[0], label.names if isinstance(label, datasets.ClassLabel) else None
