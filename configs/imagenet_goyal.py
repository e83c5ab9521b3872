"""ResNet-50 in an hour: 90 epochs at batch 8192 with a gradual warm-up (arXiv:1706.02677).

    python -m trainer --config=configs/imagenet_goyal.py --workdir=DIR --config.data.path=SHARDS

Expected: 76.26 +- 0.09 % top-1 at batch 8192 and 76.40 +- 0.12 % at 256 (the paper, table 1 and
section 5.2), on 256 P100 in an hour; not measured by this project. Departs from the source: no
colour noise along the principal components; images are resized by area rather than bicubic.
"""

import ml_collections

from configs import base

TOP1 = "76.26"


def get_config() -> ml_collections.ConfigDict:
  config = base.get_config("resnet")
  config.global_batch_size = 8192
  config.total_epochs = 90.0
  config.label_smoothing = 0.0

  config.model.update(base.SAVE_TIME)
  config.model.bn_group = "32"  # of one worker

  config.data.operations = "color_jitter(brightness=0.4, contrast=0.4, saturation=0.4)"

  config.optimizer.lr_per_256 = 0.1
  config.optimizer.warmup_epochs = 5.0
  config.optimizer.warmup_start = 256 / 8192  # from the rate of batch 256, not from 0
  config.optimizer.schedule = "step(at=(30, 60, 80), factor=0.1)"
  config.optimizer.weight_decay = 1e-4

  config.eval.every_epochs = 5.0
  return config
