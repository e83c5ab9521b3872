"""The order in which a host sees an `HfSource`, and its position in it, which can be saved.

In each epoch the row groups are put in random order and dealt to the streams of all hosts. A host
reads its streams side by side. What they give next, `window` examples in all, is shuffled as a
whole, and used up while the next window is read. Every example is seen once in an epoch; a host
that is done with its part of an epoch begins its part of the next. The parts of two hosts differ by
a row group.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import functools
import itertools
import threading
import time
from typing import Any

from absl import logging
import numpy as np

from input_pipeline.errors import DataError
from input_pipeline.records import Record
from input_pipeline.sources.hf import HfSource, RowGroup
from input_pipeline.workers import processes
from input_pipeline.workers.threads import CLOSE_SECONDS, Threads

Position = dict[str, Any]  # JSON-able
Pick = Callable[[int], Record]  # gives an example for 0, those after it in its window for more

_ENDLESS = 2**62  # steps
_KEPT = 64  # positions after this many of the last batches can be asked for


class Stream:
  """The examples of one host, in order."""

  def __init__(
    self,
    source: HfSource,
    *,
    host: int,
    hosts: int,
    streams: int,
    window: int,
    seed: int | None,
    position: Position | None = None,
    epoch: int = 0,
  ):
    """Starts to read.

    Args:
      source: the examples of all hosts.
      host: number of this host.
      hosts: number of hosts.
      streams: row groups that this host reads at once; fewer where there are not enough of them.
      window: examples that are shuffled together.
      seed: of the order; None is one pass in the order of the files.
      position: what `position()` said; None is the start of `epoch`.
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
    self._start, self._records = position, []
    self._used = 0
    if position["used"]:
      self._turn()
      self._used = position["used"]

  def take(self, count: int) -> list[Pick]:
    """Returns the next examples; fewer than `count` only at the end of the one pass.

    Raises:
      DataError: a file cannot be read, or has changed.
    """
    picks: list[Pick] = []
    while len(picks) < count:
      if self._used == len(self._records) and not self._turn():
        break
      end = min(len(self._records), self._used + count - len(picks))
      picks += [functools.partial(_pick, self._records, i) for i in range(self._used, end)]
      self._used = end
    return picks

  def position(self) -> Position:
    """Returns where the next `take` begins."""
    return self._start | {"used": self._used, "data": self._source.fingerprint}

  def close(self) -> None:
    """Stops to read; waits for what is being read, but not for long."""
    self._stop.set()
    self._ahead.close()
    self._readers.close()
    # A thread that comes back from C++ while the interpreter ends would abort the process.
    deadline = time.monotonic() + CLOSE_SECONDS
    self._readers.join(deadline)
    self._ahead.join(deadline)

  def _next_window(self) -> tuple[Position, list[Record]] | None:
    return next(self._windows, None)

  def _turn(self) -> bool:
    """Goes to the next window, which is read already if all is well; tells whether there is one."""
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
    """Yields windows, from number `first` of `epoch` on, each with the position of its start."""
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
        # A stream gives the same share of itself to each window: the last one is no smaller.
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

  def _part(self, examples: Iterator[Record], length: int, number: int, count: int) -> list[Record]:
    wanted = length * (number + 1) // count - length * number // count
    found = [example["record"] for example in itertools.islice(examples, wanted)]
    if len(found) != wanted:
      raise DataError("A parquet file holds fewer rows than its footer says; check the data.")
    return found

  def _open(self, epoch: int) -> list[tuple[Any, int]]:
    """Returns the streams of this host in an epoch, each with its number of examples."""
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
      number = (
        stream * self._hosts + self._host
      )  # those with a row group more than others are of different hosts
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

  def _examples(self, groups: list[RowGroup]) -> Iterator[dict[str, Record]]:
    for group in groups:
      for record in self._source.read(group, self._stop):
        yield {"record": record}

  def __getstate__(self) -> dict[str, Any]:
    return {"data": self._source.fingerprint}  # `datasets` hashes what its generators refer to


def _pick(window: Sequence[Record], index: int, offset: int) -> Record:
  return window[(index + offset) % len(window)]


def streams_of_a_host(source: HfSource, hosts: int, wanted: int) -> int:
  """Returns how many row groups a host reads at once: at most as many as it has."""
  return max(1, min(wanted, len(source.row_groups) // hosts))


def examples_of_hosts(source: HfSource, hosts: int, streams: int) -> list[int]:
  """Returns how many examples each host sees in a pass in the order of the files."""
  streams = streams_of_a_host(source, hosts, streams)
  rows = [group.rows for group in source.row_groups]
  return [
    sum(sum(rows[stream * hosts + host :: streams * hosts]) for stream in range(streams))
    for host in range(hosts)
  ]


class ReadAhead:
  """Iterates over batches that are decoded in threads; knows the position after each of them."""

  def __init__(
    self,
    stream: Stream,
    make: Callable[[int, list[Pick]], Any],
    *,
    rows: int,
    first_step: int,
    end_step: int,
    threads: int,
    ahead: int,
  ):
    """Makes nothing before the first batch is asked for.

    Args:
      stream: where the examples come from.
      make: makes the batch of a step of its examples, in any thread.
      rows: examples of a batch.
      first_step: number of the first batch.
      end_step: number behind the last one; batches at the end may be short or empty.
      threads: batches that are made at once.
      ahead: batches made before they are asked for.
    """
    self._stream, self._make, self._rows = stream, make, rows
    self._step, self._end, self._ahead = first_step, end_step, max(ahead, threads)
    self._pool = Threads(threads, "hf-decode")
    self._waiting: collections.deque[futures.Future[Any]] = collections.deque()
    self._positions = {first_step: stream.position()}

  def __iter__(self) -> "ReadAhead":
    return self

  def __next__(self) -> Any:
    while self._step < self._end and len(self._waiting) <= self._ahead:
      batch = functools.partial(self._make, self._step, self._stream.take(self._rows))
      self._waiting.append(self._pool.submit(batch))
      self._step += 1
      self._positions[self._step] = self._stream.position()
      self._positions.pop(self._step - self._ahead - _KEPT, None)
    if not self._waiting:
      raise StopIteration
    return self._waiting.popleft().result()

  def position(self, step: int) -> Position:
    """Returns the position between the batches `step - 1` and `step`, if that is not long ago."""
    return self._positions[step]

  def close(self) -> None:
    """Stops all threads."""
    self._pool.close()
    self._stream.close()
    self._pool.join(time.monotonic() + CLOSE_SECONDS)


def train(
  source: HfSource,
  data: Any,
  make: Callable[[int, list[Pick]], Any],
  *,
  seed: int,
  global_batch_size: int,
  first_step: int,
  host: int,
  hosts: int,
  positions: Sequence[Position] | None,
) -> ReadAhead:
  """Returns the endless batches of a host; see `loader.train_batches`."""
  if len(source.row_groups) < hosts:
    raise DataError(
      f"the parquet files have {len(source.row_groups)} row groups, fewer than the {hosts} hosts; "
      "make shards with `python -m input_pipeline.prepare --from hf:...`, or write the parquet with "
      "smaller row groups."
    )
  if host == 0:
    _describe(source, hosts, data.hf_streams, data.hf_window)
  epoch = first_step * global_batch_size // len(source)
  stream = Stream(
    source,
    host=host,
    hosts=hosts,
    streams=data.hf_streams,
    window=max(1, data.hf_window),
    seed=seed,
    position=_resumed(source, positions, host, hosts, epoch, first_step),
    epoch=epoch,
  )
  return ReadAhead(
    stream,
    make,
    rows=global_batch_size // hosts,
    first_step=first_step,
    end_step=_ENDLESS,
    threads=processes.choose_threads(data.threads),
    ahead=data.prefetch_batches,
  )


def evaluate(
  source: HfSource,
  data: Any,
  make: Callable[[int, list[Pick]], Any],
  *,
  batch_size: int,
  host: int,
  hosts: int,
) -> ReadAhead:
  """Returns the batches of a host in one pass: as many as the host with the most examples needs."""
  rows = batch_size // hosts
  stream = Stream(
    source,
    host=host,
    hosts=hosts,
    streams=data.hf_streams,
    window=min(data.hf_window, 4 * rows),
    seed=None,
  )
  most = max(examples_of_hosts(source, hosts, data.hf_streams))
  return ReadAhead(
    stream,
    make,
    rows=rows,
    first_step=0,
    end_step=-(-most // rows),
    threads=processes.choose_threads(data.threads),
    ahead=data.prefetch_batches,
  )


def _resumed(
  source: HfSource,
  positions: Sequence[Position] | None,
  host: int,
  hosts: int,
  epoch: int,
  first_step: int,
) -> Position | None:
  """Returns this host's position of those in a checkpoint; None, with a warning, if they do not fit."""
  if (
    positions
    and len(positions) == hosts
    and all(p["data"] == source.fingerprint for p in positions)
  ):
    return positions[host]
  if first_step:
    why = "holds no position in this kind of data"
    if positions:
      why = (
        "is that of other files"
        if len(positions) == hosts
        else f"is that of {len(positions)} hosts, not {hosts}"
      )
    logging.warning(
      "The position in the data that the checkpoint of step %d has %s, so the order changes: "
      "epoch %d begins anew, "
      "in a new order, and some of its examples are seen twice.",
      first_step,
      why,
      epoch,
    )
  return None


def _describe(source: HfSource, hosts: int, streams: int, window: int) -> None:
  """Logs what a host reads and holds, and warns where hosts cannot share the work well."""
  files, groups = len({group.file for group in source.row_groups}), len(source.row_groups)
  size = sum(group.bytes for group in source.row_groups)
  mean = size / len(source)
  streams = streams_of_a_host(source, hosts, streams)
  # Two windows, and of each row group the bytes of the file and what they become.
  held = 2 * min(window, len(source) / hosts) * mean + 2 * streams * max(
    group.bytes for group in source.row_groups
  )
  logging.info(
    "Streaming %s examples, %.1f GiB, in %d row groups of %d files: each host reads %d at once and "
    "shuffles windows of "
    "%d examples, about %.0f MiB in memory.",
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
      "%d row groups do not divide evenly over %d hosts with %d streams each: some hosts have up to "
      "a row group more than others, which begin the next epoch earlier; "
      "`python -m input_pipeline.prepare --from hf:...` makes "
      "shards that any number of hosts shares exactly.",
      groups,
      hosts,
      streams,
    )
