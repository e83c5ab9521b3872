"""The fields of nets without normalisation: what a config may set of them.

Nothing here imports JAX, so that help and refusals need not wait for it.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from configs.fields import POSITIVE, Field, Fields, one_of
from trainer.models.resnet_fields import COMMON, depth_of

# The keys of the tables in nfnet.py.
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "elu", "leaky_relu")
DEPTHS = (26, 50, 101, 152, 200)
VARIANTS = tuple(f"f{n}" for n in range(7))

_FIELDS: Fields = {
  "width": Field(1.0, "Multiplies the channels of the net.", "", POSITIVE),
  "activation": Field("relu", "Of stem and blocks.", check=one_of(*ACTIVATIONS)),
  "padding": Field(
    "same",
    "Of convolutions and of the max-pool: same, TensorFlow's, as in the papers' code and timm's "
    "dm_nfnet | torch, symmetric, as in timm's nf_resnet.",
    check=one_of("same", "torch"),
  ),
  "alpha": Field(0.2, "Factor of the branch of a block.", "", POSITIVE),
  "skip_init": Field(
    True,
    "Whether each branch has a trained factor that starts at 0 (arXiv:2002.10444); else the gains "
    "of its last convolution start at 0, as in timm's nf_resnet.",
  ),
  "gamma_in": Field(
    "activation",
    "What the gain of the activation multiplies: activation | kernel, all of them, as in timm's "
    "nf_resnet, that of the stem among them.",
    check=one_of("activation", "kernel"),
  ),
  "ws_rule": Field(
    "max",
    "How kernels are standardised: max, by the root of max(variance * fan-in, ws_epsilon), as in "
    "the papers' code | add, by that of (variance + ws_epsilon) * fan-in, as in timm.",
    check=one_of("max", "add"),
  ),
  "ws_epsilon": Field(1e-4, "See ws_rule; 1e-5 in timm.", "", POSITIVE),
  "se_ratio": dataclasses.replace(
    COMMON["se_ratio"],
    words="Channels of squeeze-and-excitation (arXiv:1709.01507) over those of the block; 0 for "
    "none.",
  ),
  "drop_path": dataclasses.replace(
    COMMON["drop_path"],
    words="Stochastic depth (arXiv:1603.09382): block i of N, from 0, skips its branch for this "
    "times i/N of the examples in training.",
  ),
  "drop_path_rescale": Field(
    False,
    "Whether the branches that are kept grow by 1/(1 - rate), as in timm; not in the papers' code.",
    resume=COMMON["drop_path"].resume,
  ),
  **{name: COMMON[name] for name in ("dropout", "head_bias_init", "scan", "remat")},
}


def _fields(first: Mapping[str, Field], **defaults: Any) -> Fields:
  return dict(first) | {
    name: dataclasses.replace(field, default=defaults.get(name, field.default))
    for name, field in _FIELDS.items()
  }


NFNET: Fields = _fields(
  {"variant": Field("f0", "Published net (arXiv:2102.06171).", check=one_of(*VARIANTS))},
  activation="gelu_tanh",
  se_ratio=0.5,
)

NF_RESNET: Fields = _fields(
  {
    "depth": depth_of("nf_resnet", 50, DEPTHS),
    "shortcut": Field(
      "conv",
      "Where the image is halved: conv, a 1x1 convolution with stride | pool, the mean of 2x2 "
      "pixels before it, as in timm.",
      check=one_of("conv", "pool"),
    ),
  }
)
