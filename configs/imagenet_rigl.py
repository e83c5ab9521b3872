"""ResNet-50 with 80 or 90 % of its weights zero from the first step on: RigL (arXiv:1911.11134).

    python -m trainer --config=configs/imagenet_rigl.py:erk80 --workdir=DIR \\
        --config.data.path=SHARDS

Expected top-1 (the paper and the README of google-research/rigl, whose dense net has 76.8), not
measured by this project: erk80 75.12, erk90 73.07, uniform80 74.60, uniform90 72.02, and with all
durations times five erk80_5x 77.17, erk90_5x 76.42. By the paper a forward pass needs 0.42 of the
multiply-adds of the dense net at erk80 and 0.23 at uniform80; a chip that multiplies whole matrices
gains no time from that. Masks change every 100 steps until step 25,000 of 32,000. Departs from the
source: ties are broken by position rather than by noise.
"""

import ml_collections

from configs import base

_STEPS = 32_000
_LAST_CHANGE = 25_000
_DROPS = (30, 70, 90)  # epochs after which the rate is a tenth

# Distribution, sparsity, factor of all durations.
_NETS = {
  "erk80": ("erk", 0.8, 1),
  "erk90": ("erk", 0.9, 1),
  "uniform80": ("uniform", 0.8, 1),
  "uniform90": ("uniform", 0.9, 1),
  "erk80_5x": ("erk", 0.8, 5),
  "erk90_5x": ("erk", 0.9, 5),
}

VARIANTS = tuple(_NETS)

TOP1 = dict(zip(VARIANTS, ["75.12", "73.07", "74.60", "72.02", "77.17", "76.42"], strict=True))


def get_config(variant: str = "erk80") -> ml_collections.ConfigDict:
  distribution, sparsity, times = _NETS[variant]
  config = base.get_config("resnet")
  config.global_batch_size = 4096
  config.total_epochs, config.total_steps = 0.0, times * _STEPS
  config.label_smoothing = 0.1

  config.model.update(base.SAVE_TIME)

  config.sparsity.name = "rigl"
  config.sparsity.sparsity = sparsity
  config.sparsity.distribution = distribution
  if distribution == "uniform":
    config.sparsity.dense = "^stem"
  config.sparsity.every_steps = 100
  config.sparsity.end_share = _LAST_CHANGE / _STEPS
  config.sparsity.drop_fraction = 0.3

  config.optimizer.lr_per_256 = 0.1
  config.optimizer.warmup_epochs = 5.0
  config.optimizer.schedule = f"step(at={tuple(times * d for d in _DROPS)}, factor=0.1)"
  config.optimizer.weight_decay = 1e-4

  config.eval.every_epochs = 5.0
  return config
