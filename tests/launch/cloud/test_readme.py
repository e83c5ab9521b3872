"""Every command of the READMEs' sections on pods is one that its program accepts."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest

from launch.cloud import cli
from tests.readme_tables import check_tests

ROOT = pathlib.Path(__file__).parents[3]


def commands_of(program):
  found = []
  for readme in ("README.md", "launch/README.md"):
    text = (ROOT / readme).read_text()
    section = text.split("## The pod in ten minutes")[1].split("\n## ")[0]
    lines = re.findall(r"^    (\S.*)$", section.replace("\\\n", ""), re.MULTILINE)
    found += [line for line in lines if line.startswith(f"{program} ")]
  assert found
  return found


@pytest.mark.parametrize("line", commands_of("launch/tpu"))
def test_lines_of_the_launcher(line, monkeypatch, tmp_path, capsys):
  for name, value in (
    ("CLOUDSDK_CORE_PROJECT", "my-project"),
    ("CLOUDSDK_COMPUTE_ZONE", "us-west4-a"),
    ("TPU_BUCKET", "gs://my-bucket"),
    ("XDG_STATE_HOME", str(tmp_path)),
  ):
    monkeypatch.setenv(name, value)
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
  assert cli.main([*shlex.split(line, comments=True)[1:], "--dry-run"]) == 0, (
    capsys.readouterr().err
  )


@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed")
def test_lines_of_gcloud(tmp_path):
  lines = commands_of("gcloud")
  (tmp_path / "lines.json").write_text(
    json.dumps([{"command_string": shlex.join(shlex.split(line))} for line in lines])
  )
  done = subprocess.run(
    ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={tmp_path}/lines.json"],
    capture_output=True,
    text=True,
    env=os.environ | {"CLOUDSDK_CONFIG": str(tmp_path)},
    check=False,
  )
  if "Invalid choice" in done.stderr:
    pytest.skip("this gcloud has no linter of command lines")
  found = json.loads(done.stdout)
  assert len(found) == len(lines)
  assert not [entry for entry in found if not entry["success"]]


def test_each_row_of_who_protects_names_its_test():
  check_tests("launch/README.md", "### Who protects what is paid for", column=4, least=15)
