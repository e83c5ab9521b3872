"""A process of test_sharding.py: runs the tiny net on 8 virtual devices in every way to shard it, and prints what it saw.

    JAX_NUM_CPU_DEVICES=8 python -m tests.trainer.sharded bfloat16|float32|float64 [mode ...]
"""

import json
import re
import sys

import jax
import numpy as np

from tests.trainer import tiny
from trainer import config as config_lib, evaluate, mesh as mesh_lib, train as train_lib
from trainer.step import METRICS

STEPS = 10
FSDP = {"mesh.fsdp": 2, "sharding.params": "fsdp"}
SPACE = {"mesh.space": 2}
UPDATE = {"sharding.opt_state": "data"}
ACCUMULATE = {"accumulation_steps": 4}
GROUP = {"model.bn_group": "8"}

# Name: (devices, what differs from the default). Those of one family compute the same numbers.
MODES = {
    "global": {
        "1": (1, {}), "8": (8, {}), "fsdp": (8, FSDP), "space": (8, SPACE), "update": (8, UPDATE),
        "all": (8, FSDP | UPDATE | SPACE),
    },
    "group": {
        "1": (1, GROUP), "2": (2, GROUP), "4": (4, GROUP), "8": (8, GROUP), "space": (8, GROUP | SPACE),
        "all": (8, GROUP | FSDP | UPDATE | SPACE),
    },
    "device": {"device": (8, {"model.bn_group": "device"}), "number": (8, {"model.bn_group": "4"})},
    "accumulation": {"1": (1, ACCUMULATE), "8": (8, ACCUMULATE), "all": (8, ACCUMULATE | FSDP | UPDATE)},
    "accumulation, groups": {
        "1": (1, ACCUMULATE | {"model.bn_group": "2"}), "8": (8, ACCUMULATE | {"model.bn_group": "2"}),
        "device": (4, ACCUMULATE | {"model.bn_group": "device"}),
    },
}


def make_config(dtype, overrides):
  config = tiny.get_config()
  config.global_batch_size = config.eval.batch_size = 32
  config.model.dtype = dtype
  config.optimizer.lr_per_256 = 0.4
  config.optimizer.ema_decay = 0.9
  config.update_from_flattened_dict(overrides)
  return config


def batches():
  """Yields the host batches of the run."""
  rng = np.random.default_rng(0)
  for _ in range(STEPS):
    yield {"image": rng.integers(0, 256, (32, 16, 16, 3), np.uint8), "label": rng.integers(0, 6, 32, np.int32)}


def collectives(compiled):
  """Returns the number of collectives of each kind in a compiled program."""
  found = re.findall(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(",
                     compiled.as_text())
  return {kind: found.count(kind) for kind in sorted(set(found))}


def local_bytes(tree):
  """Returns what the first device holds of a tree, and the size of the tree, in bytes."""
  leaves = jax.tree.leaves(tree)
  return [sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves), sum(leaf.nbytes for leaf in leaves)]


def run(dtype, num_devices, overrides):
  config = make_config(dtype, overrides)
  config_lib.validate(config, num_devices=num_devices)
  program = train_lib.build(config, 64, jax.devices()[:num_devices])
  train_step = train_lib.compile_train_step(config, program)
  eval_step = train_lib.compile_eval_step(config, program)
  state = jax.jit(program.init, out_shardings=jax.tree.map(lambda x: x.sharding, program.abstract_state))()
  born = jax.tree.map(lambda x: x.sharding, state)
  metrics = []
  for batch in batches():
    state, step_metrics = train_step(state, mesh_lib.to_global(program.mesh, batch))
    metrics.append(np.asarray(step_metrics).tolist())
  assert jax.tree.map(lambda x: x.sharding, state) == born
  mask = np.arange(32) < 29
  result = evaluate.evaluate(eval_step, program.mesh, *state.for_eval(),
                             iter([batch | {"mask": mask} for batch in batches()]), lambda: False)
  return dict(zip(METRICS, np.transpose(metrics).tolist())) | {
      "eval": result,
      "stats": [np.asarray(x).tolist() for x in jax.tree.leaves(state.batch_stats)],
      "train_collectives": collectives(train_step),
      "eval_collectives": collectives(eval_step),
      "opt_state_bytes": local_bytes(state.opt_state),
      "params_bytes": local_bytes(state.params),
  }


def main(dtype, *families):
  print(json.dumps({family: {name: run(dtype, *mode) for name, mode in MODES[family].items()}
                    for family in families or MODES}))


if __name__ == "__main__":
  main(*sys.argv[1:])
