"""Process of test_sharding.py: runs small nets on virtual devices in every layout; prints JSON.

JAX_NUM_CPU_DEVICES=8 python -m tests.trainer.sharded float32|float64 family ...
JAX_NUM_CPU_DEVICES=4 python -m tests.trainer.sharded float32 hosts PORT PROCESS    (of two)
"""

import collections
import json
import os
import sys
import tempfile

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.trainer import outside, tiny
from trainer import config as config_lib
from trainer import evaluate
from trainer import mesh as mesh_lib
from trainer import optimizer as optimizer_lib
from trainer import program as program_lib
from trainer.models import convolution
from trainer.pod.pod import Pod
from trainer.pod.requests import NOTHING
from trainer.step import metric_names
from trainer.tools import collectives
from trainer.weights import teacher
from trainer.workdir.checkpoint import Checkpointer

STEPS = 10
FSDP = {"mesh.fsdp": 2, "sharding.params": "fsdp"}
SPACE = {"mesh.space": 2}
UPDATE = {"sharding.opt_state": "data"}
ALL = FSDP | SPACE | UPDATE
ACCUMULATE = {"accumulation_steps": 4}
GROUP = {"model.bn_group": "8"}

# For test_distill.py, which names the teacher in the environment.
DISTILLED = ACCUMULATE | {
  "distill.teacher": os.environ.get("TEACHER", ""),
  "distill.weight": 0.75,
  "distill.temperature": 2.0,
}

RANDOM = {"augment": "mixup(alpha=0.2)|tests.trainer.outside:shade(strength=0.3)"}
LAYOUTS = {"1": (1, {}), "8": (8, {}), "all": (8, ALL)}

# Name: (devices, what differs from the default). Those of one family compute the same numbers.
FAMILIES = {
  "global": {
    "1": (1, {}),
    "8": (8, {}),
    "fsdp": (8, FSDP),
    "space": (8, SPACE),
    "update": (8, UPDATE),
    "all": (8, ALL),
  },
  "group": {
    "1": (1, GROUP),
    "2": (2, GROUP),
    "4": (4, GROUP),
    "8": (8, GROUP),
    "together": (8, GROUP | {"model.bn_together": True}),
    "all": (8, GROUP | ALL),
  },
  "device": {
    "number": (1, {"model.bn_group": "4"}),
    "device": (8, {"model.bn_group": "device"}),
    "half": (8, {"model.bn_group": "2"}),
  },
  "accumulation": {"1": (1, ACCUMULATE), "8": (8, ACCUMULATE), "all": (8, ACCUMULATE | ALL)},
  "accumulation of groups": {
    "1": (1, ACCUMULATE | {"model.bn_group": "2"}),
    "8": (8, ACCUMULATE | {"model.bn_group": "2"}),
    "device": (4, ACCUMULATE | {"model.bn_group": "device"}),
  },
  # A batch in one go, and in four, where groups make both the same but for the order of the running
  # averages.
  "one": {"1": (1, {"model.bn_group": "1"})},
  "four": {"1": (1, ACCUMULATE | {"model.bn_group": "1"})},
  "hosts": {"8": (8, GROUP), "all": (8, GROUP | ALL)},
  # Dropout, stochastic depth and mixing: drawn for an example, not for a device.
  "random": {name: (n, RANDOM | mode) for name, (n, mode) in LAYOUTS.items()},
  "random micro-batches": {"1": (1, RANDOM | ACCUMULATE), "8": (8, RANDOM | ACCUMULATE)},
  "distilled": {
    "1": (1, DISTILLED),
    "4": (4, DISTILLED),
    "all": (8, DISTILLED | ALL),
  },
}


def make_config(dtype, overrides):
  config = (outside if "augment" in overrides else tiny).get_config()
  config.global_batch_size = config.eval.batch_size = 32
  config.model.dtype = dtype
  config.optimizer.lr_per_256 = 0.4
  config.optimizer.ema_decay = 0.9
  config.update_from_flattened_dict(overrides)
  return config


def batches():
  """Yields this host's rows of every batch."""
  rng, rows = np.random.default_rng(0), 32 // jax.process_count()
  mine = slice(rows * jax.process_index(), rows * (jax.process_index() + 1))
  for _ in range(STEPS):
    batch = {
      "image": rng.integers(0, 256, (32, 16, 16, 3), np.uint8),
      "label": rng.integers(0, 6, 32, np.int32),
      "mask": np.arange(32) < 29,
    }
    yield {name: x[mine] for name, x in batch.items()}


def number_of_each(compiled):
  """Returns the number of collectives of each kind in a compiled program."""
  return collections.Counter(collective.kind for collective in collectives.read(compiled.as_text()))


def kernel_bytes(tree):
  """Return {leaf: [bytes on the first device, bytes in all]} of leaves that are no vectors."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): [
      leaf.addressable_shards[0].data.nbytes,
      leaf.nbytes,
    ]
    for path, leaf in jax.tree.leaves_with_path(tree)
    if leaf.ndim > 1
  }


def start(program, host_state=None):
  """Return the state of step 0, made in place or, without compiling that, copied from the host."""
  shardings = jax.tree.map(lambda x: x.sharding, program.abstract_state)
  if host_state is not None:
    return jax.device_put(host_state, shardings)
  return jax.jit(program.init, out_shardings=shardings)()


def run(dtype, num_devices, overrides, host_state=None):
  """Returns what ten steps and an evaluation show, and the state of step 0."""
  config = make_config(dtype, overrides)
  config_lib.validate(config)
  config_lib.check_split(config, num_devices=num_devices)
  read = teacher.read(config) if config.distill.weight else None
  program = program_lib.build(config, 64, jax.devices()[:num_devices], teacher=read)
  taught = (read.place(config, program.mesh),) if read else ()
  train_step = program.compile("train", **program.sizes("train"))
  eval_step = program.compile("eval", **program.sizes("eval"))
  state = start(program, host_state)
  if host_state is None and jax.process_count() == 1:
    host_state = jax.device_get(state)
  nothing, metrics = mesh_lib.flags(program.mesh, NOTHING), []
  for batch in batches():
    batch = {name: batch[name] for name in program_lib.BATCHES["train"]}
    state, output = train_step(state, mesh_lib.to_global(program.mesh, batch), nothing, *taught)
    metrics.append(np.asarray(output.metrics).tolist())
  for leaf, abstract in zip(
    jax.tree.leaves(state), jax.tree.leaves(program.abstract_state), strict=True
  ):
    assert (
      leaf.sharding.is_equivalent_to(abstract.sharding, leaf.ndim) and leaf.dtype == abstract.dtype
    )
  return dict(zip(metric_names(config), np.transpose(metrics).tolist())) | {
    "eval": evaluate.evaluate(
      eval_step, program.mesh, [state.for_eval()], batches(), lambda: nothing
    ),
    "batch_stats": [np.asarray(x).tolist() for x in jax.tree.leaves(state.batch_stats)],
    "dtypes": sorted({str(leaf.dtype) for leaf in jax.tree.leaves(state)}),
    "train_collectives": number_of_each(train_step),
    "eval_collectives": number_of_each(eval_step),
    "momentum": kernel_bytes(state.opt_state),
    "params": kernel_bytes(state.params),
  }, host_state


def move_checkpoints(dtype):
  """Return whether each layout restores what another saved bit for bit, and starts alike."""

  def build(num_devices, overrides):
    config = make_config(dtype, overrides)
    return config, program_lib.build(config, 64, jax.devices()[:num_devices])

  def same(a, b):
    return all(
      np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )

  config, program = build(8, ALL)
  state = start(program)
  moved = {"born": same(state, start(build(1, {})[1]))}
  with tempfile.TemporaryDirectory() as folder:
    checkpointer = Checkpointer(Pod(config.pod), epath.Path(folder), config, 0)
    checkpointer.save_and_wait(0, state, {"best": None, "wall_seconds": {}})
    checkpointer.close()
    for name, (num_devices, overrides) in {
      "1": (1, {}),
      "fsdp": (8, FSDP),
      "update": (8, UPDATE),
    }.items():
      config, program = build(num_devices, overrides)
      checkpointer = Checkpointer(Pod(config.pod), epath.Path(folder), config, 0)
      restored, _ = checkpointer.restore_newest(program.abstract_state)
      checkpointer.close()
      placed = jax.tree.map(
        lambda x, abstract: x.sharding == abstract.sharding, restored, program.abstract_state
      )
      moved[name] = same(restored, state) and all(jax.tree.leaves(placed))
  return moved


def update_in_shards():
  """Return {optimizer: [on a device, in shards over eight]}: norms of its leaves after 3 steps."""
  shapes = {"conv": (3, 3, 8, 16), "bn": (16,), "head": (16, 8)}
  rng = np.random.default_rng(0)
  steps = [{name: rng.normal(size=shape) for name, shape in shapes.items()} for _ in range(4)]
  seen = collections.defaultdict(list)
  for name in optimizer_lib.OPTIMIZERS:
    for num_devices, overrides in ((1, {}), (8, FSDP | UPDATE)):
      config = make_config("float64", {"optimizer.name": name, "optimizer.agc": 0.3} | overrides)
      mesh = mesh_lib.make_mesh(config.mesh, jax.devices()[:num_devices])
      rule = optimizer_lib.make_optimizer(config, lambda step: 0.1)
      state = {"params": steps[0], "opt_state": jax.eval_shape(rule.init, steps[0])}
      shardings = mesh_lib.state_shardings(config, mesh, state)
      in_shards = mesh_lib.state_shardings(config, mesh, {"opt_state": steps[0]})["opt_state"]
      assert num_devices == 1 or not in_shards["conv"].is_fully_replicated

      def take(state, grads, rule=rule):
        updates, opt_state = rule.update(grads, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}

      def init(params, rule=rule):
        return {"params": params, "opt_state": rule.init(params)}

      state = jax.jit(init, out_shardings=shardings)(steps[0])
      step = jax.jit(take, out_shardings=shardings)
      for grads in steps[1:]:
        state = step(state, jax.device_put(grads, in_shards))
      moved = jax.tree.map(lambda x, start: x - start, jax.device_get(state["params"]), steps[0])
      leaves = jax.tree.leaves([moved, jax.device_get(state["opt_state"])])
      seen[name].append([float(np.linalg.norm(leaf)) for leaf in leaves])
  return seen


def thin_maps():
  """Return {parts of the height: largest error} of convolutions down to maps of a single row.

  Two of them read each map, with kernels that are computed.
  """
  rng = np.random.default_rng(0)
  args = [rng.normal(size=shape) for shape in ((8, 8, 8, 4), (6, 2, 3, 3, 4, 4), (4,))]

  def value(x, kernels, gain):
    for i, (one, other) in enumerate(kernels):
      x, stride, around = jnp.tanh(x), 2 - i % 2, [(1, 1), (1, 1)]
      x = convolution.convolve(x, one * gain, stride, around) + convolution.dense(
        x, other * gain, (stride, stride), around, dimension_numbers=("NHWC", "HWIO", "NHWC")
      )
    return jnp.sum(jnp.sin(x))

  gradients = jax.value_and_grad(value, (0, 1, 2))
  expected, errors = jax.tree.leaves(jax.jit(gradients)(*args)), {}
  for space in (2, 4):
    mesh = mesh_lib.make_mesh(make_config("float64", {"mesh.space": space}).mesh)
    whole = mesh_lib.replicated(mesh)
    shardings = (mesh_lib.batch_sharding(mesh, 4), whole, whole)
    with jax.set_mesh(mesh):
      found = jax.jit(gradients, in_shardings=shardings, out_shardings=whole)(*args)
    errors[space] = max(
      float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
      for a, b in zip(map(np.asarray, jax.tree.leaves(found)), expected, strict=True)
    )
  return errors


def main(dtype, *families):
  if families[0] == "hosts":
    _, port, process = families
    families = families[:1]
    jax.distributed.initialize(f"localhost:{port}", 2, int(process), heartbeat_timeout_seconds=30)
  others = {
    "checkpoint": lambda: move_checkpoints(dtype),
    "optimizers": update_in_shards,
    "thin": thin_maps,
  }
  seen = {}
  for family in families:
    if family in others:
      seen[family] = others[family]()
      continue
    host_state, seen[family] = None, {}
    for name, (num_devices, overrides) in FAMILIES[family].items():
      seen[family][name], host_state = run(dtype, num_devices, overrides, host_state)
  print(json.dumps(seen))


if __name__ == "__main__":
  main(*sys.argv[1:])
