"""The recipes of this folder: every run file, with its variants."""

from collections.abc import Iterator
import importlib
import pathlib
import types

import ml_collections

_FOLDER = pathlib.Path(__file__).parent


def names() -> list[str]:
  """Return the recipes as they are typed behind --config=configs/, without ".py".

  A run file whose `get_config` takes an argument lists its values in VARIANTS; each is a recipe of
  its own, as in "imagenet_mlperf:8192".
  """
  return [name for module in _run_files() for name in _variants(module)]


def load(name: str) -> ml_collections.ConfigDict:
  """Return the config of one of `names()`."""
  file, _, variant = name.partition(":")
  module = importlib.import_module(f"configs.{file}")
  return module.get_config(*[variant] * bool(variant))


def title(name: str) -> str:
  """Return the first line of a recipe's docstring."""
  module = importlib.import_module(f"configs.{name.partition(':')[0]}")
  return str(module.__doc__).splitlines()[0]


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
