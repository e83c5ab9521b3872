"""ResNet-50 v1.5 as NVIDIA's DeepLearningExamples: 90 epochs, 77.1 %.

    python -m trainer --config=configs/imagenet_nvidia.py --workdir=DIR --config.data.path=SHARDS

Expected: 77.1 +- 0.1 % top-1, published in the README of DeepLearningExamples,
PyTorch/Classification/ConvNets/resnet50v1.5, about 3 hours on 8 A100; not measured by this project.
Departs from the source: fan-out initialisation, bfloat16 instead of float16.
"""

import ml_collections

from configs import base

TOP1 = "77.1"


def get_config() -> ml_collections.ConfigDict:
  config = base.get_config("resnet")
  config.global_batch_size = 2048  # 8 GPUs of 256
  config.total_epochs = 90.0
  config.label_smoothing = 0.1

  config.model.update(base.SAVE_TIME)
  config.model.bn_group = "256"

  config.optimizer.lr_per_256 = 0.256
  config.optimizer.momentum = 0.875
  config.optimizer.nesterov = False
  config.optimizer.warmup_epochs = 8.0
  config.optimizer.weight_decay = 1 / 32768

  config.eval.every_epochs = 5.0
  return config
