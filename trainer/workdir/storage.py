"""Where a workdir lies: a folder, or a bucket of Google Cloud Storage.

Buckets are reached through etils, gcsfs and TensorStore. Nothing here waits for ever: requests that
fail are retried for a minute or two, then the error is raised.

Of all errors of a storage, one rule says how a run ends: one that has refused (no such bucket, no
right, no room) ends it with 2, one that was silent or busy with 76.
"""

import errno
import importlib.util
import os
import re
from typing import NamedTuple

from etils import epath

from input_pipeline.remote import fsspec as remote
from input_pipeline.remote import has_scheme
from input_pipeline.remote import tensorstore as bucket
from trainer.errors import ConfigError, StorageError

# The same for workdirs as for data: whether an error is the storage's, whether a later try may
# succeed, and its first line.
is_failure, may_pass, first_line = remote.is_failure, remote.may_pass, remote.said

_PREFIX = "gs://"
_SILENCE_SECONDS = 30.0  # after which TensorStore gives up a connection
_PROBE_SECONDS = 10.0  # for one request of `problem`, and for all pauses between its retries
# TensorStore's default of 32 retries takes a quarter of an hour for each write, during which no
# newer checkpoint can be started.
_RETRIES = {"max_retries": 7, "initial_delay": "1s", "max_delay": "32s"}


def path_of(workdir: str) -> epath.Path:
  """Return the path of a workdir, and set up its kind of storage in this process.

  Raises:
    ConfigError: if it is neither a folder nor a bucket that can be used, or gcsfs is missing.
  """
  if not has_scheme(workdir):
    return epath.Path(workdir).expanduser().absolute()
  if not re.match(rf"{_PREFIX}[a-z0-9][-_.a-z0-9]+[a-z0-9](/|$)", workdir):
    raise ConfigError(f"--workdir {workdir} is neither a folder nor gs://BUCKET/FOLDER.")
  if remote.CHAIN in workdir:
    raise ConfigError(
      f"--workdir {workdir} holds {remote.CHAIN!r}, which fsspec joins two URLs by; give another "
      "name."
    )
  if importlib.util.find_spec("gcsfs") is None:
    raise ConfigError(
      f"--workdir {workdir} is a bucket, for which gcsfs is missing; run: pip install -e '.[gcs]'"
    )
  _configure()
  return epath.Path(workdir)


def _configure() -> None:
  bucket.limit_waits(_SILENCE_SECONDS)
  # Private: Orbax has no option for retries. Held by tests/trainer/test_private_apis.py.
  from orbax.checkpoint._src.serialization import tensorstore_utils

  remote.limit_requests()
  for context in (tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT):
    context["gcs_request_retries"] = _RETRIES


def in_bucket(path: epath.Path) -> bool:
  """Whether a path is in a bucket."""
  return str(path).startswith(_PREFIX)


# What says of a checkpoint that it is not whole, though any storage may say it.
MISSING = (FileNotFoundError, NotADirectoryError)
_UNREACHABLE = ("PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "UNAUTHENTICATED")


def cause_of(error: Exception) -> Exception:
  """Return what Orbax has raised, which wraps errors of TensorStore in a bare Exception."""
  return error.__cause__ if isinstance(error.__cause__, Exception) else error


def lost(error: Exception) -> Exception | None:
  """Return the storage's error by which Orbax could not read a checkpoint; None if it was read.

  Such an error proves nothing about the checkpoint.
  """
  cause = cause_of(error)
  failed = is_failure(cause) or any(word in str(cause) for word in _UNREACHABLE)
  return cause if failed and not isinstance(cause, MISSING) else None


# What mends an error of the system whose own words do not say it.
_REMEDIES = {
  errno.EFBIG: "raise the limit of the size of a file (ulimit -f), or give another file system",
  errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


class Problem(NamedTuple):
  """Why a storage cannot be used; JSON-able.

  Attributes:
    words: the reason.
    lasting: whether a later try meets the same.
  """

  words: str
  lasting: bool

  @classmethod
  def of(cls, error: Exception) -> "Problem":
    """Return what an error says."""
    words = first_line(error)
    for number in sorted(remote.numbers(error)):
      reason = os.strerror(number)  # which the long texts of TensorStore have at their end
      words += f"; {reason}" if reason not in words else ""
      words += f"; {_REMEDIES[number]}" if number in _REMEDIES else ""
    return cls(words, not may_pass(error))

  def ends(self, what: str) -> StorageError:
    """Return the error that ends a run; `what` says what could not be done."""
    advice = "mend that, then run" if self.lasting else "run"
    return StorageError(f"{what} ({self.words}); {advice} the same command again.", self.lasting)


def failed(what: str, error: Exception) -> StorageError:
  """Return the error that ends a run after `error`; `what` says what could not be done."""
  return Problem.of(error).ends(what)


def problem(path: epath.Path) -> Problem | None:
  """Return what is wrong with the bucket of a path, within half a minute; None for a folder."""
  if not in_bucket(path):
    return None
  # Imported here: they come with [gcs]. Orbax asks for the kind of a bucket in the same way.
  from google.api_core import exceptions
  from google.auth import exceptions as auth_exceptions
  from google.cloud import storage
  from google.cloud.storage import retry

  name = str(path).removeprefix(_PREFIX).split("/")[0]
  try:
    storage.Client().get_bucket(
      name, timeout=_PROBE_SECONDS, retry=retry.DEFAULT_RETRY.with_timeout(_PROBE_SECONDS)
    )
    return None
  except exceptions.NotFound:
    return Problem(f"there is no bucket {name}", True)
  except (exceptions.Forbidden, exceptions.Unauthorized) as error:
    return Problem(
      f"bucket {name} is closed to these credentials, which need storage.buckets.get on it besides "
      f"roles/storage.objectUser ({first_line(error)})",
      True,
    )
  except auth_exceptions.DefaultCredentialsError:
    return Problem(
      "no Google credentials were found; run: gcloud auth application-default login", True
    )
  except (exceptions.GoogleAPIError, auth_exceptions.GoogleAuthError, OSError) as error:
    error = getattr(error, "cause", None) or error
    return Problem(f"bucket {name} cannot be reached ({first_line(error)})", not may_pass(error))


def write_whole(path: epath.Path, text: str) -> None:
  """Write a file that appears whole and stays: as one object, or synced and renamed into place."""
  if in_bucket(path):
    path.write_text(text)
  else:
    partial = path.parent / f"{path.name}.{os.getpid()}.tmp"
    with open(partial, "w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())  # else a host that loses power may keep the name and no content
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
      os.fsync(folder)
    finally:
      os.close(folder)


def read_whole(path: epath.Path) -> bytes:
  """Return a file of one moment, though its owner may replace it meanwhile.

  An open file of gcsfs asks for the size first, and cuts a longer one that comes between.
  """
  files, name = remote.filesystem(str(path))
  return files.cat_file(name)


def move_folder(source: epath.Path, target: epath.Path) -> None:
  """Move a folder to a path that does not exist yet; in a bucket the cloud copies each object."""
  if in_bucket(source):
    import fsspec

    # Not by epath, which requires the parent folder to exist, as on a disk.
    fsspec.filesystem("gcs").mv(str(source), str(target), recursive=True)
  else:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
