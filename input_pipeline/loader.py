"""Batches for training and evaluation: global order -> rows of this host -> decode -> uint8 arrays.

The batch of a training step is a pure function of (source, config.data, seed, step): neither hosts,
processes, threads nor restarts change it, so there is no iterator state to save. Resume is
`first_step=`. Of streams from Hugging Face alone it is not: they have a position, which a
checkpoint keeps (see hf_stream.py).
"""

import abc
import collections
import math
from typing import Any, Iterator, Sequence

from absl import flags
from absl import logging
import grain
import numpy as np

from input_pipeline import hf
from input_pipeline import hf_stream
from input_pipeline import image
from input_pipeline import processes
from input_pipeline.errors import BadRecordError
from input_pipeline.errors import DataError
from input_pipeline.records import Record
from input_pipeline.sources import Source
from input_pipeline.sources import SyntheticSource

Batch = dict[str, np.ndarray]

_ENDLESS = 2**62  # steps
_NEIGHBOURS = 16  # tried in place of a record that cannot be decoded
_GREY = 128  # of an evaluated image that cannot be decoded
_POOL = 4  # synthetic batches made; more would only cost memory


class _BadRows:
  """What went wrong in one batch; travels from a decoding process beside the arrays."""

  def __init__(self):
    self.reasons: list[str] = []
    self.fatal: str | None = None


class _Rows(abc.ABC):
  """Makes this host's rows of one global batch. Called by Grain, in threads or processes."""

  def __init__(self, source: Source, size: int, batch_size: int, host: int, hosts: int):
    self._source = source
    # Here and below plain values: attributes of a ConfigDict are slow, and this runs once per image.
    self._size = int(size)
    self._rows = batch_size // hosts
    self._batch_size = batch_size
    self._offset = host * self._rows

  def _first(self, step: int) -> int:
    """Returns the global number of this host's first example in batch `step`."""
    return step * self._batch_size + self._offset

  def _empty(self) -> Batch:
    n = self._rows
    return {
      "image": np.zeros((n, self._size, self._size, 3), np.uint8),
      "label": np.zeros(n, np.int32),
      "bad": np.zeros(n, bool),
    }

  def __call__(self, step: int) -> tuple[Batch, _BadRows]:
    return self.make(int(step), self._picks(self._first(int(step))))

  def make(
    self, step: int, picks: Sequence[tuple[Sequence[Record], int]]
  ) -> tuple[Batch, _BadRows]:
    """Makes the rows of batch `step` of the examples source[index] for (source, index) of `picks`."""
    batch, bad = self._empty(), _BadRows()
    try:
      self._fill(batch, self._first(step), picks, bad)
    except DataError as e:
      # Carried, not raised, so that it arrives the same from a thread and from a process.
      bad.fatal = str(e)
    return batch, bad

  @abc.abstractmethod
  def _picks(self, first: int) -> list[tuple[Source, int]]:
    """Returns which examples the rows are, the first of which is example number `first` of the run."""

  @abc.abstractmethod
  def _fill(self, batch: Batch, first: int, picks: Any, bad: _BadRows) -> None:
    """Fills the rows of `batch` with `picks`; notes in `bad` what fails."""

  def _read(
    self, source: Any, index: int, bad: _BadRows
  ) -> tuple[Record | None, np.ndarray | None]:
    """Returns the record and uint8 [height, width, 3]; None for what cannot be had, with a note."""
    record = None
    try:
      record = source[index]
      return record, image.decode(record.image)
    except BadRecordError as e:
      bad.reasons.append(f"{record.name}: {e}" if record else str(e))
      return record, None


class _TrainRows(_Rows):
  """Rows of an endless run over the examples: each epoch another permutation of all of them."""

  def __init__(self, source, data, batch_size, host, hosts, seed: int):
    super().__init__(source, data.image_size, batch_size, host, hosts)
    self._area = tuple(data.crop_area)
    self._aspect = tuple(data.crop_aspect)
    self._flip = bool(data.flip)
    order_seed, crop_seed = np.random.SeedSequence(seed).generate_state(2)
    # Hashed, because Grain adds the epoch to its seed: seed 1 would repeat the epochs of seed 0.
    self._order = grain.MapDataset.range(len(source)).shuffle(seed=int(order_seed))
    self._crop_seed = int(crop_seed)

  def _picks(self, first):
    return [(self._source, self._order[first + row]) for row in range(self._rows)]

  def _fill(self, batch, first, picks, bad):
    for row, (source, index) in enumerate(picks):
      number = first + row  # counts examples over all epochs
      for offset in range(_NEIGHBOURS + 1):
        record, rgb = self._read(source, (index + offset) % len(source), bad)
        if rgb is not None:
          break
      else:
        raise DataError(
          f"{_NEIGHBOURS + 1} neighbouring records cannot be decoded, the last is "
          f"{bad.reasons[-1]}; check the data."
        )
      batch["bad"][row] = offset > 0
      rng = np.random.Generator(np.random.Philox(key=[self._crop_seed, number]))
      batch["image"][row] = image.train_view(
        rgb, rng, self._size, self._area, self._aspect, self._flip
      )
      batch["label"][row] = record.label


class _EvalRows(_Rows):
  """Rows of one pass over the examples in order, padded at the end."""

  def __init__(self, source, data, batch_size, host, hosts):
    super().__init__(source, data.eval_image_size, batch_size, host, hosts)
    self._resize = int(data.eval_resize)

  def _empty(self):
    return super()._empty() | {"mask": np.zeros(self._rows, bool)}

  def _picks(self, first):
    return [(self._source, i) for i in range(first, min(first + self._rows, len(self._source)))]

  def _fill(self, batch, first, picks, bad):
    for row, (source, index) in enumerate(picks):
      batch["mask"][row] = True
      record, rgb = self._read(source, index, bad)
      if rgb is None:
        batch["bad"][row] = True
        batch["image"][row] = _GREY
      else:
        batch["image"][row] = image.eval_crop(rgb, self._resize, self._size)
      if record is not None:
        batch["label"][row] = record.label


class BatchIterator:
  """Iterates over batches; counts records that cannot be decoded and stops when they are too many.

  Attributes:
    bad_records: how many rows of the batches so far could not be decoded.
  """

  def __init__(
    self, batches: Iterator[tuple[Batch, _BadRows]], examples: int, max_bad_fraction: float
  ):
    """Wraps an iterator of Grain (or a generator).

    Args:
      batches: yields (batch, what was bad in it); has close().
      examples: length of the source.
      max_bad_fraction: bad rows tolerated, as a share of `examples` or, when that is more, of the
        rows seen.
    """
    self.bad_records = 0
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
      batch, bad = next(self._batches)
    except RuntimeError as e:
      if "terminated unexpectedly" not in str(e):
        raise
      raise DataError(
        f"a decoding process failed ({e}); it was probably short of memory or of /dev/shm, "
        "lower config.data.workers or config.data.prefetch_batches."
      ) from e
    for reason in bad.reasons:
      if reason not in self._logged:
        self._logged.add(reason)
        self._last.append(reason)
        logging.warning("Bad record: %s", reason)
    if bad.fatal:
      raise DataError(bad.fatal)
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

  def position(self, step: int) -> hf_stream.Position | None:
    """Returns what `train_batches(positions=)` needs to go on with batch `step`, one of the last few.

    None where the number of the step says it all.
    """
    return self._batches.position(step) if isinstance(self._batches, hf_stream.ReadAhead) else None

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
  positions: Sequence[hf_stream.Position] | None = None,
) -> BatchIterator:
  """Iterates over this host's rows of the global batches first_step, first_step + 1, ... endlessly.

  Row r of step s is example number g = s * global_batch_size + r of the run. Its epoch is
  g // len(source), each epoch is another permutation, and epochs run on across batches. Host h gets
  the rows [h * b, (h + 1) * b) with b = global_batch_size / hosts. A record that cannot be decoded
  is replaced by the next one in the source that can.

  Args:
    source: the examples.
    data: `config.data`.
    seed: of the order, crops and flips.
    global_batch_size: examples per step over all hosts.
    first_step: where to start; any step starts as fast as the first.
    host: number of this host.
    hosts: number of hosts.
    positions: of all hosts before `first_step`, for a stream; see BatchIterator.position.

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
  rows = _TrainRows(source, data, global_batch_size, host, hosts, seed)
  if isinstance(source, hf.HfSource):
    batches = hf_stream.train(
      source,
      data,
      rows.make,
      seed=seed,
      global_batch_size=global_batch_size,
      first_step=first_step,
      host=host,
      hosts=hosts,
      positions=positions,
    )
  else:
    make = _synthetic if isinstance(source, SyntheticSource) else _read_ahead
    batches = make(rows, first_step, _ENDLESS, data)
  return BatchIterator(batches, len(source), data.max_bad_fraction)


def eval_batches(
  source: Source, data: Any, *, batch_size: int, host: int = 0, hosts: int = 1
) -> BatchIterator:
  """Iterates once over all examples: every one exactly once over all hosts.

  All hosts get the same number of batches: ceil(len(source) / batch_size), or a few more of a
  stream. Rows that pad the last ones are zero with mask False. A record that cannot be decoded stays in the count, as a grey image with its label (0
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
  if isinstance(source, hf.HfSource):
    batches = hf_stream.evaluate(
      source, data, rows.make, batch_size=batch_size, host=host, hosts=hosts
    )
  else:
    make = _synthetic if isinstance(source, SyntheticSource) else _read_ahead
    batches = make(rows, 0, math.ceil(len(source) / batch_size), data)
  return BatchIterator(batches, len(source), data.max_bad_fraction)


def _check(data: Any, field: str, batch_size: int, hosts: int) -> None:
  """Raises DataError if a batch cannot be shared among the hosts or made at all."""
  if batch_size < 1 or batch_size % hosts:
    raise DataError(
      f"{field}={batch_size} must be a positive multiple of the number of hosts, {hosts}."
    )
  least = {"image_size": 1, "eval_image_size": 1, "prefetch_batches": 1, "threads": 0, "workers": 0}
  for name, minimum in least.items():
    if data[name] < minimum:
      raise DataError(f"config.data.{name}={data[name]} must be at least {minimum}.")


def _read_ahead(
  rows: _Rows, first_step: int, end_step: int, data: Any
) -> Iterator[tuple[Batch, _BadRows]]:
  """Makes the batches first_step, ..., end_step - 1 in order, in threads or in processes."""
  # A whole batch is one task: nothing is passed between threads or copied to put rows together.
  steps = grain.MapDataset.range(first_step, end_step).map(rows)
  ahead = grain.ReadOptions(
    num_threads=data.threads, prefetch_buffer_size=max(data.prefetch_batches, data.threads)
  )
  batches = steps.to_iter_dataset(ahead)
  if data.workers:
    # Grain reads absl flags of its own when it starts processes, and trips outside of absl.app.run.
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()
    workers = grain.MultiprocessingOptions(num_workers=data.workers, per_worker_buffer_size=1)
    batches = batches.mp_prefetch(workers, worker_init_fn=_start_worker)
  return iter(batches)


def _start_worker(index: int, count: int) -> None:
  """Runs in a new decoding process, number `index` of `count`."""
  del index, count
  processes.follow_parent()


def _synthetic(
  rows: _Rows, first_step: int, end_step: int, data: Any
) -> Iterator[tuple[Batch, _BadRows]]:
  """Yields the same few batches over and over: what then remains is the cost of the run itself."""
  del data
  pool = {}
  for step in range(first_step, end_step):
    # The last batch of an evaluation is its own: rows of it may be padding.
    key = step if step == end_step - 1 else step % _POOL
    if key not in pool:
      pool[key] = rows(key)
    yield pool[key]
