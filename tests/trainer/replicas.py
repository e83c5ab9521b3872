"""Processes of test_replicas.py: a bit flips in one copy of one leaf, on one device.

JAX_NUM_CPU_DEVICES=8 python -m tests.trainer.replicas    in several layouts; prints JSON
python -m tests.trainer.replicas STEP HOST --config=X --workdir=DIR ...    after a step of a run
"""

import functools
import json
import os
import pathlib
import sys

import jax
import numpy as np

from tests.trainer import tiny
from trainer import mesh as mesh_lib
from trainer import program as program_lib
from trainer import replicas
from trainer.pod.pod import Pod
from trainer.pod.requests import NOTHING
from trainer.run import Run
from trainer.state import path_name
from trainer.tools import collectives

FSDP = {"mesh.fsdp": 2, "sharding.params": "fsdp"}
UPDATE = {"sharding.opt_state": "data"}
# Name: (layout, path of the leaf, devices that have the wrong copy).
CASES = {
  "params": ({}, "params/head/kernel", [5]),
  "statistics": ({}, "batch_stats/stem_bn/mean", [0]),
  "step": ({}, "step", [7]),
  "two devices": ({}, "ema/params/head/bias", [1, 6]),
  "half of them": ({}, "params/head/bias", [0, 1, 2, 3]),
  "shards of params": (FSDP, "params/head/kernel", [3]),
  "optimizer beside shards of params": (FSDP, "opt_state/1/1/0/trace/head/bias", [2]),
  "params beside shards of the update": (FSDP | UPDATE, "params/stem_conv/kernel", [4]),
  "height": ({"mesh.space": 2} | UPDATE, "ema/params/head/kernel", [1]),
  "a pair": ({"mesh.space": 2} | UPDATE, "params/head/kernel", [6]),
}


def flip(state, name, devices, bit=0):
  """Return the state with a bit of the first value flipped in the copies of these devices."""

  def copy(shard):
    value = np.array(shard.data)
    if shard.device.id in devices:
      value.reshape(-1)[:1].view(np.uint32)[:] ^= np.uint32(1 << bit)
    return jax.device_put(value, shard.device)

  def leaf(path, x):
    if path_name(path) != name:
      return x
    return jax.make_array_from_single_device_arrays(
      x.shape, x.sharding, [copy(shard) for shard in x.addressable_shards]
    )

  assert name in [path_name(path) for path, _ in jax.tree.leaves_with_path(state)]
  return jax.tree.map_with_path(leaf, state)


def compare_layouts():
  """Return what is found in each case, before and after the bits flip, and the collectives."""
  seen, compiled = {}, {}
  for name, (layout, leaf, devices) in CASES.items():
    config = tiny.get_config()
    config.optimizer.ema_decay = 0.9
    config.update_from_flattened_dict(layout)
    key = json.dumps(layout)
    if key not in compiled:
      program = program_lib.build(config, 64)
      compiled[key] = (
        program,
        program.init_state(),
        program.compile("replicas", **program.sizes("replicas")),
      )
    program, state, compare = compiled[key]
    copied = list(replicas.copied(state, program.mesh).values())
    comparisons = [
      compare(state, mesh_lib.flags(program.mesh, NOTHING)),
      compare(flip(state, leaf, devices), mesh_lib.flags(program.mesh, NOTHING)),
    ]
    watch = replicas.Replicas(Pod(config.pod), program.mesh, copied, 4)
    watch.step(3, None)  # not due
    watch.check(3, functools.partial(compare, state))
    try:
      watch.check(4, functools.partial(compare, flip(state, leaf, devices)))
      sentence = ""
    except replicas.ReplicasDiffer as error:
      sentence = str(error)
    seen[name] = {
      "differs": [int(comparison.differs) for comparison in comparisons],
      "sentence": sentence,
      "leaves": len(copied),
      "all leaves": len(jax.tree.leaves(state)),
      "collectives": sorted(
        [each.kind, each.devices, each.bytes] for each in collectives.read(compare.as_text())
      ),
    }
  print(json.dumps(seen | {"gradients": compare_gradients()}))


def compare_gradients():
  """Return what is found when all devices compute the same, and when one has a wrong weight."""
  config = tiny.get_config()
  config.model.bn_group = "device"
  program = program_lib.build(config, 64)
  recompute = program.compile("recompute", **program.sizes("recompute"))
  rng = np.random.default_rng(0)
  batch = mesh_lib.to_global(
    program.mesh,
    {
      "image": rng.integers(0, 256, (8, 16, 16, 3), np.uint8),
      "label": rng.integers(0, 6, 8, np.int32),
    },
  )
  variables = program.init_state().raw()
  leaves = replicas.gradients(variables.params, program.mesh)
  watch = replicas.Replicas(Pod(config.pod), program.mesh, leaves, 4)
  watch.check(4, functools.partial(recompute, variables, batch))
  wrong = variables._replace(params=flip(variables.params, "stem_conv/kernel", [5], bit=20))
  try:
    watch.check(8, functools.partial(recompute, wrong, batch))
  except replicas.ReplicasDiffer as error:
    return str(error)


def run_with_a_flip(step, host):
  """Be `python -m trainer`, but for a bit that flips, once, on the first device of a host."""
  take_step = Run.take_step

  def take(run):
    take_step(run)
    flipped = pathlib.Path(run.workdir.path) / "flipped"
    if run.step == step and run.pod.host == host and not flipped.exists():
      run.state = flip(run.state, "params/head/bias", [jax.local_devices()[0].id], bit=3)
      flipped.touch()

  Run.take_step = take
  from trainer.__main__ import main

  os._exit(main(sys.argv))


if __name__ == "__main__":
  if len(sys.argv) == 1:
    compare_layouts()
  else:
    numbers, sys.argv[1:] = map(int, sys.argv[1:3]), sys.argv[3:]
    run_with_a_flip(*numbers)
