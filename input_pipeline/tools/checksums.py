"""Check shards, on a disk or in a bucket, against the checksums that `prepare` wrote."""

from collections.abc import Callable, Sequence
from concurrent import futures
import hashlib

from input_pipeline.remote.tensorstore import Bucket, Changed
from input_pipeline.sources import catalog

_PIECE = 8 << 20  # bytes of one read from a bucket


def verify(
  folder: catalog.Folder, shards: Sequence[catalog.Shard], report: Callable[[int], None]
) -> list[str]:
  """Read shards as a whole, several at a time, and compare their SHA-256.

  Args:
    folder: where they are.
    shards: with size and sha256.
    report: called with the number of bytes checked since the last call.

  Returns:
    One sentence for each shard that is missing or differs from what was written.

  Raises:
    DataError: the bucket cannot be read at all.
  """
  wrong = []
  with futures.ThreadPoolExecutor() as pool:  # hashing releases the interpreter
    waiting = {pool.submit(_sha256, folder, shard): shard for shard in shards}
    try:
      for future in futures.as_completed(waiting):
        shard = waiting[future]
        path = folder.path_of(shard.name)
        try:
          if future.result() != shard.sha256:
            wrong.append(
              f"{path} is not what was written, its SHA-256 differs; copy it again, or delete it "
              "and rerun `python -m input_pipeline.prepare` as before."
            )
        except OSError as e:
          wrong.append(f"{path} cannot be read ({e.strerror}); copy it again.")
        except Changed as e:
          wrong.append(str(e))
        report(_size(shard))
    finally:
      pool.shutdown(cancel_futures=True)
  return sorted(wrong)


def _sha256(folder: catalog.Folder, shard: catalog.Shard) -> str:
  """Return the SHA-256 of a file; raise OSError, for a bucket DataError, if it cannot be read."""
  if not isinstance(folder, Bucket):
    with open(folder.path_of(shard.name), "rb") as f:
      return hashlib.file_digest(f, "sha256").hexdigest()
  digest = hashlib.sha256()
  size = _size(shard)
  for start in range(0, size, _PIECE):
    digest.update(folder.read(shard.name, start, min(start + _PIECE, size)))
  return digest.hexdigest()


def _size(shard: catalog.Shard) -> int:
  if shard.size is None:
    raise ValueError(f"{shard.name} has no size to check")
  return shard.size
