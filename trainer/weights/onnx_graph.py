"""A traced function as a graph of ONNX.

The jaxpr of the model is walked, operation by operation, so that any family of convolutions, dense
layers, pools and elementwise functions is exported without a line of its own. (jax2onnx needs an
Orbax older than ours.) What depends on constants alone is computed here. Images stay in the layout
[N, C, H, W] between the convolutions: each value carries the order that its axes lie in, so that
a transpose is written only where an order matters. An affine function per channel behind a
convolution, as batch norm is in evaluation, becomes part of the convolution.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import operator
from typing import Any, NoReturn

import jax
import jax.export
from jax.extend import core
import numpy as np

from trainer.weights.errors import WeightsError

OPSET = 17
_IR_VERSION = 8
BATCH = "batch"  # name of the free dimension

# Operations on elements, of the same name but for these letters.
_ELEMENTWISE: Mapping[str, str] = {
  "abs": "Abs",
  "add": "Add",
  "add_any": "Add",
  "ceil": "Ceil",
  "cos": "Cos",
  "div": "Div",
  "eq": "Equal",
  "erf": "Erf",
  "exp": "Exp",
  "floor": "Floor",
  "ge": "GreaterOrEqual",
  "gt": "Greater",
  "le": "LessOrEqual",
  "log": "Log",
  "logistic": "Sigmoid",
  "lt": "Less",
  "max": "Max",
  "min": "Min",
  "mul": "Mul",
  "neg": "Neg",
  "not": "Not",
  "pow": "Pow",
  "sign": "Sign",
  "sin": "Sin",
  "sqrt": "Sqrt",
  "sub": "Sub",
  "tanh": "Tanh",
}
_REDUCTIONS: Mapping[str, str] = {
  "reduce_max": "ReduceMax",
  "reduce_min": "ReduceMin",
  "reduce_sum": "ReduceSum",
}
_PASSED_ON = ("copy", "copy_p", "reduce_precision", "optimization_barrier", "stop_gradient")


@dataclasses.dataclass(frozen=True)
class _Value:
  """An array while it is traced.

  Attributes:
    data: name of a value in the graph, or the array itself where it is constant.
    shape: as the jaxpr has it; a size of 1 in `data` stands for any.
    order: which axis of `shape` each axis of `data` is.
  """

  data: str | np.ndarray
  shape: tuple[Any, ...]
  order: tuple[int, ...]


@dataclasses.dataclass
class Node:
  """An operation of the graph, before it is written."""

  kind: str
  inputs: list[str]
  output: str
  attributes: dict[str, Any]


def _concrete(size: Any) -> int | None:
  return int(size) if isinstance(size, int | np.integer) else None


class Graph:
  """Nodes and constants of a function, as they are traced."""

  def __init__(self) -> None:
    self.nodes: list[Node] = []
    self.constants: dict[str, np.ndarray] = {}
    self._count = 0

  def _name(self) -> str:
    self._count += 1
    return f"v{self._count}"

  def _constant(self, array: np.ndarray) -> str:
    name = self._name()
    self.constants[name] = np.ascontiguousarray(array)
    return name

  def _emit(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
    output = self._name()
    self.nodes.append(Node(kind, list(inputs), output, attributes))
    return output

  def trace(
    self, jaxpr: core.Jaxpr, constants: Sequence[Any], inputs: Sequence[_Value]
  ) -> list[_Value]:
    """Add the operations of a jaxpr; return its results.

    Raises:
      WeightsError: if one has no counterpart here.
    """
    values: dict[Any, _Value] = {}

    def read(atom: Any) -> _Value:
      return _fixed(np.asarray(atom.val)) if isinstance(atom, core.Literal) else values[atom]

    values.update(zip(jaxpr.constvars, (_fixed(np.asarray(c)) for c in constants), strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))
    for equation in jaxpr.eqns:
      results = self._run(equation, [read(atom) for atom in equation.invars])
      values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]

  def _run(self, equation: Any, inputs: list[_Value]) -> list[_Value]:
    name, shape = equation.primitive.name, tuple(equation.outvars[0].aval.shape)
    inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
    if inner is not None and name not in ("scan", "while", "cond"):
      closed = isinstance(inner, core.ClosedJaxpr)
      jaxpr, constants = (inner.jaxpr, inner.consts) if closed else (inner, [])
      return self.trace(jaxpr, constants, inputs)
    if name == "broadcast_in_dim":
      return [self._broadcast(inputs[0], shape, equation.params["broadcast_dimensions"])]
    if all(isinstance(value.data, np.ndarray) for value in inputs):
      return _fold(equation, inputs)
    if name in _PASSED_ON:
      return inputs
    if name in _ELEMENTWISE:
      return [self._elementwise(_ELEMENTWISE[name], inputs, shape)]
    if name in _REDUCTIONS:
      return [self._reduce(_REDUCTIONS[name], inputs[0], equation.params["axes"], shape)]
    step: Callable[..., _Value] = getattr(self, f"_{name}", _refuse)
    return [step(*inputs, shape=shape, params=equation.params, primitive=name)]

  # Order and size of axes.

  def _in_order(self, value: _Value, order: Sequence[int]) -> str:
    """Return the name of a value whose axes lie in this order."""
    order = tuple(order)
    if isinstance(value.data, np.ndarray):
      at = [value.order.index(axis) for axis in order]
      return self._constant(value.data.transpose(at))
    at = [value.order.index(axis) for axis in order]
    return value.data if order == value.order else self._emit("Transpose", [value.data], perm=at)

  def _plain(self, value: _Value) -> str:
    return self._in_order(value, range(len(value.shape)))

  def _broadcast(self, value: _Value, shape: tuple[Any, ...], places: Sequence[int]) -> _Value:
    """Put the axes of a value at their places; axes of size 1 stand for the others."""
    if list(places) == list(range(len(shape))):
      return _Value(value.data, shape, value.order)
    at = dict(zip(places, value.shape, strict=True))
    if isinstance(value.data, np.ndarray):
      data = value.data.transpose(np.argsort(value.order))
      sizes = iter(data.shape)
      data = data.reshape([next(sizes) if axis in at else 1 for axis in range(len(shape))])
      return _Value(data, shape, tuple(range(len(shape))))
    target = [at.get(axis, 1) for axis in range(len(shape))]
    return _Value(self._reshaped(self._plain(value), target), shape, tuple(range(len(shape))))

  def _reshaped(self, name: str, shape: Sequence[Any]) -> str:
    sizes = [_concrete(size) for size in shape]
    if sizes.count(None) > 1:
      raise WeightsError("cannot be exported to ONNX: it splits the batch over two axes")
    target = np.array([-1 if size is None else size for size in sizes], np.int64)
    return self._emit("Reshape", [name, self._constant(target)])

  # Operations, by the name of their primitive.

  def _elementwise(self, kind: str, inputs: list[_Value], shape: tuple[Any, ...]) -> _Value:
    leader = max(inputs, key=lambda value: isinstance(value.data, str))
    order = leader.order if len(leader.order) == len(shape) else tuple(range(len(shape)))
    zero = [isinstance(v.data, np.ndarray) and not v.data.any() for v in inputs]
    if kind == "Max" and any(zero):
      return _Value(
        self._emit("Relu", [self._in_order(inputs[zero.index(False)], order)]), shape, order
      )
    # Scalars of a jaxpr have no axes; those of ONNX broadcast as they are.
    names = [
      self._in_order(value, order if len(value.shape) == len(order) else ()) for value in inputs
    ]
    return _Value(self._emit(kind, names), shape, order)

  def _reduce(
    self, kind: str, value: _Value, axes: Sequence[int], shape: tuple[Any, ...]
  ) -> _Value:
    assert isinstance(value.data, str)
    at = sorted(value.order.index(axis) for axis in axes)
    left = [axis for axis in value.order if axis not in axes]
    order = tuple(sorted(left).index(axis) for axis in left)
    if kind == "ReduceSum":
      name = self._emit(kind, [value.data, self._constant(np.array(at, np.int64))], keepdims=0)
    else:
      name = self._emit(kind, [value.data], axes=at, keepdims=0)
    return _Value(name, shape, order)

  def _rsqrt(self, x: _Value, *, shape: tuple[Any, ...], **_: Any) -> _Value:
    root = self._elementwise("Sqrt", [x], shape)
    return self._elementwise("Reciprocal", [root], shape)

  def _square(self, x: _Value, *, shape: tuple[Any, ...], **_: Any) -> _Value:
    return self._elementwise("Mul", [x, x], shape)

  def _erfc(self, x: _Value, *, shape: tuple[Any, ...], **_: Any) -> _Value:
    one = _fixed(np.ones((), np.float32))
    return self._elementwise("Sub", [one, self._elementwise("Erf", [x], shape)], shape)

  def _integer_pow(self, x: _Value, *, shape: tuple[Any, ...], params: Any, **_: Any) -> _Value:
    power = _fixed(np.array(params["y"], np.float32))
    return self._elementwise("Pow", [x, power], shape)

  def _convert_element_type(
    self, x: _Value, *, shape: tuple[Any, ...], params: Any, **_: Any
  ) -> _Value:
    from onnx import helper

    assert isinstance(x.data, str)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(params["new_dtype"]))
    return _Value(self._emit("Cast", [x.data], to=kind), shape, x.order)

  def _select_n(self, which: _Value, *cases: _Value, shape: tuple[Any, ...], **_: Any) -> _Value:
    if len(cases) != 2:
      raise WeightsError("cannot be exported to ONNX: it selects among more than two")
    return self._elementwise("Where", [which, cases[1], cases[0]], shape)

  def _transpose(self, x: _Value, *, shape: tuple[Any, ...], params: Any, **_: Any) -> _Value:
    where = {axis: place for place, axis in enumerate(params["permutation"])}
    return _Value(x.data, shape, tuple(where[axis] for axis in x.order))

  def _reshape(self, x: _Value, *, shape: tuple[Any, ...], **_: Any) -> _Value:
    name = self._reshaped(self._plain(x), shape)
    return _Value(name, shape, tuple(range(len(shape))))

  _squeeze = _reshape
  _expand_dims = _reshape

  def _concatenate(self, *xs: _Value, shape: tuple[Any, ...], params: Any, **_: Any) -> _Value:
    order = next(x.order for x in xs if isinstance(x.data, str))
    names = [self._in_order(x, order) for x in xs]
    axis = order.index(params["dimension"])
    return _Value(self._emit("Concat", names, axis=axis), shape, order)

  def _pad(
    self, x: _Value, fill: _Value, *, shape: tuple[Any, ...], params: Any, primitive: str
  ) -> _Value:
    assert isinstance(x.data, str)
    low, high, inside = zip(*params["padding_config"], strict=True)
    if any(inside) or not isinstance(fill.data, np.ndarray):
      _refuse(primitive=primitive)
    pads = [side[axis] for side in (low, high) for axis in x.order]
    names = [x.data, self._constant(np.array(pads, np.int64)), self._constant(fill.data)]
    return _Value(self._emit("Pad", names), shape, x.order)

  def _slice(self, x: _Value, *, shape: tuple[Any, ...], params: Any, **_: Any) -> _Value:
    assert isinstance(x.data, str)
    starts, limits = params["start_indices"], params["limit_indices"]
    steps = params["strides"] or (1,) * len(x.shape)
    cut = [a for a, size in enumerate(x.shape) if (starts[a], limits[a], steps[a]) != (0, size, 1)]
    if not cut:
      return x
    places = [x.order.index(axis) for axis in range(len(x.shape))]
    rows = [[values[axis] for axis in cut] for values in (starts, limits, places, steps)]
    names = [self._constant(np.array(row, np.int64)) for row in rows]
    return _Value(self._emit("Slice", [x.data, *names]), shape, x.order)

  def _conv_general_dilated(
    self, x: _Value, kernel: _Value, *, shape: tuple[Any, ...], params: Any, primitive: str
  ) -> _Value:
    numbers = params["dimension_numbers"]
    if set(params["lhs_dilation"]) - {1} or params["batch_group_count"] != 1:
      _refuse(primitive=primitive)
    low, high = zip(*params["padding"], strict=True)
    name = self._emit(
      "Conv",
      [self._in_order(x, numbers.lhs_spec), self._in_order(kernel, numbers.rhs_spec)],
      strides=list(params["window_strides"]),
      pads=[*low, *high],
      dilations=list(params["rhs_dilation"]),
      group=params["feature_group_count"],
    )
    return _Value(name, shape, tuple(numbers.out_spec))

  def _pool(self, kind: str, x: _Value, shape: tuple[Any, ...], params: Any) -> _Value:
    """Return the pool over two of four axes of images, the windows of a reduce_window."""
    window, pads = params["window_dimensions"], params["padding"]
    flat = [axis for axis, size in enumerate(window) if size == 1 and tuple(pads[axis]) == (0, 0)]
    dilated = {*params["base_dilation"], *params["window_dilation"]} - {1}
    if len(window) != 4 or 0 not in flat or len(flat) < 2 or dilated:
      _refuse(primitive="reduce_window")
    order = (0, flat[-1], *(axis for axis in range(1, 4) if axis != flat[-1]))
    attributes: dict[str, Any] = {"count_include_pad": 1} if kind == "AveragePool" else {}
    name = self._emit(
      kind,
      [self._in_order(x, order)],
      kernel_shape=[window[axis] for axis in order[2:]],
      strides=[params["window_strides"][axis] for axis in order[2:]],
      pads=[pads[axis][side] for side in (0, 1) for axis in order[2:]],
      **attributes,
    )
    return _Value(name, shape, order)

  def _reduce_window_max(
    self, x: _Value, *, shape: tuple[Any, ...], params: Any, **_: Any
  ) -> _Value:
    return self._pool("MaxPool", x, shape, params)

  def _reduce_window_sum(
    self, x: _Value, *, shape: tuple[Any, ...], params: Any, **_: Any
  ) -> _Value:
    mean = self._pool("AveragePool", x, shape, params)
    count = _fixed(np.array(math.prod(params["window_dimensions"]), np.float32))
    return self._elementwise("Mul", [mean, count], shape)

  def _dot_general(
    self, x: _Value, y: _Value, *, shape: tuple[Any, ...], params: Any, **_: Any
  ) -> _Value:
    (contract, batch), plain = params["dimension_numbers"], tuple(range(len(shape)))
    if batch == ((), ()) and contract == ((len(x.shape) - 1,), (0,)) and len(y.shape) == 2:
      return _Value(self._emit("MatMul", [self._plain(x), self._plain(y)]), shape, plain)
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    left = [next(letters) for _ in x.shape]
    right = [next(letters) for _ in y.shape]
    for pairs in (contract, batch):
      for i, j in zip(*pairs, strict=True):
        right[j] = left[i]
    out = [left[i] for i in batch[0]]
    out += [letter for i, letter in enumerate(left) if i not in (*contract[0], *batch[0])]
    out += [letter for j, letter in enumerate(right) if j not in (*contract[1], *batch[1])]
    equation = f"{''.join(left)},{''.join(right)}->{''.join(out)}"
    names = [self._plain(x), self._plain(y)]
    return _Value(self._emit("Einsum", names, equation=equation), shape, plain)


def _fixed(array: np.ndarray) -> _Value:
  return _Value(array, array.shape, tuple(range(array.ndim)))


def _refuse(*_: Any, primitive: str, **__: Any) -> NoReturn:
  raise WeightsError(
    f"cannot be exported to ONNX: its operation {primitive} has no counterpart yet"
  )


def _refuse_loops(jaxpr: core.Jaxpr) -> None:
  for equation in jaxpr.eqns:
    if equation.primitive.name in ("scan", "while"):
      raise WeightsError("cannot be exported to ONNX: it has a loop; --format=stablehlo takes it")
    for inner in core.jaxprs_in_params(equation.params):
      _refuse_loops(inner)


def _whole(value: _Value) -> np.ndarray:
  """Return a constant in the order of its shape, at full size where sizes are known."""
  assert isinstance(value.data, np.ndarray)
  data = value.data.transpose(np.argsort(value.order))
  sizes = [have if _concrete(size) is None else size for have, size in zip(data.shape, value.shape)]
  return np.broadcast_to(data, sizes)


def _fold(equation: Any, inputs: list[_Value]) -> list[_Value]:
  """Return what an operation makes of constants."""
  with jax.default_device(jax.local_devices(backend="cpu")[0]):
    arrays = [jax.numpy.asarray(_whole(value)) for value in inputs]
    made = equation.primitive.bind(*arrays, **equation.params)
  results = made if equation.primitive.multiple_results else [made]
  return [
    _Value(np.asarray(array), tuple(out.aval.shape), tuple(range(array.ndim)))
    for array, out in zip(results, equation.outvars, strict=True)
  ]


_AFFINE: Mapping[str, Callable[[Any, Any], Any]] = {
  "Add": operator.add,
  "Sub": operator.sub,
  "Mul": operator.mul,
  "Div": operator.truediv,
}


def fold_affine(graph: Graph, outputs: Sequence[str]) -> None:
  """Make affine functions per channel part of the convolution before them."""
  users: dict[str, list[Node]] = {}
  for node in graph.nodes:
    for name in node.inputs:
      users.setdefault(name, []).append(node)
  gone: set[int] = set()
  for conv in graph.nodes:
    if conv.kind != "Conv" or conv.inputs[1] not in graph.constants:
      continue
    kernel = graph.constants[conv.inputs[1]].astype(np.float64)
    bias, first = np.zeros(len(kernel)), conv.output
    while len(users.get(conv.output, [])) == 1 and conv.output not in outputs:
      (node,) = users[conv.output]
      constant = graph.constants.get(node.inputs[-1])
      if node.kind not in _AFFINE or constant is None or node.inputs[0] != conv.output:
        break
      if constant.shape not in ((), (1, len(kernel), 1, 1)):
        break
      factor = constant.astype(np.float64).reshape(-1)
      bias = _AFFINE[node.kind](bias, factor)
      if node.kind in ("Mul", "Div"):
        kernel = _AFFINE[node.kind](kernel, factor.reshape(-1, 1, 1, 1))
      conv.output = node.output
      gone.add(id(node))
    if conv.output != first:
      dtype = graph.constants[conv.inputs[1]].dtype
      conv.inputs[1:] = [graph._constant(array.astype(dtype)) for array in (kernel, bias)]
  graph.nodes = [node for node in graph.nodes if id(node) not in gone]


def to_model(
  function: Callable[[Any, jax.Array], jax.Array],
  variables: Any,
  image: jax.ShapeDtypeStruct,
  *,
  channels_first: bool,
  words: Mapping[str, str],
) -> Any:
  """Return an onnx.ModelProto of (variables, images) -> logits, with the variables inside.

  Args:
    function: to be traced.
    variables: tree of arrays.
    image: shape [H, W, 3] and dtype of an image; the number of images is free.
    channels_first: whether the graph takes images [N, 3, H, W] instead.
    words: metadata.

  Raises:
    WeightsError: half a sentence, if an operation has no counterpart.
  """
  from onnx import TensorProto, checker, helper, numpy_helper

  (batch,) = jax.export.symbolic_shape(BATCH)
  images = jax.ShapeDtypeStruct((batch, *image.shape), image.dtype)
  leaves, structure = jax.tree.flatten(variables)

  def flat(*arguments: jax.Array) -> jax.Array:
    return function(jax.tree.unflatten(structure, arguments[:-1]), arguments[-1])

  shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
  traced = jax.make_jaxpr(flat)(*shapes, images)
  _refuse_loops(traced.jaxpr)
  order = (0, 3, 1, 2) if channels_first else (0, 1, 2, 3)
  graph = Graph()
  inputs = [_fixed(np.asarray(leaf)) for leaf in leaves] + [
    _Value("images", tuple(images.shape), order)
  ]
  (result,) = graph.trace(traced.jaxpr, traced.consts, inputs)
  graph.nodes.append(Node("Identity", [graph._plain(result)], "logits", {}))
  fold_affine(graph, ["logits"])
  used = {name for node in graph.nodes for name in node.inputs}
  sizes = [BATCH, *image.shape]
  pixel = TensorProto.UINT8 if image.dtype == np.uint8 else TensorProto.FLOAT
  model = helper.make_model(
    helper.make_graph(
      [
        helper.make_node(node.kind, node.inputs, [node.output], **node.attributes)
        for node in graph.nodes
      ],
      "classifier",
      [helper.make_tensor_value_info("images", pixel, [sizes[axis] for axis in order])],
      [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [BATCH, result.shape[-1]])],
      [
        numpy_helper.from_array(array, name)
        for name, array in graph.constants.items()
        if name in used
      ],
    ),
    opset_imports=[helper.make_opsetid("", OPSET)],
    ir_version=_IR_VERSION,
    producer_name="resnet-pod",
  )
  helper.set_model_props(model, dict(words))
  checker.check_model(model, full_check=True)
  return model
