"""Ranged reads of files in place: gs://, s3://, http(s)://, file:// or a plain folder.

TensorStore's key-value stores do the reading. Faults of the network (timeouts, 429 and 5xx, broken
connections, truncated or slow answers) are handled and counted here.
"""

import collections
from collections.abc import Callable
import dataclasses
import os
import queue
import random
import re
import threading
import time
from typing import Any

from absl import logging
import tensorstore as ts

from input_pipeline.errors import DataError, InputLost, first_line
from input_pipeline.remote import has_scheme

SCHEMES = ("gs", "s3", "http", "https", "file")

# Worth another try; the rest (PERMISSION_DENIED, OUT_OF_RANGE, ...) does not pass.
_TRANSIENT = re.compile(
  r"UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|INTERNAL|CANCELLED"
)
# Seconds between tries: doubled each time, and drawn at random between half of it and all.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 20.0
_NO_RETRIES = {"max_retries": 0}  # those of this module are counted and limited in time


@dataclasses.dataclass(frozen=True)
class Patience:
  """How long to wait for a server.

  Attributes:
    timeout_seconds: for one request, after which it is sent again.
    hedge_seconds: for one request, after which a second one is sent; the first answer counts.
    give_up_seconds: for one read, over all its requests.
  """

  timeout_seconds: float = 30.0
  hedge_seconds: float = 5.0
  give_up_seconds: float = 300.0


class Changed(DataError):
  """A file is missing, or is not the one that was read before."""


class Bucket:
  """A read-only folder. Thread-safe; can be pickled.

  Attributes:
    url: the folder, as it was given.
    counters: requests, bytes, retries and hedges so far.
  """

  def __init__(self, url: str, patience: Patience = Patience()):
    """Open the folder; no request is sent yet.

    Args:
      url: SCHEME://... or the path of a folder.
      patience: time limits.

    Raises:
      DataError: the URL is none of a known kind.
    """
    self.url = url
    self.counters: collections.Counter[str] = collections.Counter()
    self._patience = patience
    self._connect()

  def _connect(self) -> None:
    self._lock = threading.Lock()
    self._interrupts = 0
    self._generations: dict[str, bytes] = {}
    limit_waits(self._patience.timeout_seconds)
    url = self.url if has_scheme(self.url) else f"file://{os.path.abspath(self.url)}"
    path, mark, query = url.partition("?")
    context = ts.Context({f"{kind}_request_retries": _NO_RETRIES for kind in ("gcs", "s3", "http")})
    try:
      spec = ts.KvStore.Spec(f"{path.rstrip('/')}/{mark}{query}")
      self._store = ts.KvStore.open(spec, context=context).result(self._patience.give_up_seconds)
    except (ValueError, TimeoutError) as e:
      raise DataError(f"{path} cannot be opened ({_reason(e)}).") from e

  def __getstate__(self) -> dict[str, Any]:
    return {key: self.__dict__[key] for key in ("url", "_patience")}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state, counters=collections.Counter())
    self._connect()

  def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
    """Return the bytes [start, stop) of a file; a negative start counts from its end.

    Raises:
      Changed: there is no such file, it ends before `stop`, or it was replaced since the last read.
      DataError: it cannot be read, for a reason that does not pass or that lasted too long.
    """
    value = self._read_or_none(name, start, stop)
    if value is None:
      raise Changed(f"{self.path_of(name)} is missing; check the data.")
    if start is not None and start >= 0 and stop is not None and len(value) != stop - start:
      raise Changed(f"{self.path_of(name)} ends before byte {stop:,}; check the data.")
    return value

  def read_small(self, name: str) -> bytes | None:
    """Return the whole of a file, or None if there is none; raise DataError as `read` does."""
    return self._read_or_none(name, None, None)

  def sizes(self) -> dict[str, int | None] | None:
    """Return the files of the folder, without their sizes; None over http, which has no listing."""
    if self.url.startswith("http"):
      return None
    keys = self._patiently("its listing", self._store.list)
    return {key.decode(): None for key in keys if b"/" not in key}

  def interrupt(self) -> None:
    """Make reads that are under way fail instead of being retried."""
    with self._lock:
      self._interrupts += 1

  def drain_counters(self) -> collections.Counter[str]:
    """Return `counters` and reset them."""
    with self._lock:
      counters, self.counters = self.counters, collections.Counter()
    return counters

  def path_of(self, name: str) -> str:
    """Return the full name of a file for messages, without the query, which may be a secret."""
    return f"{self.url.partition('?')[0].rstrip('/')}/{name}"

  def _read_or_none(self, name: str, start: int | None, stop: int | None) -> bytes | None:
    part = None if start is None else slice(start, stop)
    result = self._patiently(name, lambda: self._store.read(name, byte_range=part))
    if result.state == "missing":
      return None
    generation = result.stamp.generation
    with self._lock:
      self.counters["bytes"] += len(result.value)
      if self._generations.setdefault(name, generation) != generation:
        raise Changed(f"{self.path_of(name)} was replaced while it was being read; check the data.")
    return result.value

  def _patiently(self, what: str, send: Callable[[], ts.Future]) -> Any:
    """Return the result of a request, which is retried while that may help."""
    give_up = time.monotonic() + self._patience.give_up_seconds
    pause, interrupts = _FIRST_PAUSE, self._interrupts
    while True:
      try:
        return self._once(send)
      except (ValueError, OSError, TimeoutError) as e:
        reason = _reason(e)
        if not isinstance(e, TimeoutError) and not _TRANSIENT.match(reason):
          if reason.startswith("OUT_OF_RANGE"):
            raise Changed(f"{self.path_of(what)} is shorter than it was; check the data.") from e
          raise DataError(f"{self.path_of(what)} cannot be read ({_explained(reason)}).") from e
        if time.monotonic() + pause > give_up or interrupts != self._interrupts:
          raise InputLost(
            f"{self.path_of(what)} could not be read within "
            f"config.data.stream_give_up_seconds={self._patience.give_up_seconds:g}; the last "
            f"reason was: {reason}."
          ) from e
      with self._lock:
        self.counters["retries"] += 1
        often = self.counters["retries"]
      if often & (often - 1) == 0:  # 1, 2, 4, 8, ...: otherwise a bad hour would fill the log
        logging.warning("Retry %d, of %s: %s", often, self.path_of(what), reason)
      time.sleep(random.uniform(pause / 2, pause))
      pause = min(2 * pause, _LONGEST_PAUSE)

  def _once(self, send: Callable[[], ts.Future]) -> Any:
    """Send a request, and a second one if the first is slow; return the first result."""
    answers: queue.SimpleQueue[ts.Future] = queue.SimpleQueue()
    end = time.monotonic() + self._patience.timeout_seconds
    sent: list[ts.Future] = []

    def start() -> None:
      with self._lock:
        self.counters["requests"] += 1
      sent.append(send())
      sent[-1].add_done_callback(answers.put)

    start()
    failed = 0
    try:
      while True:
        hedging = len(sent) == 1 and not failed
        wait = end - time.monotonic()
        try:
          answer = answers.get(
            timeout=max(0, min(wait, self._patience.hedge_seconds) if hedging else wait)
          )
        except queue.Empty:
          if not hedging or time.monotonic() >= end:
            raise TimeoutError(f"no answer within {self._patience.timeout_seconds:g} s") from None
          with self._lock:
            self.counters["hedges"] += 1
          start()
          continue
        if answer.exception() is None or failed + 1 == len(sent):
          return answer.result()
        failed += 1  # the other one may still succeed
    finally:
      for future in sent:
        future.cancel()


def limit_waits(seconds: float) -> None:
  """Make TensorStore give up connections that are silent for so long; it would wait for ever.

  Variables that the environment sets already win. No effect after the first request of a process.
  """
  os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", str(min(20, round(seconds))))
  os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", str(max(1, round(seconds))))
  os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")


def _explained(reason: str) -> str:
  """Return a reason with what it means for a user, where that is known."""
  if "was ignored by server" in reason:
    return "its server sends whole files only, and parts are needed; use another server or a bucket"
  if redirect := re.search(r"HTTP code 30\d", reason):
    return f"{redirect[0]}, a redirect; give the URL that it leads to"
  if "HTTP code 401" in reason or "HTTP code 403" in reason:
    return (
      f"{reason}; give the credentials of this machine the right to read it, those of Google by: "
      "gcloud auth application-default login"
    )
  return reason


def _reason(error: BaseException) -> str:
  return (first_line(error) or type(error).__name__)[:300]
