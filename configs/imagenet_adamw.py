"""ResNet-50 by AdamW at a constant rate of 1e-3: what a first tutorial writes.

    python -m trainer --config=configs/imagenet_adamw.py --workdir=DIR --config.data.path=SHARDS

Nobody has published a figure for it. It is here to compare with: same length, batch and images as
imagenet_resnet50.py, but an adaptive optimizer with the defaults of optax.adamw, and no schedule.
"""

import ml_collections

from configs import imagenet_resnet50

TOP1 = ""


def get_config() -> ml_collections.ConfigDict:
  config = imagenet_resnet50.get_config()
  config.optimizer.name = "adamw"
  config.optimizer.lr_per_256 = 0.0
  config.optimizer.lr = 1e-3
  config.optimizer.warmup_epochs = 0.0
  config.optimizer.schedule = "constant"
  config.optimizer.weight_decay = 1e-4
  return config
