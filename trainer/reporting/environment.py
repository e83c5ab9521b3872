"""Where a start of a run runs and with what, and why it ended if it failed; for those who look."""

from collections.abc import Iterator
import contextlib
from importlib import metadata
import pathlib
import platform
import socket
import subprocess
import time
from typing import Any

from absl import logging
import jax

from trainer.errors import Preempted, TrainerError
from trainer.workdir import storage
from trainer.workdir.files import write_json
from trainer.workdir.paths import Workdir

_PACKAGES = ("resnet-pod", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_GIT_SECONDS = 5.0


def facts() -> dict[str, Any]:
  """Return date, host, devices, versions and commit of this process, JSON-able."""
  found: dict[str, Any] = {
    "time": time.time(),
    "host": socket.gethostname(),
    "hosts": jax.process_count(),
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "versions": {"python": platform.python_version(), **_versions()},
  }
  if commit := _commit():
    found["commit"] = commit
  return found


def _versions() -> dict[str, str]:
  versions = {}
  for name in _PACKAGES:
    with contextlib.suppress(metadata.PackageNotFoundError):
      versions[name] = metadata.version(name)
  return versions


def _commit() -> str:
  """Return the commit of this program, with a word if files differ; "" where there is no git."""
  folder = pathlib.Path(__file__).parents[2]
  if not (folder / ".git").exists():
    return ""
  try:
    described = subprocess.run(
      ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--dirty=, changed"],
      capture_output=True,
      text=True,
      check=True,
      timeout=_GIT_SECONDS,
    )
  except (OSError, subprocess.SubprocessError):
    return ""
  return described.stdout.strip()


@contextlib.contextmanager
def failure_kept(run: Workdir) -> Iterator[None]:
  """Keep in the workdir why the body failed; what an earlier start has left there is removed."""
  _chief_tries(lambda: run.ended.unlink(missing_ok=True))
  try:
    yield
  except Preempted:
    raise
  except TrainerError as error:
    reason = {"time": time.time(), "code": error.exit_code, "reason": str(error)}
    _chief_tries(lambda: write_json(run.ended, reason, needed=False))
    raise


def _chief_tries(action: Any) -> None:
  """Call it on process 0; whatever fails there must not hide the failure itself."""
  try:
    if jax.process_index() == 0:
      action()
  except Exception as error:
    logging.warning("Why a run has failed could not be kept (%s).", storage.first_line(error))
