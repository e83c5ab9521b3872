"""Learning rates by name: `config.optimizer.schedule`, as in "step(at=(30, 60), factor=0.1)".

To add one, write a function (span, *, options) -> schedule and a line in SCHEDULES. The schedule is
over all steps of the run and takes one step or an array of them; times in the options are epochs
from the start of the run.

A rate is that of a step before it is taken: step 0 of a warm-up from 0 has a rate of exactly 0. It
changes moments and statistics, and no weight.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from configs import names
from trainer.errors import ConfigError

_FIELD = "config.optimizer.schedule"


@dataclasses.dataclass(frozen=True)
class Span:
  """What a schedule is made for.

  Attributes:
    start: rate of step 0, where there is a warm-up.
    peak: highest rate.
    end: rate after the last step, where the schedule has such an end.
    warmup: steps from start to peak.
    total: steps of the run, those of the warm-up among them.
    per_epoch: steps of an epoch, a fraction where the batch does not divide the examples.
  """

  start: float
  peak: float
  end: float
  warmup: int
  total: int
  per_epoch: float

  def steps(self, epochs: float) -> int:
    """Return the first step of an epoch."""
    return round(epochs * self.per_epoch)

  def decay_steps(self, over_warmup: bool) -> int:
    """Return the steps of a decay that ends with the run; see `after_warmup`."""
    return self.total if over_warmup else self.total - self.warmup

  def after_warmup(
    self, decay: optax.Schedule, *, over_warmup: bool = False, per_epoch: bool = False
  ) -> optax.Schedule:
    """Return a linear warm-up (arXiv:1706.02677) and then `decay`.

    Args:
      decay: steps since the end of the warm-up -> rate.
      over_warmup: whether `decay` counts from step 0 instead, and the warm-up replaces its
        beginning.
      per_epoch: whether all steps of an epoch, also in the warm-up, have the rate of its first.
    """
    schedule = decay
    if self.warmup:
      after = (lambda step: decay(step + self.warmup)) if over_warmup else decay
      warmup = optax.linear_schedule(self.start, self.peak, self.warmup)
      schedule = optax.join_schedules([warmup, after], [self.warmup])
    return self._once_an_epoch(schedule) if per_epoch else schedule

  def _once_an_epoch(self, schedule: optax.Schedule) -> optax.Schedule:
    def stepwise(step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
      epochs = math.ceil(self.total / self.per_epoch)
      starts = [self.steps(epoch) for epoch in range(epochs + 1)]
      first = jnp.array(starts, jnp.result_type(step))
      epoch = jnp.searchsorted(first, step, side="right", method="scan_unrolled") - 1
      return schedule(first[epoch])

    return stepwise


def cosine(span: Span, *, over_warmup: bool = False, per_epoch: bool = False) -> optax.Schedule:
  """Half a cosine from peak to end (arXiv:1608.03983).

  By epoch, torchvision's recipes have it after the warm-up, timm's over it.
  """
  decay = optax.cosine_decay_schedule(
    span.peak, span.decay_steps(over_warmup), alpha=span.end / span.peak
  )
  return span.after_warmup(decay, over_warmup=over_warmup, per_epoch=per_epoch)


def linear(span: Span, *, over_warmup: bool = False, per_epoch: bool = False) -> optax.Schedule:
  """A straight line from peak to end."""
  decay = optax.linear_schedule(span.peak, span.end, span.decay_steps(over_warmup))
  return span.after_warmup(decay, over_warmup=over_warmup, per_epoch=per_epoch)


def polynomial(
  span: Span,
  *,
  power: float,
  extra_steps: int = 0,
  over_warmup: bool = False,
  per_epoch: bool = False,
) -> optax.Schedule:
  """end + (peak - end) * (1 - t / T) ** power.

  Args:
    span: of the run.
    power: 2 in MLPerf.
    extra_steps: by which T is longer than the decay; 1 in MLPerf's rules.
    over_warmup: see Span.after_warmup.
    per_epoch: likewise.
  """
  _require(power > 0, f"power of polynomial must be positive; it is {power!r}")
  _require(extra_steps >= 0, f"extra_steps of polynomial must be 0 or more; it is {extra_steps!r}")
  steps = span.decay_steps(over_warmup) + extra_steps
  decay = optax.polynomial_schedule(span.peak, span.end, power, steps)
  return span.after_warmup(decay, over_warmup=over_warmup, per_epoch=per_epoch)


def constant(span: Span) -> optax.Schedule:
  """The peak for all steps; `config.optimizer.final_lr_fraction` has no effect."""
  return span.after_warmup(optax.constant_schedule(span.peak))


def step(span: Span, *, at: Sequence[float], factor: float) -> optax.Schedule:
  """The peak, times `factor` from each of the epochs `at` on (arXiv:1512.03385).

  `config.optimizer.final_lr_fraction` has no effect.
  """
  _require(factor > 0, f"factor of step must be positive; it is {factor!r}")
  _check_epochs(span, "at of step", at)
  drops = [span.steps(epoch) - span.warmup for epoch in at]
  _require(drops[0] > 0, f"at of step begins with epoch {at[0]}, which must come after the warm-up")
  factors = {drop: factor ** drops.count(drop) for drop in drops}
  return span.after_warmup(optax.piecewise_constant_schedule(span.peak, factors))


def piecewise(span: Span, *, points: Sequence[tuple[float, float]]) -> optax.Schedule:
  """Straight lines between points (epoch, share of the peak), as in FFCV's ImageNet recipes.

  Before the first and after the last point the rate is theirs; `config.optimizer.final_lr_fraction`
  has no effect.
  """
  _own_rise(span, "piecewise")
  _require(
    isinstance(points, tuple | list)
    and len(points) > 0
    and all(isinstance(point, tuple | list) and len(point) == 2 for point in points)
    and all(isinstance(number, int | float) for point in points for number in point),
    f"points of piecewise must be pairs (epoch, share of the peak); they are {points!r}",
  )
  epochs, shares = zip(*points, strict=True)
  _check_epochs(span, "points of piecewise", epochs)
  _require(
    min(shares) >= 0 and max(shares) > 0,
    f"shares in points of piecewise must be 0 or more, and not all 0; they are {shares!r}",
  )
  at = np.array([span.steps(epoch) for epoch in epochs], np.float64)
  rates = span.peak * np.array(shares, np.float64)
  return lambda step: jnp.interp(step, at, rates)


def one_cycle(span: Span, *, rise: float = 0.3, start: float = 0.04) -> optax.Schedule:
  """Half a cosine from `start` x peak to the peak, and another one to the end (arXiv:1708.07120).

  torch's OneCycleLR reaches both the peak and the end one step earlier.

  Args:
    span: of the run.
    rise: share of the run before the peak.
    start: rate of step 0 as a share of the peak.
  """
  _own_rise(span, "one_cycle")
  _require(0 < rise < 1, f"rise of one_cycle must be in (0, 1); it is {rise!r}")
  _require(0 < start <= 1, f"start of one_cycle must be in (0, 1]; it is {start!r}")
  turn = max(1, round(rise * span.total))
  up = optax.cosine_decay_schedule(start * span.peak, turn, alpha=1 / start)
  down = optax.cosine_decay_schedule(
    span.peak, max(1, span.total - turn), alpha=span.end / span.peak
  )
  return optax.join_schedules([up, down], [turn])


def exponential(
  span: Span,
  *,
  every: float,
  factor: float,
  staircase: bool = True,
  from_start: bool = True,
  per_epoch: bool = False,
) -> optax.Schedule:
  """The peak times `factor` ** (t / `every`), not below the end (EfficientNet, arXiv:1905.11946).

  Args:
    span: of the run.
    every: epochs.
    factor: of so many epochs, below 1.
    staircase: whether t / every is rounded down.
    from_start: whether t counts from step 0, as TensorFlow's EfficientNet does, or from the end of
      the warm-up.
    per_epoch: see Span.after_warmup.
  """
  _require(every > 0, f"every of exponential must be positive; it is {every!r}")
  # From 1 on optax takes the end as a ceiling: at the default, 0, no step would change a weight.
  _require(0 < factor < 1, f"factor of exponential must be in (0, 1); it is {factor!r}")
  decay = optax.exponential_decay(
    span.peak, every * span.per_epoch, factor, staircase=staircase, end_value=span.end
  )
  return span.after_warmup(decay, over_warmup=from_start, per_epoch=per_epoch)


# (span, *, options) -> schedule of all steps.
SCHEDULES: Mapping[str, Callable[..., optax.Schedule]] = {
  "cosine": cosine,
  "linear": linear,
  "polynomial": polynomial,
  "constant": constant,
  "step": step,
  "piecewise": piecewise,
  "one_cycle": one_cycle,
  "exponential": exponential,
}


def peak_rate(config: ml_collections.ConfigDict) -> float:
  """Return `config.optimizer.lr`, or what `lr_per_256` makes of the batch (arXiv:1706.02677)."""
  fields = config.optimizer
  return fields.lr or fields.lr_per_256 * config.global_batch_size / 256


def make_schedule(
  config: ml_collections.ConfigDict,
  *,
  warmup_steps: int,
  total_steps: int,
  per_epoch: float,
  offset: int = 0,
) -> optax.Schedule:
  """Return step -> learning rate; computes nothing yet.

  Args:
    config: a validated config.
    warmup_steps: steps from `config.optimizer.warmup_start` of the peak to the peak.
    total_steps: steps of the run, those of the warm-up among them.
    per_epoch: steps of an epoch.
    offset: added to the step; see trainer.config.Durations.

  Raises:
    ValueError: one sentence, if there is no such schedule or option.
    ConfigError: if an option is out of range, or past the end of the run.
  """
  fields, peak = config.optimizer, peak_rate(config)
  span = Span(
    start=fields.warmup_start * peak,
    peak=peak,
    end=peak * fields.final_lr_fraction,
    warmup=warmup_steps,
    total=total_steps,
    per_epoch=per_epoch,
  )
  calls = names.find_calls(SCHEDULES, fields.schedule, _FIELD)
  _require(
    len(calls) == 1, f"one schedule must be named, as in 'cosine'; it is {fields.schedule!r}"
  )
  try:
    schedule = calls[0](span)
  except TypeError as error:
    raise ConfigError(f"{_FIELD} is {fields.schedule!r}, which cannot be made: {error}.") from error
  if not offset:
    return schedule

  def shifted(step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
    return schedule(step + offset)

  return shifted


def check(config: ml_collections.ConfigDict) -> None:
  """Refuse a schedule that fits no data; what depends on their number is left to `make_schedule`.

  Raises:
    ValueError, ConfigError: see make_schedule.
  """
  per_epoch = 1000.0
  total = round(config.total_epochs * per_epoch) or 2**30
  warmup = round(config.optimizer.warmup_epochs * per_epoch)
  if config.optimizer.warmup_steps:
    warmup = 1  # of unknown length in epochs
  make_schedule(config, warmup_steps=min(warmup, total - 1), total_steps=total, per_epoch=per_epoch)


def _require(holds: bool, sentence: str) -> None:
  if not holds:
    raise ConfigError(f"{_FIELD}: {sentence}.")


def _own_rise(span: Span, name: str) -> None:
  _require(
    not span.warmup,
    f"{name} has a rise of its own; set config.optimizer.warmup_epochs and "
    "config.optimizer.warmup_steps to 0",
  )


def _check_epochs(span: Span, what: str, epochs: Sequence[float]) -> None:
  numbers = isinstance(epochs, tuple | list) and all(isinstance(e, int | float) for e in epochs)
  _require(
    numbers and len(epochs) > 0, f"{what} must be a tuple of numbers of epochs; it is {epochs!r}"
  )
  _require(
    epochs[0] >= 0 and all(a < b for a, b in itertools.pairwise(epochs)),
    f"{what} must be epochs in ascending order, from 0 on; they are {epochs!r}",
  )
  _require(
    span.steps(epochs[-1]) <= span.total,
    f"{what} ends with epoch {epochs[-1]}, past the end of the run at epoch "
    f"{span.total / span.per_epoch:g}",
  )
