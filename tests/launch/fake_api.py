"""What the fake cloud of fake_cloud.py holds and answers: its errors, resources, and HTTP side."""

import contextlib
import dataclasses
import datetime
import http.server
import json
import re
import time
from typing import Any
import urllib.parse

from tests.launch.fake_hosts import Host


class ApiError(Exception):
  """What Google answers instead."""

  def __init__(self, code: int, status: str, message: str):
    super().__init__(message)
    self.code, self.body = code, {"error": {"code": code, "status": status, "message": message}}


@dataclasses.dataclass
class Refusal:
  """Requests that are answered with an error.

  Attributes:
    match: regular expression for "METHOD /path".
    times: how many more, None for all.
    too_late: whether the request takes effect, as if the server died before its answer.
  """

  match: str
  error: ApiError
  times: int | None = None
  too_late: bool = False


@dataclasses.dataclass
class Request:
  """What comes with a request."""

  query: dict[str, str]
  body: dict[str, Any]
  caller: str = ""  # the token


@dataclasses.dataclass
class Node:
  """A slice."""

  name: str
  spec: dict[str, Any]
  hosts: list[Host]
  state: str = "CREATING"
  health: str = "HEALTHY"
  created: float = dataclasses.field(default_factory=time.time)
  removed: float | None = None

  def json(self) -> dict[str, Any]:
    endpoints = [{"ipAddress": host.address, "port": 8470} for host in self.hosts]
    if self.spec.get("networkConfig", {}).get("enableExternalIps", True):
      endpoints = [
        endpoint | {"accessConfig": {"externalIp": endpoint["ipAddress"]}} for endpoint in endpoints
      ]
    return self.spec | {
      "name": self.name,
      "id": "1",
      "state": self.state,
      "health": self.health,
      "createTime": datetime.datetime.fromtimestamp(self.created, datetime.UTC).isoformat(),
      "apiVersion": "V2_ALPHA1",
      "networkEndpoints": endpoints,
    }


@dataclasses.dataclass
class Resource:
  """A queued resource."""

  name: str
  request: dict[str, Any]
  nodes: list[str]
  expires: float
  ahead: list[str]  # states to come
  state: str = "CREATING"
  initiator: str = "SERVICE"
  failure: str = ""
  created: str = dataclasses.field(
    default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat()
  )

  def json(self) -> dict[str, Any]:
    state: dict[str, Any] = {"state": self.state, "stateInitiator": self.initiator}
    if self.failure:
      state["failedData"] = {"error": {"code": 8, "message": self.failure}}
    node, parent = (
      self.request["tpu"]["nodeSpec"][0]["node"],
      self.name.partition("/queuedResources")[0],
    )
    specs = [
      {"parent": parent, "nodeId": name.rpartition("/")[2], "node": node} for name in self.nodes
    ]
    return self.request | {
      "name": self.name,
      "createTime": self.created,
      "tpu": {"nodeSpec": specs},
      "state": state,
    }


def hosts_of(accelerator_type: str) -> int:
  """Returns the number of hosts of a slice; raises ApiError for a type that does not exist."""
  match = re.fullmatch(r"(v2|v3|v4|v5p|v5litepod|v6e)-(\d+)", accelerator_type)
  if not match:
    raise ApiError(
      400, "INVALID_ARGUMENT", f"Invalid value for accelerator type: '{accelerator_type}'"
    )
  kind, size = match[1], int(match[2])
  if kind in ("v5litepod", "v6e"):  # sizes are chips; up to 8 of them are one host
    return 1 if size <= 8 else size // 4
  return max(1, size // 8)  # sizes are cores, 8 on each host


class Api(http.server.BaseHTTPRequestHandler):
  def _answer(self):
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query))
    body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
    request = Request(query, body, (self.headers.get("Authorization") or "").rpartition(" ")[2])
    try:
      path = urllib.parse.unquote(url.path)
      code, answer = 200, self.server.owner.answer(self.command, path, request)
    except ApiError as error:
      code, answer = error.code, error.body
    content = json.dumps(answer).encode()
    with contextlib.suppress(ConnectionError):  # of a host that has deleted itself
      self.send_response(code)
      self.send_header("Content-Type", "application/json")
      self.send_header("Content-Length", str(len(content)))
      self.end_headers()
      self.wfile.write(content)

  do_GET = do_POST = do_PATCH = do_DELETE = _answer

  def log_message(self, *args):
    del args
