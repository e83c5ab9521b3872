"""How well the chips are used: the FLOPs of the model over what the chips can do in the same time.

Model FLOPs are those of the mathematics, not of the program: 2 for each multiply-add of
convolutions and matrix products, padding included (as papers and torchvision count), and none for
normalisation, activations, pooling, loss and optimizer. A loop that may end early counts in full,
and of two ways the longer. A training step counts as three forward passes: the backward pass of a
convolution is two of its size, for the gradients of its input and of its kernel. Where parameters
are frozen, a product counts once, and once more for each factor that needs a gradient. The forward
pass of a teacher is one more, of its own net. Recomputation to save memory does not count. The
quotient is the model FLOPs utilisation (MFU) of arXiv:2204.02311, appendix B.
"""

from collections.abc import Sequence
import math
from typing import Any, cast

import jax
from jax.extend import core
import jax.numpy as jnp

from trainer import finetune
from trainer.distill import Teacher
from trainer.program import Program
from trainer.reporting.chips import CHIPS
from trainer.state import Model, Variables

_PASSES = 3  # that a training step counts as


def peak(devices: Sequence[jax.Device]) -> float | None:
  """Return the bfloat16 FLOP/s of the chips that `devices` belong to, or None if one is unknown.

  A device is a core on v2, v3 and TPU7x, where a chip has two; a core or a whole chip on v4 and
  v5p, depending on their setup; else a chip. Cores of one chip have the same coordinates.
  """
  if any(device.device_kind not in CHIPS for device in devices):
    return None
  chips = {
    (getattr(device, "slice_index", 0), tuple(device.coords)): device.device_kind
    for device in devices
  }
  return sum(CHIPS[kind].peak for kind in chips.values())


def forward_flops(model: Model, variables: Variables, image_size: int) -> int:
  """Return the model FLOPs of one image; nothing is computed, `variables` may be abstract."""
  return image_flops(model, variables, image_size)[0]


def training_flops(model: Model, variables: Variables, image_size: int, freeze: str = "") -> int:
  """Return the model FLOPs of one image in a training step, but for those of a teacher."""
  return image_flops(model, variables, image_size, freeze)[1]


def image_flops(
  model: Model, variables: Variables, image_size: int, freeze: str = ""
) -> tuple[int, int]:
  """Return the model FLOPs of one image, of its forward pass and in a training step.

  Args:
    model: that is trained.
    variables: of it; may be abstract.
    image_size: of its images.
    freeze: see `config.optimizer.freeze`.
  """

  def forward(variables: Variables, image: jax.Array) -> jax.Array:
    return model.merge(variables, None)(image)

  image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
  program = jax.make_jaxpr(forward)(variables, image).jaxpr

  def count(trained: Variables) -> int:
    return 2 * _multiply_adds(program, [*jax.tree.leaves(trained), False])[0]

  nothing = jax.tree.map(lambda _: False, variables)
  own = count(nothing)
  if not freeze:
    return own, _PASSES * own
  return own, count(nothing._replace(params=finetune.trained(freeze, variables.params)))


def teacher_flops(teacher: Teacher | None, image_size: int) -> int:
  """Return the model FLOPs of one image that a training step has for its teacher; 0 without one."""
  return forward_flops(teacher.model, teacher.variables, image_size) if teacher else 0


def _multiply_adds(program: core.Jaxpr, wanted: Sequence[bool]) -> tuple[int, list[bool]]:
  """Return the multiply-adds of a program, and which of its results need a gradient.

  A convolution or matrix product counts once, and once more for each operand that needs a gradient,
  which is a product of the same size; those of a scan once per round.

  Args:
    program: what is counted.
    wanted: which of its arguments need a gradient.
  """
  needs = dict(zip(program.invars, wanted, strict=True))

  def need(variables: Sequence[Any]) -> list[bool]:
    return [not isinstance(each, core.Literal) and needs.get(each, False) for each in variables]

  total = 0
  for eqn in program.eqns:
    inputs = need(eqn.invars)
    outputs = [any(inputs)] * len(eqn.outvars)
    name = eqn.primitive.name
    inner = list(core.jaxprs_in_params(eqn.params))
    if name in _PRODUCTS:
      total += (1 + sum(inputs)) * _PRODUCTS[name](eqn)
    elif name in ("scan", "while"):
      count, outputs = _of_loop(eqn, inputs)
      total += count
    elif name == "cond":
      counts, results = zip(*(_multiply_adds(each, inputs[1:]) for each in inner), strict=True)
      total += max(counts)
      outputs = list(map(any, zip(*results, strict=True)))
    elif len(inner) == 1 and len(inner[0].invars) == len(inputs):
      count, outputs = _multiply_adds(inner[0], inputs)
      total += count
    else:
      total += sum(_multiply_adds(each, [any(inputs)] * len(each.invars))[0] for each in inner)
    needs.update(zip(eqn.outvars, outputs, strict=True))
  return total, need(program.outvars)


def _of_loop(eqn: core.JaxprEqn, inputs: list[bool]) -> tuple[int, list[bool]]:
  """Return what `_multiply_adds` does, for a loop."""
  params = eqn.params
  if eqn.primitive.name == "scan":
    body, rounds = params["jaxpr"].jaxpr, params["length"]
    first = params["num_consts"]
    last = first + params["num_carry"]
  else:
    body, rounds = params["body_jaxpr"].jaxpr, _rounds(params["cond_jaxpr"].jaxpr)
    inputs = inputs[params["cond_nconsts"] :]
    first, last = params["body_nconsts"], len(inputs)
  while True:
    count, outputs = _multiply_adds(body, inputs)
    # What a round makes of an argument goes into the next one.
    carried = [a or b for a, b in zip(inputs[first:last], outputs, strict=False)]
    if carried == inputs[first:last]:
      return rounds * count, [*carried, *outputs[len(carried) :]]
    inputs = [*inputs[:first], *carried, *inputs[last:]]


def _rounds(condition: core.Jaxpr) -> int:
  """Return how often a loop runs at most: the bound of its counter, or 1 if that is unknown."""
  bounds = [
    int(eqn.invars[1].val)
    for eqn in condition.eqns
    if eqn.primitive.name == "lt" and isinstance(eqn.invars[1], core.Literal)
  ]
  return max(bounds, default=1)


def _of_convolution(eqn: core.JaxprEqn) -> int:
  kernel = _shape(eqn.invars[1])
  outputs = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
  return math.prod(_shape(eqn.outvars[0])) * math.prod(kernel) // outputs


def _of_matrices(eqn: core.JaxprEqn) -> int:
  (contracted, _), _ = eqn.params["dimension_numbers"]
  lengths = _shape(eqn.invars[0])
  return math.prod(_shape(eqn.outvars[0])) * math.prod(lengths[axis] for axis in contracted)


_PRODUCTS = {"conv_general_dilated": _of_convolution, "dot_general": _of_matrices}


def _shape(variable: core.Var | core.Literal) -> tuple[int, ...]:
  return cast(jax.core.ShapedArray, variable.aval).shape


class Work:
  """The work of the steps of a run, whose images may change their size."""

  def __init__(self, steps: Sequence[tuple[int, float]]):
    """Store what each step takes.

    Args:
      steps: (steps taken before, work of each step from there on), rising; the first is for the
        steps before it too.
    """
    self._steps = steps

  def between(self, start: int, stop: int) -> float:
    """Return the work of the steps start + 1, ..., stop."""
    ends = [first for first, _ in self._steps[1:]]
    total = 0.0
    for begin, end, work in zip(
      [-math.inf, *ends], [*ends, math.inf], [work for _, work in self._steps], strict=True
    ):
      total += work * max(0, min(stop, end) - max(start, begin))
    return total


def work(program: Program, peak: float | None) -> Work:
  """Return the model FLOPs of the steps of a run; the number of the steps, if nobody needs them.

  Args:
    program: of the run.
    peak: of the chips in FLOP/s, None if it is not known.
  """
  lengths, variables = program.lengths, program.abstract_state.for_eval()
  if not peak and len(lengths.sizes) == 1:
    return Work([(0, 1.0)])
  config = program.config
  each = {
    size: training_flops(program.model, variables, size, config.optimizer.freeze)
    + teacher_flops(program.teacher, size)
    for size in {size for _, size in lengths.sizes}
  }
  batch = config.global_batch_size
  return Work([(first - lengths.offset, batch * each[size]) for first, size in lengths.sizes])
