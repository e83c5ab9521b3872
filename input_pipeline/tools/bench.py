"""Decoding speed on this machine, compared with the other input pipelines that are installed.

    python -m input_pipeline.bench --data=DIR_OR_URL [--images=N] [--max-size=PIXELS] [--no-rivals]
        [--only=PART]

Every contestant makes batches of the same images, in turns and each in a process of its own, so
that other load on the machine affects all of them. CPU time is compared, user and system, over all
threads and processes of a contestant. Images in a folder are first written to an ArrayRecord file,
as `input_pipeline.prepare` does; without --data images are generated. Streamed data are read ahead
by threads, which counts as rest.

Then the operations of `config.data.operations` are timed, and the augmentation of RSB's recipe A1
(arXiv:2110.00476) is compared with timm's own.

Rivals take part if they can be imported: `pip install tensorflow-cpu nvidia-dali-cuda120 timm`.
"""

import argparse
import collections
from collections.abc import Callable, Mapping
import contextlib
import functools
import importlib.metadata
import math
import multiprocessing
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
import os
import platform
import statistics
import sys
import tempfile
import time
from typing import Any, NamedTuple

from configs import arguments, base, own_packages
from input_pipeline import image, loader
from input_pipeline.errors import DataError
from input_pipeline.sources import Source
from input_pipeline.tools import bench_data, bench_operations, rivals
from input_pipeline.tools.rivals import Made, Spent
from input_pipeline.workers import processes

_CHIP_IMAGES, _CHIP_SECONDS = 128, 0.070  # per step of a TPU v5e
_SETTLED = 0.005  # seconds of CPU in 0.2 s, below which a contestant has no work ahead left
_AHEAD = 4  # batches that Grain makes ahead with each decoding process
_A1 = {  # of config.data; timm's rand-m7-mstd0.5-inc1 and random interpolation
  "interpolation": "random",
  "operations": "timm_rand_augment(m=7, mstd=0.5, inc=1)",
}
_PARTS = ("train", "eval", "a1", "operations")
_LIMIT = 900.0  # seconds after which a silent contestant is given up


class Contestant(NamedTuple):
  """One row of the table.

  Attributes:
    name: shown in the table.
    make: called in its own process; returns batches without end, and CPU seconds by stage, a
      counter that it keeps updating.
    ahead: batches that it makes before they are asked for.
  """

  name: str
  make: Callable[[], Made]
  ahead: int = 0


class Turn(NamedTuple):
  """The result of one contestant in one round: `cpu` and `stages` in seconds per image."""

  cpu: float
  images_per_second: float
  stages: dict[str, float]


def ours(
  source: Source,
  batch_size: int,
  train: bool,
  workers: int = 0,
  timed: bool = False,
  fields: Mapping[str, str] | None = None,
) -> Made:
  """Return batches of this package and, if `timed`, CPU seconds by stage.

  Args:
    source: the examples.
    batch_size: of a batch.
    train: whether to train on them or to evaluate.
    workers: decoding processes.
    timed: whether to measure stages, which costs some time.
    fields: of config.data, where they differ from the defaults.
  """
  data = base.get_config().data
  data.update(fields or {})
  data.workers, data.threads = workers, 0
  spent: Spent = collections.Counter()
  if timed:
    names = ("_measure", "decode", "draw_box", "train_view", "eval_view")
    for where, name in [(image, n) for n in names] + [(bench_data.Sample, "__getitem__")]:
      setattr(where, name, _timed(getattr(where, name), spent, name))
  if train:
    return loader.train_batches(source, data, seed=0, global_batch_size=batch_size), spent
  return loader.eval_batches(source, data, batch_size=batch_size), spent


def _timed(function: Callable[..., Any], spent: Spent, name: str) -> Callable[..., Any]:
  @functools.wraps(function)
  def timed(*args: Any, **kwargs: Any) -> Any:
    start = time.thread_time()
    try:
      return function(*args, **kwargs)
    finally:
      spent[name] += time.thread_time() - start  # type: ignore[assignment]  # seconds

  return timed


def _stages(spent: Spent, total: float) -> dict[str, float]:
  """Return CPU seconds of stages that do not overlap, from those of nested functions."""
  if not spent:
    return {}
  decode = spent["decode"] + spent["_measure"]
  resize = spent["train_view"] + spent["eval_view"] - decode - spent["draw_box"]
  read = spent["__getitem__"]
  return {"read": read, "decode": decode, "resize": resize, "rest": total - read - decode - resize}


def _serve(
  pipe: connection.Connection, contestant: Contestant, images: int, batch_size: int
) -> None:
  """Take a turn whenever the pipe asks for it; the main function of a contestant's process."""
  try:
    batches, spent = contestant.make()
    batches = iter(batches)
    count = contestant.ahead + math.ceil(images / batch_size)
    for _ in range(contestant.ahead + 1):
      next(batches)
    _settle()
    pipe.send(None)
    while pipe.recv():
      before = _cpu()
      spent.clear()
      for i in range(count):
        if i == contestant.ahead:
          start = time.monotonic()
        next(batches)
      wall = time.monotonic() - start
      cpu = _settle() - before
      n = count * batch_size
      stages = _stages(spent, cpu)
      rate = (count - contestant.ahead) * batch_size / wall
      pipe.send(Turn(cpu / n, rate, {k: v / n for k, v in stages.items()}))
    if isinstance(batches, loader.BatchIterator):
      batches.close()
  except Exception as e:  # a rival may fail in any way; the others continue
    pipe.send(f"{type(e).__name__}: {' '.join(str(e).split())[:200]}")


def _cpu() -> float:
  """Return the CPU seconds of this process and its children."""
  total = time.process_time()
  for child in multiprocessing.active_children():
    with open(f"/proc/{child.pid}/stat", encoding="utf-8") as f:
      user, system = f.read().rsplit(")", 1)[1].split()[11:13]
    total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
  return total


def _settle() -> float:
  """Wait until all work ahead is done; return the CPU seconds until then."""
  while True:
    before = _cpu()
    time.sleep(0.2)
    after = _cpu()
    if after - before < _SETTLED:
      return before


def race(
  contestants: list[Contestant], images: int, batch_size: int, rounds: int
) -> dict[str, list[Turn]]:
  """Run each contestant once per round; return the turns by name of those that could start."""
  context = multiprocessing.get_context("spawn")
  running: dict[str, tuple[SpawnProcess, connection.Connection]] = {}
  turns: dict[str, list[Turn]] = {}
  try:
    for contestant in contestants:
      ours_end, theirs = context.Pipe()
      process = context.Process(target=_serve, args=(theirs, contestant, images, batch_size))
      process.start()
      theirs.close()
      running[contestant.name] = process, ours_end
      _say(f"starting {contestant.name}")
      failed = _receive(ours_end)
      if failed is not None:
        print(f"{contestant.name} left out: {failed}", file=sys.stderr)
        del running[contestant.name]
    if (first := contestants[0].name) not in running:
      raise DataError(f"{first!r}, with which all others are compared, could not start.")
    for number in range(rounds):
      for name, (_, pipe) in list(running.items()):
        _say(f"round {number + 1} of {rounds}: {name}")
        pipe.send(True)
        turn = _receive(pipe)
        if isinstance(turn, str):
          raise DataError(f"{name} failed: {turn}")
        turns.setdefault(name, []).append(turn)
  finally:
    for process, pipe in running.values():
      with contextlib.suppress(OSError):
        pipe.send(False)
      process.join(10)
      if process.is_alive():
        process.kill()
    _say("")
  return turns


def _receive(pipe: connection.Connection) -> Any:
  """Return what a contestant sends: None once it is ready, a Turn, or the text of a failure."""
  if not pipe.poll(_LIMIT):
    return f"no answer for {_LIMIT:.0f} s"
  try:
    return pipe.recv()
  except EOFError:
    return "its process died"


def _say(text: str) -> None:
  if sys.stderr.isatty():
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def report(turns: dict[str, list[Turn]]) -> str:
  """Return the table; ratios are to the first row, each the median over the rounds."""
  first = next(iter(turns.values()))
  lines = ["  ours/this  img/CPU-s    img/s"]
  for name, rounds in turns.items():
    ratio = statistics.median(t.cpu / own.cpu for t, own in zip(rounds, first, strict=True))
    rate = 1 / statistics.median(t.cpu for t in rounds)
    wall = statistics.median(t.images_per_second for t in rounds)
    lines.append(f"  {ratio:9.2f}  {rate:9.0f}  {wall:7.0f}  {name}")
  return "\n".join(lines)


def report_stages(timed: list[Turn], own: list[Turn], worker: list[Turn], mean_bytes: float) -> str:
  """Return the time by stage, the overhead over decode and resize, and the needs of a chip."""
  stages = {s: statistics.median(t.stages[s] for t in timed) for s in timed[0].stages}
  work = [t.stages["decode"] + t.stages["resize"] for t in timed]
  in_process, through = (
    statistics.median(t.cpu / w - 1 for t, w in zip(turns, work, strict=True))
    for turns in (own, worker)
  )
  rate = _CHIP_IMAGES / _CHIP_SECONDS
  cpu = statistics.median(t.cpu for t in worker)
  bytes_per_second = mean_bytes / statistics.median(t.cpu for t in own)
  spent = ", ".join(f"{name} {1e6 * seconds:.0f}" for name, seconds in stages.items())
  return (
    f"Microseconds of CPU per image: {spent}\n"
    f"Overhead over decode and resize: {in_process:.1%} in process, "
    f"{through:.1%} through a decoding process\n"
    f"Encoded bytes: {bytes_per_second * 1e-6:.0f} MB per CPU-second\n"
    f"A chip that takes {_CHIP_IMAGES} images in {1000 * _CHIP_SECONDS:.0f} ms (TPU v5e) needs "
    f"{rate:.0f} images/s: {rate * cpu:.1f} cores like these"
  )


def report_scaling(one: list[Turn], many: list[Turn], count: int) -> str:
  """Return the throughput of several processes as a share of that many times one."""
  clock = statistics.median(
    m.images_per_second / o.images_per_second / count for m, o in zip(many, one, strict=True)
  )
  cpu = statistics.median(o.cpu / m.cpu for m, o in zip(many, one, strict=True))
  return (
    f"{count} decoding processes: {clock:.2f} of {count} times one by the clock, which is reliable "
    f"only on an idle machine; {cpu:.2f} by CPU time"
  )


def main(argv: list[str] | None = None) -> int:
  """Run the command; return its exit code."""
  parser = arguments.Parser(
    prog="python -m input_pipeline.bench",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--data", default="", help="as config.data.path, or a folder of class folders")
  add("--split", default="train", help="as config.data.train_split")
  add("--images", type=int, default=1000, help="images per turn, and the most different ones")
  add("--rounds", type=int, default=5, help="turns of each contestant")
  add("--batch-size", type=int, default=128)
  add("--max-size", type=int, default=0, help="also measure images as made by prepare --max-size")
  add("--rivals", action=argparse.BooleanOptionalAction, default=True, help="those installed too")
  add("--peers", dest="rivals", action=argparse.BooleanOptionalAction, help=argparse.SUPPRESS)
  add("--only", choices=_PARTS, help="one part of it")
  args = parser.parse_args(argv)
  for name in ("images", "rounds", "batch_size"):
    if getattr(args, name) < 1:
      parser.error(f"--{name.replace('_', '-')} must be at least 1")
  if sys.platform != "linux":
    parser.error("the CPU time of processes that still run is only known on Linux")
  try:
    with tempfile.TemporaryDirectory() as folder:
      _run(args, folder)
  except DataError as e:
    print(f"bench: {e}", file=sys.stderr)
    return 1
  return 0


def _run(args: argparse.Namespace, folder: str) -> None:
  own_packages.check("trainer")  # which the processes need
  source = bench_data.open_data(args.data, args.split, args.images, folder)
  sample = bench_data.Sample(source, args.images)
  examples = sample.once()
  mean_bytes = statistics.mean(len(e.image) for e in examples)
  cores = processes.cores()
  print(
    f"{len(examples)} images of {mean_bytes / 1000:.1f} kB, batches of {args.batch_size}, "
    f"{args.rounds} rounds of {args.images}; {cores} cores of {_cpu_name()}, "
    f"load {os.getloadavg()[0]:.1f}"
  )
  packages = ("simplejpeg", "opencv-python-headless", "pillow", "numpy", "grain", "array_record")
  versions = (f"{name} {importlib.metadata.version(name)}" for name in packages)
  print(f"Python {platform.python_version()}, {', '.join(versions)}")

  own, timed, worker = "ours", "timed", "ours, through a decoding process"
  many = f"ours, through {cores} decoding processes"
  # Of streamed data no sample is measured: it would be read record by record.
  measured = sample if source.order == "shuffle" else source
  mine = functools.partial(functools.partial, ours, measured, args.batch_size)
  train = [
    Contestant(own, mine(True)),
    Contestant(timed, mine(True, timed=True)),
    Contestant(worker, mine(True, 1), _AHEAD),
  ]
  if cores > 1:
    train.append(Contestant(many, mine(True, cores), _AHEAD * cores))
  if args.max_size:
    small = bench_data.Sample(bench_data.write_shard(folder, examples, args.max_size), args.images)
    make = functools.partial(ours, small, args.batch_size, True)
    train.append(Contestant(f"ours, re-encoded with --max-size={args.max_size}", make))
  evaluation = [Contestant(own, mine(False))]
  a1 = [Contestant(own, mine(True, fields=_A1))]
  if args.rivals:
    for contestants, task in ((train, "TRAIN"), (evaluation, "EVAL"), (a1, "A1")):
      for name, rival in rivals.installed(task):
        contestants.append(Contestant(name, functools.partial(rival, examples, args.batch_size)))

  parts = (args.only,) if args.only else _PARTS
  run = functools.partial(race, images=args.images, batch_size=args.batch_size, rounds=args.rounds)
  if "train" in parts:
    print(
      "\nTraining: JPEG to batch, random crop to 224 px, flip. Ratios of images per CPU-second."
    )
    turns = run(train)
    stages = report_stages(turns.pop(timed), turns[own], turns[worker], mean_bytes)
    print(f"{report(turns)}\n\n{stages}")
    if many in turns:
      print(report_scaling(turns[worker], turns[many], cores))
  if "train" in parts and args.max_size:
    effects = bench_data.pixel_effect(examples, small.once())
    print(
      f"--max-size={args.max_size} changes pixels by {effects[0]:.2f} of 255 levels on average in "
      f"training, {effects[1]:.2f} in evaluation"
    )
  if "eval" in parts:
    print("\nEvaluation: shorter side to 256 px, central crop of 224 px.")
    print(report(run(evaluation)))
  if "a1" in parts:
    print("\nTraining as RSB A1: crop by bilinear or bicubic, flip, RandAugment, 224 px.")
    print(report(run(a1)))
  if "operations" in parts:
    print(f"\nOperations on an image of {bench_operations.SIZE} px, laws and then their steps.")
    print(bench_operations.report(examples, args.rounds))


def _cpu_name() -> str:
  with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as f:
    return next(line for line in f if line.startswith("model name")).split(":")[1].strip()
  return platform.processor() or platform.machine()
