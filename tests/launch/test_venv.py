"""PYTHON=... chooses the interpreter of .venv, also where there is a .venv already."""

import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# Stands for a Python of some version; its pip installs nothing.
PYTHON = r"""#!/bin/bash
case "$*" in
  --version) echo "Python VERSION.0" ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip "*) exit 0 ;;
  *print*) echo VERSION ;;
  *exit*) [[ VERSION != 3.[0-9] && VERSION != 3.10 ]] ;;
esac
"""


@pytest.fixture
def root(tmp_path):
  """A checkout with nothing in it but what launch/venv.sh reads."""
  root = tmp_path / "a checkout"
  (root / "launch").mkdir(parents=True)
  for name in ("launch/venv.sh", "setup.cfg", "pyproject.toml"):
    (root / name).write_text((ROOT / name).read_text())
  return root


@pytest.fixture
def python(tmp_path):
  def make(version):
    path = tmp_path / f"python{version}"
    path.write_text(PYTHON.replace("VERSION", version))
    path.chmod(0o755)
    return path

  return make


def ensure_venv(root, python=None):
  """Run ensure_venv in `root`; return the version that it chose, or the last line of its error."""
  done = subprocess.run(
    ["bash", "-euc", 'source launch/venv.sh; ensure_venv test; "$PY" --version'],
    cwd=root,
    env={"PATH": "/usr/bin:/bin"} | ({"PYTHON": str(python)} if python else {}),
    capture_output=True,
    text=True,
    check=False,
  )
  return (done.stderr if done.returncode else done.stdout).splitlines()[-1]


def test_another_python_makes_a_new_environment(root, python):
  assert ensure_venv(root, python("3.11")) == "Python 3.11.0"
  (root / ".venv/of-the-first").touch()
  assert ensure_venv(root, python("3.13")) == "Python 3.13.0"
  assert not (root / ".venv/of-the-first").exists()


def test_the_same_version_or_none_keeps_the_environment(root, python):
  ensure_venv(root, python("3.13"))
  (root / ".venv/of-the-first").touch()
  assert ensure_venv(root, python("3.13")) == ensure_venv(root) == "Python 3.13.0"
  assert (root / ".venv/of-the-first").exists()


@pytest.mark.parametrize("version", ["3.10", "none"])
def test_a_python_that_does_not_do_is_refused_and_removes_nothing(root, python, version, tmp_path):
  ensure_venv(root, python("3.13"))
  bad = tmp_path / "nowhere" if version == "none" else python(version)
  message = ensure_venv(root, bad)
  assert "Python 3.11 or newer is needed" in message and str(bad) in message
  assert ensure_venv(root) == "Python 3.13.0"


def test_an_environment_of_somebody_else_is_not_removed(root, python):
  subprocess.run([python("3.11"), "-m", "venv", root / ".venv"], check=True)
  message = ensure_venv(root, python("3.13"))
  assert "the Python of .venv is 3.11" in message and "is 3.13; remove .venv" in message
  assert (root / ".venv/bin/python").exists()
