"""Where a workdir lies: a folder, or a bucket of Google Cloud Storage through etils, gcsfs and TensorStore.

Nothing here waits for ever: what cannot be reached is tried again for a minute or two, and then the caller hears of it.
"""

import importlib.util
import re

from etils import epath

from input_pipeline.remote import fsspec as remote
from input_pipeline.remote import tensorstore as bucket
from trainer.errors import ConfigError

# Errors are recognised and put into one line in the same way for workdirs and for data.
is_failure, first_line = remote.is_failure, remote.said

_PREFIX = "gs://"
_SILENCE_SECONDS = 30.0  # of a connection of TensorStore
_PROBE_SECONDS = 10.0  # for one request of `problem`, and for the pauses between its tries
# TensorStore's own are 32 retries, a quarter of an hour for each write, in which no newer checkpoint can be begun.
_RETRIES = {"max_retries": 7, "initial_delay": "1s", "max_delay": "32s"}


def path_of(workdir: str) -> epath.Path:
  """Returns the path of a workdir, and makes its kind of storage ready to be used in this process.

  Raises:
    ConfigError: if it names a storage that is not known, no bucket, or one for which nothing is installed.
  """
  if "://" not in workdir:
    return epath.Path(workdir).expanduser().absolute()
  if not re.match(rf"{_PREFIX}[a-z0-9][-_.a-z0-9]+[a-z0-9](/|$)", workdir):
    raise ConfigError(f"--workdir {workdir} is neither a folder nor gs://BUCKET/FOLDER.")
  if importlib.util.find_spec("gcsfs") is None:
    raise ConfigError(
      f"--workdir {workdir} is a bucket, for which gcsfs is missing; run: pip install -e '.[gcs]'"
    )
  _configure()
  return epath.Path(workdir)


def _configure() -> None:
  bucket.limit_waits(_SILENCE_SECONDS)
  from orbax.checkpoint._src.serialization import tensorstore_utils  # Orbax has no option for it

  remote.limit_requests()
  for context in (tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT):
    context["gcs_request_retries"] = _RETRIES


def in_bucket(path: epath.Path) -> bool:
  """Tells whether a path is one of a bucket."""
  return str(path).startswith(_PREFIX)


def problem(path: epath.Path) -> str | None:
  """Asks for the bucket of a path; returns what is wrong with it, within half a minute, or None, as for a folder."""
  if not in_bucket(path):
    return None
  # Imported here: they come with [gcs]. This is also what Orbax uses to ask for the kind of a bucket.
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
    return f"there is no bucket {name}"
  except (exceptions.Forbidden, exceptions.Unauthorized) as error:
    return (
      f"bucket {name} is closed to these credentials, which need storage.buckets.get on it besides "
      f"roles/storage.objectUser ({first_line(error)})"
    )
  except auth_exceptions.DefaultCredentialsError:
    return "no Google credentials were found; run: gcloud auth application-default login"
  except (exceptions.GoogleAPIError, auth_exceptions.GoogleAuthError, OSError) as error:
    return f"bucket {name} cannot be reached ({first_line(getattr(error, 'cause', None) or error)})"


def write_whole(path: epath.Path, text: str) -> None:
  """Writes a file of which nobody sees a part: an object appears whole, a file is renamed into place."""
  if in_bucket(path):
    path.write_text(text)
  else:
    partial = path.parent / f"{path.name}.tmp"
    partial.write_text(text)
    partial.replace(path)


def move_folder(source: epath.Path, target: epath.Path) -> None:
  """Moves a folder to where nothing is yet. In a bucket the objects go one by one, and none through this host."""
  if in_bucket(source):
    import fsspec

    # Not by epath, which wants the folder above to be there, as on a disk.
    fsspec.filesystem("gcs").mv(str(source), str(target), recursive=True)
  else:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
