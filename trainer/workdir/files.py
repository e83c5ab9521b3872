"""Opening the folder of a run, and its files of JSON."""

from collections.abc import Mapping
import json
import secrets
from typing import Any

from absl import logging
from etils import epath
import jax

from trainer.errors import ConfigError
from trainer.pod.pod import Pod
from trainer.workdir import storage
from trainer.workdir.paths import Workdir


def open_workdir(workdir: str, pod: Pod) -> epath.Path:
  """Make the folder, and prove that this host can write it and sees what host 0 writes.

  Args:
    workdir: local folder or gs://BUCKET/FOLDER.
    pod: this host among the others, all of which call this.

  Raises:
    StorageError: if it cannot be written.
    ConfigError: if it is another folder than that of host 0.
  """
  path = storage.path_of(workdir)
  # Of this start alone: another one in the same folder may write and remove its own meanwhile.
  probe = Workdir(path).probe(pod.host, secrets.token_hex(8))
  trouble = storage.problem(path)
  if trouble:
    raise trouble.ends(f"--workdir {path} cannot be used by host {pod.host}")
  try:
    path.mkdir(parents=True, exist_ok=True)
    probe.write_text(probe.name)
    written = pod.gather("workdir", probe.read_text())[0]
    first = path / written
    seen = first.read_text() if first.exists() else None
    pod.gather("workdir is seen", None)
    probe.unlink()
  except Exception as error:
    if not storage.is_failure(error):
      raise
    reason = getattr(error, "strerror", None) or storage.first_line(error)
    if isinstance(error, FileExistsError):
      reason = "it is a file"
    trouble = storage.Problem(reason, not storage.may_pass(error))
    raise trouble.ends(f"--workdir {path} cannot be written by host {pod.host}") from error
  if seen != written:
    raise ConfigError(
      f"--workdir {path} is not the same folder on host {pod.host} as on host 0; give a bucket, or "
      "a folder that all hosts mount."
    )
  return path


def write_json(path: epath.Path, value: dict[str, Any], *, needed: bool = True) -> None:
  """Write a file that is whole or absent, on process 0 only.

  Args:
    path: the file.
    value: what it holds.
    needed: whether a run cannot go on without it; if not, a warning is all.

  Raises:
    StorageError: if it is needed and cannot be written.
  """
  if jax.process_index() == 0:
    text = json.dumps(value, indent=2) + "\n"
    try:
      storage.write_whole(path, text)
    except Exception as error:
      if not storage.is_failure(error):
        raise
      if needed:
        raise storage.failed(f"{path} could not be written", error) from error
      logging.warning("%s could not be written (%s).", path, storage.first_line(error))


def read_json(
  path: epath.Path, kinds: Mapping[str, Any] | None = None, *, set_aside: bool = False
) -> dict[str, Any] | None:
  """Return what a file holds, or None if there is no such file, or none that is whole.

  Args:
    path: the file.
    kinds: type or types of the entries that it must have.
    set_aside: whether process 0 moves a damaged file to NAME.damaged.

  Raises:
    StorageError: if it cannot be read, or a damaged one not be set aside.
  """
  try:
    content = storage.read_whole(path)
  except FileNotFoundError:
    return None
  except Exception as error:
    if not storage.is_failure(error):
      raise
    raise storage.failed(f"{path} could not be read", error) from error
  trouble = ""
  try:
    value = json.loads(content)
    if not isinstance(value, dict):
      trouble = f"it holds {type(value).__name__}"
    else:
      wrong = [name for name, kind in (kinds or {}).items() if not _is(value.get(name), kind)]
      trouble = f"it lacks {', '.join(wrong)}" if wrong else ""
  except ValueError as error:
    trouble = storage.first_line(error)
  if not trouble:
    return value
  logging.warning("%s is damaged (%s) and is not used.", path, trouble)
  if set_aside and jax.process_index() == 0:
    aside = path.parent / f"{path.name}.damaged"
    try:
      aside.write_bytes(content)
      path.unlink()
    except Exception as error:
      if not storage.is_failure(error):
        raise
      raise storage.failed(f"{path} could not be set aside as {aside}", error) from error
  return None


def _is(value: Any, kind: Any) -> bool:
  return isinstance(value, kind) and not isinstance(value, bool)
