"""Runs gcloud: within a time limit, without a shell, and with an answer to what went wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from typing import Any, Callable

from launch.cloud.commands import Line, shell

# What gcloud writes, to what it means; the first that is found counts.
_KINDS = (
    ("precondition", r"HTTPError 412|conditionNotMet|[Pp]re-?condition(s)? .*(not|failed)|PreconditionFailed"),
    ("exists", r"ALREADY_EXISTS|HTTPError 409|already exists"),
    ("throttled", r"(RESOURCE_EXHAUSTED|429|[Qq]uota).*(per minute|per second|[Rr]ate|[Tt]oo many requests)"
                  r"|Too Many Requests|rateLimitExceeded"),
    ("quota", r"[Qq]uota"),
    ("capacity", r"no more capacity|[Ss]tockout|insufficient capacity|not enough (resources|capacity)"),
    ("throttled", r"RESOURCE_EXHAUSTED|HTTPError 429"),
    ("permission", r"PERMISSION_DENIED|HTTPError 403|does not have .*(access|permission)|[Ff]orbidden"),
    ("auth", r"UNAUTHENTICATED|HTTPError 401|active account|[Rr]eauthentication|invalid_grant|gcloud auth login"),
    ("not_found", r"NOT_FOUND|HTTPError 404|was not found|not found:|matched no objects|404"),
    ("bad_request", r"INVALID_ARGUMENT|FAILED_PRECONDITION|HTTPError 400|unrecognized arguments|must be specified"),
    ("unavailable", r"UNAVAILABLE|INTERNAL|ABORTED|DEADLINE_EXCEEDED|HTTPError 50\d|\b50[0234]\b"
                    r"|[Cc]onnection|[Tt]imed out|resolve host|Name or service|network|unreachable"),
)
TRANSIENT = ("unavailable", "throttled", "timeout")


class GcloudError(Exception):
  """A line that failed.

  Attributes:
    kind: quota | capacity | permission | auth | not_found | exists | precondition | unavailable | throttled | bad_request |
      timeout | unknown.
    line: the words that were run.
    output: what had been printed before.
  """

  def __init__(self, kind: str, line: Line, message: str, output: str = ""):
    super().__init__(message)
    self.kind, self.line, self.output = kind, line, output


def classify(stderr: str) -> str:
  """Returns the kind of a failure by what gcloud wrote."""
  return next((kind for kind, pattern in _KINDS if re.search(pattern, stderr)), "unknown")


def sentence(stderr: str, code: int) -> str:
  """Returns what gcloud said was wrong, without its hints."""
  lines = [line.strip() for line in stderr.splitlines() if line.strip()]
  errors = [line for line in lines if line.startswith("ERROR:")]
  line = (errors or lines or [f"gcloud ended with exit code {code}"])[-1]
  return re.sub(r"^ERROR: (\([\w.-]+\) )?", "", line)[:500]


class Gcloud:
  """The gcloud of this machine."""

  def __init__(self, limit: float = 120.0, log: Callable[[str], None] = lambda line: None,
               sleep: Callable[[float], None] = time.sleep):
    """Makes one that ends a line after `limit` seconds and tells `log` of lines that fail and are run again."""
    self.limit, self._log, self._sleep = limit, log, sleep
    self._program = os.environ.get("TPU_GCLOUD", "gcloud")

  def run(self, line: Line, tries: int = 3) -> str:
    """Returns what a line prints.

    Args:
      line: from launch.cloud.commands.
      tries: how often a service that is busy, silent or down is asked.

    Raises:
      GcloudError: if it fails, or takes too long.
    """
    pause = 2.0
    while True:
      tries -= 1
      try:
        printed, said = self._once(line)
        # That message is what is asked for, and gcloud says it beside the output.
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
      raise GcloudError("unknown", line, f"gcloud printed no JSON ({error}): {output[:200]}") from error

  def hosts(self, line: Line) -> tuple[list[str], str]:
    """Runs a line on hosts; returns what they printed, of however many, and what was said of those that failed."""
    try:
      printed, said = self._once(line)
    except GcloudError as error:
      return error.output.splitlines(), str(error)
    errors = [text for text in said.splitlines() if "ERROR" in text]
    return printed.splitlines(), sentence("\n".join(errors), 0) if errors else ""

  def attach(self, line: Line) -> int:
    """Runs a line with the terminal as its output; returns its exit code."""
    return subprocess.call([self._program, *line[1:]], stdin=subprocess.DEVNULL)

  def _once(self, line: Line) -> tuple[str, str]:
    try:
      process = subprocess.Popen([self._program, *line[1:]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True)
    except OSError as error:
      raise GcloudError("not_installed", line, f"{self._program} cannot be run ({error.strerror}); install the Google "
                        "Cloud CLI: https://cloud.google.com/sdk/docs/install") from error
    output, errors = [], []
    readers = [threading.Thread(target=into.extend, args=(stream,), daemon=True)
               for into, stream in ((output, process.stdout), (errors, process.stderr))]
    for reader in readers:
      reader.start()
    try:
      code = process.wait(self.limit)
    except subprocess.TimeoutExpired:
      code = None
    finally:
      # Also when the user interrupts: gcloud's own children would go on.
      if process.poll() is None:
        _end(process)
    for reader in readers:
      reader.join(5)
    printed, said = "".join(output), "".join(errors)
    if code is None:
      raise GcloudError("timeout", line, f"no answer within {self.limit:g} s: {shell(line)[:200]}", printed)
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
