"""ResNet-50 as torchvision's first weights: 90 epochs at batch 256, three steps of the rate.

    python -m trainer --config=configs/imagenet_torchvision_v1.py --workdir=DIR \\
        --config.data.path=SHARDS

Expected: 76.13 % top-1, the figure of torchvision's ResNet50_Weights.IMAGENET1K_V1, trained on 8
GPUs; not measured by this project. Departs from the source: the head starts from N(0, 0.01), and an
epoch is 5004.6 steps, its rest carried into the next, instead of 5005.
"""

import ml_collections

from configs import base

TOP1 = "76.13"


def get_config() -> ml_collections.ConfigDict:
  config = base.get_config("resnet")
  config.global_batch_size = 256
  config.total_epochs = 90.0
  config.label_smoothing = 0.0

  config.model.update(base.SAVE_TIME)
  config.model.zero_init_residual = False
  config.model.bn_group = "32"  # of one GPU

  config.optimizer.lr_per_256 = 0.1
  config.optimizer.nesterov = False
  config.optimizer.warmup_epochs = 0.0
  config.optimizer.schedule = "step(at=(30, 60), factor=0.1)"
  config.optimizer.weight_decay = 1e-4
  config.optimizer.decay_bn_and_bias = True

  config.eval.every_epochs = 5.0
  return config
