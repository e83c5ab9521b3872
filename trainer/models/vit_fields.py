"""The fields of Vision Transformers: what a config may set of them.

Nothing here imports JAX, so that help and refusals need not wait for it.
"""

from configs.fields import ASK, POSITIVE, SHARE, YES, Field, Fields, at_least, one_of

# Width, depth, heads: arXiv:2106.04560, table 2.
VARIANTS = {
  "Ti": (192, 12, 3),
  "S": (384, 12, 6),
  "M": (512, 12, 8),
  "B": (768, 12, 12),
  "L": (1024, 24, 16),
  "H": (1280, 32, 16),
}

VIT: Fields = {
  "variant": Field("B", "Width, depth and heads.", check=one_of(*VARIANTS)),
  "patch": Field(16, "Height and width of a patch.", "pixels", at_least(1)),
  "width": Field(
    0, "Of a token; 0 is that of the variant, here and below.", "channels", at_least(0)
  ),
  "depth": Field(0, "Number of blocks.", "blocks", at_least(0)),
  "heads": Field(0, "Of the attention; they divide the width.", "heads", at_least(0)),
  "mlp": Field(0, "Inside the MLP of a block; 0 is 4 times the width.", "channels", at_least(0)),
  "positions": Field(
    "learned",
    "Added to the patches: learned | sincos2d: fixed sines and cosines of both directions "
    "(arXiv:2104.02057, as in big_vision), no parameters.",
    check=one_of("learned", "sincos2d"),
  ),
  "pool": Field(
    "token",
    "What the head sees: token, a class token beside the patches | mean, of all patches.",
    check=one_of("token", "mean"),
  ),
  "token_position": Field(
    True,
    "Whether the class token has a learned position too, as in timm; not so in big_vision.",
  ),
  "pool_first": Field(
    False, "Whether the mean comes before the last norm (timm's fc_norm), not behind it."
  ),
  "pre_logits": Field(False, "Whether a dense layer and tanh come before the head."),
  "layer_scale": Field(
    0.0,
    "First value of a factor for each channel of each branch (arXiv:2103.17239); 0 for none.",
    "",
    at_least(0),
  ),
  "gelu": Field(
    "exact",
    "exact, by the error function, as in timm | tanh, its approximation, as in big_vision.",
    check=one_of("exact", "tanh"),
  ),
  "norm_epsilon": Field(1e-6, "Of layer norms, added to the variance.", "", POSITIVE),
  "dropout": Field(
    0.0,
    "Share set to 0 in training: of embedded tokens, and in each block behind the attention, in "
    "the MLP and behind it.",
    "",
    SHARE,
    ASK,
  ),
  "drop_path": Field(
    0.0,
    "Stochastic depth (arXiv:1603.09382): share of examples for which training skips a branch; "
    "it grows linearly from 0 at the first block to this at the last.",
    "",
    SHARE,
    ASK,
  ),
  "head_bias_init": Field(0.0, "First bias of the head: -log(num_classes) suits sigmoid losses."),
  "zero_init_head": Field(True, "Whether the kernel of the head starts at 0, as in big_vision."),
  "scan": Field(
    False,
    "Whether all blocks but the first are one block in a loop, which compiles faster. "
    "Checkpoints are the same.",
    resume=YES,
  ),
  "remat": Field(
    "none",
    "What training computes anew in the backward pass, to save memory: none | dots, all but "
    "products with parameters | blocks, all but the inputs of blocks.",
    check=one_of("none", "dots", "blocks"),
    resume=YES,
  ),
}
