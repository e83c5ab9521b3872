"""ConvNeXt T, S, B and L: 300 epochs with AdamW (arXiv:2201.03545).

    python -m trainer --config=configs/imagenet_convnext.py:t --workdir=DIR \\
        --config.data.path=SHARDS

Expected top-1 at 224 px: t 82.1, s 83.1, b 83.8, l 84.3 (the paper, table 1; timm measures 82.07,
83.14, 83.84 and 84.30 of the paper's weights). Not measured by this project. The arguments are
those of facebookresearch/ConvNeXt, TRAINING.md and main.py. Departs from the source: one share and
one way to mix for each 128 images, where it draws one for each GPU.
"""

import ml_collections

from configs import base

_DROP_PATH = {"t": 0.1, "s": 0.4, "b": 0.5, "l": 0.5}

VARIANTS = tuple(_DROP_PATH)
TOP1 = {"t": "82.1", "s": "83.1", "b": "83.8", "l": "84.3"}


def get_config(variant: str = "t") -> ml_collections.ConfigDict:
  config = base.get_config("convnext")
  config.global_batch_size = 4096
  config.total_epochs = 300.0
  config.label_smoothing = 0.1
  config.augment = "random_erasing(p=0.25)|mix(mixup=0.8, cutmix=1.0, switch=0.5, group=128)"

  config.model.variant = variant
  config.model.drop_path = _DROP_PATH[variant]

  config.data.interpolation = config.data.eval_interpolation = "bicubic"
  config.data.operations = "timm_rand_augment(n=2, m=9, mstd=0.5, inc=True)"

  config.optimizer.name = "adamw"
  config.optimizer.lr_per_256 = 0.0
  config.optimizer.lr = 4e-3
  config.optimizer.warmup_epochs = 20.0
  config.optimizer.final_lr_fraction = 1e-6 / 4e-3
  config.optimizer.weight_decay = 0.05
  config.optimizer.ema_decay = 0.9999
  config.optimizer.ema_rule = "constant"

  config.eval.every_epochs = 10.0
  return config
