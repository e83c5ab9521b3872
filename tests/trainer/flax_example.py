"""The step of Flax's ImageNet example, written anew, and its estimate on a TPU beside ours.

    python -m tests.trainer.flax_example [--topology=v5e:2x2] [--batch=128] [--ours='A=B ...']

compiles both for the same chips, one after the other, and prints their estimates by
trainer.tools.tpu_cost, by kind, with the ratio of ours to the example's. Each `--ours` is a row of
configs/imagenet_resnet50.py with these fields; without any there are those of LEVERS. With
`--texts=FOLDER` the compiled programs are kept there, and those found there are not compiled again.
It needs libtpu, runs nothing, and takes minutes for each step.

The example is github.com/google/flax, examples/imagenet: ResNet-50 v1.5 in Linen, bfloat16
activations, batch norm over the global batch, SGD with Nesterov momentum, weight decay of kernels
as a part of the loss, a cosine after a warm-up. Its images come normalised from the host.
"""

import argparse
import ast
from collections.abc import Callable
import functools
import json
import pathlib
import sys
import time
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

CLASSES, SIZE = 1000, 224
# Fields of our step, by rows of the table. BN is over a device's own examples where none says else.
_STEM = "model.pool_first=True model.row_pairs=True"
LEVERS = (
  "accumulation_steps=1",
  "accumulation_steps=8",
  "accumulation_steps=8 model.pool_first=True",
  f"accumulation_steps=8 {_STEM}",
  f"accumulation_steps=8 {_STEM} model.bn_together=True model.zeros_last=True",
  f"accumulation_steps=8 {_STEM} model.bn_group=32",
  f"accumulation_steps=4 {_STEM}",
)


class Block(nn.Module):
  """A bottleneck of 1x1, 3x3 and 1x1 convolutions, the stride on the second."""

  channels: int
  stride: int
  conv: Callable[..., Any]
  norm: Callable[..., Any]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    strides = (self.stride, self.stride)
    y = nn.relu(self.norm()(self.conv(self.channels, (1, 1))(x)))
    y = nn.relu(self.norm()(self.conv(self.channels, (3, 3), strides)(y)))
    y = self.norm(scale_init=nn.initializers.zeros_init())(self.conv(4 * self.channels, (1, 1))(y))
    if x.shape != y.shape:
      x = self.norm(name="norm_proj")(
        self.conv(4 * self.channels, (1, 1), strides, name="conv_proj")(x)
      )
    return nn.relu(x + y)


class ResNet50(nn.Module):
  """ResNet v1.5 of 50 layers."""

  numbers: tuple[int, ...] = (3, 4, 6, 3)
  classes: int = CLASSES

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
    conv = functools.partial(nn.Conv, use_bias=False, dtype=jnp.bfloat16)
    norm = functools.partial(
      nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=jnp.bfloat16
    )
    x = conv(64, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], name="conv_init")(x)
    x = nn.relu(norm(name="bn_init")(x))
    x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
    for stage, number in enumerate(self.numbers):
      for block in range(number):
        x = Block(64 * 2**stage, 2 if stage and not block else 1, conv, norm)(x)
    x = jnp.mean(x, axis=(1, 2))
    return jnp.asarray(nn.Dense(self.classes, dtype=jnp.bfloat16)(x), jnp.bfloat16)


class State(NamedTuple):
  """What a step reads and writes."""

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any


def make_step(
  steps_per_epoch: int = 1252, model: nn.Module | None = None
) -> tuple[Callable[[], State], Callable[[State, Any, Any], tuple[State, Any]]]:
  """Return init() -> state and step(state, images, labels) -> (state, metrics)."""
  net = model or ResNet50()
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, 0.4, 5 * steps_per_epoch, 100 * steps_per_epoch
  )
  optimizer = optax.sgd(schedule, momentum=0.9, nesterov=True)

  def init() -> State:
    variables = net.init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3), jnp.bfloat16))
    params = variables["params"]
    return State(jnp.int32(0), params, variables["batch_stats"], optimizer.init(params))

  def step(
    state: State, images: jax.Array, labels: jax.Array
  ) -> tuple[State, dict[str, jax.Array]]:
    one_hot = jax.nn.one_hot(labels, CLASSES)

    def loss_fn(params: Any) -> tuple[jax.Array, tuple[Any, jax.Array]]:
      logits, new = net.apply(
        {"params": params, "batch_stats": state.batch_stats}, images, mutable=["batch_stats"]
      )
      loss = optax.softmax_cross_entropy(logits, one_hot).mean()
      kernels = [x for x in jax.tree.leaves(params) if x.ndim > 1]
      decay = 0.0001 * 0.5 * sum(jnp.sum(x**2) for x in kernels)
      return loss + decay, (new["batch_stats"], logits)

    grads, (batch_stats, logits) = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics = {
      "loss": optax.softmax_cross_entropy(logits, one_hot).mean(),
      "accuracy": jnp.mean(jnp.argmax(logits, -1) == labels),
      "learning_rate": schedule(state.step),
    }
    params = optax.apply_updates(state.params, updates)
    return State(state.step + 1, params, batch_stats, opt_state), metrics

  return init, step


def lower(devices: list[jax.Device], batch: int) -> jax.stages.Lowered:
  """Trace the step for a global batch over devices, the state whole on each."""
  mesh = Mesh(np.array(devices), ("batch",), axis_types=(AxisType.Auto,))
  whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("batch"))
  init, step = make_step()
  state = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), jax.eval_shape(init)
  )
  images = jax.ShapeDtypeStruct((batch, SIZE, SIZE, 3), jnp.bfloat16, sharding=split)
  labels = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=split)
  return jax.jit(step, donate_argnums=0, out_shardings=whole).lower(state, images, labels)


def compile_ours(devices: list[jax.Device], batch: int, fields: str) -> jax.stages.Compiled:
  """Compile this project's step for the same work.

  Args:
    devices: to compile for.
    batch: over all of them.
    fields: as in "accumulation_steps=8 model.bn_group=32".
  """
  from configs import imagenet_resnet50
  from trainer import config as config_lib
  from trainer import program as program_lib
  from trainer.tools import layers

  config = imagenet_resnet50.get_config()
  config.global_batch_size = config.eval.batch_size = batch
  config.model.bn_group = "device"
  for field in fields.split():
    name, value = field.split("=")
    text = isinstance(config[name] if "." not in name else config.model[name[6:]], str)
    config.update_from_flattened_dict({name: value if text else ast.literal_eval(value)})
  config_lib.validate(config)
  config_lib.check_split(config, num_devices=len(devices))
  program = program_lib.build(config, 1_281_167, devices)
  with layers.named(layers.structure(program.model, program.abstract_state.raw())):
    lowered = program.lower("train", **program.sizes("train"))
  return program.finish(lowered, "train")


def compiled(
  compile_step: Callable[[], jax.stages.Compiled], kept: pathlib.Path | None
) -> tuple[str, dict[str, float]]:
  """Return the text of a program, and MiB of its temporaries and seconds of its compilation.

  Args:
    compile_step: makes it, unless it is kept.
    kept: file of its text; None for none.
  """
  from trainer.tools import estimate

  facts = kept and kept.with_suffix(".json")
  if kept and facts and kept.exists():
    return kept.read_text(), json.loads(facts.read_text()) if facts.exists() else {}
  start = time.perf_counter()
  step = compile_step()
  found = {
    "temporaries, MiB": estimate.memory(step)["temporary"] / 2**20,
    "compiled in, s": time.perf_counter() - start,
  }
  text = step.as_text() or ""
  if kept and facts:
    kept.write_text(text)
    facts.write_text(json.dumps(found))
  return text, found


def main(arguments: list[str]) -> None:
  """Print the table."""
  parser = argparse.ArgumentParser(prog="python -m tests.trainer.flax_example")
  parser.add_argument("--topology", default="v5e:2x2")
  parser.add_argument("--batch", type=int, default=128, help="images a chip")
  parser.add_argument("--ours", action="append", help="fields of a row, as in 'FIELD=VALUE ...'")
  parser.add_argument("--texts", type=pathlib.Path, help="folder of compiled programs")
  args = parser.parse_args(arguments)
  from launch import preflight

  devices = preflight.topology_devices(args.topology, 1)
  from trainer.tools import estimate, tpu_cost

  where = estimate.pod(devices)
  batch = args.batch * where.chips
  device = tpu_cost.rates(where.chip, where.devices_per_chip)
  steps: dict[str, Callable[[], jax.stages.Compiled]] = {
    "Flax example": lambda: lower(devices, batch).compile()
  }
  for fields in args.ours or LEVERS:
    steps[fields] = functools.partial(compile_ours, devices, batch, fields)
  lines: dict[str, tpu_cost.TimeLine] = {}
  facts: dict[str, dict[str, float]] = {}
  for name, compile_step in steps.items():
    kept = args.texts and args.texts / f"{args.topology} {args.batch} {name}.txt".replace(":", "-")
    text, facts[name] = compiled(compile_step, kept)
    lines[name] = tpu_cost.time_line(text, device)
    print(f"{name}: {facts[name]}", file=sys.stderr, flush=True)
  theirs = lines["Flax example"]
  print(f"Estimates for {args.topology}, {args.batch} images a chip, M cycles of a step")
  kinds = dict.fromkeys(kind for line in lines.values() for kind in line.by_kind())
  measured = dict.fromkeys(fact for found in facts.values() for fact in found)
  columns = [
    "M an image",
    "ratio",
    "without collectives",
    "ratio",
    "sum of the compiler's",
    "GB of HBM",
    "collectives",
    *measured,
    *kinds,
  ]
  print(f"| | {' | '.join(columns)} |")
  print("|---|" + "---:|" * len(columns))
  for name, line in lines.items():
    cells = [
      f"{line.cycles / args.batch / 1e6:.3f}",
      f"{line.cycles / theirs.cycles:.3f}",
      f"{line.without_collectives / 1e6:.1f}",
      f"{line.without_collectives / theirs.without_collectives:.3f}",
      f"{line.estimated / 1e6:.1f}",
      f"{line.hbm_bytes / 1e9:.1f}",
      f"{sum(each.rounds for each in line.transfers):.0f}",
      *(f"{facts[name][fact]:.0f}" if fact in facts[name] else "" for fact in measured),
      *(f"{line.by_kind().get(kind, 0) / 1e6:.1f}" for kind in kinds),
    ]
    print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
  main(sys.argv[1:])
