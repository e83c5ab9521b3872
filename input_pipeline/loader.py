"""Batches for training and evaluation: order -> rows of this host -> decode -> uint8 arrays.

The batch of a training step is a pure function of (source, config.data, seed, step): hosts,
processes, threads and restarts do not change it, so there is no iterator state to save, and a run
resumes by `first_step=`. That holds for the orders shuffle and lanes (see `sources.ORDERS`). Only
parquet has a position, which a checkpoint keeps; see `sources/hf_stream.py`.
"""

import collections
from collections.abc import Sequence

from absl import logging
import ml_collections

from configs import base, checks, fields, image_sizes
from input_pipeline import batches as batches_lib
from input_pipeline.batches import Batches
from input_pipeline.errors import DataError, UnusableData
from input_pipeline.rows import Batch, EvalRows, Rows, Sizes, TrainRows
from input_pipeline.sources.base import Plan, Position, Reader, Source
from input_pipeline.workers import processes
from input_pipeline.workers.pool import Replacements

# The orders that data.repeats applies to; a parquet stream has each example once.
_REPEATED = ("shuffle", "lanes")


class BatchIterator:
  """Iterates over batches, counts records that cannot be decoded, and fails at too many of them.

  Attributes:
    count: number of batches; without end in training.
    bad_records: how many rows of the batches so far could not be decoded.
    reads: requests, bytes, retries and hedges of the reads from a bucket so far.
  """

  def __init__(self, batches: Batches, reader: Reader, examples: int, max_bad_fraction: float):
    """Wrap an iterator.

    Args:
      batches: what is iterated over.
      reader: where their examples come from.
      examples: length of the source.
      max_bad_fraction: bad rows tolerated, as a share of `examples` or, if that is more, of the
        rows so far.
    """
    self.count = len(reader.steps)
    self.bad_records = 0
    self.reads: collections.Counter[str] = collections.Counter()
    self._batches = batches
    self._reader = reader
    self._examples = examples
    self._max_bad_fraction = max_bad_fraction
    self._seen = 0
    self._logged: set[str] = set()
    self._last: collections.deque[str] = collections.deque(maxlen=3)

  def __iter__(self) -> "BatchIterator":
    return self

  def __next__(self) -> Batch:
    """Return the next batch.

    Raises:
      StopIteration: the evaluation is over.
      DataError: too many records are bad, a shard is wrong, or too many decoding processes died.
    """
    batch, notes = next(self._batches)
    for reason in notes.reasons:
      if reason not in self._logged:
        self._logged.add(reason)
        self._last.append(reason)
        logging.warning("Bad record: %s", reason)
    self.reads += notes.reads
    if notes.fatal:
      raise notes.fatal
    self._seen += len(batch["bad"])
    self.bad_records += int(batch["bad"].sum())
    share_of = max(self._seen, self._examples)
    if self.bad_records > self._max_bad_fraction * share_of:
      raise UnusableData(
        f"{self.bad_records} records cannot be decoded, {self.bad_records / share_of:.3%} of "
        f"{share_of}, more than config.data.max_bad_fraction={self._max_bad_fraction}; the last "
        f"were {'; '.join(self._last)}."
      )
    return batch

  def position(self, step: int) -> Position | None:
    """Return what `train_batches(positions=)` needs to resume at batch `step`, one of the last.

    None if the number of the step is enough.
    """
    return self._reader.position(step)

  def close(self) -> None:
    """Stop threads and processes; the iterator cannot be used afterwards. May be called twice."""
    self._batches.close()


def train_batches(
  source: Source,
  data: ml_collections.ConfigDict,
  *,
  seed: int,
  global_batch_size: int,
  first_step: int = 0,
  host: int = 0,
  hosts: int = 1,
  positions: Sequence[Position] | None = None,
  sizes: Sizes = (),
  replacements: Replacements | None = None,
) -> BatchIterator:
  """Iterate over this host's rows of the batches first_step, first_step + 1, ... without end.

  Row r of step s is example number g = s * global_batch_size + r of the run. Its epoch is
  g // len(source), each epoch is another permutation, and a batch may span two epochs. Host h gets
  the rows [h * b, (h + 1) * b) with b = global_batch_size / hosts. A record that cannot be decoded
  is replaced by the next one in the source that can. With data.repeats, r examples in a row of an
  epoch are the same record, each augmented by its own number. Sources with another order describe
  it: `order.LaneShuffle`, and `sources/hf_stream.py`, where it depends on the number of hosts.

  Args:
    source: the examples.
    data: `config.data`.
    seed: of order and augmentation.
    global_batch_size: examples per step over all hosts.
    first_step: where to start; any step starts as fast as the first.
    host: number of this host.
    hosts: number of hosts.
    positions: of all hosts before `first_step`, where the order has them; see
      BatchIterator.position.
    sizes: (step, size S of the images from it on), rising from step 0; by default the first size
      that `data` has, throughout. Neither the order nor the boxes of crops depend on it.
    replacements: of decoding processes, where several loaders share a limit.

  Returns:
    An iterator of {"image": uint8 [b, S, S, 3], "label": int32 [b], "bad": bool [b]}, to be closed.

  Raises:
    DataError: a value does not fit; see BatchIterator for what happens later.
  """
  check_train(source, data, global_batch_size, hosts)
  if seed < 0:
    raise DataError(f"config.seed={seed} must not be negative.")
  workers, _ = processes.choose(data.workers, data.threads)
  plan = Plan(data, global_batch_size, host, hosts, workers, seed, first_step, positions)
  reader = source.train_reader(plan)
  sizes = sizes or ((0, image_sizes.of(data)[0][1]),)
  rows = TrainRows(reader, data, *_decoders(reader, data), seed, sizes)
  logging.info(
    "Decoding in %s.",
    f"{rows.workers} processes, {rows.threads} threads each"
    if rows.workers
    else f"{rows.threads} threads",
  )
  return _iterator(rows, data, len(source), replacements)


def check_train(
  source: Source, data: ml_collections.ConfigDict, global_batch_size: int, hosts: int
) -> None:
  """Refuse what `train_batches` would refuse; nothing is read.

  Raises:
    DataError: a value does not fit.
  """
  _check(data, "config.global_batch_size", global_batch_size, hosts)
  _check_fields(
    data, "crop", "crop_area", "crop_aspect", "crop_padding", "interpolation", "repeats"
  )
  if data.repeats > 1 and source.order not in _REPEATED:
    raise DataError(
      f"config.data.repeats={data.repeats} is not possible with the order {source.order!r} of "
      f"{type(source).__name__}; make shards with `python -m input_pipeline.prepare`, or set it to "
      "1."
    )
  source.check_plan(Plan(data, global_batch_size, hosts=hosts))


def eval_batches(
  source: Source,
  data: ml_collections.ConfigDict,
  *,
  batch_size: int,
  host: int = 0,
  hosts: int = 1,
  numbers: bool = False,
  replacements: Replacements | None = None,
) -> BatchIterator:
  """Iterate over all examples, each exactly once over all hosts.

  All hosts get the same number of batches: ceil(len(source) / batch_size), or a few more of
  parquet. Rows that pad the last ones are zero with mask False. A record that cannot be decoded
  stays in the count, as a grey image with its label (0 if that cannot be read either).

  Args:
    source: the examples.
    data: `config.data`.
    batch_size: examples per batch over all hosts; host h gets the rows [h * b, (h + 1) * b).
    host: number of this host.
    hosts: number of hosts.
    numbers: whether batches have "number", int32 [b]: that of a validation image of ILSVRC2012 by
      the name of its file, and 0 for all others.
    replacements: of decoding processes, where several loaders share a limit.

  Returns:
    An iterator of {"image": uint8 [b, S, S, 3], "label": int32 [b], "bad": bool [b],
    "mask": bool [b]}, to be closed.

  Raises:
    DataError: a value does not fit; see BatchIterator for what happens later.
  """
  check_eval(data, batch_size, hosts)
  workers, _ = processes.choose(data.workers, data.threads)
  reader = source.eval_reader(Plan(data, batch_size, host, hosts, workers))
  rows = EvalRows(reader, data, *_decoders(reader, data), numbers)
  return _iterator(rows, data, len(source), replacements)


def _iterator(
  rows: Rows, data: ml_collections.ConfigDict, examples: int, replacements: Replacements | None
) -> BatchIterator:
  replacements = replacements or Replacements(data.worker_restarts)
  batches = batches_lib.start(rows, data, replacements)
  return BatchIterator(batches, rows.reader, examples, data.max_bad_fraction)


def check_eval(data: ml_collections.ConfigDict, batch_size: int, hosts: int) -> None:
  """Refuse what `eval_batches` would refuse; nothing is read.

  Raises:
    DataError: a value does not fit.
  """
  _check(data, "config.eval.batch_size", batch_size, hosts)
  _check_fields(data, "eval_resize", "eval_interpolation")
  if 0 < data.eval_resize < data.eval_image_size:
    raise DataError(
      f"config.data.eval_resize={data.eval_resize} is smaller than "
      f"config.data.eval_image_size={data.eval_image_size}, which is cut out of it; 0 is no resize."
    )


def _decoders(reader: Reader, data: ml_collections.ConfigDict) -> tuple[int, int]:
  """Return the number of decoding processes, and of threads in each."""
  if reader.in_order:
    return 0, processes.choose_threads(data.threads)
  return processes.choose(data.workers, data.threads)


def _check_fields(data: ml_collections.ConfigDict, *names: str) -> None:
  """Raise DataError if the value of a field is none that it may have."""
  values = checks.flatten(data)
  for name in names:
    wrong = fields.problem(f"data.{name}", base.RUN[f"data.{name}"], values[name])
    if wrong:
      raise DataError(wrong)


def _check(data: ml_collections.ConfigDict, field: str, batch_size: int, hosts: int) -> None:
  """Raise DataError if a batch cannot be shared among the hosts or made at all."""
  if batch_size < 1 or batch_size % hosts:
    raise DataError(
      f"{field}={batch_size} must be a positive multiple of the number of hosts, {hosts}."
    )
  _check_fields(data, "image_size", "eval_image_size", "prefetch_batches", "threads", "workers")
