"""ResNet-18 and ResNet-50 for 16 to 88 epochs at growing image sizes: the ladder of FFCV.

    python -m trainer --config=configs/imagenet_ffcv.py:rn50_88 --workdir=DIR \\
        --config.data.path=SHARDS

Expected top-1 at 256 px, averaged over each image and its mirror (README of
libffcv/ffcv-imagenet):

    epochs       16    24    32    40    56    88
    ResNet-18   66.9  68.8  70.0  70.6  71.3  72.4    187 min for 88 epochs on one A100
    ResNet-50   73.8  75.6  76.6  77.2  78.0  78.4    77 min for 88 epochs on 8 A100

Not measured by this project. Departs from the source: images are as `prepare` stores them, not
re-encoded at 400 or 500 px; bfloat16 instead of float16.
"""

import ml_collections

from configs import base, image_sizes

# Epochs: first and last epoch of the growth from 160 to 192 px
_GROWTH = {16: (11, 13), 24: (17, 20), 32: (23, 27), 40: (29, 34), 56: (41, 48), 88: (65, 76)}
# Net: depth, batch, peak rate, weight decay
_NETS = {"rn18": (18, 1024, 0.5, 5e-5), "rn50": (50, 4096, 1.7, 1e-4)}

VARIANTS = tuple(f"{net}_{epochs}" for net in _NETS for epochs in _GROWTH)

TOP1 = dict(
  zip(
    VARIANTS,
    [
      "66.9",
      "68.8",
      "70.0",
      "70.6",
      "71.3",
      "72.4",
      "73.8",
      "75.6",
      "76.6",
      "77.2",
      "78.0",
      "78.4",
    ],
    strict=True,
  )
)


def get_config(variant: str = "rn50_16") -> ml_collections.ConfigDict:
  net, _, epochs = variant.partition("_")
  depth, batch, lr, decay = _NETS[net]
  config = base.get_config("resnet")
  config.global_batch_size = batch
  config.total_epochs = float(epochs)
  config.label_smoothing = 0.1

  config.model.depth = depth
  config.model.update(base.SAVE_TIME)
  config.model.blurpool = "convs"
  config.model.zero_init_residual = False
  config.model.bn_group = "512"

  first, last = _GROWTH[int(epochs)]
  config.data.image_sizes = image_sizes.ramp(
    min_size=160, max_size=192, start_epoch=first, end_epoch=last
  )
  config.data.eval_image_size = 256
  config.data.eval_resize = 293  # a crop of 224/256

  config.optimizer.lr_per_256 = 0.0
  config.optimizer.lr = lr
  config.optimizer.nesterov = False
  config.optimizer.warmup_epochs = 0.0  # a part of the schedule
  config.optimizer.schedule = f"piecewise(points=((0, 1e-4), (2, 1), ({epochs}, 0)))"
  config.optimizer.weight_decay = decay
  # FFCV leaves out what has "bn" in its name; the norms of shortcuts have not.
  config.optimizer.decay_bn_and_bias = True
  config.optimizer.no_decay = r"/bn\d|^stem_bn"

  config.eval.flip = True
  config.eval.every_epochs = 8.0
  return config
