"""What a host asks Google: its metadata server, the TPU API as its service account, and gcloud."""

from __future__ import annotations

import calendar
import email.utils
import json
import os
import subprocess
import time
import urllib.error
import urllib.request

from launch.host.files import Json

_API = "https://tpu.googleapis.com/"
_SECONDS = 20.0  # for one answer of the API


class ApiError(Exception):
  """A refusal of the TPU API; `code` is that of HTTP, 0 if it could not be reached."""

  def __init__(self, code: int, message: str):
    super().__init__(message)
    self.code = code


def metadata(path: str) -> str | None:
  """Return a value of the machine's metadata server, or None where there is none."""
  server = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
  request = urllib.request.Request(
    f"http://{server}/computeMetadata/v1/instance/{path}", headers={"Metadata-Flavor": "Google"}
  )
  try:
    with urllib.request.urlopen(request, timeout=2) as reply:
      return reply.read().decode()
  except (OSError, ValueError):
    return None


class Api:
  """The TPU API v2, called with the token of this machine: it needs no file, login or gcloud.

  Where there is no token, gcloud is tried in its place.
  """

  def __init__(self, project: str, zone: str):
    self._project, self._zone = project, zone

  def age(self, node: str) -> float:
    """Return the seconds since the creation of a node, by the clock of the cloud.

    Raises:
      ApiError: if the API does not return it.
    """
    value, date = self._rest("GET", f"nodes/{node}")
    try:
      created = _seconds_of(value["createTime"])
    except (KeyError, ValueError) as error:
      raise ApiError(0, f"{node} has no createTime") from error
    return max(0.0, date - created)

  def may_delete(self) -> None:
    """Prove that this machine may delete queued resources, by a name that cannot exist.

    Raises:
      ApiError: with code 403 if it may not, else if that could not be found out.
    """
    # Longer than the launcher allows, and random: the API answers 404 if it would obey.
    name = f"may-i-delete-{os.urandom(20).hex()}"
    try:
      self.delete(name)
    except ApiError as error:
      if error.code != 404:
        raise

  def delete(self, name: str) -> None:
    """Delete a queued resource with its nodes.

    Raises:
      ApiError: if that is refused, with code 404 if it does not exist.
    """
    try:
      self._rest("DELETE", f"queuedResources/{name}?force=true")
    except ApiError as error:
      if error.code in (403, 404):
        raise
      self._gcloud_delete(name, error)

  def _gcloud_delete(self, name: str, first: ApiError) -> None:
    where = [f"--project={self._project}", f"--zone={self._zone}"]
    words = ["compute", "tpus", "queued-resources", "delete", name, "--force", "--async"]
    try:
      gcloud(*words, *where)
    except RuntimeError as error:
      text = str(error)
      code = 404 if "NOT_FOUND" in text else 403 if "PERMISSION_DENIED" in text else first.code
      raise ApiError(code, f"{first}; {text}") from error

  def _rest(self, method: str, path: str) -> tuple[Json, float]:
    """Return the answer to a request, and the time in its header."""
    token = metadata("service-accounts/default/token")
    if not token:
      raise ApiError(0, "this machine has no service account")
    base = os.environ.get("CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU", _API)
    request = urllib.request.Request(
      f"{base}v2/projects/{self._project}/locations/{self._zone}/{path}",
      method=method,
      headers={"Authorization": f"Bearer {json.loads(token)['access_token']}"},
    )
    try:
      with urllib.request.urlopen(request, timeout=_SECONDS) as reply:
        date = email.utils.parsedate_to_datetime(reply.headers["Date"]).timestamp()
        return json.loads(reply.read() or b"{}"), date
    except urllib.error.HTTPError as error:
      raise ApiError(error.code, _message(error)) from error
    except (OSError, ValueError) as error:
      raise ApiError(0, f"tpu.googleapis.com does not answer: {error}") from error


def _message(error: urllib.error.HTTPError) -> str:
  try:
    return str(json.loads(error.read())["error"]["message"])[:300]
  except (OSError, ValueError, KeyError, TypeError):
    return f"HTTP {error.code}"


def _seconds_of(text: str) -> float:
  """Return the seconds since 1970 of a time such as 2026-01-02T03:04:05.678901234Z."""
  return calendar.timegm(time.strptime(text[:19], "%Y-%m-%dT%H:%M:%S"))


def gcloud(*words: str, seconds: float = 120.0) -> str:
  """Run gcloud and return its output; RuntimeError with its last line if it fails."""
  name = f"gcloud {' '.join(words[:4])}"
  try:
    done = subprocess.run(
      ["gcloud", *words, "--quiet"],
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      timeout=seconds,
      check=False,
    )
  except (OSError, subprocess.TimeoutExpired) as error:
    raise RuntimeError(f"{name}: {error}") from error
  if done.returncode:
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    raise RuntimeError(f"{name}: {lines[-1][:300]}")
  return done.stdout
