"""The recipes of this folder: every run file, with its variants.

Beside `get_config` a run file may have VARIANTS, the arguments that it takes; EXAMPLES, the number
of training examples that it is written for, if not ImageNet's; and has TOP1, the expected top-1 in
percent, one or by variant.
"""

from collections.abc import Iterator
import importlib
import pathlib
import types
from typing import Any

import ml_collections

_IMAGENET = 1_281_167  # training examples of ILSVRC2012
_FOLDER = pathlib.Path(__file__).parent


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
  return getattr(_module(name), "EXAMPLES", _IMAGENET)


def top1(name: str) -> str:
  """Return the expected top-1 of a recipe in percent, whoever measured it; "" if nobody has."""
  found = _module(name).TOP1
  return found if isinstance(found, str) else found[name.partition(":")[2]]


def _module(name: str) -> Any:
  return importlib.import_module(f"configs.{name.partition(':')[0]}")


def _run_files() -> Iterator[types.ModuleType]:
  for path in sorted(_FOLDER.glob("*.py")):
    if path.stem in ("__init__", "__main__", "base"):
      continue
    module = importlib.import_module(f"configs.{path.stem}")
    if hasattr(module, "get_config"):
      yield module


def _variants(module: types.ModuleType) -> list[str]:
  file = module.__name__.rpartition(".")[2]
  return [f"{file}:{variant}" for variant in getattr(module, "VARIANTS", ())] or [file]
