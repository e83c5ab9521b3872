"""How gcloud is run, and what its failures mean."""

import pathlib

import pytest

from launch.cloud.gcloud import Gcloud, GcloudError, classify, sentence


# As gcloud 528 wrote them.
@pytest.mark.parametrize(
  "stderr, kind",
  [
    (
      (
        "ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS: Resource "
        "'r' already exists"
      ),
      "exists",
    ),
    (
      (
        "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource 'r' "
        "was not found"
      ),
      "not_found",
    ),
    (
      "ERROR: (gcloud.x) PERMISSION_DENIED: Permission 'tpu.nodes.create' denied on 'projects/p'",
      "permission",
    ),
    (
      (
        "ERROR: (gcloud.x) RESOURCE_EXHAUSTED: Quota limit 'TPUV4PerProject' has been "
        "exceeded. Limit: 32"
      ),
      "quota",
    ),
    (
      (
        "ERROR: (gcloud.x) RESOURCE_EXHAUSTED: Quota exceeded for quota metric "
        "'Requests' and limit 'Requests per minute'"
      ),
      "throttled",
    ),
    ('ERROR: (gcloud.x) RESOURCE_EXHAUSTED: There is no more capacity in the zone "z"', "capacity"),
    ("ERROR: (gcloud.x) UNAVAILABLE: The service is currently unavailable.", "unavailable"),
    ("ERROR: (gcloud.x) HTTPError 503: backend error", "unavailable"),
    ("ERROR: (gcloud.x) You do not currently have an active account selected.", "auth"),
    (
      (
        "ERROR: (gcloud.storage.cp) HTTPError 412: At least one of the pre-conditions "
        "you specified did not hold."
      ),
      "precondition",
    ),
    (
      "ERROR: (gcloud.storage.cat) The following URLs matched no objects or files:\ngs://b/x",
      "not_found",
    ),
    ("ERROR: (gcloud.x) INVALID_ARGUMENT: Invalid accelerator type", "bad_request"),
    ("ERROR: (gcloud.x) unrecognized arguments: --spto (did you mean '--spot'?)", "bad_request"),
    (
      "ERROR: gcloud crashed (ConnectionError): HTTPSConnectionPool: Max retries exceeded",
      "unavailable",
    ),
    ('ERROR: (gcloud.x) {\n  "code": 7,\n  "message": "no such account"\n}', "permission"),
    ('ERROR: (gcloud.x) {\n  "code": 8,\n  "message": "no more capacity"\n}', "capacity"),
    ("something new", "unknown"),
    ("........ERROR: HTTPError 412\n.\n", "precondition"),
    ("..ERROR: (gcloud.storage.cp) NOT_FOUND: no such thing", "not_found"),
    (
      (
        "ERROR: (gcloud.x) NOT_FOUND: Resource "
        "'projects/p/locations/z/queuedResources/quota-404-network' was not found"
      ),
      "not_found",
    ),
    (
      (
        "ERROR: (gcloud.x) RESOURCE_EXHAUSTED: Quota limit 'TPUV4' has been exceeded in "
        "project [rate-1]."
      ),
      "quota",
    ),
    (
      (
        "ERROR: (gcloud.storage.cat) The following URLs matched no objects or "
        "files:\ngs://b/forbidden/invalid_grant"
      ),
      "not_found",
    ),
    (
      (
        "This command is authenticated with /tmp/test_a_quota_is_forbidden/token\n"
        "ERROR: (gcloud.x) Connection reset by peer"
      ),
      "unavailable",
    ),
  ],
)
def test_kinds_of_failures(stderr, kind):
  assert classify(stderr) == kind


@pytest.mark.parametrize(
  "stderr, told",
  [
    ("", "gcloud ended with exit code 7"),
    ("hint\nERROR: (gcloud.a.b-c) NOT_FOUND: it\nmore\n", "NOT_FOUND: it"),
    ("......ERROR: HTTPError 412\n.\n", "HTTPError 412"),
    ("odd\n...\n", "odd"),
    (
      'Create..failed.\nERROR: (gcloud.x) {\n  "code": 7,\n  "message": "no account"\n}\n',
      "no account",
    ),
  ],
)
def test_what_a_failure_is_told_by(stderr, told):
  assert sentence(stderr, 7) == told


@pytest.fixture
def program(tmp_path, monkeypatch):
  """Returns a function that makes gcloud a shell script."""

  def write(text):
    path = tmp_path / "gcloud"
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setenv("TPU_GCLOUD", str(path))
    return tmp_path

  return write


def test_a_line_that_takes_too_long_is_ended_with_all_its_processes(program):
  folder = program("echo early; sleep 100 & echo $! >$(dirname $0)/pid; wait")
  with pytest.raises(GcloudError, match="no answer within 1 s") as raised:
    Gcloud(1).run(["gcloud", "x"], tries=1)
  assert raised.value.kind == "timeout" and raised.value.output == "early\n"
  process = pathlib.Path("/proc", (folder / "pid").read_text().strip(), "cmdline")
  assert not process.exists() or not process.read_text()  # gone, or a zombie


def test_a_busy_service_is_asked_again_and_others_are_not(program):
  pauses = []
  folder = program(
    'echo x >>$(dirname $0)/count; echo "ERROR: (gcloud.x) UNAVAILABLE: later" >&2; exit 1'
  )
  with pytest.raises(GcloudError, match=r"^UNAVAILABLE: later$"):
    Gcloud(10, sleep=pauses.append).run(["gcloud", "x"])
  assert pauses == [2.0, 6.0] and (folder / "count").read_text() == "x\n" * 3
  program(
    'echo x >>$(dirname $0)/count; echo "ERROR: (gcloud.x) PERMISSION_DENIED: no" >&2; exit 1'
  )
  with pytest.raises(GcloudError):
    Gcloud(10, sleep=pauses.append).run(["gcloud", "x"])
  assert (folder / "count").read_text() == "x\n" * 4
