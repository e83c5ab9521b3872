"""The SPMD program; see README.md."""

import pathlib
import runpy

_CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
runpy.run_path(str(_CONFIGS / "own_packages.py"))["check"](
  "configs", "input_pipeline", library="ml_collections"
)
