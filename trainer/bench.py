"""What the training loop costs: steps per second of `train()` over those of the bare jitted step, in one run.

    python -m trainer.bench [--steps N] [--rounds N] [--batch-size N]

The net is tiny (CIFAR ResNet-8 of a quarter of the width on 16 px images), so that a step is short and whatever the loop
adds shows. `train()` runs in full, with logging, event files and prefetching, on synthetic batches that cost nothing
to make; the bare step gets one batch that is on the device already. Compiling, the last evaluation and the last save are
left out of both.
"""

import argparse
import contextlib
import statistics
import tempfile
import time

from absl import logging
import jax
import ml_collections

from configs import base
from input_pipeline import loader, sources
from trainer import mesh as mesh_lib, train as train_lib
from trainer.step import NOTHING


def make_config(batch_size: int, steps: int) -> ml_collections.ConfigDict:
  """Returns the config of both sides."""
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
  """Returns steps per second of `train()`."""
  with tempfile.TemporaryDirectory() as workdir:
    seconds = train_lib.train(config, workdir)["wall_seconds"]
  return config.total_steps / (seconds["step"] + seconds["input_wait"])


def bare_speed(config: ml_collections.ConfigDict) -> float:
  """Returns steps per second of the compiled step on one batch."""
  program = train_lib.build(config, config.data.synthetic_examples)
  train_step = train_lib.compile_train_step(config, program)
  source = sources.open_source(config.data, config.data.train_split, config.model.num_classes)
  with contextlib.closing(loader.train_batches(source, config.data, seed=config.seed,
                                               global_batch_size=config.global_batch_size)) as host_batches:
    host_batch = next(host_batches)
  batch = mesh_lib.to_global(program.mesh, {name: host_batch[name] for name in train_lib.TRAIN_BATCH})
  requests = mesh_lib.flags(program.mesh, NOTHING)
  state = program.init_state()
  jax.block_until_ready((state, batch))
  start = time.perf_counter()
  for _ in range(config.total_steps):
    state, metrics = train_step(state, batch, requests)
  jax.block_until_ready((state, metrics))
  return config.total_steps / (time.perf_counter() - start)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--steps", type=int, default=1000, help="steps of each side in each round")
  parser.add_argument("--rounds", type=int, default=6, help="rounds, each of both sides in turn")
  parser.add_argument("--batch-size", type=int, default=32, help="images per step")
  args = parser.parse_args()
  logging.set_verbosity(logging.WARNING)
  config = make_config(args.batch_size, args.steps)
  rounds = []
  with tempfile.TemporaryDirectory() as compiled:
    jax.config.update("jax_compilation_cache_dir", compiled)  # or every round would compile both sides again
    for number in range(args.rounds):
      loop, bare = loop_speed(config), bare_speed(config)
      rounds.append((loop, bare))
      print(f"round {number + 1:2}: train() {loop:7.1f} steps/s   bare step {bare:7.1f} steps/s   "
            f"ratio {loop / bare:.3f}", flush=True)
  # Whatever else the machine does can only slow a round down, so the fastest one of each side says most.
  loop, bare = map(max, zip(*rounds))
  print(f"fastest rounds: ratio {loop / bare:.3f}, a bare step takes {1000 / bare:.2f} ms, train() adds "
        f"{1e6 * (1 / loop - 1 / bare):.0f} us; median ratio {statistics.median(l / b for l, b in rounds):.3f} "
        f"({jax.device_count()} x {jax.devices()[0].device_kind}, batch {args.batch_size})")


if __name__ == "__main__":
  main()
