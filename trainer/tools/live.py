"""What lies in the memory of a TPU when a step needs the most of it, by layer."""

from collections.abc import Callable
import functools

from trainer.tools import hlo, kinds

_ALIASES = ("get-tuple-element", "tuple", "bitcast", "while", "opt-barrier", "conditional")
# An array of an instruction: its name, and the number in its tuple.
_Value = tuple[str, int]


def largest(text: str, *, training: bool = True) -> dict[str, float]:
  """Return bytes by layer at the moment at which the temporaries of a program are largest.

  Arguments and results are not counted. Layers are those that wrote the arrays: an activation that
  is kept for the backward pass is of the layer that made it. This follows the schedule, without the
  compiler's ways to lay arrays into each other's place, so that the sum differs from
  `memory_analysis()`.

  Args:
    text: `as_text()` of a program compiled for TPUs.
    training: whether it computes gradients.
  """
  module = hlo.parse(text)
  work = kinds.work_of(module, training)

  @functools.cache
  def peak(computation: str) -> dict[str, float]:
    return _peak(module, computation, lambda each: work(each).layer, peak)

  found = peak(module.entry)
  return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def _peak(
  module: hlo.Module,
  computation: str,
  layer: Callable[[hlo.Instruction], str],
  peak: Callable[[str], dict[str, float]],
) -> dict[str, float]:
  lines = module.computations[computation]
  values: dict[str, set[_Value]] = {}  # what each name stands for
  sizes: dict[_Value, float] = {}
  last: dict[_Value, int] = {}
  makers: dict[_Value, str] = {}  # instructions
  layers: dict[_Value, str] = {}
  results: set[_Value] = set()
  for number, line in enumerate(lines):
    read = set().union(*(values.get(operand, set()) for operand in line.operands))
    last |= dict.fromkeys(read, number)
    if line.opcode == "get-tuple-element" and line.operands:
      index = int(line.attribute("index") or 0)
      whole = values.get(line.operands[0], set())
      # Of a tuple that one instruction made, one array; of another, all that may be meant.
      values[line.name] = {each for each in whole if each == (line.operands[0], index)} or whole
    elif line.opcode in _ALIASES or line.opcode.endswith("-done"):
      values[line.name] = read
    elif line.opcode not in ("parameter", "constant"):
      made = {(line.name, index) for index in range(len(line.arrays))}
      for value in made:
        array = line.arrays[value[1]]
        sizes[value] = array.bytes if array.space == 0 else 0.0
      if line.opcode.endswith("-start"):  # the first or second array is the one that is copied
        for index in range(len(line.arrays)):
          if index != (0 if line.opcode == "copy-start" else 1):
            sizes[line.name, index] = 0.0
      values[line.name] = made
      makers |= dict.fromkeys(made, line.name)
      # A copy is of the layer whose array it is.
      copied = [layers[value] for value in read if value in layers and not line.op_name]
      layers |= dict.fromkeys(made, layer(line) or next(iter(sorted(copied)), ""))
    if line.is_root:
      results = values.get(line.name, set())
  ends: dict[int, list[_Value]] = {}
  for value, number in last.items():
    ends.setdefault(number, []).append(value)
  now: dict[str, float] = {}
  best: dict[str, float] = {}
  for number, line in enumerate(lines):
    for value in values.get(line.name, set()):
      if makers.get(value) == line.name and value in last and value not in results:
        name = layers[value]
        now[name] = now.get(name, 0.0) + sizes[value]
    inside = peak(line.attribute("body") or "") if line.opcode == "while" else {}
    if sum(now.values()) + sum(inside.values()) > sum(best.values()):
      best = {name: now.get(name, 0.0) + inside.get(name, 0.0) for name in {*now, *inside}}
    for value in ends.get(number, ()):
      if value not in results and value in sizes:
        now[layers[value]] -= sizes[value]
  return {name: size for name, size in best.items() if size}
