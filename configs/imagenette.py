"""ResNet-18 of half the width, from scratch, on 10 classes of ImageNet: 15, 30 or 45 epochs.

    python -m input_pipeline.prepare --tar imagenette.tar --out data/imagenette
    python -m trainer --config=configs/imagenette.py:45 --workdir=runs/imagenette \\
        --config.data.path=data/imagenette

Measured on 6,000 training and 1,500 validation images, on one H200 in float32 (the convolutions in
TF32), with jax 0.11.2:

    epochs        15           30      45
    top-1         80.0 ± 0.5   84.1    86.5 ± 0.4   seeds: 3, 1, 3
    on two cores  14 min       28 min  41 min       estimated, a quiet AMD EPYC

A run of 15 epochs on two such cores ended at 80.9 (jax 0.10.2).

Chosen on a fifth of the training images; configs/imagenette.md has the choices, the curves, seeds
and what each part is worth.
"""

import ml_collections

from configs import base

# Epochs: the epoch from which on images have 112 px
_LARGER = {"15": 11, "30": 21, "45": 32}

VARIANTS = tuple(_LARGER)

EXAMPLES = 6_000
TOP1 = {"15": "80.0", "30": "84.1", "45": "86.5"}


def get_config(epochs: str = "45") -> ml_collections.ConfigDict:
  config = base.get_config("resnet")
  config.global_batch_size = 64
  config.total_epochs = float(epochs)

  config.model.depth = 18
  config.model.width = 0.5
  config.model.num_classes = 10
  config.model.dtype = "float32"  # what a CPU computes fastest
  config.model.stem = "deep"
  config.model.shortcut = "pool"

  config.data.image_sizes = f"0:80, {_LARGER[epochs]}:112"
  config.data.eval_image_size = 144  # 1.3 times that of training: arXiv:1906.06423
  config.data.eval_resize = 160
  config.data.crop_area = (0.35, 1.0)
  config.data.operations = "timm_rand_augment(m=6, mstd=0.5, inc=True)"

  config.optimizer.lr_per_256 = 0.6
  config.optimizer.warmup_epochs = 3.0
  config.optimizer.weight_decay = 5e-4
  config.optimizer.ema_decay = 0.995

  config.eval.batch_size = 100
  config.eval.every_epochs = 5.0
  config.eval.flip = True
  return config
