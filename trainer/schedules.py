"""Learning rate schedules by name: a linear warm-up, then what `config.optimizer.schedule` says.

To add one, write a function (peak, end, steps) -> schedule and a line in SCHEDULES.
"""

from collections.abc import Callable, Mapping

import jax
import ml_collections
import optax

from configs import names


def cosine(peak: float, end: float, steps: int) -> optax.Schedule:
  """Half a cosine from peak to end (arXiv:1608.03983)."""
  return optax.cosine_decay_schedule(peak, steps, alpha=end / peak)


def linear(peak: float, end: float, steps: int) -> optax.Schedule:
  """A straight line from peak to end."""
  return optax.linear_schedule(peak, end, steps)


def constant(peak: float, end: float, steps: int) -> optax.Schedule:
  """The peak for all steps; `config.optimizer.final_lr_fraction` has no effect."""
  del end, steps
  return optax.constant_schedule(peak)


# (peak, end, steps) -> schedule of the steps after the warm-up.
SCHEDULES: Mapping[str, Callable[[float, float, int], optax.Schedule]] = {
  "cosine": cosine,
  "linear": linear,
  "constant": constant,
}


def make_schedule(
  config: ml_collections.ConfigDict, *, warmup_steps: int, total_steps: int, offset: int = 0
) -> optax.Schedule:
  """Return step -> learning rate: linear warm-up (arXiv:1706.02677), then the named schedule.

  Args:
    config: a validated config.
    warmup_steps: steps from 0 to the peak.
    total_steps: steps of the run, those of the warm-up among them.
    offset: added to the step; see trainer.config.Durations.

  Raises:
    ValueError: one sentence, if there is no such schedule.
  """
  peak = config.optimizer.lr_per_256 * config.global_batch_size / 256
  end = peak * config.optimizer.final_lr_fraction
  make = names.find(SCHEDULES, config.optimizer.schedule, "config.optimizer.schedule")
  schedule = make(peak, end, total_steps - warmup_steps)
  if warmup_steps:
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    schedule = optax.join_schedules([warmup, schedule], [warmup_steps])
  if not offset:
    return schedule

  def shifted(step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
    return schedule(step + offset)

  return shifted
