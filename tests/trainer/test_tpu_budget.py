"""A step on a TPU may not grow: a small net compiled for one chip, against figures of the past."""

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

import pytest

# Of the compiler that they were recorded with: cycles of the time line, and bytes that the program
# reads and writes in all its memories.
LIBTPU = "0.0.42.1"
BUDGET = {"cycles": 1_544_730, "bytes": 1_267_531_776}
GROWTH = 1.03

STEP = """
import json
from launch import preflight
devices = preflight.topology_devices("v5e:1x1", 1)
from configs import imagenet_resnet50
from trainer import program as program_lib
from trainer.reporting.chips import CHIPS
from trainer.tools import tpu_cost

config = imagenet_resnet50.get_config()
config.model.depth, config.data.image_size = 18, 64
config.global_batch_size = config.eval.batch_size = 32
program = program_lib.build(config, 1_281_167, devices)
step = program.compile("train", **program.sizes("train"))
line = tpu_cost.time_line(step.as_text(), tpu_cost.rates(CHIPS["TPU v5 lite"]))
bytes_accessed = step.cost_analysis()["bytes accessed"]
print(json.dumps({"cycles": line.cycles, "bytes": bytes_accessed}))
"""


@pytest.mark.slow
def test_resnet18_within_its_budget():
  try:
    version = importlib.metadata.version("libtpu")
  except importlib.metadata.PackageNotFoundError:
    pytest.skip("libtpu, of pip install -e '.[tpu]', is not installed")
  if version != LIBTPU:
    pytest.skip(f"the budget was recorded with libtpu {LIBTPU}; this is {version}")
  result = subprocess.run(
    [sys.executable, "-c", STEP],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parents[2],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  assert result.returncode == 0, result.stderr
  found = json.loads(result.stdout.splitlines()[-1])
  over = {name: found[name] / budget for name, budget in BUDGET.items()}
  assert max(over.values()) <= GROWTH, f"over the budget of libtpu {LIBTPU}: {over}"
  # A budget that is far too large guards nothing: record it anew with what made the step leaner.
  assert min(over.values()) > 1 / 1.1, f"far below the budget of libtpu {LIBTPU}: {over}"
