"""The fields of EfficientNets: what a config may set of them.

Nothing here imports JAX, so that help and refusals need not wait for it.
"""

import dataclasses

from configs.fields import POSITIVE, Field, Fields, one_of
from trainer.models.resnet_fields import COMMON

# The keys of the table in efficientnet.py.
VARIANTS = (
  *(f"b{n}" for n in range(9)),
  *(f"v2_b{n}" for n in range(4)),
  *("v2_s", "v2_m", "v2_l"),
)

EFFICIENTNET: Fields = {
  "variant": Field(
    "b0",
    "Published net: b0 to b8 (arXiv:1905.11946) | v2_s, v2_m, v2_l, v2_b0 to v2_b3 "
    "(arXiv:2104.00298). Image size and dropout are fields of their own.",
    check=one_of(*VARIANTS),
  ),
  "width": Field(
    1.0, "Multiplies the channels of the variant, rounded to a multiple of 8.", "", POSITIVE
  ),
  "repeats": Field(
    1.0, "Multiplies the blocks of each stage of the variant, rounded up.", "", POSITIVE
  ),
  "padding": Field(
    "same",
    "Of convolutions: same, TensorFlow's, and timm's tf_efficientnet | torch, symmetric, "
    "torchvision's, and timm's efficientnet.",
    check=one_of("same", "torch"),
  ),
  "se_ratio": dataclasses.replace(
    COMMON["se_ratio"],
    default=0.25,
    words="Channels of squeeze-and-excitation over those that come into the block; 0 for none.",
  ),
  **{
    name: dataclasses.replace(COMMON[name], default=default)
    for name, default in (
      ("activation", "silu"),
      ("dropout", 0.0),
      ("head_bias_init", 0.0),
      ("bn_momentum", 0.99),
      ("bn_epsilon", 1e-3),
      ("bn_unbiased", False),
      ("bn_shifted", False),
      ("bn_together", False),
      ("bn_group", "global"),
      ("scan", False),
      ("remat", "none"),
    )
  },
  "drop_path": dataclasses.replace(
    COMMON["drop_path"],
    words="Stochastic depth (arXiv:1603.09382): block i of N, from 0, skips its branch for this "
    "times i/N of the examples in training.",
  ),
}
