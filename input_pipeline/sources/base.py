"""What a source of examples is, and the reader that serves its examples step by step.

A new source subclasses Source and gets a line in the table `sources.KINDS`. One with quick access
to any example defines `open`, `__len__` and `__getitem__`, and inherits the rest: a shuffle of all
examples in each epoch. One with an order of its own returns readers of its own.
"""

import abc
import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import math
import types
from typing import Any, ClassVar, Self

import ml_collections
import numpy as np

from input_pipeline.errors import DataError
from input_pipeline.order import GlobalShuffle, IndexOrder, OnePass, seeds
from input_pipeline.records import Record
from input_pipeline.sources.catalog import Folder, Shard

HF_PREFIX = "hf:"  # of a config.data.path on the Hugging Face hub
ENDLESS = 2**48  # steps of a training run, as far as a reader is concerned

# Where a reader is in its data, as JSON, where the number of the step is not enough.
Position = dict[str, Any]

# Returns an example of a batch for 0, and for n > 0 the n-th of those that may replace it.
Get = Callable[[int], Record]


@dataclasses.dataclass(frozen=True)
class Plan:
  """The rows of this host in each batch, and how they are to be read.

  Attributes:
    data: `config.data`.
    batch_size: examples per step over all hosts, a multiple of `hosts`.
    host: number of this host; it has the rows [host * b, (host + 1) * b), b = batch_size / hosts.
    hosts: number of hosts.
    workers: decoding processes of this host; 0 decodes in threads.
    seed: of a training run.
    first_step: where a training run starts.
    positions: of all hosts before `first_step`, where a checkpoint has them.
  """

  data: ml_collections.ConfigDict
  batch_size: int
  host: int = 0
  hosts: int = 1
  workers: int = 0
  seed: int = 0
  first_step: int = 0
  positions: Sequence[Position] | None = None


class Reader(abc.ABC):
  """Examples of the rows of this host, step by step. Pickled to decoding processes.

  Attributes:
    steps: those that can be asked for.
    rows: of this host in a batch.
    parts: tasks that a batch is made in, each with rows of its own; with several, each decoding
      process gets one part of every batch.
    in_order: whether `examples` must be called in this process, once per step, in order. Then only
      threads can decode.
    distinct: number of different batches that are repeated; None if each is another one.
  """

  in_order: ClassVar[bool] = False
  distinct: ClassVar[int | None] = None

  def __init__(self, plan: Plan, steps: range, parts: int = 1):
    self.steps = steps
    self.rows = plan.batch_size // plan.hosts
    self.parts = parts
    self._batch_size = plan.batch_size
    self._offset = plan.host * self.rows

  def span(self, step: int, part: int = 0) -> tuple[int, int]:
    """Return the number in the run of the first example of a task, and how many rows it has."""
    begin, end = (self.rows * p // self.parts for p in (part, part + 1))
    return step * self._batch_size + self._offset + begin, end - begin

  @abc.abstractmethod
  def examples(self, step: int, part: int = 0) -> Iterable[Get]:
    """Return the examples of a task in the order of its rows; fewer than rows where it is padded.

    Raises:
      DataError: from here or while iterating, if the data cannot be read.
    """

  def drain_counters(self) -> collections.Counter[str]:
    """Return the requests, bytes, retries and hedges of this process since the last call."""
    return collections.Counter()

  def position(self, step: int) -> Position | None:
    """Return the position before batch `step`, one of the last; None if the step is enough."""
    del step
    return None

  def close(self) -> None:  # noqa: B027 (most readers have nothing to close)
    """Stop reading ahead in this process; may be called twice."""


class IndexReader(Reader):
  """Examples of a source with quick access by index."""

  def __init__(self, source: "Source", plan: Plan, steps: range, order: IndexOrder):
    super().__init__(plan, steps)
    self._source = source
    self._order = order

  def examples(self, step: int, part: int = 0) -> Iterator[Get]:
    """See Reader."""
    first, count = self.span(step, part)
    for number in range(first, first + count):
      index = self._order[number]
      if index is not None:
        yield functools.partial(self._get, index)

  def _get(self, index: int, offset: int) -> Record:
    return self._source[(index + offset) % len(self._source)]


class Source(abc.ABC):
  """Examples of one split. Can be pickled, so that decoding processes can open their own.

  Attributes:
    order: name of the order of training examples, a key of `sources.ORDERS` or a new one; runs
      resume only in the same order.
    indexed: whether `source[index]` is quick.
    num_classes: labels are in 0..num_classes-1.
    class_names: one per label.
    class_counts: number of records of each class, if it is known without reading them.
    shards: files of records, if the source consists of such.
    folder: where the shards are.
    digest: changes if the images or their order change, but not if they are moved or copied as they
      are; "" if unknown. Its first word is the way in which it was made; others do not compare.
    revision: of a data set of the hub, or "".
    renumbered: whether earlier versions numbered the same classes in another order.
    left_out: what is not among the examples, by reason; see `sources.layout.REASONS`.
    notes: what was chosen or found when it was opened, a line each.
    index_reader: class of the default readers.
  """

  order: ClassVar[str] = "shuffle"
  indexed: ClassVar[bool] = True
  num_classes: int
  class_names: tuple[str, ...]
  class_counts: Sequence[int] | None = None
  shards: Sequence[Shard] = ()
  folder: Folder | None = None
  digest: str = ""
  revision: str = ""
  renumbered: bool = False
  left_out: Mapping[str, Sequence[str]] = types.MappingProxyType({})
  notes: Sequence[str] = ()
  index_reader: type[IndexReader] = IndexReader

  @classmethod
  def open(cls, data: ml_collections.ConfigDict, split: str, num_classes: int | None) -> Self:
    """Open one split.

    Args:
      data: `config.data`.
      split: its name; `val` and `validation` are synonyms.
      num_classes: `config.model.num_classes`, or None for as many as there are. The caller checks
        that the source has as many.

    Raises:
      DataError: the data do not exist, or do not match the config.
    """
    raise DataError(f"config.data.kind names {cls.__name__}, which has no method open().")

  @abc.abstractmethod
  def __len__(self) -> int:
    """Return the number of examples."""

  def __getitem__(self, index: int) -> Record:
    """Return example `index`; raise BadRecordError if it alone is bad, DataError if more is."""
    raise DataError(f"{type(self).__name__} has no access by index; read it with train_batches.")

  def read_each(self, indices: Sequence[int]) -> Iterator[tuple[int, Callable[[], Record]]]:
    """Yield each index with a function that returns or raises what `source[index]` does.

    Neighbours may be read by one request.
    """
    for index in indices:
      yield index, functools.partial(self.__getitem__, index)

  def subset(self, indices: np.ndarray) -> "Source":
    """Return a source of the examples at these indices, which rise.

    Raises:
      DataError: this source cannot be taken apart.
    """
    own = type(self)
    if not self.indexed or (own.train_reader, own.eval_reader) != (
      Source.train_reader,
      Source.eval_reader,
    ):
      raise DataError(
        f"{own.__name__} has an order of its own and cannot serve a part of a split; name whole "
        "splits in config.data.train_split and config.data.eval_split."
      )
    return Subset(self, indices)

  def check_plan(self, plan: Plan) -> None:  # noqa: B027 (most fit any plan)
    """Raise DataError if a training run of this plan does not fit the data; nothing is read."""

  def train_reader(self, plan: Plan) -> Reader:
    """Return the reader of a training run without end; `check_plan` was called."""
    order = GlobalShuffle(len(self), seeds(plan.seed)[0], int(plan.data.repeats))
    return self.index_reader(self, plan, range(plan.first_step, ENDLESS), order)

  def eval_reader(self, plan: Plan) -> Reader:
    """Return the reader of one pass over all examples; all hosts have the same number of steps."""
    return self.index_reader(self, plan, eval_steps(self, plan), OnePass(len(self)))

  def describe_order(
    self, data: ml_collections.ConfigDict, *, global_batch_size: int, hosts: int
  ) -> str:
    """Return in words the order of training examples, and what it costs in memory."""
    del data, global_batch_size, hosts
    return "a shuffle of all in each epoch"


class Subset(Source):
  """Some of the examples of a source with quick access by index."""

  def __init__(self, source: Source, indices: Sequence[int] | np.ndarray):
    """Store what it is a part of.

    Args:
      source: of all examples.
      indices: those of the part, in order.
    """
    self.num_classes, self.class_names = source.num_classes, source.class_names
    self.index_reader = source.index_reader
    self._source, self._indices = source, indices

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> Record:
    return self._source[int(self._indices[index])]


def eval_steps(source: Source, plan: Plan) -> range:
  """Return the steps of one pass, the last of which may be padded."""
  return range(math.ceil(len(source) / plan.batch_size))
