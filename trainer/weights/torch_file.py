"""Files of torch.save, in the format of zip archives and in the one before, without torch.

Only plain tensors are read, lazily: those that are asked for, after the pickle has been read as
data (`trainer.weights.pickles`). Archives are stored, not compressed, so that no file can grow when
it is read, and every size is checked against the file before memory is taken.
"""

from collections.abc import Callable, Mapping
import io
import math
import pathlib
from typing import Any
import zipfile

import ml_dtypes
import numpy as np

from trainer.weights import pickles
from trainer.weights.errors import WeightsError

_MAGIC = 0x1950A86A20F9469CFC6C  # of the format before zip archives
_LEGACY_VERSION = 1001
_MOST_PICKLE = 256 << 20  # bytes
_MOST_ENTRIES = 1_000_000
_DTYPES: Mapping[str, np.dtype[Any]] = {
  "Double": np.dtype("<f8"),
  "Float": np.dtype("<f4"),
  "Half": np.dtype("<f2"),
  "BFloat16": np.dtype(ml_dtypes.bfloat16),
  "Long": np.dtype("<i8"),
  "Int": np.dtype("<i4"),
  "Short": np.dtype("<i2"),
  "Char": np.dtype("i1"),
  "Byte": np.dtype("u1"),
  "Bool": np.dtype("?"),
}
# Where checkpoints of training programs keep the tensors, the averaged ones first.
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_RAW = ("state_dict", "model", "model_state_dict", "net", "module")

# Key and number of elements of a storage -> its bytes, or None if there is none.
Storages = Callable[[str], bytes | None]


def decode(data: np.ndarray, averaged: bool = True) -> dict[str, np.ndarray]:
  """Return the tensors of a file by name.

  Args:
    data: uint8 [bytes], the whole file.
    averaged: whether averaged weights are taken where a checkpoint has both.

  Raises:
    WeightsError: half a sentence, to follow the name of the file.
  """
  if data[:2].tobytes() == b"PK":
    root, storages = _open_zip(data)
  else:
    root, storages = _open_legacy(data)
  return {name: _tensor(name, value, storages) for name, value in _entries(root, averaged).items()}


def _open_zip(data: np.ndarray) -> tuple[Any, Storages]:
  """Return the pickle of an archive as data, and its storages."""
  try:
    archive = zipfile.ZipFile(io.BytesIO(data.tobytes()))
    entries = archive.infolist()
  # OSError and others: offsets of a damaged directory.
  except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, UnicodeError) as error:
    raise WeightsError(f"is a damaged zip archive ({_short(error)})") from error
  names = [entry.filename for entry in entries]
  if len(set(names)) != len(names) or len(names) > _MOST_ENTRIES:
    raise WeightsError("is a zip archive with entries of the same name, or too many of them")
  for entry in entries:
    parts = pathlib.PurePosixPath(entry.filename.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in entry.filename:
      raise WeightsError(f"is a zip archive with the name {entry.filename!r}, which is refused")
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
      raise WeightsError(
        f"is a zip archive whose {entry.filename!r} is compressed, which torch.save never does"
      )
  if sum(entry.file_size for entry in entries) > len(data):
    raise WeightsError("is a zip archive of more bytes than the file has")
  roots = [name for name in names if pathlib.PurePosixPath(name).name == "data.pkl"]
  if any(pathlib.PurePosixPath(name).name == "constants.pkl" for name in names):
    raise WeightsError("is a program of TorchScript; save its state_dict() with torch.save instead")
  if len(roots) != 1:
    raise WeightsError("is a zip archive, but not one of torch.save: it has no data.pkl")
  folder = roots[0].removesuffix("data.pkl")

  def read(name: str) -> bytes | None:
    if name not in names:
      return None
    try:
      return archive.read(name)
    except (
      zipfile.BadZipFile,
      ValueError,
      OSError,
      EOFError,
      NotImplementedError,
      RuntimeError,
      UnicodeError,
    ) as error:
      raise WeightsError(f"is damaged at {name!r} ({_short(error)})") from error

  if (read(f"{folder}byteorder") or b"little") != b"little":
    raise WeightsError("was written on a machine with the other order of bytes")
  pickled = read(roots[0]) or b""
  if len(pickled) > _MOST_PICKLE:
    raise WeightsError(f"has a pickle of {len(pickled):,} bytes")
  return pickles.load(io.BytesIO(pickled)), lambda key: read(f"{folder}data/{key}")


def _open_legacy(data: np.ndarray) -> tuple[Any, Storages]:
  """Return the pickle of a file before zip archives as data, and its storages."""
  raw = data.tobytes()
  file = io.BytesIO(raw)
  try:
    magic = pickles.load(file)
  except WeightsError as error:
    raise WeightsError("is neither safetensors nor a file of torch.save, or is damaged") from error
  if magic != _MAGIC:
    raise WeightsError("is a pickle, but not one of torch.save")
  if pickles.load(file) != _LEGACY_VERSION:
    raise WeightsError("is of an unknown version of torch.save")
  system = pickles.load(file)
  if not isinstance(system, dict) or system.get("little_endian") is not True:
    raise WeightsError("was written on a machine with the other order of bytes")
  root = pickles.load(file)
  keys = pickles.load(file)
  if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
    raise WeightsError("has no list of storages")
  sizes = _legacy_sizes(root)
  at = file.tell()
  found: dict[str, bytes] = {}
  for key in keys:
    count = int.from_bytes(raw[at : at + 8], "little")
    if key not in sizes:
      raise WeightsError(f"has a storage {key[:40]!r} that no tensor uses")
    size = count * sizes[key]
    at += 8
    if at + size > len(raw):
      raise WeightsError(f"is cut short: storage {key[:40]!r} has {size:,} bytes by its entry")
    found[key] = raw[at : at + size]
    at += size
  return root, found.get


def _legacy_sizes(root: Any) -> dict[str, int]:
  """Return the bytes of an element of every storage that the tensors in `root` refer to."""
  sizes: dict[str, int] = {}
  waiting, seen = [root], set()
  while waiting:
    value = waiting.pop()
    if id(value) in seen:
      continue
    seen.add(id(value))
    if isinstance(value, dict):
      waiting.extend(value.values())
    elif isinstance(value, list | tuple):
      waiting.extend(value)
    elif isinstance(value, pickles.Call):
      waiting.append(value.arguments)
    elif isinstance(value, pickles.Reference):
      key, dtype, _ = _storage(value)
      sizes[key] = dtype.itemsize
  return sizes


def _storage(value: Any) -> tuple[str, np.dtype[Any], int]:
  """Return key, dtype and number of elements of a storage."""
  match value:
    case pickles.Reference(("storage", pickles.Name(path), str(key), _, int(count), *_)):
      dtype = _DTYPES.get(path.split(".")[-1].removesuffix("Storage"))
      if dtype is None:
        raise WeightsError(f"has a storage of type {path!r}, which is not read")
      return key, dtype, count
  raise WeightsError("has a tensor without a storage")


def _entries(root: Any, averaged: bool) -> dict[str, Any]:
  """Return the tensors of a state dict, or of the one within a checkpoint, by name."""
  wrappers = (*_AVERAGED, *_RAW) if averaged else (*_RAW, *_AVERAGED)
  for _ in range(3):
    if not isinstance(root, dict):
      raise WeightsError(f"holds a {type(root).__name__.lower()}, no state dict")
    inner = next((name for name in wrappers if isinstance(root.get(name), dict)), None)
    if inner is None:
      break
    root = root[inner]
  found = {
    name: value
    for name, value in root.items()
    if isinstance(name, str) and isinstance(value, pickles.Call) and "_rebuild_" in value.name
  }
  if not found:
    raise WeightsError("holds no tensors by name")
  return found


def _tensor(name: str, value: Any, storages: Storages) -> np.ndarray:
  """Return a tensor, by the call that would make it."""
  match value:
    case pickles.Call("torch._utils._rebuild_parameter", (pickles.Call() as inner, *_)):
      value = inner
  match value:
    case pickles.Call(_, (storage, int(offset), tuple(size), tuple(stride), *_)):
      pass
    case _:
      raise WeightsError(f"has a tensor {name[:80]!r} that is no plain one")
  key, dtype, count = _storage(storage)
  plain = all(type(n) is int and n >= 0 for n in (*size, *stride))
  if not plain or len(size) != len(stride) or len(size) > 8 or offset < 0:
    raise WeightsError(f"has a tensor {name[:80]!r} of size {size!r} and stride {stride!r}")
  raw = storages(key)
  if raw is None or len(raw) != count * dtype.itemsize:
    raise WeightsError(
      f"is cut short or damaged: {name[:80]!r} needs {count * dtype.itemsize:,} bytes, its storage "
      f"has {len(raw or b''):,}"
    )
  elements = math.prod(size)
  last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
  if elements and (last >= count or elements > count):
    raise WeightsError(f"has a tensor {name[:80]!r} of {list(size)} beyond its {count:,} values")
  flat = np.frombuffer(raw, dtype)
  if not elements:
    return np.zeros(size, dtype)
  view = np.lib.stride_tricks.as_strided(
    flat[offset:], size, [step * dtype.itemsize for step in stride], writeable=False
  )
  return np.ascontiguousarray(view).reshape(size)


def _short(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0][:100]
