"""Images of your own, in one folder for each class: ResNet-18 from scratch, or from weights.

    python -m trainer --config=configs/own_images.py --workdir=runs/mine --config.data.path=FOLDER

FOLDER holds CLASS/*.jpg, of which a fifth of each class is held out for the evaluation, or
train/CLASS/*.jpg and val/CLASS/*.jpg. The classes are those of the folder. With weights of a
ResNet-18, as --config.init_from=resnet18-f37072fd.pth, far fewer images are enough;
--config.model.depth=50 takes those of a ResNet-50.

Small batches, a short warm-up and mild crops suit some hundreds to some thousands of images; there
is no expected accuracy. Not measured by this project.
"""

import ml_collections

from configs import base

TOP1 = ""
EXAMPLES = 1_000


def get_config() -> ml_collections.ConfigDict:
  config = base.get_config("resnet")
  config.global_batch_size = 32
  config.total_epochs = 30.0

  config.model.depth = 18
  config.model.num_classes = 0  # as many as the data have
  config.data.val_fraction = 0.2
  config.data.crop_area = (0.35, 1.0)  # a small set learns little from tiny crops

  config.optimizer.lr_per_256 = 0.1
  config.optimizer.warmup_epochs = 1.0
  config.optimizer.weight_decay = 5e-4

  config.eval.batch_size = 32
  config.eval.every_epochs = 2.0
  config.log.every_steps = 10
  return config
