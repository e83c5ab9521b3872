"""What a training step costs, and what the trainer costs beside it, one command for each cost:

    python -m trainer.bench step      images/s of a ResNet-50 step over those of Flax's example
    python -m trainer.bench loop      steps per second of `train()` over those of the bare step
    python -m trainer.bench save      time that steps lose to an asynchronous save over its duration
    python -m trainer.bench startup   seconds to the first step of a second start over the first
    python -m trainer.bench depth     compiler, memory and step of deep nets, unrolled and scanned
    python -m trainer.bench augment   FLOPs and bytes that mixing adds to a step
    python -m trainer.bench replicas  what it takes to compare the copies of the state on devices
    python -m trainer.bench hosts     seconds until many hosts agree, memory and threads of host 0

`--help` after a command lists its options.
"""

import argparse
import collections
from collections.abc import Callable, Sequence
import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

from absl import logging
from etils import epath
import jax
import jax.numpy as jnp
import ml_collections

from configs import base
from input_pipeline import loader, sources
from trainer import config as config_lib
from trainer import mesh as mesh_lib
from trainer import program as program_lib
from trainer import replicas
from trainer import train as train_lib
from trainer.errors import TrainerError
from trainer.pod.pod import Pod
from trainer.pod.requests import NOTHING
from trainer.state import TrainState
from trainer.tools import collectives
from trainer.tools.depth import bench_depth
from trainer.tools.hosts import bench_hosts
from trainer.tools.step_speed import bench_step
from trainer.workdir.checkpoint import Checkpointer
from trainer.workdir.paths import Workdir


def loop_config(batch_size: int, steps: int) -> ml_collections.ConfigDict:
  """Return the config of both sides."""
  config = base.get_config()
  config.global_batch_size = config.eval.batch_size = batch_size
  config.total_epochs, config.total_steps = 0.0, steps
  config.model.name, config.model.depth, config.model.width = "cifar_resnet", 8, 0.25
  config.model.num_classes, config.model.dtype = 10, "float32"
  config.data.kind, config.data.synthetic_examples = "synthetic", 8 * batch_size
  config.data.image_size = config.data.eval_image_size = config.data.eval_resize = 16
  config.optimizer.warmup_epochs = config.eval.every_epochs = 0.0
  return config


def loop_speed(config: ml_collections.ConfigDict) -> float:
  """Return steps per second of `train()`."""
  with tempfile.TemporaryDirectory() as workdir:
    seconds = train_lib.train(config, workdir)["wall_seconds"]
  return config.total_steps / (seconds["step"] + seconds["input_wait"])


def bare_speed(config: ml_collections.ConfigDict) -> float:
  """Return steps per second of the compiled step on one batch."""
  program = program_lib.build(config, config.data.synthetic_examples)
  train_step = program.compile("train", **program.sizes("train"))
  source = sources.open_source(config.data, config.data.train_split, config.model.num_classes)
  with contextlib.closing(
    loader.train_batches(
      source, config.data, seed=config.seed, global_batch_size=config.global_batch_size
    )
  ) as host_batches:
    host_batch = next(host_batches)
  batch = mesh_lib.to_global(
    program.mesh, {name: host_batch[name] for name in program_lib.BATCHES["train"]}
  )
  requests = mesh_lib.flags(program.mesh, NOTHING)
  state = program.init_state()
  jax.block_until_ready((state, batch))
  start = time.perf_counter()
  for _ in range(config.total_steps):
    state, output = train_step(state, batch, requests)
  jax.block_until_ready((state, output))
  return config.total_steps / (time.perf_counter() - start)


def bench_loop(args: argparse.Namespace) -> None:
  """Print what the loop costs: steps per second of `train()` over those of the bare jitted step.

  The net is tiny (CIFAR ResNet-8 of a quarter of the width on 16 px images), so that a step is
  short and whatever the loop adds shows. `train()` runs in full, with logging, event files and
  prefetching, on synthetic batches that cost nothing to make; the bare step gets one batch that is
  on the device already. Neither side includes compilation, evaluation or saves.
  """
  config = loop_config(args.batch_size, args.steps)
  rounds = []
  with tempfile.TemporaryDirectory() as compiled:
    config.compilation_cache = compiled  # so that only the first round compiles
    for number in range(args.rounds):
      loop, bare = loop_speed(config), bare_speed(config)
      rounds.append((loop, bare))
      print(
        f"round {number + 1:2}: train() {loop:7.1f} steps/s   bare step {bare:7.1f} steps/s   "
        f"ratio {loop / bare:.3f}",
        flush=True,
      )
  # Other load of the machine can only slow a round down, so the fastest round of each side counts.
  loop, bare = map(max, zip(*rounds))
  print(
    f"fastest rounds: ratio {loop / bare:.3f}, a bare step takes {1000 / bare:.2f} ms, train() "
    f"adds {1e6 * (1 / loop - 1 / bare):.0f} us; median ratio "
    f"{statistics.median(l / b for l, b in rounds):.3f} ({devices()}, batch {args.batch_size})"
  )


class StepLoop:
  """Cheap steps that read, write and donate a training state, two in flight as in `train()`."""

  def __init__(self, state: TrainState, idle_seconds: float):
    """Compile the step.

    Args:
      state: state before the first step; donated.
      idle_seconds: pause of the host in each step, as while an accelerator computes.
    """
    self.state = state
    self._idle_seconds = idle_seconds
    self._queued: collections.deque[jax.Array] = collections.deque()
    self._step = jax.jit(
      lambda state: (
        jax.tree.map(lambda x: x if x.dtype == jnp.int32 else 0.999 * x, state),
        state.step + 1,
      ),
      donate_argnums=0,
    )

  def run(self) -> None:
    """Take a step."""
    self.state, metrics = self._step(self.state)
    self._queued.append(metrics)
    time.sleep(self._idle_seconds)
    if len(self._queued) > 2:
      self._queued.popleft().block_until_ready()

  def drain(self) -> None:
    """Wait for all steps."""
    self._queued.clear()
    jax.block_until_ready(self.state)

  def seconds_per_step(self, steps: int) -> float:
    """Return the mean over `steps` steps."""
    self.drain()
    start = time.perf_counter()
    for _ in range(steps):
      self.run()
    self.drain()
    return (time.perf_counter() - start) / steps


def bench_save(args: argparse.Namespace) -> None:
  """Print what a step loop loses to the asynchronous save of a ResNet-50 with SGD momentum.

  The loss is the time for which the loop stands still (hashing the leaves, copying them on the
  device, starting the save) plus what the steps during the save take longer than without one:
  writing needs the processors of the host, which may be the device as well.
  """
  config = base.get_config()
  config.global_batch_size, config.checkpoint.keep_last = jax.device_count(), 1
  program = program_lib.build(config, num_examples=1000)
  loop = StepLoop(program.init_state(), args.idle_seconds)
  items = loop.state.params, loop.state.batch_stats, loop.state.opt_state
  values, size = (
    sum(getattr(x, what) for x in jax.tree.leaves(items)) for what in ("size", "nbytes")
  )
  print(f"{values / 1e6:.0f} M values, {size / 1e6:.0f} MB; {devices()}", flush=True)
  loop.seconds_per_step(3)
  rounds = []
  with tempfile.TemporaryDirectory(dir=args.folder) as folder:
    checkpointer = Checkpointer(Pod(config.pod), epath.Path(folder), config, every_steps=0)
    for number in range(args.rounds + 1):
      quiet = loop.seconds_per_step(args.steps)
      start, steps = time.perf_counter(), 0
      checkpointer.save(number, loop.state, {"best": None, "wall_seconds": {}})
      stall = time.perf_counter() - start
      while not (Workdir(epath.Path(folder)).checkpoints / str(number)).exists():
        loop.run()
        checkpointer.poll()
        steps += 1
      loop.drain()
      whole = time.perf_counter() - start
      checkpointer.poll(wait=True)
      lost = whole - steps * quiet
      print(
        f"{f'save {number:2}:' if number else 'first:  '} stood still {stall:.3f} s, "
        f"lost {lost:.3f} s of {whole:.3f} s, ratios {stall / whole:.3f} and {lost / whole:.3f}; "
        f"{steps} steps during it, of {1000 * quiet:.1f} ms without it",
        flush=True,
      )
      if number:  # the first save compiles the hashes, once in a process
        rounds.append((stall / whole, lost / whole))
    checkpointer.close()
  stall, lost = map(statistics.median, zip(*rounds))
  print(f"medians: the loop stands still for {stall:.3f} of a save and loses {lost:.3f} of it")


def bench_startup(args: argparse.Namespace) -> None:
  """Print how much sooner a second start takes its first step, with what the first one compiled.

  Both are processes of `python -m trainer` with a ResNet-18 on synthetic images of 64 px, timed
  from the start of the interpreter to the progress line of step 1. They share the compilation cache
  only.
  """
  seconds = []
  with tempfile.TemporaryDirectory() as folder:
    for number in range(2):
      fields = {
        "model.depth": 18,
        "data.kind": "synthetic",
        "data.image_size": 64,
        "data.eval_image_size": 64,
        "data.eval_resize": 64,
        "global_batch_size": 8,
        "eval.batch_size": 8,
        "total_epochs": 0.0,
        "total_steps": 100,
        "optimizer.warmup_epochs": 0.0,
        "eval.every_epochs": 0.0,
        "log.every_steps": 1,
        "compilation_cache": f"{folder}/compiled",
      }
      command = [
        sys.executable,
        "-m",
        "trainer",
        f"--config={base.__file__}",
        f"--workdir={folder}/{number}",
        *[f"--config.{field}={value}" for field, value in fields.items()],
      ]
      environment = {
        name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"
      }
      start = time.perf_counter()
      log = []
      with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
          log.append(line)
          if "step 1/100 " in line:
            break
        seconds.append(time.perf_counter() - start)
        process.kill()
      compiled = re.search(r"Compiled in ([0-9.]+) s", "".join(log))
      if not compiled:
        sys.exit("".join(log))
      print(
        f"start {number + 1}: first step after {seconds[-1]:.1f} s, of which it compiled for "
        f"{compiled[1]} s",
        flush=True,
      )
  print(f"ratio {seconds[1] / seconds[0]:.3f}")


def bench_augment(args: argparse.Namespace) -> None:
  """Print what `config.augment` adds to the FLOPs and bytes of a ResNet-50 step at 224 px.

  By the cost analysis of the compiler, for the compiled program; nothing runs.
  """
  figures = []
  for chain in ("", args.chain):
    config = base.get_config()
    config.global_batch_size, config.augment = args.batch_size, chain
    config.data.image_size = args.image_size
    config_lib.validate(config)
    program = program_lib.build(config, num_examples=1000 * args.batch_size)
    cost = program.compile("train", **program.sizes("train")).cost_analysis()
    assert cost is not None, "the compiler of this backend counts nothing"
    figures.append((cost["flops"], cost["bytes accessed"]))
    flops, accessed = (value / args.batch_size for value in figures[-1])
    print(
      f"{flops / 1e9:.3f} GFLOP and {accessed / 1e6:.1f} MB of an image with "
      f"{chain or 'no augmentation'}",
      flush=True,
    )
  flops, accessed = (new / old - 1 for old, new in zip(*figures))
  print(
    f"the augmentation adds {100 * flops:.3f} % of FLOPs and {100 * accessed:.3f} % of bytes "
    f"({devices()}, batch {args.batch_size})"
  )


def bench_replicas(args: argparse.Namespace) -> None:
  """Print what a comparison of the copies of a ResNet-50 with SGD momentum takes.

  FLOPs, bytes and collectives are those of the compiled program, by the cost analysis of the
  compiler; JAX_NUM_CPU_DEVICES=8 makes eight devices of a CPU.
  """
  config = base.get_config()
  config.global_batch_size = jax.device_count()
  config.mesh.fsdp = args.fsdp
  config.sharding.params, config.sharding.opt_state = args.params, args.opt_state
  config_lib.validate(config)
  program = program_lib.build(config, num_examples=1000)
  leaves = replicas.copied(program.abstract_state, program.mesh)
  if not leaves:
    sys.exit("There is one device, and no copy to compare; set JAX_NUM_CPU_DEVICES=8.")
  start = time.perf_counter()
  compare = program.compile("replicas", **program.sizes("replicas"))
  compiled = time.perf_counter() - start
  cost = compare.cost_analysis()
  assert cost is not None, "the compiler of this backend counts nothing"
  print(
    f"{len(leaves)} of {len(jax.tree.leaves(program.abstract_state))} leaves have copies; "
    f"{cost['flops'] / 1e9:.3f} GFLOP and {cost['bytes accessed'] / 1e6:.1f} MB on each device; "
    f"compiled in {compiled:.1f} s"
  )
  print("\n".join(collectives.describe(collectives.read(compare.as_text() or ""))), flush=True)
  state, zeros = program.init_state(), mesh_lib.flags(program.mesh, NOTHING)
  seconds = []
  for _ in range(args.rounds + 1):
    start = time.perf_counter()
    jax.block_until_ready(compare(state, zeros))
    seconds.append(time.perf_counter() - start)
  print(f"median of {args.rounds}: {1000 * statistics.median(seconds[1:]):.1f} ms ({devices()})")


def devices() -> str:
  """Return what this process runs on."""
  return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def _first_line(doc: str | None) -> str:
  return (doc or "").partition("\n")[0]


def main(arguments: Sequence[str] | None = None) -> None:
  """Run the benchmark that `arguments` name."""
  parser = argparse.ArgumentParser(prog="python -m trainer.bench", description=_first_line(__doc__))
  commands = parser.add_subparsers(required=True)

  def add(
    name: str,
    function: Callable[[argparse.Namespace], None],
    **options: tuple[int | float | str, str],
  ) -> None:
    command = commands.add_parser(name, help=_first_line(function.__doc__))
    command.set_defaults(function=function)
    for option, (default, text) in options.items():
      command.add_argument(
        f"--{option.replace('_', '-')}", type=type(default), default=default, help=text
      )

  add(
    "step",
    bench_step,
    ours=("", "fields of ours as in 'accumulation_steps=8 model.pool_first=True', rows apart by ;"),
    batch_size=(16, "images per step on each device"),
    image_size=(224, "pixels"),
    dtype=("", "of activations; bfloat16 on accelerators and float32 on a CPU without it"),
    steps=(2, "steps of each side in each round"),
    rounds=(5, "rounds after the first, each with all sides"),
  )
  add(
    "loop",
    bench_loop,
    steps=(1000, "steps of each side in each round"),
    rounds=(6, "rounds, each with both sides"),
    batch_size=(32, "images per step"),
  )
  add(
    "save",
    bench_save,
    rounds=(5, "saves after the first"),
    steps=(10, "steps timed before each save"),
    idle_seconds=(0.1, "pause of the host in each step"),
    folder=(tempfile.gettempdir(), "folder on the disk to write to"),
  )
  add("startup", bench_startup)
  add(
    "depth",
    bench_depth,
    nets=(
      "cifar_resnet-56,cifar_resnet-110,cifar_resnet_v2-1001,cifar_resnet-1202",
      "families and depths",
    ),
    ways=(
      "unroll,scan,scan+convs,scan+blocks",
      "unroll or scan, with +REMAT of config.model.remat",
    ),
    width=(1.0, "of config.model.width"),
    image_size=(32, "pixels"),
    batch_size=(8, "images per step"),
    steps=(3, "steps timed after the first"),
    limit_seconds=(1200.0, "longest time for one net"),
  )
  add(
    "augment",
    bench_augment,
    chain=("mix(mixup=0.2, cutmix=1.0)", "config.augment; the default is that of RSB A1"),
    batch_size=(16, "images per step"),
    image_size=(224, "pixels"),
  )
  add(
    "replicas",
    bench_replicas,
    rounds=(5, "comparisons after the first"),
    fsdp=(1, "config.mesh.fsdp"),
    params=("replicated", "config.sharding.params"),
    opt_state=("replicated", "config.sharding.opt_state"),
  )
  add("hosts", bench_hosts, hosts=(1024, "hosts, simulated by two processes"))
  args = parser.parse_args(arguments)
  logging.set_verbosity(logging.WARNING)
  try:
    mesh_lib.device_count()
    args.function(args)
  except TrainerError as error:
    raise SystemExit(str(error)) from error
