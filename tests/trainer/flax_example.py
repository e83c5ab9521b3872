"""The step of Flax's ImageNet example, written anew, and its estimate on a TPU beside ours.

    python -m tests.trainer.flax_example [--topology=v5e:2x2] [--batch=128] [--accumulation=1,8]

compiles both for the same chips, one after the other, and prints their estimates by
trainer.tools.tpu_cost, by kind, with the ratio of ours to the example's. `--texts=FOLDER` keeps the
compiled programs there, and takes those that it finds. It needs libtpu, runs nothing, and takes
minutes for each step.

The example is github.com/google/flax, examples/imagenet: ResNet-50 v1.5 in Linen, bfloat16
activations, batch norm over the global batch, SGD with Nesterov momentum, weight decay of kernels
as a part of the loss, a cosine after a warm-up. Its images come normalised from the host.
"""

import argparse
from collections.abc import Callable
import functools
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


def compile_ours(devices: list[jax.Device], batch: int, accumulation: int) -> jax.stages.Compiled:
  """Compile this project's step for the same work: statistics of a device's own examples."""
  from configs import imagenet_resnet50
  from trainer import config as config_lib
  from trainer import program as program_lib
  from trainer.tools import layers

  config = imagenet_resnet50.get_config()
  config.global_batch_size = config.eval.batch_size = batch
  config.model.bn_group, config.accumulation_steps = "device", accumulation
  config_lib.validate(config)
  program = program_lib.build(config, 1_281_167, devices)
  with layers.named(program.model.merge(program.abstract_state.raw(), None)):
    lowered = program.lower("train", **program.sizes("train"))
  return program.finish(lowered, "train")


def main(arguments: list[str]) -> None:
  """Print the table."""
  parser = argparse.ArgumentParser(prog="python -m tests.trainer.flax_example")
  parser.add_argument("--topology", default="v5e:2x2")
  parser.add_argument("--batch", type=int, default=128, help="images a chip")
  parser.add_argument("--accumulation", default="1,8", help="micro-batches of ours, a row for each")
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
  for count in map(int, args.accumulation.split(",")):
    steps[f"ours, {count} micro-batch(es)"] = functools.partial(compile_ours, devices, batch, count)
  lines: dict[str, tpu_cost.TimeLine] = {}
  for name, compile_step in steps.items():
    start = time.perf_counter()
    kept = args.texts and args.texts / f"{args.topology} {args.batch} {name}.txt".replace(":", "-")
    if kept and kept.exists():
      text = kept.read_text()
    else:
      text = compile_step().as_text() or ""
      if kept:
        kept.write_text(text)
    lines[name] = tpu_cost.time_line(text, device)
    print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
  theirs = lines["Flax example"]
  print(f"Estimates for {args.topology}, {args.batch} images a chip, M cycles of a step")
  kinds = dict.fromkeys(kind for line in lines.values() for kind in line.by_kind())
  print("| | M an image | ratio | without collectives | ratio | sum of the compiler's |", end="")
  print("".join(f" {kind} |" for kind in kinds))
  print("|---|" + "---:|" * (5 + len(kinds)))
  for name, line in lines.items():
    print(
      f"| {name} | {line.cycles / args.batch / 1e6:.3f} | {line.cycles / theirs.cycles:.3f} | "
      f"{line.without_collectives / 1e6:.1f} | "
      f"{line.without_collectives / theirs.without_collectives:.3f} | {line.estimated / 1e6:.1f} |",
      end="",
    )
    print("".join(f" {line.by_kind().get(kind, 0) / 1e6:.1f} |" for kind in kinds))


if __name__ == "__main__":
  main(sys.argv[1:])
