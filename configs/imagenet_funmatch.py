"""ResNet-50 that learns from a larger net, for 300 or 1200 epochs: FunMatch (arXiv:2106.05237).

    python -m trainer --config=configs/imagenet_funmatch.py:300 --workdir=DIR \\
        --config.data.path=SHARDS --config.distill.teacher=WORKDIR

The teacher is any run of this program on the same classes, or an imported net. Published is 82.8 %
at 224 px for a BiT ResNet-50 and a BiT ResNet-152x2 of 83.0 % (README of big_vision,
configs/proj/distill), not after how many epochs; nothing is expected of this net and a teacher of
yours, and nothing was measured by this project. All fields are of bit_i1k.py there, whose 300
epochs took its authors about 15 hours on a TPU v3-32. Departs from the source: the student is
torchvision's net with batch norm, where BiT's has group norm and standardised weights.
"""

import ml_collections

from configs import base

VARIANTS = ("300", "1200")
EXAMPLES = 1_255_544  # 98 % of ImageNet
TOP1 = dict.fromkeys(VARIANTS, "")


def get_config(epochs: str = "300") -> ml_collections.ConfigDict:
  config = base.get_config("resnet")
  config.global_batch_size = 4096
  config.total_epochs = float(epochs)
  config.label_smoothing = 0.0

  config.model.update(base.SAVE_TIME)

  config.distill.weight = 1.0
  config.distill.temperature = 1.0
  # The same mixed images for both nets: one share for the batch, the larger one for the image.
  config.augment = "mix(mixup=1.0, partner='roll', fold=True)"

  config.data.train_split = "train[:98%]"
  config.data.crop_area = (0.05, 1.0)  # the default of TensorFlow's sampled boxes
  config.data.mean = config.data.std = (127.5, 127.5, 127.5)  # to -1..1

  config.optimizer.name = "adamw"
  config.optimizer.lr_per_256 = 0.0
  config.optimizer.lr = 0.03
  config.optimizer.mu_dtype = "bfloat16"
  config.optimizer.clip_norm = 1.0
  config.optimizer.warmup_epochs = 5_000 * config.global_batch_size / EXAMPLES
  config.optimizer.weight_decay = 3e-4
  config.optimizer.decay = "scheduled"  # times the schedule, not times the rate

  config.eval.every_epochs = 5.0
  return config
