"""What hosts install is what setup.cfg asks for, by hash."""

import configparser
import pathlib
import re

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
import pytest

ROOT = pathlib.Path(__file__).parents[3]


def pins(name):
  text = (ROOT / "launch" / name).read_text()
  blocks = re.findall(
    r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;]+).*?\\\n((?:    --hash=sha256:[0-9a-f]{64}.*\n)+)",
    text,
    re.MULTILINE,
  )
  assert len(blocks) == len(re.findall(r"^\S+==", text, re.MULTILINE))  # each has its hashes
  return {canonicalize_name(name): version for name, version, _ in blocks}


def test_the_lock_file_satisfies_setup_cfg():
  config = configparser.ConfigParser()
  config.read(ROOT / "setup.cfg")
  wanted = config["options"]["install_requires"] + "".join(
    config["options.extras_require"][extra] for extra in ("tpu", "gcs")
  )
  pinned = pins("requirements-tpu.lock")
  assert "libtpu" in pinned and "gcsfs" in pinned
  for line in filter(None, map(str.strip, wanted.splitlines())):
    if not line.startswith("#"):
      requirement = Requirement(line)
      assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), line


def test_jax_has_the_same_bounds_everywhere():
  config = configparser.ConfigParser()
  config.read(ROOT / "setup.cfg")
  lines = [config["options"]["install_requires"], *config["options.extras_require"].values()]
  found = re.findall(r"^jax(\[\w+\])?(\S*)$", "\n".join(lines), re.MULTILINE)
  assert [extra for extra, _ in found] == ["", "[tpu]", "[cuda12]"]
  assert len({bounds for _, bounds in found}) == 1


def test_the_tool_that_installs_is_pinned_too():
  assert list(pins("requirements-uv.lock")) == ["uv"]


@pytest.mark.parametrize("name", ["requirements-tpu.lock", "requirements-uv.lock"])
def test_the_lock_files_name_no_index_and_no_path(name):
  lines = (ROOT / "launch" / name).read_text().splitlines()
  assert not [line for line in lines if "://" in line or line.startswith("-")]


def test_the_python_of_hosts_is_in_the_first_lines():
  version = re.search(
    r"--python-version[ =](\S+)", (ROOT / "launch/requirements-tpu.lock").read_text()
  )[1]
  config = configparser.ConfigParser()
  config.read(ROOT / "setup.cfg")
  assert Requirement(f"python{config['options']['python_requires']}").specifier.contains(version)
