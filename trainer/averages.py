"""Averages of weights over steps, which evaluation uses.

`config.optimizer.ema_rule` names what the weight of the past is at each update; to add a rule,
write a function (updates, decay, *, options) -> decay and a line in RULES.

torchvision's recipes average by alpha = (1 - 0.99998) * batch * 32 / epochs every 32 steps, and
copy while the rate warms up. For batch 1024, 600 epochs and a warm-up of 5 that is

    config.optimizer.ema_decay = 1 - (1 - 0.99998) * 1024 * 32 / 600
    config.optimizer.ema_rule = "constant"
    config.optimizer.ema_every_steps = 32
    config.optimizer.ema_start_epochs = 5.0

but for the phase: torchvision counts the 32 steps anew in each epoch.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from configs import base, names
from trainer import compiler
from trainer.state import BatchStats, Params, Tree

_FIELD = "config.optimizer.ema_rule"

# (averages, params, batch_stats, steps taken before this one) -> averages.
Average = Callable[[dict[str, Any], Params, BatchStats, jax.Array], dict[str, Any]]


def tf(updates: jax.Array, decay: float) -> jax.Array:
  """min(decay, (1 + n) / (10 + n)), as TensorFlow has it.

  While few steps are averaged the window grows with them, else the random start would linger
  (Adam's bias).
  """
  return jnp.minimum(decay, (1.0 + updates) / (10.0 + updates))


def constant(updates: jax.Array, decay: float) -> jax.Array:
  """The decay; the first update copies, as in torch's AveragedModel and timm."""
  return jnp.where(updates == 0, 0.0, decay)


def timm(
  updates: jax.Array, decay: float, *, gamma: float = 1.0, power: float = 2 / 3
) -> jax.Array:
  """min(decay, 1 - (1 + n / gamma) ** -power), the warm-up of timm's ModelEmaV3."""
  if not (gamma > 0 and power > 0):
    raise ValueError(f"{_FIELD}: gamma and power of timm must be positive; {gamma!r}, {power!r}.")
  return jnp.minimum(decay, 1.0 - (1.0 + updates / gamma) ** -power)


RULES: Mapping[str, Callable[..., jax.Array]] = {"tf": tf, "constant": constant, "timm": timm}


def find_rule(text: str) -> Callable[[jax.Array, float], jax.Array]:
  """Return a rule of RULES with its options.

  Raises:
    ValueError: one sentence, if a rule or an option is not known or out of range.
  """
  calls = names.find_calls(RULES, text, _FIELD)
  if len(calls) != 1:
    raise ValueError(f"{_FIELD}: one rule must be named, as in 'tf'; it is {text!r}.")
  try:
    jax.eval_shape(lambda: calls[0](jnp.zeros((), jnp.int32), 0.5))
  except TypeError as error:
    raise ValueError(f"{_FIELD} is {text!r}, which cannot be computed: {error}.") from error
  return calls[0]


def check(config: ml_collections.ConfigDict) -> None:
  """Refuse fields of an average that do not fit together.

  Raises:
    ValueError: one sentence.
  """
  fields = config.optimizer
  find_rule(fields.ema_rule)
  for name, field in base.RUN.items():
    section, _, key = name.rpartition(".")
    of_average = section == "optimizer" and key.startswith("ema_")
    if of_average and not fields.ema_decay and fields[key] != field.default:
      raise ValueError(
        f"config.{name} is {fields[key]!r}, but config.optimizer.ema_decay is 0, and no weights "
        "are averaged; set ema_decay, or leave the other out."
      )


def make_average(config: ml_collections.ConfigDict, start: int = 0) -> Average:
  """Return the update of `TrainState.ema` after a step.

  It is due at the steps 0, N, 2N and so on for N = `config.optimizer.ema_every_steps`; the others
  leave the averages untouched. Until `start` an update copies, and so does the first one from then
  on, unless the rule is tf. The rule counts the updates from there.

  Args:
    config: a validated config.
    start: steps before which updates copy.
  """
  fields = config.optimizer
  rule, every = find_rule(fields.ema_rule), fields.ema_every_steps
  dtype = jnp.promote_types(config.model.dtype, jnp.float32)
  first = -(-max(start, 0) // every)

  def update(ema: Tree, new: Tree, step: jax.Array) -> Tree:
    updates = step // every - first
    decay = rule(jnp.maximum(updates, 0), fields.ema_decay)
    if first:
      decay = jnp.where(updates < 0, 0.0, decay)
    return optax.incremental_update(new, ema, 1.0 - decay.astype(dtype))

  def average(
    ema: dict[str, Any], params: Params, batch_stats: BatchStats, step: jax.Array
  ) -> dict[str, Any]:
    raw = {"params": params, "batch_stats": batch_stats}
    averaged = raw if fields.ema_batch_stats else {"params": params}
    kept = {name: ema[name] for name in averaged}
    if every == 1:
      kept = update(kept, averaged, step)
    else:
      # A branch, not a product with 0: the steps between then read and write no averages.
      with compiler.one_in(every):
        kept = jax.lax.cond(step % every == 0, update, lambda kept, *_: kept, kept, averaged, step)
    return raw | kept

  return average
