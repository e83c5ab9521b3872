"""Google's side of a launch, on loopback: real gcloud manages TPU slices whose hosts are folders.

    python -m tests.launch.fake_cloud FOLDER

It prints what to export, and serves until Ctrl-C: the TPU API (v2, v2alpha1), the part of Compute
Engine that `gcloud compute tpus ... ssh` needs, one version of every secret, and a metadata server
per host. `ssh`, `scp`, `ssh-keygen` and `ssh-add` are programs of FOLDER/bin (see fake_ssh.py) that
run a command in the folder of a host, with HOME set to it. It follows the published schema, not the
service's timing: a queued resource advances by one state each time that it is read. Every public
method of Cloud that changes something can also be called by HTTP:

    curl 127.0.0.1:PORT/control/preempt -d '{"name": "RUN"}'

Buckets are served by tests/trainer/bucket_server.py.
"""

import argparse
from collections.abc import Callable
import contextlib
import os
import pathlib
import re
import shlex
import signal
import threading
import time
from typing import Any

from tests.launch import fake_services
from tests.launch.fake_api import Api, ApiError, Node, Refusal, Request, Resource, hosts_of
from tests.launch.fake_hosts import Host, install, serve
from tests.launch.fake_services import NAME
from tests.trainer.shared import free_port

QUEUE = ("ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
_SERVICE = "token-of-the-service-account"
OFFLINE = "http://127.0.0.1:1"  # nobody listens there


class Cloud:
  """All projects and zones.

  Attributes:
    calls: "METHOD /path" of each request, in their order.
    resources: the queued resources that exist, by their short name.
    nodes: the nodes that exist, by their short name.
    bills: every node that there ever was.
    grants: whether a request ever leaves the queue.
    may_delete: whether the service account of hosts may delete queued resources.
    explains: whether whoever launches may read the policies by which that is so.
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
      clock: the time to which --valid-until-duration is added.
    """
    self._root, self._host_environment, self._clock = root.resolve(), host_environment or {}, clock
    self._lock = threading.RLock()
    self._count = 0
    self._refusals: list[Refusal] = []
    self._operations: dict[str, dict[str, Any]] = {}
    self.calls: list[str] = []
    self.resources: dict[str, Resource] = {}
    self.nodes: dict[str, Node] = {}
    self.bills: list[Node] = []
    self.grants = self.may_delete = self.explains = True
    self._failure: dict[str, Any] | None = None
    self._server = serve(Api, self)
    self.url = f"http://127.0.0.1:{self._server.server_port}"
    install(self._root)
    home = self._root / "home"
    (home / "token").write_text("token")
    self._google = {
      "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": f"{self.url}/",
      "CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE": f"{self.url}/compute/v1/",
      **{
        f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{name}": f"{self.url}/"
        for name in ("SECRETMANAGER", "CLOUDRESOURCEMANAGER", "POLICYTROUBLESHOOTER")
      },
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
    """Returns the number of requests that match a regular expression for "METHOD /path"."""
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

  def fail_create(self, code: int, message: str) -> None:
    """Accepts the next create, and lets its operation fail."""
    self._failure = {"code": code, "message": message}

  def grant(self, name: str) -> None:
    """Brings a request out of the queue, whether or not anybody reads it."""
    with self._lock:
      self.grants, resource = True, self.resources[name]
      while resource.state != "ACTIVE":
        self._advance(resource)

  def reboot(self, name: str) -> None:
    """Boots all hosts of a node."""
    for host in self.nodes[name].hosts:
      host.boot()

  def paid(self) -> float:
    """Returns the seconds that nodes have existed."""
    return sum((node.removed or self._clock()) - node.created for node in self.bills)

  def preempt(self, name: str, notice: float = 0.0, stale: int = 0) -> None:
    """Takes the nodes of a queued resource away.

    Args:
      name: of the queued resource.
      notice: seconds between the notice, in the metadata and as SIGTERM, and the end.
      stale: for how many more reads the queued resource stays ACTIVE.
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
        node.removed = self._clock()
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
    """Sets state and health of a node."""
    node = self.nodes[name]
    node.state, node.health = state or node.state, health or node.health

  def set_link(self, name: str, worker: int, link: str, dead: bool = False) -> None:
    """Sets the link of a host ("up", "down", "hung"); a dead one has lost its processes as well."""
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
    coordinator, workers = f"127.0.0.1:{free_port()}", hosts_of(spec["acceleratorType"])
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
        address, metadata = f"127.{self._count}.0.{worker + 1}", spec.get("metadata", {})
        hosts.append(Host(self._root, address, worker, environment, metadata, _SERVICE))
      node = Node(name, spec, hosts, created=self._clock())
      self.nodes[name.rpartition("/")[2]] = node
      self.bills.append(node)

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
        if node.state == "CREATING":
          node.state = "READY"
          for host in node.hosts:
            host.boot()
    elif resource.state == "GONE":
      del self.resources[resource.name.rpartition("/")[2]]

  def _remove_node(self, name: str) -> None:
    node = self.nodes.pop(name)
    node.removed = node.removed or self._clock()
    for host in node.hosts:
      host.remove()

  # What the API is asked.

  def answer(self, method: str, path: str, request: Request) -> dict[str, Any]:
    """Returns the answer to a request, or raises ApiError."""
    if path.startswith("/control/"):
      getattr(self, path.removeprefix("/control/"))(**request.body)
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
      if method == "DELETE" and request.caller == _SERVICE and not self.may_delete:
        raise ApiError(403, "PERMISSION_DENIED", f"Permission 'tpu.nodes.delete' denied on {path}")
      for wanted, pattern, handle in _ROUTES:
        match = re.fullmatch(pattern, path)
        if match and method == wanted:
          answer = handle(self, request, **match.groupdict())
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
    hosts_of(spec["node"]["acceleratorType"])
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
    if self._failure:
      failure, self._failure = self._failure, None
      return self._operation(parent, error=failure)
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

  def _operation(
    self,
    parent: str,
    response: dict[str, Any] | None = None,
    error: dict[str, Any] | None = None,
  ) -> dict[str, Any]:
    self._count += 1
    name = f"{parent}/operations/operation-{self._count}"
    self._operations[name] = {"name": name, "done": True} | (
      {"error": error} if error else {"response": response or {}}
    )
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


_PARENT = r"/v2(?:alpha1)?/(?P<parent>projects/[^/]+/locations/[^/]+)"
_ROUTES = (
  ("POST", f"{_PARENT}/queuedResources", Cloud._create),
  ("GET", f"{_PARENT}/queuedResources", Cloud._list),
  ("GET", f"{_PARENT}/queuedResources{NAME}", Cloud._describe),
  ("DELETE", f"{_PARENT}/queuedResources{NAME}", Cloud._delete),
  ("GET", f"{_PARENT}/operations{NAME}", Cloud._get_operation),
  ("GET", f"{_PARENT}/nodes", Cloud._list_nodes),
  ("GET", f"{_PARENT}/nodes{NAME}", Cloud._describe_node),
  ("PATCH", f"{_PARENT}/nodes{NAME}", Cloud._patch_node),
  ("DELETE", f"{_PARENT}/nodes{NAME}", Cloud._delete_node),
  ("POST", f"{_PARENT}/nodes{NAME}:getGuestAttributes", Cloud._guest_attributes),
  *fake_services.ROUTES,
)


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
    with contextlib.suppress(KeyboardInterrupt):
      signal.pause()


if __name__ == "__main__":
  main()
