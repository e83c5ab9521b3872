"""A step over several slices: the same numbers, and what crosses the slow network stands apart."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from trainer import mesh as mesh_lib
from trainer import program as program_lib
from trainer import step as step_lib
from trainer.pod.requests import FAIL, STOP

FOR_TPUS = {f"model.{name}": True for name in ("pool_first", "row_pairs", "bn_together")}


@pytest.mark.parametrize(
  ("micro_batches", "dtype"), [(1, "float32"), (2, "float32"), (1, "bfloat16")]
)
def test_a_step_over_slices_has_the_numbers_of_any_other(config, batch, micro_batches, dtype):
  config.accumulation_steps, config.optimizer.ema_decay = micro_batches, 0.9
  config.model.dtype = dtype
  program = program_lib.build(config, num_examples=64)
  first = jax.jit(program.init)()

  def guarded(across):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(mesh_lib, "crosses_slices", lambda mesh: across)
      step = step_lib.make_train_step(
        *(program.model, program.optimizer, program.schedule, config, program.mesh), guarded=True
      )
    return jax.jit(step)

  step = guarded(True)
  state, output = step(first, batch, np.array([STOP], np.int32))
  assert output.metrics[1] in np.arange(1, 8) / 8  # top1, not of none or all
  expected = guarded(False)(first, batch, np.array([STOP], np.int32))
  close = (1e-5, 1e-6) if dtype == "float32" else (0.02, 1e-4)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, *close), (state, output), expected)
  # And a failure leaves every leaf as it is.
  after, output = step(state, batch, np.array([FAIL], np.int32))
  assert int(output.request) == FAIL
  jax.tree.map(np.testing.assert_array_equal, after, state)


TWO_SLICES = """
import json
import jax
from launch import preflight
devices = preflight.topology_devices("v5e:2x2", 2)
from tests.trainer import tiny
from trainer import program as program_lib
from trainer.reporting.chips import CHIPS
from trainer.tools import collectives, hlo, tpu_cost

config = tiny.get_config("resnet")
config.global_batch_size = config.eval.batch_size = 32
config.data.image_size = 32
config.model.update(dtype="bfloat16", bn_group="device")
config.update_from_flattened_dict(json.loads(sys.argv[1]))
program = program_lib.build(config, 64, devices)
text = program.compile("train", **program.sizes("train")).as_text()
of_loop = [each for each in collectives.read(text) if each.in_loop]
module = hlo.parse(text)
branches = [
  each
  for computation in module.computations.values()
  for instruction in computation
  if instruction.opcode == "conditional"
  for each in instruction.called
]
sends = [each.opcode for name in branches for each in module.computations[name]].count("send")
line = tpu_cost.time_line(text, tpu_cost.rates(CHIPS["TPU v5 lite"]))
open_loops = [each.name for each in line.open_loops]
sent = sum(each.bytes for each in collectives.read(text) if "slices" in each.kind)
params = sum(each.size for each in jax.tree.leaves(program.abstract_state.params))
print(json.dumps([[each.kind for each in of_loop], len(branches), sends, open_loops]))
print(sent / params)
"""


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu, of pip install -e '.[tpu]', is not installed",
)
@pytest.mark.parametrize(
  ("fields", "narrow"),
  [({}, True), (FOR_TPUS | {"accumulation_steps": 2}, False)],
  ids=["plain", "all"],
)
def test_nothing_crosses_slices_in_the_loop_or_beside_the_update(fields, narrow):
  result = subprocess.run(
    [sys.executable, "-c", f"import sys\n{TWO_SLICES}", json.dumps(fields)],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parents[2],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  assert result.returncode == 0, result.stderr
  # Nor does the estimate take the loop of one round for one of which it knows nothing.
  *_, found, sent = result.stdout.splitlines()
  assert json.loads(found) == [[], 2, 0, []]
  # Gradients of kernels cross as they are computed, in bfloat16; sums of several in float32, which
  # are three bytes for each parameter, added up over what a chip sends and receives.
  assert float(sent) < 2 if narrow else 3 < float(sent) < 4
