"""A run in one process: what it was opened with, and what changes from step to step."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import re
import time
from typing import Any

from absl import logging
import jax
import ml_collections
import numpy as np

from input_pipeline import loader, sources
from input_pipeline.batches import substituted
from input_pipeline.errors import BadRecordError, one_line
from input_pipeline.rows import Batch, validation_number
from input_pipeline.workers.pool import Replacements
from trainer import checks, real_labels
from trainer import config as config_lib
from trainer import data as data_lib
from trainer import evaluate as evaluate_lib
from trainer import mesh as mesh_lib
from trainer import program as program_lib
from trainer.checks import Checks
from trainer.errors import ConfigError, Preempted
from trainer.pod.pod import Pod
from trainer.pod.requests import FAIL, Requests
from trainer.program import Program, Steps
from trainer.reporting import classes as class_tables
from trainer.reporting import flops
from trainer.reporting.clock import WallClock
from trainer.reporting.screen import SCREEN
from trainer.reporting.telemetry import Telemetry
from trainer.state import TrainState, Variables
from trainer.weights import start as start_lib
from trainer.weights import teacher as teacher_lib
from trainer.workdir import lease
from trainer.workdir.checkpoint import Checkpointer
from trainer.workdir.files import read_json, write_json
from trainer.workdir.paths import Workdir

STOPPED_EARLY = "Stopped before the first step of this process; nothing is lost."
_NAMES = 16  # images of a split whose names are compared with those that ReaL labels are for


@dataclasses.dataclass(frozen=True)
class Opened:
  """What a run was opened with.

  Attributes:
    workdir: its folder.
    train_source: its examples.
    eval_sources: those of each evaluated split, by name; the first decides which checkpoint is the
      best.
    statistics_source: those that BN statistics are computed on before an evaluation, or None.
    program: what is compiled.
  """

  workdir: Workdir
  train_source: sources.Source
  eval_sources: Mapping[str, sources.Source]
  statistics_source: sources.Source | None
  program: Program


class Run:
  """A run in this process, as `train` takes it from start to end.

  Attributes:
    step: steps taken.
    restored: whether a checkpoint was found.
    state: after that step; of a new run from `compile` on.
    best: {'step', 'top1'} of the best evaluation so far, or None.
    replacements: of decoding processes of this host.
    history: by which resumes the config was changed: [{'step', 'changes'}, ...].
    result: of the evaluation of this step, or None if it was not evaluated or was cut short.
  """

  state: TrainState

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    opened: Opened,
    pod: Pod,
    clock: WallClock,
    stop: Callable[[], bool],
  ):
    self.config, self.pod, self.clock, self.stop = config, pod, clock, stop
    self.workdir, self.program = opened.workdir, opened.program
    self.train_source, self.eval_sources = opened.train_source, opened.eval_sources
    self.statistics_source = opened.statistics_source
    self.data = data_lib.describe(self.train_source, self.eval_sources)
    self.saved_data: data_lib.Facts | None = None
    self.saved_teacher: str | None = None
    self._labels: dict[str, np.ndarray | None] = {}
    self.lengths, self.mesh = self.program.lengths, self.program.mesh
    self.checkpointer = Checkpointer(pod, self.workdir.path, config, self.lengths.checkpoint_every)
    self.steps = Steps(self.program)
    self.requests = Requests(self.mesh, stop, self.checkpointer.wanted)
    self.lease: lease.Lease | None = None
    self.step, self.restored = 0, False
    self.start: start_lib.Start | None = None
    self.replacements = Replacements(config.data.worker_restarts)
    self._real: np.ndarray | None = None
    self.best: dict[str, Any] | None = None
    self.history: list[dict[str, Any]] = []
    self.positions: list[Any] | None = None
    self.result: evaluate_lib.Result | None = None

  def own_workdir(self, exits: contextlib.ExitStack) -> None:
    """Keep other runs out of the workdir."""
    if self.pod.host == 0:
      path, seconds = self.workdir.owner, self.config.pod.lease_seconds
      self.lease = exits.enter_context(lease.hold(path, self.workdir.path, seconds))

  def restore(self, checkpoint: str = "newest") -> None:
    """Take up a checkpoint of the workdir: the newest, if there is one; or best, or a step."""
    with SCREEN.doing(f"restoring checkpoint {checkpoint}") as doing:
      restored = self.checkpointer.restore(self.program.abstract_checkpoint, checkpoint)
    if restored is None:
      return
    self.restored, (state, meta) = True, restored
    self.state = self.program.from_checkpoint(state)
    self.step, self.best, self.positions = meta["step"], meta["best"], meta.get("positions")
    self.clock.restore(meta["wall_seconds"], meta.get("starts"))
    self.history = meta.get("history", [])
    self.saved_data, self.saved_teacher = meta.get("dataset"), meta.get("teacher")
    if changes := meta.get("changes"):
      self.history = [*self.history, {"step": self.step, "changes": changes}]
      words = config_lib.in_words(changes)
      logging.info("By config.resume.allow, from step %d on: %s.", self.step, words)
    offset = meta.get("offset", 0)
    before, now = meta["config"]["global_batch_size"], self.config.global_batch_size
    if before != now:
      # The data resume at the last whole batch of the new size.
      offset = (self.step + offset) * before // now - self.step
    if offset != self.lengths.offset:
      self.program = program_lib.build(
        self.config, len(self.train_source), offset=offset, teacher=self.program.teacher
      )
      self.lengths, self.steps = self.program.lengths, Steps(self.program)
    logging.info(
      "Resuming from checkpoint %d of %d, restored in %.1f s.",
      self.step,
      self.lengths.last,
      doing.seconds,
    )

  def check_data(self) -> None:
    """Refuse other data or another teacher in a resume, and evaluated classes not trained on."""
    if self.restored:
      path, teacher = str(self.workdir.path), self.program.teacher
      teacher_lib.check_same(self.saved_teacher, teacher, self.config, path)
      allow = "data" in config_lib.allowed_names(self.config.resume.allow)
      data_lib.check_same(self.saved_data, self.data, self.train_source, path, allow)
    self._match_labels(self.data["classes"])

  def match_labels(self) -> None:
    """Compare the classes of an evaluated data set by name with those that the run has learned."""
    if self.saved_data is not None:
      self._match_labels(self.saved_data["classes"])
    elif names := self._imported_classes:
      self._match_labels(names)
    else:  # of an earlier version, which kept no names
      for source in self.eval_sources.values():
        sources.check_number(source, self.config.data, self.config.model.num_classes)

  def _match_labels(self, classes: Sequence[str]) -> None:
    self._labels = {
      name: data_lib.label_table(classes, source, name)
      for name, source in self.eval_sources.items()
    }

  def read_start(self) -> None:
    """Read the weights that a new run begins with, if `config.init_from` names any."""
    if not self.config.init_from:
      return
    if self.restored:
      logging.info(
        "config.init_from is not read: this run resumes from its own checkpoint %d.", self.step
      )
      return
    self.start = start_lib.read_start(self.program, self.pod)
    logging.info("config.init_from=%s.", self.start)
    ours, theirs = self.data["classes"], self.start.classes
    if self.start.head and ours and theirs and tuple(ours) != theirs:
      logging.warning(
        "The head of config.init_from is of other classes (%s, ...) than the data (%s, ...); "
        "--config.init_exclude=^head/ makes a new one.",
        ", ".join(theirs[:3]),
        ", ".join(ours[:3]),
      )

  def read_real_labels(self) -> None:
    """Read `config.eval.real_labels`, if it names any; all hosts must have the same."""
    if not (path := self.config.eval.real_labels):
      return
    self._real = real_labels.read(path, self.config.model.num_classes)
    names = list(self._class_names())
    if all(re.fullmatch(r"n\d{8}", name) for name in names) and names != sorted(names):
      raise ConfigError(
        f"config.eval.real_labels={path} is for classes in the order of their WordNet ids; those "
        "of this run are in another."
      )
    self._check_names(path, len(self._real))
    digest = hashlib.sha256(self._real.tobytes()).hexdigest()
    host = self.pod.odd_one("config.eval.real_labels", digest)
    if host is not None:
      raise ConfigError(
        f"Host {host} reads another file at config.eval.real_labels={path} than host 0; give all "
        "hosts the same."
      )

  def _check_names(self, path: str, count: int) -> None:
    """Refuse ReaL labels for images of other names, by the first of each split."""
    for split, source in self.eval_sources.items():
      # Of others the names are known when they are read.
      for index in range(min(_NAMES, len(source)) if source.indexed else 0):
        with contextlib.suppress(BadRecordError):
          name = source[index].name
          if not 1 <= validation_number(name) <= count:
            raise ConfigError(
              f"config.eval.real_labels={path} is for the images ILSVRC2012_val_00000001.JPEG to "
              f"{count:08d}; one of config.data.eval_split={split} is called {one_line(name)}. "
              "Give the data under their own names, or no ReaL labels."
            )

  def compile(self, exits: contextlib.ExitStack) -> None:
    """Compile the training step, begin with the evaluation step, make the state of a new run."""
    if self.pod.agree("compile", self.stop()):
      raise Preempted(STOPPED_EARLY)
    before = self.clock.read()["compile"]
    exits.callback(self.steps.close)
    with self.clock("compile"), SCREEN.doing("compiling the training step"):
      if not SCREEN.on:
        logging.info("Compiling the training step.")
      first, *later = self.program.all_sizes("train", self.step)
      self.steps.prepare("train", **first)
      self.checks = Checks(self.pod, self.program, self.steps, [first, *later])
      self.steps.prepare("eval", **self.program.sizes("eval"))
      if self.statistics_source:
        self.steps.prepare("statistics", **self.program.sizes("statistics"))
      for sizes in later:
        self.steps.prepare("train", **sizes)
      self.program.check_eval_size()  # while the training step compiles
      self.checks.prepare_gradients()
      if self.start:
        self.state, self.start = start_lib.make_state(self.program, self.start), None
      elif not self.restored:
        self.state = self.program.init_state()
      teacher = self.program.teacher
      self._taught = (teacher.place(self.config, self.mesh),) if teacher else ()
      self.train_step = self.steps.get("train", **first)
      self._sizes = first
      jax.block_until_ready(self.state)
      self.pod.gather("compiled", None)  # a collective would wait for 30 s, and name nobody
    logging.info("Compiled in %.1f s.", self.clock.read()["compile"] - before)

  def start_input(self, exits: contextlib.ExitStack) -> None:
    """Start to load batches from this step on, and to report."""
    config = self.config
    self.host_batches = loader.train_batches(
      self.train_source,
      config.data,
      seed=config.seed,
      first_step=self.step + self.lengths.offset,
      host=self.pod.host,
      hosts=self.pod.hosts,
      global_batch_size=config.global_batch_size,
      positions=self.positions,
      sizes=self.lengths.sizes,
      replacements=self.replacements,
    )
    exits.callback(self.host_batches.close)
    peak = flops.peak(self.mesh.devices.flatten().tolist())
    self.telemetry = Telemetry(
      self.workdir.path,
      config,
      self.clock,
      first_step=self.step,
      total_steps=self.lengths.last,
      epoch=self.lengths.epoch,
      work=flops.work(self.program, peak).between,
      peak=peak,
      image_size=self.lengths.image_size if config.data.image_sizes else None,
      exchange=self.pod.exchange,
      reads=lambda: self.host_batches.reads,
      replaced=lambda: self.replacements.count,
      evaluations=self.lengths.evaluations_after,
      evaluated_examples=sum(map(len, self.eval_sources.values())),
    )
    SCREEN.waits_for = "this step"
    exits.callback(self.telemetry.close)
    first = self.step
    batches = substituted(
      self.telemetry.with_samples(self.host_batches, self._class_names()),
      self.host_batches.count,
      lambda n: self.program.empty_batch(
        "train", self.pod.hosts, **self.program.sizes_at(first + n)
      ),
      lambda n, error: self.requests.fail(first + n + 1, error),
      self.pod.stop_requested,
    )
    self.batches = mesh_lib.prefetch(self.mesh, batches, program_lib.BATCHES["train"])
    exits.callback(self.batches.close)

  def take_step(self) -> None:
    """Take a training step; returns when it is dispatched.

    If a host has failed, the steps from there on are undone instead.
    """
    step = self.step + 1
    self.pod.at(f"step {step}")
    with self.clock("input_wait"):
      batch = next(self.batches)
    if self.pod.hosts == 1 and self.requests.fails(step):  # nobody waits for this host
      self.requests.agree(step, FAIL)
      return
    if self.lengths.image_size(self.step) != self._sizes["image_size"]:
      self._change_size()
    flags = self.requests.flags(step)
    with jax.transfer_guard("disallow"):
      self.state, output = self.train_step(self.state, batch, flags, *self._taught)
    self.step = step
    self.result = None
    self.requests.note(step, output.request)
    if not self._step_back():
      self.telemetry.step(step, output.metrics)
      self.checks.step(step, self.state, batch, self._sizes)
    self.checkpointer.poll()

  def _step_back(self) -> bool:
    """Undo the count of steps that have changed nothing because a host had failed."""
    failed = self.requests.failed_step
    if failed is not None:
      self.step = failed - 1
      self.telemetry.forget(failed)
    return failed is not None

  def _change_size(self) -> None:
    """Take up the program of the next step, which was asked for at the start."""
    self._sizes = self.program.sizes_at(self.step)
    with self.clock("compile"):
      self.train_step = self.steps.get("train", **self._sizes)
    logging.info("Images of %d px from step %d on.", self._sizes["image_size"], self.step + 1)

  def flush(self) -> None:
    """Wait for every step taken; raise if one was not finite, or if another run has the workdir.

    Raises as well if devices have different copies of the state. So only good states are saved, and
    only by the owner of the workdir.
    """
    self.requests.flush()
    self._step_back()
    self.telemetry.flush()
    self.checks.flush(self.step, self.state)
    if self.lease:
      self.lease.check()

  def evaluate_now(self) -> bool:
    """Evaluate this step and note its result; False if a host asks for a stop meanwhile."""
    start = time.monotonic()
    self.result = self.evaluate()
    if self.result is None:
      return False
    self.telemetry.evaluated(self.step, self.result, time.monotonic() - start)
    if self.pod.host == 0:
      checks.warn_of_means(self.config.model, self.state.batch_stats)
    if self.best is None or self.result["top1"] > self.best["top1"]:
      self.best = {"step": self.step, "top1": self.result["top1"]}
      self.checkpointer.set_best(self.step)
    return True

  def evaluate(self) -> evaluate_lib.Result | None:
    """Evaluate the state on all splits; None if a host asks for a stop meanwhile."""
    self.pod.at(f"evaluation of step {self.step}")
    with self.clock("compile"), SCREEN.doing("compiling the evaluation"):
      eval_step = self.steps.get("eval", **self.program.sizes("eval"))
    weights, results, tables = self._weights(), {}, {}
    for name, source in self.eval_sources.items():
      self.pod.at(f"evaluation of step {self.step} on {name}")
      host_batches = self._one_pass(source, numbers=self._real is not None)
      batches = data_lib.relabelled(host_batches, self._labels.get(name))
      if self._real is not None:
        batches = real_labels.accepted(batches, self._real)
      with (
        self.clock("eval"),
        contextlib.closing(host_batches),
        SCREEN.doing(f"evaluating {name}", "batches") as doing,
      ):
        count = functools.partial(doing.count, total=-(-len(source) // self.config.eval.batch_size))
        result = evaluate_lib.evaluate(
          eval_step,
          self.mesh,
          weights,
          self._with_substitutes("eval", batches, host_batches.count),
          self.requests.flags,
          self.program.abstract_totals(),
          self._allowed(name) if self.config.eval.classes == "data" else None,
          count,
        )
      if result is None:
        return None
      if "confusion" in result:
        tables[name] = class_tables.table(result.pop("confusion"), self._class_names())
      results[name] = result
    if tables:
      found = {"step": self.step, "splits": tables}
      write_json(self.workdir.eval_classes, found, needed=False)
    return evaluate_lib.join(results)

  def _allowed(self, split: str) -> np.ndarray:
    """Return which classes of the run a split has, bool [classes]."""
    source, table = self.eval_sources[split], self._labels.get(split)
    counts = source.class_counts
    labels = np.arange(source.num_classes) if counts is None else np.flatnonzero(counts)
    allowed = np.zeros(self.config.model.num_classes, np.bool_)
    allowed[labels if table is None else table[labels]] = True
    return allowed

  def _class_names(self) -> Sequence[str]:
    """Return the names of the classes that the run has learned; numbers if they are not known."""
    number = self.config.model.num_classes
    known = [self._imported_classes, (self.saved_data or self.data)["classes"]]
    return next((n for n in known if n and len(n) == number), [str(i) for i in range(number)])

  @functools.cached_property
  def _imported_classes(self) -> Sequence[str]:
    """The names that the workdir has; those of imported weights stand nowhere else."""
    return (read_json(self.workdir.classes, {"classes": list}) or {}).get("classes", ())

  def _weights(self) -> list[Variables]:
    """Return what an evaluation is of: the averaged weights, if any, and the others."""
    weights = [self.state.for_eval()]
    if self.config.eval.raw:
      # Averaged weights may be in shards where the others are whole.
      shardings = jax.tree.map(lambda x: x.sharding, self.program.abstract_state.for_eval())
      weights.append(jax.device_put(self.state.raw(), shardings))
    if not self.statistics_source:
      return weights
    with self.clock("compile"), SCREEN.doing("compiling the statistics of batch norm"):
      step = self.steps.get("statistics", **self.program.sizes("statistics"))
    precise = []
    for variables in weights:
      host_batches = self._one_pass(self.statistics_source)
      doing = SCREEN.doing("computing the statistics of batch norm")
      with self.clock("eval"), contextlib.closing(host_batches), doing:
        batches = self._with_substitutes("statistics", host_batches, host_batches.count)
        precise.append(evaluate_lib.precise_bn(step, self.mesh, variables, batches))
    return precise

  def _with_substitutes(
    self, mode: program_lib.Mode, batches: Iterable[Batch], count: int
  ) -> Iterator[Batch]:
    sizes = self.program.sizes(mode)
    return substituted(
      batches,
      count,
      lambda n: self.program.empty_batch(mode, self.pod.hosts, **sizes),
      lambda n, error: self.requests.fail(None, error),
      self.pod.stop_requested,
    )

  def _one_pass(self, source: sources.Source, numbers: bool = False) -> loader.BatchIterator:
    return loader.eval_batches(
      source,
      self.config.data,
      batch_size=self.config.eval.batch_size,
      host=self.pod.host,
      hosts=self.pod.hosts,
      numbers=numbers,
      replacements=self.replacements,
    )

  def save(self, *, wait: bool = False) -> None:
    """Save the state after this step; with `wait` it is saved when this returns."""
    with self.clock("checkpoint"):
      save = self.checkpointer.save_and_wait if wait else self.checkpointer.save
      save(self.step, self.program.to_checkpoint(self.state), self.meta())

  def meta(self) -> dict[str, Any]:
    """Return what a checkpoint holds beside the state."""
    position = self.host_batches.position(self.step + self.lengths.offset)
    # With None the step says where the data resume, on all hosts or on none.
    everywhere = position and self.pod.gather(f"positions of step {self.step}", position)
    return {
      "best": self.best,
      "wall_seconds": self.clock.read(),
      "starts": self.clock.noted,
      "positions": everywhere and [at for _, at in sorted(everywhere.items())],
      "offset": self.lengths.offset,
      "history": self.history,
      "dataset": self.data,
      "teacher": self.program.teacher and self.program.teacher.digest,
    }
