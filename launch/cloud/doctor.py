"""Checks account, project, zone, bucket and service account, with the commands that fix them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import dataclasses
import json
import re
import subprocess
import sys
from typing import Any

from launch.cloud import commands
from launch.cloud.gcloud import Gcloud, GcloudError
from launch.cloud.look import queued_of
from launch.cloud.settings import Place, UsageError

_TESTED = 528  # version of the Google Cloud CLI whose parser accepts all lines of commands.py
_SERVICES = tuple(
  f"{name}.googleapis.com"
  for name in ("tpu", "compute", "storage", "iam", "cloudresourcemanager", "cloudquotas")
)
_SECRETS = "secretmanager.googleapis.com"  # only for `up --secret`
_DEFAULT_ACCOUNT = "PROJECT_NUMBER-compute@developer.gserviceaccount.com"
_REMOVERS = {"roles/tpu.admin", "roles/owner", "roles/editor"}  # roles that may delete TPUs
_IAP = "35.235.240.0/20"  # from where Identity-Aware Proxy reaches hosts


@dataclasses.dataclass(frozen=True)
class Wanted:
  """What a run would need; type and service account may be ""."""

  place: Place
  owner: str
  type: str
  service_account: str


@dataclasses.dataclass(frozen=True)
class Finding:
  """The result of one check; `advice` is what to do if it is not good."""

  about: str
  good: bool
  what: str
  advice: str = ""


def lines(wanted: Wanted) -> list[commands.Line]:
  """Returns the lines that `run` runs."""
  place = wanted.place
  return [
    commands.version(),
    commands.account(),
    commands.services(place),
    commands.accelerator_types(place),
    commands.quotas(place),
    commands.bucket(place),
    commands.bucket_policy(place),
    commands.project_number(place),
    commands.project_policy(place),
    commands.account_policy(place, wanted.service_account or _DEFAULT_ACCOUNT),
    commands.firewall(place),
    commands.list_queued(place),
    commands.list_nodes(place),
  ]


def run(wanted: Wanted, as_json: bool, gcloud: Gcloud | None = None) -> int:
  """Print all findings; return 0 if all are good, else 1."""
  gcloud = gcloud or Gcloud(60, lambda line: print(line, file=sys.stderr))
  bad = 0
  for finding in findings(wanted, gcloud):
    bad += not finding.good
    if as_json:
      print(json.dumps(dataclasses.asdict(finding)), flush=True)
    else:
      print(f"{'ok ' if finding.good else 'BAD'} {finding.about:16} {finding.what}", flush=True)
      if finding.advice:
        print(f"    {finding.advice}", flush=True)
  return int(bad > 0)


def findings(wanted: Wanted, gcloud: Gcloud) -> Iterator[Finding]:
  """Make one check after the other."""
  checks: list[tuple[str, Callable[[Wanted, Gcloud], Iterator[Finding]]]] = [
    ("gcloud", _version),
    ("account", _account),
    ("APIs", _services),
    ("accelerator", _accelerator),
    ("quota", _quota),
    ("bucket", _bucket),
    ("service account", _service_account),
    ("actAs", _act_as),
    ("firewall", _firewall),
    ("ssh", _ssh),
    ("left over", _stale),
  ]
  for about, check in checks:
    try:
      yield from check(wanted, gcloud)
    except GcloudError as error:
      if error.kind in ("unavailable", "timeout"):
        yield Finding("network", False, f"Google cannot be reached from here: {error}")
        return
      advice = {
        "auth": "gcloud auth login",
        "permission": f"you lack the permission for: {commands.shell(error.line)}",
      }.get(error.kind, "")
      yield Finding(about, False, f"could not be checked: {error}", advice)
      if error.kind in ("auth", "not_installed"):
        return


def _version(wanted: Wanted, gcloud: Gcloud) -> Iterator[Finding]:
  del wanted
  found = gcloud.json(commands.version()).get("Google Cloud SDK", "")
  number = int(found.split(".")[0]) if found.split(".")[0].isdigit() else 0
  good = number >= _TESTED
  yield Finding(
    "gcloud",
    good,
    f"Google Cloud SDK {found}",
    "" if good else f"older than {_TESTED}, the tested version: gcloud components update",
  )


def _account(wanted: Wanted, gcloud: Gcloud) -> Iterator[Finding]:
  del wanted
  accounts = gcloud.json(commands.account()) or []
  if accounts:
    yield Finding("account", True, accounts[0].get("account", "?"))
  else:
    yield Finding("account", False, "no account is logged in", "gcloud auth login")


def _services(wanted: Wanted, gcloud: Gcloud) -> Iterator[Finding]:
  enabled = {
    entry.get("config", {}).get("name")
    for entry in gcloud.json(commands.services(wanted.place)) or []
  }
  missing = [name for name in _SERVICES if name not in enabled]
  yield Finding(
    "APIs",
    not missing,
    f"not enabled: {', '.join(missing)}" if missing else "enabled: " + ", ".join(_SERVICES),
    f"gcloud services enable {' '.join(missing)} --project={wanted.place.project}"
    if missing
    else "",
  )
  if _SECRETS not in enabled:
    what = f"not enabled: {_SECRETS}, which only --secret needs"
    yield Finding("APIs", True, f"{what}: gcloud services enable {_SECRETS}")


def _accelerator(wanted: Wanted, gcloud: Gcloud) -> Iterator[Finding]:
  if not wanted.type:
    return
  found = gcloud.json(commands.accelerator_types(wanted.place)) or []
  names = sorted({entry.get("type") or entry["name"].rsplit("/", 1)[-1] for entry in found})
  good = wanted.type in names
  yield Finding(
    "accelerator",
    good,
    f"{wanted.type} {'is' if good else 'is not'} offered in {wanted.place.zone}",
    ""
    if good
    else "offered: "
    + (", ".join(names) or "none; use a zone of https://cloud.google.com/tpu/docs/regions-zones"),
  )


def _quota(wanted: Wanted, gcloud: Gcloud) -> Iterator[Finding]:
  family = wanted.type.rpartition("-")[0]
  word = {"v5litepod": "v5slitepod"}.get(family, family)
  found = {}
  for entry in gcloud.json(commands.quotas(wanted.place)) or []:
    name = entry.get("quotaId", "")
    for dimension in entry.get("dimensionsInfos", []):
      value = int(dimension.get("details", {}).get("value", 0))
      if (
        wanted.place.zone in dimension.get("applicableLocations", [])
        and "tpu" in name.lower()
        and value
      ):
        found[name] = value
  mine = {name: value for name, value in found.items() if word in name.lower()} if word else found
  yield Finding(
    "quota",
    bool(mine),
    ", ".join(f"{name} {value}" for name, value in sorted(mine.items()))
    or f"none for {wanted.type or 'TPUs'} in {wanted.place.zone}",
    ""
    if mine
    else "request it: https://console.cloud.google.com/iam-admin/quotas, service Cloud TPU API",
  )


def _bucket(wanted: Wanted, gcloud: Gcloud) -> Iterator[Finding]:
  place, region = wanted.place, wanted.place.zone.rpartition("-")[0]
  name = "/".join(place.bucket.split("/")[:3])
  make = (
    f"gcloud storage buckets create {name} --project={place.project} --location={region} "
    "--uniform-bucket-level-access"
  )
  try:
    found = gcloud.json(commands.bucket(place))
  except GcloudError as error:
    if error.kind != "not_found":
      raise
    yield Finding("bucket", False, f"there is no {name}", make)
    return
  location = str(found.get("location", "")).lower()
  multi = location in ("us", "eu", "asia") and region.startswith(location.replace("eu", "europe"))
  good = location == region or multi
  yield Finding(
    "bucket",
    good,
    f"{name} is in {location}, the zone in {region}",
    "" if good else f"reading ImageNet across regions is slow and is charged for; {make}",
  )

  soft = found.get("soft_delete_policy") or found.get("softDeletePolicy") or {}
  seconds = int(soft.get("retentionDurationSeconds", 0))
  if seconds:
    yield Finding(
      "bucket",
      False,
      f"{name} keeps replaced objects for {seconds / 86400:.0f} days, and each minute's logs",
      f"gcloud storage buckets update {name} --clear-soft-delete",
    )


def _account_of(place: Place, service_account: str, gcloud: Gcloud) -> str:
  """Returns the service account of the hosts."""
  if service_account:
    return service_account
  number = gcloud.json(commands.project_number(place))["projectNumber"]
  return _DEFAULT_ACCOUNT.replace("PROJECT_NUMBER", number)


def removal_lines(place: Place, service_account: str) -> list[commands.Line]:
  """Returns the lines that `check_removal` runs; the last one only if it is needed."""
  return [
    *([] if service_account else [commands.project_number(place)]),
    commands.project_policy(place),
    commands.may_delete(place, service_account or _DEFAULT_ACCOUNT),
  ]


def check_removal(place: Place, service_account: str, gcloud: Gcloud) -> str | None:
  """Find out, before anything is bought, whether hosts may remove their own slice.

  Args:
    place: of the run.
    service_account: of the hosts; "" is the project's Compute Engine one.
    gcloud: of this machine.

  Returns:
    None if they may, or a sentence if that cannot be found out from here.

  Raises:
    UsageError: if they may not.
  """
  account = service_account or "The project's Compute Engine service account"
  try:
    account = _account_of(place, service_account, gcloud)
    member = f"serviceAccount:{account}"
    if _roles(gcloud.json(commands.project_policy(place), tries=1), member) & _REMOVERS:
      return None
    answer = gcloud.json(commands.may_delete(place, account), tries=1)
    state = str((answer or {}).get("overallAccessState"))
  except (GcloudError, KeyError) as error:
    state = str(error)
  if state == "CAN_ACCESS":
    return None
  if state == "CANNOT_ACCESS":
    raise UsageError(
      f"{account} may not delete TPUs, so no slice could remove itself; give it the right: "
      f"{_grant(place, account)}"
    )
  return (
    f"Whether {account} may remove the slice cannot be found out from here ({state}). Its hosts "
    "prove it before a trainer starts; if they may not, only this launcher removes it, so stay "
    "until then."
  )


def _grant(place: Place, account: str) -> str:
  return (
    f"gcloud projects add-iam-policy-binding {place.project} --role=roles/tpu.admin "
    f"--member=serviceAccount:{account}"
  )


def _act_as(wanted: Wanted, gcloud: Gcloud) -> Iterator[Finding]:
  """Whoever makes a slice must be allowed to let it act as its service account."""
  account = _account_of(wanted.place, wanted.service_account, gcloud)
  user = (gcloud.json(commands.account()) or [{}])[0].get("account", "")
  if not user:
    return
  kind = "serviceAccount" if user.endswith(".gserviceaccount.com") else "user"
  roles = _roles(gcloud.json(commands.project_policy(wanted.place)), f"{kind}:{user}")
  roles |= _roles(gcloud.json(commands.account_policy(wanted.place, account)), f"{kind}:{user}")
  good = bool(roles & {"roles/iam.serviceAccountUser", "roles/owner", "roles/editor"})
  yield Finding(
    "actAs",
    good,
    f"{user} {'may' if good else 'may not'} let hosts act as {account}"
    + ("" if good else ", by a role of its own; a role of a group is not seen here"),
    ""
    if good
    else f"gcloud iam service-accounts add-iam-policy-binding {account} "
    f"--project={wanted.place.project} --role=roles/iam.serviceAccountUser --member={kind}:{user}",
  )


def _firewall(wanted: Wanted, gcloud: Gcloud) -> Iterator[Finding]:
  """Hosts must be reached by ssh, directly or by Identity-Aware Proxy."""
  sources: set[str] = set()
  for rule in gcloud.json(commands.firewall(wanted.place)) or []:
    enters = rule.get("direction") == "INGRESS" and not rule.get("disabled")
    if enters and any(_allows_ssh(allowed) for allowed in rule.get("allowed", [])):
      sources.update(rule.get("sourceRanges", []))
  good = bool(sources)
  yield Finding(
    "firewall",
    good,
    f"port 22 is open to {', '.join(sorted(sources))}" if good else "port 22 is closed",
    ""
    if good
    else "gcloud compute firewall-rules create allow-ssh-by-iap --direction=INGRESS "
    f"--allow=tcp:22 --source-ranges={_IAP} --project={wanted.place.project}   (and up --iap)",
  )


def _allows_ssh(allowed: dict[str, Any]) -> bool:
  if allowed.get("IPProtocol") not in ("tcp", "all"):
    return False
  ports = allowed.get("ports") or ["0-65535"]
  ranges = [[int(end) for end in port.split("-")] for port in ports]
  return any(ends[0] <= 22 <= ends[-1] for ends in ranges)


def _service_account(wanted: Wanted, gcloud: Gcloud) -> Iterator[Finding]:
  place = wanted.place
  account = _account_of(wanted.place, wanted.service_account, gcloud)
  member = f"serviceAccount:{account}"
  project = _roles(gcloud.json(commands.project_policy(place)), member)
  bucket = _roles(gcloud.json(commands.bucket_policy(place)), member) | project
  custom = sorted(role for role in project if role.startswith("projects/"))
  good = bool(project & _REMOVERS or custom)
  yield Finding(
    "service account",
    good,
    f"{account} {'may' if good else 'may not'} remove its own slice at the cost limit"
    + (f" if {custom[0]} allows it, which hosts prove before training" if custom else ""),
    "" if good else _grant(place, account),
  )
  name = "/".join(place.bucket.split("/")[:3])
  for roles, role, what in (
    (
      {"roles/storage.objectUser", "roles/storage.objectAdmin", "roles/storage.admin"},
      "roles/storage.objectUser",
      "read and write objects of",
    ),
    (
      {
        "roles/storage.legacyBucketReader",
        "roles/storage.legacyBucketWriter",
        "roles/storage.legacyBucketOwner",
        "roles/storage.admin",
      },
      "roles/storage.legacyBucketReader",
      "read the metadata of",
    ),
  ):
    good = bool(bucket & roles)
    yield Finding(
      "service account",
      good,
      f"{account} {'may' if good else 'may not'} {what} {name}",
      ""
      if good
      else f"gcloud storage buckets add-iam-policy-binding {name} --role={role} "
      f"--member=serviceAccount:{account}",
    )


def _roles(policy: dict[str, Any], member: str) -> set[str]:
  return {
    binding["role"]
    for binding in policy.get("bindings", [])
    if member in binding.get("members", []) and "condition" not in binding
  }


def _ssh(wanted: Wanted, gcloud: Gcloud) -> Iterator[Finding]:
  """gcloud refuses to reach many hosts if an ssh-agent runs without its key."""
  del wanted, gcloud
  key = "~/.ssh/google_compute_engine"
  try:
    done = subprocess.run(
      ["ssh-add", "-l"],
      capture_output=True,
      text=True,
      stdin=subprocess.DEVNULL,
      timeout=10,
      check=False,
    )
  except (OSError, subprocess.TimeoutExpired) as error:
    yield Finding("ssh", False, f"ssh-add cannot be run: {error}", "install OpenSSH")
    return
  if done.returncode == 0 and not re.search(r"google_compute_engine", done.stdout):
    yield Finding(
      "ssh",
      False,
      "the ssh-agent does not have gcloud's key",
      f"ssh-add {key}   (gcloud makes the key at its first ssh)",
    )
  else:
    yield Finding(
      "ssh",
      True,
      "gcloud's key is in the ssh-agent"
      if done.returncode == 0
      else "no ssh-agent has keys, so gcloud uses its own, which must have no passphrase",
    )


def _stale(wanted: Wanted, gcloud: Gcloud) -> Iterator[Finding]:
  place = wanted.place
  listed = {
    value["name"].rsplit("/", 1)[-1]: queued_of(value)
    for value in gcloud.json(commands.list_queued(place)) or []
  }
  dead = [
    name
    for name, one in listed.items()
    if one.state in ("SUSPENDED", "FAILED") and one.owner in ("", wanted.owner)
  ]
  for name in dead:
    yield Finding(
      "left over",
      False,
      f"queued resource {name} is {listed[name].state} but counts against quota",
      f"launch/tpu down {name} --project={place.project} --zone={place.zone}",
    )
  orphans = []
  for node in gcloud.json(commands.list_nodes(place)) or []:
    name, labels = node["name"].rsplit("/", 1)[-1], node.get("labels", {})
    holder = (node.get("queuedResource") or "").rsplit("/", 1)[-1] or labels.get("run", name)
    if holder not in listed and labels.get("owner", wanted.owner) == wanted.owner:
      orphans.append(name)
      yield Finding(
        "left over",
        False,
        f"no queued resource holds the node {name}",
        commands.shell(commands.delete_node(place, name)),
      )
  if not dead and not orphans:
    yield Finding("left over", True, f"nothing of yours in {place.zone}")
