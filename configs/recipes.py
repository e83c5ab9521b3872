"""The recipes of this folder: every run file, with its variants.

Beside `get_config` a run file may have VARIANTS, the arguments that it takes; EXAMPLES, the number
of training examples that it is written for, if not ImageNet's; and has TOP1, the expected top-1 in
percent, one or by variant.
"""

from collections.abc import Iterator, Sequence
import difflib
import importlib
import os
import pathlib
import textwrap
import types
from typing import Any

import ml_collections

IMAGENET = 1_281_167  # training examples of ILSVRC2012
_FOLDER = pathlib.Path(__file__).parent
_WIDTH = 100
_RUN_FILE = ("--config=", "-config=")  # as a command line has it


def names() -> list[str]:
  """Return the recipes as they are typed behind --config=configs/, without ".py".

  A run file whose `get_config` takes an argument lists its values in VARIANTS; each is a recipe of
  its own, as in "imagenet_mlperf:8192".
  """
  return [name for module in _run_files() for name in _variants(module)]


def load(name: str) -> ml_collections.ConfigDict:
  """Return the config of one of `names()`."""
  variant = name.partition(":")[2]
  return _module(name).get_config(*[variant] * bool(variant))


def title(name: str) -> str:
  """Return the first line of a recipe's docstring."""
  return str(_module(name).__doc__).splitlines()[0]


def examples(name: str) -> int:
  """Return the training examples that a recipe is written for."""
  return getattr(_module(name), "EXAMPLES", IMAGENET)


def top1(name: str) -> str:
  """Return the expected top-1 of a recipe in percent, whoever measured it; "" if nobody has."""
  found = _module(name).TOP1
  return found if isinstance(found, str) else found[name.partition(":")[2]]


def listing() -> str:
  """Return a line for each run file: its name, the first line of its docstring, its variants."""
  lines = []
  for module in _run_files():
    name = module.__name__.rpartition(".")[2]
    text = str(module.__doc__).splitlines()[0]
    variants = getattr(module, "VARIANTS", ())
    others = f" (:{variants[0]} and {len(variants) - 1} more)" if variants else ""
    shown = textwrap.shorten(text, _WIDTH - 25 - len(others), placeholder=" ...")
    lines.append(f"{name:24} {shown}{others}")
  return "\n".join(lines)


def path_of(word: str) -> str:
  """Return the file that --config names: a path, or the name of a run file of this folder.

  A file of the current folder comes before one of this folder.

  Args:
    word: as in "my_run.py", "smoke", "configs/smoke.py" or "imagenet_mlperf:8192".

  Raises:
    ValueError: there is none; one sentence with the nearest names.
  """
  file, colon, variant = word.partition(":")
  if os.path.isfile(file):
    return word
  names = [path.stem for path in sorted(_FOLDER.glob("*.py")) if _is_run_file(path)]
  name = os.path.basename(file).removesuffix(".py")
  if name in names and file.removesuffix(".py") in (name, os.path.join(_FOLDER.name, name)):
    return f"{_FOLDER / name}.py{colon}{variant}"
  near = difflib.get_close_matches(name, names, n=3) or [n for n in names if name and name in n]
  meant = f"did you mean {' or '.join(near)}?" if near else f"there is {', '.join(names)}."
  what = "is a folder" if os.path.isdir(file) else "does not exist"
  raise ValueError(f"The run file {file or 'of --config'} {what}; {meant}")


def joined(argv: Sequence[str]) -> list[str]:
  """Return a command line with `--flag value` as `--flag=value`, and the run file before fields.

  absl takes the first form as well; ml_collections refuses fields in front of their file.
  """
  found: list[str] = []
  for word in argv:
    flag = found[-1] if found else ""
    if flag.startswith("-") and "=" not in flag and not word.startswith("-"):
      found[-1] = f"{flag}={word}"
    else:
      found.append(word)
  # Sorting is stable: all else stays in order.
  return found[:1] + sorted(found[1:], key=lambda word: not word.startswith(_RUN_FILE))


def with_paths(argv: Sequence[str]) -> list[str]:
  """Return a command line, joined, with the path of the run file in place of its name.

  Raises:
    ValueError: there is no such file; one sentence.
  """
  found = joined(argv)
  for i, argument in enumerate(found):
    if argument.startswith(_RUN_FILE):
      found[i] = f"--config={path_of(argument.partition('=')[2])}"
  return found


def variants_of(path: str) -> tuple[str, ...]:
  """Return the variants of a run file of this folder, by its path; of another file none."""
  file = pathlib.Path(path)
  known = file.parent == _FOLDER and file.exists() and _is_run_file(file)
  return tuple(getattr(_module(file.stem), "VARIANTS", ())) if known else ()


def _is_run_file(path: pathlib.Path) -> bool:
  return "\ndef get_config(" in path.read_text() and path.stem != "base"


def _module(name: str) -> Any:
  return importlib.import_module(f"configs.{name.partition(':')[0]}")


def _run_files() -> Iterator[types.ModuleType]:
  for path in sorted(_FOLDER.glob("*.py")):
    if _is_run_file(path):
      yield importlib.import_module(f"configs.{path.stem}")


def _variants(module: types.ModuleType) -> list[str]:
  file = module.__name__.rpartition(".")[2]
  return [f"{file}:{variant}" for variant in getattr(module, "VARIANTS", ())] or [file]
