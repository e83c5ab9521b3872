"""The order in which a host reads an `HfSource`, and its position in it, which can be saved.

In each epoch the row groups are put in random order and dealt to the streams of all hosts. A host
reads its streams side by side. Their next `window` examples in all are shuffled as a whole, and
used up while the next window is read. Every example is used once in an epoch; a host that has
finished its part of an epoch begins its part of the next. The parts of two hosts differ by at most
one row group.
"""

from collections.abc import Iterator, Sequence
import functools
import itertools
import threading
import time
from typing import TYPE_CHECKING, Any

from absl import logging
import numpy as np

from input_pipeline.errors import DataError
from input_pipeline.records import Record
from input_pipeline.sources.base import ENDLESS, Get, Plan, Position, Reader
from input_pipeline.workers import processes
from input_pipeline.workers.threads import CLOSE_SECONDS, Threads

if TYPE_CHECKING:
  from input_pipeline.sources.hf import HfSource, RowGroup

_KEPT = 64  # positions that are kept after the batches were returned


class Stream:
  """The examples of one host, in order."""

  def __init__(
    self,
    source: "HfSource",
    *,
    host: int,
    hosts: int,
    streams: int,
    window: int,
    seed: int | None,
    position: Position | None = None,
    epoch: int = 0,
  ):
    """Start to read.

    Args:
      source: the examples of all hosts.
      host: number of this host.
      hosts: number of hosts.
      streams: row groups that this host reads at once; fewer where there are not enough of them.
      window: examples that are shuffled together.
      seed: of the order; None is one pass in the order of the files.
      position: a result of `position()`; None is the start of `epoch`.
      epoch: where to start without a position.
    """
    self._source, self._host, self._hosts, self._seed = source, host, hosts, seed
    self._streams = streams_of_a_host(source, hosts, streams)
    self._window = window
    self._stop = threading.Event()
    self._readers = Threads(self._streams, "hf-read")
    self._ahead = Threads(1, "hf-window")
    position = position or {"epoch": epoch, "window": 0, "used": 0, "streams": None}
    self._windows = self._read(position["epoch"], position["window"], position["streams"])
    self._next = self._ahead.submit(self._next_window)
    self._start = position
    self._records: list[Record] = []
    self._used = 0
    if position["used"]:
      self._turn()
      self._used = position["used"]

  def take(self, count: int) -> list[Get]:
    """Return the next examples; fewer than `count` only at the end of the one pass.

    Raises:
      DataError: a file cannot be read, or has changed.
    """
    picks: list[Get] = []
    while len(picks) < count:
      if self._used == len(self._records) and not self._turn():
        break
      end = min(len(self._records), self._used + count - len(picks))
      picks += [functools.partial(_pick, self._records, i) for i in range(self._used, end)]
      self._used = end
    return picks

  def position(self) -> Position:
    """Return where the next `take` begins."""
    return self._start | {"used": self._used, "data": self._source.fingerprint}

  def close(self) -> None:
    """Stop reading; wait a few seconds at most for reads that are under way."""
    self._stop.set()
    self._ahead.close()
    self._readers.close()
    # A thread that returns from C++ while the interpreter ends would abort the process.
    deadline = time.monotonic() + CLOSE_SECONDS
    self._readers.join(deadline)
    self._ahead.join(deadline)

  def _next_window(self) -> tuple[Position, list[Record]] | None:
    return next(self._windows, None)

  def _turn(self) -> bool:
    """Proceed to the next window, which should be read by now; return whether there is one."""
    window = self._next.result()
    if window is None:
      return False
    self._next = self._ahead.submit(self._next_window)
    self._start, self._records = window
    self._used = 0
    return True

  def _read(
    self, epoch: int, first: int, states: list[Any] | None
  ) -> Iterator[tuple[Position, list[Record]]]:
    """Yield windows, from number `first` of `epoch` on, each with the position of its start."""
    while True:
      streams = self._open(epoch)
      if states:
        for (stream, _), state in zip(streams, states, strict=True):
          stream.load_state_dict(state)
      examples = [(iter(stream), length) for stream, length in streams]
      count = max(1, round(sum(length for _, length in streams) / self._window))
      for number in range(first, count):
        start = {
          "epoch": epoch,
          "window": number,
          "streams": states or [stream.state_dict() for stream, _ in streams],
        }
        states = None
        # Each window takes the same share of every stream, so the last one is no smaller.
        parts = [
          self._readers.submit(functools.partial(self._part, *each, number, count))
          for each in examples
        ]
        records = list(itertools.chain.from_iterable(part.result() for part in parts))
        del parts
        if self._seed is not None:
          order = np.random.default_rng([self._seed, epoch, number, self._host]).permutation(
            len(records)
          )
          records = [records[i] for i in order]
        if records:
          yield start, records
      if self._seed is None:
        return
      epoch, first = epoch + 1, 0

  def _part(
    self, examples: Iterator[dict[str, Record]], length: int, number: int, count: int
  ) -> list[Record]:
    wanted = length * (number + 1) // count - length * number // count
    found = [example["record"] for example in itertools.islice(examples, wanted)]
    if len(found) != wanted:
      raise DataError("A parquet file holds fewer rows than its footer lists; check the data.")
    return found

  def _open(self, epoch: int) -> list[tuple[Any, int]]:
    """Return the streams of this host in an epoch, each with its number of examples."""
    import datasets
    import datasets.distributed

    groups = list(self._source.row_groups)
    if self._seed is not None:
      groups = [
        groups[i] for i in np.random.default_rng([self._seed, epoch]).permutation(len(groups))
      ]
    whole = datasets.IterableDataset.from_generator(self._examples, gen_kwargs={"groups": groups})
    count, opened = self._streams * self._hosts, []
    for stream in range(self._streams):
      # So that the streams with a row group more than others belong to different hosts.
      number = stream * self._hosts + self._host
      length = sum(group.rows for group in groups[number::count])
      if length:
        nodes = min(count, len(groups))  # the others have nothing
        opened.append(
          (
            datasets.distributed.split_dataset_by_node(whole, number, nodes, strategy="shards"),
            length,
          )
        )
    return opened

  def _examples(self, groups: "list[RowGroup]") -> Iterator[dict[str, Record]]:
    for group in groups:
      for record in self._source.read(group, self._stop):
        yield {"record": record}

  def __getstate__(self) -> dict[str, Any]:
    return {"data": self._source.fingerprint}  # `datasets` hashes whatever its generators refer to


def _pick(window: Sequence[Record], index: int, offset: int) -> Record:
  return window[(index + offset) % len(window)]


def streams_of_a_host(source: "HfSource", hosts: int, wanted: int) -> int:
  """Return how many row groups a host reads at once: at most as many as it has."""
  return max(1, min(wanted, len(source.row_groups) // hosts))


def examples_of_hosts(source: "HfSource", hosts: int, streams: int) -> list[int]:
  """Return how many examples each host has in one pass in the order of the files."""
  streams = streams_of_a_host(source, hosts, streams)
  rows = [group.rows for group in source.row_groups]
  return [
    sum(sum(rows[stream * hosts + host :: streams * hosts]) for stream in range(streams))
    for host in range(hosts)
  ]


class HfReader(Reader):
  """The examples of a Stream by step, and the positions between the last steps."""

  in_order = True

  def __init__(self, stream: Stream, plan: Plan, steps: range):
    super().__init__(plan, steps)
    self._stream = stream
    # Those of the batches that threads decode ahead, and of some that were returned before.
    ahead = max(plan.data.prefetch_batches, processes.choose_threads(plan.data.threads))
    self._kept = ahead + _KEPT
    self._positions = {steps.start: stream.position()}

  def examples(self, step: int, part: int = 0) -> list[Get]:
    """See Reader."""
    del part
    picks = self._stream.take(self.rows)
    self._positions[step + 1] = self._stream.position()
    self._positions.pop(step + 1 - self._kept, None)
    return picks

  def position(self, step: int) -> Position:
    """See Reader."""
    return self._positions[step]

  def close(self) -> None:
    """See Reader."""
    self._stream.close()


def check_plan(source: "HfSource", plan: Plan) -> None:
  """Raise DataError if there are fewer row groups than hosts."""
  groups = len(source.row_groups)
  if groups < plan.hosts:
    raise DataError(
      f"the parquet files have {groups} row groups, fewer than the {plan.hosts} hosts; make shards "
      "with `python -m input_pipeline.prepare --from hf:...`, or write the parquet with smaller "
      "row groups."
    )


def train_reader(source: "HfSource", plan: Plan) -> HfReader:
  """Return the examples of a training run; see `Source.train_reader`."""
  data = plan.data
  if plan.host == 0:
    _describe(source, plan.hosts, data.hf_streams, data.hf_window)
  epoch = plan.first_step * plan.batch_size // len(source)
  stream = Stream(
    source,
    host=plan.host,
    hosts=plan.hosts,
    streams=data.hf_streams,
    window=max(1, data.hf_window),
    seed=plan.seed,
    position=_resumed(source, plan, epoch),
    epoch=epoch,
  )
  return HfReader(stream, plan, range(plan.first_step, ENDLESS))


def eval_reader(source: "HfSource", plan: Plan) -> HfReader:
  """Return the examples of one pass, in as many steps as the host with the most of them needs."""
  data, rows = plan.data, plan.batch_size // plan.hosts
  stream = Stream(
    source,
    host=plan.host,
    hosts=plan.hosts,
    streams=data.hf_streams,
    window=min(data.hf_window, 4 * rows),
    seed=None,
  )
  most = max(examples_of_hosts(source, plan.hosts, data.hf_streams))
  return HfReader(stream, plan, range(-(-most // rows)))


def _resumed(source: "HfSource", plan: Plan, epoch: int) -> Position | None:
  """Return this host's position in a checkpoint; None, with a warning, if it does not fit."""
  positions, hosts = plan.positions, plan.hosts
  if (
    positions
    and len(positions) == hosts
    and all(p["data"] == source.fingerprint for p in positions)
  ):
    return positions[plan.host]
  if plan.first_step:
    why = "there is none for this kind of data"
    if positions:
      why = (
        "the one that it has is that of other files"
        if len(positions) == hosts
        else f"the one that it has is that of {len(positions)} hosts, not {hosts}"
      )
    logging.warning(
      "The checkpoint of step %d holds no position that fits the data: %s. So the order changes: "
      "epoch %d begins anew, in another order, and some of its examples are used twice.",
      plan.first_step,
      why,
      epoch,
    )
  return None


def _describe(source: "HfSource", hosts: int, streams: int, window: int) -> None:
  """Log what a host reads and holds, with a warning where the hosts cannot share evenly."""
  files, groups = len({group.file for group in source.row_groups}), len(source.row_groups)
  size = sum(group.bytes for group in source.row_groups)
  mean = size / len(source)
  largest = max(group.bytes for group in source.row_groups)
  streams = streams_of_a_host(source, hosts, streams)
  # Two windows, and of each open row group its bytes in the file and their records.
  held = 2 * min(window, len(source) / hosts) * mean + 2 * streams * largest
  logging.info(
    "Streaming %s examples, %.1f GiB, in %d row groups of %d files: each host reads %d at once and "
    "shuffles windows of %d examples, about %.0f MiB in memory.",
    f"{len(source):,}",
    size / 2**30,
    groups,
    files,
    streams,
    window,
    held / 2**20,
  )
  if groups % (hosts * streams) and groups < 10 * hosts * streams:
    logging.warning(
      "%d row groups do not divide evenly over %d hosts with %d streams each: some hosts have a "
      "row group more than others, which begin the next epoch earlier; "
      "`python -m input_pipeline.prepare --from hf:...` makes shards that any number of hosts "
      "shares exactly.",
      groups,
      hosts,
      streams,
    )
