"""The optax chain and the learning rate schedule of a config."""

from typing import Any

import jax
import ml_collections
import optax


def make_schedule(
  config: ml_collections.ConfigDict, *, warmup_steps: int, total_steps: int
) -> optax.Schedule:
  """Returns step -> learning rate: linear warm-up, then one cosine (arXiv:1706.02677, arXiv:1608.03983)."""
  peak = config.optimizer.lr_per_256 * config.global_batch_size / 256
  end = peak * config.optimizer.final_lr_fraction
  if not warmup_steps:
    return optax.cosine_decay_schedule(peak, total_steps, alpha=config.optimizer.final_lr_fraction)
  return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, total_steps, end)


def decays(params: Any) -> Any:
  """Returns a tree of booleans: True where weight decay belongs, on kernels; False on BN scales and all biases."""
  return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


def make_optimizer(
  config: ml_collections.ConfigDict, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """Returns the gradient transformation of `config.optimizer`.

  sgd adds `weight_decay * params` to the gradient before the momentum, as the ImageNet recipes do; adamw decays apart
  from the moments (arXiv:1711.05101). Clipping, where asked for, comes first and sees the pure gradient.
  """
  opt = config.optimizer
  mask = None if opt.decay_bn_and_bias else decays
  if opt.name == "sgd":
    rule = optax.chain(
      optax.add_decayed_weights(opt.weight_decay, mask=mask),
      optax.sgd(schedule, momentum=opt.momentum, nesterov=opt.nesterov),
    )
  else:
    rule = optax.adamw(
      schedule, b1=opt.b1, b2=opt.b2, eps=opt.eps, weight_decay=opt.weight_decay, mask=mask
    )
  clip = optax.clip_by_global_norm(opt.clip_norm) if opt.clip_norm else optax.identity()
  return optax.chain(clip, rule)
