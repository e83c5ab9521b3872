"""Opening the folder of a run, and its files of JSON."""

import json
import time
from typing import Any

from etils import epath
import jax

from trainer.errors import ConfigError, TrainerError
from trainer.pod.pod import Pod
from trainer.workdir import storage
from trainer.workdir.paths import Workdir


def open_workdir(workdir: str, pod: Pod) -> epath.Path:
  """Make the folder, and prove that this host can write it and sees what host 0 writes.

  Args:
    workdir: local folder or gs://BUCKET/FOLDER.
    pod: this host among the others, all of which call this.

  Raises:
    ConfigError: if it cannot be written, or is another folder than that of host 0.
  """
  path = storage.path_of(workdir)
  probe, first = Workdir(path).probe(pod.host), Workdir(path).probe(0)
  trouble = storage.problem(path)
  if trouble:
    raise ConfigError(f"--workdir {path} cannot be used by host {pod.host}: {trouble}.")
  try:
    path.mkdir(parents=True, exist_ok=True)
    probe.write_text(str(time.time()))
    written = pod.gather("workdir", probe.read_text())[0]
    seen = first.read_text() if first.exists() else None
    pod.gather("workdir is seen", None)
    probe.unlink()
  except Exception as error:
    if not storage.is_failure(error):
      raise
    reason = getattr(error, "strerror", None) or storage.first_line(error)
    raise ConfigError(
      f"--workdir {path} cannot be written by host {pod.host}: {reason}."
    ) from error
  if seen != written:
    raise ConfigError(
      f"--workdir {path} is not the same folder on host {pod.host} as on host 0; give a bucket, or "
      "a folder that all hosts mount."
    )
  return path


def write_json(path: epath.Path, value: dict[str, Any]) -> None:
  """Write a file that is whole or absent, on process 0 only.

  Raises:
    TrainerError: if it cannot be written.
  """
  if jax.process_index() == 0:
    text = json.dumps(value, indent=2) + "\n"
    try:
      storage.write_whole(path, text)
    except Exception as error:
      if not storage.is_failure(error):
        raise
      raise TrainerError(
        f"{path} could not be written ({storage.first_line(error)}); run the same command again."
      ) from error


def read_json(path: epath.Path) -> dict[str, Any] | None:
  """Return what a file holds, or None if there is no such file.

  Raises:
    TrainerError: if it cannot be read, or holds no JSON.
  """
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    return None
  except ValueError as error:
    raise TrainerError(
      f"{path} is damaged ({storage.first_line(error)}); remove it, then run the same command "
      "again."
    ) from error
  except Exception as error:
    if not storage.is_failure(error):
      raise
    raise TrainerError(
      f"{path} could not be read ({storage.first_line(error)}); run the same command again."
    ) from error
