"""The text of a compiled program, read into computations and instructions in their order."""

from collections.abc import Iterator, Sequence
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

  def touched(self, instruction: Instruction) -> list[Array]:
    """Return the arrays that an instruction reads and writes, or their part.

    Of one that it takes slices of, those; of one that it updates in place, what it writes.
    """
    parts: tuple[Instruction, ...] = (instruction,)
    names = dict(enumerate(instruction.operands))
    if instruction.opcode == "fusion" and instruction.called[0] in self.computations:
      parts = self.computations[instruction.called[0]]
      found = [(re.search(r" parameter\((\d+)\)", part.line), part.name) for part in parts]
      names = {int(number[1]): name for number, name in found if number}
    read, written = self._parts(parts, frozenset(names.values()))
    arrays: list[Array] = []
    for number, operand in enumerate(instruction.operands):
      if operand in self.instructions:
        arrays += _of_size(self.instructions[operand].arrays, read.get(names.get(number, "")))
    root = next((part for part in parts if part.is_root), instruction)
    results = root.operands if root.opcode == "tuple" else (root.name,)
    for number, array in enumerate(instruction.arrays):
      result = results[number] if number < len(results) else ""
      arrays += _of_size((array,), written.get(result))
    return arrays

  def _parts(
    self, lines: Sequence[Instruction], inputs: frozenset[str]
  ) -> tuple[dict[str, float], dict[str, float]]:
    """Return bytes that are read of inputs, and written of results, if that is not all of them."""
    same: dict[str, str] = {}  # names of an array in another shape, by the one that it has first
    read: dict[str, float] = {}
    written: dict[str, float] = {}
    whole: set[str] = set()
    for line in lines:
      sources = [same.get(name, name) for name in line.operands]
      if line.opcode == "bitcast":
        same[line.name] = sources[0]
        if sources[0] in written:
          written[line.name] = written[sources[0]]
        continue
      size = None
      if line.opcode == "dynamic-slice":
        size = line.arrays[0].bytes
      elif line.opcode == "dynamic-update-slice" and sources[0] in inputs:
        size, written[line.name] = 0.0, self.instructions[line.operands[1]].arrays[0].bytes
      if size is not None:
        read[sources[0]] = read.get(sources[0], 0.0) + size
      whole.update(sources if size is None else sources[1:])
    return {name: size for name, size in read.items() if name not in whole}, written

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


def _of_size(arrays: tuple[Array, ...], size: float | None) -> tuple[Array, ...]:
  return arrays if size is None else (dataclasses.replace(arrays[0], bytes=size),)


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
