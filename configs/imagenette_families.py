"""Small nets of most families from scratch on 10 classes of ImageNet: same images, like cost.

    python -m input_pipeline.prepare --tar imagenette.tar --out data/imagenette
    python -m trainer --config=configs/imagenette_families.py:vit --workdir=runs/vit \\
        --config.data.path=data/imagenette

Measured on 6,000 training and 1,500 validation images, seed 0, on 2 shared cores of an AMD EPYC:
resnet 69.9, rigl (80 % zeros) 69.3, nf_resnet 63.6, nfnet 60.5, mdeq 58.7, vit 57.8, efficientnet
49.5 %; costs and curves are in trainer/models/README.md.
"""

from typing import Any

import ml_collections

from configs import (
  base,
  imagenet_efficientnet,
  imagenette_mdeq,
  imagenette_nfnet,
  imagenette_rigl,
  imagenette_vit,
)

EXAMPLES = 6_000
# Optimizer and regularisation are those of a recipe; its net is made small.
_NETS: dict[str, tuple[Any, tuple[str, ...], dict[str, Any]]] = {
  "resnet": (imagenette_rigl, ("dense",), {}),
  "rigl": (imagenette_rigl, ("rigl",), {}),
  "vit": (imagenette_vit, (), {"model.width": 48}),
  "mdeq": (imagenette_mdeq, (), {"model.width": 0.125, "model.forward_iterations": 8}),
  "nf_resnet": (
    imagenette_nfnet,
    (),
    {
      "model.depth": 26,
      "model.width": 0.25,
      "model.dropout": 0.2,
      "model.drop_path": 0.1,
    },
  ),
  "nfnet": (imagenette_nfnet, (), {"model.width": 0.125}),
  "efficientnet": (
    imagenet_efficientnet,
    ("b0",),
    {
      "label_smoothing": 0.0,
      "model.width": 0.5,
      "model.bn_group": "global",
      "model.bn_momentum": 0.9,
      "data.operations": "",
      # Its own RMSProp is of batches of 4,096 and 350 epochs; this is the ViT's AdamW.
      "optimizer.name": "adamw",
      "optimizer.schedule": "cosine",
      "optimizer.lr_per_256": 0.0,
      "optimizer.lr": 1e-3,
      "optimizer.weight_decay": 0.05,
      "optimizer.clip_norm": 1.0,
    },
  ),
}
VARIANTS = tuple(_NETS)
TOP1 = {
  "resnet": "69.9",
  "rigl": "69.3",
  "vit": "57.8",
  "mdeq": "58.7",
  "nf_resnet": "63.6",
  "nfnet": "60.5",
  "efficientnet": "49.5",
}


def get_config(family: str = "resnet") -> ml_collections.ConfigDict:
  recipe, variant, fields = _NETS[family]
  config: ml_collections.ConfigDict = recipe.get_config(*variant)
  if family == "nf_resnet":  # with NFNet's recipe
    config.model = base.get_config(family).model
  config.update_from_flattened_dict(fields)
  config.global_batch_size = 64
  config.total_epochs = 12.0
  config.model.num_classes = 10
  config.model.dtype = "float32"  # what a CPU computes fastest

  config.data.image_size = config.data.eval_image_size = 64
  config.data.eval_resize = 73
  config.data.crop_area = (0.35, 1.0)

  config.optimizer.warmup_epochs = 1.0
  config.optimizer.ema_decay = 0.0  # averages of so few steps lag behind

  config.eval.batch_size = 100
  config.eval.every_epochs = 3.0
  return config
