"""Images in parquet files: of a data set of the Hugging Face hub, or of a folder, local or remote.

`datasets` finds the files and the features of a data set on the hub, with the token of the
environment (HF_TOKEN). The files are read by row group: some hundred neighbouring images, usually
in one request.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import copy
import functools
import hashlib
import os
import threading
from typing import Any, NamedTuple, Self

import ml_collections
import numpy as np

from input_pipeline.errors import DataError
from input_pipeline.records import Record
from input_pipeline.remote import fsspec as remote
from input_pipeline.remote import has_scheme
from input_pipeline.sources import hf_stream, layout, parquet, parquet_files, splits
from input_pipeline.sources.base import Plan, Reader, Source
from input_pipeline.workers.threads import Threads

_FOOTER_THREADS = 32


class RowGroup(NamedTuple):
  """A part of a parquet file: `rows` examples in `bytes` bytes of the file."""

  file: int
  index: int  # type: ignore[assignment]  # hides tuple.index
  rows: int
  bytes: int


class Labelling(NamedTuple):
  """What the columns of a data set mean: the same for all its splits and files."""

  columns: parquet.Columns
  names: tuple[str, ...]


class HfSource(Source):
  """One split: its row groups, and how to read them. There is no quick access to one example.

  Attributes:
    row_groups: all of them, in the order of the files.
    fingerprint: changes if a file is added, renamed or cut differently, but not if all files move.
  """

  order = "windows"
  indexed = False

  def __init__(self, found: parquet_files.DataSet, split: str, labelling: Labelling):
    """Read the footer of each file.

    Args:
      found: the data set.
      split: its name there.
      labelling: what its columns mean.

    Raises:
      DataError: a file cannot be read, or does not hold labelled images.
    """
    self._path = found.path
    self._files = list(found.splits[split])
    self._footers = _read_footers(self._files)
    self._image, self._label = labelling.columns.image, labelling.columns.label
    self.class_names = labelling.names
    self.num_classes = len(self.class_names)
    declared = (found.features or {}).get(self._label)
    self._tables = [
      parquet.table(url, self._label, footer, self.class_names, declared)
      for url, (_, footer) in zip(self._files, self._footers)
    ]
    for number in range(len(self._files)):
      self._check(number)
    self.row_groups = tuple(self._row_groups())
    # Which rows of a row group (URL, index) there are; None for all of every one.
    self._rows: Mapping[tuple[str, int], np.ndarray] | None = None
    digest = hashlib.sha256(repr([os.path.basename(f) for f in self._files]).encode())
    digest.update(repr(self.row_groups).encode())
    self.fingerprint = digest.hexdigest()[:16]
    self.digest, self.revision = f"parquet {self.fingerprint}", found.revision
    self.left_out = found.left_out
    mapped = sum(table is not None and parquet.is_renumbering(table) for table in self._tables)
    self.notes = (
      *found.notes,
      *labelling.columns.notes,
      *[f"{mapped} files number the classes otherwise: labels are mapped by name"] * bool(mapped),
      *[f"{layout.UNUSED}{name}" for name in found.splits if name != split],
    )
    if not len(self):
      raise DataError(f"{self._path} holds no examples.")

  @classmethod
  def open(cls, data: ml_collections.ConfigDict, split: str, num_classes: int | None) -> Self:
    """See Source; `num_classes` is used where labels are plain integers."""
    found = parquet_files.find_splits(data.path, layout.words(data.allow))
    name = splits.find(split, list(found.splits), data.path)
    columns = (data.image_column, data.label_column)
    return cls(found, name, read_labelling(found, name, columns, num_classes))

  def _check(self, number: int) -> None:
    """Raise DataError for what the footer of a file shows: bad labels, or no images in it."""
    url, (_, footer) = self._files[number], self._footers[number]
    if parquet.only_paths(footer, self._image):
      raise DataError(
        f"{url} holds the paths of images and not the images; write it again with their bytes, or "
        "make shards of the folder in which they are."
      )
    if parquet.has_integers(footer, self._label):
      found = parquet.label_range(footer, self._label)
      if found is None:  # no statistics
        labels = _read_column(url, self._footers[number], self._label)
        present = [label for label in labels if label is not None] or [-1]
        found = (min(present), max(present), len(labels) - len(present))
      parquet.check_range(url, found, self._tables[number], self.num_classes)

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
    part._tables = [self._tables[i] for i in files]
    part.left_out, part.notes = {}, ()
    part.row_groups = tuple(group._replace(file=files.index(group.file)) for group in groups)
    if self._rows is not None:
      keys = [(self._files[group.file], group.index) for group in groups]
      part._rows = {key: self._rows[key] for key in keys}
    return part

  def __getitem__(self, index: int) -> Record:
    """See Source; reads a whole row group."""
    if not 0 <= index < len(self):
      raise IndexError(f"example {index} of {len(self)}")
    _, get = next(iter(self.read_each([index])))
    return get()

  def read_each(self, indices: Sequence[int]) -> Iterator[tuple[int, Callable[[], Record]]]:
    """See Source; `indices` ascend."""
    wanted, first = iter(indices), 0
    index = next(wanted, None)
    for group in self.row_groups:
      if index is not None and index < first + group.rows:
        for number, record in enumerate(self.read(group), first):
          if number == index:
            yield index, functools.partial(_same, record)
            index = next(wanted, None)
      first += group.rows

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
    numbers = self._tables[group.file]
    name = f"{os.path.basename(url)}[{group.index}]"
    rows = range(len(labels)) if self._rows is None else self._rows[url, group.index].tolist()
    for row in rows:
      image, label = images[row].as_py(), labels[row]
      shown = f"{name}[{row}]"
      if isinstance(image, dict):
        shown = os.path.basename(image.get("path") or "") or shown
        image = image["bytes"]
      known = label if numbers is None or label is None else numbers.get(label)
      if known is None or not 0 <= known < self.num_classes:
        raise DataError(
          f"{url}, row {row} of row group {group.index}: the label is {label!r}, but there are "
          f"{self.num_classes} classes; choose a split with labels."
        )
      yield Record(image or b"", int(known), shown)

  def check_plan(self, plan: Plan) -> None:
    """See Source."""
    hf_stream.check_plan(self, plan)

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
    from pyarrow import parquet as pq

    url, (size, footer) = self._files[group.file], self._footers[group.file]
    try:
      with remote.open_file(url, size) as f:
        file = pq.ParquetFile(f, metadata=footer, pre_buffer=has_scheme(url))
        return file.read_row_group(group.index, [self._image, self._label], use_threads=False)
    except pyarrow.ArrowInvalid as e:
      raise DataError(f"{url} is damaged: {remote.said(e)}.") from e


def read_labelling(
  found: parquet_files.DataSet,
  split: str,
  columns: tuple[str, str] = ("", ""),
  num_classes: int | None = None,
) -> Labelling:
  """Return what the columns of a data set mean: by its split for training, if it has one.

  Args:
    found: the data set.
    split: asked if there is none for training.
    columns: `config.data.image_column` and `label_column`.
    num_classes: number of classes where labels are integers without names.

  Raises:
    DataError: a file cannot be read, or there are no labelled images.
  """
  split = next((name for name in found.splits if splits.canonical(name) == "train"), split)
  files = found.splits[split]
  footers = _read_footers(files[:1])
  features = found.features or parquet.features_of(footers[0][1])
  chosen = parquet.choose(found.path, features, *columns)
  label = features[chosen.label]
  if not parquet.is_named(label):  # else the first file has it all
    footers += _read_footers(files[1:])
  values = (
    value
    for url, footer in zip(files, footers)
    for value in _read_column(url, footer, chosen.label)
  )
  named = [(url, footer) for url, (_, footer) in zip(files, footers)]
  return Labelling(
    chosen,
    parquet.class_names(found.path, chosen.label, named, found.features, values, num_classes),
  )


def _same(record: Record) -> Record:
  return record


def _read_column(url: str, footer: tuple[int, Any], column: str) -> list[Any]:
  """Return the values of one column of a file."""
  from pyarrow import parquet as pq

  def read() -> list[Any]:
    with remote.open_file(url, footer[0]) as f:
      return pq.ParquetFile(f, metadata=footer[1]).read([column]).column(column).to_pylist()

  return remote.retried(url, read)


def _read_footers(urls: Sequence[str]) -> list[tuple[int, Any]]:
  # Not an executor, whose end would wait for servers that do not answer.
  threads = Threads(min(_FOOTER_THREADS, len(urls)), "footers")
  try:
    footers = [threads.submit(functools.partial(_read_footer, url)) for url in urls]
    return [footer.result() for footer in footers]
  finally:
    threads.close()


def _read_footer(url: str) -> tuple[int, Any]:
  """Return the size of a parquet file and its metadata."""
  import pyarrow
  from pyarrow import parquet as pq

  def read() -> tuple[int, Any]:
    with remote.open_file(url) as f:
      f.seek(0, os.SEEK_END)
      return f.tell(), pq.read_metadata(f)

  try:
    return remote.retried(url, read)
  except pyarrow.ArrowInvalid as e:
    raise DataError(f"{url} is no parquet file, or cut off: {remote.said(e)}.") from e
