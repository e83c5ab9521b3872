"""Orders of examples: pure functions of the seed and the number of the example in the run.

Example number g is row g % B of step g // B of a run with batches of B examples over all hosts.
Hosts and processes are no arguments of an order, so they cannot change it, and any step can be the
first.
"""

from collections.abc import Sequence
import functools
import itertools
from typing import Any, NamedTuple, Protocol

import numpy as np


def seeds(seed: int) -> tuple[int, int]:
  """Return the seeds of the order and of the augmentation of a run.

  Hashed, because Grain adds the epoch to its seed: seed 1 would repeat the epochs of seed 0.
  """
  order, augmentation = np.random.SeedSequence(seed).generate_state(2)
  return int(order), int(augmentation)


class IndexOrder(Protocol):
  """An order by index, for sources with quick access to any example."""

  def __getitem__(self, number: int) -> int | None:
    """Return the index of example `number` of a run; None behind the last one."""


class Run(NamedTuple):
  """Neighbouring records of one shard, to be read by one request."""

  first: int
  count: int  # type: ignore[assignment]  # hides tuple.count


class Part(NamedTuple):
  """Origin of examples: `slots` of the records of window `key`, in the order of the examples."""

  key: tuple[int, ...]
  slots: np.ndarray


class WindowedOrder(Protocol):
  """An order whose examples come out of windows: sets of runs, each of which is read once."""

  def parts(self, first: int, count: int) -> list[Part]:
    """Return where the examples first, ..., first + count - 1 come from."""

  def runs(self, key: tuple[int, ...]) -> list[Run]:
    """Return the runs of a window; its slots count through them."""


class GlobalShuffle:
  """Each epoch is another permutation of all examples; an IndexOrder."""

  def __init__(self, length: int, seed: int, repeats: int = 1):
    """Store the arguments.

    Args:
      length: of an epoch.
      seed: of the order.
      repeats: examples in a row that are the same; an epoch then ends before it has seen all.
    """
    import grain  # here, because it imports JAX, which takes seconds and `prepare` does without

    self._order = grain.MapDataset.range(length).shuffle(seed=seed)
    self._length, self._repeats = length, repeats

  def __getitem__(self, number: int) -> int:
    """Return the index of example `number` of a run."""
    place = number % self._length
    return self._order[number - place + place // self._repeats]


class OnePass:
  """All examples once, in their order; an IndexOrder."""

  def __init__(self, length: int):
    self._length = length

  def __getitem__(self, number: int) -> int | None:
    return number if number < self._length else None


class LaneShuffle:
  """Each epoch is another permutation of all records, made for reading neighbours together.

  The records of each shard are cut into blocks of neighbours. An epoch shuffles the blocks of all
  shards and cuts the sequence into one stretch per lane, as long as the number of records that the
  epoch takes from that lane. Every batch takes the same number of rows from each lane, and a lane
  serves its stretch in windows of a few blocks, each shuffled on its own. So a host reads only the
  blocks of the lanes of its rows, whatever the number of hosts, and a batch mixes lanes x window
  blocks from anywhere in the data. (MosaicML Streaming calls fixed lanes canonical nodes.)
  """

  def __init__(
    self,
    shard_counts: Sequence[int],
    seed: int,
    batch_size: int,
    *,
    lanes: int,
    block: int,
    window: int,
    repeats: int = 1,
  ):
    """Cut the shards into blocks.

    Args:
      shard_counts: number of records of each shard.
      seed: of the order.
      batch_size: examples per step over all hosts, a multiple of `lanes`.
      lanes: number of lanes.
      block: records of a block, or up to twice as many; shards with fewer are one block.
      window: blocks of a window.
      repeats: examples in a row of a lane that are the same record. A lane then ends an epoch
        before it has served its whole stretch.
    """
    self._repeats = repeats
    self._firsts = _block_firsts(shard_counts, block)
    self._length = int(self._firsts[-1])
    self._seed = seed
    self._batch_size = batch_size
    self._rows = batch_size // lanes  # of each lane in a batch
    self._lanes = np.arange(lanes)
    self._window = window
    self._make_caches()

  def _make_caches(self) -> None:
    """Cache what all lanes of two epochs need."""
    lanes = len(self._lanes)
    self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)
    self._stretch = functools.lru_cache(maxsize=2 * lanes)(self._make_stretch)
    self._permutation = functools.lru_cache(maxsize=2 * lanes)(self._make_permutation)

  def __getstate__(self) -> dict[str, Any]:
    caches = ("_epoch", "_stretch", "_permutation")
    return {key: value for key, value in self.__dict__.items() if key not in caches}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._make_caches()

  def parts(self, first: int, count: int) -> list[Part]:
    """See WindowedOrder."""
    parts, number, end = [], first, first + count
    while number < end:
      # Up to the end of the lane's rows, of the epoch and of the window.
      epoch, lane = number // self._length, number % self._batch_size // self._rows
      ahead = self._rows - number % self._rows
      ahead = min(ahead, end - number, (epoch + 1) * self._length - number)
      position = int((self._taken(number) - self._taken(epoch * self._length))[lane])
      _, bounds = self._stretch(epoch, lane)
      window = int(np.searchsorted(bounds, position // self._repeats, side="right")) - 1
      ahead = min(ahead, int(bounds[window + 1]) * self._repeats - position)
      places = np.arange(position, position + ahead) // self._repeats - bounds[window]
      slots = self._permutation(epoch, lane, window)[places]
      parts.append(Part((epoch, lane, window), slots))
      number += ahead
    return parts

  def runs(self, key: tuple[int, ...]) -> list[Run]:
    """See WindowedOrder."""
    epoch, lane, window = key
    runs, bounds = self._stretch(epoch, lane)
    ends = np.cumsum([run.count for run in runs])
    first, last = np.searchsorted(ends, bounds[window : window + 2] - [0, 1], side="right")
    return runs[first : last + 1]

  def _taken(self, number: int) -> np.ndarray:
    """Return how many of the examples before `number` each lane has served, int64 [lanes]."""
    batches, rest = divmod(number, self._batch_size)
    return batches * self._rows + np.clip(rest - self._lanes * self._rows, 0, self._rows)

  def _random(self, n: int, *words: int) -> np.ndarray:
    """Return `n` numbers in [0, 1) that are a function of the seed and of up to three words."""
    key = [self._seed, 0]
    return np.random.Generator(np.random.Philox(key=key, counter=[0, *words])).random(n)

  def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the blocks in order, where each ends in the epoch, and where each lane begins."""
    # Not numpy's own shuffle, whose algorithm may change with its version.
    blocks = np.argsort(self._random(len(self._firsts) - 1, epoch, 0, 0), kind="stable")
    ends = np.cumsum(np.diff(self._firsts)[blocks])
    served = self._taken((epoch + 1) * self._length) - self._taken(epoch * self._length)
    return blocks, ends, np.concatenate([[0], np.cumsum(served)])

  def _make_stretch(self, epoch: int, lane: int) -> tuple[list[Run], np.ndarray]:
    """Return the runs of a lane in an epoch, and where its windows begin and the last one ends."""
    blocks, ends, lane_begins = self._epoch(epoch)
    begin, end = lane_begins[lane], lane_begins[lane + 1]
    if begin == end:
      return [], np.zeros(1, np.int64)
    i, j = np.searchsorted(ends, [begin, end - 1], side="right")
    blocks, ends = blocks[i : j + 1], ends[i : j + 1]
    starts = ends - (self._firsts[blocks + 1] - self._firsts[blocks])
    skipped = np.maximum(begin - starts, 0)  # of a block that two lanes share
    firsts = self._firsts[blocks] + skipped
    counts = np.minimum(ends, end) - starts - skipped
    runs = [Run(f, n) for f, n in zip(firsts.tolist(), counts.tolist(), strict=True)]
    # First windows differ in length, so that not all lanes need new blocks at the same step.
    first = 1 + lane * self._window // len(self._lanes)
    cuts = [0, *range(first, len(runs), self._window), len(runs)]
    return runs, np.concatenate([[0], np.cumsum(counts)])[cuts]

  def _make_permutation(self, epoch: int, lane: int, window: int) -> np.ndarray:
    _, bounds = self._stretch(epoch, lane)
    size = int(bounds[window + 1] - bounds[window])
    return np.argsort(self._random(size, epoch, lane, window + 1), kind="stable")


class InOrder:
  """All records once, in their order; the rows of a step are a window."""

  def __init__(self, shard_counts: Sequence[int]):
    self._ends = np.cumsum(shard_counts)

  def parts(self, first: int, count: int) -> list[Part]:
    """See WindowedOrder."""
    count = min(count, int(self._ends[-1]) - first)
    return [Part((first, count), np.arange(count))] if count > 0 else []

  def runs(self, key: tuple[int, ...]) -> list[Run]:
    """See WindowedOrder."""
    first, count = key
    cuts = [int(end) for end in self._ends if first < end < first + count]
    cuts = [first, *cuts, first + count]
    return [Run(a, b - a) for a, b in itertools.pairwise(cuts)]


def _block_firsts(shard_counts: Sequence[int], block: int) -> np.ndarray:
  """Return the index of the first record of each block and, at the end, the number of records."""
  firsts, start = [], 0
  for count in shard_counts:
    blocks = max(1, count // block)
    firsts.append(start + np.arange(blocks) * count // blocks)
    start += count
  return np.concatenate([*firsts, [start]])
