"""NFNet F0 to F6: 360 epochs without normalisation, each net at its image size (arXiv:2102.06171).

    python -m trainer --config=configs/imagenet_nfnet.py:f0 --workdir=DIR \\
        --config.data.path=SHARDS

Expected top-1, by the paper's code (google-deepmind/deepmind-research, nfnets) and, in brackets, by
timm of the same weights: f0 83.6 (83.5), f1 84.7 (84.7), f2 85.1 (85.2), f3 85.7 (85.7), f4 85.9
(85.8), f5 86.0 (86.1); f6 86.5 (86.4) with sharpness-aware minimisation, which is not here. Not
measured by this project. Each unit's gradient is clipped to 0.01 of the norm of its weights, but
for the kernel of the head; evaluation has larger images than training. Departs from the source:
RandAugment is torchvision's, from f1 on at its largest magnitude, about TensorFlow's 10, where f3
and larger ones have 15; mixing reuses the images of a batch, where the source decodes two for each;
evaluation keeps the aspect of an image, where the source squashes it to a square.
"""

import ml_collections

from configs import base

# Image size in training and in evaluation, dropout, magnitude of RandAugment of 30.
_NETS: dict[str, tuple[int, int, float, int]] = {
  "f0": (192, 256, 0.2, 15),
  "f1": (224, 320, 0.3, 30),
  "f2": (256, 352, 0.4, 30),
  "f3": (320, 416, 0.4, 30),
  "f4": (384, 512, 0.5, 30),
  "f5": (416, 544, 0.5, 30),
  "f6": (448, 576, 0.5, 30),
}

VARIANTS = tuple(_NETS)

TOP1 = dict(zip(VARIANTS, ["83.6", "84.7", "85.1", "85.7", "85.9", "86.0", "86.5"], strict=True))


def get_config(variant: str = "f0") -> ml_collections.ConfigDict:
  size, eval_size, dropout, magnitude = _NETS[variant]
  config = base.get_config("nfnet")
  config.global_batch_size = 4096
  config.total_epochs = 360.0
  config.label_smoothing = 0.1
  config.augment = "mix(mixup=0.2, cutmix=1.0, per='example', group=32)"

  config.model.variant = variant
  config.model.dropout = dropout
  config.model.drop_path = 0.25

  config.data.image_size, config.data.eval_image_size = size, eval_size
  config.data.eval_resize = eval_size + 32
  config.data.interpolation = config.data.eval_interpolation = "bicubic"
  config.data.operations = f"rand_augment(n=4, m={magnitude})"

  config.optimizer.lr_per_256 = 0.1
  config.optimizer.nesterov = True
  config.optimizer.warmup_epochs = 5.0
  config.optimizer.weight_decay = 2e-5
  config.optimizer.agc = 0.01
  config.optimizer.no_agc = "^head/kernel"
  config.optimizer.ema_decay = 0.99999

  config.eval.every_epochs = 10.0
  return config
