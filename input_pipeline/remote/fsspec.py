"""Remote files through fsspec: with time limits and retries, and no secret in a message."""

from collections.abc import Callable, Iterator
import errno
import os
import random
import re
import threading
from typing import Any, TypeVar

import fsspec

from input_pipeline.errors import DataError, InputLost, Stopped, first_line
from input_pipeline.remote import has_scheme

T = TypeVar("T")

# Otherwise gcsfs asks for the type of each bucket by gRPC, which blocks for a minute if denied. It
# looks when it is imported, which `datasets` may do too.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

CHAIN = "::"
# Limit of one request; gcsfs tries six times, with pauses of half a minute in all.
_REQUEST_SECONDS = 60.0
# fsspec itself tries once over HTTP. Other file systems retry by themselves, and get two tries.
_TRIES = {"http": 6, "https": 6}
_FIRST_PAUSE = 0.5  # seconds; doubled before each further try
# fsspec's file systems raise the errors of their HTTP libraries, which have no common base class.
_NETWORK = ("aiohttp", "gcsfs", "google", "httpx", "httpx2", "httpcore", "httpcore2", "requests")
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
# Of a disk that answers: there is no room, no right, or something else of that name; or of a limit
# that the next start has as well.
_FINAL_NUMBERS = {
  errno.EACCES,
  errno.EDQUOT,
  errno.EEXIST,
  errno.EFBIG,
  errno.EISDIR,
  errno.ELOOP,
  errno.EMFILE,
  errno.ENAMETOOLONG,
  errno.ENOENT,
  errno.ENOSPC,
  errno.ENOTDIR,
  errno.EPERM,
  errno.EROFS,
}
# As gcsfs (403) and TensorStore say it, whose errors have no class and no number for it.
_FINAL_WORDS = re.compile(r"^Forbidden|PERMISSION_DENIED|UNAUTHENTICATED")
_NUMBER_IN_TENSORSTORE = re.compile(r"os_error_code='(\d+)'")
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
  """Return the file system of a URL or local path, and the path in it.

  Raises:
    DataError: nothing is installed for its scheme, or it holds "::".
  """
  if not has_scheme(url):
    return fsspec.filesystem("file"), os.path.abspath(os.path.expanduser(url))
  if CHAIN in url:
    raise DataError(f"{url} cannot be read: {CHAIN!r} in a URL is what fsspec joins two by.")
  try:
    limit_requests()
    return fsspec.core.url_to_fs(url)
  except (ImportError, ValueError) as e:  # the latter for an unknown scheme
    raise DataError(
      f"{url} cannot be read ({said(e)}); gs:// needs: pip install -e '.[gcs]'."
    ) from e


def limit_requests() -> None:
  """Set time limits for the file systems of fsspec, and disable the listings cache of gcsfs."""
  import aiohttp  # comes with gcsfs and with datasets

  limit = aiohttp.ClientTimeout(total=_REQUEST_SECONDS)
  gcs = fsspec.config.conf.setdefault("gcs", {})
  gcs.setdefault("requests_timeout", limit)
  gcs.setdefault("use_listings_cache", False)  # it would hide what others write
  for scheme in ("http", "https"):
    fsspec.config.conf.setdefault(scheme, {}).setdefault("client_kwargs", {"timeout": limit})


def retried(what: str, call: Callable[[], T], stop: threading.Event | None = None) -> T:
  """Return the result of `call`, retried with growing pauses while the network fails.

  Args:
    what: the file, for messages.
    call: reads or writes it as a whole, so that it can be repeated.
    stop: ends the pauses.

  Raises:
    DataError: it failed for a lasting reason; InputLost, too often.
    Stopped: `stop` is set.
  """
  tries = _TRIES.get(what.split("://")[0], 2) if has_scheme(what) else 1
  for attempt in range(tries):
    if stop is not None and stop.is_set():
      raise Stopped
    try:
      return call()
    except Exception as e:
      if not is_failure(e):
        raise
      if not may_pass(e) or attempt == tries - 1:
        kind = InputLost if may_pass(e) else DataError
        raise kind(f"{what} cannot be used: {said(e)}.") from e
      (stop or threading.Event()).wait(_FIRST_PAUSE * 2**attempt * random.uniform(0.5, 1.0))
  raise AssertionError


def is_failure(error: Exception) -> bool:
  """Whether an error comes from the storage or the network, and not from a bug."""
  return isinstance(error, (OSError, EOFError)) or type(error).__module__.split(".")[0] in _NETWORK


def may_pass(error: BaseException) -> bool:
  """Whether a later try may succeed: the storage was silent or busy, and has not refused."""
  return not numbers(error) & _FINAL_NUMBERS and not any(map(_is_final, _chain(error)))


def numbers(error: BaseException) -> set[int]:
  """Return the numbers of the system's errors that an error and its causes name."""
  found = set()
  for one in _chain(error):
    found |= {int(number) for number in _NUMBER_IN_TENSORSTORE.findall(str(one))}
    if isinstance(one, OSError) and one.errno is not None:
      found.add(one.errno)
  return found


def _chain(error: BaseException | None) -> Iterator[BaseException]:
  while error is not None:
    yield error
    error = error.__cause__


def _is_final(error: BaseException) -> bool:
  if isinstance(error, _FINAL) or _FINAL_WORDS.search(str(error)):
    return True
  status = _status(error)
  return not (status is None or status in (408, 429) or status >= 500)


def _status(error: BaseException) -> int | None:
  """Return the HTTP status in an error, wherever its library keeps it."""
  response = getattr(error, "response", None)
  for value in (getattr(error, name, None) for name in ("status", "code")):
    if isinstance(value, int):
      return value
  return getattr(response, "status_code", None)


def said(error: BaseException) -> str:
  """Return an error as one line, without tokens and without the queries of URLs."""
  line = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1", first_line(error))
  line = re.sub(r"\b(hf_[A-Za-z0-9]{4,}|ya29\.[\w.-]+)", "***", line)
  for name in _TOKENS:
    if token := os.environ.get(name):
      line = line.replace(token, "***")
  return f"{type(error).__name__}: {line}"[:300].rstrip(". ")


def open_file(url: str, size: int | None = None) -> Any:
  """Open a file for ranged reads: each read is one request for exactly these bytes.

  Args:
    url: URL or local path.
    size: its length in bytes if known, which saves a request.
  """
  fs, path = filesystem(url)
  return fs.open(path, cache_type="none", size=size) if has_scheme(url) else fs.open(path)
