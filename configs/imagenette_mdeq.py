"""A small MDEQ (deep equilibrium model) on 10 classes of ImageNet, of a size for two CPU cores.

    python -m input_pipeline.prepare --tar imagenette.tar --out data/imagenette
    python -m trainer --config=configs/imagenette_mdeq.py --workdir=runs/imagenette-mdeq \\
        --config.data.path=data/imagenette

Measured on 6,000 training and 1,500 validation images, seed 0, on one H200 that seven other runs
shared: 58.1 %. Images of 64 px are halved twice by a stride; the first two epochs are unrolled.
"""

import ml_collections

from configs import base

EXAMPLES = 6_000
TOP1 = "58.1"


def get_config() -> ml_collections.ConfigDict:
  config = base.get_config("mdeq")
  config.global_batch_size = 64
  config.total_epochs = 12.0

  config.model.variant = "small"
  config.model.width = 0.25
  config.model.expansion = 2
  config.model.num_classes = 10
  config.model.dtype = "float32"  # what a CPU computes fastest
  config.model.solver = "anderson"
  config.model.forward_iterations, config.model.backward_iterations = 10, 8
  config.model.tolerance = 1e-2
  config.model.unrolled_steps = 188  # two epochs
  config.model.unrolled_layers = 5

  config.data.image_size = config.data.eval_image_size = 64
  config.data.eval_resize = 73
  config.data.crop_area = (0.35, 1.0)

  config.optimizer.name = "adamw"
  config.optimizer.lr_per_256 = 0.0
  config.optimizer.lr = 2e-3
  config.optimizer.warmup_epochs = 1.0
  config.optimizer.weight_decay = 0.05
  config.optimizer.clip_norm = 1.0

  config.eval.batch_size = 100
  config.eval.every_epochs = 4.0
  return config
