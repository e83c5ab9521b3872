"""The progress line of a run, and the curves in its event files."""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import json
import os
import pathlib
import statistics
import time

from absl import logging
from etils import epath
import jax
import ml_collections
import numpy as np

from input_pipeline.rows import Batch
from trainer.config import flatten
from trainer.errors import NonFiniteError
from trainer.evaluate import Result, in_words
from trainer.pod.requests import LAG
from trainer.reporting import events, examples, json_lines, wandb_writer
from trainer.reporting.clock import WallClock, format_seconds
from trainer.reporting.clu import metric_writers, periodic_actions
from trainer.reporting.screen import SCREEN
from trainer.step import metric_names
from trainer.workdir.paths import Workdir

# (last step of a window, mean time at which this host dispatched its steps) -> {host: mean time} of
# the newest window that all hosts have reported, which may be the one before.
Exchange = Callable[[int, float], dict[int, float]]

# A host is logged as late from this share of a step on, and from what cannot be an error of clocks.
_LATE, _CLOCK_SECONDS = 0.05, 0.01
_STEP_PASSES = 3  # a step computes as much as so many forward passes


def straggler(means: dict[int, float]) -> tuple[int, float]:
  """Return the host that came last, and by how many seconds after the median one.

  Args:
    means: host -> mean over a window of the times, in seconds since 1970, at which it dispatched
      each step. Clocks of machines differ by a few milliseconds.
  """
  last = max(sorted(means), key=lambda host: means[host])
  return last, means[last] - statistics.median_low(means.values())


class Telemetry:
  """Collects the metrics of each step and writes their means every `config.log.every_steps`."""

  def __init__(
    self,
    workdir: epath.Path,
    config: ml_collections.ConfigDict,
    clock: WallClock,
    *,
    first_step: int,
    total_steps: int,
    epoch: Callable[[int], float],
    work: Callable[[int, int], float] = lambda start, stop: stop - start,
    peak: float | None = None,
    image_size: Callable[[int], int] | None = None,
    exchange: Exchange = lambda step, mean: {jax.process_index(): mean},
    reads: Callable[[], Mapping[str, int]] = dict,
    replaced: Callable[[], int] = int,
    evaluations: Callable[[int], int] = lambda step: 0,
    evaluated_examples: int = 0,
  ):
    """Open the event files on process 0; the other processes write nothing.

    Args:
      workdir: folder of the run.
      config: config of the run.
      clock: wall time of the run by cause.
      first_step: steps taken before this process.
      total_steps: length of the run.
      epoch: returns the epochs after a step, for the progress line.
      work: returns the model FLOPs of the steps between two, for the MFU and the ETA; in any unit
        where there is no peak.
      peak: FLOP/s of all chips; None if unknown (see trainer.reporting.flops).
      image_size: returns the size of the images of the step after so many, where that changes.
      exchange: exchanges dispatch times; called on every host at the end of each window.
      reads: returns what this host has read from a bucket so far: requests, bytes, retries, hedges.
      replaced: returns how many decoding processes this host has replaced so far.
      evaluations: returns how many are to come after a step, for the ETA.
      evaluated_examples: of each of them.
    """
    self._config, self._clock, self._names = config, clock, metric_names(config)
    self._first_step, self._total_steps, self._epoch = first_step, total_steps, epoch
    self._work, self._peak, self._image_size = work, peak, image_size
    self._exchange, self._reads, self._replaced = exchange, reads, replaced
    self._evaluations, self._evaluated_examples = evaluations, evaluated_examples
    self._eval_seconds: float | None = None  # of the last evaluation of this process
    self._facts: list[str] = []  # for the row of a terminal
    directory = str(Workdir(workdir).events)
    self._chief = jax.process_index() == 0
    writers: list[metric_writers.MetricWriter] = []
    if self._chief:
      writers = [
        events.EventWriter(directory, first_step),
        json_lines.JsonWriter(Workdir(workdir).metrics, first_step),
      ]
      if config.log.wandb:
        writers.append(wandb_writer.WandbWriter(Workdir(workdir), config))
    self._writer = metric_writers.AsyncMultiWriter(writers)
    # As Markdown, in which an indented block stays as it is.
    fields = json.dumps(config.to_dict(), indent=2).splitlines()
    self._writer.write_texts(first_step, {"config": "\n".join(f"    {f}" for f in fields)})
    self._writer.write_hparams(flatten(config))
    self._samples = Workdir(workdir).samples
    self._progress = periodic_actions.ReportProgress(
      num_train_steps=total_steps,
      every_steps=config.log.every_steps,
      every_secs=None,
      writer=self._writer,
    )
    self._profile = (
      periodic_actions.Profile(
        logdir=directory,
        num_profile_steps=config.log.profile_steps,
        profile_duration_ms=0,
        first_profile=config.log.profile_step,
        every_secs=None,
      )
      if config.log.profile_step and self._chief
      else None
    )
    self._pending: collections.deque[tuple[int, jax.Array, float]] = collections.deque()
    self._last_ready: float | None = None
    self._open_window()
    if self._chief:
      SCREEN.steps(first_step, total_steps, self._facts, last=True)

  def _open_window(self) -> None:
    self._window: list[np.ndarray] = []  # metrics of each step
    self._dispatched: list[float] = []  # when each step was, in seconds since 1970
    self._step_seconds: list[float] = []
    self._mark = self._clock.read()

  def step(self, step: int, metrics: jax.Array) -> None:
    """Take the metrics of the step just dispatched, and read those of `LAG` steps before.

    Raises:
      NonFiniteError: naming the step whose loss, gradients or parameters are not finite numbers.
    """
    self._progress(step)
    if self._profile:
      self._profile(step)
    if self._chief:
      SCREEN.steps(step, self._total_steps, self._facts)
    self._pending.append((step, metrics, time.monotonic()))
    if len(self._pending) > LAG:
      self._absorb()

  def with_samples(self, batches: Iterable[Batch], classes: Sequence[str]) -> Iterator[Batch]:
    """Yield the batches; keep some images of the first in the workdir and in the event files.

    Args:
      batches: of this host; those of process 0 are kept.
      classes: names by label.
    """
    wanted = self._chief
    for batch in batches:
      if wanted:
        images = examples.keep_samples(self._samples, batch, classes)
        self._writer.write_images(self._first_step, {"train/images": images})
        wanted = False
      yield batch

  def forget(self, step: int) -> None:
    """Drop what is not read yet of this step and of later ones, which changed nothing."""
    self._pending = collections.deque(one for one in self._pending if one[0] < step)

  def flush(self) -> None:
    """Wait for every dispatched step, and read its metrics.

    Raises:
      NonFiniteError: as `step` does.
    """
    while self._pending:
      # Since when it is ready is not known: nobody has waited for it.
      if self._pending[0][1].is_ready():  # type: ignore[attr-defined]  # arrays of values have it
        self._last_ready = None
      self._absorb()
    # What comes next, a save or an evaluation, is not part of the step after it.
    self._last_ready = None

  def _absorb(self) -> None:
    step, metrics, dispatched = self._pending.popleft()
    metrics = jax.device_get(metrics)
    ready = time.monotonic()
    if not np.isfinite(metrics).all():
      values = ", ".join(f"{name} {value:g}" for name, value in zip(self._names, metrics))
      raise NonFiniteError(
        f"Step {step} is not finite ({values}). Nothing of it was saved. Lower the learning rate "
        "or set config.optimizer.clip_norm, then run again: the last checkpoint is from before it."
      )
    self._window.append(metrics)
    self._dispatched.append(dispatched)
    if self._last_ready is not None:
      self._step_seconds.append(ready - self._last_ready)
    self._last_ready = ready
    if step % self._config.log.every_steps == 0 or step == self._total_steps:
      self._write(step)

  def _write(self, step: int) -> None:
    steps = len(self._window)
    scalars = dict(zip(self._names, np.mean(self._window, axis=0).tolist()))
    scalars.pop("request", None)
    last = dict(zip(self._names, self._window[-1].tolist()))
    scalars |= {name: last[name] for name in ("learning_rate", "density") if name in last}
    if "mask_changed" in scalars:  # most steps change nothing
      scalars["mask_changed"] *= steps
    seconds = {cause: value - self._mark[cause] for cause, value in self._clock.read().items()}
    training = seconds["step"] + seconds["input_wait"]
    scalars["images_per_second"] = steps * self._config.global_batch_size / training
    scalars["images_per_second_per_device"] = scalars["images_per_second"] / jax.device_count()
    scalars["input_wait"] = seconds["input_wait"] / training
    scalars["checkpoint_stall_seconds"] = seconds["checkpoint"]
    scalars["goodput"] = self._clock.goodput()
    speed = (
      f"{scalars['images_per_second']:.0f} img/s "
      f"({scalars['images_per_second_per_device']:.0f} per device)"
    )
    work = self._work(step - steps, step)
    if self._peak:
      scalars["mfu"] = work / self._peak / training
      speed += f"  MFU {100 * scalars['mfu']:.1f}%"
    if self._image_size:
      scalars["image_size"] = self._image_size(step - 1)
      speed += f"  {scalars['image_size']} px"
    if self._step_seconds:
      median, p99 = np.percentile(self._step_seconds, (50, 99)).tolist()
      scalars |= {"step_seconds_median": median, "step_seconds_p99": p99}
      speed += f"  step {1000 * median:.1f} ms (p99 {1000 * p99:.1f})"
    means = self._exchange(step, statistics.fmean(self._dispatched))
    late = False
    if len(means) > 1:
      scalars["straggler_host"], scalars["straggler_seconds"] = straggler(means)
      median = scalars.get("step_seconds_median", training / steps)
      late = scalars["straggler_seconds"] >= max(_CLOCK_SECONDS, _LATE * median)
    scalars |= {f"read_{name}": count for name, count in self._reads().items()}
    if replaced := self._replaced():
      scalars["workers_replaced"] = replaced
    self._open_window()
    self.write(step, "train", scalars | _memory())
    epoch, waiting = self._epoch(step), 100 * scalars["input_wait"]
    eta = self._work(step, self._total_steps) * training / work
    eta += self._evaluations(step) * self._one_evaluation(training / steps)
    logging.info(
      "step %d/%d  epoch %.2f  loss %.4f  top1 %.1f%%  lr %.4g  grad %.3g  %s  "
      "input wait %.1f%%  ETA %s",
      step,
      self._total_steps,
      epoch,
      scalars["loss"],
      100 * scalars["top1"],
      scalars["learning_rate"],
      scalars["grad_norm"],
      speed,
      waiting,
      format_seconds(eta),
    )
    if late and self._chief:
      logging.info(
        "last host: %d, %.0f ms behind the median over the last %d steps",
        scalars["straggler_host"],
        1000 * scalars["straggler_seconds"],
        steps,
      )
    if self._chief:
      self._facts = [
        f"ETA {format_seconds(eta)}",
        f"loss {scalars['loss']:.4f}",
        f"{scalars['images_per_second']:.0f} img/s",
        f"epoch {epoch:.2f}",
        f"input wait {waiting:.1f}%",
      ]
      SCREEN.steps(step, self._total_steps, self._facts, last=True)

  def _one_evaluation(self, step_seconds: float) -> float:
    """Return the seconds of an evaluation; before the first, those of as many forward passes."""
    if self._eval_seconds is not None:
      return self._eval_seconds
    steps = self._evaluated_examples / self._config.global_batch_size
    return steps * step_seconds / _STEP_PASSES

  def write(self, step: int, group: str, scalars: Mapping[str, object]) -> None:
    """Write scalars named GROUP/NAME at a step to the event files, in the background."""
    self._writer.write_scalars(step, {f"{group}/{name}": value for name, value in scalars.items()})

  def evaluated(self, step: int, result: Result, seconds: float | None = None) -> None:
    """Write and log the result of an evaluation: top1, top5, loss, examples.

    Those of the first split are eval/top1 and so on, those of another eval/SPLIT/top1.

    Args:
      step: which was evaluated.
      result: of all splits.
      seconds: that it has taken; None if that is not known.
    """
    self._eval_seconds = seconds
    scalars: dict[str, object] = dict(result)
    scalars.pop("splits", None)
    self.write(step, "eval", scalars)
    for name, other in result.get("splits", {}).items():
      self.write(step, f"eval/{name}", dict(other))
    self._writer.flush()
    first, *rest = in_words(result)
    took = f", in {format_seconds(seconds)}" if seconds is not None else ""
    logging.info("step %d  epoch %.2f  eval: %s%s", step, self._epoch(step), first, took)
    for line in rest:
      logging.info("step %d  epoch %.2f  eval of %s", step, self._epoch(step), line)

  def close(self) -> None:
    """Write what is left."""
    if self._chief:
      SCREEN.close()
    self._writer.flush()
    self._writer.close()


def _memory() -> dict[str, int]:
  """Return bytes in use by this process (not its decoding processes) and its fullest device."""
  memory, statm = {}, pathlib.Path("/proc/self/statm")
  if statm.exists():
    memory["host_memory_bytes"] = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
  devices = [stats for stats in (device.memory_stats() for device in jax.local_devices()) if stats]
  if devices:
    memory["device_memory_bytes"] = max(stats["bytes_in_use"] for stats in devices)
    memory["device_memory_peak_bytes"] = max(stats["peak_bytes_in_use"] for stats in devices)
  return memory
