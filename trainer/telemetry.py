"""What a run tells: where its time goes, the progress line, and the curves in the event files."""

import collections
import contextlib
import sys
import time
from typing import Any, Iterator

from absl import logging
from etils import epath
import jax
import ml_collections
import numpy as np
import tqdm

from trainer import events
from trainer.errors import NonFiniteError
from trainer.step import METRICS, NOTHING
from clu import metric_writers, periodic_actions  # isort: skip  (trainer.events makes them importable)

# Metrics are fetched when two later steps are queued behind them, so that the devices never wait for the host.
_LAG = 2


class WallClock:
  """Splits wall time into causes; every second belongs to exactly one."""

  CAUSES = ("compile", "input_wait", "step", "eval", "checkpoint", "other")

  def __init__(self):
    self.seconds = {cause: 0.0 for cause in self.CAUSES}
    self._cause = "other"
    self._since = time.monotonic()

  def switch(self, cause: str) -> str:
    """Counts time towards `cause` from now on, and returns the cause before."""
    now = time.monotonic()
    self.seconds[self._cause] += now - self._since
    before, self._cause, self._since = self._cause, cause, now
    return before

  @contextlib.contextmanager
  def __call__(self, cause: str) -> Iterator[None]:
    """Counts the body towards `cause`."""
    before = self.switch(cause)
    try:
      yield
    finally:
      self.switch(before)

  def read(self) -> dict[str, float]:
    """Returns seconds by cause, up to now."""
    self.switch(self._cause)
    return dict(self.seconds)

  def restore(self, seconds: dict[str, float]) -> None:
    """Adds what earlier processes of this run have counted."""
    for cause, value in seconds.items():
      self.seconds[cause] += value


class Telemetry:
  """Collects the metrics of each step and writes their means every `config.log.every_steps`."""

  def __init__(self, workdir: epath.Path, config: ml_collections.ConfigDict, clock: WallClock, *, first_step: int,
               total_steps: int, steps_per_epoch: float):
    """Opens the event files on process 0; the other processes write nothing.

    Args:
      workdir: folder of the run; event files go to its `events`.
      config: config of the run.
      clock: where its time goes.
      first_step: steps taken before this process.
      total_steps: length of the run.
      steps_per_epoch: for the epoch of the progress line.
    """
    self._config, self._clock = config, clock
    self._total_steps, self._steps_per_epoch = total_steps, steps_per_epoch
    directory = str(workdir / "events")
    self._chief = jax.process_index() == 0
    writers = [events.SummaryWriter(directory)] if self._chief else []
    self._writer = metric_writers.AsyncMultiWriter(writers)
    self._progress = periodic_actions.ReportProgress(
        num_train_steps=total_steps, every_steps=config.log.every_steps, every_secs=None, writer=self._writer)
    self._profile = periodic_actions.Profile(
        logdir=directory, num_profile_steps=config.log.profile_steps, profile_duration_ms=0,
        first_profile=config.log.profile_step, every_secs=None) if config.log.profile_step and self._chief else None
    self.request = NOTHING  # the highest that any host has made at the steps looked at
    self._pending: collections.deque[tuple[int, jax.Array]] = collections.deque()
    self._window: list[np.ndarray] = []
    self._mark = self._seconds()
    self._bar = tqdm.tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True,
                          disable=not (self._chief and sys.stderr.isatty()))

  def _seconds(self) -> tuple[float, float]:
    seconds = self._clock.read()
    return seconds["step"] + seconds["input_wait"], seconds["input_wait"]

  def step(self, step: int, metrics: jax.Array) -> None:
    """Takes the metrics of a step that was just dispatched, and looks at those of `_LAG` steps before.

    Raises:
      NonFiniteError: naming the step whose loss, gradients or parameters are not finite numbers.
    """
    self._progress(step)
    if self._profile:
      self._profile(step)
    self._bar.update()
    self._pending.append((step, metrics))
    if len(self._pending) > _LAG:
      self._absorb()

  def flush(self) -> None:
    """Waits for every dispatched step.

    Raises:
      NonFiniteError: as `step` does.
    """
    while self._pending:
      self._absorb()

  def forget(self, request: int) -> None:
    """Drops a request that has been met, and only that one."""
    if self.request == request:
      self.request = NOTHING

  def _absorb(self) -> None:
    step, metrics = self._pending.popleft()
    metrics = jax.device_get(metrics)
    if not np.isfinite(metrics).all():
      values = ", ".join(f"{name} {value:g}" for name, value in zip(METRICS, metrics))
      raise NonFiniteError(f"Step {step} is not finite ({values}). Nothing of it was saved; lower the learning rate or "
                           "set config.optimizer.clip_norm, then run again: the last checkpoint is from before.")
    self.request = max(self.request, int(metrics[METRICS.index("request")]))
    self._window.append(metrics)
    if step % self._config.log.every_steps == 0 or step == self._total_steps:
      self._write(step)

  def _write(self, step: int) -> None:
    scalars = dict(zip(METRICS, np.mean(self._window, axis=0).tolist()))
    del scalars["request"]
    scalars["learning_rate"] = float(self._window[-1][METRICS.index("learning_rate")])
    mark = self._seconds()
    training, waiting = (now - before for now, before in zip(mark, self._mark))
    examples = len(self._window) * self._config.global_batch_size
    scalars["images_per_second"] = examples / training
    scalars["images_per_second_per_device"] = examples / training / jax.device_count()
    scalars["input_wait"] = waiting / training
    eta = (self._total_steps - step) * training / len(self._window)
    self._window, self._mark = [], mark
    self.write(step, "train", scalars)
    if self._bar.disable:  # as on all hosts but the first, whose log level hides this line
      logging.info(
          "step %d/%d  epoch %.2f  loss %.4f  top1 %.1f%%  lr %.4g  grad %.3g  %.0f img/s (%.0f per device)  "
          "input wait %.1f%%  ETA %s", step, self._total_steps, step / self._steps_per_epoch, scalars["loss"],
          100 * scalars["top1"], scalars["learning_rate"], scalars["grad_norm"], scalars["images_per_second"],
          scalars["images_per_second_per_device"], 100 * scalars["input_wait"], _duration(eta))
    else:
      self._bar.set_postfix_str(f"epoch {step / self._steps_per_epoch:.2f}, loss {scalars['loss']:.4f}, "
                                f"{scalars['images_per_second']:.0f} img/s, "
                                f"input wait {100 * scalars['input_wait']:.1f}%")

  def write(self, step: int, group: str, scalars: dict[str, Any]) -> None:
    """Writes scalars named GROUP/NAME at a step to the event files, in the background."""
    self._writer.write_scalars(step, {f"{group}/{name}": value for name, value in scalars.items()})

  def evaluated(self, step: int, result: dict[str, Any]) -> None:
    """Writes and logs the result of an evaluation."""
    self.write(step, "eval", result)
    self._writer.flush()
    logging.info("step %d  epoch %.2f  eval: top1 %.2f%%  top5 %.2f%%  loss %.4f  on %d examples", step,
                 step / self._steps_per_epoch, 100 * result["top1"], 100 * result["top5"], result["loss"],
                 result["examples"])

  def close(self) -> None:
    """Writes what is left."""
    self._bar.close()
    self._writer.flush()
    self._writer.close()


def _duration(seconds: float) -> str:
  hours, minutes = divmod(round(seconds / 60), 60)
  return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"
