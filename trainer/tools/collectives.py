"""What a compiled program sends between devices, read from its text, for CPU and TPU alike."""

import dataclasses
import itertools
import math
import re

import numpy as np

KINDS = (
  "all-reduce|all-gather|reduce-scatter|(?:ragged-)?all-to-all|collective-permute|"
  "collective-broadcast|recv"
)
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.* -> .* \{$")
_COLLECTIVE = re.compile(rf'\s+(?:ROOT )?%?[\w.-]+ = ([^"]*?) ({KINDS})(-start)?\(')
_BETWEEN_SLICES = re.compile(
  r'_xla_megascale_target="\{([\d,]+)\}.*_xla_megascale_transfer_type="(\w+)"'
)
_CALLED = re.compile(r"\b(calls|to_apply|body)=%?([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
  """An operation between devices.

  Attributes:
    kind: its name in XLA: all-reduce, all-gather, reduce-scatter, collective-permute, all-to-all,
      ...; followed by "between slices" if it uses the network of the data centre.
    devices: number of devices that share it.
    bytes: bytes on each device after a gather or before a scatter; else those of the result.
    in_loop: whether it is in a loop, and so may run more than once.
  """

  kind: str
  devices: int
  bytes: int
  in_loop: bool


def read(text: str) -> list[Collective]:
  """Return the collectives of a compiled program.

  Four habits of the TPU compiler disguise them. A reduce-scatter is a fusion named
  all-reduce-scatter that contains an all-reduce and slices its result. A collective that overlaps
  other work appears in each fusion that advances it, with the same chain_id. One that is split into
  start and done has its operands in the shape of its result. Between slices it is a send and a recv
  whose attributes hold the kind and the numbers of the slices.

  Args:
    text: `as_text()` of a compiled jitted function.
  """
  partitions = int(found[1]) if (found := re.search(r"\bnum_partitions=(\d+)", text)) else 1
  replicas = int(found[1]) if (found := re.search(r"\breplica_count=(\d+)", text)) else 1
  computation = ""
  lines: list[tuple[str, str, str, str | None, str]] = []
  callers: dict[str, set[str]] = {}
  bodies: set[str] = set()
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      computation = header[1]
    elif found := _COLLECTIVE.match(line):
      lines.append((computation, found[1], found[2], found[3], line))
    for how, name in _CALLED.findall(line):
      callers.setdefault(name, set()).add(computation)
      if how == "body":
        bodies.add(name)

  def in_loop(name: str) -> bool:
    return name in bodies or any(in_loop(caller) for caller in callers.get(name, ()))

  seen, collectives = set(), []
  for computation, shape, kind, start, line in lines:
    if chain := re.search(r'channel_id=(\d+).*chain_id="(\d+)"', line):
      if chain.groups() in seen:
        continue
      seen.add(chain.groups())
    between = _BETWEEN_SLICES.search(line)
    if kind == "recv" and not between:
      continue
    devices = _group_size(line) or partitions * replicas
    size = _size(re.sub(r"(u32|token)\[\]", "", shape))
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
      kind = "reduce-scatter"
    elif kind == "reduce-scatter":
      size *= devices
    elif between and kind == "recv":
      kind = between[2].lower().replace("_", "-") + " between slices"
      devices = between[1].count(",") + 1
    if start and kind == "all-gather":
      size *= devices / (devices + 1)
    elif start and kind == "collective-permute":
      size /= 2
    collectives.append(Collective(kind, devices, round(size), in_loop(computation)))
  return collectives


def describe(collectives: list[Collective]) -> list[str]:
  """Return a line for each kind and number of devices, with their count and bytes in total."""

  def key(collective: Collective) -> tuple[str, int]:
    return collective.kind, collective.devices

  lines = []
  for (kind, devices), found in itertools.groupby(sorted(collectives, key=key), key):
    group = list(found)
    size = sum(each.bytes for each in group) / 2**20
    line = f"{kind:25} over {devices} devices: {len(group)}, {size:.2f} MiB"
    looped = sum(each.in_loop for each in group)
    lines.append(line + f"; {looped} of them in loops, counted once" * (looped > 0))
  return lines


def _size(shape: str) -> float:
  """Return the bytes of all arrays in a shape such as '(f32[8,128]{1,0:T(8,128)}, bf16[])'."""
  # pred, the type without a number of bits in its name, takes a byte.
  return sum(
    math.prod(int(length) for length in re.findall(r"\d+", dimensions)) * int(bits or 8) / 8
    for bits, dimensions in re.findall(r"\b[a-z]+(\d*)\w*\[([\d,]*)\]", shape)
  )


def _group_size(line: str) -> int | None:
  """Return how many devices share the collective of a line; None if it names none: all of them."""
  return len(found) if (found := group(line)) else None


def group(line: str) -> tuple[int, ...]:
  """Return the numbers of the devices that share the collective of a line: of one group of several.

  They are positions in the mesh, whose devices are the partitions of the program in their order. ()
  if the line names none: all of them.
  """
  if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", line):
    return _chain(re.findall(r"\{(\d+),(\d+)\}", pairs[1]))
  if axes := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", line):
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes[1])}
    numbers = _iota(axes[2], math.prod(sizes.values())).reshape(list(sizes.values()))
    kept = []
    # A part of an axis, 'b':(2)4, are the 4 of its positions that are neighbours behind 2 others.
    for name, before, part in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", axes[3]):
      sizes_of = int(before or 1), int(part or sizes[name])
      kept.append((list(sizes).index(name), *sizes_of, sizes[name] // math.prod(sizes_of)))
    return _first(numbers, kept)
  if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line):
    return tuple(_iota(iota[2], 0)[: int(iota[1])].tolist())
  if first := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
    return tuple(map(int, first[1].split(",")))
  return ()


def _iota(text: str, size: int) -> np.ndarray:
  """Return the numbers that "[2,4]T(1,0)" stands for, or those up to `size` for an empty text."""
  if not text:
    return np.arange(size)
  lengths = [int(length) for length in re.findall(r"\[(.*?)\]", text)[0].split(",")]
  order = re.search(r"T\((.*?)\)", text)
  axes = [int(axis) for axis in order[1].split(",")] if order else range(len(lengths))
  return np.arange(math.prod(lengths)).reshape(lengths).transpose(axes).flatten()


def _first(numbers: np.ndarray, kept: list[tuple[int, int, int, int]]) -> tuple[int, ...]:
  """Return the numbers of the first group in a mesh.

  Args:
    numbers: of the devices, in the shape of the mesh.
    kept: parts of axes along which a group lies: axis, positions before, in and behind the part.
  """
  index: list[np.ndarray] = [np.zeros(1, int)] * numbers.ndim
  for axis, _, part, after in kept:
    index[axis] = (index[axis][:, None] + np.arange(part) * after).flatten()
  return tuple(numbers[np.ix_(*index)].flatten().tolist())


def _chain(pairs: list[tuple[str, str]]) -> tuple[int, ...]:
  """Return the devices of the longest chain of (from, to) pairs."""
  groups: dict[str, set[str]] = {}
  for pair in pairs:
    joined = set.union(*(groups.get(device, {device}) for device in pair))
    groups |= dict.fromkeys(joined, joined)
  longest = max(map(len, groups.values()))
  return next(tuple(sorted(map(int, group))) for group in groups.values() if len(group) == longest)
