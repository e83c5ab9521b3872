"""The config of a workdir as a run file: --config=trainer/workdir/saved.py:WORKDIR.

`python -m trainer --mode=eval --workdir=WORKDIR` uses it where no --config is given. It imports no
JAX.
"""

import json
from typing import Any

import ml_collections

from configs import base

_CONFIG = "config.json"  # as trainer.workdir.paths.Workdir has it


def get_config(workdir: str) -> ml_collections.ConfigDict:
  """Return the config that a workdir was last started with.

  Fields that are newer than the workdir have their defaults.

  Raises:
    ValueError: there is none that can be read; one sentence.
    TrainerError: likewise, of a bucket that cannot be used, or not now.
  """
  from trainer.workdir import storage  # here, because it imports TensorStore

  path = storage.path_of(workdir) / _CONFIG
  try:
    values = json.loads(storage.read_whole(path))
    config = base.get_config(values["model"]["name"]).unlock()
  except FileNotFoundError as error:
    raise ValueError(
      f"{workdir} holds no {_CONFIG}; check --workdir, or give the --config of the run."
    ) from error
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path} cannot be read ({error}); give the --config of the run.") from error
  except Exception as error:
    if not storage.is_failure(error):
      raise
    if storage.in_bucket(path):
      raise storage.failed(f"{path} cannot be read", error) from error
    reason = storage.first_line(error)
    raise ValueError(f"{path} cannot be read ({reason}); give the --config of the run.") from error
  _fill(config, values)
  return config.lock()


def _fill(config: ml_collections.ConfigDict, values: dict[str, Any]) -> None:
  for name, value in values.items():
    if isinstance(value, dict):
      if name not in config:
        config[name] = ml_collections.ConfigDict()
      _fill(config[name], value)
    else:
      config[name] = tuple(value) if isinstance(value, list) else value
