"""The SPMD program; see README.md."""

import importlib.util
import pathlib
import sys


def _check_own_packages() -> None:
  """Refuse a user's own `configs` or `input_pipeline`, which Python finds before ours.

  `python -m` looks into the working directory first.

  Raises:
    ImportError: with one sentence; of `python -m` the exit code is 2 instead.
  """
  ours = pathlib.Path(__file__).resolve().parents[1]
  for name in ("configs", "input_pipeline", "launch"):
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
      continue  # of a partial installation, which is found out by who needs it
    found = pathlib.Path(spec.origin).resolve().parent
    if found != ours / name:
      sentence = (
        f"{found} hides the package {name} of this program; run it from another folder, or by the "
        "command resnet-pod, or rename that folder."
      )
      if sys.argv[:1] == ["-m"]:  # while Python looks for the module to run
        print(sentence, file=sys.stderr)
        sys.exit(2)
      raise ImportError(sentence)


_check_own_packages()
