"""ResNet-RS: 350 epochs, nets of 50 to 420 layers, each at its image size (arXiv:2103.07579).

    python -m trainer --config=configs/imagenet_resnet_rs.py:101_192 --workdir=DIR \\
        --config.data.path=SHARDS

Expected top-1, by the README of tensorflow/tpu, models/official/resnet/resnet_rs (and by timm, of
the same weights converted): 50_160 78.8 (77.9), 101_160 80.3, 101_192 81.2 (80.7), 152_192 82.0,
152_224 82.2, 152_256 83.0 (82.9), 200_256 83.4 (83.9), 270_256 83.8 (83.6), 350_256 84.0, 350_320
84.2, 420_320 84.4 (84.2). Not measured by this project. Departs from the source: RandAugment is
torchvision's at its largest magnitude, about TensorFlow's 10, where the source has 10 for the
first two and 15 for the others. BN statistics keep nothing of earlier steps (momentum 0): the
averages of the weights hold theirs as well.
"""

import ml_collections

from configs import base

# Net and size: dropout, rate of stochastic depth
_NETS = {
  "50_160": (0.25, 0.0),
  "101_160": (0.25, 0.0),
  "101_192": (0.25, 0.0),
  "152_192": (0.25, 0.0),
  "152_224": (0.25, 0.0),
  "152_256": (0.25, 0.0),
  "200_256": (0.25, 0.1),
  "270_256": (0.25, 0.1),
  "350_256": (0.25, 0.1),
  "350_320": (0.4, 0.1),
  "420_320": (0.4, 0.1),
}

VARIANTS = tuple(_NETS)

TOP1 = dict(
  zip(
    VARIANTS,
    ["78.8", "80.3", "81.2", "82.0", "82.2", "83.0", "83.4", "83.8", "84.0", "84.2", "84.4"],
    strict=True,
  )
)


def get_config(variant: str = "50_160") -> ml_collections.ConfigDict:
  depth, size = map(int, variant.split("_"))
  dropout, drop_path = _NETS[variant]
  config = base.get_config("resnet_rs")
  config.global_batch_size = 4096
  config.total_epochs = 350.0
  config.label_smoothing = 0.1

  config.model.depth = depth
  config.model.dropout = dropout
  config.model.drop_path = drop_path
  config.model.bn_momentum = 0.0

  config.data.image_size = config.data.eval_image_size = size
  config.data.eval_resize = size + 32
  config.data.interpolation = config.data.eval_interpolation = "bicubic"
  config.data.operations = "rand_augment(n=2, m=30)"

  config.optimizer.lr_per_256 = 0.1
  config.optimizer.nesterov = False
  config.optimizer.warmup_epochs = 5.0
  config.optimizer.weight_decay = 4e-5
  config.optimizer.ema_decay = 0.9999

  config.eval.every_epochs = 10.0
  return config
