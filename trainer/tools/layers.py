"""Names of layers in the operations of a compiled step, for all model families alike."""

from collections.abc import Iterator
import contextlib
import functools
from typing import Any

from flax import nnx
import jax

from trainer.state import Model, Variables


def structure(model: Model, variables: Variables) -> nnx.Module:
  """Return a model for `named`, without values in it.

  Args:
    model: without its arrays.
    variables: its arrays or their shapes.
  """
  made: list[nnx.Module] = []
  # Traced, so that stacked blocks can be taken apart.
  jax.eval_shape(lambda variables: made.append(model.merge(variables, None)), variables)
  return made[0]


@contextlib.contextmanager
def named(model: nnx.Module) -> Iterator[None]:
  """Give what is traced inside the names of its layers: stage1_block1/conv2, head.

  NNX names no operation by itself. Every class of module in `model` gets a `__call__` that traces
  in a `jax.named_scope` of the attribute that holds the module. Only metadata changes, which are no
  part of a key of the compilation cache. A block that is split and merged again inside the model,
  as one that is scanned, starts anew: its layers have the names they have in the block.
  """
  with contextlib.ExitStack() as stack:
    paths: list[tuple[dict[int, tuple[Any, ...]], tuple[Any, ...]]] = []
    classes = {cls for _, module in nnx.iter_modules(model) for cls in type(module).__mro__}
    for cls in classes:
      if issubclass(cls, nnx.Module) and "__call__" in vars(cls):
        stack.callback(setattr, cls, "__call__", vars(cls)["__call__"])
        setattr(cls, "__call__", _scoped(vars(cls)["__call__"], paths))  # noqa: B010
    yield


def _scoped(call: Any, paths: list[tuple[dict[int, tuple[Any, ...]], tuple[Any, ...]]]) -> Any:
  """Return a `__call__` that traces in the scope of its module.

  Args:
    call: the one to be wrapped.
    paths: of the modules that are being called: of all modules in the outermost, and the own.
  """

  @functools.wraps(call)
  def scoped(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
    if not paths or id(self) not in paths[-1][0]:
      inside = {id(module): path for path, module in nnx.iter_modules(self)}
      path: tuple[Any, ...] = ()
      name = ""
    else:
      inside, above = paths[-1]
      path = inside[id(self)]
      name = "/".join(map(str, path[len(above) :]))
    paths.append((inside, path))
    try:
      # A module that calls itself, as one that wraps another of its class, adds no name.
      with jax.named_scope(name) if name else contextlib.nullcontext():
        return call(self, *args, **kwargs)
    finally:
      paths.pop()

  return scoped
