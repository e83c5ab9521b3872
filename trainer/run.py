"""A run in one process: what it was opened with, and what changes from step to step."""

from collections.abc import Callable
import contextlib
import dataclasses
from typing import Any

from absl import logging
import jax
import ml_collections

from input_pipeline import loader, sources
from trainer import evaluate as evaluate_lib
from trainer import mesh as mesh_lib
from trainer import program as program_lib
from trainer.config import Changes
from trainer.errors import Preempted
from trainer.pod.pod import Pod
from trainer.pod.requests import Requests
from trainer.program import Program, Steps
from trainer.reporting import flops
from trainer.reporting.clock import WallClock
from trainer.reporting.telemetry import Telemetry
from trainer.state import TrainState
from trainer.workdir import lease
from trainer.workdir.checkpoint import Checkpointer
from trainer.workdir.paths import Workdir


@dataclasses.dataclass(frozen=True)
class Opened:
  """What a run is about: its folder, its examples and its program."""

  workdir: Workdir
  train_source: sources.Source
  eval_source: sources.Source
  program: Program


class Run:
  """A run in this process: what it was opened with, and what changes from step to step.

  Attributes:
    step: steps taken.
    restored: whether a checkpoint was found.
    state: after that step; of a new run from `compile` on.
    best: {'step', 'top1'} of the best evaluation so far, or None.
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
    self.train_source, self.eval_source = opened.train_source, opened.eval_source
    self.lengths, self.mesh = self.program.lengths, self.program.mesh
    self.checkpointer = Checkpointer(pod, self.workdir.path, config, self.lengths.checkpoint_every)
    self.steps = Steps(self.program)
    self.requests = Requests(self.mesh, stop, self.checkpointer.wanted)
    self.lease: lease.Lease | None = None
    self.step, self.restored = 0, False
    self.best: dict[str, Any] | None = None
    self.history: list[dict[str, Any]] = []
    self.positions: list[Any] | None = None
    self.result: evaluate_lib.Result | None = None

  def own_workdir(self, exits: contextlib.ExitStack) -> None:
    """Keep other runs out of the workdir."""
    if self.pod.host == 0:
      path, seconds = self.workdir.owner, self.config.pod.lease_seconds
      self.lease = exits.enter_context(lease.hold(path, self.workdir.path, seconds))

  def restore(self) -> None:
    """Take up the newest checkpoint of the workdir, if there is one."""
    restored = self.checkpointer.restore_newest(self.program.abstract_state)
    if restored is None:
      return
    self.restored, (self.state, meta) = True, restored
    self.step, self.best, self.positions = meta["step"], meta["best"], meta.get("positions")
    self.clock.restore(meta["wall_seconds"], meta.get("starts"))
    self.history = meta.get("history", [])
    if changes := meta.get("changes"):
      self.history = [*self.history, {"step": self.step, "changes": changes}]
      logging.info("By config.resume.allow, from step %d on: %s.", self.step, _in_words(changes))
    offset = meta.get("offset", 0)
    before, now = meta["config"]["global_batch_size"], self.config.global_batch_size
    if before != now:
      # The data resume at the last whole batch of the new size.
      offset = (self.step + offset) * before // now - self.step
    if offset != self.lengths.offset:
      self.program = program_lib.build(self.config, len(self.train_source), offset=offset)
      self.lengths, self.steps = self.program.lengths, Steps(self.program)
    logging.info("Resuming from checkpoint %d of %d.", self.step, self.lengths.last)

  def compile(self, exits: contextlib.ExitStack) -> None:
    """Compile the training step, begin with the evaluation step, make the state of a new run."""
    if self.pod.agree("compile", self.stop()):
      raise Preempted("Stopped before the first step of this process; nothing is lost.")
    before = self.clock.read()["compile"]
    exits.callback(self.steps.close)
    with self.clock("compile"):
      self.steps.prepare("train", **self.program.sizes("train"))
      self.steps.prepare("eval", **self.program.sizes("eval"))
      if not self.restored:
        self.state = self.program.init_state()
      self.train_step = self.steps.get("train", **self.program.sizes("train"))
      jax.block_until_ready(self.state)
    logging.info("Compiled in %.1f s.", self.clock.read()["compile"] - before)

  def start_input(self, exits: contextlib.ExitStack) -> None:
    """Start to load batches from this step on, and to report."""
    config, program = self.config, self.program
    self.host_batches = loader.train_batches(
      self.train_source,
      config.data,
      seed=config.seed,
      first_step=self.step + self.lengths.offset,
      host=self.pod.host,
      hosts=self.pod.hosts,
      global_batch_size=config.global_batch_size,
      positions=self.positions,
    )
    exits.callback(self.host_batches.close)
    self.telemetry = Telemetry(
      self.workdir.path,
      config,
      self.clock,
      first_step=self.step,
      total_steps=self.lengths.last,
      epoch=self.lengths.epoch,
      seconds_at_peak=flops.seconds_at_peak(
        program.model,
        program.abstract_state.for_eval(),
        devices=self.mesh.devices.flatten().tolist(),
        **program.sizes("train"),
      ),
      exchange=self.pod.exchange,
      reads=lambda: self.host_batches.reads,
    )
    exits.callback(self.telemetry.close)
    self.batches = mesh_lib.prefetch(self.mesh, self.host_batches, program_lib.BATCHES["train"])
    exits.callback(self.batches.close)

  def take_step(self) -> None:
    """Take a training step; returns when it is dispatched."""
    self.pod.at(f"step {self.step + 1}")
    with self.clock("input_wait"):
      batch = next(self.batches)
    flags = self.requests.flags()
    with jax.transfer_guard("disallow"):
      self.state, output = self.train_step(self.state, batch, flags)
    self.step += 1
    self.result = None
    self.telemetry.step(self.step, output.metrics)
    self.requests.note(self.step, output.request)
    self.checkpointer.poll()

  def flush(self) -> None:
    """Wait for every step taken; raise if one was not finite, or if another run has the workdir.

    So only good states are saved, and only by the owner of the workdir.
    """
    self.telemetry.flush()
    self.requests.flush()
    if self.lease:
      self.lease.check()

  def evaluate_now(self) -> bool:
    """Evaluate this step and note its result; False if a host asks for a stop meanwhile."""
    self.result = self.evaluate()
    if self.result is None:
      return False
    self.telemetry.evaluated(self.step, self.result)
    if self.best is None or self.result["top1"] > self.best["top1"]:
      self.best = {"step": self.step, "top1": self.result["top1"]}
      self.checkpointer.set_best(self.step)
    return True

  def evaluate(self) -> evaluate_lib.Result | None:
    """Evaluate the state; None if a host asks for a stop meanwhile."""
    self.pod.at(f"evaluation of step {self.step}")
    with self.clock("compile"):
      eval_step = self.steps.get("eval", **self.program.sizes("eval"))
    host_batches = loader.eval_batches(
      self.eval_source,
      self.config.data,
      batch_size=self.config.eval.batch_size,
      host=self.pod.host,
      hosts=self.pod.hosts,
    )
    with self.clock("eval"), contextlib.closing(host_batches):
      return evaluate_lib.evaluate(
        eval_step, self.mesh, self.state.for_eval(), host_batches, self.requests.flags
      )

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
    }


def _in_words(changes: Changes) -> str:
  return ", ".join(f"config.{name} {old!r} -> {new!r}" for name, (old, new) in changes.items())
