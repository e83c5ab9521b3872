"""Tables of weights, and of what differs between two."""

from collections.abc import Iterator

import numpy as np

from configs.names import natural
from trainer.weights.read import Loaded

_LONGEST = 100  # characters of a fact


def show(loaded: Loaded) -> Iterator[str]:
  """Yield the lines about a file or a workdir: what it is, its leaves, what it says of itself."""
  tensors, facts = loaded.tensors, loaded.about
  statistics = [name for name in tensors if name.endswith(("running_mean", "running_var"))]
  total = sum(tensor.size for tensor in tensors.values())
  averaged = sum(tensors[name].size for name in statistics)
  yield f"{loaded.origin}: {loaded.kind}, {loaded.guess}"
  yield (
    f"{total - averaged:,} parameters in {len(tensors) - len(statistics):,} leaves, "
    f"{averaged:,} running averages in {len(statistics):,}"
  )
  yield ""
  width = max([len("leaf"), *(len(name) for name in tensors)])
  yield f"{'leaf':{width}}  {'shape':18} {'dtype':9} {'mean':>10} {'deviation':>10} {'largest':>10}"
  for name in sorted(tensors, key=natural):
    values = _wide(tensors[name])
    numbers = (values.mean(), values.std(), np.abs(values).max()) if values.size else (0, 0, 0)
    columns = " ".join(f"{number:10.3g}" for number in numbers)
    shape = str(list(values.shape))
    yield f"{name:{width}}  {shape:18} {tensors[name].dtype!s:9} {columns}"
  yield ""
  words = dict(loaded.metadata) or facts.words()
  for name, text in words.items():
    yield f"{name}: {text if len(text) <= _LONGEST else text[: _LONGEST - 3] + '...'}"


def differences(a: Loaded, b: Loaded) -> list[str]:
  """Return a line for each leaf that differs; nothing if all are equal."""
  lines = []
  names = sorted(a.tensors.keys() | b.tensors.keys(), key=natural)
  width = max((len(name) for name in names), default=0)
  for name in names:
    if name not in a.tensors or name not in b.tensors:
      where = a.origin if name in a.tensors else b.origin
      lines.append(f"{name:{width}}  only in {where}")
      continue
    left, right = a.tensors[name], b.tensors[name]
    if left.shape != right.shape:
      lines.append(f"{name:{width}}  shape {list(left.shape)} and {list(right.shape)}")
    elif not np.array_equal(left, right):
      left, right = _wide(left), _wide(right)
      difference, largest = np.abs(left - right).max(), np.abs(left).max()
      relative = f", {difference / largest:.2e} of the largest" if largest else ""
      lines.append(f"{name:{width}}  {list(left.shape)} max abs {difference:.3e}{relative}")
  return lines


def _wide(tensor: np.ndarray) -> np.ndarray:
  return tensor.astype(np.float64)
