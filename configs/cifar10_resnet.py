"""The CIFAR-10 nets of the ResNet paper: 20 to 110 layers, 64,000 steps (arXiv:1512.03385, 4.2).

    python -m input_pipeline.prepare --folder CIFAR10 --out data/cifar10
    python -m trainer --config=configs/cifar10_resnet.py:20 --workdir=DIR \\
        --config.data.path=data/cifar10

CIFAR10 holds train/CLASS/*.png and val/CLASS/*.png. Expected error on the 10,000 test images: 8.75
percent with 20 layers, 7.51 with 32, 7.17 with 44, 6.97 with 56, 6.43 with 110 (table 6 of the
paper); not measured by this project. Departs from the source: mean and deviation of each channel
instead of the mean of each pixel; with 110 layers the rate rises from 0.01 over the first 400
steps, where the paper holds it there.
"""

import ml_collections

from configs import base

VARIANTS = ("20", "32", "44", "56", "110")

EXAMPLES = 50_000
TOP1 = {"20": "91.25", "32": "92.49", "44": "92.83", "56": "93.03", "110": "93.57"}


def get_config(depth: str = "20") -> ml_collections.ConfigDict:
  config = base.get_config("cifar_resnet")
  config.global_batch_size = 128
  config.total_epochs = 64_000 * 128 / 50_000
  config.label_smoothing = 0.0

  config.model.depth = int(depth)
  config.model.shortcut = "pad"
  config.model.num_classes = 10
  config.model.zero_init_residual = False
  config.model.dtype = "float32"

  config.data.image_size = config.data.eval_image_size = 32
  config.data.crop, config.data.crop_padding = "padded", 4
  config.data.eval_resize = 0
  config.data.mean = (125.3, 123.0, 113.9)
  config.data.std = (63.0, 62.1, 66.7)

  config.optimizer.lr_per_256 = 0.0
  config.optimizer.lr = 0.1
  config.optimizer.nesterov = False
  config.optimizer.warmup_epochs = 0.0
  if depth == "110":
    config.optimizer.warmup_steps = 400
    config.optimizer.warmup_start = 0.1
  config.optimizer.schedule = "step(at=(81.92, 122.88), factor=0.1)"  # 32,000 and 48,000 steps
  config.optimizer.weight_decay = 1e-4
  config.optimizer.decay_bn_and_bias = True

  config.eval.batch_size = 1000
  config.eval.every_epochs = 10.0
  return config
