"""The fields of ConvNeXts: what a config may set of them.

Nothing here imports JAX, so that help and refusals need not wait for it.
"""

import dataclasses

from configs.fields import POSITIVE, Field, Fields, at_least, one_of
from trainer.models.resnet_fields import COMMON
from trainer.models.vit_fields import VIT

# Blocks of each stage, channels of the first: arXiv:2201.03545, section 3.
VARIANTS = {
  "t": ((3, 3, 9, 3), 96),
  "s": ((3, 3, 27, 3), 96),
  "b": ((3, 3, 27, 3), 128),
  "l": ((3, 3, 27, 3), 192),
}

CONVNEXT: Fields = {
  "variant": Field("t", "Blocks and channels of each stage.", check=one_of(*VARIANTS)),
  "width": Field(1.0, "Multiplies the channels of the variant.", "", POSITIVE),
  "repeats": Field(
    1.0, "Multiplies the blocks of each stage of the variant, rounded up.", "", POSITIVE
  ),
  "patch": Field(4, "Kernel and stride of the first convolution.", "pixels", at_least(1)),
  "layer_scale": dataclasses.replace(VIT["layer_scale"], default=1e-6),
  **{name: VIT[name] for name in ("norm_epsilon", "drop_path", "head_bias_init", "remat")},
  **{name: COMMON[name] for name in ("dropout", "scan")},
}
