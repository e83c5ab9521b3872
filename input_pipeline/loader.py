"""Batches for training and evaluation: global order -> rows of this host -> decode -> uint8 arrays.

The batch of a training step is a pure function of (source, config.data, seed, step): neither hosts,
processes, threads nor restarts change it, so there is no iterator state to save. Resume is
`first_step=`. That holds for sources with random access, which get a global shuffle, and for
streamed ones, which get the shuffle in lanes of `order.LaneShuffle`. Only parquet (see
`hf_stream.py`) has a position, which a checkpoint keeps.
"""

import collections
from collections.abc import Iterator, Sequence
import math
import sys
from typing import Any

from absl import flags, logging
import grain
import numpy as np

from input_pipeline.errors import DataError
from input_pipeline.rows import Batch, EvalRows, Notes, Rows, TrainRows
from input_pipeline.sources import Source, StreamSource, SyntheticSource, hf, hf_stream
from input_pipeline.workers import processes, slots

_ENDLESS = 2**48  # steps
_SLOTS_IN_FLIGHT = 6  # tasks of a process being written, waiting to be fetched, and in use
_POOL = 4  # synthetic batches made; more would only cost memory


class BatchIterator:
  """Iterates over batches; counts records that cannot be decoded and stops when they are too many.

  Attributes:
    bad_records: how many rows of the batches so far could not be decoded.
    reads: requests, bytes, retries and hedges of the reads from a bucket so far.
  """

  def __init__(
    self, batches: Iterator[tuple[Batch, Notes]], examples: int, max_bad_fraction: float
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
  is replaced by the next one in the source that can. A StreamSource has another order, see
  `order.py`, and so has an HfSource, whose order depends on the number of hosts: `hf_stream.py`.

  Args:
    source: the examples.
    data: `config.data`.
    seed: of the order, crops and flips.
    global_batch_size: examples per step over all hosts.
    first_step: where to start; any step starts as fast as the first.
    host: number of this host.
    hosts: number of hosts.
    positions: of all hosts before `first_step`, for an HfSource; see BatchIterator.position.

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
  rows = TrainRows(source, data, global_batch_size, host, hosts, seed)
  logging.info(
    "Decoding in %s.",
    f"{rows.workers} processes, {rows.threads} threads each"
    if rows.workers
    else f"{rows.threads} threads",
  )
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


def describe_order(source: Source, data: Any, *, global_batch_size: int, hosts: int) -> str:
  """Returns in which order training examples come, and what that costs in memory, for a person."""
  if isinstance(source, hf.HfSource):
    return (
      f"parquet, {data.hf_streams} row groups at once, shuffled in windows of {data.hf_window:,}"
    )
  if not isinstance(source, StreamSource):
    return "a shuffle of all in each epoch"
  block = data.stream_window * data.stream_block
  ahead = data.stream_ahead_steps * global_batch_size
  # The windows in use, and those that the steps ahead need.
  held = min(len(source), -(-(data.stream_lanes * block + max(ahead, block)) // hosts))
  size = sum(shard.size or 0 for shard in source.shards) / len(source)
  memory = f", about {held * size / 2**20:,.0f} MiB" if size else ""
  return (
    f"streamed, {data.stream_lanes} lanes, each shuffled in windows of {data.stream_window} blocks of "
    f"{data.stream_block}; a host holds up to {held:,} records{memory}"
  )


def eval_batches(
  source: Source, data: Any, *, batch_size: int, host: int = 0, hosts: int = 1
) -> BatchIterator:
  """Iterates once over all examples: every one exactly once over all hosts.

  All hosts get the same number of batches: ceil(len(source) / batch_size), or a few more of an
  HfSource. Rows that pad the last ones are zero with mask False. A record that cannot be decoded
  stays in the count, as a grey image with its label (0 if that cannot be read either).

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
  rows = EvalRows(source, data, batch_size, host, hosts)
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
  least = dict(image_size=1, eval_image_size=1, prefetch_batches=1, threads=-1, workers=-1)
  for name, minimum in least.items():
    if data[name] < minimum:
      raise DataError(f"config.data.{name}={data[name]} must be at least {minimum}.")


class _Joined:
  """Puts the parts of batches together, and closes what makes them."""

  def __init__(self, tasks: Iterator[tuple[Batch, Notes]], rows: Rows):
    self._tasks = tasks
    self._rows = rows

  def __iter__(self) -> "_Joined":
    return self

  def __next__(self) -> tuple[Batch, Notes]:
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


def _read_ahead(rows: Rows, first_step: int, end_step: int, data: Any) -> _Joined:
  """Makes the batches first_step, ..., end_step - 1 in order, in threads or in processes."""
  rows.steps = range(first_step, end_step)
  # A whole batch is one task, or one for each process: nothing is copied to put single rows together.
  tasks = grain.MapDataset.range(first_step * rows.parts, end_step * rows.parts).map(rows)
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
  rows: Rows, first_step: int, end_step: int, data: Any
) -> Iterator[tuple[Batch, Notes]]:
  """Yields the same few batches over and over: what then remains is the cost of the run itself."""
  del data
  pool = {}
  for step in range(first_step, end_step):
    # The last batch of an evaluation is its own: rows of it may be padding.
    key = step if step == end_step - 1 else step % _POOL
    if key not in pool:
      pool[key] = rows(key)
    yield pool[key]
