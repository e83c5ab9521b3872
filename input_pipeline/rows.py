"""Rows of batches: the examples of a host at a step, decoded into uint8 arrays."""

import abc
import collections
from collections.abc import Callable, Iterable, Sequence
import functools
import re
from typing import Any

from absl import logging
import ml_collections
import numpy as np

from configs import image_sizes
from input_pipeline import augment, image
from input_pipeline.errors import BadRecordError, DataError, UnusableData, one_line
from input_pipeline.order import seeds
from input_pipeline.records import Record
from input_pipeline.sources.base import Get, Reader
from input_pipeline.workers import slots

# image: uint8 [rows, size, size, 3] | label: int32 [rows] | bad: bool [rows], whether the record
# could not be used | and in evaluation mask: bool [rows], whether the row is no padding | and where
# it is asked for number: int32 [rows], of a validation image of ILSVRC2012 by its name, else 0.
Batch = dict[str, np.ndarray]

# (first step, size of its images and of those after it), rising from step 0.
Sizes = Sequence[tuple[int, int]]

_VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})\b")
_NEIGHBOURS = 16  # tried in place of a record that cannot be decoded
_GREY = 128  # of an evaluated image that cannot be decoded


def validation_number(name: str) -> int:
  """Return the number of a validation image of ILSVRC2012 by its name; 0 for all others."""
  match = _VALIDATION.search(name)
  return int(match[1]) if match else 0


class Notes:
  """What happened while a batch was made; sent from a decoding process along with the arrays."""

  def __init__(self) -> None:
    self.reasons: list[str] = []  # of records that are bad
    self.fatal: DataError | None = None
    self.reads: collections.Counter[str] = collections.Counter()  # see Bucket.counters

  def add(self, other: "Notes") -> None:
    """Add the notes of another part of the same batch."""
    self.reasons += other.reasons
    self.fatal = self.fatal or other.fatal
    self.reads += other.reads


Made = tuple[Batch, Notes]


class Rows(abc.ABC):
  """This host's rows of each batch. Grain calls it with the number of a task, a batch or a part of
  one, in threads or processes.

  Attributes:
    reader: where the examples come from.
    workers: decoding processes; 0 decodes in threads of this one.
    threads: decoding threads of each process; 0 decodes a batch when it is asked for.
    slots: memory that processes write images to.
  """

  def __init__(self, reader: Reader, sizes: Sizes, workers: int, threads: int):
    self.reader = reader
    self.workers, self.threads = workers, threads
    self.slots: slots.Slots | None = None
    # Plain values here and below: a ConfigDict is slow, and this runs once per image.
    self._sizes = tuple(sizes)

  def __call__(self, task: int) -> Made:
    step, part = divmod(int(task), self.reader.parts)
    return self.make(step, self.reader.examples(step, part), part)

  def size_at(self, step: int) -> int:
    """Return the size of the images of a step."""
    return image_sizes.at(self._sizes, step)

  def make(
    self, step: int, examples: Iterable[Get], part: int = 0, size: int | None = None
  ) -> Made:
    """Make a task of its examples; `size` is that of the step, unless it is given."""
    first, count = self.reader.span(step, part)
    size = size or self.size_at(step)
    batch, notes = self._empty(count, size), Notes()
    # Without a free slot Grain copies the array to shared memory of its own: slower, not wrong.
    claim = self.slots and self.slots.claim((count, size, size, 3))
    if claim:
      batch["image"] = claim.array
    try:
      self._fill(batch, first, examples, notes)
    except DataError as e:
      # Carried, not raised, so that it arrives the same from a thread and from a process.
      notes.fatal = e
    notes.reads = self.reader.drain_counters()
    if claim:
      batch["image"] = claim.slot  # type: ignore[assignment]  # until `open`
    return batch, notes

  def open(self, element: Made) -> Made:
    """Return what a process made, with the images in place of the number of their slot."""
    batch, notes = element
    slot: Any = batch["image"]
    if self.slots and isinstance(slot, slots.Slot):
      batch["image"] = self.slots.open(slot)
    return batch, notes

  def make_slots(self, count: int) -> None:
    """Reserve shared memory for `count` tasks of each process."""
    rows = -(-self.reader.rows // self.reader.parts)
    size = max(size for _, size in self._sizes)
    self.slots = slots.Slots((rows, size, size, 3), self.workers, count)
    logging.log_first_n(
      logging.INFO,
      "Up to %.1f GiB of shared memory for decoded batches.",
      1,
      self.slots.nbytes / 2**30,
    )

  @abc.abstractmethod
  def _empty(self, count: int, size: int) -> Batch:
    """Return `count` rows to be filled."""

  @abc.abstractmethod
  def _fill(self, batch: Batch, first: int, examples: Iterable[Get], notes: Notes) -> None:
    """Fill the rows of `batch`, the first of which is example number `first`; note what fails."""

  def _read(
    self, get: Get, offset: int, view: Callable[[bytes], None], notes: Notes
  ) -> tuple[Record | None, bool]:
    """Return the record, None if there is none, and whether `view` could use it; note why not."""
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
    self._start: Any = self._generator.bit_generator.state

  def of(self, number: int) -> np.random.Generator:
    """Return the generator, at the start of the numbers of an example."""
    self._start["state"]["key"][1] = number
    self._generator.bit_generator.state = self._start
    return self._generator


def crop_of(data: ml_collections.ConfigDict) -> Callable[..., np.ndarray]:
  """Return `image.train_view` with the options of a config: a function of (bytes, rng, size)."""
  return functools.partial(
    image.train_view,
    area=tuple(data.crop_area),
    aspect=tuple(data.crop_aspect),
    flip=bool(data.flip),
    crop=str(data.crop),
    padding=int(data.crop_padding),
    interpolation=str(data.interpolation),
  )


class TrainRows(Rows):
  """Rows of a training run: random crop and flip, then the operations of the config."""

  def __init__(
    self,
    reader: Reader,
    data: ml_collections.ConfigDict,
    workers: int,
    threads: int,
    seed: int,
    sizes: Sizes,
  ):
    super().__init__(reader, sizes, workers, threads)
    self._crop = crop_of(data)
    self._operations = augment.parse(data.operations)
    self._seed = seeds(seed)[1]

  def _empty(self, count: int, size: int) -> Batch:
    return _empty_rows(count, size)

  def _fill(self, batch: Batch, first: int, examples: Iterable[Get], notes: Notes) -> None:
    draws = Draws(self._seed)
    for row, get in enumerate(examples):
      view = functools.partial(self._view, draws, first + row, batch["image"][row])
      for offset in range(_NEIGHBOURS + 1):
        record, good = self._read(get, offset, view, notes)
        if record and good:
          batch["bad"][row] = offset > 0
          batch["label"][row] = record.label
          break
      else:
        raise UnusableData(
          f"{_NEIGHBOURS + 1} neighbouring records cannot be decoded, the last is "
          f"{notes.reasons[-1]}; check the data."
        )

  def _view(self, draws: Draws, number: int, out: np.ndarray, data: bytes) -> None:
    """Write the augmented image of example `number` to uint8 [size, size, 3]."""
    rng = draws.of(number)
    self._crop(data, rng, len(out), out=out)
    augment.apply(self._operations, out, rng)


class EvalRows(Rows):
  """Rows of one pass over the examples in order, padded at the end."""

  def __init__(
    self,
    reader: Reader,
    data: ml_collections.ConfigDict,
    workers: int,
    threads: int,
    numbers: bool = False,
  ):
    super().__init__(reader, ((0, int(data.eval_image_size)),), workers, threads)
    self._numbers = numbers
    self._resize = int(data.eval_resize)
    self._interpolation = str(data.eval_interpolation)

  def _empty(self, count: int, size: int) -> Batch:
    empty = _empty_rows(count, size) | {"mask": np.zeros(count, bool)}
    return empty | {"number": np.zeros(count, np.int32)} if self._numbers else empty

  def _fill(self, batch: Batch, first: int, examples: Iterable[Get], notes: Notes) -> None:
    del first
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
        if self._numbers:
          batch["number"][row] = validation_number(record.name)
      count += 1
    batch["image"][count:] = 0

  def _view(self, out: np.ndarray, data: bytes) -> None:
    """Write the central crop of an image to uint8 [size, size, 3]."""
    out[...] = image.eval_view(data, self._resize, len(out), self._interpolation)
