"""The real gcloud accepts every line that the launcher can emit, in every variant."""

import json
import os
import shlex
import subprocess

import pytest

from launch.cloud import commands
from tests.launch.lives import ROOT, needs_gcloud

WHERE = ["--project=my-project", "--zone=us-central2-b", "--bucket=gs://my-bucket"]
TRAINER = ["--config=tests/trainer/tiny.py", "--config.data.path=a \"b\" 'c' $(d) `e`;f"]
UP = ["up", "run-1", "--max-hours=12", *WHERE]
VERBS = [
  [*UP, "--type=v4-32", *TRAINER],
  [
    *UP,
    "--type=v5litepod-64",
    "--spot",
    "--slices=2",
    "--max-wait=2d",
    "--label=team=vision",
    *TRAINER,
  ],
  [
    *UP,
    "--type=v6e-16",
    "--reserved",
    "--internal-ips",
    "--service-account=sa@my-project.iam.gserviceaccount.com",
    "--network=net",
    "--subnetwork=sub",
    "--autocheckpoint",
    "--env-file={environment}",
    "--secret=KEY=key",
    *TRAINER,
  ],
  [*UP, "--type=v5p-16", "--reserved", "--reservation=one", *TRAINER],
  [*UP, "--type=v6e-16", "--flex-start", *TRAINER],
  *([verb, "run-1", *WHERE] for verb in ("watch", "status", "stop", "down", "doctor")),
  ["logs", "run-1", "--worker=all", "-f", *WHERE],
  ["logs", "run-1", "--worker=3", "--slice=1", "--attempt=2", *WHERE],
  ["down", "--all", *WHERE],
  ["list", *WHERE],
  ["doctor", *WHERE],
  ["prepare", "shards", "--source=gs://my-bucket/tars", "--out=gs://my-bucket/shards", *WHERE],
]


@pytest.fixture(scope="module")
def lint(tmp_path_factory):
  """Returns a function from lines to the errors of gcloud's parser, by line."""
  folder = tmp_path_factory.mktemp("gcloud")
  # An account or a configuration of this machine plays no part in it.
  environment = os.environ | {
    "CLOUDSDK_CONFIG": str(folder / "config"),
    "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1",
    "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "1",
  }

  def judge(lines):
    (folder / "lines").write_text(json.dumps([{"command_string": line} for line in lines]))
    done = subprocess.run(
      ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={folder / 'lines'}"],
      capture_output=True,
      text=True,
      env=environment,
      timeout=600,
    )
    if "Invalid choice" in done.stderr:
      pytest.skip("this gcloud has no meta lint-gcloud-commands")
    answers = json.loads(done.stdout)
    assert len(answers) == len(lines)
    return {
      line: answer["error_message"] for line, answer in zip(lines, answers) if not answer["success"]
    }

  return judge


@needs_gcloud
def test_wrong_lines_are_refused(lint):
  start = "gcloud compute tpus queued-resources"
  create = f"{start} create r --node-id=r --accelerator-type=v4-8 --runtime-version=v --zone=z"
  wrong = [
    f"{create} --spto",
    f"{create} --best-effort",
    f"{start} delete r --zone=z --forced",
    f"{start} list --zone=z --no-such",
    f"{start} sssh r --zone=z",
  ]
  right = f"{start} delete r --zone=z --force"
  assert set(lint([*wrong, right])) == set(wrong)


@needs_gcloud
def test_every_line(lint, dry_lines):
  lines = sorted({commands.shell(line) for line in commands.every_line()} | set(dry_lines))
  assert lint(lines) == {}


@pytest.fixture(scope="module")
def dry_lines(tmp_path_factory):
  """Returns what all verbs print with --dry-run."""
  environment = tmp_path_factory.mktemp("a home") / "my $(secret)'s.env"
  environment.write_text("KEY=value")
  environment.chmod(0o600)
  lines = []
  for words in VERBS:
    words = [word.replace("{environment}", str(environment)) for word in words]
    done = subprocess.run(
      [ROOT / "launch" / "tpu", words[0], "--dry-run", *words[1:]],
      capture_output=True,
      text=True,
      timeout=60,
      env=os.environ | {"TPU_GCLOUD": "/no/gcloud/is/run"},
    )
    assert done.returncode == 0 and not done.stderr, f"{words}: {done.stderr}"
    lines += done.stdout.splitlines()
  return lines


def test_lines_are_ready_to_paste(dry_lines):
  for line in dry_lines:
    words = shlex.split(line)
    assert words[0] == "gcloud" and commands.shell(words) == line


def test_verbs_of_this_file_are_all():
  done = subprocess.run(
    [ROOT / "launch" / "tpu", "--help"], capture_output=True, text=True, check=True
  )
  known = {
    line.split()[0]
    for line in done.stdout.splitlines()
    if line.startswith("    ") and line[4:5] != " "
  }
  assert {words[0] for words in VERBS} == known
