"""The two set-up commands say in one plain sentence what is missing."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = ["launch/smoke.sh", "tests/run.sh", ".ci/run"]
SHELLCHECK = shutil.which(
  "shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
)


@pytest.fixture
def clone(tmp_path):
  """The repository without its .venv, in a folder with a space in its name."""
  target = tmp_path / "a clone"
  shutil.copytree(
    ROOT,
    target,
    ignore=shutil.ignore_patterns(".venv", ".git", "runs", "data", "__pycache__", "*.egg-info"),
  )
  return target


def run(script, **environment):
  return subprocess.run(
    ["bash", str(script)],
    capture_output=True,
    text=True,
    cwd="/",
    stdin=subprocess.DEVNULL,
    env=os.environ | environment,
  )


@pytest.mark.parametrize("script", SCRIPTS)
def test_syntax(script):
  subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck, of the extra [test], is not installed")
def test_shellcheck():
  scripts = sorted(
    {
      *ROOT.glob("launch/*.sh"),
      *ROOT.glob("launch/host/*.sh"),
      ROOT / "launch/tpu",
      ROOT / "tests/run.sh",
      ROOT / ".ci/run",
    }
  )
  result = subprocess.run(
    [SHELLCHECK, "--external-sources", *scripts],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
  )
  assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_a_python(clone, script):
  result = run(clone / script, PYTHON="/nowhere/python3")
  assert result.returncode != 0
  assert "Python 3.11 or newer is needed" in result.stderr.splitlines()[-1]
  assert not (clone / ".venv").exists()


@pytest.mark.parametrize("script", SCRIPTS[:2])
def test_without_a_network(clone, script):
  offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
  result = run(clone / script, **offline)
  assert result.returncode != 0
  assert "pip could not install" in result.stderr.splitlines()[-1]
  assert "install.log" in result.stderr.splitlines()[-1]
  # Nothing is taken for installed that is not.
  assert not list((clone / ".venv").glob("installed-*"))


def test_help_of_the_smoke_run():
  result = subprocess.run(
    ["bash", ROOT / "launch/smoke.sh", "--help"], capture_output=True, text=True, check=True
  )
  assert "--fresh" in result.stdout
