"""What the fake cloud of fake_cloud.py answers beside the TPU API: projects, policies, secrets."""

import base64
from typing import TYPE_CHECKING, Any

from tests.launch.fake_api import Request

if TYPE_CHECKING:
  from tests.launch.fake_cloud import Cloud

Answer = dict[str, Any]


def _project(cloud: "Cloud", request: Request, name: str) -> Answer:
  del cloud, request
  return {"name": name, "commonInstanceMetadata": {"items": []}}


def _resource_manager(cloud: "Cloud", request: Request, name: str) -> Answer:
  del cloud, request
  return {"projectId": name, "projectNumber": "7"}


def _policy(cloud: "Cloud", request: Request, name: str) -> Answer:
  del request, name
  if not cloud.may_delete or not cloud.explains:
    return {}
  member = "serviceAccount:7-compute@developer.gserviceaccount.com"
  return {"bindings": [{"role": "roles/editor", "members": [member]}]}


def _troubleshoot(cloud: "Cloud", request: Request) -> Answer:
  del request
  state = "CAN_ACCESS" if cloud.may_delete else "CANNOT_ACCESS"
  return {"overallAccessState": state if cloud.explains else "UNKNOWN_INFO"}


def _secret(cloud: "Cloud", request: Request, name: str) -> Answer:
  del cloud, request
  value = f"the secret {name.rpartition('/')[2]}"
  data = base64.b64encode(value.encode()).decode()
  return {"name": f"{name}/versions/1", "payload": {"data": data}}


NAME = r"/(?P<name>[^/:]+)"
# Method, regular expression of the path, and who answers with its groups.
ROUTES = (
  ("GET", rf"/compute/v1/projects{NAME}", _project),
  ("GET", rf"/v1/projects{NAME}", _resource_manager),
  ("POST", rf"/v1/projects{NAME}:getIamPolicy", _policy),
  ("POST", r"/v3/iam:troubleshoot", _troubleshoot),
  ("GET", r"/v1/(?P<name>projects/[^/]+/secrets/[^/]+)/versions/latest:access", _secret),
)
