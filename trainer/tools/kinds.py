"""What the operations of a compiled step are for: their layer, and the kind of their work."""

from collections.abc import Callable
import functools
import re
from typing import NamedTuple

from trainer.tools import collectives, hlo

FORWARD, DATA, WEIGHT = "convolution forward", "data gradient", "weight gradient"
NORM, RESIDUAL, POOL = "norm", "residual", "pool"
OPTIMIZER, INPUT, OTHER = "optimizer", "input and loss", "other"
COLLECTIVES, COPIES = "collectives", "copies"

# In the order of a report. Convolutions stand for matrix products too, and have what is fused into
# them: the sums of the norm behind, normalisation and ReLU before.
KINDS = (
  FORWARD,
  DATA,
  WEIGHT,
  NORM,
  RESIDUAL,
  POOL,
  OPTIMIZER,
  INPUT,
  OTHER,
  COPIES,
  COLLECTIVES,
)

# Parts of a path that name a transformation, not a layer.
_NOISE = re.compile(
  r"^(while|body|cond|branch_\d+_fun|closed_call|checkpoint|rematted_computation|remat\d*|"
  r"one_in_\d+|one_round|shard_map|custom_(jvp|vjp)_call\w*|jit|pjit|scan|vmap)?$"
)
# What a loop over blocks stacks and slices is of no layer.
_OF_BLOCKS = re.compile(r"jvp\(.*/while/(body|cond)/")
_NORM = re.compile(r"(^|[/_.])(bn|norm|\w*BatchNorm|\w*LayerNorm)", re.IGNORECASE)
_ADDS = ("add", "add_any")
_COLLECTIVE = re.compile(rf"({collectives.KINDS}|recv|send)(-start|-done)?$")


class Origin(NamedTuple):
  """Where an operation was traced.

  Attributes:
    layer: path of modules, as in stage1_block1/conv1; "" outside of the model.
    primitive: of JAX, as in conv_general_dilated.
    gradient: whether it is of a backward pass.
    differentiated: whether it is of a function that is differentiated, or of its gradient.
  """

  layer: str
  primitive: str
  gradient: bool
  differentiated: bool


@functools.cache
def origin(op_name: str) -> Origin:
  """Return what the metadata of an operation have."""
  gradient, differentiated = "transpose(" in op_name, "jvp(" in op_name
  path = re.sub(r"\bjit\([^()]*\)", "", op_name)
  path = re.sub(r"\b(transpose|jvp|vmap|remat|checkpoint)\(|\)", "", path)
  *layers, primitive = path.split("/")
  return Origin(
    "/".join(part for part in layers if not _NOISE.match(part)), primitive, gradient, differentiated
  )


class Work(NamedTuple):
  """What a scheduled instruction is for."""

  layer: str
  kind: str


def work_of(module: hlo.Module, training: bool) -> Callable[[hlo.Instruction], Work]:
  """Return the function from a scheduled instruction of a step to its layer and kind.

  A fusion is of the layer of its convolution, if it has one, else of that of most of its
  operations.

  Args:
    module: the program.
    training: whether it has gradients, so that what is not differentiated is the optimizer's.
  """

  def work(instruction: hlo.Instruction) -> Work:
    parts = [instruction, *module.inside(instruction)]
    origins = [origin(part.op_name) for part in parts if part.op_name]
    products = [part for part in parts if part.opcode in ("convolution", "dot")]
    if products:
      kind = _product(products[0])
      if products[0].op_name:
        origins = [origin(products[0].op_name)]
    elif any(part.opcode in ("select-and-scatter", "reduce-window") for part in parts):
      kind = POOL
    elif any(map(sends, parts)):
      kind = COLLECTIVES
    elif not origins:
      kind = COPIES
    elif training and not any(each.differentiated for each in origins):
      kind = OPTIMIZER
    elif not any(each.layer for each in origins):
      kind = OTHER if any(_OF_BLOCKS.search(part.op_name) for part in parts) else INPUT
    elif any(
      each.primitive in _ADDS and each.layer and not is_norm(each.layer) for each in origins
    ) and any("/" in each.layer for each in [*origins, origin(instruction.op_name)]):
      kind = RESIDUAL
    elif any(is_norm(each.layer) for each in origins):
      kind = NORM
    else:
      kind = OTHER
    named = [each.layer for each in origins if each.layer]
    layer = max(dict.fromkeys(named), key=named.count) if named else ""
    return Work(layer, kind)

  return functools.cache(work)


def is_norm(layer: str) -> bool:
  """Return whether a layer is a norm, by its name."""
  return bool(_NORM.search(layer))


def sends(instruction: hlo.Instruction) -> bool:
  """Return whether an instruction itself is a collective, or the start or the end of one."""
  return bool(_COLLECTIVE.match(instruction.opcode))


def _product(convolution: hlo.Instruction) -> str:
  """Return the kind of a convolution or a matrix product."""
  if not origin(convolution.op_name).gradient:
    return FORWARD
  # The gradient of a kernel sums over examples: they are the features of its input, and the other
  # operand's spatial dimensions, those of its kernel, lie between the features.
  labels = re.search(r"dim_labels=(\w+)_", convolution.line)
  return WEIGHT if labels and not labels[1].startswith("b") else DATA
