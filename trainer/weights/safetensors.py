"""The safetensors format: 8 bytes of length, a header of JSON, then the bytes of all tensors.

Read here rather than by the library of that name, for three reasons: the format is this small, the
library has no bfloat16 for numpy, and each thing that can be wrong with a file must be refused in a
sentence, before memory is taken for it.
"""

from collections.abc import Mapping
import json
import math
from typing import Any

import ml_dtypes
import numpy as np

from trainer.weights.errors import WeightsError

_DTYPES: Mapping[str, np.dtype[Any]] = {
  "F64": np.dtype("<f8"),
  "F32": np.dtype("<f4"),
  "F16": np.dtype("<f2"),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I64": np.dtype("<i8"),
  "I32": np.dtype("<i4"),
  "I16": np.dtype("<i2"),
  "I8": np.dtype("i1"),
  "U8": np.dtype("u1"),
  "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MOST_HEADER = 100_000_000  # bytes; the limit of the library
_ALIGNMENT = 8  # bytes, of the first tensor, as the library writes it
_METADATA = "__metadata__"


def decode(data: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Return the tensors of a file by name, and its metadata.

  Args:
    data: uint8 [bytes], the whole file. The tensors are views of it.

  Raises:
    WeightsError: half a sentence, to follow the name of the file.
  """
  if len(data) < 8:
    raise WeightsError(f"has {len(data)} bytes, too few for a header of safetensors")
  length = int.from_bytes(data[:8].tobytes(), "little")
  if length > min(len(data) - 8, _MOST_HEADER):
    raise WeightsError(f"claims a header of {length:,} bytes in a file of {len(data):,}")
  try:
    header = json.loads(data[8 : 8 + length].tobytes(), object_pairs_hook=_without_twins)
  except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 are a ValueError, too
    raise WeightsError(f"has a header that is no JSON ({_short(error)})") from error
  if not isinstance(header, dict):
    raise WeightsError("has a header that is no table")
  metadata = header.pop(_METADATA, {})
  if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
    raise WeightsError("has metadata that are not words by name")
  body = data[8 + length :]
  tensors, spans = {}, []
  for name, entry in header.items():
    dtype, shape, begin, end = _entry(name, entry)
    if not 0 <= begin <= end <= len(body):
      raise WeightsError(f"is cut short or damaged: tensor {name!r} lies outside of it")
    if end - begin != math.prod(shape) * dtype.itemsize:
      raise WeightsError(
        f"has {end - begin:,} bytes for tensor {name!r}, which do not make {list(shape)} of {dtype}"
      )
    spans.append((begin, end))
    tensors[name] = np.frombuffer(body[begin:end], dtype).reshape(shape)
  covered = 0
  for begin, end in sorted(spans):
    if begin != covered:
      raise WeightsError(f"has tensors that overlap or leave a gap at byte {min(begin, covered):,}")
    covered = end
  if covered != len(body):
    raise WeightsError(f"has {len(body) - covered:,} bytes behind its last tensor")
  return tensors, metadata


def _entry(name: str, entry: Any) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
  """Return dtype, shape, begin and end of a tensor, by its entry of the header."""
  if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
    raise WeightsError(f"has an entry {name!r} that describes no tensor")
  dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
  if not isinstance(dtype, str) or dtype not in _DTYPES:
    raise WeightsError(f"has tensor {name!r} of type {dtype!r}; known are {', '.join(_DTYPES)}")
  if not _counts(shape) or len(shape) > 8:
    raise WeightsError(f"has tensor {name!r} of shape {shape!r}")
  if not _counts(offsets) or len(offsets) != 2:
    raise WeightsError(f"has tensor {name!r} at {offsets!r}")
  return _DTYPES[dtype], tuple(shape), *offsets


def _counts(values: Any) -> bool:
  return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  table = dict(pairs)
  if len(table) != len(pairs):
    raise ValueError("a name stands there twice")
  return table


def _short(error: Exception) -> str:
  return str(error).splitlines()[0][:100] if str(error) else type(error).__name__


def encode(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> list[bytes]:
  """Return the parts of a file in their order: length, header, and each tensor.

  Args:
    tensors: by name.
    metadata: words by name.
  """
  header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
  parts, at = [], 0
  for name, tensor in tensors.items():
    raw = np.ascontiguousarray(tensor).tobytes()
    header[name] = {
      "dtype": _NAMES[tensor.dtype],
      "shape": list(tensor.shape),
      "data_offsets": [at, at + len(raw)],
    }
    parts.append(raw)
    at += len(raw)
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % _ALIGNMENT)
  return [len(text).to_bytes(8, "little"), text, *parts]
