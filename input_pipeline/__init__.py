"""From image files to uint8 batches on the host; no accelerator is needed.

    import input_pipeline

    source = input_pipeline.open_source(config.data, "train", num_classes=1000)
    batches = input_pipeline.train_batches(source, config.data, seed=0, global_batch_size=1024)

Names are imported when they are first used: `input_pipeline.prepare` runs without JAX.
"""

import importlib
import pathlib
import runpy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from input_pipeline.errors import DataError
  from input_pipeline.loader import eval_batches, train_batches
  from input_pipeline.sources import open_source

_CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
runpy.run_path(str(_CONFIGS / "own_packages.py"))["check"]("configs", library="ml_collections")

__all__ = ["DataError", "eval_batches", "open_source", "train_batches"]

_MODULES = {
  "DataError": "errors",
  "eval_batches": "loader",
  "open_source": "sources",
  "train_batches": "loader",
}


def __getattr__(name: str) -> Any:
  if name not in _MODULES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
