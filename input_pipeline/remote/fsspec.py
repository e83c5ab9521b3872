"""Files elsewhere, through fsspec: with time limits and tries, and no secret in a message."""

from collections.abc import Callable
import os
import random
import re
import threading
from typing import Any, TypeVar

import fsspec

from input_pipeline.errors import DataError, first_line
from input_pipeline.remote import has_scheme

T = TypeVar("T")

_REQUEST_SECONDS = (
  60.0  # for one request; gcsfs tries six times, with pauses of half a minute in all
)
_TRIES = {
  "http": 6,
  "https": 6,
}  # of which fsspec makes one; of the others, which try several times themselves, 2
_FIRST_PAUSE = 0.5  # seconds; twice as long before each further try
# fsspec's file systems raise what their HTTP libraries do, which have no base in common.
_NETWORK = ("aiohttp", "gcsfs", "google", "httpx", "httpx2", "httpcore", "httpcore2", "requests")
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


class Stopped(Exception):
  """What `retried` raises when it is asked to stop."""


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
  """Returns the file system of a URL or local path, and the path in it.

  Raises:
    DataError: nothing is installed for its scheme.
  """
  try:
    if has_scheme(url):
      limit_requests()
    return fsspec.core.url_to_fs(url)
  except (ImportError, ValueError) as e:  # the latter for a scheme that fsspec does not know
    raise DataError(
      f"{url} cannot be read ({said(e)}); gs:// needs: pip install -e '.[gcs]'."
    ) from e


def limit_requests() -> None:
  """Gives the file systems of fsspec time limits, and takes from gcsfs what hides the work of others."""
  # Otherwise gcsfs asks each bucket for its kind by gRPC, and where it may not, that blocks for a minute.
  os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
  import aiohttp  # comes with gcsfs and with datasets

  limit = aiohttp.ClientTimeout(total=_REQUEST_SECONDS)
  gcs = fsspec.config.conf.setdefault("gcs", {})
  gcs.setdefault("requests_timeout", limit)
  gcs.setdefault(
    "use_listings_cache", False
  )  # it would hide what TensorStore and other hosts write
  for scheme in ("http", "https"):
    fsspec.config.conf.setdefault(scheme, {}).setdefault("client_kwargs", {"timeout": limit})


def retried(what: str, call: Callable[[], T], stop: threading.Event | None = None) -> T:
  """Returns what `call` does, tried again with growing pauses while the network fails.

  Args:
    what: the file, for messages.
    call: reads or writes it as a whole, so that it can be done again.
    stop: ends the pauses.

  Raises:
    DataError: it failed for good, or too often.
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
      if not _may_pass(e) or attempt == tries - 1:
        raise DataError(f"{what} cannot be used: {said(e)}.") from e
      (stop or threading.Event()).wait(_FIRST_PAUSE * 2**attempt * random.uniform(0.5, 1.0))
  raise AssertionError


def is_failure(error: Exception) -> bool:
  """Tells whether an error is the storage's, and not a mistake of the program."""
  return isinstance(error, (OSError, EOFError)) or type(error).__module__.split(".")[0] in _NETWORK


def _may_pass(error: Exception) -> bool:
  if isinstance(error, _FINAL):
    return False
  status = _status(error)
  return status is None or status in (408, 429) or status >= 500


def _status(error: Exception) -> int | None:
  """Returns the HTTP status in an error, wherever its library keeps it."""
  response = getattr(error, "response", None)
  for value in (getattr(error, name, None) for name in ("status", "code")):
    if isinstance(value, int):
      return value
  return getattr(response, "status_code", None)


def said(error: BaseException) -> str:
  """Returns an error as one line, without tokens and without signatures in URLs."""
  line = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1", first_line(error))
  line = re.sub(r"\b(hf_[A-Za-z0-9]{4,}|ya29\.[\w.-]+)", "***", line)
  for name in _TOKENS:
    if token := os.environ.get(name):
      line = line.replace(token, "***")
  return f"{type(error).__name__}: {line}"[:300].rstrip(". ")


def open_file(url: str, size: int | None = None) -> Any:
  """Opens a file for reads of ranges: each read is one request for just these bytes.

  Args:
    url: URL or local path.
    size: its length in bytes where it is known, which saves a request.
  """
  fs, path = filesystem(url)
  return fs.open(path, cache_type="none", size=size) if has_scheme(url) else fs.open(path)
