"""Records of an ArrayRecord shard by ranged reads, wherever `tensorstore.Bucket` can read.

The library opens files by name only, and reads a bucket by one request per record. So the index at
the end of a shard is read here, once, and then the bytes of neighbouring records by one request.
They are put at their offsets in a sparse file in memory, which the library reads: decompression and
checksums remain its own.

Format: https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md, and for
the index and the postscript https://github.com/google/array_record/blob/main/cpp/layout.proto.
"""

from collections.abc import Callable, Iterator
import contextlib
import os
import struct
import tempfile
import threading
from typing import NamedTuple

from array_record.python import array_record_module
import numpy as np
import zstandard

from input_pipeline.errors import BadRecordError, DataError
from input_pipeline.remote.tensorstore import Bucket

_BLOCK = 1 << 16  # bytes; every block of a file begins with a header
_BLOCK_HEADER, _CHUNK_HEADER = 24, 40  # bytes
_ENTRY = 16  # bytes of a chunk in the index, at most
_POSTSCRIPT = 256  # bytes at the start of the last block with the offset of the index; 114 are used
_RECORDS = ord("r")  # type of a chunk
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_BUFFER = 32 << 10  # bytes


class _Index(NamedTuple):
  """Where the chunks of a shard are: int64 `starts` [n + 1] and `first` [n + 1], of their records.

  `parts` are the pieces of the file, (offset, bytes), that the library needs besides a chunk.
  """

  size: int
  starts: np.ndarray
  first: np.ndarray
  parts: list[tuple[int, bytes]]


class RemoteShard:
  """One ArrayRecord file of known length in a bucket. Thread-safe."""

  def __init__(self, bucket: Bucket, name: str, count: int, size: int | None, mend: str):
    """Store the arguments; no request is sent yet.

    Args:
      bucket: where the file is.
      name: of the file.
      count: number of its records.
      size: number of its bytes, if known.
      mend: what to do about a damaged shard, for messages.
    """
    self._bucket = bucket
    self._name = name
    self._count = count
    self._size = size
    self._mend = mend
    self._index: _Index | None = None
    self._lock = threading.Lock()

  def read(self, first: int, stop: int) -> list[bytes | BadRecordError]:
    """Return the records [first, stop), each as bytes or an error, by one request.

    The first call sends one or two more, for the index.

    Raises:
      DataError: the shard is gone, has changed, cannot be reached, or is no ArrayRecord file of
        `count` records.
    """
    index = self._opened()
    chunks = np.searchsorted(index.first, [first, stop - 1], side="right") - 1
    start, end = int(index.starts[chunks[0]]), int(index.starts[chunks[1] + 1])
    data = self._bucket.read(self._name, start, end)
    with _sparse_file(index.size, [*index.parts, (start, data)]) as path:
      reader = array_record_module.ArrayRecordReader(
        path, _OPTIONS, file_reader_buffer_size=_BUFFER
      )
      try:
        return reader.read(list(range(first, stop)))
      except (RuntimeError, ValueError, IndexError):
        return [self._read_one(reader, i) for i in range(first, stop)]
      finally:
        reader.close()

  def _read_one(
    self, reader: array_record_module.ArrayRecordReader, i: int
  ) -> bytes | BadRecordError:
    try:
      return reader.read([i])[0]
    except (RuntimeError, ValueError, IndexError) as e:  # a wrong checksum
      return BadRecordError(f"{self._name}[{i}]: cannot be read ({e})")

  def open(self) -> None:
    """Read the index, which `read` needs; raise DataError as it does."""
    self._opened()

  def _opened(self) -> _Index:
    with self._lock:
      if self._index is None:
        self._index = self._read_index()
      return self._index

  def _read_index(self) -> _Index:
    path = self._bucket.path_of(self._name)
    try:
      index = self._parse_index()
      with _sparse_file(index.size, index.parts) as copy:
        reader = array_record_module.ArrayRecordReader(copy, _OPTIONS)
        found = reader.num_records() if reader.ok() else None
        reader.close()
      if found is None or index.first[-1] != found:
        raise ValueError("its index is wrong")
    except (ValueError, IndexError, struct.error, zstandard.ZstdError) as e:
      raise DataError(f"{path} is damaged or no ArrayRecord file ({e}); {self._mend}.") from e
    if found != self._count:
      raise DataError(f"{path} holds {found} records instead of {self._count}; {self._mend}.")
    return index

  def _parse_index(self) -> _Index:
    """Read the index, by one request if the size is known, else by two; raise ValueError."""
    # The index, padding to a whole block, and the block of the postscript.
    wanted = _BLOCK * (2 + -(-self._count * _ENTRY // _BLOCK))
    start = -_BLOCK if self._size is None else max(0, self._size - wanted)
    tail = self._bucket.read(self._name, start, self._size)
    if len(tail) < _BLOCK:
      raise ValueError("it is too short")
    postscript, _ = _read_chunk(tail[-_BLOCK:], 0)
    offset = int(_fields(postscript[0])[1][0])
    if 0 <= start <= offset:
      tail = tail[offset - start :]
    else:
      tail = self._bucket.read(self._name, offset, None)
    entries, end = _read_chunk(tail, offset % _BLOCK)
    tags, values = _fields(b"".join(entries[1:]))  # the first entry is their number
    starts, counts = values[tags == 1], values[tags == 3]
    size = offset + len(tail)
    return _Index(
      size=size,
      starts=np.append(starts, offset),
      first=np.concatenate([[0], np.cumsum(counts)]),
      parts=[(offset, tail[:end]), (size - _BLOCK, tail[-_BLOCK : _POSTSCRIPT - _BLOCK])],
    )


def _read_chunk(data: bytes, in_block: int) -> tuple[list[bytes], int]:
  """Return the records of the chunk at the start of `data`, and its length in the file.

  Args:
    data: the rest of a file, or more than the chunk.
    in_block: offset of the chunk in its block.

  Raises:
    ValueError: there is no chunk of records, or not all of it.
  """
  header, end = _without_headers(data, 0, in_block, _CHUNK_HEADER)
  _, size, _, kind, _ = struct.unpack("<5Q", header)
  if kind & 0xFF != _RECORDS or size > len(data):
    raise ValueError("there is no index at its end")
  body, end = _without_headers(data, end, (in_block + end) % _BLOCK, size)
  unpackers: dict[int, Callable[[bytes], bytes]] = {0: bytes, ord("z"): _unpack_zstd}
  unpack = unpackers.get(body[0])
  if unpack is None:
    raise ValueError(f"it is compressed by {chr(body[0])!r}, this program reads zstd and plain")
  sizes_length, at = _varint(body, 1)
  sizes = _varints(unpack(body[at : at + sizes_length]))
  values = unpack(body[at + sizes_length :])
  ends = np.cumsum(sizes)
  if len(ends) != kind >> 8 or ends[-1] != len(values):
    raise ValueError("the lengths in its index do not add up")
  return [values[e - n : e] for n, e in zip(sizes.tolist(), ends.tolist())], end


def _without_headers(data: bytes, position: int, in_block: int, size: int) -> tuple[bytes, int]:
  """Return `size` bytes from `position` on, block headers left out, and where they end."""
  parts = []
  while size:
    if in_block == 0:
      position, in_block = position + _BLOCK_HEADER, _BLOCK_HEADER
    part = data[position : position + min(size, _BLOCK - in_block)]
    if not part:
      raise ValueError("it ends too early")
    parts.append(part)
    position, size, in_block = (
      position + len(part),
      size - len(part),
      (in_block + len(part)) % _BLOCK,
    )
  return b"".join(parts), position


def _unpack_zstd(data: bytes) -> bytes:
  size, at = _varint(data, 0)
  return zstandard.ZstdDecompressor().decompress(data[at:], max_output_size=size)


def _varint(data: bytes, at: int) -> tuple[int, int]:
  """Return the varint at data[at], and the position after it."""
  value = shift = 0
  while True:
    value |= (data[at] & 0x7F) << shift
    if data[at] < 0x80:
      return value, at + 1
    at, shift = at + 1, shift + 7


def _varints(data: bytes) -> np.ndarray:
  """Return the varints that a string consists of, int64."""
  array = np.frombuffer(data, np.uint8)
  ends = np.flatnonzero(array < 0x80)
  starts = np.concatenate([[0], ends[:-1] + 1])
  places = np.arange(len(array)) - np.repeat(starts, ends - starts + 1)
  return np.add.reduceat((array & 0x7F).astype(np.int64) << 7 * places, starts)


def _fields(message: bytes) -> tuple[np.ndarray, np.ndarray]:
  """Return the field numbers and values of serialized messages whose fields are all integers."""
  pairs = _varints(message).reshape(-1, 2)
  return pairs[:, 0] >> 3, pairs[:, 1]


@contextlib.contextmanager
def _sparse_file(size: int, parts: list[tuple[int, bytes]]) -> Iterator[str]:
  """Yield the path of a sparse file in memory that holds `parts` at their offsets."""
  with contextlib.ExitStack() as stack:
    if hasattr(os, "memfd_create"):
      descriptor = os.memfd_create("shard")
      stack.callback(os.close, descriptor)
      path = f"/proc/self/fd/{descriptor}"
    else:  # not Linux
      file = stack.enter_context(tempfile.NamedTemporaryFile())
      descriptor, path = file.fileno(), file.name
    os.ftruncate(descriptor, size)
    for offset, data in parts:
      os.pwrite(descriptor, data, offset)
    yield path
