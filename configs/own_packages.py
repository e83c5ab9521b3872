"""Refuses a user's own package of the name of ours, which Python would import in place of it.

`python -m` looks into the working directory first. This file is run by its path, before any package
but that of the caller is imported, for `configs` itself may be the one that is hidden.
"""

import functools
import importlib.util
import pathlib
import sys

_OURS = pathlib.Path(__file__).resolve().parents[1]


@functools.cache
def check(*names: str) -> None:
  """Compare where Python finds packages with where this program has them, once.

  Args:
    names: of the packages.

  Raises:
    ImportError: one is hidden; in one sentence. A command of this program ends with code 2 instead.
  """
  for name in names:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
      continue  # of a partial installation, which is found out by who needs it
    found = pathlib.Path(spec.origin).resolve().parent
    if found != _OURS / name:
      sentence = (
        f"{found} hides the package {name} of this program; run it from another folder, or by the "
        "command resnet-pod, or rename that folder."
      )
      if _is_command():
        print(sentence, file=sys.stderr)
        sys.exit(2)
      raise ImportError(sentence)


def _is_command() -> bool:
  """Whether this process is `python -m` with a module of this program."""
  if sys.argv[:1] == ["-m"]:  # while Python looks for the module to run
    return True
  spec = getattr(sys.modules["__main__"], "__spec__", None)
  package = spec.name.partition(".")[0] if spec else ""
  return package in ("configs", "input_pipeline", "launch", "trainer")
