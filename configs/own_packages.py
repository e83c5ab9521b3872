"""Refuses a Python that is too old or lacks our libraries, and a user's package of a name of ours.

The latter Python would import in place of it: `python -m` looks into the working directory first.
This file is run by its path, before any package but that of the caller is imported, for `configs`
itself may be the one that is hidden.
"""

import functools
import importlib.util
import pathlib
import sys

_OURS = pathlib.Path(__file__).resolve().parents[1]


@functools.lru_cache(maxsize=None)
def check(*names: str, library: str = "") -> None:
  """Compare where Python finds packages with where this program has them, once.

  Args:
    names: of the packages.
    library: which all commands of the caller import, if there is one.

  Raises:
    ImportError: one is hidden, Python is too old or the library is missing; in one sentence. A
      command of this program ends with code 2 instead.
  """
  if sys.version_info < (3, 11):
    _refuse(f"Python 3.11 or newer is needed; {sys.executable} is {sys.version.split()[0]}.")
  if library and importlib.util.find_spec(library) is None:
    _refuse(
      f"{sys.executable} has no {library}: type source .venv/bin/activate, where launch/smoke.sh "
      "has made .venv, or pip install -e ."
    )
  for name in names:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
      continue  # of a partial installation, which is found out by who needs it
    found = pathlib.Path(spec.origin).resolve().parent
    if found != _OURS / name:
      _refuse(
        f"{found} hides the package {name} of this program; run it from another folder, or by the "
        "command resnet-pod, or rename that folder."
      )


def _refuse(sentence: str) -> None:
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
