"""The estimate of our step on a TPU beside that of Flax's ImageNet example.

    python -m tests.trainer.flax_example [--topology=v5e:2x2] [--batch=128] [--ours='A=B ...']

compiles both for the same chips, one after the other, and prints their estimates by
trainer.tools.tpu_cost, by kind, with the ratio of ours to the example's. Each `--ours` is a row of
configs/imagenet_resnet50.py with these fields, or as it is if they are ""; without any there are
those of LEVERS. With `--texts=FOLDER` the compiled programs are kept there, and those found there
are not compiled again. It needs libtpu, runs nothing, and takes minutes for each step.
`python -m trainer.bench step` runs the same steps on the devices that there are.
"""

import argparse
from collections.abc import Callable
import functools
import json
import pathlib
import sys
import time

import jax

from trainer.tools import flax_example

# Fields of our step, by rows of the table. BN is over a device's own examples where none says else.
_NO_VECTORS = "model.bn_together=False model.zeros_last=False"
_PLAIN = f"model.pool_first=False {_NO_VECTORS}"
LEVERS = (
  _PLAIN,
  "",
  f"accumulation_steps=8 {_PLAIN}",
  f"accumulation_steps=8 {_NO_VECTORS}",
  f"accumulation_steps=8 model.row_pairs=True {_NO_VECTORS}",
  "accumulation_steps=8 model.row_pairs=True",
  f"accumulation_steps=8 model.row_pairs=True {_NO_VECTORS} model.bn_group=32",
  f"accumulation_steps=4 model.row_pairs=True {_NO_VECTORS}",
)


def compile_ours(devices: list[jax.Device], batch: int, fields: str) -> jax.stages.Compiled:
  """Compile this project's step for the same work.

  Args:
    devices: to compile for.
    batch: over all of them.
    fields: as in "accumulation_steps=8 model.bn_group=32".
  """
  from trainer.tools import layers, step_speed

  program = step_speed.our_program(devices, batch, fields)
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
    "Flax example": lambda: flax_example.build(devices, batch).lowered.compile()
  }
  for fields in args.ours or LEVERS:
    steps[fields or "ours"] = functools.partial(compile_ours, devices, batch, fields)
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
