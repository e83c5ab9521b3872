"""A small ResNet-18 on 10 classes of ImageNet, dense or with 80 % zeros by each method: for a CPU.

    python -m input_pipeline.prepare --tar imagenette.tar --out data/imagenette
    python -m trainer --config=configs/imagenette_rigl.py:rigl --workdir=runs/imagenette_rigl \\
        --config.data.path=data/imagenette

Measured on 6,000 training and 1,500 validation images, seed 0, on one H200 that other runs shared:
dense 71.5, static 70.9, set 71.3, rigl 71.0, gradual 72.5 %; one standard error is 1.2 points.
"""

import ml_collections

from configs import base

EXAMPLES = 6_000
VARIANTS = ("dense", "static", "set", "rigl", "gradual")
TOP1 = {"dense": "71.5", "static": "70.9", "set": "71.3", "rigl": "71.0", "gradual": "72.5"}


def get_config(variant: str = "rigl") -> ml_collections.ConfigDict:
  config = base.get_config("resnet")
  config.global_batch_size = 64
  config.total_epochs = 12.0

  config.model.depth = 18
  config.model.width = 0.25
  config.model.num_classes = 10
  config.model.dtype = "float32"  # what a CPU computes fastest

  config.data.image_size = 112
  config.data.eval_image_size = 144
  config.data.eval_resize = 160
  config.data.crop_area = (0.35, 1.0)

  config.optimizer.lr_per_256 = 0.3
  config.optimizer.warmup_epochs = 1.0
  config.optimizer.weight_decay = 5e-4

  if variant != "dense":
    config.sparsity.name = variant
    config.sparsity.sparsity = 0.8
  if variant in ("set", "rigl", "gradual"):
    config.sparsity.every_steps = 25

  config.eval.batch_size = 100
  config.eval.every_epochs = 3.0
  return config
