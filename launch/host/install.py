"""What a trainer needs before it starts: code, packages, its environment, and free chips."""

from __future__ import annotations

import glob
import hashlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from typing import BinaryIO

from launch.host.files import Json, locked
from launch.host.google import gcloud

_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")


def prepare(
  home: pathlib.Path, url: str, spec: Json, log: BinaryIO
) -> tuple[list[str], pathlib.Path, dict[str, str]]:
  """Fetch the code of an attempt and install its packages.

  Args:
    home: the folder of the run on this host.
    url: the folder of the run in the bucket.
    spec: see attempt_spec of launch/cloud/driver.py.
    log: receives the output of the installation.

  Returns:
    Command, folder and environment of the trainer.
  """
  code = home / "code" / spec["code"]
  if not code.exists():
    _fetch_code(f"{url}/launch/code-{spec['code']}.tar.gz", code, spec["archive"])
  environment = dict(os.environ, PYTHONUNBUFFERED="1", PYTHONPATH=str(code))
  environment.update(read_environment(home / "env"))
  for name, secret in spec["secrets"].items():
    words = ["secrets", "versions", "access", "latest", f"--secret={secret}"]
    environment[name] = gcloud(*words, f"--project={spec['project']}")
  python = spec["python"] or install(code, log)
  return [python, "-m", "trainer", *spec["argv"]], code, environment


def fetch(url: str, path: pathlib.Path, sha: str) -> None:
  """Copy an object of the bucket, where others may write, if its SHA-256 is the expected one."""
  gcloud("storage", "cp", url, str(path), seconds=300)
  if hashlib.sha256(path.read_bytes()).hexdigest() != sha:
    path.unlink()
    raise RuntimeError(f"{url} is not what the launcher put there: somebody else has written it")


def _fetch_code(url: str, code: pathlib.Path, sha: str) -> None:
  partial = code.with_name(f"{code.name}.tmp")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  archive = partial.with_suffix(".tar.gz")
  fetch(url, archive, sha)
  with tarfile.open(archive) as tar:
    if hasattr(tarfile, "tar_filter"):
      tar.extractall(partial, filter="tar")
    else:  # a Python before the filters
      tar.extractall(partial)
  partial.rename(code)


def read_environment(path: pathlib.Path) -> dict[str, str]:
  """Return the NAME=VALUE lines of a file that only its owner may read; values pass no shell."""
  if not path.exists():
    return {}
  path.chmod(0o600)
  lines = [
    line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")
  ]
  return dict(line.split("=", 1) for line in lines)


def install(code: pathlib.Path, log: BinaryIO) -> str:
  """Make the environment of the code's lock file, once per host, and return its Python."""
  lock, tool = code / "launch" / "requirements-tpu.lock", code / "launch" / "requirements-uv.lock"
  digest = hashlib.sha256(lock.read_bytes()).hexdigest()[:12]
  folder = pathlib.Path.home() / "tpu" / f"env-{digest}"
  folder.parent.mkdir(parents=True, exist_ok=True)
  python = str(folder / "bin" / "python")
  with locked(folder.with_suffix(".lock"), 1800):
    if (folder / "complete").exists():
      return python
    # The command in the first lines of the lock file names the version.
    version = re.search(r"--python-version[ =](\S+)", lock.read_text())
    if not version:
      raise RuntimeError(f"{lock.name} does not name a Python version")
    pip = f"{sys.executable} -m pip install --user --quiet --require-hashes -r {tool}".split()
    sync = f"uv pip sync --quiet --python {python} --require-hashes {lock}".split()
    steps = [pip, ["uv", "venv", "--quiet", "--clear", "--python", version[1], str(folder)], sync]
    if shutil.which("uv", path=_path_with_uv()):
      del steps[0]
    for step in steps:
      _run_step(step, log)
    (folder / "complete").touch()
  return python


def _path_with_uv() -> str:
  return f"{pathlib.Path.home()}/.local/bin:{os.environ['PATH']}"


def _run_step(step: list[str], log: BinaryIO) -> None:
  """Run one step of the installation, at most three times: registries may be busy."""
  environment = dict(os.environ, PATH=_path_with_uv(), PIP_BREAK_SYSTEM_PACKAGES="1")
  for pause in (5, 20, None):
    code = subprocess.call(step, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
    if code == 0:
      return
    if pause:
      time.sleep(pause)
  raise RuntimeError(
    f"installation failed: {' '.join(step[:4])} ... ended with code {code}; see the log"
  )


def free_devices() -> None:
  """End the processes that hold the chips, of any user, then remove libtpu's lock."""
  devices = [path for pattern in _DEVICES for path in glob.glob(pattern)]
  if not devices:
    return
  for number in (signal.SIGTERM, signal.SIGKILL):
    holders = subprocess.run(
      ["sudo", "-n", "lsof", "-t", *devices], capture_output=True, text=True, check=False
    ).stdout.split()
    if not holders:
      break
    subprocess.call(["sudo", "-n", "kill", f"-{int(number)}", *holders])
    time.sleep(5)
  subprocess.call(["sudo", "-n", "rm", "-f", "/tmp/libtpu_lockfile"])
