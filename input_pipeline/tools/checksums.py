"""Shards against the checksums that `prepare` wrote down, on a disk or in a bucket."""

from collections.abc import Callable, Sequence
from concurrent import futures
import hashlib

from input_pipeline.remote.tensorstore import Bucket, Changed
from input_pipeline.sources import catalog

_PIECE = 8 << 20  # bytes of one read from a bucket


def verify(
  folder: catalog.Folder, shards: Sequence[catalog.Shard], report: Callable[[int], None]
) -> list[str]:
  """Reads shards as a whole, several at a time, and compares their SHA-256.

  Args:
    folder: where they are.
    shards: with size and sha256.
    report: called with the number of bytes that were checked since the last call.

  Returns:
    One sentence for each shard that is missing or not what was written.

  Raises:
    DataError: the bucket cannot be read at all.
  """
  wrong = []
  with futures.ThreadPoolExecutor() as pool:  # hashing leaves other threads alone
    waiting = {pool.submit(_sha256, folder, shard): shard for shard in shards}
    try:
      for future in futures.as_completed(waiting):
        shard = waiting[future]
        path = folder.path_of(shard.name)
        try:
          if future.result() != shard.sha256:
            wrong.append(
              f"{path} is not what was written, its SHA-256 is another one; copy it again, or "
              "delete it and rerun `python -m input_pipeline.prepare` as before."
            )
        except OSError as e:
          wrong.append(f"{path} cannot be read ({e.strerror}); copy it again.")
        except Changed as e:
          wrong.append(str(e))
        report(shard.size)
    finally:
      pool.shutdown(cancel_futures=True)
  return sorted(wrong)


def _sha256(folder: catalog.Folder, shard: catalog.Shard) -> str:
  """Returns the SHA-256 of a file; raises OSError, or of a bucket DataError, if it cannot be read."""
  if not isinstance(folder, Bucket):
    with open(folder.path_of(shard.name), "rb") as f:
      return hashlib.file_digest(f, "sha256").hexdigest()
  digest = hashlib.sha256()
  for start in range(0, shard.size, _PIECE):
    digest.update(folder.read(shard.name, start, min(start + _PIECE, shard.size)))
  return digest.hexdigest()
