"""Estimates of steps that were compiled before, kept in a folder by what decides them.

Learning rates and lengths are constants of a program: runs that differ in them alone have one
schedule and one estimate, and a step of it is compiled once. Values of 0, 1 and -1 tell programs
apart, because the compiler drops operations with them; so do all integers, which may be rounds of
a loop.
"""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
from typing import Any

from etils import epath
import jax

from trainer import compiler, tools
from trainer.errors import ConfigError
from trainer.workdir import storage

_CONSTANT = re.compile(r"(?<=stablehlo\.constant dense<).*?(?=> : tensor<(?:\d+x)*(?:bf|f)\d+>)")
_NUMBER = re.compile(r"(?<![\w.])-?\d+\.\d+(?:E[+-]?\d+)?", re.IGNORECASE)
_KEPT = (0.0, 1.0, -1.0)


def without_values(program: str) -> str:
  """Return the text of a program, StableHLO, with `x` for its floating point constants."""
  return _CONSTANT.sub(
    lambda found: _NUMBER.sub(
      lambda number: number[0] if float(number[0]) in _KEPT else "x", found[0]
    ),
    program,
  )


def path(folder: str, lowered: jax.stages.Lowered, *about: Any) -> epath.Path:
  """Return the file of a step's estimate; there is none before `keep`.

  Args:
    folder: of all estimates.
    lowered: the step.
    *about: what the estimate depends on beside its program, as the topology.
  """
  # Estimates of another compiler, with other options or by another account, are others.
  account = pathlib.Path(tools.__file__).parent
  sources = [pathlib.Path(compiler.__file__), *sorted(account.glob("*.py"))]
  parts = [
    *map(str, about),
    importlib.metadata.version("libtpu"),
    *(os.environ.get(name, "") for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")),
    *(hashlib.sha256(each.read_bytes()).hexdigest() for each in sources),
    without_values(lowered.as_text()),
  ]
  digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
  return epath.Path(folder).expanduser() / f"{digest[:32]}.json"


def find(path: epath.Path) -> dict[str, Any] | None:
  """Return the figures of a step; None if there are none.

  Raises:
    ConfigError: if their file is damaged.
  """
  if not path.exists():
    return None
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise ConfigError(f"--known: {path} is damaged ({error}); remove it.") from error


def keep(path: epath.Path, figures: dict[str, Any]) -> None:
  """Write the figures of a step, which `find` returns then."""
  path.parent.mkdir(parents=True, exist_ok=True)
  storage.write_whole(path, json.dumps(figures))
