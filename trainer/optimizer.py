"""Optimizers by name, as optax gradient transformations, and which parameters decay.

To add one, write a function (fields, schedule, mask) -> transformation and a line in OPTIMIZERS; a
field of its own is an entry of `configs/base.py`.
"""

from collections.abc import Callable, Mapping, Sequence
import re

import jax
import ml_collections
import optax

from configs import names
from trainer.state import Params, Tree

# Returns a tree of booleans for the parameters; None stands for True everywhere.
Mask = Callable[[Params], Tree] | None
Optimizer = Callable[
  [ml_collections.ConfigDict, optax.Schedule, Mask], optax.GradientTransformation
]


def sgd(
  fields: ml_collections.ConfigDict, schedule: optax.Schedule, mask: Mask
) -> optax.GradientTransformation:
  """SGD with momentum; `weight_decay * params` is added to the gradient before the momentum."""
  return optax.chain(
    optax.add_decayed_weights(fields.weight_decay, mask=mask),
    optax.sgd(schedule, momentum=fields.momentum, nesterov=fields.nesterov),
  )


def adamw(
  fields: ml_collections.ConfigDict, schedule: optax.Schedule, mask: Mask
) -> optax.GradientTransformation:
  """AdamW: decay apart from the moments, times the learning rate (arXiv:1711.05101)."""
  return optax.adamw(
    schedule,
    b1=fields.b1,
    b2=fields.b2,
    eps=fields.eps,
    weight_decay=fields.weight_decay,
    mask=mask,
  )


OPTIMIZERS: Mapping[str, Optimizer] = {"sgd": sgd, "adamw": adamw}


def decay_mask(no_decay: Sequence[str]) -> Callable[[Params], Tree]:
  """Return a function of the parameters: a tree of booleans, True where weight decay applies.

  It applies to matrices and kernels. Vectors and scalars do not decay: biases, scales of
  normalisation layers and the like (arXiv:1807.11205, section 3.2).

  Args:
    no_decay: regular expressions of further parameters without decay, searched for in their path,
      such as "head/kernel".
  """

  def decays(path: tuple[object, ...], leaf: jax.Array) -> bool:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return leaf.ndim >= 2 and not any(re.search(pattern, name) for pattern in no_decay)

  return lambda params: jax.tree.map_with_path(decays, params)


def make_optimizer(
  config: ml_collections.ConfigDict, schedule: optax.Schedule, no_decay: Sequence[str] = ()
) -> optax.GradientTransformation:
  """Return the gradient transformation of `config.optimizer`.

  Clipping, where asked for, comes first and sees the pure gradient.

  Args:
    config: a validated config.
    schedule: step -> learning rate.
    no_decay: patterns of the model family; see `decay_mask`.

  Raises:
    ValueError: one sentence, if there is no such optimizer.
  """
  fields = config.optimizer
  optimizer = names.find(OPTIMIZERS, fields.name, "config.optimizer.name")
  rule = optimizer(fields, schedule, make_mask(config, no_decay))
  clip = optax.clip_by_global_norm(fields.clip_norm) if fields.clip_norm else optax.identity()
  return optax.chain(clip, rule)


def make_mask(config: ml_collections.ConfigDict, no_decay: Sequence[str]) -> Mask:
  """Return which parameters decay; None for all."""
  fields = config.optimizer
  if fields.decay_bn_and_bias:
    return None
  return decay_mask([*no_decay, fields.no_decay] if fields.no_decay else no_decay)
