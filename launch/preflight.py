"""What a run would be on TPU slices, estimated on a machine without one: does it fit, time, money.

    python -m launch.preflight --topology=v5e:4x4 --config=configs/X.py [--config.field=value ...]

Compiles the training step, for every image size of the run, and the evaluation step, and prints
mesh, shardings, memory, the estimated time of a step, collectives, what hosts must deliver, and
hours. It needs libtpu (pip install -e '.[tpu]') and no data, and takes minutes. Nothing is run: all
figures are estimates from the compiler's schedule. This is the only command of launch/ that imports
JAX.

Exit codes: 0 it fits; 3 it does not fit the memory; 2 the command, the config or the mesh is wrong.
"""

from collections.abc import Callable, Iterator
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import resource
import sys
import tempfile
from typing import TYPE_CHECKING, Any, TextIO

from absl import flags
import ml_collections

from configs import recipes
from input_pipeline.errors import DataError
from launch import preflight_compile, preflight_table, preflight_text
from launch.preflight_compile import DoesNotFitError
from trainer import command_line
from trainer.errors import DONE, FAILED, ConfigError, TrainerError

if TYPE_CHECKING:
  from trainer import program as program_lib
  from trainer.tools import estimate

FLAGS = flags.FLAGS
flags.DEFINE_string(
  "topology", None, "Topology of a slice, as the compiler names it: v5e:4x4, v4:2x2x4, v6e:16x16."
)
flags.DEFINE_integer(
  "slices", 1, "Number of such slices, joined by the data centre's network.", lower_bound=1
)
flags.DEFINE_bool("json", False, "Print one JSON object instead of text.")
flags.DEFINE_bool(
  "find_batch", False, "Find the largest batch per chip that fits, by bisection: several compiles."
)
flags.DEFINE_float(
  "dollars_per_chip_hour", None, "Price, for the cost of the run.", lower_bound=0.0
)
flags.DEFINE_string(
  "from_checkpoint", None, "Workdir whose newest checkpoint this run is to resume from."
)
flags.DEFINE_string(
  "compiled", None, "Folder for the compiled programs, for the first start on the topology."
)
flags.DEFINE_string(
  "known",
  None,
  "Folder of estimates by step: one that differs from a step there in learning rates and lengths "
  "alone is not compiled again.",
)
flags.DEFINE_string(
  "recipes",
  None,
  "Print a table of the reports in this folder, one of each recipe; with --topology, make those "
  "that are missing first.",
)
flags.DEFINE_integer(
  "train_examples", 0, "Training examples, if not those of the recipe.", lower_bound=0
)
flags.DEFINE_integer("eval_examples", 50_000, "Examples of an evaluation.", lower_bound=1)


def topology_devices(topology: str, slices: int) -> list:
  """Returns descriptions of the devices of TPU slices, to compile for.

  Args:
    topology: of one slice, e.g. "v5e:4x4".
    slices: number of slices.

  Raises:
    ConfigError: if libtpu is missing or does not know the topology.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise ConfigError(
      "The TPU compiler is missing; install it with pip install -e '.[tpu]' (480 MB)."
    )
  # Keep libtpu from searching a TPU and its metadata server, whatever its type, and from its lock:
  # without a TPU to share, several compilers may run at once.
  os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  }
  from jax.experimental import topologies

  one_chip = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
  try:
    return topologies.get_topology_desc(
      platform="tpu", topology_name=topology, num_slices=slices, **one_chip
    ).devices
  except Exception as error:
    raise ConfigError(
      f"--topology={topology}: {preflight_compile.first_line(error)} {_topologies(topology)}"
    ) from error


def _topologies(topology: str) -> str:
  """Returns what a wrong topology might have been."""
  from trainer.reporting.chips import CHIPS

  by_name = {chip.name: chip for chip in CHIPS.values()}
  name = topology.partition(":")[0]
  if name in by_name:
    shapes = [f"{name}:{shape}" for shape in by_name[name].topologies]
    return f"Of {name} there are {', '.join(shapes)} and larger."
  examples = [f"{chip.name}:{chip.topologies[1]}" for chip in by_name.values()]
  return f"There are, for example, {', '.join(examples)}."


def preflight(config: ml_collections.ConfigDict, screen: TextIO) -> dict[str, Any]:
  """Compile the steps of a config for --topology, and return what is known about them.

  Args:
    config: of the run.
    screen: gets lines of progress.

  Raises:
    TrainerError: with one sentence if config and topology do not fit, or the memory is too small.
  """
  devices = topology_devices(FLAGS.topology, FLAGS.slices)
  from launch import preflight_checks
  from trainer import config as config_lib
  from trainer import data
  from trainer import program as program_lib
  from trainer.tools import estimate
  from trainer.weights import teacher as teacher_lib

  if not config.model.num_classes and not config.data.path:
    raise ConfigError(
      "config.model.num_classes is 0, as many as the data have: give it, or --config.data.path."
    )
  config = data.with_classes(config)
  config_lib.validate(config)
  config_lib.check_split(config, num_devices=len(devices))
  name = command_line.name_of(sys.argv)
  examples = FLAGS.train_examples or _examples(name)
  teacher = teacher_lib.read(config) if config.distill.weight else None
  program = program_lib.build(config, examples, devices, teacher=teacher)
  where = estimate.pod(devices)
  # What is wrong with it shows before anything compiles.
  found = FLAGS.from_checkpoint and preflight_checks.checkpoint(FLAGS.from_checkpoint, program)
  try:
    with preflight_checks.kept(FLAGS.compiled) as programs:
      report = _report(program, where, name, screen)
  except DoesNotFitError as error:
    if not FLAGS.find_batch or error.mode == "eval":
      advice = preflight_checks.advice(config, error.mode, where.chips)
      raise DoesNotFitError(f"{error} {advice}", error.mode) from error
    most = _find_batch(program, examples, where.chips, screen)
    raise DoesNotFitError(
      f"{error} Of a training step {most} images a chip fit"
      + (f": --config.global_batch_size={most * where.chips}." if most else ".")
    ) from error
  report |= {"checkpoint": found} if found else {}
  report |= {"programs": programs} if programs else {}
  if FLAGS.find_batch:
    report["largest_batch_per_chip"] = _find_batch(
      program, examples, where.chips, screen, fits_now=True
    )
  return report


def _report(
  program: "program_lib.Program", where: "estimate.Pod", name: str, screen: TextIO
) -> dict[str, Any]:
  """Returns what the compiled steps of a program are.

  Args:
    program: of the run.
    where: its chips.
    name: of the run file.
    screen: gets lines of progress.

  Raises:
    TrainerError: if a step does not fit.
  """
  from launch import preflight_checks, preflight_known
  from trainer import mesh as mesh_lib
  from trainer.reporting import flops
  from trainer.tools import estimate

  chip = program.mesh.devices.flat[0].device_kind
  report: dict[str, Any] = {
    "config": name,
    "fields": _fields(),
    "topology": FLAGS.topology,
    "slices": where.slices,
    "libtpu": importlib.metadata.version("libtpu"),
    "chip": chip,
    "chips": where.chips,
    "devices": program.mesh.size,
    "hosts": where.hosts,
    "mesh": dict(program.mesh.shape),
    "shardings": mesh_lib.describe_shardings(program.abstract_state),
    "hbm_bytes": round(where.chip.hbm_bytes / where.devices_per_chip),
    "leaves_out": estimate.LEAVES_OUT,
    "steps": [],
  }
  compiling = 0.0
  for mode, sizes in [
    *(("train", sizes) for sizes in program.all_sizes("train")),
    ("eval", program.sizes("eval")),
  ]:
    size, batch = sizes["image_size"], sizes["batch_size"]
    net = program.model, program.abstract_state.raw(), size
    if mode == "train":
      work = flops.training_flops(*net, program.config.optimizer.freeze)
      work += flops.teacher_flops(program.teacher, size)
    else:
      work = flops.forward_flops(*net)
    lowered = preflight_compile.lower(program, mode, sizes, screen)
    known, figures = None, None
    if FLAGS.known and not FLAGS.compiled:  # where programs are to be kept, all are compiled
      options = program.config.compiler_options
      about = (FLAGS.topology, FLAGS.slices, program.mesh, mode, batch, work, options)
      known = preflight_known.path(FLAGS.known, lowered, *about)
      figures = preflight_known.find(known)
    if figures is None:
      step, seconds = preflight_compile.compile_step(program, lowered, mode, sizes, screen)
      figures = {"compile_cpu_seconds": seconds} | estimate.step(
        step,
        program.mesh,
        batch_size=batch,
        flops=batch * work,
        training=mode == "train",
      )
      if known:
        preflight_known.keep(known, figures)
    else:
      what = preflight_compile.name_of(mode, sizes)
      print(f"{what}: estimate of --known", file=screen, flush=True)
    compiling += figures["compile_cpu_seconds"]
    if mode == "train":
      figures["as_asked"] = preflight_checks.as_asked(figures, program)
    report["steps"].append({"mode": mode, **sizes, "per_chip": batch / where.chips} | figures)
  trained = [each for each in report["steps"] if each["mode"] == "train"]
  evaluated = report["steps"][-1]
  fastest = max(each["images_per_second"] for each in trained)
  report["host"] = estimate.host_side(where, fastest)
  total, every = program.lengths.total, program.lengths.eval_every
  report["run"] = {"train_steps": total} | estimate.run(
    {each["image_size"]: each["ms"] / 1e3 for each in trained},
    program.lengths.sizes,
    total=total,
    evaluations=-(-total // every) if every else 1,
    eval_steps=-(-FLAGS.eval_examples // evaluated["batch_size"]),
    eval_seconds=evaluated["ms"] / 1e3,
    start_seconds=compiling,
    chips=where.chips,
    dollars_per_chip_hour=FLAGS.dollars_per_chip_hour,
  )
  return report


def _find_batch(
  program: "program_lib.Program",
  examples: int,
  chips: int,
  screen: TextIO,
  fits_now: bool = False,
) -> int:
  """Returns the most images per chip of a training step that fit.

  Args:
    program: of the run.
    examples: of its training split.
    chips: of the topology.
    screen: gets lines of progress.
    fits_now: whether its own batch is known to fit.
  """
  from trainer import program as program_lib

  config, devices = program.config, list(program.mesh.devices.flat)
  unit = max(1, config.global_batch_size // chips // (8 if fits_now else 64))

  def fits(units: int) -> bool:
    tried = ml_collections.ConfigDict(config)
    tried.global_batch_size = units * unit * chips
    # As many steps as the run has: of fewer a warm-up may be too long, and memory asks for none.
    scaled = -(-examples * tried.global_batch_size // config.global_batch_size)
    candidate = program_lib.build(tried, scaled, devices, teacher=program.teacher)
    sizes = candidate.sizes("train")
    try:
      lowered = preflight_compile.lower(candidate, "train", sizes, screen)
      preflight_compile.compile_step(candidate, lowered, "train", sizes, screen)
    except DoesNotFitError:
      return False
    return True

  return unit * largest(fits, config.global_batch_size // chips // unit, known=fits_now)


def largest(fits: Callable[[int], bool], start: int, known: bool = False) -> int:
  """Returns the largest n for which `fits`, which holds up to some number; 0 if not even for 1.

  Args:
    fits: takes long, so that it is asked seldom.
    start: the first guess.
    known: whether `fits(start)` is known to hold, and not to be asked.
  """
  low, high = (start, 2 * start) if known else (0, start)
  while fits(high):
    low, high = high, 2 * high
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if fits(middle) else (low, middle)
  return low


@contextlib.contextmanager
def _without_chatter() -> Iterator[TextIO]:
  """Yield the standard error of this process; what libtpu writes there by itself is dropped."""
  sys.stderr.flush()
  kept = os.dup(2)
  with tempfile.TemporaryFile() as chatter, os.fdopen(kept, "w") as screen:
    os.dup2(chatter.fileno(), 2)
    before, sys.stderr = sys.stderr, screen
    try:
      yield screen
    finally:
      sys.stderr = before
      os.dup2(kept, 2)


def _fields() -> dict[str, Any]:
  """Returns the fields of the config that the command line sets."""
  flag: Any = FLAGS["config"]
  return dict(flag.override_values)


def _examples(name: str) -> int:
  """Returns the training examples that a run file is written for; ImageNet's if it is no recipe."""
  files = {recipe.partition(":")[0] for recipe in recipes.names()}
  return recipes.examples(name) if name.partition(":")[0] in files else recipes.IMAGENET


def _table(folder: str, words: list[str]) -> int:
  path = pathlib.Path(folder)
  if any(word.startswith("--topology=") for word in words):
    preflight_table.make(path, words)
  print(preflight_table.text(path))
  return DONE


def main(argv: list[str]) -> int:
  """Returns the exit code: those of trainer.errors, or DOES_NOT_FIT."""
  try:
    if command_line.answered(argv, __doc__):
      return DONE
    if folders := [word for word in argv[1:] if word.startswith("--recipes=")]:
      return _table(
        folders[0].partition("=")[2], [word for word in argv[1:] if word not in folders]
      )
    command_line.parse(argv, "--topology=v5e:4x4 --config=configs/X.py")
    with _without_chatter() as screen:
      report = preflight(FLAGS.config, screen)
    print(json.dumps(report, indent=2) if FLAGS.json else preflight_text.text(report), flush=True)
  except (TrainerError, DataError) as error:
    if FLAGS.json and isinstance(error, DoesNotFitError):
      print(json.dumps({"fields": _fields(), "refused": str(error)}, indent=2))
    print(f"preflight: {error}", file=sys.stderr)
    return error.exit_code if isinstance(error, DoesNotFitError) else FAILED
  return DONE


def _with_unlimited_stacks() -> None:
  """Start this command again without the limit of stacks, if there is one.

  With one, of whatever size, libtpu 0.0.42 crashes on training steps for several chips of v6e and
  of tpu7x. The limit that counts is that of the start of the process.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
  if soft == resource.RLIM_INFINITY or importlib.util.find_spec("libtpu") is None:
    return
  if hard != resource.RLIM_INFINITY:
    print(
      "preflight: stacks are limited here (ulimit -Hs); for v6e and tpu7x the compiler may crash, "
      "and does not where they are unlimited.",
      file=sys.stderr,
    )
    return
  resource.setrlimit(resource.RLIMIT_STACK, (hard, hard))
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
  _with_unlimited_stacks()
  sys.exit(main(sys.argv))
