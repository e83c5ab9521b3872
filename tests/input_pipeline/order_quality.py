"""Compare the order of streamed data with a uniform shuffle.

    python -m tests.input_pipeline.order_quality [--lanes N] ...

At the size of ImageNet, 1,281,167 examples of 1,000 classes in 1,024 shards, for one epoch of
batches of 1,024.
"""

import argparse

import numpy as np

from configs import base
from input_pipeline import order

_COUNTS = [len(part) for part in np.array_split(np.arange(1_281_167), 1024)]
_BATCH = 1024


def epoch(lanes: order.LaneShuffle, number: int) -> np.ndarray:
  """Return the indices of the records of an epoch in their order."""
  total = sum(_COUNTS)
  indices, runs = [], {}
  for first in range(number * total, (number + 1) * total, _BATCH):
    for key, slots in lanes.parts(first, min(_BATCH, (number + 1) * total - first)):
      if key not in runs:
        runs[key] = np.concatenate([np.arange(r.first, r.first + r.count) for r in lanes.runs(key)])
      indices.append(runs[key][slots])
  return np.concatenate(indices)


def describe(name: str, indices: np.ndarray, next_epoch: np.ndarray) -> str:
  batches = indices[: len(indices) // _BATCH * _BATCH].reshape(-1, _BATCH)
  sorted_label = indices * 1000 // len(indices)
  classes = [len(np.unique(b)) for b in sorted_label[: batches.size].reshape(-1, _BATCH)]
  shards = [len(np.unique(b)) for b in (batches * 1024 // len(indices))]
  # Place of a record in the epoch against its index: 1/3 of the length on average if independent.
  moved = np.abs(np.arange(len(indices)) - indices).mean() / len(indices)
  places = [np.empty(len(e), np.int64) for e in (indices, next_epoch)]
  for place, order_ in zip(places, (indices, next_epoch)):
    place[order_] = np.arange(len(order_))
  epochs = np.abs(places[0] - places[1]).mean() / len(indices)
  neighbours = np.mean(places[0][:-1] // _BATCH == places[0][1:] // _BATCH)
  return (
    f"{name:34} {np.mean(classes):6.1f} {np.std(classes):5.1f}   {np.mean(shards):6.1f}   "
    f"{moved:.4f}   {epochs:.4f}   {neighbours:.5f}"
  )


def main() -> None:
  data = base.get_config().data
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  for name in ("lanes", "block", "window"):
    parser.add_argument(f"--{name}", type=int, default=data[f"stream_{name}"])
  args = parser.parse_args()
  lanes = order.LaneShuffle(
    _COUNTS, 0, _BATCH, lanes=args.lanes, block=args.block, window=args.window
  )
  rng = np.random.default_rng(0)
  total = sum(_COUNTS)
  print(
    "If the shards were sorted by class, which is the worst case; those of `prepare` are shuffled."
  )
  print(f"{'':34} classes/batch    shards   distance from  epoch to  neighbours in")
  print(f"{'':34}   mean    sd  /batch    its place     epoch   the same batch")
  print(describe("uniform shuffle", rng.permutation(total), rng.permutation(total)))
  print(
    describe(
      f"{args.lanes} lanes x {args.window} blocks of {args.block}", epoch(lanes, 0), epoch(lanes, 1)
    )
  )


if __name__ == "__main__":
  main()
