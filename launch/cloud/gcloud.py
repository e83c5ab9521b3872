"""Runs gcloud: within a time limit, without a shell, and with the kind of every failure."""

from __future__ import annotations

from collections.abc import Callable
import json
import os
import re
import signal
import subprocess
import threading
import time
from typing import Any

from launch.cloud.commands import Line, shell

# By the status of the API, as in "ERROR: (gcloud.compute.x) NOT_FOUND: ...".
_STATUS = {
  "ALREADY_EXISTS": "exists",
  "NOT_FOUND": "not_found",
  "PERMISSION_DENIED": "permission",
  "UNAUTHENTICATED": "auth",
  "INVALID_ARGUMENT": "bad_request",
  "FAILED_PRECONDITION": "bad_request",
  "OUT_OF_RANGE": "bad_request",
  "UNIMPLEMENTED": "bad_request",
  "UNAVAILABLE": "unavailable",
  "INTERNAL": "unavailable",
  "ABORTED": "unavailable",
  "CANCELLED": "unavailable",
  "DEADLINE_EXCEEDED": "unavailable",
  "UNKNOWN": "unavailable",
}
# Names of google.rpc.Code, by which an operation fails.
_RPC = {
  1: "CANCELLED",
  3: "INVALID_ARGUMENT",
  4: "DEADLINE_EXCEEDED",
  5: "NOT_FOUND",
  6: "ALREADY_EXISTS",
  7: "PERMISSION_DENIED",
  8: "RESOURCE_EXHAUSTED",
  9: "FAILED_PRECONDITION",
  10: "ABORTED",
  11: "OUT_OF_RANGE",
  12: "UNIMPLEMENTED",
  13: "INTERNAL",
  14: "UNAVAILABLE",
  16: "UNAUTHENTICATED",
}
# By a code, as in "HTTPError 404: ...".
_HTTP = {
  "400": "bad_request",
  "401": "auth",
  "403": "permission",
  "404": "not_found",
  "409": "exists",
  "412": "precondition",
}
# By the message of a RESOURCE_EXHAUSTED; the first match counts.
_EXHAUSTED = (
  ("throttled", r"per minute|per second|\b[Rr]ate\b|[Tt]oo many requests"),
  ("quota", r"[Qq]uota"),
  ("capacity", r"capacity|[Ss]tockout|resources"),
)
# By the messages of gcloud itself.
_WORDS = (
  ("auth", r"active account|[Rr]eauthentication|invalid_grant|gcloud auth login"),
  ("precondition", r"pre-conditions|PreconditionFailed"),
  ("not_found", r"matched no objects|[Nn]ot found|does not exist"),
  ("permission", r"does not have .*(access|permission)|[Ff]orbidden"),
  ("exists", r"already exists"),
  ("bad_request", r"unrecognized arguments|must be specified|Invalid (value|choice)|Bad syntax"),
  (
    "unavailable",
    (
      r"[Cc]onnection|Max retries|[Tt]imed out|resolve host|Name or service|[Nn]etwork is "
      r"unreachable|Service Unavailable"
    ),
  ),
)
TRANSIENT = ("unavailable", "throttled", "timeout")
FATAL = ("permission", "auth", "bad_request", "not_installed")  # the same if tried again


class GcloudError(Exception):
  """A line that failed.

  Attributes:
    kind: quota | capacity | permission | auth | not_found | exists | precondition | unavailable |
      throttled | bad_request | timeout | not_installed | unknown.
    line: the words that were run.
    output: what was printed before the failure.
  """

  def __init__(self, kind: str, line: Line, message: str, output: str = ""):
    super().__init__(message)
    self.kind, self.line, self.output = kind, line, output


def _operation(stderr: str) -> dict[str, Any]:
  """Returns the error of an operation that failed after its request was accepted, or nothing.

  gcloud prints it as the JSON of a google.rpc.Status.
  """
  found = re.search(r"ERROR: \(gcloud[\w.-]*\) (\{.*\})", stderr, re.DOTALL)
  try:
    return dict(json.loads(found[1])) if found else {}
  except ValueError:
    return {}


def classify(stderr: str) -> str:
  """Returns the kind of a failure by the messages of gcloud, whatever names are in them."""
  operation = _operation(stderr)
  if operation:
    stderr = f"ERROR: (gcloud) {_RPC.get(operation.get('code', 2), 'UNKNOWN')}: " + str(
      operation.get("message", "")
    )
  # Not only at the start of a line: the dots of a progress bar may precede it.
  status = re.search(r"ERROR: \(gcloud[\w.-]*\) (?:\[\S+\] )?([A-Z]+(?:_[A-Z]+)*): (.*)", stderr)
  code = re.search(r"\bHTTPError (\d+)(.*)", stderr)
  exhausted = next(
    (found for found in (status, code) if found and found[1] in ("RESOURCE_EXHAUSTED", "429")), None
  )
  if exhausted:
    said = _without_names((status or exhausted)[2])
    return next((kind for kind, pattern in _EXHAUSTED if re.search(pattern, said)), "throttled")
  if status and status[1] in _STATUS:
    return _STATUS[status[1]]
  if code:
    return _HTTP.get(code[1], "unavailable" if code[1].startswith("5") else "unknown")
  said = _without_names(stderr)
  return next((kind for kind, pattern in _WORDS if re.search(pattern, said)), "unknown")


def _without_names(text: str) -> str:
  """Remove what may have any name: addresses, paths, and names in brackets."""
  return re.sub(r"\S*://\S+|(?:^|(?<=\s))/\S+|\bprojects/\S+|\[[^\]\s]*\]", "", text)


def sentence(stderr: str, code: int) -> str:
  """Returns the error message of gcloud, without its hints."""
  if operation := _operation(stderr):
    return str(operation.get("message", "the operation failed"))[:500]
  errors = re.findall(r"ERROR: (?:\([\w.-]+\) )?(.+)", stderr)
  lines = [line.strip() for line in stderr.splitlines() if line.strip(" .")]
  return (errors or lines or [f"gcloud ended with exit code {code}"])[-1].strip()[:500]


class Gcloud:
  """The gcloud of this machine."""

  def __init__(
    self,
    limit: float = 120.0,
    log: Callable[[str], None] = lambda line: None,
    sleep: Callable[[float], None] = time.sleep,
  ):
    """Makes one that ends a line after `limit` seconds; `log` receives what is tried again."""
    self.limit, self._log, self._sleep = limit, log, sleep
    self._program = os.environ.get("TPU_GCLOUD", "gcloud")

  def run(self, line: Line, tries: int = 3) -> str:
    """Returns what a line prints.

    Args:
      line: from launch.cloud.commands.
      tries: how often a line is run while the service is busy, silent or down.

    Raises:
      GcloudError: if it fails, or takes too long.
    """
    pause = 2.0
    while True:
      tries -= 1
      try:
        printed, said = self._once(line)
        # That message is wanted, and gcloud writes it to stderr.
        return printed + said if "--print-created-message" in line else printed
      except GcloudError as error:
        if error.kind not in TRANSIENT or tries < 1:
          raise
        self._log(f"{' '.join(line[:5])}: {error}; again in {pause:.0f} s")
        self._sleep(pause)
        pause *= 3

  def json(self, line: Line, tries: int = 3) -> Any:
    """Returns what a line with --format=json prints."""
    output = self.run(line, tries)
    try:
      return json.loads(output or "null")
    except ValueError as error:
      raise GcloudError(
        "unknown", line, f"gcloud printed no JSON ({error}): {output[:200]}"
      ) from error

  def hosts(self, line: Line) -> tuple[list[str], str]:
    """Run a line on hosts; return the lines that any of them printed, and the error of others."""
    try:
      printed, said = self._once(line)
    except GcloudError as error:
      return error.output.splitlines(), str(error)
    errors = [text for text in said.splitlines() if "ERROR" in text]
    return printed.splitlines(), sentence("\n".join(errors), 0) if errors else ""

  def attach(self, line: Line) -> int:
    """Run a line with the terminal as its output; return its exit code."""
    return subprocess.call([self._program, *line[1:]], stdin=subprocess.DEVNULL)

  def _once(self, line: Line) -> tuple[str, str]:
    try:
      process = subprocess.Popen(
        [self._program, *line[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
      )
    except OSError as error:
      raise GcloudError(
        "not_installed",
        line,
        f"{self._program} cannot be run ({error.strerror}); install the Google Cloud CLI: "
        "https://cloud.google.com/sdk/docs/install",
      ) from error
    output: list[str] = []
    errors: list[str] = []
    readers = [
      threading.Thread(target=into.extend, args=(stream,), daemon=True)
      for into, stream in ((output, process.stdout), (errors, process.stderr))
    ]
    for reader in readers:
      reader.start()
    try:
      code = process.wait(self.limit)
    except subprocess.TimeoutExpired:
      code = None
    finally:
      # Also if the user interrupts: the children of gcloud would survive.
      if process.poll() is None:
        _end(process)
    for reader in readers:
      reader.join(5)
    printed, said = "".join(output), "".join(errors)
    if code is None:
      raise GcloudError(
        "timeout", line, f"no answer within {self.limit:g} s: {shell(line)[:200]}", printed
      )
    if code:
      raise GcloudError(classify(said), line, sentence(said, code), printed)
    return printed, said


def _end(process: subprocess.Popen) -> None:
  for number, seconds in ((signal.SIGTERM, 3), (signal.SIGKILL, 3)):
    try:
      os.killpg(process.pid, number)
      process.wait(seconds)
      return
    except ProcessLookupError:
      return
    except subprocess.TimeoutExpired:
      continue
