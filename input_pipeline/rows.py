"""Rows of batches: which examples a host has at a step, decoded into uint8 arrays."""

import abc
import collections
from collections.abc import Callable, Iterable, Iterator
import functools
import threading
from typing import Any

from absl import logging
import numpy as np

from input_pipeline import image
from input_pipeline.errors import BadRecordError, DataError, one_line
from input_pipeline.order import GlobalShuffle, InOrder, LaneShuffle, WindowedOrder
from input_pipeline.records import Record
from input_pipeline.remote.read_ahead import ReadAhead
from input_pipeline.sources import Source, StreamSource
from input_pipeline.workers import processes, slots

Batch = dict[str, np.ndarray]

_NEIGHBOURS = 16  # tried in place of a record that cannot be decoded
_GREY = 128  # of an evaluated image that cannot be decoded

# Gives an example of a batch for 0, and for a larger number the n-th of those that may replace it.
Get = Callable[[int], Record]


class Notes:
  """What happened while a batch was made; travels from a decoding process beside the arrays."""

  def __init__(self):
    self.reasons: list[str] = []  # of records that are bad
    self.fatal: str | None = None
    self.reads: collections.Counter[str] = collections.Counter()  # see Bucket.counters

  def add(self, other: "Notes") -> None:
    """Adds what happened in another part of the same batch."""
    self.reasons += other.reasons
    self.fatal = self.fatal or other.fatal
    self.reads += other.reads


class Rows(abc.ABC):
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

  def __call__(self, task: int) -> tuple[Batch, Notes]:
    step, part = divmod(int(task), self.parts)
    return self.make(step, self._examples(part, step), part)

  def make(self, step: int, examples: Iterable[Get], part: int = 0) -> tuple[Batch, Notes]:
    """Makes a task of its examples."""
    first, count = self._span(part, step)
    batch, notes = self._empty(count), Notes()
    # Without a free slot Grain copies the array to shared memory of its own: slower, not wrong.
    claim = self.slots and self.slots.claim(count)
    if claim:
      batch["image"] = claim.array
    try:
      self._fill(batch, first, examples, notes)
    except DataError as e:
      # Carried, not raised, so that it arrives the same from a thread and from a process.
      notes.fatal = str(e)
    if self._streamed:
      notes.reads = self._source.bucket.drain_counters()
    if claim:
      batch["image"] = claim.slot
    return batch, notes

  def open(self, element: tuple[Batch, Notes]) -> tuple[Batch, Notes]:
    """Returns what a process made, with the images in place of the number of their slot."""
    batch, notes = element
    if isinstance(batch["image"], slots.Slot):
      batch["image"] = self.slots.open(batch["image"])
    return batch, notes

  def make_slots(self, count: int) -> None:
    """Reserves shared memory for so many tasks of each process."""
    rows = -(-self._rows // self.parts)
    self.slots = slots.Slots((rows, self._size, self._size, 3), self.workers, count)
    logging.log_first_n(
      logging.INFO,
      "Up to %.1f GiB of shared memory for decoded batches.",
      1,
      self.slots.nbytes / 2**30,
    )

  def close(self) -> None:
    """Stops reading ahead in this process."""
    for reader in self._readers.values():
      self._source.bucket.interrupt()  # first: closing waits for reads that are under way
      reader.close()

  def _span(self, part: int, step: int) -> tuple[int, int]:
    """Returns the global number of the first example of a task, and how many it has."""
    begin, end = (self._rows * p // self.parts for p in (part, part + 1))
    return step * self._batch_size + self._offset + begin, end - begin

  def _examples(self, part: int, step: int) -> Iterator[Get]:
    """Yields the examples of a task."""
    if self._streamed:
      for index, data in self._reader(part).take(step):
        yield functools.partial(self._get, index, data)
    else:
      first, count = self._span(part, step)
      for number in range(first, first + count):
        index = self._index(number)
        if index is not None:
          yield functools.partial(self._get, index, None)

  def _get(self, index: int, data: Any, offset: int) -> Record:
    """Returns an example or a neighbour of it, of `data` where that is read already."""
    if data is not None and not offset:
      return self._source.decode(index, data)
    return self._source[(index + offset) % len(self._source)]

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
  def _fill(self, batch: Batch, first: int, examples: Iterable[Get], notes: Notes) -> None:
    """Fills the rows of `batch`, the first of which is example number `first`; notes what fails."""

  def _read(
    self, get: Get, offset: int, view: Callable[[bytes], None], notes: Notes
  ) -> tuple[Record | None, bool]:
    """Returns the record, None if there is none, and whether `view` could use it; notes why not."""
    record = None
    try:
      record = get(offset)
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


class Draws:
  """Random numbers by example: those of Philox(key=[seed, example]), in a tenth of the time."""

  def __init__(self, seed: int):
    self._generator = np.random.Generator(np.random.Philox(key=[seed, 0]))
    self._start = self._generator.bit_generator.state

  def of(self, number: int) -> np.random.Generator:
    """Returns the generator, at the start of the numbers of an example."""
    self._start["state"]["key"][1] = number
    self._generator.bit_generator.state = self._start
    return self._generator


class TrainRows(Rows):
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
    draws = Draws(self._crop_seed)
    for row, get in enumerate(examples):
      view = functools.partial(self._view, draws, first + row, batch["image"][row])
      for offset in range(_NEIGHBOURS + 1):
        record, good = self._read(get, offset, view, notes)
        if good:
          break
      else:
        raise DataError(
          f"{_NEIGHBOURS + 1} neighbouring records cannot be decoded, the last is "
          f"{notes.reasons[-1]}; check the data."
        )
      batch["bad"][row] = offset > 0
      batch["label"][row] = record.label

  def _view(self, draws: Draws, number: int, out: np.ndarray, data: bytes) -> None:
    """Writes the augmented image of example `number` to uint8 [size, size, 3]."""
    rng = draws.of(number)
    image.train_view(data, rng, self._size, self._area, self._aspect, self._flip, out)


class EvalRows(Rows):
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
    for row, get in enumerate(examples):
      batch["mask"][row] = True
      view = functools.partial(self._view, batch["image"][row])
      record, good = self._read(get, 0, view, notes)
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
