"""How well the chips are used: the FLOPs of the model over what the chips can do in the same time.

Model FLOPs are those of the mathematics, not of the program: 2 for each multiply-add of
convolutions and matrix products, padding included (as papers and torchvision count), and none for
normalisation, activations, pooling, loss and optimizer. A loop that may end early counts in full,
and of two ways the longer. A training step counts as three forward passes: the backward pass of a
convolution is two of its size, for the gradients of its input and of its kernel. The forward pass
of a teacher is one more, of its own net. Recomputation to save memory does not count. The quotient
is the model FLOPs utilisation (MFU) of arXiv:2204.02311, appendix B.
"""

from collections.abc import Iterable, Sequence
import math
from typing import cast

import jax
from jax.extend import core
import jax.numpy as jnp

from trainer.distill import Teacher
from trainer.program import Program
from trainer.reporting.chips import CHIPS
from trainer.state import Model, Variables

FORWARD_PASSES = 3  # that a training step counts as


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

  def forward(variables: Variables, image: jax.Array) -> jax.Array:
    return model.merge(variables, None)(image)

  image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
  return 2 * _multiply_adds(jax.make_jaxpr(forward)(variables, image).eqns)


def _multiply_adds(eqns: Iterable[core.JaxprEqn]) -> int:
  """Return the multiply-adds of all convolutions and matrix products, once per round of a scan."""
  total = 0
  for eqn in eqns:
    if eqn.primitive.name == "conv_general_dilated":
      kernel = _shape(eqn.invars[1])
      outputs = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
      total += math.prod(_shape(eqn.outvars[0])) * math.prod(kernel) // outputs
    elif eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      total += math.prod(_shape(eqn.outvars[0])) * math.prod(
        _shape(eqn.invars[0])[axis] for axis in contracted
      )
    else:
      inner = [_multiply_adds(jaxpr.eqns) for jaxpr in core.jaxprs_in_params(eqn.params)]
      name, rounds = eqn.primitive.name, eqn.params.get("length", 1)
      if name == "while":
        rounds = _rounds(eqn.params["cond_jaxpr"].jaxpr)
      total += rounds * (max(inner) if name == "cond" else sum(inner))
  return total


def _rounds(condition: core.Jaxpr) -> int:
  """Return how often a loop runs at most: the bound of its counter, or 1 if that is unknown."""
  bounds = [
    int(eqn.invars[1].val)
    for eqn in condition.eqns
    if eqn.primitive.name == "lt" and isinstance(eqn.invars[1], core.Literal)
  ]
  return max(bounds, default=1)


def _shape(variable: core.Var | core.Literal) -> tuple[int, ...]:
  return cast(jax.core.ShapedArray, variable.aval).shape


def step_flops(
  model: Model,
  variables: Variables,
  *,
  image_size: int,
  batch_size: int,
  teacher: Teacher | None = None,
) -> int:
  """Return the model FLOPs of a training step; see `forward_flops`."""
  of_image = FORWARD_PASSES * forward_flops(model, variables, image_size)
  return batch_size * (of_image + teacher_flops(teacher, image_size))


def teacher_flops(teacher: Teacher | None, image_size: int) -> int:
  """Return the model FLOPs of one image that a training step has for its teacher; 0 without one."""
  return forward_flops(teacher.model, teacher.variables, image_size) if teacher else 0


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
  batch, teacher = program.config.global_batch_size, program.teacher
  each = {
    size: step_flops(program.model, variables, image_size=size, batch_size=batch, teacher=teacher)
    for size in {size for _, size in lengths.sizes}
  }
  return Work([(first - lengths.offset, each[size]) for first, size in lengths.sizes])
