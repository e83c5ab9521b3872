"""What depth costs a step, unrolled and scanned: tracing, compiling, memory, seconds."""

import argparse
import multiprocessing
from multiprocessing.connection import Connection
import statistics
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from configs import base
from trainer import mesh as mesh_lib
from trainer import program as program_lib
from trainer.pod.requests import NOTHING


def net_config(
  family: str, depth: int, *, scan: bool, remat: str, width: float, image_size: int, batch_size: int
) -> ml_collections.ConfigDict:
  """Return the config of a net for 10 classes in float32."""
  config = base.get_config(family)
  config.model.update(
    {"depth": depth, "scan": scan, "remat": remat, "width": width, "num_classes": 10}
  )
  config.model.dtype = "float32"
  config.global_batch_size = batch_size
  config.data.image_size = image_size
  config.total_epochs, config.total_steps, config.optimizer.warmup_epochs = 0.0, 1000, 0.0
  return config


def measure(config: ml_collections.ConfigDict, steps: int) -> dict[str, float]:
  """Return what the training step of a config costs, on images of noise.

  Returns:
    Seconds of CPU to make the first state (`init`), to `trace` and to `compile`, which other load
    on the machine does not stretch;
    seconds of a `step` (the median of `steps` after the first), bytes of `temporaries`, and `loss`
    after all of them.
  """
  program = program_lib.build(config, 1000)
  start = time.process_time()
  lowered = program.lower("train", **program.sizes("train"))
  traced = time.process_time()
  step = lowered.compile()
  compiled = time.process_time()
  size, examples = config.data.image_size, config.global_batch_size
  rng = np.random.default_rng(0)
  batch = mesh_lib.to_global(
    program.mesh,
    {
      "image": rng.integers(0, 256, (examples, size, size, 3), np.uint8),
      "label": rng.integers(0, 10, examples, np.int32),
    },
  )
  start_init = time.process_time()
  state = jax.block_until_ready(program.init_state())
  init = time.process_time() - start_init
  requests, seconds = mesh_lib.flags(program.mesh, NOTHING), []
  for _ in range(steps + 1):
    begin = time.perf_counter()
    state, output = jax.block_until_ready(step(state, batch, requests))
    seconds.append(time.perf_counter() - begin)
  memory = step.memory_analysis()
  return {
    "init": init,
    "trace": traced - start,
    "compile": compiled - traced,
    "temporaries": float(memory.temp_size_in_bytes) if memory else float("nan"),
    "step": statistics.median(seconds[1:]),
    "loss": float(jnp.asarray(output.metrics)[0]),
  }


def _send(connection: Connection, config: ml_collections.ConfigDict, steps: int) -> None:
  connection.send(measure(config, steps))


def measure_within(
  config: ml_collections.ConfigDict, steps: int, seconds: float
) -> dict[str, float] | None:
  """Return `measure` from a process of its own, or None if it takes longer than `seconds`."""
  context = multiprocessing.get_context("spawn")
  receiver, sender = context.Pipe(duplex=False)
  process = context.Process(target=_send, args=(sender, config, steps))
  process.start()
  sender.close()
  try:
    return receiver.recv() if receiver.poll(seconds) else None
  finally:
    process.kill()
    process.join()


def bench_depth(args: argparse.Namespace) -> None:
  """Print what the step of deep nets costs to compile and to run, unrolled and scanned.

  Each net is measured in a process of its own, which is ended at the limit: the compiler cannot be
  interrupted otherwise.
  """
  print(f"width {args.width:g}, {args.image_size} px, batch {args.batch_size}, float32")
  print(
    f"{'net':24} {'loop':6} {'remat':6} {'init s':>8} {'trace s':>8} {'compile s':>10} "
    f"{'temporaries MB':>15} {'step s':>7}  loss"
  )
  for net in args.nets.split(","):
    family, _, depth = net.strip().rpartition("-")
    for way in args.ways.split(","):
      scan, _, remat = way.strip().partition("+")
      config = net_config(
        family,
        int(depth),
        scan=scan == "scan",
        remat=remat or "none",
        width=args.width,
        image_size=args.image_size,
        batch_size=args.batch_size,
      )
      costs = measure_within(config, args.steps, args.limit_seconds)
      name = f"{net:24} {scan:6} {remat or 'none':6}"
      if costs is None:
        print(f"{name}  not within {args.limit_seconds:g} s", flush=True)
      else:
        print(
          f"{name} {costs['init']:8.1f} {costs['trace']:8.1f} {costs['compile']:10.1f} "
          f"{costs['temporaries'] / 1e6:15.1f} {costs['step']:7.2f}  {costs['loss']:.4f}",
          flush=True,
        )
