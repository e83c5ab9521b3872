"""Batches for training and evaluation: global order -> rows of this host -> decode -> uint8 arrays.

The batch of a training step is a pure function of (source, config.data, seed, step): neither hosts,
processes, threads nor restarts change it, so there is no iterator state to save. Resume is
`first_step=`. That holds for sources with random access, which get a global shuffle, and for
streamed ones, which get the shuffle in lanes of `order.LaneShuffle`.
"""

import abc
import collections
import functools
import math
import sys
import threading
from typing import Any, Callable, Iterator

from absl import flags
from absl import logging
import grain
import numpy as np

from input_pipeline import image
from input_pipeline import processes
from input_pipeline import slots
from input_pipeline.errors import BadRecordError
from input_pipeline.errors import DataError
from input_pipeline.errors import one_line
from input_pipeline.order import GlobalShuffle
from input_pipeline.order import InOrder
from input_pipeline.order import LaneShuffle
from input_pipeline.order import WindowedOrder
from input_pipeline.records import Record
from input_pipeline.sources import Source
from input_pipeline.sources import StreamSource
from input_pipeline.sources import SyntheticSource
from input_pipeline.stream import ReadAhead

Batch = dict[str, np.ndarray]

_ENDLESS = 2**48  # steps
_NEIGHBOURS = 16  # tried in place of a record that cannot be decoded
_GREY = 128  # of an evaluated image that cannot be decoded
_SLOTS_IN_FLIGHT = 6  # tasks of a process being written, waiting to be fetched, and in use
_POOL = 4  # synthetic batches made; more would only cost memory


class _Notes:
  """What happened while a batch was made; travels from a decoding process beside the arrays."""

  def __init__(self):
    self.reasons: list[str] = []  # of records that are bad
    self.fatal: str | None = None
    self.reads: collections.Counter[str] = collections.Counter()  # see Bucket.counters

  def add(self, other: "_Notes") -> None:
    """Adds what happened in another part of the same batch."""
    self.reasons += other.reasons
    self.fatal = self.fatal or other.fatal
    self.reads += other.reads


class _Rows(abc.ABC):
  """Makes this host's rows of one global batch. Called by Grain, in threads or processes.

  A task is a batch, or of streamed data one of `parts` parts of it: each process has its own part,
  so that no two of them read the same blocks.
  """

  def __init__(self, source: Source, data: Any, size: int, batch_size: int, host: int, hosts: int):
    self._source = source
    # Here and below plain values: attributes of a ConfigDict are slow, and this runs once per image.
    self._size = int(size)
    self._rows = batch_size // hosts
    self._batch_size = batch_size
    self._offset = host * self._rows
    self.workers, self.threads = processes.choose(data.workers, data.threads)
    self._streamed = isinstance(source, StreamSource)
    self.parts = max(1, self.workers) if self._streamed else 1
    self.slots: slots.Slots | None = None  # where processes write the images
    self._ahead = int(data.stream_ahead_steps)
    self._requests = int(data.stream_requests)
    self.steps = range(0)
    self._forget_readers()

  def _forget_readers(self) -> None:
    self._readers: dict[int, ReadAhead] = {}
    self._lock = threading.Lock()

  def __getstate__(self) -> dict[str, Any]:
    return {key: v for key, v in self.__dict__.items() if key not in ("_readers", "_lock")}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._forget_readers()

  def __call__(self, task: int) -> tuple[Batch, _Notes]:
    step, part = divmod(int(task), self.parts)
    first, count = self._span(part, step)
    batch, notes = self._empty(count), _Notes()
    # Without a free slot Grain copies the array to shared memory of its own: slower, not wrong.
    claim = self.slots and self.slots.claim(count)
    if claim:
      batch["image"] = claim.array
    try:
      self._fill(batch, first, self._examples(part, step), notes)
    except DataError as e:
      # Carried, not raised, so that it arrives the same from a thread and from a process.
      notes.fatal = str(e)
    if self._streamed:
      notes.reads = self._source.bucket.drain_counters()
    if claim:
      batch["image"] = claim.slot
    return batch, notes

  def open(self, element: tuple[Batch, _Notes]) -> tuple[Batch, _Notes]:
    """Returns what a process made, with the images in place of the number of their slot."""
    batch, notes = element
    if isinstance(batch["image"], slots.Slot):
      batch["image"] = self.slots.open(batch["image"])
    return batch, notes

  def make_slots(self, count: int) -> None:
    """Reserves shared memory for so many tasks of each process."""
    rows = -(-self._rows // self.parts)
    self.slots = slots.Slots((rows, self._size, self._size, 3), self.workers, count)

  def close(self) -> None:
    """Stops reading ahead in this process."""
    for reader in self._readers.values():
      reader.close()
      self._source.bucket.interrupt()

  def _span(self, part: int, step: int) -> tuple[int, int]:
    """Returns the global number of the first example of a task, and how many it has."""
    begin, end = (self._rows * p // self.parts for p in (part, part + 1))
    return step * self._batch_size + self._offset + begin, end - begin

  def _examples(self, part: int, step: int) -> Iterator[tuple[int, Callable[[], Record]]]:
    """Yields index and record of each example of a task; raises, when called, as Source does."""
    if self._streamed:
      for index, data in self._reader(part).take(step):
        yield index, functools.partial(self._source.decode, index, data)
    else:
      first, count = self._span(part, step)
      for number in range(first, first + count):
        index = self._index(number)
        if index is not None:
          yield index, functools.partial(self._source.__getitem__, index)

  def _reader(self, part: int) -> ReadAhead:
    with self._lock:
      if part not in self._readers:
        self._readers[part] = ReadAhead(
          self._source.read_run,
          self._windowed_order(),
          functools.partial(self._span, part),
          steps=self.steps,
          ahead=self._ahead,
          requests=self._requests,
        )
      return self._readers[part]

  @abc.abstractmethod
  def _empty(self, count: int) -> Batch:
    """Returns `count` rows to be filled."""

  @abc.abstractmethod
  def _index(self, number: int) -> int | None:
    """Returns the index of an example by its number; None if it only pads."""

  @abc.abstractmethod
  def _windowed_order(self) -> WindowedOrder:
    """Returns the order of streamed data."""

  @abc.abstractmethod
  def _fill(self, batch: Batch, first: int, examples: Iterator, notes: _Notes) -> None:
    """Fills the rows of `batch`, the first of which is example number `first`; notes what fails."""

  def _read(
    self, get: Callable[[], Record], view: Callable[[bytes], None], notes: _Notes
  ) -> tuple[Record | None, bool]:
    """Returns the record, None if there is none, and whether `view` could use it; notes why not."""
    record = None
    try:
      record = get()
      view(record.image)
      return record, True
    except BadRecordError as e:
      notes.reasons.append(one_line(f"{record.name}: {e}" if record else str(e)))
      return record, False


def _empty_rows(count: int, size: int) -> Batch:
  return {
    "image": np.empty((count, size, size, 3), np.uint8),
    "label": np.zeros(count, np.int32),
    "bad": np.zeros(count, bool),
  }


class _TrainRows(_Rows):
  """Rows of an endless run over the examples: each epoch another permutation of all of them."""

  def __init__(self, source, data, batch_size, host, hosts, seed: int):
    super().__init__(source, data, data.image_size, batch_size, host, hosts)
    self._area = tuple(data.crop_area)
    self._aspect = tuple(data.crop_aspect)
    self._flip = bool(data.flip)
    order_seed, crop_seed = np.random.SeedSequence(seed).generate_state(2)
    # Hashed, because Grain adds the epoch to its seed: seed 1 would repeat the epochs of seed 0.
    self._order_seed, self._crop_seed = int(order_seed), int(crop_seed)
    self._lanes, self._block, self._window = (
      int(data[f"stream_{name}"]) for name in ("lanes", "block", "window")
    )
    self._order = GlobalShuffle(len(source), self._order_seed)

  def _empty(self, count):
    return _empty_rows(count, self._size)

  def _index(self, number):
    return self._order[number]

  def _windowed_order(self):
    return LaneShuffle(
      [shard.count for shard in self._source.shards],
      self._order_seed,
      self._batch_size,
      lanes=self._lanes,
      block=self._block,
      window=self._window,
    )

  def _fill(self, batch, first, examples, notes):
    for row, (index, get) in enumerate(examples):
      view = functools.partial(self._view, first + row, batch["image"][row])
      for offset in range(_NEIGHBOURS + 1):
        neighbour = (index + offset) % len(self._source)
        if offset:
          get = functools.partial(self._source.__getitem__, neighbour)
        record, good = self._read(get, view, notes)
        if good:
          break
      else:
        raise DataError(
          f"{_NEIGHBOURS + 1} neighbouring records cannot be decoded, the last is "
          f"{notes.reasons[-1]}; check the data."
        )
      batch["bad"][row] = offset > 0
      batch["label"][row] = record.label

  def _view(self, number: int, out: np.ndarray, data: bytes) -> None:
    """Writes the augmented image of example `number` to uint8 [size, size, 3]."""
    rng = np.random.Generator(np.random.Philox(key=[self._crop_seed, number]))
    image.train_view(data, rng, self._size, self._area, self._aspect, self._flip, out)


class _EvalRows(_Rows):
  """Rows of one pass over the examples in order, padded at the end."""

  def __init__(self, source, data, batch_size, host, hosts):
    super().__init__(source, data, data.eval_image_size, batch_size, host, hosts)
    self._resize = int(data.eval_resize)

  def _empty(self, count):
    return _empty_rows(count, self._size) | {"mask": np.zeros(count, bool)}

  def _index(self, number):
    return number if number < len(self._source) else None

  def _windowed_order(self):
    return InOrder([shard.count for shard in self._source.shards])

  def _fill(self, batch, first, examples, notes):
    count = 0
    for row, (_, get) in enumerate(examples):
      batch["mask"][row] = True
      view = functools.partial(self._view, batch["image"][row])
      record, good = self._read(get, view, notes)
      if not good:
        batch["bad"][row] = True
        batch["image"][row] = _GREY
      if record is not None:
        batch["label"][row] = record.label
      count += 1
    batch["image"][count:] = 0

  def _view(self, out: np.ndarray, data: bytes) -> None:
    """Writes the central crop of an image to uint8 [size, size, 3]."""
    out[...] = image.eval_view(data, self._resize, self._size)


class BatchIterator:
  """Iterates over batches; counts records that cannot be decoded and stops when they are too many.

  Attributes:
    bad_records: how many rows of the batches so far could not be decoded.
    reads: requests, bytes, retries and hedges of the reads from a bucket so far.
  """

  def __init__(
    self, batches: Iterator[tuple[Batch, _Notes]], examples: int, max_bad_fraction: float
  ):
    """Wraps an iterator.

    Args:
      batches: yields (batch, what happened to it); has close().
      examples: length of the source.
      max_bad_fraction: bad rows tolerated, as a share of `examples` or, when that is more, of the
        rows seen.
    """
    self.bad_records = 0
    self.reads: collections.Counter[str] = collections.Counter()
    self._batches = batches
    self._examples = examples
    self._max_bad_fraction = max_bad_fraction
    self._seen = 0
    self._logged = set()
    self._last = collections.deque(maxlen=3)

  def __iter__(self) -> "BatchIterator":
    return self

  def __next__(self) -> Batch:
    """Returns the next batch.

    Raises:
      StopIteration: the evaluation is over.
      DataError: too many records are bad, a shard is wrong, or a decoding process died.
    """
    try:
      batch, notes = next(self._batches)
    except RuntimeError as e:
      if "terminated unexpectedly" not in str(e):
        raise
      raise DataError(
        f"a decoding process failed ({e}); it was probably short of memory or of /dev/shm, "
        "lower config.data.workers or config.data.prefetch_batches."
      ) from e
    for reason in notes.reasons:
      if reason not in self._logged:
        self._logged.add(reason)
        self._last.append(reason)
        logging.warning("Bad record: %s", reason)
    self.reads += notes.reads
    if notes.fatal:
      raise DataError(notes.fatal)
    self._seen += len(batch["bad"])
    self.bad_records += int(batch["bad"].sum())
    share_of = max(self._seen, self._examples)
    if self.bad_records > self._max_bad_fraction * share_of:
      raise DataError(
        f"{self.bad_records} records cannot be decoded, {self.bad_records / share_of:.3%} of "
        f"{share_of}, more than config.data.max_bad_fraction={self._max_bad_fraction}; the last "
        f"were {'; '.join(self._last)}."
      )
    return batch

  def close(self) -> None:
    """Stops threads and processes; the iterator cannot be used afterwards. May be called twice."""
    self._batches.close()


def train_batches(
  source: Source,
  data: Any,
  *,
  seed: int,
  global_batch_size: int,
  first_step: int = 0,
  host: int = 0,
  hosts: int = 1,
) -> BatchIterator:
  """Iterates over this host's rows of the global batches first_step, first_step + 1, ... endlessly.

  Row r of step s is example number g = s * global_batch_size + r of the run. Its epoch is
  g // len(source), each epoch is another permutation, and epochs run on across batches. Host h gets
  the rows [h * b, (h + 1) * b) with b = global_batch_size / hosts. A record that cannot be decoded
  is replaced by the next one in the source that can. A StreamSource has another order than all
  other sources, see `order.py`.

  Args:
    source: the examples.
    data: `config.data`.
    seed: of the order, crops and flips.
    global_batch_size: examples per step over all hosts.
    first_step: where to start; any step starts as fast as the first.
    host: number of this host.
    hosts: number of hosts.

  Returns:
    An iterator of {"image": uint8 [b, S, S, 3], "label": int32 [b], "bad": bool [b]}, to be closed.

  Raises:
    DataError: a value does not fit; see BatchIterator for what happens later.
  """
  _check(data, "config.global_batch_size", global_batch_size, hosts)
  if seed < 0:
    raise DataError(f"config.seed={seed} must not be negative.")
  for name, most in (("crop_area", 1.0), ("crop_aspect", math.inf)):
    low, high = data[name]
    if not 0 < low <= high <= most:
      raise DataError(f"config.data.{name}={(low, high)} must be 0 < low <= high <= {most}.")
  if isinstance(source, StreamSource) and global_batch_size % data.stream_lanes:
    raise DataError(
      f"config.global_batch_size={global_batch_size} must be a multiple of "
      f"config.data.stream_lanes={data.stream_lanes}."
    )
  rows = _TrainRows(source, data, global_batch_size, host, hosts, seed)
  make = _synthetic if isinstance(source, SyntheticSource) else _read_ahead
  return BatchIterator(make(rows, first_step, _ENDLESS, data), len(source), data.max_bad_fraction)


def eval_batches(
  source: Source, data: Any, *, batch_size: int, host: int = 0, hosts: int = 1
) -> BatchIterator:
  """Iterates once over all examples: every one exactly once over all hosts.

  All hosts get ceil(len(source) / batch_size) batches. Rows that pad the last one are zero with
  mask False. A record that cannot be decoded stays in the count, as a grey image with its label (0
  if that cannot be read either).

  Args:
    source: the examples.
    data: `config.data`.
    batch_size: examples per batch over all hosts; host h gets the rows [h * b, (h + 1) * b).
    host: number of this host.
    hosts: number of hosts.

  Returns:
    An iterator of {"image": uint8 [b, S, S, 3], "label": int32 [b], "bad": bool [b],
    "mask": bool [b]}, to be closed.

  Raises:
    DataError: a value does not fit; see BatchIterator for what happens later.
  """
  _check(data, "config.eval.batch_size", batch_size, hosts)
  if data.eval_resize < data.eval_image_size:
    raise DataError(
      f"config.data.eval_resize={data.eval_resize} is smaller than "
      f"config.data.eval_image_size={data.eval_image_size}, which is cut out of it."
    )
  rows = _EvalRows(source, data, batch_size, host, hosts)
  batches = math.ceil(len(source) / batch_size)
  make = _synthetic if isinstance(source, SyntheticSource) else _read_ahead
  return BatchIterator(make(rows, 0, batches, data), len(source), data.max_bad_fraction)


def _check(data: Any, field: str, batch_size: int, hosts: int) -> None:
  """Raises DataError if a batch cannot be shared among the hosts or made at all."""
  if batch_size < 1 or batch_size % hosts:
    raise DataError(
      f"{field}={batch_size} must be a positive multiple of the number of hosts, {hosts}."
    )
  least = dict(image_size=1, eval_image_size=1, prefetch_batches=1, threads=-1, workers=-1)
  for name, minimum in least.items():
    if data[name] < minimum:
      raise DataError(f"config.data.{name}={data[name]} must be at least {minimum}.")


class _Joined:
  """Puts the parts of batches together, and closes what makes them."""

  def __init__(self, tasks: Iterator[tuple[Batch, _Notes]], rows: _Rows):
    self._tasks = tasks
    self._rows = rows

  def __iter__(self) -> "_Joined":
    return self

  def __next__(self) -> tuple[Batch, _Notes]:
    batch, notes = next(self._tasks)
    if self._rows.parts == 1:
      return batch, notes
    parts = [batch]
    for _ in range(self._rows.parts - 1):
      part, its_notes = next(self._tasks)
      parts.append(part)
      notes.add(its_notes)
    return {key: np.concatenate([part[key] for part in parts]) for key in batch}, notes

  def close(self) -> None:
    """Stops threads and processes."""
    self._rows.close()
    self._tasks.close()


def _read_ahead(rows: _Rows, first_step: int, end_step: int, data: Any) -> _Joined:
  """Makes the batches first_step, ..., end_step - 1 in order, in threads or in processes."""
  rows.steps = range(first_step, end_step)
  # A whole batch is one task, or one for each process: nothing is copied to put single rows together.
  tasks = grain.MapDataset.range(first_step * rows.parts, end_step * rows.parts).map(rows)
  logging.info(
    "Decoding in %s.",
    f"{rows.workers} processes, {rows.threads} threads each"
    if rows.workers
    else f"{rows.threads} threads",
  )
  ahead = max(data.prefetch_batches, rows.threads) if rows.threads else 0
  batches = tasks.to_iter_dataset(grain.ReadOptions(rows.threads, ahead))
  if rows.workers:
    if sys.platform == "linux":  # elsewhere Grain's way has to do
      rows.make_slots(ahead + _SLOTS_IN_FLIGHT)
    # Grain reads absl flags of its own when it starts processes, and trips outside of absl.app.run.
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=rows.workers, per_worker_buffer_size=1)
    batches = batches.mp_prefetch(options, worker_init_fn=_start_worker).map(rows.open)
  return _Joined(iter(batches), rows)


def _start_worker(index: int, count: int) -> None:
  """Runs in a new decoding process, number `index` of `count`."""
  del count
  slots.set_worker(index)
  processes.follow_parent()


def _synthetic(
  rows: _Rows, first_step: int, end_step: int, data: Any
) -> Iterator[tuple[Batch, _Notes]]:
  """Yields the same few batches over and over: what then remains is the cost of the run itself."""
  del data
  pool = {}
  for step in range(first_step, end_step):
    # The last batch of an evaluation is its own: rows of it may be padding.
    key = step if step == end_step - 1 else step % _POOL
    if key not in pool:
      pool[key] = rows(key)
    yield pool[key]
