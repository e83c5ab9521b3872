"""What a run verifies of itself: devices against each other, and numbers near the edge."""

from collections.abc import Mapping, Sequence
import functools
from typing import Any

from absl import logging
import jax
import ml_collections

from trainer import replicas
from trainer.models import norm
from trainer.pod.pod import Pod
from trainer.program import Program, Steps
from trainer.replicas import Replicas
from trainer.state import TrainState

Batch = dict[str, jax.Array]


class Checks:
  """Compares what must be equal on several devices, by `config.checks`."""

  def __init__(
    self, pod: Pod, program: Program, steps: Steps, all_sizes: Sequence[Mapping[str, int]]
  ):
    """Begin to compile the comparison of copies, unless it is off or nothing has copies.

    Args:
      pod: this host among the others.
      program: of the run.
      steps: its compiled steps.
      all_sizes: image and batch sizes of the training steps to come.
    """
    fields, state, mesh = program.config.checks, program.abstract_state, program.mesh
    self._steps, self._all_sizes = steps, all_sizes
    self._no_sizes = program.sizes("replicas")
    copied = replicas.copied(state, mesh).values()
    self._copies = self._gradients = None
    if copied and (every := fields.replicas_every_steps):
      steps.prepare("replicas", **self._no_sizes)
      self._copies = Replicas(pod, mesh, copied, every)
    if mesh.size > 1 and (every := fields.recompute_every_steps):
      self._gradients = Replicas(pod, mesh, replicas.gradients(state.params, mesh), every)

  def prepare_gradients(self) -> None:
    """Begin to compile the comparisons of gradients, which nothing waits for so soon."""
    for sizes in self._all_sizes if self._gradients else ():
      self._steps.prepare("recompute", **sizes)

  def step(self, step: int, state: TrainState, batch: Batch, sizes: Mapping[str, int]) -> None:
    """Start the comparisons that are due after a step, and read those of two steps before.

    Args:
      step: steps taken.
      state: after the step.
      batch: of the step.
      sizes: of the batch.

    Raises:
      ReplicasDiffer: naming devices and leaves, on all hosts at the same step.
    """
    if self._copies:
      self._copies.step(step, functools.partial(self._compare, state))
    if self._gradients:
      self._gradients.step(step, functools.partial(self._recompute, state, batch, sizes))

  def flush(self, step: int, state: TrainState) -> None:
    """Compare the copies after this step, and wait for all results.

    Raises:
      ReplicasDiffer: as `step` does.
    """
    if self._copies:
      self._copies.check(step, functools.partial(self._compare, state))
    if self._gradients:
      self._gradients.flush()

  def _compare(self, state: TrainState, zeros: jax.Array) -> replicas.Comparison:
    return self._steps.get("replicas", **self._no_sizes)(state, zeros)

  def _recompute(
    self, state: TrainState, batch: Batch, sizes: Mapping[str, int], zeros: jax.Array
  ) -> replicas.Comparison:
    return self._steps.get("recompute", **sizes)(state.raw(), batch, zeros)


def warn_of_means(fields: ml_collections.ConfigDict, batch_stats: dict[str, Any]) -> None:
  """Warn of batch norms whose variances lose digits, by their running averages.

  Args:
    fields: `config.model`.
    batch_stats: of the state, on the devices.
  """
  if fields.get("bn_shifted", True):  # other families have other norms
    return
  ratios = norm.means_over_deviations(jax.device_get(batch_stats), fields.bn_epsilon)
  far = {name: ratio for name, ratio in ratios.items() if ratio > norm.FAR}
  if far:
    worst = max(far, key=lambda name: far[name])
    logging.warning(
      "%s and %d more batch norms have means far from 0: %.0f times the deviation, where float32 "
      "loses %.2g %% of the variance. model.bn_shifted=True keeps it, in a new run or with "
      "--config.resume.allow=model.bn_shifted.",
      worst,
      len(far) - 1,
      far[worst],
      100 * norm.lost(far[worst]),
    )
