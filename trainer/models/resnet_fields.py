"""The fields of all residual nets: what a config may set of them.

Nothing here imports JAX, so that help and refusals need not wait for it.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import re
from typing import Any

from configs.fields import ASK, POSITIVE, SHARE, YES, Check, Field, Fields, at_least, one_of

# The keys of STAGES and RS_STAGES in resnet.py.
DEPTHS = (18, 34, 50, 101, 152, 200)
RS_DEPTHS = (50, 101, 152, 200, 270, 350, 420)
# The keys of the table in layers.py.
ACTIVATIONS = ("relu", "leaky_relu", "elu", "gelu", "silu", "hard_swish")

COMMON: Fields = {
  "width": Field(1.0, "Multiplies the channels of the stem and of every stage.", "", POSITIVE),
  "stem": Field(
    "conv7",
    "Of resnet, before the pool: conv7, one 7x7 convolution | deep, three of 3x3 (ResNet-D, "
    "arXiv:1812.01187).",
    check=one_of("conv7", "deep"),
  ),
  "stem_pool": Field(
    "max",
    "Of resnet, the second halving: max, a 3x3 max-pool | conv, a 3x3 convolution (ResNet-RS).",
    check=one_of("max", "conv"),
  ),
  "pool_first": Field(
    False,
    "Of resnet, whether training takes the stem's max-pool before it normalises and activates, so "
    "that it does that to a quarter of the values: the same outputs, and gradients but where two "
    "values of a window round to one. It saves time on a TPU, most with accumulation_steps.",
    resume=ASK,
  ),
  "row_pairs": Field(
    False,
    "Of resnet, whether training computes the 7x7 convolution on pairs of rows, as one of 4x7 on "
    "6 channels with the same weights, which is half of a space to depth: the same outputs and "
    "gradients, in less time on a TPU. It needs an empty config.augment.",
    resume=ASK,
  ),
  "zeros_last": Field(
    False,
    "Whether the gradient of what a 1x1 convolution with a stride reads, as that of a projection, "
    "is computed for the pixels that it reads alone, and gets the zeros between them afterwards: "
    "the same gradients, in less time on a TPU.",
    resume=ASK,
  ),
  "preact": Field(False, "Blocks of norm, activation, convolution: ResNet v2 (arXiv:1603.05027)."),
  "stride_at": Field(
    "3x3",
    "Convolution of a bottleneck that strides: 3x3 (v1.5) | 1x1, the first one (v1).",
    check=one_of("3x3", "1x1"),
  ),
  "shortcut": Field(
    "conv",
    "Where the shape changes: conv, a 1x1 convolution (option B) | pool, the mean of 2x2 pixels "
    "before it (ResNet-D) | pad, zeros for new channels (option A).",
    check=one_of("conv", "pool", "pad"),
  ),
  "groups": Field(
    1, "Of the 3x3 convolution of a bottleneck: 32 in ResNeXt.", "groups", at_least(1)
  ),
  "base_width": Field(
    64,
    "Channels of each group in a stage of 64: 4 or 8 in ResNeXt, 128 in a wide ResNet.",
    "channels",
    at_least(1),
  ),
  "se_ratio": Field(
    0.0,
    "Channels of squeeze-and-excitation (arXiv:1709.01507) over those of the block, rounded to a "
    "multiple of 8: 0.0625 is the usual; 0 for none.",
    "",
    SHARE,
  ),
  "blurpool": Field(
    "none",
    "Blur before striding (BlurPool, arXiv:1904.11486): convs, before every convolution with "
    "stride and 16 input channels or more, as FFCV does | all, behind the max-pool too, as "
    "Composer does.",
    check=one_of("none", "convs", "all"),
  ),
  "activation": Field("relu", "Of stem and blocks.", check=one_of(*ACTIVATIONS)),
  "drop_path": Field(
    0.0,
    "Stochastic depth (arXiv:1603.09382): highest share of examples for which training skips the "
    "branch of a block.",
    "",
    SHARE,
    ASK,
  ),
  "drop_path_by": Field(
    "block",
    "How it grows: block, from 0 at the first block to model.drop_path at the last | stage, by "
    "stage s of S to (s + 1)/(S + 1) of it (ResNet-RS).",
    check=one_of("block", "stage"),
    resume=ASK,
  ),
  "dropout": Field(
    0.0, "Share of the features that training sets to 0 before the head.", "", SHARE, ASK
  ),
  "head_bias_init": Field(0.0, "First bias of the head: -log(num_classes) suits sigmoid losses."),
  "zero_init_residual": Field(
    True,
    "Whether each residual branch starts at 0: by the scale of its last BN (arXiv:1706.02677, "
    "5.1), or by its last kernel with model.preact.",
  ),
  "bn_momentum": Field(0.9, "Share of the old running average kept at each step.", "", SHARE),
  "bn_epsilon": Field(1e-5, "Added to the variance.", "", POSITIVE),
  "bn_unbiased": Field(
    False,
    "Whether the running variance averages n/(n - 1) times that of the n values of a batch, as "
    "torch's does.",
  ),
  "bn_shifted": Field(
    False,
    "Whether variances are computed from distances to the running mean. Without, they lose 0.2 % "
    "where a mean is 100 deviations and 13 % at 1,000, of which evaluations warn in the log.",
    resume=ASK,
  ),
  "bn_together": Field(
    False,
    "Whether barriers keep what training computes of a BN's sums in few operations, of which a TPU "
    "needs as long for a few numbers as for thousands. The same but for rounding.",
    resume=ASK,
  ),
  "bn_group": Field(
    "global",
    "Whose examples share BN statistics: global (the whole batch, or micro-batch) | device (each "
    "device its own: results depend on the number of devices) | a number of examples, as in '64' "
    "(the same numbers on any number of devices).",
    check=Check(
      "global, device or a number of examples",
      lambda v: re.fullmatch("global|device|[1-9][0-9]*", v) is not None,
    ),
  ),
  "scan": Field(
    False,
    "Whether the equal blocks of a stage are one block in a loop, which deep nets compile faster. "
    "Checkpoints are the same.",
    resume=YES,
  ),
  "remat": Field(
    "none",
    "What training computes anew in the backward pass, to save memory: none | convs, all but "
    "convolutions | blocks, all but the inputs of blocks.",
    check=one_of("none", "blocks", "convs"),
    resume=YES,
  ),
}


def depth_of(family: str, default: int, depths: Iterable[int]) -> Field:
  """Return the field of the depth of a family that has these depths."""
  words = f"one of {', '.join(map(str, depths))} ({family})"
  return Field(default, "Layers with weights.", "layers", Check(words, lambda v: v in depths))


def fields_of(depth: Field, **defaults: Any) -> Fields:
  """Return the fields of a family, by their names without "model.".

  All residual nets have the same, so that a config may change its `model.name` among them.

  Args:
    depth: the field of that name.
    defaults: where they differ from those of COMMON.
  """
  return {"depth": depth} | {
    name: dataclasses.replace(field, default=defaults.get(name, field.default))
    for name, field in COMMON.items()
  }


RESNET = fields_of(depth_of("resnet", 50, DEPTHS))
RESNET_RS = fields_of(
  depth_of("resnet_rs", 50, RS_DEPTHS),
  stem="deep",
  stem_pool="conv",
  shortcut="pool",
  se_ratio=0.25,
  drop_path_by="stage",
)
CIFAR_RESNET = fields_of(
  Field(
    20,
    "Layers with weights; n blocks in each stage.",
    "layers",
    Check("6n+2 (cifar_resnet: 8, 14, 20, 26, ...)", lambda v: v >= 8 and v % 6 == 2),
  )
)
CIFAR_RESNET_V2 = fields_of(
  Field(
    164,
    "Layers with weights; n bottlenecks in each stage.",
    "layers",
    Check("9n+2 (cifar_resnet_v2: 11, 20, 29, 38, ...)", lambda v: v >= 11 and v % 9 == 2),
  ),
  preact=True,
  stride_at="1x1",
  zero_init_residual=False,
)


def check_pool_first(fields: Mapping[str, Any]) -> None:
  """Refuse `pool_first` where there is no max-pool, or no norm and rising function before it.

  Raises:
    ValueError: one sentence that names the fields.
  """
  for name, allowed in (
    ("stem_pool", ("max",)),
    ("blurpool", ("none", "convs")),
    ("preact", (False,)),
    ("activation", ("relu", "leaky_relu", "elu")),
  ):
    if fields[name] not in allowed:
      raise ValueError(
        f"config.model.pool_first is True, and config.model.{name} is {fields[name]!r}; it needs "
        f"{' or '.join(map(repr, allowed))}: set config.model.pool_first to False."
      )
