"""EfficientNet B0 to B7 and EfficientNetV2: 350 epochs with RMSProp, each at its image size.

    python -m trainer --config=configs/imagenet_efficientnet.py:v2_s --workdir=DIR \\
        --config.data.path=SHARDS

Expected top-1, by the README of tensorflow/tpu, models/official/efficientnet, with AutoAugment: b0
77.1, b1 79.1, b2 80.1, b3 81.6, b4 82.9, b5 83.6, b6 84.0, b7 84.3; by that of google/automl,
efficientnetv2: v2_b0 78.7, v2_b1 79.8, v2_b2 80.5, v2_b3 82.1, v2_s 83.9, v2_m 85.2, v2_l 85.7.
Not measured by this project. The images of V2 grow in four stages of equal length, each compiled
once. Departs from the source: V2's RandAugment and mixing have the strength of the last stage in
all four; RandAugment is torchvision's at its largest magnitude, about TensorFlow's 10, where v2_m
has 15 and v2_l 20; V2 is trained without 2 % of the examples there, to choose checkpoints by them.
"""

import ml_collections

from configs import base, image_sizes

_EPOCHS = 350.0
# Image size in training and in evaluation, dropout, magnitude of RandAugment of 30, or 0 for
# AutoAugment, and alpha of mixup and of cutmix.
_NETS: dict[str, tuple[int, int, float, int, float]] = {
  "b0": (224, 224, 0.2, 0, 0.0),
  "b1": (240, 240, 0.2, 0, 0.0),
  "b2": (260, 260, 0.3, 0, 0.0),
  "b3": (300, 300, 0.3, 0, 0.0),
  "b4": (380, 380, 0.4, 0, 0.0),
  "b5": (456, 456, 0.4, 0, 0.0),
  "b6": (528, 528, 0.5, 0, 0.0),
  "b7": (600, 600, 0.5, 0, 0.0),
  "v2_b0": (192, 224, 0.2, 0, 0.0),
  "v2_b1": (192, 240, 0.2, 0, 0.0),
  "v2_b2": (208, 260, 0.3, 0, 0.0),
  "v2_b3": (240, 300, 0.3, 0, 0.0),
  "v2_s": (300, 384, 0.2, 30, 0.0),
  "v2_m": (384, 480, 0.3, 30, 0.2),
  "v2_l": (384, 480, 0.4, 30, 0.5),
}

VARIANTS = tuple(_NETS)

TOP1 = {
  "b0": "77.1",
  "b1": "79.1",
  "b2": "80.1",
  "b3": "81.6",
  "b4": "82.9",
  "b5": "83.6",
  "b6": "84.0",
  "b7": "84.3",
  "v2_b0": "78.7",
  "v2_b1": "79.8",
  "v2_b2": "80.5",
  "v2_b3": "82.1",
  "v2_s": "83.9",
  "v2_m": "85.2",
  "v2_l": "85.7",
}


def get_config(variant: str = "b0") -> ml_collections.ConfigDict:
  size, eval_size, dropout, magnitude, alpha = _NETS[variant]
  config = base.get_config("efficientnet")
  config.global_batch_size = 4096
  config.total_epochs = _EPOCHS
  config.label_smoothing = 0.1

  config.model.variant = variant
  config.model.dropout = dropout
  config.model.drop_path = 0.2
  config.model.bn_group = "128"

  config.data.image_size, config.data.eval_image_size = size, eval_size
  config.data.eval_resize = eval_size + 32
  config.data.interpolation = config.data.eval_interpolation = "bicubic"
  config.data.operations = "auto_augment(policy='v0')"

  config.optimizer.name = "rmsprop"
  config.optimizer.schedule = "exponential(every=2.4, factor=0.97)"
  config.optimizer.lr_per_256 = 0.016
  config.optimizer.warmup_epochs = 5.0
  config.optimizer.weight_decay = 1e-5
  config.optimizer.ema_decay = 0.9999

  if variant.startswith("v2"):
    config.model.bn_momentum = 0.9
    sizes = [int(128 + (size - 128) * stage / 4) for stage in (1, 2, 3, 4)]
    config.data.image_sizes = image_sizes.equal_stages(sizes, _EPOCHS)
  if magnitude:  # S, M and L
    config.data.operations = f"rand_augment(n=2, m={magnitude})"
    config.data.eval_resize = eval_size
    config.data.mean = config.data.std = (127.5, 127.5, 127.5)
  if alpha:
    config.augment = f"mix(mixup={alpha}, cutmix={alpha}, per='example', group=128, fold=True)"

  config.eval.every_epochs = 10.0
  return config
