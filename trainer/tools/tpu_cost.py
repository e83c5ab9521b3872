"""An estimate of what a step takes on a TPU, from the schedule that the compiler writes.

The compiler of TPUs gives `estimated_cycles` to most operations of a program. Here they become a
time line: operations one after the other, a loop as often as it turns, and beside them the copies
and collectives that the schedule starts early and waits for later. What has no estimate is costed
by the bytes that it reads and writes at the bandwidth of the memory (HBM), in whichever memory
they lie; a collective by what a ring of its devices sends over all links of a chip at once.

It is an estimate. Left out are the contention of collectives with other traffic and their latency,
what the host does, and whatever the compiler's estimate of an operation leaves out: a pool's
backward pass (select-and-scatter), which has none, takes at least its bytes.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import re
from typing import NamedTuple

from trainer.reporting.chips import Chip
from trainer.tools import collectives, hlo, kinds

# What the program does not do: names, addresses, shapes.
_FREE = frozenset(
  (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "bitcast-convert",
    "after-all",
    "add-dependency",
    "opt-barrier",
    "partition-id",
    "replica-id",
    "iota",
  )
)
_FREE_CALLS = re.compile(r'custom_call_target="(ConcatBitcast|AllocateBuffer|\w*Sharding\w*)"')
_CALLS = ("conditional", "call")
_ONE_IN = re.compile(r"\bone_in_(\d+)/cond$")
_ONE_ROUND = re.compile(r"\bone_round/while$")
_WITH_COLLECTIVES = ("fusion", "async-start")
HBM = 0
# A collective, and devices that share it.
Found = tuple[collectives.Collective, tuple[int, ...]]


class Rates(NamedTuple):
  """What a device does in a cycle of its clock.

  Attributes:
    hbm: bytes of its memory.
    links: bytes sent to its neighbours.
    network: bytes sent to other slices.
  """

  hbm: float
  links: float
  network: float


def rates(chip: Chip, devices_per_chip: int = 1) -> Rates:
  """Return those of each of the devices, one or two, that a chip is to the compiler."""
  # Where the network's bandwidth is not published, that of v5e.
  network = chip.network_bandwidth or 3.125e9
  return Rates(
    *(
      bandwidth / chip.clock / devices_per_chip
      for bandwidth in (chip.hbm_bandwidth, chip.link_bandwidth, network)
    )
  )


@dataclasses.dataclass(frozen=True)
class Item:
  """An operation of the time line, or a wait.

  Attributes:
    name: of the instruction.
    work: its layer and kind.
    cycles: in all its rounds.
    estimated: whether by the compiler; else by bytes.
    hbm_bytes: what it reads and writes there, at most.
    rounds: how often it runs in a step.
    waits: whether it is a wait for a copy or a collective.
  """

  name: str
  work: kinds.Work
  cycles: float
  estimated: bool
  hbm_bytes: float
  rounds: float = 1
  waits: bool = False


@dataclasses.dataclass(frozen=True)
class Transfer:
  """A collective of the time line.

  Attributes:
    collective: what is sent.
    group: positions in the mesh of devices that share it, one group of several; () for all.
    layer: that it is of; "" for none.
    cycles: of a round, over the links.
    rounds: how often it runs in a step.
    position: where in its computation it starts, as a share of the cycles of that.
    waited: cycles of a round for which nothing else runs.
  """

  collective: collectives.Collective
  group: tuple[int, ...]
  layer: str
  cycles: float
  rounds: float
  position: float
  waited: float


@dataclasses.dataclass(frozen=True)
class Loop:
  """A loop that ends by its values, so that its program does not say how often it turns.

  Attributes:
    name: of the loop.
    most: its rounds at most, all of which count; None if no bound could be read, and one counts.
    cycles: of what counts, in a step.
  """

  name: str
  most: int | None
  cycles: float


@dataclasses.dataclass(frozen=True)
class TimeLine:
  """The estimate of a step on each device.

  Attributes:
    items: operations and waits, in their order.
    transfers: collectives.
    open_loops: loops that end by their values.
  """

  items: tuple[Item, ...]
  transfers: tuple[Transfer, ...]
  open_loops: tuple[Loop, ...]

  @property
  def cycles(self) -> float:
    """Of the whole step."""
    return sum(item.cycles for item in self.items)

  @property
  def estimated(self) -> float:
    """What the compiler's estimates add up to, without waits and what it gives none for."""
    return sum(item.cycles for item in self.items if item.estimated)

  @property
  def without_collectives(self) -> float:
    """Cycles but for collectives, and for the waits for them."""
    return sum(item.cycles for item in self.items if item.work.kind != kinds.COLLECTIVES)

  @property
  def hbm_bytes(self) -> float:
    """Bytes that operations read from HBM and write to it, at most; copies included."""
    return sum(item.hbm_bytes for item in self.items)

  def by_kind(self) -> dict[str, float]:
    """Return cycles by kind, in the order of KINDS, without kinds that do not occur."""
    totals = _total((item.work.kind, item.cycles) for item in self.items)
    return {kind: totals[kind] for kind in kinds.KINDS if kind in totals}

  def by_layer(self) -> dict[str, float]:
    """Return cycles by layer, "" for what has none, in the order of their forward pass."""
    # What is no convolution may be scheduled early, or late.
    forward = [item for item in self.items if item.work.kind == kinds.FORWARD]
    order = dict.fromkeys(item.work.layer for item in [*forward, *self.items])
    totals = _total((item.work.layer, item.cycles) for item in self.items)
    return {layer: totals[layer] for layer in order}


def _total(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
  totals: dict[str, float] = {}
  for name, value in pairs:
    totals[name] = totals.get(name, 0.0) + value
  return totals


def time_line(text: str, device: Rates, *, training: bool = True) -> TimeLine:
  """Return the time line of a program compiled for TPUs.

  Args:
    text: its `as_text()`.
    device: see `rates`.
    training: whether the program computes gradients.
  """
  module = hlo.parse(text)
  return _Walk(module, device, kinds.work_of(module, training), text).run(module.entry)


class _Walk:
  """A way through the computations of a program, in the order of their schedules."""

  def __init__(
    self,
    module: hlo.Module,
    device: Rates,
    work: Callable[[hlo.Instruction], kinds.Work],
    text: str,
  ):
    self._module = module
    self._device = device
    self._work = work
    # What a collective without groups needs to be read.
    self._header = text.partition("\n")[0]

  def run(self, computation: str) -> TimeLine:
    """Return the time line of a computation."""
    line = _Line(self._device)
    for instruction in self._module.computations[computation]:
      self._step(instruction, line)
    return line.close()

  def _step(self, instruction: hlo.Instruction, line: "_Line") -> None:
    name, opcode = instruction.name, instruction.opcode
    if opcode in _FREE or _FREE_CALLS.search(instruction.line):
      return
    work = self._work(instruction)
    if opcode == "while":
      self._turn(instruction, line)
    elif opcode in _CALLS:
      for inner, share in self._called(instruction):
        line.include(inner, share)
    elif opcode.endswith("-done"):
      line.wait(instruction.operands[0], work)
    elif found := self._collectives(instruction):
      self._send(instruction, found, work, line)
    elif opcode.endswith("-start"):
      line.copy(name, work, _moved(instruction))
    elif opcode not in ("send", "recv"):
      touched = self._module.touched(instruction)
      in_hbm = sum(array.bytes for array in touched if array.space == HBM)
      cycles = instruction.cycles
      if cycles is None:
        everywhere = sum(array.bytes for array in touched)
        line.compute(Item(name, work, everywhere / self._device.hbm, False, in_hbm))
      else:
        line.compute(Item(name, work, cycles, True, in_hbm))

  def _send(
    self,
    instruction: hlo.Instruction,
    found: list[Found],
    work: kinds.Work,
    line: "_Line",
  ) -> None:
    """Start the collectives of an instruction, and wait for them where it does."""
    inside = " ".join(
      each.line
      for each in self._module.inside(instruction)
      if kinds.sends(each) or each.opcode == "custom-call"
    )
    # A collective that overlaps with others' work is in each fusion that advances it.
    chain = re.search(r'channel_id=(\d+).*?chain_id="(\d+)"', inside)
    key = "/".join(chain.groups()) if chain else instruction.name
    line.send(key, work, found)
    if instruction.cycles is not None:
      line.compute(Item(instruction.name, work, instruction.cycles, True, 0.0))
    if "AsyncCollectiveDone" in inside if chain else not self._returns_early(instruction):
      line.wait(key, work)

  @staticmethod
  def _returns_early(instruction: hlo.Instruction) -> bool:
    return instruction.opcode.endswith("-start") or instruction.opcode == "recv"

  def _collectives(self, instruction: hlo.Instruction) -> list[Found]:
    """Return what an instruction sends, or starts to send."""
    lines = [("", instruction.line)] if kinds.sends(instruction) else []
    if instruction.opcode in _WITH_COLLECTIVES:
      lines += [
        (f"%{name} () -> () {{", each.line)
        for name in instruction.called
        for each in self._module.computations[name]
        if kinds.sends(each)
      ]
    return [
      (found, collectives.group(line))
      for computation, line in lines
      for found in collectives.read(f"{self._header}\n{computation}\n{line}")
    ]

  def _called(self, instruction: hlo.Instruction) -> list[tuple[TimeLine, float]]:
    """Return the time lines of what is called, and how often each runs in a step.

    Of branches that is the dearest, and the cheapest too where trainer.compiler.one_in names them.
    """
    lines = sorted(map(self.run, instruction.called), key=lambda each: each.cycles)
    if named := _ONE_IN.search(instruction.op_name):
      share = 1 / int(named[1])
      return [(lines[-1], share), (lines[0], 1 - share)]
    return [(lines[-1], 1)]

  def _turn(self, loop: hlo.Instruction, line: "_Line") -> None:
    """Take the rounds of a loop."""
    most, is_open = self._rounds(loop)
    rounds = most or 1
    body = self.run(loop.attribute("body") or "")
    line.include(body, rounds)
    if is_open:  # by sums over the batch, often; a counter is compared beside the rest
      condition = self.run(loop.attribute("condition") or "")
      line.include(condition, rounds)
      line.note(Loop(loop.name, most, rounds * (body.cycles + condition.cycles)))

  def _rounds(self, loop: hlo.Instruction) -> tuple[int | None, bool]:
    """Return how often a loop turns at most, and whether it may end before.

    The first is of loops that count from 0 to a constant, as those of scans do; None for others.
    """
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.line):
      return int(known[1]), False
    if _ONE_ROUND.search(loop.op_name):
      return 1, False
    condition = self._module.computations[loop.attribute("condition") or ""]
    parts = [each for part in condition for each in (part, *self._module.inside(part))]
    compared = {name for part in parts if "direction=LT" in part.line for name in part.operands}
    constants = [part for part in parts if part.opcode == "constant"]
    # In a fusion the constant may be an operand, with another name inside.
    limits = [part for part in constants if part.name in compared] or constants
    bounds = {
      found[1]
      for part in limits
      if (found := re.search(r" [su]\d+\[\]\S* constant\((\d+)\)", part.line))
    }
    if not compared or len(bounds) != 1:
      return None, True
    return int(bounds.pop()), any(part.opcode == "and" for part in parts)


class _Line:
  """A time line in the making: a device that computes, copies and sends at the same time."""

  def __init__(self, device: Rates):
    self._device = device
    self._now = 0.0
    self._items: list[Item] = []
    self._copies: dict[str, float] = {}  # bytes that are left, in the order of their start
    self._sent: dict[str, float] = {}  # when it will have arrived
    self._links_free = 0.0
    self._transfers: list[tuple[str, Transfer]] = []
    self._waited: dict[str, float] = {}
    self._open_loops: list[Loop] = []

  def compute(self, item: Item) -> None:
    """Take the time of an operation; copies get the bandwidth that it leaves."""
    self._items.append(item)
    self._advance(item.cycles, item.hbm_bytes)

  def include(self, inner: TimeLine, rounds: float) -> None:
    """Take the time of a computation, so many times."""
    self._advance(inner.cycles * rounds, inner.hbm_bytes * rounds)
    self._items += [
      dataclasses.replace(
        item,
        cycles=item.cycles * rounds,
        hbm_bytes=item.hbm_bytes * rounds,
        rounds=item.rounds * rounds,
      )
      for item in inner.items
    ]
    self._transfers += [
      ("", dataclasses.replace(each, rounds=each.rounds * rounds)) for each in inner.transfers
    ]
    self._open_loops += [
      dataclasses.replace(each, cycles=each.cycles * rounds) for each in inner.open_loops
    ]

  def note(self, loop: Loop) -> None:
    """Keep a loop that ends by its values."""
    self._open_loops.append(loop)

  def copy(self, name: str, work: kinds.Work, size: float) -> None:
    """Start to copy so many bytes."""
    self._copies[name] = size
    self._items.append(Item(name, work._replace(kind=kinds.COPIES), 0.0, False, size))

  def send(self, name: str, work: kinds.Work, found: Sequence[Found]) -> None:
    """Start collectives, behind those that are on their way, unless they were started before."""
    if name in self._sent:
      return
    for each, group in found:
      cycles = _sending(each, self._device)
      self._links_free = max(self._links_free, self._now) + cycles
      self._transfers.append((name, Transfer(each, group, work.layer, cycles, 1, self._now, 0.0)))
    self._sent[name] = self._links_free

  def wait(self, name: str, work: kinds.Work) -> None:
    """Wait until a copy or a collective has ended."""
    if name in self._copies:
      queue = list(self._copies)
      ahead = queue[: queue.index(name) + 1]
      cycles = sum(map(self._copies.pop, ahead)) / self._device.hbm
      kind = kinds.COPIES
    elif name in self._sent:
      cycles = max(0.0, self._sent[name] - self._now)
      self._advance(cycles, 0.0)
      self._now -= cycles
      self._waited[name] = cycles
      kind = kinds.COLLECTIVES
    else:
      return
    self._now += cycles
    if cycles:
      self._items.append(Item(name, work._replace(kind=kind), cycles, False, 0.0, waits=True))

  def _advance(self, cycles: float, hbm_bytes: float) -> None:
    self._now += cycles
    left = max(0.0, cycles * self._device.hbm - hbm_bytes)
    for name, size in self._copies.items():
      self._copies[name] = max(0.0, size - left)
      left = max(0.0, left - size)

  def close(self) -> TimeLine:
    """Return the time line."""
    transfers = tuple(
      dataclasses.replace(
        each, position=each.position / self._now, waited=self._waited.get(name, 0.0)
      )
      if name
      else each
      for name, each in self._transfers
    )
    return TimeLine(tuple(self._items), transfers, tuple(self._open_loops))


def _moved(start: hlo.Instruction) -> float:
  """Return the bytes of HBM that an asynchronous copy takes: twice its size within HBM."""
  arrays = [array for array in start.arrays if array.shape]
  if not arrays:
    return 0.0
  ends = sum(array.space == HBM for array in arrays[:2])
  return min(array.bytes for array in arrays) * max(1, ends)


def _sending(collective: collectives.Collective, device: Rates) -> float:
  """Return the cycles of a collective in a ring of its devices."""
  across = collective.kind.endswith("between slices")
  others = (collective.devices - 1) / collective.devices
  if collective.kind.startswith("all-reduce"):
    share = 2 * others
  else:
    share = 1.0 if "permute" in collective.kind or "broadcast" in collective.kind else others
  return share * collective.bytes / (device.network if across else device.links)
