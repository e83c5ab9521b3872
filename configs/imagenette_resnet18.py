"""ResNet-18 from scratch on Imagenette (10 classes of ImageNet), sized for a CPU."""

from configs import base


def get_config():
  config = base.get_config()
  config.global_batch_size = 64
  config.total_epochs = 36.0

  config.model.depth = 18
  config.model.num_classes = 10
  config.model.dtype = "float32"

  config.data.image_size = 72
  config.data.eval_resize = 82
  config.data.crop_area = (0.35, 1.0)

  config.optimizer.lr_per_256 = 0.2
  config.optimizer.warmup_epochs = 3.0
  config.optimizer.weight_decay = 5e-4

  config.eval.batch_size = 100
  config.eval.every_epochs = 3.0
  config.log.every_steps = 50
  return config
