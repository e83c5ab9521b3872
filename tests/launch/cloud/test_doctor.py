"""The findings of doctor where all is well, and where one thing is wrong."""

import json

import pytest

from launch.cloud import commands, doctor
from launch.cloud.gcloud import GcloudError
from launch.cloud.settings import Place, UsageError

WANTED = doctor.Wanted(
  Place("", "my-project", "us-west4-a", "gs://my-bucket/a"), "me", "v5litepod-16", ""
)
ACCOUNT = "serviceAccount:7-compute@developer.gserviceaccount.com"
QUOTA = {
  "quotaId": "TPUV5sLitepodPerProjectPerZoneForTPUAPI",
  "dimensionsInfos": [{"details": {"value": "16"}, "applicableLocations": ["us-west4-a"]}],
}
SSH = {
  "direction": "INGRESS",
  "allowed": [{"IPProtocol": "icmp"}, {"IPProtocol": "tcp", "ports": ["20-22", "80"]}],
  "sourceRanges": ["0.0.0.0/0"],
}
WELL = {
  "version": {"Google Cloud SDK": "528.0.0"},
  "auth": [{"account": "me@example.com"}],
  "services": [
    {"config": {"name": f"{name}.googleapis.com"}}
    for name in ("tpu", "compute", "storage", "iam", "cloudresourcemanager", "cloudquotas")
  ],
  "accelerator-types": [{"name": "x/v5litepod-16", "type": "v5litepod-16"}],
  "quotas": [QUOTA],
  "buckets describe": {"location": "US-WEST4"},
  "buckets get-iam-policy": {
    "bindings": [
      {"role": "roles/storage.objectUser", "members": [ACCOUNT]},
      {"role": "roles/storage.legacyBucketReader", "members": [ACCOUNT]},
    ]
  },
  "projects describe": {"projectNumber": "7"},
  "service-accounts get-iam-policy": {
    "bindings": [{"role": "roles/iam.serviceAccountUser", "members": ["user:me@example.com"]}]
  },
  "firewall-rules list": [SSH],
  "projects get-iam-policy": {"bindings": [{"role": "roles/tpu.admin", "members": [ACCOUNT]}]},
  "queued-resources list": [],
  "tpu-vm list": [],
}


class Answers:
  """Answers lines of gcloud from a table."""

  def __init__(self, **changes):
    self.table = WELL | {
      name if " " in name else name.replace("__", " ").replace("_", "-"): value
      for name, value in changes.items()
    }

  def json(self, line, tries=3):
    del tries
    found = next(value for words, value in self.table.items() if words in " ".join(line))
    if isinstance(found, Exception):
      raise found
    return found


def findings(**changes):
  return [one for one in doctor.findings(WANTED, Answers(**changes)) if one.about != "ssh"]


def test_all_is_well(capsys):
  assert all(one.good for one in findings())
  doctor.run(WANTED, True, Answers())
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert {
    "gcloud",
    "account",
    "APIs",
    "accelerator",
    "quota",
    "bucket",
    "service account",
    "actAs",
    "firewall",
    "ssh",
    "left over",
  } == {line["about"] for line in lines}


def suspended(name, owner="me"):
  return {
    "name": f"projects/p/locations/z/queuedResources/{name}",
    "state": {"state": "SUSPENDED"},
    "tpu": {"nodeSpec": [{"node": {"labels": {"owner": owner}}}]},
  }


@pytest.mark.parametrize(
  "changes, about, what, advice",
  [
    ({"version": {"Google Cloud SDK": "400.0.0"}}, "gcloud", "400.0.0", "gcloud components update"),
    ({"auth": []}, "account", "no account", "gcloud auth login"),
    (
      {"services": WELL["services"][1:]},
      "APIs",
      "tpu.googleapis.com",
      "gcloud services enable tpu.googleapis.com --project=my-project",
    ),
    (
      {"accelerator_types": []},
      "accelerator",
      "v5litepod-16 is not offered in us-west4-a",
      "regions-zones",
    ),
    (
      {
        "buckets describe": {
          "location": "US",
          "soft_delete_policy": {"retentionDurationSeconds": "604800"},
        }
      },
      "bucket",
      "keeps replaced objects for 7 days",
      "gcloud storage buckets update gs://my-bucket --clear-soft-delete",
    ),
    (
      {"service-accounts get-iam-policy": {}},
      "actAs",
      "me@example.com may not let hosts act as 7-compute@",
      "--role=roles/iam.serviceAccountUser --member=user:me@example.com",
    ),
    (
      {"firewall-rules list": [SSH | {"disabled": True}]},
      "firewall",
      "is closed",
      "35.235.240.0/20",
    ),
    (
      {"firewall-rules list": [SSH | {"allowed": [{"IPProtocol": "tcp", "ports": ["80"]}]}]},
      "firewall",
      "is closed",
      "up --iap",
    ),
    ({"quotas": []}, "quota", "none for v5litepod-16", "request it"),
    (
      {"quotas": [QUOTA | {"quotaId": "TPUV4PodPerProjectPerZoneForTPUAPI"}]},
      "quota",
      "none for v5litepod-16",
      "request it",
    ),
    (
      {"buckets__describe": {"location": "EUROPE-WEST4"}},
      "bucket",
      "europe-west4",
      "--location=us-west4",
    ),
    (
      {"buckets__describe": GcloudError("not_found", [], "no")},
      "bucket",
      "there is no gs://my-bucket",
      "gcloud storage buckets create gs://my-bucket --project=my-project --location=us-west4",
    ),
    (
      {"projects__get_iam_policy": {}},
      "service account",
      "may not remove its own slice",
      "--role=roles/tpu.admin",
    ),
    (
      {"buckets__get_iam_policy": {"bindings": WELL["buckets get-iam-policy"]["bindings"][1:]}},
      "service account",
      "may not read and write objects",
      "--role=roles/storage.objectUser",
    ),
    (
      {"buckets__get_iam_policy": {"bindings": WELL["buckets get-iam-policy"]["bindings"][:1]}},
      "service account",
      "may not read the metadata",
      "--role=roles/storage.legacyBucketReader",
    ),
    (
      {"queued_resources__list": [suspended("old")]},
      "left over",
      "old is SUSPENDED",
      "launch/tpu down old",
    ),
    (
      {"tpu_vm__list": [{"name": "x/nodes/lost"}]},
      "left over",
      "no queued resource holds the node lost",
      "tpu-vm delete lost",
    ),
    (
      {"quotas": GcloudError("permission", ["gcloud", "quotas"], "denied")},
      "quota",
      "could not be checked: denied",
      "you lack the permission",
    ),
  ],
)
def test_one_thing_is_wrong(changes, about, what, advice):
  bad = [one for one in findings(**changes) if not one.good]
  assert [one.about for one in bad] == [about]
  assert what in bad[0].what and advice in bad[0].advice


def test_what_belongs_to_others_is_left_alone():
  assert all(one.good for one in findings(queued_resources__list=[suspended("hers", "she")]))


def test_a_bucket_of_the_continent_is_near_enough():
  assert all(one.good for one in findings(buckets__describe={"location": "US"}))


def test_a_custom_role_is_proven_by_the_hosts():
  roles = {"bindings": [{"role": "projects/my-project/roles/pod", "members": [ACCOUNT]}]}
  found = findings(**{"projects get-iam-policy": roles})
  assert all(one.good for one in found)
  assert any("which hosts prove before training" in one.what for one in found)


REFUSED = GcloudError("permission", [], "API [policytroubleshooter.googleapis.com] not enabled")


@pytest.mark.parametrize(
  "account, changes, told",
  [
    ("", {}, None),
    ("", {"projects get-iam-policy": {}, "troubleshoot": "CAN_ACCESS"}, None),
    ("", {"projects get-iam-policy": {}, "troubleshoot": "UNKNOWN_INFO"}, "(UNKNOWN_INFO)"),
    ("", {"projects get-iam-policy": {}, "troubleshoot": REFUSED}, "not enabled"),
    ("", {"projects get-iam-policy": REFUSED}, "not enabled"),
    ("", {"projects describe": REFUSED}, "The project's Compute Engine service account"),
    ("", {"projects describe": {}}, "cannot be found out"),
    ("sa@p", {"troubleshoot": "UNKNOWN_CONDITIONAL"}, "Whether sa@p may remove the slice"),
  ],
)
def test_whether_hosts_may_remove_their_slice(account, changes, told):
  state = changes.get("troubleshoot")
  if isinstance(state, str):
    changes = changes | {"troubleshoot": {"overallAccessState": state}}
  found = doctor.check_removal(WANTED.place, account, Answers(**changes))
  assert found is None if told is None else told in found and found.endswith(".")


def test_hosts_that_may_not_remove_their_slice_are_refused():
  answers = Answers(troubleshoot={"overallAccessState": "CANNOT_ACCESS"})
  with pytest.raises(
    UsageError, match=r"sa@p may not delete TPUs.*--role=roles/tpu.admin --member"
  ):
    doctor.check_removal(WANTED.place, "sa@p", answers)


def test_without_a_network_one_line_says_so():
  found = findings(auth=GcloudError("unavailable", [], "no route to host"))
  assert [one.about for one in found if not one.good] == ["network"] and found[
    -1
  ].about == "network"


def test_nobody_logged_in_ends_the_questions():
  error = GcloudError("auth", [], "You do not currently have an active account selected.")
  found = findings(services=error)
  assert found[-1].about == "APIs" and found[-1].advice == "gcloud auth login"


def test_every_line_is_among_those_that_are_checked():
  known = {line[1:5] and tuple(line[1:4]) for line in commands.every_line()}
  assert all(tuple(line[1:4]) in known for line in doctor.lines(WANTED))
