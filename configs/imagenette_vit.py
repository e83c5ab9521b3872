"""A small Vision Transformer from scratch on 10 classes of ImageNet, of a size for two CPU cores.

    python -m input_pipeline.prepare --tar imagenette.tar --out data/imagenette
    python -m trainer --config=configs/imagenette_vit.py --workdir=runs/imagenette-vit \\
        --config.data.path=data/imagenette

Measured on 6,000 training and 1,500 validation images, seed 0, on one H200 that nine other runs
shared: 67.3 %. 690,730 parameters; a step of 64 images took about 0.75 s of CPU of an AMD EPYC
under other load, by which the whole run is half an hour of CPU, or 15 to 20 minutes on two free
cores: an estimate.
"""

import ml_collections

from configs import base

EXAMPLES = 6_000
TOP1 = "67.3"


def get_config() -> ml_collections.ConfigDict:
  config = base.get_config("vit")
  config.global_batch_size = 64
  config.total_epochs = 24.0

  config.model.patch = 8
  config.model.width = 96
  config.model.depth = 6
  config.model.heads = 3
  config.model.positions = "sincos2d"
  config.model.pool = "mean"
  config.model.num_classes = 10
  config.model.dtype = "float32"  # what a CPU computes fastest

  config.data.image_size = config.data.eval_image_size = 64
  config.data.eval_resize = 73
  config.data.crop_area = (0.35, 1.0)

  config.optimizer.name = "adamw"
  config.optimizer.lr_per_256 = 0.0
  config.optimizer.lr = 1e-3
  config.optimizer.warmup_epochs = 2.0
  config.optimizer.weight_decay = 0.05
  config.optimizer.clip_norm = 1.0

  config.eval.batch_size = 100
  config.eval.every_epochs = 4.0
  return config
