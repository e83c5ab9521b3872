"""A run from start to end: data, program, newest checkpoint, compilation, steps, result."""

from collections.abc import Callable, Iterator
import contextlib
import json
from typing import Any

from absl import logging
import jax
import ml_collections

from input_pipeline import loader, sources
from input_pipeline.errors import DataError
from input_pipeline.sources import layout, slices
from trainer import config as config_lib
from trainer import data as data_lib
from trainer import failures
from trainer import program as program_lib
from trainer.errors import CheckpointError, ConfigError, Preempted, TrainerError
from trainer.evaluate import Result, in_words
from trainer.pod import preemption
from trainer.pod.join import join_pod
from trainer.pod.pod import Pod
from trainer.pod.requests import FAIL, SAVE, STOP
from trainer.reporting import environment, overview, report, screen, wandb_writer
from trainer.reporting.clock import WallClock
from trainer.run import STOPPED_EARLY, Opened, Run
from trainer.weights import teacher as teacher_lib
from trainer.workdir import storage
from trainer.workdir.files import open_workdir, read_json, write_json
from trainer.workdir.paths import Workdir

# Entries of `final.json`, without which it is damaged.
FINAL = {"step": int, "top1": float, "loss": float, "examples": int, "wall_seconds": dict}


def train(
  config: ml_collections.ConfigDict,
  workdir: str,
  stop: Callable[[], bool] = lambda: False,
  verbose: bool = False,
) -> dict[str, Any]:
  """Train to the end of the run, from wherever its workdir is.

  Args:
    config: the run; see `configs/base.py`.
    workdir: folder of everything the run writes; a workdir with checkpoints resumes from the newest
      valid one.
    stop: True saves and ends the process, and those of all other hosts. It is asked at every step,
      and by a thread while a start or a batch is waited for. Ctrl-C does the same, where this is
      the main thread and the program has no handler of its own; without either, a start is not cut
      short.
    verbose: whether every parameter and how it is split over the devices is logged, and not only
      written to `overview.txt`.

  Returns:
    What `final.json` holds: step, epochs, top1, top5, loss, examples, best, wall_seconds by cause,
    goodput, and more.

  Raises:
    TrainerError: with one sentence for the user; `Preempted` after a stop.
    input_pipeline.errors.DataError: if the data are missing, inconsistent or broken.
  """
  clock = WallClock()
  with _in_sight(stop) as stop, join_pod(config, stop) as pod, contextlib.ExitStack() as exits:
    with preemption.at_once(STOPPED_EARLY):
      _check_wandb(config, pod)
      config = data_lib.with_classes(config)
      opened = _open(config, workdir, pod)
      shown = _show(opened, verbose) if pod.host == 0 else ""
      run = Run(config, opened, pod, clock, stop)
      run.own_workdir(exits)
      run.restore()
      exits.callback(run.checkpointer.close)
      run.check_data()
      run.read_start()
      run.read_real_labels()
    if final := _already_finished(run):
      return final
    # Of a run that has been accepted; a refused start leaves the workdir of another as it was.
    exits.enter_context(environment.failure_kept(run.workdir))
    _keep(opened, shown)
    run.compile(exits)
    with preemption.at_once(STOPPED_EARLY):
      run.start_input(exits)
    return _finish(run, _loop(run))


@contextlib.contextmanager
def _in_sight(stop: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
  """Show the run, and take `stop` and Ctrl-C as requests to stop."""
  screen.SCREEN.waits_for = "the start"
  with screen.shown(), preemption.interrupts(lambda: screen.SCREEN.waits_for, stop) as requested:
    yield lambda: stop() or requested()


def _check_wandb(config: ml_collections.ConfigDict, pod: Pod) -> None:
  """Refuse, on all hosts, a `config.log.wandb` that the first one can do nothing with."""
  if config.log.wandb:
    trouble = pod.gather("config.log.wandb", wandb_writer.problem() if pod.host == 0 else "")[0]
    if trouble:
      raise ConfigError(trouble)


def _show(opened: Opened, verbose: bool) -> str:
  """Log what is about to run; return it with the parameters and their shardings."""
  first, details = overview.first_screen(opened), overview.details(opened)
  logging.info("%s", first)
  if verbose:
    logging.info("%s", details)
  return f"{first}\n{details}\n"


def _keep(opened: Opened, shown: str) -> None:
  """Write what was shown to the workdir of a run that has been accepted."""
  path = opened.workdir.overview
  try:
    if shown:
      path.write_text(shown)
  except Exception as error:
    if not storage.is_failure(error):
      raise
    logging.warning("%s could not be written (%s).", path, storage.first_line(error))


def evaluate_only(
  config: ml_collections.ConfigDict,
  workdir: str,
  stop: Callable[[], bool] = lambda: False,
  checkpoint: str = "newest",
) -> dict[str, Any]:
  """Evaluate a checkpoint of a workdir on `config.data.eval_split`, and write `eval.json`.

  Args:
    config: the run; only what may differ in a resume may differ from the run of the checkpoint.
    workdir: its folder.
    stop: as in `train`.
    checkpoint: newest, best, or a step.

  Returns:
    {'step', 'top1', 'top5', 'loss', 'examples'}, and what else `evaluate.Result` has.

  Raises:
    TrainerError: as `train` does, and if there is no checkpoint.
  """
  with _in_sight(stop) as stop, join_pod(config, stop) as pod, contextlib.ExitStack() as exits:
    with preemption.at_once("Stopped before the evaluation; nothing is lost."):
      config = data_lib.with_classes(config)
      opened = _open(config, workdir, pod, evaluation=True)
      run = Run(config, opened, pod, WallClock(), stop)
      run.restore(checkpoint)
      run.checkpointer.close()
      if not run.restored:
        raise CheckpointError(
          f"{workdir} holds no checkpoint to evaluate; train first, or check --workdir."
        )
      run.match_labels()
      run.read_real_labels()
    exits.callback(run.steps.close)
    result = run.evaluate()
    if result is None:
      if failed := failures.evaluation_failed(run):
        raise failed
      raise Preempted("Stopped during the evaluation; the same command starts it again.")
    found = {"step": run.step, **result}
    write_json(run.workdir.evaluation, found)
    for line in in_words(result):
      logging.info("Checkpoint %d: %s.", run.step, line)
    logging.info("Result: %s", run.workdir.evaluation)
    return found


def _open(
  config: ml_collections.ConfigDict, workdir: str, pod: Pod, evaluation: bool = False
) -> Opened:
  """Open workdir and data, the same on all hosts, and trace the program that they make.

  Raises:
    TrainerError: they do not fit the config or each other, or hosts differ.
    DataError: the data are missing or not of the form that the config asks for.
  """
  folder = Workdir(open_workdir(workdir, pod))
  program_lib.use_compilation_cache(config, folder.compiled)
  evaluated = slices.several(config.data.eval_split, "config.data.eval_split")
  train_source = _open_train(config, evaluation)
  eval_sources = [
    # The number of its classes may be another: they are compared by name with those of training.
    sources.open_source(config.data, split, config.model.num_classes, any_number=True)
    for split in evaluated
  ]
  if train_source is None:
    train_source = eval_sources[0]  # of which an evaluation uses the length alone
  trained = slices.parse(config.data.train_split)
  for name in evaluated:
    if trained.whole and slices.parse(name).name == trained.name:
      logging.warning("%s is evaluated, but trained on as well: %s.", name, trained.text)
  opened = (train_source, *eval_sources)
  if pod.host == 0:
    for line in layout.summary(opened):
      logging.info("Data: %s.", line)
  host = pod.odd_one("data", [data_lib.summary(source) for source in opened])
  if host is not None:
    raise ConfigError(
      f"Host {host} sees other data at config.data.path {config.data.path} than host 0; give all "
      "hosts the same files, and a data set of the hub with its @REVISION."
    )
  loader.check_eval(config.data, config.eval.batch_size, pod.hosts)
  if not evaluation:
    loader.check_train(train_source, config.data, config.global_batch_size, pod.hosts)
    if (batch := config.global_batch_size) > len(train_source):
      logging.warning(
        "config.global_batch_size is %d, more than the %d examples of %s: a step has some of them "
        "more than once; --config.global_batch_size=%d has each once.",
        batch,
        len(train_source),
        config.data.train_split,
        max(1, len(train_source)),
      )
  teacher = None
  if not evaluation:
    teacher = teacher_lib.read_everywhere(config, train_source.class_names, pod)
  program = program_lib.build(config, len(train_source), teacher=teacher)
  config_lib.check_precise_bn(config, train_source, program.abstract_state.for_eval().batch_stats)
  count, total = config.eval.precise_bn_examples, len(train_source)
  some = train_source.subset(slices.choose(total, 0, count)) if count else None
  named = dict(zip(evaluated, eval_sources, strict=True))
  return Opened(folder, train_source, named, some, program)


def _open_train(config: ml_collections.ConfigDict, evaluation: bool) -> sources.Source | None:
  """Open the training split; None if there is none and an evaluation does without."""
  try:
    return sources.open_source(
      config.data, config.data.train_split, config.model.num_classes, any_number=evaluation
    )
  except DataError:
    if not evaluation or config.eval.precise_bn_examples:
      raise
    return None


def _already_finished(run: Run) -> dict[str, Any] | None:
  """Note this start; return the result of a run that was complete before, else None."""
  complete = run.step >= run.lengths.last
  final = read_json(run.workdir.final, FINAL, set_aside=True) if complete else None
  if final is not None:
    logging.info("This run is complete: %s", json.dumps(final, indent=2))
  if run.pod.host == 0:
    before = read_json(run.workdir.config)
    changes = config_lib.differences(before, run.config.to_dict()) if before else {}
    if final is None:
      _note_start(run, changes)
    elif changes:
      logging.warning(
        "The result is that of %s; these fields differ now and had no effect: %s. "
        "--mode=eval evaluates with other settings.",
        run.workdir.config,
        config_lib.in_words(changes),
      )
  return final


def _note_start(run: Run, changes: config_lib.Changes) -> None:
  """Write what this process runs, on which data, and that it was started."""
  folder = run.workdir
  write_json(folder.config, run.config.to_dict())
  write_json(folder.environment, environment.facts())
  names = run.train_source.class_names
  # Imported weights may have brought theirs.
  if names and read_json(folder.classes, {"classes": list}, set_aside=True) is None:
    words = data_lib.words_of(run.config.data.path, names)
    write_json(folder.classes, {"classes": list(names)} | ({"words": words} if words else {}))
  write_json(folder.data, {"path": run.config.data.path, **run.data, "left_out": _left_out(run)})
  earlier = read_json(folder.starts, WallClock.STARTS, set_aside=True)
  write_json(folder.starts, run.clock.start(earlier, run.step, changes))


def _left_out(run: Run) -> dict[str, list[str]]:
  """Return the names of all files of the data that are no examples, by reason."""
  found: dict[str, list[str]] = {}
  for source in (run.train_source, *run.eval_sources.values()):
    found |= {reason: sorted(paths) for reason, paths in source.left_out.items()}
  return found


def _loop(run: Run) -> Result:
  """Take steps to the end of the run, and save what is good if anything fails.

  Returns:
    The evaluation of the last step.

  Raises:
    Preempted: after a stop; everything there is to keep is saved.
    RunFailed: after a failure of the input, of memory or of a library.
  """
  try:
    return _steps(run)
  except TrainerError:
    raise
  except Exception as error:
    raise failures.end_at_once(run, error) from error


def _steps(run: Run) -> Result:
  """Take steps to the end of the run; evaluate and save where that is due.

  Returns:
    The evaluation of the last step.

  Raises:
    TrainerError: as `_loop` does.
  """
  # A checkpoint is taken before the evaluation of its step, so one that was cut short, or is lost
  # with its process, is done again here.
  stopping = bool(run.step) and run.lengths.is_evaluated(run.step) and not run.evaluate_now()
  run.clock.switch("step")
  # What is decided here is the same on all hosts: a function of the step, or of requests that a
  # step has agreed on.
  while run.step < run.lengths.last and not stopping:
    run.take_step()
    evaluated = run.lengths.is_evaluated(run.step)
    if evaluated or run.checkpointer.due(run.step) or run.requests.agreed == SAVE:
      run.flush()
      if run.requests.agreed != FAIL:
        run.save()
      run.requests.forget(SAVE)
    stopping = run.requests.agreed >= STOP
    if evaluated and not stopping:
      stopping = not run.evaluate_now()
  run.flush()
  run.clock.switch("other")
  if run.result is None:
    failures.end(run)
  run.save(wait=True)
  if run.result is None:
    raise Preempted(
      f"Stopped and saved at step {run.step} of {run.lengths.last}; the same command resumes "
      "from there."
    )
  return run.result


def _finish(run: Run, result: Result) -> dict[str, Any]:
  """Write `final.json` and the report; return what the former holds."""
  seconds = run.clock.since_first_start()
  examples = (run.step + run.lengths.offset) * run.config.global_batch_size
  final: dict[str, Any] = {
    **result,
    "step": run.step,
    "epochs": run.lengths.epoch(run.step),
    "best": run.best,
    "params": overview.count_params(run.program),
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "images_per_second": examples / (seconds["step"] + seconds["input_wait"]),
    "bad_records": run.host_batches.bad_records,
    "workers_replaced": run.replacements.count,
    "reads": dict(run.host_batches.reads),
    "wall_seconds": seconds | {"total": sum(seconds.values())},
    "goodput": {"share": run.clock.goodput(), "starts": run.clock.starts},
    "history": run.history,
  }
  write_json(run.workdir.final, final)
  logging.info(
    "Done: top1 %.2f%%, top5 %.2f%% on %d examples after %.1f epochs; goodput %.1f%%.",
    100 * final["top1"],
    100 * final["top5"],
    final["examples"],
    final["epochs"],
    100 * final["goodput"]["share"],
  )
  if run.pod.host == 0:
    try:
      with screen.SCREEN.doing("writing the report"):
        path = report.write_report(str(run.workdir.path))
      logging.info("Curves: %s", path)
    except Exception as error:  # whatever it is, the run is complete
      logging.warning(
        "No report was written (%s); try: python -m trainer.report %s",
        storage.first_line(error),
        run.workdir.path,
      )
  return final
