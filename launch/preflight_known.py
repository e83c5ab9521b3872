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
import tempfile
from typing import Any

import jax

from trainer import compiler, tools
from trainer.errors import ConfigError

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


class Known:
  """Estimates in a folder, a file each."""

  def __init__(self, folder: str | None, *place: Any):
    """Open a folder; it is made with the first estimate.

    Args:
      folder: None keeps nothing.
      *place: what else the estimates depend on, as the topology.
    """
    self._folder = pathlib.Path(folder).expanduser() if folder else None
    # Estimates of another compiler, with other options or by another account, are others.
    account = pathlib.Path(tools.__file__).parent
    sources = [pathlib.Path(compiler.__file__), *sorted(account.glob("*.py"))]
    self._place = [
      *map(str, place),
      importlib.metadata.version("libtpu"),
      *(os.environ.get(name, "") for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")),
      *(hashlib.sha256(each.read_bytes()).hexdigest() for each in sources),
    ]

  def find(self, lowered: jax.stages.Lowered, *about: Any) -> dict[str, Any] | None:
    """Return what was kept of a step.

    Args:
      lowered: the step.
      *about: what its estimate depends on beside its program.

    Returns:
      What `keep` was given; None if nothing.

    Raises:
      ConfigError: if its file is damaged.
    """
    if self._folder is None or not (path := self._path(lowered, about)).exists():
      return None
    try:
      return json.loads(path.read_text())
    except ValueError as error:
      raise ConfigError(f"--known: {path} is damaged ({error}); remove it.") from error

  def keep(self, figures: dict[str, Any], lowered: jax.stages.Lowered, *about: Any) -> None:
    """Keep the figures of a step, which `find` returns for the same arguments."""
    if self._folder is None:
      return
    path = self._path(lowered, about)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all, also where two commands have one folder.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
      json.dump(figures, file)
    os.replace(file.name, path)

  def _path(self, lowered: jax.stages.Lowered, about: tuple[Any, ...]) -> pathlib.Path:
    assert self._folder is not None
    parts = [*self._place, *map(str, about), without_values(lowered.as_text())]
    return self._folder / f"{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:32]}.json"
