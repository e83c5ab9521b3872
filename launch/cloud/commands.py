"""Every gcloud line that the launcher can emit, as lists of words; nothing here runs anything.

The commands are GA where one exists. `--zone` and `--project` are always given, because gcloud
would fill them in from its configuration. Lines are joined by shlex for display, and never pass
through a shell.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import shlex

from launch.cloud.settings import LAUNCHER, Place, Settings

Line = list[str]

_TPUS = ["gcloud", "compute", "tpus"]


def _where(place: Place) -> Line:
  return [f"--project={place.project}", f"--zone={place.zone}", "--quiet"]


def _capacity(settings: Settings, limit: float | None) -> Line:
  if settings.capacity == "flex-start":
    return ["--provisioning-model=flex-start", f"--max-run-duration={max(60, round(limit or 0))}s"]
  if settings.reservation:
    return [f"--reservation={settings.reservation}"]
  return [] if settings.capacity == "on-demand" else [f"--{settings.capacity}"]


def _project(place: Place) -> Line:
  return [f"--project={place.project}", "--quiet"]


def create(
  settings: Settings, attempt: int, wait: float, boot: str, limit: float | None = None
) -> Line:
  """Request the slices of an attempt; without --async, for the error of a request that fails.

  Args:
    settings: of the run.
    attempt: number of the attempt.
    wait: seconds in the queue after which the request expires.
    boot: path of the startup script; see launch/cloud/boot.py.
    limit: seconds for which the slice may exist; the service keeps that of flex-start itself.
  """
  labels = [
    ("run", settings.run),
    ("owner", settings.owner),
    ("attempt", str(attempt)),
    ("launcher", LAUNCHER),
    *settings.labels,
  ]
  # Only what GA lacks is asked of alpha, whose --spot sends a wrong request.
  flex = settings.capacity == "flex-start"
  alpha = settings.autocheckpoint or settings.reservation or flex
  track = ["gcloud", "alpha", "compute", "tpus"] if alpha else _TPUS
  nodes = (
    [f"--node-id={settings.run}"]
    if settings.slices == 1
    else [f"--node-count={settings.slices}", f"--node-prefix={settings.run}"]
  )
  named = [
    ("service-account", settings.service_account),
    ("network", settings.network),
    ("subnetwork", settings.subnetwork),
  ]
  return [
    *track,
    "queued-resources",
    "create",
    settings.run,
    *nodes,
    f"--accelerator-type={settings.type}",
    f"--runtime-version={settings.runtime_version}",
    *_capacity(settings, limit),
    *(f"--{name}={value}" for name, value in named if value),
    *(["--internal-ips"] if settings.internal_ips else []),
    *(["--autocheckpoint-enabled"] if settings.autocheckpoint else []),
    "--labels=" + ",".join(f"{key}={value}" for key, value in labels),
    f"--valid-until-duration={max(60, round(wait))}s",
    f"--metadata-from-file=startup-script={boot}",
    *_where(settings.place),
  ]


def describe(place: Place) -> Line:
  """Read the queued resource of a run."""
  return [*_TPUS, "queued-resources", "describe", place.run, "--format=json", *_where(place)]


def list_queued(place: Place) -> Line:
  """Read all queued resources of a zone."""
  return [*_TPUS, "queued-resources", "list", "--format=json", *_where(place)]


def list_nodes(place: Place) -> Line:
  """Read all nodes of a zone: one call for any number of slices."""
  return [*_TPUS, "tpu-vm", "list", "--format=json", *_where(place)]


def delete(place: Place) -> Line:
  """Remove a queued resource with its nodes; without --force an ACTIVE one stays."""
  return [*_TPUS, "queued-resources", "delete", place.run, "--force", "--async", *_where(place)]


def delete_node(place: Place, node: str) -> Line:
  """Remove a node that no queued resource holds any more."""
  return [*_TPUS, "tpu-vm", "delete", node, "--async", *_where(place)]


def _hosts(slice_number: int | None, worker: int | None) -> Line:
  # Never a range of workers: if all of a range fail, gcloud exits with 0.
  return [
    f"--node={'all' if slice_number is None else slice_number}",
    f"--worker={'all' if worker is None else worker}",
  ]


# For sh -c as root: RUN NAME URL SHA HOME VERB ...; its exit codes are those of AGENT_TROUBLE.
_AGENT_STEPS = (
  'd="${TPU_STATE:-/var/lib/tpu}/$1"; n="$2"; f="$d/$2"; u="$3"; s="$4"; e="$5/tpu-$1.env"',
  'shift 5; umask 077; mkdir -p "$d" && cd "$d" || exit 80',
  'whole() { echo "$s  $1" | sha256sum --check --status 2>/dev/null; }',
  'bad() { rm -f "$f.$$"; exit "$1"; }',
  'if ! whole "$f"; then gcloud storage cp "$u/launch/$n" "$f.$$" --quiet >&2 || bad 81',
  'whole "$f.$$" || bad 82; mv "$f.$$" "$f"; fi',
  'if [ -f "$e" ]; then install -m 600 "$e" env && rm -f "$e"; fi',
  'python3 "$f" "$u" "$@"',
)
_AGENT = "; ".join(_AGENT_STEPS)
AGENT_TROUBLE = {
  "80": "it cannot write to /var/lib/tpu",
  "81": "it cannot fetch its agent: may its service account read the bucket?",
  "82": "the agent in the bucket is not the one of this launcher: somebody else has written there",
  "1": "it broke, or sudo is not allowed to this login (OS Login: roles/compute.osAdminLogin)",
}


def agent(place: Place, name: str, sha: str, *words: str) -> str:
  """Returns the command for hosts: run a verb of the agent as root, from any login.

  Args:
    place: of the run.
    name: of the agent in the bucket, from where a host fetches it that does not have it.
    sha: its SHA-256, checked before each use.
    *words: verb and argument.
  """
  fixed, verb = shlex.join([place.run, name, place.url, sha]), shlex.join(words)
  return (
    f'sudo -n sh -c {shlex.quote(_AGENT)} sh {fixed} "$HOME" {verb} || '
    'echo "tpu-agent-failed $? $(hostname)"'
  )


def ssh(
  settings: Settings, command: str, slice_number: int | None = None, worker: int | None = None
) -> Line:
  """Run a command on hosts, 64 at a time; gcloud repeats it after a lost connection."""
  return [
    *_TPUS,
    "queued-resources",
    "ssh",
    settings.run,
    *_hosts(slice_number, worker),
    "--batch-size=64",
    "--ssh-flag=-oBatchMode=yes",
    "--ssh-flag=-oConnectTimeout=15",
    "--ssh-flag=-oServerAliveInterval=15",
    f"--command={command}",
    *(["--tunnel-through-iap"] if settings.iap else []),
    *_where(settings.place),
  ]


def copy_environment(settings: Settings) -> Line:
  """Copy the file of secrets to every host, not by command line, label, metadata or bucket."""
  return [
    *_TPUS,
    "queued-resources",
    "scp",
    settings.env_file,
    f"{settings.run}:tpu-{settings.run}.env",
    *_hosts(None, None),
    *(["--tunnel-through-iap"] if settings.iap else []),
    *_where(settings.place),
  ]


def upload(place: Place, path: str, url: str, generation: str | None = None) -> Line:
  """Copy a file to the bucket; with `generation` only over that one ("0": only if none exists)."""
  condition = [f"--if-generation-match={generation}"] if generation is not None else []
  return [
    "gcloud",
    "storage",
    "cp",
    path,
    url,
    *condition,
    "--print-created-message",
    f"--project={place.project}",
    "--quiet",
  ]


def read(place: Place, url: str) -> Line:
  """Print an object, or all that match a pattern."""
  return ["gcloud", "storage", "cat", url, f"--project={place.project}", "--quiet"]


def object_generation(place: Place, url: str) -> Line:
  """Read the current generation of an object, and when it was written."""
  return [
    "gcloud",
    "storage",
    "objects",
    "describe",
    url,
    "--format=json(generation,creation_time)",
    f"--project={place.project}",
    "--quiet",
  ]


def list_objects(place: Place, url: str) -> Line:
  """List the objects that match a pattern."""
  return ["gcloud", "storage", "ls", url, f"--project={place.project}", "--quiet"]


# The lines of doctor.


def version() -> Line:
  """Read the version of gcloud, offline."""
  return ["gcloud", "version", "--format=json"]


def account() -> Line:
  """Read which account is logged in."""
  return ["gcloud", "auth", "list", "--filter=status:ACTIVE", "--format=json"]


def default_project() -> Line:
  """Read the default project of gcloud."""
  return ["gcloud", "config", "get", "project"]


def default_account() -> Line:
  """Read the account that gcloud uses."""
  return ["gcloud", "config", "get", "account"]


def services(place: Place) -> Line:
  """List the enabled APIs of a project."""
  return [
    "gcloud",
    "services",
    "list",
    "--format=json(config.name)",
    "--enabled",
    f"--project={place.project}",
    "--quiet",
  ]


def bucket(place: Place) -> Line:
  """Read the location of a bucket."""
  return [
    "gcloud",
    "storage",
    "buckets",
    "describe",
    "/".join(place.bucket.split("/")[:3]),
    "--format=json",
    f"--project={place.project}",
    "--quiet",
  ]


def bucket_policy(place: Place) -> Line:
  """Read the permissions on a bucket."""
  return [
    "gcloud",
    "storage",
    "buckets",
    "get-iam-policy",
    "/".join(place.bucket.split("/")[:3]),
    "--format=json",
    f"--project={place.project}",
    "--quiet",
  ]


def project_policy(place: Place) -> Line:
  """Read the permissions in a project."""
  return ["gcloud", "projects", "get-iam-policy", place.project, "--format=json", "--quiet"]


def may_delete(place: Place, account: str) -> Line:
  """Ask whether a service account may delete TPUs, by all policies of project and organization."""
  return [
    "gcloud",
    "policy-intelligence",
    "troubleshoot-policy",
    "iam",
    f"//cloudresourcemanager.googleapis.com/projects/{place.project}",
    "--permission=tpu.nodes.delete",  # that of queued resources, too
    f"--principal-email={account}",
    "--format=json(overallAccessState)",
    *_project(place),
  ]


def project_number(place: Place) -> Line:
  """Read the number in the name of the default service account."""
  return [
    "gcloud",
    "projects",
    "describe",
    place.project,
    "--format=json(projectNumber)",
    "--quiet",
  ]


def firewall(place: Place) -> Line:
  """List the firewall rules of a project."""
  return ["gcloud", "compute", "firewall-rules", "list", "--format=json", *_project(place)]


def account_policy(place: Place, account: str) -> Line:
  """Read who may let machines act as a service account."""
  line = ["gcloud", "iam", "service-accounts", "get-iam-policy", account, "--format=json"]
  return [*line, *_project(place)]


def accelerator_types(place: Place) -> Line:
  """List the accelerator types of a zone."""
  return [*_TPUS, "accelerator-types", "list", "--format=json", *_where(place)]


def quotas(place: Place) -> Line:
  """List the TPU quotas of a project."""
  return [
    "gcloud",
    "beta",
    "quotas",
    "info",
    "list",
    "--service=tpu.googleapis.com",
    f"--project={place.project}",
    "--format=json",
    "--quiet",
  ]


def shell(line: Line) -> str:
  """Returns a line ready to paste into a shell."""
  return shlex.join(line)


def every_line() -> Iterator[Line]:
  """Yields each line in each variant, with values that are hard to quote."""
  place = Place("run-1", "my-project", "us-central2-b", "gs://my-bucket/some/folder")
  base = Settings(
    place, owner="me", type="v4-32", runtime_version="tpu-ubuntu2204-base", max_seconds=3600
  )
  for slices in (1, 2):
    for capacity in ("on-demand", "spot", "reserved", "flex-start"):
      for autocheckpoint in (False, True) if capacity != "spot" else (False,):
        settings = dataclasses.replace(
          base, slices=slices, capacity=capacity, autocheckpoint=autocheckpoint
        )
        yield create(settings, 3, 6 * 3600, "/tmp/a b/boot.sh", 3600)
        if capacity == "reserved":
          yield create(dataclasses.replace(settings, reservation="one"), 1, 60, "boot.sh")
        yield create(
          dataclasses.replace(
            settings,
            service_account="sa@my-project.iam.gserviceaccount.com",
            network="net",
            subnetwork="sub",
            internal_ips=True,
            labels=(("team", "vision"),),
          ),
          1,
          1,
          "boot.sh",
        )
  yield from (
    describe(place),
    list_queued(place),
    list_nodes(place),
    delete(place),
    delete_node(place, "run-1-0"),
  )
  for iap in (False, True):
    settings = dataclasses.replace(base, iap=iap, env_file="/home/a b/my $(secret)'s.env")
    for hosts in ((None, None), (0, 0), (1, 17)):
      for words in (
        ("status",),
        ("end", "3"),
        ("start", "3"),
        ("stop",),
        ("stacks",),
        ("tail", "30"),
        ("follow", "30"),
      ):
        yield ssh(settings, agent(place, "agent-01.pyz", "0123456789ab", *words), *hosts)
    yield copy_environment(settings)
  for generation in (None, "0", "1764000000000000"):
    yield upload(place, "/tmp/a b/run.json", f"{place.url}/run.json", generation)
  yield from (
    read(place, f"{place.url}/run.json"),
    object_generation(place, f"{place.url}/run.json"),
    list_objects(place, f"{place.url}/logs/**"),
  )
  yield from (
    version(),
    account(),
    default_project(),
    default_account(),
    services(place),
    bucket(place),
    bucket_policy(place),
    project_policy(place),
    may_delete(place, "sa@my-project.iam.gserviceaccount.com"),
    project_number(place),
    firewall(place),
    account_policy(place, "sa@my-project.iam.gserviceaccount.com"),
    accelerator_types(place),
    quotas(place),
  )
