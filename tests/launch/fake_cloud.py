"""Google's side of a launch, on loopback: real gcloud creates, reaches and deletes TPU slices whose hosts are folders.

    python -m tests.launch.fake_cloud FOLDER

It prints what to export, and serves until Ctrl-C: the TPU API (v2 and v2alpha1), what `gcloud compute tpus ... ssh`
asks of Compute Engine, one version of every secret, and a metadata server for each host. `ssh`, `scp`, `ssh-keygen` and
`ssh-add` are programs of FOLDER/bin (see fake_ssh.py) that run a command in the folder of a host, with HOME set to it.
It follows the published schema, not the service's timing: a queued resource moves on by one state each time that it is
read. Every public method of Cloud that changes something can also be called by HTTP:

    curl 127.0.0.1:PORT/control/preempt -d '{"name": "RUN"}'

Buckets are served by tests/trainer/bucket_server.py.
"""

import argparse
import base64
from collections.abc import Callable
import contextlib
import dataclasses
import datetime
import http.server
import json
import os
import pathlib
import re
import shlex
import signal
import threading
import time
from typing import Any
import urllib.parse

from tests.launch.fake_hosts import Host, install, serve
from tests.trainer.shared import free_port

QUEUE = ("ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
OFFLINE = "http://127.0.0.1:1"  # nobody listens there


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
    too_late: the request is obeyed before it is refused, as by a server that dies before it can answer.
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


@dataclasses.dataclass
class Node:
  """A slice."""

  name: str
  spec: dict[str, Any]
  hosts: list[Host]
  state: str = "CREATING"
  health: str = "HEALTHY"

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


class Cloud:
  """All projects and zones.

  Attributes:
    calls: "METHOD /path" of each request, in their order.
    resources: the queued resources that exist, by their short name.
    nodes: the nodes that exist, by their short name.
    grants: whether a request ever leaves the queue.
    environment: what a process needs to meet this cloud in place of Google's.
  """

  def __init__(
    self,
    root: pathlib.Path,
    host_environment: dict[str, str] | None = None,
    clock: Callable[[], float] = time.time,
  ):
    """Serves from now on.

    Args:
      root: folder for the programs and the hosts.
      host_environment: more variables of each host.
      clock: tells the time to which --valid-until-duration is added.
    """
    self._root, self._host_environment, self._clock = root.resolve(), host_environment or {}, clock
    self._lock = threading.RLock()
    self._count = 0
    self._refusals: list[Refusal] = []
    self._operations: dict[str, dict[str, Any]] = {}
    self.calls: list[str] = []
    self.resources: dict[str, Resource] = {}
    self.nodes: dict[str, Node] = {}
    self.grants = True
    self._server = serve(_Api, self)
    self.url = f"http://127.0.0.1:{self._server.server_port}"
    install(self._root)
    home = self._root / "home"
    (home / "token").write_text("token")
    self._google = {
      "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": f"{self.url}/",
      "CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE": f"{self.url}/compute/v1/",
      "CLOUDSDK_API_ENDPOINT_OVERRIDES_SECRETMANAGER": f"{self.url}/",
      "CLOUDSDK_AUTH_ACCESS_TOKEN_FILE": str(home / "token"),
      "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1",
      "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "1",
    }
    # A gcloud that wants anything else finds nobody.
    self.environment = self._google | {
      "HTTPS_PROXY": OFFLINE,
      "HTTP_PROXY": OFFLINE,
      "NO_PROXY": "127.0.0.1,localhost",
      "HOME": str(home),
      "XDG_STATE_HOME": str(home / "state"),
      "CLOUDSDK_CORE_PROJECT": "project",
      "PATH": f"{self._root / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }

  def close(self) -> None:
    """Ends everything that runs in a host."""
    self._server.shutdown()
    self._server.server_close()
    for name in list(self.nodes):
      self._remove_node(name)

  def __enter__(self) -> "Cloud":
    return self

  def __exit__(self, *exception) -> None:
    self.close()

  def count(self, pattern: str) -> int:
    """Returns how many requests there were of a kind, by a regular expression for "METHOD /path"."""
    return sum(bool(re.search(pattern, line)) for line in self.calls)

  # What the service does by itself, and what a test makes it do.

  def refuse(
    self,
    match: str,
    code: int,
    status: str,
    message: str,
    times: int | None = None,
    too_late: bool = False,
  ) -> None:
    """Answers requests with an error; see Refusal."""
    self._refusals.append(Refusal(match, ApiError(code, status, message), times, too_late))

  def allow(self, grants: bool) -> None:
    """Sets `grants`."""
    self.grants = grants

  def preempt(self, name: str, notice: float = 0.0, stale: int = 0) -> None:
    """Takes the nodes of a queued resource away.

    Args:
      name: of the queued resource.
      notice: seconds between the notice in the metadata, with the SIGTERM of a system that shuts down, and the end.
      stale: how many more reads the queued resource says ACTIVE.
    """
    nodes = [self.nodes[node.rpartition("/")[2]] for node in self.resources[name].nodes]
    if notice:
      for host in (host for node in nodes for host in node.hosts):
        host.preempted = True
        host.kill(signal.SIGTERM)
      time.sleep(notice)
    with self._lock:
      for node in nodes:
        node.state = "PREEMPTED"
        for host in node.hosts:
          host.kill()
      resource = self.resources[name]
      resource.initiator = "SERVICE"
      resource.ahead = [*["ACTIVE"] * stale, "SUSPENDING", "SUSPENDED"]
      if not stale:
        resource.state = resource.ahead.pop(0)

  def fail(self, name: str, message: str) -> None:
    """Ends a queued resource in the state FAILED."""
    with self._lock:
      resource = self.resources[name]
      resource.state, resource.failure, resource.ahead = "FAILED", message, []

  def set_node(self, name: str, state: str | None = None, health: str | None = None) -> None:
    """Sets what a node says of itself."""
    node = self.nodes[name]
    node.state, node.health = state or node.state, health or node.health

  def set_link(self, name: str, worker: int, link: str, dead: bool = False) -> None:
    """Sets whether a host can be reached ("up", "down", "hung"); a dead one has lost its processes as well."""
    host = self.nodes[name].hosts[worker]
    host.connect(link)
    if dead:
      host.kill()

  def add_node(
    self, name: str, zone: str, labels: dict[str, str], accelerator_type: str = "v4-8"
  ) -> None:
    """Makes a node that no queued resource knows."""
    full = f"projects/project/locations/{zone}/nodes/{name}"
    self._make_nodes(
      [full], {"acceleratorType": accelerator_type, "runtimeVersion": "v", "labels": labels}
    )
    self.nodes[name].state = "READY"

  def _make_nodes(self, names: list[str], spec: dict[str, Any]) -> None:
    coordinator, workers = f"127.0.0.1:{free_port()}", _hosts_of(spec["acceleratorType"])
    for number, name in enumerate(names):
      self._count += 1
      hosts = []
      for worker in range(workers):
        environment = (
          self._google
          | self._host_environment
          | {
            "JAX_COORDINATOR_ADDRESS": coordinator,
            "JAX_NUM_PROCESSES": str(workers * len(names)),
            "JAX_PROCESS_ID": str(workers * number + worker),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
          }
        )
        if len(names) > 1:
          environment["MEGASCALE_SLICE_ID"] = str(number)
        hosts.append(Host(self._root, f"127.{self._count}.0.{worker + 1}", worker, environment))
      self.nodes[name.rpartition("/")[2]] = Node(name, spec, hosts)

  def _advance(self, resource: Resource) -> None:
    """Moves a queued resource on by one state."""
    if resource.state not in ("ACTIVE", "SUSPENDING", "SUSPENDED", "DELETING", "FAILED"):
      if self._clock() > resource.expires:
        self.fail(
          resource.name.rpartition("/")[2],
          "The queued resource request was not fulfilled before its 'valid until' time.",
        )
      elif resource.state == "WAITING_FOR_RESOURCES" and not self.grants:
        return
    if not resource.ahead:
      return
    resource.state = resource.ahead.pop(0)
    if resource.state == "PROVISIONING":
      self._make_nodes(resource.nodes, resource.request["tpu"]["nodeSpec"][0]["node"])
    elif resource.state == "ACTIVE":
      for name in resource.nodes:
        node = self.nodes[name.rpartition("/")[2]]
        node.state = "READY" if node.state == "CREATING" else node.state
    elif resource.state == "GONE":
      del self.resources[resource.name.rpartition("/")[2]]

  def _remove_node(self, name: str) -> None:
    for host in self.nodes.pop(name).hosts:
      host.remove()

  # What the API is asked.

  def answer(
    self, method: str, path: str, query: dict[str, str], body: dict[str, Any]
  ) -> dict[str, Any]:
    """Returns the answer to a request, or raises ApiError."""
    if path.startswith("/control/"):
      getattr(self, path.removeprefix("/control/"))(**body)
      return {}
    with self._lock:
      line = f"{method} {path}"
      self.calls.append(line)
      refusal = next(
        (
          refusal
          for refusal in self._refusals
          if re.search(refusal.match, line) and refusal.times != 0
        ),
        None,
      )
      if refusal and refusal.times:
        refusal.times -= 1
      if refusal and not refusal.too_late:
        raise refusal.error
      for wanted, pattern, handle in _ROUTES:
        match = re.fullmatch(pattern, path)
        if match and method == wanted:
          answer = handle(self, Request(query, body), **match.groupdict())
          if refusal:
            raise refusal.error
          return answer
      raise ApiError(404, "NOT_FOUND", f"{line} is not part of this cloud")

  def _find(self, kind: str, short: str, full: str) -> Any:
    found = getattr(self, kind).get(short)
    if not found or found.name != full:
      raise ApiError(404, "NOT_FOUND", f"Resource '{full}' was not found")
    return found

  def _create(self, request: Request, parent: str) -> dict[str, Any]:
    name, body = request.query["queuedResourceId"], request.body
    if name in self.resources:
      raise ApiError(
        409, "ALREADY_EXISTS", f"Resource '{parent}/queuedResources/{name}' already exists"
      )
    spec = body["tpu"]["nodeSpec"][0]
    _hosts_of(spec["node"]["acceleratorType"])
    several = spec.get("multisliceParams") or spec.get("multiNodeParams")
    nodes = (
      [spec["nodeId"]]
      if not several
      else [
        f"{several.get('nodeIdPrefix', name)}-{number}" for number in range(several["nodeCount"])
      ]
    )
    taken = [node for node in nodes if node in self.nodes]
    if taken:
      raise ApiError(409, "ALREADY_EXISTS", f"Resource '{parent}/nodes/{taken[0]}' already exists")
    duration = body.get("queueingPolicy", {}).get("validUntilDuration")
    expires = self._clock() + float(duration.removesuffix("s")) if duration else float("inf")
    self.resources[name] = Resource(
      f"{parent}/queuedResources/{name}",
      body,
      [f"{parent}/nodes/{node}" for node in nodes],
      expires,
      list(QUEUE),
    )
    return self._operation(parent, self.resources[name].json())

  def _operation(self, parent: str, response: dict[str, Any] | None = None) -> dict[str, Any]:
    self._count += 1
    name = f"{parent}/operations/operation-{self._count}"
    self._operations[name] = {"name": name, "done": True, "response": response or {}}
    return self._operations[name]

  def _get_operation(self, _, parent: str, name: str) -> dict[str, Any]:
    return self._operations[f"{parent}/operations/{name}"]

  def _describe(self, _, parent: str, name: str) -> dict[str, Any]:
    resource = self._find("resources", name, f"{parent}/queuedResources/{name}")
    self._advance(resource)
    return self._find("resources", name, resource.name).json()

  def _list(self, _, parent: str) -> dict[str, Any]:
    for resource in [
      resource for resource in self.resources.values() if resource.name.startswith(f"{parent}/")
    ]:
      self._advance(resource)
    return {
      "queuedResources": [
        resource.json()
        for resource in self.resources.values()
        if resource.name.startswith(f"{parent}/")
      ]
    }

  def _delete(self, request: Request, parent: str, name: str) -> dict[str, Any]:
    resource = self._find("resources", name, f"{parent}/queuedResources/{name}")
    nodes = [
      short for short in (full.rpartition("/")[2] for full in resource.nodes) if short in self.nodes
    ]
    if (
      request.query.get("force", "").lower() != "true"
      and resource.state not in ("SUSPENDED", "FAILED")
      and nodes
    ):
      raise ApiError(
        400,
        "FAILED_PRECONDITION",
        f"Queued resource {name} in state {resource.state} has nodes; delete "
        "them first or use force",
      )
    for node in nodes:
      self._remove_node(node)
    resource.state, resource.initiator, resource.ahead = "DELETING", "USER", ["DELETING", "GONE"]
    return self._operation(parent)

  def _describe_node(self, _, parent: str, name: str) -> dict[str, Any]:
    return self._find("nodes", name, f"{parent}/nodes/{name}").json()

  def _list_nodes(self, _, parent: str) -> dict[str, Any]:
    return {
      "nodes": [node.json() for node in self.nodes.values() if node.name.startswith(f"{parent}/")]
    }

  def _patch_node(self, request: Request, parent: str, name: str) -> dict[str, Any]:
    node = self._find("nodes", name, f"{parent}/nodes/{name}")
    node.spec = node.spec | {
      field: request.body.get(field) for field in request.query["updateMask"].split(",")
    }
    return self._operation(parent, node.json())

  def _delete_node(self, _, parent: str, name: str) -> dict[str, Any]:
    full = self._find("nodes", name, f"{parent}/nodes/{name}").name
    self._remove_node(name)
    for resource in self.resources.values():
      if full in resource.nodes:
        resource.state, resource.initiator, resource.ahead = "SUSPENDING", "USER", ["SUSPENDED"]
    return self._operation(parent)

  def _guest_attributes(self, request: Request, parent: str, name: str) -> dict[str, Any]:
    hosts = self._find("nodes", name, f"{parent}/nodes/{name}").hosts
    numbers = [int(worker) for worker in request.body.get("workerIds", []) if worker] or range(
      len(hosts)
    )
    items = [
      [
        {"namespace": "hostkeys", "key": "ssh-ed25519", "value": f"AAAA{hosts[number].address}"},
        {"namespace": "guestInventory", "key": "hostname", "value": f"t1v-n-{name}-w-{number}"},
      ]
      for number in numbers
    ]
    return {"guestAttributes": [{"queryValue": {"items": entry}} for entry in items]}

  def _project(self, _, name: str) -> dict[str, Any]:
    return {"name": name, "commonInstanceMetadata": {"items": []}}

  def _secret(self, _, name: str) -> dict[str, Any]:
    value = f"the secret {name.rpartition('/')[2]}"
    return {
      "name": f"{name}/versions/1",
      "payload": {"data": base64.b64encode(value.encode()).decode()},
    }


_PARENT = r"/v2(?:alpha1)?/(?P<parent>projects/[^/]+/locations/[^/]+)"
_NAME = r"/(?P<name>[^/:]+)"
_ROUTES = (
  ("POST", f"{_PARENT}/queuedResources", Cloud._create),
  ("GET", f"{_PARENT}/queuedResources", Cloud._list),
  ("GET", f"{_PARENT}/queuedResources{_NAME}", Cloud._describe),
  ("DELETE", f"{_PARENT}/queuedResources{_NAME}", Cloud._delete),
  ("GET", f"{_PARENT}/operations{_NAME}", Cloud._get_operation),
  ("GET", f"{_PARENT}/nodes", Cloud._list_nodes),
  ("GET", f"{_PARENT}/nodes{_NAME}", Cloud._describe_node),
  ("PATCH", f"{_PARENT}/nodes{_NAME}", Cloud._patch_node),
  ("DELETE", f"{_PARENT}/nodes{_NAME}", Cloud._delete_node),
  ("POST", f"{_PARENT}/nodes{_NAME}:getGuestAttributes", Cloud._guest_attributes),
  ("GET", rf"/compute/v1/projects{_NAME}", Cloud._project),
  ("GET", r"/v1/(?P<name>projects/[^/]+/secrets/[^/]+)/versions/latest:access", Cloud._secret),
)


def _hosts_of(accelerator_type: str) -> int:
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


class _Api(http.server.BaseHTTPRequestHandler):
  def _answer(self):
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query))
    body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
    try:
      code, answer = (
        200,
        self.server.owner.answer(self.command, urllib.parse.unquote(url.path), query, body),
      )
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


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "folder", type=pathlib.Path, help="is made; its hosts and what they wrote stay"
  )
  folder = parser.parse_args().folder
  folder.mkdir(parents=True)
  with Cloud(folder) as cloud:
    print(
      "".join(f"export {name}={shlex.quote(value)}\n" for name, value in cloud.environment.items()),
      flush=True,
    )
    print(
      f'# curl {cloud.url.removeprefix("http://")}/control/preempt -d \'{{"name": "RUN"}}\'',
      flush=True,
    )
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    try:
      signal.pause()
    except KeyboardInterrupt:
      pass


if __name__ == "__main__":
  main()
