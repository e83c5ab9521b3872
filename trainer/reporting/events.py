"""TensorBoard event files for clu without TensorFlow, and reading their scalars back.

`clu.metric_writers` (0.0.12) imports a writer made of TensorFlow as soon as it is imported itself,
and `clu.periodic_actions` imports `clu.metric_writers`. Importing this module first puts a writer
made of tensorboardX in that place, whether TensorFlow is installed or not, so that a run never
depends on it:

    from trainer.reporting import events
    from clu import metric_writers, periodic_actions

    writer = metric_writers.create_default_writer(logdir, just_logging=jax.process_index() > 0)
    ...
    scalars = events.read_scalars(logdir)

An event file is a sequence of records: length (uint64), its checksum (uint32), an Event protocol
buffer, its checksum (uint32), all little-endian; checksums are masked CRC-32C (TFRecord).
"""

from collections.abc import Iterator, Mapping
import os
import struct
import sys
import time
import types
from typing import Any
import uuid

from absl import logging
from etils import epath
import numpy as np
from tensorboardX import event_file_writer, record_writer
from tensorboardX import summary as summaries
from tensorboardX.proto import event_pb2, summary_pb2

from trainer.workdir import storage

_FLUSH_SECONDS = 30.0  # at most so long do written events stay in memory while others follow
_RETRY_SECONDS = 60.0  # pause of the flushes after one to a bucket has failed
_BUCKETS = 30  # of a histogram, as TensorFlow's


class SummaryWriter:
  """The clu MetricWriter that writes event files; made by `metric_writers.create_default_writer`.

  It writes in the caller's thread and has no queue: clu's AsyncWriter is the queue, and after
  `flush` everything is on the disk. Parameter names are those of clu's interface, because
  AsyncWriter passes them by name.

  Args:
    logdir: local folder or gs:// path, made if absent; each writer adds a file of its own.
  """

  def __init__(self, logdir: str):
    # tensorboardX names a file by second and host: a writer that is opened again within the second
    # would empty the file of the one before.
    record_writer.directory_check(logdir)
    self._events = event_file_writer.EventsWriter(
      os.path.join(logdir, "events"), filename_suffix=f".{uuid.uuid4().hex[:8]}"
    )
    self._flushed = time.monotonic()

  def _write(self, step: int, summary: summary_pb2.Summary):
    self._events.write_event(
      event_pb2.Event(step=int(step), wall_time=time.time(), summary=summary)
    )
    if time.monotonic() - self._flushed > _FLUSH_SECONDS:
      self.flush()

  def write_scalars(self, step: int, scalars: Mapping[str, Any]):
    """Writes numbers or arrays of one element, stored as float32."""
    summary = summary_pb2.Summary()
    for name, value in scalars.items():
      summary.value.add(tag=name, simple_value=np.asarray(value).item())
    self._write(step, summary)

  def write_texts(self, step: int, texts: Mapping[str, str]):
    """Writes Markdown."""
    for name, text in texts.items():
      self._write(step, summaries.text(name, text))

  def write_hparams(self, hparams: Mapping[str, Any]):
    """Writes the flat mapping as the text `hparams`, a table."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in hparams.items())
    self._write(0, summaries.text("hparams", f"| name | value |\n|---|---|\n{rows}"))

  def write_histograms(
    self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
  ):
    """Writes histograms of finite arrays of any shape; raises ValueError for one that is not."""
    for name, values in arrays.items():
      buckets = (num_buckets or {}).get(name) or _BUCKETS
      self._write(step, summaries.histogram(name, np.asarray(values), bins=buckets))

  def write_images(self, step: int, images: Mapping[str, Any]):
    """Writes [H, W, C] or, as one grid, [N, H, W, C]: uint8, or floating point in [0, 1]."""
    for name, image in images.items():
      image = np.asarray(image)
      layout = "HWC" if image.ndim == 3 else "NHWC"
      self._write(step, summaries.image(name, image, dataformats=layout))

  def write_summaries(
    self, step: int, values: Mapping[str, Any], metadata: Mapping[str, Any] | None = None
  ):
    """Warns once that raw summaries are not written."""
    logging.log_first_n(logging.WARNING, "Event files get no raw summaries: %s.", 1, [*values])

  def write_videos(self, step: int, videos: Mapping[str, Any]):
    """Warns once that videos are not written."""
    logging.log_first_n(logging.WARNING, "Event files get no videos: %s.", 1, [*videos])

  def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int):
    """Warns once that audio is not written."""
    logging.log_first_n(logging.WARNING, "Event files get no audio: %s.", 1, [*audios])

  def flush(self):
    """Returns when everything written so far is in the file."""
    self._events.flush()
    self._flushed = time.monotonic()

  def close(self):
    """Flushes and closes the file."""
    self._events.close()


class _BucketFile:
  """A file in a bucket for tensorboardX: objects cannot grow, so each flush uploads it anew.

  A run does not end for want of curves: what could not be uploaded is told, and goes with a later flush.
  """

  def __init__(self, path: str):
    self._path = epath.Path(path)
    self._data = bytearray()
    self._uploaded = 0
    self._retry_time = 0.0  # gcsfs has tried for half a minute, and every flush would

  def write(self, data: bytes):
    self._data += data

  def flush(self):
    if time.monotonic() >= self._retry_time:
      self._upload()

  def close(self):
    self._upload()

  def _upload(self):
    if self._uploaded == len(self._data):
      return
    try:
      self._path.write_bytes(bytes(self._data))
      self._uploaded = len(self._data)
    except (
      Exception
    ) as error:  # those of gcsfs, aiohttp and Google's libraries have no base in common
      self._retry_time = time.monotonic() + _RETRY_SECONDS
      logging.warning("%s could not be written (%s).", self._path, storage.first_line(error))


class _BucketFiles:
  """tensorboardX's factory of files in a bucket, through etils as all other files in buckets."""

  def open(self, path: str) -> _BucketFile:
    return _BucketFile(path)

  def directory_check(self, path: str):
    """Does nothing: a bucket has no folders."""


def read_scalars(logdir: os.PathLike | str) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Reads the scalars of all event files of a folder, as one run.

  A run that was stopped and resumed has several files and repeats the steps since its last
  checkpoint: for these the later file wins, by the time at which it was opened.

  Args:
    logdir: local folder or gs:// path.

  Returns:
    {name: (steps, values, wall_times)}: int64, float64 and float64 [number of points] each, sorted
    by step, every step once; wall times are seconds since 1970. Empty if there are no scalars.

  Raises:
    FileNotFoundError: if the folder does not exist.
  """
  files = [list(_events(path)) for path in epath.Path(logdir).iterdir() if "tfevents" in path.name]
  points: dict[str, dict[int, tuple[float, float]]] = {}
  for events in sorted(filter(None, files), key=lambda events: events[0].wall_time):
    for event in events:
      for value in event.summary.value:
        if value.WhichOneof("value") == "simple_value":
          points.setdefault(value.tag, {})[event.step] = (value.simple_value, event.wall_time)
  scalars = {}
  for name, by_step in sorted(points.items()):
    steps = sorted(by_step)
    values, wall_times = zip(*(by_step[step] for step in steps))
    scalars[name] = (np.array(steps, np.int64), np.array(values), np.array(wall_times))
  return scalars


def _events(path: epath.Path) -> Iterator[event_pb2.Event]:
  """Yields the events of a file up to its end or the first record that is not whole."""
  data, start = path.read_bytes(), 0
  while start < len(data):
    record = _record(data, start)
    if record is None:
      # A killed process leaves a torn last record. Behind it nothing can be found: where the next
      # record starts is known only from this one.
      logging.warning(
        "%s: the record at byte %d of %d is not whole; the rest is left out.",
        path,
        start,
        len(data),
      )
      return
    yield event_pb2.Event.FromString(record)
    start += len(record) + 16


def _record(data: bytes, start: int) -> bytes | None:
  """Returns the record that starts at byte `start` of `data`, or None if it is not whole."""
  header = data[start : start + 12]
  if len(header) < 12 or _checksum(header[:8]) != header[8:]:
    return None
  (length,) = struct.unpack("<Q", header[:8])
  record = data[start + 12 : start + 12 + length]
  checksum = data[start + 12 + length : start + 16 + length]
  return record if checksum == _checksum(record) else None


def _checksum(data: bytes) -> bytes:
  return struct.pack("<I", record_writer.masked_crc32c(data))


def _install():
  """Makes `SummaryWriter` clu's writer of event files.

  Raises:
    ImportError: if clu.metric_writers has been imported with another one before.
  """
  loaded = sys.modules.get("clu.metric_writers")
  if loaded is not None:
    raise ImportError(
      "import trainer.reporting.events before clu.metric_writers or clu.periodic_actions: "
      f"clu already has {loaded.SummaryWriter.__module__}.SummaryWriter"
    )
  module = types.ModuleType("clu.metric_writers.summary_writer", SummaryWriter.__doc__)
  module.SummaryWriter = SummaryWriter
  sys.modules[module.__name__] = module
  from clu import metric_writers  # only now can it be imported

  # A base class would have to be imported before the class that its package needs on import.
  metric_writers.MetricWriter.register(SummaryWriter)
  # tensorboardX's own wants google-cloud-storage.
  record_writer.register_writer_factory("gs", _BucketFiles())


_install()
