"""The story of a run: open the data, build the program, find the newest checkpoint, compile, train, evaluate, report."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import time
from typing import Any

from absl import logging
from clu import parameter_overview
from etils import epath
from flax import nnx
import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np
import optax

from input_pipeline import loader, sources
from trainer import config as config_lib
from trainer import evaluate
from trainer import mesh as mesh_lib
from trainer import step as step_lib
from trainer.errors import CheckpointError, ConfigError, Preempted, TrainerError
from trainer.optimizer import make_optimizer, make_schedule
from trainer.pod.pod import Pod
from trainer.reporting import flops, report
from trainer.reporting.clock import WallClock
from trainer.reporting.telemetry import Telemetry
from trainer.state import TrainState, make_init
from trainer.step import NOTHING, SAVE, STOP
from trainer.workdir import storage
from trainer.workdir.checkpoint import Checkpointer

TRAIN_BATCH = ("image", "label")

# Without it the compiler computes a gradient that is wanted in shards by one convolution for each shard, in a loop that
# passes the sums around a ring. With 4 of 64 channels at a time that leaves the matrix units empty.
TPU_OPTIONS = {"xla_tpu_enable_windowed_einsum_for_reduce_scatter": "false"}


@dataclasses.dataclass
class Program:
  """What a config, a mesh and the length of the run define; no array is made yet."""

  mesh: Mesh
  lengths: config_lib.Durations
  graphdef: nnx.GraphDef
  schedule: optax.Schedule
  optimizer: optax.GradientTransformation
  init: Callable[[], TrainState]
  abstract_state: TrainState

  def state_shardings(self) -> TrainState:
    """Returns where each leaf of the state lives."""
    return jax.tree.map(lambda x: x.sharding, self.abstract_state)

  def init_state(self) -> TrainState:
    """Returns the state of step 0, made in place on all devices."""
    return jax.jit(self.init, out_shardings=self.state_shardings())()


def build(
  config: ml_collections.ConfigDict, num_examples: int, devices: Sequence[jax.Device] | None = None
) -> Program:
  """Builds the program of a validated config for a training split of `num_examples`, on `devices` instead of all."""
  mesh = mesh_lib.make_mesh(config.mesh, devices)
  lengths = config_lib.durations(config, num_examples)
  schedule = make_schedule(config, warmup_steps=lengths.warmup, total_steps=lengths.total)
  optimizer = make_optimizer(config, schedule)
  graphdef, init = make_init(config, optimizer, mesh_lib.batch_shards(mesh))
  shapes = jax.eval_shape(init)
  abstract_state = jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    shapes,
    mesh_lib.state_shardings(config, mesh, shapes),
  )
  return Program(mesh, lengths, graphdef, schedule, optimizer, init, abstract_state)


def compile_train_step(config: ml_collections.ConfigDict, program: Program) -> Callable[..., Any]:
  """Compiles (state, batch, requests) -> (state, metrics); the state is donated."""
  train_step = step_lib.make_train_step(
    program.graphdef, program.optimizer, program.schedule, config, program.mesh
  )
  out_shardings = (program.state_shardings(), mesh_lib.replicated(program.mesh))
  jitted = jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)
  batch = _abstract_batch(
    program.mesh, config.global_batch_size, config.data.image_size, TRAIN_BATCH
  )
  options = TPU_OPTIONS if program.mesh.devices.flat[0].platform == "tpu" else None
  return jitted.lower(program.abstract_state, batch, mesh_lib.abstract_flags(program.mesh)).compile(
    options
  )


def compile_eval_step(config: ml_collections.ConfigDict, program: Program) -> Callable[..., Any]:
  """Compiles (params, batch_stats, totals, batch, requests) -> totals."""
  jitted = jax.jit(
    step_lib.make_eval_step(program.graphdef, config, program.mesh),
    out_shardings=mesh_lib.replicated(program.mesh),
  )
  batch = _abstract_batch(
    program.mesh, config.eval.batch_size, config.data.eval_image_size, evaluate.BATCH
  )
  return jitted.lower(
    *program.abstract_state.for_eval(),
    evaluate.abstract_totals(program.mesh),
    batch,
    mesh_lib.abstract_flags(program.mesh),
  ).compile()


def _abstract_batch(
  mesh: Mesh, batch_size: int, size: int, names: tuple[str, ...]
) -> dict[str, jax.ShapeDtypeStruct]:
  kinds = {
    "image": ((batch_size, size, size, 3), np.uint8),
    "label": ((batch_size,), np.int32),
    "mask": ((batch_size,), np.bool_),
  }
  return {
    name: jax.ShapeDtypeStruct(
      *kinds[name], sharding=mesh_lib.batch_sharding(mesh, len(kinds[name][0]))
    )
    for name in names
  }


def train(
  config: ml_collections.ConfigDict, workdir: str, stop: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
  """Trains to the end of the run, from wherever its workdir is.

  Args:
    config: the run; see `configs/base.py`.
    workdir: folder of everything the run writes; a workdir with checkpoints goes on from the newest valid one.
    stop: asked at every step; True saves and ends the process, and with it those of all other hosts.

  Returns:
    What `final.json` holds: step, epochs, top1, top5, loss, examples, best, wall_seconds by cause, goodput, and more.

  Raises:
    TrainerError: with one sentence for the user; `Preempted` after a stop.
    input_pipeline.errors.DataError: if the data are missing, inconsistent or broken.
  """
  clock = WallClock()
  with join_pod(config, stop) as pod:
    return _train(config, workdir, stop, pod, clock)


def _train(
  config: ml_collections.ConfigDict,
  workdir: str,
  stop: Callable[[], bool],
  pod: Pod,
  clock: WallClock,
) -> dict[str, Any]:
  workdir, train_source, eval_source, program = _open(config, workdir, pod)
  lengths, mesh = program.lengths, program.mesh
  logging.info("%s", describe(config, program, train_source, eval_source))

  checkpointer = Checkpointer(pod, workdir, config, lengths.checkpoint_every)
  restored = checkpointer.restore_newest(program.abstract_state)
  if restored:
    state, meta = restored
    first_step, best = meta["step"], meta["best"]
    clock.restore(meta["wall_seconds"])
    logging.info("Going on from checkpoint %d of %d.", first_step, lengths.total)
  else:
    state, meta, first_step, best = None, {}, 0, None
  write_json(workdir / "config.json", config.to_dict())
  finished = workdir / "final.json"
  if first_step >= lengths.total and finished.exists():
    logging.info("This run is complete: %s", finished.read_text())
    checkpointer.close()
    return json.loads(finished.read_text())
  if pod.host == 0:
    starts = workdir / "starts.json"
    write_json(starts, clock.start(json.loads(starts.read_text()) if starts.exists() else None))

  if pod.agree("compile", stop()):
    raise Preempted("Stopped before the first step of this process; nothing is lost.")
  compiled_before = clock.read()["compile"]
  with clock("compile"):
    if state is None:
      state = program.init_state()
    train_step = compile_train_step(config, program)
    eval_step = compile_eval_step(config, program)
    jax.block_until_ready(state)
  logging.info("Compiled in %.1f s.", clock.read()["compile"] - compiled_before)

  host_batches = loader.train_batches(
    train_source,
    config.data,
    seed=config.seed,
    first_step=first_step,
    host=pod.host,
    hosts=pod.hosts,
    global_batch_size=config.global_batch_size,
    positions=meta.get("positions"),
  )
  flags = {request: mesh_lib.flags(mesh, request) for request in (NOTHING, SAVE, STOP)}
  telemetry = Telemetry(
    workdir,
    config,
    clock,
    first_step=first_step,
    total_steps=lengths.total,
    steps_per_epoch=lengths.per_epoch,
    seconds_at_peak=flops.seconds_at_peak(
      program.graphdef,
      *program.abstract_state.for_eval(),
      image_size=config.data.image_size,
      batch_size=config.global_batch_size,
      devices=mesh.devices.flatten(),
    ),
    exchange=pod.exchange,
    reads=lambda: host_batches.reads,
  )

  def is_eval_step(step: int) -> bool:
    return step == lengths.total or bool(lengths.eval_every and step % lengths.eval_every == 0)

  def requests() -> jax.Array:
    return flags[STOP if stop() else SAVE if checkpointer.wanted() else NOTHING]

  def evaluate_now(step: int) -> dict[str, Any] | None:
    """Returns the result, or None if a host asks for a stop."""
    nonlocal best
    pod.at(f"evaluation of step {step}")
    eval_batches = loader.eval_batches(
      eval_source, config.data, batch_size=config.eval.batch_size, host=pod.host, hosts=pod.hosts
    )
    with clock("eval"), contextlib.closing(eval_batches):
      result = evaluate.evaluate(eval_step, mesh, *state.for_eval(), eval_batches, requests)
    if result:
      telemetry.evaluated(step, result)
      if best is None or result["top1"] > best["top1"]:
        best = {"step": step, "top1": result["top1"]}
        checkpointer.set_best(step)
    return result

  def meta_now() -> dict[str, Any]:
    position = host_batches.position(step)
    # With None the step says where the data go on, on all hosts or on none.
    positions = position and [
      at for _, at in sorted(pod.gather(f"positions of step {step}", position).items())
    ]
    return {"best": best, "wall_seconds": clock.read(), "positions": positions}

  batches = mesh_lib.prefetch(mesh, host_batches, TRAIN_BATCH)
  step, result, stopping = first_step, None, False
  try:
    # A checkpoint is taken before the evaluation of its step, so one that was cut short, or is lost with its process,
    # is done again here.
    if step and is_eval_step(step):
      result = evaluate_now(step)
      stopping = result is None
    clock.switch("step")
    # What is decided here is the same on all hosts: a function of the step, or of requests that a step has agreed on.
    while step < lengths.total and not stopping:
      pod.at(f"step {step + 1}")
      with clock("input_wait"):
        batch = next(batches)
      request = requests()
      with jax.transfer_guard("disallow"):
        state, metrics = train_step(state, batch, request)
      step += 1
      telemetry.step(step, metrics)
      checkpointer.poll()
      if is_eval_step(step) or checkpointer.due(step) or telemetry.request == SAVE:
        telemetry.flush()  # raises if a step up to this one was not finite: only good states are saved
        with clock("checkpoint"):
          checkpointer.save(step, state, meta_now())
        telemetry.forget(SAVE)
      stopping = telemetry.request == STOP
      if is_eval_step(step) and not stopping:
        result = evaluate_now(step)
        stopping = result is None

    telemetry.flush()
    clock.switch("other")
    with clock("checkpoint"):
      checkpointer.save_and_wait(step, state, meta_now())
    if step < lengths.total or result is None:
      raise Preempted(
        f"Stopped and saved at step {step} of {lengths.total}; the same command goes on from there."
      )
  finally:
    batches.close()
    host_batches.close()
    telemetry.close()
    checkpointer.close()

  seconds = clock.since_first_start()
  final = result | {
    "step": step,
    "epochs": step / lengths.per_epoch,
    "best": best,
    "params": count_params(program),
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "images_per_second": step
    * config.global_batch_size
    / (seconds["step"] + seconds["input_wait"]),
    "bad_records": host_batches.bad_records,
    "reads": dict(host_batches.reads),
    "wall_seconds": seconds | {"total": sum(seconds.values())},
    "goodput": {"share": clock.goodput(), "starts": clock.starts},
  }
  write_json(finished, final)
  logging.info(
    "Done: top1 %.2f%%, top5 %.2f%% on %d examples after %.1f epochs; goodput %.1f%%.",
    100 * final["top1"],
    100 * final["top5"],
    final["examples"],
    final["epochs"],
    100 * final["goodput"]["share"],
  )
  if pod.host == 0:
    try:
      logging.info("Curves: %s", report.write_report(str(workdir)))
    except Exception as error:  # whatever it is, the run is complete
      logging.warning(
        "No report was written (%s); try: python -m trainer.report %s",
        storage.first_line(error),
        workdir,
      )
  return final


def _open(
  config: ml_collections.ConfigDict, workdir: str, pod: Pod
) -> tuple[epath.Path, sources.Source, sources.Source, Program]:
  """Returns the folder of the run, its training and evaluation examples, and its program."""
  path = open_workdir(workdir, pod)
  use_compilation_cache(config, path)
  train_source, eval_source = (
    sources.open_source(config.data, split, config.model.num_classes)
    for split in (config.data.train_split, config.data.eval_split)
  )
  seen = pod.gather(
    "data", [getattr(source, "fingerprint", len(source)) for source in (train_source, eval_source)]
  )
  for host, theirs in seen.items():
    if theirs != seen[0]:
      raise ConfigError(
        f"Host {host} sees other data at config.data.path {config.data.path} than host 0; give all hosts "
        "the same files, and a data set of the hub with its @REVISION."
      )
  return path, train_source, eval_source, build(config, len(train_source))


def evaluate_only(
  config: ml_collections.ConfigDict, workdir: str, stop: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
  """Evaluates the newest checkpoint of a workdir on `config.data.eval_split`, and writes `eval.json`.

  Returns:
    {'step', 'top1', 'top5', 'loss', 'examples'}.

  Raises:
    TrainerError: as `train` does, and if there is no checkpoint.
  """
  with join_pod(config, stop) as pod:
    return _evaluate_only(config, workdir, stop, pod)


def _evaluate_only(
  config: ml_collections.ConfigDict, workdir: str, stop: Callable[[], bool], pod: Pod
) -> dict[str, Any]:
  directory, _, eval_source, program = _open(config, workdir, pod)
  checkpointer = Checkpointer(pod, directory, config, every_steps=0)
  restored = checkpointer.restore_newest(program.abstract_state)
  checkpointer.close()
  if restored is None:
    raise CheckpointError(
      f"{workdir} holds no checkpoint to evaluate; train first, or check --workdir."
    )
  state, meta = restored
  host_batches = loader.eval_batches(
    eval_source, config.data, batch_size=config.eval.batch_size, host=pod.host, hosts=pod.hosts
  )
  flags = {request: mesh_lib.flags(program.mesh, request) for request in (NOTHING, STOP)}
  pod.at("evaluation")
  with contextlib.closing(host_batches):
    result = evaluate.evaluate(
      compile_eval_step(config, program),
      program.mesh,
      *state.for_eval(),
      host_batches,
      lambda: flags[STOP if stop() else NOTHING],
    )
  if result is None:
    raise Preempted("Stopped during the evaluation; the same command starts it again.")
  result = {"step": meta["step"]} | result
  write_json(directory / "eval.json", result)
  logging.info(
    "Checkpoint %d: top1 %.2f%%, top5 %.2f%%, loss %.4f on %d examples.",
    result["step"],
    100 * result["top1"],
    100 * result["top5"],
    result["loss"],
    result["examples"],
  )
  return result


@contextlib.contextmanager
def join_pod(config: ml_collections.ConfigDict, stop: Callable[[], bool]) -> Iterator[Pod]:
  """Checks the config, finds the other hosts, makes sure that all of them mean the same run, and leaves with them.

  Raises:
    TrainerError: as `Pod.join` does, and if the config can run nowhere, not on these devices, or is not that of all hosts.
  """
  config_lib.validate(config)
  with Pod.join(config.pod, stop) as pod:
    if pod.host:
      logging.set_verbosity(logging.WARNING)  # one host tells the story, all tell what goes wrong
    mine = config_lib.flatten(config) | {"jax version": jax.__version__, "source code": code_hash()}
    digests = pod.gather(
      "config", hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
    )
    if len(set(digests.values())) > 1:
      for host, theirs in pod.gather("differing config", mine).items():
        field = next(
          (
            field
            for field in sorted(mine.keys() | theirs.keys())
            if mine.get(field) != theirs.get(field)
          ),
          "",
        )
        if field:
          raise ConfigError(
            f"Host {host} has {field} = {theirs.get(field)!r}, host {pod.host} has {mine.get(field)!r}; "
            "start all hosts with the same code and the same flags."
          )
    config_lib.check_split(config, num_devices=jax.device_count())
    yield pod


def code_hash() -> str:
  """Returns a hash of the source of `trainer`, `input_pipeline` and `configs`, to tell one version from another."""
  root, digest = pathlib.Path(__file__).parents[1], hashlib.sha256()
  for folder in ("trainer", "input_pipeline", "configs"):
    for path in sorted((root / folder).rglob("*.py")):
      digest.update(path.read_bytes())
  return digest.hexdigest()[:16]


def open_workdir(workdir: str, pod: Pod) -> epath.Path:
  """Makes the folder, and proves that this host can write it and sees what host 0 writes.

  Raises:
    ConfigError: if it cannot.
  """
  path = storage.path_of(workdir)
  probe, first = path / f".probe-{pod.host}", path / ".probe-0"
  trouble = storage.problem(path)
  if trouble:
    raise ConfigError(f"--workdir {path} cannot be used by host {pod.host}: {trouble}.")
  try:
    path.mkdir(parents=True, exist_ok=True)
    probe.write_text(str(time.time()))
    written = pod.gather("workdir", probe.read_text())[0]
    seen = first.read_text() if first.exists() else None
    pod.gather("workdir is seen", None)
    probe.unlink()
  except Exception as error:
    if not storage.is_failure(error):
      raise
    reason = getattr(error, "strerror", None) or storage.first_line(error)
    raise ConfigError(
      f"--workdir {path} cannot be written by host {pod.host}: {reason}."
    ) from error
  if seen != written:
    raise ConfigError(
      f"--workdir {path} is not the same folder on host {pod.host} as on host 0; give a bucket, or a "
      "folder that all hosts mount."
    )
  return path


def use_compilation_cache(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
  """Tells JAX where `config.compilation_cache` keeps compiled programs, unless the environment has told it."""
  if config.compilation_cache and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = (
      workdir / "compiled" if config.compilation_cache == "workdir" else config.compilation_cache
    )
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Small programs too: those that hash the leaves of a checkpoint are a few dozen, quick each and seconds together.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def write_json(path: epath.Path, value: dict[str, Any]) -> None:
  """Writes a file that is whole or absent, on process 0.

  Raises:
    TrainerError: if it cannot be written.
  """
  if jax.process_index() == 0:
    text = json.dumps(value, indent=2) + "\n"
    try:
      storage.write_whole(path, text)
    except Exception as error:
      if not storage.is_failure(error):
        raise
      raise TrainerError(
        f"{path} could not be written ({storage.first_line(error)}); run the same command again."
      ) from error


def count_params(program: Program) -> int:
  """Returns the number of trained parameters."""
  return sum(x.size for x in jax.tree.leaves(program.abstract_state.params))


def describe(
  config: ml_collections.ConfigDict,
  program: Program,
  train_source: sources.Source,
  eval_source: sources.Source,
) -> str:
  """Returns what is about to run, for the log."""
  lengths, devices = program.lengths, jax.devices()
  overview = parameter_overview.get_parameter_overview(
    program.abstract_state.params, include_stats=False
  )
  return "\n".join(
    [
      "This run:",
      f"  model     {config.model.name} {config.model.depth}, width {config.model.width:g}, "
      f"{count_params(program):,} parameters, {config.model.num_classes} classes, {config.model.dtype}",
      f"  data      {config.data.path or config.data.kind}: {len(train_source):,} to train, {len(eval_source):,} to evaluate, "
      f"at {config.data.image_size} and {config.data.eval_image_size} px",
      "  order     "
      + train_source.describe_order(
        config.data,
        global_batch_size=config.global_batch_size,
        hosts=jax.process_count(),
      ),
      f"  length    {lengths.total:,} steps of {config.global_batch_size}, {lengths.total / lengths.per_epoch:.2f} epochs, "
      f"warm-up {lengths.warmup:,}, evaluation every {lengths.eval_every or lengths.total:,}",
      f"  devices   {len(devices)} x {devices[0].device_kind}, mesh {dict(program.mesh.shape)}, "
      f"{jax.process_count()} process(es)",
      *[f"  {line}" for line in mesh_lib.describe_shardings(program.abstract_state)],
      overview,
    ]
  )
