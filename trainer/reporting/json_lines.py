"""`metrics.jsonl`: the curves of a run as lines of JSON, beside its TensorBoard files.

Each line is one window of training or one evaluation, {"step": 400, "time": 1764163200.5,
"train/loss": 2.31, ...}, with the names that the event files have. After any number of stops each
step is there once and steps rise, so the file can be read as it is:

    pandas.read_json("WORKDIR/metrics.jsonl", lines=True)
"""

from collections.abc import Callable, Iterator, Mapping
import json
import math
import time
from typing import Any

from etils import epath
import numpy as np

from input_pipeline.remote import fsspec as remote
from trainer.reporting.clu import metric_writers
from trainer.reporting.events import FLUSH_SECONDS, BucketFile, UntilItFails
from trainer.workdir import storage


class ScalarWriter(metric_writers.MetricWriter):
  """Takes scalars; what else a run writes is for TensorBoard alone."""

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Write nothing."""

  write_audios = write_videos = write_histograms = write_summaries = write_texts
  write_pointcloud = write_texts

  def write_images(self, step: int, images: Mapping[str, Any]) -> None:
    """The same."""

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """The same."""

  def flush(self) -> None:
    """Return once everything written so far is where it belongs, as far as that can be awaited."""


def grouped(scalars: Mapping[str, Any]) -> dict[str, float]:
  """Return scalars as numbers, without those of no group, as clu's own are."""
  return {name: np.asarray(value).item() for name, value in scalars.items() if "/" in name}


class JsonWriter(ScalarWriter):
  """Adds a line for each group of scalars in the thread of the caller; clu queues, see EventWriter.

  A file that cannot be written ends no run: see UntilItFails.
  """

  def __init__(self, path: epath.Path, first_step: int = 0):
    """Open a file, without the lines of steps that are taken again.

    Args:
      path: local or gs://.
      first_step: steps that the run had taken when this process restored it.
    """
    self._path, self._first_step = path, first_step
    self._object: BucketFile | None = None  # in a bucket; they cannot grow
    self._try = UntilItFails(path)
    self._flushed = time.monotonic()
    self._keep(lambda line: line["step"] <= first_step)

  def _keep(self, stays: Callable[[dict[str, Any]], bool]) -> None:
    """Leave only some of the lines in the file."""

    def rewrite() -> None:
      content = "".join(f"{json.dumps(line)}\n" for line in read(self._path) if stays(line))
      if storage.in_bucket(self._path):
        self._object = BucketFile(str(self._path))
        self._object.write(content.encode())
      else:
        storage.write_whole(self._path, content)

    self._try(rewrite)

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Add a line."""
    values = grouped(scalars)
    if not values:
      return
    if step == self._first_step:  # its evaluation is done again
      self.flush()
      self._keep(lambda line: line["step"] < step or not line.keys() & values.keys())
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    line = json.dumps({"step": int(step), "time": time.time(), **finite}) + "\n"

    def add() -> None:
      if self._object:
        self._object.write(line.encode())
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
          self.flush()
      else:
        with self._path.open("a") as file:
          file.write(line)

    self._try(add)

  def flush(self) -> None:
    """Return once everything written so far is in the file."""
    if self._object:
      self._object.flush()
    self._flushed = time.monotonic()

  def close(self) -> None:
    """The same, also if a bucket has been silent."""
    if self._object:
      self._object.close()


def read(path: epath.Path) -> Iterator[dict[str, Any]]:
  """Yield the lines of a file, without those that a killed run left torn; none if it is absent."""
  try:
    content = storage.read_whole(path)
  except FileNotFoundError:
    return
  yield from _lines(content)


class Tail:
  """The lines of a file that another process writes; each look reads what is new."""

  def __init__(self, path: epath.Path):
    """Read nothing yet.

    Args:
      path: local or gs://; may not exist yet.
    """
    self._path = path
    self._forget()

  def _forget(self) -> None:
    self._found: list[dict[str, Any]] = []
    self._size = 0  # bytes of whole lines read so far
    self._last = b""  # the last of them: as it has the time, it is found again in no other place

  def read(self) -> list[dict[str, Any]]:
    """Return all lines there are now; a resumed run may have fewer than before.

    Raises:
      StorageError: if the file cannot be read.
    """
    try:
      files, name = remote.filesystem(str(self._path))
      size = files.size(name)
      if size != self._size:
        start = self._size - len(self._last)
        new = files.cat_file(name, start=start, end=size) if size > self._size else b""
        if not new.startswith(self._last) or size < self._size:  # it was written anew
          self._forget()
          new = files.cat_file(name, start=0, end=size)
        self._add(new[len(self._last) :])
    except FileNotFoundError:
      self._forget()
    except Exception as error:
      if not storage.is_failure(error):
        raise
      raise storage.failed(f"{self._path} could not be read", error) from error
    return self._found

  def _add(self, new: bytes) -> None:
    """Take the whole lines of what comes behind those that were read."""
    whole = new[: new.rfind(b"\n") + 1]
    if whole:
      self._found = [*self._found, *_lines(whole)]
      self._size += len(whole)
      self._last = whole.splitlines(keepends=True)[-1]


def _lines(content: bytes) -> Iterator[dict[str, Any]]:
  for line in content.splitlines():
    try:
      found = json.loads(line)
    except ValueError:
      continue
    if isinstance(found, dict) and isinstance(found.get("step"), int):
      yield found
