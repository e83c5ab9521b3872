"""ArrayRecord shards read by ranges wherever they are, in the shuffle of `order.LaneShuffle`."""

import collections
from collections.abc import Callable, Iterator, Sequence
import copy
import functools
import threading
from typing import Any, Self

import ml_collections
import numpy as np

from input_pipeline.errors import BadRecordError, DataError
from input_pipeline.order import InOrder, LaneShuffle, Run, WindowedOrder, seeds
from input_pipeline.records import Record
from input_pipeline.remote import has_scheme, tensorstore
from input_pipeline.remote.read_ahead import ReadAhead
from input_pipeline.remote.record_reader import RemoteShard
from input_pipeline.sources import catalog, local
from input_pipeline.sources.array_record import ShardedSource
from input_pipeline.sources.base import ENDLESS, Get, Plan, Reader, eval_steps

# Records of a part of a split that lie up to this far apart are read by one request, with those
# between them.
_NEAR = 8


class StreamSource(ShardedSource):
  """Shards anywhere. Quick for runs of neighbours, which StreamReader asks for."""

  order = "lanes"

  def __init__(self, bucket: tensorstore.Bucket, split: catalog.Split):
    super().__init__(bucket, split)
    self.bucket = bucket
    self._open_shards()

  @classmethod
  def open(cls, data: ml_collections.ConfigDict, split: str, num_classes: int | None) -> Self:
    """See Source."""
    path = _checked_url(data.path) if has_scheme(data.path) else local.checked_folder(data.path)
    patience = tensorstore.Patience(
      data.stream_timeout_seconds, data.stream_hedge_seconds, data.stream_give_up_seconds
    )
    bucket = tensorstore.Bucket(path, patience)
    columns = (data.image_column, data.label_column)
    source = cls(bucket, catalog.read(bucket, split, columns, num_classes))
    if path.startswith("http"):  # any server, perhaps one that sends whole files only
      source._remote[0].open()
    return source

  def _open_shards(self) -> None:
    self._remote = [
      RemoteShard(self.bucket, shard.name, shard.count, shard.size, self._mend)
      for shard in self.shards
    ]

  def __getstate__(self) -> dict[str, Any]:
    state = self.__dict__.copy()
    del state["_remote"]
    return state

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._open_shards()

  def __getitem__(self, index: int) -> Record:
    return self.decode(index, self.read_run(Run(index, 1))[0])

  def subset(self, indices: np.ndarray) -> Self:
    """See Source."""
    part = super().subset(indices)
    part.bucket = copy.copy(self.bucket)  # to be interrupted, and counted, by itself
    part._open_shards()
    return part

  def read_run(self, run: Run) -> list[bytes | BadRecordError]:
    """Return the records of a run, which lies in one shard; see RemoteShard.read."""
    shard, position = self._find(run.first)
    if self._chosen is None:
      return self._remote[shard].read(position, position + run.count)
    positions = self._chosen[run.first : run.first + run.count]
    positions = positions - positions[0] + position
    answers: list[bytes | BadRecordError] = []
    for near in np.split(positions, np.flatnonzero(np.diff(positions) > _NEAR) + 1):
      records = self._remote[shard].read(int(near[0]), int(near[-1]) + 1)
      answers += [records[i] for i in (near - near[0]).tolist()]
    return answers

  def decode(self, index: int, data: bytes | BadRecordError) -> Record:
    """Return the example that an answer of `read_run` holds, or raise as __getitem__ does."""
    if isinstance(data, BadRecordError):
      # A new one: raising `data` would attach this frame to it, and with the frame the whole batch
      # until the next garbage collection.
      raise BadRecordError(str(data))
    return self._decode(data, *self._find(index))

  def read_each(self, indices: Sequence[int]) -> Iterator[tuple[int, Callable[[], Record]]]:
    """See Source."""
    if indices[-1] - indices[0] >= len(indices):  # no neighbours
      yield from super().read_each(indices)
      return
    for run in InOrder(self._counts()).runs((indices[0], len(indices))):
      try:
        answers = self.read_run(run)
      except DataError as e:  # of a whole shard
        yield run.first, functools.partial(_raise, e)
        continue
      for index, answer in enumerate(answers, run.first):
        yield index, functools.partial(self.decode, index, answer)

  def check_plan(self, plan: Plan) -> None:
    """See Source."""
    data = plan.data
    if plan.batch_size % data.stream_lanes:
      raise DataError(
        f"config.global_batch_size={plan.batch_size} must be a multiple of "
        f"config.data.stream_lanes={data.stream_lanes}."
      )

  def train_reader(self, plan: Plan) -> Reader:
    """See Source."""
    data = plan.data
    order = LaneShuffle(
      self._counts(),
      seeds(plan.seed)[0],
      plan.batch_size,
      lanes=int(data.stream_lanes),
      block=int(data.stream_block),
      window=int(data.stream_window),
      repeats=int(data.repeats),
    )
    return StreamReader(self, plan, range(plan.first_step, ENDLESS), order)

  def eval_reader(self, plan: Plan) -> Reader:
    """See Source."""
    return StreamReader(self, plan, eval_steps(self, plan), InOrder(self._counts()))

  def describe_order(
    self, data: ml_collections.ConfigDict, *, global_batch_size: int, hosts: int
  ) -> str:
    """See Source."""
    block = data.stream_window * data.stream_block
    ahead = data.stream_ahead_steps * global_batch_size
    # The windows in use, and those that the steps ahead need.
    held = min(len(self), -(-(data.stream_lanes * block + max(ahead, block)) // hosts))
    size = sum(shard.size or 0 for shard in self.shards) / self._ends[-1]
    memory = f", about {held * size / 2**20:,.0f} MiB" if size else ""
    return (
      f"streamed, {data.stream_lanes} lanes, each shuffled in windows of {data.stream_window} "
      f"blocks of {data.stream_block}; a host holds up to {held:,} records{memory}"
    )

  def _counts(self) -> list[int]:
    if self._chosen is None:
      return [shard.count for shard in self.shards]
    counts = np.diff(np.searchsorted(self._chosen, [0, *self._ends]))
    return counts[counts > 0].tolist()


class StreamReader(Reader):
  """Examples in an order of windows, which are read ahead of the steps that need them.

  Each decoding process makes its own part of every batch, so that no two of them read the same
  blocks.
  """

  def __init__(self, source: StreamSource, plan: Plan, steps: range, order: WindowedOrder):
    super().__init__(plan, steps, parts=max(1, plan.workers))
    self._source = source
    self._order = order
    self._ahead = int(plan.data.stream_ahead_steps)
    self._requests = int(plan.data.stream_requests)
    self._forget_readers()

  def _forget_readers(self) -> None:
    self._readers: dict[int, ReadAhead] = {}
    self._lock = threading.Lock()

  def __getstate__(self) -> dict[str, Any]:
    return {key: v for key, v in self.__dict__.items() if key not in ("_readers", "_lock")}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._forget_readers()

  def examples(self, step: int, part: int = 0) -> Iterator[Get]:
    """See Reader."""
    for index, data in self._reader(part).take(step):
      yield functools.partial(self._get, index, data)

  def _get(self, index: int, data: bytes | BadRecordError, offset: int) -> Record:
    if offset:
      return self._source[(index + offset) % len(self._source)]
    return self._source.decode(index, data)

  def _reader(self, part: int) -> ReadAhead:
    with self._lock:
      if part not in self._readers:
        self._readers[part] = ReadAhead(
          self._source.read_run,
          self._order,
          functools.partial(self.span, part=part),
          steps=self.steps,
          ahead=self._ahead,
          requests=self._requests,
        )
      return self._readers[part]

  def drain_counters(self) -> collections.Counter[str]:
    """See Reader."""
    return self._source.bucket.drain_counters()

  def close(self) -> None:
    """See Reader."""
    for reader in self._readers.values():
      self._source.bucket.interrupt()  # first: closing waits for reads that are under way
      reader.close()


def _checked_url(url: str) -> str:
  """Return a URL that can be streamed from; raise DataError for others."""
  scheme, slashes, _ = url.partition("://")
  if scheme not in tensorstore.SCHEMES or not slashes:
    what = f"{scheme}:// is not supported" if slashes else "an address has :// behind its kind"
    raise DataError(
      f"config.data.path is {url}, but {what}; it may be "
      f"{', '.join(f'{s}://' for s in tensorstore.SCHEMES)} or a folder."
    )
  return url


def _raise(error: Exception) -> Record:
  raise error
