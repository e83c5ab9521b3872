"""The fields of multiscale deep equilibrium models: what a config may set of them.

Nothing here imports JAX, so that help and refusals need not wait for it.
"""

from typing import NamedTuple

from configs.fields import ASK, POSITIVE, SHARE, Check, Field, Fields, at_least, one_of
from trainer.models.resnet_fields import COMMON


class Variant(NamedTuple):
  """A published net.

  Attributes:
    channels: of each resolution, the highest first.
    head: inner channels of the bottleneck that each resolution enters in the head.
    final: channels that are averaged over the image.
    halvings: of the image before the highest resolution.
    post_affine: whether the last norm of the function has scale and bias.
  """

  channels: tuple[int, ...]
  head: tuple[int, ...]
  final: int
  halvings: int
  post_affine: bool


# arXiv:2006.08656, as its public code builds them (locuslab/deq, MDEQ-Vision/experiments).
VARIANTS = {
  "tiny": Variant((24, 24), (8, 16), 200, 0, False),
  "large": Variant((32, 64, 128, 256), (14, 28, 56, 112), 1680, 0, False),
  "small": Variant((32, 64, 128, 256), (24, 48, 96, 192), 2048, 2, True),
  "small_reg": Variant((32, 64, 128, 256), (28, 56, 112, 224), 2048, 2, False),
}

_UP_TO_ONE = Check("in (0, 1]", lambda v: 0 < v <= 1)

MDEQ: Fields = {
  "variant": Field(
    "tiny",
    "Published net: tiny and large for images of 32 px; small and small_reg for ImageNet.",
    check=one_of(*VARIANTS),
  ),
  "width": Field(
    1.0, "Multiplies its channels; those of the function are rounded to 8.", "", POSITIVE
  ),
  "expansion": Field(
    5, "Channels inside a residual block over those around it.", "times", at_least(1)
  ),
  "weight_norm": Field(
    True, "Whether kernels of the residual blocks are a direction and a length (arXiv:1602.07868)."
  ),
  "solver": Field(
    "broyden",
    "Of the fixed point, and of the linear equation of its gradient: broyden | anderson.",
    check=one_of("broyden", "anderson"),
    resume=ASK,
  ),
  "stop": Field(
    "relative",
    "Whether an example is done: relative, once |f(z) - z| is below model.tolerance times |f(z)| | "
    "absolute, below model.tolerance | fixed, never: all iterations are computed, a loop of known "
    "length.",
    check=one_of("relative", "absolute", "fixed"),
    resume=ASK,
  ),
  "tolerance": Field(1e-3, "Of model.stop.", "", POSITIVE, ASK),
  "forward_iterations": Field(
    18, "Of the fixed point, at most; its best iterate is taken.", "iterations", at_least(1), ASK
  ),
  "backward_iterations": Field(20, "Likewise, of the gradient.", "iterations", at_least(1), ASK),
  "anderson_history": Field(6, "Iterates that anderson combines.", "iterates", at_least(1), ASK),
  "anderson_ridge": Field(
    1e-4, "Of its least squares, over the mean square of the residuals.", "", POSITIVE, ASK
  ),
  "anderson_damping": Field(
    1.0, "Share of f(z) in what it combines; the rest is z.", "", _UP_TO_ONE, ASK
  ),
  "gradient": Field(
    "implicit",
    "implicit, of the fixed point (arXiv:1909.01377) | phantom, through model.phantom_steps steps "
    "from there (arXiv:2111.05177).",
    check=one_of("implicit", "phantom"),
    resume=ASK,
  ),
  "phantom_steps": Field(
    1, "Of the phantom gradient; 1 is that of arXiv:2103.12803.", "steps", at_least(1), ASK
  ),
  "phantom_damping": Field(
    1.0, "Share of f(z) in each of these steps; the rest is z.", "", _UP_TO_ONE, ASK
  ),
  "unrolled_steps": Field(
    0,
    "Steps of the run, from its start, in which the function is applied model.unrolled_layers "
    "times and no equation is solved: they make the rest train.",
    "steps",
    at_least(0),
    ASK,
  ),
  "unrolled_layers": Field(10, "See model.unrolled_steps.", "layers", at_least(1), ASK),
  "jacobian_weight": Field(
    0.0,
    "Factor of the loss |v J|^2 per value of z, of random normal v (arXiv:2106.14342), which makes "
    "the fixed point easier to find; 0 for none.",
    "",
    at_least(0),
    ASK,
  ),
  "jacobian_share": Field(
    1.0, "Share of the steps that have this loss, drawn at random.", "", _UP_TO_ONE, ASK
  ),
  "jacobian_steps": Field(
    0, "Steps of the run after which none has it; 0 for no end.", "steps", at_least(0), ASK
  ),
  "dropout": Field(
    0.0,
    "Share of the channels of each branch that training sets to 0, the same in all iterations.",
    "",
    SHARE,
    ASK,
  ),
  **{
    name: COMMON[name]
    for name in (
      "bn_momentum",
      "bn_epsilon",
      "bn_unbiased",
      "bn_shifted",
      "bn_together",
      "bn_group",
    )
  },
}
