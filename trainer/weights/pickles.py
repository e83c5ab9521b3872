"""A pickle as plain data, without running any of it.

Python's own unpickler imports and calls what a pickle names. Here the few operations that a file of
torch.save consists of are carried out on dicts, lists, tuples and numbers, and a name or a call
stays what it is: an entry that the reader of the file may interpret. Names other than those of
tensors and of a few harmless values are refused.
"""

from collections.abc import Callable
import dataclasses
import io
import pickle
import pickletools
from typing import Any

from trainer.weights.errors import WeightsError

# Values that checkpoints hold beside tensors: options of a command, random states, numpy numbers.
# They are read over and never made.
_HARMLESS = frozenset(
  {
    "_codecs.encode",
    "argparse.Namespace",
    "builtins.set",
    "__builtin__.set",
    "collections.Counter",
    "collections.defaultdict",
    "copyreg._reconstructor",
    "copy_reg._reconstructor",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    "pathlib.PosixPath",
    "torch.Size",
    "torch.device",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel",
    "torch.serialization._get_layout",
  }
)
_TENSORS = frozenset(
  {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
  }
)
_MOST_OPERATIONS = 20_000_000


@dataclasses.dataclass(frozen=True)
class Name:
  """What a pickle would import: "module.name"."""

  path: str


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
  """What a pickle would call: `name(*arguments)`."""

  name: str
  arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
  """What a pickle refers to outside of itself: a persistent id, such as that of a storage."""

  value: Any


_MARK = object()


def load(file: io.BytesIO) -> Any:
  """Return what the pickle at the position of `file` holds, and leave the position behind it.

  Raises:
    WeightsError: half a sentence, if it is damaged, or holds anything but data and tensors.
  """
  machine = _Machine()
  try:
    for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
      if count > _MOST_OPERATIONS:
        raise WeightsError("holds a pickle of too many operations")
      if operation.name == "STOP":
        return machine.pop()
      machine.run(operation.name, argument)
  except WeightsError:
    raise
  # What genops and the machine raise on bytes that are no pickle.
  except (
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
    pickle.PickleError,
  ) as error:
    raise WeightsError(f"holds a damaged pickle ({_short(error)})") from error
  raise WeightsError("holds a pickle that is cut short")


def _short(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0][:100]


class _Machine:
  """The stack and the memory of an unpickler."""

  def __init__(self) -> None:
    self._stack: list[Any] = []
    self._memory: dict[int, Any] = {}

  def pop(self) -> Any:
    """Take the last value from the stack."""
    value = self._stack.pop()
    if value is _MARK:
      raise ValueError("a mark where a value belongs")
    return value

  def _to_mark(self) -> list[Any]:
    """Take all values behind the last mark, and the mark."""
    for at in range(len(self._stack) - 1, -1, -1):
      if self._stack[at] is _MARK:
        values = self._stack[at + 1 :]
        del self._stack[at:]
        return values
    raise ValueError("no mark on the stack")

  def run(self, operation: str, argument: Any) -> None:
    """Carry out one operation of pickle, by its name in pickletools."""
    if operation in _LITERALS:
      self._stack.append(argument)
    elif operation in _CONSTANTS:
      self._stack.append(_CONSTANTS[operation]())
    elif operation in _TUPLES:
      count = _TUPLES[operation]
      values = [self.pop() for _ in range(count)]
      self._stack.append(tuple(reversed(values)))
    elif operation in ("PUT", "BINPUT", "LONG_BINPUT"):
      self._memory[int(argument)] = self._stack[-1]
    elif operation == "MEMOIZE":
      self._memory[len(self._memory)] = self._stack[-1]
    elif operation in ("GET", "BINGET", "LONG_BINGET"):
      self._stack.append(self._memory[int(argument)])
    elif operation not in ("PROTO", "FRAME"):
      step: Callable[[Any], None] | None = getattr(self, f"_{operation.lower()}", None)
      if step is None:
        raise WeightsError(f"holds a pickle with the operation {operation}, which is refused")
      step(argument)

  def _mark(self, _: Any) -> None:
    self._stack.append(_MARK)

  def _pop(self, _: Any) -> None:
    self._stack.pop()

  def _pop_mark(self, _: Any) -> None:
    self._to_mark()

  def _dup(self, _: Any) -> None:
    self._stack.append(self._stack[-1])

  def _tuple(self, _: Any) -> None:
    self._stack.append(tuple(self._to_mark()))

  def _list(self, _: Any) -> None:
    self._stack.append(self._to_mark())

  def _dict(self, _: Any) -> None:
    values = self._to_mark()
    self._stack.append({})
    self._put(values)

  def _append(self, _: Any) -> None:
    value = self.pop()
    self._extend([value])

  def _appends(self, _: Any) -> None:
    self._extend(self._to_mark())

  def _additems(self, _: Any) -> None:
    self._to_mark()  # of a set, which no tensor is in

  def _extend(self, values: list[Any]) -> None:
    if isinstance(self._stack[-1], list):
      self._stack[-1].extend(values)
    elif not isinstance(self._stack[-1], Call):
      raise ValueError("entries of what is no list")

  def _setitem(self, _: Any) -> None:
    value, key = self.pop(), self.pop()
    self._put([key, value])

  def _setitems(self, _: Any) -> None:
    self._put(self._to_mark())

  def _put(self, values: list[Any]) -> None:
    if len(values) % 2:
      raise ValueError("a key without a value")
    if isinstance(self._stack[-1], dict):
      for key, value in zip(values[::2], values[1::2], strict=True):
        if not isinstance(key, str | int | float | bool | bytes | Name | Reference | None):
          raise ValueError(f"a key of type {type(key).__name__}")
        self._stack[-1][key] = value
    elif not isinstance(self._stack[-1], Call):
      raise ValueError("entries of what is no table")

  def _global(self, argument: str) -> None:
    self._name(*argument.split(" ", 1))

  def _stack_global(self, _: Any) -> None:
    name, module = self.pop(), self.pop()
    self._name(module, name)

  def _name(self, module: Any, name: Any) -> None:
    path = f"{module}.{name}"
    storage = module in ("torch", "torch.storage") and str(name).endswith("Storage")
    dtype = module == "torch" and str(name) in _DTYPES
    if path not in _HARMLESS | _TENSORS and not storage and not dtype:
      raise WeightsError(
        f"holds a pickle that would run {path[:80]!r}, which no weights need; it is not read. Save "
        "the weights alone: torch.save(model.state_dict(), FILE)"
      )
    self._stack.append(Name(path))

  def _reduce(self, _: Any) -> None:
    arguments, function = self.pop(), self.pop()
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
      raise ValueError("a call of what is no function")
    if function.path == "collections.OrderedDict":
      pairs = arguments[0] if arguments else []
      self._stack.append({})
      self._put([value for pair in pairs for value in pair])
    else:
      self._stack.append(Call(function.path, arguments))

  _newobj = _reduce

  def _build(self, _: Any) -> None:
    self.pop()  # attributes of an object, such as the versions of modules

  def _binpersid(self, _: Any) -> None:
    self._stack.append(Reference(self.pop()))


_DTYPES = frozenset({"float16", "bfloat16", "float32", "float64", "int64", "int32", "bool"})
_LITERALS = frozenset(
  {
    "INT",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG",
    "LONG1",
    "LONG4",
    "FLOAT",
    "BINFLOAT",
    "STRING",
    "BINSTRING",
    "SHORT_BINSTRING",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINBYTES8",
    "UNICODE",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
  }
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
  "NONE": lambda: None,
  "NEWTRUE": lambda: True,
  "NEWFALSE": lambda: False,
  "EMPTY_DICT": dict,
  "EMPTY_LIST": list,
  "EMPTY_TUPLE": tuple,
  "EMPTY_SET": list,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
