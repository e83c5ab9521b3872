"""The text of a compiled program, read into computations and instructions in their order."""

from collections.abc import Iterator
import dataclasses
import functools
import math
import re

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*-> .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+(\d*)\w*)\[([\d,]*)\](?:\{([\d,]*)((?::[^{}]*)?)\})?")
_CALLED = re.compile(
  r"\b(?:calls|to_apply|body|condition|called_computations|branch_computations|"
  r"(?:true|false)_computation)=(\{[^}]*\}|%?[\w.-]+)"
)


@dataclasses.dataclass(frozen=True)
class Array:
  """An array as it lies in memory.

  Attributes:
    dtype: as XLA writes it: f32, bf16, pred.
    shape: its lengths.
    bytes: with the padding to whole tiles of its two innermost dimensions.
    space: memory that holds it: 0 for HBM, 1 for the memory on the chip.
  """

  dtype: str
  shape: tuple[int, ...]
  bytes: float
  space: int


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line of a computation.

  Attributes:
    name: without %.
    opcode: fusion, while, copy-start, all-reduce, ...
    arrays: the result, or what a tuple holds, flattened.
    operands: names.
    line: the whole line.
    is_root: whether it is the result of its computation.
  """

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  line: str
  is_root: bool

  @property
  def op_name(self) -> str:
    """Where the program was traced: jit(step)/jvp(stage1_block1)/conv1/conv_general_dilated."""
    return found[1] if (found := re.search(r'op_name="([^"]*)"', self.line)) else ""

  @property
  def cycles(self) -> float | None:
    """What the compiler of TPUs expects it to take; None if it gives no estimate."""
    found = re.search(r'"estimated_cycles":"(\d+)"', self.line)
    return float(found[1]) if found else None

  @property
  def called(self) -> tuple[str, ...]:
    """Computations that it runs."""
    return tuple(
      name.strip().lstrip("%")
      for names in _CALLED.findall(self.line)
      for name in names.strip("{}").split(",")
    )

  def attribute(self, name: str) -> str | None:
    """Return the word behind `name=`, without %."""
    found = re.search(rf"\b{name}=%?([^,\s]+)", self.line)
    return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Module:
  """A compiled program.

  Attributes:
    entry: name of the computation that it starts with.
    computations: instructions by name of the computation, in the order of their schedule.
  """

  entry: str
  computations: dict[str, tuple[Instruction, ...]]

  @functools.cached_property
  def instructions(self) -> dict[str, Instruction]:
    """All instructions by name, which is unique in a program."""
    return {each.name: each for lines in self.computations.values() for each in lines}

  def inside(self, instruction: Instruction) -> Iterator[Instruction]:
    """Yield the instructions of all computations that an instruction calls, at any depth."""
    for name in instruction.called:
      for each in self.computations.get(name, ()):
        yield each
        yield from self.inside(each)


def parse(text: str) -> Module:
  """Return what is in `as_text()` of a compiled jitted function.

  Raises:
    ValueError: if there is no entry.
  """
  entry, name = "", ""
  computations: dict[str, list[Instruction]] = {}
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      name = header[2]
      computations[name] = []
      if header[1]:
        entry = name
    elif name and (found := _INSTRUCTION.match(line)):
      computations[name].append(_instruction(line, found))
    elif line.startswith("}"):
      name = ""
  if not entry:
    raise ValueError("the text of a compiled program has an ENTRY computation; this has none")
  return Module(entry, {name: tuple(lines) for name, lines in computations.items()})


def _instruction(line: str, found: re.Match[str]) -> Instruction:
  rest = re.sub(r"/\*index=\d+\*/", "", found[3])
  end = _closing(rest) if rest.startswith("(") else rest.index(" ")
  shape, call = rest[:end], rest[end:].lstrip()
  opcode, _, _ = call.partition("(")
  operands = call[len(opcode) : len(opcode) + _closing(call[len(opcode) :])]
  return Instruction(
    found[2],
    opcode,
    arrays(shape),
    tuple(re.findall(r"%([\w.-]+)", operands)),
    line,
    bool(found[1]),
  )


def _closing(text: str) -> int:
  """Return where the bracket that a text starts with is closed: the index behind it."""
  depth = 0
  for i, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if not depth:
      return i + 1
  return len(text)


def arrays(shape: str) -> tuple[Array, ...]:
  """Return the arrays of a shape such as "(f32[8,128]{1,0:T(8,128)}, bf16[]{:S(1)})"."""
  return tuple(_array(*found) for found in _ARRAY.findall(shape) if found[0] != "token")


def _array(dtype: str, bits: str, lengths: str, order: str, memory: str) -> Array:
  shape = tuple(map(int, lengths.split(","))) if lengths else ()
  # Dimensions from the outermost to the innermost, the last of them in whole tiles.
  padded = [shape[int(axis)] for axis in reversed(order.split(","))] if order else list(shape)
  if tile := re.search(r":T\(([\d,]+)\)", memory):
    sides = [int(side) for side in tile[1].split(",")]
    padded = [1] * (len(sides) - len(padded)) + padded
    for i, side in enumerate(reversed(sides), 1):
      padded[-i] = -(-padded[-i] // side) * side
  space = re.search(r"S\((\d+)\)", memory)
  # pred, the type without a number of bits in its name, takes a byte.
  return Array(dtype, shape, math.prod(padded) * int(bits or 8) / 8, int(space[1]) if space else 0)
