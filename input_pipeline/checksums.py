"""The shards of `prepare` against the checksums in their manifest, on a disk or in a bucket."""

from concurrent import futures
import errno
import hashlib
import json
import os
from typing import Any, Callable

import tensorstore as ts

from input_pipeline import records
from input_pipeline.errors import DataError
from input_pipeline.errors import one_line

_PIECE = 8 << 20  # bytes of one read from a bucket
_SECONDS = 60.0  # for one such read, with the library's own tries in it


def read_manifest(folder: str) -> dict[str, Any] | None:
  """Returns the manifest of a local folder or of a URL that TensorStore reads; None if it has none.

  Raises:
    DataError: it cannot be read.
  """
  if "://" not in folder:
    path = os.path.join(os.path.expanduser(folder), records.MANIFEST)
    return records.read_json(path) if os.path.exists(path) else None
  found = _remote(folder, lambda store: store.read(records.MANIFEST).result(timeout=_SECONDS))
  if found.state == "missing":
    return None
  try:
    return json.loads(found.value)
  except ValueError as e:
    raise DataError(
      f"{folder}/{records.MANIFEST} is no JSON ({e}); upload it again, or make the data again."
    ) from e


def verify(
  folder: str, shards: list[dict[str, Any]], report: Callable[[int], None]
) -> list[str]:
  """Reads shards as a whole, several at a time, and compares their SHA-256.

  Args:
    folder: local, or a URL that TensorStore reads.
    shards: from a manifest: file, bytes, sha256 of each.
    report: called with the number of bytes that were checked since the last call.

  Returns:
    One sentence for each shard that is missing or not what was written.

  Raises:
    DataError: the bucket cannot be read at all.
  """
  wrong = []
  with futures.ThreadPoolExecutor() as pool:  # hashing leaves other threads alone
    waiting = {pool.submit(_sha256, folder, s["file"], s["bytes"]): s for s in shards}
    try:
      for future in futures.as_completed(waiting):
        shard = waiting[future]
        path = os.path.join(folder, shard["file"])
        try:
          if future.result() != shard["sha256"]:
            wrong.append(
              f"{path} is not what was written, its SHA-256 differs from that in "
              f"{records.MANIFEST}; copy it again, or delete it and rerun "
              "`python -m input_pipeline.prepare` as before."
            )
        except OSError as e:
          wrong.append(f"{path} cannot be read ({e.strerror}); copy it again.")
        report(shard["bytes"])
    finally:
      pool.shutdown(cancel_futures=True)
  return sorted(wrong)


def _sha256(folder: str, name: str, size: int) -> str:
  """Returns the SHA-256 of a file; raises OSError if it is missing, DataError as `verify`."""
  if "://" not in folder:
    with open(os.path.join(os.path.expanduser(folder), name), "rb") as f:
      return hashlib.file_digest(f, "sha256").hexdigest()
  digest = hashlib.sha256()

  def read(store: ts.KvStore) -> bool:
    for start in range(0, size, _PIECE):
      part = slice(start, min(start + _PIECE, size))
      found = store.read(name, byte_range=part).result(timeout=_SECONDS)
      if found.state == "missing":
        return False
      digest.update(found.value)
    return True

  if not _remote(folder, read):
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
  return digest.hexdigest()


def _remote(folder: str, call: Callable[[ts.KvStore], Any]) -> Any:
  """Returns what `call` does with the store of a URL; raises DataError if that fails or hangs."""
  try:
    return call(ts.KvStore.open(f"{folder.rstrip('/')}/").result(timeout=_SECONDS))
  except TimeoutError as e:
    raise DataError(f"{folder} did not answer within {_SECONDS:.0f} s; is the network up?") from e
  except (ValueError, OSError, RuntimeError) as e:  # what TensorStore makes of all else
    raise DataError(f"{folder} cannot be read: {one_line(str(e))}.") from e
