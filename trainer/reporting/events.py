"""TensorBoard event files: writing them through clu without TensorFlow, and reading scalars back.

    from trainer.reporting import events
    from trainer.reporting.clu import metric_writers

    writers = [events.EventWriter(logdir, first_step)] if jax.process_index() == 0 else []
    writer = metric_writers.AsyncMultiWriter(writers)
    ...
    scalars = events.read_scalars(logdir)

An event file is a sequence of records: length (uint64), its checksum (uint32), an Event protocol
buffer, its checksum (uint32), all little-endian; checksums are masked CRC-32C (TFRecord).

Each process of a run adds a file. One that is resumed takes steps again that an earlier process had
written, so its file starts with the mark by which TensorBoard drops these (SessionLog.START).
"""

from collections.abc import Callable, Iterator, Mapping
import os
import re
import socket
import struct
import time
from typing import Any
import uuid

from absl import logging
from etils import epath
import numpy as np

from trainer.reporting.clu import metric_writers
from trainer.reporting.tensorboardx import event_pb2, record_writer, summaries, summary_pb2
from trainer.workdir import storage

FLUSH_SECONDS = 30.0  # an event later than this flushes those before it
_RETRY_SECONDS = 60.0  # no uploads to a bucket for so long after one has failed
_COMPARED = ("eval/top1", "eval/top5", "eval/loss", "train/loss")  # in TensorBoard's HParams
_BUCKETS = 30  # of a histogram, as TensorFlow's


class EventWriter(metric_writers.MetricWriter):
  """Writes TensorBoard event files in the thread of the caller.

  The queue is clu's: wrap it in AsyncWriter or AsyncMultiWriter. After `flush` everything is in the
  file; one that cannot be written ends no run, see UntilItFails. Parameter names are those of clu's
  interface, because AsyncWriter passes them by name.
  """

  def __init__(self, logdir: str, first_step: int | None = None):
    """Add a file to a folder.

    Args:
      logdir: local folder or gs:// path, made if absent.
      first_step: steps that the run had taken when this process restored it. Points of later steps
        in older files are void, and scalars written at this step replace those of older files.
        None: all points of older files stay.
    """
    record_writer.directory_check(logdir)
    self._logdir, self._first_step = logdir, first_step
    # Scalars of all files at first_step, once they are needed: {name: (value, wall time)}.
    self._at_first_step: dict[str, tuple[float, float]] | None = None
    second = _next_second(logdir)
    name = f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{uuid.uuid4().hex[:8]}"
    self._records = record_writer.RecordWriter(os.path.join(logdir, name))
    self._try = UntilItFails(os.path.join(logdir, name))
    self._flushed = time.monotonic()
    # read_scalars sorts files by the time of this event, TensorBoard by name: both are `second`.
    self._add(event_pb2.Event(wall_time=second, file_version="brain.Event:2"))
    if first_step is not None:
      # TensorBoard drops nothing at the first mark of a folder, and files of before have none.
      self._drop_from(first_step + 1)
      self._drop_from(first_step + 1)

  def _add(self, event: event_pb2.Event) -> None:
    self._try(lambda: self._records.write(event.SerializeToString()))

  def _drop_from(self, step: int) -> None:
    """Add the mark at which readers drop what they have of this step and later ones."""
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._add(event_pb2.Event(step=step, wall_time=time.time(), session_log=start))

  def _write(self, step: int, summary: summary_pb2.Summary, wall_time: float | None = None) -> None:
    self._add(event_pb2.Event(step=int(step), wall_time=wall_time or time.time(), summary=summary))
    if time.monotonic() - self._flushed > FLUSH_SECONDS:
      self.flush()

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Write numbers or arrays of one element, stored as float32."""
    values = {name: np.asarray(value).item() for name, value in scalars.items()}
    if step == self._first_step:
      self._replace(step, values)
    self._write(step, _summary(values))

  def _replace(self, step: int, values: Mapping[str, float]) -> None:
    """Drop what older files have of these scalars at the first step of this process.

    The evaluation of the step that a run is resumed at is done again. Readers can only drop all
    scalars of a step, so the others are written again, with their wall times.
    """
    if self._at_first_step is None:
      self._at_first_step = self._read(step)
    known = self._at_first_step
    if values.keys() & known.keys():
      self._drop_from(step)
      for name, (value, wall_time) in known.items():
        if name not in values:
          self._write(step, _summary({name: value}), wall_time)
    known |= {name: (value, time.time()) for name, value in values.items()}

  def _read(self, step: int) -> dict[str, tuple[float, float]]:
    """Return {name: (value, wall time)} of the scalars in the folder at a step."""
    try:
      scalars = read_scalars(self._logdir)
    except FileNotFoundError:  # a bucket without a file
      return {}
    # As in BucketFile: no kind of error of a bucket may end the run.
    except Exception as error:
      logging.warning(
        "%s could not be read (%s); step %d may be drawn twice.",
        self._logdir,
        storage.first_line(error),
        step,
      )
      return {}
    return {
      name: (values[at].item(), wall_times[at].item())
      for name, (steps, values, wall_times) in scalars.items()
      for at in np.flatnonzero(steps == step)
    }

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Write Markdown."""
    for name, text in texts.items():
      self._write(step, summaries.text(name, text))

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Write the flat mapping as a table, in the text `hparams`, and for the HParams of TensorBoard.

    There runs are compared by their fields and by `_COMPARED`.
    """
    rows = "\n".join(f"| {name} | {value} |" for name, value in hparams.items())
    self._write(0, summaries.text("hparams", f"| name | value |\n|---|---|\n{rows}"))
    kinds = (bool, int, float, str)
    plain = {name: v if isinstance(v, kinds) else str(v) for name, v in hparams.items()}
    # The last one is for the end of a run, which nobody needs to know there.
    for summary in summaries.hparams(plain, dict.fromkeys(_COMPARED, 0.0))[:2]:
      self._write(0, summary)

  def write_histograms(
    self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
  ) -> None:
    """Write histograms of arrays of any shape; raise ValueError for one that is not finite."""
    for name, values in arrays.items():
      buckets = (num_buckets or {}).get(name) or _BUCKETS
      self._write(step, summaries.histogram(name, np.asarray(values), bins=buckets))

  def write_images(self, step: int, images: Mapping[str, Any]) -> None:
    """Write [H, W, C] or, as one grid, [N, H, W, C]: uint8, or floating point in [0, 1]."""
    for name, image in images.items():
      image = np.asarray(image)
      layout = "HWC" if image.ndim == 3 else "NHWC"
      self._write(step, summaries.image(name, image, dataformats=layout))

  def write_summaries(
    self, step: int, values: Mapping[str, Any], metadata: Mapping[str, Any] | None = None
  ) -> None:
    """Warn once that raw summaries are not written."""
    logging.log_first_n(logging.WARNING, "Event files get no raw summaries: %s.", 1, [*values])

  def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
    """Warn once that videos are not written."""
    logging.log_first_n(logging.WARNING, "Event files get no videos: %s.", 1, [*videos])

  def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None:
    """Warn once that audio is not written."""
    logging.log_first_n(logging.WARNING, "Event files get no audio: %s.", 1, [*audios])

  def flush(self) -> None:
    """Return once everything written so far is in the file."""
    self._try(self._records.flush)
    self._flushed = time.monotonic()

  def close(self) -> None:
    """Flush and close the file."""
    self.flush()
    self._try(self._records.close)


def _summary(values: Mapping[str, float]) -> summary_pb2.Summary:
  summary = summary_pb2.Summary()
  for name, value in values.items():
    summary.value.add(tag=name, simple_value=value)
  return summary


def _next_second(logdir: str) -> int:
  """Return the time, in seconds since 1970, for the name of a file that is read after all others.

  TensorBoard reads the files of a folder by name, which starts with a time. Clocks of machines
  differ, and two processes may start within a second, so it may be later than now.
  """
  now = int(time.time())
  try:
    names = [path.name for path in epath.Path(logdir).iterdir()]
  except FileNotFoundError:  # a bucket without a file
    return now
  # As in BucketFile: no kind of error of a bucket may end the run.
  except Exception as error:
    logging.warning("%s could not be listed (%s).", logdir, storage.first_line(error))
    return now
  found = [re.search(r"tfevents\.(\d+)", name) for name in names]
  return max([now, *(int(match[1]) + 1 for match in found if match)])


class UntilItFails:
  """Writes to a file; the first failure is logged, and nothing is written after it.

  So no file of curves ends a run, for want of room on a disk or by any error of a bucket.
  """

  def __init__(self, path: os.PathLike[str] | str):
    self._path, self._failed = path, False

  def __call__(self, write: Callable[[], None]) -> None:
    if self._failed:
      return
    try:
      write()
    # Errors of gcsfs, aiohttp and Google's libraries have no base in common.
    except Exception as error:
      reason = storage.first_line(error)
      logging.warning("%s could not be written (%s); it ends here.", self._path, reason)
      self._failed = True


class BucketFile:
  """A file in a bucket for tensorboardX: objects cannot grow, so each flush uploads it anew.

  An upload that fails does not end the run: it is logged, and a later flush tries again.
  """

  def __init__(self, path: str):
    self._path = epath.Path(path)
    self._data = bytearray()
    self._uploaded = 0
    self._retry_time = 0.0  # each failing flush would take gcsfs half a minute

  def write(self, data: bytes) -> None:
    self._data += data

  def flush(self) -> None:
    if time.monotonic() >= self._retry_time:
      self._upload()

  def close(self) -> None:
    self._upload()

  def _upload(self) -> None:
    if self._uploaded == len(self._data):
      return
    try:
      self._path.write_bytes(bytes(self._data))
      self._uploaded = len(self._data)
    # Errors of gcsfs, aiohttp and Google's libraries have no base in common.
    except Exception as error:
      self._retry_time = time.monotonic() + _RETRY_SECONDS
      logging.warning("%s could not be written (%s).", self._path, storage.first_line(error))


class BucketFiles:
  """tensorboardX's factory of files in a bucket, through etils like all other files in buckets."""

  def open(self, path: str) -> BucketFile:
    return BucketFile(path)

  def directory_check(self, path: str) -> None:
    """Do nothing: a bucket has no folders."""


def read_scalars(
  logdir: os.PathLike[str] | str,
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Read the scalars of all event files of a folder, as one run.

  A run that was killed and resumed has several files and repeats the steps since its last
  checkpoint. As in TensorBoard, a mark in the later file drops these steps of the earlier ones.
  Files of before have no marks: where steps are repeated, the file that was opened last counts.

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
      if event.session_log.status == event_pb2.SessionLog.START:
        points = {
          name: {step: point for step, point in by_step.items() if step < event.step}
          for name, by_step in points.items()
        }
      for value in event.summary.value:
        if value.WhichOneof("value") == "simple_value":
          points.setdefault(value.tag, {})[event.step] = (value.simple_value, event.wall_time)
  scalars = {}
  for name, by_step in sorted((name, by_step) for name, by_step in points.items() if by_step):
    steps = sorted(by_step)
    values, wall_times = zip(*(by_step[step] for step in steps))
    scalars[name] = (np.array(steps, np.int64), np.array(values), np.array(wall_times))
  return scalars


def _events(path: epath.Path) -> Iterator[event_pb2.Event]:
  """Yield the events of a file up to its end or the first record that is not whole."""
  data, start = storage.read_whole(path), 0
  while start < len(data):
    record = _record(data, start)
    if record is None:
      # A killed process leaves a torn last record. Nothing after it can be found: where the next
      # record starts follows from the length of this one.
      logging.warning(
        "%s: the record at byte %d of %d is not whole; the rest of the file is ignored.",
        path,
        start,
        len(data),
      )
      return
    yield event_pb2.Event.FromString(record)
    start += len(record) + 16


def _record(data: bytes, start: int) -> bytes | None:
  """Return the record that starts at byte `start` of `data`, or None if it is not whole."""
  header = data[start : start + 12]
  if len(header) < 12 or _checksum(header[:8]) != header[8:]:
    return None
  (length,) = struct.unpack("<Q", header[:8])
  record = data[start + 12 : start + 12 + length]
  checksum = data[start + 12 + length : start + 16 + length]
  return record if checksum == _checksum(record) else None


def _checksum(data: bytes) -> bytes:
  return struct.pack("<I", record_writer.masked_crc32c(data))


# tensorboardX's own writer to buckets needs google-cloud-storage.
record_writer.register_writer_factory("gs", BucketFiles())
