"""Fine-tune a ResNet-50 that was trained on ImageNet, on images and classes of your own.

    python -m trainer --config=configs/finetune_resnet50.py --workdir=DIR \\
        --config.init_from=resnet50-0676ba61.pth \\
        --config.data.path=FOLDER --config.model.num_classes=10

FOLDER holds train/CLASS/*.jpg and val/CLASS/*.jpg. The weights are any that `trainer.weights`
reads, or the workdir of a run; the head is made anew.

    :layers   behind the name of the file, or nothing: every layer, at rates that grow from the stem
              to the new head
    :head     only the head; the rest stays as it is, with its batch norms; for few images

For both, one after the other: train `head` in one workdir, and give that as `init_from` of
`layers`. Rates are a start, not a published recipe, and depend on the data; there is no expected
accuracy. Not measured by this project on a whole data set.
"""

import ml_collections

from configs import base

VARIANTS = ("layers", "head")
TOP1 = ""
EXAMPLES = 5_000  # a small data set of your own


def get_config(variant: str = "layers") -> ml_collections.ConfigDict:
  if variant not in VARIANTS:
    raise ValueError(f"variant is {variant!r}; there is {', '.join(VARIANTS)}.")
  config = base.get_config("resnet")
  config.global_batch_size = 256
  config.total_epochs = 20.0
  config.label_smoothing = 0.1

  config.model.depth = 50
  config.model.update(base.SAVE_TIME)
  config.data.crop_area = (0.25, 1.0)  # a short run gains little from tiny crops

  # A tenth of the rate of training from scratch, a hundredth for the stem.
  config.optimizer.lr_per_256 = 0.01
  config.optimizer.warmup_epochs = 1.0
  config.optimizer.weight_decay = 1e-4
  if variant == "head":
    config.optimizer.freeze = "^stem|^stage"
    config.optimizer.lr_per_256 = 0.1
  else:
    config.optimizer.lr_scales = "^head/:10, ^stage3:0.5, ^stage2:0.25, ^stem|^stage1:0.1"

  config.eval.batch_size = 256
  config.eval.every_epochs = 1.0
  return config
