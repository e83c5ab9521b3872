"""How a process becomes a host of a run: with the same config, code and devices as the others."""

from collections.abc import Callable, Iterator
import contextlib
import hashlib
import json
import multiprocessing
import pathlib
from typing import Any

from absl import logging
import jax
import ml_collections

from trainer import config as config_lib
from trainer import mesh
from trainer.errors import ConfigError
from trainer.pod.pod import Pod


@contextlib.contextmanager
def join_pod(config: ml_collections.ConfigDict, stop: Callable[[], bool]) -> Iterator[Pod]:
  """Check the config, find the other hosts, make sure that all mean the same run; leave with them.

  Args:
    config: of the run.
    stop: whether this host was asked to stop.

  Raises:
    TrainerError: as `Pod.join` does, and if the config can run nowhere, not on these devices, or is
      not that of all hosts.
  """
  # What multiprocessing itself asks before it starts a process.
  if getattr(multiprocessing.current_process(), "_inheriting", False):
    raise ConfigError(
      "A decoding process has imported the script that trains, and would train as well; put the "
      "script's calls under: if __name__ == '__main__':"
    )
  config_lib.validate(config)
  with Pod.join(config.pod, stop) as pod:
    if pod.host:
      logging.set_verbosity(logging.WARNING)  # host 0 logs the run, every host what goes wrong
    _compare(pod, config_lib.flatten(config))
    config_lib.check_split(config, num_devices=mesh.device_count())
    yield pod


def _compare(pod: Pod, values: dict[str, Any]) -> None:
  """Refuse hosts with another config, another version of JAX or other code."""
  mine = values | {"jax version": jax.__version__, "source code": code_hash()}
  digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
  if len(set(pod.gather("config", digest).values())) == 1:
    return
  for host, theirs in pod.gather("differing config", mine).items():
    for field in sorted(mine.keys() | theirs.keys()):
      if mine.get(field) != theirs.get(field):
        raise ConfigError(
          f"Host {host} has {field} = {theirs.get(field)!r}, host {pod.host} has "
          f"{mine.get(field)!r}; start all hosts with the same code and the same flags."
        )


def code_hash() -> str:
  """Return a hash of the source of `trainer`, `input_pipeline` and `configs`."""
  root, digest = pathlib.Path(__file__).parents[2], hashlib.sha256()
  for folder in ("trainer", "input_pipeline", "configs"):
    for path in sorted((root / folder).rglob("*.py")):
      digest.update(path.read_bytes())
  return digest.hexdigest()[:16]
