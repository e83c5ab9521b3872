"""Run file of the tests: 5,146 parameters, 16 px images of 6 classes, 10 steps of 8 examples.

Or the smallest net of another family: --config=tests/trainer/tiny.py:FAMILY.
"""

from configs import base, families


def get_config(family="cifar_resnet"):
  config = base.get_config(family)
  config.global_batch_size = 8
  config.total_epochs, config.total_steps = 0.0, 10
  config.label_smoothing = 0.0
  config.model.update(families.find(family).TRIAL)
  config.model.num_classes, config.model.dtype = 6, "float32"
  config.data.image_size = config.data.eval_image_size = config.data.eval_resize = 16
  config.data.synthetic_examples = 64
  config.data.workers = 0
  config.optimizer.lr_per_256 = 1.0
  config.optimizer.warmup_epochs = 0.0
  config.eval.batch_size = 8
  config.eval.every_epochs = 0.0
  config.log.every_steps = 1
  return config
