"""Optimizers by name, as optax gradient transformations, and which parameters decay.

To add one, write a function (fields, schedule, mask) -> transformation and a line in OPTIMIZERS; a
field of its own is an entry of `configs/base.py` and a name in FIELDS.

One mask says which parameters weight decay takes (`make_mask`). The trust ratios of lamb and lars
have the same one: a parameter that does not decay has none.
"""

from collections.abc import Callable, Mapping, Sequence
import re

import jax
import jax.numpy as jnp
import ml_collections
import optax

from configs import base, names
from trainer import finetune, schedules
from trainer.models import packing
from trainer.state import Params, Tree, path_name

# Returns a tree of booleans for the parameters; None stands for True everywhere.
Mask = Callable[[Params], Tree] | None
Optimizer = Callable[
  [ml_collections.ConfigDict, optax.Schedule, Mask], optax.GradientTransformation
]


def sgd(
  fields: ml_collections.ConfigDict, schedule: optax.Schedule, mask: Mask
) -> optax.GradientTransformation:
  """SGD with momentum; `weight_decay * params` is added to the gradient before the momentum.

  Without dampening, as in torch. Composer's DecoupledSGDW is `decay = scheduled`.
  """
  return optax.chain(
    optax.add_decayed_weights(fields.weight_decay, mask=mask),
    optax.sgd(schedule, momentum=fields.momentum, nesterov=fields.nesterov),
  )


def adamw(
  fields: ml_collections.ConfigDict, schedule: optax.Schedule, mask: Mask
) -> optax.GradientTransformation:
  """AdamW: decay apart from the moments, times the learning rate (arXiv:1711.05101).

  big_vision's decay is `decay = scheduled`.
  """
  return optax.adamw(
    schedule,
    b1=fields.b1,
    b2=fields.b2,
    eps=fields.eps,
    mu_dtype=_mu_dtype(fields),
    weight_decay=fields.weight_decay,
    mask=mask,
  )


def lamb(
  fields: ml_collections.ConfigDict, schedule: optax.Schedule, mask: Mask
) -> optax.GradientTransformation:
  """LAMB (arXiv:1904.00962) as in timm, which ResNet strikes back (arXiv:2110.00476) trains with.

  Unlike `optax.lamb`, gradients are first clipped to `lamb_clip_norm`, and parameters without decay
  take plain Adam steps. timm has no trust ratio without decay; here the mask alone decides.
  """
  clip = fields.lamb_clip_norm
  return optax.chain(
    optax.clip_by_global_norm(clip) if clip else optax.identity(),
    optax.scale_by_adam(
      b1=fields.b1, b2=fields.b2, eps=fields.lamb_eps, mu_dtype=_mu_dtype(fields)
    ),
    optax.add_decayed_weights(fields.weight_decay, mask=mask),
    _masked(_by_leaf(optax.scale_by_trust_ratio()), mask),
    optax.scale_by_learning_rate(schedule),
  )


def lars(
  fields: ml_collections.ConfigDict, schedule: optax.Schedule, mask: Mask
) -> optax.GradientTransformation:
  """LARS (arXiv:1708.03888) as in MLPerf: the rate is part of what the momentum sums up.

  Parameters without decay have plain momentum at the same rate. See `scale_by_lars`, which is not
  what `optax.lars` computes. timm's Lars has the rate outside of the momentum: the two differ while
  the rate changes.
  """
  return optax.chain(
    _masked(_by_leaf(scale_by_lars(fields.weight_decay, fields.eta)), mask),
    optax.scale_by_learning_rate(schedule),
    optax.trace(fields.momentum),
  )


def scale_by_lars(weight_decay: float, eta: float) -> optax.GradientTransformation:
  """Return (g + decay * w) * eta * |w| / (|g| + decay * |w|), by leaf; the ratio is 1 at norm 0.

  The sum of norms is MLPerf's and TensorFlow's; `optax.scale_by_trust_ratio` has the norm of the
  sum.
  """

  def scale(g: jax.Array, w: jax.Array) -> jax.Array:
    g_norm, w_norm = jnp.linalg.norm(g.ravel()), jnp.linalg.norm(w.ravel())
    both = (g_norm > 0) & (w_norm > 0)
    length = jnp.where(both, g_norm + weight_decay * w_norm, 1.0)
    ratio = jnp.where(both, eta * w_norm / length, 1.0)
    return ratio * (g + weight_decay * w)

  def update(updates: optax.Updates, params: optax.Params) -> optax.Updates:
    return jax.tree.map(scale, updates, params)

  return optax.stateless(update)


def rmsprop(
  fields: ml_collections.ConfigDict, schedule: optax.Schedule, mask: Mask
) -> optax.GradientTransformation:
  """RMSProp as in TensorFlow, which EfficientNet (arXiv:1905.11946) trains with.

  Squares are averaged from 1 on, epsilon is inside the root, and the rate is part of what the
  momentum sums up. Decay is added to the gradient.
  """
  return optax.chain(
    optax.add_decayed_weights(fields.weight_decay, mask=mask),
    optax.rmsprop(
      schedule,
      decay=fields.rms_decay,
      eps=fields.rms_eps,
      initial_scale=1.0,
      momentum=fields.momentum,
    ),
  )


OPTIMIZERS: Mapping[str, Optimizer] = {
  "sgd": sgd,
  "adamw": adamw,
  "lamb": lamb,
  "lars": lars,
  "rmsprop": rmsprop,
}

# The fields of an optimizer that not every one has.
FIELDS: Mapping[str, tuple[str, ...]] = {
  "sgd": ("momentum", "nesterov"),
  "adamw": ("b1", "b2", "eps", "mu_dtype"),
  "lamb": ("b1", "b2", "lamb_eps", "lamb_clip_norm", "mu_dtype"),
  "lars": ("momentum", "eta"),
  "rmsprop": ("momentum", "rms_decay", "rms_eps"),
}
# Those whose decay is a part of their trust ratio.
_DECAY_IN_RATIO = ("lamb", "lars")


def decay_mask(no_decay: Sequence[str], vectors: bool = False) -> Callable[[Params], Tree]:
  """Return a function of the parameters: a tree of booleans, True where weight decay applies.

  It applies to matrices and kernels. Vectors and scalars do not decay: biases, scales of
  normalisation layers and the like (arXiv:1807.11205, section 3.2).

  Args:
    no_decay: regular expressions of further parameters without decay, searched for in their path,
      such as "head/kernel".
    vectors: whether vectors and scalars decay as well.
  """

  def decays(path: tuple[object, ...], leaf: jax.Array) -> bool:
    ndim = leaf.ndim - packing.is_packed(path_name(path))
    return (vectors or ndim >= 2) and not _matches(path, no_decay)

  return lambda params: jax.tree.map_with_path(decays, params)


def make_optimizer(
  config: ml_collections.ConfigDict, schedule: optax.Schedule, no_decay: Sequence[str] = ()
) -> optax.GradientTransformation:
  """Return the gradient transformation of `config.optimizer`.

  Clipping, where asked for, comes first and sees the pure gradient. For what is frozen, or has a
  rate of its own, see trainer/finetune.py.

  Args:
    config: a validated config.
    schedule: step -> learning rate.
    no_decay: patterns of the model family; see `decay_mask`.

  Raises:
    ValueError: one sentence, if there is no such optimizer.
  """
  return finetune.wrap(config, _make_rule(config, schedule, no_decay))


def _make_rule(
  config: ml_collections.ConfigDict, schedule: optax.Schedule, no_decay: Sequence[str]
) -> optax.GradientTransformation:
  """Return the transformation of all parameters alike."""
  fields, mask = config.optimizer, make_mask(config, no_decay)
  optimizer = names.find(OPTIMIZERS, fields.name, "config.optimizer.name")
  clip = optax.clip_by_global_norm(fields.clip_norm) if fields.clip_norm else optax.identity()
  if fields.agc:
    clip = optax.chain(clip, adaptive_clip(fields.agc, fields.no_agc))
  if fields.decay == "own":
    return optax.chain(clip, optimizer(fields, schedule, mask))
  plain = fields.copy_and_resolve_references()
  plain.weight_decay = 0.0
  rule = optimizer(plain, schedule, mask)
  if fields.decay == "coupled":
    return optax.chain(clip, optax.add_decayed_weights(fields.weight_decay, mask=mask), rule)
  unit = schedules.peak_rate(config) if fields.decay == "scheduled" else 1.0

  def decay(step: jax.Array) -> jax.Array:
    return -fields.weight_decay / unit * schedule(step)

  return optax.chain(clip, rule, optax.add_decayed_weights(decay, mask=mask))


def adaptive_clip(factor: float, without: str) -> optax.GradientTransformation:
  """Clip the gradient of each unit to `factor` times the norm of its weights (arXiv:2102.06171).

  `optax.adaptive_grad_clip` takes a unit as NFNet does: an output channel of an HWIO kernel, a
  column of a matrix, a whole vector. Norms of weights count as 1e-3 at least.

  Args:
    factor: largest norm of a gradient over that of its weights.
    without: regular expression of parameters that are left alone; "" for none.
  """
  clip = _by_leaf(optax.adaptive_grad_clip(factor))
  if not without:
    return clip

  def mask(params: Params) -> Tree:
    return jax.tree.map_with_path(lambda path, _: not _matches(path, [without]), params)

  return optax.masked(clip, mask)


def make_mask(config: ml_collections.ConfigDict, no_decay: Sequence[str]) -> Mask:
  """Return which parameters decay; None for all."""
  fields = config.optimizer
  if fields.decay_bn_and_bias:
    return decay_mask([fields.no_decay], vectors=True) if fields.no_decay else None
  return decay_mask([*no_decay, fields.no_decay] if fields.no_decay else no_decay)


def check(config: ml_collections.ConfigDict) -> None:
  """Refuse fields of `config.optimizer` that do not fit together.

  Raises:
    ValueError: one sentence.
  """
  fields = config.optimizer
  names.find(OPTIMIZERS, fields.name, "config.optimizer.name")
  finetune.parse_scales(fields.lr_scales)
  if fields.lr and fields.lr_per_256:
    raise ValueError(
      f"config.optimizer.lr is {fields.lr} and config.optimizer.lr_per_256 is "
      f"{fields.lr_per_256}; set one of them to 0."
    )
  if not fields.lr and not fields.lr_per_256:
    raise ValueError(
      "config.optimizer.lr and config.optimizer.lr_per_256 are both 0; one must be positive."
    )
  if fields.warmup_start and not fields.warmup_epochs and not fields.warmup_steps:
    raise ValueError(
      f"config.optimizer.warmup_start is {fields.warmup_start}, but there is no warm-up; set "
      "config.optimizer.warmup_epochs, or warmup_start to 0."
    )
  if fields.decay != "own" and fields.name in _DECAY_IN_RATIO:
    raise ValueError(
      f"config.optimizer.decay is {fields.decay}, but the decay of {fields.name} is a part of its "
      "trust ratio; set it to own."
    )
  for field in sorted({field for own in FIELDS.values() for field in own}):
    value, default = fields[field], base.RUN[f"optimizer.{field}"].default
    if fields.name in FIELDS and field not in FIELDS[fields.name] and value != default:
      of = " and ".join(name for name, own in FIELDS.items() if field in own)
      raise ValueError(
        f"config.optimizer.{field} is {value!r}, which {fields.name} has no use for; it is a field "
        f"of {of}."
      )


def _masked(rule: optax.GradientTransformation, mask: Mask) -> optax.GradientTransformation:
  return optax.masked(rule, mask) if mask else rule


def _by_leaf(rule: optax.GradientTransformation) -> optax.GradientTransformation:
  """Return a rule without state that takes each leaf by itself, for stacked blocks as well."""

  def update(
    updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
  ) -> tuple[optax.Updates, optax.OptState]:
    def one(path: tuple[object, ...], g: jax.Array, w: jax.Array) -> jax.Array:
      apply = lambda g, w: rule.update(g, state, w)[0]  # noqa: E731
      return (jax.vmap(apply) if packing.is_packed(path_name(path)) else apply)(g, w)

    return jax.tree.map_with_path(one, updates, params), state

  return optax.GradientTransformation(rule.init, update)


def _matches(path: tuple[object, ...], patterns: Sequence[str]) -> bool:
  """Whether a pattern is in the path; finetune.check sees to it that stacked blocks are alike."""
  name = packing.names(path_name(path))[0]
  return any(re.search(pattern, name) for pattern in patterns)


def _mu_dtype(fields: ml_collections.ConfigDict) -> jnp.dtype | None:
  return None if fields.mu_dtype == "params" else jnp.dtype(fields.mu_dtype)
